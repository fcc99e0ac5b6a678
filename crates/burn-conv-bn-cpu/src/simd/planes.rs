//! The microkernels: sums of shifted planes, and dot products with them.
//!
//! Registers hold a block of sums, a few channels by a few vectors of positions, so that each loaded value is
//! used several times. The blocks fit sixteen vector registers with one to spare, or the compiler spills sums
//! to memory. Eight sums or more keep two units busy whose additions take four cycles.

// Blocks of registers are addressed by their place in the block.
#![allow(clippy::needless_range_loop)]

use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

pub(crate) use super::chunk::WIDEST;
use super::products::accumulate_columns;
use crate::Real;

/// Values that [`correlate`] may read behind a plane's last position, and write behind a target's: a
/// block of sums, in vectors of the widest unit.
pub(crate) fn slack(channels: usize) -> usize {
    let full = if channels < CHANNELS { 0 } else { VECTORS[0] };
    full.max(VECTORS[channels % CHANNELS]) * WIDEST
}

/// Values of a cache line in single precision.
pub(crate) const LINE: usize = 16;

/// Most lines of the planes in a block of taps: the first-level cache holds them, of some 100 bytes
/// each.
const BLOCK_LINES: usize = 128;

/// Bytes of planes in a block of dot products with all channels of gradients: half of a first-level cache,
/// through which the gradients stream.
const BLOCK_BYTES: usize = 16 << 10;

/// A multiple of the taps of each block of dot products, so that no block is cut.
const BLOCK_TAPS: usize = 36;

/// Channels of a full block of sums.
pub(crate) const CHANNELS: usize = 6;

/// Vectors of positions of a block of sums, by its number of channels; of a full block at 0.
const VECTORS: [usize; CHANNELS] = [2, 8, 4, 3, 2, 2];

/// Most positions, for each channel of gradients, for which it is faster to transpose the planes once than to take a sum
/// across lanes for each channel.
const FEW_POSITIONS: usize = 2;

/// The next length that is an odd number of cache lines: planes a power of two apart would share a few
/// sets of a cache.
pub(crate) fn plane_len(len: usize) -> usize {
    (len.div_ceil(LINE) | 1) * LINE
}

/// Taps of a block, of `taps` for each of `channels`, which read `lines` lines of its planes: about
/// [`BLOCK_LINES`] in all, the same number in each block as far as they divide.
pub(crate) fn taps_in_cache(channels: usize, taps: usize, lines: usize) -> usize {
    let most = (BLOCK_LINES / lines).max(1);
    channels.div_ceil(channels.div_ceil(most)) * taps
}

/// Factors of shifted planes, `[channels, taps]`, in the order in which [`correlate`] reads them.
#[derive(Debug)]
pub(crate) struct Filter<T> {
    channels: usize,
    taps: usize,
    /// Taps of a block. The blocks' sums are added in order, and a block's lines of the planes stay in the
    /// first-level cache for all channels.
    block: usize,
    factors: Vec<T>,
}

impl<T: Real> Filter<T> {
    /// `factors(tap)` returns the factor of each channel.
    pub(crate) fn new<F: Fn(usize) -> T>(
        channels: usize,
        taps: usize,
        block: usize,
        factors: impl Fn(usize) -> F + Sync,
    ) -> Self {
        let all = |_, _| true;
        let [filter] = Self::several(channels, taps, 1, block, all, |tap, _, channels| {
            let factor = factors(tap);
            let last = channels.end - 1;
            [std::array::from_fn(
                #[inline(always)]
                |lane| factor((channels.start + lane).min(last)),
            )]
        });
        filter
    }

    /// Filters over `sources` planes, computed together: `factors` returns each filter's, for one of a plane's `taps`
    /// and some neighbouring channels, [`CHANNELS`] or the few of the remainder. Filter `k` takes the
    /// taps with `has(tap, k)`, in blocks of `block` planes.
    #[allow(unsafe_code)]
    pub(crate) fn several<const K: usize>(
        channels: usize,
        sources: usize,
        taps: usize,
        block: usize,
        has: impl Fn(usize, usize) -> bool + Sync,
        factors: impl Fn(usize, usize, Range<usize>) -> [[T; CHANNELS]; K] + Sync,
    ) -> [Self; K] {
        let counts: [usize; K] =
            std::array::from_fn(|k| (0..taps).filter(|tap| has(*tap, k)).count());
        let is_whole = counts == [taps; K];
        let mut lists = counts.map(|count| Vec::with_capacity(channels * sources * count));
        let mut counted = counts.iter();
        let mut rests = lists.each_mut().map(|list| {
            let len = channels * counted.next().expect("each filter is counted");
            list.spare_capacity_mut()[..sources * len].chunks_mut(block * len)
        });
        let blocks: Vec<[&mut [MaybeUninit<T>]; K]> = (0..sources.div_ceil(block))
            .map(|_| {
                rests
                    .each_mut()
                    .map(|list| list.next().expect("each filter has as many blocks"))
            })
            .collect();
        blocks
            .into_par_iter()
            .enumerate()
            .for_each(|(index, mut targets)| {
                let start = index * block;
                let end = (start + block).min(sources);
                let (mut at, mut ends) = (0, [0; K]);
                for first in (0..channels).step_by(CHANNELS) {
                    let last = (first + CHANNELS).min(channels);
                    for (source, tap) in
                        (start..end).flat_map(|source| (0..taps).map(move |tap| (source, tap)))
                    {
                        let values = factors(source, tap, first..last);
                        let to = at + last - first;
                        for (k, (target, values)) in targets.iter_mut().zip(values).enumerate() {
                            if is_whole {
                                write(&mut target[at..to], values);
                            } else if has(tap, k) {
                                let end = ends[k] + last - first;
                                write(&mut target[ends[k]..end], values);
                                ends[k] = end;
                            }
                        }
                        at = to;
                    }
                }
            });
        let mut counted = counts.iter();
        lists.map(|mut factors| {
            let count = counted.next().expect("each filter is counted");
            // SAFETY: the blocks are all of the first values, as many as the filter has, and each of a block's values,
            // a channel's factor of a tap, was written.
            unsafe { factors.set_len(channels * sources * count) };
            Self {
                channels,
                taps: sources * count,
                block: block * count,
                factors,
            }
        })
    }
}

/// Fills a target with as many of the values as it holds.
#[inline(always)]
fn write<T: Real>(target: &mut [MaybeUninit<T>], values: [T; CHANNELS]) {
    if let Ok(target) = <&mut [_; CHANNELS]>::try_from(&mut *target) {
        *target = values.map(MaybeUninit::new);
        return;
    }
    for (target, value) in target.iter_mut().zip(values) {
        target.write(value);
    }
}

/// `target[c][p] = sum over taps t of filter[c][t] * source[offsets[t] + p]` for `positions`
/// positions, with `target`'s channels `pitch` apart. Up to [`slack`] values behind a channel's positions
/// are overwritten with unspecified numbers. With `adds` the target's values are added to.
///
/// Each sum runs over the taps in order, whatever the position.
///
/// # Panics
///
/// Panics if the slices are too short.
pub(crate) fn correlate<T: Real>(
    filter: &Filter<T>,
    source: &[T],
    offsets: &[usize],
    target: &mut [T],
    pitch: usize,
    positions: usize,
    adds: bool,
) {
    assert_eq!(filter.factors.len(), filter.channels * filter.taps);
    assert_eq!(offsets.len(), filter.taps);
    let last = offsets.iter().max().copied().unwrap_or(0);
    let slack = slack(filter.channels);
    assert!(last + positions + slack <= source.len());
    assert!((filter.channels - 1) * pitch + positions + slack <= target.len());
    Arch::new().dispatch(Correlate {
        filter,
        source,
        offsets,
        target,
        pitch,
        positions,
        adds,
    });
}

struct Correlate<'a, T> {
    filter: &'a Filter<T>,
    source: &'a [T],
    offsets: &'a [usize],
    target: &'a mut [T],
    pitch: usize,
    positions: usize,
    /// Whether the first block of taps adds to the target, as the others do.
    adds: bool,
}

impl<T: Real> WithSimd for Correlate<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let channels = self.filter.channels;
        let full = channels / CHANNELS * CHANNELS;
        let mut start = 0;
        let mut factors = self.filter.factors.as_slice();
        while start < self.filter.taps {
            let end = (start + self.filter.block).min(self.filter.taps);
            let (block, rest) = factors.split_at((end - start) * channels);
            let (whole, remainder) = block.split_at((end - start) * full);
            let taps = Taps { start, end };
            if full > 0 {
                self.blocks::<S, CHANNELS, { VECTORS[0] }, 1>(simd, taps, whole, 0..full);
            }
            let channels = full..channels;
            match channels.len() {
                1 => self.blocks::<S, 1, { VECTORS[1] }, 4>(simd, taps, remainder, channels),
                2 => self.blocks::<S, 2, { VECTORS[2] }, 2>(simd, taps, remainder, channels),
                3 => self.blocks::<S, 3, { VECTORS[3] }, 1>(simd, taps, remainder, channels),
                4 => self.blocks::<S, 4, { VECTORS[4] }, 1>(simd, taps, remainder, channels),
                5 => self.blocks::<S, 5, { VECTORS[5] }, 1>(simd, taps, remainder, channels),
                _ => {}
            }
            (start, factors) = (end, rest);
        }
    }
}

#[derive(Clone, Copy)]
struct Taps {
    start: usize,
    end: usize,
}

impl<T: Real> Correlate<'_, T> {
    /// All blocks of sums of `channels`, a multiple of `M`, each of `M` channels by `N` vectors, or by
    /// `LAST` for the last positions if that is enough.
    #[inline(always)]
    #[allow(unsafe_code)]
    fn blocks<S: Simd, const M: usize, const N: usize, const LAST: usize>(
        &mut self,
        simd: S,
        taps: Taps,
        factors: &[T],
        channels: Range<usize>,
    ) {
        let lanes = size_of::<T::Vector<S>>() / size_of::<T>();
        let step = N * lanes;
        debug_assert!(step <= N * WIDEST);
        let offsets = &self.offsets[taps.start..taps.end];
        let factors = factors.chunks_exact(M * offsets.len());
        for position in (0..self.positions).step_by(step) {
            let is_short = self.positions - position <= LAST * lanes;
            for (first, factors) in channels.clone().step_by(M).zip(factors.clone()) {
                // SAFETY: `correlate` checked that each plane holds `slack` values after its
                // `positions` from the largest offset on, and the target after those of its last
                // channel; `position < positions` and a block is no wider than `slack`. `factors`
                // holds `M` values for each offset.
                unsafe {
                    let source = self.source.as_ptr().add(position);
                    let target = self.target.as_mut_ptr().add(first * self.pitch + position);
                    let (factors, pitch) = (factors.as_ptr(), self.pitch);
                    let add = self.adds || taps.start > 0;
                    if is_short {
                        block::<S, T, M, LAST>(simd, factors, source, offsets, target, pitch, add);
                    } else {
                        block::<S, T, M, N>(simd, factors, source, offsets, target, pitch, add);
                    }
                }
            }
        }
    }
}

/// One block of sums: stored, or added to what is there.
///
/// # Safety
///
/// `source + offset` must be good for reading `N` vectors for each offset, `factors` for reading `M`
/// values for each offset, and `target + m * pitch` for reading and writing `N` vectors for each
/// `m < M`.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn block<S: Simd, T: Real, const M: usize, const N: usize>(
    simd: S,
    factors: *const T,
    source: *const T,
    offsets: &[usize],
    target: *mut T,
    pitch: usize,
    add: bool,
) {
    let lanes = size_of::<T::Vector<S>>() / size_of::<T>();
    let mut sums = [[T::splat(simd, T::ZERO); N]; M];
    // SAFETY: the caller's promise; `lanes` values are a vector, read and written unaligned.
    unsafe {
        if add {
            for m in 0..M {
                for n in 0..N {
                    sums[m][n] = load::<S, T>(target.add(m * pitch + n * lanes));
                }
            }
        }
        let mut factors = factors;
        for offset in offsets {
            let source = source.add(*offset);
            if M > N {
                let mut values = [T::splat(simd, T::ZERO); N];
                for n in 0..N {
                    values[n] = load::<S, T>(source.add(n * lanes));
                }
                for m in 0..M {
                    let factor = T::splat(simd, *factors.add(m));
                    for n in 0..N {
                        sums[m][n] = T::mul_add(simd, factor, values[n], sums[m][n]);
                    }
                }
            } else {
                let mut factor = [T::splat(simd, T::ZERO); M];
                for m in 0..M {
                    factor[m] = T::splat(simd, *factors.add(m));
                }
                for n in 0..N {
                    let values = load::<S, T>(source.add(n * lanes));
                    for m in 0..M {
                        sums[m][n] = T::mul_add(simd, factor[m], values, sums[m][n]);
                    }
                }
            }
            factors = factors.add(M);
        }
        for m in 0..M {
            for n in 0..N {
                let at = target.add(m * pitch + n * lanes);
                at.cast::<T::Vector<S>>().write_unaligned(sums[m][n]);
            }
        }
    }
}

/// `sums[c][t] += sum over positions p of grads[c][p] * source[offsets[t] + p]`, with `grads`'
/// channels `pitch` apart.
///
/// Reads up to [`WIDEST`] positions behind the last: `grads` must be zero there, and the source finite.
///
/// # Panics
///
/// Panics if the slices are too short.
pub(crate) fn accumulate<T: Real>(
    sums: &mut [T],
    grads: &[T],
    pitch: usize,
    source: &[T],
    offsets: &[usize],
    positions: usize,
) {
    let channels = sums.len() / offsets.len();
    let last = offsets.iter().max().copied().unwrap_or(0);
    assert!(last + positions + WIDEST <= source.len());
    assert!((channels - 1) * pitch + positions + WIDEST <= grads.len());
    let done = if positions <= FEW_POSITIONS * channels {
        accumulate_columns(sums, (grads, pitch), source, offsets, positions)
    } else {
        0
    };
    Arch::new().dispatch(Accumulate {
        done,
        sums,
        grads,
        pitch,
        source,
        offsets,
        positions,
    });
}

struct Accumulate<'a, T> {
    /// Offsets that are done.
    done: usize,
    sums: &'a mut [T],
    grads: &'a [T],
    pitch: usize,
    source: &'a [T],
    offsets: &'a [usize],
    positions: usize,
}

impl<T: Real> WithSimd for Accumulate<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let channels = self.sums.len() / self.offsets.len();
        let full = channels / CHANNELS * CHANNELS;
        let plane = self.positions * size_of::<T>();
        let block = (BLOCK_BYTES / plane)
            .next_multiple_of(BLOCK_TAPS)
            .max(BLOCK_TAPS);
        for start in (self.done..self.offsets.len()).step_by(block) {
            let taps = start..(start + block).min(self.offsets.len());
            for channel in (0..full).step_by(CHANNELS) {
                self.taps::<S, CHANNELS, 2>(simd, channel, taps.clone());
            }
            match channels - full {
                1 => self.taps::<S, 1, 9>(simd, full, taps),
                2 => self.taps::<S, 2, 4>(simd, full, taps),
                3 => self.taps::<S, 3, 3>(simd, full, taps),
                4 => self.taps::<S, 4, 2>(simd, full, taps),
                5 => self.taps::<S, 5, 2>(simd, full, taps),
                _ => {}
            }
        }
    }
}

impl<T: Real> Accumulate<'_, T> {
    /// Some taps of `M` channels from `channel` on, `N` at a time and the remainder one by one.
    #[inline(always)]
    fn taps<S: Simd, const M: usize, const N: usize>(
        &mut self,
        simd: S,
        channel: usize,
        taps: Range<usize>,
    ) {
        let start = taps.start;
        let (blocks, rest) = self.offsets[taps].as_chunks::<N>();
        for (index, block) in blocks.iter().enumerate() {
            self.block::<S, M, N>(simd, channel, start + index * N, block);
        }
        let start = start + blocks.len() * N;
        for (index, offset) in rest.iter().enumerate() {
            self.block::<S, M, 1>(simd, channel, start + index, &[*offset]);
        }
    }

    #[inline(always)]
    #[allow(unsafe_code)]
    fn block<S: Simd, const M: usize, const N: usize>(
        &mut self,
        simd: S,
        channel: usize,
        tap: usize,
        offsets: &[usize; N],
    ) {
        let vectors = self
            .positions
            .div_ceil(size_of::<T::Vector<S>>() / size_of::<T>());
        // SAFETY: `accumulate` checked that each plane and each channel holds WIDEST values, no
        // less than a vector, after its `positions`.
        let sums = unsafe {
            let grads = self.grads.as_ptr().add(channel * self.pitch);
            dots::<S, T, M, N>(
                simd,
                grads,
                self.pitch,
                self.source.as_ptr(),
                offsets,
                vectors,
            )
        };
        let taps = self.offsets.len();
        for (m, sums) in sums.iter().enumerate() {
            let target = &mut self.sums[(channel + m) * taps + tap..][..N];
            for (target, sum) in target.iter_mut().zip(sums) {
                *target += *sum;
            }
        }
    }
}

/// The dot products of `M` channels of gradients with `N` shifts of the source.
///
/// # Safety
///
/// `grads + m * pitch` must be good for reading `vectors` vectors for each `m < M`, and `source +
/// offset` for each offset.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn dots<S: Simd, T: Real, const M: usize, const N: usize>(
    simd: S,
    grads: *const T,
    pitch: usize,
    source: *const T,
    offsets: &[usize; N],
    vectors: usize,
) -> [[T; N]; M] {
    let lanes = size_of::<T::Vector<S>>() / size_of::<T>();
    let mut sums = [[T::splat(simd, T::ZERO); N]; M];
    for vector in 0..vectors {
        // SAFETY: the caller's promise; `lanes` values are a vector, read unaligned.
        unsafe {
            let (grads, source) = (grads.add(vector * lanes), source.add(vector * lanes));
            if M > N {
                let mut values = [T::splat(simd, T::ZERO); N];
                for n in 0..N {
                    values[n] = load::<S, T>(source.add(offsets[n]));
                }
                for m in 0..M {
                    let grad = load::<S, T>(grads.add(m * pitch));
                    for n in 0..N {
                        sums[m][n] = T::mul_add(simd, grad, values[n], sums[m][n]);
                    }
                }
            } else {
                let mut grad = [T::splat(simd, T::ZERO); M];
                for m in 0..M {
                    grad[m] = load::<S, T>(grads.add(m * pitch));
                }
                for n in 0..N {
                    let values = load::<S, T>(source.add(offsets[n]));
                    for m in 0..M {
                        sums[m][n] = T::mul_add(simd, grad[m], values, sums[m][n]);
                    }
                }
            }
        }
    }
    let mut totals = [[T::ZERO; N]; M];
    for m in 0..M {
        for n in 0..N {
            totals[m][n] = T::sum(simd, sums[m][n]);
        }
    }
    totals
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
