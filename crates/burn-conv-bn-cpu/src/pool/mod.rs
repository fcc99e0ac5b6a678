//! Max pooling over planes, and its gradient.
//!
//! The gradient needs one byte for each output: the argmax, the position of the maximum in its window.
//! The values are those of Burn's Flex backend, 0.22.1, to the bit but for what a NaN carries:
//!
//! - Of equal values, the first in its window wins, row by row; -0.0 and 0.0 are equal.
//! - A NaN wins against any number, and the last NaN against those before it.
//! - Padding never wins, not even against negative infinity. A window that lies wholly in padding gives
//!   negative infinity, and passes no gradient on.
//! - Where windows overlap, a value's gradients are added up in the order of the outputs. Of `f16` and
//!   `bf16`, they are added up in `f32` and rounded once; Flex does so for `bf16` alone.
//!
//! Forward deinterleaves a band of input rows: a line for each remainder of the columns by the stride. In a
//! line, the inputs of a tap at neighbouring outputs are neighbours, whatever stride and dilation are, and
//! padding is negative infinity, written once for each thread. Backward sums a band of rows in the
//! first-level cache. Both read or write each activation once in main memory.

pub(crate) mod backward;
pub(crate) mod forward;
pub(crate) mod geometry;
pub(crate) mod joined;
