//! A block's norm folded into its convolution.

use burn::module::Param;
use burn::tensor::{DType, Tensor, TensorData};

use super::FoldError;
use super::block::Block;
use super::convolution::Convolution;
use crate::definition::{NormVariant, accumulator_dtype};

impl<C> Block<'_, C> {
    pub(super) fn fold<const D: usize>(&self) -> Result<C, FoldError>
    where
        C: Convolution<D>,
    {
        if !self.settings.track_running_stats {
            return Err(FoldError::NoRunningStatistics);
        }
        let weight = self.conv.weight().val().detach();
        let (dtype, device) = (weight.dtype(), weight.device());
        let channels = weight.dims()[0];
        let row = |what, tensor: Tensor<1>| {
            let values: Vec<f64> = tensor.into_data().iter::<f64>().collect();
            match values.len() == channels {
                true => Ok(values),
                false => Err(FoldError::Channels {
                    what,
                    expected: channels,
                    got: values.len(),
                }),
            }
        };
        let mean = row("running_mean", self.norm.running_mean.value_sync())?;
        let variance = row("running_var", self.norm.running_var.value_sync())?;
        let (gamma, beta) = match self.settings.affine {
            true => (
                row("gamma", self.norm.gamma.val())?,
                row("beta", self.norm.beta.val())?,
            ),
            false => (vec![1.0; channels], vec![0.0; channels]),
        };
        let bias = match self.conv.bias() {
            Some(bias) => row("bias", bias.val())?,
            None => vec![0.0; channels],
        };
        let epsilon = self.norm.epsilon;
        let (mut scales, mut shifts) = (Vec::new(), Vec::new());
        for channel in 0..channels {
            let variance = variance[channel];
            let deviation = match self.settings.norm_variant {
                NormVariant::BatchNorm => (variance + epsilon).sqrt(),
                NormVariant::Tutorial => variance.sqrt() + epsilon,
            };
            let scale = gamma[channel] / deviation;
            let shift = scale * (bias[channel] - mean[channel]) + beta[channel];
            if !(scale.is_finite() && shift.is_finite()) {
                return Err(FoldError::NotFinite {
                    channel,
                    mean: mean[channel],
                    variance,
                    gamma: gamma[channel],
                    beta: beta[channel],
                });
            }
            scales.push(scale);
            shifts.push(shift);
        }
        let accumulator = accumulator_dtype(dtype);
        let upload = |values: Vec<f64>, dtype: DType| {
            Tensor::<1>::from_data(TensorData::new(values, [channels]), (&device, dtype))
        };
        let mut columns = [1; D];
        columns[0] = channels;
        let scale = upload(scales, accumulator).reshape(columns);
        let weight = (weight.cast(accumulator) * scale).cast(dtype);
        Ok(self.conv.clone().with_parameters(
            Param::from_tensor(weight),
            Param::from_tensor(upload(shifts, dtype)),
        ))
    }
}
