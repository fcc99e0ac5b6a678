//! Programs that cargo builds and test programs that report.

use std::io::{BufRead, BufReader, Read};
use std::ops::AddAssign;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::say::{note, say};
use crate::workspace::{show, typed};

/// A program that was built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Of its target.
    pub name: String,
    pub file: PathBuf,
    /// Its package's folder, in which cargo runs tests.
    pub folder: PathBuf,
}

/// Runs a cargo command that builds, and returns the programs that it built.
pub fn build(mut command: Command) -> Result<Vec<Program>> {
    command.arg("--message-format=json-render-diagnostics");
    note!("$ {}", typed(&command));
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("cargo failed ({})", output.status);
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    Ok(messages.lines().filter_map(program).collect())
}

/// The program, if this is cargo's message that it was built.
fn program(message: &str) -> Option<Program> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    let manifest = PathBuf::from(message["manifest_path"].as_str()?);
    Some(Program {
        name: message["target"]["name"].as_str()?.to_string(),
        file: PathBuf::from(message["executable"].as_str()?),
        folder: manifest.parent()?.to_path_buf(),
    })
}

/// Runs a cargo command that tests. Returns whether it succeeded, and what ran.
pub fn test(mut command: Command) -> Result<(bool, Count)> {
    show(&command)?;
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let output = child.stdout.take().context("the output is a pipe")?;
    // Closes the pipe where it fails, which ends the command.
    let count = pass_on(output);
    let status = child.wait().context("cannot wait for cargo")?;
    Ok((status.success(), count?))
}

/// Prints what test programs print, and counts their tests.
fn pass_on(output: impl Read) -> Result<Count> {
    let mut count = Count::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("cannot read what the tests print")?;
        let line = String::from_utf8_lossy(&line);
        say!("{line}")?;
        count.see(&line);
    }
    Ok(count)
}

/// Test programs that ran to their end, and their tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub programs: usize,
    pub passed: usize,
    pub failed: usize,
}

impl Count {
    /// Counts what a line of a test program's output says.
    pub fn see(&mut self, line: &str) {
        let Some(result) = line.strip_prefix("test result: ") else {
            return;
        };
        self.programs += 1;
        for part in result.split(['.', ';']) {
            let mut words = part.split_whitespace();
            let number = words.next().and_then(|word| word.parse::<usize>().ok());
            match (number, words.next()) {
                (Some(number), Some("passed")) => self.passed += number,
                (Some(number), Some("failed")) => self.failed += number,
                _ => {}
            }
        }
    }

    /// Counts a whole output.
    pub fn of(output: &str) -> Self {
        let mut count = Self::default();
        output.lines().for_each(|line| count.see(line));
        count
    }
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.programs += other.programs;
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_where_cargo_says() {
        let built = r#"{"reason":"compiler-artifact","manifest_path":"/w/crates/a/Cargo.toml",
            "target":{"kind":["test"],"name":"leaks"},"executable":"/w/target/deps/leaks-1"}"#;
        let wanted = Program {
            name: "leaks".to_string(),
            file: "/w/target/deps/leaks-1".into(),
            folder: "/w/crates/a".into(),
        };
        assert_eq!(program(built), Some(wanted));
        let library = r#"{"manifest_path":"/w/Cargo.toml","target":{"name":"burn"},
            "executable":null}"#;
        assert_eq!(program(library), None);
        assert_eq!(program("Compiling"), None);
    }

    #[test]
    fn tests_are_counted() {
        let output = "running 3 tests\ntest a ... ok\n\
            test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.31s\n\
            test result: FAILED. 4 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 7.00s\n\
            no test result: ok. 9 passed; 9 failed\n";
        let mut count = Count::of(output);
        let wanted = Count {
            programs: 2,
            passed: 16,
            failed: 2,
        };
        assert_eq!(count, wanted);
        count += wanted;
        assert_eq!((count.programs, count.passed, count.failed), (4, 32, 4));
        assert_eq!(Count::of("error: could not compile"), Count::default());
    }
}
