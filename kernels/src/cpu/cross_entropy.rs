//! Softmax cross-entropy and accuracy.
