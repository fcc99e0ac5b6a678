//! Any bytes as an IDX file. From the folder of `burn-conv-bn-train`:
//!
//! ```text
//! mkdir -p fuzz/corpus/idx
//! cargo +nightly fuzz run idx fuzz/corpus/idx fuzz/seeds/idx -- -dict=fuzz/idx.dict
//! ```
//!
//! The test `data_fuzz` does the same with the seeds and mutations of them, without a fuzzer.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[allow(
    dead_code,
    reason = "the target reads, and does nothing with what it has read"
)]
#[path = "../../src/data/idx.rs"]
mod idx;

#[path = "../../tests/exercise/mod.rs"]
mod exercise;

fuzz_target!(|bytes: &[u8]| {
    let _ = exercise::exercise(bytes);
});
