//! Linux's tables of lines `name : value`.

use std::fs;
use std::path::Path;

/// A size, as `VmRSS: 13560 kB`, in bytes. `None` without such a file or line.
pub fn bytes(file: &Path, name: &str) -> Option<u64> {
    let table = fs::read_to_string(file).ok()?;
    let kibibytes = value(&table, name)?.strip_suffix("kB")?.trim();
    Some(1024 * kibibytes.parse::<u64>().ok()?)
}

/// The value of the first line of a name.
pub fn value<'a>(table: &'a str, name: &str) -> Option<&'a str> {
    table.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then_some(value.trim())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_bytes_by_their_whole_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let status = "Name:\tx\nVmRSSX:\t 1 kB\nVmHWM:\t   13564 kB\nVmRSS:\t   13560 kB\n";
        fs::write(file.path(), status).unwrap();
        assert_eq!(bytes(file.path(), "VmRSS"), Some(13560 * 1024));
        assert_eq!(bytes(file.path(), "VmHWM"), Some(13564 * 1024));
        assert_eq!(bytes(file.path(), "Vm"), None);
        assert_eq!(bytes(file.path(), "Name"), None);
        assert_eq!(bytes(Path::new("/none"), "VmRSS"), None);
    }
}
