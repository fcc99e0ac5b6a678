//! `cargo xtask check`: format, lints, documentation, layout and packages.

mod circles;
mod length;
mod source;

use std::path::Path;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use crate::gpu::{self, Fusion};
use crate::say::say;
use crate::workspace::{cargo, root, succeeds};

/// The packages that are held to `circles` and `length`, by their folders.
const HELD: &[&str] = &[
    "crates/burn-conv-bn",
    "crates/burn-conv-bn-bench",
    "crates/burn-conv-bn-bench-worker",
    "crates/burn-conv-bn-cpu",
    "crates/burn-conv-bn-cubecl",
    "crates/burn-conv-bn-files",
    "crates/burn-conv-bn-gpu-tests",
    "crates/burn-conv-bn-memory",
    "crates/burn-conv-bn-models",
    "crates/burn-conv-bn-train",
    "examples/add-layer",
    "examples/borrowed",
    "examples/convert-model",
    "examples/data-parallel",
    "examples/fine-tune",
    "examples/fold",
    "examples/pretrained",
    "examples/segment",
    "examples/stripes",
    "xtask",
];

/// The packages that are published: the libraries.
const PUBLISHED: [&str; 7] = [
    "burn-conv-bn",
    "burn-conv-bn-cpu",
    "burn-conv-bn-cubecl",
    "burn-conv-bn-files",
    "burn-conv-bn-memory",
    "burn-conv-bn-models",
    "burn-conv-bn-train",
];

#[derive(Args, Debug)]
pub struct Check {
    /// Leave a step out; may be given several times.
    #[arg(long, value_enum, value_name = "STEP")]
    skip: Vec<Step>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Step {
    /// `cargo fmt --all --check`.
    Fmt,
    /// Source files of a package that import each other in a circle.
    Circles,
    /// Source files above 600 lines, and functions above 80 without a comment `// Long: <reason>`.
    Length,
    /// `cargo clippy`, where a warning is an error.
    Clippy,
    /// `cargo clippy` of what a GPU runs, in the build of its tests.
    GpuClippy,
    /// `cargo package` of what is published, without a build of the packages.
    Package,
    /// `cargo doc`, where a warning is an error.
    Docs,
    /// `cargo doc` of what a GPU runs.
    GpuDocs,
    /// `cargo check` of what ROCm, Metal and Vulkan run, which takes a build of its own.
    GpuOthers,
}

impl Step {
    const ALL: [Self; 9] = [
        Self::Fmt,
        Self::Circles,
        Self::Length,
        Self::Clippy,
        Self::GpuClippy,
        Self::Package,
        Self::Docs,
        Self::GpuDocs,
        Self::GpuOthers,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Fmt => "fmt",
            Self::Circles => "circles",
            Self::Length => "length",
            Self::Clippy => "clippy",
            Self::GpuClippy => "gpu-clippy",
            Self::Package => "package",
            Self::Docs => "docs",
            Self::GpuDocs => "gpu-docs",
            Self::GpuOthers => "gpu-others",
        }
    }

    /// Runs the step, and says whether it passed.
    fn passes(self) -> Result<bool> {
        let command = match self {
            Self::Circles => return holds(circles::circles),
            Self::Length => return holds(length::lengths),
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
            Self::Package => {
                let mut command = cargo(&["package", "--no-verify", "--allow-dirty"]);
                command.args(PUBLISHED.iter().flat_map(|name| ["-p", *name]));
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
        };
        succeeds(command)
    }
}

/// Whether nothing is found in the packages that are held to it. Prints what is.
fn holds(find: impl Fn(&Path) -> Result<Vec<String>>) -> Result<bool> {
    let mut is_clean = true;
    for package in HELD {
        for line in find(&root().join(package))? {
            say!("{package}/{line}")?;
            is_clean = false;
        }
    }
    Ok(is_clean)
}

/// Runs every step that is not skipped.
pub fn check(args: &Check) -> Result<()> {
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
        if !step.passes()? {
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
