//! Tests of the op and the layer on Flex.

mod borrowed;
mod cat_channels;
mod common;

mod activations;
mod conv_bn_max_pool;
mod fold;
mod gradients;
mod halves;
mod layer;
mod max_pool;
mod module;
mod norm_layer;
mod operands;
mod parity;
mod pytorch;
mod ranks;
mod rebuilt;
mod save_plan;
mod states;
mod validation;
