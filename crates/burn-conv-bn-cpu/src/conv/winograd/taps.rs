//! Kernels beyond 3x3 as sums of 3x3 ones, each over tiles at an offset.
//!
//! Five taps `w0..w4` are `w0 w1 w2` and, two inputs on, `0 w3 w4`; seven are three such parts. Two inputs are the
//! distance of the tiles: all parts read one set of transformed tiles, and their products are added up before these are
//! transformed back. The first of the four products of `0 w3 w4` vanishes, so that five taps take 7 products for each
//! pair of outputs instead of 10, seven 10 instead of 14. Taps in depth are parts at offsets of whole slices.

use std::mem::MaybeUninit;

use pulp::Arch;
use rayon::prelude::*;

use super::transforms::{E, filter_transposed, transformed};
use super::window::{Shape, parts, products};
use crate::simd::planes::{CHANNELS, Filter, taps_in_cache};
use crate::simd::sweeps::Sweep;
use crate::{Geometry, Real};

/// Kernels whose gradients a thread transforms at a time.
const KERNELS: usize = 1024;

/// Values of a part of a kernel.
const PART: usize = 9;

/// Values of the transformed weight.
pub(crate) fn transformed_len(geometry: &Geometry) -> usize {
    let kernels = geometry.channels_out() * geometry.group_in();
    kernels * products(geometry)
}

/// The parts of a kernel, and which of them each product has.
#[derive(Debug)]
pub(super) struct Taps {
    /// Depth, row and column of each.
    parts: Vec<[usize; 3]>,
    classes: Vec<Class>,
    /// The class of each of the `E * E` products.
    of: [usize; E * E],
}

/// The parts of some products.
#[derive(Debug)]
pub(super) struct Class {
    /// Which of the kernel's parts.
    parts: Vec<usize>,
    /// Offsets in the input's planes, of each channel and part.
    pub(super) inputs: Vec<usize>,
    /// The same in planes of the output's gradient, in the other direction.
    pub(super) outputs: Vec<usize>,
}

impl Taps {
    /// With planes `plane` apart.
    pub(super) fn new(geometry: &Geometry, shape: Shape, plane: usize) -> Self {
        let [depth, down, across] = parts(geometry);
        let all: Vec<[usize; 3]> = (0..depth * down * across)
            .map(|part| [part / (down * across), part / across % down, part % across])
            .collect();
        let (mut classes, mut limits) = (Vec::new(), Vec::new());
        let of = std::array::from_fn(|product| {
            let limit = [
                if product / E == 0 { 1 } else { down },
                if product % E == 0 { 1 } else { across },
            ];
            limits
                .iter()
                .position(|other| *other == limit)
                .unwrap_or_else(|| {
                    let parts = all.iter().enumerate();
                    let parts =
                        parts.filter(|(_, [_, row, column])| *row < limit[0] && *column < limit[1]);
                    let parts: Vec<usize> = parts.map(|(index, _)| index).collect();
                    let offset = |part: &usize| shape.offset(geometry, all[*part]);
                    let offsets = |channels: usize, at: &dyn Fn(usize) -> usize| {
                        let starts = (0..channels).map(|channel| channel * plane);
                        starts
                            .flat_map(|start| {
                                parts.iter().map(move |part| start + at(offset(part)))
                            })
                            .collect()
                    };
                    let inputs = offsets(geometry.group_in(), &|offset| offset);
                    let outputs = offsets(geometry.group_out(), &|offset| shape.reach() - offset);
                    limits.push(limit);
                    classes.push(Class {
                        parts,
                        inputs,
                        outputs,
                    });
                    classes.len() - 1
                })
        });
        Self {
            parts: all,
            classes,
            of,
        }
    }

    pub(super) fn of(&self, product: usize) -> &Class {
        &self.classes[self.of[product]]
    }

    /// Number of offsets.
    pub(super) fn offsets(&self) -> usize {
        let offsets = |class: &Class| class.inputs.len() + class.outputs.len();
        self.classes.iter().map(offsets).sum()
    }

    /// `G w G'` of each group, from input channels to output channels or, `transposed`, back, where the output
    /// channels may be scaled.
    pub(super) fn filters<T: Real>(
        &self,
        geometry: &Geometry,
        weight: &[T],
        transposed: bool,
        scale: Option<&[T]>,
    ) -> Vec<Filter<T>> {
        let (group_in, group_out) = (geometry.group_in(), geometry.group_out());
        let (channels, sources, channel_step, source_step) = if transposed {
            (group_in, group_out, 1, group_in)
        } else {
            (group_out, group_in, group_in, 1)
        };
        let len: usize = geometry.kernel.iter().product();
        let [depth, down, _] = parts(geometry);
        let block = taps_in_cache(sources, 1, depth * down);
        let mut has = vec![[false; E * E]; self.parts.len()];
        for product in 0..E * E {
            for part in &self.of(product).parts {
                has[*part][product] = true;
            }
        }
        weight
            .chunks_exact(group_out * group_in * len)
            .enumerate()
            .flat_map(|(group, kernels)| {
                let scale = scale.map(|scale| &scale[group * group_out..]);
                let arch = Arch::new();
                let has = |part: usize, product: usize| has[part][product];
                Filter::several(
                    channels,
                    sources,
                    self.parts.len(),
                    block,
                    has,
                    |source, part, channels| {
                        let last = channels.end - 1;
                        let part = self.parts[part];
                        let kernel = |lane: usize| {
                            let channel = (channels.start + lane).min(last);
                            &kernels[(channel * channel_step + source * source_step) * len..][..len]
                        };
                        let mut copies = [[T::ZERO; PART]; CHANNELS];
                        if len > PART {
                            copies = std::array::from_fn(|lane| {
                                part_of(kernel(lane), geometry.kernel, part)
                            });
                        }
                        let kernels: [&[T; PART]; CHANNELS] = std::array::from_fn(|lane| {
                            kernel(lane).try_into().unwrap_or(&copies[lane])
                        });
                        let scale = scale.map_or(T::ONE, |scale| scale[source]);
                        arch.dispatch(Sweep(
                            #[inline(always)]
                            || {
                                let factors: [[T; CHANNELS]; E * E] = transformed(&kernels);
                                factors.map(
                                    #[inline(always)]
                                    |factors| {
                                        factors.map(
                                            #[inline(always)]
                                            |factor| factor * scale,
                                        )
                                    },
                                )
                            },
                        ))
                    },
                )
            })
            .collect()
    }

    /// `G' u G` of one group's kernels: the transpose of [`filters`](Self::filters), from sums of each product, kernel
    /// and part. Writes each value.
    pub(super) fn kernels<T: Real>(
        &self,
        geometry: &Geometry,
        sums: &[T],
        grad: &mut [MaybeUninit<T>],
    ) {
        let len: usize = geometry.kernel.iter().product();
        let count = geometry.group_in() * geometry.group_out();
        // Of each part, the place of its products' first sums and the distance of the next kernel's.
        let mut places = vec![[(sums.len(), 0); E * E]; self.parts.len()];
        let mut start = 0;
        for product in 0..E * E {
            let parts = &self.of(product).parts;
            for (rank, part) in parts.iter().enumerate() {
                places[*part][product] = (start + rank, parts.len());
            }
            start += count * parts.len();
        }
        grad.par_chunks_mut(KERNELS * len)
            .enumerate()
            .for_each(|(index, grad)| {
                for (part, places) in self.parts.iter().zip(&places) {
                    let sums =
                        places.map(|(start, step)| (&sums[start + index * KERNELS * step..], step));
                    for (kernel, grad) in grad.chunks_exact_mut(len).enumerate() {
                        let lines: [[f64; 3]; E] = std::array::from_fn(|row| {
                            filter_transposed(std::array::from_fn(|column| {
                                let (sums, step) = sums[row * E + column];
                                sums.get(kernel * step).map_or(0.0, |sum| sum.to_f64())
                            }))
                        });
                        write_part(lines, geometry.kernel, *part, grad);
                    }
                }
            });
    }
}

/// Writes `G' u G` of a part to its place in a kernel, from its rows transformed along the columns.
#[inline(always)]
fn write_part<T: Real>(
    lines: [[f64; 3]; E],
    [_, rows, columns]: [usize; 3],
    [depth, down, across]: [usize; 3],
    grad: &mut [MaybeUninit<T>],
) {
    let first = (depth * rows + 2 * down) * columns + 2 * across;
    for column in usize::from(across > 0)..3 {
        let values = filter_transposed(std::array::from_fn(|row| lines[row][column]));
        for row in usize::from(down > 0)..3 {
            grad[first + row * columns + column].write(T::from_f64(values[row]));
        }
    }
}

/// A part of a kernel: zeros where the part before has taps.
#[inline(always)]
fn part_of<T: Real>(
    kernel: &[T],
    size: [usize; 3],
    [depth, down, across]: [usize; 3],
) -> [T; PART] {
    let [_, rows, columns] = size;
    let first = (depth * rows + 2 * down) * columns + 2 * across;
    std::array::from_fn(|tap| match [tap / 3, tap % 3] {
        [0, _] if down > 0 => T::ZERO,
        [_, 0] if across > 0 => T::ZERO,
        [row, column] => kernel[first + row * columns + column],
    })
}
