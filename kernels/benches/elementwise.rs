//! Elementwise programs, from memory (8192 x 1024) and from the cache (64 x 1024), on all threads:
//! `cargo bench -p dataflow-kernels --bench elementwise`. The rate is in elements per second.

use dataflow_kernels::cpu::interpreter::{Compiled, Operand};
use dataflow_kernels::cpu::team::Team;
use dataflow_kernels::expression::{Builder, Program, Register};
use dataflow_kernels::{Rows, RowsMut};
use divan::Bencher;
use divan::counter::ItemsCount;

fn main() {
    Team::new(None).expect("the system starts threads").run(divan::main);
}

const COLS: usize = 1024;

fn run(bencher: Bencher<'_, '_>, rows: usize, form: impl Fn(&mut Builder, &[Register]) -> Vec<Register>) {
    let compiled = Compiled::new(&Program::new(2, form));
    let inputs = [3, 7].map(|k| (0..rows * COLS).map(|i| ((i * k) % 101) as f32 / 101.0 - 0.5).collect::<Vec<f32>>());
    let operands = inputs.each_ref().map(|x| Operand::Full(Rows::contiguous(x, COLS)));
    let mut y = vec![0.0f32; rows * COLS];
    bencher
        .counter(ItemsCount::new(rows * COLS))
        .bench_local(|| compiled.run(&operands, &mut [RowsMut::contiguous(&mut y, COLS).into()], 0, 0));
}

macro_rules! programs {
    ($($name:ident($b:ident, $x:ident) $form:expr;)*) => {$(
        #[divan::bench(args = [64, 8192])]
        fn $name(bencher: Bencher<'_, '_>, rows: usize) {
            run(bencher, rows, |$b, $x| vec![$form]);
        }
    )*};
}

programs! {
    add(b, x) b.add(x[0], x[1]);
    sixteen_cheap_steps(b, x) {
        let step = |y, i| if i % 2 == 0 { b.mul(y, x[1]) } else { b.add(y, x[0]) };
        (0..16).fold(x[0], step)
    };
    exp(b, x) b.exp(x[0]);
    sigmoid(b, x) b.sigmoid(x[0]);
    softplus(b, x) b.softplus(x[0]);
    tanh(b, x) b.tanh(x[0]);
    gelu(b, x) b.gelu(x[0]);
    swiglu(b, x) {
        let silu = b.silu(x[0]);
        b.mul(silu, x[1])
    };
    dropout(b, x) b.dropout(x[0], 0, 0.1);
}
