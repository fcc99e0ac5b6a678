use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, TensorMetadata};
use burn::tensor::Shape;
use burn_autodiff::NodeId;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};

use super::parents::{inner, is_tracked, node_or_untracked, retrieve, untracked};
use crate::backend::{ConvBackwardOptions, ConvBnBackend, ConvSaved, OptionalTensor};
use crate::spec::{ConvSpec, Parents};

#[derive(Debug)]
struct ConvBackward;

/// The input is kept for the weight's gradient and the weight for the input's, each only if the
/// other is tracked.
#[derive(Clone, Debug)]
struct State {
    input: Option<NodeId>,
    weight: Option<NodeId>,
    bias: Bias,
    options: ConvBackwardOptions,
}

/// Where the bias went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bias {
    /// Into the output.
    Added,
    /// Nowhere, since a norm with batch statistics would subtract it again: its gradient is zero.
    Absorbed,
}

impl<B: ConvBnBackend> Backward<B, 3> for ConvBackward {
    type State = State;

    fn backward(self, ops: Ops<State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let state = ops.state;
        let saved = ConvSaved::<B> {
            output_grad: grads.consume::<B>(&ops.node),
            input: retrieve::<B>(checkpointer, state.input).into(),
            weight: retrieve::<B>(checkpointer, state.weight).into(),
        };
        let [node_input, node_weight, node_bias] = ops.parents;
        if let (Some(node), Bias::Absorbed) = (&node_bias, state.bias) {
            // Optimizers skip a parameter without a gradient.
            let grad = &saved.output_grad;
            let shape = Shape::new([state.options.weight_shape[0]]);
            let zeros = B::float_zeros(shape, &grad.device(), grad.dtype().into());
            grads.register::<B>(node.id, zeros);
        }
        let result = B::conv_backward(saved, state.options);
        let results = [result.input, result.weight, result.bias];
        let nodes = [node_input, node_weight, node_bias];
        for (node, grad) in nodes.into_iter().zip(results) {
            if let (Some(node), OptionalTensor::Present(grad)) = (node, grad) {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

/// The tensors of a convolution.
pub(super) struct Operands<B: Backend, C: CheckpointStrategy> {
    pub(super) input: FloatTensor<Autodiff<B, C>>,
    pub(super) weight: FloatTensor<Autodiff<B, C>>,
    pub(super) bias: OptionalTensor<Autodiff<B, C>>,
}

pub(super) fn register<B: ConvBnBackend, C: CheckpointStrategy>(
    operands: Operands<B, C>,
    spec: ConvSpec,
) -> FloatTensor<Autodiff<B, C>> {
    let Operands {
        input,
        weight,
        bias,
    } = &operands;
    let (input, weight) = (input.primitive().clone(), weight.primitive().clone());
    let bias = inner::<B, C>(bias.clone());
    let output = B::conv(input, weight, bias.into(), spec.clone());
    attach(operands, Bias::Added, output, spec, None)
}

/// Registers a convolution that has been computed.
pub(super) fn attach<B: ConvBnBackend, C: CheckpointStrategy>(
    operands: Operands<B, C>,
    bias_use: Bias,
    output: FloatTensor<B>,
    spec: ConvSpec,
    max_workspace: Option<usize>,
) -> FloatTensor<Autodiff<B, C>> {
    let Operands {
        input,
        weight,
        bias,
    } = operands;
    let nodes = [
        input.node(),
        weight.node(),
        node_or_untracked::<B, C>(&bias, weight.primitive()),
    ];
    let prep = Backward::<B, 3>::prepare::<C>(ConvBackward, nodes);
    let OpsKind::Tracked(mut prep) = prep.compute_bound().stateful() else {
        return untracked::<B, C>(output);
    };
    let state = State {
        input: weight.is_tracked().then(|| prep.checkpoint(&input)),
        weight: input.is_tracked().then(|| prep.checkpoint(&weight)),
        bias: bias_use,
        options: ConvBackwardOptions {
            spec,
            input_shape: input.shape(),
            weight_shape: weight.shape(),
            max_workspace,
            wanted: Parents {
                input: input.is_tracked(),
                weight: weight.is_tracked(),
                bias: bias_use == Bias::Added && is_tracked::<B, C>(&bias),
                ..Parents::default()
            },
        },
    };
    prep.finish(state, output)
}
