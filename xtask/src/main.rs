//! Tasks of the workspace, run as `cargo xtask <task>`.

// They panic where nobody reads them: `say!` and `note!` do not.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod bench;
mod gpu;
mod interrupt;
mod programs;
mod sanitize;
mod say;
mod soak;
mod torchvision;

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use burn_conv_bn_bench::device::{DEVICES, FLEX, WEBGPU};
use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::gpu::Fusion;
use crate::programs::Count;
use crate::say::{note, say};

/// Names the folder with the real MNIST that tests read.
const MNIST: &str = "BURN_CONV_BN_MNIST";

/// Where tests look without that variable, from the workspace's root.
const MNIST_BESIDE: &str = "../shared/mnist";

/// Tasks of this workspace. Nothing but cargo and the pinned toolchain is needed.
#[derive(Parser, Debug)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand, Debug)]
enum Task {
    /// Compare the fused layer with Burn's own layers and with PyTorch: time and memory.
    ///
    /// Every result is checked against that of Burn's own layers before it is timed; a wrong one is
    /// marked, and makes the exit status non-zero. Tables go to standard output, progress to
    /// standard error. All contenders inherit the environment, as it may hold settings of the
    /// allocator.
    Bench(bench::Bench),
    /// Check format, lints and documentation.
    ///
    /// Every step runs, also after another failed; the last line names those that failed.
    Check(Check),
    /// Run the tests of the whole workspace in the release profile.
    ///
    /// In a debug build Burn is too slow to train with, and the release profile shares its build
    /// with `cargo run --release`. The tests of GPU kernels run where a Vulkan driver is found, a
    /// software one included, in a build of their own. What this machine cannot run is named, with
    /// the reason, before and after the tests.
    Test(Test),
    /// Run the tests of the CPU kernels under AddressSanitizer, without and with AVX-512.
    ///
    /// The last lines say what was covered.
    Sanitize,
    /// Run the tests that draw their cases, again and again with fresh seeds, until the time is over.
    ///
    /// Property tests, numerical stress, training that is killed, damaged data files, threads,
    /// leaks and convergence, all without a GPU. At the end a list says which seeds each program ran
    /// with, and which command repeats a failure.
    Soak(soak::Soak),
    /// Compare the networks with torchvision's: weights, logits, loss, every gradient and 30 steps.
    ///
    /// In f64, and in f32 next to how far PyTorch's own f32 is from its f64. Needs a python with
    /// torch, torchvision and safetensors, which writes 1.8 GB of weights and what PyTorch computes
    /// with them to `target/torchvision`. `cargo xtask test` finds them there too from then on.
    Torchvision(torchvision::Torchvision),
    /// Build the GPU tests and benchmarks for CUDA and pack them for a machine without a toolchain.
    GpuBundle(gpu::Bundle),
}

#[derive(Args, Debug)]
struct Check {
    /// Leave a step out; may be given several times.
    #[arg(long, value_enum, value_name = "STEP")]
    skip: Vec<Step>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Step {
    /// `cargo fmt --all --check`.
    Fmt,
    /// `cargo clippy`, where a warning is an error.
    Clippy,
    /// `cargo clippy` of what a GPU runs, in the build of its tests.
    GpuClippy,
    /// `cargo doc`, where a warning is an error.
    Docs,
    /// `cargo doc` of what a GPU runs.
    GpuDocs,
    /// `cargo check` of what ROCm, Metal and Vulkan run, which takes a build of its own.
    GpuOthers,
}

#[derive(Args, Debug)]
struct Test {
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
enum Half {
    /// What needs no GPU.
    Host,
    /// What runs on a GPU.
    Gpu,
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Bench(args) => bench::bench(&args),
        Task::Check(args) => check(&args),
        Task::Test(args) => test(args),
        Task::Sanitize => sanitize::sanitize(),
        Task::Soak(args) => soak::soak(&args),
        Task::Torchvision(args) => torchvision::torchvision(&args),
        Task::GpuBundle(args) => gpu::bundle(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !say::is_closed_pipe(&error) {
                note!("error: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}

impl Step {
    const ALL: [Self; 6] = [
        Self::Fmt,
        Self::Clippy,
        Self::GpuClippy,
        Self::Docs,
        Self::GpuDocs,
        Self::GpuOthers,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Fmt => "fmt",
            Self::Clippy => "clippy",
            Self::GpuClippy => "gpu-clippy",
            Self::Docs => "docs",
            Self::GpuDocs => "gpu-docs",
            Self::GpuOthers => "gpu-others",
        }
    }

    fn command(self) -> Command {
        match self {
            Self::Fmt => cargo(&["fmt", "--all", "--check"]),
            Self::Clippy => {
                let mut command = cargo(&["clippy", "--release", "--all-targets"]);
                command.args(gpu::WITHOUT).args(["--", "-D", "warnings"]);
                command
            }
            Self::GpuClippy => {
                let mut command = cargo(&["clippy", "--all-targets"]);
                command.args(gpu::webgpu(Fusion::On));
                command.args(["--", "-D", "warnings"]);
                command
            }
            Self::Docs => {
                let mut command = cargo(&["doc", "--no-deps", "--release"]);
                command.args(gpu::WITHOUT);
                command.env("RUSTDOCFLAGS", "-D warnings");
                command
            }
            Self::GpuDocs => {
                let mut command = cargo(&["doc", "--no-deps"]);
                command.args(gpu::webgpu(Fusion::On));
                command.env("RUSTDOCFLAGS", "-D warnings");
                command
            }
            Self::GpuOthers => gpu::other_runtimes(),
        }
    }
}

fn check(args: &Check) -> Result<()> {
    if Step::ALL.iter().all(|step| args.skip.contains(step)) {
        bail!("nothing was checked: every step is skipped");
    }
    let mut failed = Vec::new();
    let mut skipped = Vec::new();
    for step in Step::ALL {
        if args.skip.contains(&step) {
            skipped.push(step.name());
            continue;
        }
        say!("== check: {} ==", step.name())?;
        if !succeeds(step.command())? {
            failed.push(step.name());
        }
    }
    if !skipped.is_empty() {
        say!("check: skipped as asked: {}", skipped.join(", "))?;
    }
    if !failed.is_empty() {
        bail!("check failed: {}", failed.join(", "));
    }
    say!("check: passed")
}

/// Tests that this run leaves out.
struct Skip {
    what: &'static str,
    why: String,
}

fn test(args: Test) -> Result<()> {
    if args.only == Some(Half::Host) && (args.without_fusion || args.runtime != WEBGPU) {
        bail!(
            "--without-fusion and --runtime are for the tests of the GPU kernels, which --only host \
             leaves out"
        );
    }
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
            Err(why) => skips.push(Skip { what, why }),
        }
    }
    let fusion = match args.without_fusion {
        true => Fusion::Off,
        false => Fusion::On,
    };
    let mut commands = Vec::new();
    if args.only != Some(Half::Gpu) {
        commands.push((command, None));
    }
    match gpu::unavailable(&args.runtime) {
        _ if args.only == Some(Half::Host) => {}
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
        Err(why) => skips.push(Skip {
            what: "GPU kernels",
            why,
        }),
    }

    for skip in &skips {
        say!("Will be skipped: {} ({})", skip.what, skip.why)?;
    }
    let names = match skips.is_empty() {
        true => "nothing".to_string(),
        false => skips
            .iter()
            .map(|skip| skip.what)
            .collect::<Vec<_>>()
            .join(", "),
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

/// The python to run: the one that was named, the environment's, or the system's.
fn python(named: Option<PathBuf>) -> PathBuf {
    let named = named.or_else(|| env::var_os("PYTHON").map(PathBuf::from));
    named.unwrap_or_else(|| PathBuf::from("python3"))
}

/// The workspace's root.
fn root() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// The cargo that runs this, in the workspace's root.
fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root());
    command
}

/// Prints the command as one types it.
fn show(command: &Command) -> Result<()> {
    let program = Path::new(command.get_program());
    let program = program.file_name().unwrap_or(program.as_os_str());
    let args: Vec<_> = command
        .get_args()
        .map(|arg| arg.to_string_lossy())
        .collect();
    say!("$ {} {}", program.to_string_lossy(), args.join(" "))
}

/// Shows the command, runs it, and says whether it succeeded.
fn succeeds(mut command: Command) -> Result<bool> {
    show(&command)?;
    let status = command
        .status()
        .with_context(|| format!("cannot start {:?}", command.get_program()))?;
    Ok(status.success())
}
