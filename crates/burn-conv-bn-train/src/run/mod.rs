//! Trainings: a job, one run of it, and what compares runs.

pub(crate) mod compare;
mod dashboard;
mod early_stop;
pub(crate) mod fit;
pub(crate) mod folder;
pub(crate) mod interrupt;
pub mod job;
pub(crate) mod parity;
mod record;
pub mod renderer;
pub(crate) mod terminal;
pub(crate) mod worker;
