use dataflow_kernels::cpu::norm::{Kind, Norm};
use dataflow_kernels::cuda::{cross_entropy, norm};

use crate::emulation::Memory;
use crate::golden::{Case, assert_close, cases};
use crate::{in_all_orders, in_both_formats};

fn check_norm(memory: &Memory, case: &Case, kind: Kind, groups: usize, strided: bool) {
    let x = case.get("in/x");
    let cols = *x.shape.last().unwrap();
    let rows = x.data.len() / cols;
    let norm = Norm { kind, groups, eps: case.attrs["eps"].as_f64().unwrap() as f32 };
    let place = |data: &[f32]| if strided { memory.columns(data, cols) } else { memory.input(data, cols) };
    let output = || if strided { memory.output_columns(rows, cols) } else { memory.output(rows, cols) };
    let parameter = |name: &str| case.has(name).then(|| memory.input(case.data(name), cols));
    let (weight, bias) = (parameter("in/weight"), parameter("in/bias"));
    let (input, y, dx) = (place(&x.data), output(), output());
    let statistics = memory.output(rows, norm.stats_per_row());
    memory.run(|c| norm::forward(c, norm, input, None, weight, bias, y, statistics));
    assert_close("y", &memory.read(y), case.data("out/y"), memory.tolerance(1e-5));

    // the same of a sum
    let part: Vec<f32> = x.data.iter().enumerate().map(|(i, x)| x * ((i * 7 % 5) as f32 / 4.0 - 0.5)).collect();
    let rest: Vec<f32> = x.data.iter().zip(&part).map(|(x, p)| x - p).collect();
    let (part, rest, h) = (place(&part), place(&rest), output());
    memory.run(|c| norm::forward(c, norm, part, Some((rest, h)), weight, bias, y, statistics));
    assert_close("y of a sum", &memory.read(y), case.data("out/y"), memory.tolerance(1e-5));
    assert_close("the sum", &memory.read(h), &x.data, memory.tolerance(1e-6));

    let dy = place(case.data("cot/y"));
    let dweight = weight.map(|_| memory.output(1, cols));
    let dbias = bias.map(|_| memory.output(1, cols));
    memory.run(|c| norm::backward(c, norm, input, statistics, weight, dy, None, dx, dweight, dbias));
    assert_close("dx", &memory.read(dx), case.data("grad/x"), memory.tolerance(1e-5));
    dweight
        .into_iter()
        .for_each(|g| assert_close("dweight", &memory.read(g), case.data("grad/weight"), memory.tolerance(1e-5)));
    dbias
        .into_iter()
        .for_each(|g| assert_close("dbias", &memory.read(g), case.data("grad/bias"), memory.tolerance(1e-5)));

    let passing = place(&x.data);
    memory.run(|c| norm::backward(c, norm, input, statistics, weight, dy, Some(passing), dx, dweight, dbias));
    let want: Vec<f32> = case.data("grad/x").iter().zip(&x.data).map(|(g, x)| g + x).collect();
    assert_close("dx with a gradient that passes by", &memory.read(dx), &want, memory.tolerance(1e-5));
}

#[test]
fn norms_match_the_golden_numbers() {
    in_both_formats(|memory| {
        for strided in [false, true] {
            for case in cases("rms_norm") {
                check_norm(memory, &case, Kind::Rms, 1, strided);
            }
            for case in cases("layer_norm") {
                check_norm(memory, &case, Kind::Layer, 1, strided);
            }
            for case in cases("group_norm") {
                check_norm(memory, &case, Kind::Layer, case.size("groups"), strided);
            }
        }
    });
}

/// Widths that take several vectors of a thread, and several warps of a row.
#[test]
fn wide_norms_match_the_processor() {
    in_both_formats(|memory| {
        for (cols, groups, rows, kind) in
            [(300, 1, 5, Kind::Layer), (768, 12, 3, Kind::Rms), (1030, 1, 2, Kind::Layer), (2052, 1, 2, Kind::Rms)]
        {
            let norm = Norm { kind, groups, eps: 1e-5 };
            let number = |i: usize| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 0.9;
            let x: Vec<f32> = (0..rows * cols).map(number).collect();
            let dy: Vec<f32> = (0..rows * cols).map(|i| number(i + 12_345)).collect();
            let w: Vec<f32> = (0..cols).map(|i| number(i + 99)).collect();
            let matrix = |data| dataflow_kernels::Rows::contiguous(data, cols);
            let (mut y, mut dx) = (vec![0.0; rows * cols], vec![0.0; rows * cols]);
            let (mut statistics, mut dw) = (vec![0.0; rows * norm.stats_per_row()], vec![0.0; cols]);
            let mut db = vec![0.0; cols];
            let out = dataflow_kernels::RowsMut::contiguous(&mut y, cols);
            use dataflow_kernels::cpu::norm as cpu;
            cpu::forward(norm, matrix(&x), None, Some(&w), None, out, Some(&mut statistics));
            let out = dataflow_kernels::RowsMut::contiguous(&mut dx, cols);
            let (x_, dy_) = (matrix(&x), matrix(&dy));
            cpu::backward(norm, x_, &statistics, Some(&w), dy_, None, out, Some(&mut dw), Some(&mut db));

            let (gx, gw, gdy) = (memory.input(&x, cols), memory.input(&w, cols), memory.input(&dy, cols));
            let (gy, gdx) = (memory.output(rows, cols), memory.output(rows, cols));
            let gs = memory.output(rows, norm.stats_per_row());
            let (gdw, gdb) = (memory.output(1, cols), memory.output(1, cols));
            memory.run(|c| norm::forward(c, norm, gx, None, Some(gw), None, gy, gs));
            memory.run(|c| norm::backward(c, norm, gx, gs, Some(gw), gdy, None, gdx, Some(gdw), Some(gdb)));
            assert_close("y", &memory.read(gy), &y, memory.tolerance(1e-5));
            assert_close("dx", &memory.read(gdx), &dx, memory.tolerance(1e-5));
            assert_close("dweight", &memory.read(gdw), &dw, memory.tolerance(1e-5));
            assert_close("dbias", &memory.read(gdb), &db, memory.tolerance(1e-5));
        }
    });
}

fn integers(data: &[f32]) -> Vec<i32> {
    data.iter().map(|&x| x as i32).collect()
}

#[test]
fn cross_entropy_matches_the_golden_numbers() {
    in_all_orders(|memory| {
        for case in cases("cross_entropy") {
            let logits = case.get("in/logits");
            let (rows, classes) = (logits.shape[0], logits.shape[1]);
            let targets = memory.integers(&integers(case.data("in/targets")));
            let upstream = memory.input(case.data("cot/y"), 1);
            let (loss, lse) = (memory.output(1, 1), memory.output(1, rows));
            for strided in [false, true] {
                let x =
                    if strided { memory.columns(&logits.data, classes) } else { memory.input(&logits.data, classes) };
                let dx = memory.output(rows, classes);
                memory.run(|c| cross_entropy::forward(c, x, targets, loss, lse));
                assert_close("loss", &memory.read(loss), case.data("out/y"), 1e-5);
                memory.run(|c| cross_entropy::backward(c, x, targets, lse, upstream, dx));
                assert_close("dlogits", &memory.read(dx), case.data("grad/logits"), 1e-5);
                // over the logits, in blocks of rows
                let factor = case.data("cot/y")[0];
                memory.run(|c| {
                    let counted = cross_entropy::count(c, targets, classes)?;
                    let losses = cross_entropy::losses(c, rows);
                    for from in (0..rows).step_by(2) {
                        let to = (from + 2).min(rows);
                        let part = losses.slice_cols(from, to);
                        let (x, targets) = (x.slice_rows(from, to), targets.slice_cols(from, to));
                        cross_entropy::rows_in_place(c, x, targets, counted, factor, part)?;
                    }
                    cross_entropy::mean(c, losses, counted, loss)
                });
                assert_close("loss", &memory.read(loss), case.data("out/y"), 1e-5);
                assert_close("dlogits in place", &memory.read(x), case.data("grad/logits"), 1e-5);
            }
        }
    });
}

#[test]
fn targets_that_are_no_class_are_refused_and_accuracy_counts() {
    in_all_orders(|memory| {
        let logits = memory.input(&[1.0, 3.0, 3.0, -5.0, -7.0, -6.0, 0.0, 0.0, 1.0, 2.0, 1.0, 0.0], 3);
        let (share, lse) = (memory.output(1, 1), memory.output(1, 4));
        let targets = memory.integers(&[1, 0, 1, -1]);
        memory.run(|c| cross_entropy::accuracy(c, logits, targets, share));
        assert_eq!(memory.read(share), [2.0 / 3.0]);
        let targets = memory.integers(&[1, 0, 3, -1]);
        let refused = memory.try_run(|c| cross_entropy::forward(c, logits, targets, share, lse));
        assert_eq!(refused.unwrap_err().to_string(), "target 3 at position 2 is none of 3 classes");
        let targets = memory.integers(&[-1; 4]);
        memory.run(|c| cross_entropy::forward(c, logits, targets, share, lse));
        assert_eq!(memory.read(share), [0.0]);
    });
}
