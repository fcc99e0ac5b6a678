//! Tensors as files: `input` is the file `input.f32`, raw little-endian f32 without a header.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// Bytes read at once: large buffers would be in the resident set when memory is measured.
const CHUNK: usize = 1 << 16;

/// Reads a tensor's values.
///
/// # Errors
///
/// The file cannot be read, or does not hold a whole number of values; named in the error.
pub fn read(folder: &Path, name: &str) -> Result<Vec<f32>> {
    let path = path(folder, name);
    let read = || -> Result<Vec<f32>> {
        let mut file = File::open(&path)?;
        let bytes = usize::try_from(file.metadata()?.len())?;
        ensure!(bytes.is_multiple_of(4), "{bytes} bytes are no f32 values");
        let mut values = Vec::with_capacity(bytes / 4);
        let mut buffer = vec![0; CHUNK.min(bytes)];
        while values.len() < bytes / 4 {
            let left = bytes - 4 * values.len();
            let chunk = &mut buffer[..left.min(CHUNK)];
            file.read_exact(chunk)?;
            let (words, _) = chunk.as_chunks::<4>();
            values.extend(words.iter().map(|word| f32::from_le_bytes(*word)));
        }
        Ok(values)
    };
    read().with_context(|| format!("cannot read {}", path.display()))
}

/// Writes a tensor's values.
///
/// # Errors
///
/// The file cannot be written; named in the error.
pub fn write(folder: &Path, name: &str, values: &[f32]) -> Result<()> {
    let path = path(folder, name);
    let write = || -> Result<()> {
        let mut file = BufWriter::new(File::create(&path)?);
        for value in values {
            file.write_all(&value.to_le_bytes())?;
        }
        Ok(file.flush()?)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

fn path(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.f32"))
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
    fn values_come_back_bit_for_bit_and_damage_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        // More than one chunk, and not a whole number of them.
        let values: Vec<f32> = (0..CHUNK / 4 + 3)
            .map(|i| (i as f32).sqrt() - 9.0)
            .collect();
        write(folder, "input", &values).unwrap();
        assert_eq!(read(folder, "input").unwrap(), values);
        let file = folder.join("input.f32");
        for (bytes, values) in [(&[][..], &[][..]), (&[0, 0, 0x80, 0x3f], &[1.0])] {
            std::fs::write(&file, bytes).unwrap();
            assert_eq!(read(folder, "input").unwrap(), values);
        }
        std::fs::write(&file, [0; 7]).unwrap();
        for name in ["input", "none"] {
            let error = read(folder, name).unwrap_err().to_string();
            assert!(error.contains(&format!("{name}.f32")), "{error}");
        }
    }

    #[test]
    fn errors_are_relative_to_the_largest_value() {
        assert_eq!(relative_error(&[1.0, 4.5], &[1.0, 4.0]), Some(0.125));
        assert_eq!(relative_error(&[0.5, -4.0], &[0.0, -4.0]), Some(0.125));
        assert_eq!(relative_error(&[2.0], &[2.0]), Some(0.0));
        assert_eq!(relative_error(&[f32::MAX], &[-f32::MAX]), Some(2.0));
        for (values, reference) in [
            (&[1.0][..], &[1.0, 2.0][..]),
            (&[f32::NAN, 1.0], &[1.0, 1.0]),
            (&[1.0], &[f32::INFINITY]),
            (&[0.0], &[0.0]),
            (&[], &[]),
        ] {
            assert_eq!(relative_error(values, reference), None);
        }
    }
}
