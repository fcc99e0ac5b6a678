//! Options as files: configurations that people write, and what a run was started with.

use std::any::TypeId;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::data::{Digits, MnistData};

/// Options of a subcommand with their values, by their long names.
///
/// [`read`] has an example.
pub type Options = BTreeMap<String, Value>;

/// Options that are about the command line itself.
const UNCONFIGURABLE: [&str; 4] = ["config", "help", "print-config", "version"];

/// Why a configuration cannot be used.
///
/// [`read`] has an example.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system reported.
        source: io::Error,
    },
    /// The file is neither TOML nor, if its name ends in `.json`, JSON.
    #[error("{} is not valid {language}: {reason}", .path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// `"TOML"` or `"JSON"`.
        language: &'static str,
        /// What is wrong with it, and where.
        reason: String,
    },
    /// There are keys that are no options.
    #[error("{origin} has what `mnist {subcommand}` does not: {unknown}; it has {allowed}")]
    Unknown {
        /// Where the options come from.
        origin: String,
        /// The subcommand.
        subcommand: String,
        /// The keys.
        unknown: String,
        /// All options of the subcommand.
        allowed: String,
    },
    /// An option has a value of a kind that no option has, or that this one has not.
    #[error("{origin} sets {option} to {value}, which should be {wanted}")]
    Kind {
        /// Where the options come from.
        origin: String,
        /// The option.
        option: String,
        /// Its value.
        value: Value,
        /// What would have been right.
        wanted: &'static str,
    },
    /// An option's value was refused.
    #[error("{origin} cannot be used: {reason}")]
    Refused {
        /// Where the options come from.
        origin: String,
        /// Why.
        reason: String,
    },
    /// An option's value is not text that a file could hold.
    #[error("the value of --{option} is not UTF-8, and cannot be written to a file")]
    NotText {
        /// The option.
        option: String,
    },
}

/// Reads a configuration: JSON if the file's name ends in `.json`, otherwise TOML.
///
/// # Errors
///
/// [`ConfigError::Io`] or [`ConfigError::Syntax`].
///
/// # Examples
///
/// ```
/// use burn_conv_bn_train::config::{ConfigError, read};
///
/// let file = tempfile::NamedTempFile::new()?;
/// std::fs::write(file.path(), "model = 'resnet18'\nbatch-size = 256\n")?;
/// let options = read(file.path())?;
/// assert_eq!(options["model"], "resnet18");
/// assert_eq!(options["batch-size"], 256);
///
/// std::fs::write(file.path(), "batch-size =\n")?;
/// assert!(matches!(
///     read(file.path()),
///     Err(ConfigError::Syntax { language: "TOML", .. })
/// ));
/// # Ok::<(), anyhow::Error>(())
/// ```
pub fn read(path: &Path) -> Result<Options, ConfigError> {
    let text = fs::read_to_string(path).map_err(|source| ConfigError::Io {
        path: path.to_path_buf(),
        source,
    })?;
    let json = path
        .extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
    let (language, parsed) = match json {
        true => (
            "JSON",
            serde_json::from_str(&text).map_err(|error| error.to_string()),
        ),
        false => ("TOML", from_toml(&text)),
    };
    parsed.map_err(|reason| ConfigError::Syntax {
        path: path.to_path_buf(),
        language,
        reason,
    })
}

fn from_toml(text: &str) -> Result<Options, String> {
    toml::from_str(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start);
        let before = text.get(..start).unwrap_or(text);
        let line = before.matches('\n').count() + 1;
        format!("{} (line {line})", error.message().replace('\n', ", "))
    })
}

/// As text that [`read`] reads: TOML.
///
/// ```
/// use burn_conv_bn_train::config::{Options, to_toml};
/// use serde_json::json;
///
/// let options = Options::from([
///     ("lr".to_string(), json!(0.5)),
///     ("norm".to_string(), json!("burn")),
/// ]);
/// assert_eq!(to_toml(&options), "lr = 0.5\nnorm = \"burn\"\n");
/// ```
pub fn to_toml(options: &Options) -> String {
    let mut table = toml::Table::new();
    for (option, value) in options {
        let value = match value {
            Value::Bool(value) => toml::Value::Boolean(*value),
            Value::Number(number) => match (number.as_i64(), number.as_f64()) {
                (Some(integer), _) => toml::Value::Integer(integer),
                // An integer that is too large for TOML.
                (None, _) if number.is_u64() => toml::Value::String(number.to_string()),
                (None, float) => toml::Value::Float(float.unwrap_or(f64::NAN)),
            },
            Value::String(text) => toml::Value::String(text.clone()),
            other => toml::Value::String(other.to_string()),
        };
        table.insert(option.clone(), value);
    }
    table.to_string()
}

/// The options that files may set.
fn configurable(command: &Command) -> impl Iterator<Item = (&str, &Arg)> {
    command
        .get_arguments()
        .filter_map(|arg| Some((arg.get_long()?, arg)))
        .filter(|(option, _)| !UNCONFIGURABLE.contains(option))
}

/// What has to go before the arguments of a subcommand, so that it has `options` where nothing
/// else is given: an option is left out if it is on the command line, or another one with which it
/// cannot be.
///
/// # Errors
///
/// [`ConfigError::Unknown`] or [`ConfigError::Kind`], with `origin` for where the options come
/// from.
pub(crate) fn arguments(
    options: &Options,
    origin: &str,
    command: &Command,
    given: &ArgMatches,
) -> Result<Vec<OsString>, ConfigError> {
    let known: BTreeMap<&str, &Arg> = configurable(command).collect();
    let unknown: Vec<&str> = options
        .keys()
        .map(String::as_str)
        .filter(|option| !known.contains_key(option))
        .collect();
    if !unknown.is_empty() {
        let allowed: Vec<&str> = known.into_keys().collect();
        return Err(ConfigError::Unknown {
            origin: origin.to_string(),
            subcommand: command.get_name().to_string(),
            unknown: unknown.join(", "),
            allowed: allowed.join(", "),
        });
    }

    let on_command_line = |arg: &Arg| {
        let source = given.value_source(arg.get_id().as_str());
        source == Some(ValueSource::CommandLine)
    };
    let given: Vec<&Arg> = known
        .values()
        .copied()
        .filter(|arg| on_command_line(arg))
        .collect();
    let excluded = |arg: &Arg| {
        given.iter().any(|given| {
            let conflicts = |a: &Arg, b: &Arg| {
                let conflicts = command.get_arg_conflicts_with(a);
                conflicts.iter().any(|c| c.get_id() == b.get_id())
            };
            given.get_id() == arg.get_id() || conflicts(given, arg) || conflicts(arg, given)
        })
    };
    let mut arguments: Vec<OsString> = Vec::new();
    for (option, value) in options {
        let arg = known[option.as_str()];
        if excluded(arg) {
            continue;
        }
        let wrong = |wanted| ConfigError::Kind {
            origin: origin.to_string(),
            option: option.clone(),
            value: value.clone(),
            wanted,
        };
        match (arg.get_action(), value) {
            (ArgAction::SetTrue, Value::Bool(true)) => {
                arguments.push(format!("--{option}").into());
            }
            (ArgAction::SetTrue, Value::Bool(false)) => {}
            (ArgAction::SetTrue, _) => return Err(wrong("true or false")),
            (_, Value::String(text)) => arguments.push(format!("--{option}={text}").into()),
            (_, Value::Number(number)) => arguments.push(format!("--{option}={number}").into()),
            _ => return Err(wrong("a text or a number")),
        }
    }
    Ok(arguments)
}

/// All options of a subcommand with the values that they have now, defaults among them. What has
/// none is left out.
///
/// # Errors
///
/// [`ConfigError::NotText`].
pub(crate) fn effective(command: &Command, matches: &ArgMatches) -> Result<Options, ConfigError> {
    let mut options = Options::new();
    for (option, arg) in configurable(command) {
        let id = arg.get_id().as_str();
        if let ArgAction::SetTrue = arg.get_action() {
            options.insert(option.to_string(), Value::Bool(matches.get_flag(id)));
            continue;
        }
        let Some(value) = matches.get_raw(id).and_then(|mut values| values.next()) else {
            continue;
        };
        let text = value.to_str().ok_or_else(|| ConfigError::NotText {
            option: option.to_string(),
        })?;
        options.insert(option.to_string(), typed(arg, text));
    }
    Ok(options)
}

/// A value as a number if the option takes one, so that it is written in one way only.
fn typed(arg: &Arg, text: &str) -> Value {
    let kind = arg.get_value_parser().type_id();
    let number = if kind == TypeId::of::<f64>() {
        text.parse::<f64>().ok().map(Value::from)
    } else if kind == TypeId::of::<usize>() || kind == TypeId::of::<u64>() {
        text.parse::<u64>().ok().map(Value::from)
    } else {
        None
    };
    number.unwrap_or_else(|| Value::from(text))
}

/// Name of the file that [`RunFile`] is in.
///
/// [`RunFile`] has an example.
pub const RUN_FILE: &str = "job.json";

/// What a training was started with; [`RUN_FILE`] in its folder.
///
/// ```
/// use burn_conv_bn_train::config::{DataIdentity, Options, RUN_FILE, RunFile, RunFileError};
/// use burn_conv_bn_train::data::{DataRequest, DatasetChoice, resolve};
///
/// let data = resolve(&DataRequest {
///     choice: DatasetChoice::Synthetic,
///     train_limit: Some(8),
///     test_limit: Some(4),
///     ..DataRequest::default()
/// })?;
/// let options = |batch_size: u64| {
///     Options::from([("batch-size".to_string(), serde_json::Value::from(batch_size))])
/// };
/// let folder = tempfile::tempdir()?;
/// let file = RunFile::new(&options(256), DataIdentity::of(&data));
/// std::fs::write(folder.path().join(RUN_FILE), file.to_json())?;
///
/// // Later, to go on with it. Batches of another size would make it another run.
/// let file = RunFile::read(folder.path())?;
/// file.check_data(folder.path(), &DataIdentity::of(&data))?;
/// let other = file.check_options(folder.path(), &options(512));
/// assert!(matches!(other, Err(RunFileError::Differs { .. })));
/// # Ok::<(), anyhow::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunFile {
    /// Version of the program that wrote it.
    pub version: String,
    /// Options of `mnist train`: those that say what is computed, and where.
    pub options: Options,
    /// The digits.
    pub data: DataIdentity,
}

/// Which digits a model was trained and tested on.
///
/// [`RunFile`] has an example.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataIdentity {
    /// `mnist`, `synthetic` or `custom`.
    pub name: String,
    /// Training digits.
    pub train_digits: usize,
    /// MD5 of their images and labels.
    pub train_md5: String,
    /// Test digits.
    pub test_digits: usize,
    /// MD5 of their images and labels.
    pub test_md5: String,
}

impl DataIdentity {
    /// Of data that were found.
    pub fn of(data: &MnistData) -> Self {
        let digest = |digits: &Digits| {
            let mut context = md5::Context::new();
            context.consume(digits.images());
            context.consume(digits.labels());
            format!("{:x}", context.finalize())
        };
        Self {
            name: data.origin.name().to_string(),
            train_digits: data.train.len(),
            train_md5: digest(&data.train),
            test_digits: data.test.len(),
            test_md5: digest(&data.test),
        }
    }

    /// For people, with as much of the checksums as tells two sets apart.
    fn describe(&self) -> String {
        let Self {
            name,
            train_digits,
            train_md5,
            test_digits,
            test_md5,
        } = self;
        let short = |md5: &str| md5.chars().take(8).collect::<String>();
        format!(
            "{name} ({train_digits} training digits, MD5 {}.., and {test_digits} test digits, MD5 \
             {}..)",
            short(train_md5),
            short(test_md5)
        )
    }
}

/// Why a folder's run cannot be gone on with.
///
/// [`RunFile`] has an example.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunFileError {
    /// There is no such file.
    #[error(
        "{} has no {RUN_FILE}, which says what its checkpoints are of: they were not written by \
         `mnist train`, or by an older one", .directory.display()
    )]
    Missing {
        /// The folder.
        directory: PathBuf,
    },
    /// The file cannot be read.
    #[error("cannot read {}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system reported.
        source: io::Error,
    },
    /// The file is not one that was written for a run.
    #[error("{} is damaged: {source}", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The run was started with other options.
    #[error("cannot resume the run in {}: it was started with {differences}", .directory.display())]
    Differs {
        /// The folder.
        directory: PathBuf,
        /// The options, with both values of each.
        differences: String,
    },
    /// The run was started on other digits.
    #[error("cannot resume the run in {}: it was started on {stored}, and these are {found}", .directory.display())]
    Data {
        /// The folder.
        directory: PathBuf,
        /// The run's digits.
        stored: String,
        /// The digits that were found now.
        found: String,
    },
}

impl RunFile {
    /// Options that decide what a run computes: another value of one makes it another run.
    ///
    /// Data are told apart by their content, wherever they come from.
    const FIXED: [&str; 12] = [
        "model",
        "variant",
        "optimizer",
        "lr",
        "gamma",
        "norm",
        "dropout",
        "precision",
        "batch-size",
        "seed",
        "train-limit",
        "test-limit",
    ];

    /// Options that are about one call and not about the run.
    const PASSING: [&str; 5] = ["artifacts", "json", "overwrite", "plain", "resume"];

    /// Of a run that starts now, with all options of `mnist train`.
    pub fn new(options: &Options, data: DataIdentity) -> Self {
        let mut options = options.clone();
        options.retain(|option, _| !Self::PASSING.contains(&option.as_str()));
        // A run may be resumed from another folder.
        if let Some(Value::String(folder)) = options.get_mut("data-dir")
            && let Ok(path) = std::path::absolute(&*folder)
            && let Some(path) = path.to_str()
        {
            *folder = path.to_string();
        }
        Self {
            version: env!("CARGO_PKG_VERSION").to_string(),
            options,
            data,
        }
    }

    /// Reads the file in the folder of a run.
    ///
    /// # Errors
    ///
    /// [`RunFileError`].
    pub fn read(directory: &Path) -> Result<Self, RunFileError> {
        let path = directory.join(RUN_FILE);
        let json = match fs::read(&path) {
            Ok(json) => json,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(RunFileError::Missing {
                    directory: directory.to_path_buf(),
                });
            }
            Err(source) => return Err(RunFileError::Io { path, source }),
        };
        serde_json::from_slice(&json).map_err(|source| RunFileError::Damaged { path, source })
    }

    /// What goes into the file.
    pub fn to_json(&self) -> Vec<u8> {
        let mut json = serde_json::to_vec_pretty(self).expect("texts and numbers are JSON");
        json.push(b'\n');
        json
    }

    /// Checks that all of `options` that decide what is computed are this run's.
    ///
    /// # Errors
    ///
    /// [`RunFileError::Differs`], with every option that is not.
    pub fn check_options(&self, directory: &Path, options: &Options) -> Result<(), RunFileError> {
        let differences: Vec<String> = Self::FIXED
            .iter()
            .map(|option| (option, self.options.get(*option), options.get(*option)))
            .filter(|(_, stored, asked)| stored != asked)
            .map(|(option, stored, asked)| match (stored, asked) {
                (Some(stored), Some(asked)) => {
                    format!("--{option} {}, not {}", shown(stored), shown(asked))
                }
                (Some(stored), None) => format!("--{option} {}, which is gone", shown(stored)),
                (None, Some(asked)) => format!("no --{option}, not with {}", shown(asked)),
                (None, None) => unreachable!("they differ"),
            })
            .collect();
        match differences.is_empty() {
            true => Ok(()),
            false => Err(RunFileError::Differs {
                directory: directory.to_path_buf(),
                differences: differences.join(", and with "),
            }),
        }
    }

    /// Checks that `data` are this run's.
    ///
    /// # Errors
    ///
    /// [`RunFileError::Data`].
    pub fn check_data(&self, directory: &Path, data: &DataIdentity) -> Result<(), RunFileError> {
        match self.data == *data {
            true => Ok(()),
            false => Err(RunFileError::Data {
                directory: directory.to_path_buf(),
                stored: self.data.describe(),
                found: data.describe(),
            }),
        }
    }
}

/// A value as on the command line.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use serde_json::json;

    fn command() -> Command {
        Command::new("train")
            .arg(
                Arg::new("lr")
                    .long("lr")
                    .value_parser(clap::value_parser!(f64)),
            )
            .arg(
                Arg::new("batch_size")
                    .long("batch-size")
                    .value_parser(clap::value_parser!(usize))
                    .default_value("2048"),
            )
            .arg(
                Arg::new("seed")
                    .long("seed")
                    .value_parser(clap::value_parser!(u64)),
            )
            .arg(Arg::new("norm").long("norm").default_value("burn"))
            .arg(
                Arg::new("resume")
                    .long("resume")
                    .action(ArgAction::SetTrue)
                    .conflicts_with("overwrite"),
            )
            .arg(
                Arg::new("overwrite")
                    .long("overwrite")
                    .action(ArgAction::SetTrue),
            )
            .arg(Arg::new("config").long("config"))
    }

    fn matches(arguments: &[OsString]) -> ArgMatches {
        let program = [OsString::from("train")];
        command()
            .try_get_matches_from(program.iter().chain(arguments))
            .unwrap()
    }

    fn given(arguments: &[&str]) -> ArgMatches {
        let arguments: Vec<OsString> = arguments.iter().map(Into::into).collect();
        matches(&arguments)
    }

    fn options(value: Value) -> Options {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn what_is_written_reads_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let set = given(&["--lr", "5e-1", "--seed", "18446744073709551615", "--resume"]);
        let written = effective(&command(), &set).unwrap();
        assert_eq!(
            written,
            options(json!({
                "lr": 0.5,
                "batch-size": 2048,
                "seed": u64::MAX,
                "norm": "burn",
                "resume": true,
                "overwrite": false,
            }))
        );
        let json = serde_json::to_string(&written).unwrap();
        for (name, text) in [("job.toml", to_toml(&written)), ("job.JSON", json)] {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            let read = read(&path).unwrap();
            let arguments = arguments(&read, name, &command(), &given(&[])).unwrap();
            let again = effective(&command(), &matches(&arguments)).unwrap();
            assert_eq!(again, written, "{name}");
        }
    }

    #[test]
    fn the_command_line_wins() {
        let file = options(json!({"lr": 0.5, "norm": "tutorial", "overwrite": true}));
        let line = given(&["--lr", "1", "--resume"]);
        let arguments = arguments(&file, "job.toml", &command(), &line).unwrap();
        assert_eq!(arguments, ["--norm=tutorial"]);
    }

    #[test]
    fn what_is_no_option_is_named() {
        for (file, parts) in [
            (
                json!({"learning-rate": 1, "lr": 1, "config": "x"}),
                vec!["config, learning-rate;", "batch-size, lr, norm", "job.toml"],
            ),
            (json!({"resume": 1}), vec!["resume", "1", "true or false"]),
            (json!({"lr": [1]}), vec!["lr", "[1]", "a text or a number"]),
            (
                json!({"lr": true}),
                vec!["lr", "true", "a text or a number"],
            ),
        ] {
            let file = options(file);
            let refused = arguments(&file, "job.toml", &command(), &given(&[]));
            let error = refused.unwrap_err().to_string();
            for part in parts {
                assert!(error.contains(part), "no {part:?} in {error}");
            }
        }
    }

    #[test]
    fn files_that_cannot_be_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("job.toml"), "lr = 1\nnorm = tutorial\n").unwrap();
        fs::write(path("job.json"), "{\"lr\": }").unwrap();
        for (name, parts) in [
            ("job.toml", ["job.toml is not valid TOML", "(line 2)"]),
            ("job.json", ["job.json is not valid JSON", "line 1"]),
            ("absent.toml", ["cannot read", "absent.toml"]),
        ] {
            let error = read(&path(name)).unwrap_err().to_string();
            for part in parts {
                assert!(error.contains(part), "no {part:?} in {error}");
            }
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }

    fn identity(name: &str) -> DataIdentity {
        DataIdentity {
            name: name.to_string(),
            train_digits: 10,
            train_md5: "0123456789abcdef".to_string(),
            test_digits: 5,
            test_md5: "fedcba9876543210".to_string(),
        }
    }

    #[test]
    fn a_run_file_comes_back_and_is_compared() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let missing = RunFile::read(at).unwrap_err();
        assert!(matches!(missing, RunFileError::Missing { .. }), "{missing}");

        let asked = options(json!({
            "lr": 0.5, "norm": "burn", "train-limit": 64, "epochs": 5, "json": "out.json",
            "resume": true, "data-dir": "digits",
        }));
        let file = RunFile::new(&asked, identity("mnist"));
        let target = at.join(RUN_FILE);
        fs::write(&target, file.to_json()).unwrap();
        let read = RunFile::read(at).unwrap();
        assert_eq!(read, file);
        assert!(!read.options.contains_key("json"));
        assert!(!read.options.contains_key("resume"));
        let folder_of_data = read.options["data-dir"].as_str().unwrap();
        assert!(Path::new(folder_of_data).is_absolute(), "{folder_of_data}");

        read.check_options(at, &asked).unwrap();
        read.check_data(at, &identity("mnist")).unwrap();
        // The number of epochs may be another one.
        let mut other = asked.clone();
        other.insert("epochs".to_string(), json!(9));
        read.check_options(at, &other).unwrap();

        other.insert("lr".to_string(), json!(1.0));
        other.insert("test-limit".to_string(), json!(7));
        other.remove("train-limit");
        let error = read.check_options(at, &other).unwrap_err().to_string();
        for part in [
            "--lr 0.5, not 1.0",
            "--train-limit 64, which is gone",
            "no --test-limit, not with 7",
        ] {
            assert!(error.contains(part), "no {part:?} in {error}");
        }
        let error = read.check_data(at, &identity("synthetic")).unwrap_err();
        let error = error.to_string();
        for part in ["mnist (10 training", "synthetic (10 training", "01234567.."] {
            assert!(error.contains(part), "no {part:?} in {error}");
        }

        fs::write(&target, "{}").unwrap();
        let damaged = RunFile::read(at).unwrap_err();
        assert!(matches!(damaged, RunFileError::Damaged { .. }), "{damaged}");
    }
}
