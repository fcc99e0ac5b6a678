//! The totals of a run's epochs, those before a resume included, and its best epoch.

use burn::train::metric::store::{Aggregate, EventStoreClient, Split};
use burn::train::metric::{LossMetric, Metric};
use serde::{Deserialize, Serialize};

use crate::measure::metrics::{Evaluation, SplitRecord, Tally};

/// One finished epoch, as every checkpoint after it holds it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct EpochTotals {
    /// Over the training digits, each before its step, with the steps.
    pub(crate) train: SplitRecord,
    /// Over the test digits, after the epoch.
    pub(crate) test: Evaluation,
}

/// The totals of all epochs of a run: those before it was resumed, and those since.
#[derive(Clone)]
pub(crate) struct History {
    past: Vec<EpochTotals>,
    train: Tally,
    test: Tally,
}

impl History {
    /// Goes on where `past` ends. The tallies must be empty.
    pub(crate) fn new(past: Vec<EpochTotals>, train: Tally, test: Tally) -> Self {
        Self { past, train, test }
    }

    /// The epochs that are over, the first one first.
    pub(crate) fn finished(&self) -> Vec<EpochTotals> {
        let since = self.train.finished().into_iter().zip(self.test.finished());
        let since = since.map(|(train, test)| EpochTotals {
            train,
            test: test.evaluation,
        });
        self.past.iter().cloned().chain(since).collect()
    }
}

/// The epoch, counted from 1, with the lowest mean loss on the test digits; the first of several.
///
/// None if no loss is finite.
pub(crate) fn best_epoch(history: &[EpochTotals]) -> Option<usize> {
    let losses = history.iter().map(|epoch| epoch.test.average_loss());
    (1..)
        .zip(losses)
        .filter(|(_, loss)| loss.is_finite())
        .min_by(|(_, a), (_, b)| a.total_cmp(b))
        .map(|(epoch, _)| epoch)
}

/// Waits until the logs of an epoch are written, which another thread does.
pub(crate) fn wait_for_logs(epoch: usize, store: &EventStoreClient) {
    // It answers when it has done everything that it was asked before.
    let name = LossMetric::new().name();
    let _ = store.find_metric(&name, epoch, Aggregate::Mean, &Split::Valid);
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Epochs with these mean losses on the test digits.
    pub(crate) fn history(losses: &[f64]) -> Vec<EpochTotals> {
        let epoch = |&loss| EpochTotals {
            train: SplitRecord::default(),
            test: Evaluation {
                loss_sum: 4.0 * loss,
                correct: 2,
                total: 4,
            },
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
