use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, TensorMetadata};
use burn::tensor::ops::MaxPoolOptions;

use super::conv_bn::{inner_inputs, register_grads, tracked};
use super::{conv_bn, max_pool, node_or_untracked, retrieve, untracked};
use crate::backend::{
    ConvBnBackend, ConvBnBackwardOptions, ConvBnInputs, ConvBnMaxPoolBackwardOptions,
    ConvBnMaxPoolForward, ConvBnSaved, NormOutput, OptionalTensor,
};
use crate::definition::{ConvBnOptions, SavePlan};
use crate::portable::{bias_shift, shifted_mean};

#[derive(Debug)]
struct ConvBnMaxPoolBackward;

/// What [`SavePlan::with_max_pool`] says, and the pool's places.
#[derive(Clone, Debug)]
struct State<B: ConvBnBackend> {
    input: Option<NodeId>,
    weight: Option<NodeId>,
    gamma: Option<NodeId>,
    beta: Option<NodeId>,
    mean: Option<FloatTensor<B>>,
    variance: Option<FloatTensor<B>>,
    output: Option<FloatTensor<B>>,
    places: IntTensor<B>,
    options: ConvBnMaxPoolBackwardOptions,
}

impl<B: ConvBnBackend> Backward<B, 5> for ConvBnMaxPoolBackward {
    type State = State<B>;

    fn backward(
        self,
        ops: Ops<State<B>, 5>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let state = ops.state;
        let saved = ConvBnSaved {
            output_grad: grads.consume::<B>(&ops.node),
            input: retrieve::<B>(checkpointer, state.input).into(),
            weight: retrieve::<B>(checkpointer, state.weight).into(),
            bias: OptionalTensor::Absent,
            gamma: retrieve::<B>(checkpointer, state.gamma).into(),
            beta: retrieve::<B>(checkpointer, state.beta).into(),
            mean: state.mean.into(),
            variance: state.variance.into(),
            conv_output: OptionalTensor::Absent,
            output: state.output.into(),
            residual: OptionalTensor::Absent,
        };
        let result = B::conv_bn_max_pool_backward(saved, state.places, state.options);
        let results = [
            result.input,
            result.weight,
            result.bias,
            result.gamma,
            result.beta,
        ];
        let parents = ops.parents.map(|node| node.map(|node| node.id));
        register_grads(parents, results, grads);
    }
}

pub(super) fn register<B: ConvBnBackend, C: CheckpointStrategy>(
    inputs: ConvBnInputs<Autodiff<B, C>>,
    options: ConvBnOptions,
    pool: MaxPoolOptions<2>,
) -> NormOutput<Autodiff<B, C>> {
    let weight = inputs.weight.primitive();
    let nodes = [
        inputs.input.node(),
        inputs.weight.node(),
        node_or_untracked::<B, C>(&inputs.bias, weight),
        node_or_untracked::<B, C>(&inputs.gamma, weight),
        node_or_untracked::<B, C>(&inputs.beta, weight),
    ];
    let one_after_the_other = |inputs, options, pool| {
        let normalized = conv_bn::register::<B, C>(inputs, options);
        NormOutput {
            output: max_pool::register::<B, C>(normalized.output, pool),
            ..normalized
        }
    };
    if inputs.residual.is_present() {
        return one_after_the_other(inputs, options, pool);
    }
    match ConvBnMaxPoolBackward
        .prepare::<C>(nodes)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(mut prep) => {
            let plain = inner_inputs(inputs.clone());
            let shift = bias_shift::<B>(&plain);
            let forward = B::conv_bn_max_pool_forward(plain, options.clone(), pool.clone());
            let ConvBnMaxPoolForward::Pooled {
                output,
                places,
                mean,
                variance,
            } = forward
            else {
                // This node was never registered; those of the two ops are.
                return one_after_the_other(inputs, options, pool);
            };
            let tracked = tracked(&inputs);
            let statistics = inputs.statistics.kind();
            let present = inputs.present();
            let plan = SavePlan::new(&options, statistics, present, tracked)
                .with_max_pool(&options, present);
            let mut checkpoint = |kept: bool, tensor: Option<&FloatTensor<Autodiff<B, C>>>| {
                tensor
                    .filter(|_| kept)
                    .map(|tensor| prep.checkpoint(tensor))
            };
            let state = State {
                input: checkpoint(plan.input, Some(&inputs.input)),
                weight: checkpoint(plan.weight, Some(&inputs.weight)),
                gamma: checkpoint(plan.gamma, inputs.gamma.as_option()),
                beta: checkpoint(plan.beta, inputs.beta.as_option()),
                mean: plan.statistics.then(|| mean.clone()),
                variance: plan.statistics.then(|| variance.clone()),
                output: plan.output.then(|| output.clone()),
                places,
                options: ConvBnMaxPoolBackwardOptions {
                    conv_bn: ConvBnBackwardOptions {
                        options,
                        statistics,
                        input_shape: inputs.input.shape(),
                        weight_shape: inputs.weight.shape(),
                        norm_dtype: inputs.norm_dtype(),
                        wanted: tracked,
                    },
                    pool,
                },
            };
            NormOutput {
                output: prep.finish(state, output),
                mean: untracked::<B, C>(shifted_mean::<B>(mean, shift)),
                variance: untracked::<B, C>(variance),
            }
        }
        OpsKind::UnTracked(prep) => {
            let result = B::conv_bn_max_pool(inner_inputs(inputs), options, pool);
            NormOutput {
                output: prep.finish(result.output),
                mean: untracked::<B, C>(result.mean),
                variance: untracked::<B, C>(result.variance),
            }
        }
    }
}
