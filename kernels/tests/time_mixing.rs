//! Token shift and causal convolution against the golden files and plain loops in `f64`.
mod golden;

use dataflow_kernels::cpu::conv1d::{self, Conv};
use dataflow_kernels::cpu::output::Output;
use dataflow_kernels::cpu::team::Team;
use dataflow_kernels::cpu::token_shift;
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

#[test]
fn golden_token_shift() {
    for case in cases("token_shift") {
        let &[_, len, cols] = case.get("in/x").shape.as_slice() else { panic!() };
        let (x, dy) = (case.data("in/x"), case.data("cot/y"));
        let (mut y, mut dx) = (vec![f32::NAN; x.len()], vec![f32::NAN; x.len()]);
        token_shift::forward(Rows::contiguous(x, cols), len, None, RowsMut::contiguous(&mut y, cols));
        assert_eq!(y, case.data("out/y"));
        token_shift::backward(Rows::contiguous(dy, cols), len, RowsMut::contiguous(&mut dx, cols), None);
        assert_eq!(dx, case.data("grad/x"));
    }
}

#[test]
fn token_shift_carries_a_state() {
    let (batch, len, cols) = (3, 5, 7);
    let (x, state, dy) = (random(batch * len * cols, 1), random(batch * cols, 2), random(batch * len * cols, 3));
    let mut y = vec![f32::NAN; x.len()];
    let state_rows = Rows::contiguous(&state, cols);
    token_shift::forward(Rows::contiguous(&x, cols), len, Some(state_rows), RowsMut::contiguous(&mut y, cols));
    let (mut dx, mut dstate) = (vec![f32::NAN; x.len()], vec![f32::NAN; state.len()]);
    let dstate_rows = RowsMut::contiguous(&mut dstate, cols);
    token_shift::backward(Rows::contiguous(&dy, cols), len, RowsMut::contiguous(&mut dx, cols), Some(dstate_rows));
    for b in 0..batch {
        let at = b * len * cols;
        assert_eq!(y[at..at + cols], state[b * cols..(b + 1) * cols]);
        assert_eq!(y[at + cols..at + len * cols], x[at..at + (len - 1) * cols]);
        assert_eq!(dstate[b * cols..(b + 1) * cols], dy[at..at + cols]);
        assert_eq!(dx[at..at + (len - 1) * cols], dy[at + cols..at + len * cols]);
    }
}

/// Outputs, dx, mix gradients one after the other, state gradient.
type Mixed = (Vec<Vec<f32>>, Vec<f32>, Vec<Vec<f32>>, Vec<f32>);

struct Mix {
    len: usize,
    cols: usize,
    x: Vec<f32>,
    state: Option<Vec<f32>>,
    mixes: Vec<Vec<f32>>,
    dys: Vec<Vec<f32>>,
}

impl Mix {
    fn run(&self) -> Mixed {
        let Mix { len, cols, .. } = *self;
        let x = Rows::contiguous(&self.x, cols);
        let mixes: Vec<&[f32]> = self.mixes.iter().map(|m| &m[..]).collect();
        let mut ys = vec![vec![f32::NAN; self.x.len()]; mixes.len()];
        let mut outputs: Vec<Output<'_>> = ys.iter_mut().map(|y| RowsMut::contiguous(y, cols).into()).collect();
        let state = self.state.as_ref().map(|s| Rows::contiguous(s, cols));
        token_shift::mix_forward(x, len, state, &mixes, &mut outputs);
        let mut rounded = vec![vec![Bf16::default(); self.x.len()]; mixes.len()];
        let mut outputs: Vec<Output<'_>> = rounded.iter_mut().map(|y| RowsMut::contiguous(y, cols).into()).collect();
        token_shift::mix_forward(x, len, state, &mixes, &mut outputs);
        let pairs = || rounded.iter().flatten().zip(ys.iter().flatten());
        assert!(pairs().all(|(a, b)| *a == Bf16::from_f32(*b)), "{cols} columns in bf16");
        let dys: Vec<Rows<'_>> = self.dys.iter().map(|d| Rows::contiguous(d, cols)).collect();
        let mut dx = vec![f32::NAN; self.x.len()];
        let mut dmixes = vec![vec![f32::NAN; cols]; mixes.len()];
        let mut dmix_slices: Vec<&mut [f32]> = dmixes.iter_mut().map(|m| &mut m[..]).collect();
        let mut dstate = vec![f32::NAN; self.x.len() / len];
        let (dx_rows, dstate_rows) = (RowsMut::contiguous(&mut dx, cols), RowsMut::contiguous(&mut dstate, cols));
        token_shift::mix_backward(x, len, state, &mixes, &dys, dx_rows, &mut dmix_slices, Some(dstate_rows));
        (ys, dx, dmixes, dstate)
    }

    fn expected(&self) -> Mixed {
        let Mix { len, cols, .. } = *self;
        let rows = self.x.len() / cols;
        let mut ys = vec![vec![0.0; self.x.len()]; self.mixes.len()];
        let mut dx = vec![0.0f64; self.x.len()];
        let mut dmixes = vec![vec![0.0f64; cols]; self.mixes.len()];
        let mut dstate = vec![0.0f64; rows / len * cols];
        for (r, c) in (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))) {
            let i = r * cols + c;
            let x = self.x[i] as f64;
            let prev = match &self.state {
                _ if r % len > 0 => self.x[i - cols] as f64,
                Some(state) => state[r / len * cols + c] as f64,
                None => 0.0,
            };
            for j in 0..self.mixes.len() {
                let (mix, dy) = (self.mixes[j][c] as f64, self.dys[j][i] as f64);
                ys[j][i] = (x + (prev - x) * mix) as f32;
                dx[i] += dy * (1.0 - mix);
                *if r % len > 0 { &mut dx[i - cols] } else { &mut dstate[r / len * cols + c] } += dy * mix;
                dmixes[j][c] += dy * (prev - x);
            }
        }
        let f32s = |v: Vec<f64>| v.into_iter().map(|x| x as f32).collect::<Vec<f32>>();
        (ys, f32s(dx), dmixes.into_iter().map(f32s).collect(), f32s(dstate))
    }
}

#[test]
fn mixing_agrees_with_f64_on_any_threads() {
    for (batch, len, cols, count, state) in [
        (3, 211, 133, 4, true),
        (70, 3, 40, 2, false),
        (5, 1, 17, 1, true),
        (2, 600, 64, 6, false),
        (1, 41, 1100, 3, true),
    ] {
        let size = batch * len * cols;
        let mix = Mix {
            len,
            cols,
            x: random(size, 1),
            state: state.then(|| random(batch * cols, 2)),
            mixes: (0..count).map(|j| random(cols, 3 + j as u32)).collect(),
            dys: (0..count).map(|j| random(size, 13 + j as u32)).collect(),
        };
        let (one, two, want) = (on_threads(1, || mix.run()), on_threads(2, || mix.run()), mix.expected());
        assert!(one == two, "depends on the threads");
        assert_close("dx", &one.1, &want.1, 1e-5);
        assert_close("dstate", &one.3, &want.3, 1e-5);
        for j in 0..count {
            assert_close("y", &one.0[j], &want.0[j], 1e-6);
            assert_close("dmix", &one.2[j], &want.2[j], 1e-5);
        }
    }
}

/// y, dx, dweight, dbias
type Convolved = (Vec<f32>, Vec<f32>, Vec<f32>, Vec<f32>);

fn run_conv(conv: Conv<'_>, x: &[f32], len: usize, window: Option<&[f32]>, dy: &[f32]) -> Convolved {
    let cols = conv.bias.unwrap().len();
    let (x, window) = (Rows::contiguous(x, cols), window.map(|w| Rows::contiguous(w, cols)));
    let (mut y, mut dx) = (vec![f32::NAN; dy.len()], vec![f32::NAN; dy.len()]);
    let (mut dweight, mut dbias) = (vec![f32::NAN; conv.weight.len()], vec![f32::NAN; cols]);
    conv1d::forward(conv, x, len, window, RowsMut::contiguous(&mut y, cols), None);
    let dx_rows = RowsMut::contiguous(&mut dx, cols);
    conv1d::backward(conv, x, len, window, Rows::contiguous(dy, cols), dx_rows, &mut dweight, Some(&mut dbias));
    (y, dx, dweight, dbias)
}

#[test]
fn golden_causal_conv1d_silu() {
    for case in cases("causal_conv1d_silu") {
        let rows = |name: &str| case.get(name).permute(&[0, 2, 1]).data;
        let conv = Conv { weight: case.data("in/weight"), bias: Some(case.data("in/bias")), silu: true };
        let (y, dx, dweight, dbias) = run_conv(conv, &rows("in/x"), case.size("T"), None, &rows("cot/y"));
        assert_close(&case.name, &y, &rows("out/y"), 1e-5);
        assert_close(&case.name, &dx, &rows("grad/x"), 1e-5);
        assert_close(&case.name, &dweight, case.data("grad/weight"), 1e-5);
        assert_close(&case.name, &dbias, case.data("grad/bias"), 1e-5);
    }
}

fn expected_conv(conv: Conv<'_>, x: &[f32], len: usize, window: Option<&[f32]>, dy: &[f32]) -> Convolved {
    let bias = conv.bias.unwrap();
    let (cols, taps) = (bias.len(), conv.weight.len() / bias.len());
    let (mut y, mut dx) = (vec![0.0; dy.len()], vec![0.0f64; dy.len()]);
    let (mut dweight, mut dbias) = (vec![0.0f64; conv.weight.len()], vec![0.0f64; cols]);
    for i in 0..x.len() {
        let (r, c) = (i / cols, i % cols);
        let (b, t) = (r / len, r % len);
        // the row that tap j sees, counted from the start of the window
        let seen = |j: usize| match (t + j).checked_sub(taps - 1) {
            Some(at) => x[(b * len + at) * cols + c] as f64,
            None => window.map_or(0.0, |w| w[(b * (taps - 1) + t + j) * cols + c] as f64),
        };
        let z = bias[c] as f64 + (0..taps).map(|j| conv.weight[c * taps + j] as f64 * seen(j)).sum::<f64>();
        let sigmoid = 1.0 / (1.0 + (-z).exp());
        let (value, slope) = if conv.silu { (z * sigmoid, sigmoid * (1.0 + z * (1.0 - sigmoid))) } else { (z, 1.0) };
        y[i] = value as f32;
        let dz = dy[i] as f64 * slope;
        dbias[c] += dz;
        for j in 0..taps {
            dweight[c * taps + j] += dz * seen(j);
            if t + j + 1 >= taps {
                dx[i - (taps - 1 - j) * cols] += dz * conv.weight[c * taps + j] as f64;
            }
        }
    }
    let f32s = |v: Vec<f64>| v.into_iter().map(|x| x as f32).collect::<Vec<f32>>();
    (y, f32s(dx), f32s(dweight), f32s(dbias))
}

#[test]
fn convolution_agrees_with_f64_on_any_threads() {
    for taps in 1..=conv1d::MAX_TAPS {
        for (batch, len, cols) in [(3, 211, 133), (90, 2, 19), (2, 700, 600), (5, 40, 16), (140, 37, 3)] {
            if cols == 600 && taps != 4 {
                continue;
            }
            let size = batch * len * cols;
            let (x, dy, window) = (random(size, 1), random(size, 2), random(batch * (taps - 1) * cols, 3));
            let (weight, bias) = (random(cols * taps, 4), random(cols, 5));
            let conv = Conv { weight: &weight, bias: Some(&bias), silu: taps != 3 };
            let window = (taps % 2 == 0).then_some(&window[..]);
            let one = on_threads(1, || run_conv(conv, &x, len, window, &dy));
            let two = on_threads(2, || run_conv(conv, &x, len, window, &dy));
            assert!(one == two, "depends on the threads");
            let want = expected_conv(conv, &x, len, window, &dy);
            assert_close("y", &one.0, &want.0, 1e-5);
            assert_close("dx", &one.1, &want.1, 1e-5);
            assert_close("dweight", &one.2, &want.2, 1e-5);
            assert_close("dbias", &one.3, &want.3, 1e-5);
        }
    }
}

#[test]
fn a_sequence_in_pieces_is_the_whole_sequence() {
    let (batch, len, cols, taps) = (2, 23, 21, 4);
    let (x, weight) = (random(batch * len * cols, 1), random(cols * taps, 2));
    let conv = Conv { weight: &weight, bias: None, silu: true };
    let mut whole = vec![f32::NAN; x.len()];
    conv1d::forward(conv, Rows::contiguous(&x, cols), len, None, RowsMut::contiguous(&mut whole, cols), None);
    let mut window = vec![0.0; batch * (taps - 1) * cols];
    let mut from = 0;
    for piece in [1, 2, 7, 1, 3, 9] {
        let cut = |v: &[f32]| -> Vec<f32> {
            (0..batch).flat_map(|b| v[(b * len + from) * cols..(b * len + from + piece) * cols].to_vec()).collect()
        };
        let (input, mut y, mut next) = (cut(&x), vec![f32::NAN; batch * piece * cols], vec![f32::NAN; window.len()]);
        conv1d::forward(
            conv,
            Rows::contiguous(&input, cols),
            piece,
            Some(Rows::contiguous(&window, cols)),
            RowsMut::contiguous(&mut y, cols),
            Some(RowsMut::contiguous(&mut next, cols)),
        );
        assert_close("piece", &y, &cut(&whole), 1e-6);
        window = next;
        from += piece;
    }
    assert_eq!(from, len);
}
