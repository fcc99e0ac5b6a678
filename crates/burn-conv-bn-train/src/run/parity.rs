//! Whether fused and unfused training are the same computation: the first losses from the same
//! weights on the same batches.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use burn::data::dataloader::DataLoader;
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::Tensor;
use burn::train::{Interrupter, TrainStep};
use burn_conv_bn_models::{AnyNetwork, DenseNet};

use crate::choice::Choice;
use crate::data::{CLASSES, Digits, EpochLoader, MnistBatch};
use crate::device::DeviceChoice;
use crate::measure::memory::MemoryProbe;
use crate::model::ModelChoice;
use crate::print::{number, say};
use crate::run::job::{Job, Precision, Variant};
use crate::step::Classifier;

/// Largest difference of losses that double precision may show.
pub(crate) const F64_TOLERANCE: f64 = 1e-6;

/// Error of an f32 loss, relative to its size, that rounding alone explains.
///
/// The loss is the result of four roundings at its own size: the log-softmax's two subtractions, and
/// sum and quotient of the mean. Each is off by up to half an ulp, 2^-24 of the loss; the two-times rule
/// allows twice their sum.
const F32_FLOOR: f64 = 4.0 * f32::EPSILON as f64;

/// The same computation with its sums in another order: digits or features are counted from the other
/// end. Without rounding the losses would be the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Reordering {
    /// Digits of a batch from last to first, which the batch's sums run over.
    batch: bool,
    /// Channels, hidden values and inputs of linear layers from last to first, which the sums of the
    /// convolutions after the first one and of the linear layers run over.
    ///
    /// The tutorial's network gives its first linear layer every pixel of every channel. There images and
    /// kernels are turned around, too.
    features: bool,
}

impl Reordering {
    /// All three that change something.
    fn all() -> [Self; 3] {
        [(true, false), (false, true), (true, true)]
            .map(|(batch, features)| Self { batch, features })
    }

    fn of_batch(self, batch: MnistBatch, model: ModelChoice) -> MnistBatch {
        let MnistBatch {
            mut images,
            mut targets,
        } = batch;
        if self.batch {
            images = images.flip([0]);
            targets = targets.flip([0]);
        }
        if self.features && model == ModelChoice::Tutorial {
            images = images.flip([2, 3]);
        }
        MnistBatch { images, targets }
    }

    fn of_network(self, network: AnyNetwork, model: ModelChoice) -> AnyNetwork {
        if !self.features {
            return network;
        }
        match network {
            AnyNetwork::DenseNet(net) => of_dense_net(net).into(),
            network => {
                let axes = if model == ModelChoice::Tutorial { 4 } else { 2 };
                network.map(&mut ReverseFeatures { axes: 0..axes })
            }
        }
    }
}

/// Of the channels inside the dense layers alone: those of a concatenation are in the order of the layers.
fn of_dense_net(mut net: DenseNet) -> DenseNet {
    let blocks = [
        &mut net.denseblock1,
        &mut net.denseblock2,
        &mut net.denseblock3,
        &mut net.denseblock4,
    ];
    for layer in blocks.into_iter().flatten() {
        let outputs = &mut ReverseFeatures { axes: 0..1 };
        layer.conv1 = layer.conv1.clone().map(outputs);
        let inputs = &mut ReverseFeatures { axes: 1..2 };
        layer.conv2 = layer.conv2.clone().map(inputs);
    }
    net
}

/// Counts the channels and features of a network from the other end, all but the classes and the images'
/// one channel.
///
/// What goes into VGG's linear layers is one pixel for each channel, repeated: turned around as a
/// whole it is the channels turned around.
struct ReverseFeatures {
    /// Those of each parameter that are turned around. Weights of linear layers are `[in, out]`, of
    /// convolutions `[out, in, ..]`.
    axes: Range<usize>,
}

impl ModuleMapper for ReverseFeatures {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| {
            let tracked = tensor.is_require_grad();
            let mut tensor = tensor.detach().set_require_grad(false);
            for axis in self.axes.start..self.axes.end.min(D) {
                if tensor.dims()[axis] != CLASSES {
                    tensor = tensor.flip([axis as isize]);
                }
            }
            tensor.set_require_grad(tracked)
        })
    }
}

/// Losses of the first steps.
#[derive(Clone, Debug)]
pub(crate) struct Parity {
    /// Of the fused variant.
    pub(crate) fused: Vec<f64>,
    /// Of the unfused variant, first as it is and then reordered.
    pub(crate) unfused: Vec<Vec<f64>>,
    /// Of the unfused variant in double precision, where the runs are in single.
    pub(crate) exact: Option<Vec<f64>>,
}

impl Parity {
    /// Trains for `steps` steps without dropout: fused and unfused, and, in single precision,
    /// unfused in each of [`Reordering::all`] and in double precision.
    ///
    /// # Errors
    ///
    /// In mixed precision, if the data cannot be read, or if it was interrupted.
    pub(crate) fn measure(
        job: &Job,
        digits: Arc<Digits>,
        steps: usize,
        interrupter: &Interrupter,
    ) -> Result<Self> {
        // On the CPU where that was compiled in: double precision is no strength of GPUs, and
        // WGSL has no exponential of it.
        let mut double = job.clone();
        double.setup.precision = Precision::F64;
        double.setup.device = DeviceChoice::host().unwrap_or(job.setup.device);
        Self::of_runs(job.setup.precision, |precision, variant, order| {
            let job = if precision == job.setup.precision {
                job
            } else {
                &double
            };
            losses(job, &digits, variant, steps, order, interrupter)
        })
    }

    /// Checks that the losses of two variants can be judged in that precision.
    pub(crate) fn check(precision: Precision) -> Result<()> {
        ensure!(
            !precision.is_mixed(),
            "parity has no bound for {}, in which rounding alone takes the losses of two variants \
             apart within a few steps; use --precision f32 or f64",
            precision.name()
        );
        Ok(())
    }

    /// The runs that the verdict needs for a job in that precision.
    fn of_runs(
        precision: Precision,
        mut run: impl FnMut(Precision, Variant, Reordering) -> Result<Vec<f64>>,
    ) -> Result<Self> {
        Self::check(precision)?;
        let none = Reordering::default();
        let mut parity = Self {
            fused: run(precision, Variant::Fused, none)?,
            unfused: vec![run(precision, Variant::Unfused, none)?],
            exact: None,
        };
        if precision == Precision::F32 {
            for order in Reordering::all() {
                parity
                    .unfused
                    .push(run(precision, Variant::Unfused, order)?);
            }
            let exact = run(Precision::F64, Variant::Unfused, none)?;
            parity.exact = Some(exact);
        }
        Ok(parity)
    }

    /// Largest difference of a loss between two unfused runs.
    pub(crate) fn spread(&self) -> f64 {
        let runs = self.unfused.iter().enumerate();
        let pairs = runs.flat_map(|(i, a)| self.unfused[..i].iter().map(move |b| largest(a, b)));
        pairs.fold(0.0, f64::max)
    }

    /// Prints the losses and the verdict.
    ///
    /// In single precision the losses of both variants drift from those of double precision, and the
    /// optimizer multiplies the drift, Adadelta at a learning rate of 1 more than others. The verdict follows
    /// the two-times rule: the fused run may be at most twice as far from the unfused run in double precision
    /// as the farthest unfused run in single. That yardstick shares no fault with the fused op. The spread of
    /// the unfused runs would not do: Burn sums each channel of its batch norm in one long f32 sum, whose
    /// error every order shares. In case the unfused runs agree with the yardstick by chance, half an ulp of
    /// the loss (2^-24 of it) for each of four roundings is allowed, twice as well.
    ///
    /// # Errors
    ///
    /// If the variants differ by more than [`F64_TOLERANCE`] in double precision, or the fused run
    /// breaks the two-times rule in single, or if a loss is not finite.
    pub(crate) fn judge(&self) -> Result<()> {
        let unfused = &self.unfused[0];
        let (reference, named) = match &self.exact {
            Some(exact) => (exact, "unfused in f64"),
            None => (unfused, "unfused"),
        };
        say!(
            "{:>4} {:>14} {:>14} {named:>14} {:>12}",
            "step",
            "fused",
            "unfused",
            "|fused - it|"
        )?;
        for (step, (fused, unfused)) in self.fused.iter().zip(unfused).enumerate() {
            let difference = (fused - reference[step]).abs();
            let [fused, unfused, it] =
                [*fused, *unfused, reference[step]].map(|loss| number(loss, 14, 9));
            let step = step + 1;
            say!("{step:>4} {fused} {unfused} {it} {difference:>12.1e}")?;
        }
        let difference = largest(&self.fused, reference);
        let limit = match &self.exact {
            None => {
                say!("largest difference {difference:.1e}, allowed {F64_TOLERANCE:.0e}")?;
                F64_TOLERANCE
            }
            Some(exact) => {
                let errors = self.unfused.iter().map(|run| largest(run, exact));
                let farthest = errors.fold(0.0, f64::max);
                say!(
                    "largest difference from double precision: fused {difference:.1e}, {} unfused \
                     runs, whose sums run in different orders, up to {farthest:.1e} (and up to \
                     {:.1e} from each other)",
                    self.unfused.len(),
                    self.spread()
                )?;
                let floor =
                    F32_FLOOR * exact.iter().fold(0.0, |max: f64, loss| max.max(loss.abs()));
                (2.0 * farthest).max(floor)
            }
        };
        if !difference.is_finite() || !limit.is_finite() {
            bail!("a loss is not a finite number, and nothing can be said about the others");
        }
        ensure!(
            difference <= limit,
            "the fused losses are off by {difference:e}, more than {limit:e}"
        );
        Ok(())
    }
}

/// Largest difference of two runs' losses; infinite where one is not a number.
fn largest(a: &[f64], b: &[f64]) -> f64 {
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences
        .map(|difference| {
            if difference.is_nan() {
                f64::INFINITY
            } else {
                difference
            }
        })
        .fold(0.0, f64::max)
}

fn losses(
    job: &Job,
    digits: &Arc<Digits>,
    variant: Variant,
    steps: usize,
    reordering: Reordering,
    interrupter: &Interrupter,
) -> Result<Vec<f64>> {
    let loader = EpochLoader::new(
        digits.clone(),
        job.setup.batch_size,
        job.setup.precision.activations(),
        job.device(),
        job.setup.data.seed,
        0,
    );
    let mut optimizer = job.setup.optimizer.init();
    let network = reordering.of_network(job.network(variant.form()), job.setup.model);
    let mut model = Classifier::new(network, MemoryProbe::off(), job.setup.precision);
    let mut losses = Vec::with_capacity(steps);
    while losses.len() < steps {
        for batch in loader.iter().take(steps - losses.len()) {
            if interrupter.should_stop() {
                bail!("interrupted");
            }
            let output = TrainStep::step(&model, reordering.of_batch(batch?, job.setup.model));
            losses.push(output.item.loss.mean().into_scalar::<f64>());
            model = optimizer.step(job.setup.learning_rate(), model, output.grads);
        }
    }
    Ok(losses)
}

#[cfg(test)]
mod tests;
