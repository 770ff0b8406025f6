//! Rotary position embedding. Device side: `kernels/cuda/rotary.cu`; formulas in [`cpu::rotary`](crate::cpu::rotary).

use super::call::{Call, Calls, Tensor};
use super::source::real;
use crate::cpu::rotary::{Direction, Pairing};
use crate::device::KernelError;

/// A rotation without its tables: the device computes angles itself.
#[derive(Clone, Copy, Debug)]
pub struct Rotation {
    /// Which channels form a pair.
    pub pairing: Pairing,
    /// Base of the frequencies.
    pub base: f64,
    /// Channels of a head.
    pub head_dim: usize,
    /// A factor on the result; 1 for none.
    pub scale: f32,
}

/// As [`cpu::rotary::rotate`](crate::cpu::rotary::rotate) for sequences of `time` rows; `y` may be the memory of `x`. Positions
/// count from `position` (`i32[1]`), or from 0.
///
/// # Errors
/// As [`Calls::launch`].
pub fn rotate(
    c: &mut Calls<'_>,
    rotation: Rotation,
    direction: Direction,
    time: usize,
    position: Option<Tensor>,
    x: Tensor,
    y: Tensor,
) -> Result<(), KernelError> {
    let Rotation { pairing, base, head_dim, scale } = rotation;
    let pairs = time * head_dim / 2;
    let batch = x.rows / time.max(1);
    // enough blocks for a large device, but few, so that an angle serves many heads
    let groups = 1024usize.div_ceil(pairs.div_ceil(256).max(1)).clamp(1, batch.max(1));
    let sequences = batch.div_ceil(groups).max(1);
    let call = real(Call::file("rotary", "rotate"), x)
        .define("INTERLEAVED", u8::from(pairing == Pairing::Interleaved))
        .grid3(pairs.div_ceil(256), batch.div_ceil(sequences), 1)
        .rows(x)
        .rows(y);
    let [time, heads, dim, sequences] = [time, x.cols / head_dim.max(1), head_dim, sequences].map(|n| n as i32);
    let call = call.arg(time).arg(heads).arg(dim).arg(base.log2()).arg(scale);
    c.launch(call.arg(i32::from(direction == Direction::Backward)).arg(sequences).pointer_or_null(position))
}
