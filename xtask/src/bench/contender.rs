//! A contender's process, and the conversation with it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::path::Path;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use burn_conv_bn_bench::protocol::{Contender, Reply, Request};

use super::report::{ContenderReport, Problem, ProblemKind};
use crate::interrupt::Guarded;
use crate::say::note;

/// Reported lines of a dead process's standard error.
const LAST_LINES: usize = 8;

/// Period and number of looks at whether a process has ended.
const TICK: Duration = Duration::from_millis(10);
const MOMENT: usize = 100;

/// A function that picks one kind of reply.
macro_rules! reply {
    ($kind:ident) => {
        |reply| match reply {
            burn_conv_bn_bench::protocol::Reply::$kind(content) => Some(content),
            _ => None,
        }
    };
}

pub(crate) use reply;

/// Picks the reply without content.
pub fn done(reply: Reply) -> Option<()> {
    (reply == Reply::Done {}).then_some(())
}

/// A process that speaks the protocol. It ends when this is dropped, and at an interrupt.
pub struct Process {
    name: String,
    child: Guarded,
    requests: ChildStdin,
    replies: BufReader<ChildStdout>,
    stderr: File,
}

impl Process {
    pub fn start(mut command: Command) -> Result<Self> {
        let stderr = tempfile::tempfile().context("cannot create a file for errors")?;
        let program = Path::new(command.get_program());
        let name = program.file_name().unwrap_or(program.as_os_str());
        let name = name.to_string_lossy().into_owned();
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr.try_clone()?);
        let guarded = Guarded::spawn(command)?;
        let mut child = guarded.child();
        let (requests, replies) = child
            .stdin
            .take()
            .zip(child.stdout.take())
            .context("no pipe")?;
        drop(child);
        Ok(Self {
            name,
            child: guarded,
            requests,
            replies: BufReader::new(replies),
            stderr,
        })
    }

    /// As [`Guarded::kill_when`].
    pub fn kill_when(&self, is_due: impl Fn(u32) -> bool + Send + 'static) -> Arc<AtomicBool> {
        self.child.kill_when(is_due)
    }

    /// Sends a request and waits for its reply, which `take` picks by kind. The process's death is a
    /// problem, too.
    pub fn ask<T>(
        &mut self,
        request: &Request,
        take: impl FnOnce(Reply) -> Option<T>,
    ) -> Result<T, Problem> {
        let failed = |reason: String| Problem::new(ProblemKind::Failed, reason);
        let line = serde_json::to_string(request).map_err(|error| failed(error.to_string()))?;
        let sent = writeln!(self.requests, "{line}").and_then(|()| self.requests.flush());
        sent.map_err(|_| failed(self.death()))?;
        loop {
            let mut answer = String::new();
            let read = self.replies.read_line(&mut answer);
            if read.is_err() || answer.is_empty() {
                return Err(failed(self.death()));
            }
            let answer = answer.trim_end();
            return match serde_json::from_str(answer) {
                Ok(Reply::Tuned { kernels }) => {
                    note!("bench: {} tuned {kernels} kernels so far", self.name);
                    continue;
                }
                Ok(Reply::Unavailable { reason }) => {
                    Err(Problem::new(ProblemKind::Unavailable, reason))
                }
                Ok(Reply::Failed { reason }) => Err(failed(reason)),
                Ok(reply) => {
                    take(reply).ok_or_else(|| failed(format!("{answer} does not answer {line}")))
                }
                Err(_) => Err(failed(format!("{} said {answer:?}", self.name))),
            };
        }
    }

    /// The end of a process that does not answer, by itself if within a moment, and its last words.
    fn death(&mut self) -> String {
        let mut end = "it closed its output, and was killed".to_string();
        for _ in 0..MOMENT {
            if let Ok(Some(status)) = self.child.child().try_wait() {
                end = status.to_string();
                break;
            }
            thread::sleep(TICK);
        }
        let mut bytes = Vec::new();
        let _ = self.stderr.rewind();
        let _ = self.stderr.read_to_end(&mut bytes);
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        let mut lines: Vec<&str> = lines.into_iter().filter(|line| !line.is_empty()).collect();
        lines.drain(..lines.len().saturating_sub(LAST_LINES));
        if lines.is_empty() {
            format!("{} died ({end})", self.name)
        } else {
            format!("{} died ({end}), saying: {}", self.name, lines.join(" / "))
        }
    }
}

/// A contender of an entry with its process, which ends at the first problem.
pub struct Running {
    process: Option<Process>,
    pub report: ContenderReport,
}

impl Running {
    /// Makes a process a contender.
    pub fn load(contender: Contender, process: Result<Process>, load: &Request) -> Self {
        let mut running = Self {
            process: None,
            report: ContenderReport::new(contender),
        };
        match process {
            Ok(process) => running.process = Some(process),
            Err(error) => running.fail(Problem::new(ProblemKind::Failed, format!("{error:#}"))),
        }
        running.ask(load, done);
        running
    }

    /// As [`Process::ask`]. A problem goes to the report and ends the process.
    pub fn ask<T>(
        &mut self,
        request: &Request,
        take: impl FnOnce(Reply) -> Option<T>,
    ) -> Option<T> {
        let answer = self.process.as_mut()?.ask(request, take);
        answer.map_err(|problem| self.fail(problem)).ok()
    }

    /// Runs a step that counts.
    pub fn timed_step(&mut self) {
        let step = self.ask(&Request::Run {}, reply!(Ran));
        self.report.steps.extend(step);
    }

    /// Times the device's kernels over one more step. A contender without kernels keeps its steps.
    pub fn profile(&mut self) {
        let Some(process) = &mut self.process else {
            return;
        };
        let kernels = process.ask(&Request::Profile {}, |reply| match reply {
            Reply::Profiled { kernels } => Some(kernels),
            _ => None,
        });
        match kernels {
            Ok(kernels) => self.report.kernels = kernels,
            Err(problem) if problem.kind == ProblemKind::Unavailable => {}
            Err(problem) => self.fail(problem),
        }
    }

    /// Whether the process runs.
    pub fn is_alive(&self) -> bool {
        self.process.is_some()
    }

    /// Ends the process.
    pub fn end(&mut self) {
        self.process = None;
    }

    /// Notes a problem and ends the process. Its steps do not count: ratios need all rounds.
    fn fail(&mut self, problem: Problem) {
        self.report.fail(problem);
        self.report.steps.clear();
        self.process = None;
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    const DONE: &str = r#"{"done":{}}"#;
    const RAN: &str = r#"{"ran":{"forward_ms":1.0,"backward_ms":2.0}}"#;

    fn shell(script: &str) -> Result<Process> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Process::start(command)
    }

    /// A contender that answers with these lines and then dies.
    fn running(answers: &[&str]) -> Running {
        let echo = |answer: &&str| format!("read line; echo '{answer}'; ");
        let script: String = answers.iter().map(echo).collect();
        Running::load(Contender::Fused, shell(&script), &Request::Hello {})
    }

    #[test]
    fn a_death_is_reported_with_its_last_words() {
        let mut process =
            shell("read line; seq 20 >&2; echo; echo out of memory >&2; exit 3").unwrap();
        // The empty line is no reply, and ends nothing.
        let problem = process.ask(&Request::Hello {}, done).unwrap_err();
        assert!(problem.reason.contains("sh said \"\""), "{problem}");
        for _ in 0..2 {
            let reason = process.ask(&Request::Hello {}, done).unwrap_err().reason;
            assert!(reason.starts_with("sh died (exit status: 3)"), "{reason}");
            let words = "saying: 14 / 15 / 16 / 17 / 18 / 19 / 20 / out of memory";
            assert!(reason.ends_with(words), "{reason}");
        }
    }

    #[test]
    fn nonsense_is_quoted_and_absence_is_named() {
        for (answer, wanted) in [
            ("hello", "sh said \"hello\""),
            (RAN, "does not answer {\"hello\":{}}"),
        ] {
            let mut process = shell(&format!("read line; echo '{answer}'")).unwrap();
            let problem = process.ask(&Request::Hello {}, done).unwrap_err();
            assert!(problem.reason.contains(wanted), "{problem}");
        }
        let error = Process::start(Command::new("/no/such/python"))
            .err()
            .unwrap();
        assert!(error.to_string().contains("/no/such/python"), "{error}");
    }

    #[test]
    fn timed_steps_are_kept_beside_a_profile_if_there_is_one() {
        let kernels = r#"{"profiled":{"kernels":[{"name":"k","launches":3,"ms":0.5}]}}"#;
        for (profiled, count) in [(kernels, 1), (r#"{"unavailable":{"reason":"a CPU"}}"#, 0)] {
            let mut running = running(&[DONE, RAN, RAN, profiled]);
            assert!(running.ask(&Request::Run {}, reply!(Ran)).is_some());
            running.timed_step();
            running.profile();
            let report = running.report;
            assert_eq!((report.problem, report.steps.len()), (None, 1));
            assert_eq!(report.kernels.len(), count);
        }
    }

    #[test]
    fn tuned_kernels_are_told_before_the_answer() {
        let tuned = |kernels| format!(r#"{{"tuned":{{"kernels":{kernels}}}}}"#);
        let answer = format!("{}\n{}\n{RAN}", tuned(1), tuned(12));
        let mut running = running(&[DONE, &answer]);
        running.timed_step();
        let report = running.report;
        assert_eq!((report.problem, report.steps.len()), (None, 1));
    }

    #[test]
    fn one_that_dies_keeps_no_steps() {
        let mut running = running(&[DONE, RAN]);
        running.timed_step();
        running.timed_step();
        running.timed_step();
        assert!(!running.is_alive() && running.report.steps.is_empty());
        assert_eq!(running.report.problem.unwrap().kind, ProblemKind::Failed);
    }

    #[test]
    fn one_that_cannot_run_here_says_so() {
        let mut running = running(&[r#"{"unavailable":{"reason":"no compiler"}}"#, RAN]);
        assert_eq!(running.ask(&Request::Run {}, reply!(Ran)), None);
        let wanted = Problem::new(ProblemKind::Unavailable, "no compiler");
        assert_eq!(running.report.problem, Some(wanted));
    }
}
