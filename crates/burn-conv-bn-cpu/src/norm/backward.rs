//! The two steps of the backward pass: the norm's two sums, then the gradients.

use std::mem::{MaybeUninit, swap};

use super::gradient::{Backward, ConvOutput, GradSums, Gradients, InputGradCoefficients};
use super::lines::Step;
use super::{channels, tiles};
use crate::Element;
use crate::conv::tile::{Output, Transposed};
use crate::conv::{Chosen, choose};
use crate::scratch::room;

/// First step of the backward pass: the sums of `g` and of `g * (z - mean)`, with the convolution's
/// output `z` recomputed or kept. [The crate's example](crate) shows both steps.
///
/// # Panics
///
/// Panics if a slice is not of the geometry's size, if `z` is to be recomputed without the input
/// or the weight, or if [`ConvOutput::Gram`] meets a pass that does not allow it.
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
        ConvOutput::Recompute => sum(pass, Output::Computed, None),
        ConvOutput::Gram(gram) => match gram.sum(pass) {
            Some(sums) => sums,
            None => sum(pass, Output::Computed, None),
        },
        ConvOutput::Kept(values) => {
            assert_eq!(values.len(), len);
            sum(pass, Output::Kept(values), None)
        }
        ConvOutput::Store(buffer) => {
            let sums = sum(pass, Output::Computed, Some(room(buffer, len)));
            // SAFETY: there is room for `len` values. Each belongs to a block's share, and a
            // block's tiles have pieces for all of its channels and positions, which `sum_block`
            // writes.
            unsafe { buffer.set_len(len) };
            sums
        }
    }
}

fn sum<E: Element>(
    pass: &Backward<'_, E>,
    output: Output<'_, E>,
    stored: Option<&mut [MaybeUninit<E>]>,
) -> GradSums {
    let weight = pass.weight.filter(|_| matches!(output, Output::Computed));
    match choose::<E>(pass.geometry, weight, None) {
        Chosen::Direct(algorithm) => tiles::sum(pass, &algorithm, output, stored),
        Chosen::Winograd(algorithm) => tiles::sum(pass, &algorithm, output, stored),
        Chosen::Packed(algorithm) => channels::sum(pass, &algorithm, output, stored),
        Chosen::Slices(algorithm) => channels::sum(pass, &algorithm, output, stored),
    }
}

/// Second step of the backward pass: the gradients, from the norm's coefficients. [The crate's example](crate) shows
/// both steps.
///
/// [`ConvOutput::Store`] is the buffer that [`grad_sums`] filled. If the convolution changes no shape and its input's
/// gradient is requested, that gradient takes the buffer's memory: its values replace the output's, image by image,
/// and the buffer has the memory of `gradients` instead. Blocks that are bands of an image read each other's output,
/// and leave the buffer as it is.
///
/// Under fixed statistics there are no coefficients. The input's gradient is formed from the norm's scale times
/// `g`. The weight's gradient is formed from `g` alone: it is the gradient of the weight with the norm folded in.
/// If the activation's derivative does not depend on `z` either, the values of `conv_output` are irrelevant.
///
/// # Panics
///
/// Panics if a slice is not of the geometry's size, if `z` is to be recomputed without the input or
/// the weight, or if the weight's gradient is requested without the input,
/// or if [`ConvOutput::Gram`] comes without coefficients.
pub fn backward<E: Element>(
    pass: &Backward<'_, E>,
    conv_output: ConvOutput<'_, E>,
    coefficients: Option<InputGradCoefficients<'_, E::Real>>,
    mut gradients: Gradients<'_, E>,
) {
    let geometry = pass.geometry;
    let recomputes = matches!(conv_output, ConvOutput::Recompute | ConvOutput::Gram(_));
    pass.check(recomputes, gradients.weight.is_some());
    if let Some((_, weight)) = &gradients.input {
        assert_eq!(weight.len(), geometry.weight_len());
    }
    let output = match (conv_output, &mut gradients.input) {
        (ConvOutput::Gram(gram), _) if gram.is_filled() => {
            let coefficients = coefficients.expect("ConvOutput::Gram requires coefficients");
            return gram.backward(pass, coefficients, gradients);
        }
        (ConvOutput::Recompute | ConvOutput::Gram(_), _) => Output::Computed,
        (ConvOutput::Kept(kept), _) => {
            assert_eq!(kept.len(), pass.output_len());
            Output::Kept(kept)
        }
        (ConvOutput::Store(stored), input) => {
            assert_eq!(stored.len(), pass.output_len());
            match input {
                Some((grad, _)) if geometry.overwrites_output() => {
                    swap(*grad, stored);
                    Output::Overwritten
                }
                _ => Output::Kept(stored),
            }
        }
    };
    let weight = pass.weight.filter(|_| recomputes);
    let scale = coefficients.is_none().then_some(pass.affine.scale);
    let transposed = gradients
        .input
        .as_ref()
        .map(|(_, weight)| Transposed { weight, scale });
    let step = Step { pass, coefficients };
    match choose::<E>(geometry, weight, transposed) {
        Chosen::Direct(algorithm) => tiles::backward(&step, &algorithm, output, gradients),
        Chosen::Winograd(algorithm) => tiles::backward(&step, &algorithm, output, gradients),
        Chosen::Packed(algorithm) => {
            channels::backward(&step, &algorithm, output, scale, gradients);
        }
        Chosen::Slices(algorithm) => {
            channels::backward(&step, &algorithm, output, scale, gradients);
        }
    }
}
