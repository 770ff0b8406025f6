//! Elementwise ops. Each is an expression; shape rule, gradient and kernels follow from it.

use std::ops::RangeInclusive;
use std::sync::Arc;

use dataflow_graph::builtin::Elementwise;
use dataflow_graph::format::number::Real;
use dataflow_graph::initializer::fnv;
use dataflow_graph::op::{Op, OpError};
use dataflow_graph::registry::{Info, Registry};
use dataflow_graph::systems::compound::Decomposition;
use dataflow_graph::types::TensorType;
use dataflow_kernels::expression::{Builder, Program, Register};
use serde::{Deserialize, Serialize};

/// A function of one number, as an attribute of other ops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activation {
    /// `x`
    #[default]
    Identity,
    /// `x sigmoid(x)`
    Silu,
    /// `x (1 + erf(x / sqrt 2)) / 2`
    Gelu,
    /// `1 / (1 + e^-x)`
    Sigmoid,
    /// Hyperbolic tangent
    Tanh,
    /// `max(x, 0)`
    Relu,
    /// `max(x, 0)^2`
    SquaredRelu,
    /// `log(1 + e^x)`, the identity above 20
    Softplus,
    /// `log(sigmoid(x))`
    LogSigmoid,
}

impl Activation {
    /// Writes the function of `x`.
    pub fn write(self, b: &mut Builder, x: Register) -> Register {
        match self {
            Activation::Identity => x,
            Activation::Silu => b.silu(x),
            Activation::Gelu => b.gelu(x),
            Activation::Sigmoid => b.sigmoid(x),
            Activation::Tanh => b.tanh(x),
            Activation::Relu => b.relu(x),
            Activation::SquaredRelu => b.squared_relu(x),
            Activation::Softplus => b.softplus(x),
            Activation::LogSigmoid => b.log_sigmoid(x),
        }
    }
}

macro_rules! activations {
    ($($name:ident: $about:literal, $formula:literal;)*) => {
        $(
            #[doc = $about]
            #[derive(Clone, Debug, Serialize, Deserialize)]
            #[serde(deny_unknown_fields)]
            pub struct $name {}

            impl Op for $name {
                fn expression(&self, _: usize) -> Option<Program> {
                    Some(Program::new(1, |b, x| vec![Activation::$name.write(b, x[0])]))
                }
                fn strided(&self) -> bool {
                    true
                }
            }
        )*

        fn register_activations(registry: &mut Registry) {
            $(registry.op::<$name>(Info {
                name: stringify!($name),
                about: $about,
                inputs: &["x"],
                formula: $formula,
                source: "",
                example: "",
            });)*
        }
    };
}

activations! {
    Silu: "The sigmoid-weighted linear unit.", "x sigmoid(x)";
    Gelu: "The Gaussian error linear unit in its exact form.", "x (1 + erf(x / sqrt 2)) / 2";
    Sigmoid: "The logistic function.", "1 / (1 + exp(-x))";
    Tanh: "The hyperbolic tangent.", "tanh(x)";
    Relu: "The rectified linear unit.", "max(x, 0)";
    SquaredRelu: "The square of the rectified linear unit.", "max(x, 0)^2";
    Softplus: "A smooth rectifier; the identity above 20.", "log(1 + exp(x))";
    LogSigmoid: "The logarithm of the logistic function.", "log(sigmoid(x))";
}

/// The sum of two or more tensors, with broadcasting.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Add {}

impl Op for Add {
    fn arity(&self) -> RangeInclusive<usize> {
        2..=16
    }
    fn expression(&self, inputs: usize) -> Option<Program> {
        Some(dataflow_graph::builtin::sum(inputs).program)
    }
    fn strided(&self) -> bool {
        true
    }
}

/// The product of two tensors, with broadcasting.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mul {}

impl Op for Mul {
    fn arity(&self) -> RangeInclusive<usize> {
        2..=2
    }
    fn expression(&self, _: usize) -> Option<Program> {
        Some(Program::new(2, |b, x| vec![b.mul(x[0], x[1])]))
    }
    fn strided(&self) -> bool {
        true
    }
}

/// `factor x`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scale {
    factor: Real,
}

impl Op for Scale {
    fn expression(&self, _: usize) -> Option<Program> {
        Some(Program::new(1, |b, x| vec![b.scale(x[0], self.factor.0 as f32)]))
    }
    fn strided(&self) -> bool {
        true
    }
}

/// `x activation(z)`: the gate of SwiGLU (arXiv:2002.05202), of Mamba and of RetNet.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gate {
    /// The function of the gate.
    pub activation: Activation,
}

impl Op for Gate {
    fn arity(&self) -> RangeInclusive<usize> {
        2..=2
    }
    fn expression(&self, _: usize) -> Option<Program> {
        Some(Program::new(2, |b, x| {
            let gate = self.activation.write(b, x[1]);
            vec![b.mul(x[0], gate)]
        }))
    }
    fn decompose(&self, d: &mut Decomposition<'_>) -> Result<bool, OpError> {
        if self.activation == Activation::Identity {
            return Ok(false);
        }
        let &[x, z] = d.inputs() else { return Ok(false) };
        let gate = d.emit(Elementwise::of(1, |b, x| self.activation.write(b, x[0])), &[z])?;
        let y = d.emit(Mul {}, &[x, gate])?;
        d.set(0, y);
        Ok(true)
    }
    fn strided(&self) -> bool {
        true
    }
}

/// Sets elements to 0 with probability `p` and divides the others by `1 - p` (Srivastava et al., 2014). The
/// mask is a function of seed, step, row and element, so the backward pass draws the same one again. Nothing
/// in evaluation.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dropout {
    p: Real,
    /// Which mask of the step: a hash of the node's path.
    #[serde(skip)]
    site: u32,
}

impl Op for Dropout {
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        check_probability(self.p.0)?;
        dataflow_graph::elementwise::infer(&inputs[..1])
    }
    fn expression(&self, _: usize) -> Option<Program> {
        Some(Program::new(1, |b, x| vec![b.dropout(x[0], self.site, self.p.0 as f32)]))
    }
    fn strided(&self) -> bool {
        true
    }
    fn uses_step(&self) -> bool {
        self.p.0 > 0.0
    }
    fn placed(&self, path: &str) -> Option<Arc<dyn Op>> {
        Some(Arc::new(Self { site: site_of(path), ..self.clone() }))
    }
    fn evaluation(&self) -> Option<Arc<dyn Op>> {
        // a wrong probability stays, to be reported in evaluation too
        check_probability(self.p.0).ok()?;
        Some(Arc::new(Self { p: Real(0.0), ..self.clone() }))
    }
}

/// The number of a node's random mask.
pub(crate) fn site_of(path: &str) -> u32 {
    let hash = fnv(path);
    (hash ^ (hash >> 32)) as u32
}

pub(crate) fn check_probability(p: f64) -> Result<(), OpError> {
    if (0.0..1.0).contains(&p) { Ok(()) } else { Err(format!("the dropout probability {p} is not in [0, 1)").into()) }
}

pub(crate) fn register(registry: &mut Registry) {
    register_activations(registry);
    registry.op::<Add>(Info {
        name: "Add",
        about: "The sum of two or more tensors, with broadcasting.",
        inputs: &["a", "b", "..."],
        formula: "a + b + ...",
        source: "",
        example: "",
    });
    registry.op::<Mul>(Info {
        name: "Mul",
        about: "The product of two tensors, with broadcasting.",
        inputs: &["a", "b"],
        formula: "a b",
        source: "",
        example: "",
    });
    registry.op::<Scale>(Info {
        name: "Scale",
        about: "A tensor times a constant.",
        inputs: &["x"],
        formula: "factor x",
        source: "",
        example: "(factor: 0.5)",
    });
    registry.op::<Gate>(Info {
        name: "Gate",
        about: "A tensor times a function of another.",
        inputs: &["x", "z"],
        formula: "x activation(z)",
        source: "arXiv:2002.05202",
        example: "(activation: Silu)",
    });
    registry.op::<Dropout>(Info {
        name: "Dropout",
        about: "Random zeros while training; nothing in evaluation.",
        inputs: &["x"],
        formula: "x keep / (1 - p), keep = 1 with probability 1 - p",
        source: "Srivastava et al., 2014",
        example: "(p: 0.2)",
    });
}
