//! Products whose result goes through an elementwise program: a row of tiles at a time, while it is in the cache.

use std::ops::Range;

use super::product::{After, is_thin};
use super::{Factor, Init, run};
use crate::cpu::interpreter::{Compiled, Operand, Run};
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
/// `kept`, if that is given; without it, [`Init::Accumulate`] adds to what the first output holds. With `pairs`, factors
/// are rounded as in [`matmul_bf16`](super::matmul_bf16).
///
/// # Panics
/// If the sizes do not fit, or nothing can hold the product's result in `f32`.
pub fn matmul_then(
    kept: Option<RowsMut<'_>>,
    (a, b): (Factor<'_>, Factor<'_>),
    init: Init<'_>,
    pairs: bool,
    epilogue: Epilogue<'_, '_, '_>,
) {
    let (m, n, result) = (a.rows(), b.cols(), epilogue.result);
    let taken = epilogue.inputs.iter().enumerate().any(|(i, x)| i != result && matches!(x, Operand::InPlace(0)));
    if let Some(mut c) = kept {
        assert_eq!((c.rows(), c.cols()), (m, n), "size of the product");
        let (ptr, stride) = (c.as_mut_ptr(), c.stride());
        // SAFETY: the program reads a part of it after the product has written that for the last time, in the same task.
        let read = Operand::Full(unsafe { Rows::from_raw(ptr, m, n, stride) });
        chain(c, read, (a, b), init, pairs, epilogue);
    } else if taken {
        assert!(!matches!(init, Init::Accumulate), "the first output holds an input of the program");
        with_scratch(m * n, |scratch| {
            let mut c = RowsMut::contiguous(scratch, n);
            let ptr = c.as_mut_ptr();
            // SAFETY: as above.
            let read = Operand::Full(unsafe { Rows::from_raw(ptr, m, n, n) });
            chain(c, read, (a, b), init, pairs, epilogue);
        });
    } else {
        let Output::Single(first) = &mut epilogue.outputs[0] else {
            panic!("a sum of products needs an output in f32, or `kept`");
        };
        let (ptr, stride) = (first.as_mut_ptr(), first.stride());
        assert_eq!((first.rows(), first.cols()), (m, n), "size of the product");
        // SAFETY: the program touches a part of its output after the product is done with it, in the same task.
        let c = unsafe { RowsMut::from_raw(ptr, m, n, stride) };
        chain(c, Operand::InPlace(0), (a, b), init, pairs, epilogue);
    }
}

/// The product to `c`, which the program reads as `read`.
fn chain<'i>(
    c: RowsMut<'_>,
    read: Operand<'i>,
    (a, b): (Factor<'_>, Factor<'_>),
    init: Init<'_>,
    pairs: bool,
    epilogue: Epilogue<'_, 'i, '_>,
) {
    let Epilogue { program, inputs, result, outputs, seed, step } = epilogue;
    let (m, n) = (a.rows(), b.cols());
    assert!(outputs.iter().all(|o| (o.rows(), o.cols()) == (m, n)), "outputs of other sizes than the product");
    inputs[result] = read;
    if is_thin(m, n) {
        run(c, a, b, init, true, pairs, None);
        return program.run(inputs, outputs, seed, step);
    }
    if let Some(bound) = program.bind(inputs, outputs, seed, step) {
        run(c, a, b, init, true, pairs, Some(&Parts(bound)));
    }
}

/// The program behind a product whose result has the size of its operands.
struct Parts<'a>(Run<'a>);

impl After for Parts<'_> {
    fn ahead(&self, rows: Range<usize>, columns: Range<usize>) {
        self.0.ahead(rows, columns);
    }
    fn complete(&self, rows: Range<usize>, columns: Range<usize>) {
        // SAFETY: `chain` borrows the operands as long as the product runs, whose tasks have different parts.
        unsafe { self.0.part(rows, columns) }
    }
}
