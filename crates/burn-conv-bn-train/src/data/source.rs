//! Choice of the data: where MNIST is looked for, and what stands in for it.

use std::env;
use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::digits::generate;
use super::download::{self, DownloadError, MIRRORS};
use super::files::{self, FILES, Parts};
use super::idx::{Digits, IdxError};

/// Environment variable that, unless empty or `0`, forbids the download.
///
/// ```
/// use std::process::Command;
///
/// use burn_conv_bn_train::data::OFFLINE;
///
/// // A training that is not to download anything.
/// let mut training = Command::new("mnist");
/// training.env(OFFLINE, "1");
/// ```
pub const OFFLINE: &str = "BURN_CONV_BN_OFFLINE";

/// Digits in the training part of MNIST and of its stand-in.
const TRAIN_COUNT: usize = 60_000;

/// Digits in the test part of MNIST and of its stand-in.
const TEST_COUNT: usize = 10_000;

/// Keeps the drawn test digits apart from the training digits of any seed in use.
const TEST_SEED: u64 = 0x7465_7374_5f70_6172;

/// Which data to train on.
///
/// [`resolve`] has an example.
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
///
/// [`resolve`] has an example.
#[derive(Clone, Debug, Default)]
pub struct DataRequest {
    /// Which data to train on.
    pub choice: DatasetChoice,
    /// Folder with the four IDX files; with it, no other place is looked at.
    pub data_dir: Option<PathBuf>,
    /// Whether MNIST may be downloaded; see also [`OFFLINE`].
    pub allow_download: bool,
    /// Seed of the drawn digits.
    pub seed: u64,
    /// Most training digits to keep, counted from the first.
    pub train_limit: Option<usize>,
    /// Most test digits to keep, counted from the first.
    pub test_limit: Option<usize>,
}

/// The data and where they come from.
///
/// [`resolve`] has an example.
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
///
/// [`resolve`] has an example.
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
///
/// [`resolve`] has an example.
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
///
/// # Examples
///
/// ```
/// use burn_conv_bn_train::data::{DataError, DataRequest, DatasetChoice, resolve};
///
/// let request = DataRequest {
///     choice: DatasetChoice::Synthetic,
///     train_limit: Some(100),
///     test_limit: Some(20),
///     ..DataRequest::default()
/// };
/// let data = resolve(&request)?;
/// assert_eq!((data.train.len(), data.test.len()), (100, 20));
/// assert_eq!(data.origin.name(), "synthetic");
/// assert_eq!(
///     data.origin.to_string(),
///     "built-in synthetic digits (seed 0), as requested"
/// );
///
/// let nothing = DataRequest {
///     train_limit: Some(0),
///     ..request
/// };
/// assert!(matches!(
///     resolve(&nothing),
///     Err(DataError::ZeroLimit { part: "training" })
/// ));
/// # Ok::<(), DataError>(())
/// ```
pub fn resolve(request: &DataRequest) -> Result<MnistData, DataError> {
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
    let own = match from_cache(&path, &paths) {
        Ok(parts) => {
            let fresh = false;
            return Ok(with_origin(
                parts,
                DataOrigin::Download {
                    path,
                    fresh,
                    ignored,
                },
            ));
        }
        Err(miss) => miss,
    };

    let obstacle = if !allow_download {
        Miss::Forbidden
    } else if machine.offline {
        Miss::Offline
    } else {
        let fetched = download::fetch(machine.mirrors, &path).map_err(Miss::Download);
        match fetched.and_then(|()| from_cache(&path, &paths)) {
            Ok(parts) => {
                let fresh = true;
                return Ok(with_origin(
                    parts,
                    DataOrigin::Download {
                        path,
                        fresh,
                        ignored,
                    },
                ));
            }
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
mod tests {
    use std::time::{Duration, Instant};

    use tempfile::TempDir;

    use super::super::testing::{gzip, idx_files, real_mnist, refusing_mirror, serve, write_idx};
    use super::*;

    /// A machine without network whose cache is `dir`.
    fn offline(dir: &TempDir) -> Machine<'static> {
        Machine {
            cache: Some(dir.path().into()),
            offline: true,
            mirrors: &[],
        }
    }

    fn small() -> (Digits, Digits) {
        (generate(30, 1), generate(20, 2))
    }

    fn in_folder(dir: &Path) -> Result<MnistData, DataError> {
        let request = DataRequest {
            data_dir: Some(dir.into()),
            allow_download: true,
            ..DataRequest::default()
        };
        // Nothing but the folder may be used.
        let machine = Machine {
            cache: None,
            offline: true,
            mirrors: &[],
        };
        resolve_on(&machine, &request)
    }

    /// A request that is quick to fulfil by drawing.
    fn auto() -> DataRequest {
        DataRequest {
            allow_download: true,
            train_limit: Some(12),
            test_limit: Some(8),
            ..DataRequest::default()
        }
    }

    /// Puts the real files where Burn keeps its copy.
    fn fill_burn_cache(cache: &Path, real: &Path) {
        for file in &FILES {
            let dir = cache.join("burn-dataset/mnist").join(file.part);
            fs::create_dir_all(&dir).unwrap();
            let packed = fs::File::open(file.find(real).unwrap().unwrap()).unwrap();
            let mut plain = fs::File::create(dir.join(file.name)).unwrap();
            io::copy(&mut flate2::read::GzDecoder::new(packed), &mut plain).unwrap();
        }
    }

    #[test]
    fn reads_a_folder_of_custom_digits() {
        let (train, test) = small();
        let dir = TempDir::new().unwrap();
        write_idx(dir.path(), &train, &test);
        let data = in_folder(dir.path()).unwrap();
        assert_eq!((data.train, data.test), (train, test));
        assert_eq!(data.origin.name(), "custom");
        assert_eq!(
            data.origin.to_string(),
            format!(
                "custom digits from {} (not MNIST by their checksums)",
                dir.path().display()
            )
        );
    }

    #[test]
    fn reads_the_folder_below_that_torchvision_fills() {
        let (train, test) = small();
        let dir = TempDir::new().unwrap();
        let raw = dir.path().join("MNIST/raw");
        write_idx(&raw, &train, &test);
        let data = in_folder(dir.path()).unwrap();
        assert_eq!(data.train, train);
        assert_eq!(
            data.origin,
            DataOrigin::Folder {
                path: raw,
                genuine: false
            }
        );
    }

    #[test]
    fn reads_gzip_files_with_dotted_names() {
        let (train, test) = small();
        let dir = TempDir::new().unwrap();
        for (file, bytes) in FILES.iter().zip(idx_files(&train, &test)) {
            let name = file.name.replace("-idx", ".idx") + ".gz";
            fs::write(dir.path().join(name), gzip(&bytes)).unwrap();
        }
        assert_eq!(in_folder(dir.path()).unwrap().test, test);
    }

    #[test]
    fn names_a_missing_file_and_draws_nothing() {
        let (train, test) = small();
        for file in &FILES {
            let dir = TempDir::new().unwrap();
            write_idx(dir.path(), &train, &test);
            fs::remove_file(dir.path().join(file.name)).unwrap();
            let error = in_folder(dir.path()).unwrap_err();
            assert!(
                matches!(&error, DataError::Missing { dir: at, name }
                    if at == dir.path() && *name == file.name),
                "{error}"
            );
        }
    }

    #[test]
    fn names_a_damaged_file_and_draws_nothing() {
        let (train, test) = small();
        for (damaged, sound) in FILES.iter().zip(idx_files(&train, &test)) {
            let dir = TempDir::new().unwrap();
            write_idx(dir.path(), &train, &test);
            let plain = dir.path().join(damaged.name);
            let packed = plain.with_extension("gz");
            fs::remove_file(&plain).unwrap();
            let bytes = gzip(&sound);
            fs::write(&packed, &bytes[..bytes.len() / 2]).unwrap();
            let error = in_folder(dir.path()).unwrap_err();
            assert!(
                matches!(&error, DataError::Idx(IdxError::Gzip { path, .. }) if *path == packed),
                "{error}"
            );
        }
    }

    #[test]
    fn names_a_folder_that_is_none() {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        for none in [file, dir.path().join("absent")] {
            let error = in_folder(&none).unwrap_err();
            assert!(
                matches!(&error, DataError::Io { path, .. } if *path == none),
                "{error}"
            );
        }
    }

    #[test]
    fn reads_the_real_mnist() {
        let Some(real) = real_mnist() else { return };
        let data = in_folder(&real).unwrap();
        assert_eq!((data.train.len(), data.test.len()), (60_000, 10_000));
        assert_eq!(data.train.labels()[..5], [5, 0, 4, 1, 9]);
        assert_eq!(data.test.labels()[..5], [7, 2, 1, 0, 4]);
        assert_eq!(data.origin.name(), "mnist");
        assert_eq!(
            data.origin.to_string(),
            format!("MNIST from {}", real.display())
        );
    }

    #[test]
    fn limits_keep_the_first_digits() {
        let (train, test) = small();
        let dir = TempDir::new().unwrap();
        write_idx(dir.path(), &train, &test);
        let request = DataRequest {
            data_dir: Some(dir.path().into()),
            train_limit: Some(7),
            test_limit: Some(1_000),
            ..DataRequest::default()
        };
        let data = resolve_on(&offline(&dir), &request).unwrap();
        assert_eq!(data.train.labels(), &train.labels()[..7]);
        assert_eq!(data.test, test);
    }

    #[test]
    fn refuses_a_limit_of_zero() {
        let dir = TempDir::new().unwrap();
        let request = DataRequest {
            test_limit: Some(0),
            ..auto()
        };
        let error = resolve_on(&offline(&dir), &request).unwrap_err();
        assert!(
            matches!(error, DataError::ZeroLimit { part: "test" }),
            "{error}"
        );
    }

    #[test]
    fn draws_on_request_without_looking_around() {
        let dir = TempDir::new().unwrap();
        let request = DataRequest {
            choice: DatasetChoice::Synthetic,
            seed: 4,
            ..auto()
        };
        let data = resolve_on(&offline(&dir), &request).unwrap();
        assert_eq!(data.train, generate(12, 4));
        assert_ne!(data.test, generate(8, 4), "the test digits must be new");
        assert_eq!(data.origin.name(), "synthetic");
        assert_eq!(
            data.origin.to_string(),
            "built-in synthetic digits (seed 4), as requested"
        );
    }

    #[test]
    fn auto_draws_and_gives_the_reasons() {
        let dir = TempDir::new().unwrap();
        let data = resolve_on(&offline(&dir), &auto()).unwrap();
        assert_eq!((data.train.len(), data.test.len()), (12, 8));
        let line = data.origin.to_string();
        let cache = dir.path().display();
        assert_eq!(
            line,
            format!(
                "built-in synthetic digits (seed 0), because no MNIST was found: \
                 nothing in {cache}/burn-dataset/mnist; nothing in {cache}/burn-conv-bn/mnist; \
                 the download is forbidden by BURN_CONV_BN_OFFLINE"
            )
        );
    }

    #[test]
    fn mnist_on_demand_is_mnist_or_an_error() {
        let dir = TempDir::new().unwrap();
        let request = DataRequest {
            choice: DatasetChoice::Mnist,
            allow_download: false,
            ..auto()
        };
        let error = resolve_on(&offline(&dir), &request).unwrap_err();
        assert!(matches!(error, DataError::NotFound { .. }), "{error}");
        assert!(
            error.to_string().contains("the download is not allowed"),
            "{error}"
        );
    }

    #[test]
    fn fails_fast_without_a_network() {
        let dir = TempDir::new().unwrap();
        let mirrors = [refusing_mirror(), refusing_mirror()];
        let mirrors = mirrors.each_ref().map(String::as_str);
        let machine = Machine {
            offline: false,
            mirrors: &mirrors,
            ..offline(&dir)
        };
        let start = Instant::now();
        let data = resolve_on(&machine, &auto()).unwrap();
        assert!(
            start.elapsed() < Duration::from_secs(8),
            "{:?}",
            start.elapsed()
        );
        let line = data.origin.to_string();
        assert!(line.contains("the download failed"), "{line}");
        assert!(mirrors.iter().all(|mirror| line.contains(mirror)), "{line}");
    }

    #[test]
    fn a_system_without_a_cache_folder_draws() {
        let machine = Machine {
            cache: None,
            offline: false,
            mirrors: &[],
        };
        let line = resolve_on(&machine, &auto()).unwrap().origin.to_string();
        assert!(
            line.ends_with("this system names no cache folder"),
            "{line}"
        );
    }

    #[test]
    fn passes_over_unsound_or_foreign_files_in_the_caches() {
        let (train, test) = small();
        let dir = TempDir::new().unwrap();
        let (burn, own) = ("burn-dataset/mnist", "burn-conv-bn/mnist");
        write_idx(&dir.path().join(burn).join("train"), &train, &test);
        for (file, bytes) in FILES.iter().zip(idx_files(&train, &test)) {
            let path = download::stored(&dir.path().join(own), file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, gzip(&bytes)).unwrap();
        }
        let line = resolve_on(&offline(&dir), &auto())
            .unwrap()
            .origin
            .to_string();
        // Burn's copy lacks the test part; the earlier download holds other digits.
        assert!(line.contains("test/t10k-images-idx3-ubyte"), "{line}");
        assert!(
            line.contains("burn-conv-bn/mnist do not have the checksums of MNIST"),
            "{line}"
        );
    }

    #[test]
    fn uses_the_copy_that_burn_keeps() {
        let Some(real) = real_mnist() else { return };
        let dir = TempDir::new().unwrap();
        fill_burn_cache(dir.path(), &real);
        let data = resolve_on(&offline(&dir), &auto()).unwrap();
        assert_eq!(data.train.labels()[..3], [5, 0, 4]);
        let path = dir.path().join("burn-dataset/mnist");
        assert_eq!(data.origin, DataOrigin::BurnCache { path });
    }

    #[test]
    fn downloads_once_and_tells_what_it_passed_over() {
        let Some(real) = real_mnist() else { return };
        let dir = TempDir::new().unwrap();
        let (train, test) = small();
        for part in ["train", "test"] {
            write_idx(
                &dir.path().join("burn-dataset/mnist").join(part),
                &train,
                &test,
            );
        }
        let mirror = serve(move |name| fs::read(real.join(name)).ok());
        let online = Machine {
            offline: false,
            mirrors: &[&mirror],
            ..offline(&dir)
        };

        let first = resolve_on(&online, &auto()).unwrap().origin;
        let line = first.to_string();
        assert!(line.starts_with("MNIST downloaded to "), "{line}");
        assert!(line.contains("(passed over: the files in "), "{line}");

        let second = resolve_on(&offline(&dir), &auto()).unwrap().origin;
        assert!(
            matches!(second, DataOrigin::Download { fresh: false, .. }),
            "{second}"
        );
        assert_eq!(second.name(), "mnist");
    }

    #[test]
    fn the_variable_counts_unless_empty_or_zero() {
        let set = |value: &str| is_set(Some(OsStr::new(value)));
        assert!(set("1") && set("true"));
        assert!(!set("0") && !set("") && !is_set(None));
    }
}
