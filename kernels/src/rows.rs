//! Row-strided matrices: the one tensor view that every kernel takes.
//!
//! A tensor `[.., C]` is seen as `[rows, C]` with `rows` the product of the leading dimensions. Columns are
//! contiguous, rows are `stride` elements apart, so a slice of the last dimension (one head, one part of a
//! split projection) is read and written in place, without a copy.

use std::marker::PhantomData;

use crate::cpu::threads::parallel_for;

/// A read-only matrix `[rows, cols]`; element `(r, c)` lies at `r * stride + c`.
#[derive(Clone, Copy)]
pub struct Rows<'a, T = f32> {
    ptr: *const T,
    rows: usize,
    cols: usize,
    stride: usize,
    lifetime: PhantomData<&'a [T]>,
}

// SAFETY: `Rows` is a shared borrow of `[T]`, which is Send and Sync when `T` is Sync.
unsafe impl<T: Sync> Send for Rows<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Rows<'_, T> {}

/// Elements that a matrix spans from its first to one past its last.
fn span(rows: usize, cols: usize, stride: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * stride + cols }
}

impl<'a, T> Rows<'a, T> {
    /// A matrix over `data`.
    ///
    /// # Panics
    /// If the rows overlap (`stride < cols`) or `data` is shorter than the matrix.
    pub fn new(data: &'a [T], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(rows <= 1 || stride >= cols, "rows of {cols} columns overlap at a stride of {stride}");
        assert!(
            data.len() >= span(rows, cols, stride),
            "{rows} rows at stride {stride} exceed {} elements",
            data.len()
        );
        Self { ptr: data.as_ptr(), rows, cols, stride, lifetime: PhantomData }
    }

    /// A matrix whose rows follow each other without a gap.
    pub fn contiguous(data: &'a [T], cols: usize) -> Self {
        Self::new(data, data.len().checked_div(cols).unwrap_or(0), cols, cols)
    }

    /// # Safety
    /// `ptr` must be valid for reads over the whole matrix for `'a`, with no write to it meanwhile.
    pub unsafe fn from_raw(ptr: *const T, rows: usize, cols: usize, stride: usize) -> Self {
        Self { ptr, rows, cols, stride, lifetime: PhantomData }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Elements from one row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// The address of element `(0, 0)`.
    pub fn as_ptr(&self) -> *const T {
        self.ptr
    }

    /// Row `r`, `cols` elements.
    #[inline(always)]
    pub fn row(&self, r: usize) -> &'a [T] {
        assert!(r < self.rows);
        // SAFETY: r is in range, and the constructor checked that every row lies within the borrow.
        unsafe { std::slice::from_raw_parts(self.ptr.add(r * self.stride), self.cols) }
    }

    /// The rows `from..to`.
    pub fn slice_rows(&self, from: usize, to: usize) -> Rows<'a, T> {
        assert!(from <= to && to <= self.rows);
        // SAFETY: a sub-range of rows of a valid matrix.
        unsafe { Rows::from_raw(self.ptr.add(from * self.stride), to - from, self.cols, self.stride) }
    }

    /// The columns `from..to` of every row.
    pub fn slice_cols(&self, from: usize, to: usize) -> Rows<'a, T> {
        assert!(from <= to && to <= self.cols);
        // SAFETY: a sub-range of columns of a valid matrix.
        unsafe { Rows::from_raw(self.ptr.add(from), self.rows, to - from, self.stride) }
    }

    /// Whether the rows follow each other without a gap.
    pub fn is_contiguous(&self) -> bool {
        self.rows <= 1 || self.stride == self.cols
    }

    /// All elements as one slice, where the rows are contiguous.
    pub fn as_slice(&self) -> Option<&'a [T]> {
        // SAFETY: contiguous, so the matrix is `rows * cols` elements without a gap.
        self.is_contiguous().then(|| unsafe { std::slice::from_raw_parts(self.ptr, self.rows * self.cols) })
    }
}

/// A writable matrix `[rows, cols]`; element `(r, c)` lies at `r * stride + c`.
///
/// Elements between the columns of two rows belong to somebody else and are never touched, so several
/// `RowsMut` may interleave in one buffer as long as their columns differ.
pub struct RowsMut<'a, T = f32> {
    ptr: *mut T,
    rows: usize,
    cols: usize,
    stride: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: `RowsMut` is an exclusive borrow of its elements.
unsafe impl<T: Send> Send for RowsMut<'_, T> {}
// SAFETY: sharing it only gives the read methods and `shared_row`, whose caller promises disjoint rows.
unsafe impl<T: Send + Sync> Sync for RowsMut<'_, T> {}

impl<'a, T> RowsMut<'a, T> {
    /// A matrix over `data`.
    ///
    /// # Panics
    /// If the rows overlap (`stride < cols`) or `data` is shorter than the matrix.
    pub fn new(data: &'a mut [T], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(rows <= 1 || stride >= cols, "rows of {cols} columns overlap at a stride of {stride}");
        assert!(
            data.len() >= span(rows, cols, stride),
            "{rows} rows at stride {stride} exceed {} elements",
            data.len()
        );
        Self { ptr: data.as_mut_ptr(), rows, cols, stride, lifetime: PhantomData }
    }

    /// A matrix whose rows follow each other without a gap.
    pub fn contiguous(data: &'a mut [T], cols: usize) -> Self {
        let rows = data.len().checked_div(cols).unwrap_or(0);
        Self::new(data, rows, cols, cols)
    }

    /// # Safety
    /// For `'a`, `ptr` must be valid for reads and writes of the matrix's elements, and nothing else may
    /// access those elements (the gaps between rows may be in use).
    pub unsafe fn from_raw(ptr: *mut T, rows: usize, cols: usize, stride: usize) -> Self {
        Self { ptr, rows, cols, stride, lifetime: PhantomData }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Elements from one row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// The address of element `(0, 0)`.
    pub fn as_mut_ptr(&mut self) -> *mut T {
        self.ptr
    }

    /// The same matrix for a shorter time.
    pub fn reborrow(&mut self) -> RowsMut<'_, T> {
        // SAFETY: the exclusive borrow of self makes the copy exclusive too.
        unsafe { RowsMut::from_raw(self.ptr, self.rows, self.cols, self.stride) }
    }

    /// The matrix for reading.
    pub fn as_rows(&self) -> Rows<'_, T> {
        // SAFETY: no write is possible while the shared borrow lasts.
        unsafe { Rows::from_raw(self.ptr, self.rows, self.cols, self.stride) }
    }

    /// Row `r` for writing, `cols` elements.
    #[inline(always)]
    pub fn row(&mut self, r: usize) -> &mut [T] {
        // SAFETY: exclusive borrow of self; the range is checked inside.
        unsafe { self.shared_row(r) }
    }

    /// Row `r` for writing, from a shared reference: for parallel tasks that own different rows (or
    /// different columns of a row, of which each touches only its own).
    ///
    /// # Safety
    /// No two live slices may overlap in elements that either side accesses.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn shared_row(&self, r: usize) -> &mut [T] {
        assert!(r < self.rows);
        // SAFETY: r is in range; exclusiveness is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(r * self.stride), self.cols) }
    }

    /// The block `rows × cols` for a parallel task that owns it.
    ///
    /// # Safety
    /// No two live blocks may overlap.
    pub unsafe fn shared_block(&self, rows: std::ops::Range<usize>, cols: std::ops::Range<usize>) -> RowsMut<'_, T> {
        assert!(rows.start <= rows.end && rows.end <= self.rows && cols.start <= cols.end && cols.end <= self.cols);
        // SAFETY: in range; exclusiveness is the caller's promise.
        unsafe {
            RowsMut::from_raw(self.ptr.add(rows.start * self.stride + cols.start), rows.len(), cols.len(), self.stride)
        }
    }

    /// The columns `from..to` of every row.
    pub fn slice_cols(&mut self, from: usize, to: usize) -> RowsMut<'_, T> {
        // SAFETY: the exclusive borrow of self makes the block exclusive.
        unsafe { self.shared_block(0..self.rows, from..to) }
    }

    /// Runs `task(i, block)` for every block of `rows` rows (the last one may be shorter), in parallel.
    pub fn for_each_block(&mut self, rows: usize, task: impl Fn(usize, RowsMut<'_, T>) + Send + Sync)
    where
        T: Send + Sync,
    {
        let shared = &*self;
        parallel_for(shared.rows.div_ceil(rows.max(1)), |i| {
            let end = ((i + 1) * rows).min(shared.rows);
            // SAFETY: the blocks have no row in common.
            task(i, unsafe { shared.shared_block(i * rows..end, 0..shared.cols) });
        });
    }

    /// Whether the rows follow each other without a gap.
    pub fn is_contiguous(&self) -> bool {
        self.rows <= 1 || self.stride == self.cols
    }

    /// All elements as one slice, where the rows are contiguous.
    pub fn as_slice_mut(&mut self) -> Option<&mut [T]> {
        // SAFETY: contiguous and exclusively borrowed.
        self.is_contiguous().then(|| unsafe { std::slice::from_raw_parts_mut(self.ptr, self.rows * self.cols) })
    }
}

/// A slice that parallel tasks write at places that do not overlap.
#[derive(Clone, Copy)]
pub struct SharedSlice<'a, T> {
    ptr: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: it is an exclusive borrow handed to tasks that promise disjoint ranges.
unsafe impl<T: Send> Send for SharedSlice<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    /// Shares `data` among tasks.
    pub fn new(data: &'a mut [T]) -> Self {
        Self { ptr: data.as_mut_ptr(), len: data.len(), lifetime: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements `range` for writing.
    ///
    /// # Safety
    /// No two live ranges may overlap.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn range(&self, range: std::ops::Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: in range; exclusiveness is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_skip_the_gap() {
        let data: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let m = Rows::new(&data[1..], 3, 2, 4);
        assert_eq!(m.row(2), &[9.0, 10.0]);
        assert_eq!(m.slice_cols(1, 2).row(1), &[6.0]);
        assert!(m.as_slice().is_none());
    }

    #[test]
    #[should_panic(expected = "exceed")]
    fn short_data_is_refused() {
        Rows::new(&[0.0f32; 9], 3, 2, 4);
    }
}
