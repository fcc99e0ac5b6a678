//! Checkpoints that neither a kill nor a full disk nor a damaged file takes away.
//!
//! A checkpoint is a set of files in the folder `checkpoint` of a run. After epoch 3 they are
//! Burn's records `model-3.bpk`, `optim-3.bpk` and `scheduler-3.bpk`, and `epoch-3.json`, which
//! lists them with their checksums and has the totals and steps of the epochs so far. Each file
//! appears whole or not at all, the list last: a set without a list is not complete. Older sets are
//! removed when a newer one is complete and on the disk, their lists first. What stays are the two
//! newest, and that of the best epoch. A run that has finished no epoch yet has the list of a set
//! without files, `epoch-0.json`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use burn::lr_scheduler::LrSchedulerRecord;
use burn::optim::OptimizerRecord;
use burn::store::ModuleRecord;
use burn::tensor::Bytes;
use burn::train::checkpoint::{Checkpoint, Checkpointer, CheckpointerError, KeepLastNCheckpoints};
use burn::train::{LearnerModel, SupervisedTraining};
use burn_conv_bn_files::{OutputError, Survives, sync_folder, write};
use serde::{Deserialize, Serialize};

use crate::measure::history::{Epoch, History, best_epoch};
use crate::print::message;

/// What Burn calls the files of a checkpoint.
const PARTS: [&str; 3] = [MODEL, OPTIMIZER, SCHEDULER];
const MODEL: &str = "model";
const OPTIMIZER: &str = "optim";
const SCHEDULER: &str = "scheduler";

/// The kind of file that lists a set.
const LIST: &str = "epoch";

pub(crate) fn folder(directory: &Path) -> PathBuf {
    directory.join("checkpoint")
}

/// The file of a checkpoint that has the model.
pub(crate) fn model_file(directory: &Path, epoch: usize) -> PathBuf {
    folder(directory).join(file_name(MODEL, epoch))
}

fn file_name(kind: &str, epoch: usize) -> String {
    let extension = if kind == LIST { "json" } else { "bpk" };
    format!("{kind}-{epoch}.{extension}")
}

/// Checkpoints that cannot be read, the newest first: the epoch of each, and which file is missing or not
/// as it was written.
pub(crate) type Damaged = Vec<(usize, String)>;

/// A complete checkpoint, every byte of it as it was written. By default that of no epoch.
#[derive(Default)]
pub(crate) struct Set {
    /// The epochs that were finished.
    pub(crate) epoch: usize,
    pub(crate) history: Vec<Epoch>,
    /// None if no epoch was finished.
    pub(crate) records: Option<Records>,
}

pub(crate) struct Records {
    pub(crate) model: ModuleRecord,
    pub(crate) optimizer: OptimizerRecord,
    pub(crate) scheduler: LrSchedulerRecord,
}

/// The newest checkpoint of a run that can be read, and those newer ones that cannot.
///
/// Sets whose list was never written count as neither: the process was killed before they were
/// complete.
pub(crate) fn newest(directory: &Path) -> Result<(Option<Set>, Damaged)> {
    let mut damaged = Vec::new();
    for epoch in listed_epochs(directory)?.into_iter().rev() {
        match read(directory, epoch) {
            Ok(set) => return Ok((Some(set), damaged)),
            Err(error) => damaged.push((epoch, message(&error))),
        }
    }
    Ok((None, damaged))
}

pub(crate) fn read(directory: &Path, epoch: usize) -> Result<Set> {
    let folder = folder(directory);
    let path = folder.join(file_name(LIST, epoch));
    let contents = List::read(&path)?;
    if contents.epoch != epoch || contents.history.len() != epoch {
        bail!("{} is the list of another epoch", path.display());
    }
    let records = if epoch == 0 {
        None
    } else {
        Some(Records {
            model: contents.load(&folder, MODEL)?,
            optimizer: contents.load(&folder, OPTIMIZER)?,
            scheduler: contents.load(&folder, SCHEDULER)?,
        })
    };
    Ok(Set {
        epoch,
        history: contents.history,
        records,
    })
}

/// The epochs of a run with a complete checkpoint, in order, without that of no epoch.
pub(crate) fn epochs(directory: &Path) -> Result<Vec<usize>> {
    let mut epochs = listed_epochs(directory)?;
    epochs.retain(|&epoch| epoch > 0);
    Ok(epochs)
}

fn listed_epochs(directory: &Path) -> Result<Vec<usize>> {
    let folder = folder(directory);
    let files = files(directory).with_context(|| format!("cannot read {}", folder.display()))?;
    let lists = files.into_iter().filter(|file| file.is_list);
    let mut epochs: Vec<usize> = lists.map(|file| file.epoch).collect();
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
    path: PathBuf,
    epoch: usize,
    /// Whether it is the one that makes the set complete.
    is_list: bool,
}

/// The files of all checkpoints of a run; none if it has no folder for them.
pub(crate) fn files(directory: &Path) -> io::Result<Vec<SetFile>> {
    let entries = match fs::read_dir(folder(directory)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
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

/// The epoch in the name of a file, and whether it is the list of a set.
fn epoch_of(name: &str) -> Option<(usize, bool)> {
    let (kind, rest) = name.split_once('-')?;
    let epoch = rest.split('.').next()?.parse().ok()?;
    let known = kind == LIST || PARTS.contains(&kind);
    (known && file_name(kind, epoch) == name).then_some((epoch, kind == LIST))
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
/// Files of later epochs stay, readable or not: the run has yet to write them anew.
pub(crate) fn prune(directory: &Path, epoch: usize, history: &[Epoch]) -> Result<(), OutputError> {
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
    history: History,
    /// The first of all parts.
    failure: Mutex<Option<OutputError>>,
    /// Sets that are not complete yet.
    pending: Mutex<BTreeMap<usize, Contents>>,
}

impl Store {
    /// Writes to the folder of `directory`; `history` has the epochs.
    pub(crate) fn new(directory: &Path, history: &History) -> Self {
        Self {
            directory: directory.to_path_buf(),
            history: history.clone(),
            failure: Mutex::default(),
            pending: Mutex::default(),
        }
    }

    /// The first file that could not be written, which has stopped the training.
    pub(crate) fn take_failure(&self) -> Option<OutputError> {
        lock(&self.failure).take()
    }

    /// Begins a run: makes the folder, and the set of no epoch.
    pub(crate) fn begin(&self) -> Result<(), OutputError> {
        let folder = folder(&self.directory);
        fs::create_dir_all(&folder)
            .and_then(|()| sync_folder(&self.directory))
            .map_err(|error| OutputError::io(folder, error))?;
        self.complete(Contents::default())
    }

    fn save<R: Checkpoint>(&self, part: &str, epoch: usize, record: R) -> Result<(), OutputError> {
        let name = file_name(part, epoch);
        let path = folder(&self.directory).join(&name);
        let failed = |error| OutputError::io(&path, error);
        let bytes = record
            .checkpoint_into_bytes()
            .map_err(|error| failed(io::Error::other(error)))?;
        write(&path, &bytes, Survives::PowerLoss)?;

        let mut pending = lock(&self.pending);
        let set = pending.entry(epoch).or_insert_with(|| {
            // Burn has handed the whole epoch to the metrics before, and may have gone on.
            let mut history = self.history.finished();
            history.truncate(epoch);
            Contents {
                epoch,
                history,
                files: BTreeMap::new(),
            }
        });
        set.files.insert(name, checksum(&bytes));
        if set.files.len() < PARTS.len() {
            return Ok(());
        }
        let set = pending.remove(&epoch).unwrap_or_default();
        drop(pending);
        self.complete(set)
    }

    /// Writes the list of a set whose files are all on the disk, and removes those it replaces.
    fn complete(&self, set: Contents) -> Result<(), OutputError> {
        let path = folder(&self.directory).join(file_name(LIST, set.epoch));
        let list = List {
            md5: set.checksum(),
            set,
        };
        let json =
            serde_json::to_vec(&list).map_err(|error| OutputError::io(&path, error.into()))?;
        write(&path, &json, Survives::PowerLoss)?;
        prune(&self.directory, list.set.epoch, &list.set.history)
    }
}

/// Each change is one operation on a map or a value: what a poisoned lock guards is sound.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes one record of every checkpoint, and hands out that of the run that is resumed.
pub(crate) struct PartCheckpointer<R> {
    store: Arc<Store>,
    part: &'static str,
    /// Taken out when Burn asks for it: the checked bytes are loaded, even if the file has changed since.
    restored: Mutex<Option<R>>,
}

impl<R: Checkpoint> Checkpointer<R> for PartCheckpointer<R> {
    fn save(&self, epoch: usize, record: R) -> Result<(), CheckpointerError> {
        self.store
            .save(self.part, epoch, record)
            .map_err(|failure| {
                // Kept for the caller, and returned to Burn, which stops the training.
                let error = CheckpointerError::Unknown(failure.to_string());
                lock(&self.store.failure).get_or_insert(failure);
                error
            })
    }

    /// Does nothing: a set is removed when the one that replaces it is complete, which only the store knows.
    fn delete(&self, _epoch: usize) -> Result<(), CheckpointerError> {
        Ok(())
    }

    fn restore(&self, epoch: usize) -> Result<R, CheckpointerError> {
        let absent = || CheckpointerError::Unknown(format!("there is no record of epoch {epoch}"));
        lock(&self.restored).take().ok_or_else(absent)
    }
}

impl<R> PartCheckpointer<R> {
    fn new(store: &Arc<Store>, part: &'static str, restored: Option<R>) -> Self {
        Self {
            store: store.clone(),
            part,
            restored: Mutex::new(restored),
        }
    }
}

/// Makes a training write checkpoints to `store`; `records` are those of the run that is resumed.
pub(crate) fn with_checkpoints<M: LearnerModel>(
    training: SupervisedTraining<M>,
    store: &Arc<Store>,
    records: Option<Records>,
) -> SupervisedTraining<M> {
    let (model, rest) = records
        .map(|r| (r.model, (r.optimizer, r.scheduler)))
        .unzip();
    let (optimizer, scheduler) = rest.unzip();
    training
        .with_custom_checkpointers(
            PartCheckpointer::new(store, MODEL, model),
            PartCheckpointer::new(store, OPTIMIZER, optimizer),
            PartCheckpointer::new(store, SCHEDULER, scheduler),
        )
        // After every epoch. Burn's choice of the best one begins anew in a run that is resumed.
        .with_checkpointing_strategy(KeepLastNCheckpoints::new(usize::MAX))
}

/// The file that makes a set complete.
#[derive(Serialize, Deserialize)]
struct List {
    /// Of `set`, as JSON without spaces.
    md5: String,
    set: Contents,
}

#[derive(Default, Serialize, Deserialize)]
struct Contents {
    epoch: usize,
    history: Vec<Epoch>,
    /// MD5 of each file, by its name.
    files: BTreeMap<String, String>,
}

impl List {
    fn read(path: &Path) -> Result<Contents> {
        let named = || path.display().to_string();
        let json = fs::read(path).with_context(|| format!("{} cannot be read", named()))?;
        let list: Option<Self> = serde_json::from_slice(&json).ok();
        let list = list.with_context(|| format!("{} is not the list of a checkpoint", named()))?;
        let sound = list.md5 == list.set.checksum();
        ensure!(sound, "{} is not as it was written", named());
        Ok(list.set)
    }
}

impl Contents {
    fn checksum(&self) -> String {
        // Text, numbers and lists of them always have a form in JSON.
        checksum(&serde_json::to_vec(self).unwrap_or_default())
    }

    fn load<R: Checkpoint>(&self, folder: &Path, part: &str) -> Result<R> {
        let name = file_name(part, self.epoch);
        let path = folder.join(&name);
        let bytes =
            fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?;
        if self.files.get(&name) != Some(&checksum(&bytes)) {
            bail!("{} is damaged: its checksum is wrong", path.display());
        }
        R::checkpoint_from_bytes(Bytes::from_bytes_vec(bytes))
            .with_context(|| format!("{} is no record", path.display()))
    }
}

fn checksum(bytes: &[u8]) -> String {
    format!("{:x}", md5::compute(bytes))
}

#[cfg(test)]
mod tests;
