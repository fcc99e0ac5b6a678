//! A step of the layer, of every rank: its operands, its running statistics, and what it keeps.

use std::sync::{Mutex, PoisonError};

use burn::module::{Module, ModuleMapper, Param, RunningState};
use burn::nn::BatchNorm;
use burn::nn::conv::Conv2d;
use burn::tensor::{DType, Device, Shape, Tensor};

use super::borrowed::ConvBnRef;
use super::convolution::Convolution;
use super::error::or_panic;
use super::{MaxPool2d, RunningVariance};
use crate::functional::{ConvBnParams, Normalized, Running};
use crate::spec::{
    ConvBnError, ConvBnOptions, ConvBnProblem, NormSpec, Parents, SavePlan, SavedTensor,
    StatisticsKind,
};

/// Updates so far of all running statistics; held while they are read and written.
static UPDATES: Mutex<u64> = Mutex::new(0);

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

/// Running statistics between a forward pass's start and its end: the one place where they are written.
///
/// The op may update what was read at its start, if no other update came between.
pub(super) struct RunningUpdate<'a> {
    norm: &'a BatchNorm,
    factor: f64,
    device: Device,
    /// [`UPDATES`] when they were read.
    updates: u64,
}

impl<'a> RunningUpdate<'a> {
    /// Reads the statistics. `values` is how many values of a channel the batch's are taken of.
    pub(super) fn start(
        norm: &'a BatchNorm,
        kind: RunningVariance,
        device: Device,
        values: impl FnOnce() -> usize,
    ) -> (Self, Running) {
        let factor = match kind {
            RunningVariance::Biased => 1.0,
            RunningVariance::Unbiased => {
                let values = values() as f64;
                values / (values - 1.0)
            }
        };
        let updates = UPDATES.lock().unwrap_or_else(PoisonError::into_inner);
        let update = Self {
            norm,
            factor,
            device,
            updates: *updates,
        };
        let running = update.read();
        (update, running)
    }

    /// Writes them after a batch.
    pub(super) fn finish<const D: usize>(self, batch: &Normalized<D>) {
        // Threads that train clones of a layer share its statistics: no update is lost between reading
        // and writing. The tensors are too small for Flex to run another task of this thread meanwhile.
        let mut updates = UPDATES.lock().unwrap_or_else(PoisonError::into_inner);
        let [mean, variance] = match &batch.running {
            Some(running) if *updates == self.updates => running.clone(),
            _ => self
                .read()
                .after(batch.mean.clone(), batch.variance.clone()),
        };
        set(&self.norm.running_mean, mean);
        set(&self.norm.running_var, variance);
        *updates += 1;
    }

    fn read(&self) -> Running {
        let [mean, variance] = [&self.norm.running_mean, &self.norm.running_var]
            .map(|state| current(state).dequantize().to_device(&self.device));
        Running {
            mean,
            variance,
            momentum: self.norm.momentum,
            factor: self.factor,
        }
    }
}

/// Sets the value, of all clones of the state. [`RunningState::update`] leaves it pending, to be divided by the
/// number of threads that updated it, and a pending update would overwrite a record that is loaded next.
fn set(running: &RunningState<Tensor<1>>, value: Tensor<1>) {
    struct Replace(Tensor<1>);

    impl ModuleMapper for Replace {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let value = Tensor::from_dispatch(self.0.clone().into_dispatch());
            Param::initialized(param.id, value)
        }
    }

    drop(running.clone().map(&mut Replace(value)));
}

impl<C: Convolution<D>, const D: usize> ConvBnRef<'_, C, D> {
    /// Runs an op on the parameters, and updates the running statistics.
    #[track_caller]
    pub(super) fn run(
        &self,
        input: Tensor<D>,
        residual: Option<Tensor<D>>,
        op: impl FnOnce(
            Tensor<D>,
            ConvBnParams<D>,
            ConvBnOptions,
            Option<Running>,
        ) -> Result<Normalized<D>, ConvBnError>,
    ) -> Tensor<D> {
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
        let (update, running) = (training && self.settings.track_running_stats)
            .then(|| {
                let kind = self.settings.running_variance;
                RunningUpdate::start(self.norm, kind, input.device(), || {
                    let problem = self.problem(shape, StatisticsKind::Batch);
                    problem.values_per_channel()
                })
            })
            .unzip();
        let result = or_panic(op(input, params, options, running));
        if let Some(update) = update {
            update.finish(&result);
        }
        result.output
    }

    fn statistics(&self, training: bool) -> StatisticsKind {
        if training || !self.settings.track_running_stats {
            StatisticsKind::Batch
        } else {
            StatisticsKind::Fixed
        }
    }

    /// The op's options for an input of that shape, on which `Same` padding depends.
    fn options(&self, input: &Shape) -> ConvBnOptions {
        ConvBnOptions {
            conv: self.conv.spec(input),
            norm: NormSpec::new(self.settings.norm_variant, self.norm.epsilon),
            activation: self.settings.activation,
            recompute: self.settings.recompute,
            max_workspace: self.settings.max_workspace,
        }
    }

    /// The weight's values, which may be quantized.
    pub(super) fn weight(&self) -> Tensor<D> {
        self.conv.weight().val().dequantize()
    }

    #[track_caller]
    pub(super) fn problem(&self, input: Shape, statistics: StatisticsKind) -> ConvBnProblem {
        let options = self.options(&input);
        let is_batch = statistics == StatisticsKind::Batch;
        let weight = self.conv.weight().val().shape();
        or_panic(ConvBnProblem::conv_bn(input, weight, &options, is_batch))
    }

    /// What a training step keeps for the backward pass of [`forward`](Self::forward), for an input of that
    /// shape that is itself tracked, by name and bytes.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward), for the shape.
    #[track_caller]
    pub fn saved_for_backward(&self, input_shape: [usize; D]) -> Vec<SavedTensor> {
        self.saved(input_shape, false)
    }

    /// As [`saved_for_backward`](Self::saved_for_backward), for
    /// [`forward_residual`](Self::forward_residual) with a residual that is tracked too.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward), for the shape.
    #[track_caller]
    pub fn saved_for_backward_residual(&self, input_shape: [usize; D]) -> Vec<SavedTensor> {
        self.saved(input_shape, true)
    }

    #[track_caller]
    fn saved(&self, input_shape: [usize; D], residual: bool) -> Vec<SavedTensor> {
        let input_shape = Shape::from(input_shape);
        let options = self.options(&input_shape);
        let (problem, statistics, [present, tracked]) = self.step(input_shape, residual);
        if problem.values_per_channel() == 0 {
            return Vec::new();
        }
        let plan = SavePlan::new(&options, statistics, present, tracked);
        self.tensors(plan, &problem)
    }

    /// The plan's tensors. Those that are dequantized for the step are the node's own.
    fn tensors(&self, plan: SavePlan, problem: &ConvBnProblem) -> Vec<SavedTensor> {
        let gamma = self.norm.gamma.val();
        let gamma_dtype = gamma.clone().dequantize().dtype();
        let mut saved = plan.tensors(problem, self.weight().dtype(), gamma_dtype);
        for tensor in &mut saved {
            let parameter = match tensor.name {
                "weight" => Some(self.conv.weight().val().dtype()),
                "bias" => self.conv.bias().map(|bias| bias.val().dtype()),
                "gamma" => Some(gamma.dtype()),
                "beta" => Some(self.norm.beta.val().dtype()),
                _ => None,
            };
            tensor.shared &= !matches!(parameter, Some(DType::QFloat(_)));
        }
        saved
    }

    /// Shapes of a training step for a tracked input, its statistics, and which tensors it is given and
    /// which of them are tracked.
    #[track_caller]
    fn step(&self, input: Shape, residual: bool) -> (ConvBnProblem, StatisticsKind, [Parents; 2]) {
        let weight = self.weight();
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
}

impl ConvBnRef<'_, Conv2d, 4> {
    /// As [`saved_for_backward`](Self::saved_for_backward), of
    /// [`forward_max_pool`](Self::forward_max_pool) on Flex. `pooled` is what that returns, and `output`
    /// the block's, with the padding that Burn's pool adds, where it is kept between the two.
    ///
    /// # Panics
    ///
    /// As [`forward_max_pool`](Self::forward_max_pool), for the shape.
    #[track_caller]
    pub fn saved_for_backward_max_pool(
        &self,
        input_shape: [usize; 4],
        pool: impl Into<MaxPool2d>,
    ) -> Vec<SavedTensor> {
        let input_shape = Shape::from(input_shape);
        let options = self.options(&input_shape);
        let (problem, statistics, [present, tracked]) = self.step(input_shape, false);
        if problem.values_per_channel() == 0 {
            return Vec::new();
        }
        let pooled = pool.into().problem(problem.output.clone());
        let joined = SavePlan::joins_max_pool(statistics, false) && pooled.is_regular();
        let plan = if joined {
            let options = options.joined();
            let plan = SavePlan::new(&options, statistics, present, tracked);
            plan.with_max_pool(&options, present)
        } else {
            SavePlan::new(&options, statistics, present, tracked)
        };
        let dtype = self.weight().dtype();
        let mut saved = self.tensors(plan, &problem);
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
            // The block may keep the very buffer that Burn's pool does, or rebuild it.
            if is_output && tensor.shared && (plan.output || plan.rebuilds_output) {
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
}
