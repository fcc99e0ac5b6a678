//! Tests of the op and the layer on Flex.

mod common;

mod activations;
mod conv_bn_max_pool;
mod fold;
mod gradients;
mod layer;
mod max_pool;
mod module;
mod operands;
mod parity;
mod pytorch;
mod ranks;
mod states;
mod validation;
