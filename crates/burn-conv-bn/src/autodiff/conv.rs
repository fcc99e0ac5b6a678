use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, TensorMetadata};
use burn::tensor::Shape;
use burn_autodiff::NodeId;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};

use super::parents::{inner, node_or_untracked, retrieve};
use crate::backend::{ConvBnBackend, OptionalTensor};
use crate::portable::sweeps::Composed;
use crate::portable::{channel_sum, channels, conv};
use crate::spec::ConvSpec;

#[derive(Debug)]
struct ConvBackward;

/// The input is kept for the weight's gradient and the weight for the input's, each only if the
/// other is tracked.
#[derive(Clone, Debug)]
struct State {
    input: Option<NodeId>,
    weight: Option<NodeId>,
    input_shape: Shape,
    weight_shape: Shape,
    spec: ConvSpec,
}

impl<B: Backend> Backward<B, 3> for ConvBackward {
    type State = State;

    fn backward(self, ops: Ops<State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let [node_input, node_weight, node_bias] = ops.parents;
        let state = ops.state;
        let output_grad = grads.consume::<B>(&ops.node);
        let input = retrieve::<B>(checkpointer, state.input);
        let weight = retrieve::<B>(checkpointer, state.weight);
        if let Some(node) = node_bias {
            let grad = channels::<B>(channel_sum::<B>(output_grad.clone()));
            grads.register::<B>(node.id, grad);
        }
        if let (Some(node), Some(input)) = (node_weight, input) {
            let grad = conv::weight_backward::<B, Composed>(
                input,
                &state.weight_shape,
                output_grad.clone(),
                &state.spec,
            );
            grads.register::<B>(node.id, grad);
        }
        if let (Some(node), Some(weight)) = (node_input, weight) {
            let shape = &state.input_shape;
            let grad = conv::input_backward::<B, Composed>(shape, weight, output_grad, &state.spec);
            grads.register::<B>(node.id, grad);
        }
    }
}

pub(super) fn register<B: ConvBnBackend, C: CheckpointStrategy>(
    input: FloatTensor<Autodiff<B, C>>,
    weight: FloatTensor<Autodiff<B, C>>,
    bias: OptionalTensor<Autodiff<B, C>>,
    spec: ConvSpec,
) -> FloatTensor<Autodiff<B, C>> {
    let nodes = [
        input.node(),
        weight.node(),
        node_or_untracked::<B, C>(&bias, weight.primitive()),
    ];
    let forward = |input, weight, bias, spec| {
        B::conv(
            input,
            weight,
            OptionalTensor::from(inner::<B, C>(bias)),
            spec,
        )
    };
    match ConvBackward.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(mut prep) => {
            let state = State {
                input: weight.is_tracked().then(|| prep.checkpoint(&input)),
                weight: input.is_tracked().then(|| prep.checkpoint(&weight)),
                input_shape: input.shape(),
                weight_shape: weight.shape(),
                spec: spec.clone(),
            };
            let output = forward(input.into_primitive(), weight.into_primitive(), bias, spec);
            prep.finish(state, output)
        }
        OpsKind::UnTracked(prep) => prep.finish(forward(
            input.into_primitive(),
            weight.into_primitive(),
            bias,
            spec,
        )),
    }
}
