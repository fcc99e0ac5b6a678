//! The four files of MNIST.

use std::path::{Path, PathBuf};

use super::idx::{self, Digits, IdxError, Kind};

/// One file of MNIST.
pub(super) struct MnistFile {
    /// Name of the decompressed file.
    pub(super) name: &'static str,
    /// `"train"` or `"test"`; Burn's cache has a folder for each.
    pub(super) part: &'static str,
    pub(super) kind: Kind,
    /// MD5 of the decompressed file, as a big-endian number.
    pub(super) md5: u128,
}

/// Training images and labels, then test images and labels.
pub(super) const FILES: [MnistFile; 4] = [
    MnistFile {
        name: "train-images-idx3-ubyte",
        part: "train",
        kind: Kind::Images,
        md5: 0x6bbc_9ace_898e_44ae_57da_46a3_2403_1adb,
    },
    MnistFile {
        name: "train-labels-idx1-ubyte",
        part: "train",
        kind: Kind::Labels,
        md5: 0xa25b_ea73_6e30_d166_cddd_b491_f175_f624,
    },
    MnistFile {
        name: "t10k-images-idx3-ubyte",
        part: "test",
        kind: Kind::Images,
        md5: 0x2646_ac64_7ad5_339d_bf08_2846_2832_69ea,
    },
    MnistFile {
        name: "t10k-labels-idx1-ubyte",
        part: "test",
        kind: Kind::Labels,
        md5: 0x27ae_3e4e_0951_9cfb_b04c_3296_1520_3637,
    },
];

impl MnistFile {
    /// Looks for the file under the names that are in use, plain before gzip.
    pub(super) fn find(&self, dir: &Path) -> Option<PathBuf> {
        let dotted = self.name.replace("-idx", ".idx");
        let names = [self.name, &dotted].into_iter();
        names
            .flat_map(|name| ["", ".gz"].map(|suffix| dir.join(format!("{name}{suffix}"))))
            .find(|path| path.is_file())
    }
}

/// Reads the four files, given in the order of [`FILES`]: the training and the test digits, and whether all
/// have the checksums of MNIST.
pub(super) fn read(paths: &[PathBuf; 4]) -> Result<([Digits; 2], bool), IdxError> {
    let mut genuine = true;
    let mut part = |first: usize| {
        let [images, labels] = [first, first + 1].map(|i| {
            let file = idx::read(&paths[i], FILES[i].kind)?;
            genuine &= file.md5 == FILES[i].md5;
            Ok(file)
        });
        Digits::pair(images?, labels?)
    };
    let digits = [part(0)?, part(2)?];
    Ok((digits, genuine))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;

    #[test]
    fn finds_every_name_in_use() {
        for name in [
            "train-images-idx3-ubyte",
            "train-images-idx3-ubyte.gz",
            "train-images.idx3-ubyte",
            "train-images.idx3-ubyte.gz",
        ] {
            let dir = TempDir::new().unwrap();
            let path = dir.path().join(name);
            assert_eq!(FILES[0].find(dir.path()), None);
            fs::create_dir(&path).unwrap();
            assert_eq!(FILES[0].find(dir.path()), None, "a folder is no file");
            fs::remove_dir(&path).unwrap();
            fs::write(&path, "").unwrap();
            assert_eq!(FILES[0].find(dir.path()), Some(path));
        }
    }

    #[test]
    fn finds_nothing_below_a_file() {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(FILES[0].find(&file), None);
    }
}
