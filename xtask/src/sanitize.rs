//! `cargo xtask sanitize`: the CPU kernels, the one place with pointer arithmetic and with threads of
//! its own, under AddressSanitizer and under Helgrind.
//!
//! ThreadSanitizer, which knows atomics as Helgrind does not, would need the standard library built
//! with it, and so the component `rust-src` and an unstable cargo option.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, ValueEnum};

use crate::programs::{self, Count};
use crate::{cargo, root, show};

/// The feature of the kernels' package that compiles them for AVX-512 too.
const AVX512: &str = "x86-v4";

/// The package whose program Helgrind watches.
const RACES: &str = "burn-conv-bn-races";

/// Its program.
const PROGRAM: &str = "races";

/// What Helgrind reports and is none of the kernels' doing, from the workspace's root.
const SUPPRESSIONS: &str = "xtask/src/sanitize/helgrind.supp";

/// Where Helgrind's program is built and its reports are written, from the workspace's root.
const HELGRIND_FOLDER: &str = "target/helgrind";

#[derive(Args, Debug)]
pub struct Sanitize {
    /// Run one of the two.
    #[arg(long, value_enum, value_name = "TOOL")]
    only: Option<Tool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Tool {
    /// AddressSanitizer: the tests of the CPU kernels, without and with AVX-512.
    Address,
    /// Helgrind: the same kernels on plain threads, without AVX-512, which Valgrind does not know.
    Helgrind,
}

/// Runs the tools and says what each covered.
pub fn sanitize(args: &Sanitize) -> Result<()> {
    let wants = |tool| args.only.is_none_or(|only| only == tool);
    let mut covered = Vec::new();
    let mut failed = Vec::new();
    if wants(Tool::Address) {
        for features in ["", AVX512] {
            let (passed, count) = address(features)?;
            let units = vector_units(features, has_avx512());
            covered.push(format!(
                "AddressSanitizer, {units}: {} test programs, {} tests passed, {} failed",
                count.programs, count.passed, count.failed
            ));
            if !passed {
                failed.push(format!("AddressSanitizer, {units}"));
            }
        }
    }
    if wants(Tool::Helgrind) {
        match (valgrind_version(), args.only) {
            (Some(version), _) => {
                let report = helgrind()?;
                covered.push(format!(
                    "Helgrind of {version}, no AVX-512: {}",
                    report.line()
                ));
                if report.summary.errors > 0 {
                    failed.push("Helgrind".to_string());
                }
            }
            (None, None) => covered.push(format!("Helgrind: SKIPPED, {NO_VALGRIND}")),
            (None, Some(_)) => bail!(NO_VALGRIND),
        }
    }
    println!("sanitize: covered");
    for line in covered {
        println!("  {line}");
    }
    match failed.is_empty() {
        true => {
            println!("sanitize: passed");
            Ok(())
        }
        false => bail!("sanitize failed: {}", failed.join("; ")),
    }
}

const NO_VALGRIND: &str = "valgrind is not installed; Debian's package is valgrind";

/// Runs the tests of the CPU kernels under AddressSanitizer. A sanitizer is an unstable option of the
/// compiler, which `RUSTC_BOOTSTRAP` opens on a stable toolchain.
fn address(features: &str) -> Result<(bool, Count)> {
    let host = host()?;
    let mut command = cargo(&["test", "--release", "-p", "burn-conv-bn-cpu", "--target"]);
    // Doc tests would need the sanitizer in rustdoc too, and have no code of their own here.
    command
        .arg(host)
        .args(["--lib", "--tests", "--no-fail-fast"]);
    command.args(["--features", features]);
    command.args(["--target-dir", "target/sanitize"]);
    command.env("RUSTC_BOOTSTRAP", "1");
    command.env("RUSTFLAGS", "-Zsanitizer=address");
    show(&command);
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let output = child
        .stdout
        .take()
        .context("the standard output is a pipe")?;
    let mut count = Count::default();
    for line in BufReader::new(output).lines() {
        let line = line.context("cannot read what the tests print")?;
        println!("{line}");
        count.see(&line);
    }
    let status = child.wait().context("cannot wait for cargo")?;
    Ok((status.success(), count))
}

/// The triple that the toolchain compiles for by itself.
fn host() -> Result<String> {
    let output = Command::new("rustc")
        .arg("-vV")
        .current_dir(root())
        .output()
        .context("cannot run rustc")?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .find_map(|line| line.strip_prefix("host: "))
        .map(str::to_string)
        .context("rustc -vV names no host")
}

/// The code that ran: what is compiled for AVX-512 is chosen only where the processor has it.
fn vector_units(features: &str, has_avx512: bool) -> &'static str {
    match (features, has_avx512) {
        (AVX512, true) => "with AVX-512",
        (AVX512, false) => "built with AVX-512, which this processor lacks",
        _ => "without AVX-512",
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    std::arch::is_x86_feature_detected!("avx512f")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx512() -> bool {
    false
}

/// What `valgrind --version` says, if there is one.
fn valgrind_version() -> Option<String> {
    let output = Command::new("valgrind").arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_string())
}

/// What Helgrind found, and in what.
struct Report {
    /// What the program says that it did.
    program: String,
    summary: Summary,
}

impl Report {
    fn line(&self) -> String {
        format!(
            "{}; {} errors, {} reports suppressed",
            self.program, self.summary.errors, self.summary.suppressed
        )
    }
}

/// Runs the kernels under Helgrind, after what it must report.
///
/// The processor that Valgrind shows to a program has AVX2 at most; without the feature for it there
/// is no code for AVX-512 in the program either.
fn helgrind() -> Result<Report> {
    let mut command = cargo(&["build", "--release", "-p", RACES, "--bin", PROGRAM]);
    command.args(["--target-dir", HELGRIND_FOLDER]);
    // No instructions beyond the baseline but those that are chosen at run time.
    command.env("RUSTFLAGS", "");
    command.env_remove("CARGO_ENCODED_RUSTFLAGS");
    // Reports name functions and lines.
    command.env("CARGO_PROFILE_RELEASE_DEBUG", "line-tables-only");
    let built = programs::build(command)?;
    let program = built
        .into_iter()
        .find(|program| program.name == PROGRAM)
        .map(|program| program.file)
        .ok_or_else(|| anyhow!("cargo built no program {PROGRAM}"))?;

    let (canary, _) = watch(&program, Some("--canary"))?;
    if canary.errors == 0 {
        bail!("Helgrind missed a race that is there: it cannot be relied on here");
    }
    let (summary, printed) = watch(&program, None)?;
    if summary.errors > 0 {
        let log = log_file(None);
        let text = fs::read_to_string(&log).unwrap_or_default();
        println!("{text}");
        println!("Helgrind's report is also in {}", log.display());
    }
    Ok(Report {
        program: printed,
        summary,
    })
}

/// Runs a program under Helgrind. Returns what was found, and what the program printed.
fn watch(program: &Path, argument: Option<&str>) -> Result<(Summary, String)> {
    let log = log_file(argument);
    let mut command = Command::new("valgrind");
    command
        .arg("--tool=helgrind")
        .arg(format!("--suppressions={SUPPRESSIONS}"))
        .arg("--num-callers=40")
        .arg(format!("--log-file={}", log.display()))
        .arg(program)
        .args(argument)
        .current_dir(root())
        .stderr(Stdio::inherit());
    show(&command);
    let output = command.output().context("cannot run valgrind")?;
    if !output.status.success() {
        bail!(
            "{} failed under Helgrind ({})",
            program.display(),
            output.status
        );
    }
    let text = fs::read_to_string(&log)
        .with_context(|| format!("cannot read Helgrind's report {}", log.display()))?;
    let summary = text
        .lines()
        .find_map(summary)
        .with_context(|| format!("Helgrind's report {} has no summary", log.display()))?;
    let printed = String::from_utf8_lossy(&output.stdout);
    Ok((summary, printed.trim().to_string()))
}

fn log_file(argument: Option<&str>) -> PathBuf {
    let name = match argument {
        Some(_) => "canary.log",
        None => "races.log",
    };
    root().join(HELGRIND_FOLDER).join(name)
}

/// Numbers of reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Summary {
    errors: usize,
    suppressed: usize,
}

/// The numbers, if this is the line in which Valgrind sums up.
fn summary(line: &str) -> Option<Summary> {
    let (_, counts) = line.split_once("ERROR SUMMARY: ")?;
    let (errors, rest) = counts.split_once(" errors from ")?;
    let (_, suppressed) = rest.split_once("(suppressed: ")?;
    let number = |text: &str| text.replace(',', "").parse().ok();
    Some(Summary {
        errors: number(errors)?,
        suppressed: number(suppressed.split_whitespace().next()?)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn valgrind_is_understood() {
        let line = "==1719== ERROR SUMMARY: 1,203 errors from 7 contexts (suppressed: 12 from 3)";
        let wanted = Summary {
            errors: 1203,
            suppressed: 12,
        };
        assert_eq!(summary(line), Some(wanted));
        assert_eq!(summary("==1719== Helgrind, a thread error detector"), None);
        assert_eq!(summary("==1719== ERROR SUMMARY: many errors"), None);
    }

    #[test]
    fn code_that_did_not_run_is_not_claimed() {
        assert_eq!(vector_units("", true), "without AVX-512");
        assert_eq!(vector_units(AVX512, true), "with AVX-512");
        assert!(vector_units(AVX512, false).contains("lacks"));
    }

    /// A suppression without a reason is none.
    #[test]
    fn every_suppression_is_explained() {
        let text = include_str!("sanitize/helgrind.supp");
        let mut explained = false;
        let mut suppressions = 0;
        for line in text.lines() {
            match line {
                "{" => {
                    assert!(explained, "no comment above suppression {suppressions}");
                    suppressions += 1;
                    explained = false;
                }
                "" => explained = false,
                _ if line.starts_with('#') => explained = true,
                _ => {}
            }
        }
        assert!(suppressions > 0);
    }
}
