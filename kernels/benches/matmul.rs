//! Matrix products at the sizes of a training step (six layers of 384 channels, 2048 tokens), on all threads, with factors
//! in `f32` (`false`) and `bf16` (`true`):
//! `cargo bench -p dataflow-kernels --bench matmul`. The rate is in floating-point operations (items) per second.

use dataflow_kernels::cpu::matmul::{Init, Mat, matmul, matmul_bf16};
use dataflow_kernels::cpu::team::Team;
use dataflow_kernels::{Rows, RowsMut};
use divan::counter::ItemsCount;

fn main() {
    Team::new(None).expect("the system starts threads").run(divan::main);
}

/// `(m, n, k)` of `[m, k] x [k, n]`.
const FORWARD: [(usize, usize, usize); 6] =
    [(2048, 1152, 384), (2048, 384, 384), (2048, 1024, 384), (2048, 384, 1024), (2048, 56, 768), (768, 384, 128)];
const WEIGHT: [(usize, usize, usize); 6] =
    [(1152, 384, 2048), (384, 384, 2048), (1024, 384, 2048), (384, 1024, 2048), (56, 768, 2048), (384, 128, 768)];

fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919) % 1009) as f32 / 1009.0 - 0.5).collect()
}

fn rate((m, n, k): (usize, usize, usize)) -> ItemsCount {
    ItemsCount::new(2 * m * n * k)
}

fn product<const BF16: bool>(c: RowsMut<'_>, a: Mat<'_>, b: Mat<'_>, init: Init<'_>) {
    if BF16 { matmul_bf16(c, a, b, init) } else { matmul(c, a, b, init) }
}

/// `y = x W^T`
#[divan::bench(args = FORWARD, consts = [false, true])]
fn linear<const BF16: bool>(bencher: divan::Bencher<'_, '_>, size: (usize, usize, usize)) {
    let (m, n, k) = size;
    let (x, w, mut y) = (numbers(m * k), numbers(n * k), vec![0.0; m * n]);
    bencher.counter(rate(size)).bench_local(|| {
        let (x, w) = (Mat::Normal(Rows::new(&x, m, k, k)), Mat::Transposed(Rows::new(&w, n, k, k)));
        product::<BF16>(RowsMut::new(&mut y, m, n, n), x, w, Init::Zero);
    });
}

/// `dx = dy W`
#[divan::bench(args = FORWARD, consts = [false, true])]
fn linear_input<const BF16: bool>(bencher: divan::Bencher<'_, '_>, size: (usize, usize, usize)) {
    let (m, n, k) = size;
    let (dy, w, mut dx) = (numbers(m * k), numbers(k * n), vec![0.0; m * n]);
    bencher.counter(rate(size)).bench_local(|| {
        let (dy, w) = (Mat::Normal(Rows::new(&dy, m, k, k)), Mat::Normal(Rows::new(&w, k, n, n)));
        product::<BF16>(RowsMut::new(&mut dx, m, n, n), dy, w, Init::Zero);
    });
}

/// `dW = dy^T x`
#[divan::bench(args = WEIGHT, consts = [false, true])]
fn linear_weight<const BF16: bool>(bencher: divan::Bencher<'_, '_>, size: (usize, usize, usize)) {
    let (m, n, k) = size;
    let (dy, x, mut dw) = (numbers(k * m), numbers(k * n), vec![0.0; m * n]);
    bencher.counter(rate(size)).bench_local(|| {
        let (dy, x) = (Mat::Transposed(Rows::new(&dy, k, m, m)), Mat::Normal(Rows::new(&x, k, n, n)));
        product::<BF16>(RowsMut::new(&mut dw, m, n, n), dy, x, Init::Zero);
    });
}
