//! What holds of any bytes as an IDX file. For the fuzz target, and for the test that does its work where
//! there is no fuzzer; both have the reader as their module `idx`.

use crate::idx::{CLASSES, IdxProblem, Kind, PIXELS, parse};

/// Reads `bytes` as a file of images and as one of labels, and checks what holds of any bytes.
///
/// Returns the number of items that each has, or why it was refused.
pub fn exercise(bytes: &[u8]) -> [Result<usize, IdxProblem>; 2] {
    let read = [Kind::Images, Kind::Labels].map(|kind| -> Result<usize, IdxProblem> {
        let (data, md5) = parse(bytes, kind)?;
        let (header, item_bytes) = match kind {
            Kind::Images => (16, PIXELS),
            Kind::Labels => (8, 1),
        };
        let items = data.len() / item_bytes;
        assert!(items > 0, "no items");
        assert_eq!(data.len() % item_bytes, 0, "a piece of an item");
        assert_eq!(data.capacity(), data.len(), "memory to spare");
        if kind == Kind::Labels {
            let digits = data.iter().all(|&label| usize::from(label) < CLASSES);
            assert!(digits, "a label that is no digit");
        }
        if !bytes.starts_with(&[0x1f, 0x8b]) {
            assert_eq!(bytes[header..], data, "other bytes than the file's");
            let count = u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
            assert_eq!(count as usize, items, "another number of items");
            let wanted = u128::from_be_bytes(md5::compute(bytes).into());
            assert_eq!(md5, wanted, "another checksum");
        }
        Ok(items)
    });
    assert!(read.iter().any(Result::is_err), "two kinds at once");
    read
}
