//! Tests of the op and the layer on Flex.

mod common;

mod gradients;
mod layer;
mod parity;
mod pytorch;
mod validation;
