//! The norm's formula per channel, in kernels.

use burn_cubecl::cubecl;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::walk::{Grid, Lanes, Unit, resized, row};

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

/// `scale * (value - mean) + shift` of some channels.
#[derive(CubeType)]
pub(crate) struct AffineRows<T: Float, N: Size> {
    pub(crate) mean: Vector<T, N>,
    pub(crate) scale: Vector<T, N>,
    pub(crate) shift: Vector<T, N>,
}

#[cube]
impl<T: Float, N: Size> AffineRows<T, N> {
    /// For a launch that reads no norm.
    pub(crate) fn unread() -> Self {
        AffineRows::<T, N> {
            mean: Vector::zero(),
            scale: Vector::zero(),
            shift: Vector::zero(),
        }
    }
}

/// A unit's rows of a table.
#[cube]
pub(crate) fn unit_affine<T: Float, N: Size, V: Size>(
    table: ComptimeOption<&Tensor<Vector<T, V>>>,
    grid: &Grid,
    unit: &Unit,
    #[comptime] lanes: Lanes,
) -> AffineRows<T, N> {
    #[comptime]
    match table {
        ComptimeOption::Some(table) => AffineRows::<T, N> {
            mean: row::<T, N, V>(table, grid, unit, rows::MEAN, lanes),
            scale: row::<T, N, V>(table, grid, unit, rows::SCALE, lanes),
            shift: row::<T, N, V>(table, grid, unit, rows::SHIFT, lanes),
        },
        ComptimeOption::None => AffineRows::<T, N>::unread(),
    }
}

/// A unit's rows from statistics and parameters.
#[cube]
pub(crate) fn unit_norm<T: Float, P: Float, N: Size, V: Size>(
    mean: ComptimeOption<&Tensor<Vector<T, V>>>,
    variance: ComptimeOption<&Tensor<Vector<T, V>>>,
    gamma: ComptimeOption<&Tensor<Vector<P, V>>>,
    beta: ComptimeOption<&Tensor<Vector<P, V>>>,
    norm: &NormArgs,
    unit: &Unit,
    #[comptime] lanes: Lanes,
) -> AffineRows<T, N> {
    #[comptime]
    match mean {
        ComptimeOption::Some(mean) => {
            let affine = channel_affine::<T, P, V>(
                mean[unit.vector],
                variance.unwrap()[unit.vector],
                gamma,
                beta,
                norm,
                unit.vector,
            );
            AffineRows::<T, N> {
                mean: resized(affine.mean, lanes),
                scale: resized(affine.scale, lanes),
                shift: resized(affine.shift, lanes),
            }
        }
        ComptimeOption::None => AffineRows::<T, N>::unread(),
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
pub(crate) fn standard_deviation<T: Float, V: Size>(
    variance: Vector<T, V>,
    norm: &NormArgs,
) -> Vector<T, V> {
    let unbiased = Vector::new(norm.values.get::<T>() / norm.freedom.get::<T>());
    (variance * unbiased + Vector::new(norm.inner_epsilon.get::<T>())).sqrt()
}

/// `s`.
#[cube]
pub(crate) fn inverse_deviation<T: Float, V: Size>(
    deviation: Vector<T, V>,
    norm: &NormArgs,
) -> Vector<T, V> {
    let one = Vector::new(T::from_int(1));
    one / (deviation + Vector::new(norm.outer_epsilon.get::<T>()))
}

#[cube]
pub(crate) fn parameter<T: Float, P: Float, V: Size>(
    tensor: ComptimeOption<&Tensor<Vector<P, V>>>,
    vector: usize,
    #[comptime] otherwise: i64,
) -> Vector<T, V> {
    #[comptime]
    match tensor {
        ComptimeOption::Some(tensor) => Vector::cast_from(tensor[vector]),
        ComptimeOption::None => Vector::new(T::from_int(otherwise)),
    }
}

#[cube]
pub(crate) fn channel_affine<T: Float, P: Float, V: Size>(
    mean: Vector<T, V>,
    variance: Vector<T, V>,
    gamma: ComptimeOption<&Tensor<Vector<P, V>>>,
    beta: ComptimeOption<&Tensor<Vector<P, V>>>,
    norm: &NormArgs,
    vector: usize,
) -> AffineRows<T, V> {
    let inverse = inverse_deviation(standard_deviation(variance, norm), norm);
    AffineRows::<T, V> {
        mean,
        scale: parameter::<T, P, V>(gamma, vector, 1) * inverse,
        shift: parameter::<T, P, V>(beta, vector, 0),
    }
}

/// Writes the rows at one of a row's `vectors`.
#[cube]
pub(crate) fn write_affine<T: Float, V: Size>(
    table: &mut Tensor<Vector<T, V>>,
    affine: &AffineRows<T, V>,
    vector: usize,
    vectors: usize,
) {
    table[rows::MEAN * vectors + vector] = affine.mean;
    table[rows::SCALE * vectors + vector] = affine.scale;
    table[rows::SHIFT * vectors + vector] = affine.shift;
}
