use std::fs::{self, Permissions};
use std::io;
use std::path::{Path, PathBuf};

use crate::OutputError;

/// Most links that a path is followed through, as on Linux.
const MAX_LINKS: usize = 40;

/// What a path names, behind its links.
#[derive(Debug)]
pub(crate) enum Target {
    /// A regular file with its permissions, or an absent one.
    File {
        /// Its folder as the system names it, and its name.
        path: PathBuf,
        permissions: Option<Permissions>,
    },
    /// A device, FIFO or socket, or another open file of a process.
    Stream,
    /// This process's standard output, also by a name such as `/dev/stdout`.
    StandardOutput,
    /// This process's standard error, also by a name such as `/dev/stderr`.
    StandardError,
}

impl Target {
    pub(crate) fn of(path: &Path) -> Result<Self, OutputError> {
        let folder = || OutputError::Folder { path: path.into() };
        let text = path.as_os_str().to_string_lossy();
        if text.ends_with(std::path::is_separator) {
            return Err(folder());
        }
        let permissions = match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => return Err(folder()),
            Ok(metadata) => metadata.is_file().then(|| metadata.permissions()),
            // A dangling link is an absent file, too.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(OutputError::io(path, error)),
        };
        if permissions.as_ref().is_some_and(Permissions::readonly) {
            return Err(OutputError::ReadOnly { path: path.into() });
        }
        let target = follow(path).map_err(|error| OutputError::io(path, error))?;
        match target {
            Self::File { path, .. } if permissions.is_none() && path.exists() => Ok(Self::Stream),
            Self::File { path, .. } => Ok(Self::File { path, permissions }),
            stream => Ok(stream),
        }
    }
}

/// The folder of a file.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Where a path's links end, without permissions. A device still counts as a file.
fn follow(path: &Path) -> io::Result<Target> {
    let mut path = path.to_path_buf();
    for _ in 0..MAX_LINKS {
        let folder = fs::canonicalize(folder_of(&path))?;
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        if is_open_files(&folder) {
            let own = fs::canonicalize("/proc/self/fd").is_ok_and(|own| own == folder);
            return Ok(match name.to_str() {
                Some("1") if own => Target::StandardOutput,
                Some("2") if own => Target::StandardError,
                // Readers of an open file would keep the old one if it were replaced.
                _ => Target::Stream,
            });
        }
        path = folder.join(name);
        match fs::read_link(&path) {
            Ok(next) => path = folder.join(next),
            Err(_) => {
                return Ok(Target::File {
                    path,
                    permissions: None,
                });
            }
        }
    }
    Err(io::Error::other("too many links"))
}

/// Whether a folder is a process's list of open files on Linux: `/proc/N/fd`.
fn is_open_files(folder: &Path) -> bool {
    folder.starts_with("/proc") && folder.ends_with("fd")
}
