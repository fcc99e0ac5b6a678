//! The workspace, its cargo, and commands.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::say::say;

/// The python to run: the one that was named, the environment's, or the system's.
pub fn python(named: Option<PathBuf>) -> PathBuf {
    let named = named.or_else(|| env::var_os("PYTHON").map(PathBuf::from));
    named.unwrap_or_else(|| PathBuf::from("python3"))
}

/// The workspace's root.
pub fn root() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// The cargo that runs this, in the workspace's root.
pub fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root());
    command
}

/// Prints a command.
pub fn show(command: &Command) -> Result<()> {
    say!("$ {}", typed(command))
}

/// The command as one types it.
pub fn typed(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let program = program.file_name().unwrap_or(program.as_os_str());
    let args: Vec<_> = command
        .get_args()
        .map(|arg| arg.to_string_lossy())
        .collect();
    format!("{} {}", program.to_string_lossy(), args.join(" "))
}

/// Shows the command, runs it, and says whether it succeeded.
pub fn succeeds(mut command: Command) -> Result<bool> {
    show(&command)?;
    let status = command
        .status()
        .with_context(|| format!("cannot start {:?}", command.get_program()))?;
    Ok(status.success())
}
