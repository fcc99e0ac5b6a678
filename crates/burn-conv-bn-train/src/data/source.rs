//! Choice of the data: where MNIST is looked for, and what stands in for it.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::download::{self, MIRRORS};
use super::files::{self, FILES};
use super::idx::Digits;
use super::synthetic::generate;
use crate::choice::{ON_DATA, ON_TRAINING};

/// Environment variable that, unless empty or `0`, forbids the download.
pub const OFFLINE: &str = "BURN_CONV_BN_OFFLINE";

/// Digits in the training part of MNIST and of its stand-in.
const TRAIN_COUNT: usize = 60_000;

/// Digits in the test part of MNIST and of its stand-in.
const TEST_COUNT: usize = 10_000;

/// Keeps the drawn test digits apart from the training digits of any seed in use.
const TEST_SEED: u64 = 0x7465_7374_5f70_6172;

/// Which data to train on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DatasetChoice {
    /// MNIST if it can be had, else drawn digits.
    #[default]
    Auto,
    /// MNIST or an error.
    Mnist,
    /// Drawn digits.
    Synthetic,
}

/// Which data to find.
#[derive(Args, Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DataRequest {
    /// Seed of weights, order, dropout and built-in digits.
    #[arg(long, default_value_t = 123_456, help_heading = ON_TRAINING)]
    pub seed: u64,
    /// MNIST if it is found or downloaded and built-in digits otherwise, or one of the two.
    #[arg(long, value_enum, default_value = "auto", help_heading = ON_DATA)]
    pub dataset: DatasetChoice,
    /// Folder with MNIST's four IDX files, plain or .gz.
    #[arg(long, value_name = "DIR", help_heading = ON_DATA)]
    pub data_dir: Option<PathBuf>,
    /// Do not try to download MNIST.
    #[arg(long, help_heading = ON_DATA)]
    pub no_download: bool,
    /// Train on the first N digits only.
    #[arg(long, value_name = "N", help_heading = ON_DATA)]
    pub train_limit: Option<usize>,
}

/// The data and where they come from.
#[derive(Clone, Debug)]
pub struct MnistData {
    /// Digits to learn from.
    pub train: Digits,
    /// Digits to measure with.
    pub test: Digits,
    /// Short name of the data: `"mnist"`, `"custom"` (a user's own IDX files) or `"synthetic"`.
    pub name: &'static str,
    /// Where both come from, as a line for the user.
    pub origin: String,
}

/// Finds the data, with `test_limit` test digits at most.
///
/// 1. [`DatasetChoice::Synthetic`] draws the digits.
/// 2. A `data_dir` must hold the four IDX files, plain or gzip, itself or in
///    `MNIST/raw`. Files of another data set of 28x28 images are accepted, and
///    the origin says so.
/// 3. Else the cache of Burn's own `MnistDataset`, if its checksums are right.
/// 4. Else an earlier download in `<cache>/burn-conv-bn/mnist`, or a new one if allowed.
/// 5. Else [`DatasetChoice::Auto`] draws the digits: 60,000 and 10,000.
///
/// # Errors
///
/// If a given `data_dir` is not readable, complete and sound, or if
/// [`DatasetChoice::Mnist`] cannot be fulfilled.
pub(crate) fn resolve(request: &DataRequest, test_limit: Option<usize>) -> Result<MnistData> {
    let machine = Machine {
        cache: dirs::cache_dir(),
        offline: is_set(env::var_os(OFFLINE).as_deref()),
        mirrors: MIRRORS,
    };
    resolve_on(&machine, request, test_limit)
}

/// What [`resolve`] takes from the machine it runs on.
struct Machine<'a> {
    cache: Option<PathBuf>,
    offline: bool,
    mirrors: &'a [&'a str],
}

fn is_set(variable: Option<&OsStr>) -> bool {
    variable.is_some_and(|value| !value.is_empty() && value != "0")
}

fn resolve_on(
    machine: &Machine,
    request: &DataRequest,
    test_limit: Option<usize>,
) -> Result<MnistData> {
    let mut data = match (request.dataset, &request.data_dir) {
        (DatasetChoice::Synthetic, _) => draw(request, test_limit, "as requested"),
        (_, Some(dir)) => from_folder(dir)?,
        (choice, None) => match search(machine, request.no_download) {
            Ok(data) => data,
            Err(tried) if choice == DatasetChoice::Mnist => bail!(
                "no MNIST was found: {tried}; name a folder with its four IDX files, allow the \
                 download, or choose the synthetic digits"
            ),
            Err(tried) => {
                let reason = format!("because no MNIST was found: {tried}");
                draw(request, test_limit, &reason)
            }
        },
    };
    data.train
        .truncate(request.train_limit.unwrap_or(usize::MAX));
    data.test.truncate(test_limit.unwrap_or(usize::MAX));
    Ok(data)
}

fn draw(request: &DataRequest, test_limit: Option<usize>, reason: &str) -> MnistData {
    let count = |full: usize, limit: Option<usize>| limit.map_or(full, |limit| limit.min(full));
    let seed = request.seed;
    MnistData {
        train: generate(count(TRAIN_COUNT, request.train_limit), seed),
        test: generate(count(TEST_COUNT, test_limit), seed ^ TEST_SEED),
        name: "synthetic",
        origin: format!("built-in synthetic digits (seed {seed}), {reason}"),
    }
}

fn from_folder(dir: &Path) -> Result<MnistData> {
    fs::read_dir(dir).with_context(|| format!("cannot look at {}", dir.display()))?;
    let find = |dir: &Path| FILES.each_ref().map(|file| file.find(dir));
    // Torchvision keeps its files in a folder below the one that its user names.
    let (mut folder, mut found) = (dir.to_path_buf(), find(dir));
    if found.iter().all(Option::is_none) {
        let raw = dir.join("MNIST/raw");
        let nested = find(&raw);
        if nested.iter().any(Option::is_some) {
            (folder, found) = (raw, nested);
        }
    }
    let at = folder.display();
    if let Some(absent) = found.iter().position(Option::is_none) {
        bail!("{at} has no {} (plain or .gz)", FILES[absent].name);
    }

    let (digits, genuine) = files::read(&found.map(Option::unwrap_or_default))?;
    if genuine {
        return Ok(mnist(digits, &format!("from {at}")));
    }
    let [train, test] = digits;
    Ok(MnistData {
        train,
        test,
        name: "custom",
        origin: format!("custom digits from {at} (not MNIST by their checksums)"),
    })
}

fn mnist([train, test]: [Digits; 2], how: &str) -> MnistData {
    MnistData {
        train,
        test,
        name: "mnist",
        origin: format!("MNIST {how}"),
    }
}

/// Looks for MNIST in the caches, then on the network. Otherwise returns the places that were tried, and
/// what was wrong with each.
fn search(machine: &Machine, no_download: bool) -> Result<MnistData, String> {
    let Some(cache) = &machine.cache else {
        return Err("this system names no cache folder".to_string());
    };
    let path = cache.join("burn-conv-bn/mnist");
    let paths = FILES.each_ref().map(|file| download::stored(&path, file));
    let burn = cache.join("burn-dataset/mnist");
    let burns = FILES
        .each_ref()
        .map(|file| burn.join(file.part).join(file.name));
    let places = [
        ("from Burn's cache at", &burn, &burns),
        ("from an earlier download at", &path, &paths),
    ];
    let (mut tried, mut ignored) = (Vec::new(), String::new());
    for (how, dir, paths) in places {
        let at = dir.display();
        match from_cache(dir, paths) {
            Ok(Some(digits)) => return Ok(mnist(digits, &format!("{how} {at}{ignored}"))),
            Ok(None) => tried.push(format!("nothing in {at}")),
            Err(error) => {
                ignored = format!(" (passed over: {error})");
                tried.push(error.to_string());
            }
        }
    }

    if no_download {
        tried.push("the download is not allowed".to_string());
    } else if machine.offline {
        tried.push(format!("the download is forbidden by {OFFLINE}"));
    } else {
        let at = path.display();
        let fetched = download::fetch(machine.mirrors, &path).map_err(|error| anyhow!(error));
        match fetched.and_then(|()| from_cache(&path, &paths)) {
            Ok(Some(digits)) => return Ok(mnist(digits, &format!("downloaded to {at}{ignored}"))),
            Ok(None) => tried.push(format!("the download is gone from {at}")),
            Err(error) => tried.push(format!("the download failed: {error}")),
        }
    }
    Err(tried.join("; "))
}

/// Reads files that are MNIST only if their checksums say so. None if there are none.
fn from_cache(dir: &Path, paths: &[PathBuf; 4]) -> Result<Option<[Digits; 2]>> {
    if !paths.iter().any(|path| path.exists()) {
        return Ok(None);
    }
    let (digits, genuine) = files::read(paths)?;
    let dir = dir.display();
    ensure!(
        genuine,
        "the files in {dir} do not have the checksums of MNIST"
    );
    Ok(Some(digits))
}

#[cfg(test)]
mod tests;
