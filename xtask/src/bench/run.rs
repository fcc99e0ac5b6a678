//! The run of the entries: data, check, rounds, memory.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow};
use burn_conv_bn_bench::catalogue::Entry;
use burn_conv_bn_bench::device::FLEX;
use burn_conv_bn_bench::protocol::{Contender, Engine, OWN_REFERENCE, Request};
use burn_conv_bn_bench::tensor_file::{read, relative_error};
use burn_conv_bn_files::Lock;
use tempfile::TempDir;

use super::args::{Bench, Peer};
use super::contender::{Process, Running, done, reply};
use super::lock::lock;
use super::machine;
use super::output::Outputs;
use super::report::{ContenderReport, EntryReport, Problem, ProblemKind, Report, TensorError};
use super::table;
use crate::interrupt;
use crate::programs;
use crate::say::{note, say};
use crate::workspace::{cargo, python, root};

/// Program of Burn's contenders, and its package.
const WORKER: &str = "bench-worker";
const WORKER_PACKAGE: &str = "burn-conv-bn-bench-worker";

/// Program of PyTorch's contenders, from the workspace's root.
const PYTORCH: &str = "crates/burn-conv-bn-bench/peer/pytorch.py";

/// Seed of all data.
pub const SEED: u64 = 20_240_229;

/// Steps of each contender before the timed ones. On devices other than Flex clocks rise, and Burn's
/// fusion compiles and tunes kernels for other groups of operations than in the check.
const WARM_UPS: usize = 1;
const DEVICE_WARM_UPS: usize = 3;

/// Timed rounds of an entry, unless `--rounds` says otherwise: as many as fit the budget.
const LEAST_ROUNDS: usize = 3;
const MOST_ROUNDS: usize = 7;
const BUDGET: Duration = Duration::from_secs(120);
const QUICK_BUDGET: Duration = Duration::from_secs(8);

/// Pause before every timed step. The OpenMP threads of PyTorch's wheels spin for a while after each
/// parallel loop, and would take the processor from the next contender.
const PAUSE: Duration = Duration::from_millis(50);

/// Programs and settings of all entries.
pub struct Lab<'a> {
    args: &'a Bench,
    worker: PathBuf,
    /// The python, if the peer was asked for.
    python: Option<PathBuf>,
    _lock: Option<Lock>,
    pub contenders: Vec<Contender>,
    /// Threads of each contender.
    pub threads: usize,
    /// Version by name.
    pub versions: BTreeMap<String, String>,
    /// The widest vectors that are used, by who uses them.
    pub vectors: BTreeMap<String, String>,
}

impl<'a> Lab<'a> {
    /// Builds the worker, unless it is there, and looks for the peer.
    pub fn set_up(args: &'a Bench) -> Result<Self> {
        let worker = match &args.worker {
            // A name alone would be looked for among the system's programs.
            Some(file) => file
                .canonicalize()
                .with_context(|| format!("cannot find the worker {}", file.display()))?,
            None => programs::build(build(&args.device))?
                .into_iter()
                .find(|program| program.name == WORKER)
                .map(|program| program.file)
                .with_context(|| format!("cargo built no {WORKER}"))?,
        };
        // After the build: cargo handles interrupts itself.
        interrupt::listen()?;
        let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let mut lab = Self {
            args,
            worker,
            python: (args.peer == Some(Peer::Pytorch)).then(|| python(args.python.clone())),
            _lock: lock(&env::temp_dir())?,
            contenders: args.contenders(Engine::Burn),
            threads: args.threads.map_or(cores, NonZeroUsize::get),
            versions: machine::rustc_version().into_iter().collect(),
            vectors: BTreeMap::new(),
        };
        lab.greet(Engine::Burn, "burn-conv-bn")?;
        if let Some(python) = lab.python.clone() {
            lab.greet(Engine::PyTorch, "torch")
                .with_context(|| format!("--peer pytorch: {} has no PyTorch", python.display()))?;
            lab.contenders.extend(args.contenders(Engine::PyTorch));
        }
        if args.device != FLEX {
            // Those of the CPU's kernels say nothing about other devices.
            lab.vectors.clear();
        }
        Ok(lab)
    }

    /// Asks an engine for its software.
    fn greet(&mut self, engine: Engine, name: &str) -> Result<()> {
        let hello = self.start(engine)?.ask(&Request::Hello {}, reply!(Hello));
        let software = hello.map_err(|problem| anyhow!(problem.reason))?;
        self.versions.extend(software.versions);
        let vectors = software.vectors.map(|vectors| (name.to_string(), vectors));
        self.vectors.extend(vectors);
        Ok(())
    }

    pub fn device(&self) -> &str {
        &self.args.device
    }

    /// A fresh process for a contender.
    pub fn start(&self, engine: Engine) -> Result<Process> {
        let mut command = match engine {
            Engine::Burn => Command::new(&self.worker),
            Engine::PyTorch => Command::new(self.python.as_ref().context("there is no python")?),
        };
        match engine {
            Engine::Burn => command.env("RAYON_NUM_THREADS", self.threads.to_string()),
            // Its threads are in the request to load.
            Engine::PyTorch => {
                let script = self.args.peer_script.clone();
                command.arg(script.unwrap_or_else(|| root().join(PYTORCH)))
            }
        };
        Process::start(command)
    }

    /// Runs the entries of a report. Each is saved before it is printed.
    pub fn run_all(&self, report: &mut Report, outputs: &Outputs) -> Result<()> {
        let began = Instant::now();
        for index in 0..report.entries.len() {
            let mut entry = report.entries[index].clone();
            let place = format!("[{}/{}]", index + 1, report.entries.len());
            let say = |what: &str| {
                let elapsed = began.elapsed().as_secs();
                note!(
                    "bench: {place} {}: {what} ({elapsed} s elapsed)",
                    entry.entry.id
                );
            };
            let started = Instant::now();
            let measured = match self.args.largest_batch {
                Some(bytes) => self
                    .largest_batches(&entry.entry, bytes.get(), &say)
                    .map(|contenders| (0, contenders)),
                None => self.measure(&entry, &say),
            };
            // An interrupt kills contenders, which is no result.
            interrupt::check()?;
            entry.problem = None;
            match measured {
                Ok((rounds, contenders)) => {
                    entry.rounds = rounds;
                    entry.contenders = contenders;
                }
                Err(error) => entry.problem = Some(format!("{error:#}")),
            }
            entry.seconds = started.elapsed().as_secs_f64();
            entry.summarize();
            report.entries[index] = entry;
            report.summarize();
            outputs.write(report, false)?;
            say!("\n{}", table::entry(&report.entries[index]).trim_end())?;
        }
        note!("bench: all of it took {} s", began.elapsed().as_secs());
        Ok(())
    }

    /// Runs an entry. Returns the number of rounds and the contenders.
    fn measure(
        &self,
        entry: &EntryReport,
        say: &dyn Fn(&str),
    ) -> Result<(usize, Vec<ContenderReport>)> {
        say("drawing the data");
        let folder = scratch()?;
        let data = folder.path().join("data");
        self.draw(&entry.entry, &data)?;
        say("loading");
        let contenders = self.contenders.iter();
        let load = |contender: Contender| {
            let load = self.load_request(&entry.entry, contender, &data);
            Running::load(contender, self.start(contender.engine()), &load)
        };
        let mut running: Vec<Running> = contenders.map(|c| load(*c)).collect();
        Self::check(entry, &mut running, folder.path(), say);
        let rounds = self.time(&mut running, say);
        if self.args.profile {
            say("profiling");
            running.iter_mut().for_each(Running::profile);
        }
        // Memory is measured in fresh processes, without others beside them.
        running.iter_mut().for_each(Running::end);
        for contender in &mut running {
            let report = &mut contender.report;
            if self.args.no_memory || report.steps.is_empty() {
                continue;
            }
            say(&format!("measuring the memory of {}", report.contender));
            let mut fresh = load(report.contender);
            report.memory = fresh.ask(&Request::Memory {}, reply!(Measured));
            if let Some(problem) = fresh.report.problem {
                let reason = format!("while memory was measured: {}", problem.reason);
                report.fail(Problem::new(problem.kind, reason));
            }
        }
        let reports = running.into_iter().map(|contender| contender.report);
        Ok((rounds, reports.collect()))
    }

    pub fn draw(&self, entry: &Entry, data: &Path) -> Result<()> {
        let prepare = Request::Prepare {
            entry: entry.clone(),
            seed: SEED,
            data_dir: data.to_path_buf(),
        };
        let drawn = self.start(Engine::Burn)?.ask(&prepare, done);
        drawn.map_err(|problem| anyhow!("cannot draw the data: {}", problem.reason))
    }

    /// The request that makes a process a contender of an entry.
    pub fn load_request(&self, entry: &Entry, contender: Contender, data: &Path) -> Request {
        Request::Load {
            entry: entry.clone(),
            variant: contender,
            device: self.args.device.clone(),
            precision: self.args.precision,
            data_dir: data.to_path_buf(),
            threads: self.threads,
        }
    }

    /// Compares every contender's results with those of the unfused one, each in a folder of its name.
    fn check(entry: &EntryReport, running: &mut [Running], folder: &Path, say: &dyn Fn(&str)) {
        let results = |contender: Contender| folder.join(contender.to_string());
        let reference = results(Contender::Unfused);
        // The unfused one first: its files are the reference.
        let mut order: Vec<&mut Running> = running.iter_mut().collect();
        order.sort_by_key(|running| running.report.contender != Contender::Unfused);
        let mut tensors: Option<Vec<String>> = None;
        for running in order {
            let name = running.report.contender;
            say(&format!("checking {name}"));
            let dir = results(name);
            let check = Request::Check { dir: dir.clone() };
            let Some(checked) = running.ask(&check, reply!(Checked)) else {
                continue;
            };
            if name == Contender::Unfused {
                tensors = Some(checked.tensors);
                continue;
            }
            let errors = match &tensors {
                _ if checked.own_reference => {
                    compare(&dir, &dir.join(OWN_REFERENCE), &checked.tensors)
                }
                Some(tensors) => compare(&dir, &reference, tensors),
                None => {
                    let reason = "not checked: there is no reference";
                    let problem = Problem::new(ProblemKind::Unavailable, reason);
                    running.report.fail(problem);
                    continue;
                }
            };
            match errors {
                Ok(errors) => running.report.check(errors, entry.tolerance),
                Err(error) => {
                    let reason = format!("cannot compare: {error:#}");
                    running
                        .report
                        .fail(Problem::new(ProblemKind::Mismatch, reason));
                }
            }
            // Results are as large as activations.
            let _ = fs::remove_dir_all(&dir);
        }
    }

    /// Times all contenders round by round, after warm-ups: a round is one step of every contender in turn.
    /// Returns the number of rounds.
    ///
    /// Steps of a round are neighbours in time: a slow phase of the machine hits all of them. Every round
    /// starts with another contender.
    fn time(&self, running: &mut [Running], say: &dyn Fn(&str)) -> usize {
        say("warming up");
        let mut round = 0.0;
        for contender in running.iter_mut() {
            let warm_ups = match self.args.device.as_str() {
                FLEX => WARM_UPS,
                _ => DEVICE_WARM_UPS,
            };
            let mut step = None;
            for _ in 0..warm_ups {
                thread::sleep(PAUSE);
                step = contender.ask(&Request::Run {}, reply!(Ran));
            }
            // The first steps of a compiled contender compile.
            if contender.report.contender != Contender::Compile {
                round += step.map_or(0.0, |step| 1e-3 * step.total_ms());
            }
        }
        let rounds = rounds(self.args, round);
        let count = running.len();
        for index in 0..rounds {
            for turn in 0..count {
                let contender = &mut running[(turn + index) % count];
                if contender.is_alive() {
                    let name = contender.report.contender;
                    say(&format!("{name}, round {} of {rounds}", index + 1));
                    thread::sleep(PAUSE);
                    contender.timed_step();
                }
            }
        }
        rounds
    }
}

/// A folder for an entry's data, which goes with it.
pub fn scratch() -> Result<TempDir> {
    tempfile::Builder::new()
        .prefix("burn-conv-bn-bench-")
        .tempdir()
        .context("cannot create a folder for the data")
}

/// The number of timed rounds, where one takes so many seconds.
fn rounds(args: &Bench, seconds: f64) -> usize {
    let budget = if args.quick { QUICK_BUDGET } else { BUDGET };
    let fit = (budget.as_secs_f64() / seconds) as usize;
    let fit = fit.clamp(LEAST_ROUNDS, MOST_ROUNDS);
    args.rounds.map_or(fit, NonZeroUsize::get)
}

/// Errors of the tensors in a folder relative to those in another.
fn compare(folder: &Path, reference: &Path, tensors: &[String]) -> Result<Vec<TensorError>, Error> {
    let compare = |name: &String| {
        Ok(TensorError {
            name: name.clone(),
            error: relative_error(&read(folder, name)?, &read(reference, name)?),
        })
    };
    tensors.iter().map(compare).collect()
}

/// The command that builds the worker for a device.
///
/// For Flex the worker is built as a default member, not by its package's name, with the features of
/// `cargo build --release`, so that Burn is built once for both. Other devices have a target folder each, so
/// that a change of device builds nothing anew.
fn build(device: &str) -> Command {
    let mut command = cargo(&["build", "--release", "--locked", "--bin", WORKER]);
    if device != FLEX {
        let features = format!("{device},fusion,autotune,persistence");
        let folder = format!("target/gpu-{device}");
        command.args(["-p", WORKER_PACKAGE, "--features", &features]);
        command.args(["--target-dir", &folder]);
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::testing::parse;

    #[test]
    fn rounds_fit_their_budget() {
        let [full, quick] = [&[][..], &["--quick"]].map(|options| parse(options).unwrap());
        assert_eq!(rounds(&full, 1.0), MOST_ROUNDS);
        assert_eq!(rounds(&full, 30.0), 4);
        assert_eq!(rounds(&full, 1000.0), LEAST_ROUNDS);
        assert_eq!(rounds(&quick, 2.0), 4);
        // Nobody is left to time.
        assert_eq!(rounds(&quick, 0.0), MOST_ROUNDS);
        assert_eq!(rounds(&parse(&["--rounds", "11"]).unwrap(), 1000.0), 11);
    }

    #[test]
    fn the_worker_is_built_for_its_device() {
        let args = |device| {
            let command = build(device);
            let args: Vec<_> = command
                .get_args()
                .map(|arg| arg.to_str().unwrap())
                .collect();
            args.join(" ")
        };
        let flex = "build --release --locked --bin bench-worker";
        assert_eq!(args(FLEX), flex);
        let cuda = " -p burn-conv-bn-bench-worker --features cuda,fusion,autotune,persistence \
                    --target-dir target/gpu-cuda";
        assert_eq!(args("cuda"), format!("{flex}{cuda}"));
    }
}
