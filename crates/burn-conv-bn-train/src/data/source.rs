//! Choice of the data: where MNIST is looked for, and what stands in for it.

use std::env;
use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::download::{self, DownloadError, MIRRORS};
use super::files::{self, FILES, Parts};
use super::idx::{Digits, IdxError};
use super::synthetic::generate;

/// Environment variable that, unless empty or `0`, forbids the download.
pub const OFFLINE: &str = "BURN_CONV_BN_OFFLINE";

/// Digits in the training part of MNIST and of its stand-in.
const TRAIN_COUNT: usize = 60_000;

/// Digits in the test part of MNIST and of its stand-in.
const TEST_COUNT: usize = 10_000;

/// Keeps the drawn test digits apart from the training digits of any seed in use.
const TEST_SEED: u64 = 0x7465_7374_5f70_6172;

/// Which data to train on.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    clap::ValueEnum,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum DatasetChoice {
    /// MNIST if it can be had, else drawn digits.
    #[default]
    Auto,
    /// MNIST or an error.
    Mnist,
    /// Drawn digits, whatever else there is.
    Synthetic,
}

/// What [`resolve`] is to find.
#[derive(Clone, Debug, Default)]
pub(crate) struct DataRequest {
    /// Which data to train on.
    pub(crate) choice: DatasetChoice,
    /// Folder with the four IDX files; with it, no other place is looked at.
    pub(crate) data_dir: Option<PathBuf>,
    /// Whether MNIST may be downloaded; see also [`OFFLINE`].
    pub(crate) allow_download: bool,
    /// Seed of the drawn digits.
    pub(crate) seed: u64,
    /// Most training digits to keep, counted from the first.
    pub(crate) train_limit: Option<usize>,
    /// Most test digits to keep, counted from the first.
    pub(crate) test_limit: Option<usize>,
}

/// The data and where they come from.
#[derive(Clone, Debug)]
pub struct MnistData {
    /// Digits to learn from.
    pub train: Digits,
    /// Digits to measure with.
    pub test: Digits,
    /// Where both come from.
    pub origin: DataOrigin,
}

/// Where the data come from; displayed as one line for the user.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DataOrigin {
    /// A folder that the user named.
    Folder {
        /// Folder that holds the four files.
        path: PathBuf,
        /// Whether the files have the checksums of MNIST.
        genuine: bool,
    },
    /// The copy of MNIST that Burn keeps for its own data set.
    BurnCache {
        /// Folder that holds the `train` and `test` folders.
        path: PathBuf,
    },
    /// A download of MNIST, made now or in an earlier run.
    Download {
        /// Folder that holds the four files.
        path: PathBuf,
        /// Whether the download was made now.
        fresh: bool,
        /// A copy that was passed over, and why.
        ignored: Option<String>,
    },
    /// Drawn digits.
    Synthetic {
        /// Seed that they were drawn with.
        seed: u64,
        /// Why MNIST was not to be had; `None` if drawn digits were asked for.
        reason: Option<String>,
    },
}

impl DataOrigin {
    /// Short name of the data: `"mnist"`, `"custom"` (a user's own IDX files) or `"synthetic"`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Folder { genuine: false, .. } => "custom",
            Self::Folder { .. } | Self::BurnCache { .. } | Self::Download { .. } => "mnist",
            Self::Synthetic { .. } => "synthetic",
        }
    }
}

impl fmt::Display for DataOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder { path, genuine } if *genuine => {
                write!(f, "MNIST from {}", path.display())
            }
            Self::Folder { path, .. } => {
                write!(
                    f,
                    "custom digits from {} (not MNIST by their checksums)",
                    path.display()
                )
            }
            Self::BurnCache { path } => write!(f, "MNIST from Burn's cache at {}", path.display()),
            Self::Download {
                path,
                fresh,
                ignored,
            } => {
                let how = if *fresh {
                    "downloaded to"
                } else {
                    "from an earlier download at"
                };
                write!(f, "MNIST {how} {}", path.display())?;
                match ignored {
                    Some(ignored) => write!(f, " (passed over: {ignored})"),
                    None => Ok(()),
                }
            }
            Self::Synthetic { seed, reason } => {
                write!(f, "built-in synthetic digits (seed {seed}), ")?;
                match reason {
                    Some(reason) => write!(f, "because no MNIST was found: {reason}"),
                    None => write!(f, "as requested"),
                }
            }
        }
    }
}

/// Why there are no data.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file is there but not sound.
    #[error(transparent)]
    Idx(#[from] IdxError),
    /// The given folder, or something in it, cannot be looked at.
    #[error("cannot look at {path}: {source}")]
    Io {
        /// Folder or file that was looked at.
        path: PathBuf,
        /// What the system reported.
        source: io::Error,
    },
    /// The given folder lacks one of the four files.
    #[error("{dir} has no {name} (plain or .gz)")]
    Missing {
        /// Folder that was searched.
        dir: PathBuf,
        /// Name of the decompressed file.
        name: &'static str,
    },
    /// MNIST was demanded and is nowhere to be had.
    #[error(
        "no MNIST was found: {tried}; name a folder with its four IDX files, allow the download, \
         or choose the synthetic digits"
    )]
    NotFound {
        /// The places that were tried, and what was wrong with each.
        tried: String,
    },
    /// A limit of zero digits.
    #[error("a limit of 0 leaves no {part} digits")]
    ZeroLimit {
        /// `"training"` or `"test"`.
        part: &'static str,
    },
}

/// Finds the data.
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
/// [`DataError`] if a given `data_dir` is not readable, complete and sound, if
/// [`DatasetChoice::Mnist`] cannot be fulfilled, or if a limit is 0.
pub(crate) fn resolve(request: &DataRequest) -> Result<MnistData, DataError> {
    let machine = Machine {
        cache: dirs::cache_dir(),
        offline: is_set(env::var_os(OFFLINE).as_deref()),
        mirrors: MIRRORS,
    };
    resolve_on(&machine, request)
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

fn resolve_on(machine: &Machine, request: &DataRequest) -> Result<MnistData, DataError> {
    let limits = [
        ("training", request.train_limit),
        ("test", request.test_limit),
    ];
    if let Some((part, _)) = limits.into_iter().find(|(_, limit)| *limit == Some(0)) {
        return Err(DataError::ZeroLimit { part });
    }

    let mut data = match (request.choice, &request.data_dir) {
        (DatasetChoice::Synthetic, _) => draw(request, None),
        (_, Some(dir)) => from_folder(dir)?,
        (choice, None) => match search(machine, request.allow_download) {
            Ok(data) => data,
            Err(misses) => {
                let tried = join(&misses);
                if choice == DatasetChoice::Mnist {
                    return Err(DataError::NotFound { tried });
                }
                draw(request, Some(tried))
            }
        },
    };
    data.train
        .truncate(request.train_limit.unwrap_or(usize::MAX));
    data.test.truncate(request.test_limit.unwrap_or(usize::MAX));
    Ok(data)
}

fn draw(request: &DataRequest, reason: Option<String>) -> MnistData {
    let count = |full: usize, limit: Option<usize>| limit.map_or(full, |limit| limit.min(full));
    let seed = request.seed;
    MnistData {
        train: generate(count(TRAIN_COUNT, request.train_limit), seed),
        test: generate(count(TEST_COUNT, request.test_limit), seed ^ TEST_SEED),
        origin: DataOrigin::Synthetic { seed, reason },
    }
}

fn from_folder(dir: &Path) -> Result<MnistData, DataError> {
    fs::read_dir(dir).map_err(|source| DataError::Io {
        path: dir.into(),
        source,
    })?;

    // Torchvision keeps its files in a folder below the one that its user names.
    let raw = dir.join("MNIST/raw");
    let (mut folder, mut found) = (dir, find(dir)?);
    if found.iter().all(Option::is_none) {
        let nested = find(&raw)?;
        if nested.iter().any(Option::is_some) {
            (folder, found) = (&raw, nested);
        }
    }
    if let Some(absent) = found.iter().position(Option::is_none) {
        return Err(DataError::Missing {
            dir: folder.into(),
            name: FILES[absent].name,
        });
    }

    let paths = found.map(Option::unwrap_or_default);
    let parts = files::read(&paths)?;
    let genuine = parts.genuine;
    Ok(with_origin(
        parts,
        DataOrigin::Folder {
            path: folder.into(),
            genuine,
        },
    ))
}

fn find(dir: &Path) -> Result<[Option<PathBuf>; 4], DataError> {
    let mut found = [const { None }; 4];
    for (found, file) in found.iter_mut().zip(&FILES) {
        *found = file
            .find(dir)
            .map_err(|(path, source)| DataError::Io { path, source })?;
    }
    Ok(found)
}

fn with_origin(parts: Parts, origin: DataOrigin) -> MnistData {
    MnistData {
        train: parts.train,
        test: parts.test,
        origin,
    }
}

/// Why one place did not give MNIST.
#[derive(Debug, Error)]
enum Miss {
    #[error("this system names no cache folder")]
    NoCache,
    #[error("nothing in {0}")]
    Absent(PathBuf),
    #[error(transparent)]
    Unsound(#[from] IdxError),
    #[error("the files in {0} do not have the checksums of MNIST")]
    Altered(PathBuf),
    #[error("the download is not allowed")]
    Forbidden,
    #[error("the download is forbidden by {OFFLINE}")]
    Offline,
    #[error("the download failed: {}", join(.0))]
    Download(Vec<DownloadError>),
}

fn join(reasons: &[impl ToString]) -> String {
    let reasons: Vec<String> = reasons.iter().map(ToString::to_string).collect();
    reasons.join("; ")
}

/// Looks for MNIST in the caches, then on the network.
fn search(machine: &Machine, allow_download: bool) -> Result<MnistData, Vec<Miss>> {
    let cache = machine
        .cache
        .as_deref()
        .ok_or_else(|| vec![Miss::NoCache])?;

    let path = cache.join("burn-dataset/mnist");
    let paths = FILES
        .each_ref()
        .map(|file| path.join(file.part).join(file.name));
    let burn = match from_cache(&path, &paths) {
        Ok(parts) => return Ok(with_origin(parts, DataOrigin::BurnCache { path })),
        Err(miss) => miss,
    };
    let ignored = match &burn {
        Miss::Absent(_) => None,
        miss => Some(miss.to_string()),
    };

    let path = cache.join("burn-conv-bn/mnist");
    let paths = FILES.each_ref().map(|file| download::stored(&path, file));
    let found = |parts: Parts, fresh: bool| {
        let origin = DataOrigin::Download {
            path: path.clone(),
            fresh,
            ignored: ignored.clone(),
        };
        with_origin(parts, origin)
    };
    let own = match from_cache(&path, &paths) {
        Ok(parts) => return Ok(found(parts, false)),
        Err(miss) => miss,
    };

    let obstacle = if !allow_download {
        Miss::Forbidden
    } else if machine.offline {
        Miss::Offline
    } else {
        let fetched = download::fetch(machine.mirrors, &path).map_err(Miss::Download);
        match fetched.and_then(|()| from_cache(&path, &paths)) {
            Ok(parts) => return Ok(found(parts, true)),
            Err(miss) => miss,
        }
    };
    Err(vec![burn, own, obstacle])
}

/// Reads files that are MNIST only if their checksums say so.
fn from_cache(dir: &Path, paths: &[PathBuf; 4]) -> Result<Parts, Miss> {
    if !paths.iter().any(|path| path.exists()) {
        return Err(Miss::Absent(dir.into()));
    }
    let parts = files::read(paths)?;
    if !parts.genuine {
        return Err(Miss::Altered(dir.into()));
    }
    Ok(parts)
}

#[cfg(test)]
mod tests;
