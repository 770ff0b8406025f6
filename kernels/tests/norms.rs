//! RMS, layer and group norm against the golden files and a loop in `f64`.
mod golden;

use dataflow_kernels::cpu::norm::{Kind, Norm, Residual, backward, forward};
use dataflow_kernels::cpu::team::Team;
use dataflow_kernels::device::Bf16;
use dataflow_kernels::{Rows, RowsMut};
use golden::{assert_close, cases};

fn random(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2654435761).wrapping_add(12345);
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 8) as f32 / 8388608.0 - 1.0
        })
        .collect()
}

fn on_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    Team::new(Some(threads)).unwrap().run(f)
}

struct Results {
    y: Vec<f32>,
    h: Vec<f32>,
    dx: Vec<f32>,
    dweight: Vec<f32>,
    dbias: Vec<f32>,
}

struct Inputs {
    norm: Norm,
    cols: usize,
    x: Vec<f32>,
    residual: Option<Vec<f32>>,
    weight: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
    dy: Vec<f32>,
    dh: Option<Vec<f32>>,
}

impl Inputs {
    fn run(&self) -> Results {
        let (norm, cols, len) = (self.norm, self.cols, self.x.len());
        let rows = len / cols;
        let (weight, bias) = (self.weight.as_deref(), self.bias.as_deref());
        let mut stats = vec![f32::NAN; rows * norm.stats_per_row()];
        let (mut y, mut h, mut dx) = (vec![f32::NAN; len], vec![f32::NAN; len], vec![f32::NAN; len]);
        let (mut dweight, mut dbias) = (vec![f32::NAN; cols], vec![f32::NAN; cols]);
        let residual = self
            .residual
            .as_ref()
            .map(|r| Residual { residual: Rows::contiguous(r, cols), h: RowsMut::contiguous(&mut h, cols) });
        let x = Rows::contiguous(&self.x, cols);
        forward(norm, x, residual, weight, bias, RowsMut::contiguous(&mut y, cols), Some(&mut stats));
        let mut rounded = vec![Bf16::default(); len];
        let residual = self.residual.as_ref().map(|r| {
            let residual = Rows::contiguous(r, cols);
            Residual { residual, h: RowsMut::contiguous(&mut h, cols) }
        });
        forward(norm, x, residual, weight, bias, RowsMut::contiguous(&mut rounded, cols), None);
        assert!(rounded.iter().zip(&y).all(|(a, b)| *a == Bf16::from_f32(*b)), "{norm:?}, {cols} columns in bf16");
        let input = if self.residual.is_some() { &h } else { &self.x };
        backward(
            norm,
            Rows::contiguous(input, cols),
            &stats,
            weight,
            Rows::contiguous(&self.dy, cols),
            self.dh.as_ref().map(|dh| Rows::contiguous(dh, cols)),
            RowsMut::contiguous(&mut dx, cols),
            weight.map(|_| &mut dweight[..]),
            bias.map(|_| &mut dbias[..]),
        );
        Results { y, h, dx, dweight, dbias }
    }

    /// The same in f64.
    fn expected(&self) -> Results {
        let (cols, groups) = (self.cols, self.norm.groups);
        let width = cols / groups;
        let f32s = |v: Vec<f64>| v.into_iter().map(|x| x as f32).collect::<Vec<f32>>();
        let h: Vec<f64> =
            (0..self.x.len()).map(|i| (self.x[i] + self.residual.as_ref().map_or(0.0, |r| r[i])) as f64).collect();
        let (mut y, mut dx) = (vec![0.0; h.len()], vec![0.0; h.len()]);
        let (mut dweight, mut dbias) = (vec![0.0; cols], vec![0.0; cols]);
        for start in (0..h.len()).step_by(width) {
            let v = &h[start..start + width];
            let layer = self.norm.kind == Kind::Layer;
            let mean = if layer { v.iter().sum::<f64>() / width as f64 } else { 0.0 };
            let var = v.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
            let inv = 1.0 / (var + self.norm.eps as f64).sqrt();
            let c = |i: usize| (start + i) % cols;
            let weight = |i: usize| self.weight.as_ref().map_or(1.0, |w| w[c(i)] as f64);
            let n = |i: usize| (v[i] - mean) * inv;
            let g = |i: usize| self.dy[start + i] as f64 * weight(i);
            let g_mean = if layer { (0..width).map(g).sum::<f64>() / width as f64 } else { 0.0 };
            let gn_mean = (0..width).map(|i| g(i) * n(i)).sum::<f64>() / width as f64;
            for i in 0..width {
                y[start + i] = n(i) * weight(i) + self.bias.as_ref().map_or(0.0, |b| b[c(i)] as f64);
                let dh = self.dh.as_ref().map_or(0.0, |dh| dh[start + i] as f64);
                dx[start + i] = inv * (g(i) - g_mean - n(i) * gn_mean) + dh;
                dweight[c(i)] += self.dy[start + i] as f64 * n(i);
                dbias[c(i)] += self.dy[start + i] as f64;
            }
        }
        Results { y: f32s(y), h: f32s(h), dx: f32s(dx), dweight: f32s(dweight), dbias: f32s(dbias) }
    }
}

#[test]
fn golden_cases() {
    for (op, kind) in [("rms_norm", Kind::Rms), ("layer_norm", Kind::Layer), ("group_norm", Kind::Layer)] {
        for case in cases(op) {
            let groups = if op == "group_norm" { case.size("groups") } else { 1 };
            let x = case.get("in/x");
            let parameter = |name: &str| case.has(name).then(|| case.data(name).to_vec());
            let inputs = Inputs {
                norm: Norm { kind, groups, eps: case.attrs["eps"].as_f64().unwrap() as f32 },
                cols: *x.shape.last().unwrap(),
                x: x.data.clone(),
                residual: None,
                weight: parameter("in/weight"),
                bias: parameter("in/bias"),
                dy: case.data("cot/y").to_vec(),
                dh: None,
            };
            let got = inputs.run();
            let name = format!("{op} {}", case.name);
            assert_close(&name, &got.y, case.data("out/y"), 1e-5);
            assert_close(&name, &got.dx, case.data("grad/x"), 1e-5);
            if inputs.weight.is_some() {
                assert_close(&name, &got.dweight, case.data("grad/weight"), 1e-5);
            }
            if inputs.bias.is_some() {
                assert_close(&name, &got.dbias, case.data("grad/bias"), 1e-5);
            }
        }
    }
}

#[test]
fn odd_shapes_with_residual_agree_with_f64_on_any_threads() {
    for (rows, groups, width) in [(1037, 1, 131), (259, 6, 37), (40, 12, 64), (3, 1, 2500)] {
        for kind in [Kind::Rms, Kind::Layer] {
            let (cols, len) = (groups * width, rows * groups * width);
            let inputs = Inputs {
                norm: Norm { kind, groups, eps: 1e-5 },
                cols,
                x: random(len, 1).iter().map(|x| x + 3.0).collect(),
                residual: Some(random(len, 2)),
                weight: Some(random(cols, 3)),
                bias: Some(random(cols, 4)),
                dy: random(len, 5),
                dh: Some(random(len, 6)),
            };
            let (one, two) = (on_threads(1, || inputs.run()), on_threads(2, || inputs.run()));
            let want = inputs.expected();
            for (name, one, two, want) in [
                ("y", &one.y, &two.y, &want.y),
                ("h", &one.h, &two.h, &want.h),
                ("dx", &one.dx, &two.dx, &want.dx),
                ("dweight", &one.dweight, &two.dweight, &want.dweight),
                ("dbias", &one.dbias, &two.dbias, &want.dbias),
            ] {
                assert_eq!(one, two, "{name} depends on the threads");
                assert_close(name, one, want, 1e-5);
            }
        }
    }
}

#[test]
fn column_slices_leave_the_rest_alone() {
    let (rows, cols, stride) = (9, 20, 33);
    let x = random(rows * stride, 1);
    let mut y = vec![7.0; rows * stride];
    let norm = Norm { kind: Kind::Rms, groups: 2, eps: 1e-5 };
    forward(
        norm,
        Rows::new(&x[3..], rows, cols, stride),
        None,
        None,
        None,
        RowsMut::new(&mut y[5..], rows, cols, stride),
        None,
    );
    for r in 0..rows {
        let input = &x[3 + r * stride..][..cols];
        let inv = |g: usize| 1.0 / (input[g * 10..][..10].iter().map(|x| x * x).sum::<f32>() / 10.0 + 1e-5).sqrt();
        let want: Vec<f32> = (0..cols).map(|c| input[c] * inv(c / 10)).collect();
        assert_close("slice", &y[5 + r * stride..][..cols], &want, 1e-6);
        assert!(y[r * stride..r * stride + 5].iter().all(|&v| v == 7.0));
    }
    assert!(y[5 + 8 * stride + cols..].iter().all(|&v| v == 7.0));
}

#[test]
fn no_rows_give_zero_parameter_gradients() {
    let norm = Norm { kind: Kind::Layer, groups: 1, eps: 1e-5 };
    let (mut dweight, mut dbias) = (vec![1.0; 5], vec![1.0; 5]);
    let none = || Rows::new(&[], 0, 5, 5);
    backward(
        norm,
        none(),
        &[],
        None,
        none(),
        None,
        RowsMut::new(&mut [], 0, 5, 5),
        Some(&mut dweight),
        Some(&mut dbias),
    );
    assert_eq!((dweight, dbias), (vec![0.0; 5], vec![0.0; 5]));
}
