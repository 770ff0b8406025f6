//! Convolution and token shift.

use dataflow_kernels::cuda::conv1d::{self, Conv};
use dataflow_kernels::cuda::token_shift;

use crate::golden::{assert_close, cases};
use crate::in_both_formats;

#[test]
fn the_convolution_matches_the_golden_numbers() {
    in_both_formats(|memory| {
        for (case, strided) in cases("causal_conv1d_silu").iter().flat_map(|c| [(c, false), (c, true)]) {
            let [batch, channels, time] = case.get("in/x").shape[..] else { panic!("three dimensions") };
            let rows = |name: &str| case.get(name).permute(&[0, 2, 1]).data;
            let place =
                |data: &[f32]| if strided { memory.columns(data, channels) } else { memory.input(data, channels) };
            let (weight, bias) = (case.data("in/weight"), case.data("in/bias"));
            let taps = weight.len() / channels;
            let conv =
                Conv { weight: memory.input(weight, taps), bias: Some(memory.input(bias, channels)), silu: true };
            let (x, dy) = (place(&rows("in/x")), place(&rows("cot/y")));
            let [y, dx] = std::array::from_fn(|_| memory.output(batch * time, channels));
            let (dweight, dbias) = (memory.output(channels, taps), memory.output(1, channels));
            memory.run(|c| conv1d::forward(c, conv, x, time, y));
            assert_close("y", &memory.read(y), &rows("out/y"), memory.tolerance(1e-5));
            memory.run(|c| conv1d::backward(c, conv, x, time, dy, dx, dweight, Some(dbias)));
            assert_close("dx", &memory.read(dx), &rows("grad/x"), memory.tolerance(1e-5));
            assert_close("dweight", &memory.read(dweight), case.data("grad/weight"), memory.tolerance(1e-5));
            assert_close("dbias", &memory.read(dbias), case.data("grad/bias"), memory.tolerance(1e-5));
        }
    });
}

/// Several runs of rows, other widths, no SiLU: against the definition.
#[test]
fn the_convolution_over_several_runs_is_its_definition() {
    in_both_formats(|memory| {
        for (taps, time, channels) in [(1, 70, 4), (3, 130, 4)] {
            let batch = 2;
            let number = |i: usize| (i * 37 % 101) as f32 / 50.0 - 1.0;
            let x: Vec<f32> = (0..batch * time * channels).map(number).collect();
            let dy: Vec<f32> = (0..x.len()).map(|i| number(i + 17)).collect();
            let weight: Vec<f32> = (0..channels * taps).map(|i| number(i + 5)).collect();
            let (mut y, mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; x.len()], vec![0.0; weight.len()]);
            for (b, t, c) in (0..batch).flat_map(|b| (0..time).flat_map(move |t| (0..channels).map(move |c| (b, t, c))))
            {
                let at = |t: usize| (b * time + t) * channels + c;
                for j in (0..taps).filter(|j| t + j + 1 >= taps) {
                    let from = at(t + j + 1 - taps);
                    y[at(t)] += weight[c * taps + j] * x[from];
                    dx[from] += weight[c * taps + j] * dy[at(t)];
                    dw[c * taps + j] += x[from] * dy[at(t)];
                }
            }
            let conv = Conv { weight: memory.input(&weight, taps), bias: None, silu: false };
            let (x, dy) = (memory.input(&x, channels), memory.input(&dy, channels));
            let [gy, gdx] = std::array::from_fn(|_| memory.output(batch * time, channels));
            let gdw = memory.output(channels, taps);
            memory.run(|c| conv1d::forward(c, conv, x, time, gy));
            memory.run(|c| conv1d::backward(c, conv, x, time, dy, gdx, gdw, None));
            assert_close("y", &memory.read(gy), &y, memory.tolerance(1e-5));
            assert_close("dx", &memory.read(gdx), &dx, memory.tolerance(1e-5));
            assert_close("dweight", &memory.read(gdw), &dw, memory.tolerance(1e-5));
        }
    });
}

#[test]
fn the_shift_matches_the_golden_numbers() {
    in_both_formats(|memory| {
        for case in cases("token_shift") {
            let [batch, time, cols] = case.get("in/x").shape[..] else { panic!("three dimensions") };
            let (x, dy) = (memory.columns(case.data("in/x"), cols), memory.columns(case.data("cot/y"), cols));
            let [y, dx] = std::array::from_fn(|_| memory.output_columns(batch * time, cols));
            memory.run(|c| token_shift::forward(c, x, time, &[], &[y]));
            assert_close("y", &memory.read(y), case.data("out/y"), memory.tolerance(1e-6));
            memory.run(|c| token_shift::backward(c, dy, time, &[], &[dy], dx, &[]));
            assert_close("dx", &memory.read(dx), case.data("grad/x"), memory.tolerance(1e-6));
        }
    });
}

/// Mixing, over several runs of rows: as on the processor.
#[test]
fn mixing_matches_the_processor() {
    use dataflow_kernels::{Rows, RowsMut, cpu};
    in_both_formats(|memory| {
        let (batch, time, cols, count) = (2, 67, 12, 3);
        let number = |i: usize| (i * 29 % 97) as f32 / 48.0 - 1.0;
        let x: Vec<f32> = (0..batch * time * cols).map(number).collect();
        let mixes: Vec<Vec<f32>> = (0..count).map(|j| (0..cols).map(|i| number(i * 3 + j)).collect()).collect();
        let dys: Vec<Vec<f32>> = (0..count).map(|j| (0..x.len()).map(|i| number(i * 5 + j)).collect()).collect();
        let mut ys = vec![vec![0.0; x.len()]; count];
        let (mut dx, mut dmixes) = (vec![0.0; x.len()], vec![vec![0.0; cols]; count]);
        {
            let mixes: Vec<&[f32]> = mixes.iter().map(|m| &m[..]).collect();
            let mut ys: Vec<_> = ys.iter_mut().map(|y| RowsMut::contiguous(y, cols).into()).collect();
            let dys: Vec<Rows<'_>> = dys.iter().map(|y| Rows::contiguous(y, cols)).collect();
            let mut dmixes: Vec<&mut [f32]> = dmixes.iter_mut().map(|m| &mut m[..]).collect();
            let x = Rows::contiguous(&x, cols);
            cpu::token_shift::mix_forward(x, time, None, &mixes, &mut ys);
            let dx = RowsMut::contiguous(&mut dx, cols);
            cpu::token_shift::mix_backward(x, time, None, &mixes, &dys, dx, &mut dmixes, None);
        }
        let x = memory.input(&x, cols);
        let mix: Vec<_> = mixes.iter().map(|m| memory.input(m, cols)).collect();
        let dy: Vec<_> = dys.iter().map(|y| memory.input(y, cols)).collect();
        let y: Vec<_> = (0..count).map(|_| memory.output(batch * time, cols)).collect();
        let dmix: Vec<_> = (0..count).map(|_| memory.output(1, cols)).collect();
        // a gradient that can take no vectors
        let gdx = memory.output_columns(batch * time, cols);
        memory.run(|c| token_shift::forward(c, x, time, &mix, &y));
        memory.run(|c| token_shift::backward(c, x, time, &mix, &dy, gdx, &dmix));
        assert_close("dx", &memory.read(gdx), &dx, memory.tolerance(1e-5));
        for j in 0..count {
            assert_close("y", &memory.read(y[j]), &ys[j], memory.tolerance(1e-6));
            assert_close("dmix", &memory.read(dmix[j]), &dmixes[j], memory.tolerance(1e-5));
        }
    });
}
