use dataflow_kernels::cpu::scan::Dims;
use dataflow_kernels::cuda::scan::{self, Gradients, Inputs};

use crate::emulation::Memory;
use crate::golden::{Case, assert_close, cases};
use crate::in_both_formats;

/// A tensor of a golden file, `(B, C, T)`, as `[B T, C]`.
fn rows(case: &Case, name: &str) -> Vec<f32> {
    case.get(name).permute(&[0, 2, 1]).data
}

/// Step sizes with their bias, which the ops have in a linear layer.
fn steps(case: &Case, name: &str, bias: &str) -> Vec<f32> {
    let (steps, bias) = (rows(case, name), case.data(bias));
    steps.iter().enumerate().map(|(i, x)| x + bias[i % bias.len()]).collect()
}

struct Names {
    step: &'static str,
    bias: &'static str,
    keys: &'static str,
    queries: &'static str,
}

fn check(memory: &Memory, case: &Case, names: &Names) {
    let [batch, channels, time] = case.get("in/u").shape[..] else { panic!("three dimensions") };
    let state = case.get(&format!("in/{}", names.keys)).shape[1];
    let dims = Dims { batch, time, channels, state };
    let name = |kind: &str, name: &str| format!("{kind}/{name}");
    let columns = |data: &[f32], cols| memory.columns(data, cols);
    let a_log = case.has("in/A_log").then(|| memory.input(case.data("in/A_log"), state));
    let inputs = Inputs {
        u: columns(&rows(case, "in/u"), channels),
        step: columns(&steps(case, &name("in", names.step), &name("in", names.bias)), channels),
        keys: columns(&rows(case, &name("in", names.keys)), state),
        queries: columns(&rows(case, &name("in", names.queries)), state),
        a_log,
        skip: Some(memory.input(case.data("in/D"), channels)),
        gate: Some(columns(&rows(case, "in/z"), channels)),
    };
    let y = memory.output_columns(dims.rows(), channels);
    let boundaries = memory.output(dims.boundaries_len() / channels, channels);
    memory.run(|c| scan::forward(c, dims, &inputs, y, Some(boundaries)));
    assert_close("y", &memory.read(y), &rows(case, "out/y"), memory.tolerance(1e-5));

    let dy = columns(&rows(case, "cot/y"), channels);
    let wide = || memory.output_columns(dims.rows(), channels);
    let gradients = Gradients {
        u: wide(),
        step: wide(),
        keys: memory.output_columns(dims.rows(), state),
        queries: memory.output_columns(dims.rows(), state),
        a_log: a_log.map(|_| memory.output(channels, state)),
        skip: Some(memory.output(1, channels)),
        gate: Some(wide()),
    };
    memory.run(|c| scan::backward(c, dims, &inputs, dy, boundaries, gradients));
    let grad = |n: &str| rows(case, &name("grad", n));
    assert_close("du", &memory.read(gradients.u), &grad("u"), memory.tolerance(1e-5));
    assert_close("dstep", &memory.read(gradients.step), &grad(names.step), memory.tolerance(1e-5));
    assert_close("dkeys", &memory.read(gradients.keys), &grad(names.keys), memory.tolerance(1e-5));
    assert_close("dqueries", &memory.read(gradients.queries), &grad(names.queries), memory.tolerance(1e-5));
    assert_close("dz", &memory.read(gradients.gate.unwrap()), &grad("z"), memory.tolerance(1e-5));
    assert_close("dD", &memory.read(gradients.skip.unwrap()), case.data("grad/D"), memory.tolerance(1e-5));
    if let Some(a_log) = gradients.a_log {
        assert_close("dA_log", &memory.read(a_log), case.data("grad/A_log"), memory.tolerance(1e-5));
    }

    // without the gate: the gradient of y then is the cotangent times silu(z)
    let silu = |z: f32| z / (1.0 + (-z).exp());
    let product = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, z)| a * silu(*z)).collect::<Vec<_>>();
    let z = rows(case, "in/z");
    let ungated = Inputs { gate: None, ..inputs };
    memory.run(|c| scan::forward(c, dims, &ungated, y, Some(boundaries)));
    assert_close("y before the gate", &product(&memory.read(y), &z), &rows(case, "out/y"), memory.tolerance(1e-5));
    let dy = columns(&product(&rows(case, "cot/y"), &z), channels);
    let gradients = Gradients { gate: None, ..gradients };
    memory.run(|c| scan::backward(c, dims, &ungated, dy, boundaries, gradients));
    assert_close("du without gate", &memory.read(gradients.u), &grad("u"), memory.tolerance(1e-5));
    assert_close("dstep without gate", &memory.read(gradients.step), &grad(names.step), memory.tolerance(1e-5));
    assert_close("dkeys without gate", &memory.read(gradients.keys), &grad(names.keys), memory.tolerance(1e-5));
}

#[test]
fn the_selective_scan_matches_the_golden_numbers() {
    let names = Names { step: "delta", bias: "delta_bias", keys: "B", queries: "C" };
    in_both_formats(|memory| cases("selective_scan").iter().for_each(|case| check(memory, case, &names)));
}

#[test]
fn the_longhorn_update_matches_the_golden_numbers() {
    let names = Names { step: "dt", bias: "t_bias", keys: "k", queries: "q" };
    in_both_formats(|memory| cases("longhorn_scan").iter().for_each(|case| check(memory, case, &names)));
}
