//! Generation from a trained model: text goes in and comes out token by token, at constant cost where the architecture
//! has a state of constant size.
//!
//! * [`pool`]: programs that continue sequences, whose states lie in the slots of one pool.
//! * [`sampling`]: from logits to a token.
//! * [`stops`]: text that ends a completion.
//! * [`open`]: all of it from a run folder.
//! * [`vocabulary`]: from text to tokens and back, as tokens come.

pub mod open;
pub mod pool;
pub mod sampling;
pub mod stops;
pub mod vocabulary;
