//! The command line with its files.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Result, bail};
use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches};

use super::args::{Cli, Subcommands, Train};
use super::config::{self, Layers};
use crate::persist::checkpoint;
use crate::persist::run_file::{Options, RUN_FILE, RunFile};
use crate::print::{PrintError, say};
use crate::run::job::{RecomputePolicy, Variant};

/// Time limit without a command, in minutes.
const DEFAULT_TIME_LIMIT: f64 = 8.0;

/// A command, with what files add to it: its configuration, and the run that it resumes.
pub(super) struct Invocation {
    pub(super) command: Subcommands,
    /// All options of the command with their values.
    pub(super) options: Options,
    /// The run to be resumed.
    pub(super) stored: Option<RunFile>,
}

impl Invocation {
    /// Reads a command line and its files. Ends the process if the command line alone is wrong, or asks
    /// for help.
    pub(super) fn read(mut arguments: Vec<OsString>) -> Result<Self> {
        let bare = is_bare(&arguments);
        if bare {
            arguments.insert(arguments.len().min(1), "compare".into());
        }
        let matches = match Cli::command().try_get_matches_from(arguments) {
            Ok(matches) => matches,
            Err(error) => {
                error.print().map_err(PrintError::from)?;
                std::process::exit(error.exit_code());
            }
        };
        let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
        let mut command = cli.command;
        if let (true, Subcommands::Compare(args)) = (bare, &mut command) {
            args.options.time_limit.get_or_insert(DEFAULT_TIME_LIMIT);
        }
        let mut layers = Layers::new(&command, matches.subcommand().map(|(_, given)| given))?;
        if let Err(error) = layers.check() {
            Cli::command()
                .error(ErrorKind::ValueValidation, error)
                .exit();
        }
        let on_line = layers.given.clone();
        if let Some(path) = cli.config.config {
            command = layers.add(&config::read(&path)?, &path.display().to_string())?;
        }
        if layers.options.get("dataset") == Some(&"synthetic".into()) && layers.is_given("data-dir")
        {
            bail!("--dataset synthetic draws its digits, and reads none from --data-dir");
        }
        let mut stored = None;
        if let Subcommands::Train(Train { folder, .. }) = &command
            && folder.resume
            && let Some(file) = stored_run(&folder.path)?
        {
            let origin = folder.path.join(RUN_FILE).display().to_string();
            command = layers.add(&file.options, &origin)?;
            stored = Some(file);
        }
        if let Subcommands::Train(args) = &command {
            check_variant(args, |option| on_line.contains(option))?;
        }
        command.complete();
        let options = config::effective(&command)?;
        if cli.config.print_config {
            say!("{}", config::to_toml(&options).trim_end())?;
            std::process::exit(0);
        }
        Ok(Self {
            command,
            options,
            stored,
        })
    }
}

/// Refuses options of fused blocks where there are none, or where the variant decides. Files may have the default, which
/// `--print-config` prints.
fn check_variant(args: &Train, on_line: impl Fn(&str) -> bool) -> Result<()> {
    let recompute = args.setup.recompute != RecomputePolicy::Conv;
    let max_workspace = args.setup.max_workspace.is_some();
    for (option, is_set) in [("recompute", recompute), ("max-workspace", max_workspace)] {
        let reason = match (args.variant, option) {
            (Variant::Unfused, _) => "an option of fused blocks, and --variant unfused has none",
            (Variant::NormConv, "recompute") => "decided by --variant norm-conv",
            _ => continue,
        };
        if is_set || on_line(option) {
            bail!("--{option} is {reason}");
        }
    }
    Ok(())
}

/// Whether a command line has no command, but options of `compare` or nothing.
pub(super) fn is_bare(arguments: &[OsString]) -> bool {
    const OWN: [&str; 4] = ["-h", "--help", "-V", "--version"];

    arguments.get(1).is_none_or(|first| {
        first.as_encoded_bytes().starts_with(b"-") && OWN.iter().all(|own| first != own)
    })
}

/// Options and data of the run in a folder. None if there is no run.
fn stored_run(directory: &Path) -> Result<Option<RunFile>> {
    if checkpoint::folder(directory).exists() {
        RunFile::read(directory).map(Some)
    } else {
        RunFile::find(directory)
    }
}
