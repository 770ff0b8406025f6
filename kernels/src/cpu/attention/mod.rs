//! Causal softmax attention (FlashAttention, [arXiv:2205.14135](https://arxiv.org/abs/2205.14135)).
//!
//! `out_i = sum over j <= i of softmax_j(D^-1/2 q_i . k_j) v_j` for every sequence and head, with a block of queries
//! meeting one block of keys after the other: no `[time, time]` matrix exists, and the backward pass computes
//! probabilities again from the log-sum-exp of each row. Blocks above the diagonal are never touched.
//!
//! Blocks are 64 × 64, so that scores, a block of keys and a block of queries lie in the first two cache levels. A
//! pair of blocks costs two products forward and five backward; the vector work between them (exponential, masks,
//! dropout) is about a tenth of that. `block.rs` says how the products are laid out.

pub(in crate::cpu) mod block;

mod backward;
mod decode;
mod extend;
mod forward;

pub use backward::backward;
pub use block::Factors;
pub use decode::decode;
pub use extend::extend;
pub use forward::forward;

use crate::cpu::simd::Simd;
use crate::random::{Keep, key_at};

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

/// The dropout mask for one block of queries: [`Keep::at`] the counter `row << 32 | column`, where `row` is
/// `(b * heads + h) * time + i`.
#[derive(Clone, Copy)]
struct BlockDropout {
    keep: Keep,
    first_row: u32,
}

impl BlockDropout {
    fn new(keep: Keep, first_row: usize) -> Self {
        Self { keep, first_row: first_row as u32 }
    }

    /// The second half of [`random::key_at`](crate::random::key_at) for the rows from `lane` of the block on.
    #[inline(always)]
    fn rows<S: Simd>(&self, s: S, lane: usize) -> S::I {
        let step = key_at([0, 0], 1)[1];
        let first = key_at(self.keep.key, self.first_row.wrapping_add(lane as u32))[1];
        s.add_i(s.mul_i(s.iota(), s.splat_i(step as i32)), s.splat_i(first as i32))
    }

    /// What to multiply the probabilities of a column with: 0 or `1 / (1 - p)`.
    ///
    /// This is [`random::bits`](crate::random::bits), of which the first round depends on the column alone.
    #[inline(always)]
    fn factor<S: Simd>(&self, s: S, rows: S::I, column: usize) -> S::F {
        let [first, second, third] = Keep::MIX;
        let x = (column as u32).wrapping_add(self.keep.key[0]);
        let x = (x ^ (x >> 17)).wrapping_mul(first);
        let x = s.add_i(s.splat_i((x ^ (x >> 11)) as i32), rows);
        let x = s.mul_i(x, s.splat_i(second as i32));
        let x = s.mul_i(s.xor_i(x, s.shr::<15>(x)), s.splat_i(third as i32));
        let x = s.xor_i(x, s.shr::<14>(x));
        let dropped = s.lt(s.to_float(s.shr::<8>(x)), s.splat((self.keep.threshold >> 8) as f32));
        s.select(dropped, s.zero(), s.splat(self.keep.scale))
    }
}
