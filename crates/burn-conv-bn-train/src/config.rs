//! Options as files: configurations that people write, and the options of a run in its folder.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use clap::ArgMatches;
use clap::parser::ValueSource;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value, json};

use crate::data::{Digits, MnistData};

/// Options of a command with their values, by their long names.
pub(crate) type Options = Map<String, Value>;

/// Options of which a command takes one.
const RIVALS: [[&str; 2]; 2] = [["resume", "overwrite"], ["images", "test-set"]];

/// A check of a number, and what it asks for.
type Bounds = (fn(f64) -> bool, &'static str);

const COUNT: Bounds = (|n| (1.0..=1e6).contains(&n), "from 1 to 1000000");
const INTERVAL: Bounds = (|n| (0.0..=1e6).contains(&n), "from 0 to 1000000");
const THREADS: Bounds = (|n| (1.0..=1024.0).contains(&n), "from 1 to 1024");
const BYTES: Bounds = (|n| n >= 1.0, "at least 1");
const POSITIVE: Bounds = (|n| n > 0.0, "above 0");
const PROBABILITY: Bounds = (|n| (0.0..1.0).contains(&n), "at least 0 and less than 1");

/// Bounds of the options that are numbers, on the command line and in files alike. A seed has none.
const BOUNDS: [(&str, Bounds); 14] = [
    ("batch-size", COUNT),
    ("dropout", PROBABILITY),
    ("early-stopping", COUNT),
    ("epoch", COUNT),
    ("epochs", COUNT),
    ("gamma", POSITIVE),
    ("log-interval", INTERVAL),
    ("lr", POSITIVE),
    ("max-workspace", BYTES),
    ("steps", COUNT),
    ("test-limit", COUNT),
    ("threads", THREADS),
    ("time-limit", POSITIVE),
    ("train-limit", COUNT),
];

/// Most bytes of a file of options.
const MOST_BYTES: u64 = 1 << 20;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", .path.display())]
    Io { path: PathBuf, source: io::Error },
    /// The file is neither TOML nor, if its name ends in `.json`, JSON.
    #[error("{} is not valid {language}: {reason}", .path.display())]
    Syntax {
        path: PathBuf,
        language: &'static str,
        reason: String,
    },
    /// There are keys that are no options.
    #[error("{origin} has what `mnist {command}` does not: {unknown}; it has {allowed}")]
    Unknown {
        origin: String,
        command: String,
        unknown: String,
        allowed: String,
    },
    /// An option's value is of a wrong kind or out of bounds.
    #[error("{origin} sets {option} to {value}: {reason}")]
    Refused {
        origin: String,
        option: String,
        value: String,
        reason: String,
    },
    /// An option's value is not text that a file could hold.
    #[error("the options cannot be written to a file: {0}")]
    NotText(#[source] serde_json::Error),
}

/// Reads a configuration of at most 1 MiB: JSON if the file's name ends in `.json`, otherwise TOML.
pub(crate) fn read(path: &Path) -> Result<Options, ConfigError> {
    let text = read_text(path).map_err(|source| ConfigError::Io {
        path: path.to_path_buf(),
        source,
    })?;
    let syntax = |language, reason| ConfigError::Syntax {
        path: path.to_path_buf(),
        language,
        reason,
    };
    let extension = path.extension().unwrap_or_default();
    if extension.eq_ignore_ascii_case("json") {
        return serde_json::from_str(&text).map_err(|error| syntax("JSON", error.to_string()));
    }
    let table: toml::Table = toml::from_str(&text).map_err(|error| {
        let before = error.span().and_then(|span| text.get(..span.start));
        let line = before.unwrap_or_default().matches('\n').count() + 1;
        let reason = error.message().replace('\n', ", ");
        syntax("TOML", format!("{reason} (line {line})"))
    })?;
    let options = table.into_iter().map(|(option, value)| {
        let value = match value {
            toml::Value::String(text) => Value::from(text),
            toml::Value::Integer(integer) => Value::from(integer),
            toml::Value::Boolean(switch) => Value::from(switch),
            toml::Value::Float(float) if float.is_finite() => Value::from(float),
            other => {
                return Err(ConfigError::Refused {
                    origin: path.display().to_string(),
                    option,
                    value: other.to_string(),
                    reason: "an option is a text, a finite number, true or false".to_string(),
                });
            }
        };
        Ok((option, value))
    });
    options.collect()
}

/// Reads a file of options, which is no device that never ends.
fn read_text(path: &Path) -> io::Result<String> {
    let kind = fs::metadata(path)?.file_type();
    #[cfg(unix)]
    let pipe = std::os::unix::fs::FileTypeExt::is_fifo(&kind);
    #[cfg(not(unix))]
    let pipe = false;
    if !kind.is_file() && !pipe {
        return Err(io::Error::other("it is neither a regular file nor a pipe"));
    }
    let mut bytes = Vec::new();
    File::open(path)?
        .take(MOST_BYTES + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(io::Error::other("it is larger than 1 MiB"));
    }
    String::from_utf8(bytes).map_err(|_| io::Error::other("it is not UTF-8"))
}

/// As text that [`read`] reads: TOML.
pub(crate) fn to_toml(options: &Options) -> String {
    let mut options = options.clone();
    for value in options.values_mut() {
        // An integer that is too large for TOML.
        if value.is_u64() && !value.is_i64() {
            *value = Value::from(value.to_string());
        }
    }
    toml::to_string(&options).expect("options are texts, numbers and switches")
}

/// The options of a command, put together from the command line and files.
///
/// The command is an enum whose variants are commands, by their names, with structs of options by their
/// long names.
pub(crate) struct Layers {
    command: String,
    pub(crate) options: Options,
    /// Options that further files do not set.
    given: BTreeSet<String>,
}

impl Layers {
    /// A command as parsed from the command line, whose matches tell what was given there; none was
    /// without them.
    pub(crate) fn new(
        command: &impl Serialize,
        matches: Option<&ArgMatches>,
    ) -> Result<Self, ConfigError> {
        let (command, options) = parts(command)?;
        let on_line = |option: &&String| {
            let source =
                matches.and_then(|matches| matches.value_source(&option.replace('-', "_")));
            source == Some(ValueSource::CommandLine)
        };
        Ok(Self {
            given: options.keys().filter(on_line).cloned().collect(),
            command,
            options,
        })
    }

    pub(crate) fn is_given(&self, option: &str) -> bool {
        self.given.contains(option)
    }

    /// Checks the bounds of every option.
    pub(crate) fn check(&self) -> Result<(), String> {
        let mut options = self.options.iter();
        options.try_for_each(|(option, value)| {
            check(option, value).map_err(|reason| format!("--{option} {value}: {reason}"))
        })
    }

    /// Sets options that neither the command line nor an earlier file has set, nor a rival of which the
    /// command line has, and returns the command.
    pub(crate) fn add<T: DeserializeOwned>(
        &mut self,
        added: &Options,
        origin: &str,
    ) -> Result<T, ConfigError> {
        let unknown: Vec<&str> = added
            .keys()
            .filter(|option| !self.options.contains_key(*option))
            .map(String::as_str)
            .collect();
        if !unknown.is_empty() {
            let allowed: Vec<&str> = self.options.keys().map(String::as_str).collect();
            return Err(ConfigError::Unknown {
                origin: origin.to_string(),
                command: self.command.clone(),
                unknown: unknown.join(", "),
                allowed: allowed.join(", "),
            });
        }
        let excluded = |option: &str| {
            let rivals = RIVALS.iter().filter(|pair| pair.contains(&option));
            self.is_given(option) || rivals.flatten().any(|rival| self.is_given(rival))
        };
        let free: Vec<_> = added
            .iter()
            .filter(|(option, _)| !excluded(option))
            .collect();
        for (option, value) in free {
            // One at a time, so that an error names the option.
            self.set::<T>(option, value.clone())
                .or_else(|reason| match value {
                    // As numbers too large for TOML are written.
                    Value::String(text) if let Ok(number) = text.parse::<Number>() => {
                        self.set::<T>(option, Value::Number(number))
                    }
                    _ => Err(reason),
                })
                .map_err(|reason| ConfigError::Refused {
                    origin: origin.to_string(),
                    option: option.clone(),
                    value: value.to_string(),
                    reason,
                })?;
        }
        self.given.extend(added.keys().cloned());
        self.build().map_err(ConfigError::NotText)
    }

    fn set<T: DeserializeOwned>(&mut self, option: &str, value: Value) -> Result<(), String> {
        check(option, &value)?;
        self.options.insert(option.to_string(), value);
        self.build::<T>()
            .map(drop)
            .map_err(|error| error.to_string())
    }

    fn build<T: DeserializeOwned>(&self) -> serde_json::Result<T> {
        serde_json::from_value(json!({ &self.command: &self.options }))
    }
}

/// All options of a command that have a value.
pub(crate) fn effective(command: &impl Serialize) -> Result<Options, ConfigError> {
    let (_, mut options) = parts(command)?;
    options.retain(|_, value| !value.is_null());
    Ok(options)
}

/// The name of a command and its options, null where one has no value.
fn parts(command: &impl Serialize) -> Result<(String, Options), ConfigError> {
    if let Value::Object(command) = serde_json::to_value(command).map_err(ConfigError::NotText)?
        && let Some((name, Value::Object(options))) = command.into_iter().next()
    {
        return Ok((name, options));
    }
    // A command without options.
    Ok(Default::default())
}

/// Checks a number's bounds.
pub(crate) fn check(option: &str, value: &Value) -> Result<(), String> {
    let bounds = BOUNDS.iter().find(|(bounded, _)| *bounded == option);
    match (bounds, value.as_f64()) {
        (Some((_, (within, words))), Some(number)) if !within(number) => {
            Err(format!("it must be {words}"))
        }
        _ => Ok(()),
    }
}

/// Name of the file that [`RunFile`] is in.
pub(crate) const RUN_FILE: &str = "job.json";

/// What a training was started with; [`RUN_FILE`] in its folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RunFile {
    /// Version of the program that wrote it.
    pub(crate) version: String,
    /// Options of `mnist train`: those that say what is computed, and where.
    pub(crate) options: Options,
    /// The digits.
    pub(crate) data: DataIdentity,
}

/// Which digits a model was trained and tested on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DataIdentity {
    /// `mnist`, `synthetic` or `custom`.
    pub(crate) name: String,
    /// Training digits.
    pub(crate) train_digits: usize,
    /// MD5 of their images and labels.
    pub(crate) train_md5: String,
    /// Test digits.
    pub(crate) test_digits: usize,
    /// MD5 of their images and labels.
    pub(crate) test_md5: String,
}

impl DataIdentity {
    /// Of data that were found.
    pub(crate) fn of(data: &MnistData) -> Self {
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
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunFileError {
    /// There is no such file.
    #[error(
        "{} has no {RUN_FILE}, which says what its checkpoints are of: they were not written by \
         `mnist train`, or by an older one", .directory.display()
    )]
    Missing { directory: PathBuf },
    /// The file cannot be read.
    #[error("cannot read {}: {source}", .path.display())]
    Io { path: PathBuf, source: io::Error },
    /// The file is not one that was written for a run.
    #[error("{} is damaged: {source}", .path.display())]
    Damaged {
        path: PathBuf,
        source: serde_json::Error,
    },
    /// The run was started with other options.
    #[error("cannot resume the run in {}: it was started with {differences}", .directory.display())]
    Differs {
        directory: PathBuf,
        differences: String,
    },
    /// The run was started on other digits.
    #[error("cannot resume the run in {}: it was started on {stored}, and these are {found}", .directory.display())]
    Data {
        directory: PathBuf,
        stored: String,
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
    pub(crate) fn new(options: &Options, data: DataIdentity) -> Self {
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
    pub(crate) fn read(directory: &Path) -> Result<Self, RunFileError> {
        let path = directory.join(RUN_FILE);
        match read_text(&path) {
            Ok(json) => {
                serde_json::from_str(&json).map_err(|source| RunFileError::Damaged { path, source })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(RunFileError::Missing {
                directory: directory.to_path_buf(),
            }),
            Err(source) => Err(RunFileError::Io { path, source }),
        }
    }

    /// What goes into the file.
    pub(crate) fn to_json(&self) -> Vec<u8> {
        let mut json = serde_json::to_vec_pretty(self).expect("texts and numbers are JSON");
        json.push(b'\n');
        json
    }

    /// Checks that all of `options` that decide what is computed are this run's.
    pub(crate) fn check_options(
        &self,
        directory: &Path,
        options: &Options,
    ) -> Result<(), RunFileError> {
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
        if differences.is_empty() {
            return Ok(());
        }
        Err(RunFileError::Differs {
            directory: directory.to_path_buf(),
            differences: differences.join(", and with "),
        })
    }

    /// Checks that `data` are this run's.
    pub(crate) fn check_data(
        &self,
        directory: &Path,
        data: &DataIdentity,
    ) -> Result<(), RunFileError> {
        if self.data == *data {
            return Ok(());
        }
        Err(RunFileError::Data {
            directory: directory.to_path_buf(),
            stored: self.data.describe(),
            found: data.describe(),
        })
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

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Command {
        Train(Train),
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Train {
        batch_size: usize,
        lr: Option<f64>,
        norm: String,
        overwrite: bool,
        resume: bool,
        seed: u64,
    }

    fn defaults() -> Command {
        Command::Train(Train {
            batch_size: 2048,
            lr: None,
            norm: "burn".to_string(),
            overwrite: false,
            resume: false,
            seed: 1,
        })
    }

    fn layers(given: &[&str]) -> Layers {
        let mut layers = Layers::new(&defaults(), None).unwrap();
        layers.given = given.iter().map(ToString::to_string).collect();
        layers
    }

    fn options(value: Value) -> Options {
        serde_json::from_value(value).unwrap()
    }

    fn add(given: &[&str], added: Value) -> Result<Command, ConfigError> {
        layers(given).add(&options(added), "job.toml")
    }

    #[test]
    fn what_is_written_reads_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let job = json!({"lr": 5e-1, "seed": u64::MAX, "resume": true});
        let command = add(&[], job).unwrap();
        let written = effective(&command).unwrap();
        let all = json!({
            "batch-size": 2048, "lr": 0.5, "norm": "burn", "overwrite": false, "resume": true,
            "seed": u64::MAX,
        });
        assert_eq!(written, options(all));
        let json = serde_json::to_string(&written).unwrap();
        for (name, text) in [("job.toml", to_toml(&written)), ("job.JSON", json)] {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            let again: Command = layers(&[]).add(&read(&path).unwrap(), name).unwrap();
            assert_eq!(again, command, "{name}");
        }
        assert_eq!(effective(&defaults()).unwrap().get("lr"), None);
    }

    #[test]
    fn the_first_layer_wins() {
        let mut layers = layers(&["lr", "resume"]);
        let file = json!({"lr": 0.5, "norm": "tutorial", "overwrite": true});
        let _: Command = layers.add(&options(file), "job.toml").unwrap();
        let stored = json!({"norm": "burn", "seed": 7});
        let Command::Train(train) = layers.add(&options(stored), "job.json").unwrap();
        assert_eq!(
            (train.lr, train.norm.as_str(), train.seed),
            (None, "tutorial", 7)
        );
        assert!(!train.overwrite, "the line has resume");
        // Rivals in one file are the command's to refuse.
        let both = json!({"overwrite": false, "resume": true});
        let Command::Train(train) = add(&[], both).unwrap();
        assert!(train.resume);
    }

    #[test]
    fn an_error_names_the_option() {
        for (file, parts) in [
            (
                json!({"learning-rate": 1, "lr": 1, "config": "x"}),
                vec![
                    "mnist train",
                    "config, learning-rate;",
                    "batch-size, lr, norm",
                ],
            ),
            (json!({"resume": 1}), vec!["resume to 1:", "a boolean"]),
            (json!({"seed": 2, "lr": [1]}), vec!["lr to [1]:", "f64"]),
            (json!({"lr": true}), vec!["lr to true:", "f64"]),
            (json!({"batch-size": -1}), vec!["batch-size to -1:"]),
            (
                json!({"batch-size": 0}),
                vec!["batch-size to 0:", "from 1 to"],
            ),
            (json!({"batch-size": null}), vec!["batch-size to null:"]),
        ] {
            let error = add(&[], file).unwrap_err().to_string();
            for part in parts.into_iter().chain(["job.toml"]) {
                assert!(error.contains(part), "no {part:?} in {error}");
            }
        }
    }

    #[test]
    fn bounds_are_inclusive() {
        for (option, allowed, refused) in [
            (
                "batch-size",
                vec![json!(1), json!(1_000_000)],
                vec![json!(0), json!(1_000_001)],
            ),
            (
                "threads",
                vec![json!(1024)],
                vec![json!(0), json!(u64::MAX)],
            ),
            ("log-interval", vec![json!(0)], vec![json!(1_000_001)]),
            (
                "dropout",
                vec![json!(0.0), json!(0.99)],
                vec![json!(1.0), json!(-0.1)],
            ),
            ("lr", vec![json!(1e-30)], vec![json!(0), json!(-1)]),
            ("seed", vec![json!(0), json!(u64::MAX)], vec![]),
        ] {
            for value in allowed {
                assert_eq!(check(option, &value), Ok(()), "{option} {value}");
            }
            for value in refused {
                assert!(check(option, &value).is_err(), "{option} {value}");
            }
        }
    }

    #[test]
    fn files_that_cannot_be_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let large = vec![b'#'; MOST_BYTES as usize + 1];
        let files: [(&str, &[u8], [&str; 2]); 8] = [
            (
                "a.toml",
                b"lr = 1\nnorm = tutorial\n",
                ["a.toml is not valid TOML", "(line 2)"],
            ),
            (
                "a.json",
                b"{\"lr\": }",
                ["a.json is not valid JSON", "line 1"],
            ),
            ("nan.toml", b"lr = nan\n", ["lr to nan:", "a finite number"]),
            (
                "inf.toml",
                b"lr = -inf\n",
                ["lr to -inf:", "a finite number"],
            ),
            (
                "list.toml",
                b"lr = [1, nan]\n",
                ["lr to [1, nan]:", "a finite number"],
            ),
            (
                "date.toml",
                b"lr = 1979-05-27\n",
                ["lr to 1979-05-27:", "a finite number"],
            ),
            ("text.toml", b"norm = \"\xff\"\n", ["cannot read", "UTF-8"]),
            ("large.toml", &large, ["cannot read", "1 MiB"]),
        ];
        for (name, bytes, _) in files {
            fs::write(path(name), bytes).unwrap();
        }
        let absent = [
            ("absent.toml", ["cannot read", "absent.toml"]),
            (".", ["cannot read", "neither a regular file nor a pipe"]),
        ];
        for (name, parts) in files
            .iter()
            .map(|(name, _, parts)| (*name, *parts))
            .chain(absent)
        {
            let error = read(&path(name)).unwrap_err().to_string();
            for part in parts {
                assert!(error.contains(part), "no {part:?} in {error}");
            }
            assert_eq!(error.lines().count(), 1, "{error}");
        }
        // The largest file.
        fs::write(path("large.toml"), &large[1..]).unwrap();
        assert!(read(&path("large.toml")).unwrap().is_empty());
        if cfg!(target_os = "linux") {
            for device in ["/dev/null", "/dev/full", "/dev/zero"] {
                let error = read(Path::new(device)).unwrap_err().to_string();
                assert!(
                    error.contains(device) && error.contains("neither"),
                    "{error}"
                );
            }
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
