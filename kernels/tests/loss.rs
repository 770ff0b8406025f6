//! Cross-entropy and accuracy against the golden file and a loop in `f64`.
mod golden;

use dataflow_kernels::cpu::cross_entropy::{
    IGNORE_INDEX, TargetOutOfRange, accuracy, backward, backward_in_place, forward, forward_backward,
    forward_backward_in_place,
};
use dataflow_kernels::cpu::team::Team;
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

/// Loss and gradient by all four ways, which must agree.
fn run(logits: &[f32], classes: usize, targets: &[i32], upstream: f32) -> (f32, Vec<f32>) {
    let x = Rows::contiguous(logits, classes);
    let mut lse = vec![f32::NAN; targets.len()];
    let loss = forward(x, targets, &mut lse).unwrap();
    let mut separate = vec![f32::NAN; logits.len()];
    backward(x, targets, &lse, upstream, RowsMut::contiguous(&mut separate, classes)).unwrap();
    let mut in_place = logits.to_vec();
    backward_in_place(RowsMut::contiguous(&mut in_place, classes), targets, &lse, upstream).unwrap();
    assert_eq!(in_place, separate);
    let mut fused = vec![f32::NAN; logits.len()];
    let fused_loss = forward_backward(x, targets, upstream, None, RowsMut::contiguous(&mut fused, classes)).unwrap();
    assert_eq!(loss, fused_loss);
    in_place.copy_from_slice(logits);
    forward_backward_in_place(RowsMut::contiguous(&mut in_place, classes), targets, upstream, None).unwrap();
    assert_eq!(in_place, fused);
    assert_close("fused", &fused, &separate, 1e-5);
    (loss.mean(), fused)
}

fn expected(logits: &[f32], classes: usize, targets: &[i32], upstream: f32) -> (f32, Vec<f32>) {
    let counted = targets.iter().filter(|&&t| t != IGNORE_INDEX).count() as f64;
    let (mut loss, mut grad) = (0.0, vec![0.0; logits.len()]);
    for (r, (row, &target)) in logits.chunks(classes).zip(targets).enumerate() {
        if target == IGNORE_INDEX {
            continue;
        }
        let max = row.iter().fold(f64::MIN, |m, &x| m.max(x as f64));
        let lse = max + row.iter().map(|&x| (x as f64 - max).exp()).sum::<f64>().ln();
        loss += (lse - row[target as usize] as f64) / counted;
        for (v, &x) in row.iter().enumerate() {
            let hit = f64::from(v == target as usize);
            grad[r * classes + v] = (((x as f64 - lse).exp() - hit) / counted * upstream as f64) as f32;
        }
    }
    (loss as f32, grad)
}

#[test]
fn golden_cases() {
    for case in cases("cross_entropy") {
        let classes = case.size("V");
        let targets: Vec<i32> = case.data("in/targets").iter().map(|&t| t as i32).collect();
        let (loss, grad) = run(case.data("in/logits"), classes, &targets, case.data("cot/y")[0]);
        assert_close(&case.name, &[loss], case.data("out/y"), 1e-6);
        assert_close(&case.name, &grad, case.data("grad/logits"), 1e-5);
    }
}

#[test]
fn odd_shapes_agree_with_f64_on_any_threads() {
    for (rows, classes) in [(2301, 65), (37, 50257), (5, 2048), (64, 1), (700, 130)] {
        // rising logits make every block's maximum larger than the one before
        let logits: Vec<f32> = random(rows * classes, 1)
            .iter()
            .enumerate()
            .map(|(i, x)| x * 6.0 + 4.0 * ((i % classes) / 2048) as f32 - 50.0)
            .collect();
        let targets: Vec<i32> = (0..rows as i32)
            .map(|r| if r % 5 == 3 { IGNORE_INDEX } else { r.wrapping_mul(7919) % classes as i32 })
            .collect();
        let (one, two) = (
            on_threads(1, || run(&logits, classes, &targets, 0.25)),
            on_threads(2, || run(&logits, classes, &targets, 0.25)),
        );
        assert!(one == two, "depends on the threads");
        let want = expected(&logits, classes, &targets, 0.25);
        assert_close("loss", &[one.0], &[want.0], 1e-5);
        assert_close("gradient", &one.1, &want.1, 1e-5);
    }
}

#[test]
fn extreme_logits() {
    let inf = f32::INFINITY;
    // a masked class has probability 0 and no gradient
    let (loss, grad) = run(&[0.0, -inf, 0.0], 3, &[0], 1.0);
    assert_close("masked", &[loss], &[2f32.ln()], 1e-6);
    assert_close("masked", &grad, &[-0.5, 0.0, 0.5], 1e-6);
    let (loss, grad) = run(&[1000.0, -1000.0, 0.0], 3, &[1], 1.0);
    assert_close("far", &[loss], &[2000.0], 1e-6);
    assert_close("far", &grad, &[1.0, -1.0, 0.0], 1e-6);
    // NaN is never lost
    let x = Rows::new(&[0.0, f32::NAN, 1.0], 1, 3, 3);
    let (mut lse, mut grad) = ([0.0], [0.0; 3]);
    assert!(forward(x, &[0], &mut lse).unwrap().mean().is_nan() && lse[0].is_nan());
    assert!(forward_backward(x, &[0], 1.0, None, RowsMut::contiguous(&mut grad, 3)).unwrap().mean().is_nan());
    assert!(grad.iter().all(|g| g.is_nan()));
}

#[test]
fn no_counted_row_is_a_loss_of_zero() {
    let (loss, grad) = run(&random(12, 3), 4, &[IGNORE_INDEX; 3], 1.0);
    assert_eq!((loss, grad), (0.0, vec![0.0; 12]));
}

#[test]
fn blocks_of_rows_add_up_to_the_batch() {
    let (rows, classes) = (50, 33);
    let logits = random(rows * classes, 4);
    let targets: Vec<i32> = (0..rows as i32).map(|r| if r < 9 { -1 } else { r % 33 }).collect();
    let (loss, grad) = run(&logits, classes, &targets, 2.0);
    let (x, mut blocks, mut sum) = (Rows::contiguous(&logits, classes), vec![0.0; logits.len()], 0.0);
    for from in (0..rows).step_by(20) {
        let to = (from + 20).min(rows);
        let block = RowsMut::contiguous(&mut blocks[from * classes..to * classes], classes);
        sum += forward_backward(x.slice_rows(from, to), &targets[from..to], 2.0, Some(41), block).unwrap().sum;
    }
    assert_eq!(blocks, grad);
    assert_close("loss", &[(sum / 41.0) as f32], &[loss], 1e-6);
}

#[test]
fn wrong_targets_are_named() {
    let x = Rows::new(&[0.0; 6], 3, 2, 2);
    for target in [2, -2, i32::MAX, i32::MIN] {
        let want = TargetOutOfRange { position: 1, target, classes: 2 };
        assert_eq!(forward(x, &[-1, target, 0], &mut [0.0; 3]), Err(want));
        assert_eq!(accuracy(x, &[-1, target, 0]), Err(want));
    }
}

#[test]
fn accuracy_takes_the_first_of_equal_logits() {
    let logits = [1.0, 3.0, 3.0, 0.0, -1.0, -2.0, 0.0, 0.0, 9.0, 5.0, 5.0, 5.0];
    let x = Rows::contiguous(&logits, 3);
    assert_eq!(accuracy(x, &[1, 0, 2, 0]), Ok((4, 4)));
    assert_eq!(accuracy(x, &[2, -1, 2, 1]), Ok((1, 3)));
    let logits = random(500 * 77, 9);
    let best = |row: &[f32]| (0..77).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as i32;
    let targets: Vec<i32> =
        logits.chunks(77).enumerate().map(|(r, row)| if r % 4 == 0 { 5 } else { best(row) }).collect();
    let want = logits.chunks(77).zip(&targets).filter(|(row, t)| best(row) == **t).count();
    assert_eq!(accuracy(Rows::contiguous(&logits, 77), &targets), Ok((want, 500)));
}
