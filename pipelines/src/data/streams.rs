//! Which random numbers a row of a batch is made of.

use dataflow_kernels::random::Stream;

use super::batch::{Draw, Purpose, Split};

/// The random numbers of one row: a function of seed, draw and row and of nothing that happened before.
pub(crate) fn row_stream(seed: u64, draw: Draw, row: usize) -> Stream {
    // Each combination of split and purpose is a domain, whose draws have nothing to do with the others'.
    let domain = match (draw.split, draw.purpose) {
        (Split::Train, Purpose::Training) => 1,
        (Split::Train, Purpose::Evaluation) => 2,
        (Split::Validation, Purpose::Training) => 3,
        (Split::Validation, Purpose::Evaluation) => 4,
    };
    Stream::new(scramble(scramble(seed ^ scramble(domain)) ^ draw.step), row as u64)
}

/// The finalizer of SplitMix64: a bijection that spreads neighbouring numbers over all 64 bits. For one
/// seed and domain, no two steps share a stream.
fn scramble(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
