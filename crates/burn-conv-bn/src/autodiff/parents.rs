//! A node's parents: which are there, which are tracked, and their values.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, Backend};
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::{NodeId, ops::NodeGuard};

use crate::backend::{OptionalTensor, RunningStatistics};

/// The node of an input that may be missing; for a missing one, an untracked node that wants no
/// gradient.
pub(super) fn node_or_untracked<B: Backend, C: CheckpointStrategy>(
    tensor: &OptionalTensor<Autodiff<B, C>>,
    present: &FloatTensor<B>,
) -> NodeGuard {
    match tensor {
        OptionalTensor::Present(tensor) => tensor.node(),
        OptionalTensor::Absent => untracked::<B, C>(present.clone()).node(),
    }
}

pub(super) fn untracked<B: Backend, C: CheckpointStrategy>(
    tensor: FloatTensor<B>,
) -> FloatTensor<Autodiff<B, C>> {
    <Autodiff<B, C> as AutodiffBackend>::from_inner(tensor)
}

pub(super) fn is_tracked<B: Backend, C: CheckpointStrategy>(
    tensor: &OptionalTensor<Autodiff<B, C>>,
) -> bool {
    tensor.as_option().is_some_and(|tensor| tensor.is_tracked())
}

pub(super) fn inner<B: Backend, C: CheckpointStrategy>(
    tensor: OptionalTensor<Autodiff<B, C>>,
) -> Option<FloatTensor<B>> {
    tensor.into_option().map(|tensor| tensor.into_primitive())
}

impl<B: Backend> RunningStatistics<B> {
    /// The same with another backend's tensors.
    pub(super) fn map<C: Backend>(
        self,
        tensor: impl Fn(FloatTensor<B>) -> FloatTensor<C>,
    ) -> RunningStatistics<C> {
        match self {
            Self::Absent => RunningStatistics::Absent,
            Self::Present {
                mean,
                variance,
                momentum,
                factor,
            } => RunningStatistics::Present {
                mean: tensor(mean),
                variance: tensor(variance),
                momentum,
                factor,
            },
        }
    }
}

pub(super) fn retrieve<B: Backend>(
    checkpointer: &mut Checkpointer,
    id: Option<NodeId>,
) -> Option<FloatTensor<B>> {
    id.map(|id| checkpointer.retrieve_node_output::<FloatTensor<B>>(id))
}
