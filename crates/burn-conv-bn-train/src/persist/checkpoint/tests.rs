use super::*;

use std::time::Duration;

use burn::module::Module;
use burn::nn::LinearConfig;
use burn::tensor::Device;
use tempfile::TempDir;

use crate::measure::history::{Evaluation, SplitRecord, StepRecord};
use crate::measure::memory::{StepMeasure, StepMemory};

fn totals(test_loss: f64) -> Epoch {
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
    Epoch {
        train: SplitRecord {
            evaluation: evaluation(0.1),
            steps: vec![step; 2],
        },
        test: Some(evaluation(test_loss)),
    }
}

/// A run with checkpoints after epochs with these test losses.
struct Run {
    folder: TempDir,
    store: Arc<Store>,
    history: History,
}

impl Run {
    fn new(losses: &[f64]) -> Self {
        let folder = TempDir::new().unwrap();
        let history = History::default();
        let store = Store::new(folder.path(), &history);
        store.begin().unwrap();
        let mut run = Self {
            folder,
            store: Arc::new(store),
            history,
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
        let Epoch { train, test } = totals(loss);
        self.history.trained(train);
        self.history.tested(test.unwrap());
        let epoch = self.history.finished().len();
        let layer = LinearConfig::new(3, 2).init(&Device::flex());
        let store = &self.store;
        PartCheckpointer::new(store, MODEL, None).save(epoch, layer.into_record())?;
        PartCheckpointer::new(store, OPTIMIZER, None).save(epoch, OptimizerRecord::default())?;
        let record = LrSchedulerRecord::new().with_scalar("iter_idx", epoch as i64);
        PartCheckpointer::new(store, SCHEDULER, None).save(epoch, record)
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
        let name = |(_, text): &(usize, String)| {
            let (path, _) = text.split_once(' ').unwrap();
            let name = Path::new(path).file_name().unwrap();
            name.to_str().unwrap().to_string()
        };
        let names = damaged.iter().map(name).collect();
        (set.map(|set| set.epoch), names)
    }
}

#[test]
fn a_set_comes_back_as_it_was_saved() {
    let run = Run::new(&[1.0 / 3.0, f64::NAN, f64::INFINITY, 1e-300]);
    let (set, damaged) = newest(run.directory()).unwrap();
    assert!(damaged.is_empty(), "{damaged:?}");
    let set = set.unwrap();
    assert_eq!(set.epoch, 4);
    let bits = |history: &[Epoch]| -> Vec<[u64; 2]> {
        let losses = |epoch: &Epoch| {
            let step = epoch.train.steps[1].evaluation;
            [epoch.test.unwrap(), step].map(|evaluation| evaluation.loss_sum.to_bits())
        };
        history.iter().map(losses).collect()
    };
    let history = run.history.finished();
    assert_eq!(bits(&set.history), bits(&history));
    // All but the loss that is not a number.
    for epoch in [0, 2, 3] {
        assert_eq!(set.history[epoch], history[epoch]);
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
                    .into_iter()
                    .chain([LIST])
                    .map(move |kind| file_name(kind, epoch))
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
        // Epoch 0 is the state before the first epoch.
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
    fs::write(run.file(&file_name(MODEL, epoch)), "x").unwrap();
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
    let mut past = run.history.finished();
    past.truncate(3);
    prune(run.directory(), 3, &past).unwrap();
    run.history = History::new(past);
    run.store = Arc::new(Store::new(run.directory(), &run.history));
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
    let failure = run.store.take_failure().unwrap();
    let model = real.join("model-3.bpk").display().to_string();
    assert!(failure.to_string().contains(&model), "{failure}");

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
