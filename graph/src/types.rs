//! Shapes and element types of values.

use std::fmt;

pub use dataflow_kernels::device::DType;

/// Shape and element type of a value. Row-major; the last dimension is contiguous.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorType {
    /// Sizes, outermost first. A scalar has none.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: DType,
}

impl TensorType {
    /// `f32` of this shape.
    pub fn f32(shape: impl Into<Vec<usize>>) -> Self {
        Self { shape: shape.into(), dtype: DType::F32 }
    }

    /// `i32` of this shape.
    pub fn i32(shape: impl Into<Vec<usize>>) -> Self {
        Self { shape: shape.into(), dtype: DType::I32 }
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes when stored without gaps.
    pub fn bytes(&self) -> usize {
        self.elements() * self.dtype.size()
    }

    /// The last dimension; 1 for a scalar.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// The product of all dimensions but the last.
    pub fn rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }

    /// The same with another last dimension.
    pub fn with_cols(&self, cols: usize) -> Self {
        let mut shape = self.shape.clone();
        match shape.last_mut() {
            Some(last) => *last = cols,
            None => shape.push(cols),
        }
        Self { shape, dtype: self.dtype }
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape)
    }
}

/// The shape that tensors of these shapes broadcast to, dimensions aligned at the right; `None` where two
/// sizes differ and neither is 1.
pub fn broadcast(shapes: &[&[usize]]) -> Option<Vec<usize>> {
    let rank = shapes.iter().map(|s| s.len()).max().unwrap_or(0);
    let mut out = vec![1; rank];
    for shape in shapes {
        for (o, &n) in out.iter_mut().rev().zip(shape.iter().rev()) {
            match (*o, n) {
                (a, b) if a == b => {}
                (1, b) => *o = b,
                (_, 1) => {}
                _ => return None,
            }
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broadcasting_aligns_at_the_right() {
        assert_eq!(broadcast(&[&[2, 3, 4], &[4]]), Some(vec![2, 3, 4]));
        assert_eq!(broadcast(&[&[3, 1], &[2, 1, 5]]), Some(vec![2, 3, 5]));
        assert_eq!(broadcast(&[&[3], &[4]]), None);
        assert_eq!(broadcast(&[&[], &[4]]), Some(vec![4]));
    }
}
