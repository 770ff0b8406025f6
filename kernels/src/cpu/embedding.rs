//! Row lookup and its gradient.
