//! What stands in the way of a run, and what is left of it then: damaged files, disks that are
//! full, folders that are gone or belong to another process.

#![cfg(unix)]

mod training;

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::tempdir;
use training::{Outcome, finish, train, train_by};

/// A training that must end with an error of one line, which has all of `parts`.
#[track_caller]
fn assert_fails(output: &Output, parts: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{}: {stderr}", output.status);
    assert!(stderr.starts_with("error: "), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    for part in parts {
        assert!(stderr.contains(part), "no {part:?} in {stderr}");
    }
}

#[track_caller]
fn assert_refused(folder: &Path, options: &str, parts: &[&str]) {
    let output = train(folder, options).output().unwrap();
    assert_fails(&output, parts);
}

/// Waits for a file of a training that runs.
#[track_caller]
fn wait_for(path: &Path, child: &mut Child) {
    let started = Instant::now();
    while !path.exists() {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "{ended:?} before {}", path.display());
        let waited = started.elapsed();
        assert!(waited < Duration::from_secs(60), "no {}", path.display());
        thread::sleep(Duration::from_millis(1));
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// Writes to standard error what the test harness would hide of a test that passes.
fn note(text: &str) {
    // Not `eprintln!`, which the harness captures.
    let _ = writeln!(io::stderr(), "{text}");
}

/// What befalls a file.
type Damage<'a> = &'a dyn Fn(&Path);

#[test]
fn a_damaged_checkpoint_leads_to_the_one_before_it() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    finish(folder, "--epochs 3 --artifacts whole --json whole.json");
    let whole = Outcome::read(folder, "whole");

    let cut = |path: &Path| {
        let bytes = fs::read(path).unwrap();
        fs::write(path, &bytes[..bytes.len() - 2]).unwrap();
    };
    let flip = |path: &Path| {
        let mut bytes = fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(path, bytes).unwrap();
    };
    let vanish = |path: &Path| fs::remove_file(path).unwrap();
    let ways: [(&str, Damage); 4] = [
        ("model-3.bpk", &cut),
        ("optim-3.bpk", &flip),
        ("scheduler-3.bpk", &vanish),
        ("epoch-3.json", &cut),
    ];
    for (i, (name, damage)) in ways.into_iter().enumerate() {
        let run = format!("run-{i}");
        copy(&folder.join("whole"), &folder.join(&run));
        damage(&folder.join(&run).join("checkpoint").join(name));
        let options = format!("--epochs 3 --artifacts {run} --json {run}.json --resume");
        let stdout = finish(folder, &options);
        for part in [
            "Passed over the checkpoint of epoch 3",
            name,
            "Resuming after epoch 2.",
        ] {
            assert!(stdout.contains(part), "no {part:?} in {stdout}");
        }
        Outcome::read(folder, &run).assert_same(&whole, name);
    }
}

#[test]
fn a_run_with_nothing_but_damage_is_left_alone() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    finish(folder, "--epochs 2 --artifacts run");
    let models =
        ["model-1.bpk", "model-2.bpk"].map(|name| folder.join("run/checkpoint").join(name));
    for model in &models {
        fs::write(model, "damage").unwrap();
    }
    assert_refused(
        folder,
        "--epochs 3 --artifacts run --resume",
        &[
            "no complete checkpoint",
            "model-1.bpk is damaged",
            "model-2.bpk is damaged",
        ],
    );
    for model in &models {
        assert_eq!(fs::read_to_string(model).unwrap(), "damage");
    }
}

/// At this rate nothing changes, and the loss cannot improve after the first epoch.
#[test]
fn patience_survives_a_resume() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    let options = "--lr 1e-30 --gamma 1 --early-stopping 2";
    finish(
        folder,
        &format!("{options} --epochs 6 --artifacts whole --json whole.json"),
    );
    let whole = Outcome::read(folder, "whole");
    assert_eq!(whole.report.epochs.len(), 3);

    finish(folder, &format!("{options} --epochs 2 --artifacts run"));
    // The second time, the run has stopped already.
    for _ in 0..2 {
        finish(
            folder,
            &format!("{options} --epochs 6 --artifacts run --json run.json --resume"),
        );
        Outcome::read(folder, "run").assert_same(&whole, "early stopping");
    }
}

#[test]
fn every_optimizer_and_precision_resumes() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    for (i, options) in [
        "--optimizer adam",
        "--optimizer adamw",
        "--optimizer sgd",
        "--optimizer adadelta --precision f64",
        "--optimizer adadelta --precision bf16",
        "--optimizer adam --precision f16",
        "--optimizer adadelta --variant unfused",
        "--optimizer sgd --variant unfused --precision bf16",
    ]
    .into_iter()
    .enumerate()
    {
        let (whole, run) = (format!("whole-{i}"), format!("run-{i}"));
        let options = |more: &str| format!("{options} {more}");
        finish(
            folder,
            &options(&format!(
                "--epochs 2 --artifacts {whole} --json {whole}.json"
            )),
        );
        finish(folder, &options(&format!("--epochs 1 --artifacts {run}")));
        finish(
            folder,
            &options(&format!(
                "--epochs 2 --artifacts {run} --json {run}.json --resume"
            )),
        );
        let whole = Outcome::read(folder, &whole);
        Outcome::read(folder, &run).assert_same(&whole, &options(""));
    }
}

/// Burn restores the state of its own optimizers in single precision.
#[test]
fn what_would_lose_digits_is_not_resumed() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    let options = "--optimizer adam --precision f64 --artifacts run";
    finish(folder, &format!("{options} --epochs 1"));
    assert_refused(
        folder,
        &format!("{options} --epochs 2 --resume"),
        &["double precision", "adam"],
    );
}

#[test]
fn a_folder_belongs_to_one_process_at_a_time() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    let mut first = train(folder, "--epochs 50 --artifacts run")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for(&folder.join("run/checkpoint/epoch-1.json"), &mut first);
    for options in ["--resume", "--overwrite"] {
        assert_refused(
            folder,
            &format!("--epochs 50 --artifacts run {options}"),
            &["another process", "run"],
        );
    }
    first.kill().unwrap();
    first.wait().unwrap();
    finish(folder, "--epochs 1 --artifacts run --resume");
}

#[test]
fn a_folder_that_goes_away_takes_nothing_with_it() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    finish(folder, "--epochs 4 --artifacts whole --json whole.json");
    let whole = Outcome::read(folder, "whole");

    let mut child = train(folder, "--epochs 4 --artifacts run")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let checkpoints = folder.join("run/checkpoint");
    wait_for(&checkpoints.join("epoch-1.json"), &mut child);
    // Root may write anywhere, but not below a file.
    fs::rename(&checkpoints, folder.join("aside")).unwrap();
    fs::write(&checkpoints, "").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_fails(&output, &["cannot write", "run/checkpoint"]);

    fs::remove_file(&checkpoints).unwrap();
    fs::rename(folder.join("aside"), &checkpoints).unwrap();
    finish(
        folder,
        "--epochs 4 --artifacts run --json run.json --resume",
    );
    Outcome::read(folder, "run").assert_same(&whole, "a folder that went away");
}

/// A process that may not write more than so many bytes to a file has what a full disk is to it: a
/// write ends half-way, with an error.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_costs_no_more_than_an_epoch() {
    use rustix::process::{Pid, Resource, Rlimit, prlimit};

    let folder = tempdir().unwrap();
    let folder = folder.path();
    finish(folder, "--epochs 4 --artifacts whole --json whole.json");
    let whole = Outcome::read(folder, "whole");

    // Room for a part of a checkpoint, and room for nothing at all.
    for (run, bytes) in [("part", 64 << 10), ("nothing", 0)] {
        // The signal that comes with the error would end the process, which is another test.
        let mut shell = Command::new("sh");
        shell.args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""]);
        shell.arg(env!("CARGO_BIN_EXE_mnist"));
        let options = format!("--epochs 4 --artifacts {run}");
        let mut child = train_by(shell, folder, &options)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        wait_for(
            &folder.join(run).join("checkpoint/epoch-1.json"),
            &mut child,
        );
        let limit = Rlimit {
            current: Some(bytes),
            maximum: Some(bytes),
        };
        prlimit(Some(Pid::from_child(&child)), Resource::Fsize, limit).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_fails(
            &output,
            &["cannot write", run, "checkpoint", "File too large"],
        );

        let options = format!("--epochs 4 --artifacts {run} --json {run}.json --resume");
        let stdout = finish(folder, &options);
        assert!(stdout.contains("Resuming after epoch"), "{stdout}");
        Outcome::read(folder, run).assert_same(&whole, run);
    }
}

/// A disk that is full from the start is found to be so before anything is trained or removed.
#[test]
fn a_disk_without_room_keeps_what_it_has() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    finish(folder, "--epochs 1 --artifacts run --json run.json");
    let before = Outcome::read(folder, "run");
    for options in ["--epochs 1 --overwrite", "--epochs 2 --resume"] {
        let mut shell = Command::new("sh");
        // In units of 512 or 1024 bytes.
        shell.args(["-c", "trap '' XFSZ; ulimit -f 100; exec \"$0\" \"$@\""]);
        shell.arg(env!("CARGO_BIN_EXE_mnist"));
        let options = format!("{options} --artifacts run");
        let output = train_by(shell, folder, &options).output().unwrap();
        assert_fails(
            &output,
            &["cannot write to the directory run", "File too large"],
        );
        Outcome::read(folder, "run").assert_same(&before, &options);
    }
}

#[test]
fn a_folder_that_is_read_only_keeps_what_it_has() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    // No user may make a folder there, not even root.
    #[cfg(target_os = "linux")]
    assert_refused(folder, "--epochs 1 --artifacts /proc/run", &["/proc/run"]);

    finish(folder, "--epochs 1 --artifacts run --json run.json");
    let before = Outcome::read(folder, "run");
    let run = folder.join("run");
    let allow = |mode| fs::set_permissions(&run, fs::Permissions::from_mode(mode)).unwrap();
    allow(0o555);
    if fs::write(run.join("probe"), "").is_ok() {
        allow(0o755);
        note("SKIPPED: whoever runs this may write to folders that are read-only");
        return;
    }
    for options in ["--epochs 1 --overwrite", "--epochs 2 --resume"] {
        let options = format!("{options} --artifacts run");
        assert_refused(folder, &options, &["cannot write to the directory run"]);
        Outcome::read(folder, "run").assert_same(&before, &options);
    }
    // What has nothing to do needs no room.
    finish(folder, "--epochs 1 --artifacts run --resume");
    allow(0o755);
}
