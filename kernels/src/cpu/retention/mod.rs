//! Retention (RetNet).
