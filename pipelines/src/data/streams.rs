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

/// Where the `place`-th of `count` goes in an order of an epoch's own: a bijection of `0..count`, found without a table
/// of it. A Feistel network permutes the numbers of an even number of bits, and is walked until it lands below `count`
/// (Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
pub(crate) fn epoch_permutation(seed: u64, epoch: u64, count: u64, place: u64) -> u64 {
    // domains 1 to 4 are those of rows
    let key = scramble(scramble(seed ^ scramble(5)) ^ epoch);
    let half = (64 - count.saturating_sub(1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1 << half) - 1;
    let mut number = place;
    loop {
        let (mut left, mut right) = (number >> half, number & mask);
        for round in 0..4 {
            (left, right) = (right, left ^ (scramble(key ^ scramble(right ^ (round << 40))) & mask));
        }
        number = left << half | right;
        if number < count {
            return number;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::epoch_permutation;

    #[test]
    fn every_count_is_permuted() {
        for count in [1, 2, 3, 4, 5, 16, 17, 100, 1023, 1024, 1025] {
            let mut seen = vec![false; count as usize];
            (0..count).for_each(|place| seen[epoch_permutation(7, 3, count, place) as usize] = true);
            assert!(seen.iter().all(|&seen| seen), "{count}");
        }
        let order = |epoch| (0..1000).map(|place| epoch_permutation(7, epoch, 1000, place)).collect::<Vec<u64>>();
        let fixed = order(0).iter().enumerate().filter(|&(place, to)| place as u64 == *to).count();
        assert!(fixed < 10, "{fixed}");
        assert_ne!(order(0), order(1));
    }
}
