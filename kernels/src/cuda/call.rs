//! What a launch does on a CUDA device: the calls it makes, as data.
//!
//! An op's CUDA kernel is a function of a [`Calls`]: it looks at the tensors of its launch (sizes and strides are known by
//! then) and writes down kernel calls and matrix products. It runs once, when a plan is loaded; what it wrote is
//! bound to memory, captured and replayed. Nothing here touches a GPU.
//!
//! # How kernels receive tensors
//!
//! Two forms of [`Argument`]:
//! - [`Argument::Rows`]: the struct `Rows<T>` of `kernels/cuda/common.cuh` by value, `{ T* data; int rows; int cols; long long
//!   stride; }`. Element `(r, c)` is `data[r * stride + c]`; columns are contiguous, the gap between rows belongs to
//!   somebody else and must not be touched. This is for the inputs and outputs of strided ops.
//! - [`Argument::Pointer`]: a bare `T*` to a tensor without gaps (parameters, statistics, scratch memory).
//!
//! Offsets are multiples of 64 bytes where a tensor starts, but a block of columns starts anywhere: a kernel that loads
//! vectors checks [`Tensor::vector`] first. An output may be the same memory as an input where
//! [`Calls::in_place`] says so, element for element; the kernel then must not say `__restrict__` of them.
//!

use std::borrow::Cow;

use crate::device::{DType, KernelError, Operand, Region};

/// Where an address comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// A region of the program.
    Region(Region),
    /// Memory that lasts as long as the launch; all launches of a program share it.
    Scratch,
}

/// A tensor of a call: a row-strided matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tensor {
    /// Where it lies.
    pub place: Place,
    /// Byte offset of its first element.
    pub offset: usize,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// Elements from one row to the next.
    pub stride: usize,
    /// Element type.
    pub dtype: DType,
}

impl From<&Operand> for Tensor {
    fn from(o: &Operand) -> Self {
        let place = Place::Region(o.region);
        Self { place, offset: o.offset, rows: o.rows, cols: o.cols, stride: o.stride, dtype: o.dtype }
    }
}

impl Tensor {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the rows follow each other without a gap.
    pub fn is_contiguous(&self) -> bool {
        self.rows <= 1 || self.stride == self.cols
    }

    /// The same elements as rows of `cols` columns, where there are no gaps.
    ///
    /// # Errors
    /// If there are, or the elements do not make whole rows.
    pub fn reshape(self, cols: usize) -> Result<Self, KernelError> {
        if !self.is_contiguous() || cols == 0 || !self.len().is_multiple_of(cols) {
            return Err(KernelError(format!("{self:?} is not without gaps in rows of {cols}")));
        }
        Ok(Self { rows: self.len() / cols, cols, stride: cols, ..self })
    }

    /// The rows `from..to`.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn slice_rows(self, from: usize, to: usize) -> Self {
        assert!(from <= to && to <= self.rows);
        Self { offset: self.offset + from * self.stride * self.dtype.size(), rows: to - from, ..self }
    }

    /// The columns `from..to` of every row.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn slice_cols(self, from: usize, to: usize) -> Self {
        assert!(from <= to && to <= self.cols);
        Self { offset: self.offset + from * self.dtype.size(), cols: to - from, ..self }
    }

    /// The most elements, up to `most`, that can be loaded at once: a power of two that divides the columns and the
    /// stride, and at whose multiple the tensor starts.
    pub fn vector(&self, most: usize) -> usize {
        let fits = |n: usize| {
            self.cols.is_multiple_of(n)
                && (self.rows <= 1 || self.stride.is_multiple_of(n))
                && self.offset.is_multiple_of(n * self.dtype.size())
        };
        let mut n = 1;
        while n * 2 <= most && fits(n * 2) {
            n *= 2;
        }
        n
    }
}

/// An argument of a kernel call, as the kernel's parameter list has it.
#[derive(Clone, Debug, PartialEq)]
pub enum Argument {
    /// `Rows<T>` by value.
    Rows(Tensor),
    /// `T*`
    Pointer(Tensor),
    /// A null pointer, for a tensor that is not there.
    Null,
    /// `Rows<T>` of nothing, whose `data` is null.
    NoRows,
    /// `int`
    I32(i32),
    /// `unsigned`
    U32(u32),
    /// `long long`
    I64(i64),
    /// `unsigned long long`
    U64(u64),
    /// `float`
    F32(f32),
    /// `double`
    F64(f64),
    /// A pointer to constant memory that holds these arguments one after the other, each at a multiple of 8 bytes: tables of
    /// many tensors.
    Table(Vec<Argument>),
    /// `int*` to four words of this launch, all 0 before: a kernel that refuses its input writes there, word 0 last and not 0.
    /// See [`Call::refuses`].
    Fault,
}

impl From<i32> for Argument {
    fn from(x: i32) -> Self {
        Argument::I32(x)
    }
}
impl From<u32> for Argument {
    fn from(x: u32) -> Self {
        Argument::U32(x)
    }
}
impl From<i64> for Argument {
    fn from(x: i64) -> Self {
        Argument::I64(x)
    }
}
impl From<u64> for Argument {
    fn from(x: u64) -> Self {
        Argument::U64(x)
    }
}
/// Sizes are passed as `long long`.
impl From<usize> for Argument {
    fn from(x: usize) -> Self {
        Argument::I64(x as i64)
    }
}
impl From<f32> for Argument {
    fn from(x: f32) -> Self {
        Argument::F32(x)
    }
}
impl From<f64> for Argument {
    fn from(x: f64) -> Self {
        Argument::F64(x)
    }
}

/// CUDA source text.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// `kernels/cuda/{0}.cu`, see [`source::FILES`](super::source::FILES).
    File(&'static str),
    /// Generated code: the whole text of one `KERNEL`, without includes.
    Generated(String),
}

/// In words, why a kernel refused its input, from the four words it wrote.
pub type Refusal = fn([i32; 4]) -> String;

/// One kernel call.
#[derive(Clone, Debug)]
pub struct Call {
    /// The code.
    pub source: Source,
    /// Preprocessor definitions with which the file is compiled, in the order given: tile sizes, head sizes, types.
    pub defines: Vec<(&'static str, String)>,
    /// The `KERNEL`'s name.
    pub entry: Cow<'static, str>,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory; more than 48 KiB are fine up to the device's limit.
    pub shared: usize,
    /// In the order of the kernel's parameters.
    pub arguments: Vec<Argument>,
    /// For a kernel with [`Argument::Fault`].
    pub refusal: Option<Refusal>,
}

impl Call {
    /// A kernel of `kernels/cuda/{file}.cu`: one block of 256 threads until told otherwise.
    pub fn file(file: &'static str, entry: &'static str) -> Self {
        Self {
            source: Source::File(file),
            defines: Vec::new(),
            entry: Cow::Borrowed(entry),
            grid: [1; 3],
            block: [256, 1, 1],
            shared: 0,
            arguments: Vec::new(),
            refusal: None,
        }
    }

    /// A generated kernel.
    pub fn generated(text: String, entry: String) -> Self {
        Self { source: Source::Generated(text), entry: Cow::Owned(entry), ..Self::file("", "") }
    }

    /// Compiles the file with `-Dname=value`.
    pub fn define(mut self, name: &'static str, value: impl ToString) -> Self {
        self.defines.push((name, value.to_string()));
        self
    }

    /// Number of blocks in x.
    pub fn grid(self, x: usize) -> Self {
        self.grid3(x, 1, 1)
    }

    /// Number of blocks. x may be up to 2^31 - 1, y and z up to 65535.
    pub fn grid3(mut self, x: usize, y: usize, z: usize) -> Self {
        self.grid = [x, y, z].map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        self
    }

    /// Threads of a block.
    pub fn block(mut self, threads: usize) -> Self {
        self.block = [threads as u32, 1, 1];
        self
    }

    /// Bytes of dynamic shared memory.
    pub fn shared(mut self, bytes: usize) -> Self {
        self.shared = bytes;
        self
    }

    /// A tensor as `Rows<T>`.
    pub fn rows(mut self, tensor: Tensor) -> Self {
        self.arguments.push(Argument::Rows(tensor));
        self
    }

    /// A tensor without gaps as `T*`.
    pub fn pointer(mut self, tensor: Tensor) -> Self {
        self.arguments.push(Argument::Pointer(tensor));
        self
    }

    /// A tensor as `T*`, or a null pointer.
    pub fn pointer_or_null(self, tensor: Option<Tensor>) -> Self {
        match tensor {
            Some(tensor) => self.pointer(tensor),
            None => self.arg(Argument::Null),
        }
    }

    /// A tensor as `Rows<T>`, or one whose `data` is null.
    pub fn rows_or_null(self, tensor: Option<Tensor>) -> Self {
        match tensor {
            Some(tensor) => self.rows(tensor),
            None => self.arg(Argument::NoRows),
        }
    }

    /// Any other argument: `.arg(eps)`, `.arg(time)`.
    pub fn arg(mut self, argument: impl Into<Argument>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds the argument `int* fault`; `words` says what it means.
    pub fn refuses(mut self, words: Refusal) -> Self {
        self.arguments.push(Argument::Fault);
        self.refusal = Some(words);
        self
    }
}

/// What a product starts from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Start {
    /// `y = a b`
    Zero,
    /// `y = a b + base`; the base has the sizes of `y`, and may be `y`.
    Add(Tensor),
    /// `y = a b + bias`, the same for each row; a tensor of as many elements as `y` has columns.
    Bias(Tensor),
}

/// A matrix, possibly read transposed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mat {
    /// As it lies in memory.
    pub tensor: Tensor,
    /// Whether it enters the product transposed.
    pub transposed: bool,
}

impl Mat {
    /// As it lies in memory.
    pub fn normal(tensor: Tensor) -> Self {
        Self { tensor, transposed: false }
    }

    /// Transposed.
    pub fn transposed(tensor: Tensor) -> Self {
        Self { tensor, transposed: true }
    }
}

/// `y = op(a) op(b)`, by cuBLASLt. Accumulation is in `f32`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Product {
    /// `[m, k]` as it enters the product.
    pub a: Mat,
    /// `[k, n]` as it enters the product.
    pub b: Mat,
    /// `[m, n]`
    pub y: Tensor,
    /// What it starts from.
    pub start: Start,
    /// Each of the three is so many matrices below each other.
    pub batches: usize,
    /// Whether factors may be rounded to bf16, where they are `f32`.
    pub bf16: bool,
}

/// One thing that a launch does.
#[derive(Clone, Debug)]
pub enum Work {
    /// A kernel.
    Call(Call),
    /// A matrix product.
    Product(Product),
}

/// The tensors of a launch, and the calls that its kernel writes down.
pub struct Calls<'a> {
    inputs: &'a [Operand],
    outputs: &'a [Operand],
    in_place: &'a [(usize, usize)],
    work: Vec<Work>,
    scratch: usize,
}

impl<'a> Calls<'a> {
    /// No calls yet.
    pub fn new(inputs: &'a [Operand], outputs: &'a [Operand], in_place: &'a [(usize, usize)]) -> Self {
        Self { inputs, outputs, in_place, work: Vec::new(), scratch: 0 }
    }

    /// Number of inputs.
    pub fn inputs(&self) -> usize {
        self.inputs.len()
    }

    /// Number of outputs.
    pub fn outputs(&self) -> usize {
        self.outputs.len()
    }

    /// Input `i`.
    pub fn input(&self, i: usize) -> Tensor {
        Tensor::from(&self.inputs[i])
    }

    /// Output `o`.
    pub fn output(&self, o: usize) -> Tensor {
        Tensor::from(&self.outputs[o])
    }

    /// The input that output `o` updates in place, if there is one.
    pub fn in_place(&self, o: usize) -> Option<usize> {
        self.in_place.iter().find(|pair| pair.0 == o).map(|pair| pair.1)
    }

    /// Memory without gaps for the calls of this launch; its contents are undefined.
    pub fn scratch(&mut self, rows: usize, cols: usize, dtype: DType) -> Tensor {
        let offset = self.scratch;
        self.scratch += (rows * cols * dtype.size()).next_multiple_of(256);
        Tensor { place: Place::Scratch, offset, rows, cols, stride: cols, dtype }
    }

    /// Adds a kernel call; it sees what those before it wrote. One without blocks is left out.
    ///
    /// # Errors
    /// If a pointer is given to a tensor with gaps, or a size exceeds what a launch can have.
    pub fn launch(&mut self, call: Call) -> Result<(), KernelError> {
        if call.grid.contains(&0) {
            return Ok(());
        }
        let refuse = |what: String| Err(KernelError(format!("kernel `{}`: {what}", call.entry)));
        if let Some(Argument::Pointer(t)) =
            call.arguments.iter().find(|a| matches!(a, Argument::Pointer(t) if !t.is_contiguous()))
        {
            return refuse(format!("{t:?} has gaps between its rows"));
        }
        let [x, y, z] = call.grid;
        let threads: u32 = call.block.iter().product();
        if call.arguments.len() > 128 {
            return refuse(format!("{} arguments, but 128 are the most", call.arguments.len()));
        }
        if x > i32::MAX as u32 || y > 65535 || z > 65535 || !(1..=1024).contains(&threads) {
            return refuse(format!(
                "{:?} blocks of {:?} threads are more than a launch can have",
                call.grid, call.block
            ));
        }
        self.work.push(Work::Call(call));
        Ok(())
    }

    /// Adds a matrix product.
    ///
    /// # Errors
    /// If sizes or types differ.
    pub fn product(&mut self, product: Product) -> Result<(), KernelError> {
        let Product { a, b, y, start, batches, .. } = product;
        let sides = |m: &Mat| {
            let rows = m.tensor.rows / batches.max(1);
            if m.transposed { (m.tensor.cols, rows) } else { (rows, m.tensor.cols) }
        };
        let ((m, k), (l, n)) = (sides(&a), sides(&b));
        let start_fits = match start {
            Start::Zero => true,
            Start::Add(base) => (base.rows, base.cols) == (y.rows, y.cols),
            Start::Bias(bias) => bias.len() == n && bias.is_contiguous(),
        };
        if batches == 0 || k != l || (m * batches, n) != (y.rows, y.cols) || !start_fits {
            return Err(KernelError(format!("{product:?}: the sizes do not fit")));
        }
        let alike = |t: &Tensor| t.dtype == y.dtype;
        let start_alike = match &start {
            Start::Zero => true,
            Start::Add(tensor) | Start::Bias(tensor) => alike(tensor),
        };
        if a.tensor.dtype != b.tensor.dtype || !start_alike {
            return Err(KernelError(format!("{product:?}: factors differ in type, or result and start do")));
        }
        if m * n > 0 {
            self.work.push(Work::Product(product));
        }
        Ok(())
    }

    /// The calls, and bytes of scratch memory.
    pub fn finish(self) -> (Vec<Work>, usize) {
        (self.work, self.scratch)
    }
}
