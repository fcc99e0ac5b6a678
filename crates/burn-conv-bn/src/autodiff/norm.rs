use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, TensorMetadata};
use burn::tensor::DType;
use burn_autodiff::NodeId;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};

use super::parents::{inner, is_tracked, node_or_untracked, retrieve, untracked};
use crate::backend::{ConvBnBackend, NormOutput, OptionalTensor};
use crate::portable::{cast, channel_sum, channels, norm};
use crate::spec::NormSpec;

#[derive(Debug)]
struct BatchNormBackward;

/// The input, its statistics and gamma are kept unless beta alone is tracked.
#[derive(Clone, Debug)]
struct State<B: Backend> {
    input: Option<NodeId>,
    gamma: Option<NodeId>,
    mean: FloatTensor<B>,
    variance: FloatTensor<B>,
    norm: NormSpec,
    norm_dtype: DType,
}

impl<B: Backend> Backward<B, 3> for BatchNormBackward {
    type State = State<B>;

    fn backward(
        self,
        ops: Ops<State<B>, 3>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let [node_input, node_gamma, node_beta] = ops.parents;
        let state = ops.state;
        let output_grad = grads.consume::<B>(&ops.node);
        let input = retrieve::<B>(checkpointer, state.input);
        let gamma = retrieve::<B>(checkpointer, state.gamma);
        let Some(input) = input else {
            if let Some(node) = node_beta {
                let grad = channels::<B>(channel_sum::<B>(output_grad));
                grads.register::<B>(node.id, cast::<B>(grad, state.norm_dtype));
            }
            return;
        };
        let result = norm::backward::<B>(
            input,
            gamma,
            state.mean,
            state.variance,
            output_grad,
            state.norm,
            node_input.is_some(),
        );
        if let (Some(node), Some(grad)) = (node_input, result.input) {
            grads.register::<B>(node.id, grad);
        }
        for (node, grad) in [(node_gamma, result.gamma), (node_beta, result.beta)] {
            if let Some(node) = node {
                grads.register::<B>(node.id, cast::<B>(grad, state.norm_dtype));
            }
        }
    }
}

pub(super) fn register<B: ConvBnBackend, C: CheckpointStrategy>(
    input: FloatTensor<Autodiff<B, C>>,
    gamma: OptionalTensor<Autodiff<B, C>>,
    beta: OptionalTensor<Autodiff<B, C>>,
    norm: NormSpec,
) -> NormOutput<Autodiff<B, C>> {
    let nodes = [
        input.node(),
        node_or_untracked::<B, C>(&gamma, input.primitive()),
        node_or_untracked::<B, C>(&beta, input.primitive()),
    ];
    let norm_dtype = gamma
        .as_option()
        .or(beta.as_option())
        .unwrap_or(&input)
        .dtype();
    let forward = |input, gamma, beta| {
        let gamma = OptionalTensor::from(inner::<B, C>(gamma));
        B::batch_normalize(
            input,
            gamma,
            OptionalTensor::from(inner::<B, C>(beta)),
            norm,
        )
    };
    let (output, mean, variance) = match BatchNormBackward
        .prepare::<C>(nodes)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(mut prep) => {
            let keeps_input = input.is_tracked() || is_tracked::<B, C>(&gamma);
            let checkpoint = keeps_input.then(|| prep.checkpoint(&input));
            let gamma_checkpoint = match &gamma {
                OptionalTensor::Present(gamma) if input.is_tracked() => {
                    Some(prep.checkpoint(gamma))
                }
                _ => None,
            };
            let result = forward(input.into_primitive(), gamma, beta);
            let state = State {
                input: checkpoint,
                gamma: gamma_checkpoint,
                mean: result.mean.clone(),
                variance: result.variance.clone(),
                norm,
                norm_dtype,
            };
            (
                prep.finish(state, result.output),
                result.mean,
                result.variance,
            )
        }
        OpsKind::UnTracked(prep) => {
            let result = forward(input.into_primitive(), gamma, beta);
            (prep.finish(result.output), result.mean, result.variance)
        }
    };
    NormOutput {
        output,
        mean: untracked::<B, C>(mean),
        variance: untracked::<B, C>(variance),
    }
}
