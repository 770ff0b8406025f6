//! RWKV x051a and gated linear attention against golden data, plain recurrences in f64, and themselves.
mod golden;

use dataflow_kernels::cpu::team::Team;
use dataflow_kernels::cpu::{gla::*, wkv::*};
use dataflow_kernels::device::Bf16;
use dataflow_kernels::{Rows, RowsMut};
use golden::{assert_close, cases};

/// Reproducible numbers in -1..1.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

#[derive(Clone, Copy)]
struct Size {
    b: usize,
    t: usize,
    h: usize,
    dk: usize,
    dv: usize,
}

/// A matrix with gaps between its rows, as if it were some columns of a wider one.
struct Wide {
    data: Vec<f32>,
    rows: usize,
    cols: usize,
}

const GAP: usize = 3;

impl Wide {
    fn new(dense: &[f32], cols: usize) -> Self {
        let rows = dense.len() / cols;
        let mut data = vec![f32::NAN; rows * (cols + GAP)];
        for r in 0..rows {
            data[r * (cols + GAP)..][..cols].copy_from_slice(&dense[r * cols..][..cols]);
        }
        Self { data, rows, cols }
    }
    fn empty(rows: usize, cols: usize) -> Self {
        Self { data: vec![f32::NAN; rows * (cols + GAP)], rows, cols }
    }
    fn rows(&self) -> Rows<'_> {
        Rows::new(&self.data, self.rows, self.cols, self.cols + GAP)
    }
    fn rows_mut(&mut self) -> RowsMut<'_> {
        RowsMut::new(&mut self.data, self.rows, self.cols, self.cols + GAP)
    }
    fn dense(&self) -> Vec<f32> {
        for row in self.data.chunks_exact(self.cols + GAP) {
            assert!(row[self.cols..].iter().all(|x| x.is_nan()), "wrote into the gap");
        }
        (0..self.rows).flat_map(|r| self.rows().row(r).to_vec()).collect()
    }
}

/// `[y, dr, dk, dv, d_time_decay, d_time_faaaa]`
fn run_wkv(n: Size, [r, k, v, decay, bonus, dy]: [&[f32]; 6]) -> Vec<Vec<f32>> {
    let width = n.h * n.dk;
    let [r, k, v, dy] = [r, k, v, dy].map(|x| Wide::new(x, width));
    let [mut y, mut dr, mut dk, mut dv] = [0; 4].map(|_| Wide::empty(n.b * n.t, width));
    let mut kept = vec![f32::NAN; wkv_boundaries_len(n.b, n.t, n.h, n.dk)];
    wkv_forward(y.rows_mut(), r.rows(), k.rows(), v.rows(), decay, bonus, n.b, None, None, Some(&mut kept));
    let (mut d_decay, mut d_bonus) = (vec![f32::NAN; n.h], vec![f32::NAN; n.h]);
    wkv_backward(
        dr.rows_mut(),
        dk.rows_mut(),
        dv.rows_mut(),
        &mut d_decay,
        &mut d_bonus,
        dy.rows(),
        r.rows(),
        k.rows(),
        v.rows(),
        decay,
        bonus,
        n.b,
        &kept,
    );
    let mut rounded = [0; 3].map(|_| vec![Bf16::default(); n.b * n.t * width]);
    let [gr, gk, gv] = rounded.each_mut().map(|x| RowsMut::contiguous(x, width));
    let (mut unused, mut other) = (vec![0.0; n.h], vec![0.0; n.h]);
    let (dy, r, k, v) = (dy.rows(), r.rows(), k.rows(), v.rows());
    wkv_backward(gr, gk, gv, &mut unused, &mut other, dy, r, k, v, decay, bonus, n.b, &kept);
    assert!(rounded.iter().zip([&dr, &dk, &dv]).all(|(x, y)| is_rounded(x, &y.dense())), "gradients in bf16");
    vec![y.dense(), dr.dense(), dk.dense(), dv.dense(), d_decay, d_bonus]
}

fn is_rounded(narrow: &[Bf16], whole: &[f32]) -> bool {
    narrow.iter().zip(whole).all(|(x, y)| *x == Bf16::from_f32(*y))
}

/// `[y, dq, dk, dv, d_log_gate]`
fn run_gla(n: Size, [q, k, v, g, dy]: [&[f32]; 5]) -> Vec<Vec<f32>> {
    let [q, k, g] = [q, k, g].map(|x| Wide::new(x, n.h * n.dk));
    let [v, dy] = [v, dy].map(|x| Wide::new(x, n.h * n.dv));
    let [mut dq, mut dk, mut dg] = [0; 3].map(|_| Wide::empty(n.b * n.t, n.h * n.dk));
    let [mut y, mut dv] = [0; 2].map(|_| Wide::empty(n.b * n.t, n.h * n.dv));
    let mut kept = vec![f32::NAN; gla_boundaries_len(n.b, n.t, n.h, n.dk, n.dv)];
    gla_forward(y.rows_mut(), q.rows(), k.rows(), v.rows(), g.rows(), None, n.b, n.h, None, None, Some(&mut kept));
    gla_backward(
        dq.rows_mut(),
        dk.rows_mut(),
        dv.rows_mut(),
        dg.rows_mut(),
        dy.rows(),
        q.rows(),
        k.rows(),
        v.rows(),
        g.rows(),
        None,
        n.b,
        n.h,
        &kept,
    );
    let (keys, values) = (n.b * n.t * n.h * n.dk, n.b * n.t * n.h * n.dv);
    let mut rounded = [keys, keys, values, keys].map(|len| vec![Bf16::default(); len]);
    let [gq, gk, gv, gg] = &mut rounded;
    let [gq, gk, gg] = [gq, gk, gg].map(|x| RowsMut::contiguous(x, n.h * n.dk));
    let gv = RowsMut::contiguous(gv, n.h * n.dv);
    let (dy, q, k, v, g) = (dy.rows(), q.rows(), k.rows(), v.rows(), g.rows());
    gla_backward(gq, gk, gv, gg, dy, q, k, v, g, None, n.b, n.h, &kept);
    assert!(rounded.iter().zip([&dq, &dk, &dv, &dg]).all(|(x, y)| is_rounded(x, &y.dense())), "gradients in bf16");
    vec![y.dense(), dq.dense(), dk.dense(), dv.dense(), dg.dense()]
}

/// The recurrences token by token in f64, with all states kept, and their gradients.
///
/// `gate` gives `(decay, d decay / d parameter)` per `(b, t, h, d)`; with `bonus` (per head) the state is read
/// before the token is added. Returns `[y, dq, dk, dv, d parameter per gate]` and the bonus gradient per head.
fn plain(
    n: Size,
    [q, k, v, dy]: [&[f32]; 4],
    gate: &dyn Fn(usize, usize) -> (f64, f64),
    bonus: Option<&[f32]>,
    scale: f64,
) -> (Vec<Vec<f32>>, Vec<f32>) {
    let (wk, wv) = (n.h * n.dk, n.h * n.dv);
    let mut out = [wv, wk, wk, wv, wk].map(|w| vec![0.0f64; n.b * n.t * w]);
    let mut d_bonus = vec![0.0f64; n.h];
    let len = n.dk * n.dv;
    for b in 0..n.b {
        for h in 0..n.h {
            let key = |t: usize, d: usize| (b * n.t + t) * wk + h * n.dk + d;
            let value = |t: usize, e: usize| (b * n.t + t) * wv + h * n.dv + e;
            let (at, u) = (|x: &[f32], i: usize| f64::from(x[i]), bonus.map(|u| f64::from(u[h])));
            let mut states = vec![vec![0.0f64; len]];
            for t in 0..n.t {
                let mut next = states[t].clone();
                for d in 0..n.dk {
                    let a = gate(key(t, d), h).0;
                    for e in 0..n.dv {
                        let (old, kv) = (states[t][d * n.dv + e], at(k, key(t, d)) * at(v, value(t, e)));
                        next[d * n.dv + e] = a * old + kv;
                        let seen = u.map_or(a * old + kv, |u| old + u * kv);
                        out[0][value(t, e)] += scale * at(q, key(t, d)) * seen;
                    }
                }
                states.push(next);
            }
            let mut grad = vec![0.0f64; len];
            for t in (0..n.t).rev() {
                for d in 0..n.dk {
                    let (a, slope) = gate(key(t, d), h);
                    let (qd, kd) = (scale * at(q, key(t, d)), at(k, key(t, d)));
                    for e in 0..n.dv {
                        let i = d * n.dv + e;
                        let (ve, dye, old) = (at(v, value(t, e)), at(dy, value(t, e)), states[t][i]);
                        let mut own = grad[i];
                        let mut later = 0.0;
                        match u {
                            Some(u) => {
                                out[1][key(t, d)] += scale * dye * (old + u * kd * ve);
                                d_bonus[h] += qd * dye * kd * ve;
                                out[2][key(t, d)] += u * qd * dye * ve;
                                out[3][value(t, e)] += u * qd * dye * kd;
                                later = qd * dye;
                            }
                            None => {
                                out[1][key(t, d)] += scale * dye * states[t + 1][i];
                                own += qd * dye;
                            }
                        }
                        out[2][key(t, d)] += own * ve;
                        out[3][value(t, e)] += own * kd;
                        out[4][key(t, d)] += own * old * slope;
                        grad[i] = a * own + later;
                    }
                }
            }
        }
    }
    let f32s = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
    (out.iter().map(|x| f32s(x)).collect(), f32s(&d_bonus))
}

fn plain_wkv(n: Size, [r, k, v, decay, bonus, dy]: [&[f32]; 6]) -> Vec<Vec<f32>> {
    let gate = |_: usize, h: usize| {
        let rate = f64::from(decay[h]).exp();
        ((-rate).exp(), if rate < 1e3 { -rate * (-rate).exp() } else { 0.0 })
    };
    let (mut out, d_bonus) = plain(n, [r, k, v, dy], &gate, Some(bonus), 1.0);
    let per_gate = out.pop().unwrap();
    let mut d_decay = vec![0.0f64; n.h];
    for (i, x) in per_gate.iter().enumerate() {
        d_decay[i / n.dk % n.h] += f64::from(*x);
    }
    out.push(d_decay.iter().map(|&x| x as f32).collect());
    out.push(d_bonus);
    out
}

fn plain_gla(n: Size, [q, k, v, g, dy]: [&[f32]; 5]) -> Vec<Vec<f32>> {
    let gate = |i: usize, _: usize| (f64::from(g[i]).exp(), f64::from(g[i]).exp());
    plain(n, [q, k, v, dy], &gate, None, (n.dk as f64).powf(-0.5)).0
}

const WKV: [&str; 6] = ["y", "dr", "dk", "dv", "d_time_decay", "d_time_faaaa"];
const GLA: [&str; 5] = ["y", "dq", "dk", "dv", "d_log_gate"];

fn compare(what: &str, names: &[&str], got: &[Vec<f32>], want: &[Vec<f32>], tolerance: f32) {
    for ((name, got), want) in names.iter().zip(got).zip(want) {
        assert_close(&format!("{what} {name}"), got, want, tolerance);
    }
}

#[test]
fn golden_wkv() {
    for case in cases("wkv_x051a") {
        let n =
            Size { b: case.size("B"), t: case.size("T"), h: case.size("H"), dk: case.size("N"), dv: case.size("N") };
        let rows = |name: &str| case.get(name).permute(&[0, 2, 1, 3]).data;
        let [r, k, v, dy] = ["in/r", "in/k", "in/v", "cot/y"].map(rows);
        let got = run_wkv(n, [&r, &k, &v, case.data("in/time_decay"), case.data("in/time_faaaa"), &dy]);
        let mut want: Vec<Vec<f32>> = ["out/y", "grad/r", "grad/k", "grad/v"].map(rows).to_vec();
        want.extend(["grad/time_decay", "grad/time_faaaa"].map(|name| case.data(name).to_vec()));
        compare(&case.name, &WKV, &got, &want, 2e-6);
    }
}

#[test]
fn golden_gla() {
    for case in cases("gla") {
        let n =
            Size { b: case.size("B"), t: case.size("T"), h: case.size("H"), dk: case.size("Dk"), dv: case.size("Dv") };
        let rows = |name: &str| case.get(name).permute(&[0, 2, 1, 3]).data;
        let [q, k, v, g, dy] = ["in/q", "in/k", "in/v", "in/log_gate", "cot/y"].map(rows);
        let got = run_gla(n, [&q, &k, &v, &g, &dy]);
        let want = ["out/y", "grad/q", "grad/k", "grad/v", "grad/log_gate"].map(rows);
        compare(&case.name, &GLA, &got, &want, 2e-6);
    }
}

/// Awkward sizes, around the lengths of chunks and spans.
const SIZES: [Size; 6] = [
    Size { b: 2, t: 150, h: 2, dk: 64, dv: 64 },
    Size { b: 1, t: 64, h: 3, dk: 32, dv: 32 },
    Size { b: 2, t: 65, h: 1, dk: 10, dv: 10 },
    Size { b: 1, t: 1, h: 2, dk: 7, dv: 7 },
    Size { b: 1, t: 17, h: 1, dk: 48, dv: 48 },
    Size { b: 3, t: 129, h: 2, dk: 5, dv: 5 },
];

fn wkv_inputs(n: Size, decay: f32) -> [Vec<f32>; 6] {
    let all = n.b * n.t * n.h * n.dk;
    let decays = (0..n.h).map(|h| decay + 0.3 * h as f32).collect();
    [noise(all, 1), noise(all, 2), noise(all, 3), decays, noise(n.h, 4), noise(all, 5)]
}

#[test]
fn wkv_equals_the_recurrence_for_any_decay() {
    for n in SIZES {
        // w from 1 - 5e-5 to exp(-3e26), and infinite rates
        for decay in [-10.0, -3.0, 0.0, 2.0, 5.0, 60.0, 1e4] {
            let inputs = wkv_inputs(n, decay);
            let inputs = inputs.each_ref().map(|x| x.as_slice());
            let (got, want) = (run_wkv(n, inputs), plain_wkv(n, inputs));
            compare(&format!("T {} N {} decay {decay}", n.t, n.dk), &WKV[..4], &got[..4], &want[..4], 5e-6);
            // sums over all tokens of terms of both signs
            compare(&format!("T {} N {} decay {decay}", n.t, n.dk), &WKV[4..], &got[4..], &want[4..], 2e-5);
        }
    }
}

fn gla_inputs(n: Size, gate: &dyn Fn(usize, f32) -> f32) -> [Vec<f32>; 5] {
    let (keys, values) = (n.b * n.t * n.h * n.dk, n.b * n.t * n.h * n.dv);
    let gates = noise(keys, 4).into_iter().enumerate().map(|(i, x)| gate(i, 0.5 * (x + 1.0))).collect();
    [noise(keys, 1), noise(keys, 2), noise(values, 3), gates, noise(values, 5)]
}

#[test]
fn gla_equals_the_recurrence_for_any_gate() {
    type Gate = fn(usize, f32) -> f32;
    let gates: [(&str, Gate); 8] = [
        ("none", |_, _| 0.0),
        ("weak", |_, x| -1e-3 * x),
        ("ordinary", |_, x| x.max(1e-6).ln() / 16.0),
        ("log sigmoid", |_, x| x.max(1e-6).ln()),
        ("strong", |_, x| -20.0 - x),
        ("very strong", |_, x| -200.0 * x - 80.0),
        ("mixed", |i, x| if i % 3 == 0 { -30.0 * x } else { -0.01 * x }),
        ("bursts", |i, x| if i / 97 % 2 == 0 { -25.0 } else { -0.001 * x }),
    ];
    for n in SIZES {
        for n in [n, Size { dv: n.dv + 9, ..n }, Size { dk: n.dk / 2, ..n }] {
            for (name, gate) in gates {
                let inputs = gla_inputs(n, &gate);
                let inputs = inputs.each_ref().map(|x| x.as_slice());
                let (got, want) = (run_gla(n, inputs), plain_gla(n, inputs));
                let name = format!("T {} Dk {} Dv {} {name}", n.t, n.dk, n.dv);
                compare(&name, &GLA[..4], &got[..4], &want[..4], 1e-5);
                // gradients that vanish cannot be compared in relation to their size
                if want[4].iter().any(|x| x.abs() > 1e-30) {
                    compare(&name, &GLA[4..], &got[4..], &want[4..], 1e-5);
                }
                assert!(got[4].iter().all(|x| x.is_finite()), "{name}");
            }
        }
    }
}

fn columns(x: &[f32], width: usize, n: Size, from: usize, to: usize) -> Vec<f32> {
    (0..n.b).flat_map(|b| x[(b * n.t + from) * width..(b * n.t + to) * width].to_vec()).collect::<Vec<f32>>()
}

#[test]
fn wkv_in_pieces_equals_the_whole() {
    let n = Size { b: 2, t: 90, h: 3, dk: 70, dv: 70 };
    let width = n.h * n.dk;
    let [r, k, v, decay, bonus, _] = wkv_inputs(n, -2.0);
    let forward = |piece: &[Vec<f32>; 3], initial: Option<&[f32]>| {
        let mut y = vec![f32::NAN; piece[0].len()];
        let mut last = vec![f32::NAN; n.b * n.h * n.dk * n.dk];
        let [r, k, v] = piece.each_ref().map(|x| Rows::contiguous(x, width));
        let out = RowsMut::contiguous(&mut y, width);
        wkv_forward(out, r, k, v, &decay, &bonus, n.b, initial, Some(&mut last), None);
        (y, last)
    };
    let cut = |from, to| [&r, &k, &v].map(|x| columns(x, width, n, from, to));
    let (whole, whole_state) = forward(&cut(0, n.t), None);
    // two pieces, then a few tokens one by one
    let (first, state) = forward(&cut(0, 41), None);
    let (second, mut state) = forward(&cut(41, 80), Some(&state));
    assert_close("first", &first, &columns(&whole, width, n, 0, 41), 2e-6);
    assert_close("second", &second, &columns(&whole, width, n, 41, 80), 2e-6);
    for t in 80..n.t {
        let piece = cut(t, t + 1);
        let [r, k, v] = piece.each_ref().map(|x| Rows::contiguous(x, width));
        let mut y = vec![f32::NAN; n.b * width];
        wkv_step(RowsMut::contiguous(&mut y, width), &mut state, r, k, v, &decay, &bonus);
        assert_close("step", &y, &columns(&whole, width, n, t, t + 1), 2e-6);
    }
    assert_close("state", &state, &whole_state, 2e-6);
}

#[test]
fn gla_in_pieces_equals_the_whole() {
    let n = Size { b: 2, t: 90, h: 3, dk: 37, dv: 70 };
    let (keys, values) = (n.h * n.dk, n.h * n.dv);
    let [q, k, v, g, _] = gla_inputs(n, &|_, x| x.max(1e-6).ln() / 16.0);
    let forward = |piece: &[Vec<f32>; 4], initial: Option<&[f32]>| {
        let mut y = vec![f32::NAN; piece[3].len()];
        let mut last = vec![f32::NAN; n.b * n.h * n.dk * n.dv];
        let [q, k, g] = [0, 1, 2].map(|i| Rows::contiguous(&piece[i], keys));
        let v = Rows::contiguous(&piece[3], values);
        let out = RowsMut::contiguous(&mut y, values);
        gla_forward(out, q, k, v, g, Some(0.3), n.b, n.h, initial, Some(&mut last), None);
        (y, last)
    };
    let cut = |from, to| {
        let [q, k, g] = [&q, &k, &g].map(|x| columns(x, keys, n, from, to));
        [q, k, g, columns(&v, values, n, from, to)]
    };
    let (whole, whole_state) = forward(&cut(0, n.t), None);
    let (first, state) = forward(&cut(0, 41), None);
    let (second, mut state) = forward(&cut(41, 80), Some(&state));
    assert_close("first", &first, &columns(&whole, values, n, 0, 41), 2e-6);
    assert_close("second", &second, &columns(&whole, values, n, 41, 80), 2e-6);
    for t in 80..n.t {
        let piece = cut(t, t + 1);
        let [q, k, g] = [0, 1, 2].map(|i| Rows::contiguous(&piece[i], keys));
        let v = Rows::contiguous(&piece[3], values);
        let mut y = vec![f32::NAN; n.b * values];
        gla_step(RowsMut::contiguous(&mut y, values), &mut state, q, k, v, g, Some(0.3), n.h);
        assert_close("step", &y, &columns(&whole, values, n, t, t + 1), 2e-6);
    }
    assert_close("state", &state, &whole_state, 2e-6);
}

#[test]
fn same_bits_on_any_number_of_threads() {
    let n = Size { b: 2, t: 100, h: 3, dk: 24, dv: 24 };
    let wkv = wkv_inputs(n, -1.0);
    let gla = gla_inputs(n, &|_, x| -x);
    let run = |threads: usize| {
        Team::new(Some(threads)).unwrap().run(|| {
            let mut all = run_wkv(n, wkv.each_ref().map(|x| x.as_slice()));
            all.extend(run_gla(n, gla.each_ref().map(|x| x.as_slice())));
            all.concat().iter().map(|x| x.to_bits()).collect::<Vec<u32>>()
        })
    };
    assert!(run(1) == run(2));
}
