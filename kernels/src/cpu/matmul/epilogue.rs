//! Products whose result goes through an elementwise program: a row of tiles at a time, while it is in the cache.

use std::ops::Range;

use super::product::{After, is_thin};
use super::{Factor, Init, run};
use crate::cpu::interpreter::{Compiled, MAX_INPUTS, Operand, Run};
use crate::cpu::output::Output;
use crate::cpu::threads::with_scratch;
use crate::{Rows, RowsMut};

/// What is computed from the result of a product.
pub struct Epilogue<'a, 'i, 'o> {
    /// The program.
    pub program: &'a Compiled,
    /// Its inputs; what stands at `result` is ignored.
    pub inputs: &'a mut [Operand<'i>],
    /// The input that is the result of the product.
    pub result: usize,
    /// Its outputs, of the size of the product.
    pub outputs: &'a mut [Output<'o>],
    /// Dropout masks are those of this seed.
    pub seed: u64,
    /// And of this step.
    pub step: u64,
}

/// The program of `epilogue` over `init + a b`, with the same bits as one after the other. The result of the product goes to
/// `kept`, if that is given; without it, [`Init::Accumulate`] adds to what the first output holds, which must then be in
/// `f32`. With `pairs`, factors are rounded as in [`matmul_bf16`](super::matmul_bf16).
///
/// # Panics
/// If the sizes do not fit, or nothing holds what is added to.
pub fn matmul_then(
    kept: Option<RowsMut<'_>>,
    (a, b): (Factor<'_>, Factor<'_>),
    init: Init<'_>,
    pairs: bool,
    epilogue: Epilogue<'_, '_, '_>,
) {
    let Epilogue { program, inputs, result, outputs, seed, step } = epilogue;
    let (m, n) = (a.rows(), b.cols());
    assert!(outputs.iter().all(|o| (o.rows(), o.cols()) == (m, n)), "outputs of other sizes than the product");
    let taken = inputs.iter().enumerate().any(|(i, x)| i != result && matches!(x, Operand::InPlace(0)));
    // where the result of the product stays until the program has read it, if it needs a place
    let (place, read) = match (kept, &mut outputs[0]) {
        (Some(mut c), _) => {
            assert_eq!((c.rows(), c.cols()), (m, n), "size of the product");
            let (ptr, stride) = (c.as_mut_ptr(), c.stride());
            // SAFETY: the program reads a part of it after the product has written that for the last time, in the same task.
            (Some(c), Operand::Full(unsafe { Rows::from_raw(ptr, m, n, stride) }))
        }
        (None, Output::Single(first)) if !taken => {
            let (ptr, stride) = (first.as_mut_ptr(), first.stride());
            // SAFETY: the program touches a part of its output after the product is done with it, in the same task.
            (Some(unsafe { RowsMut::from_raw(ptr, m, n, stride) }), Operand::InPlace(0))
        }
        _ => (None, Operand::Scalar(&0.0)),
    };
    assert!(place.is_some() || !matches!(init, Init::Accumulate), "nothing holds what the product is added to");
    inputs[result] = read;
    if is_thin(m, n) {
        if let Some(c) = place {
            run(Some(c), a, b, init, true, pairs, None);
            return program.run(inputs, outputs, seed, step);
        }
        return with_scratch(m * n, |c| {
            run(Some(RowsMut::contiguous(c, n)), a, b, init, true, pairs, None);
            let mut reading = [Operand::Scalar(&0.0); MAX_INPUTS];
            reading[..inputs.len()].copy_from_slice(inputs);
            reading[result] = Operand::Full(Rows::contiguous(c, n));
            program.run(&reading[..inputs.len()], outputs, seed, step);
        });
    }
    if let Some(bound) = program.bind(inputs, outputs, seed, step) {
        run(place, a, b, init, true, pairs, Some(&Parts { bound, result }));
    }
}

/// The program behind a product whose result has the size of its operands.
struct Parts<'a> {
    bound: Run<'a>,
    result: usize,
}

impl After for Parts<'_> {
    fn ahead(&self, rows: Range<usize>, columns: Range<usize>) {
        self.bound.ahead(rows, columns);
    }
    fn complete(&self, rows: Range<usize>, columns: Range<usize>, at: Option<(*const f32, usize)>) {
        // SAFETY: `matmul_then` borrows the operands as long as the product runs, whose tasks have different parts; a result
        // that lies elsewhere is that task's.
        unsafe {
            match at {
                Some((ptr, stride)) => self.bound.reading(self.result, ptr, stride).part(rows, columns),
                None => self.bound.part(rows, columns),
            }
        }
    }
}
