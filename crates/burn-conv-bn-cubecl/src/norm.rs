//! What is computed for each channel, between the launches over activations.

use burn_backend::DType;
use burn_cubecl::cubecl;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::zspace::Shape;

use crate::element::element_type;
use crate::fold::{Fold, One, fold_rows};
use crate::walk::{Grid, Lanes, Unit, Walk, is_idle, row, tensor_arg, unit};

/// How the inverse standard deviation `s` follows from the variance:
/// `s = 1 / (sqrt(M2 / (m - ddof) + inner_epsilon) + outer_epsilon)`.
///
/// Batch normalization has `inner_epsilon` alone, and no `ddof`. For all of them
/// `ds/dvar = -s^2 / (2 sqrt(var + inner_epsilon))`, which is taken as 0 where the root is 0.
///
/// ```
/// use burn_conv_bn_cubecl::Norm;
///
/// // That of the PyTorch tutorial: unbiased variance, epsilon outside the root.
/// let tutorial = Norm {
///     inner_epsilon: 0.0,
///     outer_epsilon: 1e-3,
///     degrees_of_freedom: 1,
/// };
/// assert_ne!(tutorial.inner_epsilon, tutorial.outer_epsilon);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Added to the variance.
    pub inner_epsilon: f64,
    /// Added to the standard deviation.
    pub outer_epsilon: f64,
    /// Degrees of freedom taken off the number of values: 0 or 1.
    pub degrees_of_freedom: usize,
}

/// `scale * (value - mean) + shift` for each channel, and the coefficients of its gradient: a
/// contiguous `[rows, channels]` table in the accumulator's dtype.
///
/// [The examples of the crate](crate#examples) make one for each pass.
#[derive(Clone, Debug)]
pub struct ChannelTable {
    pub(crate) values: CubeTensor,
    /// Whether the statistics are the batch's, so that gradients flow through them.
    pub(crate) is_of_batch: bool,
}

impl ChannelTable {
    fn of_batch(values: CubeTensor) -> Self {
        Self {
            values,
            is_of_batch: true,
        }
    }

    /// The table with its statistics as constants to the gradient, as given ones are:
    /// [`norm_input_grad`](crate::norm_input_grad) is then `scale * g`.
    ///
    /// ```no_run
    /// use burn_conv_bn_cubecl::{Activation, Affine, Moments, Norm, channel_table, normalize};
    /// use burn_cubecl::tensor::CubeTensor;
    ///
    /// /// `relu(norm(z))` by running statistics.
    /// fn norm_relu(z: CubeTensor, running: &Moments, affine: Affine, norm: Norm) -> CubeTensor {
    ///     // Without degrees of freedom the variance is used as it is, over any number of values.
    ///     let norm = Norm { degrees_of_freedom: 0, ..norm };
    ///     let table = channel_table(running, affine, norm, 1).with_constant_statistics();
    ///     normalize(z, Some(&table), None, Activation::Relu)
    /// }
    /// ```
    #[must_use]
    pub fn with_constant_statistics(self) -> Self {
        Self {
            is_of_batch: false,
            ..self
        }
    }
}

/// Rows of a [`ChannelTable`].
pub(crate) mod rows {
    pub(crate) const MEAN: usize = 0;
    pub(crate) const SCALE: usize = 1;
    pub(crate) const SHIFT: usize = 2;
    /// Rows of a table without coefficients of the gradient.
    pub(crate) const AFFINE: usize = 3;
    pub(crate) const SLOPE: usize = 3;
    pub(crate) const OFFSET: usize = 4;
    pub(crate) const ALL: usize = 5;
}

/// A norm's mean and biased variance, `[channels]` each in the accumulator's dtype (f64 for f64,
/// f32 otherwise).
///
/// [The examples of the crate](crate#examples) pass them from forward to backward.
#[derive(Clone, Debug)]
pub struct Moments {
    /// Mean.
    pub mean: CubeTensor,
    /// Sum of squared deviations over the number of values.
    pub variance: CubeTensor,
}

/// The norm's learned parameters, `[channels]` each; 1 and 0 if absent. Both of one dtype.
///
/// ```
/// use burn_conv_bn_cubecl::Affine;
///
/// // A norm without parameters.
/// let affine = Affine::default();
/// assert!(affine.gamma.is_none() && affine.beta.is_none());
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Affine<'a> {
    /// Scale.
    pub gamma: Option<&'a CubeTensor>,
    /// Shift.
    pub beta: Option<&'a CubeTensor>,
}

impl Affine<'_> {
    /// The parameters' dtype, or without them the accumulator's.
    fn dtype(&self, accumulator: DType) -> DType {
        let parameter = self.gamma.or(self.beta);
        parameter.map_or(accumulator, |tensor| tensor.dtype)
    }
}

/// The rows of `scale * (value - mean) + shift` for a unit's channels; without a table, zeros.
#[derive(CubeType)]
pub(crate) struct UnitAffine<T: Float, N: Size> {
    pub(crate) mean: Vector<T, N>,
    pub(crate) scale: Vector<T, N>,
    pub(crate) shift: Vector<T, N>,
}

#[cube]
pub(crate) fn unit_affine<T: Float, N: Size>(
    table: ComptimeOption<&Tensor<T>>,
    grid: &Grid,
    unit: &Unit,
    #[comptime] lanes: Lanes,
) -> UnitAffine<T, N> {
    #[comptime]
    match table {
        ComptimeOption::Some(table) => UnitAffine::<T, N> {
            mean: row(table, grid, unit, rows::MEAN, lanes),
            scale: row(table, grid, unit, rows::SCALE, lanes),
            shift: row(table, grid, unit, rows::SHIFT, lanes),
        },
        ComptimeOption::None => UnitAffine::<T, N> {
            mean: Vector::zero(),
            scale: Vector::zero(),
            shift: Vector::zero(),
        },
    }
}

/// [`Norm`] over a number of values, as the kernels take it.
#[derive(CubeType, CubeLaunch)]
struct NormArgs {
    inner_epsilon: InputScalar,
    outer_epsilon: InputScalar,
    /// Number of values of a channel.
    values: InputScalar,
    /// `values` less the degrees of freedom.
    freedom: InputScalar,
}

impl Norm {
    fn launch(&self, values: usize, dtype: ElemType) -> NormArgsLaunch {
        let scalar = |value: f64| InputScalar::new(value, dtype);
        NormArgsLaunch::new(
            scalar(self.inner_epsilon),
            scalar(self.outer_epsilon),
            scalar(values as f64),
            scalar(values.saturating_sub(self.degrees_of_freedom) as f64),
        )
    }
}

/// `sqrt(var + inner_epsilon)`, from the biased variance.
#[cube]
fn standard_deviation<T: Float>(variance: T, norm: &NormArgs) -> T {
    let unbiased = variance * (norm.values.get::<T>() / norm.freedom.get::<T>());
    (unbiased + norm.inner_epsilon.get::<T>()).sqrt()
}

/// `s`.
#[cube]
fn inverse_deviation<T: Float>(deviation: T, norm: &NormArgs) -> T {
    T::from_int(1) / (deviation + norm.outer_epsilon.get::<T>())
}

#[cube]
fn parameter<T: Float, P: Float>(
    tensor: ComptimeOption<&Tensor<P>>,
    channel: usize,
    #[comptime] otherwise: i64,
) -> T {
    #[comptime]
    match tensor {
        ComptimeOption::Some(tensor) => T::cast_from(tensor[channel * tensor.stride(0)]),
        ComptimeOption::None => T::from_int(otherwise),
    }
}

/// Writes the rows of `scale * (value - mean) + shift`.
#[cube]
fn write_affine<T: Float, P: Float>(
    table: &mut Tensor<T>,
    mean: T,
    variance: T,
    gamma: ComptimeOption<&Tensor<P>>,
    beta: ComptimeOption<&Tensor<P>>,
    norm: &NormArgs,
    channel: usize,
    channels: usize,
) {
    let inverse = inverse_deviation::<T>(standard_deviation::<T>(variance, norm), norm);
    table[rows::MEAN * channels + channel] = mean;
    table[rows::SCALE * channels + channel] = parameter::<T, P>(gamma, channel, 1) * inverse;
    table[rows::SHIFT * channels + channel] = parameter::<T, P>(beta, channel, 0);
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn moments_kernel<T: Float, P: Float>(
    partials: &Tensor<T>,
    gamma: ComptimeOption<&Tensor<P>>,
    beta: ComptimeOption<&Tensor<P>>,
    mean: &mut Tensor<T>,
    variance: &mut Tensor<T>,
    table: &mut Tensor<T>,
    norm: &NormArgs,
    grid: &Grid,
    #[comptime] lanes: Lanes,
    #[define(T, P)] _elements: [ElemType; 2],
) {
    if is_idle(grid) {
        terminate!();
    }
    let unit = unit::<One>(grid, lanes);
    let moments = fold_rows(partials, &unit, lanes, Fold::Moments);
    if unit.lane == 0 && unit.has_channel {
        let channel = unit.channel;
        let channel_mean = moments.first.extract(0usize);
        let channel_variance = moments.second.extract(0usize) / norm.values.get::<T>();
        mean[channel] = channel_mean;
        variance[channel] = channel_variance;
        write_affine(
            table,
            channel_mean,
            channel_variance,
            gamma,
            beta,
            norm,
            channel,
            grid.channels,
        );
    }
}

/// Moments of a table of partial moments over `values` values a channel, and the rows of
/// `scale * (value - mean) + shift`.
pub(crate) fn finish_moments(
    partials: CubeTensor,
    affine: Affine,
    norm: Norm,
    values: usize,
) -> (Moments, ChannelTable) {
    let walk = Walk::over_rows(&partials);
    let per_channel = |rows: usize| channel_values(&partials, rows, walk.channels);
    let (mean, variance, table) = (per_channel(1), per_channel(1), per_channel(rows::AFFINE));
    let client = partials.client.clone();
    let dtype = element_type(partials.dtype);
    if !walk.is_empty() {
        // SAFETY: `unit` keeps the rows and channels below those of the table.
        unsafe {
            moments_kernel::launch_unchecked(
                &client,
                walk.cube_count(&client),
                walk.lanes.cube_dim(),
                walk.address_type(),
                partials.into_tensor_arg(),
                tensor_arg(affine.gamma).into(),
                tensor_arg(affine.beta).into(),
                mean.clone().into_tensor_arg(),
                variance.clone().into_tensor_arg(),
                table.clone().into_tensor_arg(),
                norm.launch(values, dtype),
                walk.grid(),
                walk.lanes,
                [dtype, element_type(affine.dtype(mean.dtype))],
            );
        }
    }
    (Moments { mean, variance }, ChannelTable::of_batch(table))
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn affine_kernel<T: Float, P: Float>(
    mean: &Tensor<T>,
    variance: &Tensor<T>,
    gamma: ComptimeOption<&Tensor<P>>,
    beta: ComptimeOption<&Tensor<P>>,
    table: &mut Tensor<T>,
    norm: &NormArgs,
    channels: usize,
    #[define(T, P)] _elements: [ElemType; 2],
) {
    let channel = ABSOLUTE_POS;
    if channel >= channels {
        terminate!();
    }
    write_affine(
        table,
        mean[channel * mean.stride(0)],
        variance[channel * variance.stride(0)],
        gamma,
        beta,
        norm,
        channel,
        channels,
    );
}

/// The table for a backward pass: the rows of `scale * (value - mean) + shift` from the moments
/// that forward returned, over `values` values a channel. [`GradSums::finish`](crate::GradSums::finish) writes the others.
///
/// [The examples of the crate](crate#examples) call it.
pub fn channel_table(moments: &Moments, affine: Affine, norm: Norm, values: usize) -> ChannelTable {
    let mean = &moments.mean;
    let channels = mean.meta.num_elements();
    let table = channel_values(mean, rows::ALL, channels);
    let client = mean.client.clone();
    let dtype = element_type(mean.dtype);
    let cube_dim = CubeDim::new(&client, channels.max(1));
    if channels > 0 {
        // SAFETY: the kernel stops at the last channel.
        unsafe {
            affine_kernel::launch_unchecked(
                &client,
                cubecl::calculate_cube_count_elemwise(&client, channels, cube_dim),
                cube_dim,
                table.required_address_type(),
                mean.clone().into_tensor_arg(),
                moments.variance.clone().into_tensor_arg(),
                tensor_arg(affine.gamma).into(),
                tensor_arg(affine.beta).into(),
                table.clone().into_tensor_arg(),
                norm.launch(values, dtype),
                channels,
                [dtype, element_type(affine.dtype(mean.dtype))],
            );
        }
    }
    ChannelTable::of_batch(table)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn grads_kernel<T: Float, P: Float>(
    partials: &Tensor<T>,
    variance: &Tensor<T>,
    gamma: ComptimeOption<&Tensor<P>>,
    table: &mut Tensor<T>,
    gamma_grad: &mut Tensor<P>,
    beta_grad: &mut Tensor<P>,
    norm: &NormArgs,
    grid: &Grid,
    #[comptime] is_of_batch: bool,
    #[comptime] lanes: Lanes,
    #[define(T, P)] _elements: [ElemType; 2],
) {
    if is_idle(grid) {
        terminate!();
    }
    let unit = unit::<One>(grid, lanes);
    let sums = fold_rows(partials, &unit, lanes, Fold::Sums);
    if unit.lane == 0 && unit.has_channel {
        let (channel, channels) = (unit.channel, grid.channels);
        let (grad, grad_deviation) = (sums.first.extract(0usize), sums.second.extract(0usize));
        let deviation = standard_deviation::<T>(variance[channel * variance.stride(0)], norm);
        let inverse = inverse_deviation::<T>(deviation, norm);
        gamma_grad[channel] = P::cast_from(inverse * grad_deviation);
        beta_grad[channel] = P::cast_from(grad);

        if comptime!(is_of_batch) {
            // ds/dvar * 2 / (m - ddof)
            let zero = T::from_int(0);
            let slope = select(
                deviation == zero,
                zero,
                -(inverse * inverse) / (deviation * norm.freedom.get::<T>()),
            );
            let slope = parameter::<T, P>(gamma, channel, 1) * slope;
            let scale = table[rows::SCALE * channels + channel];
            table[rows::SLOPE * channels + channel] = slope * grad_deviation;
            table[rows::OFFSET * channels + channel] = -(scale * grad) / norm.values.get::<T>();
        }
    }
}

/// Gradients of the norm's parameters, `[channels]` each.
///
/// [The examples of the crate](crate#examples) return them.
#[derive(Clone, Debug)]
pub struct AffineGrads {
    /// `s * sum(g * (z - mean))`.
    pub gamma: CubeTensor,
    /// `sum(g)`.
    pub beta: CubeTensor,
}

/// Gradients of gamma and beta from a table of partial sums over `values` values a channel, in
/// the dtype of gamma or beta, otherwise the accumulator's; and of a batch's statistics the coefficients
/// of the input's gradient, into `table`.
pub(crate) fn finish_sums(
    partials: CubeTensor,
    table: &ChannelTable,
    moments: &Moments,
    affine: Affine,
    norm: Norm,
    values: usize,
) -> AffineGrads {
    let walk = Walk::over_rows(&partials);
    let client = partials.client.clone();
    let dtype = element_type(partials.dtype);
    let norm_dtype = affine.dtype(partials.dtype);
    let grad = || {
        empty_device_contiguous_dtype(
            client.clone(),
            partials.device.clone(),
            Shape::from(vec![walk.channels]),
            norm_dtype,
        )
    };
    let (gamma_grad, beta_grad) = (grad(), grad());
    if !walk.is_empty() {
        // SAFETY: `unit` keeps the rows and channels below those of the table.
        unsafe {
            grads_kernel::launch_unchecked(
                &client,
                walk.cube_count(&client),
                walk.lanes.cube_dim(),
                walk.address_type(),
                partials.into_tensor_arg(),
                moments.variance.clone().into_tensor_arg(),
                tensor_arg(affine.gamma).into(),
                table.values.clone().into_tensor_arg(),
                gamma_grad.clone().into_tensor_arg(),
                beta_grad.clone().into_tensor_arg(),
                norm.launch(values, dtype),
                walk.grid(),
                table.is_of_batch,
                walk.lanes,
                [dtype, element_type(norm_dtype)],
            );
        }
    }
    AffineGrads {
        gamma: gamma_grad,
        beta: beta_grad,
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn grad_sum_kernel<T: Float>(
    partials: &Tensor<T>,
    grad: &mut Tensor<T>,
    grid: &Grid,
    #[comptime] lanes: Lanes,
    #[define(T)] _element: ElemType,
) {
    if is_idle(grid) {
        terminate!();
    }
    let unit = unit::<One>(grid, lanes);
    let sums = fold_rows(partials, &unit, lanes, Fold::Sums);
    if unit.lane == 0 && unit.has_channel {
        grad[unit.channel] = sums.first.extract(0usize);
    }
}

/// `sum(g)` from a table of partial sums, `[channels]` in the accumulator's dtype.
pub(crate) fn finish_grad_sum(partials: CubeTensor) -> CubeTensor {
    let walk = Walk::over_rows(&partials);
    let client = partials.client.clone();
    let grad = channel_values(&partials, 1, walk.channels);
    let dtype = element_type(partials.dtype);
    if !walk.is_empty() {
        // SAFETY: `unit` keeps the rows and channels below those of the table.
        unsafe {
            grad_sum_kernel::launch_unchecked(
                &client,
                walk.cube_count(&client),
                walk.lanes.cube_dim(),
                walk.address_type(),
                partials.into_tensor_arg(),
                grad.clone().into_tensor_arg(),
                walk.grid(),
                walk.lanes,
                dtype,
            );
        }
    }
    grad
}

/// `[rows, channels]` without values, flat, in the dtype of `like`.
fn channel_values(like: &CubeTensor, rows: usize, channels: usize) -> CubeTensor {
    empty_device_contiguous_dtype(
        like.client.clone(),
        like.device.clone(),
        Shape::from(vec![rows * channels]),
        like.dtype,
    )
}
