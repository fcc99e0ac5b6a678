//! Whether fused and unfused training are the same computation: the first losses from the same
//! weights on the same batches.

use std::sync::Arc;

use anyhow::{Result, bail};
use burn::data::dataloader::DataLoader;
use burn::train::TrainStep;

use crate::batch::{EpochLoader, MnistBatch};
use crate::data::Digits;
use crate::job::{Job, Precision, Variant};
use crate::memory::MemoryProbe;
use crate::optim::AdadeltaConfig;
use crate::step::Classifier;

/// Largest difference of losses that double precision may show.
pub const F64_TOLERANCE: f64 = 1e-6;

/// Losses of the first steps, by variant and order of the digits within a batch.
#[derive(Clone, Debug)]
pub struct Parity {
    /// Of the fused variant.
    pub fused: Vec<f64>,
    /// Of the unfused variant.
    pub unfused: Vec<f64>,
    /// Of the unfused variant with each batch in another order, so that its sums are rounded
    /// otherwise: one run for each rotation of the batches.
    pub reordered: Vec<Vec<f64>>,
}

impl Parity {
    /// Trains for `steps` steps without dropout, twice and once more for each of `reorderings`.
    pub fn measure(job: &Job, digits: Arc<Digits>, steps: usize, reorderings: usize) -> Result<Self> {
        let run = |variant, rotation| losses(job, &digits, variant, steps, rotation);
        Ok(Self {
            fused: run(Variant::Fused, 0)?,
            unfused: run(Variant::Unfused, 0)?,
            reordered: (1..=reorderings)
                .map(|i| run(Variant::Unfused, i * job.batch_size / (reorderings + 1)))
                .collect::<Result<_>>()?,
        })
    }

    /// Largest difference between the fused and the unfused losses.
    pub fn difference(&self) -> f64 {
        largest(&self.fused, &self.unfused)
    }

    /// Largest difference that the order of a batch makes to the unfused losses.
    pub fn spread(&self) -> f64 {
        let each = self.reordered.iter().map(|run| largest(run, &self.unfused));
        each.fold(0.0, f64::max)
    }

    /// Prints the losses and the verdict.
    ///
    /// # Errors
    ///
    /// If the variants differ by more than [`F64_TOLERANCE`] in double precision, or by more than
    /// the [`spread`](Self::spread) in single.
    pub fn judge(&self, precision: Precision) -> Result<()> {
        println!("{:>4} {:>14} {:>14} {:>10}", "step", "fused", "unfused", "difference");
        for (step, (fused, unfused)) in self.fused.iter().zip(&self.unfused).enumerate() {
            let difference = (fused - unfused).abs();
            println!("{step:>4} {fused:>14.9} {unfused:>14.9} {difference:>10.1e}");
        }
        let (difference, limit) = match precision {
            Precision::F64 => {
                println!("largest difference {:.1e}, allowed {F64_TOLERANCE:.0e}", self.difference());
                (self.difference(), F64_TOLERANCE)
            }
            Precision::F32 => {
                println!(
                    "largest difference {:.1e}; unfused runs in {} orders of the same batches \
                     differ by {:.1e}",
                    self.difference(),
                    self.reordered.len() + 1,
                    self.spread()
                );
                (self.difference(), self.spread())
            }
        };
        // Not `difference > limit`: a NaN is a difference.
        if !(difference <= limit) {
            bail!("the variants' losses differ by {difference:e}, more than {limit:e}");
        }
        Ok(())
    }
}

fn largest(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).fold(0.0, |max, (a, b)| {
        let difference = (a - b).abs();
        if difference.is_nan() { f64::NAN } else { difference.max(max) }
    })
}

fn losses(
    job: &Job,
    digits: &Arc<Digits>,
    variant: Variant,
    steps: usize,
    rotation: usize,
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
    let mut model: Classifier = job.classifier(variant, MemoryProbe::off());
    let mut losses = Vec::with_capacity(steps);
    while losses.len() < steps {
        for batch in loader.iter().take(steps - losses.len()) {
            let output = TrainStep::step(&model, rotated(batch?, rotation));
            losses.push(output.item.output.loss.mean().into_scalar::<f64>());
            model = optimizer.step(job.learning_rate, model, output.grads);
        }
    }
    Ok(losses)
}

/// The same digits, those from `rotation` on first.
fn rotated(batch: MnistBatch, rotation: usize) -> MnistBatch {
    let rotation = rotation as i64;
    match rotation {
        0 => batch,
        _ => MnistBatch {
            images: batch.images.roll_dim(-rotation, 0),
            targets: batch.targets.roll_dim(-rotation, 0),
        },
    }
}
