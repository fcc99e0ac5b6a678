//! `cargo xtask check`: format, lints, documentation, layout and packages.

mod circles;
mod length;
mod source;

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use crate::gpu::{self, Fusion};
use crate::say::say;
use crate::workspace::{cargo, root, succeeds};

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
    fn name(self) -> String {
        let value = self.to_possible_value().expect("no step is hidden");
        value.get_name().to_string()
    }

    fn passes(self) -> Result<bool> {
        let command = match self {
            Self::Circles => return holds(circles::circles),
            Self::Length => return holds(length::lengths),
            Self::Fmt => cargo(&["fmt", "--all", "--check"]),
            Self::Clippy => warning_free(&["clippy", "--release", "--all-targets"], &gpu::WITHOUT),
            Self::GpuClippy => warning_free(&["clippy", "--all-targets"], &gpu::webgpu(Fusion::On)),
            Self::Docs => warning_free(&["doc", "--no-deps", "--release"], &gpu::WITHOUT),
            Self::GpuDocs => warning_free(&["doc", "--no-deps"], &gpu::webgpu(Fusion::On)),
            Self::Package => {
                let mut command = cargo(&["package", "--no-verify", "--allow-dirty"]);
                command.args(PUBLISHED.iter().flat_map(|name| ["-p", *name]));
                command
            }
            Self::GpuOthers => gpu::other_runtimes(),
        };
        succeeds(command)
    }
}

/// A command of cargo to which a warning is an error.
fn warning_free(subcommand: &[&str], build: &[&str]) -> Command {
    let mut command = cargo(subcommand);
    command.args(build);
    if subcommand[0] == "clippy" {
        command.args(["--", "-D", "warnings"]);
    } else {
        command.env("RUSTDOCFLAGS", "-D warnings");
    }
    command
}

/// Whether nothing is found in any package of the workspace. Prints what is.
fn holds(find: impl Fn(&Path) -> Result<Vec<String>>) -> Result<bool> {
    let mut packages = vec![root().join("xtask")];
    for folder in ["crates", "examples"] {
        let entries = fs::read_dir(root().join(folder));
        for package in entries.with_context(|| format!("cannot read {folder}"))? {
            packages.push(package?.path());
        }
    }
    packages.retain(|package| package.join("Cargo.toml").is_file());
    packages.sort();
    let mut is_clean = true;
    for package in packages {
        for line in find(&package)? {
            say!("{}/{line}", package.strip_prefix(root())?.display())?;
            is_clean = false;
        }
    }
    Ok(is_clean)
}

pub fn check(args: &Check) -> Result<()> {
    let steps = Step::value_variants();
    if steps.iter().all(|step| args.skip.contains(step)) {
        bail!("nothing was checked: every step is skipped");
    }
    let mut failed = Vec::new();
    let mut skipped = Vec::new();
    for step in steps {
        if args.skip.contains(step) {
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
