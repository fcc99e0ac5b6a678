//! Tensors as the files of the [protocol](burn_conv_bn_bench::protocol).

use std::fs::File;
use std::io::{self, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Bytes read at once: large buffers would be in the resident set when memory is measured.
const CHUNK: usize = 1 << 16;

/// Reads a tensor's values.
pub fn read(folder: &Path, name: &str) -> Result<Vec<f32>> {
    let path = tensor_file(folder, name);
    read_values(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// Writes a tensor's values.
pub fn write(folder: &Path, name: &str, values: &[f32]) -> Result<()> {
    let path = tensor_file(folder, name);
    write_values(&path, values).with_context(|| format!("cannot write {}", path.display()))
}

/// Where the tensor `name` lies in a folder.
pub fn tensor_file(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.f32"))
}

fn read_values(path: &Path) -> io::Result<Vec<f32>> {
    let mut file = File::open(path)?;
    let bytes = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    if !bytes.is_multiple_of(4) {
        let message = format!("{bytes} bytes are no whole number of f32 values");
        return Err(io::Error::new(ErrorKind::InvalidData, message));
    }
    let mut values = Vec::with_capacity(bytes / 4);
    let mut buffer = vec![0; CHUNK.min(bytes)];
    let mut left = bytes;
    while left > 0 {
        let chunk = &mut buffer[..left.min(CHUNK)];
        file.read_exact(chunk)?;
        left -= chunk.len();
        let (words, _) = chunk.as_chunks::<4>();
        values.extend(words.iter().map(|word| f32::from_le_bytes(*word)));
    }
    Ok(values)
}

fn write_values(path: &Path, values: &[f32]) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    for value in values {
        file.write_all(&value.to_le_bytes())?;
    }
    file.flush()
}

/// Largest difference relative to the largest reference value. `None` if the lengths differ, a
/// value is not finite, or the reference is all zeros, which would prove nothing.
pub fn relative_error(values: &[f32], reference: &[f32]) -> Option<f64> {
    if values.len() != reference.len() {
        return None;
    }
    let (mut largest, mut scale) = (0.0f64, 0.0f64);
    for (&value, &reference) in values.iter().zip(reference) {
        if !(value.is_finite() && reference.is_finite()) {
            return None;
        }
        let (value, reference) = (f64::from(value), f64::from(reference));
        largest = largest.max((value - reference).abs());
        scale = scale.max(reference.abs());
    }
    (scale > 0.0).then_some(largest / scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_back_bit_for_bit() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        // More than one chunk, and not a whole number of them.
        let values: Vec<f32> = (0..CHUNK / 4 + 3)
            .map(|i| (i as f32).sqrt() - 9.0)
            .collect();
        write(folder, "input", &values).unwrap();
        assert_eq!(read(folder, "input").unwrap(), values);
        let path = folder.join("input.f32");
        std::fs::write(&path, [0, 0, 0x80, 0x3f]).unwrap();
        assert_eq!(read(folder, "input").unwrap(), [1.0]);
        std::fs::write(&path, []).unwrap();
        assert!(read(folder, "input").unwrap().is_empty());
    }

    #[test]
    fn a_damaged_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = tensor_file(folder.path(), "input");
        std::fs::write(&path, [0; 7]).unwrap();
        let error = read_values(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        let error = read(folder.path(), "none").unwrap_err().to_string();
        assert!(error.contains("none.f32"), "{error}");
    }

    #[test]
    fn errors_are_relative_to_the_largest_value() {
        assert_eq!(relative_error(&[1.0, 4.5], &[1.0, 4.0]), Some(0.125));
        assert_eq!(relative_error(&[0.5, -4.0], &[0.0, -4.0]), Some(0.125));
        assert_eq!(relative_error(&[2.0], &[2.0]), Some(0.0));
        assert_eq!(relative_error(&[f32::MAX], &[-f32::MAX]), Some(2.0));
    }

    #[test]
    fn what_proves_nothing_has_no_error() {
        assert_eq!(relative_error(&[1.0], &[1.0, 2.0]), None);
        assert_eq!(relative_error(&[f32::NAN, 1.0], &[1.0, 1.0]), None);
        assert_eq!(relative_error(&[1.0], &[f32::INFINITY]), None);
        assert_eq!(relative_error(&[0.0], &[0.0]), None);
        assert_eq!(relative_error(&[], &[]), None);
    }
}
