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
    /// Probability of 0.
    pub p: f32,
    /// Chooses the mask; another one for every layer and step.
    pub key: [u32; 2],
}

/// A [`Dropout`] for one block of queries; `row` counts the score rows of all sequences and heads.
#[derive(Clone, Copy)]
struct BlockDropout {
    dropout: Dropout,
    first_row: u32,
}

impl BlockDropout {
    fn new(dropout: Dropout, first_row: usize) -> Self {
        Self { dropout, first_row: first_row as u32 }
    }

    /// For the rows from `lane` of the block on, a value that [`Self::factor`] takes.
    #[inline(always)]
    fn rows<S: Simd>(&self, s: S, lane: usize) -> S::I {
        let first = self.first_row.wrapping_add(lane as u32);
        mix(s, s.xor_i(s.add_i(s.iota(), s.splat_i(first as i32)), s.splat_i(self.dropout.key[0] as i32)))
    }

    /// What to multiply the probabilities of a column with: 0 or `1 / (1 - p)`.
    #[inline(always)]
    fn factor<S: Simd>(&self, s: S, rows: S::I, column: usize) -> S::F {
        let column = (column as u32).wrapping_mul(0x9e37_79b9).wrapping_add(self.dropout.key[1]);
        let random = s.shr::<8>(mix(s, s.xor_i(rows, s.splat_i(column as i32))));
        let dropped = s.lt(s.to_float(random), s.splat(self.dropout.p * (1u32 << 24) as f32));
        s.select(dropped, s.zero(), s.splat(1.0 / (1.0 - self.dropout.p)))
    }
}

/// A bijection of 32-bit integers in which every input bit moves about half of the output bits
/// ("lowbias32" with the constants of TheIronBorn).
#[inline(always)]
fn mix<S: Simd>(s: S, x: S::I) -> S::I {
    let x = s.mul_i(s.xor_i(x, s.shr::<16>(x)), s.splat_i(0x21f0_aaad));
    let x = s.mul_i(s.xor_i(x, s.shr::<15>(x)), s.splat_i(0x735a_2d97));
    s.xor_i(x, s.shr::<15>(x))
}
