//! The ops on plain tensors, checked: convolution, batch norm, the two fused, and a max pool.
//!
//! The first three are the custom functions of the PyTorch tutorial "Fusing Convolution and Batch
//! Norm using Custom Function", over one to three spatial dimensions and with every option. Each
//! has a backward pass of its own rather than one derived from its parts, and is differentiable
//! once. So has [`max_pool2d`], which takes the place of Burn's where a block is followed by one, and
//! [`conv_bn_max_pool2d`], which is both. [`cat_channels`] concatenates for dense networks.
//!
//! Quantized tensors are dequantized first, as by Burn's ops. A batch may be empty unless statistics are taken
//! of it; the output then is no part of the graph.
//!
//! ```
//! # #[cfg(feature = "flex")] {
//! use burn::tensor::{Device, Distribution, Tensor};
//! use burn_conv_bn::functional::{BatchNormParams, ConvBnParams, batch_norm, conv, conv_bn};
//! use burn_conv_bn::{ConvBnOptions, ConvSpec, NormSpec};
//!
//! let device = Device::flex().autodiff();
//! let x = Tensor::<4>::random([4, 3, 8, 8], Distribution::Default, &device);
//! let weight = Tensor::<4>::random([5, 3, 3, 3], Distribution::Default, &device).require_grad();
//! let spec = ConvSpec::unit(2);
//!
//! let z = conv(x.clone(), weight.clone(), None, spec.clone())?;
//! let halves = batch_norm(z, BatchNormParams::default(), NormSpec::default())?;
//! let fused = conv_bn(x, ConvBnParams::new(weight), ConvBnOptions::new(spec))?;
//! let difference = (halves.output - fused.output).abs().max().into_scalar::<f32>();
//! assert!(difference < 1e-3, "{difference}");
//! # }
//! # Ok::<(), burn_conv_bn::ConvBnError>(())
//! ```

mod cat;
mod check;
mod max_pool;
mod running;

use burn::backend::Dispatch;
use burn::tensor::Tensor;
use burn::tensor::ops::MaxPoolOptions;

pub use self::cat::cat_channels;
use self::check::Check;
pub use self::max_pool::max_pool2d;
pub(crate) use self::running::Running;
use crate::backend::{
    ConvBnBackend, ConvBnInputs, NormInputs, NormOutput, NormStatistics, OptionalTensor,
    RunningStatistics, Statistics,
};
use crate::spec::{
    BatchNormOptions, ConvBnError, ConvBnOptions, ConvBnProblem, ConvSpec, MaxPoolProblem,
    accumulator_dtype, check_activation, check_epsilon, check_values,
};

/// A normalized output and the statistics that it was normalized with: what [`batch_norm`] and
/// [`conv_bn`] return.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Normalized<const D: usize> {
    /// `[batch, channels, spatial..]`.
    pub output: Tensor<D>,
    /// Mean of the norm's input, `[channels]`, in f32 or f64. Constant to autodiff.
    pub mean: Tensor<1>,
    /// Biased variance of the norm's input (sum of squared deviations over the number of
    /// values), `[channels]`, in f32 or f64. Constant to autodiff.
    pub variance: Tensor<1>,
    /// Mean and variance of the given [`Running`] after this batch, if the op updated them.
    pub(crate) running: Option<[Tensor<1>; 2]>,
}

impl<const D: usize> Normalized<D> {
    fn new(result: NormOutput<Dispatch>) -> Self {
        Self {
            output: Tensor::from_dispatch(result.output),
            mean: Tensor::from_dispatch(result.mean),
            variance: Tensor::from_dispatch(result.variance),
            running: match result.running {
                RunningStatistics::Absent => None,
                RunningStatistics::Present { mean, variance, .. } => {
                    Some([mean, variance].map(Tensor::from_dispatch))
                }
            },
        }
    }
}

/// The tensors of the fused op besides its input; `None` where there is none.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::{Device, Tensor};
/// use burn_conv_bn::functional::ConvBnParams;
///
/// let device = Device::flex();
/// let params = ConvBnParams::new(Tensor::<4>::ones([8, 3, 3, 3], &device))
///     .with_affine(Tensor::ones([8], &device), Tensor::zeros([8], &device))
///     .with_statistics(Tensor::zeros([8], &device), Tensor::ones([8], &device));
/// assert!(params.bias.is_none() && params.residual.is_none());
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct ConvBnParams<const D: usize> {
    /// `[channels_out, channels_in / groups, kernel..]`.
    pub weight: Tensor<D>,
    /// The convolution's bias, `[channels_out]`. Under batch statistics it moves only the mean,
    /// and its gradient is zero.
    pub bias: Option<Tensor<1>>,
    /// The norm's scale and shift, `[channels_out]` each.
    pub affine: Option<(Tensor<1>, Tensor<1>)>,
    /// Added before the activation, of the output's shape.
    pub residual: Option<Tensor<D>>,
    /// Mean and variance, `[channels_out]` each, to normalize with instead of the batch's. No
    /// gradient flows to them.
    pub statistics: Option<(Tensor<1>, Tensor<1>)>,
}

impl<const D: usize> ConvBnParams<D> {
    /// A weight, and nothing else.
    pub fn new(weight: Tensor<D>) -> Self {
        Self {
            weight,
            bias: None,
            affine: None,
            residual: None,
            statistics: None,
        }
    }

    /// The values of quantized tensors, which Burn's ops take as well.
    fn dequantize(self) -> Self {
        Self {
            weight: self.weight.dequantize(),
            bias: self.bias.map(Tensor::dequantize),
            affine: self.affine.map(dequantize),
            residual: self.residual.map(Tensor::dequantize),
            statistics: self.statistics.map(dequantize),
        }
    }

    /// Adds the convolution's bias.
    #[must_use]
    pub fn with_bias(mut self, bias: Tensor<1>) -> Self {
        self.bias = Some(bias);
        self
    }

    /// Adds the norm's scale and shift.
    #[must_use]
    pub fn with_affine(mut self, gamma: Tensor<1>, beta: Tensor<1>) -> Self {
        self.affine = Some((gamma, beta));
        self
    }

    /// Adds a residual.
    #[must_use]
    pub fn with_residual(mut self, residual: Tensor<D>) -> Self {
        self.residual = Some(residual);
        self
    }

    /// Normalizes with these statistics instead of the batch's.
    #[must_use]
    pub fn with_statistics(mut self, mean: Tensor<1>, variance: Tensor<1>) -> Self {
        self.statistics = Some((mean, variance));
        self
    }
}

/// Convolution over one to three spatial dimensions.
///
/// Its backward pass keeps the input only if the weight is tracked, and the weight only if the
/// input is.
///
/// # Shapes
///
/// - `input`: `[batch, channels_in, spatial..]`
/// - `weight`: `[channels_out, channels_in / groups, kernel..]`
/// - `bias`: `[channels_out]`
/// - output: `[batch, channels_out, spatial_out..]`
///
/// # Errors
///
/// Shapes, dtypes or devices that do not fit each other.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::ops::ConvOptions;
/// use burn::tensor::{Device, Tensor};
/// use burn_conv_bn::functional::conv;
///
/// let device = Device::flex();
/// let input = Tensor::<4>::ones([2, 3, 8, 8], &device);
/// let weight = Tensor::<4>::ones([5, 3, 3, 3], &device);
/// let same = ConvOptions::new([1, 1], [1, 1], [1, 1], 1);
/// let output = conv(input, weight, None, same)?;
/// assert_eq!(output.dims(), [2, 5, 8, 8]);
/// # }
/// # Ok::<(), burn_conv_bn::ConvBnError>(())
/// ```
pub fn conv<const D: usize>(
    input: Tensor<D>,
    weight: Tensor<D>,
    bias: Option<Tensor<1>>,
    spec: impl Into<ConvSpec>,
) -> Result<Tensor<D>, ConvBnError> {
    let spec = spec.into();
    let (input, weight) = (input.dequantize(), weight.dequantize());
    let bias = bias.map(Tensor::dequantize);
    let problem = ConvBnProblem::conv(input.shape(), weight.shape(), &spec)?;
    let check = Check::new(&input);
    check.backend()?;
    check.data("weight", &weight)?;
    check.data_channels("bias", bias.as_ref(), problem.output[1])?;
    if problem.values_per_channel() == 0 {
        return Ok(check.empty(problem.output));
    }
    Ok(Tensor::from_dispatch(Dispatch::conv(
        input.into_dispatch(),
        weight.into_dispatch(),
        optional(bias),
        spec,
    )))
}

/// The tensors of a batch norm besides its input; `None` where there is none. The default has none.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::{Device, Tensor};
/// use burn_conv_bn::functional::BatchNormParams;
///
/// let device = Device::flex();
/// let params = BatchNormParams::default()
///     .with_affine(Tensor::ones([8], &device), Tensor::zeros([8], &device))
///     .with_statistics(Tensor::zeros([8], &device), Tensor::ones([8], &device));
/// assert!(params.affine.is_some() && params.statistics.is_some());
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct BatchNormParams {
    /// The norm's scale and shift, `[channels]` each.
    pub affine: Option<(Tensor<1>, Tensor<1>)>,
    /// Mean and variance, `[channels]` each, to normalize with instead of the batch's. No gradient flows to
    /// them.
    pub statistics: Option<(Tensor<1>, Tensor<1>)>,
}

impl BatchNormParams {
    /// Adds the norm's scale and shift.
    #[must_use]
    pub fn with_affine(mut self, gamma: Tensor<1>, beta: Tensor<1>) -> Self {
        self.affine = Some((gamma, beta));
        self
    }

    /// Normalizes with these statistics instead of the batch's.
    #[must_use]
    pub fn with_statistics(mut self, mean: Tensor<1>, variance: Tensor<1>) -> Self {
        self.statistics = Some((mean, variance));
        self
    }
}

/// `activation(norm(input))`, over `[batch, channels, spatial..]` of rank 2 or more.
///
/// Its backward pass keeps the input and values of the channels' number. The output is kept by nobody: a
/// layer behind, Burn's own included, that needs it in its backward pass gets it rebuilt from the input, once,
/// as under [`Recompute::Norm`](crate::Recompute::Norm). So a norm before a convolution, as in pre-activation
/// networks, keeps one activation where Burn's norm and activation keep three.
///
/// With given statistics the result returns them, in f32 or f64.
///
/// # Errors
///
/// Shapes, dtypes or devices that do not fit each other, or batch statistics over one value per channel or
/// none, or an epsilon that is not positive, which with given statistics may be 0, or a softplus's beta of 0.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_conv_bn::functional::{BatchNormParams, batch_norm};
/// use burn_conv_bn::{Activation, BatchNormOptions, NormSpec};
///
/// let device = Device::flex();
/// let input = Tensor::<4>::random([4, 3, 8, 8], Distribution::Normal(7.0, 2.0), &device);
/// let normalized = batch_norm(input.clone(), BatchNormParams::default(), NormSpec::default())?;
/// assert_eq!(normalized.mean.dims(), [3]);
/// let mean = normalized.output.mean().into_scalar::<f32>();
/// assert!(mean.abs() < 1e-4, "{mean}");
///
/// let relu = BatchNormOptions::new(NormSpec::default()).with_activation(Activation::Relu);
/// let activated = batch_norm(input, BatchNormParams::default(), relu)?;
/// assert!(activated.output.min().into_scalar::<f32>() == 0.0);
/// # }
/// # Ok::<(), burn_conv_bn::ConvBnError>(())
/// ```
pub fn batch_norm<const D: usize>(
    input: Tensor<D>,
    params: BatchNormParams,
    options: impl Into<BatchNormOptions>,
) -> Result<Normalized<D>, ConvBnError> {
    batch_norm_running(input, params, options.into(), None)
}

/// [`batch_norm`], and running statistics after the batch where the op updates them. Only with the batch's.
pub(crate) fn batch_norm_running<const D: usize>(
    input: Tensor<D>,
    params: BatchNormParams,
    options: BatchNormOptions,
    running: Option<Running>,
) -> Result<Normalized<D>, ConvBnError> {
    check_epsilon(options.norm.epsilon, params.statistics.is_none())?;
    check_activation(options.activation)?;
    let input = input.dequantize();
    let (gamma, beta) = params.affine.map(dequantize).unzip();
    let (mean, variance) = params.statistics.map(dequantize).unzip();
    let shape = input.shape();
    if D < 2 {
        return Err(ConvBnError::Rank {
            what: "batch norm's input",
            input: shape,
            expected: 2,
            got: D,
        });
    }
    if shape[1..].contains(&0) {
        return Err(ConvBnError::Zero {
            what: "input size",
            got: shape.to_vec(),
        });
    }
    if mean.is_none() {
        check_values(&shape, &shape)?;
    }
    let check = Check::new(&input);
    check.backend()?;
    let vectors = [&gamma, &beta, &mean, &variance].map(Option::as_ref);
    check.norm(vectors, shape[1])?;
    check.running(running.as_ref(), shape[1])?;
    let statistics = match mean.zip(variance) {
        Some((mean, variance)) if shape[0] == 0 => {
            let dtype = accumulator_dtype(check.dtype);
            return Ok(Normalized {
                output: check.empty(shape),
                mean: mean.cast(dtype).detach(),
                variance: variance.cast(dtype).detach(),
                running: None,
            });
        }
        Some((mean, variance)) => NormStatistics::Fixed {
            mean: mean.into_dispatch(),
            variance: variance.into_dispatch(),
        },
        None => NormStatistics::Batch,
    };
    let inputs = NormInputs {
        input: input.into_dispatch(),
        gamma: optional(gamma),
        beta: optional(beta),
        statistics,
        running: Running::into_statistics(running, check.dtype),
    };
    let result = Dispatch::batch_normalize(inputs, options);
    Ok(Normalized::new(result))
}

/// `activation(norm(conv(input)) + residual)`, keeping for the backward pass what
/// [`SavePlan`](crate::backend::SavePlan) lists: by default the input alone.
///
/// # Shapes
///
/// - `input`: `[batch, channels_in, spatial..]`
/// - output: `[batch, channels_out, spatial_out..]`
/// - mean, variance: `[channels_out]`; given statistics come back, in f32 or f64
///
/// # Errors
///
/// Shapes, dtypes or devices that do not fit each other, batch statistics over one value per channel or none,
/// or an epsilon that is not positive; with given statistics it may be 0.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_conv_bn::functional::{ConvBnParams, conv_bn};
/// use burn_conv_bn::{Activation, ConvBnOptions, ConvSpec};
///
/// let device = Device::flex().autodiff();
/// let x = Tensor::<4>::random([4, 3, 8, 8], Distribution::Default, &device);
/// let weight = Tensor::<4>::random([5, 3, 3, 3], Distribution::Default, &device).require_grad();
/// let params = ConvBnParams::new(weight.clone())
///     .with_affine(Tensor::ones([5], &device), Tensor::zeros([5], &device));
/// let options = ConvBnOptions::new(ConvSpec::unit(2)).with_activation(Activation::Relu);
///
/// let result = conv_bn(x, params, options)?;
/// assert_eq!(result.output.dims(), [4, 5, 6, 6]);
/// let grads = result.output.sum().backward();
/// assert_eq!(weight.grad(&grads).unwrap().dims(), [5, 3, 3, 3]);
/// # }
/// # Ok::<(), burn_conv_bn::ConvBnError>(())
/// ```
pub fn conv_bn<const D: usize>(
    input: Tensor<D>,
    params: ConvBnParams<D>,
    options: ConvBnOptions,
) -> Result<Normalized<D>, ConvBnError> {
    conv_bn_running(input, params, options, None)
}

/// [`conv_bn`], and running statistics after the batch where the op updates them. Only with the batch's.
pub(crate) fn conv_bn_running<const D: usize>(
    input: Tensor<D>,
    params: ConvBnParams<D>,
    options: ConvBnOptions,
    running: Option<Running>,
) -> Result<Normalized<D>, ConvBnError> {
    let (inputs, problem) = checked(input, params, &options, running)?;
    Ok(normalized(inputs, &problem, options))
}

/// [`conv_bn`] of checked tensors.
fn normalized<const D: usize>(
    inputs: ConvBnInputs<Dispatch>,
    problem: &ConvBnProblem,
    options: ConvBnOptions,
) -> Normalized<D> {
    match &inputs.statistics {
        Statistics::Fixed { mean, variance } if problem.values_per_channel() == 0 => {
            let check = Check::new(&Tensor::<D>::from_dispatch(inputs.input.clone()));
            let [mean, variance] = [mean, variance].map(|tensor| {
                let tensor = Tensor::<1>::from_dispatch(tensor.clone());
                tensor.cast(accumulator_dtype(check.dtype)).detach()
            });
            Normalized {
                output: check.empty(problem.output.clone()),
                mean,
                variance,
                running: None,
            }
        }
        _ => Normalized::new(Dispatch::conv_bn(inputs, options)),
    }
}

/// [`conv_bn`] and [`max_pool2d`] of its output, as one op where that is possible: then there is no tensor
/// between the two, nor a gradient of one.
///
/// That is so with batch statistics and no residual, on Flex and CubeCL's devices, for windows of up to 256
/// pixels without dilation and ceil mode that are padded by half their size at most. In any other case it
/// is the two functions one after the other.
///
/// Besides what [`conv_bn`] keeps, a training step then keeps one byte for each output. The backward pass
/// recomputes the convolution as [`conv_bn`] does; with [`Recompute::Never`](crate::Recompute::Never), and
/// with `Norm`, it is kept instead.
///
/// On Flex, with `Relu` or `Identity`, a handle on the output is kept too; the next layer keeps that tensor
/// anyway. The convolution is then recomputed once and stored nowhere, and the sums that the norm's gradients
/// need come from the pooled values. They come from the convolution's output where a channel's beta exceeds
/// eight times the standard deviation of the values that it is added to, or that deviation is close to zero.
///
/// On Flex the output and its statistics have the same bits either way. In f32 and f64 the gradients are those
/// of the two up to the rounding of sums.
///
/// # Shapes
///
/// - `input`: `[batch, channels_in, height, width]`
/// - output: `[batch, channels_out, height_out, width_out]`, as of [`max_pool2d`]
/// - mean, variance: `[channels_out]`, of the convolution's output
///
/// # Errors
///
/// Those of [`conv_bn`] and of [`max_pool2d`].
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::ops::MaxPoolOptions;
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_conv_bn::functional::{ConvBnParams, conv_bn_max_pool2d};
/// use burn_conv_bn::{Activation, ConvBnOptions, ConvSpec};
///
/// let device = Device::flex().autodiff();
/// let x = Tensor::<4>::random([4, 3, 10, 10], Distribution::Default, &device);
/// let weight = Tensor::<4>::random([5, 3, 3, 3], Distribution::Default, &device).require_grad();
/// let options = ConvBnOptions::new(ConvSpec::unit(2)).with_activation(Activation::Relu);
/// let pool = MaxPoolOptions::new([2, 2]);
///
/// let result = conv_bn_max_pool2d(x, ConvBnParams::new(weight.clone()), options, pool)?;
/// assert_eq!(result.output.dims(), [4, 5, 4, 4]);
/// let grads = result.output.sum().backward();
/// assert_eq!(weight.grad(&grads).unwrap().dims(), [5, 3, 3, 3]);
/// # }
/// # Ok::<(), burn_conv_bn::ConvBnError>(())
/// ```
pub fn conv_bn_max_pool2d(
    input: Tensor<4>,
    params: ConvBnParams<4>,
    options: ConvBnOptions,
    pool: MaxPoolOptions<2>,
) -> Result<Normalized<4>, ConvBnError> {
    conv_bn_max_pool2d_running(input, params, options, pool, None)
}

/// [`conv_bn_max_pool2d`], and running statistics as of [`conv_bn_running`].
pub(crate) fn conv_bn_max_pool2d_running(
    input: Tensor<4>,
    params: ConvBnParams<4>,
    options: ConvBnOptions,
    pool: MaxPoolOptions<2>,
    running: Option<Running>,
) -> Result<Normalized<4>, ConvBnError> {
    let (inputs, problem) = checked(input, params, &options, running)?;
    let pooled = MaxPoolProblem::new(problem.output.clone(), pool.clone())?;
    if pooled.is_regular() {
        let result = Dispatch::conv_bn_max_pool(inputs, options, pool);
        return Ok(Normalized::new(result));
    }
    let normalized = normalized(inputs, &problem, options);
    Ok(Normalized {
        output: max_pool2d(normalized.output, pool)?,
        ..normalized
    })
}

/// The op's tensors, and their shapes, once they fit each other.
fn checked<const D: usize>(
    input: Tensor<D>,
    params: ConvBnParams<D>,
    options: &ConvBnOptions,
    running: Option<Running>,
) -> Result<(ConvBnInputs<Dispatch>, ConvBnProblem), ConvBnError> {
    let input = input.dequantize();
    let params = params.dequantize();
    let problem = ConvBnProblem::conv_bn(
        input.shape(),
        params.weight.shape(),
        options,
        params.statistics.is_none(),
    )?;
    let channels_out = problem.output[1];
    let (gamma, beta) = params.affine.unzip();
    let (mean, variance) = params.statistics.unzip();
    let check = Check::new(&input);
    check.backend()?;
    check.data("weight", &params.weight)?;
    check.data_channels("bias", params.bias.as_ref(), channels_out)?;
    let vectors = [&gamma, &beta, &mean, &variance].map(Option::as_ref);
    check.norm(vectors, channels_out)?;
    check.running(running.as_ref(), channels_out)?;
    if let Some(residual) = &params.residual {
        check.shape("residual", residual, problem.output.clone())?;
        check.data("residual", residual)?;
    }
    // The op's mean is without the bias.
    let running = running.filter(|_| params.bias.is_none());
    let inputs = ConvBnInputs {
        input: input.into_dispatch(),
        weight: params.weight.into_dispatch(),
        bias: optional(params.bias),
        gamma: optional(gamma),
        beta: optional(beta),
        residual: optional(params.residual),
        statistics: match mean.zip(variance) {
            Some((mean, variance)) => Statistics::Fixed {
                mean: mean.into_dispatch(),
                variance: variance.into_dispatch(),
            },
            None => Statistics::Batch,
        },
        running: Running::into_statistics(running, check.dtype),
    };
    Ok((inputs, problem))
}

fn dequantize((first, second): (Tensor<1>, Tensor<1>)) -> (Tensor<1>, Tensor<1>) {
    (first.dequantize(), second.dequantize())
}

fn optional<const D: usize>(tensor: Option<Tensor<D>>) -> OptionalTensor<Dispatch> {
    tensor.map(Tensor::into_dispatch).into()
}
