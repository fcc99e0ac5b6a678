//! The microkernel of packed products: sums of rows.
//!
//! Blocks of sums are six rows by as many vectors as the registers hold: two of sixteen, four of 32. Operands
//! are padded to whole blocks, and what comes of the padding is dropped.

// Blocks of registers are addressed by their place in the block.
#![allow(clippy::needless_range_loop)]

use pulp::{Arch, Simd, WithSimd};

use super::planes::WIDEST;
use crate::Real;

/// Rows of a block of sums; operands are readable to a multiple of them.
pub(crate) const ROWS: usize = 6;

/// Registers of the larger units: AVX-512, NEON.
const MANY_REGISTERS: usize = 32;

/// `target[m][n] = sum over k of a[m * row + k * step] * b[k][n]`, added to what is there if `adds`.
///
/// The rows of `b` and of the target are `pitch` apart. Columns to the next multiple of [`WIDEST`], and the
/// target's rows to the next of [`ROWS`], are overwritten with unspecified numbers.
pub(crate) struct Sums<'a, T> {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) depth: usize,
    pub(crate) a: &'a [T],
    pub(crate) row: usize,
    pub(crate) step: usize,
    pub(crate) b: &'a [T],
    pub(crate) pitch: usize,
    pub(crate) target: &'a mut [T],
    pub(crate) adds: bool,
}

impl<T: Real> Sums<'_, T> {
    /// Computes the sums.
    ///
    /// # Panics
    ///
    /// Panics if the slices are too short.
    pub(crate) fn run(self) {
        let rows = self.rows.next_multiple_of(ROWS);
        if self.depth == 0 && !self.adds {
            self.target[..rows * self.pitch].fill(T::ZERO);
        }
        if rows * self.columns * self.depth == 0 {
            return;
        }
        assert!(self.columns.next_multiple_of(WIDEST) <= self.pitch);
        assert!((rows - 1) * self.row + (self.depth - 1) * self.step < self.a.len());
        assert!(self.depth * self.pitch <= self.b.len());
        assert!(rows * self.pitch <= self.target.len());
        Arch::new().dispatch(self);
    }
}

impl<T: Real> WithSimd for Sums<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        if S::REGISTER_COUNT >= MANY_REGISTERS {
            self.blocks::<S, 4>(simd);
        } else {
            self.blocks::<S, 2>(simd);
        }
    }
}

impl<T: Real> Sums<'_, T> {
    #[inline(always)]
    fn blocks<S: Simd, const N: usize>(&mut self, simd: S) {
        let lanes = size_of::<T::Vector<S>>() / size_of::<T>();
        let vectors = self.columns.div_ceil(lanes);
        let (whole, pairs) = (vectors / N * N, vectors / 2 * 2);
        for vector in (0..whole).step_by(N) {
            self.columns::<S, N>(simd, vector * lanes);
        }
        for vector in (whole..pairs).step_by(2) {
            self.columns::<S, 2>(simd, vector * lanes);
        }
        if pairs < vectors {
            self.columns::<S, 1>(simd, pairs * lanes);
        }
    }

    /// All rows of `N` vectors of columns.
    #[inline(always)]
    #[allow(unsafe_code)]
    fn columns<S: Simd, const N: usize>(&mut self, simd: S, column: usize) {
        for row in (0..self.rows).step_by(ROWS) {
            // SAFETY: `run` checked that `a` holds whole blocks of rows, that the target does, of `pitch`
            // values, and `b` `depth` rows of as many; the vectors end by a multiple of `WIDEST` columns.
            unsafe {
                let a = self.a.as_ptr().add(row * self.row);
                let b = self.b.as_ptr().add(column);
                let target = self.target.as_mut_ptr().add(row * self.pitch + column);
                sums::<S, T, N>(
                    simd,
                    (a, self.row, self.step),
                    b,
                    self.depth,
                    target,
                    self.pitch,
                    self.adds,
                );
            }
        }
    }
}

/// One block of sums.
///
/// # Safety
///
/// `a.0 + m * a.1 + k * a.2` must be good for reading a value, `b + k * pitch` for `N` vectors, and `target + m
/// * pitch` for reading and writing `N` vectors, for each `m < ROWS` and `k < depth`.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn sums<S: Simd, T: Real, const N: usize>(
    simd: S,
    (a, row, step): (*const T, usize, usize),
    b: *const T,
    depth: usize,
    target: *mut T,
    pitch: usize,
    adds: bool,
) {
    let lanes = size_of::<T::Vector<S>>() / size_of::<T>();
    let mut sums = [[T::splat(simd, T::ZERO); N]; ROWS];
    let one = T::splat(simd, T::ONE);
    // SAFETY: the caller's promise; `lanes` values are a vector, read and written unaligned.
    unsafe {
        for k in 0..depth {
            let mut values = [T::splat(simd, T::ZERO); N];
            for n in 0..N {
                values[n] = load::<S, T>(b.add(k * pitch + n * lanes));
            }
            for m in 0..ROWS {
                let factor = T::splat(simd, *a.add(m * row + k * step));
                for n in 0..N {
                    sums[m][n] = T::mul_add(simd, factor, values[n], sums[m][n]);
                }
            }
        }
        for m in 0..ROWS {
            for n in 0..N {
                let at = target.add(m * pitch + n * lanes);
                // Last: short sums that are added up lose less than a long one.
                if adds {
                    sums[m][n] = T::mul_add(simd, one, sums[m][n], load::<S, T>(at));
                }
                at.cast::<T::Vector<S>>().write_unaligned(sums[m][n]);
            }
        }
    }
}

/// # Safety
///
/// `from` must be good for reading a vector; it need not be aligned.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn load<S: Simd, T: Real>(from: *const T) -> T::Vector<S> {
    // SAFETY: the caller's promise.
    unsafe { from.cast::<T::Vector<S>>().read_unaligned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small whole numbers: every order of additions gives the same.
    fn values(len: usize, seed: usize) -> Vec<f32> {
        (0..len)
            .map(|index| ((index * 7 + seed * 13) % 11) as f32 - 5.0)
            .collect()
    }

    #[test]
    fn products_of_any_size() {
        let sizes: [[usize; 3]; 5] = [[1, 1, 1], [6, 4, 16], [7, 5, 17], [13, 66, 40], [2, 3, 0]];
        for [rows, columns, depth] in sizes {
            let pitch = columns.next_multiple_of(WIDEST);
            let padded = rows.next_multiple_of(ROWS);
            // By rows, and by columns.
            for (row, step) in [(depth, 1), (1, padded)] {
                for adds in [false, true] {
                    let (a, b) = (values(padded * depth, 1), values(depth * pitch, 2));
                    let start = values(padded * pitch, 3);
                    let mut got = start.clone();
                    Sums {
                        rows,
                        columns,
                        depth,
                        a: &a,
                        row,
                        step,
                        b: &b,
                        pitch,
                        target: &mut got,
                        adds,
                    }
                    .run();
                    for m in 0..rows {
                        for n in 0..columns {
                            let at = m * pitch + n;
                            let products =
                                (0..depth).map(|k| a[m * row + k * step] * b[k * pitch + n]);
                            let before = if adds { start[at] } else { 0.0 };
                            let wanted = before + products.sum::<f32>();
                            assert_eq!(got[at], wanted, "{rows} {columns} {depth}");
                        }
                    }
                }
            }
        }
    }
}
