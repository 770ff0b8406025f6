//! Attention and retention: ops over heads.

use dataflow_kernels::cpu;
use dataflow_kernels::cpu::attention::Factors;
use dataflow_kernels::cuda::call::Tensor;
use dataflow_kernels::cuda::{attention, retention};

use crate::emulation::Memory;
use crate::golden::{Case, assert_close, cases};
use crate::in_both_formats;

/// A tensor of a golden file, `(B, H, T, D)`, as `[B T, H D]`.
fn heads(case: &Case, name: &str) -> Vec<f32> {
    case.get(name).permute(&[0, 2, 1, 3]).data
}

/// Places data as a tensor without gaps, or as a block of columns.
fn place(memory: &Memory, strided: bool, data: &[f32], cols: usize) -> Tensor {
    if strided { memory.columns(data, cols) } else { memory.input(data, cols) }
}

fn result(memory: &Memory, strided: bool, rows: usize, cols: usize) -> Tensor {
    if strided { memory.output_columns(rows, cols) } else { memory.output(rows, cols) }
}

#[test]
fn attention_matches_the_golden_numbers() {
    in_both_formats(|memory| {
        for (case, strided) in cases("causal_attention").iter().flat_map(|c| [(c, false), (c, true)]) {
            let [batch, head_count, time, head_dim] = case.get("in/q").shape[..] else { panic!("four dimensions") };
            let dims = cpu::attention::Dims { batch, time, heads: head_count, head_dim };
            let (rows, cols) = (batch * time, head_count * head_dim);
            let input = |name: &str| place(memory, strided, &heads(case, name), cols);
            let output = || result(memory, strided, rows, cols);
            let (q, k, v, dy) = (input("in/q"), input("in/k"), input("in/v"), input("cot/y"));
            let (y, dq, dk, dv) = (output(), output(), output(), output());
            let lse = memory.output(batch * head_count, time);
            memory.run(|c| attention::forward(c, dims, q, k, v, None, y, lse));
            assert_close("y", &memory.read(y), &heads(case, "out/y"), memory.tolerance(1e-5));
            memory.run(|c| attention::backward(c, dims, q, k, v, None, y, lse, dy, dq, dk, dv));
            assert_close("dq", &memory.read(dq), &heads(case, "grad/q"), memory.tolerance(1e-5));
            assert_close("dk", &memory.read(dk), &heads(case, "grad/k"), memory.tolerance(1e-5));
            assert_close("dv", &memory.read(dv), &heads(case, "grad/v"), memory.tolerance(1e-5));
        }
    });
}

/// Numbers in (-1, 1).
fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i + seed * 7919) * 2_654_435_761 % 10_007) as f32 / 5003.5 - 1.0).collect()
}

/// Several blocks of queries and keys, wide heads, dropout: as on the processor.
#[test]
fn attention_over_several_blocks_matches_the_processor() {
    use dataflow_kernels::random::Keep;
    use dataflow_kernels::{Rows, RowsMut};
    in_both_formats(|memory| {
        for (time, head_dim, p) in [(130, 20, 0.0), (70, 68, 0.3)] {
            let dims = cpu::attention::Dims { batch: 1, time, heads: 2, head_dim };
            let cols = 2 * head_dim;
            let [q, k, v, dy] = std::array::from_fn(|i| numbers(time * cols, i));
            let matrix = |data| Rows::contiguous(data, cols);
            let mask = (p > 0.0).then(|| Keep::new(77, 5, 3, p));
            let mut lse = vec![0.0; 2 * time];
            let [mut y, mut dq, mut dk, mut dv] = std::array::from_fn(|_| vec![0.0; time * cols]);
            fn out(data: &mut [f32], cols: usize) -> RowsMut<'_> {
                RowsMut::contiguous(data, cols)
            }
            cpu::attention::forward(
                dims,
                Factors::Single,
                matrix(&q),
                matrix(&k),
                matrix(&v),
                mask,
                out(&mut y, cols),
                &mut lse,
            );
            let (dq_, dk_, dv_) = (out(&mut dq, cols), out(&mut dk, cols), out(&mut dv, cols));
            let (q_, k_, v_, y_, dy_) = (matrix(&q), matrix(&k), matrix(&v), matrix(&y), matrix(&dy));
            cpu::attention::backward(dims, Factors::Single, q_, k_, v_, mask, y_, &lse, dy_, dq_, dk_, dv_);

            let step = memory.integers(&[5]);
            let dropout = (p > 0.0).then_some(attention::Dropout { seed: 77, site: 3, p, step });
            let [q, k, v, dy] = [q, k, v, dy].map(|data| memory.input(&data, cols));
            let [gy, gdq, gdk, gdv] = std::array::from_fn(|_| memory.output(time, cols));
            let lse = memory.output(2, time);
            memory.run(|c| attention::forward(c, dims, q, k, v, dropout, gy, lse));
            assert_close("y", &memory.read(gy), &y, memory.tolerance(1e-5));
            memory.run(|c| attention::backward(c, dims, q, k, v, dropout, gy, lse, dy, gdq, gdk, gdv));
            assert_close("dq", &memory.read(gdq), &dq, memory.tolerance(1e-5));
            assert_close("dk", &memory.read(gdk), &dk, memory.tolerance(1e-5));
            assert_close("dv", &memory.read(gdv), &dv, memory.tolerance(1e-5));
        }
    });
}

#[test]
fn retention_matches_the_golden_numbers() {
    in_both_formats(|memory| {
        for (case, strided) in cases("retention").iter().flat_map(|c| [(c, false), (c, true)]) {
            let [batch, head_count, time, key_dim] = case.get("in/q").shape[..] else { panic!("four dimensions") };
            let value_dim = case.get("in/v").shape[3];
            let dims = cpu::retention::Dims { batch, time, heads: head_count, key_dim, value_dim };
            let (rows, keys, values) = (batch * time, head_count * key_dim, head_count * value_dim);
            let input = |name: &str, cols| place(memory, strided, &heads(case, name), cols);
            let (q, k, v, dy) =
                (input("in/q", keys), input("in/k", keys), input("in/v", values), input("cot/y", values));
            let [dq, dk] = std::array::from_fn(|_| result(memory, strided, rows, keys));
            let [y, dv] = std::array::from_fn(|_| result(memory, strided, rows, values));
            let normalizer = memory.output(batch * head_count, time);
            memory.run(|c| retention::forward(c, dims, q, k, v, y, normalizer));
            assert_close("y", &memory.read(y), &heads(case, "out/y"), memory.tolerance(1e-5));
            memory.run(|c| retention::backward(c, dims, q, k, v, normalizer, dy, dq, dk, dv));
            assert_close("dq", &memory.read(dq), &heads(case, "grad/q"), memory.tolerance(1e-5));
            assert_close("dk", &memory.read(dk), &heads(case, "grad/k"), memory.tolerance(1e-5));
            assert_close("dv", &memory.read(dv), &heads(case, "grad/v"), memory.tolerance(1e-5));
        }
    });
}

/// Several blocks, and values wider than keys.
#[test]
fn retention_over_several_blocks_matches_the_processor() {
    use dataflow_kernels::{Rows, RowsMut};
    in_both_formats(|memory| {
        let dims = cpu::retention::Dims { batch: 1, time: 140, heads: 2, key_dim: 12, value_dim: 115 };
        let (time, keys, values) = (dims.time, 2 * dims.key_dim, 2 * dims.value_dim);
        let [q, k] = [0, 1].map(|i| numbers(time * keys, i));
        let [v, dy] = [2, 3].map(|i| numbers(time * values, i));
        let (mut y, mut dq, mut dk) = (vec![0.0; time * values], vec![0.0; time * keys], vec![0.0; time * keys]);
        let (mut dv, mut normalizer) = (vec![0.0; time * values], vec![0.0; 2 * time]);
        let [q_, k_] = [&q, &k].map(|x| Rows::contiguous(x, keys));
        let [v_, dy_] = [&v, &dy].map(|x| Rows::contiguous(x, values));
        let out = RowsMut::contiguous(&mut y, values);
        cpu::retention::parallel_forward(dims, Factors::Single, q_, k_, v_, out, &mut normalizer);
        let [dq_, dk_] = [&mut dq, &mut dk].map(|x| RowsMut::contiguous(x, keys));
        let dv_ = RowsMut::contiguous(&mut dv, values);
        cpu::retention::parallel_backward(dims, Factors::Single, q_, k_, v_, &normalizer, dy_, dq_, dk_, dv_);

        let [q, k] = [q, k].map(|x| memory.input(&x, keys));
        let [v, dy] = [v, dy].map(|x| memory.input(&x, values));
        let [gdq, gdk] = std::array::from_fn(|_| memory.output(time, keys));
        let [gy, gdv] = std::array::from_fn(|_| memory.output(time, values));
        let n = memory.output(2, time);
        memory.run(|c| retention::forward(c, dims, q, k, v, gy, n));
        assert_close("y", &memory.read(gy), &y, memory.tolerance(1e-5));
        assert_close("normalizer", &memory.read(n), &normalizer, memory.tolerance(1e-5));
        memory.run(|c| retention::backward(c, dims, q, k, v, n, dy, gdq, gdk, gdv));
        assert_close("dq", &memory.read(gdq), &dq, memory.tolerance(1e-5));
        assert_close("dk", &memory.read(gdk), &dk, memory.tolerance(1e-5));
        assert_close("dv", &memory.read(gdv), &dv, memory.tolerance(1e-5));
    });
}
