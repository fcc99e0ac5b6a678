//! `cargo xtask soak`: the tests that draw their cases, with fresh seeds, until the time is over.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use burn_conv_bn_files::{self as files, Survives};
use clap::Args;

use crate::gpu;
use crate::interrupt::{self, Guarded};
use crate::programs::{self, Count, Program};
use crate::say::say;
use crate::workspace::{cargo, root};

/// The variables that seed test programs: all that there are, for each.
const SEEDS: [&str; 4] = [
    "BURN_CONV_BN_SEED",
    "BURN_CONV_BN_FUZZ_SEED",
    "BURN_CONV_BN_KILL_SEED",
    "PROPTEST_RNG_SEED",
];

/// A test program, and the variables that say how much it is to do.
type Stage = (&'static str, &'static [(&'static str, &'static str)]);

/// In the order of a round.
const STAGES: [Stage; 7] = [
    ("property", &[("PROPTEST_CASES", "2000")]),
    ("stress", &[]),
    ("concurrency", &[]),
    ("leaks", &[]),
    ("convergence", &[]),
    ("data_fuzz", &[("BURN_CONV_BN_FUZZ_MUTATIONS", "200000")]),
    ("kill", &[("BURN_CONV_BN_KILLS", "20")]),
];

/// A program that runs for longer hangs.
const LIMIT: Duration = Duration::from_secs(60 * 60);

/// How often a running program is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Where the outputs of failed programs stay, and by default the list of seeds, from the workspace's root.
const FOLDER: &str = "target/soak";

#[derive(Args, Debug)]
pub struct Soak {
    /// For how long. Each program runs once in any case, and what runs at the end is finished.
    #[arg(long, value_name = "MINUTES", value_parser = minutes)]
    minutes: Duration,
    /// What the seeds of all runs follow from [default: the time].
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    /// Write the seeds that ran, and what failed, to this file [default: target/soak/report.txt].
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
    let report = match &args.report {
        Some(path) => path.clone(),
        None => folder.join("report.txt"),
    };
    files::check(&report)?;
    let seed = args.seed.unwrap_or_else(time);
    let programs = build()?;
    interrupt::listen()?;
    say!("soak: {} programs, from seed {seed}", STAGES.len())?;

    let mut runs = Vec::new();
    let ended = rounds(args, seed, &programs, &folder, &mut runs);
    // Also after an interrupt: what ran is known.
    let list = list(seed, &runs);
    files::write(&report, list.as_bytes(), Survives::Kill)?;
    ended?;
    say!("{list}soak: the list is in {}", report.display())?;
    match runs.iter().filter(|run| run.failure.is_some()).count() {
        0 => say!("soak: {} runs passed", runs.len()),
        failed => bail!("{failed} of {} runs failed", runs.len()),
    }
}

fn rounds(
    args: &Soak,
    seed: u64,
    programs: &[Program],
    folder: &Path,
    runs: &mut Vec<Run>,
) -> Result<()> {
    let mut seeds = Seeds(seed);
    let started = Instant::now();
    for round in 0_usize.. {
        for (stage, program) in STAGES.into_iter().zip(programs) {
            if round > 0 && started.elapsed() >= args.minutes {
                return Ok(());
            }
            let run = run(stage, program, seeds.draw(), folder)?;
            let minutes = started.elapsed().as_secs_f64() / 60.0;
            let how = match &run.failure {
                None => "passed".to_string(),
                Some((how, log)) => format!("{how} (see {})", log.display()),
            };
            let (name, seed, tests) = (stage.0, run.seed, run.passed);
            runs.push(run);
            say!("soak: {minutes:.1} min, {name} with seed {seed}: {how}, {tests} tests")?;
        }
    }
    Ok(())
}

/// Builds the programs, in the order of [`STAGES`].
fn build() -> Result<Vec<Program>> {
    let mut command = cargo(&["test", "--release", "--no-run"]);
    command.args(gpu::WITHOUT);
    for (name, _) in STAGES {
        command.args(["--test", name]);
    }
    let built = programs::build(command)?;
    let find = |(name, _): &Stage| {
        let found = built.iter().find(|program| program.name == *name);
        found
            .cloned()
            .with_context(|| format!("cargo built no test program {name}"))
    };
    STAGES.iter().map(find).collect()
}

fn run(stage: Stage, program: &Program, seed: u64, folder: &Path) -> Result<Run> {
    let log = folder.join(format!("{}-{seed}.log", program.name));
    let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut command = Command::new(&program.file);
    command
        .current_dir(&program.folder)
        .env("CARGO_MANIFEST_DIR", &program.folder)
        .env("RUST_BACKTRACE", "1")
        .envs(stage.1.iter().copied())
        .envs(SEEDS.map(|name| (name, seed.to_string())))
        .stdin(Stdio::null())
        .stdout(output.try_clone().context("cannot share a file")?)
        .stderr(output);
    let status = wait(Guarded::spawn(command)?, LIMIT)?;
    // A program that is killed may leave half a character.
    let output = fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?;
    let count = Count::of(&String::from_utf8_lossy(&output));
    let failure = problem(status, count).map(|how| (how, log.clone()));
    if failure.is_none() {
        fs::remove_file(&log).with_context(|| format!("cannot remove {}", log.display()))?;
    }
    Ok(Run {
        stage,
        seed,
        passed: count.passed,
        failure,
    })
}

/// Waits for a child, and kills it when the limit is over.
fn wait(child: Guarded, limit: Duration) -> Result<Option<ExitStatus>> {
    let started = Instant::now();
    loop {
        let status = child.child().try_wait();
        let status = status.context("cannot wait for a test program")?;
        interrupt::check()?;
        if status.is_some() || started.elapsed() >= limit {
            return Ok(status);
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

/// Nanoseconds, as far as they fit.
fn time() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as u64)
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

struct Run {
    stage: Stage,
    seed: u64,
    passed: usize,
    /// What went wrong, and the file with what it printed.
    failure: Option<(String, PathBuf)>,
}

/// The seeds that each program ran with, and the commands that repeat failures.
fn list(seed: u64, runs: &[Run]) -> String {
    let mut text = format!("{} runs from seed {seed}\n", runs.len());
    for stage in STAGES {
        let of = runs.iter().filter(|run| run.stage.0 == stage.0);
        let seeds: Vec<String> = of.map(|run| run.seed.to_string()).collect();
        if !seeds.is_empty() {
            let _ = writeln!(text, "{}: {}", stage.0, seeds.join(" "));
        }
    }
    for run in runs {
        if let Some((how, _)) = &run.failure {
            let (name, settings) = run.stage;
            let seed = run.seed.to_string();
            let seeds = SEEDS.map(|name| (name, seed.as_str()));
            let all = seeds.iter().chain(settings);
            let all: String = all
                .map(|(name, value)| format!("{name}={value} "))
                .collect();
            let _ = writeln!(
                text,
                "{name} failed with seed {seed}: {how}; to repeat it:\n  \
                 {all}cargo xtask test --only host --test {name}"
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let mut sleep = Command::new("sleep");
        sleep.arg("60");
        let child = Guarded::spawn(sleep).unwrap();
        let started = Instant::now();
        let status = wait(child, Duration::from_millis(1)).unwrap();
        assert!(status.is_none() && started.elapsed() < Duration::from_secs(30));
        let child = Guarded::spawn(Command::new("true")).unwrap();
        let status = wait(child, Duration::from_secs(30)).unwrap();
        assert!(status.is_some_and(|status| status.success()));
    }

    #[test]
    fn the_list_has_every_seed_and_how_to_repeat_a_failure() {
        let run = |index: usize, seed, failure| Run {
            stage: STAGES[index],
            seed,
            passed: 5,
            failure,
        };
        let failure = ("exit status: 101".to_string(), "property-13.log".into());
        let runs = [
            run(0, 11, None),
            run(3, 12, None),
            run(0, 13, Some(failure)),
        ];
        assert_eq!(
            list(7, &runs),
            "3 runs from seed 7\n\
             property: 11 13\n\
             leaks: 12\n\
             property failed with seed 13: exit status: 101; to repeat it:\n  \
             BURN_CONV_BN_SEED=13 BURN_CONV_BN_FUZZ_SEED=13 BURN_CONV_BN_KILL_SEED=13 \
             PROPTEST_RNG_SEED=13 PROPTEST_CASES=2000 cargo xtask test --only host --test \
             property\n"
        );
    }
}
