//! The benchmark that `cargo xtask bench` runs, without anything that computes: what is timed, the
//! protocol between the driver and the contenders, the statistics, the report and its tables.
//!
//! Each contender is a process of its own, so that no allocator, thread pool or cache of one is
//! there when another is measured. The driver is in `xtask`; Burn's contenders are the program
//! `bench-worker` of the crate `burn-conv-bn-bench-worker`; PyTorch's are `peer/pytorch.py` beside
//! this crate. All three speak the [`protocol`].

pub mod catalogue;
pub mod device;
pub mod precision;
pub mod protocol;
pub mod report;
pub mod statistics;
pub mod table;
