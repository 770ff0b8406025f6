//! Causal attention: golden cases, awkward sizes against loops in f64, dropout, decoding, and the same bits on any
//! number of threads.

mod golden;

use dataflow_kernels::cpu::attention::{Dims, Factors, backward, decode, forward};
use dataflow_kernels::cpu::team::Team;
use dataflow_kernels::random::Keep;
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

fn rows<'a>(dims: Dims, x: &'a [f32]) -> Rows<'a> {
    Rows::new(x, dims.batch * dims.time, dims.heads * dims.head_dim, dims.heads * dims.head_dim)
}

struct Results {
    out: Vec<f32>,
    lse: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

/// Forward and backward on contiguous tensors; results start as NaN.
fn run(dims: Dims, x: [&[f32]; 4], dropout: Option<Keep>) -> Results {
    run_in(Factors::Single, dims, x, dropout)
}

fn run_in(factors: Factors, dims: Dims, [q, k, v, dout]: [&[f32]; 4], dropout: Option<Keep>) -> Results {
    let cols = dims.heads * dims.head_dim;
    let nan = || vec![f32::NAN; dims.batch * dims.time * cols];
    let mut r = Results {
        out: nan(),
        lse: vec![f32::NAN; dims.batch * dims.heads * dims.time],
        dq: nan(),
        dk: nan(),
        dv: nan(),
    };
    let [q, k, v, dout] = [q, k, v, dout].map(|x| rows(dims, x));
    forward(dims, factors, q, k, v, dropout, RowsMut::contiguous(&mut r.out, cols), &mut r.lse);
    let [dq, dk, dv] = [&mut r.dq, &mut r.dk, &mut r.dv].map(|x| RowsMut::contiguous(x, cols));
    backward(dims, factors, q, k, v, dropout, rows(dims, &r.out), &r.lse, dout, dq, dk, dv);
    r
}

/// The same with loops in f64; `mask[((b * heads + h) * time + i) * time + j]` multiplies probabilities.
fn naive(dims: Dims, [q, k, v, dout]: [&[f32]; 4], mask: Option<&[f32]>) -> [Vec<f32>; 4] {
    let Dims { batch, time, heads, head_dim } = dims;
    let mut results = [q, k, v, dout].map(|x| vec![0.0f64; x.len()]);
    let [out, dq, dk, dv] = &mut results;
    let scale = 1.0 / (head_dim as f64).sqrt();
    for b in 0..batch {
        for h in 0..heads {
            let at = |t: usize| (b * time + t) * heads * head_dim + h * head_dim;
            let dot = |x: &[f32], i: usize, y: &[f32], j: usize| -> f64 {
                (0..head_dim).map(|d| x[at(i) + d] as f64 * y[at(j) + d] as f64).sum()
            };
            for i in 0..time {
                let mut p: Vec<f64> = (0..=i).map(|j| (scale * dot(q, i, k, j)).exp()).collect();
                let total: f64 = p.iter().sum();
                p.iter_mut().for_each(|p| *p /= total);
                let m = |j: usize| mask.map_or(1.0, |m| m[((b * heads + h) * time + i) * time + j] as f64);
                let dp: Vec<f64> = (0..=i).map(|j| m(j) * dot(dout, i, v, j)).collect();
                let delta: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
                for j in 0..=i {
                    let ds = p[j] * (dp[j] - delta) * scale;
                    for d in 0..head_dim {
                        out[at(i) + d] += p[j] * m(j) * v[at(j) + d] as f64;
                        dv[at(j) + d] += p[j] * m(j) * dout[at(i) + d] as f64;
                        dq[at(i) + d] += ds * k[at(j) + d] as f64;
                        dk[at(j) + d] += ds * q[at(i) + d] as f64;
                    }
                }
            }
        }
    }
    results.map(|x| x.into_iter().map(|x| x as f32).collect())
}

#[test]
fn golden_cases() {
    for case in cases("causal_attention") {
        let shape = &case.get("in/q").shape;
        let dims = Dims { batch: shape[0], heads: shape[1], time: shape[2], head_dim: shape[3] };
        let get = |name: &str| case.get(name).permute(&[0, 2, 1, 3]).data;
        let r = run(dims, [&get("in/q"), &get("in/k"), &get("in/v"), &get("cot/y")], None);
        for (name, got) in [("out/y", &r.out), ("grad/q", &r.dq), ("grad/k", &r.dk), ("grad/v", &r.dv)] {
            assert_close(&format!("{} {name}", case.name), got, &get(name), 2e-6);
        }
    }
}

#[test]
fn awkward_sizes() {
    for (batch, time, heads, head_dim) in [
        (1, 1, 1, 1),
        (2, 5, 3, 10),
        (1, 64, 2, 32),
        (1, 65, 1, 64),
        (2, 200, 3, 10),
        (1, 300, 2, 128),
        (9, 130, 2, 115),
    ] {
        let dims = Dims { batch, time, heads, head_dim };
        let len = batch * time * heads * head_dim;
        // scores of some size, so that rows are far from uniform
        let mut q = random(len, 1);
        q.iter_mut().for_each(|x| *x *= 6.0);
        let (k, v, dout) = (random(len, 2), random(len, 3), random(len, 4));
        let x: [&[f32]; 4] = [&q, &k, &v, &dout];
        let r = run(dims, x, None);
        let want = naive(dims, x, None);
        for ((name, got), want) in [("out", &r.out), ("dq", &r.dq), ("dk", &r.dk), ("dv", &r.dv)].iter().zip(&want) {
            if time > 1 || *name == "out" || *name == "dv" {
                assert_close(&format!("{dims:?} {name}"), got, want, 3e-6);
            } else {
                assert!(got.iter().all(|x| x.abs() < 1e-5));
            }
        }
        let rounded = run_in(Factors::Bf16, dims, x, None);
        let results = [("out", &rounded.out), ("dq", &rounded.dq), ("dk", &rounded.dk), ("dv", &rounded.dv)];
        for ((name, got), want) in results.iter().zip(&want) {
            if time > 1 || *name == "out" || *name == "dv" {
                assert_close(&format!("{dims:?} {name}, bf16"), got, want, 2e-2);
            }
        }
        assert!(rounded.out != r.out, "{dims:?}: nothing was rounded");
        let again = Team::new(Some(1)).unwrap().run(|| run_in(Factors::Bf16, dims, x, None));
        assert!(again.dq == rounded.dq && again.dk == rounded.dk, "{dims:?}: threads differ");
    }
}

#[test]
fn huge_scores_do_not_overflow() {
    let dims = Dims { batch: 1, time: 150, heads: 1, head_dim: 16 };
    let len = dims.time * dims.head_dim;
    let big: Vec<f32> = random(len, 1).iter().map(|x| x * 100.0).collect();
    let r = run(dims, [&big, &big, &random(len, 2), &random(len, 3)], None);
    assert!([&r.out, &r.lse, &r.dq, &r.dk, &r.dv].iter().all(|x| x.iter().all(|x| x.is_finite())));
}

/// All activations as column slices of wider matrices; the columns between them stay as they are.
#[test]
fn strided_rows() {
    let dims = Dims { batch: 2, time: 70, heads: 2, head_dim: 12 };
    let (n, c) = (dims.batch * dims.time, dims.heads * dims.head_dim);
    let fused = random(n * 3 * c, 5);
    let dout_wide = random(n * (c + 3), 6);
    let part = |i: usize| Rows::new(&fused, n, 3 * c, 3 * c).slice_cols(i * c, (i + 1) * c);
    let dout = Rows::new(&dout_wide, n, c + 3, c + 3).slice_cols(2, 2 + c);
    let copy = |x: Rows<'_>| (0..n).flat_map(|r| x.row(r).to_vec()).collect::<Vec<f32>>();
    let want = run(dims, [&copy(part(0)), &copy(part(1)), &copy(part(2)), &copy(dout)], None);

    let mut out = vec![7.0; n * (c + 5)];
    let mut lse = vec![0.0; dims.batch * dims.heads * dims.time];
    forward(dims, Factors::Single, part(0), part(1), part(2), None, RowsMut::new(&mut out[1..], n, c, c + 5), &mut lse);
    let mut grads = vec![7.0; n * (3 * c + 2)];
    {
        let all = RowsMut::new(&mut grads, n, 3 * c, 3 * c + 2);
        // SAFETY: three different ranges of columns.
        let [dq, dk, dv] = std::array::from_fn(|i| unsafe { all.shared_block(0..n, i * c..(i + 1) * c) });
        let out = Rows::new(&out[1..], n, c, c + 5);
        backward(dims, Factors::Single, part(0), part(1), part(2), None, out, &lse, dout, dq, dk, dv);
    }
    for r in 0..n {
        assert_eq!(out[1 + r * (c + 5)..][..c], want.out[r * c..][..c]);
        for (i, want) in [&want.dq, &want.dk, &want.dv].into_iter().enumerate() {
            assert_eq!(grads[r * (3 * c + 2) + i * c..][..c], want[r * c..][..c]);
        }
        assert!(grads[r * (3 * c + 2) + 3 * c..][..2].iter().all(|x| *x == 7.0));
    }
    assert_eq!(out.iter().filter(|x| **x == 7.0).count(), out.len() - n * c);
}

#[test]
fn dropout_masks_probabilities() {
    let dims = Dims { batch: 2, time: 90, heads: 2, head_dim: 96 };
    let Dims { batch, time, heads, head_dim } = dims;
    let len = batch * time * heads * head_dim;
    let (q, k, v, dout) = (random(len, 1), random(len, 2), random(len, 3), random(len, 4));
    let keep = Keep::new(1, 2, 3, 0.3);
    let mut mask = vec![0.0; batch * heads * time * time];
    for (row, mask) in mask.chunks_exact_mut(time).enumerate() {
        mask.iter_mut().enumerate().for_each(|(j, mask)| *mask = keep.at((row as u64) << 32 | j as u64));
    }
    let dropped = mask.iter().filter(|&&x| x == 0.0).count() as f64 / mask.len() as f64;
    assert!((dropped - 0.3).abs() < 0.01, "{dropped} dropped");
    let r = run(dims, [&q, &k, &v, &dout], Some(keep));
    let want = naive(dims, [&q, &k, &v, &dout], Some(&mask));
    for (got, want) in [&r.out, &r.dq, &r.dk, &r.dv].into_iter().zip(&want) {
        assert_close("with dropout", got, want, 3e-6);
    }
    let other = run(dims, [&q, &k, &v, &dout], Some(Keep::new(1, 2, 4, 0.3)));
    assert_ne!(r.out, other.out);
}

#[test]
fn decoding_equals_the_last_row() {
    for (batch, time, heads, head_dim) in [(1, 1, 2, 16), (2, 40, 3, 10), (1, 700, 2, 64), (2, 257, 1, 128)] {
        let dims = Dims { batch, time, heads, head_dim };
        let (cols, len) = (heads * head_dim, batch * time * heads * head_dim);
        let (q, k, v) = (random(len, 1), random(len, 2), random(len, 3));
        let want = run(dims, [&q, &k, &v, &v], None).out;
        let last = |x: &[f32]| (0..batch).flat_map(|b| x[((b + 1) * time - 1) * cols..][..cols].to_vec()).collect();
        // a cache with room for more
        let capacity = time + 9;
        let cache = |x: &[f32]| {
            let mut cache = vec![f32::NAN; batch * capacity * cols];
            (0..batch).for_each(|b| {
                cache[b * capacity * cols..][..time * cols].copy_from_slice(&x[b * time * cols..][..time * cols])
            });
            cache
        };
        let (query, k, v): (Vec<f32>, _, _) = (last(&q), cache(&k), cache(&v));
        let mut out = vec![f32::NAN; batch * cols];
        decode(
            heads,
            time,
            Rows::contiguous(&query, cols),
            Rows::contiguous(&k, cols),
            Rows::contiguous(&v, cols),
            RowsMut::contiguous(&mut out, cols),
        );
        let want: Vec<f32> = last(&want);
        assert_close(&format!("{dims:?}"), &out, &want, 3e-6);
    }
}

#[test]
fn same_bits_on_any_number_of_threads() {
    for (batch, heads) in [(1, 2), (10, 2)] {
        let dims = Dims { batch, time: 260, heads, head_dim: 40 };
        let len = dims.batch * dims.time * dims.heads * dims.head_dim;
        let x: Vec<Vec<f32>> = (0..4).map(|i| random(len, i)).collect();
        let on = |threads: usize| {
            let team = Team::new(Some(threads)).unwrap();
            team.run(|| run(dims, [&x[0], &x[1], &x[2], &x[3]], Some(Keep::new(1, 2, 3, 0.1))))
        };
        let (one, two) = (on(1), on(2));
        assert!(one.out == two.out && one.lse == two.lse && one.dq == two.dq && one.dk == two.dk && one.dv == two.dv);
    }
}
