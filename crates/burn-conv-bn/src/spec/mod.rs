//! What the op computes, as plain data: no backend, and tensors in [`Activation::forward`] alone.

mod activation;
mod activation_config;
mod conv;
mod error;
mod norm;
mod pool;
mod problem;
mod save_plan;

pub use activation::Activation;
pub(crate) use activation::Derivative;
pub use activation_config::ActivationError;
pub use conv::{ConvBnOptions, ConvSpec, Recompute};
pub use error::ConvBnError;
pub use norm::{BatchNormOptions, NormSpec, NormVariant};
pub(crate) use pool::{MaxPoolProblem, check_window};
pub use problem::ConvBnProblem;
pub(crate) use problem::{
    check_activation, check_epsilon, check_geometry, check_momentum, check_values,
    values_per_channel,
};
pub(crate) use save_plan::accumulator_dtype;
pub use save_plan::{Parents, SavePlan, SavedTensor, StatisticsKind};
