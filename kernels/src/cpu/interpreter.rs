//! Runs fused elementwise programs over L1-sized tiles.
