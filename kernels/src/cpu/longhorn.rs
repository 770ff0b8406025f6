//! The Longhorn online update.
