//! The program that runs Burn's contenders.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use burn_conv_bn_bench::device::FLEX;

use crate::say::note;
use crate::workspace::cargo;

/// Its name.
pub const WORKER: &str = "bench-worker";

/// The package that it is in.
const WORKER_PACKAGE: &str = "burn-conv-bn-bench-worker";

/// Builds the worker for a device and returns its file.
pub fn build(device: &str) -> Result<PathBuf> {
    let args = build_args(device);
    note!("$ cargo {}", args.join(" "));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let output = cargo(&args)
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("cannot build {WORKER}");
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let file = messages.lines().find_map(executable);
    file.with_context(|| format!("cargo built {WORKER}, but does not say where"))
}

/// What cargo is told to build the worker.
///
/// For Flex it is built as a default member like any other, and not by its package's name: then
/// cargo turns on the same features as for `cargo build --release`, and builds Burn once for both.
/// Other devices have a folder each, so that going from one to another builds nothing anew.
fn build_args(device: &str) -> Vec<String> {
    let mut args = ["build", "--release", "--locked", "--bin", WORKER]
        .map(String::from)
        .to_vec();
    if device != FLEX {
        let features = format!("{device},fusion,autotune,persistence");
        let folder = format!("target/gpu-{device}");
        let more = [
            "-p",
            WORKER_PACKAGE,
            "--features",
            features.as_str(),
            "--target-dir",
            folder.as_str(),
        ];
        args.extend(more.map(String::from));
    }
    args
}

/// The worker's file, if this is cargo's message that it was built.
fn executable(message: &str) -> Option<PathBuf> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    if message["target"]["name"] != WORKER {
        return None;
    }
    message["executable"].as_str().map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worker_is_where_cargo_says() {
        let built = r#"{"reason":"compiler-artifact","target":{"kind":["bin"],
            "name":"bench-worker"},"executable":"/t/release/bench-worker"}"#;
        assert_eq!(executable(built), Some("/t/release/bench-worker".into()));
        let library =
            r#"{"reason":"compiler-artifact","target":{"name":"burn"},"executable":null}"#;
        assert_eq!(executable(library), None);
        let other = r#"{"target":{"name":"mnist"},"executable":"/t/release/mnist"}"#;
        assert_eq!(executable(other), None);
        assert_eq!(executable("Compiling"), None);
    }

    #[test]
    fn the_worker_is_built_for_its_device() {
        let flex = build_args(FLEX).join(" ");
        assert_eq!(flex, "build --release --locked --bin bench-worker");
        let cuda = build_args("cuda").join(" ");
        let more = " -p burn-conv-bn-bench-worker --features cuda,fusion,autotune,persistence \
                    --target-dir target/gpu-cuda";
        assert_eq!(cuda, format!("{flex}{more}"));
    }
}
