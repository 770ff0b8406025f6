//! Vector forms of exp, log, sigmoid and their like.
