//! Forward kernels, parallel over blocks of images: the convolution, its moments, and the norm.

use std::mem::MaybeUninit;

use pulp::Arch;
use rayon::prelude::*;

use super::channels;
use crate::blocks::{BLOCKS, shares};
use crate::conv::channels::ByChannels;
use crate::conv::tile::{Algorithm, Output, TileScratch, Work};
use crate::conv::{Chosen, check, choose};
use crate::scratch::{ScratchPool, room};
use crate::simd::sweeps;
use crate::{Activation, Affine, Element, Geometry, Moments};

/// The convolution: overwrites `output` with `[batch, channels_out, output..]`.
///
/// # Panics
///
/// Panics if a slice is not of the geometry's size.
///
/// # Examples
///
/// ```
/// use burn_conv_bn_cpu::{Geometry, conv};
///
/// // A sum over neighbours in a line of four values.
/// let one = [1; 3];
/// let geometry = Geometry::new(1, [1, 1], 1, [1, 1, 4], [1, 1, 2], one, [(0, 0); 3], one)?;
/// let mut output = Vec::new();
/// conv(&geometry, &[1.0f32, 2.0, 4.0, 8.0], &[1.0, 1.0], &mut output);
/// assert_eq!(output, [3.0, 6.0, 12.0]);
/// # Ok::<(), burn_conv_bn_cpu::GeometryError>(())
/// ```
pub fn conv<E: Element>(geometry: &Geometry, input: &[E], weight: &[E::Real], output: &mut Vec<E>) {
    conv_seeing(geometry, input, weight, output, || (), |(), _, _| {});
}

/// The convolution, and the moments of its output's channels; see [`Moments`] for an example.
///
/// # Panics
///
/// As [`conv`].
pub fn conv_moments<E: Element>(
    geometry: &Geometry,
    input: &[E],
    weight: &[E::Real],
    output: &mut Vec<E>,
) -> Moments {
    let arch = Arch::new();
    let new = || Moments::new(geometry.channels_out());
    let see = |moments: &mut Moments, channel: usize, values: &[E::Real]| {
        let (mean, squares) = sweeps::moments(arch, values);
        moments.add(channel, values.len(), mean, squares);
    };
    let blocks = conv_seeing(geometry, input, weight, output, new, see);
    blocks.iter().fold(new(), Moments::merge)
}

/// The convolution, with a statistic of each block: `new` makes it, and `see` adds each line of the output
/// to it. Returns the statistics in the blocks' order.
#[allow(unsafe_code)]
fn conv_seeing<E: Element, S: Send>(
    geometry: &Geometry,
    input: &[E],
    weight: &[E::Real],
    output: &mut Vec<E>,
    new: impl Fn() -> S + Sync,
    see: impl Fn(&mut S, usize, &[E::Real]) + Sync,
) -> Vec<S> {
    check(geometry, Some(input), Some(weight));
    let len = geometry.batch() * geometry.output_len();
    let room = room(output, len);
    let seen = match choose::<E>(geometry, Some(weight), None) {
        Chosen::Direct(algorithm) => conv_blocks(&algorithm, input, room, new, see),
        Chosen::Winograd(algorithm) => conv_blocks(&algorithm, input, room, new, see),
        Chosen::Packed(algorithm) => vec![conv_chunks(&algorithm, input, weight, room, new, see)],
        Chosen::Slices(algorithm) => vec![conv_chunks(&algorithm, input, weight, room, new, see)],
    };
    // SAFETY: there is room for `len` values. Each belongs to a block's share, and a block's tiles
    // have pieces for all of its channels and positions, which `conv_blocks` writes. `channels::conv` writes
    // every channel of its chunks, which are all positions.
    unsafe { output.set_len(len) };
    seen
}

fn conv_chunks<E: Element, S>(
    algorithm: &impl ByChannels<E>,
    input: &[E],
    weight: &[E::Real],
    output: &mut [MaybeUninit<E>],
    new: impl Fn() -> S,
    see: impl Fn(&mut S, usize, &[E::Real]),
) -> S {
    let mut seen = new();
    channels::conv(algorithm, input, weight, output, |channel, row| {
        see(&mut seen, channel, row);
    });
    seen
}

fn conv_blocks<E: Element, A: Algorithm<E>, S: Send>(
    algorithm: &A,
    input: &[E],
    output: &mut [MaybeUninit<E>],
    new: impl Fn() -> S + Sync,
    see: impl Fn(&mut S, usize, &[E::Real]) + Sync,
) -> Vec<S> {
    let geometry = algorithm.geometry();
    let blocks = geometry.blocks(BLOCKS);
    let planes = [geometry.channels_out(), geometry.positions()];
    let outputs = shares(output, &blocks, planes, |band| band.outputs.clone());
    let len = geometry.input_len();
    let pool = ScratchPool::<TileScratch<A::Scratch, E>>::new();
    blocks
        .par_iter()
        .zip(outputs)
        .map(|(block, mut output)| {
            let mut seen = new();
            let work = Work {
                block,
                input: Some(&input[block.images.start * len..block.images.end * len]),
                output: Output::Computed,
                grads: None,
            };
            pool.with(|scratch| {
                scratch.run(algorithm, work, |channel, range, line| {
                    output.prefetch_next(&range, geometry.positions());
                    let output = output.get(range).expect("there is no halo");
                    E::write(line, output);
                    see(&mut seen, channel, line);
                });
            });
            seen
        })
        .collect()
}

/// `values = activation(affine(values) + residual)` in place, on `[batch, channels_out, output..]`.
///
/// # Panics
///
/// Panics if a slice is not of the geometry's size.
///
/// # Examples
///
/// ```
/// use burn_conv_bn_cpu::{Activation, Affine, Geometry, normalize};
///
/// let one = [1; 3];
/// let geometry = Geometry::new(1, [1, 1], 1, [1, 1, 3], one, one, [(0, 0); 3], one)?;
/// let affine = Affine { mean: &[2.0], scale: &[10.0], shift: &[1.0] };
/// let mut values = [1.0f32, 2.0, 3.0];
/// normalize(&geometry, &mut values, affine, Some(&[0.0, 0.0, 0.5]), Activation::Relu);
/// assert_eq!(values, [0.0, 1.0, 11.5]);
/// # Ok::<(), burn_conv_bn_cpu::GeometryError>(())
/// ```
pub fn normalize<E: Element>(
    geometry: &Geometry,
    values: &mut [E],
    affine: Affine<'_, E::Real>,
    residual: Option<&[E]>,
    activation: Activation,
) {
    assert_eq!(values.len(), geometry.batch() * geometry.output_len());
    assert!(residual.is_none_or(|residual| residual.len() == values.len()));
    let arch = Arch::new();
    let (len, positions) = (geometry.output_len(), geometry.positions());
    values.par_chunks_exact_mut(len).enumerate().for_each_init(
        Default::default,
        |scratch, (image, values)| {
            let (converted, converted_residual): &mut (Vec<E::Real>, Vec<E::Real>) = scratch;
            for (channel, values) in values.chunks_exact_mut(positions).enumerate() {
                let start = image * len + channel * positions;
                let residual = residual
                    .map(|residual| E::read(&residual[start..][..positions], converted_residual));
                E::update(values, converted, |values| {
                    sweeps::normalize(arch, values, affine.channel(channel), residual, activation);
                });
            }
        },
    );
}
