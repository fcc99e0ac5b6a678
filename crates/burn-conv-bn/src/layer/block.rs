//! What the layers of every rank do, written once.

use std::sync::{Mutex, PoisonError};

use burn::module::{Module, Param, RunningState};
use burn::nn::BatchNorm;
use burn::tensor::{DType, Shape, Tensor, TensorData};

use super::convolution::Convolution;
use super::{ConvBnSettings, FoldError, MaxPool2d, RunningVariance};
use crate::definition::accumulator_dtype;
use crate::definition::{
    ConvBnError, ConvBnOptions, ConvBnProblem, NormSpec, NormVariant, Parents, SavePlan,
    SavedTensor, StatisticsKind, values_per_channel,
};
use crate::functional::{ConvBnParams, Normalized, conv_bn, conv_bn_max_pool2d};

/// The parts of a layer.
pub(super) struct Block<'a, C> {
    pub(super) conv: &'a C,
    pub(super) norm: &'a BatchNorm,
    pub(super) settings: &'a ConvBnSettings,
}

/// Held while running statistics are read and written.
static UPDATE: Mutex<()> = Mutex::new(());

/// Makes the updates of all threads part of the value.
///
/// Burn's `value_sync` takes those of the calling thread alone, but turning to evaluation takes all.
fn take_pending(running: &RunningState<Tensor<1>>) {
    drop(running.valid());
}

/// The value with the updates of all threads.
pub(super) fn current(running: &RunningState<Tensor<1>>) -> Tensor<1> {
    take_pending(running);
    running.value()
}

impl<C> Block<'_, C> {
    pub(super) fn forward<const D: usize>(
        &self,
        input: Tensor<D>,
        residual: Option<Tensor<D>>,
    ) -> Tensor<D>
    where
        C: Convolution<D>,
    {
        self.run(input, residual, conv_bn)
    }

    /// As [`forward`](Self::forward), with a max pool behind.
    pub(super) fn forward_max_pool(&self, input: Tensor<4>, pool: &MaxPool2d) -> Tensor<4>
    where
        C: Convolution<4>,
    {
        // What the statistics ask of the shape, the op checks.
        let output = self.problem(input.shape(), StatisticsKind::Fixed).output;
        let pool = pool.options(&output);
        self.run(input, None, |input, params, options| {
            conv_bn_max_pool2d(input, params, options, pool)
        })
    }

    /// Runs an op on the parameters, and updates the running statistics.
    pub(super) fn run<const D: usize>(
        &self,
        input: Tensor<D>,
        residual: Option<Tensor<D>>,
        op: impl FnOnce(Tensor<D>, ConvBnParams<D>, ConvBnOptions) -> Result<Normalized<D>, ConvBnError>,
    ) -> Tensor<D>
    where
        C: Convolution<D>,
    {
        let weight = self.conv.weight().val();
        let bias = self.conv.bias().map(|bias| bias.val());
        // Burn's norm looks at its own input, the convolution's output, which is on autodiff as soon as
        // one operand is: a data loader without a device gives plain inputs.
        let on_autodiff = input.is_autodiff()
            || weight.is_autodiff()
            || bias.as_ref().is_some_and(Tensor::is_autodiff);
        let training = on_autodiff && self.norm.training.is_enabled();
        let affine = self.settings.affine;
        let params = ConvBnParams {
            weight,
            bias,
            affine: affine.then(|| (self.norm.gamma.val(), self.norm.beta.val())),
            residual,
            statistics: (self.statistics(training) == StatisticsKind::Fixed).then(|| {
                let device = input.device();
                [&self.norm.running_mean, &self.norm.running_var]
                    .map(|running| current(running).to_device(&device))
                    .into()
            }),
        };
        let shape = input.shape();
        let options = self.options(&shape);
        let result = op(input, params, options).unwrap_or_else(|error| panic!("{error}"));
        if training && self.settings.track_running_stats {
            self.update_running_statistics(&result, shape);
        }
        result.output
    }

    fn statistics(&self, training: bool) -> StatisticsKind {
        match training || !self.settings.track_running_stats {
            true => StatisticsKind::Batch,
            false => StatisticsKind::Fixed,
        }
    }

    /// The op's options for an input of that shape, on which `Same` padding depends.
    fn options<const D: usize>(&self, input: &Shape) -> ConvBnOptions
    where
        C: Convolution<D>,
    {
        ConvBnOptions {
            conv: self.conv.spec(input),
            norm: NormSpec::new(self.settings.norm_variant, self.norm.epsilon),
            activation: self.settings.activation,
            recompute: self.settings.recompute,
            max_workspace: self.settings.max_workspace,
        }
    }

    fn problem<const D: usize>(&self, input: Shape, statistics: StatisticsKind) -> ConvBnProblem
    where
        C: Convolution<D>,
    {
        let options = self.options(&input);
        let is_batch = statistics == StatisticsKind::Batch;
        ConvBnProblem::conv_bn(input, self.conv.weight().val().shape(), &options, is_batch)
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// The one place where running statistics are written.
    fn update_running_statistics<const D: usize>(&self, result: &Normalized<D>, input: Shape)
    where
        C: Convolution<D>,
    {
        let variance = match self.settings.running_variance {
            RunningVariance::Biased => result.variance.clone(),
            RunningVariance::Unbiased => {
                // Not of the result, which may be pooled.
                let output = self.problem(input, StatisticsKind::Batch).output;
                let values = values_per_channel(&output) as f64;
                result.variance.clone() * (values / (values - 1.0))
            }
        };
        // Threads that train clones of a layer share its statistics: no update is lost between reading
        // and writing. The tensors are too small for Flex to run another task of this thread meanwhile.
        let _guard = UPDATE.lock().unwrap_or_else(PoisonError::into_inner);
        for (running, new) in [
            (&self.norm.running_mean, result.mean.clone()),
            (&self.norm.running_var, variance),
        ] {
            let old = current(running).to_device(&new.device());
            let new = new.cast(old.dtype()).detach();
            let momentum = self.norm.momentum;
            running.update((old * (1.0 - momentum) + new * momentum).detach());
            // A pending update would overwrite a record that is loaded next.
            take_pending(running);
        }
    }

    pub(super) fn saved_for_backward<const D: usize>(
        &self,
        input_shape: [usize; D],
        residual: bool,
    ) -> Vec<SavedTensor>
    where
        C: Convolution<D>,
    {
        let input_shape = Shape::from(input_shape);
        let options = self.options(&input_shape);
        let (problem, statistics, [present, tracked]) = self.step(input_shape, residual);
        SavePlan::new(&options, statistics, present, tracked).tensors(
            &problem,
            self.conv.weight().val().dtype(),
            self.norm.gamma.val().dtype(),
        )
    }

    /// Shapes of a training step for a tracked input, its statistics, and which tensors it is given and
    /// which of them are tracked.
    fn step<const D: usize>(
        &self,
        input: Shape,
        residual: bool,
    ) -> (ConvBnProblem, StatisticsKind, [Parents; 2])
    where
        C: Convolution<D>,
    {
        let weight = self.conv.weight().val();
        let statistics = self.statistics(self.norm.training.is_enabled());
        let affine = self.settings.affine;
        let bias = self.conv.bias();
        let present = Parents {
            input: true,
            weight: true,
            bias: bias.is_some(),
            gamma: affine,
            beta: affine,
            residual,
        };
        let tracked = Parents {
            input: true,
            // Not only where they are leaves: casts lead back to them.
            weight: weight.is_tracked(),
            bias: bias.is_some_and(|bias| bias.val().is_tracked()),
            gamma: affine && self.norm.gamma.val().is_require_grad(),
            beta: affine && self.norm.beta.val().is_require_grad(),
            residual,
        };
        (
            self.problem(input, statistics),
            statistics,
            [present, tracked],
        )
    }

    /// As [`saved_for_backward`](Self::saved_for_backward), with a max pool behind.
    pub(super) fn saved_for_backward_max_pool(
        &self,
        input_shape: [usize; 4],
        pool: &MaxPool2d,
    ) -> Vec<SavedTensor>
    where
        C: Convolution<4>,
    {
        let input_shape = Shape::from(input_shape);
        let options = self.options(&input_shape);
        let (problem, statistics, [present, tracked]) = self.step(input_shape, false);
        let pooled = pool.problem(problem.output.clone());
        let mut plan = SavePlan::new(&options, statistics, present, tracked);
        let dtype = self.conv.weight().val().dtype();
        let of_pool = pooled.saved(dtype);
        let mut output = None;
        if SavePlan::joins_max_pool(&options, statistics, false) && pooled.joins_a_block() {
            plan = plan.with_max_pool(&options, present);
            // Of the pool, which has as many places as outputs.
            output = of_pool
                .first()
                .filter(|_| plan.output)
                .map(|places| SavedTensor {
                    name: "output",
                    shape: places.shape.clone(),
                    dtype,
                    shared: true,
                });
            plan.output = false;
        }
        let mut saved = plan.tensors(&problem, dtype, self.norm.gamma.val().dtype());
        saved.extend(output);
        saved.extend(of_pool);
        saved
    }

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
