//! The comparison with torchvision's networks.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::gpu;
use crate::workspace::{cargo, python, root, succeeds};

/// Names the folder with the files that the tests read.
pub const FILES: &str = "BURN_CONV_BN_TORCHVISION";

/// Where the files are written, from the workspace's root.
pub const FOLDER: &str = "target/torchvision";

#[derive(Args, Debug)]
pub struct Torchvision {
    /// The python that has torch, torchvision and safetensors [default: $PYTHON, else python3].
    #[arg(long, value_name = "PROGRAM")]
    python: Option<PathBuf>,
}

/// Lets PyTorch write what it computes, and runs the tests that compare with it.
pub fn torchvision(args: &Torchvision) -> Result<()> {
    // A script that stops halfway must leave nothing that tests would take for the whole.
    let folder = root().join(FOLDER);
    let target = root().join("target");
    fs::create_dir_all(&target).with_context(|| format!("cannot create {}", target.display()))?;
    let unfinished = tempfile::tempdir_in(target).context("cannot create a folder in target")?;
    let python = python(args.python.clone());
    let status = Command::new(&python)
        .arg("scripts/pytorch_models.py")
        .arg("--out")
        .arg(unfinished.path())
        .current_dir(root())
        .status()
        .with_context(|| format!("cannot run {}", python.display()))?;
    if !status.success() {
        bail!("the script failed; it needs torch, torchvision and safetensors");
    }
    if folder.exists() {
        fs::remove_dir_all(&folder)
            .with_context(|| format!("cannot replace {}", folder.display()))?;
    }
    fs::rename(unfinished.keep(), &folder)
        .with_context(|| format!("cannot move the files to {}", folder.display()))?;

    let mut command = cargo(&["test", "--release"]);
    command.args(gpu::WITHOUT);
    command.args(["--test", "torchvision", "--", "--nocapture"]);
    command.env(FILES, folder);
    if !succeeds(command)? {
        bail!("the networks differ from torchvision's");
    }
    Ok(())
}
