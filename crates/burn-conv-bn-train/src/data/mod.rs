//! The digits to train on: MNIST from disk, from Burn's cache or from the
//! network, and drawn digits for machines that have none of these.
//!
//! [`resolve`] picks the source and says which one it picked; [`Digits`] holds
//! the result as plain bytes, independent of any tensor library.

mod digits;
mod download;
mod files;
// A stroke is easier to read and to change with several points on a line.
#[rustfmt::skip]
mod glyphs;
mod idx;
mod source;
#[cfg(test)]
pub(crate) mod testing;

pub use digits::generate;
#[doc(hidden)]
pub use idx::exercise as exercise_idx;
pub use idx::{CLASSES, Digits, IdxError, MAX_BYTES, PIXELS, SIDE};
pub use source::{DataError, DataOrigin, DataRequest, DatasetChoice, MnistData, OFFLINE, resolve};
