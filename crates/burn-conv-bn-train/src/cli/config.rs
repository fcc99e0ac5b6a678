//! Options from the command line and files, and their bounds.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use clap::ArgMatches;
use clap::parser::ValueSource;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Number, Value, json};

use crate::persist::run_file::{Options, read_text};

/// Options that exclude each other.
const RIVALS: [[&str; 2]; 2] = [["resume", "overwrite"], ["images", "test-set"]];

/// A check of a number, and its bounds in words.
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

/// Reads a configuration of at most 1 MiB: JSON if the file's name ends in `.json`, otherwise TOML.
pub(crate) fn read(path: &Path) -> Result<Options> {
    let named = path.display();
    let text = read_text(path).with_context(|| format!("cannot read {named}"))?;
    let extension = path.extension().unwrap_or_default();
    if extension.eq_ignore_ascii_case("json") {
        return serde_json::from_str(&text).with_context(|| format!("{named} is not valid JSON"));
    }
    let table: toml::Table = toml::from_str(&text).map_err(|error| {
        let before = error.span().and_then(|span| text.get(..span.start));
        let line = before.unwrap_or_default().matches('\n').count() + 1;
        let reason = error.message().replace('\n', ", ");
        anyhow!("{named} is not valid TOML: {reason} (line {line})")
    })?;
    let options = table.into_iter().map(|(option, value)| {
        // One that is not finite becomes null.
        let json = serde_json::to_value(&value)?;
        ensure!(
            json.is_string() || json.is_number() || json.is_boolean(),
            "{named} sets {option} to {value}: an option is a text, a finite number, true or false"
        );
        Ok((option, json))
    });
    options.collect()
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
    pub(crate) given: BTreeSet<String>,
}

impl Layers {
    /// A command as parsed from the command line, with its matches. Without matches, every option counts as
    /// not given.
    pub(crate) fn new(command: &impl Serialize, matches: Option<&ArgMatches>) -> Result<Self> {
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

    pub(crate) fn check(&self) -> Result<(), String> {
        let mut options = self.options.iter();
        options.try_for_each(|(option, value)| {
            check(option, value).map_err(|reason| format!("--{option} {value}: {reason}"))
        })
    }

    /// Sets options, and returns the command. Options that the command line or an earlier file has set stay,
    /// and so do those that exclude one of the command line's.
    pub(crate) fn add<T: DeserializeOwned>(&mut self, added: &Options, origin: &str) -> Result<T> {
        let known: Vec<&str> = self.options.keys().map(String::as_str).collect();
        let mut unknown: Vec<&str> = added.keys().map(String::as_str).collect();
        unknown.retain(|option| !known.contains(option));
        ensure!(
            unknown.is_empty(),
            "{origin} has what `mnist {}` does not: {}; it has {}",
            self.command,
            unknown.join(", "),
            known.join(", ")
        );
        for (option, value) in added {
            let mut rivals = RIVALS.iter().filter(|pair| pair.contains(&option.as_str()));
            if self.is_given(option) || rivals.any(|pair| pair.iter().any(|one| self.is_given(one)))
            {
                continue;
            }
            // One at a time, so that an error names the option.
            self.set::<T>(option, value.clone())
                .or_else(|reason| match value {
                    // As numbers too large for TOML are written.
                    Value::String(text) if let Ok(number) = text.parse::<Number>() => {
                        self.set::<T>(option, Value::Number(number))
                    }
                    _ => Err(reason),
                })
                .map_err(|reason| anyhow!("{origin} sets {option} to {value}: {reason}"))?;
        }
        self.given.extend(added.keys().cloned());
        Ok(self.build()?)
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
pub(crate) fn effective(command: &impl Serialize) -> Result<Options> {
    let (_, mut options) = parts(command)?;
    options.retain(|_, value| !value.is_null());
    Ok(options)
}

/// The name of a command and its options, null where one has no value.
fn parts(command: &impl Serialize) -> Result<(String, Options)> {
    let command =
        serde_json::to_value(command).context("the options cannot be written to a file")?;
    if let Value::Object(command) = command
        && let Some((name, Value::Object(options))) = command.into_iter().next()
    {
        return Ok((name, options));
    }
    // A command without options.
    Ok(Default::default())
}

pub(crate) fn check(option: &str, value: &Value) -> Result<(), String> {
    let bounds = BOUNDS.iter().find(|(bounded, _)| *bounded == option);
    match (bounds, value.as_f64()) {
        (Some((_, (within, words))), Some(number)) if !within(number) => {
            Err(format!("it must be {words}"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
