//! One channel's values of the convolution's output in the backward pass.

use std::mem::MaybeUninit;

use pulp::Arch;

use super::gradient::{Backward, InputGradCoefficients, OutputGrad};
use crate::conv::span::Span;
use crate::pool::backward::Routes;
use crate::simd::sweeps::{self, Argument, ChannelGrad, Gate};
use crate::{Activation, Element, Real};

/// Arguments that all blocks share.
pub(super) struct Step<'a, E: Element> {
    pub(super) pass: &'a Backward<'a, E>,
    pub(super) coefficients: Option<InputGradCoefficients<'a, E::Real>>,
}

/// Lines in the compute type.
#[derive(Default)]
pub(super) struct Converted<T> {
    /// The output, or the residual.
    output: Vec<T>,
    output_grad: Vec<T>,
    /// Of the max pool behind, if there is one, and a part of its output's gradient.
    routes: Option<Routes>,
    pooled: Vec<T>,
    /// `g` of an activation other than ReLU.
    grad: Vec<T>,
}

/// The output's gradient, and the mask that turns it into `g`.
struct Gated<'a, T> {
    output_grad: &'a [T],
    gate: Gate<'a, T>,
}

/// The gradient of one channel's values. The sweep that reads it applies a ReLU's mask, at no cost beside the
/// memory; another activation's `g` is computed here.
fn gated<'a, E: Element>(
    pass: &Backward<'a, E>,
    channel: usize,
    span: Span,
    conv_output: &[E::Real],
    converted: &'a mut Converted<E::Real>,
) -> Gated<'a, E::Real> {
    let (geometry, len) = (pass.geometry, conv_output.len());
    let output_grad = match pass.output_grad {
        OutputGrad::Whole(all) => span.read(geometry, channel, all, &mut converted.output_grad),
        OutputGrad::Pooled(pooled) => {
            let new = || Routes::new::<E::Real>(pooled.geometry);
            let routes = converted.routes.get_or_insert_with(new);
            let line = &mut converted.output_grad;
            line.resize(len, E::Real::ZERO);
            let mut at = 0;
            for range in span.ranges(geometry, channel) {
                let line = &mut line[at..][..range.len()];
                at += range.len();
                pooled.lay(routes, range.start, line, &mut converted.pooled);
            }
            line
        }
    };
    let gate = match (pass.activation, pass.output, pass.residual) {
        (Activation::Identity, ..) => Gate::Open,
        (Activation::Relu, None, None) => Gate::PreActivation,
        (Activation::Relu, Some(output), _) => {
            Gate::Output(span.read(geometry, channel, output, &mut converted.output))
        }
        (activation, output, residual) => {
            let argument = match output {
                Some(output) => {
                    Argument::Output(span.read(geometry, channel, output, &mut converted.output))
                }
                None => {
                    Argument::PreActivation(residual.map(|residual| {
                        span.read(geometry, channel, residual, &mut converted.output)
                    }))
                }
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

/// The two sums over one channel's values of the convolution's output.
pub(super) fn sums_of<E: Element>(
    pass: &Backward<'_, E>,
    channel: usize,
    span: Span,
    conv_output: &[E::Real],
    converted: &mut Converted<E::Real>,
) -> [f64; 2] {
    let Gated { output_grad, gate } = gated(pass, channel, span, conv_output, converted);
    let affine = pass.affine.channel(channel);
    let (grad, grad_deviation) =
        sweeps::grad_sums(Arch::new(), conv_output, output_grad, affine, gate);
    [grad.to_f64(), grad_deviation.to_f64()]
}

/// Writes the residual's gradient, `g`, of one channel's values. `masked` is scratch.
pub(super) fn write_residual_grad<E: Element>(
    pass: &Backward<'_, E>,
    channel: usize,
    span: Span,
    conv_output: &[E::Real],
    grad: &mut [MaybeUninit<E>],
    converted: &mut Converted<E::Real>,
    masked: &mut Vec<E::Real>,
) {
    let Gated { output_grad, gate } = gated(pass, channel, span, conv_output, converted);
    let argument = match gate {
        Gate::Open => return E::write(output_grad, grad),
        Gate::PreActivation => Argument::PreActivation(None),
        Gate::Output(output) => Argument::Output(output),
    };
    masked.resize(conv_output.len(), E::Real::ZERO);
    let (affine, relu) = (pass.affine.channel(channel), (Activation::Relu, argument));
    sweeps::activation_grad(Arch::new(), conv_output, output_grad, affine, relu, masked);
    E::write(masked, grad);
}

/// Replaces one channel's values of the convolution's output by their gradient.
pub(super) fn conv_output_grad<E: Element>(
    step: &Step<'_, E>,
    channel: usize,
    span: Span,
    line: &mut [E::Real],
    converted: &mut Converted<E::Real>,
) {
    let Gated { output_grad, gate } = gated(step.pass, channel, span, line, converted);
    let affine = step.pass.affine.channel(channel);
    let coefficients = step.coefficients.map(|all| ChannelGrad {
        scale: all.scale[channel],
        slope: all.slope[channel],
        offset: all.offset[channel],
    });
    sweeps::conv_output_grad(Arch::new(), line, output_grad, affine, gate, coefficients);
}
