//! What Burn 0.22 lacks for training: [`Adadelta`], and loss scales for gradients in f16.

mod adadelta;
mod loss_scale;

pub use adadelta::{Adadelta, AdadeltaConfig, AdadeltaState};
pub use loss_scale::{LossScale, LossScaleError, LossScaler};
