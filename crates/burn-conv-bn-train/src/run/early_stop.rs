//! When a training ends before its last epoch.

use burn::train::EarlyStoppingStrategy;
use burn::train::metric::store::EventStoreClient;

use crate::measure::history::{Epoch, History, best_epoch};

/// Whether the last `patience` epochs have brought nothing better than the epochs before them.
pub(crate) fn is_exhausted(history: &[Epoch], patience: usize) -> bool {
    // As with Burn's own early stopping, a first epoch without a loss counts as the best so far.
    let best = best_epoch(history).unwrap_or(1);
    history.len().saturating_sub(best) >= patience
}

/// Ends a training when it no longer improves.
///
/// Burn's own strategy keeps the best loss and its epoch to itself, and begins anew in a run that is
/// resumed; this one has no state but the run's history.
#[derive(Clone)]
pub(crate) struct EpochEnd {
    pub(crate) history: History,
    pub(crate) patience: usize,
}

impl EarlyStoppingStrategy for EpochEnd {
    fn should_stop(&mut self, _epoch: usize, _store: &EventStoreClient) -> bool {
        // Burn has handed the whole epoch to the metrics before it asks.
        is_exhausted(&self.history.finished(), self.patience)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::measure::history::tests::history;

    /// The epoch after which a training stops, as Burn's `MetricEarlyStoppingStrategy` decides.
    fn burn_stops_after(losses: &[f64], patience: usize) -> Option<usize> {
        let (mut best, mut lowest) = (1, f64::MAX);
        for (epoch, &loss) in (1..).zip(losses) {
            if loss < lowest {
                (best, lowest) = (epoch, loss);
            } else if epoch - best >= patience {
                return Some(epoch);
            }
        }
        None
    }

    #[test]
    fn patience_ends_where_burn_ends_it() {
        for losses in [
            &[4.0, 3.0, 2.0, 1.0][..],
            &[1.0, 1.0, 1.0, 1.0],
            &[2.0, 3.0, 1.0, 4.0, 4.0, 4.0],
            &[f64::NAN, f64::NAN, f64::NAN],
            &[f64::NAN, 2.0, f64::NAN, 3.0],
        ] {
            let history = history(losses);
            for patience in 1..4 {
                let stops = (1..=losses.len()).find(|&n| is_exhausted(&history[..n], patience));
                assert_eq!(
                    stops,
                    burn_stops_after(losses, patience),
                    "{losses:?}, patience {patience}"
                );
            }
        }
    }

    #[test]
    fn a_run_before_its_first_epoch_goes_on() {
        assert!(!is_exhausted(&[], 1));
    }
}
