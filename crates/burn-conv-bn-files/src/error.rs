use std::io;
use std::path::PathBuf;

/// Why an output cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OutputError {
    /// The path is a folder, or ends with a separator as a folder's does.
    #[error("cannot write {}: it is a folder, expected a file", .path.display())]
    Folder {
        /// The path as given.
        path: PathBuf,
    },
    /// The file's permissions forbid writing.
    #[error("cannot write {}: the file is read-only", .path.display())]
    ReadOnly {
        /// The path as given.
        path: PathBuf,
    },
    /// Two outputs are one file.
    #[error("{first} and {second} name the same file, {}", .path.display())]
    Same {
        /// Option that named the file first.
        first: &'static str,
        /// Option that named it again.
        second: &'static str,
        /// The path as the second option gave it.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot write {}: {source}", .path.display())]
    Io {
        /// The path as given.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl OutputError {
    /// The system's error for a path.
    pub fn io(path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io {
            path: path.into(),
            source,
        }
    }
}
