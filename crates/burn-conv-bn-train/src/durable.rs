//! Files that appear whole or not at all, and a folder that belongs to one process at a time.

use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tempfile::NamedTempFile;

/// How the name of a file begins that is still being written.
const PARTIAL: &str = ".partial-";

/// What a file that was written must survive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Survives {
    /// That the process is killed.
    Kill,
    /// That the machine loses power. Takes as long as the disk does.
    PowerLoss,
}

/// Writes `bytes` to `path`. What was there before stays there until all of them are written.
pub(crate) fn write_whole(path: &Path, bytes: &[u8], survives: Survives) -> io::Result<()> {
    let folder = folder_of(path);
    let mut file = partial(folder)?;
    file.as_file_mut().write_all(bytes)?;
    if survives == Survives::PowerLoss {
        file.as_file().sync_all()?;
    }
    file.persist(path).map_err(|error| error.error)?;
    match survives {
        Survives::Kill => Ok(()),
        Survives::PowerLoss => sync_folder(folder),
    }
}

/// Makes sure that the names in a folder are on the disk, as far as the system can.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    if !cfg!(unix) {
        return Ok(());
    }
    match File::open(folder)?.sync_all() {
        // Some file systems keep no folder apart from its files.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported
            ) =>
        {
            Ok(())
        }
        synced => synced,
    }
}

/// Writes `bytes` zeros to a folder for a moment.
pub(crate) fn check_room(folder: &Path, bytes: usize) -> io::Result<()> {
    let mut file = partial(folder)?;
    let zeros = vec![0; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        let some = left.min(zeros.len());
        file.as_file_mut().write_all(&zeros[..some])?;
        left -= some;
    }
    // Some file systems find out no earlier that they are full.
    file.as_file().sync_all()?;
    file.close()
}

/// Removes what a process that was killed had not finished writing to a folder.
///
/// Only for whoever holds the [`Lock`]: others may be writing.
pub(crate) fn sweep(folder: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(PARTIAL) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Keeps other processes that ask out of a folder, until it is dropped or the process ends.
pub(crate) struct Lock {
    _folder: Option<File>,
}

impl Lock {
    /// Locks a folder; none if somebody else has.
    ///
    /// Systems and file systems without such locks grant all of them.
    pub(crate) fn of(folder: &Path) -> Option<Self> {
        let Ok(file) = File::open(folder) else {
            return Some(Self { _folder: None });
        };
        match file.try_lock() {
            Ok(()) => Some(Self {
                _folder: Some(file),
            }),
            Err(TryLockError::WouldBlock) => None,
            Err(TryLockError::Error(_)) => Some(Self { _folder: None }),
        }
    }
}

/// A file that could not be written or removed.
#[derive(Debug)]
pub(crate) struct WriteFailure {
    pub(crate) path: PathBuf,
    pub(crate) source: io::Error,
}

impl WriteFailure {
    pub(crate) fn new(path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self {
            path: path.into(),
            source,
        }
    }
}

impl fmt::Display for WriteFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.source)
    }
}

/// Keeps the first failure of all that write for a training, each on a thread of its own. Clones
/// share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct FirstFailure(Arc<Mutex<Option<WriteFailure>>>);

impl FirstFailure {
    pub(crate) fn report(&self, failure: WriteFailure) {
        self.lock().get_or_insert(failure);
    }

    pub(crate) fn happened(&self) -> bool {
        self.lock().is_some()
    }

    pub(crate) fn take(&self) -> Option<WriteFailure> {
        self.lock().take()
    }

    fn lock(&self) -> MutexGuard<'_, Option<WriteFailure>> {
        // Each change is one store: a lock poisoned by a panic elsewhere guards a sound value.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn partial(folder: &Path) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PARTIAL);
    // What is written is no secret, which temporary files are taken for.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder)
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use tempfile::TempDir;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_by_another_that_is_whole() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("file");
        for survives in [Survives::Kill, Survives::PowerLoss] {
            for text in ["a long text", "short"] {
                write_whole(&path, text.as_bytes(), survives).unwrap();
                assert_eq!(fs::read_to_string(&path).unwrap(), text);
            }
        }
        assert_eq!(names(folder.path()), ["file"]);
    }

    #[test]
    fn what_cannot_be_written_is_left_as_it_was() {
        let folder = TempDir::new().unwrap();
        // A folder cannot be replaced by a file.
        let taken = folder.path().join("taken");
        fs::create_dir(&taken).unwrap();
        fs::write(taken.join("inside"), "kept").unwrap();
        write_whole(&taken, b"new", Survives::PowerLoss).unwrap_err();
        assert_eq!(fs::read_to_string(taken.join("inside")).unwrap(), "kept");
        assert_eq!(names(folder.path()), ["taken"]);
    }

    #[test]
    fn only_what_was_not_finished_is_swept() {
        let folder = TempDir::new().unwrap();
        let left = partial(folder.path()).unwrap();
        left.keep().unwrap();
        fs::write(folder.path().join("file"), "x").unwrap();
        assert_eq!(names(folder.path()).len(), 2);
        sweep(folder.path()).unwrap();
        assert_eq!(names(folder.path()), ["file"]);
        sweep(&folder.path().join("absent")).unwrap();
    }

    #[test]
    fn room_is_only_looked_for() {
        let folder = TempDir::new().unwrap();
        check_room(folder.path(), (3 << 20) + 1).unwrap();
        assert!(names(folder.path()).is_empty());
        check_room(&folder.path().join("absent"), 1).unwrap_err();
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_has_one_owner_at_a_time() {
        let folder = TempDir::new().unwrap();
        let lock = Lock::of(folder.path()).unwrap();
        assert!(Lock::of(folder.path()).is_none());
        drop(lock);
        assert!(Lock::of(folder.path()).is_some());
    }

    #[test]
    fn the_first_failure_is_kept() {
        let failure = FirstFailure::default();
        assert!(!failure.happened());
        for name in ["first", "second"] {
            let error = io::Error::from(io::ErrorKind::StorageFull);
            failure.clone().report(WriteFailure::new(name, error));
        }
        assert!(failure.happened());
        assert_eq!(failure.take().unwrap().path, Path::new("first"));
        assert!(!failure.happened());
    }
}
