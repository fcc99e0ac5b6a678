//! Matrix products, single-threaded: the callers are parallel over images.

use crate::Real;

/// A matrix of `rows` x `columns` whose element `(i, j)` is `data[i * row_stride + j *
/// column_stride]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<D> {
    pub(crate) data: D,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) row_stride: usize,
    pub(crate) column_stride: usize,
}

impl<D> Matrix<D> {
    /// Row after row, rows `row_stride` apart.
    pub(crate) fn by_rows(data: D, rows: usize, columns: usize, row_stride: usize) -> Self {
        Self {
            data,
            rows,
            columns,
            row_stride,
            column_stride: 1,
        }
    }

    pub(crate) fn transposed(self) -> Self {
        Self {
            data: self.data,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }

    /// Elements that the matrix reaches over.
    fn extent(&self) -> usize {
        match self.rows == 0 || self.columns == 0 {
            true => 0,
            false => {
                (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride + 1
            }
        }
    }
}

impl<'a, T> Matrix<&'a [T]> {
    /// A row of a matrix whose rows are contiguous.
    pub(crate) fn row(&self, row: usize) -> &'a [T] {
        debug_assert_eq!(self.column_stride, 1);
        &self.data[row * self.row_stride..][..self.columns]
    }
}

/// `target = left * right`, or `target += left * right` with `accumulate`.
///
/// # Panics
///
/// Panics if the sizes do not fit each other or the slices.
#[allow(unsafe_code)]
pub(crate) fn multiply<T: Real>(
    target: Matrix<&mut [T]>,
    left: Matrix<&[T]>,
    right: Matrix<&[T]>,
    accumulate: bool,
) {
    assert_eq!(target.rows, left.rows);
    assert_eq!(target.columns, right.columns);
    assert_eq!(left.columns, right.rows);
    assert!(target.extent() <= target.data.len());
    assert!(left.extent() <= left.data.len());
    assert!(right.extent() <= right.data.len());
    // SAFETY: the extents were just checked, so that every element that the sizes and strides
    // reach lies in its slice; `target` is borrowed mutably, so it overlaps neither operand; `T` is
    // f32 or f64, which `gemm` dispatches on.
    unsafe {
        gemm::gemm(
            target.rows,
            target.columns,
            left.columns,
            target.data.as_mut_ptr(),
            target.column_stride as isize,
            target.row_stride as isize,
            accumulate,
            left.data.as_ptr(),
            left.column_stride as isize,
            left.row_stride as isize,
            right.data.as_ptr(),
            right.column_stride as isize,
            right.row_stride as isize,
            T::ONE,
            T::ONE,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
