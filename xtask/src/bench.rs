//! `cargo xtask bench`: starts the contenders, checks them against each other, times them side by
//! side, measures their memory, and prints tables.

mod contender;
mod machine;
mod output;
mod process;

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use burn_conv_bn_bench::catalogue::{Entry, Selection, Work, catalogue, select};
use burn_conv_bn_bench::device::{DEVICES, FLEX};
use burn_conv_bn_bench::protocol::{Contender, Engine, Reply, Request};
use burn_conv_bn_bench::report::{EntryReport, ProblemKind, Report};
use burn_conv_bn_bench::table;
use clap::{Args, ValueEnum};

use super::{cargo, python, root};
use contender::Running;
use output::JsonFile;
use process::Process;

/// The program that runs Burn's contenders.
const WORKER: &str = "bench-worker";

/// The package that it is in.
const WORKER_PACKAGE: &str = "burn-conv-bn-bench-worker";

/// The program that runs PyTorch's, from the workspace's root.
const PYTORCH: &str = "crates/burn-conv-bn-bench/peer/pytorch.py";

/// Seed of all data.
const SEED: u64 = 20_240_229;

/// Timed rounds, unless `--rounds` says otherwise.
const ROUNDS: usize = 7;

/// The same where a step takes longer than [`SLOW_STEP_MS`].
const SLOW_ROUNDS: usize = 3;

/// Milliseconds.
const SLOW_STEP_MS: f64 = 5000.0;

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
    /// Smaller batches: minutes become seconds, and the ratios less telling.
    #[arg(long)]
    quick: bool,
    /// Run this entry alone; may be given several times.
    #[arg(long, value_name = "ID")]
    only: Vec<String>,
    /// Run the layers alone.
    #[arg(long)]
    layers: bool,
    /// Run the networks alone.
    #[arg(long)]
    networks: bool,
    /// Timed steps of each contender [default: 7, and 3 where a step takes longer than 5 s].
    #[arg(long, value_name = "N")]
    rounds: Option<NonZeroUsize>,
    /// Threads of each contender [default: as many as the machine runs at once].
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Another framework to compare with.
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
    /// Do not measure memory.
    #[arg(long)]
    no_memory: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Peer {
    /// PyTorch, on the CPU or on CUDA.
    Pytorch,
}

/// Runs the benchmark. Fails if a contender failed or computed something else than the others.
pub fn bench(args: &Bench) -> Result<()> {
    let entries = select(
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
    let json = args.json.as_deref().map(JsonFile::create).transpose()?;
    let (lab, versions) = Lab::set_up(args)?;
    announce(&entries, &lab, args);

    let mut report = Report {
        quick: args.quick,
        device: lab.device.clone(),
        machine: machine::describe(lab.threads, &lab.device),
        versions,
        commit: machine::clean_commit(),
        entries: Vec::new(),
        summary: Vec::new(),
    };
    for entry in entries {
        let started = Instant::now();
        let entry_report = lab.run(entry, args);
        println!("\n{}", table::entry(&entry_report, &lab.device).trim_end());
        progress(
            &entry_report.entry,
            &format!("took {}", duration(started.elapsed())),
        );
        report.entries.push(entry_report);
        report.summarize();
        // After every entry: what was interrupted keeps what is finished.
        if let Some(json) = &json {
            json.write(&report)?;
        }
    }
    conclude(&report, json.as_ref())
}

fn conclude(report: &Report, json: Option<&JsonFile>) -> Result<()> {
    let legend = table::legend(&report.device);
    println!("\n{legend}\n\n{}", table::setting(report));
    for comparison in &report.summary {
        println!("{}", table::comparison(comparison));
    }
    if let Some(json) = json {
        println!("Report: {}", json.path().display());
    }
    let failed = report.entries.iter().filter(|entry| entry.is_failure());
    let failed: Vec<_> = failed.map(|entry| entry.entry.id.as_str()).collect();
    match failed.is_empty() {
        true => Ok(()),
        false => bail!("something failed in: {}", failed.join(", ")),
    }
}

/// What all entries share: the programs, and a place for the data.
struct Lab {
    /// Where the contenders compute.
    device: String,
    worker: PathBuf,
    peer_script: PathBuf,
    /// The python, if the peer was asked for and is there.
    python: Option<PathBuf>,
    threads: usize,
    scratch: Scratch,
}

impl Lab {
    /// Builds the worker, unless it is there, and looks for the peer. Returns the versions of what
    /// runs, too.
    fn set_up(args: &Bench) -> Result<(Self, BTreeMap<String, String>)> {
        let worker = match &args.worker {
            // Not by its name alone, which would be looked for among the system's programs.
            Some(file) => file
                .canonicalize()
                .with_context(|| format!("cannot find the worker {}", file.display()))?,
            None => build_worker(&args.device)?,
        };
        let peer_script = args.peer_script.clone();
        let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let mut lab = Self {
            device: args.device.clone(),
            scratch: Scratch::create(&worker)?,
            worker,
            peer_script: peer_script.unwrap_or_else(|| root().join(PYTORCH)),
            python: None,
            threads: args.threads.map_or(cores, NonZeroUsize::get),
        };
        let mut versions = versions(&mut lab.start(Engine::Burn)?)?;
        versions.extend(machine::rustc_version());
        if args.peer == Some(Peer::Pytorch) {
            lab.python = Some(python(args.python.clone()));
            let peer = lab.start(Engine::PyTorch);
            match peer.and_then(|mut peer| self::versions(&mut peer)) {
                Ok(of_peer) => versions.extend(of_peer),
                Err(error) => {
                    eprintln!("bench: PyTorch is left out, it is not available: {error:#}");
                    lab.python = None;
                }
            }
        }
        Ok((lab, versions))
    }

    fn contenders(&self) -> impl Iterator<Item = Contender> {
        let there = move |contender: &Contender| match contender.engine() {
            Engine::Burn => true,
            Engine::PyTorch => self.python.is_some(),
        };
        Contender::ALL.into_iter().filter(there)
    }

    /// A fresh process for a contender.
    fn start(&self, engine: Engine) -> Result<Process> {
        match (engine, &self.python) {
            (Engine::Burn, _) => {
                let mut command = Command::new(&self.worker);
                command.env("RAYON_NUM_THREADS", self.threads.to_string());
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

    /// Runs an entry. What goes wrong is in the report.
    fn run(&self, entry: Entry, args: &Bench) -> EntryReport {
        let mut report = EntryReport::new(entry, &self.device);
        if let Err(error) = self.fill(&mut report, args) {
            report.problem = Some(format!("{error:#}"));
        }
        report.summarize();
        report
    }

    fn fill(&self, report: &mut EntryReport, args: &Bench) -> Result<()> {
        let entry = report.entry.clone();
        progress(&entry, "drawing the data");
        self.scratch.clear()?;
        let mut helper = self.start(Engine::Burn)?;
        let prepare = Request::Prepare {
            entry: entry.clone(),
            seed: SEED,
            data_dir: self.scratch.data(),
        };
        match helper.ask(&prepare)? {
            Reply::Done {} => {}
            other => bail!("cannot draw the data: {other:?}"),
        }

        progress(&entry, "loading");
        let started = self.contenders().map(|contender| {
            let process = self.start(contender.engine());
            Running::load(contender, process, self.load_request(&entry, contender))
        });
        let mut running: Vec<Running> = started.collect();
        self.check(&entry, &mut running, &mut helper);
        drop(helper);
        let warm_ups = match self.device.as_str() {
            FLEX => WARM_UPS,
            _ => DEVICE_WARM_UPS,
        };
        report.rounds = time(&entry, &mut running, args.rounds, warm_ups);
        // All processes end here: memory is measured in fresh ones.
        report.contenders = running.into_iter().map(Running::finish).collect();
        if !args.no_memory {
            self.measure(&entry, report);
        }
        Ok(())
    }

    fn load_request(&self, entry: &Entry, variant: Contender) -> Request {
        Request::Load {
            entry: entry.clone(),
            variant,
            device: self.device.clone(),
            data_dir: self.scratch.data(),
            threads: self.threads,
        }
    }

    /// Compares every contender's results with those of the unfused one.
    fn check(&self, entry: &Entry, running: &mut [Running], helper: &mut Process) {
        let reference = self.scratch.results(Contender::Unfused);
        // The unfused one first: the others are compared with what it wrote.
        let mut order: Vec<&mut Running> = running.iter_mut().collect();
        order.sort_by_key(|contender| contender.contender() != Contender::Unfused);
        let mut tensors: Option<Vec<String>> = None;
        for contender in order {
            let name = contender.contender();
            progress(entry, &format!("checking {name}"));
            let folder = self.scratch.results(name);
            let Some(checked) = contender.check(&folder) else {
                continue;
            };
            if name == Contender::Unfused {
                tensors = Some(checked.tensors);
                continue;
            }
            let tolerance = entry.work.tolerance(&self.device);
            let tensors = tensors.as_deref();
            contender.compare(helper, &folder, &reference, tensors, &checked, tolerance);
            // Results are as large as activations; nobody needs them any more.
            let _ = fs::remove_dir_all(&folder);
        }
    }

    /// One step of every contender that was timed, each in a fresh process.
    fn measure(&self, entry: &Entry, report: &mut EntryReport) {
        for contender in &mut report.contenders {
            if contender.steps.is_empty() {
                continue;
            }
            let name = contender.contender;
            progress(entry, &format!("measuring the memory of {name}"));
            let process = self.start(name.engine());
            let mut fresh = Running::load(name, process, self.load_request(entry, name));
            contender.memory = fresh.memory();
            if let Some(problem) = fresh.finish().problem {
                let reason = format!("while memory was measured: {}", problem.reason);
                contender.fail(problem.kind, reason);
            }
        }
    }
}

/// Times all contenders round by round, each round one step of every contender in turn, after
/// some that do not count. Returns the number of rounds.
///
/// Steps of the same round are neighbours in time, so that what slows the machine down for a while
/// slows down all of them. Every round starts with another contender.
fn time(
    entry: &Entry,
    running: &mut [Running],
    rounds: Option<NonZeroUsize>,
    warm_ups: usize,
) -> usize {
    progress(entry, "warming up");
    let mut slowest = 0.0f64;
    for contender in running.iter_mut() {
        let mut step = None;
        for _ in 0..warm_ups {
            thread::sleep(PAUSE);
            step = contender.step();
        }
        // What is compiled before it runs tells nothing yet.
        if contender.contender() != Contender::Compile {
            slowest = slowest.max(step.map_or(0.0, |step| step.total_ms()));
        }
    }
    let rounds = match rounds {
        Some(rounds) => rounds.get(),
        None if slowest > SLOW_STEP_MS => SLOW_ROUNDS,
        None => ROUNDS,
    };
    for round in 0..rounds {
        progress(entry, &format!("round {} of {rounds}", round + 1));
        for turn in rotation(running.len(), round) {
            thread::sleep(PAUSE);
            running[turn].timed_step();
        }
    }
    rounds
}

/// The order of a round.
fn rotation(count: usize, round: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |turn| (turn + round) % count)
}

fn versions(process: &mut Process) -> Result<BTreeMap<String, String>> {
    match process.ask(&Request::Hello {})? {
        Reply::Hello { versions } => Ok(versions),
        Reply::Unavailable { reason } | Reply::Failed { reason } => Err(anyhow!(reason)),
        other => bail!("{other:?} is no answer to a greeting"),
    }
}

/// Builds the worker for a device and returns its file.
fn build_worker(device: &str) -> Result<PathBuf> {
    let args = build_args(device);
    eprintln!("$ cargo {}", args.join(" "));
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
        let features = format!("{device},fusion,autotune");
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

/// The folder for data and results. Held by one run at a time: two would disturb each other's
/// timings anyway.
struct Scratch {
    folder: PathBuf,
    /// Held locked until the end.
    _lock: File,
}

impl Scratch {
    /// Beside the worker, where the next run finds and removes what an interrupted one left.
    fn create(worker: &Path) -> Result<Self> {
        let parent = worker.parent().context("the worker lies in a folder")?;
        let path = parent.join("bench.lock");
        let lock =
            File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!("another cargo xtask bench is running"),
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        Ok(Self {
            folder: parent.join("bench-data"),
            _lock: lock,
        })
    }

    fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    fn results(&self, contender: Contender) -> PathBuf {
        self.folder.join("results").join(contender.name())
    }

    fn clear(&self) -> Result<()> {
        if self.folder.exists() {
            fs::remove_dir_all(&self.folder)
                .with_context(|| format!("cannot remove {}", self.folder.display()))?;
        }
        Ok(())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = self.clear();
    }
}

/// Says what will run, and about how long it takes where that can be guessed.
fn announce(entries: &[Entry], lab: &Lab, args: &Bench) {
    let contenders: Vec<_> = lab.contenders().collect();
    let names: Vec<_> = contenders
        .iter()
        .map(|contender| contender.name())
        .collect();
    eprintln!(
        "bench: {} on {}, {} thread{}",
        names.join(", "),
        lab.device,
        lab.threads,
        if lab.threads == 1 { "" } else { "s" }
    );
    if args.peer.is_none() {
        eprintln!("bench: PyTorch is left out; --peer pytorch compares with it");
    }
    for entry in entries {
        eprintln!("bench: {:<11} {}", entry.id, entry.work);
    }
    if lab.device != FLEX {
        eprintln!(
            "bench: kernels are compiled and autotuned first, which may take minutes for each entry"
        );
        return;
    }
    let steps = args.rounds.map_or(ROUNDS, NonZeroUsize::get) + OTHER_STEPS;
    let each = |entry: &Entry| {
        let step = step_estimate(&entry.work, lab.threads).mul_f64(steps as f64);
        let contenders = contenders.iter().map(|contender| match contender.engine() {
            Engine::Burn => step + BURN_START,
            Engine::PyTorch => step + PYTORCH_START,
        });
        contenders.sum::<Duration>()
    };
    let estimate: Duration = entries.iter().map(each).sum();
    eprintln!(
        "bench: about {} in all, by a rough guess",
        duration(estimate)
    );
}

/// Steps of a contender besides the timed ones: check, warm-up, memory.
const OTHER_STEPS: usize = 4;

/// Starting a contender twice, and handling its data.
const BURN_START: Duration = Duration::from_secs(2);
/// The same for PyTorch, where one of four is compiled first.
const PYTORCH_START: Duration = Duration::from_secs(15);

/// A guess at a step of an average contender: so much for a million multiplications, and so much
/// for a million values that are written and read a few times.
fn step_estimate(work: &Work, threads: usize) -> Duration {
    let millions = |count: usize| count as f64 / 1e6;
    let microseconds =
        160.0 * millions(work.multiply_adds()) + 14_000.0 * millions(work.activations());
    Duration::from_secs_f64(1e-6 * microseconds / threads as f64)
}

fn progress(entry: &Entry, what: &str) {
    eprintln!("bench: {}: {what}", entry.id);
}

fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    match seconds {
        _ if seconds < 9.5 => format!("{seconds:.1} s"),
        _ if seconds < 99.5 => format!("{seconds:.0} s"),
        _ => format!("{:.0} min", seconds / 60.0),
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
        let more = " -p burn-conv-bn-bench-worker --features cuda,fusion,autotune \
                    --target-dir target/gpu-cuda";
        assert_eq!(cuda, format!("{flex}{more}"));
    }

    #[test]
    fn devices_are_checked_by_name() {
        #[derive(clap::Parser, Debug)]
        struct Cli {
            #[command(flatten)]
            bench: Bench,
        }
        let parse = |args: &[&str]| <Cli as clap::Parser>::try_parse_from(args);
        assert_eq!(parse(&["bench"]).unwrap().bench.device, FLEX);
        for device in DEVICES {
            let cli = parse(&["bench", "--device", device]).unwrap();
            assert_eq!(cli.bench.device, device);
        }
        let error = parse(&["bench", "--device", "abacus"]).unwrap_err();
        assert!(error.to_string().contains("vulkan"), "{error}");
    }

    #[test]
    fn larger_work_is_expected_to_take_longer() {
        let entries = catalogue(false);
        let work = |id: &str| &entries.iter().find(|entry| entry.id == id).unwrap().work;
        let small = step_estimate(work("net-256"), 2);
        let large = step_estimate(work("net-2048"), 2);
        assert!((large.as_secs_f64() / small.as_secs_f64() - 8.0).abs() < 1e-3);
        assert!(
            (step_estimate(work("net-256"), 4).as_secs_f64() * 2.0 - small.as_secs_f64()).abs()
                < 1e-6
        );
    }

    #[test]
    fn durations_are_short() {
        let texts = [0.04, 9.4, 42.3, 240.0].map(|s| duration(Duration::from_secs_f64(s)));
        assert_eq!(texts, ["0.0 s", "9.4 s", "42 s", "4 min"]);
    }

    #[test]
    fn a_second_run_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let worker = folder.path().join("bench-worker");
        let first = Scratch::create(&worker).unwrap();
        fs::create_dir_all(first.results(Contender::Fused)).unwrap();
        assert!(Scratch::create(&worker).is_err());
        drop(first);
        let second = Scratch::create(&worker).unwrap();
        assert!(!second.folder.exists());
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
