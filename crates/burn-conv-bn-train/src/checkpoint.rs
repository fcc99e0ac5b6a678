//! Checkpoints that neither a kill nor a full disk nor a damaged file takes away.
//!
//! A checkpoint is a set of files in the folder `checkpoint` of a run. After epoch 3 they are
//! Burn's records `model-3.bpk`, `optim-3.bpk` and `scheduler-3.bpk`, and `epoch-3.json`, which
//! lists them with their sizes and checksums and has the totals and steps of the epochs so far. Each file
//! appears whole or not at all, the list last: a set without a list is not complete. Older sets are
//! removed when a newer one is complete and on the disk, their lists first. What stays are the two
//! newest, and that of the best epoch. A run that has finished no epoch yet has the list of a set
//! without files, `epoch-0.json`.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::lr_scheduler::LrSchedulerRecord;
use burn::optim::OptimizerRecord;
use burn::store::ModuleRecord;
use burn::tensor::Bytes;
use burn::train::checkpoint::{
    Checkpoint, Checkpointer, CheckpointerError, CheckpointingAction, CheckpointingStrategy,
};
use burn::train::metric::store::EventStoreClient;
use burn_conv_bn_files::{OutputError, Survives, sync_folder, write};
use serde::{Deserialize, Serialize};

use crate::durable::FirstFailure;
use crate::history::{EpochTotals, History, best_epoch, wait_for_logs};

/// What Burn calls the files of a checkpoint.
const PARTS: [&str; 3] = [MODEL, OPTIMIZER, SCHEDULER];
const MODEL: &str = "model";
const OPTIMIZER: &str = "optim";
const SCHEDULER: &str = "scheduler";

/// Where the checkpoints of a run are.
pub(crate) fn folder(directory: &Path) -> PathBuf {
    directory.join("checkpoint")
}

/// The file of a checkpoint that has the model.
pub(crate) fn model_file(directory: &Path, epoch: usize) -> PathBuf {
    folder(directory).join(part_name(MODEL, epoch))
}

/// A checkpoint that cannot be read.
///
/// ```
/// use burn_conv_bn_train::checkpoint::Damaged;
///
/// let damaged = Damaged {
///     epoch: 3,
///     path: "checkpoint/model-3.bpk".into(),
///     reason: "is damaged: its checksum is wrong".to_string(),
/// };
/// assert_eq!(
///     damaged.to_string(),
///     "checkpoint/model-3.bpk is damaged: its checksum is wrong"
/// );
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damaged {
    /// The epoch after which it was written.
    pub epoch: usize,
    /// The file that is missing or not as it was written.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for Damaged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.path.display(), self.reason)
    }
}

/// A complete checkpoint, every byte of it as it was written.
pub(crate) struct Set {
    /// The epochs that were finished.
    pub(crate) epoch: usize,
    /// The totals of the finished epochs.
    pub(crate) history: Vec<EpochTotals>,
    /// None if no epoch was finished.
    pub(crate) records: Option<Records>,
}

/// The state of a training.
pub(crate) struct Records {
    pub(crate) model: ModuleRecord,
    pub(crate) optimizer: OptimizerRecord,
    pub(crate) scheduler: LrSchedulerRecord,
}

/// The newest checkpoint of a run that can be read, and those newer ones that cannot.
///
/// Sets whose list was never written count as neither: the process was killed before they were
/// complete.
pub(crate) fn newest(directory: &Path) -> io::Result<(Option<Set>, Vec<Damaged>)> {
    let mut epochs: Vec<usize> = files(directory)?
        .into_iter()
        .filter(|file| file.is_list)
        .map(|file| file.epoch)
        .collect();
    epochs.sort_unstable_by(|a, b| b.cmp(a));
    let mut damaged = Vec::new();
    for epoch in epochs {
        match read(directory, epoch) {
            Ok(set) => return Ok((Some(set), damaged)),
            Err(damage) => damaged.push(damage),
        }
    }
    Ok((None, damaged))
}

/// Reads the checkpoint of one epoch.
pub(crate) fn read(directory: &Path, epoch: usize) -> Result<Set, Damaged> {
    let folder = folder(directory);
    let path = folder.join(list_name(epoch));
    let damaged = |reason: String| Damaged {
        epoch,
        path: path.clone(),
        reason,
    };
    let bytes = fs::read(&path).map_err(|error| damaged(unreadable(&error)))?;
    let contents = List::parse(&bytes).map_err(|reason| damaged(reason.to_string()))?;
    if contents.epoch != epoch || contents.history.len() != epoch {
        return Err(damaged("is the list of another epoch".to_string()));
    }
    let records = match epoch {
        0 => None,
        _ => Some(Records {
            model: contents.load(&folder, MODEL)?,
            optimizer: contents.load(&folder, OPTIMIZER)?,
            scheduler: contents.load(&folder, SCHEDULER)?,
        }),
    };
    Ok(Set {
        epoch,
        history: contents.history,
        records,
    })
}

/// The epochs of a run with a complete checkpoint, in order, without that of no epoch.
pub(crate) fn epochs(directory: &Path) -> io::Result<Vec<usize>> {
    let mut epochs: Vec<usize> = files(directory)?
        .into_iter()
        .filter(|file| file.is_list && file.epoch > 0)
        .map(|file| file.epoch)
        .collect();
    epochs.sort_unstable();
    Ok(epochs)
}

/// The checkpoints of some epochs, in words.
pub(crate) fn named(epochs: &[usize]) -> String {
    let texts: Vec<String> = epochs.iter().map(usize::to_string).collect();
    match texts.split_last() {
        Some((last, [])) => format!("the checkpoint of epoch {last}"),
        Some((last, others)) => {
            format!("the checkpoints of epochs {} and {last}", others.join(", "))
        }
        None => "no checkpoint".to_string(),
    }
}

/// A file of a checkpoint, complete or not.
#[derive(Clone, Debug)]
pub(crate) struct SetFile {
    pub(crate) path: PathBuf,
    pub(crate) epoch: usize,
    /// Whether it is the one that makes the set complete.
    is_list: bool,
}

/// The files of all checkpoints of a run; none if it has no folder for them.
pub(crate) fn files(directory: &Path) -> io::Result<Vec<SetFile>> {
    let entries = match fs::read_dir(folder(directory)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry?;
        let found = entry.file_name().to_str().and_then(epoch_of);
        files.extend(found.map(|(epoch, is_list)| SetFile {
            path: entry.path(),
            epoch,
            is_list,
        }));
    }
    Ok(files)
}

/// Removes files of checkpoints, so that a set which is not whole any more has no list either.
pub(crate) fn remove(mut files: Vec<SetFile>) -> Result<(), OutputError> {
    files.sort_by_key(|file| !file.is_list);
    for file in files {
        match fs::remove_file(&file.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(OutputError::io(file.path, error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Removes the checkpoints that a run does not need any more once that of `epoch` is complete.
///
/// What is there of later epochs stays, readable or not: the run has yet to go past it.
pub(crate) fn prune(
    directory: &Path,
    epoch: usize,
    history: &[EpochTotals],
) -> Result<(), OutputError> {
    let kept = [epoch.checked_sub(1), best_epoch(history)];
    let files = files(directory).map_err(|error| OutputError::io(folder(directory), error))?;
    let old = |file: &SetFile| file.epoch < epoch && !kept.contains(&Some(file.epoch));
    remove(files.into_iter().filter(old).collect())
}

/// Writes the checkpoints of a run.
///
/// Burn writes the three records of an epoch on three threads. The last one to finish completes
/// the set.
pub(crate) struct Store {
    directory: PathBuf,
    failure: FirstFailure,
    pending: Mutex<BTreeMap<usize, Pending>>,
}

/// A set that is not complete yet.
#[derive(Default)]
struct Pending {
    history: Vec<EpochTotals>,
    files: Vec<StoredFile>,
}

impl Store {
    /// Writes to the folder of `directory`; what cannot be written goes to `failure`.
    pub(crate) fn new(directory: &Path, failure: FirstFailure) -> Self {
        Self {
            directory: directory.to_path_buf(),
            failure,
            pending: Mutex::default(),
        }
    }

    /// Begins a run: makes the folder, and the set of no epoch.
    pub(crate) fn begin(&self) -> Result<(), OutputError> {
        let folder = folder(&self.directory);
        fs::create_dir_all(&folder)
            .and_then(|()| sync_folder(&self.directory))
            .map_err(|error| OutputError::io(folder, error))?;
        self.complete(0, Pending::default())
    }

    /// Expects the records of an epoch.
    fn announce(&self, epoch: usize, history: Vec<EpochTotals>) {
        let files = Vec::new();
        self.pending().insert(epoch, Pending { history, files });
    }

    fn save<R: Checkpoint>(
        &self,
        part: &'static str,
        epoch: usize,
        record: R,
    ) -> Result<(), OutputError> {
        let name = part_name(part, epoch);
        let path = folder(&self.directory).join(&name);
        let failed = |error| OutputError::io(&path, error);

        let bytes = record
            .checkpoint_into_bytes()
            .map_err(|error| failed(io::Error::other(error)))?;
        write(&path, &bytes, Survives::PowerLoss)?;
        let file = StoredFile {
            name,
            bytes: bytes.len() as u64,
            md5: checksum(&bytes),
        };

        let set = {
            let mut pending = self.pending();
            let Some(set) = pending.get_mut(&epoch) else {
                return Err(failed(io::Error::other("the epoch was not announced")));
            };
            set.files.push(file);
            match set.files.len() == PARTS.len() {
                true => pending.remove(&epoch),
                false => None,
            }
        };
        match set {
            Some(set) => self.complete(epoch, set),
            None => Ok(()),
        }
    }

    /// Writes the list of a set whose files are all on the disk, and removes those it replaces.
    fn complete(&self, epoch: usize, set: Pending) -> Result<(), OutputError> {
        let Pending { history, mut files } = set;
        files.sort_by(|a, b| a.name.cmp(&b.name));
        let list = List::of(Contents {
            epoch,
            history,
            files,
        });
        let path = folder(&self.directory).join(list_name(epoch));
        let json =
            serde_json::to_vec(&list).map_err(|error| OutputError::io(&path, error.into()))?;
        write(&path, &json, Survives::PowerLoss)?;
        prune(&self.directory, epoch, &list.set.history)
    }

    fn pending(&self) -> MutexGuard<'_, BTreeMap<usize, Pending>> {
        // Each change is one operation on the map or on a list: what a poisoned lock guards is
        // sound.
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a failure for whoever started the training, and tells Burn, which stops it.
    fn report(&self, failure: OutputError) -> CheckpointerError {
        let error = CheckpointerError::Unknown(failure.to_string());
        self.failure.report(failure);
        error
    }
}

/// Writes one record of every checkpoint, and hands out that of the run that is resumed.
pub(crate) struct PartCheckpointer<R> {
    store: Arc<Store>,
    part: &'static str,
    /// Taken out when Burn asks for it. What was checked is what is loaded, whatever becomes of
    /// the file.
    restored: Mutex<Option<R>>,
}

impl<R: Checkpoint> Checkpointer<R> for PartCheckpointer<R> {
    fn save(&self, epoch: usize, record: R) -> Result<(), CheckpointerError> {
        self.store
            .save(self.part, epoch, record)
            .map_err(|failure| self.store.report(failure))
    }

    /// Removes the whole set. [`KeepLatestAndBest`] never asks for it: a set is removed when the
    /// one that replaces it is complete, which only the store knows.
    fn delete(&self, epoch: usize) -> Result<(), CheckpointerError> {
        let directory = &self.store.directory;
        let files = files(directory).map_err(CheckpointerError::IOError)?;
        let of_epoch = files.into_iter().filter(|file| file.epoch == epoch);
        remove(of_epoch.collect()).map_err(|failure| self.store.report(failure))
    }

    fn restore(&self, epoch: usize) -> Result<R, CheckpointerError> {
        let mut restored = self.restored.lock().unwrap_or_else(PoisonError::into_inner);
        restored.take().ok_or_else(|| {
            CheckpointerError::Unknown(format!("there is no record of epoch {epoch}"))
        })
    }
}

/// What Burn writes the checkpoints of a run with: the model's, the optimizer's and the schedule's.
pub(crate) type Checkpointers = (
    PartCheckpointer<ModuleRecord>,
    PartCheckpointer<OptimizerRecord>,
    PartCheckpointer<LrSchedulerRecord>,
);

/// Checkpointers that write to `store`; `records` are those of the run that is resumed.
pub(crate) fn checkpointers(store: &Arc<Store>, records: Option<Records>) -> Checkpointers {
    let (model, optimizer, scheduler) = match records {
        Some(records) => (
            Some(records.model),
            Some(records.optimizer),
            Some(records.scheduler),
        ),
        None => (None, None, None),
    };
    (
        part(store, MODEL, model),
        part(store, OPTIMIZER, optimizer),
        part(store, SCHEDULER, scheduler),
    )
}

fn part<R>(store: &Arc<Store>, part: &'static str, restored: Option<R>) -> PartCheckpointer<R> {
    PartCheckpointer {
        store: store.clone(),
        part,
        restored: Mutex::new(restored),
    }
}

/// A checkpoint after every epoch, of which the two newest are kept, and that of the best epoch.
///
/// The same as Burn's default. Burn's strategy counts what it has seen itself, and would keep other
/// sets in a run that is resumed; this one has no state but the run's history.
pub(crate) struct KeepLatestAndBest {
    pub(crate) store: Arc<Store>,
    pub(crate) history: History,
}

impl CheckpointingStrategy for KeepLatestAndBest {
    fn checkpointing(
        &mut self,
        epoch: usize,
        events: &EventStoreClient,
    ) -> Vec<CheckpointingAction> {
        // A run that is resumed after this epoch does not write its logs again.
        wait_for_logs(epoch, events);
        self.store.announce(epoch, self.history.finished());
        vec![CheckpointingAction::Save]
    }
}

/// The file that makes a set complete.
#[derive(Serialize, Deserialize)]
struct List {
    /// Of `set`, as JSON without spaces.
    md5: String,
    set: Contents,
}

#[derive(Serialize, Deserialize)]
struct Contents {
    epoch: usize,
    history: Vec<EpochTotals>,
    files: Vec<StoredFile>,
}

#[derive(Serialize, Deserialize)]
struct StoredFile {
    name: String,
    bytes: u64,
    md5: String,
}

impl List {
    fn of(set: Contents) -> Self {
        Self {
            md5: set.checksum(),
            set,
        }
    }

    fn parse(json: &[u8]) -> Result<Contents, &'static str> {
        let list: Self =
            serde_json::from_slice(json).map_err(|_| "is not the list of a checkpoint")?;
        match list.md5 == list.set.checksum() {
            true => Ok(list.set),
            false => Err("is not as it was written"),
        }
    }
}

impl Contents {
    fn checksum(&self) -> String {
        // Text, numbers and lists of them always have a form in JSON.
        checksum(&serde_json::to_vec(self).unwrap_or_default())
    }

    fn load<R: Checkpoint>(&self, folder: &Path, part: &str) -> Result<R, Damaged> {
        let name = part_name(part, self.epoch);
        let path = folder.join(&name);
        let damaged = |reason: String| Damaged {
            epoch: self.epoch,
            path: path.clone(),
            reason,
        };
        let Some(file) = self.files.iter().find(|file| file.name == name) else {
            return Err(damaged("is not in the list".to_string()));
        };
        // Looked at first, as something else may have been put there that does not fit in memory.
        let found = fs::metadata(&path).map_err(|error| damaged(unreadable(&error)))?;
        if found.len() != file.bytes {
            return Err(damaged(format!(
                "is damaged: it holds {} bytes, {} were written",
                found.len(),
                file.bytes
            )));
        }
        let bytes = fs::read(&path).map_err(|error| damaged(unreadable(&error)))?;
        if checksum(&bytes) != file.md5 {
            return Err(damaged("is damaged: its checksum is wrong".to_string()));
        }
        R::checkpoint_from_bytes(Bytes::from_bytes_vec(bytes))
            .map_err(|error| damaged(format!("is no record: {error}")))
    }
}

fn checksum(bytes: &[u8]) -> String {
    format!("{:x}", md5::compute(bytes))
}

fn unreadable(error: &io::Error) -> String {
    format!("cannot be read: {error}")
}

fn list_name(epoch: usize) -> String {
    format!("epoch-{epoch}.json")
}

fn part_name(part: &str, epoch: usize) -> String {
    format!("{part}-{epoch}.bpk")
}

/// The epoch in the name of a file, and whether it is the list of a set.
fn epoch_of(name: &str) -> Option<(usize, bool)> {
    let (stem, _) = name.rsplit_once('.')?;
    let (kind, epoch) = stem.split_once('-')?;
    let epoch = epoch.parse().ok()?;
    let is_list = kind == "epoch";
    let wanted = match is_list {
        true => list_name(epoch),
        false if PARTS.contains(&kind) => part_name(kind, epoch),
        false => return None,
    };
    (wanted == name).then_some((epoch, is_list))
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::time::Duration;

    use burn::module::Module;
    use burn::nn::LinearConfig;
    use burn::tensor::Device;
    use tempfile::TempDir;

    use crate::memory::StepMemory;
    use crate::metrics::{Evaluation, SplitRecord, StepRecord};
    use crate::step::StepMeasure;

    fn totals(test_loss: f64) -> EpochTotals {
        let evaluation = |loss_sum| Evaluation {
            loss_sum,
            correct: 1,
            total: 3,
        };
        let step = StepRecord {
            evaluation: evaluation(test_loss),
            measure: StepMeasure {
                memory: StepMemory {
                    forward_end_bytes: 7,
                    peak_bytes: 9,
                },
                duration: Duration::from_nanos(1_234_567_891),
            },
        };
        EpochTotals {
            train: SplitRecord {
                evaluation: evaluation(0.1),
                steps: vec![step; 2],
            },
            test: evaluation(test_loss),
        }
    }

    /// A run with checkpoints after epochs with these test losses.
    struct Run {
        folder: TempDir,
        store: Arc<Store>,
        history: Vec<EpochTotals>,
    }

    impl Run {
        fn new(losses: &[f64]) -> Self {
            let folder = TempDir::new().unwrap();
            let store = Store::new(folder.path(), FirstFailure::default());
            store.begin().unwrap();
            let mut run = Self {
                folder,
                store: Arc::new(store),
                history: Vec::new(),
            };
            for &loss in losses {
                run.finish_epoch(loss).unwrap();
            }
            run
        }

        fn directory(&self) -> &Path {
            self.folder.path()
        }

        /// Saves the records of one epoch, as Burn does.
        fn finish_epoch(&mut self, loss: f64) -> Result<(), CheckpointerError> {
            self.history.push(totals(loss));
            let epoch = self.history.len();
            self.store.announce(epoch, self.history.clone());
            let (model, optimizer, scheduler) = checkpointers(&self.store, None);
            let layer = LinearConfig::new(3, 2).init(&Device::flex());
            model.save(epoch, layer.into_record())?;
            optimizer.save(epoch, OptimizerRecord::default())?;
            let record = LrSchedulerRecord::new().with_scalar("iter_idx", epoch as i64);
            scheduler.save(epoch, record)
        }

        fn file(&self, name: &str) -> PathBuf {
            folder(self.directory()).join(name)
        }

        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(folder(self.directory())).unwrap();
            let mut names: Vec<String> = entries
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        }

        /// The epoch of the newest readable set, and the names of the files that are damaged.
        fn newest(&self) -> (Option<usize>, Vec<String>) {
            let (set, damaged) = newest(self.directory()).unwrap();
            let names = damaged.iter().map(|damage| {
                damage
                    .path
                    .file_name()
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .to_string()
            });
            (set.map(|set| set.epoch), names.collect())
        }
    }

    #[test]
    fn a_set_comes_back_as_it_was_saved() {
        let run = Run::new(&[1.0 / 3.0, f64::NAN, f64::INFINITY, 1e-300]);
        let (set, damaged) = newest(run.directory()).unwrap();
        assert!(damaged.is_empty(), "{damaged:?}");
        let set = set.unwrap();
        assert_eq!(set.epoch, 4);
        let bits = |history: &[EpochTotals]| -> Vec<[u64; 2]> {
            let losses = |epoch: &EpochTotals| {
                let step = epoch.train.steps[1].evaluation;
                [epoch.test, step].map(|evaluation| evaluation.loss_sum.to_bits())
            };
            history.iter().map(losses).collect()
        };
        assert_eq!(bits(&set.history), bits(&run.history));
        // All but the loss that is not a number.
        for epoch in [0, 2, 3] {
            assert_eq!(set.history[epoch], run.history[epoch]);
        }
        let records = set.records.unwrap();
        assert_eq!(records.model.len(), 2);
        assert!(records.optimizer.is_empty());
        assert_eq!(records.scheduler.scalar::<i64>("iter_idx"), Some(4));
    }

    #[test]
    fn the_two_newest_and_the_best_are_kept() {
        let of = |epochs: &[usize]| {
            let mut names: Vec<String> = epochs
                .iter()
                .flat_map(|&epoch| {
                    PARTS
                        .map(|part| part_name(part, epoch))
                        .into_iter()
                        .chain([list_name(epoch)])
                })
                .collect();
            names.sort();
            names
        };
        let mut run = Run::new(&[]);
        assert_eq!(run.names(), ["epoch-0.json"]);
        assert_eq!(run.newest().0, Some(0));
        for (loss, kept) in [
            (3.0, &[1][..]),
            (1.0, &[1, 2][..]),
            (2.0, &[2, 3][..]),
            (2.0, &[2, 3, 4][..]),
            (0.5, &[4, 5][..]),
        ] {
            run.finish_epoch(loss).unwrap();
            // The list of no epoch is that of the epoch before the first.
            let names: Vec<String> = run
                .names()
                .into_iter()
                .filter(|name| name != "epoch-0.json")
                .collect();
            assert_eq!(names, of(kept));
            assert_eq!(run.newest().0, kept.last().copied());
        }
        assert!(!run.file("epoch-0.json").exists());
    }

    #[test]
    fn a_damaged_set_gives_way_to_the_one_before_it() {
        let cut = |path: &Path| {
            let bytes = fs::read(path).unwrap();
            fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
        };
        let flip = |path: &Path| {
            let mut bytes = fs::read(path).unwrap();
            let last = bytes.len() - 3;
            bytes[last] ^= 4;
            fs::write(path, bytes).unwrap();
        };
        let vanish = |path: &Path| fs::remove_file(path).unwrap();
        let empty = |path: &Path| fs::write(path, "").unwrap();
        let forge = |path: &Path| {
            let text = fs::read_to_string(path).unwrap();
            let forged = text.replace("\"correct\":1", "\"correct\":2");
            assert_ne!(text, forged);
            fs::write(path, forged).unwrap();
        };
        type Damage<'a> = &'a dyn Fn(&Path);
        let ways: [(&str, Damage); 9] = [
            ("model-2.bpk", &cut),
            ("model-2.bpk", &flip),
            ("optim-2.bpk", &vanish),
            ("optim-2.bpk", &empty),
            ("scheduler-2.bpk", &flip),
            ("scheduler-2.bpk", &cut),
            ("epoch-2.json", &cut),
            ("epoch-2.json", &empty),
            ("epoch-2.json", &forge),
        ];
        for (name, damage) in ways {
            let run = Run::new(&[1.0, 2.0]);
            assert_eq!(run.newest(), (Some(2), Vec::new()));
            damage(&run.file(name));
            assert_eq!(run.newest(), (Some(1), vec![name.to_string()]), "{name}");

            // Nobody has removed what could not be read.
            damage_of(&run, 1);
            let before = run.names();
            let (none, damaged) = run.newest();
            assert_eq!((none, damaged.len()), (None, 2));
            assert_eq!(run.names(), before);
        }
    }

    fn damage_of(run: &Run, epoch: usize) {
        fs::write(run.file(&part_name(MODEL, epoch)), "x").unwrap();
    }

    #[test]
    fn a_set_without_its_list_was_never_complete() {
        let run = Run::new(&[1.0, 2.0]);
        fs::remove_file(run.file("epoch-2.json")).unwrap();
        assert_eq!(run.newest(), (Some(1), Vec::new()));
    }

    #[test]
    fn the_list_of_another_epoch_is_damage() {
        let run = Run::new(&[1.0, 2.0]);
        fs::copy(run.file("epoch-1.json"), run.file("epoch-7.json")).unwrap();
        assert_eq!(run.newest(), (Some(2), vec!["epoch-7.json".to_string()]));
    }

    #[test]
    fn what_is_damaged_stays_until_the_run_has_gone_past_it() {
        let mut run = Run::new(&[1.0, 2.0, 3.0, 4.0]);
        damage_of(&run, 4);
        // Resumed after epoch 3, and epoch 4 done again.
        run.history.truncate(3);
        prune(run.directory(), 3, &run.history).unwrap();
        assert!(run.file("model-4.bpk").exists());
        run.finish_epoch(4.0).unwrap();
        assert_eq!(run.newest(), (Some(4), Vec::new()));
    }

    #[test]
    fn a_set_that_cannot_be_written_leaves_the_others() {
        let mut run = Run::new(&[1.0, 2.0]);
        // Nothing can be written below a file.
        let (real, aside) = (folder(run.directory()), run.directory().join("aside"));
        fs::rename(&real, &aside).unwrap();
        fs::write(&real, "").unwrap();
        run.finish_epoch(3.0).unwrap_err();
        let failure = run.store.failure.take().unwrap();
        let model = real.join("model-3.bpk").display().to_string();
        assert!(failure.to_string().starts_with(&model), "{failure}");

        fs::remove_file(&real).unwrap();
        fs::rename(&aside, &real).unwrap();
        assert_eq!(run.newest(), (Some(2), Vec::new()));
    }

    #[test]
    fn only_a_sets_own_files_are_its_files() {
        for (name, epoch) in [
            ("epoch-0.json", Some((0, true))),
            ("scheduler-12.bpk", Some((12, false))),
            ("model-3.bpk.7-0.tmp", None),
            ("model-03.bpk", None),
            ("model-3.txt", None),
            ("notes-3.bpk", None),
            ("epoch-3", None),
            (".partial-3.bpk", None),
        ] {
            assert_eq!(epoch_of(name), epoch, "{name}");
        }
    }
}
