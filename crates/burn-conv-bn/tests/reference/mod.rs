//! The fused op in plain loops, forward and backward: what the test programs beside this folder
//! compare with.
//!
//! It is written to be read. Tensors are flat vectors in row-major order, each formula of
//! `docs/derivation.md` is a loop, and nothing is shared with the code that is tested. It computes
//! with `f64`, or with a [`ball::Ball`], an `f64` that carries a bound on what rounding may do to
//! it. `checks` holds it against cases worked out by hand and against central differences.

#![allow(dead_code, reason = "each test program uses a part of this")]

pub mod ball;
pub mod case;

use std::ops::{Add, AddAssign, Div, Mul, Sub};

use burn::tensor::{DType, bf16, f16};
use burn_conv_bn::{Activation, ConvBnOptions, NormSpec, NormVariant};

/// What the reference computes with.
pub trait Number:
    Copy + Add<Output = Self> + AddAssign + Div<Output = Self> + Mul<Output = Self> + Sub<Output = Self>
{
    /// A constant.
    fn exact(value: f64) -> Self;

    /// The value, without what is known of its error.
    fn value(self) -> f64;

    /// Whether this is 0, and nothing else.
    fn is_zero(self) -> bool;

    /// The square root.
    fn sqrt(self) -> Self;

    /// `value`, a function of this number that changes by no more than `steepest` times as much.
    /// `size` is that of the numbers that are rounded on the way to it.
    fn function(self, value: f64, steepest: f64, size: f64) -> Self;

    /// As a tensor of that type holds it.
    fn stored(self, dtype: DType) -> Self;

    /// The largest magnitude that it may have, infinite where nothing is known of it.
    fn magnitude(self) -> f64;

    /// A sum that may have been taken in another way, of terms that come to `size` and are rounded as
    /// `like` is, where their factors, which come to `factors`, are rounded too.
    fn loosened(self, like: Self, size: f64, factors: f64) -> Self;
}

impl Number for f64 {
    fn exact(value: f64) -> Self {
        value
    }

    fn value(self) -> f64 {
        self
    }

    fn is_zero(self) -> bool {
        self == 0.0
    }

    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }

    fn function(self, value: f64, _: f64, _: f64) -> Self {
        value
    }

    fn stored(self, dtype: DType) -> Self {
        match dtype {
            DType::F16 | DType::BF16 => rounded(self, dtype),
            _ => self,
        }
    }

    fn magnitude(self) -> f64 {
        self.abs()
    }

    fn loosened(self, _: Self, _: f64, _: f64) -> Self {
        self
    }
}

/// The nearest value of a type.
pub fn rounded(value: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F64 => value,
        DType::F32 => f64::from(value as f32),
        DType::F16 => f16::from_f64(value).to_f64(),
        DType::BF16 => bf16::from_f64(value).to_f64(),
        _ => panic!("{dtype:?} is no type of the op's tensors"),
    }
}

/// One application of the op: everything about it that is not a tensor.
#[derive(Clone, Debug)]
pub struct Op {
    /// Number of images.
    pub batch: usize,
    /// Input and output channels.
    pub channels: [usize; 2],
    /// Number of groups.
    pub groups: usize,
    /// Size of the input; here and below over three dimensions, of which missing ones are 1.
    pub input: [usize; 3],
    /// Size of the kernel.
    pub kernel: [usize; 3],
    /// Step between two outputs.
    pub stride: [usize; 3],
    /// Zeros before and after.
    pub padding: [(usize, usize); 3],
    /// Distance between two taps.
    pub dilation: [usize; 3],
    /// The norm.
    pub norm: NormSpec,
    /// The activation.
    pub activation: Activation,
    /// What tensors are stored as. The convolution's output is rounded to it before the norm takes
    /// it, and the statistics are those of the rounded values.
    pub dtype: DType,
    /// Whether the gradient of the convolution's output is stored, too.
    pub stores_conv_grad: bool,
}

/// What the op takes. What is absent is 0, a gamma 1.
#[derive(Clone, Debug)]
pub struct Tensors<T> {
    /// `[batch, channels_in, spatial..]`.
    pub input: Vec<T>,
    /// `[channels_out, channels_in / groups, kernel..]`.
    pub weight: Vec<T>,
    /// `[channels_out]`.
    pub bias: Vec<T>,
    /// `[channels_out]`.
    pub gamma: Vec<T>,
    /// `[channels_out]`.
    pub beta: Vec<T>,
    /// Of the output's shape.
    pub residual: Vec<T>,
    /// Mean and variance to normalize with instead of the batch's.
    pub statistics: Option<(Vec<T>, Vec<T>)>,
}

/// What the op makes of them.
#[derive(Clone, Debug)]
pub struct Forward<T> {
    /// Of the convolution's output with its bias; given statistics as they are.
    pub mean: Vec<T>,
    /// Biased; given statistics as they are.
    pub variance: Vec<T>,
    /// `s`, the inverse standard deviation.
    pub inv_std: Vec<T>,
    /// `z - mean`.
    pub deviation: Vec<T>,
    /// The same of z as it is before it is stored.
    pub unstored_deviation: Vec<T>,
    /// `gamma * s * (z - mean) + beta + residual`.
    pub pre_activation: Vec<T>,
    /// The activation of that.
    pub output: Vec<T>,
}

/// The gradients, each of its tensor's shape.
#[derive(Clone, Debug)]
pub struct Gradients<T> {
    /// Of the input.
    pub input: Vec<T>,
    /// Of the weight.
    pub weight: Vec<T>,
    /// Of the bias. With the batch's statistics it is 0 but for rounding.
    pub bias: Vec<T>,
    /// Of gamma.
    pub gamma: Vec<T>,
    /// Of beta.
    pub beta: Vec<T>,
    /// Of the residual.
    pub residual: Vec<T>,
}

impl Op {
    /// The op on an input and a weight of those shapes, stored as that type.
    pub fn new(input: &[usize], weight: &[usize], options: &ConvBnOptions, dtype: DType) -> Self {
        fn lifted<T: Copy>(values: &[T], missing: T) -> [T; 3] {
            let mut all = [missing; 3];
            all[3 - values.len()..].copy_from_slice(values);
            all
        }
        Self {
            batch: input[0],
            channels: [input[1], weight[0]],
            groups: options.conv.groups,
            input: lifted(&input[2..], 1),
            kernel: lifted(&weight[2..], 1),
            stride: lifted(&options.conv.stride, 1),
            padding: lifted(&options.conv.padding, (0, 0)),
            dilation: lifted(&options.conv.dilation, 1),
            norm: options.norm,
            activation: options.activation,
            dtype,
            stores_conv_grad: false,
        }
    }

    /// Size of the output.
    pub fn output(&self) -> [usize; 3] {
        std::array::from_fn(|dim| {
            let (before, after) = self.padding[dim];
            let extent = self.dilation[dim] * (self.kernel[dim] - 1) + 1;
            (self.input[dim] + before + after - extent) / self.stride[dim] + 1
        })
    }

    /// Values of the output.
    pub fn output_len(&self) -> usize {
        self.values_per_channel() * self.channels[1]
    }

    /// Values of the input.
    pub fn input_len(&self) -> usize {
        self.batch * self.channels[0] * self.input.iter().product::<usize>()
    }

    /// Values of the weight.
    pub fn weight_len(&self) -> usize {
        let taps: usize = self.kernel.iter().product();
        self.channels[1] * (self.channels[0] / self.groups) * taps
    }

    /// `m`: the values that a channel's statistics are taken over.
    pub fn values_per_channel(&self) -> usize {
        self.batch * self.output().iter().product::<usize>()
    }

    /// The channel of a value of the output.
    pub fn channel(&self, index: usize) -> usize {
        let positions: usize = self.output().iter().product();
        index / positions % self.channels[1]
    }

    /// Calls `visit` with the indices of an input, a weight and an output value, for each product
    /// that the convolution sums.
    pub fn for_each_product(&self, mut visit: impl FnMut(usize, usize, usize)) {
        let [group_in, group_out] = self.channels.map(|channels| channels / self.groups);
        let output = self.output();
        for image in 0..self.batch {
            for channel_out in 0..self.channels[1] {
                for within in 0..group_in {
                    let channel_in = channel_out / group_out * group_in + within;
                    let input_plane = image * self.channels[0] + channel_in;
                    let weight_plane = channel_out * group_in + within;
                    let output_plane = image * self.channels[1] + channel_out;
                    for_each_position(output, |at| {
                        for_each_position(self.kernel, |tap| {
                            let Some(met) = self.met(at, tap) else { return };
                            visit(
                                flat(input_plane, met, self.input),
                                flat(weight_plane, tap, self.kernel),
                                flat(output_plane, at, output),
                            );
                        });
                    });
                }
            }
        }
    }

    /// Where an output meets the input through a tap, unless that is padding.
    fn met(&self, at: [usize; 3], tap: [usize; 3]) -> Option<[usize; 3]> {
        let mut met = [0; 3];
        for dim in 0..3 {
            let padded = at[dim] * self.stride[dim] + tap[dim] * self.dilation[dim];
            met[dim] = padded.checked_sub(self.padding[dim].0)?;
            if met[dim] >= self.input[dim] {
                return None;
            }
        }
        Some(met)
    }

    /// The convolution, without its bias.
    pub fn conv<T: Number>(&self, input: &[T], weight: &[T]) -> Vec<T> {
        let mut output = vec![T::exact(0.0); self.output_len()];
        self.for_each_product(|x, w, y| output[y] += input[x] * weight[w]);
        let terms = self.weight_len() / self.channels[1];
        loosened(output, terms, input, weight)
    }

    /// The sum of each channel's values of a tensor of the output's shape.
    fn channel_sums<T: Number>(&self, values: &[T]) -> Vec<T> {
        let mut sums = vec![T::exact(0.0); self.channels[1]];
        for (index, value) in values.iter().enumerate() {
            sums[self.channel(index)] += *value;
        }
        sums
    }

    /// The mean of each channel's values.
    fn channel_means<T: Number>(&self, values: &[T]) -> Vec<T> {
        let count = T::exact(self.values_per_channel() as f64);
        let sums = self.channel_sums(values);
        sums.into_iter().map(|sum| sum / count).collect()
    }

    /// The variance that the norm's formula takes: one of a batch is over its degrees of freedom,
    /// one that was given is used as it is.
    fn norm_variance<T: Number>(&self, variance: T, is_given: bool) -> T {
        let values = self.values_per_channel() as f64;
        match (self.norm.variant, is_given) {
            (NormVariant::Tutorial, false) => variance * T::exact(values / (values - 1.0)),
            _ => variance,
        }
    }

    /// `s`.
    fn inv_std<T: Number>(&self, variance: T) -> T {
        let epsilon = T::exact(self.norm.epsilon);
        let deviation = match self.norm.variant {
            NormVariant::BatchNorm => (variance + epsilon).sqrt(),
            NormVariant::Tutorial => variance.sqrt() + epsilon,
        };
        T::exact(1.0) / deviation
    }

    /// `ds/dvar`. The tutorial's is infinite at 0, and taken as 0 there.
    fn inv_std_slope<T: Number>(&self, variance: T) -> T {
        let s = self.inv_std(variance);
        match self.norm.variant {
            NormVariant::BatchNorm => T::exact(-0.5) * s * s * s,
            NormVariant::Tutorial if variance.is_zero() => T::exact(0.0),
            NormVariant::Tutorial => T::exact(-0.5) * s * s / variance.sqrt(),
        }
    }

    /// `activation(norm(conv(input)) + residual)`.
    pub fn forward<T: Number>(&self, tensors: &Tensors<T>) -> Forward<T> {
        let conv = self.conv(&tensors.input, &tensors.weight);
        let stored: Vec<T> = conv.iter().map(|value| value.stored(self.dtype)).collect();
        // A bias is in z and in its mean, and comes out of their difference: the statistics of a batch
        // are taken without it.
        let channels = 0..self.channels[1];
        let (mean, variance, center) = match &tensors.statistics {
            Some((mean, variance)) => {
                let center = channels.map(|channel| mean[channel] - tensors.bias[channel]);
                (mean.clone(), variance.clone(), center.collect::<Vec<T>>())
            }
            None => {
                let center = self.channel_means(&stored);
                let squares: Vec<T> = (0..stored.len())
                    .map(|i| {
                        let deviation = stored[i] - center[self.channel(i)];
                        deviation * deviation
                    })
                    .collect();
                let mean = channels.map(|channel| center[channel] + tensors.bias[channel]);
                (mean.collect(), self.channel_means(&squares), center)
            }
        };
        let is_given = tensors.statistics.is_some();
        let inv_std: Vec<T> = variance
            .iter()
            .map(|variance| self.inv_std(self.norm_variance(*variance, is_given)))
            .collect();

        let deviations = |values: &[T]| -> Vec<T> {
            (0..values.len())
                .map(|i| values[i] - center[self.channel(i)])
                .collect()
        };
        let (deviation, unstored_deviation) = (deviations(&stored), deviations(&conv));
        let pre_activation: Vec<T> = (0..conv.len())
            .map(|i| {
                let channel = self.channel(i);
                let scale = tensors.gamma[channel] * inv_std[channel];
                scale * deviation[i] + tensors.beta[channel] + tensors.residual[i]
            })
            .collect();
        let output = pre_activation
            .iter()
            .map(|value| activate(self.activation, *value))
            .collect();
        Forward {
            mean,
            variance,
            inv_std,
            deviation,
            unstored_deviation,
            pre_activation,
            output,
        }
    }

    /// The gradients of `sum(output_grad * output)`.
    pub fn backward<T: Number>(
        &self,
        tensors: &Tensors<T>,
        forward: &Forward<T>,
        output_grad: &[T],
    ) -> Gradients<T> {
        let deviation = &forward.deviation;
        let len = self.output_len();

        // Through the activation.
        let g: Vec<T> = (0..len)
            .map(|i| output_grad[i] * slope(self.activation, forward.pre_activation[i]))
            .collect();
        // Given statistics ask nothing of z: gamma's gradient is taken from the weight's, in which z
        // was never stored.
        let summed = match tensors.statistics {
            Some(_) => &forward.unstored_deviation,
            None => deviation,
        };
        let products: Vec<T> = (0..len).map(|i| g[i] * summed[i]).collect();
        let deviation_sums = self.channel_sums(&products);
        let gamma = (0..self.channels[1])
            .map(|channel| forward.inv_std[channel] * deviation_sums[channel])
            .collect();
        let beta = self.channel_sums(&g);

        // Through the norm: directly, through the variance, and through the mean.
        let mut z_grad: Vec<T> = (0..len)
            .map(|i| {
                let channel = self.channel(i);
                tensors.gamma[channel] * forward.inv_std[channel] * g[i]
            })
            .collect();
        if tensors.statistics.is_none() {
            let values = self.values_per_channel() as f64;
            let degrees = values - self.norm.variant.degrees_of_freedom() as f64;
            let variance_grad: Vec<T> = (0..self.channels[1])
                .map(|channel| {
                    let variance = self.norm_variance(forward.variance[channel], false);
                    tensors.gamma[channel] * deviation_sums[channel] * self.inv_std_slope(variance)
                })
                .collect();
            for (i, grad) in z_grad.iter_mut().enumerate() {
                let variance_slope = T::exact(2.0 / degrees) * deviation[i];
                *grad += variance_grad[self.channel(i)] * variance_slope;
            }
            let means = self.channel_means(&z_grad);
            for (i, grad) in z_grad.iter_mut().enumerate() {
                *grad = *grad - means[self.channel(i)];
            }
        }
        let bias = self.channel_sums(&z_grad);
        if self.stores_conv_grad {
            for grad in &mut z_grad {
                *grad = grad.stored(self.dtype);
            }
        }

        // Through the convolution.
        let mut input = vec![T::exact(0.0); self.input_len()];
        let mut weight = vec![T::exact(0.0); self.weight_len()];
        self.for_each_product(|x, w, y| {
            input[x] += z_grad[y] * tensors.weight[w];
            weight[w] += z_grad[y] * tensors.input[x];
        });
        let terms = self.weight_len() / (self.channels[0] / self.groups) / self.groups;
        Gradients {
            input: loosened(input, terms, &z_grad, &tensors.weight),
            weight: loosened(weight, self.values_per_channel(), &z_grad, &tensors.input),
            bias,
            gamma,
            beta,
            residual: g,
        }
    }
}

/// Calls `visit` with each position of a volume, in the order of memory.
fn for_each_position(size: [usize; 3], mut visit: impl FnMut([usize; 3])) {
    for depth in 0..size[0] {
        for row in 0..size[1] {
            for column in 0..size[2] {
                visit([depth, row, column]);
            }
        }
    }
}

/// Index of a position in one of several volumes that follow one another.
fn flat(volume: usize, at: [usize; 3], size: [usize; 3]) -> usize {
    ((volume * size[0] + at[0]) * size[1] + at[1]) * size[2] + at[2]
}

/// Sums of `terms` products of `a` and `b`, as another algorithm may have them.
fn loosened<T: Number>(sums: Vec<T>, terms: usize, a: &[T], b: &[T]) -> Vec<T> {
    let most = |values: &[T]| {
        values
            .iter()
            .map(|value| value.magnitude())
            .fold(0.0, f64::max)
    };
    let (largest_a, largest_b) = (most(a), most(b));
    let root = (terms as f64).sqrt();
    let (size, factors) = (root * largest_a * largest_b, root * (largest_a + largest_b));
    sums.into_iter()
        .map(|sum| sum.loosened(a[0] * b[0], size, factors))
        .collect()
}

/// The largest magnitude.
pub fn largest<T: Number>(values: &[T]) -> f64 {
    values
        .iter()
        .fold(0.0, |most: f64, value| most.max(value.value().abs()))
}

/// `activation(value)`.
pub fn activate<T: Number>(activation: Activation, value: T) -> T {
    let at = value.value();
    let (result, steepest) = match activation {
        Activation::Identity => (at, 1.0),
        Activation::Relu => (above(at, 0.0, at, 0.0), 1.0),
        Activation::Relu6 => (above(at, 6.0, 6.0, above(at, 0.0, at, 0.0)), 1.0),
        Activation::LeakyRelu { negative_slope } => (
            above(at, 0.0, at, negative_slope * at),
            negative_slope.abs().max(1.0),
        ),
        Activation::Silu => (at * sigmoid(at), 1.1),
        Activation::Gelu => (at * normal_cdf(at), 1.13),
        Activation::HardSwish => (
            above(at, 3.0, at, above(at, -3.0, at * (at / 6.0 + 0.5), 0.0)),
            1.5,
        ),
        Activation::GeluApproximate => (at * sigmoid(gelu_argument(at)), 1.13),
        Activation::Sigmoid => (sigmoid(at), 0.25),
        Activation::HardSigmoid { alpha, beta } => {
            ((alpha * at + beta).clamp(0.0, 1.0), alpha.abs())
        }
        Activation::Tanh => (at.tanh(), 1.0),
        Activation::Elu { alpha } => (
            above(at, 0.0, at, alpha * at.exp_m1()),
            alpha.abs().max(1.0),
        ),
        Activation::Mish => (at * softplus(at).tanh(), 1.1),
        Activation::Softplus { beta } => (softplus(beta * at) / beta, 1.0),
        _ => panic!("the reference has no formula for {activation:?}"),
    };
    value.function(result, steepest, rounded_size(activation, at.abs()))
}

/// The activation's derivative; at a kink that of the left side, but 1 at 3 of `HardSwish` and 0
/// at the upper ones of `Relu6` and `HardSigmoid`.
pub fn slope<T: Number>(activation: Activation, value: T) -> T {
    let at = value.value();
    let (result, steepest) = match activation {
        Activation::Identity => (1.0, 0.0),
        Activation::Relu => (above(at, 0.0, 1.0, 0.0), 0.0),
        Activation::Relu6 if at >= 6.0 => (0.0, 0.0),
        Activation::Relu6 => (above(at, 0.0, 1.0, 0.0), 0.0),
        Activation::LeakyRelu { negative_slope } => (above(at, 0.0, 1.0, negative_slope), 0.0),
        Activation::Silu => {
            let sigmoid = sigmoid(at);
            (sigmoid + at * sigmoid * (1.0 - sigmoid), 0.5)
        }
        Activation::Gelu => (normal_cdf(at) + at * normal_density(at), 0.8),
        Activation::HardSwish if at >= 3.0 => (1.0, 1.0 / 3.0),
        Activation::HardSwish => (above(at, -3.0, at / 3.0 + 0.5, 0.0), 1.0 / 3.0),
        Activation::GeluApproximate => {
            // Beyond, the gate is 0 or 1 and its slope 0.
            let at = at.clamp(-40.0, 40.0);
            let argument = gelu_argument(at);
            let argument_slope = GELU_SCALE * (1.0 + 3.0 * 0.044715 * at * at);
            let bent = at * sigmoid_slope(argument) * argument_slope;
            (sigmoid(argument) + bent, 0.81)
        }
        Activation::Sigmoid => (sigmoid_slope(at), 0.1),
        Activation::HardSigmoid { alpha, beta } => {
            let line = alpha * at + beta;
            let is_between = line > 0.0 && line < 1.0;
            (if is_between { alpha } else { 0.0 }, 0.0)
        }
        Activation::Tanh => (4.0 * sigmoid_slope(2.0 * at), 0.78),
        Activation::Elu { alpha } => (above(at, 0.0, 1.0, alpha * at.exp()), alpha.abs()),
        Activation::Mish => {
            let gate_slope = 4.0 * sigmoid_slope(2.0 * softplus(at)) * sigmoid(at);
            (softplus(at).tanh() + at * gate_slope, 0.7)
        }
        Activation::Softplus { beta } => (sigmoid(beta * at), beta.abs() / 4.0),
        _ => panic!("the reference has no formula for {activation:?}"),
    };
    // Beyond, the smooth ones are straight lines in any type.
    value.function(
        result,
        steepest,
        rounded_size(activation, at.abs().min(40.0)),
    )
}

/// Where the derivative jumps.
pub fn kinks(activation: Activation) -> Vec<f64> {
    match activation {
        Activation::Relu | Activation::LeakyRelu { .. } | Activation::Elu { .. } => vec![0.0],
        Activation::Relu6 => vec![0.0, 6.0],
        Activation::HardSwish => vec![-3.0, 3.0],
        Activation::HardSigmoid { alpha, beta } => vec![-beta / alpha, (1.0 - beta) / alpha],
        _ => Vec::new(),
    }
}

/// Size of the numbers that are rounded on the way to an activation at a value of that magnitude.
fn rounded_size(activation: Activation, magnitude: f64) -> f64 {
    match activation {
        Activation::Identity | Activation::Relu | Activation::Relu6 => 0.0,
        _ => 1.0 + magnitude,
    }
}

/// One of two, by whether a value is above a bound.
fn above(value: f64, bound: f64, then: f64, otherwise: f64) -> f64 {
    if value > bound { then } else { otherwise }
}

fn sigmoid(value: f64) -> f64 {
    1.0 / (1.0 + (-value).exp())
}

/// `s(v) * s(-v)`.
fn sigmoid_slope(value: f64) -> f64 {
    sigmoid(value) * sigmoid(-value)
}

/// `ln(1 + exp(value))`.
fn softplus(value: f64) -> f64 {
    value.max(0.0) + (-value.abs()).exp().ln_1p()
}

/// `2 sqrt(2 / pi)`; GELU's approximation has half of it in its tanh.
const GELU_SCALE: f64 = 1.595_769_121_605_731;

fn gelu_argument(value: f64) -> f64 {
    GELU_SCALE * (value + 0.044715 * value.powi(3))
}

/// The normal distribution's `P(X <= value)`.
fn normal_cdf(value: f64) -> f64 {
    0.5 * libm::erfc(-value * std::f64::consts::FRAC_1_SQRT_2)
}

fn normal_density(value: f64) -> f64 {
    (-0.5 * value * value).exp() / (2.0 * std::f64::consts::PI).sqrt()
}
