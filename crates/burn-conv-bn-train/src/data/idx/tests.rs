use std::fs;

use tempfile::TempDir;

use super::super::testing::{gzip, image_file, label_file};
use super::*;

const LABELS: [u8; 3] = [7, 0, 9];

fn images() -> Vec<u8> {
    (0..3 * PIXELS).map(|i| (i % 251) as u8).collect()
}

fn write(dir: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn read_pair(images: &[u8], labels: &[u8]) -> Result<Digits, IdxError> {
    let dir = TempDir::new().unwrap();
    Digits::read(
        &write(&dir, "images", images),
        &write(&dir, "labels", labels),
    )
}

/// Reads what is no sound file of images.
fn refused(bytes: &[u8]) -> IdxError {
    read_pair(bytes, &label_file(&LABELS)).unwrap_err()
}

fn image_header(count: u32, rows: u32, columns: u32) -> Vec<u8> {
    [0x0803, count, rows, columns]
        .map(u32::to_be_bytes)
        .concat()
}

#[test]
fn reads_plain_files() {
    let digits = read_pair(&image_file(&images()), &label_file(&LABELS)).unwrap();
    assert_eq!(digits.len(), 3);
    assert!(!digits.is_empty());
    assert_eq!(digits.images(), images());
    assert_eq!(digits.labels(), LABELS);
    assert_eq!(digits.image(1)[..], images()[PIXELS..2 * PIXELS]);
    assert_eq!(digits.label(2), 9);
}

#[test]
fn reads_gzip_whatever_the_name() {
    let plain = read_pair(&image_file(&images()), &label_file(&LABELS)).unwrap();
    let zipped = read_pair(&gzip(&image_file(&images())), &gzip(&label_file(&LABELS))).unwrap();
    assert_eq!(plain, zipped);
}

#[test]
fn hashes_the_decompressed_file() {
    let dir = TempDir::new().unwrap();
    let bytes = label_file(&LABELS);
    let path = write(&dir, "labels", &gzip(&bytes));
    let wanted = u128::from_be_bytes(md5::compute(&bytes).into());
    assert_eq!(read(&path, Kind::Labels).unwrap().md5, wanted);
}

#[test]
fn truncates_images_and_labels_alike() {
    let mut digits = read_pair(&image_file(&images()), &label_file(&LABELS)).unwrap();
    digits.truncate(9);
    assert_eq!(digits.len(), 3);
    digits.truncate(2);
    assert_eq!(digits.labels(), &LABELS[..2]);
    assert_eq!(digits.images(), &images()[..2 * PIXELS]);
}

#[test]
fn refuses_an_absent_file() {
    let absent = Path::new("/nonexistent/images");
    let error = Digits::read(absent, absent).unwrap_err();
    assert_eq!(error.path, absent);
    assert!(matches!(error.problem, IdxProblem::Io(_)), "{error}");
}

#[test]
fn refuses_truncated_data_and_headers() {
    let bytes = image_file(&images());
    let whole = bytes.len() as u64;
    for length in [0, 3, 7, 15, 16, bytes.len() - 1] {
        let cut = &bytes[..length];
        for bytes in [cut.to_vec(), gzip(cut)] {
            let error = refused(&bytes);
            let IdxProblem::Truncated { found, wanted } = error.problem else {
                panic!("{length} bytes: {error}");
            };
            assert_eq!(found, length as u64);
            assert!(found < wanted && wanted <= whole, "{found} of {wanted}");
        }
    }
}

#[test]
fn refuses_trailing_bytes() {
    let mut bytes = image_file(&images());
    let whole = bytes.len() as u64;
    bytes.push(0);
    for bytes in [gzip(&bytes), bytes] {
        let error = refused(&bytes);
        assert!(
            matches!(
            error.problem,
            IdxProblem::Trailing(wanted) if wanted == whole),
            "{error}"
        );
    }
}

#[test]
fn refuses_damaged_gzip() {
    let sound = gzip(&image_file(&images()));
    let cut = sound[..sound.len() - 9].to_vec();
    let mut wrong_crc = sound.clone();
    wrong_crc[sound.len() - 8] ^= 1;
    let followed = [&sound[..], b"more"].concat();
    for bytes in [cut, wrong_crc, followed] {
        let error = refused(&bytes);
        assert!(matches!(error.problem, IdxProblem::Gzip(_)), "{error}");
    }
}

#[test]
fn refuses_the_other_kind() {
    let error = refused(&label_file(&LABELS));
    assert!(
        matches!(
            error.problem,
            IdxProblem::Magic {
                found: 0x801,
                wanted: 0x803,
                ..
            }
        ),
        "{error}"
    );
    let error = read_pair(&image_file(&images()), &image_file(&images())).unwrap_err();
    assert!(
        matches!(
            error.problem,
            IdxProblem::Magic {
                found: 0x803,
                wanted: 0x801,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn refuses_images_of_another_size() {
    for (rows, columns) in [(28, 32), (32, 28), (0, 0), (u32::MAX, u32::MAX)] {
        let error = refused(&image_header(1, rows, columns));
        assert!(
            matches!(
            error.problem,
            IdxProblem::Shape { rows: r, columns: c } if (r, c) == (rows, columns)),
            "{error}"
        );
    }
}

#[test]
fn refuses_empty_files() {
    let error = refused(&image_file(&[]));
    assert!(matches!(error.problem, IdxProblem::Empty), "{error}");
    let error = read_pair(&image_file(&images()), &label_file(&[])).unwrap_err();
    assert!(matches!(error.problem, IdxProblem::Empty), "{error}");
}

#[test]
fn refuses_to_allocate_beyond_the_limit() {
    let most = (MAX_BYTES / PIXELS as u64) as u32;
    for count in [most + 1, u32::MAX] {
        let error = refused(&image_header(count, 28, 28));
        let wanted = u64::from(count) * PIXELS as u64;
        assert!(
            matches!(
            error.problem,
            IdxProblem::TooLarge(bytes) if bytes == wanted),
            "{error}"
        );
    }
    let error = refused(&image_header(most, 28, 28));
    assert!(
        matches!(error.problem, IdxProblem::Truncated { .. }),
        "{error}"
    );
}

#[test]
fn stops_early_in_a_gzip_bomb() {
    let bomb = [image_file(&images()), vec![0; 64 << 20]].concat();
    let error = refused(&gzip(&bomb));
    assert!(matches!(error.problem, IdxProblem::Trailing(_)), "{error}");
}

#[test]
fn refuses_labels_beyond_nine() {
    let error = read_pair(&image_file(&images()), &label_file(&[9, 10, 11])).unwrap_err();
    assert!(
        matches!(
            error.problem,
            IdxProblem::Label {
                index: 1,
                value: 10,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn refuses_unequal_counts() {
    let error = read_pair(&image_file(&images()), &label_file(&[1, 2])).unwrap_err();
    assert!(
        matches!(
            error.problem,
            IdxProblem::Count {
                images: 3,
                labels: 2,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn errors_name_the_file() {
    let error = refused(&image_header(1, 28, 32)).to_string();
    assert!(
        error.ends_with("images has images of 28x32 pixels, 28x28 were wanted"),
        "{error}"
    );
}
