//! The `mnist` binary on a CubeCL device, on few digits.
//!
//! Runs on WebGPU: a software driver will do.

use std::fs;
use std::process::{Command, Output, Stdio};

use burn_conv_bn_train::data::OFFLINE;
use burn_conv_bn_train::report::Report;
use tempfile::{TempDir, tempdir};

const JOB: &str = "--dataset synthetic --device webgpu --train-limit 4";

fn mnist(folder: &TempDir, arguments: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mnist"))
        .args(arguments.split_whitespace())
        .current_dir(folder)
        .env(OFFLINE, "1")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[track_caller]
fn printed(output: Output) -> String {
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stdout}\n{stderr}");
    stdout
}

/// The fused network's losses are those of Burn's own layers, from the same weights and batches.
#[test]
fn fused_and_unfused_train_alike() {
    let folder = tempdir().unwrap();
    let text = printed(mnist(
        &folder,
        &format!("parity {JOB} --batch-size 2 --steps 2"),
    ));
    println!("{text}");
}

/// What the device's pool says: the fused network holds less at the end of forward, and at most.
#[test]
fn memory_is_that_of_the_device() {
    let folder = tempdir().unwrap();
    let text = printed(mnist(
        &folder,
        &format!("compare {JOB} --test-limit 4 --batch-size 4 --json report.json"),
    ));
    println!("{text}");
    let report = fs::read(folder.path().join("report.json")).unwrap();
    let report: Report = serde_json::from_slice(&report).unwrap();
    assert!(
        report.device.to_lowercase().contains("gpu"),
        "{}",
        report.device
    );
    let [fused, unfused, _] = report.variants.as_slice() else {
        panic!("expected three variants, got {}", report.variants.len());
    };
    // Of 4 digits, in f32. The fused form keeps the first block's output, the pooled one, and a byte of argmax for each of
    // its values; the second block's output, larger than these together, is kept by the unfused form alone.
    let first = 4 * 4 * 32 * 26 * 26;
    let pooled = (4 + 1) * 4 * 64 * 12 * 12;
    let second = 4 * 4 * 64 * 24 * 24;
    assert!(fused.forward_end_bytes >= first + pooled, "{text}");
    assert!(fused.forward_end_bytes < second, "{text}");
    assert!(unfused.forward_end_bytes > first + second, "{text}");
    assert!(fused.peak_bytes < unfused.peak_bytes, "{text}");
}

/// Shaders have no bf16. What the device lacks is refused before anything is trained.
#[test]
fn a_type_that_the_device_lacks_is_refused() {
    let folder = tempdir().unwrap();
    let arguments = format!(
        "train {JOB} --test-limit 16 --batch-size 8 --plain --artifacts run --precision bf16"
    );
    let output = mnist(&folder, &arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    for part in ["\"webgpu\"", "does not compute in bf16", "--precision f32"] {
        assert!(stderr.contains(part), "no {part:?} in {stderr}");
    }
    assert!(!folder.path().join("run").exists());
}
