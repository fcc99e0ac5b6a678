//! A contender's process, and the conversation with it.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Error, Result, anyhow};
use burn_conv_bn_bench::protocol::{Reply, Request};
use burn_conv_bn_bench::report::ProblemKind;

use crate::interrupt::Guarded;

/// How many of a process's last words are kept.
const LAST_LINES: usize = 8;

/// How often to look whether something has ended, and how many times.
const TICK: Duration = Duration::from_millis(10);
const MOMENT: usize = 100;

/// A process that speaks the protocol. It ends when this is dropped, and at an interrupt.
pub struct Process {
    name: &'static str,
    child: Guarded,
    requests: ChildStdin,
    replies: BufReader<ChildStdout>,
    last_words: LastWords,
}

impl Process {
    /// Starts it.
    pub fn start(mut command: Command, name: &'static str) -> Result<Self> {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let guarded = Guarded::spawn(command)?;
        let mut child = guarded.child();
        let no_pipe = || format!("{name} has no pipe");
        let requests = child.stdin.take().with_context(no_pipe)?;
        let replies = BufReader::new(child.stdout.take().with_context(no_pipe)?);
        let last_words = LastWords::of(child.stderr.take().with_context(no_pipe)?);
        drop(child);
        Ok(Self {
            name,
            child: guarded,
            requests,
            replies,
            last_words,
        })
    }

    /// Sends a request and waits for its reply. An error is the process's death.
    pub fn ask(&mut self, request: &Request) -> Result<Reply> {
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        let sent = self.requests.write_all(line.as_bytes());
        if sent.and_then(|()| self.requests.flush()).is_err() {
            return Err(self.death());
        }
        let mut answer = String::new();
        match self.replies.read_line(&mut answer) {
            Ok(0) | Err(_) => Err(self.death()),
            Ok(_) => serde_json::from_str(&answer)
                .with_context(|| format!("{} said {:?}", self.name, answer.trim_end())),
        }
    }

    /// What is known about the end of a process that does not answer.
    fn death(&mut self) -> Error {
        let end = self.end();
        let words = self.last_words.get();
        match words.is_empty() {
            true => anyhow!("{} died ({end})", self.name),
            false => anyhow!("{} died ({end}), saying: {words}", self.name),
        }
    }

    /// How the process ended, by itself if it does so within a moment.
    fn end(&mut self) -> String {
        for _ in 0..MOMENT {
            if let Ok(Some(status)) = self.child.child().try_wait() {
                return status.to_string();
            }
            thread::sleep(TICK);
        }
        "it closed its output, and was killed".to_string()
    }
}

/// The last lines of a stream, which is read to its end in the background.
struct LastWords {
    lines: Arc<Mutex<VecDeque<String>>>,
    reader: JoinHandle<()>,
}

impl LastWords {
    fn of(stream: impl Read + Send + 'static) -> Self {
        let lines = Arc::new(Mutex::new(VecDeque::new()));
        let kept = lines.clone();
        let reader = thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while stream
                .read_until(b'\n', &mut line)
                .is_ok_and(|bytes| bytes > 0)
            {
                let text = String::from_utf8_lossy(&line).trim().to_string();
                line.clear();
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                if !text.is_empty() {
                    kept.push_back(text);
                }
                if kept.len() > LAST_LINES {
                    kept.pop_front();
                }
            }
        });
        Self { lines, reader }
    }

    /// The lines, of a process that is dead. A process of its own may hold the stream open, so
    /// this does not wait for its end for long.
    fn get(&self) -> String {
        for _ in 0..MOMENT {
            if self.reader.is_finished() {
                break;
            }
            thread::sleep(TICK);
        }
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().cloned().collect::<Vec<_>>().join(" / ")
    }
}

/// The kind and the words of a reply that says why there is none.
pub fn refusal(reply: Reply) -> (ProblemKind, String) {
    match reply {
        Reply::Unavailable { reason } => (ProblemKind::Unavailable, reason),
        Reply::Failed { reason } => (ProblemKind::Failed, reason),
        other => (ProblemKind::Failed, format!("{other:?} is no answer")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    #[test]
    fn the_last_words_are_the_last_lines() {
        let text: String = (0..20).map(|line| format!("line {line}\n\n")).collect();
        let words = LastWords::of(Cursor::new(text + "end")).get();
        assert_eq!(
            words,
            "line 13 / line 14 / line 15 / line 16 / line 17 / line 18 / line 19 / end"
        );
        assert_eq!(LastWords::of(Cursor::new("")).get(), "");
    }

    #[cfg(unix)]
    fn shell(script: &str) -> Process {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Process::start(command, "sh").unwrap()
    }

    #[cfg(unix)]
    #[test]
    fn asks_and_is_answered() {
        let mut process = shell(r#"while read line; do echo '{"done":{}}'; done"#);
        for _ in 0..2 {
            let reply = process.ask(&Request::Hello {}).unwrap();
            assert_eq!(reply, Reply::Done {});
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_death_is_told_with_its_last_words() {
        let mut process = shell("read line; echo out of memory >&2; exit 3");
        let error = process.ask(&Request::Hello {}).unwrap_err().to_string();
        assert!(error.contains("sh died"), "{error}");
        assert!(error.contains("saying: out of memory"), "{error}");
        // Asking the dead is no panic.
        assert!(process.ask(&Request::Memory {}).is_err());
    }

    #[cfg(unix)]
    #[test]
    fn nonsense_is_quoted() {
        let mut process = shell("read line; echo hello");
        let error = process.ask(&Request::Hello {}).unwrap_err();
        assert!(
            format!("{error:#}").contains("sh said \"hello\""),
            "{error:#}"
        );
    }

    #[test]
    fn what_is_not_there_is_named() {
        let command = Command::new("/no/such/python");
        let error = Process::start(command, "pytorch.py").err().unwrap();
        assert!(error.to_string().contains("/no/such/python"), "{error}");
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
