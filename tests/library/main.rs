//! The package as a library, in one program, because linking it takes longer than running the tests.

mod generation;
mod mutations;
mod serve;
mod verify;
