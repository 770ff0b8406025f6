//! Retention: golden cases, awkward sizes against loops in f64, the three forms against each other, and the same bits
//! on any number of threads.

mod golden;

use dataflow_kernels::cpu::attention::Factors;
use dataflow_kernels::cpu::retention::{
    Dims, chunk_backward, chunk_forward, chunk_states_len, extend, parallel_backward, parallel_forward,
};
use dataflow_kernels::cpu::team::Team;
use dataflow_kernels::{Rows, RowsMut};
use golden::{assert_close, cases};

/// Uniform in -1..1, the same on every run.
fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// Inputs `q`, `k`, `v`, `dy`, contiguous.
type Inputs<'a> = [&'a [f32]; 4];
/// `y`, `dq`, `dk`, `dv`.
type Results = [Vec<f32>; 4];

#[derive(Clone, Copy, PartialEq, Debug)]
enum Form {
    Parallel,
    Chunk,
}

fn run(form: Form, dims: Dims, x: Inputs<'_>) -> Results {
    run_in(Factors::Single, form, dims, x)
}

fn run_in(factors: Factors, form: Form, dims: Dims, [q, k, v, dy]: Inputs<'_>) -> Results {
    let (qk, vs) = (dims.heads * dims.key_dim, dims.heads * dims.value_dim);
    let mut results = [v, q, k, v].map(|x| vec![f32::NAN; x.len()]);
    let [q, k, v, dy] = [(q, qk), (k, qk), (v, vs), (dy, vs)].map(|(x, cols)| Rows::contiguous(x, cols));
    let [y, dq, dk, dv] = &mut results;
    let [y, dq, dk, dv] = [(y, vs), (dq, qk), (dk, qk), (dv, vs)].map(|(x, cols)| RowsMut::contiguous(x, cols));
    if form == Form::Parallel {
        let mut normalizer = vec![f32::NAN; dims.batch * dims.heads * dims.time];
        parallel_forward(dims, factors, q, k, v, y, &mut normalizer);
        parallel_backward(dims, factors, q, k, v, &normalizer, dy, dq, dk, dv);
    } else {
        let mut states = vec![f32::NAN; chunk_states_len(dims)];
        chunk_forward(dims, q, k, v, y, &mut states);
        chunk_backward(dims, q, k, v, &states, dy, dq, dk, dv);
    }
    results
}

/// The definition with loops in f64; without the row normaliser for [`Form::Chunk`].
fn naive(form: Form, dims: Dims, [q, k, v, dy]: Inputs<'_>) -> Results {
    let Dims { batch, time, heads, key_dim, value_dim } = dims;
    let mut results = [v, q, k, v].map(|x| vec![0.0f64; x.len()]);
    let [y, dq, dk, dv] = &mut results;
    for b in 0..batch {
        for h in 0..heads {
            let gamma = 1.0 - (-5.0 - h as f64).exp2();
            let powers: Vec<f64> = (0..time).map(|n| gamma.powi(n as i32)).collect();
            let at = |t: usize, dim: usize| ((b * time + t) * heads + h) * dim;
            let dot = |x: &[f32], i: usize, y: &[f32], j: usize, dim: usize| -> f64 {
                (0..dim).map(|d| x[at(i, dim) + d] as f64 * y[at(j, dim) + d] as f64).sum()
            };
            for i in 0..time {
                let mut decay: Vec<f64> = (0..=i).map(|j| powers[i - j]).collect();
                let root = decay.iter().sum::<f64>().sqrt();
                decay.iter_mut().for_each(|d| *d /= root);
                let a: Vec<f64> = (0..=i).map(|j| decay[j] * dot(q, i, k, j, key_dim)).collect();
                let n = a.iter().map(|a| a.abs()).sum::<f64>().clamp(1.0, 5e4);
                let n = if form == Form::Parallel { n } else { 1.0 };
                for j in 0..=i {
                    let ds = decay[j] / n * dot(dy, i, v, j, value_dim);
                    for d in 0..key_dim {
                        dq[at(i, key_dim) + d] += ds * k[at(j, key_dim) + d] as f64;
                        dk[at(j, key_dim) + d] += ds * q[at(i, key_dim) + d] as f64;
                    }
                    for d in 0..value_dim {
                        y[at(i, value_dim) + d] += a[j] / n * v[at(j, value_dim) + d] as f64;
                        dv[at(j, value_dim) + d] += a[j] / n * dy[at(i, value_dim) + d] as f64;
                    }
                }
            }
        }
    }
    results.map(|x| x.into_iter().map(|x| x as f32).collect())
}

fn inputs(dims: Dims, scale: f32) -> [Vec<f32>; 4] {
    let n = dims.batch * dims.time * dims.heads;
    let mut q = random(n * dims.key_dim, 1);
    q.iter_mut().for_each(|x| *x *= scale);
    [q, random(n * dims.key_dim, 2), random(n * dims.value_dim, 3), random(n * dims.value_dim, 4)]
}

const SIZES: [Dims; 7] = [
    Dims { batch: 1, time: 1, heads: 1, key_dim: 1, value_dim: 1 },
    Dims { batch: 2, time: 5, heads: 3, key_dim: 10, value_dim: 7 },
    Dims { batch: 1, time: 64, heads: 2, key_dim: 32, value_dim: 64 },
    Dims { batch: 1, time: 65, heads: 1, key_dim: 64, value_dim: 128 },
    Dims { batch: 2, time: 200, heads: 3, key_dim: 58, value_dim: 115 },
    Dims { batch: 9, time: 130, heads: 2, key_dim: 16, value_dim: 40 },
    Dims { batch: 1, time: 330, heads: 2, key_dim: 200, value_dim: 9 },
];

#[test]
fn golden_cases() {
    for case in cases("retention") {
        let (shape, value_dim) = (&case.get("in/q").shape, case.get("in/v").shape[3]);
        let dims = Dims { batch: shape[0], heads: shape[1], time: shape[2], key_dim: shape[3], value_dim };
        let get = |name: &str| case.get(name).permute(&[0, 2, 1, 3]).data;
        let results = run(Form::Parallel, dims, [&get("in/q"), &get("in/k"), &get("in/v"), &get("cot/y")]);
        for (name, got) in ["out/y", "grad/q", "grad/k", "grad/v"].into_iter().zip(&results) {
            assert_close(&format!("{} {name}", case.name), got, &get(name), 2e-6);
        }
    }
}

#[test]
fn awkward_sizes() {
    for dims in SIZES {
        // small scores keep the normaliser at its lower limit, large ones do not
        for scale in [0.02, 2.0] {
            let [q, k, v, dy] = &inputs(dims, scale);
            for form in [Form::Parallel, Form::Chunk] {
                let got = run(form, dims, [q, k, v, dy]);
                let want = naive(form, dims, [q, k, v, dy]);
                for ((name, got), want) in ["y", "dq", "dk", "dv"].into_iter().zip(&got).zip(&want) {
                    assert_close(&format!("{form:?} {dims:?} {scale} {name}"), got, want, 3e-6);
                }
            }
            let want = naive(Form::Parallel, dims, [q, k, v, dy]);
            let got = run_in(Factors::Bf16, Form::Parallel, dims, [q, k, v, dy]);
            for ((name, got), want) in ["y", "dq", "dk", "dv"].into_iter().zip(&got).zip(&want) {
                assert_close(&format!("bf16 {dims:?} {scale} {name}"), got, want, 2e-2);
            }
            let on_one = Team::new(Some(1)).unwrap();
            assert!(got == on_one.run(|| run_in(Factors::Bf16, Form::Parallel, dims, [q, k, v, dy])));
        }
    }
}

/// So long that the first head leaves keys out of account.
#[test]
fn long_sequences() {
    for batch in [1, 16] {
        let dims = Dims { batch, time: 1900, heads: 1, key_dim: 2, value_dim: 3 };
        let [q, k, v, dy] = &inputs(dims, 1.0);
        for form in [Form::Parallel, Form::Chunk] {
            let got = run(form, dims, [q, k, v, dy]);
            let want = naive(form, dims, [q, k, v, dy]);
            for (got, want) in got.iter().zip(&want) {
                assert_close(&format!("{form:?}"), got, want, 3e-6);
            }
        }
    }
}

#[test]
fn any_pieces_equal_the_chunk_form() {
    for dims in SIZES {
        let Dims { batch, time, heads, key_dim, value_dim } = dims;
        let [q, k, v, dy] = &inputs(dims, 1.0);
        let want = &naive(Form::Chunk, dims, [q, k, v, dy])[0];
        for pieces in [vec![1], vec![67, 1, 5], vec![time]] {
            let mut state = vec![0.0; batch * heads * key_dim * value_dim];
            let mut got = vec![f32::NAN; want.len()];
            let mut t = 0;
            for len in pieces.iter().copied().cycle() {
                let len = len.min(time - t);
                if len == 0 {
                    break;
                }
                // rows t.. of every sequence, one after the other
                let part = |x: &[f32], dim: usize| -> Vec<f32> {
                    let sequences = x.chunks_exact(time * heads * dim);
                    sequences.flat_map(|x| x[t * heads * dim..(t + len) * heads * dim].to_vec()).collect()
                };
                let [q, k, v] = [(q, key_dim), (k, key_dim), (v, value_dim)].map(|(x, dim)| part(x, dim));
                let [q, k, v] =
                    [(&q, key_dim), (&k, key_dim), (&v, value_dim)].map(|(x, dim)| Rows::contiguous(x, heads * dim));
                let mut y = vec![f32::NAN; batch * len * heads * value_dim];
                let rows = RowsMut::contiguous(&mut y, heads * value_dim);
                extend(Dims { time: len, ..dims }, t, q, k, v, &mut state, rows);
                for (b, y) in y.chunks_exact(len * heads * value_dim).enumerate() {
                    got[(b * time + t) * heads * value_dim..][..y.len()].copy_from_slice(y);
                }
                t += len;
            }
            assert_close(&format!("{dims:?} in pieces of {pieces:?}"), &got, want, 1e-5);
        }
    }
}

/// Inputs and gradients as column slices of wider matrices.
#[test]
fn strided_rows() {
    let dims = Dims { batch: 2, time: 70, heads: 2, key_dim: 12, value_dim: 19 };
    let n = dims.batch * dims.time;
    let (qk, vs) = (dims.heads * dims.key_dim, dims.heads * dims.value_dim);
    let wide = 2 * qk + 2 * vs + 3;
    let fused = random(n * wide, 5);
    let columns = [0..qk, qk..2 * qk, 2 * qk..2 * qk + vs, 2 * qk + vs..2 * qk + 2 * vs];
    let all = Rows::new(&fused, n, wide, wide);
    let [q, k, v, dy] = columns.clone().map(|c| all.slice_cols(c.start, c.end));
    let copies = [q, k, v, dy].map(|x| (0..n).flat_map(|r| x.row(r).to_vec()).collect::<Vec<f32>>());
    for form in [Form::Parallel, Form::Chunk] {
        let want = run(form, dims, [&copies[0], &copies[1], &copies[2], &copies[3]]);
        let mut grads = vec![7.0; n * wide];
        let all = RowsMut::new(&mut grads, n, wide, wide);
        // SAFETY: four different ranges of columns.
        let [dq, dk, dv, y] = columns.clone().map(|c| unsafe { all.shared_block(0..n, c) });
        if form == Form::Parallel {
            let mut normalizer = vec![0.0; dims.batch * dims.heads * dims.time];
            parallel_forward(dims, Factors::Single, q, k, v, y, &mut normalizer);
            parallel_backward(dims, Factors::Single, q, k, v, &normalizer, dy, dq, dk, dv);
        } else {
            let mut states = vec![0.0; chunk_states_len(dims)];
            chunk_forward(dims, q, k, v, y, &mut states);
            chunk_backward(dims, q, k, v, &states, dy, dq, dk, dv);
        }
        for r in 0..n {
            for (c, want) in columns.iter().zip([&want[1], &want[2], &want[3], &want[0]]) {
                assert_eq!(grads[r * wide..][c.clone()], want[r * c.len()..][..c.len()]);
            }
            assert_eq!(grads[r * wide..][wide - 3..wide], [7.0; 3]);
        }
    }
}

#[test]
fn same_bits_on_any_number_of_threads() {
    for batch in [1, 10] {
        let dims = Dims { batch, time: 260, heads: 2, key_dim: 40, value_dim: 70 };
        let [q, k, v, dy] = &inputs(dims, 1.0);
        for form in [Form::Parallel, Form::Chunk] {
            let on = |threads: usize| {
                let team = Team::new(Some(threads)).unwrap();
                team.run(|| run(form, dims, [q, k, v, dy]))
            };
            assert!(on(1) == on(2));
        }
    }
}
