//! Training of the networks of `burn-conv-bn-models` on MNIST with Burn's `Learner`: data,
//! optimizer, metrics, and the comparison of the fused with the unfused form.

pub mod batch;
pub mod cli;
pub mod compare;
pub mod data;
pub mod device;
pub mod estimate;
pub mod fit;
pub mod job;
pub mod memory;
pub mod metrics;
pub mod optim;
pub mod parity;
pub mod plot;
mod print;
pub mod renderer;
pub mod report;
pub mod step;
pub mod timeline;

// `#[derive(RecordState)]` names these through the crate's root.
use burn::optim::{RecordState, StateSink, StateSource};
