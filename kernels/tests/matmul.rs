//! Matrix products against golden files and sums in f64.

mod golden;

use dataflow_kernels::cpu::matmul::{Init, Mat, matmul, matmul_bf16, matmul_on_this_thread};
use dataflow_kernels::cpu::team::Team;
use dataflow_kernels::device::Bf16;
use dataflow_kernels::{Rows, RowsMut};
use golden::{assert_close, cases};

/// Numbers in -1..1.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }
    fn below(&mut self, n: usize) -> usize {
        self.next() as usize % n
    }
    fn float(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 30) as f32 - 1.0
    }
    /// Numbers that `bf16` has too, so that products of either kind must agree with the sums of f64.
    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.float() * 128.0).round() / 128.0).collect()
    }
}

/// An operand with gaps between its rows, in either orientation.
struct Operand {
    data: Vec<f32>,
    /// The same numbers.
    narrow: Vec<Bf16>,
    rows: usize,
    cols: usize,
    stride: usize,
    offset: usize,
    transposed: bool,
}

impl Operand {
    fn new(numbers: &mut Numbers, rows: usize, cols: usize, transposed: bool, gap: usize) -> Self {
        let (stored, width) = if transposed { (cols, rows) } else { (rows, cols) };
        let (stride, offset) = (width + gap, gap / 2);
        let data = numbers.floats(offset + stored * stride);
        let narrow = data.iter().map(|x| Bf16::from_f32(*x)).collect();
        Self { data, narrow, rows, cols, stride, offset, transposed }
    }
    fn mat(&self) -> Mat<'_> {
        self.of(&self.data)
    }
    fn narrow(&self) -> Mat<'_, Bf16> {
        self.of(&self.narrow)
    }
    fn of<'a, T>(&self, data: &'a [T]) -> Mat<'a, T> {
        let data = &data[self.offset..];
        if self.transposed {
            Mat::Transposed(Rows::new(data, self.cols, self.rows, self.stride))
        } else {
            Mat::Normal(Rows::new(data, self.rows, self.cols, self.stride))
        }
    }
    fn at(&self, r: usize, c: usize) -> f64 {
        let (r, c) = if self.transposed { (c, r) } else { (r, c) };
        self.data[self.offset + r * self.stride + c] as f64
    }
}

fn on_threads<R: Send>(threads: usize, body: impl FnOnce() -> R + Send) -> R {
    Team::new(Some(threads)).unwrap().run(body)
}

/// One shape in every orientation, with every start, against sums of f64; and 1 against 2 threads.
fn check(numbers: &mut Numbers, m: usize, n: usize, k: usize, gap: usize) {
    for case in 0..4 {
        let a = Operand::new(numbers, m, k, case & 1 != 0, gap);
        let b = Operand::new(numbers, k, n, case & 2 != 0, gap / 2);
        let bias = numbers.floats(n);
        let stride = n + gap;
        let before = numbers.floats(m * stride + gap);
        let mut exact = vec![0.0; m * n];
        for i in 0..m {
            for l in 0..k {
                let x = a.at(i, l);
                for j in 0..n {
                    exact[i * n + j] += x * b.at(l, j);
                }
            }
        }
        for (name, init) in [("zero", Init::Zero), ("accumulate", Init::Accumulate), ("bias", Init::Bias(&bias))] {
            let run = |f: &(dyn Fn(RowsMut<'_>) + Sync)| {
                let mut c = before.clone();
                f(RowsMut::new(&mut c[gap / 2..], m, n, stride));
                c
            };
            let single = |c: RowsMut<'_>| matmul(c, a.mat(), b.mat(), init);
            let got = on_threads(1, || run(&single));
            let mut want = before.clone();
            for i in 0..m {
                for j in 0..n {
                    let c = &mut want[gap / 2 + i * stride + j];
                    let start = match init {
                        Init::Zero => 0.0,
                        Init::Accumulate => *c as f64,
                        Init::Bias(bias) => bias[j] as f64,
                    };
                    *c = (start + exact[i * n + j]) as f32;
                }
            }
            // sums of k terms in order
            let tolerance = 1e-6 + 5e-8 * (k as f32).sqrt();
            let what = format!("{m} x {n} x {k}, orientation {case}, gap {gap}, {name}");
            assert_close(&what, &got, &want, tolerance);
            // what lies between the rows is somebody else's
            for (at, (x, y)) in got.iter().zip(&before).enumerate() {
                let inside = at >= gap / 2 && (at - gap / 2) % stride < n && (at - gap / 2) / stride < m;
                assert!(inside || x == y, "{what}: wrote at {at} between the rows");
            }
            assert!(got == on_threads(2, || run(&single)), "{what}: 1 and 2 threads differ");
            assert_close(&what, &run(&|c| matmul_on_this_thread(c, a.mat(), b.mat(), init)), &want, tolerance);
            let rounding = |c: RowsMut<'_>| matmul_bf16(c, a.mat(), b.mat(), init);
            let got = on_threads(1, || run(&rounding));
            assert_close(&format!("{what}, bf16"), &got, &want, tolerance);
            assert!(got == on_threads(2, || run(&rounding)), "{what}, bf16: 1 and 2 threads differ");
            // what is rounded already gives the same bits
            assert!(got == run(&|c| matmul_bf16(c, a.narrow(), b.mat(), init)), "{what}, a in bf16");
            assert!(got == run(&|c| matmul_bf16(c, a.mat(), b.narrow(), init)), "{what}, b in bf16");
            assert!(got == run(&|c| matmul_bf16(c, a.narrow(), b.narrow(), init)), "{what}, both in bf16");
            assert_close(&what, &run(&|c| matmul(c, a.narrow(), b.narrow(), init)), &want, tolerance);
        }
    }
}

#[test]
fn random_small_shapes() {
    let mut numbers = Numbers(1);
    for _ in 0..120 {
        let (m, n, k) = (1 + numbers.below(70), 1 + numbers.below(140), numbers.below(90));
        let gap = [0, 0, 3, 16][numbers.below(4)];
        check(&mut numbers, m, n, k, gap);
    }
}

#[test]
fn vectors() {
    let mut numbers = Numbers(2);
    for (m, n, k) in [(1, 1, 1), (1, 300, 77), (300, 1, 77), (3, 203, 129), (203, 4, 64), (1, 16, 1), (5, 1, 0)] {
        for gap in [0, 6] {
            check(&mut numbers, m, n, k, gap);
        }
    }
    check(&mut numbers, 1, 2500, 900, 0);
    check(&mut numbers, 2500, 1, 900, 2);
}

#[test]
fn large_shapes() {
    let mut numbers = Numbers(3);
    // several blocks of k, of rows and of columns, and chunks of b
    for (m, n, k, gap) in [
        (333, 65, 384, 0),
        (24, 200, 1025, 4),
        (130, 1200, 300, 0),
        (40, 2100, 520, 2),
        (65, 96, 5000, 0),
        (300, 300, 24, 0),
        (500, 24, 200, 0),
        (300, 20, 1100, 4),
        (2000, 17, 70, 2),
        (96, 1100, 130, 0),
        (7, 50, 3000, 8),
        (200, 33000, 2, 0),
    ] {
        check(&mut numbers, m, n, k, gap);
    }
}

#[test]
fn bf16_rounds_to_nearest() {
    // every number meets a one: once as the left factor, once as the right one, along and across `k`
    let n = 32;
    let mut numbers = vec![0.0f32; n * n];
    let special =
        [1.0, 257.0, 258.0, 259.0, -257.0, -259.0, 1.0 + 1.0 / 512.0, 3.0e38, 1.0e-30, f32::INFINITY, f32::NAN];
    let rounded = [1.0, 256.0, 258.0, 260.0, -256.0, -260.0, 1.0, 3.0e38, 1.0e-30, f32::INFINITY, f32::NAN];
    let one = {
        let mut one = vec![0.0f32; n * n];
        (0..n).for_each(|i| one[i * n + i] = 1.0);
        one
    };
    for (i, (x, want)) in special.into_iter().zip(rounded).enumerate() {
        numbers.fill(0.0);
        numbers[i * n + i] = x;
        let m = Rows::contiguous(&numbers, n);
        let one = Rows::contiguous(&one, n);
        let products = [(m, one), (one, m)].into_iter().flat_map(|(a, b)| {
            let normal = (Mat::Normal(a), Mat::Normal(b));
            [normal, (Mat::Transposed(a), Mat::Normal(b)), (Mat::Normal(a), Mat::Transposed(b))]
        });
        for (a, b) in products {
            let mut c = vec![0.0; n * n];
            matmul_bf16(RowsMut::contiguous(&mut c, n), a, b, Init::Zero);
            let got = c[i * n + i];
            let close = (got - want).abs() <= want.abs() / 256.0;
            let exact = want.abs() > 1e30 || want.abs() < 1e-20 || got == want;
            assert!(got == want || (close && exact) || (got.is_nan() && !want.is_finite()), "{x}: {got}, not {want}");
        }
    }
}

#[test]
#[should_panic(expected = "is not")]
fn sizes_must_agree() {
    let (a, b, mut c) = ([0.0; 6], [0.0; 6], [0.0; 4]);
    let (a, b) = (Mat::Normal(Rows::contiguous(&a, 3)), Mat::Normal(Rows::contiguous(&b, 3)));
    matmul(RowsMut::contiguous(&mut c, 2), a, b, Init::Zero);
}

/// `c = a b` of slices without gaps.
fn product(a: Mat<'_>, b: Mat<'_>, init: Init<'_>) -> Vec<f32> {
    let mut c = vec![f32::NAN; a.rows() * b.cols()];
    matmul(RowsMut::contiguous(&mut c, b.cols()), a, b, init);
    c
}

#[test]
fn golden_linear() {
    for case in cases("linear") {
        let weight = case.get("in/weight");
        let (outputs, inputs) = (weight.shape[0], weight.shape[1]);
        let x = Rows::contiguous(case.data("in/x"), inputs);
        let dy = Rows::contiguous(case.data("cot/y"), outputs);
        let weight = Rows::contiguous(&weight.data, inputs);
        let init = if case.has("in/bias") { Init::Bias(case.data("in/bias")) } else { Init::Zero };
        let y = product(Mat::Normal(x), Mat::Transposed(weight), init);
        assert_close("y", &y, case.data("out/y"), 1e-6);
        let dx = product(Mat::Normal(dy), Mat::Normal(weight), Init::Zero);
        assert_close("dx", &dx, case.data("grad/x"), 1e-6);
        let dw = product(Mat::Transposed(dy), Mat::Normal(x), Init::Zero);
        assert_close("dweight", &dw, case.data("grad/weight"), 1e-6);
    }
}

#[test]
fn golden_matmul() {
    for case in cases("matmul") {
        let (a, b) = (case.get("in/a"), case.get("in/b"));
        let d = a.shape.len();
        let (m, k, n) = (a.shape[d - 2], a.shape[d - 1], b.shape[d - 1]);
        for i in 0..a.data.len() / (m * k) {
            let a = Rows::contiguous(&a.data[i * m * k..][..m * k], k);
            let b = Rows::contiguous(&b.data[i * k * n..][..k * n], n);
            let dy = Rows::contiguous(&case.data("cot/y")[i * m * n..][..m * n], n);
            let y = product(Mat::Normal(a), Mat::Normal(b), Init::Zero);
            assert_close("y", &y, &case.data("out/y")[i * m * n..][..m * n], 1e-6);
            let da = product(Mat::Normal(dy), Mat::Transposed(b), Init::Zero);
            assert_close("da", &da, &case.data("grad/a")[i * m * k..][..m * k], 1e-6);
            let db = product(Mat::Transposed(a), Mat::Normal(dy), Init::Zero);
            assert_close("db", &db, &case.data("grad/b")[i * k * n..][..k * n], 1e-6);
        }
    }
}
