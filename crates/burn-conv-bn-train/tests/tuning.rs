//! What the `mnist` binary says of autotuning, on WebGPU: a software driver will do.
//!
//! `cargo xtask test --only gpu --tuned`.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use burn_conv_bn_train::data::OFFLINE;

const ARGUMENTS: &str = "train --dataset synthetic --device webgpu --train-limit 2 --test-limit 2 \
                         --batch-size 2 --epochs 1 --plain --artifacts run";

/// The first step tunes for minutes on a software driver: the first count ends the run.
#[test]
fn tuned_kernels_are_counted() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_mnist"))
        .args(ARGUMENTS.split_whitespace())
        .current_dir(&folder)
        .env(OFFLINE, "1")
        // The killed process leaves its temporary folder here.
        .env("TMPDIR", folder.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = BufReader::new(child.stderr.take().unwrap());
    let mut said = Vec::new();
    let count = stderr.lines().map_while(Result::ok).find_map(|line| {
        let count = line
            .strip_prefix("Tuning: ")
            .and_then(|rest| rest.strip_suffix(" kernels so far"))
            .and_then(|count| count.parse::<usize>().ok());
        said.push(line);
        count
    });
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(count.is_some_and(|count| count > 0), "{said:?}");
}
