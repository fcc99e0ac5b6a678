//! Tasks of the workspace, run as `cargo xtask <task>`.

// They panic where nobody reads them: `say!` and `note!` do not.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod bench;
mod check;
mod gpu;
mod interrupt;
mod programs;
mod say;
mod soak;
mod test;
mod torchvision;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::say::note;

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
    /// Check format, lints, documentation, and the length and the imports of source files.
    ///
    /// Every step runs, also after another failed; the last line names those that failed.
    Check(check::Check),
    /// Run the tests of the whole workspace in the release profile.
    ///
    /// In a debug build Burn is too slow to train with, and the release profile shares its build
    /// with `cargo run --release`. The tests of GPU kernels run where a Vulkan driver is found, a
    /// software one included, in a build of their own. What this machine cannot run is named, with
    /// the reason, before and after the tests.
    Test(test::Test),
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

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Bench(args) => bench::bench(&args),
        Task::Check(args) => check::check(&args),
        Task::Test(args) => test::test(args),
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
