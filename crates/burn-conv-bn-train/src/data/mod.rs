//! The digits to train on: MNIST from disk, from Burn's cache or from the
//! network, and drawn digits for machines that have none of these.
//!
//! [`Digits`] holds them as plain bytes, independent of any tensor library.

mod batch;
mod download;
mod files;
mod idx;
mod source;
mod synthetic;
#[cfg(test)]
pub(crate) mod testing;

pub(crate) use batch::{BatchLoader, EpochLoader, MEAN, MnistBatch, STD, test_loader};
pub use batch::{DigitItem, MnistBatcher};
pub use idx::{CLASSES, Digits, IdxError, IdxProblem, MAX_BYTES, PIXELS, SIDE};
#[doc(hidden)]
pub use idx::{Kind, parse as parse_idx};
pub(crate) use source::resolve;
pub use source::{DataRequest, DatasetChoice, MnistData, OFFLINE};
pub use synthetic::generate;
