//! `cargo xtask soak`: the tests that draw their cases, with fresh seeds, until the time is over.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use burn_conv_bn_bench::device::FLEX;
use burn_conv_bn_bench::report::Machine;
use clap::Args;

use crate::bench::machine;
use crate::programs::{self, Count, Program};
use crate::{cargo, gpu, root};

/// The variables that seed test programs: all that there are, for each.
const SEEDS: [&str; 4] = [
    "BURN_CONV_BN_SEED",
    "BURN_CONV_BN_FUZZ_SEED",
    "BURN_CONV_BN_KILL_SEED",
    "PROPTEST_RNG_SEED",
];

/// A test program, and how it is run.
#[derive(Debug, PartialEq)]
struct Stage {
    program: &'static str,
    what: &'static str,
    /// Variables that say how much it is to do.
    settings: &'static [(&'static str, &'static str)],
}

/// In the order of a round.
static STAGES: [Stage; 7] = [
    Stage {
        program: "property",
        what: "random configurations of the op against naive loops in f64",
        settings: &[("PROPTEST_CASES", "2000")],
    },
    Stage {
        program: "stress",
        what: "values at the limits of what floats hold",
        settings: &[],
    },
    Stage {
        program: "concurrency",
        what: "threads, nested pools, graphs of unusual shapes: the same bits",
        settings: &[],
    },
    Stage {
        program: "leaks",
        what: "bytes in use over hundreds of steps",
        settings: &[],
    },
    Stage {
        program: "convergence",
        what: "32 steps of whole networks, fused against unfused",
        settings: &[],
    },
    Stage {
        program: "data_fuzz",
        what: "damaged data files",
        settings: &[("BURN_CONV_BN_FUZZ_MUTATIONS", "200000")],
    },
    Stage {
        program: "kill",
        what: "training killed and resumed",
        settings: &[("BURN_CONV_BN_KILLS", "20")],
    },
];

/// A program that runs for longer hangs.
const LIMIT: Duration = Duration::from_secs(60 * 60);

/// How often a running program is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Last lines of a failed program's output that the report keeps.
const TAIL: usize = 60;

/// Where programs' outputs go, and the report unless it is told otherwise, from the workspace's root.
const FOLDER: &str = "target/soak";

#[derive(Args, Debug)]
pub struct Soak {
    /// For how long. Each program runs once in any case, and what runs at the end is finished.
    #[arg(long, value_name = "MINUTES", value_parser = minutes)]
    minutes: Duration,
    /// What the seeds of all runs follow from [default: the time].
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    /// Write the report to this file [default: target/soak/report.md].
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

fn minutes(text: &str) -> Result<Duration, String> {
    let minutes: f64 = text
        .parse()
        .map_err(|_| format!("{text:?} is not a number"))?;
    Duration::try_from_secs_f64(60.0 * minutes).map_err(|error| error.to_string())
}

/// Runs the programs in turn until the time is over. Fails if one of them did.
pub fn soak(args: &Soak) -> Result<()> {
    let folder = root().join(FOLDER);
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let path = match &args.report {
        Some(path) => path.clone(),
        None => folder.join("report.md"),
    };
    let seed = args.seed.unwrap_or_else(time);
    let mut report = Report {
        seed,
        asked: args.minutes,
        elapsed: Duration::ZERO,
        date: machine::date()?,
        machine: machine::describe(threads(), FLEX, BTreeMap::new()),
        versions: versions(),
        commit: machine::clean_commit(),
        runs: Vec::new(),
    };
    // A report that cannot be written is noticed now, not after hours.
    write(&path, &report.text())?;
    let programs = build()?;
    println!("soak: {} programs, from seed {seed}", STAGES.len());

    let mut seeds = Seeds(seed);
    let started = Instant::now();
    'time: for round in 0_usize.. {
        for (stage, program) in STAGES.iter().zip(&programs) {
            if round > 0 && started.elapsed() >= args.minutes {
                break 'time;
            }
            let run = run(stage, program, seeds.draw(), &folder)?;
            println!(
                "soak: {:.1} min, {}",
                started.elapsed().as_secs_f64() / 60.0,
                run.line()
            );
            report.runs.push(run);
            report.elapsed = started.elapsed();
            // Each time: what is interrupted keeps what it found.
            write(&path, &report.text())?;
        }
    }
    println!("soak: report in {}", path.display());
    let failed = report.failures().count();
    match failed {
        0 => {
            println!("soak: {} runs passed", report.runs.len());
            Ok(())
        }
        _ => bail!("{failed} of {} runs failed", report.runs.len()),
    }
}

/// Builds the programs, in the order of [`STAGES`].
fn build() -> Result<Vec<Program>> {
    let mut command = cargo(&["test", "--release", "--no-run"]);
    command.args(gpu::WITHOUT);
    for stage in &STAGES {
        command.args(["--test", stage.program]);
    }
    let built = programs::build(command)?;
    let find = |stage: &Stage| {
        let found = built.iter().find(|program| program.name == stage.program);
        found
            .cloned()
            .with_context(|| format!("cargo built no test program {}", stage.program))
    };
    STAGES.iter().map(find).collect()
}

/// Runs a program with that seed.
fn run(stage: &'static Stage, program: &Program, seed: u64, folder: &Path) -> Result<Run> {
    let log = folder.join(format!("{}.log", stage.program));
    let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut command = Command::new(&program.file);
    command
        .current_dir(&program.folder)
        .env("CARGO_MANIFEST_DIR", &program.folder)
        .env("RUST_BACKTRACE", "1")
        .envs(stage.settings.iter().copied())
        .envs(SEEDS.map(|name| (name, seed.to_string())))
        .stdin(Stdio::null())
        .stdout(output.try_clone().context("cannot share a file")?)
        .stderr(output);
    let started = Instant::now();
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start {}", program.file.display()))?;
    let status =
        wait(&mut child, LIMIT).with_context(|| format!("cannot wait for {}", stage.program))?;
    let took = started.elapsed();
    // A program that is killed may leave half a character.
    let output = fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?;
    let output = String::from_utf8_lossy(&output);
    let count = Count::of(&output);
    let failure = problem(status, count).map(|how| Failure {
        how,
        tail: tail(&output, TAIL),
    });
    Ok(Run {
        stage,
        seed,
        took,
        count,
        failure,
    })
}

/// Waits for a child, and kills it when the limit is over.
fn wait(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if started.elapsed() >= limit {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(LOOK);
    }
}

/// What is wrong with how a program ended; without a status it was killed.
fn problem(status: Option<ExitStatus>, count: Count) -> Option<String> {
    match status {
        None => Some(format!("hung for {} minutes", LIMIT.as_secs() / 60)),
        Some(status) if !status.success() => Some(status.to_string()),
        Some(_) if count.passed == 0 => Some("ran no test".to_string()),
        Some(_) => None,
    }
}

/// The last lines of a text.
fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Puts a text in the place of what was there.
fn write(path: &Path, text: &str) -> Result<()> {
    let unfinished = path.with_extension("unfinished");
    fs::write(&unfinished, text)
        .and_then(|()| fs::rename(&unfinished, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Nanoseconds, as far as they fit.
fn time() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as u64)
}

fn threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Versions of what decides what is computed, by name.
fn versions() -> Vec<(String, String)> {
    let lock = fs::read_to_string(root().join("Cargo.lock")).unwrap_or_default();
    let packages = ["burn", "burn-flex", "gemm", "proptest", "pulp", "rayon"];
    let packages = packages
        .into_iter()
        .filter_map(|name| Some((name.to_string(), locked(&lock, name)?.to_string())));
    let compiler = machine::rustc_version().into_iter();
    compiler.chain(packages).collect()
}

/// A package's version in a lock file: the first where there are several.
fn locked<'a>(lock: &'a str, package: &str) -> Option<&'a str> {
    let name = format!("name = \"{package}\"");
    let mut lines = lock.lines().skip_while(|line| *line != name).skip(1);
    lines
        .next()?
        .strip_prefix("version = \"")?
        .strip_suffix('"')
}

/// The seeds that follow from one, by Vigna's SplitMix64. Of 32 bits, so that a program may add to
/// them.
struct Seeds(u64);

impl Seeds {
    fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) >> 32
    }
}

/// One run of a program.
struct Run {
    stage: &'static Stage,
    seed: u64,
    took: Duration,
    count: Count,
    failure: Option<Failure>,
}

struct Failure {
    how: String,
    /// Of its output.
    tail: String,
}

impl Run {
    /// It, on the screen.
    fn line(&self) -> String {
        let how = match &self.failure {
            None => "passed",
            Some(failure) => &failure.how,
        };
        format!(
            "{} with seed {}: {how}, {} tests in {:.1} s",
            self.stage.program,
            self.seed,
            self.count.passed,
            self.took.as_secs_f64()
        )
    }

    /// The command that repeats it.
    fn command(&self) -> String {
        let mut command = String::new();
        for name in SEEDS {
            let _ = write!(command, "{name}={} ", self.seed);
        }
        for (name, value) in self.stage.settings {
            let _ = write!(command, "{name}={value} ");
        }
        let _ = write!(
            command,
            "cargo xtask test --only host --test {}",
            self.stage.program
        );
        command
    }
}

/// All that was done.
struct Report {
    seed: u64,
    asked: Duration,
    elapsed: Duration,
    date: String,
    machine: Machine,
    versions: Vec<(String, String)>,
    commit: Option<String>,
    runs: Vec<Run>,
}

impl Report {
    fn failures(&self) -> impl Iterator<Item = (&Run, &Failure)> {
        let runs = self.runs.iter();
        runs.filter_map(|run| Some((run, run.failure.as_ref()?)))
    }

    /// It, as Markdown.
    fn text(&self) -> String {
        let minutes = |time: Duration| time.as_secs_f64() / 60.0;
        let mut text = String::from("# Soak\n\n");
        let _ = writeln!(
            text,
            "{}: {} runs in {:.1} minutes, of {:.1} asked for, from seed {}; {} failed.\n",
            self.date,
            self.runs.len(),
            minutes(self.elapsed),
            minutes(self.asked),
            self.seed,
            self.failures().count()
        );
        let machine = &self.machine;
        let _ = writeln!(
            text,
            "- {} ({}), {} threads, {}",
            machine.cpu,
            machine.vector_units.join(" "),
            machine.threads,
            machine.system
        );
        let versions = self.versions.iter();
        let versions: Vec<String> = versions
            .map(|(name, version)| format!("{name} {version}"))
            .collect();
        let _ = writeln!(text, "- {}", versions.join(", "));
        let _ = match &self.commit {
            Some(commit) => writeln!(text, "- commit {commit}"),
            None => writeln!(text, "- changed since its last commit"),
        };
        for (name, value) in &machine.environment {
            let _ = writeln!(text, "- `{name}={value}`");
        }
        text.push_str("\n| Program | What | Settings | Runs | Failed | Tests passed | Minutes |\n");
        text.push_str("|---|---|---|---:|---:|---:|---:|\n");
        for stage in &STAGES {
            let runs: Vec<&Run> = self.of(stage).collect();
            let mut count = Count::default();
            runs.iter().for_each(|run| count += run.count);
            let settings = stage.settings.iter();
            let settings: Vec<String> = settings
                .map(|(name, value)| format!("`{name}={value}`"))
                .collect();
            let _ = writeln!(
                text,
                "| `{}` | {} | {} | {} | {} | {} | {:.1} |",
                stage.program,
                stage.what,
                settings.join(" "),
                runs.len(),
                runs.iter().filter(|run| run.failure.is_some()).count(),
                count.passed,
                minutes(runs.iter().map(|run| run.took).sum())
            );
        }
        text.push_str("\n## Seeds\n\n");
        for stage in &STAGES {
            let seeds: Vec<String> = self.of(stage).map(|run| run.seed.to_string()).collect();
            if !seeds.is_empty() {
                let _ = writeln!(text, "- `{}`: {}", stage.program, seeds.join(", "));
            }
        }
        for (run, failure) in self.failures() {
            let _ = write!(
                text,
                "\n## `{}` failed with seed {}: {}\n\n    {}\n\nThe end of what it printed:\n\n\
                 ````text\n{}\n````\n",
                run.stage.program,
                run.seed,
                failure.how,
                run.command(),
                failure.tail
            );
        }
        text
    }

    fn of<'a>(&'a self, stage: &'a Stage) -> impl Iterator<Item = &'a Run> {
        self.runs.iter().filter(move |run| run.stage == stage)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_of(program: &str, seed: u64, failure: Option<Failure>) -> Run {
        Run {
            stage: STAGES
                .iter()
                .find(|stage| stage.program == program)
                .unwrap(),
            seed,
            took: Duration::from_secs(90),
            count: Count {
                programs: 1,
                passed: 5,
                failed: usize::from(failure.is_some()),
            },
            failure,
        }
    }

    #[test]
    fn minutes_may_be_parts_of_them() {
        assert_eq!(minutes("1.5"), Ok(Duration::from_secs(90)));
        assert_eq!(minutes("0"), Ok(Duration::ZERO));
        for wrong in ["-1", "nan", "inf", "an hour", ""] {
            assert!(minutes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn seeds_follow_from_the_first() {
        // The upper halves of SplitMix64's first numbers from 0.
        let mut seeds = Seeds(0);
        assert_eq!(
            [seeds.draw(), seeds.draw(), seeds.draw()],
            [0xe220_a839, 0x6e78_9e6a, 0x06c4_5d18]
        );
        assert_ne!(Seeds(1).draw(), Seeds(0).draw());
    }

    #[test]
    fn an_end_is_a_whole_number_of_lines() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("a\nb", 5), "a\nb");
        assert_eq!(tail("", 5), "");
    }

    #[test]
    fn versions_are_those_of_the_lock_file() {
        let lock = "[[package]]\nname = \"burn-flex\"\nversion = \"0.1.0\"\n\n\
                    [[package]]\nname = \"burn\"\nversion = \"0.22.1\"\nsource = \"x\"\n";
        assert_eq!(locked(lock, "burn"), Some("0.22.1"));
        assert_eq!(locked(lock, "bur"), None);
        assert!(versions().iter().any(|(name, _)| name == "burn"));
    }

    #[test]
    #[cfg(unix)]
    fn a_program_must_end_well_and_have_run_something() {
        use std::os::unix::process::ExitStatusExt;

        let status = |code: i32| Some(ExitStatus::from_raw(code << 8));
        let some = Count {
            programs: 1,
            passed: 2,
            failed: 0,
        };
        assert_eq!(problem(status(0), some), None);
        assert!(problem(status(101), some).unwrap().contains("101"));
        assert!(problem(None, some).unwrap().contains("hung"));
        let none = Count::default();
        assert!(problem(status(0), none).unwrap().contains("no test"));
    }

    #[test]
    #[cfg(unix)]
    fn a_hanging_program_is_killed() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let started = Instant::now();
        let status = wait(&mut child, Duration::from_millis(1)).unwrap();
        assert!(status.is_none() && started.elapsed() < Duration::from_secs(30));
        let mut child = Command::new("true").spawn().unwrap();
        let status = wait(&mut child, Duration::from_secs(30)).unwrap();
        assert!(status.is_some_and(|status| status.success()));
    }

    #[test]
    fn the_report_says_what_failed_and_how_to_repeat_it() {
        let failure = Failure {
            how: "exit status: 101".to_string(),
            tail: "thread panicked".to_string(),
        };
        let report = Report {
            seed: 7,
            asked: Duration::from_secs(60),
            elapsed: Duration::from_secs(270),
            date: "2026-01-02T03:04:05Z".to_string(),
            machine: Machine {
                cpu: "a processor".to_string(),
                ..Machine::default()
            },
            versions: vec![("burn".to_string(), "0.22.1".to_string())],
            commit: None,
            runs: vec![
                run_of("property", 11, None),
                run_of("leaks", 12, None),
                run_of("property", 13, Some(failure)),
            ],
        };
        let text = report.text();
        for part in [
            "3 runs in 4.5 minutes, of 1.0 asked for, from seed 7; 1 failed.",
            "- a processor (",
            "- burn 0.22.1\n",
            "- changed since its last commit",
            "| `PROPTEST_CASES=2000` | 2 | 1 | 10 | 3.0 |",
            "- `property`: 11, 13\n",
            "## `property` failed with seed 13: exit status: 101\n",
            "    BURN_CONV_BN_SEED=13 BURN_CONV_BN_FUZZ_SEED=13 BURN_CONV_BN_KILL_SEED=13 \
             PROPTEST_RNG_SEED=13 PROPTEST_CASES=2000 cargo xtask test --only host --test \
             property\n",
            "````text\nthread panicked\n````\n",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
        assert!(!text.contains("`leaks` failed"));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.md");
        for _ in 0..2 {
            write(&path, &text).unwrap();
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
