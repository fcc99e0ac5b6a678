//! The norm's formula per channel, in kernels.

use burn_cubecl::cubecl;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::walk::{Axis, Grid, Lanes, Unit, row};

/// Formula of the inverse standard deviation,
/// `s = 1 / (sqrt(M2 / (m - ddof) + inner_epsilon) + outer_epsilon)`.
///
/// Batch normalization has `inner_epsilon` alone and a `ddof` of 0. The derivative
/// `ds/dvar = -s^2 / (2 sqrt(var + inner_epsilon))` is 0 by definition where the root is 0.
///
/// ```
/// use burn_conv_bn_cubecl::Norm;
///
/// // The PyTorch tutorial's: unbiased variance, epsilon outside the root.
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
    /// Degrees of freedom subtracted from the number of values: 0 or 1.
    pub degrees_of_freedom: usize,
}

/// Rows of a channel table.
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

/// Rows of `scale * (value - mean) + shift` for a unit's channels; without a table, zeros.
#[derive(CubeType)]
pub(crate) struct UnitAffine<T: Float, N: Size> {
    pub(crate) mean: Vector<T, N>,
    pub(crate) scale: Vector<T, N>,
    pub(crate) shift: Vector<T, N>,
}

#[cube]
pub(crate) fn unit_affine<T: Float, N: Size, V: Size>(
    table: ComptimeOption<&Tensor<Vector<T, V>>>,
    grid: &Grid,
    unit: &Unit,
    #[comptime] lanes: Lanes,
) -> UnitAffine<T, N> {
    #[comptime]
    match table {
        ComptimeOption::Some(table) => UnitAffine::<T, N> {
            mean: row::<T, N, V>(table, grid, unit, rows::MEAN, lanes),
            scale: row::<T, N, V>(table, grid, unit, rows::SCALE, lanes),
            shift: row::<T, N, V>(table, grid, unit, rows::SHIFT, lanes),
        },
        ComptimeOption::None => UnitAffine::<T, N> {
            mean: Vector::zero(),
            scale: Vector::zero(),
            shift: Vector::zero(),
        },
    }
}

/// [`UnitAffine`] from statistics and parameters; without statistics, zeros.
#[cube]
pub(crate) fn unit_norm<T: Float, P: Float, N: Size>(
    mean: ComptimeOption<&Tensor<T>>,
    variance: ComptimeOption<&Tensor<T>>,
    gamma: ComptimeOption<&Tensor<P>>,
    beta: ComptimeOption<&Tensor<P>>,
    norm: &NormArgs,
    unit: &Unit,
    #[comptime] lanes: Lanes,
) -> UnitAffine<T, N> {
    let mut means = Vector::<T, N>::zero();
    let mut scales = Vector::<T, N>::zero();
    let mut shifts = Vector::<T, N>::zero();
    #[comptime]
    if let ComptimeOption::Some(mean) = mean {
        #[comptime]
        if let ComptimeOption::Some(variance) = variance {
            if unit.has_channel {
                match comptime!(lanes.axis) {
                    Axis::Positions => {
                        let affine = channel_affine::<T, P>(
                            mean[unit.channel * mean.stride(0)],
                            variance[unit.channel * variance.stride(0)],
                            gamma,
                            beta,
                            norm,
                            unit.channel,
                        );
                        means = Vector::new(affine.mean);
                        scales = Vector::new(affine.scale);
                        shifts = Vector::new(affine.shift);
                    }
                    Axis::Channels =>
                    {
                        #[unroll]
                        for component in 0..N::value() {
                            let channel = unit.channel + component;
                            let affine = channel_affine::<T, P>(
                                mean[channel * mean.stride(0)],
                                variance[channel * variance.stride(0)],
                                gamma,
                                beta,
                                norm,
                                channel,
                            );
                            means.insert(component, affine.mean);
                            scales.insert(component, affine.scale);
                            shifts.insert(component, affine.shift);
                        }
                    }
                }
            }
        }
    }
    UnitAffine::<T, N> {
        mean: means,
        scale: scales,
        shift: shifts,
    }
}

/// [`Norm`] for a number of values, as a kernel's argument.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct NormArgs {
    inner_epsilon: InputScalar,
    outer_epsilon: InputScalar,
    /// Number of values of a channel.
    pub(crate) values: InputScalar,
    /// `values` minus the degrees of freedom.
    pub(crate) freedom: InputScalar,
}

impl Norm {
    pub(crate) fn launch(&self, values: usize, dtype: ElemType) -> NormArgsLaunch {
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
pub(crate) fn standard_deviation<T: Float>(variance: T, norm: &NormArgs) -> T {
    let unbiased = variance * (norm.values.get::<T>() / norm.freedom.get::<T>());
    (unbiased + norm.inner_epsilon.get::<T>()).sqrt()
}

/// `s`.
#[cube]
pub(crate) fn inverse_deviation<T: Float>(deviation: T, norm: &NormArgs) -> T {
    T::from_int(1) / (deviation + norm.outer_epsilon.get::<T>())
}

#[cube]
pub(crate) fn parameter<T: Float, P: Float>(
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

/// `scale * (value - mean) + shift` of one channel.
#[derive(CubeType)]
pub(crate) struct ChannelAffine<T: Float> {
    mean: T,
    pub(crate) scale: T,
    shift: T,
}

#[cube]
pub(crate) fn channel_affine<T: Float, P: Float>(
    mean: T,
    variance: T,
    gamma: ComptimeOption<&Tensor<P>>,
    beta: ComptimeOption<&Tensor<P>>,
    norm: &NormArgs,
    channel: usize,
) -> ChannelAffine<T> {
    let inverse = inverse_deviation::<T>(standard_deviation::<T>(variance, norm), norm);
    ChannelAffine::<T> {
        mean,
        scale: parameter::<T, P>(gamma, channel, 1) * inverse,
        shift: parameter::<T, P>(beta, channel, 0),
    }
}

#[cube]
pub(crate) fn write_affine<T: Float>(
    table: &mut Tensor<T>,
    affine: &ChannelAffine<T>,
    channel: usize,
    channels: usize,
) {
    table[rows::MEAN * channels + channel] = affine.mean;
    table[rows::SCALE * channels + channel] = affine.scale;
    table[rows::SHIFT * channels + channel] = affine.shift;
}
