//! Rotary embedding and row lookup against the golden files and plain loops.
mod golden;

use dataflow_kernels::cpu::embedding::{self, IdOutOfRange};
use dataflow_kernels::cpu::rotary::{Direction, Pairing, Rotation, angles, rotate, rotate_in_place};
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

#[test]
fn golden_rotations() {
    for (op, pairing) in [("rope", Pairing::Half), ("theta_shift", Pairing::Interleaved)] {
        for case in cases(op) {
            let &[_, heads, len, dim] = case.get("in/x").shape.as_slice() else { panic!() };
            let rows = |name: &str| case.get(name).permute(&[0, 2, 1, 3]).data;
            let (mut cos, mut sin) = (vec![0.0; len * dim / 2], vec![0.0; len * dim / 2]);
            angles(pairing, 10000.0, dim, case.size("offset"), &mut cos, &mut sin);
            let rotation = Rotation { pairing, head_dim: dim, cos: &cos, sin: &sin, scale: 1.0 };
            for (from, to, direction) in
                [("in/x", "out/y", Direction::Forward), ("cot/y", "grad/x", Direction::Backward)]
            {
                let (x, cols) = (rows(from), heads * dim);
                let mut y = vec![f32::NAN; x.len()];
                rotate(rotation, direction, Rows::contiguous(&x, cols), RowsMut::contiguous(&mut y, cols));
                assert_close(&format!("{op} {} {to}", case.name), &y, &rows(to), 1e-6);
            }
        }
    }
}

#[test]
fn rotations_of_odd_shapes_agree_with_f64_on_any_threads() {
    for pairing in [Pairing::Half, Pairing::Interleaved] {
        for (batch, len, heads, dim) in [(3, 211, 5, 54), (2, 40, 2, 128), (1, 7, 3, 2), (2, 33, 12, 64)] {
            let (rows, cols, half, offset, scale) = (batch * len, heads * dim, dim / 2, 99_000, 0.125);
            let x = random(rows * cols, 1);
            let (mut cos, mut sin) = (vec![0.0; len * half], vec![0.0; len * half]);
            angles(pairing, 10000.0, dim, offset, &mut cos, &mut sin);
            let rotation = Rotation { pairing, head_dim: dim, cos: &cos, sin: &sin, scale };
            let run = |direction, threads| {
                let mut y = vec![f32::NAN; x.len()];
                let out = RowsMut::contiguous(&mut y, cols);
                on_threads(threads, || rotate(rotation, direction, Rows::contiguous(&x, cols), out));
                let mut in_place = x.clone();
                rotate_in_place(rotation, direction, RowsMut::contiguous(&mut in_place, cols));
                assert_eq!(y, in_place);
                y
            };
            for direction in [Direction::Forward, Direction::Backward] {
                let mut want = vec![0.0; x.len()];
                for (r, head, i) in (0..rows).flat_map(|r| (0..heads * half).map(move |k| (r, k / half, k % half))) {
                    let (exponent, a, b) = match pairing {
                        Pairing::Half => (2.0 * i as f64 / dim as f64, i, i + half),
                        Pairing::Interleaved => (i as f64 / (half as f64 - 1.0).max(1.0), 2 * i, 2 * i + 1),
                    };
                    let angle = (offset + r % len) as f64 * 10000f64.powf(-exponent);
                    let angle = if direction == Direction::Forward { angle } else { -angle };
                    let at = r * cols + head * dim;
                    let (va, vb) = (x[at + a] as f64, x[at + b] as f64);
                    want[at + a] = ((va * angle.cos() - vb * angle.sin()) * scale as f64) as f32;
                    want[at + b] = ((vb * angle.cos() + va * angle.sin()) * scale as f64) as f32;
                }
                let one = run(direction, 1);
                assert_eq!(one, run(direction, 2));
                assert_close("rotation", &one, &want, 1e-6);
            }
        }
    }
}

#[test]
fn golden_embedding() {
    for case in cases("embedding") {
        let cols = case.size("C");
        let ids: Vec<i32> = case.data("in/idx").iter().map(|&i| i as i32).collect();
        let mut y = vec![f32::NAN; ids.len() * cols];
        embedding::forward(&ids, case.data("in/weight"), RowsMut::contiguous(&mut y, cols)).unwrap();
        assert_eq!(y, case.data("out/y"));
        let mut dweight = vec![f32::NAN; case.size("V") * cols];
        embedding::backward(&ids, Rows::contiguous(case.data("cot/y"), cols), &mut dweight).unwrap();
        assert_close(&case.name, &dweight, case.data("grad/weight"), 1e-6);
    }
}

#[test]
fn embedding_gradient_of_any_distribution_of_ids() {
    for (vocabulary, cols, count) in [(65, 770, 3001), (5003, 37, 900), (1, 9, 50), (40, 3, 0), (700, 1030, 2)] {
        // squaring makes low ids frequent and leaves many out
        let ids: Vec<i32> = random(count, 1).iter().map(|x| (x * x * vocabulary as f32 * 0.99) as i32).collect();
        let dy = random(count * cols, 2);
        let run = |threads| {
            let mut dweight = vec![f32::NAN; vocabulary * cols];
            on_threads(threads, || embedding::backward(&ids, Rows::contiguous(&dy, cols), &mut dweight)).unwrap();
            dweight
        };
        let mut want = vec![0.0f32; vocabulary * cols];
        for (n, &id) in ids.iter().enumerate() {
            for c in 0..cols {
                want[id as usize * cols + c] += dy[n * cols + c];
            }
        }
        assert_eq!(run(1), want);
        assert_eq!(run(2), want);
    }
}

#[test]
fn wrong_ids_are_named() {
    let weight = [0.0; 6];
    let mut out = [0.0; 6];
    for id in [3, -1, i32::MAX, i32::MIN] {
        let want = Err(IdOutOfRange { position: 2, id, rows: 3 });
        assert_eq!(embedding::forward(&[0, 2, id], &weight, RowsMut::contiguous(&mut out, 2)), want);
        let mut dweight = [0.0; 6];
        assert_eq!(embedding::backward_add(&[0, 2, id], Rows::contiguous(&weight, 2), &mut dweight), want);
        assert_eq!(embedding::backward(&[0, 2, id], Rows::contiguous(&weight, 2), &mut dweight), want);
    }
}

#[test]
fn gradients_of_the_table_can_be_added_to_others() {
    let (vocabulary, cols) = (11, 7);
    let ids: Vec<i32> = (0..50).map(|i| i * i % 9).collect();
    let dy: Vec<f32> = (0..50 * cols).map(|i| ((i * 37) % 101) as f32 / 16.0).collect();
    let before: Vec<f32> = (0..vocabulary * cols).map(|i| i as f32).collect();
    let (mut sum, mut alone) = (before.clone(), vec![f32::NAN; before.len()]);
    embedding::backward_add(&ids, Rows::contiguous(&dy, cols), &mut sum).unwrap();
    embedding::backward(&ids, Rows::contiguous(&dy, cols), &mut alone).unwrap();
    // sixteenths are added without rounding
    assert!((0..before.len()).all(|i| sum[i] == before[i] + alone[i]));
    assert_ne!(sum, before);
}
