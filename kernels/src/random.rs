//! Counter-based random numbers: a number is a function of a key and a position, so any thread or device
//! can make any part of a sequence, in any order, with the same bits.
//!
//! Two generators, both of nothing but 32-bit operations:
//! - [`philox`], the Philox-4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011),
//!   behind [`Stream`], for initial parameters, shuffling and sampling;
//! - [`bits`], three multiplications for each number, for dropout masks ([`Keep`]), where the numbers are as
//!   many as the activations.

mod normal;

pub use normal::normals;

const MIX: [u32; 3] = [0xed5a_d4bb, 0xac4c_1b51, 0x3184_8bab];
const GOLDEN: u32 = 0x9e37_79b9;

/// Ten rounds of Philox-4x32: four random words for each counter.
#[inline(always)]
pub fn philox(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let ([mut k0, mut k1], [mut a, mut b, mut c, mut d]) = (key, counter);
    for _ in 0..10 {
        let p = u64::from(a) * 0xd251_1f53;
        let q = u64::from(c) * 0xcd9e_8d57;
        (a, b, c, d) = ((q >> 32) as u32 ^ b ^ k0, q as u32, (p >> 32) as u32 ^ d ^ k1, p as u32);
        k0 = k0.wrapping_add(GOLDEN);
        k1 = k1.wrapping_add(0xbb67_ae85);
    }
    [a, b, c, d]
}

/// The key for the counters whose high half is `high`: [`bits`] of the low half under it are those of the
/// whole counter. Vector code calls it once per 2^32 numbers.
#[inline(always)]
pub fn key_at(key: [u32; 2], high: u32) -> [u32; 2] {
    [key[0], key[1].wrapping_add(high.wrapping_mul(GOLDEN))]
}

/// A random word for each counter: the `triple32` hash of C. Wellons, with half of the key added before the
/// first round and half after it, so that two keys give unrelated sequences, not shifts of one.
#[inline(always)]
pub fn bits(key: [u32; 2], counter: u64) -> u32 {
    let [k0, k1] = key_at(key, (counter >> 32) as u32);
    let mut x = (counter as u32).wrapping_add(k0);
    x = (x ^ (x >> 17)).wrapping_mul(MIX[0]);
    x = (x ^ (x >> 11)).wrapping_add(k1).wrapping_mul(MIX[1]);
    x = (x ^ (x >> 15)).wrapping_mul(MIX[2]);
    x ^ (x >> 14)
}

/// A dropout mask: 0 with probability `p`, else `1 / (1 - p)`, at each counter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Keep {
    /// Key of [`bits`].
    pub key: [u32; 2],
    /// Kept where `bits >= threshold`; its low eight bits are 0, so comparing the high 24 is enough.
    pub threshold: u32,
    /// `1 / (1 - p)`
    pub scale: f32,
}

impl Keep {
    /// The mask of dropout layer `site` in training step `step`.
    ///
    /// # Panics
    /// If `p` is not in `[0, 1)`.
    pub fn new(seed: u64, step: u64, site: u32, p: f32) -> Self {
        assert!((0.0..1.0).contains(&p), "dropout probability {p} is not in [0, 1)");
        let [k0, k1, ..] = philox(halves(seed), [step as u32, (step >> 32) as u32, site, 0x6d61_736b]);
        let threshold = ((f64::from(p) * f64::from(1 << 24)).round() as u32).min((1 << 24) - 1) << 8;
        Self { key: [k0, k1], threshold, scale: 1.0 / (1.0 - p) }
    }

    /// The mask's value at a counter.
    pub fn at(&self, counter: u64) -> f32 {
        if bits(self.key, counter) >= self.threshold { self.scale } else { 0.0 }
    }

    /// The constants of the vector form: the multipliers of [`bits`].
    pub(crate) const MIX: [u32; 3] = MIX;
}

#[inline(always)]
fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

/// A sequence of random numbers. Streams of one seed are independent of each other.
#[derive(Clone, Debug)]
pub struct Stream {
    key: [u32; 2],
    stream: u64,
    block: u64,
    words: [u32; 4],
    left: usize,
    spare: Option<f32>,
}

impl Stream {
    /// Stream number `stream` of `seed`.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self { key: halves(seed), stream, block: 0, words: [0; 4], left: 0, spare: None }
    }

    /// The stream behind its first `words` words of 32 bits, a multiple of four.
    ///
    /// # Panics
    /// If it is no multiple of four.
    pub fn behind(seed: u64, stream: u64, words: usize) -> Self {
        assert!(words.is_multiple_of(4), "words come in blocks of four");
        Self { block: words as u64 / 4, ..Self::new(seed, stream) }
    }

    /// 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.left == 0 {
            let ([b0, b1], [s0, s1]) = (halves(self.block), halves(self.stream));
            self.words = philox(self.key, [b0, b1, s0, s1]);
            self.block += 1;
            self.left = 4;
        }
        self.left -= 1;
        self.words[3 - self.left]
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        u64::from(self.next_u32()) | u64::from(self.next_u32()) << 32
    }

    /// Uniform in `[0, 1)`, a multiple of 2^-24.
    pub fn uniform(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 / (1 << 24) as f32
    }

    /// Normal with mean 0 and variance 1 (Box-Muller in double precision).
    pub fn normal(&mut self) -> f32 {
        if let Some(x) = self.spare.take() {
            return x;
        }
        let [first, second] = normal::pair(std::array::from_fn(|_| self.next_u32()));
        self.spare = Some(second);
        first
    }

    /// Uniform in `0 .. n`, without bias (Lemire 2019).
    ///
    /// # Panics
    /// If `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "no number is below 0");
        let n = n as u64;
        loop {
            let product = u128::from(self.next_u64()) * u128::from(n);
            // of the 2^64 words, the first 2^64 mod n of each bucket are refused
            if product as u64 >= n.wrapping_neg() % n {
                return (product >> 64) as usize;
            }
        }
    }

    /// Brings `items` into random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_vectors() {
        assert_eq!(philox([0; 2], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([!0; 2], [!0; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0xa409_3822, 0x299f_31d0], [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    fn correlation(pairs: impl Iterator<Item = (f64, f64)>) -> f64 {
        let (mut n, mut a, mut b, mut aa, mut bb, mut ab) = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0);
        for (x, y) in pairs {
            (n, a, b, aa, bb, ab) = (n + 1.0, a + x, b + y, aa + x * x, bb + y * y, ab + x * y);
        }
        (ab / n - a / n * b / n) / ((aa / n - (a / n).powi(2)) * (bb / n - (b / n).powi(2))).sqrt()
    }

    #[test]
    fn hash_is_uniform_and_uncorrelated() {
        const N: u64 = 1 << 20;
        let limit = 4.5 / (N as f64).sqrt(); // 4.5 standard deviations
        let unit = |key, i| f64::from(bits(key, i)) / 4_294_967_296.0;
        for key in [[0, 0], [1, 0], [0, 1], [0xdead_beef, 0x1234_5678]] {
            let mean = (0..N).map(|i| unit(key, i)).sum::<f64>() / N as f64;
            assert!((mean - 0.5).abs() < limit * (1.0f64 / 12.0).sqrt(), "mean {mean}");
            let variance = (0..N).map(|i| (unit(key, i) - 0.5).powi(2)).sum::<f64>() / N as f64;
            assert!((variance - 1.0 / 12.0).abs() < limit * 0.0746, "variance {variance}");
            for lag in [1, 2, 3, 16, 64, 1000, 1024, 65536, 1 << 32] {
                let c = correlation((0..N).map(|i| (unit(key, i), unit(key, i + lag))));
                assert!(c.abs() < limit, "lag {lag}: {c}");
            }
            for other in [[key[0] ^ 1, key[1]], [key[0], key[1] ^ 1], [key[0] ^ 1 << 31, key[1]], [key[1], key[0] ^ 7]]
            {
                if other != key {
                    let c = correlation((0..N).map(|i| (unit(key, i), unit(other, i))));
                    assert!(c.abs() < limit, "keys {key:?} {other:?}: {c}");
                }
            }
            // every bit is set half of the time, and flips half of the time from one counter to the next
            for bit in 0..32 {
                let ones = (0..N).filter(|&i| bits(key, i) >> bit & 1 == 1).count() as f64 / N as f64;
                let flips =
                    (0..N).filter(|&i| (bits(key, i) ^ bits(key, i + 1)) >> bit & 1 == 1).count() as f64 / N as f64;
                assert!((ones - 0.5).abs() < limit / 2.0 && (flips - 0.5).abs() < limit / 2.0, "bit {bit}");
            }
            // chi-square of the high and of the low byte, 255 degrees of freedom
            for shift in [0, 24] {
                let mut counts = [0f64; 256];
                (0..N).for_each(|i| counts[(bits(key, i) >> shift & 255) as usize] += 1.0);
                let expected = N as f64 / 256.0;
                let chi: f64 = counts.iter().map(|c| (c - expected).powi(2) / expected).sum();
                assert!((160.0..370.0).contains(&chi), "chi-square {chi}");
            }
        }
    }

    #[test]
    fn masks_keep_the_right_share_and_differ() {
        for p in [0.0, 0.1, 0.5, 0.9] {
            let n = 1 << 18;
            let masks: Vec<Keep> = [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0)]
                .map(|(seed, step, site)| Keep::new(seed, step, site, p))
                .to_vec();
            for mask in &masks {
                let mean = (0..n).map(|i| f64::from(mask.at(i))).sum::<f64>() / n as f64;
                assert!(
                    (mean - 1.0).abs() < 4.5 * (f64::from(p) / f64::from(1.0 - p) / n as f64).sqrt() + 1e-6,
                    "{p}: {mean}"
                );
            }
            if p > 0.0 {
                for (i, a) in masks.iter().enumerate() {
                    for b in &masks[..i] {
                        let c = correlation((0..n).map(|i| (f64::from(a.at(i)), f64::from(b.at(i)))));
                        assert!(c.abs() < 4.5 / (n as f64).sqrt(), "{c}");
                    }
                }
            }
        }
    }

    #[test]
    fn streams_have_the_right_moments() {
        let mut s = Stream::new(7, 3);
        let n = 1 << 19;
        let moments = |draw: &mut dyn FnMut() -> f32| {
            let mut m = [0.0f64; 4];
            for _ in 0..n {
                let x = f64::from(draw());
                (0..4).for_each(|k| m[k] += x.powi(k as i32 + 1) / f64::from(n));
            }
            m
        };
        let normal = moments(&mut || s.normal());
        for (got, want, deviation) in
            [(normal[0], 0.0f64, 1.0), (normal[1], 1.0, 1.42), (normal[2], 0.0, 3.9), (normal[3], 3.0, 9.8)]
        {
            assert!((got - want).abs() < 4.5 * deviation / f64::from(n).sqrt(), "{got} {want}");
        }
        let uniform = moments(&mut || s.uniform());
        assert!((uniform[0] - 0.5).abs() < 0.002 && (uniform[1] - 1.0 / 3.0).abs() < 0.002);
    }

    #[test]
    fn below_and_shuffle_are_fair_and_repeatable() {
        let mut s = Stream::new(1, 0);
        let mut counts = [0; 7];
        (0..70_000).for_each(|_| counts[s.below(7)] += 1);
        assert!(counts.iter().all(|&c: &i32| (c - 10_000).abs() < 450), "{counts:?}");
        let shuffled = |stream| {
            let mut items: Vec<u32> = (0..100).collect();
            Stream::new(1, stream).shuffle(&mut items);
            items
        };
        assert_eq!(shuffled(5), shuffled(5));
        assert_ne!(shuffled(5), shuffled(6));
        let mut sorted = shuffled(5);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
    }
}
