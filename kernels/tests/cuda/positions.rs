use dataflow_kernels::cpu::rotary::{Direction, Pairing};
use dataflow_kernels::cuda::rotary::{self, Rotation};

use crate::golden::{assert_close, cases};
use crate::in_both_formats;

#[test]
fn rotations_match_the_golden_numbers() {
    in_both_formats(|memory| {
        for (op, pairing) in [("rope", Pairing::Half), ("theta_shift", Pairing::Interleaved)] {
            for case in cases(op) {
                let x = case.get("in/x").permute(&[0, 2, 1, 3]);
                let [_, time, heads, dim] = x.shape[..] else { panic!("four dimensions") };
                let cols = heads * dim;
                let rotation = Rotation { pairing, base: 10000.0, head_dim: dim, scale: 1.0 };
                let position = memory.integers(&[case.size("offset") as i32]);
                let position = (case.size("offset") > 0).then_some(position);
                let run = |direction, data: &[f32]| {
                    let x = memory.columns(data, cols);
                    let y = memory.output(data.len() / cols, cols);
                    memory.run(|c| rotary::rotate(c, rotation, direction, time, position, x, y));
                    memory.run(|c| rotary::rotate(c, rotation, direction, time, position, x, x));
                    assert_eq!(memory.read(x), memory.read(y), "in place");
                    memory.read(y)
                };
                let want = |name: &str| case.get(name).permute(&[0, 2, 1, 3]).data;
                assert_close("y", &run(Direction::Forward, &x.data), &want("out/y"), memory.tolerance(1e-5));
                assert_close("dx", &run(Direction::Backward, &want("cot/y")), &want("grad/x"), memory.tolerance(1e-5));
            }
        }
    });
}
