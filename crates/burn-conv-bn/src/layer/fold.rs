//! A block's norm folded into its convolution.

use burn::module::Param;
use burn::tensor::{DType, Tensor, TensorData, bf16, f16};

use super::FoldError;
use super::block::current;
use super::borrowed::ConvBnRef;
use super::convolution::Convolution;
use crate::spec::{NormSpec, check_epsilon};

/// Largest rounding error of a channel's weights, relative to its output. Normal numbers of every dtype round
/// by less.
const MOST_LOST: f64 = 1.0 / 256.0;

impl<C: Convolution<D>, const D: usize> ConvBnRef<'_, C, D> {
    /// For inference: one convolution, with a bias, that computes `norm(conv(input))` of the evaluation
    /// mode. The activation is not part of it; apply `settings.activation.forward(..)`, after adding a
    /// residual if there is one.
    ///
    /// The new weight `gamma * s * weight` and bias `gamma * s * (bias - running_mean) + beta` are formed
    /// in f64 on the host and have the dtype of the old weight. They are parameters of their own on its
    /// device, trainable as those of a new convolution.
    ///
    /// # Errors
    ///
    /// [`FoldError::NoRunningStatistics`] if the layer evaluates on the batch's statistics, which no fixed
    /// weight reproduces; [`FoldError::NotFinite`] if a channel's scale or shift is not finite, as from a
    /// negative running variance; [`FoldError::OutOfRange`] if the weight's dtype does not hold a folded
    /// value; [`FoldError::SamePadding`] for `Same` padding that Burn's `Conv3d` does not have;
    /// [`FoldError::Channels`] and [`FoldError::Epsilon`] for parts that do not fit each other.
    pub fn fold(&self) -> Result<C, FoldError> {
        if !self.settings.track_running_stats {
            return Err(FoldError::NoRunningStatistics);
        }
        self.conv.check_padding()?;
        let epsilon = self.norm.epsilon;
        check_epsilon(epsilon, false).map_err(|_| FoldError::Epsilon { got: epsilon })?;
        let norm = NormSpec::new(self.settings.norm_variant, epsilon);
        let weight = self.weight();
        let (shape, dtype, device) = (weight.shape(), weight.dtype(), weight.device());
        let channels = shape[0];
        let row = |what, tensor: Tensor<1>| {
            let values: Vec<f64> = tensor.dequantize().into_data().iter::<f64>().collect();
            if values.len() == channels {
                Ok(values)
            } else {
                Err(FoldError::Channels {
                    what,
                    expected: channels,
                    got: values.len(),
                })
            }
        };
        let mean = row("running_mean", current(&self.norm.running_mean))?;
        let variance = row("running_var", current(&self.norm.running_var))?;
        let (gamma, beta) = if self.settings.affine {
            (
                row("gamma", self.norm.gamma.val())?,
                row("beta", self.norm.beta.val())?,
            )
        } else {
            (vec![1.0; channels], vec![0.0; channels])
        };
        let bias = match self.conv.bias() {
            Some(bias) => row("bias", bias.val())?,
            None => vec![0.0; channels],
        };
        let mut weights: Vec<f64> = weight.into_data().iter::<f64>().collect();
        let taps = weights.len().checked_div(channels).unwrap_or(0);
        let mut shifts = Vec::with_capacity(channels);
        for channel in 0..channels {
            let folding = Channel {
                channel,
                dtype,
                mean: mean[channel],
                variance: variance[channel],
                gamma: gamma[channel],
                beta: beta[channel],
            };
            let weights = &mut weights[channel * taps..][..taps];
            shifts.push(folding.fold(&norm, weights, bias[channel])?);
        }
        let options = (&device, dtype);
        let weight = Tensor::from_data(TensorData::new(weights, shape), options);
        let bias = Tensor::from_data(TensorData::new(shifts, [channels]), options);
        Ok(self
            .conv
            .clone()
            .with_parameters(Param::from_tensor(weight), Param::from_tensor(bias)))
    }
}

/// The norm of one channel.
struct Channel {
    channel: usize,
    dtype: DType,
    mean: f64,
    variance: f64,
    gamma: f64,
    beta: f64,
}

impl Channel {
    /// Scales the channel's weights in place, rounded to the dtype. Returns the folded bias.
    fn fold(&self, norm: &NormSpec, weights: &mut [f64], bias: f64) -> Result<f64, FoldError> {
        let Self {
            channel,
            dtype,
            mean,
            variance,
            gamma,
            beta,
        } = *self;
        let scale = gamma / norm.std(variance);
        let shift = scale * (bias - mean) + beta;
        if !(scale.is_finite() && shift.is_finite()) {
            return Err(FoldError::NotFinite {
                channel,
                mean,
                variance,
                gamma,
                beta,
            });
        }
        let out_of_range = |what, value| FoldError::OutOfRange {
            what,
            dtype,
            channel,
            value,
        };
        let (mut largest, mut lost) = (0.0f64, 0.0f64);
        for weight in weights {
            let exact = *weight * scale;
            *weight = rounded(exact, dtype);
            if !weight.is_finite() {
                return Err(out_of_range("weight", exact));
            }
            if exact.abs() > largest.abs() {
                largest = exact;
            }
            lost = lost.max((exact - *weight).abs());
        }
        // The weights' relative error is gamma's. It counts against the channel's output, unless that is
        // below the normal numbers itself, as of a channel that has died.
        let least = dtype.finfo().map_or(0.0, |info| info.min_positive);
        let output = gamma.abs().max(beta.abs()).max(least);
        if lost * gamma.abs() > MOST_LOST * largest.abs() * output {
            return Err(out_of_range("weight", largest));
        }
        let rounded_shift = rounded(shift, dtype);
        if !rounded_shift.is_finite() {
            return Err(out_of_range("bias", shift));
        }
        Ok(rounded_shift)
    }
}

/// `value` as `dtype` holds it.
fn rounded(value: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F64 => value,
        DType::F16 => f16::from_f64(value).to_f64(),
        DType::BF16 => bf16::from_f64(value).to_f64(),
        _ => f64::from(value as f32),
    }
}
