//! Files that are not what they say: each is refused with an error, within bounded memory.
//!
//! One test alone in its process, as it looks at the bytes that the whole process has allocated.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;

use burn_conv_bn_memory::CountingAllocator;
use burn_conv_bn_train::data::{Digits, IdxError, IdxProblem, MAX_BYTES, PIXELS};
use flate2::Compression;
use flate2::write::GzEncoder;
use tempfile::tempdir;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

/// What a reader may take besides the data: its first 64 KiB of them, the state of the decoder, and
/// a header field of up to 64 KiB that it keeps, with room for as many again.
const READER: usize = 512 << 10;

const MIB: usize = 1 << 20;

/// A file that is refused.
struct Case {
    name: &'static str,
    /// Whether it replaces the images' file; otherwise the labels'.
    images: bool,
    content: Vec<u8>,
    /// Whether it is the right error.
    refused: fn(&IdxProblem) -> bool,
    /// Most bytes that reading it may take besides [`READER`], and besides the two images that are
    /// read before labels are.
    bound: usize,
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// The header of an images file.
fn images(count: u32, rows: u32, columns: u32) -> Vec<u8> {
    words(&[0x803, count, rows, columns])
}

/// The header of a labels file.
fn labels(count: u32) -> Vec<u8> {
    words(&[0x801, count])
}

fn then(mut header: Vec<u8>, bytes: &[u8]) -> Vec<u8> {
    header.extend(bytes);
    header
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    bomb(bytes, 0)
}

/// A gzip stream of `bytes` and a number of zeros, which take next to no bytes of it.
fn bomb(bytes: &[u8], zeros: usize) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).unwrap();
    io::copy(&mut io::repeat(0).take(zeros as u64), &mut encoder).unwrap();
    encoder.finish().unwrap()
}

/// What a bomb unpacks to.
const BOMB: usize = 64 * MIB;

/// Items of one byte, and of a digit, that are just within the limit.
const MOST_LABELS: u32 = MAX_BYTES as u32;
const MOST_IMAGES: u32 = MAX_BYTES as u32 / PIXELS as u32;

/// A case whose file replaces the images' or the labels', and whose reading takes next to no memory.
fn case(
    name: &'static str,
    images: bool,
    content: Vec<u8>,
    refused: fn(&IdxProblem) -> bool,
) -> Case {
    Case {
        name,
        images,
        content,
        refused,
        bound: 0,
    }
}

fn cases() -> Vec<Case> {
    use IdxProblem::{Count, Empty, Gzip, Label, Magic, Shape, TooLarge, Trailing, Truncated};

    let digit = [7; PIXELS];
    let sound = then(images(1, 28, 28), &digit);
    let zipped = gzip(&sound);
    let followed = then(zipped.clone(), b"more");
    // A name and a comment of the file without an end.
    let endless = |flag| {
        let header = vec![0x1f, 0x8b, 8, flag, 0, 0, 0, 0, 0, 0];
        then(header, "a".repeat(MIB).as_bytes())
    };
    let member = gzip(&[]);

    vec![
        case("nothing", true, vec![], |e| matches!(e, Truncated { .. })),
        case(
            "half a header",
            true,
            images(1, 28, 28)[..7].to_vec(),
            |e| matches!(e, Truncated { found: 7, .. }),
        ),
        case("a header alone", true, images(MOST_IMAGES, 28, 28), |e| {
            matches!(e, Truncated { found: 16, .. })
        }),
        case("half an image", true, sound[..500].to_vec(), |e| {
            matches!(e, Truncated { found: 500, .. })
        }),
        case(
            "an image too many",
            true,
            then(sound.clone(), &digit),
            |e| matches!(e, Trailing { .. }),
        ),
        case("no images", true, images(0, 28, 28), |e| matches!(e, Empty)),
        case("no labels", false, labels(0), |e| matches!(e, Empty)),
        case(
            "no file of ours",
            true,
            b"<html>please log in</html>".to_vec(),
            |e| {
                matches!(
                    e,
                    Magic {
                        found: 0x3c68_746d,
                        ..
                    }
                )
            },
        ),
        case("labels for images", true, then(labels(2), &[1, 2]), |e| {
            matches!(e, Magic { found: 0x801, .. })
        }),
        case("images for labels", false, sound.clone(), |e| {
            matches!(e, Magic { found: 0x803, .. })
        }),
        case(
            "numbers of two bytes",
            true,
            words(&[0xb03, 1, 28, 28]),
            |e| matches!(e, Magic { found: 0xb03, .. }),
        ),
        case("no rows", true, images(1, 0, 28), |e| {
            matches!(e, Shape { .. })
        }),
        case("huge images", true, images(1, u32::MAX, u32::MAX), |e| {
            matches!(e, Shape { .. })
        }),
        case(
            "images that overflow",
            true,
            images(u32::MAX, u32::MAX, u32::MAX),
            |e| matches!(e, Shape { .. }),
        ),
        case(
            "an image beyond the limit",
            true,
            images(MOST_IMAGES + 1, 28, 28),
            |e| matches!(e, TooLarge { .. }),
        ),
        case(
            "as many images as can be said",
            true,
            images(u32::MAX, 28, 28),
            |e| matches!(e, TooLarge { .. }),
        ),
        case(
            "as many labels as can be said",
            false,
            labels(u32::MAX),
            |e| matches!(e, TooLarge { .. }),
        ),
        case(
            "all labels within the limit",
            false,
            labels(MOST_LABELS),
            |e| matches!(e, Truncated { found: 8, .. }),
        ),
        case(
            "a label that is no digit",
            false,
            then(labels(2), &[9, 10]),
            |e| {
                matches!(
                    e,
                    Label {
                        index: 1,
                        value: 10,
                        ..
                    }
                )
            },
        ),
        case("a label too few", false, then(labels(1), &[1]), |e| {
            matches!(
                e,
                Count {
                    images: 2,
                    labels: 1,
                    ..
                }
            )
        }),
        case(
            "half a gzip stream",
            true,
            zipped[..zipped.len() / 2].to_vec(),
            |e| matches!(e, Gzip { .. }),
        ),
        case("a gzip header alone", true, zipped[..10].to_vec(), |e| {
            matches!(e, Gzip { .. })
        }),
        case("more after a gzip stream", true, followed, |e| {
            matches!(e, Gzip { .. })
        }),
        case("a name without an end", true, endless(8), |e| {
            matches!(e, Gzip { .. })
        }),
        case("a comment without an end", true, endless(16), |e| {
            matches!(e, Gzip { .. })
        }),
        case(
            "many streams of nothing",
            true,
            member.repeat(20_000),
            |e| matches!(e, Truncated { found: 0, .. }),
        ),
        case(
            "a bomb that is no file of ours",
            true,
            bomb(&[], BOMB),
            |e| matches!(e, Magic { found: 0, .. }),
        ),
        case("a bomb after an image", true, bomb(&sound, BOMB), |e| {
            matches!(e, Trailing { .. })
        }),
        case(
            "a bomb after a label",
            false,
            bomb(&then(labels(1), &[1]), BOMB),
            |e| matches!(e, Trailing { .. }),
        ),
        case(
            "a bomb beyond the limit",
            true,
            bomb(&images(u32::MAX, 28, 28), BOMB),
            |e| matches!(e, TooLarge { .. }),
        ),
        Case {
            // Whatever the header announces, at most twice the file's bytes are allocated.
            bound: 2 * BOMB,
            ..case(
                "a bomb that ends early",
                true,
                bomb(&images(MOST_IMAGES, 28, 28), BOMB),
                |e| matches!(e, Truncated { .. }),
            )
        },
        Case {
            // It is what it says: black images, which are too many for the labels.
            bound: BOMB,
            ..case(
                "a bomb that keeps its word",
                true,
                bomb(
                    &images((BOMB / PIXELS) as u32, 28, 28),
                    BOMB / PIXELS * PIXELS,
                ),
                |e| matches!(e, Count { labels: 2, .. }),
            )
        },
    ]
}

#[test]
fn files_are_refused_within_bounds() {
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (images_path, labels_path) = (at("images"), at("labels"));
    let sound_images = then(images(2, 28, 28), &[5; 2 * PIXELS]);
    let sound_labels = then(labels(2), &[3, 9]);
    let write = |path: &Path, content: &[u8]| fs::write(path, content).unwrap();
    write(&images_path, &sound_images);
    write(&labels_path, &sound_labels);
    let (digits, peak) = read(&images_path, &labels_path);
    assert_eq!(digits.unwrap().labels(), [3, 9]);
    assert!(peak < READER, "{peak} bytes for two digits");

    for case in cases() {
        let Case {
            name,
            images,
            content,
            refused,
            bound,
        } = case;
        let (path, sound) = if images {
            (&images_path, &sound_images)
        } else {
            (&labels_path, &sound_labels)
        };
        write(path, &content);
        drop(content);
        let (digits, peak) = read(&images_path, &labels_path);
        let error = match digits {
            Ok(digits) => panic!("{name}: accepted, as {} digits", digits.len()),
            Err(error) => error,
        };
        assert!(refused(&error.problem), "{name}: {error}");
        assert!(
            error.to_string().contains(path.to_str().unwrap()),
            "{name}: {error}"
        );
        assert!(
            peak < bound + READER,
            "{name}: {peak} bytes, {} are too many",
            bound + READER
        );
        write(path, sound);
    }

    // What never ends is no file of ours after four bytes.
    if cfg!(unix) {
        let zeros = Path::new("/dev/zero");
        let (digits, peak) = read(zeros, zeros);
        let error = digits.unwrap_err();
        let problem = &error.problem;
        assert!(
            matches!(problem, IdxProblem::Magic { found: 0, .. }),
            "{error}"
        );
        assert!(peak < READER, "{peak} bytes for a device");
    }
}

/// What reading two files gives, and the most bytes that it took at any moment.
fn read(images: &Path, labels: &Path) -> (Result<Digits, IdxError>, usize) {
    let before = ALLOCATOR.reset_peak();
    let digits = Digits::read(images, labels);
    (digits, ALLOCATOR.peak() - before)
}
