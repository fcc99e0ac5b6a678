//! Backward kernels, parallel over blocks of images: the norm's two sums, then the gradients.

use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::Arch;
use rayon::prelude::*;

use super::gradient::{
    Backward, ConvOutput, GradSums, Gradients, InputGradCoefficients, OutputGrad,
};
use crate::blocks::{BLOCKS, split};
use crate::conv::tile::{Algorithm, BlockGrads, TileScratch, Work};
use crate::conv::{Chosen, choose};
use crate::pool::backward::Routes;
use crate::scratch::{ScratchPool, room};
use crate::simd::sweeps::{self, Argument, ChannelGrad, Gate};
use crate::{Activation, Element, Real};

/// Most bytes of all blocks' weight gradients; two blocks are allowed in any case.
const WEIGHT_BYTES: usize = 16 << 20;

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

/// [`ConvOutput`] of all blocks, or of one.
enum Source<'a, E> {
    Recompute,
    Store(&'a mut [MaybeUninit<E>]),
    Kept(&'a [E]),
}

fn sum<E: Element>(pass: &Backward<'_, E>, source: Source<'_, E>) -> GradSums {
    let weight = pass.weight.filter(|_| !matches!(source, Source::Kept(_)));
    match choose(pass.geometry, weight, None) {
        Chosen::Direct(algorithm) => sum_blocks(pass, &algorithm, source),
        Chosen::Winograd(algorithm) => sum_blocks(pass, &algorithm, source),
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

impl GradSums {
    /// Adds one channel's values of the convolution's output, at offset `start` of the tensor.
    fn add<E: Element>(
        &mut self,
        pass: &Backward<'_, E>,
        channel: usize,
        start: usize,
        conv_output: &[E::Real],
        converted: &mut Converted<E::Real>,
    ) {
        let Gated { output_grad, gate } = gated(pass, channel, start, conv_output, converted);
        let (grad, grad_deviation) = sweeps::grad_sums(
            Arch::new(),
            conv_output,
            output_grad,
            pass.affine.channel(channel),
            gate,
        );
        self.grad[channel] += grad.to_f64();
        self.grad_deviation[channel] += grad_deviation.to_f64();
    }
}

/// The output's gradient, and the mask that turns it into `g`.
struct Gated<'a, T> {
    output_grad: &'a [T],
    gate: Gate<'a, T>,
}

/// The gradient of one channel's values at offset `start` of the tensor. The sweep that reads it applies a
/// ReLU's mask, at no cost beside the memory; another activation's `g` is computed here.
fn gated<'a, E: Element>(
    pass: &Backward<'a, E>,
    channel: usize,
    start: usize,
    conv_output: &[E::Real],
    converted: &'a mut Converted<E::Real>,
) -> Gated<'a, E::Real> {
    let len = conv_output.len();
    let output_grad = match pass.output_grad {
        OutputGrad::Whole(all) => E::read(&all[start..][..len], &mut converted.output_grad),
        OutputGrad::Pooled(pooled) => {
            let new = || Routes::new::<E::Real>(pooled.geometry);
            let routes = converted.routes.get_or_insert_with(new);
            let line = &mut converted.output_grad;
            line.resize(len, E::Real::ZERO);
            pooled.lay(routes, start, line, &mut converted.pooled);
            line
        }
    };
    let gate = match (pass.activation, pass.output, pass.residual) {
        (Activation::Identity, ..) => Gate::Open,
        (Activation::Relu, None, None) => Gate::PreActivation,
        (Activation::Relu, Some(output), _) => {
            Gate::Output(E::read(&output[start..][..len], &mut converted.output))
        }
        (activation, output, residual) => {
            let argument = match output {
                Some(output) => {
                    Argument::Output(E::read(&output[start..][..len], &mut converted.output))
                }
                None => Argument::PreActivation(
                    residual
                        .map(|residual| E::read(&residual[start..][..len], &mut converted.output)),
                ),
            };
            let grad = &mut converted.grad;
            grad.resize(len, E::Real::ZERO);
            sweeps::activation_grad(
                Arch::new(),
                conv_output,
                output_grad,
                pass.affine.channel(channel),
                (activation, argument),
                grad,
            );
            return Gated {
                output_grad: grad,
                gate: Gate::Open,
            };
        }
    };
    Gated { output_grad, gate }
}

/// Second step of the backward pass: the gradients, from the norm's coefficients. The convolution's output
/// `z` is `kept` or recomputed. [The crate's example](crate) shows both steps.
///
/// Under fixed statistics there are no coefficients: the gradient of `z` is `g`, and the input's weight
/// already contains the scale. If the activation's derivative does not depend on `z` either, the values of
/// `kept` are irrelevant.
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
    let input_weight = gradients.input.as_ref().map(|(_, weight)| *weight);
    match choose(geometry, weight, input_weight) {
        Chosen::Direct(algorithm) => {
            backward_blocks(pass, &algorithm, kept, coefficients, gradients);
        }
        Chosen::Winograd(algorithm) => {
            backward_blocks(pass, &algorithm, kept, coefficients, gradients);
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
    let most = WEIGHT_BYTES
        .checked_div(sums_len * size_of::<E::Real>())
        .map_or(BLOCKS, |most| most.clamp(2, BLOCKS));
    let images = geometry.images_per_block(most);
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
        // SAFETY: there is room for so many values, all of which belong to the blocks; and of a
        // block, all is written once the last tile of the last group is done.
        unsafe { grad.set_len(batch * input_len) };
    }
    if let Some(grad) = gradients.residual {
        // SAFETY: there is room for so many values, all of which belong to the blocks; and a block's
        // tiles have pieces for all of its channels and positions, which `conv_output_grad` writes.
        unsafe { grad.set_len(batch * output_len) };
    }
}

/// Arguments that all blocks share.
struct Step<'a, E: Element> {
    pass: &'a Backward<'a, E>,
    coefficients: Option<InputGradCoefficients<'a, E::Real>>,
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

/// Lines in the compute type.
#[derive(Default)]
struct Converted<T> {
    /// The output, or the residual.
    output: Vec<T>,
    output_grad: Vec<T>,
    /// Of the max pool behind, if there is one, and a part of its output's gradient.
    routes: Option<Routes>,
    pooled: Vec<T>,
    /// `g` of an activation other than ReLU.
    grad: Vec<T>,
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
            sums.add(pass, channel, at, values, converted);
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
            let residual_grad = residual_grad.as_deref_mut();
            let residual_grad = residual_grad.map(|grad| &mut grad[range]);
            conv_output_grad(step, channel, at, line, residual_grad, converted, masked);
        });
    }
}

/// Replaces a line of the convolution's output, at offset `at` of the tensor, by its gradient, and writes
/// the residual's. `masked` is scratch.
fn conv_output_grad<E: Element>(
    step: &Step<'_, E>,
    channel: usize,
    at: usize,
    line: &mut [E::Real],
    residual_grad: Option<&mut [MaybeUninit<E>]>,
    converted: &mut Converted<E::Real>,
    masked: &mut Vec<E::Real>,
) {
    let pass = step.pass;
    let arch = Arch::new();
    let Gated { output_grad, gate } = gated(pass, channel, at, line, converted);
    let affine = pass.affine.channel(channel);
    let coefficients = step.coefficients.map(|all| ChannelGrad {
        scale: all.scale[channel],
        slope: all.slope[channel],
        offset: all.offset[channel],
    });
    if let Some(grad) = residual_grad {
        let argument = match gate {
            Gate::Open => None,
            Gate::PreActivation => Some(Argument::PreActivation(None)),
            Gate::Output(output) => Some(Argument::Output(output)),
        };
        match argument {
            None => E::write(output_grad, grad),
            Some(argument) => {
                masked.resize(line.len(), E::Real::ZERO);
                let relu = (Activation::Relu, argument);
                sweeps::activation_grad(arch, line, output_grad, affine, relu, masked);
                E::write(masked, grad);
            }
        }
    }
    sweeps::conv_output_grad(arch, line, output_grad, affine, gate, coefficients);
}
