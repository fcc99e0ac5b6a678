//! Fixed numbers of neighbouring values, which the compiler holds in vectors.

// Lanes are addressed by their place in the chunk.
#![allow(clippy::needless_range_loop)]

use std::ops::{Add, Neg, Sub};

use crate::Real;

/// Values of the widest unit's vectors.
pub(crate) const WIDEST: usize = 16;

/// Values of a chunk.
pub(crate) const CHUNK: usize = 8;

/// Values of a pair.
const PAIR: usize = 2;

/// [`CHUNK`] neighbouring values.
#[derive(Clone, Copy)]
pub(crate) struct Chunk<T>([T; CHUNK]);

impl<T: Real> Chunk<T> {
    pub(crate) const ZERO: Self = Self([T::ZERO; CHUNK]);

    /// The values at `start` of `K` lines, `pitch` apart.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(crate) fn load<const K: usize>(values: &[T], start: usize, pitch: usize) -> [Self; K] {
        assert!(start + (K - 1) * pitch + CHUNK <= values.len());
        std::array::from_fn(
            #[inline(always)]
            |k| {
                // SAFETY: the last of the chunks ends within the slice, as was just checked; an
                // array is aligned as its values are.
                Self(unsafe {
                    values
                        .as_ptr()
                        .add(start + k * pitch)
                        .cast::<[T; CHUNK]>()
                        .read()
                })
            },
        )
    }

    #[inline(always)]
    pub(crate) fn get(&self, lane: usize) -> T {
        self.0[lane]
    }

    /// Exact.
    #[inline(always)]
    pub(crate) fn half(self) -> Self {
        let half = T::from_f64(0.5);
        Self(std::array::from_fn(
            #[inline(always)]
            |lane| self.0[lane] * half,
        ))
    }

    /// Stores chunks at `start` of `K` lines, `pitch` apart.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(crate) fn store<const K: usize>(
        chunks: [Self; K],
        values: &mut [T],
        start: usize,
        pitch: usize,
    ) {
        assert!(start + (K - 1) * pitch + CHUNK <= values.len());
        for (k, chunk) in chunks.into_iter().enumerate() {
            // SAFETY: the last of the chunks ends within the slice, as was just checked; an array
            // is aligned as its values are.
            unsafe {
                let at = values.as_mut_ptr().add(start + k * pitch);
                at.cast::<[T; CHUNK]>().write(chunk.0);
            }
        }
    }

    /// As [`store`](Self::store), the first `len` values of each.
    #[inline(always)]
    pub(crate) fn store_part<const K: usize>(
        chunks: [Self; K],
        values: &mut [T],
        start: usize,
        pitch: usize,
        len: usize,
    ) {
        if len >= CHUNK {
            return Self::store(chunks, values, start, pitch);
        }
        for (k, chunk) in chunks.into_iter().enumerate() {
            copy_short(&chunk.0, &mut values[start + k * pitch..][..len]);
        }
    }
}

impl<T: Real> Add for Chunk<T> {
    type Output = Self;

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(
            #[inline(always)]
            |lane| self.0[lane] + other.0[lane],
        ))
    }
}

impl<T: Real> Sub for Chunk<T> {
    type Output = Self;

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(std::array::from_fn(
            #[inline(always)]
            |lane| self.0[lane] - other.0[lane],
        ))
    }
}

impl<T: Real> Neg for Chunk<T> {
    type Output = Self;

    #[inline(always)]
    fn neg(self) -> Self {
        Self(std::array::from_fn(
            #[inline(always)]
            |lane| T::ZERO - self.0[lane],
        ))
    }
}

/// Values of a line of a square.
pub(crate) const SIDE: usize = 4;

/// A square with its lines as columns. Compilers use vectors for this size, and for none that is larger.
#[inline(always)]
pub(crate) fn transposed<T: Real>(lines: [[T; SIDE]; SIDE]) -> [[T; SIDE]; SIDE] {
    std::array::from_fn(
        #[inline(always)]
        |column| {
            std::array::from_fn(
                #[inline(always)]
                |line| lines[line][column],
            )
        },
    )
}

/// Copies as many values as both slices hold, fewer than two chunks.
#[inline(always)]
pub(crate) fn copy_short<T: Real>(source: &[T], target: &mut [T]) {
    match (
        source.first_chunk::<CHUNK>(),
        target.first_chunk_mut::<CHUNK>(),
    ) {
        (Some(first), Some(to)) => {
            *to = *first;
            for (target, source) in target.iter_mut().zip(source).skip(CHUNK) {
                *target = *source;
            }
        }
        _ => {
            for (target, source) in target.iter_mut().zip(source) {
                *target = *source;
            }
        }
    }
}

/// The even and the odd values from `start` on.
#[inline(always)]
pub(crate) fn deinterleave<T: Real>(source: &[T], start: usize) -> [Chunk<T>; PAIR] {
    let (groups, _) = source[start..][..PAIR * CHUNK].as_chunks::<PAIR>();
    let mut chunks = [Chunk::ZERO; PAIR];
    for phase in 0..PAIR {
        for lane in 0..CHUNK {
            chunks[phase].0[lane] = groups[lane][phase];
        }
    }
    chunks
}

/// A row from its even values and its odd ones, which are `pitch` behind: the inverse of [`deinterleave`].
/// Compilers vectorize it by whole rows.
#[inline(always)]
pub(crate) fn interleave<T: Real>(phases: &[T], pitch: usize, row: &mut [T]) {
    let (even, odd) = phases.split_at(pitch);
    let (pairs, rest) = row.as_chunks_mut::<PAIR>();
    for ((pair, even), odd) in pairs.iter_mut().zip(even).zip(odd) {
        *pair = [*even, *odd];
    }
    if let ([last], Some(even)) = (rest, even.get(pairs.len())) {
        *last = *even;
    }
}

/// A row's even blocks of `len` values, and its odd ones from `pitch` on. Reads and writes up to a chunk beyond.
#[inline(always)]
pub(crate) fn split_blocks<T: Real>(row: &[T], len: usize, phases: &mut [T], pitch: usize) {
    for phase in 0..PAIR {
        for block in (0..pitch).step_by(len) {
            let (from, to) = (PAIR * block + phase * len, phase * pitch + block);
            for start in (0..len).step_by(CHUNK) {
                // The next block overwrites values written behind this one.
                Chunk::store(
                    Chunk::load::<1>(row, from + start, 0),
                    phases,
                    to + start,
                    0,
                );
            }
        }
    }
}

/// A row from its even blocks of `len` values and its odd ones, which are `pitch` behind: the inverse of
/// [`split_blocks`].
#[inline(always)]
pub(crate) fn join_blocks<T: Real>(phases: &[T], pitch: usize, len: usize, row: &mut [T]) {
    for (index, to) in (0..row.len()).step_by(len).enumerate() {
        let from = index / PAIR * len + index % PAIR * pitch;
        for start in (0..len.min(row.len() - to)).step_by(CHUNK) {
            let chunks = Chunk::load::<1>(phases, from + start, 0);
            let len = row.len() - to - start;
            // The next block overwrites values written behind this one.
            Chunk::store_part(chunks, row, to + start, 0, len);
        }
    }
}
