//! The inputs of output positions, side by side.

use rayon::prelude::*;

use super::{Packed, Run, Scratch};
use crate::conv::span::Span;
use crate::{Element, Real};

/// Rows of patches that a thread packs at a time.
const PATCHES: usize = 4;

impl Packed<'_> {
    /// Packs the patches of a chunk's positions, of some channels from `first` on. Returns their length.
    pub(super) fn pack<E: Element>(
        &self,
        scratch: &mut Scratch<E>,
        input: &[E],
        chunk: Span,
        group: usize,
        first: usize,
    ) -> usize {
        let (geometry, taps) = (self.geometry, self.taps.len());
        let plane = geometry.input_plane();
        let channels = self.channels.min(geometry.group_in() - first);
        let (depth, positions) = (channels * taps, geometry.positions());
        scratch.patches.resize(self.patch_values(), E::Real::ZERO);
        let threads = &scratch.threads;
        scratch.patches[..chunk.len * self.pitch]
            .par_chunks_mut(PATCHES * self.pitch)
            .enumerate()
            .for_each(|(index, rows)| {
                threads.with(|buffers| {
                    for (row, target) in rows.chunks_exact_mut(self.pitch).enumerate() {
                        let at = chunk.start + index * PATCHES + row;
                        self.find_places(at % positions, &mut buffers.places);
                        let channel = at / positions * geometry.channels[0]
                            + group * geometry.group_in()
                            + first;
                        let source = &input[channel * plane..][..channels * plane];
                        let line = &mut buffers.line;
                        line.clear();
                        line.resize(depth, E::default());
                        for (channel, source) in source.chunks_exact(plane).enumerate() {
                            let line = &mut line[channel * taps..][..taps];
                            for (tap, place) in &buffers.places {
                                line[*tap] = source[*place];
                            }
                        }
                        E::load(line, &mut target[..depth]);
                        target[depth..].fill(E::Real::ZERO);
                    }
                });
            });
        depth
    }

    /// Packs the rows of a chunk's patches, whose runs were found, of some channels from `first` on. Returns
    /// their number.
    pub(super) fn pack_rows<E: Element>(
        &self,
        scratch: &mut Scratch<E>,
        input: &[E],
        chunk: Span,
        group: usize,
        first: usize,
    ) -> usize {
        let (geometry, taps) = (self.geometry, self.taps.len());
        let step = geometry.stride[2];
        let channels = self.channels.min(geometry.group_in() - first);
        let start = group * geometry.group_in() + first;
        let len = taps * self.row_pitch;
        scratch.patches.resize(self.patch_values(), E::Real::ZERO);
        let (runs, threads) = (&scratch.runs, &scratch.threads);
        scratch.patches[..channels * len]
            .par_chunks_mut(len.max(1))
            .with_min_len(PATCHES)
            .enumerate()
            .for_each(|(channel, rows)| {
                threads.with(|buffers| {
                    let source = &input[(start + channel) * geometry.input_plane()..];
                    let line = &mut buffers.line;
                    for (runs, target) in runs.iter().zip(rows.chunks_exact_mut(self.row_pitch)) {
                        line.clear();
                        line.resize(chunk.len, E::default());
                        for run in runs {
                            let source = &source[run.from..][..(run.len - 1) * step + 1];
                            let line = &mut line[run.at..][..run.len];
                            if step == 1 {
                                line.copy_from_slice(source);
                                continue;
                            }
                            for (value, source) in line.iter_mut().zip(source.chunks(step)) {
                                *value = source[0];
                            }
                        }
                        E::load(line, &mut target[..chunk.len]);
                    }
                });
            });
        channels * taps
    }

    /// Values of the patches of a chunk, or of their rows.
    fn patch_values(&self) -> usize {
        let rows = self.channels * self.taps.len();
        (self.positions * self.pitch).max(rows * self.row_pitch)
    }

    /// The inputs of each tap for a chunk.
    pub(super) fn find_runs(&self, chunk: Span, runs: &mut Vec<Vec<Run>>) {
        let geometry = self.geometry;
        let step = geometry.stride[2];
        runs.resize_with(self.taps.len(), Vec::new);
        runs.iter_mut().for_each(Vec::clear);
        let mut positions = 0..chunk.len;
        for (image, part) in chunk.parts(geometry) {
            for (position, at) in part.zip(&mut positions) {
                for ((_, offset), runs) in self.taps.iter().zip(&mut *runs) {
                    let Some(place) = self.place(position, *offset) else {
                        continue;
                    };
                    let from = image * geometry.input_len() + place;
                    match runs.last_mut() {
                        Some(run)
                            if run.at + run.len == at && run.from + run.len * step == from =>
                        {
                            run.len += 1;
                        }
                        _ => runs.push(Run { at, from, len: 1 }),
                    }
                }
            }
        }
    }

    /// The taps of an output position that meet the input, and the place of each in its plane.
    pub(super) fn find_places(&self, position: usize, places: &mut Vec<(usize, usize)>) {
        places.clear();
        for (tap, (_, offset)) in self.taps.iter().enumerate() {
            if let Some(place) = self.place(position, *offset) {
                places.push((tap, place));
            }
        }
    }

    /// The input of a tap at an output position, unless it is padding.
    fn place(&self, position: usize, offset: [usize; 3]) -> Option<usize> {
        let geometry = self.geometry;
        let [_, rows, columns] = geometry.output;
        let at = [
            position / columns / rows,
            position / columns % rows,
            position % columns,
        ];
        let [_, height, width] = geometry.input;
        let place = |dim: usize| {
            (at[dim] * geometry.stride[dim] + offset[dim])
                .checked_sub(geometry.padding[dim].0)
                .filter(|place| *place < geometry.input[dim])
        };
        Some((place(0)? * height + place(1)?) * width + place(2)?)
    }
}
