//! An elementwise op: an expression, and nothing else.

use dataflow::graph::format::number::Real;
use dataflow::graph::op::Op;
use dataflow::kernels::expression::Program;
use serde::{Deserialize, Serialize};

/// `max(x, 0) + slope min(x, 0)` (Maas et al., 2013).
///
/// The fields of the struct are the attributes of a row: `LeakyRelu(slope: 0.2)`, or `LeakyRelu` for the default. With
/// `deny_unknown_fields` a misspelt one is an error that names the right ones, with line and column. The type [`Real`]
/// accepts a number or an expression over the model's `config`: `LeakyRelu(slope: "1 / n_layer")`; sizes are `Size`,
/// switches are `Flag`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeakyRelu {
    #[serde(default = "default_slope")]
    slope: Real,
}

fn default_slope() -> Real {
    Real(0.01)
}

impl Op for LeakyRelu {
    /// What the op computes of an element, as a program of a few instructions. The builder `b` has the usual functions;
    /// `x` holds the inputs.
    fn expression(&self, _inputs: usize) -> Option<Program> {
        Some(Program::new(1, |b, x| {
            let zero = b.constant(0.0);
            let positive = b.max(x[0], zero);
            let negative = b.min(x[0], zero);
            let leak = b.scale(negative, self.slope.0 as f32);
            vec![b.add(positive, leak)]
        }))
    }

    /// Kernels that come from expressions take tensors with gaps between their rows, such as the parts of a split: the
    /// compiler need not copy them.
    fn strided(&self) -> bool {
        true
    }
}
