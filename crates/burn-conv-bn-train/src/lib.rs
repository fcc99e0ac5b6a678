//! Training of the networks of `burn-conv-bn-models` on MNIST with Burn's `Learner`: data,
//! optimizer, metrics, and the comparison of the fused with the unfused form.
//!
//! Where to begin: [`fit::fit`] trains a network, and [`job::Job`] describes a whole run as data; both
//! have examples. The program `mnist` is [`cli`].

pub mod batch;
pub mod checkpoint;
pub mod cli;
pub mod compare;
mod config;
mod dashboard;
pub mod data;
pub mod device;
mod durable;
pub mod estimate;
pub mod fit;
pub mod history;
mod interrupt;
pub mod job;
pub mod loss_scale;
pub mod memory;
mod metric_log;
pub mod metrics;
pub mod model;
mod number;
pub mod optim;
mod output;
pub mod parity;
pub mod plot;
pub mod predict;
mod print;
pub mod renderer;
pub mod report;
pub mod step;
pub mod timeline;
