//! A run that is killed at any moment, again and again, and resumed, ends as if it had not been.
//!
//! `BURN_CONV_BN_KILLS` chooses how often, and `BURN_CONV_BN_KILL_SEED` when.

#![cfg(unix)]

mod training;

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use chacha20::ChaCha8Rng;
use chacha20::rand_core::{Rng, SeedableRng};
use tempfile::tempdir;
use training::{Outcome, finish, train};

const KILLS: usize = 25;
const SEED: u64 = 20_260_402;
const EPOCHS: usize = 4;

/// Most kills of one run; it is left to end after that.
const KILLS_OF_A_RUN: usize = 4;

/// About as long as it takes to write a checkpoint.
const WRITING: Duration = Duration::from_millis(30);

fn variable<T: FromStr>(name: &str, default: T) -> T {
    match env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name} is {text:?}")),
        Err(_) => default,
    }
}

#[test]
fn a_killed_run_ends_like_one_that_was_not() {
    let kills: usize = variable("BURN_CONV_BN_KILLS", KILLS);
    let seed: u64 = variable("BURN_CONV_BN_KILL_SEED", SEED);
    let folder = tempdir().unwrap();
    let folder = folder.path();
    let options = |name: &str, resume: bool| {
        let resume = if resume { "--resume" } else { "" };
        format!("--epochs {EPOCHS} --artifacts {name} --json {name}.json {resume}")
    };

    let started = Instant::now();
    finish(folder, &options("whole", false));
    let duration = started.elapsed();
    let whole = Outcome::read(folder, "whole");
    assert_eq!(whole.report.epochs.len(), EPOCHS);
    assert_eq!(whole.report.step_losses.len(), 4 * EPOCHS);

    let mut dice = Dice(ChaCha8Rng::seed_from_u64(seed));
    let mut hits: BTreeMap<Phase, usize> = BTreeMap::new();
    let (mut killed, mut runs) = (0, 0);
    while killed < kills {
        runs += 1;
        assert!(runs <= 10 * kills, "runs end before they can be killed");
        let name = format!("run-{runs}");
        let artifacts = folder.join(&name);
        let mut phases = Vec::new();
        let planned = 1 + dice.below(KILLS_OF_A_RUN);
        while phases.len() < planned && killed < kills {
            let checkpoints = Checkpoints::of(&artifacts);
            let plan = dice.plan(duration, checkpoints.newest().unwrap_or(0));
            // A kill may have come before there was anything to go on from.
            let resume = checkpoints.newest().is_some();
            let command = train(folder, &options(&name, resume));
            if !kill(command, plan, folder, &artifacts) {
                break;
            }
            killed += 1;
            let phase = Checkpoints::of(&artifacts).phase();
            *hits.entry(phase).or_default() += 1;
            phases.push(phase);
        }
        // Also if it has ended by itself: then there is nothing to do.
        let resume = Checkpoints::of(&artifacts).newest().is_some();
        finish(folder, &options(&name, resume));
        let context = format!("seed {seed}, run {runs}, killed {phases:?}");
        Outcome::read(folder, &name).assert_same(&whole, &context);
        fs::remove_dir_all(&artifacts).unwrap();
    }

    // The test harness hides what a passing test prints, but not what is written here.
    let mut out = io::stderr().lock();
    let seconds = started.elapsed().as_secs_f64();
    writeln!(
        out,
        "{killed} kills of {runs} runs (seed {seed}, {seconds:.0} s), each resumed to the same bits:"
    )
    .unwrap();
    for (phase, count) in &hits {
        writeln!(out, "{count:>6} {}", phase.describe()).unwrap();
    }
    if kills >= KILLS {
        assert!(hits.contains_key(&Phase::Writing), "{hits:?}");
        assert!(hits.len() > 2, "{hits:?}");
    }
}

/// Where a kill hit, by the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Starting,
    FirstEpoch,
    Writing,
    Removing,
    LaterEpoch,
    Ending,
}

impl Phase {
    fn describe(self) -> &'static str {
        match self {
            Self::Starting => "before the run had begun",
            Self::FirstEpoch => "in the first epoch, before any checkpoint",
            Self::Writing => "while a checkpoint was being written",
            Self::Removing => "between a checkpoint and the removal of older ones",
            Self::LaterEpoch => "in a later epoch",
            Self::Ending => "after the last checkpoint",
        }
    }
}

/// The files in the folder of checkpoints.
#[derive(Default)]
struct Checkpoints {
    /// The epochs of complete sets; 0 if the run has begun.
    complete: BTreeSet<usize>,
    /// The epochs with a record.
    records: BTreeSet<usize>,
    /// Whether there is an unfinished file.
    partial: bool,
}

impl Checkpoints {
    fn of(artifacts: &Path) -> Self {
        let mut found = Self::default();
        let Ok(entries) = fs::read_dir(artifacts.join("checkpoint")) else {
            return found;
        };
        for entry in entries {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let Some((kind, rest)) = name.split_once('-') else {
                panic!("{name} is no file of a checkpoint");
            };
            let epoch = || rest.split('.').next().unwrap().parse().unwrap();
            match kind {
                ".partial" => found.partial = true,
                "epoch" => {
                    found.complete.insert(epoch());
                }
                _ => {
                    found.records.insert(epoch());
                }
            }
        }
        found
    }

    fn newest(&self) -> Option<usize> {
        self.complete.last().copied()
    }

    /// Whether the set of an epoch is being written, or was.
    fn has_begun(&self, epoch: usize) -> bool {
        let before = self.newest().is_some_and(|newest| newest + 1 == epoch);
        self.records.contains(&epoch) || (before && self.partial)
    }

    fn phase(&self) -> Phase {
        let Some(newest) = self.newest() else {
            return Phase::Starting;
        };
        let later = self.records.range(newest + 1..).next().is_some();
        let cut = self
            .records
            .range(..newest)
            .any(|epoch| !self.complete.contains(epoch));
        match newest {
            _ if self.partial || later => Phase::Writing,
            _ if cut || self.complete.len() > 3 => Phase::Removing,
            0 => Phase::FirstEpoch,
            EPOCHS => Phase::Ending,
            _ => Phase::LaterEpoch,
        }
    }
}

/// When to kill.
#[derive(Clone, Copy, Debug)]
enum Plan {
    /// So long after the start.
    After(Duration),
    /// So long after the first sign of an epoch's checkpoint.
    Checkpoint(usize, Duration),
}

struct Dice(ChaCha8Rng);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        ((u64::from(self.0.next_u32()) * bound as u64) >> 32) as usize
    }

    /// Uniform in `0..bound`.
    fn moment(&mut self, bound: Duration) -> Duration {
        bound.mul_f64(f64::from(self.0.next_u32()) / f64::from(u32::MAX))
    }

    /// A plan for a run with that many finished epochs: at any moment, or about when a checkpoint is written,
    /// which takes little of an epoch.
    fn plan(&mut self, duration: Duration, finished: usize) -> Plan {
        let left = EPOCHS - finished;
        match self.below(2) {
            0 if left > 0 => {
                let epoch = finished + 1 + self.below(left);
                Plan::Checkpoint(epoch, self.moment(WRITING))
            }
            _ => {
                // Starting takes time, too.
                let share = (left + 1) as f64 / (EPOCHS + 1) as f64;
                Plan::After(self.moment(duration.mul_f64(share)))
            }
        }
    }
}

/// Starts a training and kills it; false if it ended before.
fn kill(mut command: Command, plan: Plan, folder: &Path, artifacts: &Path) -> bool {
    let log = folder.join("stderr.txt");
    let mut child = command
        .stdout(Stdio::null())
        .stderr(File::create(&log).unwrap())
        .spawn()
        .unwrap();
    match plan {
        Plan::After(moment) => thread::sleep(moment),
        Plan::Checkpoint(epoch, moment) => {
            while child.try_wait().unwrap().is_none() {
                if Checkpoints::of(artifacts).has_begun(epoch) {
                    thread::sleep(moment);
                    break;
                }
                thread::sleep(Duration::from_micros(200));
            }
        }
    }
    child.kill().unwrap();
    let status = child.wait().unwrap();
    if status.signal() == Some(9) {
        return true;
    }
    let stderr = fs::read_to_string(&log).unwrap();
    assert!(status.success(), "{plan:?}: {status}\n{stderr}");
    false
}
