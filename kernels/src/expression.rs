//! Elementwise programs.
