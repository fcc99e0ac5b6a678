//! What the two ends of `cargo xtask bench` share, without anything that computes: the catalogue, the
//! protocol and the files of tensors.
//!
//! The driver is in `xtask`. Each contender is a process of its own, so that no allocator, thread pool
//! or cache serves two: Burn's are the program `bench-worker`, PyTorch's are `peer/pytorch.py` beside
//! this crate.

pub mod catalogue;
pub mod device;
pub mod precision;
pub mod protocol;
pub mod tensor_file;
