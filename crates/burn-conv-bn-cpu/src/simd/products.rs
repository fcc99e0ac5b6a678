//! The microkernel of packed products: sums of rows.
//!
//! Blocks of sums are six rows by as many vectors as the registers hold: two of sixteen, four of 32.

// Blocks of registers are addressed by their place in the block.
#![allow(clippy::needless_range_loop)]

use pulp::{Arch, Simd, WithSimd};

use super::chunk::{SIDE, WIDEST, transposed};
use super::prefetch;
use super::sweeps::Sweep;
use crate::Real;

/// Rows of a block of sums.
pub(crate) const ROWS: usize = 6;

/// Registers of the larger units: AVX-512, NEON.
const MANY_REGISTERS: usize = 32;

/// `target[m][n] = sum over k of a[m * row + k * step] * b[k * pitch + n]`, added to what is there if `adds`.
///
/// The target's rows are `target_pitch` apart. Its columns to the next multiple of [`WIDEST`] are overwritten with
/// unspecified numbers.
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
    pub(crate) target_pitch: usize,
    pub(crate) adds: bool,
}

impl<T: Real> Sums<'_, T> {
    /// Computes the sums.
    ///
    /// # Panics
    ///
    /// Panics if the slices are too short.
    pub(crate) fn run(self) {
        if self.depth == 0 && !self.adds {
            for target in self.target.chunks_mut(self.target_pitch).take(self.rows) {
                target[..self.columns].fill(T::ZERO);
            }
        }
        if self.rows * self.columns * self.depth == 0 {
            return;
        }
        let columns = self.columns.next_multiple_of(WIDEST);
        assert!((self.rows - 1) * self.row + (self.depth - 1) * self.step < self.a.len());
        assert!((self.depth - 1) * self.pitch + columns <= self.b.len());
        assert!((self.rows - 1) * self.target_pitch + columns <= self.target.len());
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
            // SAFETY: `run` checked that `a` holds all rows, that the target does, and `b` `depth` rows, each up to
            // the next multiple of `WIDEST` columns, by which the vectors end.
            unsafe {
                match self.rows - row {
                    1 => self.block::<S, 1, N>(simd, row, column),
                    2 => self.block::<S, 2, N>(simd, row, column),
                    3 => self.block::<S, 3, N>(simd, row, column),
                    4 => self.block::<S, 4, N>(simd, row, column),
                    5 => self.block::<S, 5, N>(simd, row, column),
                    _ => self.block::<S, ROWS, N>(simd, row, column),
                }
            }
        }
    }

    /// `M` rows of `N` vectors of columns.
    ///
    /// # Safety
    ///
    /// `a` and the target must hold the rows, `b` and the target the vectors' columns.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn block<S: Simd, const M: usize, const N: usize>(
        &mut self,
        simd: S,
        row: usize,
        column: usize,
    ) {
        let target_pitch = self.target_pitch;
        // SAFETY: the caller's promise.
        unsafe {
            let a = self.a.as_ptr().add(row * self.row);
            let b = self.b.as_ptr().add(column);
            let target = self.target.as_mut_ptr().add(row * target_pitch + column);
            sums::<S, T, M, N>(
                simd,
                (a, self.row, self.step),
                (b, self.pitch),
                self.depth,
                (target, target_pitch),
                self.adds,
            );
        }
    }
}

/// One block of sums.
///
/// # Safety
///
/// `a + m * row + k * step` must be good for reading a value, `b + k * pitch` for `N` vectors, and `target + m *
/// target_pitch` for reading and writing `N` vectors, for each `m < M` and `k < depth`.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn sums<S: Simd, T: Real, const M: usize, const N: usize>(
    simd: S,
    (a, row, step): (*const T, usize, usize),
    (b, pitch): (*const T, usize),
    depth: usize,
    (target, target_pitch): (*mut T, usize),
    adds: bool,
) {
    let lanes = size_of::<T::Vector<S>>() / size_of::<T>();
    let mut sums = [[T::splat(simd, T::ZERO); N]; M];
    let one = T::splat(simd, T::ONE);
    // SAFETY: the caller's promise; `lanes` values are a vector, read and written unaligned.
    unsafe {
        for m in 0..M {
            for n in 0..N {
                prefetch(target.add(m * target_pitch + n * lanes));
            }
        }
        for k in 0..depth {
            let mut values = [T::splat(simd, T::ZERO); N];
            for n in 0..N {
                values[n] = load::<S, T>(b.add(k * pitch + n * lanes));
            }
            for m in 0..M {
                let factor = T::splat(simd, *a.add(m * row + k * step));
                for n in 0..N {
                    sums[m][n] = T::mul_add(simd, factor, values[n], sums[m][n]);
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                let at = target.add(m * target_pitch + n * lanes);
                // Last: short sums that are added up lose less than a long one.
                if adds {
                    sums[m][n] = T::mul_add(simd, one, sums[m][n], load::<S, T>(at));
                }
                at.cast::<T::Vector<S>>().write_unaligned(sums[m][n]);
            }
        }
    }
}

/// Columns, and products, of a block of [`accumulate_columns`]: 12 KiB in single precision, and sums that are short
/// enough to keep their digits.
const BLOCK_COLUMNS: usize = 64;
const BLOCK_DEPTH: usize = 48;

/// As [`accumulate`](super::planes::accumulate), with vectors over offsets instead of positions: no sum is taken across
/// lanes. Returns how many of the offsets are done: whole vectors.
pub(super) fn accumulate_columns<T: Real>(
    sums: &mut [T],
    (grads, pitch): (&[T], usize),
    source: &[T],
    offsets: &[usize],
    positions: usize,
) -> usize {
    let taps = offsets.len();
    let whole = taps / WIDEST * WIDEST;
    let step = positions.div_ceil(positions.div_ceil(BLOCK_DEPTH).max(1));
    let mut block = [T::ZERO; BLOCK_COLUMNS * BLOCK_DEPTH];
    for (index, offsets) in offsets[..whole].chunks(BLOCK_COLUMNS).enumerate() {
        for start in (0..positions).step_by(step) {
            let depth = step.min(positions - start);
            Arch::new().dispatch(Sweep(
                #[inline(always)]
                || {
                    for (group, offsets) in offsets.as_chunks::<SIDE>().0.iter().enumerate() {
                        for first in (0..depth).step_by(SIDE) {
                            let mut square = [[T::ZERO; SIDE]; SIDE];
                            for (line, offset) in square.iter_mut().zip(offsets) {
                                line.copy_from_slice(&source[offset + start + first..][..SIDE]);
                            }
                            let targets = block[first * BLOCK_COLUMNS + group * SIDE..]
                                .chunks_mut(BLOCK_COLUMNS);
                            for (target, line) in targets.zip(transposed(square)) {
                                target[..SIDE].copy_from_slice(&line);
                            }
                        }
                    }
                },
            ));
            Sums {
                rows: sums.len() / taps,
                columns: offsets.len(),
                depth,
                a: &grads[start..],
                row: pitch,
                step: 1,
                b: &block,
                pitch: BLOCK_COLUMNS,
                target: &mut sums[index * BLOCK_COLUMNS..],
                target_pitch: taps,
                adds: true,
            }
            .run();
        }
    }
    whole
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
            let target_pitch = pitch + 3;
            // By rows, and by columns.
            for (row, step) in [(depth, 1), (1, rows)] {
                for adds in [false, true] {
                    let (a, b) = (values(rows * depth, 1), values(depth * pitch, 2));
                    let start = values(rows * target_pitch, 3);
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
                        target_pitch,
                        adds,
                    }
                    .run();
                    for m in 0..rows {
                        for n in 0..columns {
                            let at = m * target_pitch + n;
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
