//! What the op computes, as plain data: no tensors, no backend.

mod error;
mod max_pool;
mod options;
mod problem;
mod saved;

pub use error::ConvBnError;
pub(crate) use max_pool::{MaxPoolProblem, check_window};
pub(crate) use options::Derivative;
pub use options::{Activation, ConvBnOptions, ConvSpec, NormSpec, NormVariant, Recompute};
pub use problem::ConvBnProblem;
pub(crate) use problem::{
    check_epsilon, check_geometry, check_momentum, check_values, values_per_channel,
};
pub(crate) use saved::accumulator_dtype;
pub use saved::{Parents, SavePlan, SavedTensor, StatisticsKind};
