//! The norm over `[batch, channels, positions]`, with no convolution before it: forward beside backward.

use pulp::Arch;
use rayon::prelude::*;

use crate::blocks::BLOCKS;
use crate::element::write_vectorized;
use crate::scratch::room;
use crate::simd::sweeps::{self, Argument, ChannelAffine, ChannelGrad, Gate};
use crate::{
    Activation, Affine, Element, Geometry, GradSums, InputGradCoefficients, Moments, Real,
};

/// Sizes of a norm's input, `[batch, channels, positions]`, none of them zero.
///
/// ```
/// use burn_conv_bn_cpu::{Planes, moments};
///
/// let planes = Planes { batch: 2, channels: 1, positions: 2 };
/// let moments = moments(planes, &[1.0f32, 2.0, 3.0, 6.0]);
/// assert_eq!(moments.mean, [3.0]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planes {
    /// Number of images.
    pub batch: usize,
    /// Number of channels.
    pub channels: usize,
    /// Values of one channel of an image.
    pub positions: usize,
}

impl From<&Geometry> for Planes {
    /// Sizes of the convolution's output.
    fn from(geometry: &Geometry) -> Self {
        Self {
            batch: geometry.batch(),
            channels: geometry.channels_out(),
            positions: geometry.positions(),
        }
    }
}

impl Planes {
    fn len(self) -> usize {
        self.batch * self.channels * self.positions
    }

    /// Values of a block of images, the unit of sums: results do not depend on the number of threads.
    fn block_len(self) -> usize {
        self.batch.div_ceil(BLOCKS) * self.channels * self.positions
    }
}

/// Mean and squared deviations of each channel.
///
/// # Panics
///
/// Panics if `values` is not of the planes' size.
pub fn moments<E: Element>(planes: Planes, values: &[E]) -> Moments {
    assert_eq!(values.len(), planes.len());
    let new = || Moments::new(planes.channels);
    let parts: Vec<Moments> = values
        .par_chunks(planes.block_len())
        .map_init(Vec::<E::Real>::new, |scratch, block| {
            let mut moments = new();
            for (plane, values) in block.chunks_exact(planes.positions).enumerate() {
                let (mean, squares) = sweeps::moments(Arch::new(), E::read(values, scratch));
                moments.add(plane % planes.channels, planes.positions, mean, squares);
            }
            moments
        })
        .collect();
    parts.iter().fold(new(), Moments::merge)
}

/// `output = activation(affine(input) + residual)`, as [`normalize`](crate::normalize) does in place and with
/// its bits. Contents of `output` are overwritten.
///
/// # Panics
///
/// Panics if a slice is not of the planes' size.
///
/// # Examples
///
/// ```
/// use burn_conv_bn_cpu::{Activation, Affine, Planes, normalize_into};
///
/// let planes = Planes { batch: 1, channels: 1, positions: 3 };
/// let affine = Affine { mean: &[2.0], scale: &[10.0], shift: &[1.0] };
/// let mut output = Vec::new();
/// normalize_into(planes, &[1.0f32, 2.0, 3.0], affine, None, Activation::Relu, &mut output);
/// assert_eq!(output, [0.0, 1.0, 11.0]);
/// ```
#[allow(unsafe_code)]
pub fn normalize_into<E: Element>(
    planes: Planes,
    input: &[E],
    affine: Affine<'_, E::Real>,
    residual: Option<&[E]>,
    activation: Activation,
    output: &mut Vec<E>,
) {
    let (len, positions) = (planes.len(), planes.positions);
    assert_eq!(input.len(), len);
    assert!(residual.is_none_or(|residual| residual.len() == len));
    room(output, len)
        .par_chunks_exact_mut(positions)
        .zip(input.par_chunks_exact(positions))
        .enumerate()
        .for_each_init(Default::default, |scratch, (plane, (output, input))| {
            let (line, converted): &mut (Vec<E::Real>, Vec<E::Real>) = scratch;
            line.resize(positions, E::Real::ZERO);
            E::load(input, line);
            let residual = residual
                .map(|residual| E::read(&residual[plane * positions..][..positions], converted));
            let affine = affine.channel(plane % planes.channels);
            sweeps::normalize(Arch::new(), line, affine, residual, activation);
            write_vectorized(line, output);
        });
    // SAFETY: there is room for `len` values, a multiple of `positions`, and each plane was written.
    unsafe { output.set_len(len) };
}

/// Arguments of both steps of the norm's backward pass.
#[derive(Clone, Copy, Debug)]
pub struct NormBackward<'a, E: Element> {
    /// Sizes of all tensors.
    pub planes: Planes,
    /// Gradient of the output.
    pub output_grad: &'a [E],
    /// The norm, as in forward.
    pub affine: Affine<'a, E::Real>,
    /// The activation.
    pub activation: Activation,
}

impl<E: Element> NormBackward<'_, E> {
    /// The output's gradient of a plane.
    fn output_grad<'a>(&'a self, plane: usize, converted: &'a mut Vec<E::Real>) -> &'a [E::Real] {
        let positions = self.planes.positions;
        E::read(
            &self.output_grad[plane * positions..][..positions],
            converted,
        )
    }

    /// The gradient of a plane and the mask that turns it into `g`. A ReLU's mask costs the sweep nothing;
    /// another activation's `g` is computed into `grad`.
    fn gated<'a>(
        &self,
        affine: ChannelAffine<E::Real>,
        input: &[E::Real],
        output_grad: &'a [E::Real],
        grad: &'a mut Vec<E::Real>,
    ) -> (&'a [E::Real], Gate<'a, E::Real>) {
        match self.activation {
            Activation::Identity => (output_grad, Gate::Open),
            Activation::Relu => (output_grad, Gate::PreActivation),
            activation => {
                grad.resize(input.len(), E::Real::ZERO);
                let argument = Argument::PreActivation(None);
                sweeps::activation_grad(
                    Arch::new(),
                    input,
                    output_grad,
                    affine,
                    (activation, argument),
                    grad,
                );
                (grad, Gate::Open)
            }
        }
    }
}

/// First step of the norm's backward pass: the sums of `g` and of `g * (input - mean)`.
///
/// # Panics
///
/// Panics if a slice is not of the planes' size.
///
/// # Examples
///
/// ```
/// use burn_conv_bn_cpu::{Activation, Affine, NormBackward, Planes, norm_grad_sums};
///
/// let pass = NormBackward::<f32> {
///     planes: Planes { batch: 1, channels: 1, positions: 3 },
///     output_grad: &[5.0, 5.0, 3.0],
///     affine: Affine { mean: &[4.0], scale: &[0.5], shift: &[0.0] },
///     activation: Activation::Relu,
/// };
/// // The norm makes them -1, 0, 1; ReLU passes the last one's gradient.
/// let sums = norm_grad_sums(&pass, &[2.0, 4.0, 6.0]);
/// assert_eq!(sums.grad, [3.0]);
/// assert_eq!(sums.grad_deviation, [3.0 * (6.0 - 4.0)]);
/// ```
pub fn norm_grad_sums<E: Element>(pass: &NormBackward<'_, E>, input: &[E]) -> GradSums {
    let planes = pass.planes;
    assert_eq!(input.len(), planes.len());
    assert_eq!(pass.output_grad.len(), planes.len());
    let planes_per_block = planes.block_len() / planes.positions;
    let parts: Vec<GradSums> = input
        .par_chunks(planes.block_len())
        .enumerate()
        .map_init(Default::default, |scratch, (block, values)| {
            let (line, converted, grad): &mut (Vec<_>, Vec<_>, Vec<_>) = scratch;
            let mut sums = GradSums::new(planes.channels);
            for (index, values) in values.chunks_exact(planes.positions).enumerate() {
                // A block begins with an image.
                let channel = index % planes.channels;
                let affine = pass.affine.channel(channel);
                let input = E::read(values, line);
                let output_grad = pass.output_grad(block * planes_per_block + index, converted);
                let (output_grad, gate) = pass.gated(affine, input, output_grad, grad);
                let (grad, product) =
                    sweeps::grad_sums(Arch::new(), input, output_grad, affine, gate);
                sums.grad[channel] += grad.to_f64();
                sums.grad_deviation[channel] += product.to_f64();
            }
            sums
        })
        .collect();
    GradSums::total(planes.channels, &parts)
}

/// Second step of the norm's backward pass: replaces the norm's input by its gradient.
///
/// Without coefficients the statistics are constants, and the gradient is `affine.scale * g`.
///
/// # Panics
///
/// Panics if a slice is not of the planes' size.
///
/// # Examples
///
/// ```
/// use burn_conv_bn_cpu::{Activation, Affine, NormBackward, Planes, norm_input_grad};
///
/// let pass = NormBackward::<f32> {
///     planes: Planes { batch: 1, channels: 1, positions: 3 },
///     output_grad: &[5.0, 5.0, 3.0],
///     affine: Affine { mean: &[4.0], scale: &[0.5], shift: &[0.0] },
///     activation: Activation::Relu,
/// };
/// let mut values = [2.0, 4.0, 6.0];
/// norm_input_grad(&pass, None, &mut values);
/// assert_eq!(values, [0.0, 0.0, 1.5]);
/// ```
pub fn norm_input_grad<E: Element>(
    pass: &NormBackward<'_, E>,
    coefficients: Option<InputGradCoefficients<'_, E::Real>>,
    values: &mut [E],
) {
    let planes = pass.planes;
    assert_eq!(values.len(), planes.len());
    assert_eq!(pass.output_grad.len(), planes.len());
    values
        .par_chunks_exact_mut(planes.positions)
        .enumerate()
        .for_each_init(Default::default, |scratch, (plane, values)| {
            let (line, converted, grad): &mut (Vec<_>, Vec<_>, Vec<_>) = scratch;
            let channel = plane % planes.channels;
            let affine = pass.affine.channel(channel);
            let coefficients = coefficients.map(|all| ChannelGrad {
                scale: all.scale[channel],
                slope: all.slope[channel],
                offset: all.offset[channel],
            });
            let output_grad = pass.output_grad(plane, converted);
            E::update(values, line, |values| {
                let (output_grad, gate) = pass.gated(affine, values, output_grad, grad);
                let arch = Arch::new();
                sweeps::conv_output_grad(arch, values, output_grad, affine, gate, coefficients);
                if coefficients.is_none() {
                    for value in values {
                        *value = *value * affine.scale;
                    }
                }
            });
        });
}
