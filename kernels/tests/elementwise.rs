//! Elementwise programs and reductions.

mod golden;

use dataflow_kernels::expression::{Argument, Binary, Builder, Instruction, Program, Register, Unary};

const UNARY: [Unary; 16] = [
    Unary::Neg,
    Unary::Abs,
    Unary::Exp,
    Unary::Log,
    Unary::Sqrt,
    Unary::Rsqrt,
    Unary::Recip,
    Unary::Sigmoid,
    Unary::Tanh,
    Unary::Erf,
    Unary::Softplus,
    Unary::LogSigmoid,
    Unary::Relu,
    Unary::Sin,
    Unary::Cos,
    Unary::Step,
];
const BINARY: [Binary; 7] =
    [Binary::Add, Binary::Sub, Binary::Mul, Binary::Div, Binary::Max, Binary::Min, Binary::Greater];

fn one(body: impl FnOnce(&mut Builder, Register) -> Register) -> Program {
    Program::new(1, |b, x| vec![body(b, x[0])])
}

fn swiglu() -> Program {
    Program::new(2, |b, x| {
        let gate = b.silu(x[1]);
        vec![b.mul(gate, x[0])]
    })
}

#[test]
fn formulas_are_readable() {
    assert_eq!(one(|b, x| b.silu(x)).to_string(), "a * sigmoid(a)");
    assert_eq!(one(|b, x| b.squared_relu(x)).to_string(), "t0 = relu(a); t0 * t0");
    assert_eq!(one(|b, x| b.silu(x)).gradient(&[0]).to_string(), "t0 = sigmoid(a); b * t0 + a * b * (t0 * (1 - t0))");
    let program = Program::new(3, |b, x| {
        let sum = b.add(x[0], x[1]);
        let difference = b.sub(x[2], sum);
        let e = b.exp(difference);
        let n = b.neg(sum);
        let q = b.div(n, x[2]);
        vec![b.scale(e, -0.5), q]
    });
    assert_eq!(program.to_string(), "t0 = a + b; exp(c - t0) * -0.5, -t0 / c");
    assert_eq!(one(|b, x| b.dropout(x, 3, 0.1)).to_string(), "a * keep(3, 0.1)");
}

#[test]
fn builder_simplifies() {
    assert!(
        one(|b, x| {
            let zero = b.constant(0.0);
            let y = b.add(zero, x);
            let y = b.scale(y, 1.0);
            let y = b.neg(y);
            let y = b.neg(y);
            let y = b.div(y, y);
            let nothing = b.sub(y, y);
            b.add(x, nothing)
        })
        .is_identity()
    );
    assert!(!one(|b, x| b.exp(x)).is_identity());
    assert!(one(|b, x| b.dropout(x, 0, 0.0)).is_identity());
    // common subexpressions and operand order
    let program = Program::new(2, |b, x| {
        let (p, q) = (b.mul(x[0], x[1]), b.mul(x[1], x[0]));
        vec![b.add(p, q)]
    });
    assert_eq!(program.instructions().len(), 4);
    let folded = one(|b, _| {
        let two = b.constant(2.0);
        let log = b.log(two);
        b.exp(log)
    });
    assert_eq!(folded.instructions(), [Instruction::Constant(2.0.into())]);
    assert_eq!(one(|b, x| b.relu(x)).flops(), 1);
    // dead code
    let program = one(|b, x| {
        b.exp(x);
        b.tanh(x)
    });
    assert_eq!(program, one(|b, x| b.tanh(x)));
    assert_eq!(program.instructions().len(), 2);
}

#[test]
fn composition_is_writing_it_in_one_piece() {
    let silu = one(|b, x| b.silu(x));
    let product = Program::new(2, |b, x| vec![b.mul(x[0], x[1])]);
    let composed =
        product.compose(2, &[Argument::Output { program: &silu, inputs: &[1], output: 0 }, Argument::Input(0)]);
    assert_eq!(composed, swiglu());
    let twice = silu.compose(1, &[Argument::Output { program: &silu, inputs: &[0], output: 0 }]);
    let want = one(|b, x| {
        let y = b.silu(x);
        b.silu(y)
    });
    assert_eq!(twice, want);
    assert!(product.compose(1, &[Argument::Input(0), Argument::Constant(1.0)]).is_identity());
    assert_eq!(swiglu().gradient(&[0, 1]).select_outputs(&[1]), swiglu().gradient(&[1]));
}

/// Central differences in double precision.
fn check_gradient(program: &Program, at: &[f64]) {
    let wanted: Vec<usize> = (0..program.inputs()).collect();
    let gradient = program.gradient(&wanted);
    let cotangents: Vec<f64> = (0..program.outputs().len()).map(|i| 0.7 - 0.4 * i as f64).collect();
    let arguments: Vec<f64> = at.iter().chain(&cotangents).copied().collect();
    let got = gradient.evaluate(&arguments, 1, 2, 3);
    for i in 0..at.len() {
        let h = 1e-5;
        let value = |d: f64| -> f64 {
            let mut x = at.to_vec();
            x[i] += d;
            program.evaluate(&x, 1, 2, 3).iter().zip(&cotangents).map(|(y, c)| y * c).sum()
        };
        let want = (value(h) - value(-h)) / (2.0 * h);
        assert!((got[i] - want).abs() < 1e-6 * want.abs().max(1.0), "{program} at {at:?}: {} {want}", got[i]);
    }
}

#[test]
fn derivatives_of_every_operation() {
    for op in UNARY {
        for x in [-2.3, -0.7, 0.4, 1.9, 3.1] {
            if x > 0.0 || !matches!(op, Unary::Log | Unary::Sqrt | Unary::Rsqrt) {
                check_gradient(&one(|b, r| b.unary(op, r)), &[x]);
            }
        }
    }
    for op in BINARY {
        for (x, y) in [(0.3, 1.2), (-1.5, 0.8), (2.0, -0.9), (-0.4, -0.5)] {
            check_gradient(&Program::new(2, |b, r| vec![b.binary(op, r[0], r[1])]), &[x, y]);
            check_gradient(&one(|b, r| b.binary(op, r, r)), &[x]);
        }
    }
    for c in [0.0, 1.0] {
        check_gradient(&Program::new(3, |b, r| vec![b.select(r[0], r[1], r[2])]), &[c + 0.5, 2.0, 3.0]);
    }
    check_gradient(&swiglu(), &[0.3, -1.2]);
    check_gradient(&one(|b, x| b.gelu(x)), &[-0.6]);
    check_gradient(&one(|b, x| b.dropout(x, 7, 0.5)), &[1.1]);
    let several = Program::new(3, |b, x| {
        let p = b.mul(x[0], x[1]);
        let s = b.sigmoid(p);
        let q = b.div(s, x[2]);
        vec![q, s, x[1], q]
    });
    check_gradient(&several, &[0.4, -1.1, 1.7]);
    // ties
    let slope = |op| {
        Program::new(2, |b, r| vec![b.binary(op, r[0], r[1])]).gradient(&[0, 1]).evaluate(&[2.0, 2.0, 1.0], 0, 0, 0)
    };
    assert_eq!(slope(Binary::Max), [0.5, 0.5]);
    assert_eq!(slope(Binary::Min), [0.5, 0.5]);
    for op in [Unary::Abs, Unary::Relu] {
        assert_eq!(one(|b, x| b.unary(op, x)).gradient(&[0]).evaluate(&[0.0, 1.0], 0, 0, 0), [0.0]);
    }
    assert_eq!(Program::new(2, |_, r| vec![r[0]]).gradient(&[1]).to_string(), "0");
}
