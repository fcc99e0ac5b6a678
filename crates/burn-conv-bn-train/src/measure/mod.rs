//! Memory and time of training steps; estimates, reports and pictures of them.

pub mod estimate;
pub(crate) mod history;
pub mod memory;
pub(crate) mod metrics;
mod number;
pub(crate) mod plot;
pub mod report;
pub(crate) mod timeline;
