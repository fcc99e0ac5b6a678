//! The `mnist` binary, training on few digits, and what it leaves behind.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use burn_conv_bn_train::data::OFFLINE;
use burn_conv_bn_train::report::{Report, VariantReport};
use burn_pack::Reader;

/// Four steps an epoch, with the dropout that a training has by default.
const JOB: &str = "train --plain --log-interval 0 --dataset synthetic --train-limit 128 \
                   --test-limit 64 --batch-size 32";

/// A training in `folder`, to which the paths in `options` refer.
pub fn train(folder: &Path, options: &str) -> Command {
    train_by(Command::new(env!("CARGO_BIN_EXE_mnist")), folder, options)
}

/// As [`train`], through a command that takes the binary's arguments.
pub fn train_by(mut command: Command, folder: &Path, options: &str) -> Command {
    command
        .args(JOB.split_whitespace())
        .args(options.split_whitespace())
        .current_dir(folder)
        .env(OFFLINE, "1")
        .stdin(Stdio::null());
    command
}

/// Trains to the end, and returns what was printed.
#[track_caller]
pub fn finish(folder: &Path, options: &str) -> String {
    let output = train(folder, options).output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{options}\n{stdout}\n{stderr}");
    stdout
}

/// What a finished run has left.
pub struct Outcome {
    pub report: VariantReport,
    /// Every value of the last checkpoint, by a name that another run has, too.
    pub state: BTreeMap<String, Vec<u8>>,
    /// All files, from the folder of the run.
    pub files: BTreeSet<String>,
}

impl Outcome {
    /// Of the run in the folder `name`, whose report is beside it, in `name.json`.
    #[track_caller]
    pub fn read(folder: &Path, name: &str) -> Self {
        let json = fs::read(folder.join(format!("{name}.json"))).unwrap();
        let mut report: Report = serde_json::from_slice(&json).unwrap();
        let report = report.variants.pop().unwrap();
        let artifacts = folder.join(name);
        let mut files = BTreeSet::new();
        list(&artifacts, "", &mut files);
        Self {
            state: state(&artifacts, report.epochs.len()),
            report,
            files,
        }
    }

    /// Asserts that this run, killed and resumed, has ended as `whole` has in one go.
    #[track_caller]
    pub fn assert_same(&self, whole: &Self, context: &str) {
        assert_eq!(self.report.epochs, whole.report.epochs, "{context}");
        let (steps, of) = (&self.report.step_losses, &whole.report.step_losses);
        assert_eq!(steps, of, "{context}");
        let names = |run: &Self| run.state.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(self), names(whole), "{context}");
        for (name, value) in &self.state {
            assert!(*value == whole.state[name], "{context}: {name} is another");
        }
        assert_eq!(self.files, whole.files, "{context}");
    }
}

fn list(folder: &Path, prefix: &str, files: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
        if entry.file_type().unwrap().is_dir() {
            list(&entry.path(), &format!("{name}/"), files);
        } else {
            files.insert(name);
        }
    }
}

/// The values of a checkpoint. The identities of parameters, by which the optimizer's file names
/// them, are drawn at random in every run; their paths in the model are not.
fn state(artifacts: &Path, epoch: usize) -> BTreeMap<String, Vec<u8>> {
    let open = |part: &str| {
        let path = artifacts.join(format!("checkpoint/{part}-{epoch}.bpk"));
        Reader::from_file(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let mut state = BTreeMap::new();
    let [model, optimizer, scheduler] = ["model", "optim", "scheduler"].map(open);
    for name in model.tensor_names() {
        state.insert(format!("model {name}"), model.tensor_data(name).unwrap());
    }
    let paths = optimizer.metadata();
    let renamed = |name: &str| {
        let (id, field) = name.split_once('.').unwrap();
        format!("optim {}.{field}", paths[id])
    };
    for name in optimizer.tensor_names() {
        let value = optimizer.tensor_data(name).unwrap();
        state.insert(renamed(name), value);
    }
    for (name, value) in optimizer.scalars() {
        state.insert(renamed(name), format!("{value:?}").into_bytes());
    }
    for (name, value) in scheduler.scalars() {
        let value = format!("{value:?}").into_bytes();
        state.insert(format!("scheduler {name}"), value);
    }
    assert!(state.len() > 10, "a checkpoint of {} values", state.len());
    state
}
