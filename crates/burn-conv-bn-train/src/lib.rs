//! Training of the networks of `burn-conv-bn-models` on MNIST with Burn's `Learner`: data, optimizers,
//! metrics, and the comparison of the fused with the unfused form.
//!
//! The program `mnist` is [`cli::main`]. The other public items are those that the workspace's
//! benchmark, example and tests use.

mod choice;
pub mod cli;
pub mod data;
pub mod device;
mod measure;
pub mod model;
mod optim;
mod persist;
mod precision;
mod predict;
mod print;
mod run;
mod step;
#[cfg(feature = "cubecl")]
pub mod tuning;

pub use measure::{estimate, memory, report};
pub use run::{job, renderer};
