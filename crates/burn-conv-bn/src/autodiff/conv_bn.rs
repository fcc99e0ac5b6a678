use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, TensorMetadata};

use super::{inner, is_tracked, node_or_untracked, retrieve, untracked};
use crate::backend::{
    ConvBnBackend, ConvBnBackwardOptions, ConvBnForward, ConvBnInputs, ConvBnSaved, NormOutput,
    OptionalTensor, Statistics,
};
use crate::definition::{ConvBnOptions, Parents, SavePlan};
use crate::portable::{bias_shift, shifted_mean};

#[derive(Debug)]
struct ConvBnBackward;

/// What [`SavePlan`] says, and nothing else: parents as checkpoints, the op's own tensors as they
/// are.
#[derive(Clone, Debug)]
struct State<B: ConvBnBackend> {
    input: Option<NodeId>,
    weight: Option<NodeId>,
    bias: Option<NodeId>,
    gamma: Option<NodeId>,
    beta: Option<NodeId>,
    residual: Option<NodeId>,
    mean: Option<FloatTensor<B>>,
    variance: Option<FloatTensor<B>>,
    conv_output: Option<FloatTensor<B>>,
    output: Option<FloatTensor<B>>,
    options: ConvBnBackwardOptions,
}

impl<B: ConvBnBackend> Backward<B, 6> for ConvBnBackward {
    type State = State<B>;

    fn backward(
        self,
        ops: Ops<State<B>, 6>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let state = ops.state;
        let saved = ConvBnSaved {
            output_grad: grads.consume::<B>(&ops.node),
            input: retrieve::<B>(checkpointer, state.input).into(),
            weight: retrieve::<B>(checkpointer, state.weight).into(),
            bias: retrieve::<B>(checkpointer, state.bias).into(),
            gamma: retrieve::<B>(checkpointer, state.gamma).into(),
            beta: retrieve::<B>(checkpointer, state.beta).into(),
            mean: state.mean.into(),
            variance: state.variance.into(),
            conv_output: state.conv_output.into(),
            output: state.output.into(),
            residual: retrieve::<B>(checkpointer, state.residual).into(),
        };
        let result = B::conv_bn_backward(saved, state.options);
        let results = [
            result.input,
            result.weight,
            result.bias,
            result.gamma,
            result.beta,
            result.residual,
        ];
        let parents = ops.parents.map(|node| node.map(|node| node.id));
        register_grads(parents, results, grads);
    }
}

pub(super) fn register<B: ConvBnBackend, C: CheckpointStrategy>(
    inputs: ConvBnInputs<Autodiff<B, C>>,
    options: ConvBnOptions,
) -> NormOutput<Autodiff<B, C>> {
    let weight = inputs.weight.primitive();
    let nodes = [
        inputs.input.node(),
        inputs.weight.node(),
        node_or_untracked::<B, C>(&inputs.bias, weight),
        node_or_untracked::<B, C>(&inputs.gamma, weight),
        node_or_untracked::<B, C>(&inputs.beta, weight),
        node_or_untracked::<B, C>(&inputs.residual, weight),
    ];
    let (output, mean, variance, shift) = match ConvBnBackward
        .prepare::<C>(nodes)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(mut prep) => {
            let tracked = tracked(&inputs);
            let statistics = inputs.statistics.kind();
            let plan = SavePlan::new(&options, statistics, inputs.present(), tracked);
            let mut checkpoint = |kept: bool, tensor: Option<&FloatTensor<Autodiff<B, C>>>| {
                tensor
                    .filter(|_| kept)
                    .map(|tensor| prep.checkpoint(tensor))
            };
            let mut state = State {
                input: checkpoint(plan.input, Some(&inputs.input)),
                weight: checkpoint(plan.weight, Some(&inputs.weight)),
                bias: checkpoint(plan.bias, inputs.bias.as_option()),
                gamma: checkpoint(plan.gamma, inputs.gamma.as_option()),
                beta: checkpoint(plan.beta, inputs.beta.as_option()),
                residual: checkpoint(plan.residual, inputs.residual.as_option()),
                mean: None,
                variance: None,
                conv_output: None,
                output: None,
                options: ConvBnBackwardOptions {
                    options: options.clone(),
                    statistics,
                    input_shape: inputs.input.shape(),
                    weight_shape: inputs.weight.shape(),
                    norm_dtype: inputs.norm_dtype(),
                    wanted: tracked,
                },
            };
            let (forward, shift) = forward(inputs, options, plan.conv_output);
            if plan.statistics {
                state.mean = Some(forward.mean.clone());
                state.variance = Some(forward.variance.clone());
            }
            state.output = plan.output.then(|| forward.output.clone());
            state.conv_output = forward.conv_output.into_option();
            let output = prep.finish(state, forward.output);
            (output, forward.mean, forward.variance, shift)
        }
        OpsKind::UnTracked(prep) => {
            let (forward, shift) = forward(inputs, options, false);
            let output = prep.finish(forward.output);
            (output, forward.mean, forward.variance, shift)
        }
    };
    NormOutput {
        output,
        mean: untracked::<B, C>(shifted_mean::<B>(mean, shift)),
        variance: untracked::<B, C>(variance),
    }
}

/// Runs the forward kernel on the inner backend. Returns the bias's shift of the mean as well.
fn forward<B: ConvBnBackend, C: CheckpointStrategy>(
    inputs: ConvBnInputs<Autodiff<B, C>>,
    options: ConvBnOptions,
    keep_conv_output: bool,
) -> (ConvBnForward<B>, Option<FloatTensor<B>>) {
    let inputs = inner_inputs(inputs);
    let shift = bias_shift::<B>(&inputs);
    (B::conv_bn_forward(inputs, options, keep_conv_output), shift)
}

/// The inputs on the inner backend.
pub(super) fn inner_inputs<B: ConvBnBackend, C: CheckpointStrategy>(
    inputs: ConvBnInputs<Autodiff<B, C>>,
) -> ConvBnInputs<B> {
    ConvBnInputs {
        input: inputs.input.into_primitive(),
        weight: inputs.weight.into_primitive(),
        bias: inner::<B, C>(inputs.bias).into(),
        gamma: inner::<B, C>(inputs.gamma).into(),
        beta: inner::<B, C>(inputs.beta).into(),
        residual: inner::<B, C>(inputs.residual).into(),
        statistics: match inputs.statistics {
            Statistics::Batch => Statistics::Batch,
            Statistics::Fixed { mean, variance } => Statistics::Fixed {
                mean: mean.into_primitive(),
                variance: variance.into_primitive(),
            },
        },
    }
}

/// Which of the inputs are tracked.
pub(super) fn tracked<B: ConvBnBackend, C: CheckpointStrategy>(
    inputs: &ConvBnInputs<Autodiff<B, C>>,
) -> Parents {
    Parents {
        input: inputs.input.is_tracked(),
        weight: inputs.weight.is_tracked(),
        bias: is_tracked::<B, C>(&inputs.bias),
        gamma: is_tracked::<B, C>(&inputs.gamma),
        beta: is_tracked::<B, C>(&inputs.beta),
        residual: is_tracked::<B, C>(&inputs.residual),
    }
}

/// Passes gradients on to the parents that wanted them.
pub(super) fn register_grads<B: ConvBnBackend, const N: usize>(
    parents: [Option<NodeId>; N],
    results: [OptionalTensor<B>; N],
    grads: &mut Gradients,
) {
    for (node, grad) in parents.into_iter().zip(results) {
        if let (Some(node), OptionalTensor::Present(grad)) = (node, grad) {
            grads.register::<B>(node, grad);
        }
    }
}
