//! What the layers of every rank do, written once.

use burn::module::Param;
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
        let training = input.device().is_autodiff() && self.norm.training.is_enabled();
        let affine = self.settings.affine;
        let params = ConvBnParams {
            weight: self.conv.weight().val(),
            bias: self.conv.bias().map(|bias| bias.val()),
            affine: affine.then(|| (self.norm.gamma.val(), self.norm.beta.val())),
            residual,
            statistics: (self.statistics(training) == StatisticsKind::Fixed).then(|| {
                let device = input.device();
                (
                    self.norm.running_mean.value_sync().to_device(&device),
                    self.norm.running_var.value_sync().to_device(&device),
                )
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
        for (running, new) in [
            (&self.norm.running_mean, result.mean.clone()),
            (&self.norm.running_var, variance),
        ] {
            let old = running.value_sync().to_device(&new.device());
            let new = new.cast(old.dtype()).detach();
            let momentum = self.norm.momentum;
            running.update((old * (1.0 - momentum) + new * momentum).detach());
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
            gamma: affine && self.norm.gamma.val().is_tracked(),
            beta: affine && self.norm.beta.val().is_tracked(),
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
        let joined =
            SavePlan::joins_max_pool(&options, statistics, false) && pooled.joins_a_block();
        if joined {
            plan = plan.with_max_pool(&options, present);
        }
        let dtype = self.conv.weight().val().dtype();
        let mut saved = plan.tensors(&problem, dtype, self.norm.gamma.val().dtype());
        for tensor in &mut saved {
            match (tensor.name, joined) {
                ("output", true) => {
                    tensor.name = "pooled";
                    tensor.shape = pooled.output();
                }
                // The pool alone reads it.
                ("output", false) => tensor.shared = false,
                _ => {}
            }
        }
        for tensor in pooled.saved(dtype) {
            let is_output = tensor.name == "input";
            // The block may keep the very buffer that Burn's pool does.
            if is_output && tensor.shared && plan.output {
                continue;
            }
            saved.push(SavedTensor {
                name: if is_output { "output" } else { tensor.name },
                shared: false,
                ..tensor
            });
        }
        saved
    }

    pub(super) fn output_shape<const D: usize>(&self, input_shape: [usize; D]) -> [usize; D]
    where
        C: Convolution<D>,
    {
        // What batch statistics ask of the shape does not change the output's.
        let problem = self.problem(Shape::from(input_shape), StatisticsKind::Fixed);
        problem.output.dims()
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
