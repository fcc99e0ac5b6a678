//! The program itself, on stand-ins for the worker, for cargo and for test programs.
#![cfg(unix)]

use std::fs::{self, Permissions};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// Answers every request well. Before a timed step it waits if its folder has a file `slow`; the fused
/// form's results are wrong if it has a file `wrong`.
const WORKER: &str = r#"
while read -r line; do
    case $line in
    '{"hello"'*) echo '{"hello":{"versions":{"burn":"0.22.1"}}}' ;;
    '{"check"'*)
        folder=${line##*dir\":\"}
        folder=${folder%%\"*}
        mkdir -p "$folder"
        # 1 as f32, or -1.
        value='\000\000\200\077'
        case $folder in */fused) [ -e "$(dirname "$0")/wrong" ] && value='\000\000\200\277' ;; esac
        printf "$value" > "$folder/output.f32"
        echo '{"checked":{"tensors":["output"],"own_reference":false}}' ;;
    '{"run"'*)
        [ -e "$(dirname "$0")/slow" ] && { echo $$ > "$(dirname "$0")/slow"; sleep 600; }
        echo '{"ran":{"forward_ms":1.0,"backward_ms":2.0}}' ;;
    '{"memory"'*) echo '{"measured":{"resident_peak":1048576}}' ;;
    '{"prepare"'*)
        folder=${line##*data_dir\":\"}
        folder=${folder%%\"*}
        mkdir -p "$folder"
        echo '{"done":{}}' ;;
    *) echo '{"done":{}}' ;;
    esac
done
"#;

/// Longest wait for what must happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// A process started meanwhile would hold a program open that is being written, and nothing runs a
/// program that is open for writing.
static ALONE: Mutex<()> = Mutex::new(());

/// A folder of a user, with stand-ins, and one for temporary files.
struct Place {
    folder: TempDir,
    temporary: TempDir,
}

impl Place {
    fn new() -> Self {
        Self {
            folder: TempDir::new().unwrap(),
            temporary: TempDir::new().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a program for the shell.
    fn program(&self, name: &str, script: &str) -> PathBuf {
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.path(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn xtask(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command
            .args(args)
            .current_dir(self.folder.path())
            .env("TMPDIR", self.temporary.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// `xtask bench` of two short entries with the worker above.
    fn bench(&self, args: &[&str]) -> Command {
        let worker = self.program("bench-worker", WORKER);
        let mut command = self.xtask(&["bench", "--quick", "--rounds", "1", "--threads", "1"]);
        command
            .args(["--only", "k3", "--only", "net-2048", "--contender", "fused"])
            .arg("--worker")
            .arg(worker)
            .args(args);
        command
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&fs::read(self.path(name)).unwrap()).unwrap()
    }

    /// Names of a run's temporary files that are left, except its lock.
    fn left(&self) -> Vec<String> {
        let mut left = names(self.temporary.path());
        left.retain(|name| name != "burn-conv-bn-bench.lock");
        left
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn start(mut command: Command) -> Child {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    command.spawn().unwrap()
}

fn run(command: Command) -> Output {
    start(command).wait_with_output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits until a file has content, which is returned.
fn content(path: &Path) -> String {
    let started = Instant::now();
    loop {
        let text = fs::read_to_string(path).unwrap_or_default();
        if text.ends_with('\n') {
            return text.trim().to_string();
        }
        assert!(
            started.elapsed() < PATIENCE,
            "nothing in {}",
            path.display()
        );
        thread::sleep(Duration::from_millis(20));
    }
}

fn signal(name: &str, pid: &str) -> bool {
    let mut kill = Command::new("sh");
    kill.args(["-c", &format!("kill -{name} {pid}")])
        .stderr(Stdio::null());
    start(kill).wait().unwrap().success()
}

/// Whether a process runs. A zombie, which waits for its parent, does not.
fn runs(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    signal("0", pid) && !stat.contains(") Z ")
}

/// Waits until a process has ended.
fn ended(pid: &str) -> bool {
    let started = Instant::now();
    while runs(pid) {
        if started.elapsed() > PATIENCE {
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
    true
}

#[test]
fn nothing_beside_a_worker_is_touched_and_no_scratch_stays() {
    let place = Place::new();
    fs::create_dir(place.path("bench-data")).unwrap();
    fs::write(place.path("bench-data/mine"), "kept").unwrap();
    fs::write(place.path("bench.lock"), "kept").unwrap();
    let output = run(place.bench(&[]));
    assert!(output.status.success(), "{}", stderr(&output));
    let kept = |name| fs::read_to_string(place.path(name)).unwrap();
    assert_eq!(kept("bench-data/mine"), "kept");
    assert_eq!(kept("bench.lock"), "kept");
    assert_eq!(
        names(place.folder.path()),
        ["bench-data", "bench-worker", "bench.lock"]
    );
    assert!(place.left().is_empty(), "{:?}", place.left());
}

#[test]
fn a_worker_that_is_none_leaves_nothing() {
    let place = Place::new();
    let worker = place.program("bench-worker", "read -r line; echo hello");
    let output = run(place.xtask(&["bench", "--worker", worker.to_str().unwrap()]));
    assert!(!output.status.success());
    assert!(
        stderr(&output).contains("said \"hello\""),
        "{}",
        stderr(&output)
    );
    assert!(place.left().is_empty(), "{:?}", place.left());
}

#[test]
fn an_interrupt_ends_the_worker_and_the_report_says_what_is_missing() {
    for name in ["INT", "TERM"] {
        let place = Place::new();
        let slow = place.path("slow");
        fs::write(&slow, "").unwrap();
        let command = place.bench(&[
            "--json", "out.json", "--csv", "out.csv", "--plot", "out.svg",
        ]);
        let child = start(command);
        let worker = content(&slow);
        assert!(!place.left().is_empty(), "scratch is there meanwhile");
        assert!(signal(name, &child.id().to_string()));
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(
            stderr(&output).ends_with("error: interrupted\n"),
            "{}",
            stderr(&output)
        );
        assert!(ended(&worker));
        assert!(place.left().is_empty(), "{:?}", place.left());
        let report = place.json("out.json");
        for entry in report["entries"].as_array().unwrap() {
            assert_eq!(entry["problem"], "not run: interrupted");
        }
        let read = |name| fs::read_to_string(place.path(name)).unwrap();
        assert_eq!(read("out.csv").matches("not run: interrupted").count(), 2);
        assert!(read("out.svg").contains("missing: k3, net-2048 (not run: interrupted)"));
    }
}

#[test]
fn what_is_printed_is_saved_before_and_a_closed_pipe_is_no_panic() {
    let place = Place::new();
    let mut child = start(place.bench(&["--json", "out.json"]));
    // As `head -1` does: the reader goes after the first bytes.
    child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let words = stderr(&output);
    assert!(
        !words.contains("panicked") && !words.contains("error"),
        "{words}"
    );
    let entries = place.json("out.json")["entries"].clone();
    assert_eq!(entries[0]["problem"], Value::Null);
    assert_eq!(
        entries[0]["contenders"][0]["steps"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    assert!(place.left().is_empty(), "{:?}", place.left());
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_device_is_an_error_and_the_report_says_so() {
    let place = Place::new();
    let mut command = place.bench(&["--json", "out.json"]);
    command.stdout(fs::File::options().write(true).open("/dev/full").unwrap());
    let output = run(command);
    assert_eq!(output.status.code(), Some(1));
    let words = stderr(&output);
    assert!(
        words.contains("error: cannot write to standard output"),
        "{words}"
    );
    assert!(!words.contains("panicked"), "{words}");
    let entries = place.json("out.json")["entries"].clone();
    assert_eq!(entries[0]["problem"], Value::Null);
    let problem = entries[1]["problem"].as_str().unwrap();
    assert!(
        problem.starts_with("not run: cannot write to standard output"),
        "{problem}"
    );
}

#[test]
fn outputs_keep_their_mode_their_links_and_their_neighbours() {
    let place = Place::new();
    fs::write(place.path("real.json"), "old").unwrap();
    fs::set_permissions(place.path("real.json"), Permissions::from_mode(0o600)).unwrap();
    std::os::unix::fs::symlink("real.json", place.path("link.json")).unwrap();
    fs::write(place.path("link.unfinished"), "kept").unwrap();
    let output = run(place.bench(&["--json", "link.json"]));
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(place.path("link.json").is_symlink());
    let mode = fs::metadata(place.path("real.json"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(place.json("real.json")["quick"], true);
    assert_eq!(
        fs::read_to_string(place.path("link.unfinished")).unwrap(),
        "kept"
    );
}

#[test]
fn a_pipe_gets_one_report() {
    let place = Place::new();
    let fifo = place.path("fifo");
    let mut mkfifo = Command::new("mkfifo");
    mkfifo.arg(&fifo);
    assert!(start(mkfifo).wait().unwrap().success());
    let child = start(place.bench(&["--json", "fifo"]));
    let report: Value = serde_json::from_slice(&fs::read(&fifo).unwrap()).unwrap();
    assert_eq!(report["entries"].as_array().unwrap().len(), 2);
    assert!(child.wait_with_output().unwrap().status.success());
}

#[test]
fn outputs_are_checked_before_anything_runs() {
    let place = Place::new();
    fs::create_dir(place.path("folder")).unwrap();
    let cargo = place.program("cargo", "touch \"$(dirname \"$0\")/ran\"; exit 1");
    for (args, wanted) in [
        (&["bench", "--json", "folder"][..], "folder"),
        (&["bench", "--json", "new/"], "new/"),
        (&["bench", "--plot", "none/out.svg"], "none/out.svg"),
        (
            &["bench", "--json", "same", "--csv", "./same"],
            "--json and --csv",
        ),
        (&["soak", "--minutes", "0", "--report", "folder"], "folder"),
        (&["gpu-bundle", "--output", "folder"], "folder"),
    ] {
        let mut command = place.xtask(args);
        command.env("CARGO", &cargo);
        let output = run(command);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(
            stderr(&output).contains(wanted),
            "{args:?}: {}",
            stderr(&output)
        );
    }
    assert_eq!(names(place.folder.path()), ["cargo", "folder"]);
}

#[test]
fn a_report_says_what_it_is_of() {
    let place = Place::new();
    let output = run(place.bench(&["--json", "out.json", "--csv", "out.csv"]));
    assert!(output.status.success(), "{}", stderr(&output));
    let report = place.json("out.json");
    assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(report["seed"], 20_240_229);
    let mut git = Command::new("git");
    git.args(["rev-parse", "HEAD"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdout(Stdio::piped());
    let head = run(git);
    if head.status.success() {
        let commit = report["commit"].as_str().unwrap();
        let rest = commit.strip_prefix(stdout(&head).trim()).unwrap();
        assert!(["", "-dirty"].contains(&rest), "{commit}");
    }
    // The quick variant of net-2048 runs 256 images.
    assert_eq!(
        report["entries"][1]["entry"]["work"]["network"]["batch"],
        256
    );
    let tables = stdout(&output);
    assert!(tables.contains("| step, ms | batch | fused"), "{tables}");
    assert!(tables.contains("| net-2048 |   256 |"), "{tables}");
    assert!(
        tables.contains("\nquick run, of smaller batches and images: flex"),
        "{tables}"
    );
    let csv = fs::read_to_string(place.path("out.csv")).unwrap();
    let (header, lines) = csv.split_once('\n').unwrap();
    assert!(header.starts_with("batch,"), "{header}");
    assert!(lines.contains("\n256,"), "{csv}");
}

#[test]
fn contenders_take_turns_and_a_wrong_one_fails_the_run() {
    let place = Place::new();
    let worker = place.program("bench-worker", WORKER);
    let bench = || {
        let mut command = place.xtask(&["bench", "--only", "k3", "--rounds", "2"]);
        command.args(["--contender", "fused", "--worker"]);
        command.arg(&worker);
        run(command)
    };
    let output = bench();
    assert!(output.status.success(), "{}", stderr(&output));
    let words = stderr(&output);
    let rounds = words.lines().filter_map(|line| line.split_once(" of 2"));
    let rounds: Vec<&str> = rounds.map(|(line, _)| line).collect();
    let turns = [
        "bench: [1/1] k3: fused, round 1",
        "bench: [1/1] k3: unfused, round 1",
        "bench: [1/1] k3: unfused, round 2",
        "bench: [1/1] k3: fused, round 2",
    ];
    assert_eq!(rounds, turns, "{words}");

    fs::write(place.path("wrong"), "").unwrap();
    let output = bench();
    assert_eq!(output.status.code(), Some(1));
    let words = stderr(&output);
    assert!(
        words.ends_with("error: something failed in: k3\n"),
        "{words}"
    );
    let tables = stdout(&output);
    assert!(tables.contains("WRONG") && tables.contains("off the reference in output by 2.0e0"));
}

/// Trains any batch, with a MiB for each image; the fused form takes more than 80 from batch 9 on.
#[cfg(target_os = "linux")]
const TRAINER: &str = r#"
while read -r line; do
    case $line in
    '{"hello"'*) echo '{"hello":{"versions":{}}}' ;;
    '{"load"'*)
        batch=${line##*batch\":}
        batch=${batch%%[,\}]*}
        case $line in *'"fused"'*)
            [ "$batch" -gt 8 ] && { hog=$(head -c 100000000 /dev/zero | tr '\0' x); sleep 600; } ;;
        esac
        echo '{"done":{}}' ;;
    '{"train"'*)
        step='{"forward_ms":1.0,"backward_ms":2.0}'
        echo "{\"trained\":{\"steps\":[$step,$step],\"peak_bytes\":$((batch * 1048576))}}" ;;
    *) echo '{"done":{}}' ;;
    esac
done
"#;

#[test]
#[cfg(target_os = "linux")]
fn a_batch_does_not_fit_if_its_process_says_so_or_must_be_killed() {
    let place = Place::new();
    let worker = place.program("bench-worker", TRAINER);
    let mut command = place.xtask(&["bench", "--only", "net-2048", "--contender", "fused"]);
    command.args([
        "--largest-batch",
        "64MiB",
        "--json",
        "out.json",
        "--csv",
        "out.csv",
    ]);
    command.arg("--worker").arg(worker);
    let output = run(command);
    assert!(output.status.success(), "{}", stderr(&output));
    let report = place.json("out.json");
    assert_eq!(report["largest_batch"], 64 << 20);
    let largest = |place: usize| report["entries"][0]["contenders"][place]["largest"].clone();
    let wanted = serde_json::json!({
        "batch": 8, "peak_bytes": 8 << 20, "image_ms": 0.375, "to_unfused": 0.125
    });
    assert_eq!(largest(0), wanted);
    assert_eq!(largest(1)["batch"], 64);
    let csv = fs::read_to_string(place.path("out.csv")).unwrap();
    assert!(csv.contains("largest.batch"), "{csv}");
    assert!(stdout(&output).contains("| largest batch | images |"));
    assert!(place.left().is_empty(), "{:?}", place.left());
}

#[test]
fn a_peer_that_was_asked_for_must_be_there() {
    let place = Place::new();
    let empty = place.program(
        "python-without-torch",
        r#"while read -r line; do echo '{"unavailable":{"reason":"No module named torch"}}'; done"#,
    );
    for (python, reason) in [
        ("/nonexistent", "cannot start \"/nonexistent\""),
        (empty.to_str().unwrap(), "No module named torch"),
    ] {
        let output = run(place.bench(&[
            "--peer",
            "pytorch",
            "--contender",
            "eager",
            "--python",
            python,
        ]));
        assert_eq!(output.status.code(), Some(1));
        let words = stderr(&output);
        let wanted = format!("error: --peer pytorch: {python} has no PyTorch: ");
        assert!(words.contains(&wanted) && words.contains(reason), "{words}");
        assert!(!stdout(&output).contains("k3"));
    }
}

#[test]
fn nothing_tested_and_nothing_checked_is_no_success() {
    let place = Place::new();
    let result = |passed: usize| {
        format!("echo 'test result: ok. {passed} passed; 0 failed; 0 ignored; 0 measured'")
    };
    let cargo = place.program("cargo", &result(0));
    let test = |args: &[&str]| {
        let mut command = place.xtask(&["test", "--only", "host"]);
        command.args(args).env("CARGO", &cargo);
        run(command)
    };
    let output = test(&["--test", "leaks", "nosuchtest"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("no test ran"),
        "{}",
        stderr(&output)
    );
    assert!(!stdout(&output).contains("test: "), "{}", stdout(&output));
    place.program("cargo", &result(3));
    let output = test(&[]);
    assert!(output.status.success());
    assert!(
        stdout(&output).contains("test: 3 tests passed; skipped: "),
        "{}",
        stdout(&output)
    );

    let steps = [
        "fmt",
        "circles",
        "length",
        "clippy",
        "gpu-clippy",
        "package",
        "docs",
        "gpu-docs",
        "gpu-others",
    ];
    let skips: Vec<&str> = steps.iter().flat_map(|step| ["--skip", *step]).collect();
    let output = run(place.xtask(&[&["check"], skips.as_slice()].concat()));
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("nothing was checked"),
        "{}",
        stderr(&output)
    );
    assert!(!stdout(&output).contains("passed"), "{}", stdout(&output));
}

/// A stand-in for cargo that built these programs.
fn builds(place: &Place, programs: &[(&str, &Path)]) -> PathBuf {
    let message = |(name, file): &(&str, &Path)| {
        let folder = place.folder.path();
        let message = serde_json::json!({
            "manifest_path": folder.join("Cargo.toml"),
            "target": { "name": name },
            "executable": file,
        });
        format!("echo '{message}'\n")
    };
    place.program("cargo", &programs.iter().map(message).collect::<String>())
}

/// The test programs of a soak.
const STAGES: [&str; 7] = [
    "property",
    "stress",
    "concurrency",
    "leaks",
    "convergence",
    "data_fuzz",
    "kill",
];

#[test]
fn a_soak_that_is_ended_ends_its_test_program() {
    let place = Place::new();
    let test = place.program(
        "test",
        r#"[ -e first ] || { touch first; echo "test result: ok. 1 passed; 0 failed"; exit; }
           sleep 600 & echo $! > child.new; echo $$ > own; mv child.new child; wait"#,
    );
    let cargo = builds(&place, &STAGES.map(|stage| (stage, test.as_path())));
    fs::write(place.path("seeds.unfinished"), "kept").unwrap();
    let mut command = place.xtask(&["soak", "--minutes", "9", "--seed", "0"]);
    command.args(["--report", "seeds.txt"]).env("CARGO", cargo);
    let child = start(command);
    // What a test program starts ends, too.
    let grandchild = content(&place.path("child"));
    let own = content(&place.path("own"));
    assert!(signal("TERM", &child.id().to_string()));
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).ends_with("error: interrupted\n"),
        "{}",
        stderr(&output)
    );
    assert!(ended(&own) && ended(&grandchild));
    let list = fs::read_to_string(place.path("seeds.txt")).unwrap();
    assert_eq!(list, "1 runs from seed 0\nproperty: 3793791033\n");
    assert_eq!(
        fs::read_to_string(place.path("seeds.unfinished")).unwrap(),
        "kept"
    );
}

#[test]
fn a_bundle_leaves_the_folder_of_its_output_alone() {
    let place = Place::new();
    fs::create_dir(place.path("bundle")).unwrap();
    fs::write(place.path("bundle/mine"), "kept").unwrap();
    fs::write(place.path("x.sh"), "old").unwrap();
    fs::set_permissions(place.path("x.sh"), Permissions::from_mode(0o750)).unwrap();
    let program = place.program("program", "");
    let built = ["burn_conv_bn_gpu_tests", "bench-worker", "mnist"];
    let cargo = builds(&place, &built.map(|name| (name, program.as_path())));
    place.program("tar", "echo archive");
    place.program("ldd", "");
    let search = format!("{}:/usr/bin:/bin", place.folder.path().display());
    let mut command = place.xtask(&["gpu-bundle", "--output", "x.sh"]);
    command.env("CARGO", cargo).env("PATH", search);
    let output = run(command);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(
        fs::read_to_string(place.path("x.sh"))
            .unwrap()
            .ends_with("exit 0\narchive\n")
    );
    let mode = fs::metadata(place.path("x.sh"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o750);
    assert_eq!(
        fs::read_to_string(place.path("bundle/mine")).unwrap(),
        "kept"
    );
    assert_eq!(
        names(place.folder.path()),
        ["bundle", "cargo", "ldd", "program", "tar", "x.sh"]
    );
}
