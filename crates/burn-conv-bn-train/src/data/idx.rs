//! Reader of the IDX format, in which MNIST is distributed.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;
use thiserror::Error;

/// Height and width of a digit, in pixels.
pub const SIDE: usize = 28;

/// Number of pixels of a digit.
pub const PIXELS: usize = SIDE * SIDE;

/// Number of classes; the labels are `0..CLASSES`.
pub const CLASSES: usize = 10;

/// Most payload bytes (256 MiB) that a header may announce.
pub const MAX_BYTES: u64 = 256 << 20;

/// Most bytes that are allocated before any of them is there.
const FIRST_BYTES: usize = 64 << 10;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// An IDX file that was refused.
#[derive(Debug, Error)]
#[error("{} {problem}", .path.display())]
pub struct IdxError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: IdxProblem,
}

/// What is wrong with an IDX file.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum IdxProblem {
    /// It could not be opened or read, as the system reported.
    #[error("cannot be read: {0}")]
    Io(io::Error),
    /// It starts like gzip, but its stream is cut, corrupt or followed by other bytes, as the decoder
    /// reported.
    #[error("is damaged: {0} in its gzip stream")]
    Gzip(io::Error),
    /// The (decompressed) content ends before the data that the header announces.
    #[error("is truncated: it holds {found} bytes, {wanted} were wanted")]
    Truncated {
        /// Bytes that are there.
        found: u64,
        /// Bytes that were wanted.
        wanted: u64,
    },
    /// The (decompressed) content goes on after the bytes that the header announces.
    #[error("has bytes after the {0} that its header announces")]
    Trailing(u64),
    /// It does not start with the magic number of its kind.
    #[error("starts with {found:#010x}, {wanted:#010x} was wanted (IDX {kind} of bytes)")]
    Magic {
        /// First four bytes, big-endian.
        found: u32,
        /// Magic number of the wanted kind.
        wanted: u32,
        /// `"images"` or `"labels"`.
        kind: &'static str,
    },
    /// The images do not have the size of a digit.
    #[error("has images of {rows}x{columns} pixels, {SIDE}x{SIDE} were wanted")]
    Shape {
        /// Rows announced by the header.
        rows: u32,
        /// Columns announced by the header.
        columns: u32,
    },
    /// The header announces no items.
    #[error("holds no items")]
    Empty,
    /// The header announces more bytes than [`MAX_BYTES`].
    #[error("announces {0} bytes, more than the limit of {MAX_BYTES}")]
    TooLarge(u64),
    /// A label is not a digit.
    #[error("has the label {value} at index {index}, 0 to 9 were wanted")]
    Label {
        /// Position of the first bad label, counted from 0.
        index: usize,
        /// The bad label.
        value: u8,
    },
    /// Images and labels do not belong together.
    #[error("has {images} images, but {} has {labels} labels", .labels_path.display())]
    Count {
        /// Number of images.
        images: usize,
        /// Number of labels.
        labels: usize,
        /// File with the labels.
        labels_path: PathBuf,
    },
}

/// Labelled 28x28 grey digits, white (255) on black (0).
///
/// Drawn by `generate`, or read by [`read`](Self::read).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digits {
    images: Vec<u8>,
    labels: Vec<u8>,
}

impl Digits {
    /// Reads an images file and its labels file, each plain or gzip-compressed.
    ///
    /// Whatever a file announces or unpacks to, it takes no more memory than twice the bytes that
    /// were read from it and 64 KiB, and no more than [`MAX_BYTES`], besides the decoder's own.
    ///
    /// # Errors
    ///
    /// [`IdxError`] if a file cannot be read or is not sound, if the images
    /// are not 28x28, or if the two files differ in their number of items.
    ///
    /// # Examples
    ///
    /// ```
    /// use burn_conv_bn_train::data::{Digits, IdxProblem, PIXELS};
    ///
    /// let folder = tempfile::tempdir()?;
    /// let [images, labels] = ["images", "labels"].map(|name| folder.path().join(name));
    /// // One image, black all over, that is said to be a 7.
    /// let header = [0x0803_u32, 1, 28, 28].map(u32::to_be_bytes).concat();
    /// std::fs::write(&images, [header, vec![0; PIXELS]].concat())?;
    /// std::fs::write(&labels, [0_u8, 0, 8, 1, 0, 0, 0, 1, 7])?;
    /// let digits = Digits::read(&images, &labels)?;
    /// assert_eq!((digits.len(), digits.label(0)), (1, 7));
    ///
    /// let swapped = Digits::read(&labels, &images);
    /// let problem = swapped.unwrap_err().problem;
    /// assert!(matches!(problem, IdxProblem::Magic { kind: "images", .. }));
    /// # Ok::<(), anyhow::Error>(())
    /// ```
    pub fn read(images: &Path, labels: &Path) -> Result<Self, IdxError> {
        Self::pair(read(images, Kind::Images)?, read(labels, Kind::Labels)?)
    }

    /// Joins two files read by [`read`].
    pub(super) fn pair(images: IdxFile, labels: IdxFile) -> Result<Self, IdxError> {
        let count = images.data.len() / PIXELS;
        if count != labels.data.len() {
            let problem = IdxProblem::Count {
                images: count,
                labels: labels.data.len(),
                labels_path: labels.path,
            };
            let path = images.path;
            return Err(IdxError { path, problem });
        }
        Ok(Self::from_parts(images.data, labels.data))
    }

    /// `images` holds [`PIXELS`] bytes for each of the `labels`, which are below [`CLASSES`].
    pub(super) fn from_parts(images: Vec<u8>, labels: Vec<u8>) -> Self {
        debug_assert_eq!(images.len(), labels.len() * PIXELS);
        Self { images, labels }
    }

    /// Number of digits.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are no digits.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Pixels of one digit, row by row.
    ///
    /// # Panics
    ///
    /// If `index` is not below [`len`](Self::len).
    pub fn image(&self, index: usize) -> &[u8; PIXELS] {
        &self.images.as_chunks().0[index]
    }

    /// Class of one digit, below 10.
    ///
    /// # Panics
    ///
    /// If `index` is not below [`len`](Self::len).
    pub fn label(&self, index: usize) -> u8 {
        self.labels[index]
    }

    /// Pixels of all digits, `[len, 28, 28]` in row-major order.
    pub fn images(&self) -> &[u8] {
        &self.images
    }

    /// Classes of all digits, `[len]`.
    pub fn labels(&self) -> &[u8] {
        &self.labels
    }

    /// Keeps the first `limit` digits; keeps all if there are fewer.
    pub fn truncate(&mut self, limit: usize) {
        self.labels.truncate(limit);
        self.images.truncate(self.labels.len() * PIXELS);
    }
}

/// Kind of an IDX file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[doc(hidden)]
pub enum Kind {
    Images,
    Labels,
}

/// Sound content of an IDX file.
pub(super) struct IdxFile {
    path: PathBuf,
    pub(super) data: Vec<u8>,
    /// MD5 of the whole decompressed file, as a big-endian number.
    pub(super) md5: u128,
}

/// Reads one file to its end.
pub(super) fn read(path: &Path, kind: Kind) -> Result<IdxFile, IdxError> {
    let opened = File::open(path).map_err(IdxProblem::Io);
    let content = opened.and_then(|file| parse(BufReader::new(file), kind));
    let path = path.to_path_buf();
    match content {
        Ok((data, md5)) => Ok(IdxFile { path, data, md5 }),
        Err(problem) => Err(IdxError { path, problem }),
    }
}

/// Reads the content of a file: its data, and the MD5 of all of it.
#[doc(hidden)]
pub fn parse(source: impl BufRead, kind: Kind) -> Result<(Vec<u8>, u128), IdxProblem> {
    let (wanted, name, item_bytes) = match kind {
        Kind::Images => (0x0000_0803, "images", PIXELS as u64),
        Kind::Labels => (0x0000_0801, "labels", 1),
    };
    let mut content = Content::open(source)?;
    let found = content.read_u32()?;
    if found != wanted {
        let kind = name;
        return Err(IdxProblem::Magic {
            found,
            wanted,
            kind,
        });
    }
    let count = content.read_u32()?;
    if kind == Kind::Images {
        let (rows, columns) = (content.read_u32()?, content.read_u32()?);
        if [rows, columns] != [SIDE as u32; 2] {
            return Err(IdxProblem::Shape { rows, columns });
        }
    }
    let bytes = u64::from(count) * item_bytes;
    match bytes {
        0 => return Err(IdxProblem::Empty),
        1..=MAX_BYTES => {}
        _ => return Err(IdxProblem::TooLarge(bytes)),
    }

    let data = content.read(bytes)?;
    let md5 = content.finish()?;
    if kind == Kind::Labels
        && let Some(index) = data.iter().position(|&label| usize::from(label) >= CLASSES)
    {
        let value = data[index];
        return Err(IdxProblem::Label { index, value });
    }
    Ok((data, md5))
}

/// The decompressed bytes of a file, hashed on the way.
struct Content<'a> {
    reader: Box<dyn Read + 'a>,
    gzip: bool,
    offset: u64,
    md5: md5::Context,
}

impl<'a> Content<'a> {
    fn open(mut source: impl BufRead + 'a) -> Result<Self, IdxProblem> {
        let first = source.fill_buf().map_err(IdxProblem::Io)?;
        let gzip = first.starts_with(&GZIP_MAGIC);
        let reader: Box<dyn Read + 'a> = if gzip {
            Box::new(MultiGzDecoder::new(source))
        } else {
            Box::new(source)
        };
        Ok(Self {
            reader,
            gzip,
            offset: 0,
            md5: md5::Context::new(),
        })
    }

    /// The next `wanted` bytes, at most [`MAX_BYTES`].
    fn read(&mut self, wanted: u64) -> Result<Vec<u8>, IdxProblem> {
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < wanted {
            // A header is no reason to allocate: only bytes that are there are, for as many again.
            let more = bytes.len().max(FIRST_BYTES);
            let more = (wanted - bytes.len() as u64).min(more as u64);
            bytes.reserve_exact(more as usize);
            let read = (&mut self.reader).take(more).read_to_end(&mut bytes);
            if (read.map_err(|error| self.failed(error))? as u64) < more {
                return Err(IdxProblem::Truncated {
                    found: self.offset + bytes.len() as u64,
                    wanted: self.offset + wanted,
                });
            }
        }
        self.offset += wanted;
        self.md5.consume(&bytes);
        Ok(bytes)
    }

    fn read_u32(&mut self) -> Result<u32, IdxProblem> {
        let bytes = self.read(4)?;
        let shifted = |word, &byte: &u8| word << 8 | u32::from(byte);
        Ok(bytes.iter().fold(0, shifted))
    }

    /// Checks that nothing follows. In a gzip stream this also checks the CRC.
    fn finish(mut self) -> Result<u128, IdxProblem> {
        match self.reader.read(&mut [0]) {
            Ok(0) => Ok(u128::from_be_bytes(self.md5.finalize().into())),
            Ok(_) => Err(IdxProblem::Trailing(self.offset)),
            Err(error) => Err(self.failed(error)),
        }
    }

    fn failed(&self, error: io::Error) -> IdxProblem {
        use io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};

        if self.gzip && matches!(error.kind(), InvalidData | InvalidInput | UnexpectedEof) {
            IdxProblem::Gzip(error)
        } else {
            IdxProblem::Io(error)
        }
    }
}

#[cfg(test)]
mod tests;
