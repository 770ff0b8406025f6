//! RMS, layer and group normalisation. Device side: `kernels/cuda/norm.cu`; formulas in [`cpu::norm`](crate::cpu::norm).

use super::call::{Call, Calls, Tensor};
use super::partials;
use super::source::real;
use crate::cpu::norm::{Kind, Norm};
use crate::device::{DType, KernelError};

/// Most columns of a group.
const MAX_WIDTH: usize = 32 * 1024;
/// Most blocks of rows of the backward pass: each leaves sums over its rows.
const ROW_BLOCKS: usize = 264;

/// How a group of columns is handed to threads.
#[derive(Clone, Copy)]
struct Teams {
    width: usize,
    vector: usize,
    team: usize,
    block: usize,
}

impl Teams {
    fn new(norm: Norm, cols: usize, tensors: &[Tensor]) -> Result<Self, KernelError> {
        let width = cols / norm.groups.max(1);
        if width == 0 || width > MAX_WIDTH || width * norm.groups != cols {
            return Err(KernelError(format!("a CUDA norm takes groups of 1 to {MAX_WIDTH} columns, found {width}")));
        }
        let fits = |n: usize| width.is_multiple_of(n) && tensors.iter().all(|t| t.vector(n) == n);
        let vector = [4, 2, 1].into_iter().find(|&n| fits(n)).unwrap_or(1);
        // up to 32 elements of a thread in registers
        let team = match width {
            ..=1024 => width.div_ceil(vector).next_power_of_two().min(32),
            _ => (width.div_ceil(8 * vector) * vector).next_power_of_two().clamp(64, 1024),
        };
        Ok(Self { width, vector, team, block: team.max(256) })
    }

    fn call(&self, norm: Norm, entry: &'static str, x: Tensor) -> Call {
        real(Call::file("norm", entry), x)
            .define("WIDTH", self.width)
            .define("TEAM", if self.block > 256 || self.team > 32 { self.block } else { self.team })
            .define("VECTOR", self.vector)
            .define("LAYER", u8::from(norm.kind == Kind::Layer))
            .block(self.block)
    }

    /// Rows that a block has at once.
    fn rows(&self) -> usize {
        if self.team > 32 { 1 } else { self.block / self.team }
    }
}

/// As [`cpu::norm::forward`](crate::cpu::norm::forward); `residual` is the tensor that is added and the one that receives
/// the sum.
///
/// # Errors
/// If a group is wider than a block can hold, and as [`Calls::launch`].
#[allow(clippy::too_many_arguments)] // the tensors of the launch
pub fn forward(
    c: &mut Calls<'_>,
    norm: Norm,
    x: Tensor,
    residual: Option<(Tensor, Tensor)>,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    y: Tensor,
    statistics: Tensor,
) -> Result<(), KernelError> {
    let (added, sum) = residual.unzip();
    let tensors: Vec<Tensor> = [Some(x), Some(y), added, sum, weight, bias].into_iter().flatten().collect();
    let teams = Teams::new(norm, x.cols, &tensors)?;
    let call = teams.call(norm, "norm_forward", x).grid3(x.rows.div_ceil(teams.rows()), norm.groups, 1);
    let call = call.rows(x).rows_or_null(added).rows_or_null(sum).pointer_or_null(weight).pointer_or_null(bias);
    c.launch(call.rows(y).pointer(statistics).arg(norm.eps))
}

/// As [`cpu::norm::backward`](crate::cpu::norm::backward).
///
/// # Errors
/// As [`forward`].
#[allow(clippy::too_many_arguments)] // the tensors of the launch
pub fn backward(
    c: &mut Calls<'_>,
    norm: Norm,
    x: Tensor,
    statistics: Tensor,
    weight: Option<Tensor>,
    dy: Tensor,
    dh: Option<Tensor>,
    dx: Tensor,
    dweight: Option<Tensor>,
    dbias: Option<Tensor>,
) -> Result<(), KernelError> {
    let tensors: Vec<Tensor> = [Some(x), Some(dy), Some(dx), dh, weight].into_iter().flatten().collect();
    let teams = Teams::new(norm, x.cols, &tensors)?;
    let blocks = x.rows.div_ceil(teams.rows()).min(ROW_BLOCKS.div_ceil(norm.groups).max(32));
    let partials = c.scratch(blocks.max(1), 2 * x.cols, DType::F32);
    let call = teams.call(norm, "norm_backward", x).grid3(blocks, norm.groups, 1).shared(8 * teams.width);
    let call = call.rows(x).pointer(statistics).pointer_or_null(weight).rows(dy).rows_or_null(dh).rows(dx);
    let call = call.pointer(partials).arg(i32::from(dweight.is_some())).arg(i32::from(dbias.is_some()));
    c.launch(call)?;
    // without rows there are no partial sums to read
    let partials = if blocks == 0 { partials.slice_rows(0, 0) } else { partials };
    dweight.map_or(Ok(()), |out| partials::sum(c, partials, 0, out))?;
    dbias.map_or(Ok(()), |out| partials::sum(c, partials, x.cols, out))
}
