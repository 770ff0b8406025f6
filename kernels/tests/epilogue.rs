//! A product and a program over its result in one call give the bits of one after the other.

use dataflow_kernels::cpu::interpreter::{Compiled, Operand};
use dataflow_kernels::cpu::matmul::{Epilogue, Init, Mat, matmul, matmul_bf16, matmul_then};
use dataflow_kernels::cpu::output::Output;
use dataflow_kernels::device::Bf16;
use dataflow_kernels::expression::Program;
use dataflow_kernels::{Rows, RowsMut};

/// Numbers in -1..1, of which no two calls have the same.
struct Numbers(u64);

impl Numbers {
    fn floats(&mut self, n: usize) -> Vec<f32> {
        let mut next = || {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (self.0 >> 33) as f32 / (1u64 << 30) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }
}

/// Where the result of the product goes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Result {
    Kept,
    Replaced,
    /// The first output takes the place of another input.
    Summed,
}

/// Sizes for every route: thin ones, few rows, columns for less than a vector, `k` in several pieces and chunks.
const SIZES: [(usize, usize, usize); 10] = [
    (1, 40, 30),
    (6, 50, 70),
    (40, 100, 64),
    (100, 300, 33),
    (250, 24, 400),
    (300, 65, 900),
    (33, 1, 50),
    (200, 1100, 800),
    (400, 520, 2400),
    (70, 70, 0),
];

fn check((m, n, k): (usize, usize, usize), transposed: (bool, bool), pairs: bool, result: Result) {
    let label = format!("[{m}, {k}] x [{k}, {n}] {transposed:?} {pairs} {result:?}");
    let mut numbers = Numbers(7);
    let (a, b, gate) = (numbers.floats(m * k), numbers.floats(k * n), numbers.floats(m * (n + 3)));
    let bias = numbers.floats(n);
    let mat = |data, rows, cols, transposed: bool| match transposed {
        true => Mat::Transposed(Rows::new(data, cols, rows, rows)),
        false => Mat::Normal(Rows::new(data, rows, cols, cols)),
    };
    let (a, b) = (mat(&a, m, k, transposed.0), mat(&b, k, n, transposed.1));
    let init = if result == Result::Summed { Init::Zero } else { Init::Bias(&bias) };
    let mut product = vec![0.0; m * n];
    let whole = RowsMut::contiguous(&mut product, n);
    if pairs {
        matmul_bf16(whole, a, b, init)
    } else {
        matmul(whole, a, b, init)
    }

    // one output reads the product after the other was written
    let program = match result {
        Result::Summed => Program::new(2, |b, x| vec![b.add(x[0], x[1])]),
        _ => Program::new(2, |b, x| {
            let silu = b.silu(x[1]);
            let gated = b.mul(silu, x[0]);
            vec![gated, b.tanh(x[1])]
        }),
    };
    let compiled = Compiled::new(&program);
    let count = program.outputs().len();
    let mut expected = vec![vec![0.0; m * n]; count];
    let gate = Rows::new(&gate, m, n, n + 3);
    let read = [Operand::Full(gate), Operand::Full(Rows::contiguous(&product, n))];
    let mut views: Vec<_> = expected.iter_mut().map(|o| RowsMut::contiguous(o, n).into()).collect();
    if m * n > 0 {
        compiled.run(&read, &mut views, 0, 0);
    }

    // rows with gaps, of which nothing may be touched
    let stride = n + 5;
    let mut found = vec![vec![9.0; m * stride]; count];
    let mut kept = vec![9.0; m * stride];
    if result == Result::Summed {
        (0..m).for_each(|r| found[0][r * stride..r * stride + n].copy_from_slice(gate.row(r)));
    }
    let first = if result == Result::Summed { Operand::InPlace(0) } else { Operand::Full(gate) };
    let mut outputs: Vec<_> = found.iter_mut().map(|o| RowsMut::new(o, m, n, stride).into()).collect();
    let mut inputs = [first, Operand::Scalar(&0.0)];
    let epilogue =
        Epilogue { program: &compiled, inputs: &mut inputs, result: 1, outputs: &mut outputs, seed: 0, step: 0 };
    let place = (result == Result::Kept).then(|| RowsMut::new(&mut kept, m, n, stride));
    matmul_then(place, (a.into(), b.into()), init, pairs, epilogue);
    let same = |x: &[f32], y: &[f32]| {
        let rows = (0..m).all(|r| x[r * stride..r * stride + n] == y[r * n..(r + 1) * n]);
        rows && (0..m).all(|r| x[r * stride + n..(r + 1) * stride].iter().all(|x| *x == 9.0))
    };
    for (o, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert!(same(found, expected), "{label}: output {o}");
    }
    assert!(result != Result::Kept || same(&kept, &product), "{label}: the product");

    // outputs that do not hold the product may be rounded
    for holding in [true, false] {
        if result == Result::Summed || (holding && result == Result::Kept) {
            continue;
        }
        let mut rounded = vec![vec![Bf16(7); m * n]; count];
        let mut outputs: Vec<Output> = rounded.iter_mut().map(|o| RowsMut::new(o, m, n, n).into()).collect();
        if holding {
            outputs[0] = RowsMut::new(&mut found[0], m, n, stride).into();
        }
        let mut inputs = [Operand::Full(gate), Operand::Scalar(&0.0)];
        let epilogue =
            Epilogue { program: &compiled, inputs: &mut inputs, result: 1, outputs: &mut outputs, seed: 0, step: 0 };
        let place = (result == Result::Kept).then(|| RowsMut::new(&mut kept, m, n, stride));
        matmul_then(place, (a.into(), b.into()), init, pairs, epilogue);
        for o in usize::from(holding)..count {
            let equal = rounded[o].iter().zip(&expected[o]).all(|(x, y)| *x == Bf16::from_f32(*y));
            assert!(equal, "{label}: output {o} in bf16");
        }
    }
}

#[test]
fn the_program_sees_the_products_bits() {
    for size in SIZES {
        for transposed in [(false, false), (false, true), (true, false)] {
            for result in [Result::Kept, Result::Replaced, Result::Summed] {
                for pairs in [false, true] {
                    check(size, transposed, pairs, result);
                }
            }
        }
    }
}
