//! `cargo xtask test`: the tests of the whole workspace.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};
use burn_conv_bn_bench::device::{DEVICES, FLEX, WEBGPU};
use clap::builder::PossibleValuesParser;
use clap::{Args, ValueEnum};

use crate::gpu::{self, Fusion};
use crate::programs::{self, Count};
use crate::say::say;
use crate::torchvision;
use crate::workspace::{cargo, root};

/// Names the folder with the real MNIST that tests read.
const MNIST: &str = "BURN_CONV_BN_MNIST";

/// Where tests look without that variable, from the workspace's root.
const MNIST_BESIDE: &str = "../shared/mnist";

#[derive(Args, Debug)]
pub struct Test {
    /// Fail if this machine skips some of the tests: before they are built where that is known, or
    /// when a GPU turns out to lack what a test needs.
    #[arg(long)]
    strict: bool,
    /// Run one half: the tests that need no GPU, or those of the GPU kernels, which take a build of
    /// their own.
    #[arg(long, value_enum, value_name = "HALF")]
    only: Option<Half>,
    /// Build the tests of the GPU kernels without Burn's fusion, which takes minutes more the first
    /// time.
    #[arg(long)]
    without_fusion: bool,
    /// Of the tests of the GPU kernels, run those with autotuning, on WebGPU: a build and minutes of tuning of
    /// their own.
    #[arg(long, conflicts_with = "runtime")]
    tuned: bool,
    /// What the GPU kernels run on, by the name of Burn's feature. Another one than WebGPU takes a build
    /// of its own, and leaves out the tests that are for WebGPU alone.
    #[arg(
        long,
        value_name = "NAME",
        default_value = WEBGPU,
        value_parser = PossibleValuesParser::new(DEVICES.into_iter().filter(|name| *name != FLEX))
    )]
    runtime: String,
    /// Passed on to `cargo test`, as in `cargo xtask test --test it` or, to choose tests by name,
    /// `cargo xtask test running`.
    #[arg(value_name = "CARGO-TEST-ARGS", allow_hyphen_values = true)]
    cargo_args: Vec<OsString>,
    /// Passed on to the test programs, after `--`.
    #[arg(value_name = "TEST-ARGS", last = true)]
    test_args: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Half {
    /// What needs no GPU.
    Host,
    /// What runs on a GPU.
    Gpu,
}

/// Tests that this run leaves out, and why.
type Skip = (&'static str, String);

/// Runs the tests, and names what this machine cannot run.
pub fn test(args: Test) -> Result<()> {
    let names_kernels = args.without_fusion || args.tuned || args.runtime != WEBGPU;
    if args.only == Some(Half::Host) && names_kernels {
        bail!(
            "--without-fusion, --tuned and --runtime are for the tests of the GPU kernels, which --only \
             host leaves out"
        );
    }
    let (commands, skips) = plan(&args);
    for (what, why) in &skips {
        say!("Will be skipped: {what} ({why})")?;
    }
    let names = if skips.is_empty() {
        "nothing".to_string()
    } else {
        let names: Vec<_> = skips.iter().map(|(what, _)| *what).collect();
        names.join(", ")
    };
    if args.strict && !skips.is_empty() {
        bail!("--strict, and this machine would skip: {names}");
    }

    let mut passed = true;
    let mut count = Count::default();
    for (mut command, filter) in commands {
        command.args(&args.cargo_args);
        if filter.is_some() || !args.test_args.is_empty() {
            command.arg("--").args(filter).args(&args.test_args);
        }
        let (succeeded, tests) = programs::test(command)?;
        passed &= succeeded;
        count += tests;
    }
    if !passed {
        bail!("test failed; skipped: {names}");
    }
    if count.passed == 0 {
        bail!("no test ran: none that was asked for is there; skipped: {names}");
    }
    say!("test: {} tests passed; skipped: {names}", count.passed)
}

/// A command of cargo, and what its test programs are given to choose tests.
type Tests = (Command, Option<String>);

/// The tests that this machine can run, and the others.
fn plan(args: &Test) -> (Vec<Tests>, Vec<Skip>) {
    let mut skips = Vec::new();
    let mut command = cargo(&["test", "--release"]);
    command.args(gpu::WITHOUT);
    for (variable, beside, what) in [
        (MNIST, MNIST_BESIDE, "tests on the real MNIST"),
        (
            torchvision::FILES,
            torchvision::FOLDER,
            "comparison with torchvision",
        ),
    ] {
        match folder(variable, beside) {
            Ok(dir) => {
                // Tests run in the folders of their packages, where a relative path is another
                // place.
                command.env(variable, dir);
            }
            Err(_) if args.only == Some(Half::Gpu) => {}
            Err(why) => skips.push((what, why)),
        }
    }
    let fusion = if args.without_fusion {
        Fusion::Off
    } else {
        Fusion::On
    };
    let mut commands = Vec::new();
    if args.only != Some(Half::Gpu) {
        commands.push((command, None));
    }
    match gpu::unavailable(&args.runtime) {
        _ if args.only == Some(Half::Host) => {}
        Ok(()) if args.tuned => commands.push((gpu::tuned_tests(args.strict, fusion), None)),
        Ok(()) if args.runtime != WEBGPU => {
            let tests = gpu::tests_on(&args.runtime, args.strict, fusion);
            commands.extend(tests.map(|(command, filter)| (command, Some(filter))));
        }
        Ok(()) => {
            commands.push((gpu::tests(args.strict, fusion), None));
            // Cargo runs no examples beside chosen targets.
            if args.cargo_args.iter().all(|arg| arg == "--no-fail-fast") {
                commands.push((gpu::doc_tests(fusion), None));
            }
        }
        Err(why) => skips.push(("GPU kernels", why)),
    }
    (commands, skips)
}

/// The folder that a variable names, or without it the one at `beside` from the workspace's root;
/// or why there is none.
fn folder(variable: &str, beside: &str) -> Result<PathBuf, String> {
    let (dir, why) = match env::var_os(variable) {
        Some(dir) => {
            let why = format!("{variable} is {dir:?}, which is not a folder");
            (PathBuf::from(dir), why)
        }
        None => {
            let why = format!("needs a folder named by {variable}, or {beside}");
            (root().join(beside), why)
        }
    };
    let found = dir.canonicalize().ok().filter(|dir| dir.is_dir());
    found.ok_or(why)
}
