//! Tests of the bundle's script, with stand-ins for its programs.

use std::process::Output;
use std::sync::{Mutex, PoisonError};

use tempfile::TempDir;

use super::*;

/// Each writes its arguments to a file, and fails where the environment says so.
const STAND_INS: [(&str, &str); 6] = [
    (
        "mnist",
        "echo mnist $1 >> log; [ \"$1\" = compare ] && exit $COMPARE; exit $PARITY",
    ),
    (
        "gpu-tests",
        "[ \"$1\" = --list ] && { [ \"$2\" = \"$MISSING::\" ] || echo \"${2}a: test\"; exit 0; }\n\
         echo gpu-tests $* >> log; [ \"$4\" != \"$BROKEN::\" ]",
    ),
    (
        "xtask",
        "echo xtask $* >> log; cat tuned/found >> seen; echo $5 >> tuned/found; exit $BENCH",
    ),
    ("timeout", "shift 2; echo $1 >> limits; shift; exec \"$@\""),
    ("nvidia-smi", "exit 6"),
    ("python3", "exit $TORCH"),
];

struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
    log: Vec<String>,
}

/// Runs the whole of it with those variables.
fn run(variables: &[(&str, &str)]) -> Run {
    run_in(&TempDir::new().unwrap(), &["--quick"], variables)
}

/// Runs the script without its unpacking: programs and results are in the folder.
fn run_in(folder: &TempDir, options: &[&str], variables: &[(&str, &str)]) -> Run {
    use std::os::unix::fs::PermissionsExt;

    // A process that another thread starts may hold a file open that was just written, and nothing
    // runs a program that is open for writing.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let path = |name: &str| folder.path().join(name);
    // As in a new folder with programs.
    for name in ["log", "seen", "limits", "tuned"] {
        let _ = fs::remove_file(path(name));
    }
    for (name, commands) in STAND_INS {
        fs::write(path(name), format!("#!/bin/sh\n{commands}\n")).unwrap();
        fs::set_permissions(path(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let (_, commands) = SCRIPT.split_once("\ncd \"$bundle\"").unwrap();
    let (_, commands) = commands.split_once('\n').unwrap();
    let commands = commands.replace("@TESTS@", &TESTS.join(" "));
    fs::write(
        path("run.sh"),
        format!("set -u\nresults=.\ncaller=.\n{commands}"),
    )
    .unwrap();
    let search = format!(
        "{}:{}",
        folder.path().display(),
        env::var("PATH").unwrap_or_default()
    );
    let output: Output = Command::new("sh")
        .arg("run.sh")
        .args(options)
        .current_dir(folder.path())
        .env("PATH", search)
        .envs(["COMPARE", "PARITY", "BENCH"].map(|name| (name, "0")))
        .envs(["MISSING", "BROKEN"].map(|name| (name, "none")))
        .env_remove("TUNING")
        .env_remove("TUNING_ARCHIVE")
        .env_remove("BURN_CONV_BN_PRECISIONS")
        .env("TORCH", "1")
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let log = fs::read_to_string(path("log")).unwrap_or_default();
    Run {
        code: output.status.code(),
        stdout: text(&output.stdout),
        stderr: text(&output.stderr),
        log: log.lines().map(str::to_string).collect(),
    }
}

fn says(run: &Run, name: &str, how: &str) -> bool {
    let (_, summary) = run.stdout.split_once("== summary ==").unwrap_or_default();
    summary.contains(&format!("{name:<19}{how}"))
}

#[test]
fn tests_come_first_and_the_benchmark_last() {
    let run = run(&[]);
    assert_eq!(run.code, Some(0), "{}\n{}", run.stdout, run.stderr);
    let mut wanted = vec!["mnist compare".to_string()];
    let test = |name: &&str| format!("gpu-tests --test-threads 1 --nocapture {name}::");
    wanted.extend(TESTS.iter().map(test));
    wanted.push("mnist parity".to_string());
    let precisions = ["f32", "f16", "bf16"];
    let (tests, benchmarks) = run.log.split_at(run.log.len() - precisions.len());
    assert_eq!(tests, wanted);
    for (line, precision) in benchmarks.iter().zip(precisions) {
        let start = format!("xtask bench --device cuda --precision {precision} ");
        let end = format!(" --json ./gpu-bench-{precision}.json --quick");
        assert!(line.starts_with(&start) && line.ends_with(&end), "{line}");
        assert!(!line.contains("--peer "), "{line}");
        assert!(says(&run, &format!("benchmark in {precision}"), "passed\n"));
    }
    for name in TESTS.iter().chain(&["mnist compare"]) {
        assert!(says(&run, name, "passed\n"), "{name} in {}", run.stdout);
    }
}

#[test]
fn precisions_are_those_that_mean_something_or_were_asked_for() {
    let benchmarks = |variables: &[(&str, &str)]| {
        let log = run(variables).log;
        let lines = log.into_iter().filter(|line| line.starts_with("xtask"));
        let precision = |line: String| line.split(' ').nth(5).unwrap_or_default().to_string();
        lines.map(precision).collect::<Vec<_>>()
    };
    let with_torch = benchmarks(&[("TORCH", "0")]);
    assert_eq!(with_torch, ["f32", "tf32", "f16", "bf16"]);
    let asked = benchmarks(&[("BURN_CONV_BN_PRECISIONS", "bf16")]);
    assert_eq!(asked, ["bf16"]);
}

#[test]
fn without_cuda_nothing_else_is_run() {
    let run = run(&[("COMPARE", "101")]);
    assert_eq!(run.code, Some(1));
    assert_eq!(run.log, ["mnist compare"]);
    let wanted = "error: nothing trains on CUDA here (nvidia-smi finds no device)";
    assert!(run.stderr.contains(wanted), "{}", run.stderr);
}

#[test]
fn what_fails_is_named_and_the_rest_is_run() {
    let broken = run(&[("BROKEN", "cube"), ("BENCH", "3")]);
    assert_eq!(broken.code, Some(1));
    assert!(broken.stderr.contains("FAILED: cube benchmark in f32"));
    assert!(says(&broken, "cube", "FAILED (exit status 1)\n"));
    assert!(says(
        &broken,
        "benchmark in bf16",
        "FAILED (exit status 3)\n"
    ));
    assert!(says(&broken, "cube_leaks", "passed\n"));
    let missing = run(&[("MISSING", "kernels")]);
    assert_eq!(missing.code, Some(1));
    assert!(missing.stderr.contains("there are no tests of that name"));
}

const PREPARED_TESTS: [&str; 4] = ["kernels", "cube", "cube_launches", "cube_memory"];

const PREPARED_BENCHMARKS: [(&str, &str); 4] = [
    ("net-2048", "f32"),
    ("net-2048", "bf16"),
    ("resnet50", "f32"),
    ("resnet50", "bf16"),
];

#[test]
fn the_prepared_run_is_its_parts_in_order() {
    assert!(PREPARED_TESTS.iter().all(|name| TESTS.contains(name)));
    for (torch, is_there) in [("0", true), ("1", false)] {
        let folder = TempDir::new().unwrap();
        let options = ["--threads", "2", "--prepared"];
        let run = run_in(&folder, &options, &[("TORCH", torch)]);
        assert_eq!(run.code, Some(0), "{}\n{}", run.stdout, run.stderr);
        let (tests, benchmarks) = run.log.split_at(PREPARED_TESTS.len());
        let test = |name: &str| format!("gpu-tests --test-threads 1 --nocapture {name}::");
        assert_eq!(tests, PREPARED_TESTS.map(test));
        assert_eq!(benchmarks.len(), PREPARED_BENCHMARKS.len());
        for (line, (entry, precision)) in benchmarks.iter().zip(PREPARED_BENCHMARKS) {
            let start = format!("xtask bench --device cuda --precision {precision} ");
            let json = format!("--json ./gpu-bench-{entry}-{precision}.json --only {entry} ");
            assert!(line.starts_with(&start) && line.contains(&json), "{line}");
            assert_eq!(line.contains("--batch 64"), entry == "resnet50", "{line}");
            for contender in ["fused", "norm-conv", "unfused"] {
                assert!(
                    line.contains(&format!(" --contender {contender} ")),
                    "{line}"
                );
            }
            for option in ["--peer pytorch", "--contender eager", "--contender compile"] {
                assert_eq!(line.contains(option), is_there, "{line}");
            }
            assert!(line.ends_with(" --threads 2"), "{line}");
            assert!(says(&run, &format!("{entry} in {precision}"), "passed\n"));
        }
        let limits = fs::read_to_string(folder.path().join("limits")).unwrap();
        let limits = limits.lines().map(|line| line.parse::<u64>().unwrap());
        let limits: Vec<u64> = limits.collect();
        // Each test is listed first.
        assert_eq!(
            limits.len(),
            2 * PREPARED_TESTS.len() + 1 + PREPARED_BENCHMARKS.len()
        );
        assert!(
            limits.iter().all(|limit| (1..=560).contains(limit)),
            "{limits:?}"
        );
        assert!(limits[0] <= 60, "{limits:?}");
    }
}

#[test]
fn a_part_that_fails_is_named_and_the_others_are_run() {
    let broken = |bench: &str| {
        let folder = TempDir::new().unwrap();
        run_in(
            &folder,
            &["--prepared"],
            &[("BROKEN", "cube"), ("BENCH", bench)],
        )
    };
    for (bench, how) in [("3", "FAILED (exit status 3)\n"), ("124", "TIMED OUT\n")] {
        let run = broken(bench);
        assert_eq!(run.code, Some(1));
        assert_eq!(
            run.log.len(),
            PREPARED_TESTS.len() + PREPARED_BENCHMARKS.len()
        );
        assert!(says(&run, "kernels", "passed\n"), "{}", run.stdout);
        assert!(
            says(&run, "cube", "FAILED (exit status 1)\n"),
            "{}",
            run.stdout
        );
        assert!(says(&run, "cube_memory", "passed\n"), "{}", run.stdout);
        assert!(says(&run, "resnet50 in bf16", how), "{}", run.stdout);
        assert!(says(&run, "tuning.tar.gz", "passed\n"), "{}", run.stdout);
        assert!(
            run.stderr
                .contains("FAILED: cube net-2048 in f32 net-2048 in bf16 resnet50")
        );
    }
}

#[test]
fn a_second_run_finds_what_the_first_tuned() {
    for options in [&["--prepared"][..], &["--quick"]] {
        let folder = TempDir::new().unwrap();
        let path = |name: &str| folder.path().join(name);
        let found = |name: &str| fs::read_to_string(path(name)).unwrap_or_default();
        assert_eq!(run_in(&folder, options, &[]).code, Some(0));
        let first = found("tuning/found");
        assert!(first.contains("bf16"), "{first}");
        assert!(path("tuning.tar.gz").is_file());
        // The folder as it was kept.
        let second = run_in(&folder, options, &[]);
        assert_eq!(second.code, Some(0), "{}", second.stderr);
        assert!(found("seen").starts_with(&first));
        let kept = found("tuning/found");
        // The archive alone, and a folder that is named.
        fs::remove_dir_all(path("tuning")).unwrap();
        let third = run_in(&folder, options, &[("TUNING", "named")]);
        assert_eq!(third.code, Some(0), "{}", third.stderr);
        assert!(found("seen").starts_with(&kept));
        assert!(found("named/found").len() > kept.len());
        assert!(!path("tuning").exists());
        // An archive that is named.
        fs::rename(path("tuning.tar.gz"), path("other.tar.gz")).unwrap();
        let archive = [("TUNING_ARCHIVE", "other.tar.gz")];
        let fourth = run_in(&folder, options, &archive);
        assert_eq!(fourth.code, Some(0), "{}", fourth.stderr);
        assert!(found("seen").starts_with(&kept));
    }
}

#[test]
fn an_archive_that_is_not_whole_is_an_error_if_it_was_named() {
    let folder = TempDir::new().unwrap();
    let missing = run_in(
        &folder,
        &["--prepared"],
        &[("TUNING_ARCHIVE", "none.tar.gz")],
    );
    assert_eq!(missing.code, Some(1));
    assert!(
        missing.stderr.contains("there is no file"),
        "{}",
        missing.stderr
    );
    assert!(missing.log.is_empty());
    fs::write(folder.path().join("tuning.tar.gz"), "half").unwrap();
    let named = run_in(
        &folder,
        &["--prepared"],
        &[("TUNING_ARCHIVE", "tuning.tar.gz")],
    );
    assert_eq!(named.code, Some(1));
    assert!(named.stderr.contains("cannot unpack"), "{}", named.stderr);
    // The folder `unpacked` goes with the bundle.
    let _ = fs::remove_dir_all(folder.path().join("unpacked"));
    let found = run_in(&folder, &["--prepared"], &[]);
    assert_eq!(found.code, Some(0), "{}", found.stderr);
    assert!(found.stderr.contains("starts anew"), "{}", found.stderr);
}
