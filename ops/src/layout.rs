//! Ops that move data: splitting and joining the last dimension, and trained tensors as values of their own.

use std::ops::RangeInclusive;

use dataflow_graph::format::number::Size;
use dataflow_graph::gradient::Gradient;
use dataflow_graph::initializer::Initializer;
use dataflow_graph::op::{Activations, NodeView, Op, OpError, Parameter, View};
use dataflow_graph::registry::{Info, Registry};
use dataflow_graph::types::TensorType;
use dataflow_kernels::cpu::reduce::copy_rows;
use dataflow_kernels::cuda;
use dataflow_kernels::device::{Kernel, Target};
use serde::{Deserialize, Serialize};

/// Parts of the last dimension: `into` equal ones, or ones of the given `sizes`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Split {
    #[serde(default)]
    into: Option<Size>,
    #[serde(default)]
    sizes: Option<Vec<Size>>,
}

impl Split {
    fn widths(&self, cols: usize) -> Result<Vec<usize>, OpError> {
        match (&self.into, &self.sizes) {
            (Some(into), None) if **into > 0 && cols.is_multiple_of(**into) => Ok(vec![cols / **into; **into]),
            (Some(into), None) => Err(format!("{cols} columns do not split into {into} equal parts").into()),
            (None, Some(sizes)) => {
                let widths: Vec<usize> = sizes.iter().map(|s| **s).collect();
                match widths.iter().sum::<usize>() == cols {
                    true => Ok(widths),
                    false => Err(format!("the sizes {widths:?} do not add up to {cols} columns").into()),
                }
            }
            _ => Err("give either `into` or `sizes`".into()),
        }
    }
}

/// The first column of each part.
fn starts(widths: &[usize]) -> Vec<usize> {
    widths.iter().scan(0, |at, w| Some(std::mem::replace(at, *at + w))).collect()
}

impl Op for Split {
    fn tokenwise(&self) -> bool {
        true
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(self.widths(inputs[0].cols())?.into_iter().map(|w| inputs[0].with_cols(w)).collect())
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let parts = self.widths(g.type_of(g.input(0)).cols())?.len();
        let parts = (0..parts).map(|o| g.output_gradient_or_zeros(o)).collect::<Result<Vec<_>, _>>()?;
        let dx = g.emit(Concat {}, &parts)?[0];
        g.set(0, dx)
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let starts = starts(&self.widths(node.inputs[0].cols())?);
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| {
                let mut parts = starts.iter().enumerate();
                parts.try_for_each(|(o, &start)| {
                    let y = c.output(o);
                    cuda::layout::copy_rows(c, c.input(0).slice_cols(start, start + y.cols), y)
                })
            })),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let x = a.rows::<f32>(0);
                for (o, &start) in starts.iter().enumerate() {
                    let y = a.rows_mut::<f32>(o);
                    copy_rows(x.slice_cols(start, start + y.cols()), y);
                }
                Ok(())
            })),
        }
    }
    fn view(&self, inputs: &[TensorType]) -> Option<View> {
        Some(View::Columns(starts(&self.widths(inputs[0].cols()).ok()?)))
    }
    fn activations(&self, _: usize) -> Activations {
        let parts = self.into.as_ref().map(|n| **n).or(self.sizes.as_ref().map(Vec::len));
        Activations::new([0], 0..parts.unwrap_or(0))
    }
    fn strided(&self) -> bool {
        true
    }
}

/// Tensors side by side in the last dimension.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Concat {}

impl Op for Concat {
    fn tokenwise(&self) -> bool {
        true
    }
    fn arity(&self) -> RangeInclusive<usize> {
        1..=64
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        let all_but_last = |t: &TensorType| t.shape[..t.shape.len().saturating_sub(1)].to_vec();
        if inputs.iter().any(|t| t.shape.is_empty() || all_but_last(t) != all_but_last(&inputs[0])) {
            return Err("the inputs differ in more than the last dimension".into());
        }
        Ok(vec![inputs[0].with_cols(inputs.iter().map(TensorType::cols).sum())])
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let Some(dy) = g.output_gradient(0) else { return Ok(()) };
        let sizes = (0..g.inputs()).map(|i| Size(g.type_of(g.input(i)).cols())).collect();
        let parts = g.emit(Split { into: None, sizes: Some(sizes) }, &[dy])?;
        parts
            .into_iter()
            .enumerate()
            .filter(|(i, _)| g.wants(*i))
            .collect::<Vec<_>>()
            .into_iter()
            .try_for_each(|(i, p)| g.set(i, p))
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let starts = starts(&node.inputs.iter().map(TensorType::cols).collect::<Vec<_>>());
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| {
                let mut parts = starts.iter().enumerate();
                parts.try_for_each(|(i, &start)| {
                    let x = c.input(i);
                    cuda::layout::copy_rows(c, x, c.output(0).slice_cols(start, start + x.cols))
                })
            })),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let mut y = a.rows_mut::<f32>(0);
                for (i, &start) in starts.iter().enumerate() {
                    let x = a.rows::<f32>(i);
                    copy_rows(x, y.slice_cols(start, start + x.cols()));
                }
                Ok(())
            })),
        }
    }
    fn view(&self, inputs: &[TensorType]) -> Option<View> {
        Some(View::Gather(starts(&inputs.iter().map(TensorType::cols).collect::<Vec<_>>())))
    }
    fn activations(&self, inputs: usize) -> Activations {
        Activations::new(0..inputs, [0])
    }
    fn strided(&self) -> bool {
        true
    }
}

/// A trained tensor as a value of its own, for ops that take it as an input. The parameter has the row's name.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Weight {
    shape: Vec<Size>,
    init: Initializer,
}

impl Op for Weight {
    fn tokenwise(&self) -> bool {
        true
    }
    fn arity(&self) -> RangeInclusive<usize> {
        0..=0
    }
    fn infer(&self, _: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(vec![TensorType::f32(self.shape.iter().map(|s| **s).collect::<Vec<_>>())])
    }
    fn parameters(&self, _: &[TensorType]) -> Result<Vec<Parameter>, OpError> {
        let shape: Vec<usize> = self.shape.iter().map(|s| **s).collect();
        Ok(vec![Parameter::new("", shape, self.init.clone())])
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        match g.output_gradient(0) {
            Some(dy) => g.set(0, dy),
            None => Ok(()),
        }
    }
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        match target {
            Target::Cuda => Ok(Kernel::cuda(|c| cuda::layout::copy_rows(c, c.input(0), c.output(0)))),
            Target::Cpu => Ok(Kernel::cpu(|a| {
                copy_rows(a.rows(0), a.rows_mut(0));
                Ok(())
            })),
        }
    }
    fn view(&self, _: &[TensorType]) -> Option<View> {
        Some(View::Columns(vec![0]))
    }
    fn strided(&self) -> bool {
        true
    }
}

pub(crate) fn register(registry: &mut Registry) {
    registry.op::<Split>(Info {
        name: "Split",
        about: "Parts of the last dimension, equal ones or ones of given sizes.",
        inputs: &["x"],
        formula: "",
        source: "",
        example: "(into: 2)",
    });
    registry.op::<Concat>(Info {
        name: "Concat",
        about: "Tensors side by side in the last dimension.",
        inputs: &["a", "b", "..."],
        formula: "",
        source: "",
        example: "",
    });
    registry.op::<Weight>(Info {
        name: "Weight",
        about: "A trained tensor as a value of its own; the parameter has the row's name.",
        inputs: &[],
        formula: "",
        source: "",
        example: "(shape: [8], init: Zeros)",
    });
}
