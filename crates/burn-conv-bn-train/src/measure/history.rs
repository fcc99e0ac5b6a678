//! The epochs of a run, those before a resume included, and its best epoch.

use std::fmt;
use std::ops::AddAssign;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::tensor::{Int, Tensor, TensorReadError};
use serde::{Deserialize, Serialize};

use crate::measure::memory::StepMeasure;
use crate::measure::number;
use crate::print::loss;

/// How well a network does on a set of digits.
///
/// Shown as in the tutorial: `Average loss: 0.4197, Accuracy: 8681/10000 (87%)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Evaluation {
    /// Sum of the digits' losses.
    #[serde(with = "number")]
    pub(crate) loss_sum: f64,
    /// Digits classified correctly.
    pub(crate) correct: usize,
    /// Digits seen.
    pub(crate) total: usize,
}

impl Evaluation {
    /// Evaluates one batch, given the loss of every digit. Sums in double precision.
    ///
    /// # Errors
    ///
    /// [`TensorReadError`] if the device fails to compute or to hand out the values.
    pub(crate) fn of(
        losses: Tensor<1>,
        scores: Tensor<2>,
        targets: Tensor<1, Int>,
    ) -> Result<Self, TensorReadError> {
        let [total] = targets.dims();
        let hits = scores.argmax(1).squeeze_dim::<1>(1).equal(targets);
        let correct = hits.int().sum().try_into_scalar::<u64>()?;
        let losses = losses.try_into_vec_as::<f64>()?;
        Ok(Self {
            loss_sum: losses.iter().sum(),
            correct: correct as usize,
            total,
        })
    }

    /// Mean loss of a digit; not a number if there are none.
    pub(crate) fn average_loss(&self) -> f64 {
        self.loss_sum / self.total as f64
    }

    /// Fraction of the digits classified correctly; not a number if there are none.
    pub(crate) fn accuracy(&self) -> f64 {
        self.correct as f64 / self.total as f64
    }
}

impl AddAssign for Evaluation {
    fn add_assign(&mut self, other: Self) {
        self.loss_sum += other.loss_sum;
        self.correct += other.correct;
        self.total += other.total;
    }
}

impl fmt::Display for Evaluation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Average loss: {}, Accuracy: {}/{} ({:.0}%)",
            loss(self.average_loss()),
            self.correct,
            self.total,
            100.0 * self.accuracy()
        )
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StepRecord {
    /// Loss and accuracy of the batch, before the step.
    pub(crate) evaluation: Evaluation,
    pub(crate) measure: StepMeasure,
}

/// The training part of an epoch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct SplitRecord {
    /// Totals over the digits seen, each before its step.
    pub(crate) evaluation: Evaluation,
    /// The training steps.
    pub(crate) steps: Vec<StepRecord>,
}

/// One epoch, as every checkpoint after it holds it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Epoch {
    /// The training, up to the interruption if there was one.
    pub(crate) train: SplitRecord,
    /// The test after it, unless it was interrupted.
    pub(crate) test: Option<Evaluation>,
}

/// The epochs of a run, those before it was resumed included. Clones share it: Burn's metrics collect
/// it on a thread of their own.
#[derive(Clone, Debug, Default)]
pub(crate) struct History(Arc<Mutex<Vec<Epoch>>>);

impl History {
    /// Goes on after `past`.
    pub(crate) fn new(past: Vec<Epoch>) -> Self {
        Self(Arc::new(Mutex::new(past)))
    }

    /// The epochs that were begun, the first one first.
    pub(crate) fn epochs(&self) -> Vec<Epoch> {
        self.lock().clone()
    }

    /// The epochs that are over.
    pub(crate) fn finished(&self) -> Vec<Epoch> {
        let mut epochs = self.epochs();
        epochs.retain(|epoch| epoch.test.is_some());
        epochs
    }

    /// Adds an epoch, whose test is to come.
    pub(crate) fn trained(&self, train: SplitRecord) {
        self.lock().push(Epoch { train, test: None });
    }

    /// Ends the last epoch.
    pub(crate) fn tested(&self, test: Evaluation) {
        if let Some(last) = self.lock().last_mut() {
            last.test = Some(test);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Epoch>> {
        // Each change is one store: a lock poisoned by a panic elsewhere guards a sound value.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The epoch, counted from 1, with the lowest mean loss on the test digits; the first of several.
///
/// None if no loss is finite.
pub(crate) fn best_epoch(history: &[Epoch]) -> Option<usize> {
    let losses = history.iter().map(|epoch| Some(epoch.test?.average_loss()));
    (1..)
        .zip(losses)
        .filter_map(|(epoch, loss)| Some((epoch, loss.filter(|loss| loss.is_finite())?)))
        .min_by(|(_, a), (_, b)| a.total_cmp(b))
        .map(|(epoch, _)| epoch)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Epochs with these mean losses on the test digits.
    pub(crate) fn history(losses: &[f64]) -> Vec<Epoch> {
        let epoch = |&loss| Epoch {
            train: SplitRecord::default(),
            test: Some(Evaluation {
                loss_sum: 4.0 * loss,
                correct: 2,
                total: 4,
            }),
        };
        losses.iter().map(epoch).collect()
    }

    #[test]
    fn the_best_epoch_is_the_first_with_the_lowest_loss() {
        for (losses, best) in [
            (&[][..], None),
            (&[3.0][..], Some(1)),
            (&[3.0, 2.0, 2.0, 2.5][..], Some(2)),
            (&[f64::NAN, f64::INFINITY, 1e9][..], Some(3)),
            (&[f64::NAN, f64::NAN][..], None),
        ] {
            assert_eq!(best_epoch(&history(losses)), best, "{losses:?}");
        }
    }
}
