//! Linear recurrences with a matrix state: WKV, gated linear attention, and retention in linear time.

use dataflow_kernels::cpu;
use dataflow_kernels::cpu::retention::Dims;
use dataflow_kernels::cuda::linear_attention::{self, Decay};
use dataflow_kernels::cuda::{call::Tensor, gla};
use dataflow_kernels::{Rows, RowsMut};

use crate::emulation::Memory;
use crate::golden::{Case, assert_close, cases};
use crate::in_both_formats;

/// A tensor of a golden file, `(B, H, T, D)`, as `[B T, H D]`.
fn heads(case: &Case, name: &str) -> Vec<f32> {
    case.get(name).permute(&[0, 2, 1, 3]).data
}

fn place(memory: &Memory, strided: bool, data: &[f32], cols: usize) -> Tensor {
    if strided { memory.columns(data, cols) } else { memory.input(data, cols) }
}

/// Numbers in (-1, 1).
fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i + seed * 7919) * 2_654_435_761 % 10_007) as f32 / 5003.5 - 1.0).collect()
}

/// Memory for states: what the ops reserve.
fn kept(memory: &Memory, dims: Dims) -> Tensor {
    let Dims { batch, time, heads, key_dim, value_dim } = dims;
    memory.output(1, cpu::gla::gla_boundaries_len(batch, time, heads, key_dim, value_dim))
}

#[test]
fn wkv_matches_the_golden_numbers() {
    in_both_formats(|memory| {
        for (case, strided) in cases("wkv_x051a").iter().flat_map(|c| [(c, false), (c, true)]) {
            let [batch, count, time, size] = case.get("in/r").shape[..] else { panic!("four dimensions") };
            let dims = Dims { batch, time, heads: count, key_dim: size, value_dim: size };
            let cols = count * size;
            let input = |name: &str| place(memory, strided, &heads(case, name), cols);
            let output =
                || if strided { memory.output_columns(batch * time, cols) } else { memory.output(batch * time, cols) };
            let [r, k, v, dy] = ["in/r", "in/k", "in/v", "cot/y"].map(input);
            let [time_decay, time_faaaa] =
                ["in/time_decay", "in/time_faaaa"].map(|name| memory.input(case.data(name), 1));
            let decay = Decay::Wkv { time_decay, time_faaaa };
            let (y, kept, dr, dk, dv) = (output(), kept(memory, dims), output(), output(), output());
            let [d_decay, d_bonus] = std::array::from_fn(|_| memory.output(count, 1));
            memory.run(|c| linear_attention::forward(c, dims, decay, r, k, v, y, kept));
            assert_close("y", &memory.read(y), &heads(case, "out/y"), memory.tolerance(1e-5));
            let parameters = Some((d_decay, d_bonus));
            memory.run(|c| linear_attention::backward(c, dims, decay, r, k, v, kept, dy, dr, dk, dv, parameters));
            assert_close("dr", &memory.read(dr), &heads(case, "grad/r"), memory.tolerance(1e-5));
            assert_close("dk", &memory.read(dk), &heads(case, "grad/k"), memory.tolerance(1e-5));
            assert_close("dv", &memory.read(dv), &heads(case, "grad/v"), memory.tolerance(1e-5));
            assert_close("d time_decay", &memory.read(d_decay), case.data("grad/time_decay"), memory.tolerance(1e-5));
            assert_close("d time_faaaa", &memory.read(d_bonus), case.data("grad/time_faaaa"), memory.tolerance(1e-5));
        }
    });
}

/// Heads of more than 64 channels, and of different ones.
#[test]
fn retention_in_linear_time_matches_the_processor() {
    in_both_formats(|memory| {
        for (time, key_dim, value_dim) in [(130, 12, 35), (70, 72, 8)] {
            let dims = Dims { batch: 1, time, heads: 2, key_dim, value_dim };
            let (keys, values) = (2 * key_dim, 2 * value_dim);
            let [q, k] = [0, 1].map(|i| numbers(time * keys, i));
            let [v, dy] = [2, 3].map(|i| numbers(time * values, i));
            let (mut y, mut dv) = (vec![0.0; time * values], vec![0.0; time * values]);
            let (mut dq, mut dk) = (vec![0.0; time * keys], vec![0.0; time * keys]);
            let mut states = vec![0.0; cpu::retention::chunk_states_len(dims)];
            let [q_, k_] = [&q, &k].map(|x| Rows::contiguous(x, keys));
            let [v_, dy_] = [&v, &dy].map(|x| Rows::contiguous(x, values));
            cpu::retention::chunk_forward(dims, q_, k_, v_, RowsMut::contiguous(&mut y, values), &mut states);
            let [dq_, dk_] = [&mut dq, &mut dk].map(|x| RowsMut::contiguous(x, keys));
            let dv_ = RowsMut::contiguous(&mut dv, values);
            cpu::retention::chunk_backward(dims, q_, k_, v_, &states, dy_, dq_, dk_, dv_);

            let [q, k] = [q, k].map(|x| memory.input(&x, keys));
            let [v, dy] = [v, dy].map(|x| memory.input(&x, values));
            let [gy, gdv] = std::array::from_fn(|_| memory.output(time, values));
            let [gdq, gdk] = std::array::from_fn(|_| memory.output(time, keys));
            let kept = memory.output(1, states.len());
            memory.run(|c| linear_attention::forward(c, dims, Decay::Retention, q, k, v, gy, kept));
            assert_close("y", &memory.read(gy), &y, memory.tolerance(1e-5));
            let decay = Decay::Retention;
            memory.run(|c| linear_attention::backward(c, dims, decay, q, k, v, kept, dy, gdq, gdk, gdv, None));
            assert_close("dq", &memory.read(gdq), &dq, memory.tolerance(1e-5));
            assert_close("dk", &memory.read(gdk), &dk, memory.tolerance(1e-5));
            assert_close("dv", &memory.read(gdv), &dv, memory.tolerance(1e-5));
        }
    });
}

#[test]
fn gated_linear_attention_matches_the_golden_numbers() {
    in_both_formats(|memory| {
        for (case, strided) in cases("gla").iter().flat_map(|c| [(c, false), (c, true)]) {
            let [batch, count, time, key_dim] = case.get("in/q").shape[..] else { panic!("four dimensions") };
            let value_dim = case.get("in/v").shape[3];
            let dims = Dims { batch, time, heads: count, key_dim, value_dim };
            let (keys, values) = (count * key_dim, count * value_dim);
            let [q, k, g] = ["in/q", "in/k", "in/log_gate"].map(|n| place(memory, strided, &heads(case, n), keys));
            let [v, dy] = ["in/v", "cot/y"].map(|n| place(memory, strided, &heads(case, n), values));
            let [y, dv] = std::array::from_fn(|_| memory.output_columns(batch * time, values));
            let [dq, dk, dg] = std::array::from_fn(|_| memory.output_columns(batch * time, keys));
            let kept = kept(memory, dims);
            memory.run(|c| gla::forward(c, dims, None, q, k, v, g, y, kept));
            assert_close("y", &memory.read(y), &heads(case, "out/y"), memory.tolerance(1e-5));
            memory.run(|c| gla::backward(c, dims, None, q, k, v, g, kept, dy, dq, dk, dv, dg));
            assert_close("dq", &memory.read(dq), &heads(case, "grad/q"), memory.tolerance(1e-5));
            assert_close("dk", &memory.read(dk), &heads(case, "grad/k"), memory.tolerance(1e-5));
            assert_close("dv", &memory.read(dv), &heads(case, "grad/v"), memory.tolerance(1e-5));
            assert_close("dg", &memory.read(dg), &heads(case, "grad/log_gate"), memory.tolerance(2e-5));
        }
    });
}

/// Several chunks, with gates from 0 to -20 per token side by side.
#[test]
fn gated_linear_attention_over_several_chunks_matches_the_processor() {
    in_both_formats(|memory| {
        let dims = Dims { batch: 1, time: 150, heads: 1, key_dim: 20, value_dim: 17 };
        let (time, keys, values) = (dims.time, dims.key_dim, dims.value_dim);
        let [q, k, g] = [0, 1, 2].map(|i| numbers(time * keys, i));
        let g: Vec<f32> = g.iter().map(|x| if x.abs() < 0.1 { -20.0 } else { x.min(0.0) * x.abs() }).collect();
        let [v, dy] = [3, 4].map(|i| numbers(time * values, i));
        let (mut y, mut dv) = (vec![0.0; time * values], vec![0.0; time * values]);
        let (mut dq, mut dk, mut dg) = (vec![0.0; time * keys], vec![0.0; time * keys], vec![0.0; time * keys]);
        let mut boundaries = vec![0.0; cpu::gla::gla_boundaries_len(1, time, 1, keys, values)];
        let [q_, k_, g_] = [&q, &k, &g].map(|x| Rows::contiguous(x, keys));
        let [v_, dy_] = [&v, &dy].map(|x| Rows::contiguous(x, values));
        let out = RowsMut::contiguous(&mut y, values);
        cpu::gla::gla_forward(out, q_, k_, v_, g_, None, 1, 1, None, None, Some(&mut boundaries));
        let [dq_, dk_, dg_] = [&mut dq, &mut dk, &mut dg].map(|x| RowsMut::contiguous(x, keys));
        let dv_ = RowsMut::contiguous(&mut dv, values);
        cpu::gla::gla_backward(dq_, dk_, dv_, dg_, dy_, q_, k_, v_, g_, None, 1, 1, &boundaries);

        let [q, k, g] = [q, k, g].map(|x| memory.input(&x, keys));
        let [v, dy] = [v, dy].map(|x| memory.input(&x, values));
        let [gy, gdv] = std::array::from_fn(|_| memory.output(time, values));
        let [gdq, gdk, gdg] = std::array::from_fn(|_| memory.output(time, keys));
        let kept = kept(memory, dims);
        memory.run(|c| gla::forward(c, dims, None, q, k, v, g, gy, kept));
        assert_close("y", &memory.read(gy), &y, memory.tolerance(1e-5));
        memory.run(|c| gla::backward(c, dims, None, q, k, v, g, kept, dy, gdq, gdk, gdv, gdg));
        assert_close("dq", &memory.read(gdq), &dq, memory.tolerance(1e-5));
        assert_close("dk", &memory.read(gdk), &dk, memory.tolerance(1e-5));
        assert_close("dv", &memory.read(gdv), &dv, memory.tolerance(1e-5));
        assert_close("dg", &memory.read(gdg), &dg, memory.tolerance(2e-5));
    });
}
