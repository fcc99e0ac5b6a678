//! Whether fused and unfused training are the same computation: the first losses from the same
//! weights on the same batches.

use std::sync::Arc;

use anyhow::{Result, bail};
use burn::data::dataloader::DataLoader;
use burn::module::Param;
use burn::tensor::Tensor;
use burn::train::{Interrupter, TrainStep};
use burn_conv_bn_models::Net;

use crate::batch::{EpochLoader, MnistBatch};
use crate::data::Digits;
use crate::job::{Job, Precision, Variant};
use crate::memory::MemoryProbe;
use crate::optim::AdadeltaConfig;
use crate::print::say;
use crate::step::Classifier;

/// Largest difference of losses that double precision may show.
pub const F64_TOLERANCE: f64 = 1e-6;

/// The same computation with its sums in another order: digits and hidden units are counted from
/// the other end, or images and kernels are mirrored. Without rounding the losses would be the
/// same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reordering {
    /// Digits of a batch from last to first, which the batch's sums run over.
    pub batch: bool,
    /// Channels from last to first, which the sums of the second convolution and of the first
    /// linear layer run over.
    pub channels: bool,
    /// Images, kernels and the linear layer's view of them mirrored, which the sums over taps and
    /// positions run over.
    pub mirror: bool,
}

impl Reordering {
    /// No change.
    pub const NONE: Self = Self {
        batch: false,
        channels: false,
        mirror: false,
    };

    /// Three orders that share no sum's order with each other or with [`NONE`](Self::NONE).
    pub const ALL: [Self; 3] = [
        Self {
            batch: true,
            channels: true,
            mirror: false,
        },
        Self {
            batch: false,
            channels: false,
            mirror: true,
        },
        Self {
            batch: true,
            channels: true,
            mirror: true,
        },
    ];

    fn of_batch(self, batch: MnistBatch) -> MnistBatch {
        let MnistBatch { images, targets } = batch;
        let (images, targets) = match self.batch {
            true => (images.flip([0]), targets.flip([0])),
            false => (images, targets),
        };
        MnistBatch {
            images: match self.mirror {
                true => images.flip([3]),
                false => images,
            },
            targets,
        }
    }

    fn of_net(self, mut net: Net) -> Net {
        let side = pooled_side(&net);
        net.conv1.conv.weight = leaf(net.conv1.conv.weight, |weight| {
            self.mirrored(self.reversed(weight, 0), 3)
        });
        net.conv2.conv.weight = leaf(net.conv2.conv.weight, |weight| {
            self.mirrored(self.reversed(self.reversed(weight, 0), 1), 3)
        });
        net.fc1.weight = leaf(net.fc1.weight, |weight| {
            let [features, hidden] = weight.dims();
            let channels = features / (side * side);
            let pixels = weight.reshape([channels, side, side, hidden]);
            self.mirrored(self.reversed(pixels, 0), 2)
                .reshape([features, hidden])
        });
        net
    }

    fn reversed<const D: usize>(self, tensor: Tensor<D>, channels: isize) -> Tensor<D> {
        match self.channels {
            true => tensor.flip([channels]),
            false => tensor,
        }
    }

    fn mirrored<const D: usize>(self, tensor: Tensor<D>, width: isize) -> Tensor<D> {
        match self.mirror {
            true => tensor.flip([width]),
            false => tensor,
        }
    }
}

/// Height and width of what the linear layers see.
fn pooled_side(net: &Net) -> usize {
    let [channels, ..] = net.conv2.conv.weight.dims();
    let [features, _] = net.fc1.weight.dims();
    (features / channels).isqrt()
}

/// Changes a parameter that stays one.
fn leaf<const D: usize>(
    param: Param<Tensor<D>>,
    change: impl FnOnce(Tensor<D>) -> Tensor<D>,
) -> Param<Tensor<D>> {
    param.map(|tensor| change(tensor.detach().set_require_grad(false)).require_grad())
}

/// Losses of the first steps.
#[derive(Clone, Debug)]
pub struct Parity {
    /// Of the fused variant.
    pub fused: Vec<f64>,
    /// Of the unfused variant, first as it is and then reordered.
    pub unfused: Vec<Vec<f64>>,
}

impl Parity {
    /// Trains for `steps` steps without dropout: fused once, unfused once and once more for each
    /// of `reorderings`.
    ///
    /// # Errors
    ///
    /// If the data cannot be read, or if it was interrupted.
    pub fn measure(
        job: &Job,
        digits: Arc<Digits>,
        steps: usize,
        reorderings: &[Reordering],
        interrupter: &Interrupter,
    ) -> Result<Self> {
        let run = |variant, reordering: &Reordering| {
            losses(job, &digits, variant, steps, *reordering, interrupter)
        };
        Ok(Self {
            fused: run(Variant::Fused, &Reordering::NONE)?,
            unfused: [Reordering::NONE]
                .iter()
                .chain(reorderings)
                .map(|reordering| run(Variant::Unfused, reordering))
                .collect::<Result<_>>()?,
        })
    }

    /// Largest difference of a loss between the fused run and the unfused run nearest to it.
    pub fn difference(&self) -> f64 {
        let each = self.unfused.iter().map(|run| largest(&self.fused, run));
        each.fold(f64::INFINITY, f64::min)
    }

    /// Largest difference of a loss between two unfused runs.
    pub fn spread(&self) -> f64 {
        let runs = self.unfused.iter().enumerate();
        let pairs = runs.flat_map(|(i, a)| self.unfused[..i].iter().map(move |b| largest(a, b)));
        pairs.fold(0.0, f64::max)
    }

    /// Prints the losses and the verdict.
    ///
    /// # Errors
    ///
    /// If the variants differ by more than [`F64_TOLERANCE`] in double precision, or by more than
    /// the [`spread`](Self::spread) in single.
    pub fn judge(&self, precision: Precision) -> Result<()> {
        say!(
            "{:>4} {:>14} {:>14} {:>10}",
            "step",
            "fused",
            "unfused",
            "difference"
        );
        for (step, (fused, unfused)) in self.fused.iter().zip(&self.unfused[0]).enumerate() {
            let difference = (fused - unfused).abs();
            say!("{step:>4} {fused:>14.9} {unfused:>14.9} {difference:>10.1e}");
        }
        let difference = self.difference();
        let limit = match precision {
            Precision::F64 => F64_TOLERANCE,
            Precision::F32 => self.spread(),
        };
        match precision {
            Precision::F64 => say!("largest difference {difference:.1e}, allowed {limit:.0e}"),
            Precision::F32 => say!(
                "largest difference {difference:.1e} from the nearest of {} unfused runs, whose \
                 sums run in different orders and which differ by up to {limit:.1e}",
                self.unfused.len()
            ),
        }
        match difference <= limit {
            true => Ok(()),
            false => bail!("the variants' losses differ by {difference:e}, more than {limit:e}"),
        }
    }
}

/// Largest difference of two runs' losses; infinite where one is not a number.
fn largest(a: &[f64], b: &[f64]) -> f64 {
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, |max, difference| match difference.is_nan() {
        true => f64::INFINITY,
        false => difference.max(max),
    })
}

fn losses(
    job: &Job,
    digits: &Arc<Digits>,
    variant: Variant,
    steps: usize,
    reordering: Reordering,
    interrupter: &Interrupter,
) -> Result<Vec<f64>> {
    let job = Job {
        dropout: 0.0,
        ..job.clone()
    };
    let loader = EpochLoader::new(
        digits.clone(),
        job.batch_size,
        job.precision.dtype(),
        job.device(),
        job.seed,
        0,
    );
    let mut optimizer = AdadeltaConfig::new().init();
    let net = reordering.of_net(job.net(variant));
    let mut model = Classifier::new(net, MemoryProbe::off(), job.precision.dtype());
    let mut losses = Vec::with_capacity(steps);
    while losses.len() < steps {
        for batch in loader.iter().take(steps - losses.len()) {
            if interrupter.should_stop() {
                bail!("interrupted");
            }
            let output = TrainStep::step(&model, reordering.of_batch(batch?));
            losses.push(output.item.output.loss.mean().into_scalar::<f64>());
            model = optimizer.step(job.learning_rate, model, output.grads);
        }
    }
    Ok(losses)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parity(fused: &[f64], unfused: &[&[f64]]) -> Parity {
        Parity {
            fused: fused.to_vec(),
            unfused: unfused.iter().map(|run| run.to_vec()).collect(),
        }
    }

    #[test]
    fn the_verdict_compares_with_the_spread() {
        let within = parity(&[1.0, 2.05], &[&[1.0, 2.0], &[1.0, 2.1]]);
        assert!((within.difference() - 0.05).abs() < 1e-12);
        assert!((within.spread() - 0.1).abs() < 1e-12);
        assert!(within.judge(Precision::F32).is_ok());
        assert!(within.judge(Precision::F64).is_err());
        let outside = parity(&[1.0, 2.5], &[&[1.0, 2.0], &[1.0, 2.1]]);
        assert!(outside.judge(Precision::F32).is_err());
        let lost = parity(&[1.0, f64::NAN], &[&[1.0, 2.0], &[1.0, 2.1]]);
        assert!(lost.judge(Precision::F32).is_err());
        assert!(lost.judge(Precision::F64).is_err());
    }
}
