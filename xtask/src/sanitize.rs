//! `cargo xtask sanitize`: the CPU kernels, the one place with pointer arithmetic, under AddressSanitizer.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::programs::{self, Count};
use crate::say::say;
use crate::workspace::{cargo, root};

/// The feature of the kernels' package that compiles them for AVX-512 too.
const AVX512: &str = "x86-v4";

/// Runs the tests without and with AVX-512, and says what was covered.
pub fn sanitize() -> Result<()> {
    let mut covered = Vec::new();
    let mut failed = Vec::new();
    for features in ["", AVX512] {
        let (passed, count) = address(features)?;
        let units = vector_units(features, has_avx512());
        covered.push(format!(
            "{units}: {} test programs, {} tests passed, {} failed",
            count.programs, count.passed, count.failed
        ));
        if !passed {
            failed.push(units);
        }
    }
    say!("sanitize: covered by AddressSanitizer")?;
    for line in covered {
        say!("  {line}")?;
    }
    if !failed.is_empty() {
        bail!("sanitize failed: {}", failed.join("; "));
    }
    say!("sanitize: passed")
}

/// Runs the tests of the CPU kernels under AddressSanitizer. A sanitizer is an unstable option of the
/// compiler, which `RUSTC_BOOTSTRAP` opens on a stable toolchain.
fn address(features: &str) -> Result<(bool, Count)> {
    let host = host()?;
    let mut command = cargo(&["test", "--release", "-p", "burn-conv-bn-cpu", "--target"]);
    // Doc tests would need the sanitizer in rustdoc too, and have no code of their own here.
    command
        .arg(host)
        .args(["--lib", "--tests", "--no-fail-fast"]);
    command.args(["--no-default-features", "--features", features]);
    command.args(["--target-dir", "target/sanitize"]);
    command.env("RUSTC_BOOTSTRAP", "1");
    command.env("RUSTFLAGS", "-Zsanitizer=address");
    programs::test(command)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_that_did_not_run_is_not_claimed() {
        assert_eq!(vector_units("", true), "without AVX-512");
        assert_eq!(vector_units(AVX512, true), "with AVX-512");
        assert!(vector_units(AVX512, false).contains("lacks"));
    }
}
