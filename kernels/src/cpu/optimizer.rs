//! AdamW and gradient clipping.
