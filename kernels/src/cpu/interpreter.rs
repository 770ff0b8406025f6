//! Runs fused elementwise programs over L1-sized tiles.
//!
//! A [`Program`] goes over memory once, whatever its length: the matrix is cut into tiles of about a
//! thousand elements, and each instruction is one vector loop over the tile. Results of instructions live in
//! a few tile buffers that stay in the L1 cache (as few as the liveness of the registers allows); inputs are
//! read where they lie, and the instruction that makes an output writes it where it belongs, so there are no
//! copies. Interpreting costs a few nanoseconds per instruction and tile, a hundredth of a nanosecond per
//! element, so programs of cheap instructions run at the speed of memory.
//!
//! A broadcast operand costs nothing extra: every operand is a pointer with a row stride (0 for a vector that
//! all rows share) and, where a row has one value, that value is spread over a vector register. Short
//! rows are put together in one tile, and if nothing depends on the rows the whole matrix is one long row.

use std::ops::Range;

use super::math;
use super::output::{Output, round_slice};
use super::simd::{Simd, SimdKernel, dispatch};
use super::threads::{parallel_for, with_scratch};
use crate::Rows;
use crate::device::Bf16;
use crate::expression::{Binary, Instruction, Program, Unary};
use crate::random::Keep;

/// Elements of a tile: four kilobytes, so that half a dozen fit in the L1 cache.
const TILE: usize = 1024;
/// Elements of a cache line.
const LINE: usize = 16;
/// Elements of a matrix from which on operands are taken to come from memory and not from the L2 cache. Then
/// programs of four steps or more gain up to 40 % by prefetching; shorter ones lose by it.
const BEYOND_CACHE: usize = 256 * 1024;
/// Elements of a parallel task.
const GRAIN: usize = 8 * 1024;
/// Most inputs of a compiled program.
pub const MAX_INPUTS: usize = 32;
/// Most outputs of a compiled program.
pub const MAX_OUTPUTS: usize = 16;
/// Most dropout masks of a compiled program.
pub const MAX_MASKS: usize = 8;

/// An input of a program that runs over `[rows, cols]`.
#[derive(Clone, Copy)]
pub enum Operand<'a> {
    /// `[rows, cols]`
    Full(Rows<'a>),
    /// `[rows, 1]`: one value per row.
    Column(Rows<'a>),
    /// `[cols]`: one row for all.
    Row(&'a [f32]),
    /// One value for all.
    Scalar(&'a f32),
    /// `[n, cols]` or `[n, 1]`, where row `r` reads row `(r / div) % n`: for `[T, C]` over `[B, T, C]`
    /// `div = 1`, for `[B, 1, C]` `div = T`.
    Mapped {
        /// The `n` rows.
        rows: Rows<'a>,
        /// How many rows in a row read the same one.
        div: usize,
    },
    /// What lies in the memory of this output before it is overwritten.
    InPlace(usize),
}

/// An output in memory.
#[derive(Clone, Copy)]
struct Place {
    ptr: *mut u8,
    stride: usize,
    narrow: bool,
}

impl Place {
    fn new(output: &mut Output<'_>) -> Self {
        match output {
            Output::Single(y) => Self { ptr: y.as_mut_ptr().cast(), stride: y.stride(), narrow: false },
            Output::Bf16(y) => Self { ptr: y.as_mut_ptr().cast(), stride: y.stride(), narrow: true },
        }
    }

    /// The address of the element this far from the first.
    fn at(&self, offset: usize) -> *mut u8 {
        self.ptr.wrapping_add(offset * if self.narrow { size_of::<Bf16>() } else { size_of::<f32>() })
    }

    /// Elements of a cache line.
    fn line(&self) -> usize {
        if self.narrow { 2 * LINE } else { LINE }
    }
}

/// Where an instruction reads.
#[derive(Clone, Copy, Debug)]
enum Source {
    Input(u32),
    Constant(f32),
    Tile(u32),
    Output(u32),
}

/// Where it writes.
#[derive(Clone, Copy, Debug)]
enum Target {
    Tile(u32),
    Output(u32),
}

#[derive(Clone, Copy, Debug)]
enum Operation {
    Copy,
    Unary(Unary),
    Binary(Binary),
    Select,
    Keep(u32),
}

#[derive(Clone, Copy, Debug)]
struct Step {
    operation: Operation,
    from: [Source; 3],
    to: Target,
}

/// A program prepared for running.
#[derive(Debug)]
pub struct Compiled {
    steps: Vec<Step>,
    inputs: usize,
    /// For each input, one past the last step that reads it.
    last_read: Vec<usize>,
    /// For each output, the step that writes it.
    written: Vec<usize>,
    masks: Vec<(u32, f32)>,
    /// Buffers for intermediate results; after them there is one per output and three for spreading.
    tiles: usize,
}

impl Compiled {
    /// Orders the instructions and assigns tile buffers.
    ///
    /// # Panics
    /// Beyond [`MAX_INPUTS`], [`MAX_OUTPUTS`] or [`MAX_MASKS`].
    pub fn new(program: &Program) -> Self {
        let instructions = program.instructions();
        let outputs = program.outputs();
        assert!(program.inputs() <= MAX_INPUTS, "{} inputs, at most {MAX_INPUTS}", program.inputs());
        assert!(outputs.len() <= MAX_OUTPUTS, "{} outputs, at most {MAX_OUTPUTS}", outputs.len());
        let mut last_use = vec![0; instructions.len()];
        for (i, instruction) in instructions.iter().enumerate() {
            instruction.operands().for_each(|r| last_use[r as usize] = i);
        }
        // a register that is an output lives in the output's memory; other outputs of it are copies
        let owner = |r: u32| outputs.iter().position(|&o| o == r).map(|o| o as u32);
        let mut compiled = Compiled {
            steps: Vec::new(),
            inputs: program.inputs(),
            last_read: vec![0; program.inputs()],
            written: vec![0; outputs.len()],
            masks: Vec::new(),
            tiles: 0,
        };
        let mut sources: Vec<Source> = Vec::with_capacity(instructions.len());
        let mut free: Vec<u32> = Vec::new();
        for (i, &instruction) in instructions.iter().enumerate() {
            let operation = match instruction {
                Instruction::Input(k) => {
                    sources.push(Source::Input(k));
                    continue;
                }
                Instruction::Constant(c) => {
                    sources.push(Source::Constant(c.get()));
                    continue;
                }
                Instruction::Unary(op, _) => Operation::Unary(op),
                Instruction::Binary(op, ..) => Operation::Binary(op),
                Instruction::Select(..) => Operation::Select,
                Instruction::Keep { site, p } => {
                    compiled.masks.push((site, p.get()));
                    Operation::Keep(compiled.masks.len() as u32 - 1)
                }
            };
            let mut from = [Source::Constant(0.0); 3];
            for (slot, r) in from.iter_mut().zip(instruction.operands()) {
                *slot = sources[r as usize];
            }
            // a loop reads an element before it writes it, so a result may take the place of an operand
            for (k, r) in instruction.operands().enumerate() {
                let again = instruction.operands().take(k).any(|earlier| earlier == r);
                if let (Source::Tile(t), true, false) = (sources[r as usize], last_use[r as usize] == i, again) {
                    free.push(t);
                }
            }
            let to = match owner(i as u32) {
                Some(o) => Target::Output(o),
                None => Target::Tile(free.pop().unwrap_or_else(|| {
                    compiled.tiles += 1;
                    compiled.tiles as u32 - 1
                })),
            };
            sources.push(match to {
                Target::Tile(t) => Source::Tile(t),
                Target::Output(o) => Source::Output(o),
            });
            compiled.push(operation, from, to);
        }
        for (o, &r) in outputs.iter().enumerate() {
            let source = sources[r as usize];
            if !matches!(source, Source::Output(owner) if owner as usize == o) {
                let none = Source::Constant(0.0);
                compiled.push(Operation::Copy, [source, none, none], Target::Output(o as u32));
            }
        }
        assert!(compiled.masks.len() <= MAX_MASKS, "{} masks, at most {MAX_MASKS}", compiled.masks.len());
        compiled
    }

    fn push(&mut self, operation: Operation, from: [Source; 3], to: Target) {
        let step = self.steps.len();
        for source in from {
            if let Source::Input(i) = source {
                self.last_read[i as usize] = step + 1;
            }
        }
        if let Target::Output(o) = to {
            self.written[o as usize] = step;
        }
        self.steps.push(Step { operation, from, to });
    }

    fn buffers(&self) -> usize {
        self.tiles + self.written.len() + 3
    }

    /// Computes all outputs (`[rows, cols]`, all the same) from the inputs. Dropout masks are those of step
    /// `step` of `seed`.
    ///
    /// # Panics
    /// If the number of operands or the sizes do not fit.
    pub fn run(&self, inputs: &[Operand<'_>], outputs: &mut [Output<'_>], seed: u64, step: u64) {
        let Some(mut run) = self.bind(inputs, outputs, seed, step) else { return };
        run.flatten();
        run.prefetch = self.steps.len() >= 4 && run.rows * run.cols >= BEYOND_CACHE;
        let Run { rows, cols, .. } = run;
        let run = &run;
        if cols <= GRAIN {
            let block = GRAIN / cols;
            parallel_for(rows.div_ceil(block), |i| {
                let (from, to) = (i * block, ((i + 1) * block).min(rows));
                // SAFETY: tasks write different rows; `run` was checked against the operands.
                unsafe { run.part(from..to, 0..cols) };
            });
        } else {
            let pieces = cols.div_ceil(GRAIN);
            parallel_for(rows * pieces, |i| {
                let (row, from) = (i / pieces, i % pieces * GRAIN);
                let columns = from..(from + GRAIN).min(cols);
                // SAFETY: tasks write different parts of rows; `run` was checked against the operands.
                unsafe { run.part(row..row + 1, columns) };
            });
        }
    }

    /// The program with its operands, to be run part by part; `None` if there is nothing to compute.
    ///
    /// # Panics
    /// If the number of operands or the sizes do not fit.
    pub(super) fn bind<'a>(
        &'a self,
        inputs: &[Operand<'a>],
        outputs: &mut [Output<'_>],
        seed: u64,
        step: u64,
    ) -> Option<Run<'a>> {
        assert_eq!(inputs.len(), self.inputs, "operands for the inputs");
        assert_eq!(outputs.len(), self.written.len(), "operands for the outputs");
        let (rows, cols) = outputs.first().map(|o| (o.rows(), o.cols()))?;
        if rows == 0 || cols == 0 {
            return None;
        }
        let mut run = Run {
            compiled: self,
            rows,
            cols,
            inputs: [Layout { ptr: std::ptr::null(), stride: 0, div: 1, modulo: 1, splat: true }; MAX_INPUTS],
            outputs: [Place { ptr: std::ptr::null_mut(), stride: 0, narrow: false }; MAX_OUTPUTS],
            deferred: [false; MAX_OUTPUTS],
            masks: [Keep { key: [0; 2], threshold: 0, scale: 1.0 }; MAX_MASKS],
            prefetch: false,
        };
        for (o, output) in outputs.iter_mut().enumerate() {
            assert_eq!((output.rows(), output.cols()), (rows, cols), "outputs of different sizes");
            run.outputs[o] = Place::new(output);
            // rounded at the end, as other steps may read it
            run.deferred[o] = run.outputs[o].narrow;
        }
        for (i, input) in inputs.iter().enumerate() {
            run.inputs[i] = match *input {
                Operand::Full(m) => {
                    assert_eq!((m.rows(), m.cols()), (rows, cols), "size of input {i}");
                    Layout { ptr: m.as_ptr(), stride: m.stride(), div: 1, modulo: rows, splat: false }
                }
                Operand::Column(m) => {
                    assert_eq!((m.rows(), m.cols()), (rows, 1), "size of input {i}");
                    Layout { ptr: m.as_ptr(), stride: m.stride(), div: 1, modulo: rows, splat: cols > 1 }
                }
                Operand::Row(v) => {
                    assert_eq!(v.len(), cols, "size of input {i}");
                    Layout { ptr: v.as_ptr(), stride: 0, div: 1, modulo: 1, splat: false }
                }
                Operand::Scalar(x) => Layout { ptr: x, stride: 0, div: 1, modulo: 1, splat: true },
                Operand::Mapped { rows: m, div } => {
                    assert!(m.rows() > 0 && div > 0 && (m.cols() == cols || m.cols() == 1), "size of input {i}");
                    let splat = m.cols() < cols;
                    // the last row repeats where div reaches beyond the matrix: as good as one row
                    let modulo = if div >= rows { 1 } else { m.rows() };
                    Layout { ptr: m.as_ptr(), stride: m.stride(), div, modulo, splat }
                }
                Operand::InPlace(o) => {
                    assert!(o < outputs.len(), "input {i} in the place of output {o}");
                    // written before the input is read for the last time: through a buffer
                    run.deferred[o] |= self.last_read[i] > self.written[o] + 1;
                    let place = run.outputs[o];
                    assert!(!place.narrow, "input {i} in the place of a narrow output");
                    Layout { ptr: place.ptr.cast(), stride: place.stride, div: 1, modulo: rows, splat: false }
                }
            };
        }
        for (slot, &(site, p)) in run.masks.iter_mut().zip(&self.masks) {
            *slot = Keep::new(seed, step, site, p);
        }
        Some(run)
    }
}

/// An input in memory: row `r` of the program is at `ptr + (r / div) % modulo * stride`, one value if `splat`.
#[derive(Clone, Copy)]
struct Layout {
    ptr: *const f32,
    stride: usize,
    div: usize,
    modulo: usize,
    splat: bool,
}

impl Layout {
    /// As an output that would lie there.
    fn place(&self) -> Place {
        Place { ptr: self.ptr.cast_mut().cast(), stride: self.stride, narrow: false }
    }
}

/// A program with its operands.
#[derive(Clone, Copy)]
pub(super) struct Run<'a> {
    compiled: &'a Compiled,
    rows: usize,
    cols: usize,
    inputs: [Layout; MAX_INPUTS],
    outputs: [Place; MAX_OUTPUTS],
    /// Outputs that must not be written before the end of a tile.
    deferred: [bool; MAX_OUTPUTS],
    masks: [Keep; MAX_MASKS],
    /// Whether to ask for memory a tile ahead.
    prefetch: bool,
}

// SAFETY: tasks read the inputs and write disjoint parts of the outputs; both are borrowed by the call.
unsafe impl Sync for Run<'_> {}

impl Run<'_> {
    /// Computes the outputs in these rows and columns, on this thread.
    ///
    /// # Safety
    /// The operands must still be valid, the part must lie in the matrix, and nothing else may access it meanwhile.
    pub(super) unsafe fn part(&self, rows: Range<usize>, cols: Range<usize>) {
        with_scratch(self.compiled.buffers() * TILE + LINE, |scratch| {
            // SAFETY: the caller's promise.
            dispatch(unsafe { Block::new(self, rows, cols, scratch) });
        });
    }

    /// The same, with a full input that lies elsewhere.
    pub(super) fn reading(&self, input: usize, ptr: *const f32, stride: usize) -> Self {
        let mut other = *self;
        other.inputs[input] = Layout { ptr, stride, div: 1, modulo: self.rows, splat: false };
        other
    }

    /// Asks for the memory of the operands in these rows and columns to come to the second cache.
    pub(super) fn ahead(&self, rows: Range<usize>, cols: Range<usize>) {
        let inputs = self.inputs[..self.compiled.inputs].iter();
        let inputs = inputs.filter(|l| l.div == 1 && l.modulo == self.rows && !l.splat).map(Layout::place);
        for place in inputs.chain(self.outputs[..self.compiled.written.len()].iter().copied()) {
            let line = place.line();
            for row in rows.clone() {
                let start = row * place.stride + cols.start;
                (0..cols.len()).step_by(line).for_each(|i| prefetch_far(place.at(start + i)));
            }
        }
    }

    /// Makes one row of the matrix if nothing depends on where rows end.
    fn flatten(&mut self) {
        let (rows, cols) = (self.rows, self.cols);
        let inputs = &mut self.inputs[..self.compiled.inputs];
        let whole = |l: &Layout| l.stride == cols && !l.splat && l.div == 1 && l.modulo == rows;
        let scalar = |l: &Layout| l.splat && l.modulo == 1;
        let outputs = &self.outputs[..self.compiled.written.len()];
        if rows > 1 && inputs.iter().all(|l| whole(l) || scalar(l)) && outputs.iter().all(|o| o.stride == cols) {
            inputs.iter_mut().for_each(|l| l.modulo = 1);
            (self.rows, self.cols) = (1, rows * cols);
        }
    }

    /// Asks for part `part` of `parts` of the operands' memory after `tile`. The processor's own prefetching
    /// stops between instructions of a program, as each reads a tile from its start.
    #[inline(always)]
    fn prefetch(&self, tile: Tile, part: usize, parts: usize) {
        let elements = tile.rows * tile.cols;
        let (from, to) = (elements * part / parts, elements * (part + 1) / parts);
        let inputs = self.inputs[..self.compiled.inputs].iter();
        let inputs = inputs.filter(|l| l.div == 1 && l.modulo == self.rows && !l.splat).map(Layout::place);
        for place in inputs.chain(self.outputs[..self.compiled.written.len()].iter().copied()) {
            let (stride, line) = (place.stride, place.line());
            if tile.rows == 1 || stride == self.cols {
                let start = tile.row * stride + tile.col + elements;
                (from..to).step_by(line).for_each(|i| prefetch(place.at(start + i)));
            } else {
                // rows with gaps
                for row in tile.rows * part / parts..tile.rows * (part + 1) / parts {
                    let start = (tile.row + tile.rows + row) * stride + tile.col;
                    (0..tile.cols).step_by(line).for_each(|i| prefetch(place.at(start + i)));
                }
            }
        }
    }

    /// Rows from `row` on, at most `most`, over which every input is a pointer and a stride.
    fn run_of_rows(&self, row: usize, most: usize) -> usize {
        let mut n = most;
        if n > 1 {
            for l in &self.inputs[..self.compiled.inputs] {
                let period = if l.div > 1 { l.div } else { l.modulo };
                if l.modulo > 1 && period < self.rows {
                    n = n.min(period - row % period);
                }
            }
        }
        n
    }
}

/// An operand within a tile.
#[derive(Clone, Copy)]
struct View {
    ptr: *const f32,
    stride: usize,
    splat: bool,
}

/// A tile: `rows × cols` elements from row `row` and column `col` on.
#[derive(Clone, Copy)]
struct Tile {
    row: usize,
    col: usize,
    rows: usize,
    cols: usize,
}

/// A part of the matrix to run a program over.
struct Block<'a> {
    run: &'a Run<'a>,
    rows: Range<usize>,
    cols: Range<usize>,
    scratch: *mut f32,
}

impl<'a> Block<'a> {
    /// # Safety
    /// `run` must describe operands that are valid as long as the block, which must lie in the matrix and
    /// which no other thread may access meanwhile.
    unsafe fn new(run: &'a Run<'a>, rows: Range<usize>, cols: Range<usize>, scratch: &'a mut [f32]) -> Self {
        assert!(scratch.len() >= run.compiled.buffers() * TILE + LINE);
        // vectors of a whole cache line should not straddle two
        let skip = scratch.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        Self { run, rows, cols, scratch: scratch[skip..].as_mut_ptr() }
    }
}

impl SimdKernel for Block<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Block { run, rows, cols, scratch } = self;
        let width = if cols.len() <= TILE {
            cols.len()
        } else {
            cols.len().div_ceil(cols.len().div_ceil(TILE)).next_multiple_of(64)
        };
        let most = TILE / width;
        let mut row = rows.start;
        while row < rows.end {
            let n = run.run_of_rows(row, most.min(rows.end - row));
            let mut col = cols.start;
            while col < cols.end {
                let tile = Tile { row, col, rows: n, cols: width.min(cols.end - col) };
                // SAFETY: a part of the block, and `Block::new` has the caller's promise.
                unsafe { run_tile(s, run, tile, scratch) };
                col += tile.cols;
            }
            row += n;
        }
    }
}

/// Runs a program over a tile.
///
/// # Safety
/// As for [`Block::new`]; `scratch` holds the buffers.
#[inline(always)]
unsafe fn run_tile<S: Simd>(s: S, run: &Run<'_>, tile: Tile, scratch: *mut f32) {
    let compiled = run.compiled;
    let outputs = compiled.written.len();
    // SAFETY: buffers and operands are in bounds by the caller's promise, here and below.
    let buffer = |t: usize| unsafe { scratch.add(t * TILE) };
    let target = |to: Target| match to {
        Target::Tile(t) => (buffer(t as usize), tile.cols),
        Target::Output(o) if run.deferred[o as usize] => (buffer(compiled.tiles + o as usize), tile.cols),
        Target::Output(o) => {
            let place = run.outputs[o as usize];
            (place.at(tile.row * place.stride + tile.col).cast(), place.stride)
        }
    };
    let view = |from: &Source| match from {
        Source::Constant(c) => View { ptr: c, stride: 0, splat: true },
        Source::Tile(t) => View { ptr: buffer(*t as usize), stride: tile.cols, splat: false },
        Source::Output(o) => {
            let (ptr, stride) = target(Target::Output(*o));
            View { ptr, stride, splat: false }
        }
        Source::Input(i) => {
            let l = &run.inputs[*i as usize];
            let row = match (l.modulo, l.div) {
                (1, _) => 0,
                (m, 1) if m == run.rows => tile.row,
                (m, d) => tile.row / d % m,
            };
            let stride = if l.modulo == 1 || l.div > 1 { 0 } else { l.stride };
            // SAFETY: as above.
            let ptr = unsafe { l.ptr.add(row * l.stride + if l.splat { 0 } else { tile.col }) };
            View { ptr, stride, splat: l.splat }
        }
    };
    let spare = |slot: usize| buffer(compiled.tiles + outputs + slot);
    for (i, step) in compiled.steps.iter().enumerate() {
        // while this tile is worked on, the next one is on its way to the cache
        if run.prefetch {
            run.prefetch(tile, i, compiled.steps.len());
        }
        let to = target(step.to);
        // SAFETY: as above.
        unsafe {
            match step.operation {
                Operation::Copy => copy(s, tile, view(&step.from[0]), to),
                Operation::Unary(op) => {
                    let a = spread(s, tile, view(&step.from[0]), spare(0));
                    run_unary(s, tile, op, a, to);
                }
                Operation::Binary(op) => {
                    let (mut a, b) = (view(&step.from[0]), view(&step.from[1]));
                    if b.splat {
                        a = spread(s, tile, a, spare(0));
                    }
                    run_binary(s, tile, op, a, b, to);
                }
                Operation::Select => {
                    let c = spread(s, tile, view(&step.from[0]), spare(0));
                    let a = spread(s, tile, view(&step.from[1]), spare(1));
                    let b = spread(s, tile, view(&step.from[2]), spare(2));
                    select(s, tile, c, a, b, to);
                }
                Operation::Keep(mask) => {
                    let mask = &run.masks[mask as usize];
                    let whole = to.1 == run.cols && tile.cols == run.cols;
                    let (rows, cols) = if whole { (1, tile.rows * tile.cols) } else { (tile.rows, tile.cols) };
                    for r in 0..rows {
                        let first = (tile.row + r) as u64 * run.cols as u64 + tile.col as u64;
                        math::keep_mask(s, mask, first, std::slice::from_raw_parts_mut(to.0.add(r * to.1), cols));
                    }
                }
            }
        }
    }
    for o in 0..outputs {
        if run.deferred[o] {
            let from = View { ptr: buffer(compiled.tiles + o), stride: tile.cols, splat: false };
            let place = run.outputs[o];
            let to = place.at(tile.row * place.stride + tile.col);
            // SAFETY: as above.
            unsafe {
                if place.narrow {
                    narrow(s, tile, from.ptr, to.cast(), place.stride);
                } else {
                    copy(s, tile, from, (to.cast(), place.stride));
                }
            }
        }
    }
}

/// The loop body of an operation; a type and not a closure, so that inlining can be forced.
trait Body {
    /// Vectors per turn of the loop: several where loads and stores dominate.
    const UNROLL: usize;
    fn apply<S: Simd>(s: S, a: S::F, b: S::F) -> S::F;
}

macro_rules! bodies {
    ($module:ident($s:ident, $a:ident, $b:ident): $($name:ident $([$unroll:literal])? => $f:expr),* $(,)?) => {
        mod $module {
            $(pub struct $name;)*
        }
        $(impl Body for $module::$name {
            const UNROLL: usize = 1 $(* $unroll)?;
            #[inline(always)]
            fn apply<S: Simd>($s: S, $a: S::F, $b: S::F) -> S::F {
                let _ = ($s, $b);
                $f
            }
        })*
        macro_rules! $module {
            ($op:expr, $kind:ident, $apply:ident) => {
                match $op { $($kind::$name => $apply!($module::$name),)* }
            };
        }
    };
}

bodies! { unary_bodies(s, a, b):
    Neg[4] => s.neg(a),
    Abs[4] => s.abs(a),
    Exp => math::exp(s, a),
    Log => math::log(s, a),
    Sqrt => s.sqrt(a),
    Rsqrt => math::rsqrt(s, a),
    Recip => math::recip(s, a),
    Sigmoid => math::sigmoid(s, a),
    Tanh => math::tanh(s, a),
    Erf => math::erf(s, a),
    Softplus => math::softplus(s, a),
    LogSigmoid => math::log_sigmoid(s, a),
    Relu[4] => s.max(s.zero(), a),
    Sin => math::sin(s, a),
    Cos => math::cos(s, a),
    Step[4] => s.select(s.lt(s.zero(), a), s.splat(1.0), s.zero()),
}

bodies! { binary_bodies(s, a, b):
    Add[4] => s.add(a, b),
    Sub[4] => s.sub(a, b),
    Mul[4] => s.mul(a, b),
    Div => s.div(a, b),
    Max[4] => s.max(a, b),
    Min[4] => s.min(a, b),
    Greater[4] => s.select(s.lt(b, a), s.splat(1.0), s.zero()),
}

struct First;
impl Body for First {
    const UNROLL: usize = 4;
    #[inline(always)]
    fn apply<S: Simd>(_: S, a: S::F, _: S::F) -> S::F {
        a
    }
}

/// For the operand that a function of one number does not have.
const NOTHING: View = View { ptr: &0.0, stride: 0, splat: true };

/// `to = op(a)`
///
/// # Safety
/// As for [`each`]; `a` is not one value per row.
#[inline(always)]
unsafe fn run_unary<S: Simd>(s: S, tile: Tile, op: Unary, a: View, to: (*mut f32, usize)) {
    macro_rules! apply {
        ($body:path) => {
            // SAFETY: the caller's promise.
            unsafe { each::<S, $body, false, true>(s, tile, a, NOTHING, to) }
        };
    }
    unary_bodies!(op, Unary, apply)
}

/// `to = op(a, b)`
///
/// # Safety
/// As for [`each`]; not both are one value per row.
#[inline(always)]
unsafe fn run_binary<S: Simd>(s: S, tile: Tile, op: Binary, a: View, b: View, to: (*mut f32, usize)) {
    macro_rules! apply {
        ($body:path) => {
            // SAFETY: the caller's promise.
            unsafe {
                if b.splat {
                    each::<S, $body, false, true>(s, tile, a, b, to)
                } else if a.splat {
                    each::<S, $body, true, false>(s, tile, a, b, to)
                } else {
                    each::<S, $body, false, false>(s, tile, a, b, to)
                }
            }
        };
    }
    binary_bodies!(op, Binary, apply)
}

/// `to = a`
///
/// # Safety
/// As for [`each`].
#[inline(always)]
unsafe fn copy<S: Simd>(s: S, tile: Tile, a: View, to: (*mut f32, usize)) {
    // SAFETY: the caller's promise.
    unsafe {
        if a.splat {
            each::<S, First, true, true>(s, tile, a, NOTHING, to)
        } else {
            each::<S, First, false, true>(s, tile, a, NOTHING, to)
        }
    }
}

/// Rounds a tile that lies at `from` without gaps.
///
/// # Safety
/// As for [`each`].
#[inline(always)]
unsafe fn narrow<S: Simd>(s: S, tile: Tile, from: *const f32, to: *mut Bf16, stride: usize) {
    let (rows, cols) = if stride == tile.cols { (1, tile.rows * tile.cols) } else { (tile.rows, tile.cols) };
    for r in 0..rows {
        // SAFETY: the caller's promise.
        let (from, to) = unsafe {
            let from = std::slice::from_raw_parts(from.add(r * cols), cols);
            (from, std::slice::from_raw_parts_mut(to.add(r * stride), cols))
        };
        round_slice(s, from, to);
    }
}

/// `a`, with one value per row written out into the buffer `to`.
///
/// # Safety
/// As for [`each`].
#[inline(always)]
unsafe fn spread<S: Simd>(s: S, tile: Tile, a: View, to: *mut f32) -> View {
    if !a.splat {
        return a;
    }
    // SAFETY: the caller's promise.
    unsafe { copy(s, tile, a, (to, tile.cols)) };
    View { ptr: to, stride: tile.cols, splat: false }
}

/// Asks for the cache line at an address, which need not be valid.
#[inline(always)]
fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint that accesses nothing; every x86-64 has the instruction.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    let _ = address;
}

/// As [`prefetch`], into the second cache.
#[inline(always)]
fn prefetch_far(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(address.cast());
    }
    let _ = address;
}

/// Rows and columns of the loop: one long row if everything lies so.
#[inline(always)]
fn extent(tile: Tile, strides: &[usize]) -> (usize, usize) {
    if strides.iter().all(|&s| s == tile.cols) { (1, tile.rows * tile.cols) } else { (tile.rows, tile.cols) }
}

/// `to = body(a, b)`; `A`, `B`: that operand has one value per row.
///
/// # Safety
/// The operands must be valid over the tile; each is equal to `to` or does not overlap it.
#[inline(always)]
unsafe fn each<S: Simd, F: Body, const A: bool, const B: bool>(
    s: S,
    tile: Tile,
    a: View,
    b: View,
    to: (*mut f32, usize),
) {
    // one value for all rows does not hinder one long row, one value for each does
    let stride = |v: View, splat: bool| match (splat, v.stride) {
        (false, stride) => stride,
        (true, 0) => tile.cols,
        (true, _) => usize::MAX,
    };
    let (rows, cols) = extent(tile, &[stride(a, A), stride(b, B), to.1]);
    for r in 0..rows {
        // SAFETY: within the tile.
        unsafe {
            let (pa, pb, pt) = (a.ptr.add(r * a.stride), b.ptr.add(r * b.stride), to.0.add(r * to.1));
            let sa = if A { s.splat(*pa) } else { s.zero() };
            let sb = if B { s.splat(*pb) } else { s.zero() };
            let mut c = 0;
            while c + F::UNROLL * S::LANES <= cols {
                for _ in 0..F::UNROLL {
                    let va = if A { sa } else { s.load_ptr(pa.add(c)) };
                    let vb = if B { sb } else { s.load_ptr(pb.add(c)) };
                    s.store_ptr(pt.add(c), F::apply(s, va, vb));
                    c += S::LANES;
                }
            }
            while F::UNROLL > 1 && c + S::LANES <= cols {
                let va = if A { sa } else { s.load_ptr(pa.add(c)) };
                let vb = if B { sb } else { s.load_ptr(pb.add(c)) };
                s.store_ptr(pt.add(c), F::apply(s, va, vb));
                c += S::LANES;
            }
            if c < cols {
                let n = cols - c;
                let va = if A { sa } else { partial(s, pa.add(c), n) };
                let vb = if B { sb } else { partial(s, pb.add(c), n) };
                s.store_partial(std::slice::from_raw_parts_mut(pt.add(c), n), n, F::apply(s, va, vb));
            }
        }
    }
}

/// `to = c != 0 ? a : b`
///
/// # Safety
/// As for [`each`]; no operand is one value per row.
#[inline(always)]
unsafe fn select<S: Simd>(s: S, tile: Tile, c: View, a: View, b: View, to: (*mut f32, usize)) {
    let (rows, cols) = extent(tile, &[c.stride, a.stride, b.stride, to.1]);
    for r in 0..rows {
        // SAFETY: within the tile.
        unsafe {
            let at = |v: View| v.ptr.add(r * v.stride);
            let (pc, pa, pb, pt) = (at(c), at(a), at(b), to.0.add(r * to.1));
            let mut i = 0;
            while i + S::LANES <= cols {
                let m = s.eq(s.load_ptr(pc.add(i)), s.zero());
                s.store_ptr(pt.add(i), s.select(m, s.load_ptr(pb.add(i)), s.load_ptr(pa.add(i))));
                i += S::LANES;
            }
            if i < cols {
                let n = cols - i;
                let m = s.eq(partial(s, pc.add(i), n), s.zero());
                let v = s.select(m, partial(s, pb.add(i), n), partial(s, pa.add(i), n));
                s.store_partial(std::slice::from_raw_parts_mut(pt.add(i), n), n, v);
            }
        }
    }
}

/// # Safety
/// `ptr` must be valid for `n` reads.
#[inline(always)]
unsafe fn partial<S: Simd>(s: S, ptr: *const f32, n: usize) -> S::F {
    // SAFETY: the caller's promise; the slice ends before anything is written.
    unsafe { s.load_partial(std::slice::from_raw_parts(ptr, n), n) }
}
