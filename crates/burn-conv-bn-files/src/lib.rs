//! Output files of programs: a report, a table, a picture, a file of a checkpoint.
//!
//! [`write()`] replaces a regular file as a whole or leaves it alone, follows links and keeps permissions.
//! It writes through devices, FIFOs and `/dev/stdout`. Before a long computation, [`check`] tests whether
//! [`write()`] can write, and [`check_all`] also whether two outputs are one file.

mod error;
mod lock;
mod target;

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

pub use error::OutputError;
pub use lock::Lock;
use target::{Target, folder_of};

/// Prefix of the name of a file that is still being written.
const PARTIAL: &str = ".partial-";

/// The interruption that a written file survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survives {
    /// The process is killed.
    Kill,
    /// The machine loses power: the write waits for the disk.
    PowerLoss,
}

/// Writes `bytes` to `path`.
///
/// A regular file, also one behind links, is replaced once all bytes are written, and keeps its permissions;
/// an absent one appears whole. Devices and the like are appended to.
///
/// # Errors
///
/// [`OutputError`] with the path. A regular file then keeps its content.
pub fn write(path: &Path, bytes: &[u8], survives: Survives) -> Result<(), OutputError> {
    let written = match Target::of(path)? {
        Target::Stream => append(path, bytes),
        // The process's own handles: a file that is opened again starts at its beginning.
        Target::StandardOutput => flushed(io::stdout().lock(), bytes),
        Target::StandardError => flushed(io::stderr().lock(), bytes),
        Target::File { path, permissions } => replace(&path, permissions, bytes, survives),
    };
    written.map_err(|source| OutputError::io(path, source))
}

/// Checks that [`write()`] can write to `path`, and changes nothing.
///
/// # Errors
///
/// [`OutputError`]: the path is a folder or ends like one, its folder is absent or not writable, or
/// the file is read-only.
pub fn check(path: &Path) -> Result<(), OutputError> {
    match Target::of(path)? {
        Target::Stream | Target::StandardOutput | Target::StandardError => Ok(()),
        Target::File { path: file, .. } => partial(folder_of(&file), None)
            .and_then(NamedTempFile::close)
            .map_err(|source| OutputError::io(path, source)),
    }
}

/// As [`check`], of several outputs with the names of their options. Two may not be one regular file.
///
/// # Errors
///
/// [`OutputError::Same`] with both names; errors as of [`check`].
pub fn check_all(outputs: &[(&'static str, &Path)]) -> Result<(), OutputError> {
    let mut seen: Vec<(&'static str, PathBuf)> = Vec::new();
    for &(name, path) in outputs {
        check(path)?;
        let Target::File { path: file, .. } = Target::of(path)? else {
            continue;
        };
        if let Some(&(first, _)) = seen.iter().find(|(_, other)| *other == file) {
            return Err(OutputError::Same {
                first,
                second: name,
                path: path.into(),
            });
        }
        seen.push((name, file));
    }
    Ok(())
}

/// The regular file, behind links, that [`write()`] replaces for `path`, absent or not. `None` where it
/// appends: interim results must not be written there.
///
/// # Errors
///
/// As of [`check`] for a path that cannot be resolved.
pub fn replaced(path: &Path) -> Result<Option<PathBuf>, OutputError> {
    Ok(match Target::of(path)? {
        Target::File { path, .. } => Some(path),
        _ => None,
    })
}

/// Waits until the names in a folder are on the disk, on Unix.
///
/// # Errors
///
/// The system's, except where a file system cannot sync folders.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    if !cfg!(unix) {
        return Ok(());
    }
    match File::open(folder)?.sync_all() {
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

/// Checks that a folder has room, by writing that many zeros to it for a moment.
///
/// # Errors
///
/// The system's, such as a full disk.
pub fn check_room(folder: &Path, bytes: usize) -> io::Result<()> {
    let mut file = partial(folder, None)?;
    let zeros = vec![0; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        let some = left.min(zeros.len());
        file.as_file_mut().write_all(&zeros[..some])?;
        left -= some;
    }
    // Some file systems report only now that they are full.
    file.as_file().sync_all()?;
    file.close()
}

/// Removes the unfinished files of a killed process from a folder, which may be absent.
///
/// Only the one process that writes to the folder may call it: another's unfinished files go, too.
///
/// # Errors
///
/// The system's.
pub fn sweep(folder: &Path) -> io::Result<()> {
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

fn append(path: &Path, bytes: &[u8]) -> io::Result<()> {
    OpenOptions::new().append(true).open(path)?.write_all(bytes)
}

fn flushed(mut stream: impl Write, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes)?;
    stream.flush()
}

fn replace(
    path: &Path,
    permissions: Option<Permissions>,
    bytes: &[u8],
    survives: Survives,
) -> io::Result<()> {
    let folder = folder_of(path);
    let mut file = partial(folder, permissions)?;
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

/// An unfinished file with these permissions, by default those of a new file.
fn partial(folder: &Path, permissions: Option<Permissions>) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PARTIAL);
    // Temporary files are private by default; an output is not.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let file = builder.tempfile_in(folder)?;
    if let Some(permissions) = permissions {
        file.as_file().set_permissions(permissions)?;
    }
    Ok(file)
}
