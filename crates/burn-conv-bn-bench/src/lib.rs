//! Shared parts of the two ends of `cargo xtask bench`: the catalogue, the protocol and the files of
//! tensors. Nothing here computes.
//!
//! The driver is in `xtask`. Each contender is a process, with an allocator, a thread pool and caches of its own: Burn's are the program `bench-worker`, PyTorch's are `peer/pytorch.py` beside
//! this crate.

pub mod catalogue;
pub mod device;
pub mod linux;
pub mod precision;
pub mod protocol;
pub mod tensor_file;
