//! `mnist train` on a terminal: the dashboard's keys, Ctrl-C and other signals, and the state that the
//! terminal is left in.

#![cfg(unix)]

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use burn_conv_bn_train::data::OFFLINE;
use nix::pty::{Winsize, openpty};
use nix::sys::termios::{Termios, tcgetattr};
use rustix::io::{FdFlags, fcntl_setfd, ioctl_fionbio};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::{TempDir, tempdir};

/// Steps of a moment.
const SHORT: &str = "--train-limit 64 --test-limit 32 --batch-size 32";

/// Steps that take much longer than [`IMPATIENCE`].
const LONG: &str = "--train-limit 4096 --test-limit 32 --batch-size 4096";

const IMPATIENCE: Duration = Duration::from_millis(200);

const CTRL_C: &[u8] = b"\x03";
const ALTERNATE_SCREEN: &str = "\x1b[?1049h";

/// Most time for anything that is waited for.
const PATIENCE: Duration = Duration::from_secs(120);

/// Held from the making of a terminal to the start of its training: another test's training must not
/// inherit it, or it would outlive its session.
static STARTING: Mutex<()> = Mutex::new(());

/// What a training reads from.
#[derive(Clone, Copy)]
enum Input {
    /// The terminal, which sends its signals.
    Terminal,
    /// The terminal, which sends none.
    WithoutSignals,
    Nothing,
}

/// A training that has a terminal of its own, and the terminal's other end.
struct Session {
    folder: TempDir,
    child: Child,
    /// None once the terminal is gone.
    terminal: Option<(File, OwnedFd)>,
    before: Termios,
    output: Vec<u8>,
}

/// A session after its training.
struct Ended {
    folder: TempDir,
    status: ExitStatus,
    output: String,
    before: Termios,
    after: Option<Termios>,
}

impl Session {
    /// Trains for more epochs than anybody waits for. None, and a line that says so, where no
    /// program gives a process its own terminal.
    fn start(limits: &str, input: Input) -> Option<Self> {
        let options = format!("{limits} --epochs 9999");
        Self::train(&options, "xterm-256color", input)
    }

    /// As [`start`](Self::start), until the dashboard is shown and an epoch is finished.
    fn in_training(input: Input) -> Option<Self> {
        let mut session = Self::start(SHORT, input)?;
        session.wait_for("a dashboard and a checkpoint", |session| {
            session.shows(ALTERNATE_SCREEN) && session.newest() > Some(0)
        });
        Some(session)
    }

    fn train(options: &str, name: &str, input: Input) -> Option<Self> {
        if Command::new("setsid").arg("--version").output().is_err() {
            // The test harness hides what a passing test prints, but not what is written here.
            let _ = writeln!(io::stderr(), "SKIPPED: there is no `setsid` (util-linux)");
            return None;
        }
        let size = Winsize {
            ws_row: 30,
            ws_col: 100,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let starting = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        let pty = openpty(&size, None).unwrap();
        let (ours, theirs) = (File::from(pty.master), pty.slave);
        fcntl_setfd(&ours, FdFlags::CLOEXEC).unwrap();
        fcntl_setfd(&theirs, FdFlags::CLOEXEC).unwrap();
        ioctl_fionbio(&ours, true).unwrap();
        let before = tcgetattr(&theirs).unwrap();

        let folder = tempdir().unwrap();
        let end = || Stdio::from(theirs.try_clone().unwrap());
        let mut command = Command::new("setsid");
        match input {
            Input::Terminal => command.arg("--ctty").stdin(end()),
            Input::WithoutSignals => command.stdin(end()),
            Input::Nothing => command.stdin(Stdio::null()),
        };
        let arguments = format!("train --dataset synthetic --artifacts run {options}");
        let child = command
            .arg(env!("CARGO_BIN_EXE_mnist"))
            .args(arguments.split_whitespace())
            .current_dir(&folder)
            .env(OFFLINE, "1")
            .env("TERM", name)
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        drop(command);
        drop(starting);
        Some(Self {
            folder,
            child,
            terminal: Some((ours, theirs)),
            before,
            output: Vec::new(),
        })
    }

    /// Reads what there is to read.
    fn read(&mut self) {
        let mut buffer = [0; 4096];
        while let Some((ours, _)) = &mut self.terminal
            && let Ok(count @ 1..) = ours.read(&mut buffer)
        {
            self.output.extend_from_slice(&buffer[..count]);
        }
    }

    fn shows(&self, text: &str) -> bool {
        String::from_utf8_lossy(&self.output).contains(text)
    }

    fn newest(&self) -> Option<usize> {
        newest_checkpoint(self.folder.path())
    }

    #[track_caller]
    fn wait_for(&mut self, what: &str, condition: impl Fn(&mut Self) -> bool) {
        let started = Instant::now();
        while !condition(self) {
            self.read();
            if started.elapsed() > PATIENCE {
                let output = String::from_utf8_lossy(&self.output);
                panic!("no {what} after {PATIENCE:?}: {output}");
            }
            sleep(Duration::from_millis(10));
        }
    }

    fn press(&mut self, keys: &[u8]) {
        let (ours, _) = self.terminal.as_mut().expect("the terminal is there");
        ours.write_all(keys).unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    #[track_caller]
    fn end(mut self) -> Ended {
        self.wait_for("end", Self::has_ended);
        self.read();
        let folder = std::mem::replace(&mut self.folder, tempdir().unwrap());
        Ended {
            folder,
            status: self.child.wait().unwrap(),
            output: String::from_utf8_lossy(&self.output).into_owned(),
            before: self.before.clone(),
            after: self
                .terminal
                .as_ref()
                .map(|(_, theirs)| tcgetattr(theirs).unwrap()),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last epoch that has a complete checkpoint; 0 is a run that has finished none.
fn newest_checkpoint(folder: &Path) -> Option<usize> {
    let names = fs::read_dir(folder.join("run/checkpoint")).ok()?;
    let epochs = names.filter_map(|entry| {
        let name = entry.ok()?.file_name().into_string().ok()?;
        let epoch = name.strip_prefix("epoch-")?.strip_suffix(".json")?;
        epoch.parse().ok()
    });
    epochs.max()
}

impl Ended {
    /// Asserts that the training was stopped after a batch, and says what it keeps.
    #[track_caller]
    fn assert_stopped(&self) {
        let output = &self.output;
        assert_eq!(self.status.code(), Some(1), "{output}");
        let (_, error) = output.rsplit_once("error: ").expect(output);
        assert!(error.starts_with("interrupted in "), "{error}");
        assert!(error.contains("kept in run: the checkpoint"), "{error}");
        assert!(!output.contains("panicked"), "{output}");
        let (_, next) = error
            .split_once("--resume goes on with epoch ")
            .expect(error);
        let next: usize = next.trim_end().parse().expect(error);
        let kept = newest_checkpoint(self.folder.path());
        assert_eq!(kept, Some(next - 1), "{error}");
    }

    /// Asserts that the terminal is as it was before the dashboard.
    #[track_caller]
    fn assert_sane(&self) {
        let output = &self.output;
        assert_eq!(self.after.as_ref(), Some(&self.before), "{output}");
        let last = |mode: u32, state: &str| output.rfind(&format!("\x1b[?{mode}{state}"));
        let cursor = 25;
        assert!(last(cursor, "l").is_some(), "{output}");
        assert!(last(cursor, "h") > last(cursor, "l"), "{output}");
        for mode in [1000, 1002, 1003, 1006, 1015, 1049] {
            assert!(last(mode, "h").is_some(), "{mode}: {output}");
            assert!(last(mode, "l") > last(mode, "h"), "{mode}: {output}");
        }
        if let Some(error) = output.rfind("error: ") {
            assert!(last(1049, "h") < Some(error), "{output}");
        }
    }
}

#[test]
fn ctrl_c_stops_after_the_batch() {
    let Some(mut session) = Session::in_training(Input::Terminal) else {
        return;
    };
    session.press(CTRL_C);
    let ended = session.end();
    ended.assert_stopped();
    ended.assert_sane();
}

#[test]
fn a_second_ctrl_c_ends_at_once() {
    let Some(mut session) = Session::start(LONG, Input::Terminal) else {
        return;
    };
    session.wait_for("dashboard", |session| session.shows(ALTERNATE_SCREEN));
    session.wait_for("end", |session| {
        session.press(CTRL_C);
        sleep(IMPATIENCE);
        session.has_ended()
    });
    let ended = session.end();
    assert_eq!(ended.status.code(), Some(130), "{}", ended.output);
    ended.assert_sane();
}

#[test]
fn the_dashboards_keys_stop_as_ctrl_c_does() {
    for keys in [b"qs", b"qk"] {
        let Some(mut session) = Session::in_training(Input::Terminal) else {
            return;
        };
        session.press(keys);
        let ended = session.end();
        ended.assert_stopped();
        ended.assert_sane();
    }
}

#[test]
fn keys_that_would_leave_the_terminal_as_it_is_are_ignored() {
    let Some(mut session) = Session::in_training(Input::Terminal) else {
        return;
    };
    // Ctrl-Z and Ctrl-\, which suspend and abort where they raise signals.
    session.press(b"\x1a\x1c");
    let later = session.newest().map(|epoch| epoch + 3);
    session.wait_for("later checkpoint", |session| session.newest() > later);
    session.press(CTRL_C);
    let ended = session.end();
    ended.assert_stopped();
    ended.assert_sane();
}

#[test]
fn a_request_to_terminate_stops_as_ctrl_c_does() {
    let Some(session) = Session::in_training(Input::Terminal) else {
        return;
    };
    session.signal(Signal::TERM);
    let ended = session.end();
    ended.assert_stopped();
    ended.assert_sane();
}

#[test]
fn a_training_whose_terminal_is_gone_ends() {
    // A terminal's signal may come after the program has noticed.
    for input in [Input::Terminal, Input::WithoutSignals] {
        let Some(mut session) = Session::in_training(input) else {
            return;
        };
        session.terminal = None;
        let ended = session.end();
        assert_eq!(ended.status.signal(), Some(Signal::HUP.as_raw()));
        assert!(newest_checkpoint(ended.folder.path()) > Some(0));
    }
}

#[test]
fn an_error_leaves_the_terminal_as_it_was() {
    let Some(session) = Session::in_training(Input::Terminal) else {
        return;
    };
    let checkpoints = session.folder.path().join("run/checkpoint");
    fs::rename(&checkpoints, session.folder.path().join("moved")).unwrap();
    fs::write(&checkpoints, "").unwrap();
    let ended = session.end();
    assert_eq!(ended.status.code(), Some(1), "{}", ended.output);
    assert!(
        ended.output.contains("error: cannot write "),
        "{}",
        ended.output
    );
    ended.assert_sane();
}

#[test]
fn a_finished_training_leaves_the_terminal_as_it_was() {
    let options = format!("{SHORT} --epochs 2");
    let Some(session) = Session::train(&options, "xterm-256color", Input::Terminal) else {
        return;
    };
    let ended = session.end();
    assert_eq!(ended.status.code(), Some(0), "{}", ended.output);
    assert!(ended.output.contains("Test set (synthetic): "));
    ended.assert_sane();
}

#[test]
fn there_are_lines_where_the_terminal_can_show_no_dashboard_or_has_no_keys() {
    for (name, input) in [
        ("dumb", Input::Terminal),
        ("xterm-256color", Input::Nothing),
    ] {
        let options = format!("{SHORT} --epochs 1");
        let Some(session) = Session::train(&options, name, input) else {
            return;
        };
        let ended = session.end();
        assert_eq!(ended.status.code(), Some(0), "{}", ended.output);
        assert!(ended.output.contains("Epoch 1/1: "), "{}", ended.output);
        assert!(!ended.output.contains('\x1b'), "{}", ended.output);
        assert_eq!(ended.after.as_ref(), Some(&ended.before));
    }
}
