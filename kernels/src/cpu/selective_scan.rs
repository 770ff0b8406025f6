//! The Mamba selective scan.
