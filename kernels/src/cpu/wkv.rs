//! The RWKV x051a operator.
