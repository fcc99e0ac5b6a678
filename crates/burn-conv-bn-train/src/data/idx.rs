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

/// Why an IDX file was refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum IdxError {
    /// The file could not be opened or read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// File that was read.
        path: PathBuf,
        /// What the system reported.
        source: io::Error,
    },
    /// The file starts like gzip, but its stream is cut, corrupt or followed by other bytes.
    #[error("{path} is damaged: {source} in its gzip stream")]
    Gzip {
        /// File that was read.
        path: PathBuf,
        /// What the decoder reported.
        source: io::Error,
    },
    /// The (decompressed) content ends before the data that the header announces.
    #[error("{path} is truncated: it holds {found} bytes, {wanted} were wanted")]
    Truncated {
        /// File that was read.
        path: PathBuf,
        /// Bytes that are there.
        found: u64,
        /// Bytes that were wanted.
        wanted: u64,
    },
    /// The (decompressed) content goes on after the data that the header announces.
    #[error("{path} has bytes after the {wanted} that its header announces")]
    Trailing {
        /// File that was read.
        path: PathBuf,
        /// Bytes that were wanted.
        wanted: u64,
    },
    /// The file does not start with the magic number of its kind.
    #[error("{path} starts with {found:#010x}, {wanted:#010x} was wanted (IDX {kind} of bytes)")]
    Magic {
        /// File that was read.
        path: PathBuf,
        /// First four bytes, big-endian.
        found: u32,
        /// Magic number of the wanted kind.
        wanted: u32,
        /// `"images"` or `"labels"`.
        kind: &'static str,
    },
    /// The images do not have the size of a digit.
    #[error("{path} has images of {rows}x{columns} pixels, {SIDE}x{SIDE} were wanted")]
    Shape {
        /// File that was read.
        path: PathBuf,
        /// Rows announced by the header.
        rows: u32,
        /// Columns announced by the header.
        columns: u32,
    },
    /// The header announces no items.
    #[error("{path} holds no items")]
    Empty {
        /// File that was read.
        path: PathBuf,
    },
    /// The header announces more than [`MAX_BYTES`].
    #[error("{path} announces {bytes} bytes, more than the limit of {MAX_BYTES}")]
    TooLarge {
        /// File that was read.
        path: PathBuf,
        /// Payload bytes announced by the header.
        bytes: u64,
    },
    /// A label is not a digit.
    #[error("{path} has the label {value} at index {index}, 0 to 9 were wanted")]
    Label {
        /// File that was read.
        path: PathBuf,
        /// Position of the first bad label, counted from 0.
        index: usize,
        /// The bad label.
        value: u8,
    },
    /// Images and labels do not belong together.
    #[error("{images_path} has {images} images, but {labels_path} has {labels} labels")]
    Count {
        /// File with the images.
        images_path: PathBuf,
        /// File with the labels.
        labels_path: PathBuf,
        /// Number of images.
        images: usize,
        /// Number of labels.
        labels: usize,
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
    /// use burn_conv_bn_train::data::{Digits, IdxError, PIXELS};
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
    /// assert!(matches!(swapped, Err(IdxError::Magic { kind: "images", .. })));
    /// # Ok::<(), anyhow::Error>(())
    /// ```
    pub fn read(images: &Path, labels: &Path) -> Result<Self, IdxError> {
        Self::pair(read(images, Kind::Images)?, read(labels, Kind::Labels)?)
    }

    /// Joins two files read by [`read`].
    pub(super) fn pair(images: IdxFile, labels: IdxFile) -> Result<Self, IdxError> {
        let count = images.data.len() / PIXELS;
        if count != labels.data.len() {
            return Err(IdxError::Count {
                images_path: images.path,
                labels_path: labels.path,
                images: count,
                labels: labels.data.len(),
            });
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
pub(super) enum Kind {
    Images,
    Labels,
}

impl Kind {
    fn magic(self) -> u32 {
        match self {
            Self::Images => 0x0000_0803,
            Self::Labels => 0x0000_0801,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Images => "images",
            Self::Labels => "labels",
        }
    }
}

/// Sound content of an IDX file.
pub(super) struct IdxFile {
    path: PathBuf,
    data: Vec<u8>,
    /// MD5 of the whole decompressed file, as a big-endian number.
    pub(super) md5: u128,
}

/// Reads one file to its end.
pub(super) fn read(path: &Path, kind: Kind) -> Result<IdxFile, IdxError> {
    match File::open(path) {
        Ok(file) => parse(path, BufReader::new(file), kind),
        Err(source) => Err(IdxError::Io {
            path: path.into(),
            source,
        }),
    }
}

/// Reads the content of a file; `path` names it in errors.
fn parse(path: &Path, source: impl BufRead, kind: Kind) -> Result<IdxFile, IdxError> {
    let mut content = Content::open(path, source)?;
    let magic = content.read_u32()?;
    if magic != kind.magic() {
        return Err(IdxError::Magic {
            path: path.into(),
            found: magic,
            wanted: kind.magic(),
            kind: kind.name(),
        });
    }

    let count = content.read_u32()?;
    let item_bytes = match kind {
        Kind::Images => {
            let (rows, columns) = (content.read_u32()?, content.read_u32()?);
            if [rows, columns] != [SIDE as u32; 2] {
                return Err(IdxError::Shape {
                    path: path.into(),
                    rows,
                    columns,
                });
            }
            PIXELS as u64
        }
        Kind::Labels => 1,
    };
    if count == 0 {
        return Err(IdxError::Empty { path: path.into() });
    }
    let bytes = u64::from(count) * item_bytes;
    if bytes > MAX_BYTES {
        return Err(IdxError::TooLarge {
            path: path.into(),
            bytes,
        });
    }

    let data = content.read(bytes)?;
    let md5 = content.finish()?;
    if kind == Kind::Labels
        && let Some(index) = data.iter().position(|&label| usize::from(label) >= CLASSES)
    {
        return Err(IdxError::Label {
            path: path.into(),
            index,
            value: data[index],
        });
    }
    Ok(IdxFile {
        path: path.into(),
        data,
        md5,
    })
}

/// The decompressed bytes of a file, hashed on the way.
struct Content<'a> {
    path: &'a Path,
    reader: Box<dyn Read + 'a>,
    gzip: bool,
    offset: u64,
    md5: md5::Context,
}

impl<'a> Content<'a> {
    fn open(path: &'a Path, mut source: impl BufRead + 'a) -> Result<Self, IdxError> {
        let first = source.fill_buf().map_err(|source| IdxError::Io {
            path: path.into(),
            source,
        })?;
        let gzip = first.starts_with(&GZIP_MAGIC);
        let reader: Box<dyn Read + 'a> = if gzip {
            Box::new(MultiGzDecoder::new(source))
        } else {
            Box::new(source)
        };
        Ok(Self {
            path,
            reader,
            gzip,
            offset: 0,
            md5: md5::Context::new(),
        })
    }

    /// The next `wanted` bytes, at most [`MAX_BYTES`].
    fn read(&mut self, wanted: u64) -> Result<Vec<u8>, IdxError> {
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < wanted {
            // A header is no reason to allocate: only bytes that are there are, for as many again.
            let more = bytes.len().max(FIRST_BYTES);
            let more = (wanted - bytes.len() as u64).min(more as u64);
            bytes.reserve_exact(more as usize);
            let read = (&mut self.reader).take(more).read_to_end(&mut bytes);
            match read {
                Ok(read) if read as u64 == more => {}
                Ok(_) => {
                    return Err(IdxError::Truncated {
                        path: self.path.into(),
                        found: self.offset + bytes.len() as u64,
                        wanted: self.offset + wanted,
                    });
                }
                Err(source) => return Err(self.failed(source)),
            }
        }
        self.offset += wanted;
        self.md5.consume(&bytes);
        Ok(bytes)
    }

    fn read_u32(&mut self) -> Result<u32, IdxError> {
        let bytes = self.read(4)?;
        Ok(bytes
            .iter()
            .fold(0, |word, &byte| word << 8 | u32::from(byte)))
    }

    /// Checks that nothing follows. In a gzip stream this also checks the CRC.
    fn finish(mut self) -> Result<u128, IdxError> {
        match self.reader.read(&mut [0]) {
            Ok(0) => Ok(u128::from_be_bytes(self.md5.finalize().into())),
            Ok(_) => Err(IdxError::Trailing {
                path: self.path.into(),
                wanted: self.offset,
            }),
            Err(source) => Err(self.failed(source)),
        }
    }

    fn failed(&self, source: io::Error) -> IdxError {
        use io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};

        let path = self.path.into();
        if self.gzip && matches!(source.kind(), InvalidData | InvalidInput | UnexpectedEof) {
            IdxError::Gzip { path, source }
        } else {
            IdxError::Io { path, source }
        }
    }
}

/// Reads `bytes` as a file of images and as one of labels, and checks what holds of any bytes. For
/// the fuzz target, and for the tests that do its work where there is no fuzzer.
///
/// Returns the number of items that each has, or why it was refused.
///
/// # Panics
///
/// If what should hold does not.
#[doc(hidden)]
pub fn exercise(bytes: &[u8]) -> [Result<usize, IdxError>; 2] {
    let path = Path::new("input");
    let read = [Kind::Images, Kind::Labels].map(|kind| -> Result<usize, IdxError> {
        let file = parse(path, bytes, kind)?;
        let (header, item_bytes) = match kind {
            Kind::Images => (16, PIXELS),
            Kind::Labels => (8, 1),
        };
        let items = file.data.len() / item_bytes;
        assert!(items > 0, "no items");
        assert_eq!(file.data.len() % item_bytes, 0, "a piece of an item");
        assert_eq!(file.data.capacity(), file.data.len(), "memory to spare");
        if kind == Kind::Labels {
            let digits = file.data.iter().all(|&label| usize::from(label) < CLASSES);
            assert!(digits, "a label that is no digit");
        }
        if !bytes.starts_with(&GZIP_MAGIC) {
            assert_eq!(bytes[header..], file.data, "other bytes than the file's");
            let count = u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
            assert_eq!(count as usize, items, "another number of items");
            let md5 = u128::from_be_bytes(md5::compute(bytes).into());
            assert_eq!(file.md5, md5, "another checksum");
        }
        Ok(items)
    });
    assert!(read.iter().any(Result::is_err), "two kinds at once");
    for error in read.iter().filter_map(|read| read.as_ref().err()) {
        let text = error.to_string();
        assert!(text.contains("input"), "the file is not named: {text}");
    }
    read
}

#[cfg(test)]
mod tests;
