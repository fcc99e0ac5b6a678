//! What runs the entries: the programs, and a place for the data.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use burn_conv_bn_bench::catalogue::Entry;
use burn_conv_bn_bench::device::FLEX;
use burn_conv_bn_bench::precision::Precision;
use burn_conv_bn_bench::protocol::{Contender, Engine, Reply, Request};
use burn_conv_bn_bench::report::{EntryReport, Report};
use burn_conv_bn_bench::table;

use super::args::{Bench, Peer};
use super::contender::Running;
use super::machine;
use super::output::Outputs;
use super::process::Process;
use super::progress::{Progress, Rounds, duration};
use super::scratch::Scratch;
use super::worker::{self, WORKER};
use crate::interrupt;
use crate::say::{note, say};
use crate::workspace::{python, root};

/// The program that runs PyTorch's, from the workspace's root.
const PYTORCH: &str = "crates/burn-conv-bn-bench/peer/pytorch.py";

/// Seed of all data.
pub const SEED: u64 = 20_240_229;

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

/// What the contenders say about themselves.
#[derive(Debug, Default)]
pub struct Software {
    /// Version by name.
    pub versions: BTreeMap<String, String>,
    /// The widest vectors that are used, by who uses them.
    pub vectors: BTreeMap<String, String>,
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
pub struct Plan {
    /// Who runs it.
    pub contenders: Vec<Contender>,
    /// Threads of each of them.
    pub threads: usize,
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
pub struct Lab {
    /// Where the contenders compute.
    pub device: String,
    /// What they compute in.
    pub precision: Precision,
    worker: PathBuf,
    peer_script: PathBuf,
    /// The python, if the peer was asked for.
    python: Option<PathBuf>,
    pub plan: Plan,
    scratch: Scratch,
}

impl Lab {
    /// Builds the worker, unless it is there, and looks for the peer. Returns what runs, too.
    pub fn set_up(args: &Bench) -> Result<(Self, Software)> {
        let worker = match &args.worker {
            // Not by its name alone, which would be looked for among the system's programs.
            Some(file) => file
                .canonicalize()
                .with_context(|| format!("cannot find the worker {}", file.display()))?,
            None => worker::build(&args.device)?,
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
    pub fn run_all(&self, report: &mut Report, outputs: &Outputs) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_round_starts_with_another_contender() {
        let rounds: Vec<Vec<usize>> = (0..4).map(|round| rotation(3, round).collect()).collect();
        assert_eq!(rounds, [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]);
        assert_eq!(rotation(0, 5).count(), 0);
    }
}
