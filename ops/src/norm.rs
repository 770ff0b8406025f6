//! RMS, layer and group normalisation over the last dimension.

use std::ops::RangeInclusive;
use std::sync::Arc;

use dataflow_graph::builtin::{Elementwise, SumTo};
use dataflow_graph::format::number::{Flag, Real, Size};
use dataflow_graph::gradient::Gradient;
use dataflow_graph::initializer::Initializer;
use dataflow_graph::op::{Activations, Cost, Merged, NodeView, Of, Op, OpError, Pair, Parameter, Recompute, Slot};
use dataflow_graph::registry::{Info, Registry};
use dataflow_graph::systems::compound::Decomposition;
use dataflow_graph::types::TensorType;
use dataflow_kernels::cpu::norm::{self, Kind, Norm, Residual};
use dataflow_kernels::cuda;
use dataflow_kernels::device::{Kernel, Target};
use serde::{Deserialize, Serialize};

fn one() -> Size {
    Size(1)
}

fn yes() -> Flag {
    Flag(true)
}

fn eps() -> Real {
    Real(1e-5)
}

/// `y = x / sqrt(mean(x^2) + eps) w` over each of `groups` parts of the last dimension (arXiv:1910.07467).
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RmsNorm {
    #[serde(default = "eps")]
    eps: Real,
    #[serde(default = "one")]
    groups: Size,
    #[serde(default = "yes")]
    weight: Flag,
}

/// `y = (x - mean(x)) / sqrt(var(x) + eps) w + b` over each of `groups` parts of the last dimension, with the
/// biased variance (arXiv:1607.06450).
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerNorm {
    #[serde(default = "eps")]
    eps: Real,
    #[serde(default = "one")]
    groups: Size,
    #[serde(default = "yes")]
    weight: Flag,
    #[serde(default)]
    bias: Flag,
}

/// [`LayerNorm`] of `groups` parts with weight and bias for each channel (arXiv:1803.08494).
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupNorm {
    groups: Size,
    #[serde(default = "eps")]
    eps: Real,
}

/// What the three have in common.
#[derive(Clone, Copy, Debug)]
struct Form {
    norm: Norm,
    weight: bool,
    bias: bool,
}

impl Form {
    fn infer(&self, x: &TensorType) -> Result<Vec<TensorType>, OpError> {
        let groups = self.norm.groups;
        if groups == 0 || x.cols() == 0 || !x.cols().is_multiple_of(groups) {
            return Err(format!("{} columns do not split into {groups} equal groups", x.cols()).into());
        }
        Ok(vec![x.clone(), x.with_cols(self.norm.stats_per_row())])
    }
    fn parameters(&self, x: &TensorType) -> Vec<Parameter> {
        let weight = self.weight.then(|| Parameter::new("weight", [x.cols()], Initializer::Ones));
        let bias = self.bias.then(|| Parameter::new("bias", [x.cols()], Initializer::Zeros));
        weight.into_iter().chain(bias).collect()
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let Some(dy) = g.output_gradient(0) else { return Ok(()) };
        let mut inputs = vec![g.input(0), g.output(1), dy];
        inputs.extend(self.weight.then(|| g.input(1)));
        let made = g.emit(NormGradient { form: *self, passing: false }, &inputs)?;
        (0..g.inputs()).try_for_each(|i| g.set(i, made[i]))
    }
    /// The sum of two tensors and its norm are one pass.
    fn merge(&self, pair: &Pair<'_>) -> Option<Merged> {
        let x = &pair.consumer_inputs[0];
        if pair.input != 0 || !is_sum(pair.producer, pair.producer_inputs, x) {
            return None;
        }
        let mut inputs = vec![Of::Producer(0), Of::Producer(1)];
        inputs.extend((1..pair.consumer_inputs.len()).map(Of::Consumer));
        Some(Merged { op: Arc::new(SumNorm(*self)), inputs, outputs: vec![Of::Consumer(0), Of::Producer(0)] })
    }
    /// The formula, step by step. Groups are parts of a row, which only the kernel knows.
    fn decompose(&self, d: &mut Decomposition<'_>) -> Result<bool, OpError> {
        if self.norm.groups != 1 {
            return Ok(false);
        }
        let (mut x, eps) = (d.inputs()[0], self.norm.eps);
        let parameters = d.inputs()[1..].to_vec();
        let (column, share) = (d.type_of(x).with_cols(1).shape, 1.0 / d.type_of(x).cols() as f32);
        if self.norm.kind == Kind::Layer {
            let sum = d.emit(SumTo { shape: column.clone() }, &[x])?;
            let mean = d.emit(Elementwise::of(1, |b, x| b.scale(x[0], share)), &[sum])?;
            x = d.emit(Elementwise::of(2, |b, x| b.sub(x[0], x[1])), &[x, mean])?;
        }
        let squares = d.emit(Elementwise::of(1, |b, x| b.square(x[0])), &[x])?;
        let sum = d.emit(SumTo { shape: column }, &[squares])?;
        let root = Elementwise::of(1, |b, x| {
            let mean = b.scale(x[0], share);
            let mean = b.offset(mean, eps);
            b.rsqrt(mean)
        });
        let root = d.emit(root, &[sum])?;
        let mut y = d.emit(Elementwise::of(2, |b, x| b.mul(x[0], x[1])), &[x, root])?;
        let mut parameters = parameters.into_iter();
        if self.weight {
            y = d.emit(Elementwise::of(2, |b, x| b.mul(x[0], x[1])), &[y, parameters.next().expect("a weight")])?;
        }
        if self.bias {
            y = d.emit(Elementwise::of(2, |b, x| b.add(x[0], x[1])), &[y, parameters.next().expect("a bias")])?;
        }
        d.set(0, y);
        Ok(true)
    }
    fn lower(&self, target: Target) -> Result<Kernel, OpError> {
        let Form { norm, weight, bias } = *self;
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| {
                let w = weight.then(|| c.input(1));
                let b = bias.then(|| c.input(1 + usize::from(weight)));
                cuda::norm::forward(c, norm, c.input(0), None, w, b, c.output(0), c.output(1))
            })),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let w = weight.then(|| a.slice::<f32>(1));
                let b = bias.then(|| a.slice::<f32>(1 + usize::from(weight)));
                norm::forward(norm, a.rows(0), None, w, b, a.output(0), Some(a.slice_mut(1)));
                Ok(())
            })),
        }
    }
}

macro_rules! norm_op {
    ($name:ident, $self:ident => $form:expr) => {
        impl $name {
            fn form(&$self) -> Form {
                $form
            }
        }
        impl Op for $name {
            fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
                self.form().infer(&inputs[0])
            }
            fn parameters(&self, inputs: &[TensorType]) -> Result<Vec<Parameter>, OpError> {
                Ok(self.form().parameters(&inputs[0]))
            }
            fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
                self.form().gradient(g)
            }
            fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
                self.form().lower(target)
            }
            fn decompose(&self, d: &mut Decomposition<'_>) -> Result<bool, OpError> {
                self.form().decompose(d)
            }
            fn merge(&self, pair: &Pair<'_>) -> Option<Merged> {
                self.form().merge(pair)
            }
            fn activations(&self, _: usize) -> Activations {
                Activations::new([0], [0])
            }
            fn rounds(&self, _: usize) -> Activations {
                Activations::new([], [0])
            }
            fn tokenwise(&self) -> bool {
                true
            }
            fn strided(&self) -> bool {
                true
            }
            fn cost(&self, node: &NodeView<'_>) -> Cost {
                Cost { flops: 5.0 * node.outputs[0].elements() as f64, bytes: node.bytes() }
            }
        }
    };
}

norm_op!(RmsNorm, self => Form {
    norm: Norm { kind: Kind::Rms, groups: *self.groups, eps: self.eps.0 as f32 },
    weight: *self.weight,
    bias: false,
});
norm_op!(LayerNorm, self => Form {
    norm: Norm { kind: Kind::Layer, groups: *self.groups, eps: self.eps.0 as f32 },
    weight: *self.weight,
    bias: *self.bias,
});
norm_op!(GroupNorm, self => Form {
    norm: Norm { kind: Kind::Layer, groups: *self.groups, eps: self.eps.0 as f32 },
    weight: true,
    bias: true,
});

/// Whether an op adds two tensors of this type.
pub(crate) fn is_sum(op: &dyn Op, inputs: &[TensorType], tensor: &TensorType) -> bool {
    matches!(inputs, [a, b] if a == tensor && b == tensor)
        && op.updates().is_empty()
        && op.expression(2) == Some(dataflow_graph::builtin::sum(2).program)
}

/// (x, r, weight?, bias?) to the norm of `h = x + r`, then h and the statistics.
#[derive(Clone, Debug)]
struct SumNorm(Form);

impl Op for SumNorm {
    fn arity(&self) -> RangeInclusive<usize> {
        2..=4
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        let mut outputs = self.0.infer(&inputs[0])?;
        outputs.insert(1, inputs[1].clone());
        Ok(outputs)
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let (h, statistics, dh) = (g.output(1), g.output(2), g.output_gradient(1));
        let Some(dy) = g.output_gradient(0) else {
            return dh.map_or(Ok(()), |dh| (0..2).try_for_each(|i| g.set(i, dh)));
        };
        let mut inputs = vec![h, statistics, dy];
        inputs.extend(self.0.weight.then(|| g.input(2)));
        inputs.extend(dh);
        let made = g.emit(NormGradient { form: self.0, passing: dh.is_some() }, &inputs)?;
        g.set(0, made[0])?;
        (1..g.inputs()).try_for_each(|i| g.set(i, made[i - 1]))
    }
    fn recompute(&self) -> Option<Recompute> {
        let parameters = usize::from(self.0.weight) + usize::from(self.0.bias);
        let inputs = std::iter::once(Slot::Output(1)).chain((2..2 + parameters).map(Slot::Input)).collect();
        Some(Recompute { op: Arc::new(PlainNorm(self.0)), inputs, outputs: vec![0, 2] })
    }
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let Form { norm, weight, bias } = self.0;
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| {
                let w = weight.then(|| c.input(2));
                let b = bias.then(|| c.input(2 + usize::from(weight)));
                let residual = Some((c.input(1), c.output(1)));
                cuda::norm::forward(c, norm, c.input(0), residual, w, b, c.output(0), c.output(2))
            })),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let w = weight.then(|| a.slice::<f32>(2));
                let b = bias.then(|| a.slice::<f32>(2 + usize::from(weight)));
                let residual = Residual { residual: a.rows(1), h: a.rows_mut(1) };
                norm::forward(norm, a.rows(0), Some(residual), w, b, a.output(0), Some(a.slice_mut(2)));
                Ok(())
            })),
        }
    }
    fn activations(&self, _: usize) -> Activations {
        Activations::new([0, 1], [0, 1])
    }
    fn rounds(&self, _: usize) -> Activations {
        Activations::new([], [0])
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        Cost { flops: 6.0 * node.outputs[0].elements() as f64, bytes: node.bytes() }
    }
}

/// (x, weight?, bias?) to the norm of x and the statistics: what is left of [`SumNorm`] when the sum is there.
#[derive(Clone, Debug)]
struct PlainNorm(Form);

impl Op for PlainNorm {
    fn arity(&self) -> RangeInclusive<usize> {
        1..=3
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        self.0.infer(&inputs[0])
    }
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        self.0.lower(target)
    }
    fn activations(&self, _: usize) -> Activations {
        Activations::new([0], [0])
    }
    fn rounds(&self, _: usize) -> Activations {
        Activations::new([], [0])
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        Cost { flops: 5.0 * node.outputs[0].elements() as f64, bytes: node.bytes() }
    }
}

/// (x, statistics, dy, weight?, dh?) to (dx, dweight?, dbias?), where dx includes dh if gradients are `passing` by.
#[derive(Clone, Debug)]
struct NormGradient {
    form: Form,
    passing: bool,
}

impl Op for NormGradient {
    fn arity(&self) -> RangeInclusive<usize> {
        3..=5
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        let x = &inputs[0];
        let per_channel = usize::from(self.form.weight) + usize::from(self.form.bias);
        let parameters = std::iter::repeat_n(TensorType::f32([x.cols()]), per_channel);
        Ok(std::iter::once(x.clone()).chain(parameters).collect())
    }
    /// The sum of dx and another gradient.
    fn merge(&self, pair: &Pair<'_>) -> Option<Merged> {
        let own = pair.producer.downcast::<Self>()?;
        let x = &pair.producer_inputs[0];
        if own.passing || pair.output != 0 || !is_sum(pair.consumer, pair.consumer_inputs, x) {
            return None;
        }
        let mut inputs: Vec<Of> = (0..pair.producer_inputs.len()).map(Of::Producer).collect();
        inputs.push(Of::Consumer(1 - pair.input));
        let parameters = 1..1 + usize::from(own.form.weight) + usize::from(own.form.bias);
        let outputs = std::iter::once(Of::Consumer(0)).chain(parameters.map(Of::Producer)).collect();
        Some(Merged { op: Arc::new(Self { passing: true, ..own.clone() }), inputs, outputs })
    }
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let Self { form: Form { norm, weight, bias }, passing } = *self;
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| {
                let w = weight.then(|| c.input(3));
                let dh = passing.then(|| c.input(3 + usize::from(weight)));
                let dw = weight.then(|| c.output(1));
                let db = bias.then(|| c.output(1 + usize::from(weight)));
                cuda::norm::backward(c, norm, c.input(0), c.input(1), w, c.input(2), dh, c.output(0), dw, db)
            })),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let w = weight.then(|| a.slice::<f32>(3));
                let dh = passing.then(|| a.rows(3 + usize::from(weight)));
                let dw = weight.then(|| a.slice_mut::<f32>(1));
                let db = bias.then(|| a.slice_mut::<f32>(1 + usize::from(weight)));
                norm::backward(norm, a.rows(0), a.slice(1), w, a.rows(2), dh, a.rows_mut(0), dw, db);
                Ok(())
            })),
        }
    }
    fn activations(&self, _: usize) -> Activations {
        let passing = self.passing.then_some(3 + usize::from(self.form.weight));
        Activations::new([0, 2].into_iter().chain(passing), [0])
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        Cost { flops: 10.0 * node.outputs[0].elements() as f64, bytes: node.bytes() }
    }
}

pub(crate) fn register(registry: &mut Registry) {
    registry.op::<RmsNorm>(Info {
        name: "RmsNorm",
        about: "Root-mean-square normalisation of the last dimension, or of equal parts of it.",
        inputs: &["x [.., C]"],
        formula: "x / sqrt(mean(x^2) + eps) w",
        source: "arXiv:1910.07467",
        example: "",
    });
    registry.op::<LayerNorm>(Info {
        name: "LayerNorm",
        about: "Layer normalisation of the last dimension, or of equal parts of it.",
        inputs: &["x [.., C]"],
        formula: "(x - mean(x)) / sqrt(var(x) + eps) w + b",
        source: "arXiv:1607.06450",
        example: "",
    });
    registry.op::<GroupNorm>(Info {
        name: "GroupNorm",
        about: "Normalisation of equal parts of the last dimension, with weight and bias.",
        inputs: &["x [.., C]"],
        formula: "(x - mean(x)) / sqrt(var(x) + eps) w + b",
        source: "arXiv:1803.08494",
        example: "(groups: 4)",
    });
}
