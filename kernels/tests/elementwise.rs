//! Elementwise programs and reductions.

mod golden;

use dataflow_kernels::cpu::interpreter::{Compiled, Operand};
use dataflow_kernels::cpu::output::Output;
use dataflow_kernels::cpu::reduce::{
    copy_rows, fill, scale, sum_all, sum_cols, sum_groups, sum_of_squares, sum_periodic, sum_rows,
};
use dataflow_kernels::cpu::team::Team;
use dataflow_kernels::device::Bf16;
use dataflow_kernels::expression::{Argument, Binary, Builder, Instruction, Program, Register, Unary};
use dataflow_kernels::random::{Keep, Stream};
use dataflow_kernels::{Rows, RowsMut};

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

fn on_threads<R: Send>(n: usize, body: impl FnOnce() -> R + Send) -> R {
    Team::new(Some(n)).unwrap().run(body)
}

/// Runs over contiguous matrices of `cols` columns.
fn run(program: &Program, inputs: &[&[f32]], cols: usize) -> Vec<Vec<f32>> {
    let operands: Vec<Operand> = inputs.iter().map(|x| Operand::Full(Rows::contiguous(x, cols))).collect();
    let mut results = vec![vec![f32::NAN; inputs[0].len()]; program.outputs().len()];
    let mut outputs: Vec<Output> = results.iter_mut().map(|y| RowsMut::contiguous(y, cols).into()).collect();
    Compiled::new(program).run(&operands, &mut outputs, 1, 2);
    drop(outputs);
    results
}

#[test]
fn golden_functions_and_gradients() {
    let list: [(&str, &[&str], Program); 7] = [
        ("silu", &["x"], one(|b, x| b.silu(x))),
        ("gelu", &["x"], one(|b, x| b.gelu(x))),
        ("sigmoid", &["x"], one(|b, x| b.sigmoid(x))),
        ("squared_relu", &["x"], one(|b, x| b.squared_relu(x))),
        ("log_sigmoid", &["x"], one(|b, x| b.log_sigmoid(x))),
        ("softplus", &["x"], one(|b, x| b.softplus(x))),
        ("swiglu", &["up", "gate"], swiglu()),
    ];
    for (op, names, program) in list {
        let gradient = program.gradient(&(0..names.len()).collect::<Vec<_>>());
        for case in golden::cases(op) {
            let cols = *case.get("out/y").shape.last().unwrap();
            let mut inputs: Vec<&[f32]> = names.iter().map(|n| case.data(&format!("in/{n}"))).collect();
            golden::assert_close(op, &run(&program, &inputs, cols)[0], case.data("out/y"), 1e-6);
            inputs.push(case.data("cot/y"));
            for (name, got) in names.iter().zip(run(&gradient, &inputs, cols)) {
                golden::assert_close(&format!("{op} d{name}"), &got, case.data(&format!("grad/{name}")), 1e-6);
            }
        }
    }
}

fn noise(n: usize, stream: u64) -> Vec<f32> {
    let mut s = Stream::new(11, stream);
    (0..n).map(|_| s.normal()).collect()
}

/// A program of random instructions that stay finite, with all operations in it.
fn random_program(inputs: usize, length: usize, outputs: usize, seed: u64) -> Program {
    let mut s = Stream::new(seed, 0);
    Program::new(inputs, |b, x| {
        let mut pool = x.to_vec();
        for _ in 0..length {
            let pick = |s: &mut Stream, pool: &[Register]| pool[s.below(pool.len())];
            let (p, q, r) = (pick(&mut s, &pool), pick(&mut s, &pool), pick(&mut s, &pool));
            let y = match s.below(10) {
                0..=4 => {
                    let op = UNARY[s.below(UNARY.len())];
                    let p = b.tanh(p);
                    // within the domains
                    let p = if matches!(op, Unary::Log | Unary::Sqrt | Unary::Rsqrt | Unary::Recip) {
                        b.offset(p, 1.5)
                    } else {
                        p
                    };
                    b.unary(op, p)
                }
                5..=7 => {
                    let op = BINARY[s.below(BINARY.len())];
                    let q = if op == Binary::Div { b.exp(q) } else { q };
                    let y = b.binary(op, p, q);
                    b.tanh(y)
                }
                8 => {
                    let c = b.step(p);
                    b.select(c, q, r)
                }
                _ => {
                    let site = s.below(2) as u32;
                    b.dropout(p, site, 0.5)
                }
            };
            pool.push(y);
        }
        (0..outputs).map(|_| pool[pool.len() - 1 - s.below(length.min(6))]).collect()
    })
}

#[test]
fn random_programs_over_every_broadcast() {
    let (rows, stride) = (12, 2100);
    for (seed, cols) in [(0, 1), (1, 3), (2, 16), (3, 40), (4, 100), (5, 333), (6, 1024), (7, 2050), (8, 700), (9, 48)]
    {
        let program = random_program(6, 25, 4, seed);
        let compiled = Compiled::new(&program);
        let full = noise(rows * stride, 1);
        let column = noise(rows * 3, 2);
        let row = noise(cols, 3);
        let periodic = noise(4 * cols, 4);
        let grouped = noise(3 * cols, 5);
        let operands = [
            Operand::Full(Rows::new(&full, rows, cols, stride)),
            Operand::Column(Rows::new(&column, rows, 1, 3)),
            Operand::Row(&row),
            Operand::Scalar(&-0.75),
            Operand::Mapped { rows: Rows::contiguous(&periodic, cols), div: 1 },
            Operand::Mapped { rows: Rows::contiguous(&grouped, cols), div: 4 },
        ];
        let gap = cols + 5;
        let execute = || {
            let mut y = vec![vec![7.5f32; rows * gap]; 4];
            let mut outputs: Vec<Output> = y.iter_mut().map(|y| RowsMut::new(y, rows, cols, gap).into()).collect();
            compiled.run(&operands, &mut outputs, 3, 4);
            y
        };
        let results = execute();
        assert_eq!(results, on_threads(1, execute));
        // some outputs rounded, the others as they are
        let mut rounded = vec![vec![Bf16(7); rows * gap]; 2];
        let mut whole = vec![vec![7.5f32; rows * gap]; 2];
        let narrow = rounded.iter_mut().map(|y| Output::from(RowsMut::new(y, rows, cols, gap)));
        let wide = whole.iter_mut().map(|y| Output::from(RowsMut::new(y, rows, cols, gap)));
        let mut outputs: Vec<Output> = narrow.zip(wide).flat_map(|(a, b)| [a, b]).collect();
        compiled.run(&operands, &mut outputs, 3, 4);
        assert!(whole[0] == results[1] && whole[1] == results[3]);
        for (rounded, whole) in rounded.iter().zip([&results[0], &results[2]]) {
            for (i, (x, y)) in rounded.iter().zip(whole).enumerate() {
                let inside = i % gap < cols;
                assert!(*x == if inside { Bf16::from_f32(*y) } else { Bf16(7) }, "{program}: {i}");
            }
        }
        let mut off = 0;
        for r in 0..rows {
            for c in 0..cols {
                let x = [
                    full[r * stride + c],
                    column[r * 3],
                    row[c],
                    -0.75,
                    periodic[r % 4 * cols + c],
                    grouped[r / 4 * cols + c],
                ];
                let want = program.evaluate(&x.map(f64::from), 3, 4, (r * cols + c) as u64);
                for (o, want) in want.iter().enumerate() {
                    let got = f64::from(results[o][r * gap + c]);
                    // a comparison may fall on the other side after rounding
                    off += usize::from((got - want).abs() > 1e-4 * want.abs().max(1.0) || got.is_nan());
                }
            }
            assert!(results.iter().all(|y| y[r * gap + cols..(r + 1) * gap].iter().all(|&v| v == 7.5)), "gap touched");
        }
        assert!(off * 500 <= rows * cols, "{program}: {off} of {} wrong", rows * cols);
    }
}

#[test]
fn every_operation_on_long_rows_and_threads() {
    let n = 100_003;
    let x: Vec<f32> = noise(n, 1);
    let y: Vec<f32> = noise(n, 2).iter().map(|v| v + 2.5).collect();
    let programs = UNARY.map(|op| Program::new(2, |b, r| vec![b.unary(op, r[1])])).into_iter();
    for program in programs.chain(BINARY.map(|op| Program::new(2, |b, r| vec![b.binary(op, r[0], r[1])]))) {
        let got = run(&program, &[&x, &y], n);
        for i in (0..n).step_by(7) {
            let want = program.evaluate(&[f64::from(x[i]), f64::from(y[i])], 0, 0, 0)[0];
            let got = f64::from(got[0][i]);
            assert!(
                (got - want).abs() <= 1e-6 * want.abs().max(1.0) || (got.is_nan() && want.is_nan()),
                "{program}: {got} {want}"
            );
        }
        let bits = |y: Vec<Vec<f32>>| y[0].iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(got), bits(on_threads(1, || run(&program, &[&x, &y], n))));
    }
}

#[test]
fn results_may_take_the_place_of_inputs() {
    let cols = 1300;
    let (x, y, g) = (noise(3 * cols, 1), noise(3 * cols, 2), noise(3 * cols, 3));
    let gradient = swiglu().gradient(&[0, 1]);
    let want = run(&gradient, &[&x, &y, &g], cols);
    // every pair of inputs as the memory of the outputs, and a swap
    for (first, second) in [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)] {
        let originals = [&x, &y, &g];
        let (mut a, mut b) = (originals[first].clone(), originals[second].clone());
        let mut operands = originals.map(|v| Operand::Full(Rows::contiguous(v, cols)));
        (operands[first], operands[second]) = (Operand::InPlace(0), Operand::InPlace(1));
        let mut outputs = [&mut a, &mut b].map(|y| RowsMut::contiguous(y, cols).into());
        Compiled::new(&gradient).run(&operands, &mut outputs, 0, 0);
        assert!(a == want[0] && b == want[1], "outputs on {first} and {second}");
    }
    let swap = Program::new(2, |_, r| vec![r[1], r[0]]);
    let (mut a, mut b) = (x.clone(), y.clone());
    let mut outputs = [&mut a, &mut b].map(|y| RowsMut::contiguous(y, cols).into());
    Compiled::new(&swap).run(&[Operand::InPlace(0), Operand::InPlace(1)], &mut outputs, 0, 0);
    assert!(a == y && b == x);
    // constants, inputs and repeated results as outputs
    let odd = Program::new(1, |b, r| {
        let e = b.exp(r[0]);
        vec![r[0], b.constant(3.0), e, e]
    });
    let got = run(&odd, &[&x], cols);
    assert!(got[0] == x && got[1].iter().all(|&v| v == 3.0) && got[2] == got[3]);
}

#[test]
fn masks_are_the_same_in_every_layout() {
    let (rows, cols) = (9, 37);
    let program = one(|b, x| b.dropout(x, 5, 0.25));
    let ones = vec![1.0; rows * cols];
    let keep = Keep::new(1, 2, 5, 0.25);
    let want: Vec<f32> = (0..rows * cols).map(|i| keep.at(i as u64)).collect();
    assert_eq!(run(&program, &[&ones], cols)[0], want);
    assert_eq!(run(&program, &[&ones], rows * cols)[0], want);
    assert_eq!(run(&program.gradient(&[0]), &[&noise(rows * cols, 1), &ones], cols)[0], want);
    let mut wide = vec![0.0; rows * 50];
    let mut outputs = [RowsMut::new(&mut wide[3..], rows, cols, 50).into()];
    Compiled::new(&program).run(&[Operand::Scalar(&1.0)], &mut outputs, 1, 2);
    (0..rows).for_each(|r| assert_eq!(wide[3 + r * 50..][..cols], want[r * cols..][..cols]));
}

#[test]
fn sums() {
    for (rows, cols, stride) in [(1, 1, 1), (6, 5, 9), (1200, 37, 37), (600, 1000, 1003), (6, 70_000, 70_000)] {
        let data = noise(rows * stride, 1);
        let x = Rows::new(&data, rows, cols, stride);
        let at = |r: usize, c: usize| f64::from(data[r * stride + c]);
        let near = |what: &str, got: &[f32], n: usize, want: &dyn Fn(usize) -> f64| {
            for (i, &got) in got.iter().enumerate() {
                let tolerance = 1e-6 * (n as f64).sqrt().max(1.0);
                assert!((f64::from(got) - want(i)).abs() < 2.0 * tolerance, "{what} {i}: {got} {}", want(i));
            }
        };
        let all = || {
            let (mut a, mut b) = (vec![9.0; cols], vec![9.0; rows]);
            sum_rows(x, &mut a);
            sum_cols(x, &mut b);
            let parts = if rows % 3 == 0 { 3 } else { 1 };
            let (mut c, mut d) = (vec![9.0; parts * cols], vec![9.0; parts * cols]);
            sum_periodic(x, RowsMut::contiguous(&mut c, cols));
            sum_groups(x, RowsMut::contiguous(&mut d, cols));
            let mut e = vec![9.0; rows * (cols + 1)];
            copy_rows(x, RowsMut::new(&mut e, rows, cols, cols + 1));
            (a, b, c, d, e, sum_all(x), sum_of_squares(&data))
        };
        let results = on_threads(1, all);
        assert!(results == on_threads(2, all));
        let (a, b, c, d, e, total, squares) = results;
        near("sum_rows", &a, rows, &|c| (0..rows).map(|r| at(r, c)).sum());
        near("sum_cols", &b, cols, &|r| (0..cols).map(|c| at(r, c)).sum());
        let parts = c.len() / cols;
        let length = rows / parts;
        near("sum_periodic", &c, rows, &|i| (0..length).map(|k| at(i / cols + k * parts, i % cols)).sum());
        near("sum_groups", &d, rows, &|i| (0..length).map(|k| at(i / cols * length + k, i % cols)).sum());
        for r in 0..rows {
            assert_eq!(e[r * (cols + 1)..][..cols], data[r * stride..][..cols]);
            assert_eq!(e[r * (cols + 1) + cols], 9.0);
        }
        near("sum_all", &[total], rows * cols, &|_| (0..rows).map(|r| (0..cols).map(|c| at(r, c)).sum::<f64>()).sum());
        let want: f64 = data.iter().map(|&v| f64::from(v).powi(2)).sum();
        assert!((squares - want).abs() < 1e-6 * want);
    }
    let mut x = noise(300_001, 1);
    let doubled: Vec<f32> = x.iter().map(|v| v * 2.0).collect();
    scale(&mut x, 2.0);
    assert!(x == doubled);
    let mut y = vec![0.0; x.len()];
    copy_rows(Rows::contiguous(&x, x.len()), RowsMut::contiguous(&mut y, x.len()));
    assert!(x == y);
    fill(&mut y, 3.0);
    assert!(y.iter().all(|&v| v == 3.0));
}
