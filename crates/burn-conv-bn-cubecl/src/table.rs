//! Launches per channel, between those over activations.

use core::cell::RefCell;

use burn_backend::DType;
use burn_cubecl::cubecl;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::zspace::Shape;

use crate::element::element_type;
use crate::fold::{Fold, Partial, fold_rows};
use crate::norm::{
    Norm, NormArgs, NormArgsLaunch, channel_affine, inverse_deviation, parameter, rows,
    standard_deviation, write_affine,
};
use crate::walk::{Grid, Lanes, Unit, Walk, is_idle, tensor_arg, unit};
use crate::{assert_values, values_per_channel};

/// A norm with known statistics: `scale * (value - mean) + shift` per channel, and its gradient's coefficients.
#[derive(Clone, Debug)]
pub struct ChannelTable {
    pub(crate) moments: Moments,
    pub(crate) gamma: Option<CubeTensor>,
    pub(crate) beta: Option<CubeTensor>,
    norm: Norm,
    /// Number of values of a channel.
    values: usize,
    /// Whether gradients flow through the statistics, as through the batch's.
    pub(crate) is_of_batch: bool,
    /// `[rows, channels]`, flat, in the accumulator's dtype, once written.
    rows: RefCell<Option<CubeTensor>>,
}

impl ChannelTable {
    /// The table for a launch that reads it, written by a launch here unless it was before.
    pub(crate) fn rows(&self) -> CubeTensor {
        let mut rows = self.rows.borrow_mut();
        rows.get_or_insert_with(|| affine_rows(self)).clone()
    }

    /// As [`rows`](Self::rows), for the gradient of a norm's input.
    ///
    /// # Panics
    ///
    /// Panics if the statistics are the batch's and no sums completed the table.
    pub(crate) fn grad_rows(&self) -> CubeTensor {
        let rows = self.rows();
        if self.is_of_batch {
            let wanted = rows::ALL * self.moments.mean.meta.num_elements();
            let got = rows.meta.num_elements();
            assert_eq!(
                got, wanted,
                "channel table: expected {wanted} values, got {got}: complete it with `GradSums::finish`"
            );
        }
        rows
    }

    /// Whether that norm's input is the whole batch of the statistics, not a chunk of it. Given statistics leave it open.
    pub(crate) fn is_over(&self, norm_input: &CubeTensor) -> bool {
        self.is_of_batch && self.values == values_per_channel(norm_input)
    }

    /// Panics unless the table is of that many channels in that dtype, as kernels rely on.
    pub(crate) fn assert_channels(&self, channels: usize, accumulator: DType) {
        assert_values("mean", &self.moments.mean, channels, accumulator);
    }

    /// Type of gamma and beta, or the accumulator's.
    pub(crate) fn parameter_type(&self) -> ElemType {
        element_type(self.affine().dtype(self.moments.mean.dtype))
    }

    pub(crate) fn with_rows(self, rows: CubeTensor) -> Self {
        self.rows.replace(Some(rows));
        self
    }

    fn affine(&self) -> Affine<'_> {
        Affine {
            gamma: self.gamma.as_ref(),
            beta: self.beta.as_ref(),
        }
    }

    /// The table with its statistics, as given ones, constant to the gradient:
    /// [`norm_input_grad`](crate::norm_input_grad) is then `scale * g`.
    ///
    /// ```no_run
    /// use burn_conv_bn_cubecl::{Activation, Affine, Moments, Norm, channel_table, normalize};
    /// use burn_cubecl::tensor::CubeTensor;
    ///
    /// /// `relu(norm(z))` by running statistics.
    /// fn norm_relu(z: CubeTensor, running: &Moments, affine: Affine, norm: Norm) -> CubeTensor {
    ///     // Without degrees of freedom the variance is not rescaled, for any number of values.
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

/// Mean and biased variance, `[channels]` each in the accumulator's dtype (f64 for f64, f32 otherwise).
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
    /// The parameters' dtype, or the accumulator's.
    pub(crate) fn dtype(&self, accumulator: DType) -> DType {
        let parameter = self.gamma.or(self.beta);
        parameter.map_or(accumulator, |tensor| tensor.dtype)
    }

    /// Both in memory as kernels read them, in vectors.
    pub(crate) fn contiguous(&self) -> [Option<CubeTensor>; 2] {
        [self.gamma, self.beta].map(|tensor| tensor.cloned().map(into_contiguous))
    }

    /// Panics unless both have that many values, of one dtype, as kernels rely on.
    pub(crate) fn assert_channels(&self, channels: usize) {
        for (what, tensor) in [("gamma", self.gamma), ("beta", self.beta)] {
            if let Some(tensor) = tensor {
                assert_values(what, tensor, channels, self.dtype(tensor.dtype));
            }
        }
    }
}

/// A table's norm for a kernel; without a table, an unused one.
pub(crate) fn args(table: Option<&ChannelTable>, dtype: ElemType) -> NormArgsLaunch {
    let unread = Norm {
        inner_epsilon: 0.0,
        outer_epsilon: 0.0,
        degrees_of_freedom: 0,
    };
    let (norm, values) = table.map_or((unread, 1), |table| (table.norm, table.values));
    norm.launch(values, dtype)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn affine_kernel<T: Float, P: Float, V: Size>(
    mean: &Tensor<Vector<T, V>>,
    variance: &Tensor<Vector<T, V>>,
    gamma: ComptimeOption<&Tensor<Vector<P, V>>>,
    beta: ComptimeOption<&Tensor<Vector<P, V>>>,
    table: &mut Tensor<Vector<T, V>>,
    norm: &NormArgs,
    vectors: usize,
    #[define(T, P)] _elements: [ElemType; 2],
) {
    let vector = ABSOLUTE_POS;
    if vector >= vectors {
        terminate!();
    }
    let (mean, variance) = (mean[vector], variance[vector]);
    let affine = channel_affine::<T, P, V>(mean, variance, gamma, beta, norm, vector);
    write_affine(table, &affine, vector, vectors);
}

/// The table for a backward pass, from the forward pass's moments over `values` values per channel. No launch:
/// [`GradSums::finish`](crate::GradSums::finish) completes it.
///
/// # Panics
///
/// Panics if variance, gamma or beta has another number of values than the mean, variance another dtype than the mean, or
/// beta another than gamma.
pub fn channel_table(moments: &Moments, affine: Affine, norm: Norm, values: usize) -> ChannelTable {
    let channels = moments.mean.meta.num_elements();
    assert_values("variance", &moments.variance, channels, moments.mean.dtype);
    affine.assert_channels(channels);
    let [gamma, beta] = affine.contiguous();
    ChannelTable {
        moments: Moments {
            mean: into_contiguous(moments.mean.clone()),
            variance: into_contiguous(moments.variance.clone()),
        },
        gamma,
        beta,
        norm,
        values,
        is_of_batch: true,
        rows: RefCell::new(None),
    }
}

/// The rows of `scale * (value - mean) + shift`.
fn affine_rows(source: &ChannelTable) -> CubeTensor {
    let mean = &source.moments.mean;
    let channels = mean.meta.num_elements();
    let table = channel_values(mean, rows::AFFINE, channels);
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
                1,
                mean.clone().into_tensor_arg(),
                source.moments.variance.clone().into_tensor_arg(),
                tensor_arg(source.gamma.as_ref()).into(),
                tensor_arg(source.beta.as_ref()).into(),
                table.clone().into_tensor_arg(),
                args(Some(source), dtype),
                channels,
                [dtype, source.parameter_type()],
            );
        }
    }
    table
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn grads_kernel<T: Float, P: Float, V: Size>(
    partials: &Tensor<Vector<T, V>>,
    mean: &Tensor<Vector<T, V>>,
    variance: &Tensor<Vector<T, V>>,
    gamma: ComptimeOption<&Tensor<Vector<P, V>>>,
    beta: ComptimeOption<&Tensor<Vector<P, V>>>,
    table: &mut Tensor<Vector<T, V>>,
    gamma_grad: &mut Tensor<Vector<P, V>>,
    beta_grad: &mut Tensor<Vector<P, V>>,
    norm: &NormArgs,
    grid: &Grid,
    #[comptime] is_of_batch: bool,
    #[comptime] lanes: Lanes,
    #[define(T, P)] _elements: [ElemType; 2],
) {
    if is_idle(grid) {
        terminate!();
    }
    let unit = unit::<V>(grid, lanes);
    let sums = fold_rows::<T, V>(partials, &unit, lanes, Fold::Sums);
    if unit.lane == 0 && unit.has_channel {
        write_grads::<T, P, V>(
            &sums,
            mean,
            variance,
            gamma,
            beta,
            table,
            gamma_grad,
            beta_grad,
            norm,
            grid,
            &unit,
            is_of_batch,
        );
    }
}

/// Writes all rows of a unit's channels and their parameters' gradients, from `sum(g)` and `sum(g * (value - mean))`.
#[cube]
pub(crate) fn write_grads<T: Float, P: Float, V: Size>(
    sums: &Partial<T, V>,
    mean: &Tensor<Vector<T, V>>,
    variance: &Tensor<Vector<T, V>>,
    gamma: ComptimeOption<&Tensor<Vector<P, V>>>,
    beta: ComptimeOption<&Tensor<Vector<P, V>>>,
    table: &mut Tensor<Vector<T, V>>,
    gamma_grad: &mut Tensor<Vector<P, V>>,
    beta_grad: &mut Tensor<Vector<P, V>>,
    norm: &NormArgs,
    grid: &Grid,
    unit: &Unit,
    #[comptime] is_of_batch: bool,
) {
    let vector = unit.vector;
    let vectors = grid.channels / unit.width;
    let (mean, variance) = (mean[vector], variance[vector]);
    let affine = channel_affine::<T, P, V>(mean, variance, gamma, beta, norm, vector);
    write_affine(table, &affine, vector, vectors);
    let deviation = standard_deviation(variance, norm);
    let inverse = inverse_deviation(deviation, norm);
    gamma_grad[vector] = Vector::cast_from(inverse * sums.second);
    beta_grad[vector] = Vector::cast_from(sums.first);

    if comptime!(is_of_batch) {
        // ds/dvar * 2 / (m - ddof)
        let zero = Vector::<T, V>::zero();
        let slope = select_many(
            deviation.equal(&zero),
            zero,
            -(inverse * inverse) / (deviation * Vector::new(norm.freedom.get::<T>())),
        );
        let slope = parameter::<T, P, V>(gamma, vector, 1) * slope;
        table[rows::SLOPE * vectors + vector] = slope * sums.second;
        let values = Vector::new(norm.values.get::<T>());
        table[rows::OFFSET * vectors + vector] = -(affine.scale * sums.first) / values;
    }
}

/// Gradients of the norm's parameters, `[channels]` each.
#[derive(Clone, Debug)]
pub struct AffineGrads {
    /// `s * sum(g * (z - mean))`.
    pub gamma: CubeTensor,
    /// `sum(g)`.
    pub beta: CubeTensor,
}

/// What a launch writes that finishes the sums.
#[derive(Clone, Debug)]
pub(crate) struct SumsResults {
    pub(crate) rows: CubeTensor,
    pub(crate) grads: AffineGrads,
}

impl SumsResults {
    pub(crate) fn new(partials: &CubeTensor, table: &ChannelTable, channels: usize) -> Self {
        let grad = || {
            empty_device_contiguous_dtype(
                partials.client.clone(),
                partials.device.clone(),
                Shape::from(vec![channels]),
                table.affine().dtype(partials.dtype),
            )
        };
        Self {
            rows: channel_values(partials, rows::ALL, channels),
            grads: AffineGrads {
                gamma: grad(),
                beta: grad(),
            },
        }
    }

    /// Completes the table that the sums were taken with.
    pub(crate) fn complete(self, table: &ChannelTable) -> AffineGrads {
        table.rows.replace(Some(self.rows));
        self.grads
    }
}

/// Gradients of gamma and beta from partial sums, in the parameters' dtype, or the accumulator's. Writes all rows of
/// `table`, under batch statistics with the coefficients of the input's gradient.
pub(crate) fn finish_sums(partials: CubeTensor, table: &ChannelTable) -> AffineGrads {
    let walk = Walk::over_rows(&partials);
    let client = partials.client.clone();
    let dtype = element_type(partials.dtype);
    let results = SumsResults::new(&partials, table, walk.channels);
    if !walk.is_empty() {
        // SAFETY: `unit` keeps the rows and channels below those of the table.
        unsafe {
            grads_kernel::launch_unchecked(
                &client,
                walk.cube_count(&client),
                walk.lanes.cube_dim(),
                walk.address_type(),
                walk.vector_size,
                partials.into_tensor_arg(),
                table.moments.mean.clone().into_tensor_arg(),
                table.moments.variance.clone().into_tensor_arg(),
                tensor_arg(table.gamma.as_ref()).into(),
                tensor_arg(table.beta.as_ref()).into(),
                results.rows.clone().into_tensor_arg(),
                results.grads.gamma.clone().into_tensor_arg(),
                results.grads.beta.clone().into_tensor_arg(),
                args(Some(table), dtype),
                walk.grid(),
                table.is_of_batch,
                walk.lanes,
                [dtype, table.parameter_type()],
            );
        }
    }
    results.complete(table)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn grad_sum_kernel<T: Float, V: Size>(
    partials: &Tensor<Vector<T, V>>,
    grad: &mut Tensor<Vector<T, V>>,
    grid: &Grid,
    #[comptime] lanes: Lanes,
    #[define(T)] _element: ElemType,
) {
    if is_idle(grid) {
        terminate!();
    }
    let unit = unit::<V>(grid, lanes);
    let sums = fold_rows::<T, V>(partials, &unit, lanes, Fold::Sums);
    if unit.lane == 0 && unit.has_channel {
        grad[unit.vector] = sums.first;
    }
}

/// `sum(g)` from partial sums, `[channels]` in the accumulator's dtype.
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
                walk.vector_size,
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
pub(crate) fn channel_values(like: &CubeTensor, rows: usize, channels: usize) -> CubeTensor {
    empty_device_contiguous_dtype(
        like.client.clone(),
        like.device.clone(),
        Shape::from(vec![rows * channels]),
        like.dtype,
    )
}
