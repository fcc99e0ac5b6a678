//! The metrics' logs, as Burn lays them out, without what Burn does when a disk is full.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use burn::train::Interrupter;
use burn::train::logger::MetricLogger;
use burn::train::metric::store::{EpochSummary, MetricsUpdate, Split};
use burn::train::metric::{MetricDefinition, MetricEntry, MetricId, NumericEntry};
use burn_conv_bn_files::{OutputError, Survives};

use crate::persist::lock::FirstFailure;

/// Writes `<split>/epoch-<n>/<metric>.log` at the end of every pass, a value of each batch on a
/// line and the final one on the last.
///
/// Burn's own `FileMetricLogger` writes lines as they come, so that an epoch cut short leaves half
/// a log, and panics when it cannot write, one time while it is unwinding, which aborts the
/// process. Here a log is whole or not there. One that cannot be written is reported, and the
/// training asked to stop.
pub(crate) struct MetricLog {
    directory: PathBuf,
    failure: FirstFailure,
    interrupter: Interrupter,
    names: HashMap<MetricId, String>,
    /// Of the passes that are running.
    lines: BTreeMap<Log, String>,
}

/// One metric in one pass.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Log {
    split: String,
    epoch: usize,
    metric: String,
}

impl Log {
    fn path(&self, directory: &Path) -> PathBuf {
        let folder = directory.join(&self.split);
        let folder = folder.join(format!("epoch-{}", self.epoch));
        // As Burn names it.
        folder.join(format!("{}.log", self.metric.replace(' ', "_")))
    }
}

impl MetricLog {
    /// Logs to `directory`; a log that cannot be written goes to `failure`.
    pub(crate) fn new(directory: &Path, failure: FirstFailure, interrupter: Interrupter) -> Self {
        Self {
            directory: directory.to_path_buf(),
            failure,
            interrupter,
            names: HashMap::new(),
            lines: BTreeMap::new(),
        }
    }

    fn add(&mut self, entry: &MetricEntry, epoch: usize, split: &Split) {
        let value = &entry.serialized_entry;
        let Some(metric) = self.names.get(&entry.metric_id) else {
            return;
        };
        // Some metrics have a value only at the end of a pass.
        if value.is_not_available() {
            return;
        }
        let log = Log {
            split: split.to_string(),
            epoch,
            metric: metric.clone(),
        };
        let lines = self.lines.entry(log).or_default();
        lines.push_str(&value.serialized);
        lines.push('\n');
    }
}

impl MetricLogger for MetricLog {
    fn log(&mut self, update: MetricsUpdate, epoch: usize, split: &Split) {
        for entry in &update.entries {
            self.add(entry, epoch, split);
        }
        for numeric in &update.entries_numeric {
            self.add(&numeric.entry, epoch, split);
        }
    }

    /// The values of a log. Lines that are no numbers are passed over: Burn panics on an error.
    fn read_numeric(
        &mut self,
        name: &str,
        epoch: usize,
        split: &Split,
    ) -> Result<Vec<NumericEntry>, String> {
        let log = Log {
            split: split.to_string(),
            epoch,
            metric: name.to_string(),
        };
        let written;
        let lines = match self.lines.get(&log) {
            Some(lines) => lines,
            None => {
                written = fs::read_to_string(log.path(&self.directory)).unwrap_or_default();
                &written
            }
        };
        Ok(lines
            .lines()
            .filter_map(|line| NumericEntry::deserialize(line).ok())
            .collect())
    }

    fn log_metric_definition(&mut self, definition: MetricDefinition) {
        let name = definition.name.to_string();
        self.names.insert(definition.metric_id, name);
    }

    fn log_epoch_summary(&mut self, summary: EpochSummary) {
        let split = summary.split.to_string();
        let ended = |log: &&Log| log.split == split && log.epoch == summary.epoch_number;
        let ended: Vec<Log> = self.lines.keys().filter(ended).cloned().collect();
        for log in ended {
            let lines = self.lines.remove(&log).unwrap_or_default();
            if let Err(failure) = write(&log.path(&self.directory), &lines) {
                self.failure.report(failure);
                self.interrupter.stop(Some("a log cannot be written"));
            }
        }
    }
}

/// Writes one log, in a folder that need not exist.
fn write(path: &Path, lines: &str) -> Result<(), OutputError> {
    let made = path.parent().map_or(Ok(()), fs::create_dir_all);
    made.map_err(|source| OutputError::io(path, source))?;
    burn_conv_bn_files::write(path, lines.as_bytes(), Survives::Kill)
}

#[cfg(test)]
mod tests {
    use super::*;

    use burn::train::metric::store::NumericMetricUpdate;
    use burn::train::metric::{LossMetric, Metric, SerializedEntry};
    use tempfile::TempDir;

    fn log_in(directory: &Path) -> MetricLog {
        let mut log = MetricLog::new(directory, FirstFailure::default(), Interrupter::new());
        let loss = LossMetric::new();
        log.log_metric_definition(MetricDefinition::new(id(), &loss));
        log
    }

    fn id() -> MetricId {
        MetricId::new(LossMetric::new().name())
    }

    fn update(value: &NumericEntry) -> MetricsUpdate {
        let entry = SerializedEntry::new(String::new(), value.serialize());
        let entry = MetricEntry::new(id(), entry);
        MetricsUpdate::new(
            Vec::new(),
            vec![NumericMetricUpdate::new(entry, Some(value.clone()), None)],
        )
    }

    fn train(log: &mut MetricLog, epoch: usize) {
        let batch = NumericEntry::Aggregated {
            aggregated_value: 0.1,
            count: 32,
        };
        log.log(update(&batch), epoch, &Split::Train);
        log.log(update(&NumericEntry::Final(0.1)), epoch, &Split::Train);
    }

    #[test]
    fn a_log_is_there_when_its_pass_is_over() {
        let folder = TempDir::new().unwrap();
        let mut log = log_in(folder.path());
        train(&mut log, 3);
        let path = folder.path().join("train/epoch-3/Loss.log");
        assert!(!path.exists());
        let running = log.read_numeric("Loss", 3, &Split::Train).unwrap();
        assert_eq!(running.len(), 2);

        log.log_epoch_summary(EpochSummary::new(3, Split::Valid));
        assert!(!path.exists());
        log.log_epoch_summary(EpochSummary::new(3, Split::Train));
        assert_eq!(fs::read_to_string(&path).unwrap(), "0.1,32\n0.1,final\n");
        let written = log.read_numeric("Loss", 3, &Split::Train).unwrap();
        assert_eq!(written.len(), 2);
        assert!(matches!(written[1], NumericEntry::Final(value) if value == 0.1));
        assert!(log.lines.is_empty());
    }

    #[test]
    fn what_is_not_there_or_damaged_is_no_reason_to_panic() {
        let folder = TempDir::new().unwrap();
        let mut log = log_in(folder.path());
        assert!(
            log.read_numeric("Loss", 1, &Split::Valid)
                .unwrap()
                .is_empty()
        );
        write(
            &folder.path().join("valid/epoch-1/Loss.log"),
            "0.5,1\n0.2,\n",
        )
        .unwrap();
        let values = log.read_numeric("Loss", 1, &Split::Valid).unwrap();
        assert_eq!(values.len(), 1);
    }

    #[test]
    fn a_log_that_cannot_be_written_stops_the_training() {
        let folder = TempDir::new().unwrap();
        // Nothing can be written below a file.
        fs::write(folder.path().join("train"), "").unwrap();
        let mut log = log_in(folder.path());
        let (failure, interrupter) = (log.failure.clone(), log.interrupter.clone());
        train(&mut log, 1);
        assert!(!interrupter.should_stop());
        log.log_epoch_summary(EpochSummary::new(1, Split::Train));
        assert!(interrupter.should_stop());
        let failure = failure.take().unwrap().to_string();
        assert!(failure.contains("train/epoch-1/Loss.log"), "{failure}");
    }
}
