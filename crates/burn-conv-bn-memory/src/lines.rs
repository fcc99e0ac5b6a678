//! Count of the lines that another part of the program writes to a file.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Lines that a file grows by.
pub(crate) struct Lines {
    file: PathBuf,
    /// Bytes read.
    end: u64,
}

impl Lines {
    /// Lines already there are not counted.
    pub(crate) fn behind(file: &Path) -> Self {
        Self {
            end: file.metadata().map_or(0, |metadata| metadata.len()),
            file: file.to_path_buf(),
        }
    }

    /// Reports the number of lines after each wait in which it grew, until a wait is the last.
    pub(crate) fn watch(mut self, mut ended: impl FnMut() -> bool, mut report: impl FnMut(usize)) {
        let mut count = 0;
        loop {
            let is_last = ended();
            // A file that cannot be read has no lines.
            let new = self.read().unwrap_or_default();
            count += new;
            if new > 0 {
                report(count);
            }
            if is_last {
                break;
            }
        }
    }

    fn read(&mut self) -> io::Result<usize> {
        let mut file = File::open(&self.file)?;
        file.seek(SeekFrom::Start(self.end))?;
        let mut bytes = Vec::new();
        self.end += file.read_to_end(&mut bytes)? as u64;
        Ok(bytes.iter().filter(|byte| **byte == b'\n').count())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    #[test]
    fn what_a_file_grows_by_is_reported_when_it_grows() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("decisions");
        fs::write(&path, "of another process\n").unwrap();
        let lines = Lines::behind(&path);
        let mut writes = ["", "{\"key\":1}\n{\"ke", "", "y\":2}\n"].into_iter();
        let mut reports = Vec::new();
        let ended = || {
            let mut file = File::options().append(true).open(&path).unwrap();
            let write = writes.next();
            file.write_all(write.unwrap_or_default().as_bytes())
                .unwrap();
            write.is_none()
        };
        lines.watch(ended, |count| reports.push(count));
        assert_eq!(reports, [1, 2]);
    }

    #[test]
    fn nothing_is_reported_where_nothing_is_tuned() {
        let lines = Lines::behind(Path::new("/no/such/file"));
        lines.watch(|| true, |count| panic!("reported {count}"));
    }
}
