//! Networks built of [`ConvBn2d`](burn_conv_bn::ConvBn2d) blocks, each with one definition and a
//! switch between the fused form and Burn's own layers.
//!
//! Both forms have the same modules, so they share records, optimizer states and, from the same
//! seed, initial weights; turning one into the other moves no tensor.

mod form;
mod net;

pub use form::Form;
pub use net::{Net, NetConfig};
