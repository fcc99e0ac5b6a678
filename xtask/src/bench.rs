//! `cargo xtask bench`: starts the contenders, checks them against each other, times them side by
//! side, measures their memory, and prints tables.

mod contender;
pub mod machine;
mod output;
mod plot;
mod process;
mod progress;
#[cfg(test)]
mod testing;

use std::collections::BTreeMap;
use std::env;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use burn_conv_bn_bench::catalogue::{Entry, Selection, catalogue, select};
use burn_conv_bn_bench::device::{CUDA, DEVICES, FLEX};
use burn_conv_bn_bench::precision::Precision;
use burn_conv_bn_bench::protocol::{Contender, Engine, Reply, Request};
use burn_conv_bn_bench::report::{EntryReport, ProblemKind, Report};
use burn_conv_bn_bench::table;
use clap::{Args, ValueEnum};
use tempfile::TempDir;

use super::{cargo, python, root};
use crate::interrupt;
use crate::say::{note, say};
use contender::Running;
use output::Outputs;
use process::Process;
use progress::{Progress, Rounds, duration};

/// The program that runs Burn's contenders.
const WORKER: &str = "bench-worker";

/// The package that it is in.
const WORKER_PACKAGE: &str = "burn-conv-bn-bench-worker";

/// The program that runs PyTorch's, from the workspace's root.
const PYTORCH: &str = "crates/burn-conv-bn-bench/peer/pytorch.py";

/// Seed of all data.
const SEED: u64 = 20_240_229;

/// Largest values of the options. A run of more would not end, or not begin: a rayon pool of 100,000
/// threads takes minutes to start.
const MOST_ROUNDS: usize = 1000;
const MOST_IMAGES: usize = 1 << 16;
const MOST_THREADS: usize = 1024;

/// The lock of a run, in the system's folder for temporary files.
const LOCK: &str = "burn-conv-bn-bench.lock";

/// Steps of each contender before the timed ones. On a device other than Flex clocks have to rise,
/// and Burn's fusion compiles and tries kernels for what belongs together in a step, which is not
/// what belonged together in the check.
const WARM_UPS: usize = 1;
const DEVICE_WARM_UPS: usize = 3;

/// Before every timed step. The threads of OpenMP, which PyTorch's wheels use, spin for a while
/// after each parallel loop in case another one follows: they would take the processor from the
/// contender that comes next. They are left their default to spin, because that is how PyTorch is
/// used, and given the time to stop.
const PAUSE: Duration = Duration::from_millis(50);

#[derive(Args, Debug)]
pub struct Bench {
    /// Where to compute, by the name of Burn's feature for it; PyTorch computes on the same kind of
    /// device.
    #[arg(long, value_name = "DEVICE", default_value = FLEX, value_parser = DEVICES)]
    device: String,
    /// What to compute in: f16 and bf16 are mixed precision, in which Burn's norms and linear layers
    /// stay in f32, and PyTorch's are under its autocast; tf32 is for CUDA.
    #[arg(long, value_enum, value_name = "PRECISION", default_value_t = Precision::F32)]
    precision: Precision,
    /// Smaller batches and images: without a peer it ends within five minutes on two cores, and the
    /// ratios are less telling.
    #[arg(long)]
    quick: bool,
    /// Images of each entry, in place of the catalogue's: those of the classifiers are for CPUs.
    #[arg(long, value_name = "N", value_parser = up_to::<MOST_IMAGES>)]
    batch: Option<NonZeroUsize>,
    /// Run this entry alone; may be given several times.
    #[arg(long, value_name = "ID")]
    only: Vec<String>,
    /// Run the layers alone.
    #[arg(long)]
    layers: bool,
    /// Run the networks alone.
    #[arg(long)]
    networks: bool,
    /// Timed steps of each contender [default: 3 to 7, as many as fit two minutes, or 8 s with
    /// --quick].
    #[arg(long, value_name = "N", value_parser = up_to::<MOST_ROUNDS>)]
    rounds: Option<NonZeroUsize>,
    /// Threads of each contender [default: as many as the machine runs at once].
    #[arg(long, value_name = "N", value_parser = up_to::<MOST_THREADS>)]
    threads: Option<NonZeroUsize>,
    /// Another framework to compare with. An error if it is not there.
    #[arg(long, value_enum, value_name = "PEER")]
    peer: Option<Peer>,
    /// The python that has torch [default: $PYTHON, else python3].
    #[arg(long, value_name = "PATH")]
    python: Option<PathBuf>,
    /// Use this worker instead of building one. It must have been built for the device.
    #[arg(long, value_name = "FILE")]
    worker: Option<PathBuf>,
    /// Use this program for PyTorch instead of the repository's.
    #[arg(long, value_name = "FILE", hide = true)]
    peer_script: Option<PathBuf>,
    /// Write everything that was measured to this file.
    #[arg(long, value_name = "PATH")]
    json: Option<PathBuf>,
    /// Write the tables to this file, a line for each contender of each entry.
    #[arg(long, value_name = "PATH")]
    csv: Option<PathBuf>,
    /// Draw the ratios of times and peaks to this SVG file.
    #[arg(long, value_name = "PATH")]
    plot: Option<PathBuf>,
    /// Do not measure memory.
    #[arg(long)]
    no_memory: bool,
    /// Time the kernels of one more step of each contender, on a device that has kernels.
    #[arg(long)]
    profile: bool,
    /// Run this contender alone, and Burn's unfused layers, which all are compared with; may be
    /// given several times.
    #[arg(long, value_enum, value_name = "NAME")]
    contender: Vec<Contender>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Peer {
    /// PyTorch, on the CPU or on CUDA.
    Pytorch,
}

/// A whole number from 1 to `MOST`.
fn up_to<const MOST: usize>(text: &str) -> Result<NonZeroUsize, String> {
    let number = text.parse().ok();
    number
        .filter(|number: &NonZeroUsize| number.get() <= MOST)
        .ok_or_else(|| format!("expected a whole number from 1 to {MOST}"))
}

/// Runs the benchmark. Fails if a contender failed or computed something else than the others.
pub fn bench(args: &Bench) -> Result<()> {
    let mut entries = select(
        catalogue(args.quick),
        &Selection {
            only: args.only.clone(),
            layers: args.layers,
            networks: args.networks,
        },
    )?;
    if entries.is_empty() {
        bail!("no entry is both in --only and of the kind that was asked for");
    }
    if let Some(batch) = args.batch {
        for entry in &mut entries {
            entry.work = entry.work.clone().with_batch(batch.get());
        }
    }
    if !args.precision.exists_on(&args.device) {
        bail!(
            "{} is computed by NVIDIA's tensor cores: with --device {CUDA}, not {}",
            args.precision,
            args.device
        );
    }
    if args.profile && args.device == FLEX {
        bail!("--profile times the kernels of a device, and {FLEX} launches none");
    }
    if let (None, Some(name)) = (args.peer, args.of(Engine::PyTorch)) {
        bail!("{name} is PyTorch's, which --peer pytorch adds");
    }
    if args.peer.is_some() && args.contenders(Engine::PyTorch).is_empty() {
        bail!("--peer pytorch adds nothing: no --contender is PyTorch's");
    }
    let outputs = args.outputs()?;
    let (lab, software) = Lab::set_up(args)?;
    let pending = |entry| EntryReport::pending(entry, &lab.device, lab.precision);
    let mut report = Report {
        date: machine::date()?,
        quick: args.quick,
        device: lab.device.clone(),
        precision: lab.precision,
        machine: machine::describe(lab.plan.threads, &lab.device, software.vectors),
        versions: software.versions,
        commit: machine::commit(),
        version: env!("CARGO_PKG_VERSION").to_string(),
        seed: SEED,
        entries: entries.into_iter().map(pending).collect(),
        summary: Vec::new(),
    };
    announce(&report, &lab, args);
    let measured = lab.run_all(&mut report, &outputs);
    if let Err(error) = &measured {
        report.abandon(&format!("{error:#}"));
    }
    let saved = outputs.finish(&report);
    measured.and(saved)?;
    conclude(&report, &outputs, args)
}

impl Bench {
    /// A contender that was asked for by its name, of those that an engine runs.
    fn of(&self, engine: Engine) -> Option<Contender> {
        let mut named = self.contender.iter().copied();
        named.find(|contender| contender.engine() == engine)
    }

    /// The contenders that an engine runs.
    fn contenders(&self, engine: Engine) -> Vec<Contender> {
        let wanted = |contender: &Contender| {
            let named = self.contender.is_empty() || self.contender.contains(contender);
            contender.engine() == engine && (named || *contender == Contender::Unfused)
        };
        Contender::ALL.into_iter().filter(wanted).collect()
    }

    /// The files that were asked for.
    fn outputs(&self) -> Result<Outputs> {
        let forms: [(&str, &Option<PathBuf>, output::Form); 3] = [
            ("--json", &self.json, output::json),
            ("--csv", &self.csv, output::csv),
            ("--plot", &self.plot, plot::svg),
        ];
        let asked = forms.into_iter();
        let asked = asked.filter_map(|(name, path, form)| Some((name, path.as_deref()?, form)));
        Outputs::new(&asked.collect::<Vec<_>>())
    }
}

fn conclude(report: &Report, outputs: &Outputs, args: &Bench) -> Result<()> {
    let overview = table::overview(report);
    if !overview.is_empty() {
        say!("\n{}", overview.trim_end())?;
    }
    let legend = table::legend(&report.device, report.precision);
    say!("\n{legend}\n\n{}", table::setting(report))?;
    for line in table::missing(report) {
        say!("{line}")?;
    }
    for comparison in &report.summary {
        say!("{}", table::comparison(comparison))?;
    }
    for path in outputs.paths() {
        say!("Written: {}", path.display())?;
    }
    let failed = report.entries.iter().filter(|entry| entry.is_failure());
    let failed: Vec<_> = failed.map(|entry| entry.entry.id.as_str()).collect();
    if !failed.is_empty() {
        bail!("something failed in: {}", failed.join(", "));
    }
    if let Some(reason) = nothing_ran(report, Engine::Burn) {
        bail!("nothing was measured: {reason}");
    }
    if let (Some(Peer::Pytorch), Some(reason)) = (args.peer, nothing_ran(report, Engine::PyTorch)) {
        bail!("--peer pytorch measured nothing: {reason}");
    }
    Ok(())
}

/// Why no contender of an engine ran anything, if that is so.
fn nothing_ran(report: &Report, engine: Engine) -> Option<&str> {
    let contenders = report.entries.iter().flat_map(|entry| &entry.contenders);
    let mut contenders = contenders.filter(|report| report.contender.engine() == engine);
    if contenders
        .clone()
        .any(|contender| !contender.steps.is_empty())
    {
        return None;
    }
    let problem = contenders.find_map(|contender| contender.problem.as_ref());
    Some(problem.map_or("there was no contender", |problem| &problem.reason))
}

/// What the contenders say about themselves.
#[derive(Debug, Default)]
struct Software {
    /// Version by name.
    versions: BTreeMap<String, String>,
    /// The widest vectors that are used, by who uses them.
    vectors: BTreeMap<String, String>,
}

impl Software {
    /// Takes in what a process answers to a greeting.
    fn greet(&mut self, process: &mut Process, engine: Engine) -> Result<()> {
        let (versions, vectors) = match process.ask(&Request::Hello {})? {
            Reply::Hello { versions, vectors } => (versions, vectors),
            Reply::Unavailable { reason } | Reply::Failed { reason } => bail!(reason),
            other => bail!("{other:?} is no answer to a greeting"),
        };
        self.versions.extend(versions);
        let name = match engine {
            Engine::Burn => "burn-conv-bn",
            Engine::PyTorch => "torch",
        };
        let vectors = vectors.map(|vectors| (name.to_string(), vectors));
        self.vectors.extend(vectors);
        Ok(())
    }
}

/// What is done with every entry.
#[derive(Clone, Debug)]
struct Plan {
    /// Who runs it.
    contenders: Vec<Contender>,
    /// Threads of each of them.
    threads: usize,
    /// Steps of each of them before the timed ones.
    warm_ups: usize,
    /// The timed ones.
    rounds: Rounds,
    /// Whether memory is measured.
    memory: bool,
    /// Whether a step's kernels are timed.
    profile: bool,
}

/// What all entries share: the programs, and a place for the data.
struct Lab {
    /// Where the contenders compute.
    device: String,
    /// What they compute in.
    precision: Precision,
    worker: PathBuf,
    peer_script: PathBuf,
    /// The python, if the peer was asked for.
    python: Option<PathBuf>,
    plan: Plan,
    scratch: Scratch,
}

impl Lab {
    /// Builds the worker, unless it is there, and looks for the peer. Returns what runs, too.
    fn set_up(args: &Bench) -> Result<(Self, Software)> {
        let worker = match &args.worker {
            // Not by its name alone, which would be looked for among the system's programs.
            Some(file) => file
                .canonicalize()
                .with_context(|| format!("cannot find the worker {}", file.display()))?,
            None => build_worker(&args.device)?,
        };
        // Not before: cargo ends by itself.
        interrupt::listen()?;
        let peer_script = args.peer_script.clone();
        let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let mut lab = Self {
            device: args.device.clone(),
            precision: args.precision,
            scratch: Scratch::create(&env::temp_dir())?,
            worker,
            peer_script: peer_script.unwrap_or_else(|| root().join(PYTORCH)),
            python: None,
            plan: Plan {
                contenders: args.contenders(Engine::Burn),
                threads: args.threads.map_or(cores, NonZeroUsize::get),
                warm_ups: match args.device.as_str() {
                    FLEX => WARM_UPS,
                    _ => DEVICE_WARM_UPS,
                },
                rounds: Rounds {
                    asked: args.rounds,
                    quick: args.quick,
                },
                memory: !args.no_memory,
                profile: args.profile,
            },
        };
        let mut software = Software::default();
        software.greet(&mut lab.start(Engine::Burn)?, Engine::Burn)?;
        software.versions.extend(machine::rustc_version());
        if args.peer == Some(Peer::Pytorch) {
            let python = lab.python.insert(python(args.python.clone())).clone();
            let peer = lab.start(Engine::PyTorch);
            peer.and_then(|mut peer| software.greet(&mut peer, Engine::PyTorch))
                .with_context(|| format!("--peer pytorch: {} has no PyTorch", python.display()))?;
            lab.plan.contenders.extend(args.contenders(Engine::PyTorch));
        }
        if lab.device != FLEX {
            // Other devices do not compute with the processor's vectors, or not in these programs.
            software.vectors.clear();
        }
        Ok((lab, software))
    }

    /// A fresh process for a contender.
    fn start(&self, engine: Engine) -> Result<Process> {
        match (engine, &self.python) {
            (Engine::Burn, _) => {
                let mut command = Command::new(&self.worker);
                command.env("RAYON_NUM_THREADS", self.plan.threads.to_string());
                Process::start(command, WORKER)
            }
            // It is told its threads when it loads.
            (Engine::PyTorch, Some(python)) => {
                let mut command = Command::new(python);
                command.arg(&self.peer_script);
                Process::start(command, "pytorch.py")
            }
            (Engine::PyTorch, None) => bail!("there is no python"),
        }
    }

    /// Runs the entries of a report. Each is saved before it is printed.
    fn run_all(&self, report: &mut Report, outputs: &Outputs) -> Result<()> {
        let mut progress = Progress::new(report.entries.len());
        for index in 0..report.entries.len() {
            let entry = report.entries[index].entry.clone();
            progress.begin(&entry);
            let started = Instant::now();
            let mut measured = self.run(entry, &progress);
            // What an interrupt broke is no result.
            interrupt::check()?;
            measured.seconds = started.elapsed().as_secs_f64();
            report.entries[index] = measured;
            report.summarize();
            outputs.save(report)?;
            let table = table::entry(&report.entries[index], &self.device);
            say!("\n{}", table.trim_end())?;
        }
        note!("bench: all of it took {}", duration(progress.elapsed()));
        Ok(())
    }

    /// Runs an entry. What goes wrong is in the report.
    fn run(&self, entry: Entry, progress: &Progress) -> EntryReport {
        let mut report = EntryReport::new(entry, &self.device, self.precision);
        if let Err(error) = self.fill(&mut report, progress) {
            report.problem = Some(format!("{error:#}"));
        }
        report.summarize();
        report
    }

    fn fill(&self, report: &mut EntryReport, progress: &Progress) -> Result<()> {
        let entry = report.entry.clone();
        progress.say("drawing the data");
        let mut helper = self.draw(&entry)?;

        progress.say("loading");
        let mut running = Vec::new();
        for &contender in &self.plan.contenders {
            running.push(self.load(&entry, contender));
        }
        self.check(&entry, &mut running, &mut helper, progress);
        drop(helper);
        report.rounds = self.time(&mut running, progress);
        if self.plan.profile {
            for contender in &mut running {
                progress.say(format_args!("profiling {}", contender.contender()));
                contender.profile();
            }
        }
        // All processes end here: memory is measured in fresh ones.
        report.contenders = running.into_iter().map(Running::finish).collect();
        if self.plan.memory {
            self.measure(&entry, report, progress);
        }
        Ok(())
    }

    /// Draws the data of an entry. Returns the process that did, which can compare results too.
    fn draw(&self, entry: &Entry) -> Result<Process> {
        self.scratch.clear()?;
        let mut helper = self.start(Engine::Burn)?;
        let prepare = Request::Prepare {
            entry: entry.clone(),
            seed: SEED,
            data_dir: self.scratch.data(),
        };
        match helper.ask(&prepare)? {
            Reply::Done {} => Ok(helper),
            other => bail!("cannot draw the data: {other:?}"),
        }
    }

    /// A contender in a fresh process.
    fn load(&self, entry: &Entry, contender: Contender) -> Running {
        let process = self.start(contender.engine());
        Running::load(contender, process, self.load_request(entry, contender))
    }

    fn load_request(&self, entry: &Entry, variant: Contender) -> Request {
        Request::Load {
            entry: entry.clone(),
            variant,
            device: self.device.clone(),
            precision: self.precision,
            data_dir: self.scratch.data(),
            threads: self.plan.threads,
        }
    }

    /// Compares every contender's results with those of the unfused one.
    fn check(
        &self,
        entry: &Entry,
        running: &mut [Running],
        helper: &mut Process,
        progress: &Progress,
    ) {
        let reference = self.scratch.results(Contender::Unfused);
        // The unfused one first: the others are compared with what it wrote.
        let mut order: Vec<&mut Running> = running.iter_mut().collect();
        order.sort_by_key(|contender| contender.contender() != Contender::Unfused);
        let mut tensors: Option<Vec<String>> = None;
        for contender in order {
            let name = contender.contender();
            if !contender.is_alive() {
                continue;
            }
            progress.say(format_args!("checking {name}"));
            let folder = self.scratch.results(name);
            let Some(checked) = contender.check(&folder) else {
                continue;
            };
            if name == Contender::Unfused {
                tensors = Some(checked.tensors);
                continue;
            }
            let tolerance = entry.work.tolerance(&self.device, self.precision);
            let tensors = tensors.as_deref();
            contender.compare(helper, &folder, &reference, tensors, &checked, tolerance);
            // Results are as large as activations; nobody needs them any more.
            let _ = fs::remove_dir_all(&folder);
        }
    }

    /// Times all contenders round by round, each round one step of every contender in turn, after
    /// some that do not count. Returns the number of rounds.
    ///
    /// Steps of the same round are neighbours in time, so that what slows the machine down for a
    /// while slows down all of them. Every round starts with another contender.
    fn time(&self, running: &mut [Running], progress: &Progress) -> usize {
        progress.say("warming up");
        let mut round = Duration::ZERO;
        for contender in running.iter_mut() {
            let name = contender.contender();
            let mut step = None;
            for _ in 0..self.plan.warm_ups {
                thread::sleep(PAUSE);
                step = contender.step();
                if step.is_some() {}
            }
            // What is compiled before it runs tells nothing yet.
            let seconds = match name {
                Contender::Compile => 0.0,
                _ => step.map_or(0.0, |step| 1e-3 * step.total_ms()),
            };
            round += Duration::from_secs_f64(seconds);
        }
        let rounds = self.plan.rounds.count(round);
        for index in 0..rounds {
            for turn in rotation(running.len(), index) {
                let contender = &mut running[turn];
                if contender.is_alive() {
                    let (name, round) = (contender.contender(), index + 1);
                    progress.say(format_args!("{name}, round {round} of {rounds}"));
                    thread::sleep(PAUSE);
                    contender.timed_step();
                }
            }
        }
        rounds
    }

    /// One step of every contender that was timed, each in a fresh process.
    fn measure(&self, entry: &Entry, report: &mut EntryReport, progress: &Progress) {
        for contender in &mut report.contenders {
            if contender.steps.is_empty() {
                continue;
            }
            let name = contender.contender;
            progress.say(format_args!("measuring the memory of {name}"));
            let mut fresh = self.load(entry, name);
            contender.memory = fresh.memory();
            if let Some(problem) = fresh.finish().problem {
                let reason = format!("while memory was measured: {}", problem.reason);
                contender.fail(problem.kind, reason);
            }
        }
    }
}

/// The order of a round.
fn rotation(count: usize, round: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |turn| (turn + round) % count)
}

/// Builds the worker for a device and returns its file.
fn build_worker(device: &str) -> Result<PathBuf> {
    let args = build_args(device);
    note!("$ cargo {}", args.join(" "));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let output = cargo(&args)
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("cannot build {WORKER}");
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let file = messages.lines().find_map(executable);
    file.with_context(|| format!("cargo built {WORKER}, but does not say where"))
}

/// What cargo is told to build the worker.
///
/// For Flex it is built as a default member like any other, and not by its package's name: then
/// cargo turns on the same features as for `cargo build --release`, and builds Burn once for both.
/// Other devices have a folder each, so that going from one to another builds nothing anew.
fn build_args(device: &str) -> Vec<String> {
    let mut args = ["build", "--release", "--locked", "--bin", WORKER]
        .map(String::from)
        .to_vec();
    if device != FLEX {
        let features = format!("{device},fusion,autotune,persistence");
        let folder = format!("target/gpu-{device}");
        let more = [
            "-p",
            WORKER_PACKAGE,
            "--features",
            features.as_str(),
            "--target-dir",
            folder.as_str(),
        ];
        args.extend(more.map(String::from));
    }
    args
}

/// The worker's file, if this is cargo's message that it was built.
fn executable(message: &str) -> Option<PathBuf> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    if message["target"]["name"] != WORKER {
        return None;
    }
    message["executable"].as_str().map(PathBuf::from)
}

/// The folder for data and results, which is removed at the end. Held by one run at a time: two would
/// disturb each other's timings.
struct Scratch {
    folder: TempDir,
    /// Held locked until the end.
    _lock: Option<File>,
}

impl Scratch {
    /// In a folder for temporary files.
    fn create(parent: &Path) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("burn-conv-bn-bench-")
            .tempdir_in(parent);
        Ok(Self {
            _lock: lock(&parent.join(LOCK))?,
            folder: folder
                .with_context(|| format!("cannot create a folder in {}", parent.display()))?,
        })
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn all_results(&self) -> PathBuf {
        self.folder.path().join("results")
    }

    fn results(&self, contender: Contender) -> PathBuf {
        self.all_results().join(contender.name())
    }

    fn clear(&self) -> Result<()> {
        for folder in [self.data(), self.all_results()] {
            match fs::remove_dir_all(&folder) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error)
                        .with_context(|| format!("cannot remove {}", folder.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Locks a file. `None`, with a note, where the system has no locks.
fn lock(path: &Path) -> Result<Option<File>> {
    let mut options = OpenOptions::new();
    options.read(true).append(true).create(true);
    // Another user's file can be locked, but not written.
    let file = options.open(path).or_else(|_| File::open(path));
    let locked = match file {
        Ok(file) => file.try_lock().map(|()| file),
        Err(error) => Err(TryLockError::Error(error)),
    };
    match locked {
        Ok(file) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => bail!(
            "another cargo xtask bench is running, which holds {}",
            path.display()
        ),
        Err(TryLockError::Error(error)) => {
            note!(
                "bench: whether another one runs is unknown: cannot lock {}: {error}",
                path.display()
            );
            Ok(None)
        }
    }
}

/// Says what will run.
fn announce(report: &Report, lab: &Lab, args: &Bench) {
    let names = lab.plan.contenders.iter();
    let names: Vec<_> = names.map(|contender| contender.name()).collect();
    let threads = lab.plan.threads;
    note!(
        "bench: {} on {} in {}, {threads} thread{}",
        names.join(", "),
        lab.device,
        lab.precision,
        if threads == 1 { "" } else { "s" }
    );
    if args.peer.is_none() {
        note!("bench: PyTorch is left out; --peer pytorch compares with it");
    }
    for entry in &report.entries {
        note!("bench: {:<12} {}", entry.entry.id, entry.title);
    }
    if lab.device != FLEX {
        note!(
            "bench: kernels are compiled and autotuned first, which may take minutes for each entry"
        );
    }
}

/// The kind and the words of a reply that says why there is none.
fn refusal(reply: Reply) -> (ProblemKind, String) {
    match reply {
        Reply::Unavailable { reason } => (ProblemKind::Unavailable, reason),
        Reply::Failed { reason } => (ProblemKind::Failed, reason),
        other => (ProblemKind::Failed, format!("{other:?} is no answer")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_round_starts_with_another_contender() {
        let rounds: Vec<Vec<usize>> = (0..4).map(|round| rotation(3, round).collect()).collect();
        assert_eq!(rounds, [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]);
        assert_eq!(rotation(0, 5).count(), 0);
    }

    #[test]
    fn the_worker_is_where_cargo_says() {
        let built = r#"{"reason":"compiler-artifact","target":{"kind":["bin"],
            "name":"bench-worker"},"executable":"/t/release/bench-worker"}"#;
        assert_eq!(executable(built), Some("/t/release/bench-worker".into()));
        let library =
            r#"{"reason":"compiler-artifact","target":{"name":"burn"},"executable":null}"#;
        assert_eq!(executable(library), None);
        let other = r#"{"target":{"name":"mnist"},"executable":"/t/release/mnist"}"#;
        assert_eq!(executable(other), None);
        assert_eq!(executable("Compiling"), None);
    }

    #[test]
    fn the_worker_is_built_for_its_device() {
        let flex = build_args(FLEX).join(" ");
        assert_eq!(flex, "build --release --locked --bin bench-worker");
        let cuda = build_args("cuda").join(" ");
        let more = " -p burn-conv-bn-bench-worker --features cuda,fusion,autotune,persistence \
                    --target-dir target/gpu-cuda";
        assert_eq!(cuda, format!("{flex}{more}"));
    }

    #[derive(clap::Parser, Debug)]
    struct Cli {
        #[command(flatten)]
        bench: Bench,
    }

    fn parse(options: &[&str]) -> Result<Bench, clap::Error> {
        let line = ["bench"].iter().chain(options);
        <Cli as clap::Parser>::try_parse_from(line).map(|cli| cli.bench)
    }

    #[test]
    fn devices_and_precisions_are_checked_by_name() {
        assert_eq!(parse(&[]).unwrap().device, FLEX);
        for device in DEVICES {
            assert_eq!(parse(&["--device", device]).unwrap().device, device);
        }
        let error = parse(&["--device", "abacus"]).unwrap_err();
        assert!(error.to_string().contains("vulkan"), "{error}");
        assert_eq!(parse(&[]).unwrap().precision, Precision::F32);
        let bf16 = parse(&["--precision", "bf16"]).unwrap();
        assert_eq!(bf16.precision, Precision::Bf16);
        let error = parse(&["--precision", "f8"]).unwrap_err();
        assert!(error.to_string().contains("bf16"), "{error}");
    }

    #[test]
    fn what_makes_no_sense_together_is_refused() {
        for (options, wanted) in [
            (&["--precision", "tf32"][..], "cuda, not flex"),
            (&["--contender", "eager"], "--peer pytorch"),
            (
                &["--peer", "pytorch", "--contender", "fused"],
                "--contender",
            ),
            (&["--profile", "--quick"], "--profile"),
        ] {
            let error = bench(&parse(options).unwrap()).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn contenders_are_those_asked_for_and_the_reference() {
        let contenders = |options: &[&str]| {
            let bench = parse(options).unwrap();
            [Engine::Burn, Engine::PyTorch].map(|engine| bench.contenders(engine))
        };
        assert_eq!(contenders(&[]).concat(), Contender::ALL);
        let [burn, torch] = contenders(&["--contender", "fused", "--contender", "eager"]);
        assert_eq!(burn, [Contender::Fused, Contender::Unfused]);
        assert_eq!(torch, [Contender::Eager]);
    }

    #[test]
    fn numbers_have_bounds_which_are_named() {
        for (option, most) in [
            ("--rounds", "1000"),
            ("--batch", "65536"),
            ("--threads", "1024"),
        ] {
            assert!(parse(&[option, most]).is_ok());
            let beyond = (most.parse::<usize>().unwrap() + 1).to_string();
            for wrong in ["0", "-1", "1.5", &beyond, "18446744073709551615", "1e99"] {
                let error = parse(&[&format!("{option}={wrong}")])
                    .unwrap_err()
                    .to_string();
                assert!(
                    error.contains(&format!("from 1 to {most}")),
                    "{wrong}: {error}"
                );
            }
        }
    }

    #[test]
    fn a_run_of_nothing_is_no_success() {
        let mut report = testing::report();
        let conclude = |report: &Report, options: &[&str]| {
            conclude(report, &Outputs::default(), &parse(options).unwrap())
        };
        assert!(conclude(&report, &[]).is_ok());
        let peer = ["--peer", "pytorch"];
        let error = conclude(&report, &peer).unwrap_err().to_string();
        assert_eq!(
            error,
            "--peer pytorch measured nothing: there was no contender"
        );
        for contender in &mut report.entries[0].contenders {
            contender.steps.clear();
            contender.fail(ProblemKind::Unavailable, "no bf16");
        }
        let error = conclude(&report, &[]).unwrap_err().to_string();
        assert_eq!(error, "nothing was measured: no bf16");
    }

    #[test]
    fn a_second_run_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let first = Scratch::create(folder.path()).unwrap();
        fs::create_dir_all(first.results(Contender::Fused)).unwrap();
        assert!(Scratch::create(folder.path()).is_err());
        drop(first);
        drop(Scratch::create(folder.path()).unwrap());
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "the lock alone stays: {left:?}");
    }

    #[test]
    fn refusals_keep_their_kind() {
        let reason = || "why".to_string();
        let unavailable = refusal(Reply::Unavailable { reason: reason() });
        assert_eq!(unavailable, (ProblemKind::Unavailable, reason()));
        let failed = refusal(Reply::Failed { reason: reason() });
        assert_eq!(failed, (ProblemKind::Failed, reason()));
        assert_eq!(refusal(Reply::Done {}).0, ProblemKind::Failed);
    }
}
