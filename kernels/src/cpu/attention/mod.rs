//! Causal softmax attention (FlashAttention, [arXiv:2205.14135](https://arxiv.org/abs/2205.14135)).
//!
//! `out_i = sum over j <= i of softmax_j(D^-1/2 q_i . k_j) v_j` for every sequence and head, with a block of queries
//! meeting one block of keys after the other: no `[time, time]` matrix exists, and the backward pass computes
//! probabilities again from the log-sum-exp of each row. Blocks above the diagonal are never touched.
//!
//! Blocks are 64 × 64, so that scores, a block of keys and a block of queries lie in the first two cache levels. A
//! pair of blocks costs two products forward and five backward; the vector work between them (exponential, masks,
//! dropout) is about a tenth of that. [`block`] says how the products are laid out.

pub(in crate::cpu) mod block;

mod backward;
mod decode;
mod forward;

pub use backward::backward;
pub use decode::decode;
pub use forward::forward;

use crate::cpu::simd::Simd;

/// Sizes of attention. Activations are `[batch * time, heads * head_dim]`; head `h` has the columns
/// `h * head_dim..(h + 1) * head_dim`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Sequences.
    pub batch: usize,
    /// Tokens of a sequence.
    pub time: usize,
    /// Heads.
    pub heads: usize,
    /// Columns of a head.
    pub head_dim: usize,
}

impl Dims {
    fn rows(&self) -> usize {
        self.batch * self.time
    }

    fn cols(&self) -> usize {
        self.heads * self.head_dim
    }

    fn pairs(&self) -> usize {
        self.batch * self.heads
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// Dropout of attention probabilities, after the softmax: each is 0 with probability `p`, else divided by `1 - p`.
/// The mask is a function of the key and the place, so the backward pass makes the same one again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability of 0, in `0..1`.
    pub p: f32,
    /// Chooses the mask; another one for every layer and step.
    pub key: [u32; 2],
}

/// A [`Dropout`] for one block of queries.
///
/// Probability `(b, h, i, j)` has the 64-bit counter `((b * heads + h) * time + i) << 32 | j`. Its random number is a
/// hash of three rounds ("triple32" of C. Wellons), of which the first depends on the column alone and is scalar.
#[derive(Clone, Copy)]
struct BlockDropout {
    key: [u32; 2],
    threshold: f32,
    scale: f32,
    first_row: u32,
}

const GOLDEN: u32 = 0x9e37_79b9;
const MIX: [u32; 3] = [0xed5a_d4bb, 0xac4c_1b51, 0x3184_8bab];

impl BlockDropout {
    /// `first_row` counts the score rows of all sequences and heads.
    fn new(dropout: Dropout, first_row: usize) -> Self {
        assert!((0.0..1.0).contains(&dropout.p), "dropout probability {} is not in [0, 1)", dropout.p);
        Self {
            key: dropout.key,
            threshold: (dropout.p * (1 << 24) as f32).round(),
            scale: 1.0 / (1.0 - dropout.p),
            first_row: first_row as u32,
        }
    }

    /// The keys of the rows from `lane` of the block on, for [`Self::factor`].
    #[inline(always)]
    fn rows<S: Simd>(&self, s: S, lane: usize) -> S::I {
        let row = s.add_i(s.iota(), s.splat_i(self.first_row.wrapping_add(lane as u32) as i32));
        s.add_i(s.mul_i(row, s.splat_i(GOLDEN as i32)), s.splat_i(self.key[1] as i32))
    }

    /// What to multiply the probabilities of a column with: 0 or `1 / (1 - p)`.
    #[inline(always)]
    fn factor<S: Simd>(&self, s: S, rows: S::I, column: usize) -> S::F {
        let x = (column as u32).wrapping_add(self.key[0]);
        let x = (x ^ (x >> 17)).wrapping_mul(MIX[0]);
        let x = s.add_i(s.splat_i((x ^ (x >> 11)) as i32), rows);
        let x = s.mul_i(x, s.splat_i(MIX[1] as i32));
        let x = s.mul_i(s.xor_i(x, s.shr::<15>(x)), s.splat_i(MIX[2] as i32));
        let x = s.xor_i(x, s.shr::<14>(x));
        let dropped = s.lt(s.to_float(s.shr::<8>(x)), s.splat(self.threshold));
        s.select(dropped, s.zero(), s.splat(self.scale))
    }
}
