//! Shift by one position in time.
