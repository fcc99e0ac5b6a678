//! Backward kernels, parallel over blocks of images: the norm's two sums, then the gradients.

use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::Arch;
use rayon::prelude::*;

use super::channels;
use super::gradient::{Backward, ConvOutput, GradSums, Gradients, InputGradCoefficients};
use super::lines::{Converted, Source, Step, conv_output_grad, sums_of, write_residual_grad};
use crate::blocks::{BLOCKS, split};
use crate::conv::span::Span;
use crate::conv::tile::{Algorithm, BlockGrads, TileScratch, Transposed, Work};
use crate::conv::{Chosen, choose, weight_blocks};
use crate::scratch::{ScratchPool, room};
use crate::simd::sweeps;
use crate::{Element, Real};

/// Values of the weight's gradient that a thread reduces at a time: 64 KiB in single precision.
const SUMS: usize = 16 << 10;

/// First step of the backward pass: the sums of `g` and of `g * (z - mean)`, with the convolution's
/// output `z` recomputed or kept. [The crate's example](crate) shows both steps.
///
/// # Panics
///
/// Panics if a slice is not of the geometry's size, or if `z` is to be recomputed without the input
/// or the weight.
///
/// # Examples
///
/// ```
/// use burn_conv_bn_cpu::{
///     Activation, Affine, Backward, ConvOutput, Geometry, OutputGrad, grad_sums,
/// };
///
/// // A line of three pixels and a weight of 2: z is 2, 4, 6, and its mean 4.
/// let one = [1; 3];
/// let geometry = Geometry::new(1, [1, 1], 1, [1, 1, 3], one, one, [(0, 0); 3], one)?;
/// let pass = Backward::<f32> {
///     geometry: &geometry,
///     input: Some(&[1.0, 2.0, 3.0]),
///     weight: Some(&[2.0]),
///     output_grad: OutputGrad::Whole(&[5.0, 5.0, 3.0]),
///     affine: Affine { mean: &[4.0], scale: &[0.5], shift: &[0.0] },
///     activation: Activation::Relu,
///     residual: None,
///     output: None,
/// };
/// // The norm makes them -1, 0, 1; ReLU passes the last one's gradient.
/// let mut z = Vec::new();
/// let sums = grad_sums(&pass, ConvOutput::Store(&mut z));
/// assert_eq!(sums.grad, [3.0]);
/// assert_eq!(sums.grad_deviation, [3.0 * (6.0 - 4.0)]);
/// assert_eq!(z, [2.0, 4.0, 6.0]);
/// # Ok::<(), burn_conv_bn_cpu::GeometryError>(())
/// ```
#[allow(unsafe_code)]
pub fn grad_sums<E: Element>(pass: &Backward<'_, E>, conv_output: ConvOutput<'_, E>) -> GradSums {
    let recomputes = !matches!(conv_output, ConvOutput::Kept(_));
    pass.check(recomputes, false);
    let len = pass.output_len();
    match conv_output {
        ConvOutput::Recompute => sum(pass, Source::Recompute),
        ConvOutput::Kept(values) => {
            assert_eq!(values.len(), len);
            sum(pass, Source::Kept(values))
        }
        ConvOutput::Store(buffer) => {
            let sums = sum(pass, Source::Store(room(buffer, len)));
            // SAFETY: there is room for `len` values, all of which belong to the blocks; and a
            // block's tiles have pieces for all of its channels and positions, which `sum_block`
            // writes.
            unsafe { buffer.set_len(len) };
            sums
        }
    }
}

fn sum<E: Element>(pass: &Backward<'_, E>, source: Source<'_, E>) -> GradSums {
    let weight = pass.weight.filter(|_| !matches!(source, Source::Kept(_)));
    match choose::<E>(pass.geometry, weight, None) {
        Chosen::Direct(algorithm) => sum_blocks(pass, &algorithm, source),
        Chosen::Winograd(algorithm) => sum_blocks(pass, &algorithm, source),
        Chosen::Packed(algorithm) => channels::sum(pass, &algorithm, source),
        Chosen::Slices(algorithm) => channels::sum(pass, &algorithm, source),
    }
}

fn sum_blocks<E: Element, A: Algorithm<E>>(
    pass: &Backward<'_, E>,
    algorithm: &A,
    source: Source<'_, E>,
) -> GradSums {
    let geometry = pass.geometry;
    let images = geometry.images_per_block(BLOCKS);
    let len = images * geometry.output_len();
    let blocks = geometry.blocks(images);
    let sources: Vec<Source<'_, E>> = match source {
        Source::Recompute => blocks.iter().map(|_| Source::Recompute).collect(),
        Source::Store(all) => all.chunks_mut(len).map(Source::Store).collect(),
        Source::Kept(all) => all.chunks(len).map(Source::Kept).collect(),
    };
    let pool = ScratchPool::<Scratch<A::Scratch, E>>::new();
    let parts: Vec<GradSums> = blocks
        .into_par_iter()
        .zip(sources)
        .map(|(images, source)| {
            pool.with(|scratch| {
                let mut sums = GradSums::new(geometry.channels_out());
                scratch.sum_block(pass, algorithm, &images, source, &mut sums);
                sums
            })
        })
        .collect();
    GradSums::total(geometry.channels_out(), &parts)
}

/// Second step of the backward pass: the gradients, from the norm's coefficients. The convolution's output
/// `z` is `kept` or recomputed. [The crate's example](crate) shows both steps.
///
/// Under fixed statistics there are no coefficients. The input's gradient is formed from the norm's scale times
/// `g`. The weight's gradient is formed from `g` alone: it is the gradient of the weight with the norm folded in.
/// If the activation's derivative does not depend on `z` either, the values of `kept` are irrelevant.
///
/// # Panics
///
/// Panics if a slice is not of the geometry's size, if `z` is to be recomputed without the input or
/// the weight, or if the weight's gradient is requested without the input.
pub fn backward<E: Element>(
    pass: &Backward<'_, E>,
    kept: Option<&[E]>,
    coefficients: Option<InputGradCoefficients<'_, E::Real>>,
    gradients: Gradients<'_, E>,
) {
    let geometry = pass.geometry;
    pass.check(kept.is_none(), gradients.weight.is_some());
    assert!(kept.is_none_or(|kept| kept.len() == pass.output_len()));
    if let Some((_, weight)) = &gradients.input {
        assert_eq!(weight.len(), geometry.weight_len());
    }
    let weight = pass.weight.filter(|_| kept.is_none());
    let scale = coefficients.is_none().then_some(pass.affine.scale);
    let transposed = gradients
        .input
        .as_ref()
        .map(|(_, weight)| Transposed { weight, scale });
    let step = Step { pass, coefficients };
    match choose::<E>(geometry, weight, transposed) {
        Chosen::Direct(algorithm) => {
            backward_blocks(pass, &algorithm, kept, coefficients, gradients);
        }
        Chosen::Winograd(algorithm) => {
            backward_blocks(pass, &algorithm, kept, coefficients, gradients);
        }
        Chosen::Packed(algorithm) => {
            channels::backward(&step, &algorithm, kept, scale, gradients);
        }
        Chosen::Slices(algorithm) => {
            channels::backward(&step, &algorithm, kept, scale, gradients);
        }
    }
}

#[allow(unsafe_code)]
fn backward_blocks<E: Element, A: Algorithm<E>>(
    pass: &Backward<'_, E>,
    algorithm: &A,
    kept: Option<&[E]>,
    coefficients: Option<InputGradCoefficients<'_, E::Real>>,
    mut gradients: Gradients<'_, E>,
) {
    let geometry = pass.geometry;
    let step = Step { pass, coefficients };
    let sums_len = match &gradients.weight {
        Some(_) => algorithm.weight_grad_len(),
        None => 0,
    };
    let images = geometry.images_per_block(match sums_len {
        0 => BLOCKS,
        _ => weight_blocks::<E, A>(algorithm),
    });
    let blocks = geometry.blocks(images);
    let (input_len, output_len) = (geometry.input_len(), geometry.output_len());
    let batch = geometry.batch();
    let input = gradients.input.as_mut();
    let input = input.map(|(grad, _)| room(grad, batch * input_len));
    let input_blocks = split(input, images * input_len, blocks.len());
    let residual = gradients.residual.as_mut();
    let residual = residual.map(|grad| room(grad, batch * output_len));
    let residual_blocks = split(residual, images * output_len, blocks.len());
    let pool = ScratchPool::<Scratch<A::Scratch, E>>::new();
    let parts: Vec<Vec<E::Real>> = blocks
        .into_par_iter()
        .zip(input_blocks)
        .zip(residual_blocks)
        .map(|((images, input_grad), residual_grad)| {
            pool.with(|scratch| {
                let mut sums = vec![E::Real::ZERO; sums_len];
                let outputs = images.start * output_len..images.end * output_len;
                scratch.backward_block(
                    &step,
                    algorithm,
                    Block {
                        images,
                        conv_output: kept.map(|kept| &kept[outputs]),
                        input_grad,
                        weight_grad: (!sums.is_empty()).then_some(sums.as_mut_slice()),
                        residual_grad,
                    },
                );
                sums
            })
        })
        .collect();
    if let Some(grad) = gradients.weight {
        let mut parts = parts.into_iter();
        let mut sums = parts.next().unwrap_or_default();
        let parts: Vec<_> = parts.collect();
        sums.par_chunks_mut(SUMS)
            .enumerate()
            .for_each(|(index, sums)| {
                for part in &parts {
                    sweeps::add(Arch::new(), sums, &part[index * SUMS..][..sums.len()]);
                }
            });
        algorithm.weight_grad(sums, grad);
    }
    if let Some((grad, _)) = gradients.input {
        // SAFETY: the capacity is at least this length, and every value belongs to a block; and of a
        // block, all is written once the last tile of the last group is done.
        unsafe { grad.set_len(batch * input_len) };
    }
    if let Some(grad) = gradients.residual {
        // SAFETY: the capacity is at least this length, and every value belongs to a block; and a block's
        // tiles have pieces for all of its channels and positions, which `conv_output_grad` writes.
        unsafe { grad.set_len(batch * output_len) };
    }
}

/// A block of images and its share of [`Gradients`].
struct Block<'a, E: Element> {
    images: Range<usize>,
    /// The convolution's output, if it was kept.
    conv_output: Option<&'a [E]>,
    input_grad: Option<&'a mut [MaybeUninit<E>]>,
    /// In the algorithm's own form; added to.
    weight_grad: Option<&'a mut [E::Real]>,
    residual_grad: Option<&'a mut [MaybeUninit<E>]>,
}

/// Buffers of one thread.
#[derive(Default)]
struct Scratch<S, E: Element> {
    tiles: TileScratch<S, E>,
    converted: Converted<E::Real>,
    residual_grad: Vec<E::Real>,
}

impl<S: Default, E: Element> Scratch<S, E> {
    /// Adds a block to the sums, piece by piece whether `z` is kept or recomputed: the bits are the same.
    fn sum_block<A: Algorithm<E, Scratch = S>>(
        &mut self,
        pass: &Backward<'_, E>,
        algorithm: &A,
        images: &Range<usize>,
        mut source: Source<'_, E>,
        sums: &mut GradSums,
    ) {
        let start = images.start * pass.geometry.output_len();
        let recomputes = !matches!(source, Source::Kept(_));
        let work = Work {
            images: images.len(),
            input: recomputes.then(|| pass.input(images)),
            convolves: recomputes,
            grads: None,
        };
        let converted = &mut self.converted;
        self.tiles.run(algorithm, work, |channel, range, line| {
            let at = start + range.start;
            let values: &[E::Real] = match &mut source {
                Source::Kept(block) => E::read(&block[range], line),
                Source::Recompute => line,
                Source::Store(block) => {
                    E::write(line, &mut block[range]);
                    line
                }
            };
            let span = Span::of_tensor(pass.geometry, at, values.len());
            sums.add(channel, sums_of(pass, channel, span, values, converted));
        });
    }

    fn backward_block<A: Algorithm<E, Scratch = S>>(
        &mut self,
        step: &Step<'_, E>,
        algorithm: &A,
        block: Block<'_, E>,
    ) {
        let Block {
            images,
            conv_output,
            input_grad,
            weight_grad,
            mut residual_grad,
        } = block;
        let start = images.start * step.pass.geometry.output_len();
        let loads = conv_output.is_none() || weight_grad.is_some();
        let work = Work {
            images: images.len(),
            input: loads.then(|| step.pass.input(&images)),
            convolves: conv_output.is_none(),
            grads: Some(BlockGrads {
                weight: weight_grad,
                input: input_grad,
            }),
        };
        let (converted, masked) = (&mut self.converted, &mut self.residual_grad);
        self.tiles.run(algorithm, work, |channel, range, line| {
            let at = start + range.start;
            if let Some(kept) = conv_output {
                line.resize(range.len(), E::Real::ZERO);
                E::load(&kept[range.clone()], line);
            }
            let span = Span::of_tensor(step.pass.geometry, at, range.len());
            if let Some(grad) = residual_grad.as_deref_mut() {
                let pass = step.pass;
                write_residual_grad(
                    pass,
                    channel,
                    span,
                    line,
                    &mut grad[range],
                    converted,
                    masked,
                );
            }
            conv_output_grad(step, channel, span, line, converted);
        });
    }
}
