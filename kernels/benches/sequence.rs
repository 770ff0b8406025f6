//! Attention, retention, scans, chunked linear attention, convolution, norm and AdamW at the sizes of a training step (batch 8, T 256,
//! 384 channels), on all threads: `cargo bench -p dataflow-kernels --bench sequence`.

use dataflow_kernels::cpu::attention::Factors;
use dataflow_kernels::cpu::optimizer::{AdamW, adamw};
use dataflow_kernels::cpu::team::Team;
use dataflow_kernels::cpu::{attention, conv1d, gla, longhorn, norm, retention, selective_scan, wkv};
use dataflow_kernels::{Rows, RowsMut};
use divan::Bencher;

fn main() {
    Team::new(None).expect("the system starts threads").run(divan::main);
}

const BATCH: usize = 8;
const TIME: usize = 256;
const HEADS: usize = 6;
const MODEL: usize = 384;
const INNER: usize = 768;
const STATE: usize = 16;
const TOKENS: usize = BATCH * TIME;

/// Numbers between -0.5 and 0.5.
fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919) % 1009) as f32 / 1009.0 - 0.5).collect()
}

/// An activation of so many columns.
fn tokens(cols: usize) -> Vec<f32> {
    numbers(TOKENS * cols)
}

fn rows(data: &[f32]) -> Rows<'_> {
    Rows::contiguous(data, data.len() / TOKENS)
}

fn rows_mut(data: &mut [f32]) -> RowsMut<'_> {
    let cols = data.len() / TOKENS;
    RowsMut::contiguous(data, cols)
}

#[divan::bench]
fn attention_forward(bencher: Bencher<'_, '_>) {
    let dims = attention::Dims { batch: BATCH, time: TIME, heads: HEADS, head_dim: MODEL / HEADS };
    let (x, mut out, mut lse) = (tokens(MODEL), tokens(MODEL), vec![0.0; BATCH * HEADS * TIME]);
    bencher.bench_local(|| {
        attention::forward(dims, Factors::Single, rows(&x), rows(&x), rows(&x), None, rows_mut(&mut out), &mut lse)
    });
}

#[divan::bench]
fn attention_backward(bencher: Bencher<'_, '_>) {
    let dims = attention::Dims { batch: BATCH, time: TIME, heads: HEADS, head_dim: MODEL / HEADS };
    let (x, mut out, mut lse) = (tokens(MODEL), tokens(MODEL), vec![0.0; BATCH * HEADS * TIME]);
    attention::forward(dims, Factors::Single, rows(&x), rows(&x), rows(&x), None, rows_mut(&mut out), &mut lse);
    let [mut dq, mut dk, mut dv] = [MODEL; 3].map(tokens);
    bencher.bench_local(|| {
        let (dq, dk, dv) = (rows_mut(&mut dq), rows_mut(&mut dk), rows_mut(&mut dv));
        attention::backward(
            dims,
            Factors::Single,
            rows(&x),
            rows(&x),
            rows(&x),
            None,
            rows(&out),
            &lse,
            rows(&x),
            dq,
            dk,
            dv,
        );
    });
}

/// Forward, then backward.
#[divan::bench]
fn longhorn_scan(bencher: Bencher<'_, '_>) {
    let dims = longhorn::Dims { batch: BATCH, time: TIME, channels: INNER, state: STATE };
    let (x, k, bias) = (tokens(INNER), tokens(STATE), numbers(INNER));
    let (mut y, mut boundaries) = (tokens(INNER), vec![0.0; dims.boundaries_len()]);
    let ([mut du, mut ddt, mut dz], [mut dq, mut dk]) = ([INNER; 3].map(tokens), [STATE; 2].map(tokens));
    let (mut dbias, mut dskip) = (numbers(INNER), numbers(INNER));
    bencher.bench_local(|| {
        let inputs = longhorn::Inputs {
            u: rows(&x),
            dt: rows(&x),
            q: rows(&k),
            k: rows(&k),
            t_bias: Some(&bias),
            skip: Some(&bias),
            gate: Some(rows(&x)),
        };
        longhorn::forward(dims, &inputs, rows_mut(&mut y), None, Some(&mut boundaries));
        let gradients = longhorn::Gradients {
            u: rows_mut(&mut du),
            dt: rows_mut(&mut ddt),
            q: rows_mut(&mut dq),
            k: rows_mut(&mut dk),
            t_bias: Some(&mut dbias),
            skip: Some(&mut dskip),
            gate: Some(rows_mut(&mut dz)),
        };
        longhorn::backward(dims, &inputs, rows(&x), &boundaries, gradients);
    });
}

/// Mamba's, forward, then backward.
#[divan::bench]
fn selective_scan_both(bencher: Bencher<'_, '_>) {
    let dims = selective_scan::Dims { batch: BATCH, time: TIME, channels: INNER, state: STATE };
    let (x, k, bias, a_log) = (tokens(INNER), tokens(STATE), numbers(INNER), numbers(INNER * STATE));
    let (mut y, mut boundaries) = (tokens(INNER), vec![0.0; dims.boundaries_len()]);
    let ([mut du, mut ddt, mut dz], [mut db, mut dc]) = ([INNER; 3].map(tokens), [STATE; 2].map(tokens));
    let (mut dbias, mut dskip, mut da) = (numbers(INNER), numbers(INNER), numbers(INNER * STATE));
    bencher.bench_local(|| {
        let inputs = selective_scan::Inputs {
            u: rows(&x),
            delta: rows(&x),
            a_log: &a_log,
            b: rows(&k),
            c: rows(&k),
            delta_bias: Some(&bias),
            skip: Some(&bias),
            gate: Some(rows(&x)),
        };
        selective_scan::forward(dims, &inputs, rows_mut(&mut y), None, Some(&mut boundaries));
        let gradients = selective_scan::Gradients {
            u: rows_mut(&mut du),
            delta: rows_mut(&mut ddt),
            a_log: Some(&mut da),
            b: rows_mut(&mut db),
            c: rows_mut(&mut dc),
            delta_bias: Some(&mut dbias),
            skip: Some(&mut dskip),
            gate: Some(rows_mut(&mut dz)),
        };
        selective_scan::backward(dims, &inputs, rows(&x), &boundaries, gradients);
    });
}

/// RWKV's, forward, then backward.
#[divan::bench]
fn wkv_both(bencher: Bencher<'_, '_>) {
    let size = MODEL / HEADS;
    let (x, decay) = (tokens(MODEL), numbers(MODEL));
    let mut boundaries = vec![0.0; wkv::wkv_boundaries_len(BATCH, TIME, HEADS, size)];
    let [mut y, mut dr, mut dk, mut dv] = [MODEL; 4].map(tokens);
    // one decay and one bonus a head
    let (decay, mut dw, mut du) = (&decay[..HEADS], numbers(HEADS), numbers(HEADS));
    bencher.bench_local(|| {
        let x = rows(&x);
        wkv::wkv_forward(rows_mut(&mut y), x, x, x, decay, decay, BATCH, None, None, Some(&mut boundaries));
        let (dr, dk, dv) = (rows_mut(&mut dr), rows_mut(&mut dk), rows_mut(&mut dv));
        wkv::wkv_backward(dr, dk, dv, &mut dw, &mut du, x, x, x, x, decay, decay, BATCH, &boundaries);
    });
}

/// Gated linear attention, forward, then backward.
#[divan::bench]
fn gla_both(bencher: Bencher<'_, '_>) {
    let (dk, dv) = (MODEL / HEADS / 2, MODEL / HEADS);
    let (q, v) = (tokens(HEADS * dk), tokens(HEADS * dv));
    let gate: Vec<f32> = q.iter().map(|x| -0.05 * (x + 0.5)).collect();
    let mut boundaries = vec![0.0; gla::gla_boundaries_len(BATCH, TIME, HEADS, dk, dv)];
    let ([mut gq, mut gk, mut gg], [mut y, mut gv]) = ([HEADS * dk; 3].map(tokens), [HEADS * dv; 2].map(tokens));
    bencher.bench_local(|| {
        let (q, v, gate) = (rows(&q), rows(&v), rows(&gate));
        gla::gla_forward(rows_mut(&mut y), q, q, v, gate, None, BATCH, HEADS, None, None, Some(&mut boundaries));
        let (gq, gk, gv, gg) = (rows_mut(&mut gq), rows_mut(&mut gk), rows_mut(&mut gv), rows_mut(&mut gg));
        gla::gla_backward(gq, gk, gv, gg, v, q, q, v, gate, None, BATCH, HEADS, &boundaries);
    });
}

/// Of width 4 with SiLU, forward, then backward.
#[divan::bench]
fn conv1d_both(bencher: Bencher<'_, '_>) {
    let (x, weight, bias) = (tokens(INNER), numbers(INNER * 4), numbers(INNER));
    let ([mut y, mut dx], mut dw, mut db) = ([INNER; 2].map(tokens), numbers(INNER * 4), numbers(INNER));
    bencher.bench_local(|| {
        let conv = || conv1d::Conv { weight: &weight, bias: Some(&bias), silu: true };
        conv1d::forward(conv(), rows(&x), TIME, None, rows_mut(&mut y), None);
        conv1d::backward(conv(), rows(&x), TIME, None, rows(&x), rows_mut(&mut dx), &mut dw, Some(&mut db));
    });
}

/// RMSNorm, forward, then backward.
#[divan::bench]
fn rms_norm_both(bencher: Bencher<'_, '_>) {
    let norm = norm::Norm { kind: norm::Kind::Rms, groups: 1, eps: 1e-5 };
    let (x, weight, mut stats) = (tokens(MODEL), numbers(MODEL), vec![0.0; TOKENS]);
    let ([mut y, mut dx], mut dw) = ([MODEL; 2].map(tokens), numbers(MODEL));
    bencher.bench_local(|| {
        norm::forward(norm, rows(&x), None, Some(&weight), None, rows_mut(&mut y), Some(&mut stats));
        norm::backward(norm, rows(&x), &stats, Some(&weight), rows(&y), None, rows_mut(&mut dx), Some(&mut dw), None);
    });
}

/// Of a million parameters.
#[divan::bench]
fn adamw_step(bencher: Bencher<'_, '_>) {
    let settings = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.99, eps: 1e-8, decay: 0.1, step: 10, grad_scale: 1.0 };
    let (mut parameter, gradient, mut m) = (numbers(1 << 20), numbers(1 << 20), numbers(1 << 20));
    let mut v: Vec<f32> = gradient.iter().map(|g| g * g).collect();
    bencher.bench_local(|| adamw(&mut parameter, &gradient, &mut m, &mut v, settings));
}

/// Values of a head: those of 384 channels are wider than keys.
const VALUE: usize = 115;

fn retention(bencher: Bencher<'_, '_>, exact: bool) {
    let dims = retention::Dims { batch: BATCH, time: TIME, heads: HEADS, key_dim: MODEL / HEADS, value_dim: VALUE };
    let (x, v, mut y) = (tokens(MODEL), tokens(HEADS * VALUE), tokens(HEADS * VALUE));
    let [mut dq, mut dk, mut dv] = [MODEL, MODEL, HEADS * VALUE].map(tokens);
    let (mut normalizer, mut states) = (vec![0.0; BATCH * HEADS * TIME], vec![0.0; retention::chunk_states_len(dims)]);
    bencher.bench_local(|| {
        let (q, k, v) = (rows(&x), rows(&x), rows(&v));
        if exact {
            retention::parallel_forward(dims, Factors::Single, q, k, v, rows_mut(&mut y), &mut normalizer);
        } else {
            retention::chunk_forward(dims, q, k, v, rows_mut(&mut y), &mut states);
        }
        let (dy, dq, dk, dv) = (rows(&y), rows_mut(&mut dq), rows_mut(&mut dk), rows_mut(&mut dv));
        if exact {
            retention::parallel_backward(dims, Factors::Single, q, k, v, &normalizer, dy, dq, dk, dv);
        } else {
            retention::chunk_backward(dims, q, k, v, &states, dy, dq, dk, dv);
        }
    });
}

/// Forward, then backward, as attention without a softmax.
#[divan::bench]
fn retention_exact_both(bencher: Bencher<'_, '_>) {
    retention(bencher, true);
}

/// Forward, then backward, in chunks with a state.
#[divan::bench]
fn retention_chunk_both(bencher: Bencher<'_, '_>) {
    retention(bencher, false);
}
