//! The norm of each channel on the host, in f64.

use burn::backend::Flex;
use burn::tensor::{DType, Shape};
use burn_conv_bn_cpu::Real;

use super::tensor::{Kernel, tensor};
use crate::backend::OptionalTensor;
use crate::portable::cast;
use crate::spec::NormSpec;

/// [`NormSpec`]'s formula for each channel: `portable::norm::ChannelNorm` on the host.
pub(super) struct HostNorm {
    norm: NormSpec,
    values: usize,
    variance: Vec<f64>,
    /// `s`.
    pub(super) inv_std: Vec<f64>,
}

impl HostNorm {
    /// From the biased variance of `values` values a channel.
    pub(super) fn of_batch<T: Real>(norm: NormSpec, values: usize, biased_variance: &[T]) -> Self {
        let degrees = values - norm.variant.degrees_of_freedom();
        let correction = values as f64 / degrees as f64;
        let variance = biased_variance
            .iter()
            .map(|variance| variance.to_f64() * correction);
        Self::new(norm, values, variance.collect())
    }

    /// From a variance that is used as it is.
    pub(super) fn given<T: Real>(norm: NormSpec, variance: &[T]) -> Self {
        Self::new(
            norm,
            0,
            variance.iter().map(|variance| variance.to_f64()).collect(),
        )
    }

    fn new(norm: NormSpec, values: usize, variance: Vec<f64>) -> Self {
        let inv_std = variance.iter().map(|variance| norm.inv_std(*variance));
        Self {
            norm,
            values,
            inv_std: inv_std.collect(),
            variance,
        }
    }

    /// `gamma * s`.
    pub(super) fn scale<T: Real>(&self, gamma: Option<Vec<T>>) -> Vec<T> {
        rounded(self.with_gamma(gamma.as_deref(), &self.inv_std).into_iter())
    }

    fn with_gamma<T: Real>(&self, gamma: Option<&[T]>, values: &[f64]) -> Vec<f64> {
        match gamma {
            Some(gamma) => values
                .iter()
                .zip(gamma)
                .map(|(value, gamma)| value * gamma.to_f64())
                .collect(),
            None => values.to_vec(),
        }
    }

    /// Slope and offset of the input's gradient, from `sum(g)` and `sum(g * (z - mean))`.
    pub(super) fn input_grad<T: Real>(
        &self,
        gamma: Option<&[T]>,
        grad: &[f64],
        grad_deviation: &[f64],
    ) -> (Vec<f64>, Vec<f64>) {
        let values = self.values as f64;
        let degrees = (self.values - self.norm.variant.degrees_of_freedom()) as f64;
        let slope: Vec<f64> = self
            .variance
            .iter()
            .map(|variance| self.norm.slope_factor(*variance, degrees))
            .collect();
        let slope = times(&self.with_gamma(gamma, &slope), grad_deviation);
        let offset = times(&self.with_gamma(gamma, &self.inv_std), grad);
        (
            slope,
            offset.into_iter().map(|offset| -offset / values).collect(),
        )
    }
}

pub(super) fn times(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a * b).collect()
}

pub(super) fn rounded<T: Real>(values: impl Iterator<Item = f64>) -> Vec<T> {
    values.map(T::from_f64).collect()
}

/// `mean - bias`: the mean of the convolution's output without its bias.
pub(super) fn center<T: Real>(mean: &[T], bias: Option<Vec<T>>) -> Vec<T> {
    match bias {
        Some(bias) => mean
            .iter()
            .zip(bias)
            .map(|(mean, bias)| *mean - bias)
            .collect(),
        None => mean.to_vec(),
    }
}

/// Gradients of a `[channels]` tensor, in its dtype.
pub(super) fn channel_grad<E: Kernel>(
    wanted: bool,
    grad: Vec<f64>,
    dtype: DType,
) -> OptionalTensor<Flex> {
    let grad = wanted.then(|| {
        let shape = Shape::new([grad.len()]);
        let grad = rounded::<E::Real>(grad.into_iter());
        cast::<Flex>(tensor(grad, &shape), dtype)
    });
    grad.into()
}
