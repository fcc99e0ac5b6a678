//! Memory and time of training steps, and what is made of them: estimates, reports, pictures.

pub mod estimate;
pub mod memory;
pub(crate) mod metrics;
mod number;
pub(crate) mod plot;
pub mod report;
pub(crate) mod timeline;
