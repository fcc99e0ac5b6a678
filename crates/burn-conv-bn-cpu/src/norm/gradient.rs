//! Arguments of the backward pass, and the sums between its two steps.

use std::ops::Range;

use crate::conv::check;
use crate::conv::tile::Output;
use crate::pool::backward::Routes;
use crate::{Activation, Affine, Element, Geometry, PoolGeometry};

/// Arguments of both steps of the backward pass.
#[derive(Clone, Copy, Debug)]
pub struct Backward<'a, E: Element> {
    /// Shapes.
    pub geometry: &'a Geometry,
    /// The convolution's input; not required if its output is kept and no weight gradient is requested.
    pub input: Option<&'a [E]>,
    /// The convolution's weight; not required if its output is kept.
    pub weight: Option<&'a [E::Real]>,
    /// Gradient of the output.
    pub output_grad: OutputGrad<'a, E>,
    /// The norm, as in forward.
    pub affine: Affine<'a, E::Real>,
    /// The activation.
    pub activation: Activation,
    /// The residual, if the activation's derivative is computed from the pre-activation.
    pub residual: Option<&'a [E]>,
    /// The output, if the activation's derivative is computed from it: possible for Relu, Relu6 and a
    /// LeakyRelu whose slope is not negative.
    pub output: Option<&'a [E]>,
}

/// Gradient of the output, `[batch, channels_out, output..]`.
#[derive(Clone, Copy, Debug)]
pub enum OutputGrad<'a, E> {
    /// A tensor.
    Whole(&'a [E]),
    /// That of the max pool behind, expanded piece by piece.
    Pooled(PooledGrad<'a, E>),
}

/// The convolution's output in [`grad_sums`](crate::grad_sums) and [`backward`](crate::backward).
#[derive(Debug)]
pub enum ConvOutput<'a, E: Element> {
    /// Recompute it, tile by tile, and store nothing.
    Recompute,
    /// A buffer between the two: `grad_sums` recomputes the output into it, `backward` reads it and may exchange its
    /// memory for the input's gradient.
    Store(&'a mut Vec<E>),
    /// The output that forward kept.
    Kept(&'a [E]),
    /// None: its products with other tensors follow from those of the input, which `grad_sums` leaves in [`Gram`] for
    /// `backward`. For passes that allow it ([`Backward::allows_gram`]), with coefficients.
    Gram(&'a mut Gram<E::Real>),
}

/// The products of the input between the two steps of the backward pass: see [`ConvOutput::Gram`].
#[derive(Clone, Debug, Default)]
pub struct Gram<T> {
    /// Mean of each input channel.
    pub(super) mean: Vec<T>,
    /// `g x'`, `[channels_out, channels_in]`.
    pub(super) output_grad: Vec<T>,
    /// `x x'`, `[channels_in, channels_in]`.
    pub(super) input: Vec<T>,
}

impl<E: Element> ConvOutput<'_, E> {
    /// The same once more: for `grad_sums`, while `backward` is still to come.
    pub fn reborrow(&mut self) -> ConvOutput<'_, E> {
        match self {
            Self::Gram(gram) => ConvOutput::Gram(gram),
            Self::Recompute => ConvOutput::Recompute,
            Self::Store(buffer) => ConvOutput::Store(buffer),
            Self::Kept(values) => ConvOutput::Kept(values),
        }
    }
}

/// The two per-channel sums of the norm's gradient, `[channels_out]` each.
#[derive(Clone, Debug, PartialEq)]
pub struct GradSums {
    /// `sum(g)`.
    pub grad: Vec<f64>,
    /// `sum(g * (z - mean))`.
    pub grad_deviation: Vec<f64>,
}

/// Per-channel coefficients of the gradient of the convolution's output under batch statistics,
/// `scale * g + slope * (z - mean) + offset`, `[channels_out]` each. [The crate's example](crate) computes
/// them from the two sums, for batch norm.
#[derive(Clone, Copy, Debug)]
pub struct InputGradCoefficients<'a, T> {
    /// Of `g`.
    pub scale: &'a [T],
    /// Of `z - mean`.
    pub slope: &'a [T],
    /// Constant.
    pub offset: &'a [T],
}

/// Buffers for the requested gradients; contents are overwritten.
#[derive(Debug)]
pub struct Gradients<'a, E: Element> {
    /// The input's, and the weight of its transposed convolution.
    pub input: Option<(&'a mut Vec<E>, &'a [E::Real])>,
    /// The weight's.
    pub weight: Option<&'a mut Vec<E::Real>>,
    /// The residual's: `g`.
    pub residual: Option<&'a mut Vec<E>>,
}

impl<'a, E: Element> Backward<'a, E> {
    pub(super) fn check(&self, recomputes: bool, wants_weight: bool) {
        check(self.geometry, self.input, self.weight);
        let len = self.output_len();
        let output_grad = match self.output_grad {
            OutputGrad::Whole(values) => Some(values),
            OutputGrad::Pooled(pooled) => {
                pooled.check(self.geometry);
                None
            }
        };
        for values in [output_grad, self.output, self.residual] {
            assert!(values.is_none_or(|values| values.len() == len), "output");
        }
        assert!(
            self.weight.is_some() || !recomputes,
            "the convolution's output can only be recomputed with its weight"
        );
        assert!(
            self.input.is_some() || !(recomputes || wants_weight),
            "the convolution's output can only be recomputed, and its weight's gradient made, with \
             its input"
        );
    }

    /// Values of the output.
    pub(super) fn output_len(&self) -> usize {
        self.geometry.batch() * self.geometry.output_len()
    }

    /// Some images of the input, which [`check`](Self::check) requires where it is read.
    pub(super) fn input(&self, images: &Range<usize>) -> &'a [E] {
        let len = self.geometry.input_len();
        &self.input.unwrap_or_default()[images.start * len..images.end * len]
    }

    /// Some images of the convolution's output.
    pub(super) fn of_images<'b>(
        &self,
        output: Output<'b, E>,
        images: &Range<usize>,
    ) -> Output<'b, E> {
        let len = self.geometry.output_len();
        match output {
            Output::Kept(all) => Output::Kept(&all[images.start * len..images.end * len]),
            other => other,
        }
    }
}

impl GradSums {
    pub(crate) fn new(channels: usize) -> Self {
        Self {
            grad: vec![0.0; channels],
            grad_deviation: vec![0.0; channels],
        }
    }

    /// Adds to one channel's sums.
    pub(crate) fn add(&mut self, channel: usize, [grad, grad_deviation]: [f64; 2]) {
        self.grad[channel] += grad;
        self.grad_deviation[channel] += grad_deviation;
    }

    /// The sum of the blocks' sums, in order.
    pub(crate) fn total(channels: usize, parts: &[Self]) -> Self {
        let mut sums = Self::new(channels);
        for part in parts {
            for (sum, part) in sums.grad.iter_mut().zip(&part.grad) {
                *sum += part;
            }
            for (sum, part) in sums.grad_deviation.iter_mut().zip(&part.grad_deviation) {
                *sum += part;
            }
        }
        sums
    }
}

/// A max pool's input gradient, kept implicit.
#[derive(Clone, Copy, Debug)]
pub struct PooledGrad<'a, E> {
    /// Shapes.
    pub geometry: &'a PoolGeometry,
    /// Gradient of the pool's output.
    pub output_grad: &'a [E],
    /// Argmax of [`normalize_max_pool`](crate::normalize_max_pool).
    pub argmax: &'a [u8],
}

impl<E: Element> PooledGrad<'_, E> {
    pub(crate) fn check(&self, geometry: &Geometry) {
        self.geometry.check_joins(geometry);
        let len = self.geometry.output_len();
        assert_eq!(self.output_grad.len(), len, "the pool's output gradient");
        assert_eq!(self.argmax.len(), len, "the pool's argmax");
    }

    /// Writes the gradient's values from `start` on, counted over all planes.
    pub(crate) fn lay(
        &self,
        routes: &Routes,
        start: usize,
        line: &mut [E::Real],
        converted: &mut Vec<E::Real>,
    ) {
        let (plane_len, pooled_len) = (self.geometry.input_plane(), self.geometry.output_plane());
        let mut laid = 0;
        while laid < line.len() {
            let (plane, from) = ((start + laid) / plane_len, (start + laid) % plane_len);
            let len = (plane_len - from).min(line.len() - laid);
            let of_plane = plane * pooled_len..(plane + 1) * pooled_len;
            routes.lay(
                &self.output_grad[of_plane.clone()],
                &self.argmax[of_plane],
                from..from + len,
                &mut line[laid..laid + len],
                converted,
            );
            laid += len;
        }
    }
}
