use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, TensorMetadata};
use burn::tensor::ops::MaxPoolOptions;
use burn_autodiff::NodeId;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, NodeGuard, Ops, OpsKind};

use super::parents::{inner, is_tracked, node_or_untracked, retrieve, untracked};
use super::{conv, max_pool, norm};
use crate::backend::{
    ConvBnBackend, ConvBnBackwardOptions, ConvBnForward, ConvBnInputs,
    ConvBnMaxPoolBackwardOptions, ConvBnMaxPoolForward, ConvBnSaved, NormOutput, OptionalTensor,
    RunningStatistics, Statistics,
};
use crate::portable::{bias_shift, shifted_mean};
use crate::spec::{BatchNormOptions, ConvBnOptions, Parents, SavePlan, StatisticsKind};

/// The node of the op, or of the op and a max pool behind it.
#[derive(Debug)]
struct ConvBnBackward;

/// What [`SavePlan`] keeps, and a joined pool's argmax: parents as checkpoints, the op's own tensors as
/// they are.
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
    pool: Option<Pool<B>>,
    options: ConvBnBackwardOptions,
}

/// A max pool that is one op with the block.
#[derive(Clone, Debug)]
struct Pool<B: ConvBnBackend> {
    argmax: IntTensor<B>,
    options: MaxPoolOptions<2>,
}

impl<B: ConvBnBackend> State<B> {
    /// Adds what the plan keeps of the result.
    fn keep(
        &mut self,
        plan: &SavePlan,
        output: &FloatTensor<B>,
        mean: &FloatTensor<B>,
        variance: &FloatTensor<B>,
    ) {
        if plan.statistics {
            self.mean = Some(mean.clone());
            self.variance = Some(variance.clone());
        }
        self.output = plan.output.then(|| output.clone());
    }
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
        let result = match state.pool {
            None => B::conv_bn_backward(saved, state.options),
            Some(pool) => {
                let options = ConvBnMaxPoolBackwardOptions {
                    conv_bn: state.options,
                    pool: pool.options,
                };
                B::conv_bn_max_pool_backward(saved, pool.argmax, options)
            }
        };
        let results = [
            result.input,
            result.weight,
            result.bias,
            result.gamma,
            result.beta,
            result.residual,
        ];
        for (node, grad) in ops.parents.into_iter().zip(results) {
            if let (Some(node), OptionalTensor::Present(grad)) = (node, grad) {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

pub(super) fn register<B: ConvBnBackend, C: CheckpointStrategy>(
    inputs: ConvBnInputs<Autodiff<B, C>>,
    options: ConvBnOptions,
) -> NormOutput<Autodiff<B, C>> {
    if plan(&inputs, &options).rebuilds_output {
        return register_rebuilt(inputs, options);
    }
    match ConvBnBackward
        .prepare::<C>(parents(&inputs))
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(mut prep) => {
            let plan = plan(&inputs, &options);
            let mut state = state(&inputs, &options, &plan, |tensor| prep.checkpoint(tensor));
            let (forward, shift) = forward(inputs, options, plan.conv_output);
            state.keep(&plan, &forward.output, &forward.mean, &forward.variance);
            state.conv_output = forward.conv_output.into_option();
            let mean = shifted_mean::<B>(forward.mean, shift);
            let statistics = (mean, forward.variance, forward.running);
            normalized(prep.finish(state, forward.output), statistics)
        }
        OpsKind::UnTracked(prep) => {
            let result = B::conv_bn(inner_inputs(inputs), options);
            let statistics = (result.mean, result.variance, result.running);
            normalized(prep.finish(result.output), statistics)
        }
    }
}

/// An output from a node, with statistics that are not differentiated.
fn normalized<B: ConvBnBackend, C: CheckpointStrategy>(
    output: FloatTensor<Autodiff<B, C>>,
    (mean, variance, running): (FloatTensor<B>, FloatTensor<B>, RunningStatistics<B>),
) -> NormOutput<Autodiff<B, C>> {
    NormOutput {
        output,
        mean: untracked::<B, C>(mean),
        variance: untracked::<B, C>(variance),
        running: running.map(untracked::<B, C>),
    }
}

/// As two nodes, of the convolution and of norm and activation, whose output is rebuilt from the
/// convolution's. They are computed as one.
fn register_rebuilt<B: ConvBnBackend, C: CheckpointStrategy>(
    inputs: ConvBnInputs<Autodiff<B, C>>,
    options: ConvBnOptions,
) -> NormOutput<Autodiff<B, C>> {
    let norm_dtype = inputs.norm_dtype();
    let (forward, shift) = forward(inputs.clone(), options.clone(), true);
    let conv_output = forward.conv_output.into_option();
    let conv_output = conv_output.expect("conv_bn_forward returns what it was asked to keep");
    let operands = conv::Operands::<B, C> {
        input: inputs.input,
        weight: inputs.weight,
        bias: inputs.bias,
    };
    let conv_output = conv::attach(
        operands,
        conv::Bias::Absorbed,
        conv_output,
        options.conv,
        options.max_workspace,
    );
    let operands = norm::Operands::<B, C> {
        input: conv_output,
        gamma: inputs.gamma,
        beta: inputs.beta,
    };
    let mean = forward.mean.clone();
    let normalized = NormOutput {
        output: forward.output,
        mean: forward.mean,
        variance: forward.variance,
        running: forward.running,
    };
    let activated = BatchNormOptions::new(options.norm).with_activation(options.activation);
    let statistics = (StatisticsKind::Batch, norm_dtype);
    NormOutput {
        // The norm's own mean is without the bias.
        mean: untracked::<B, C>(shifted_mean::<B>(mean, shift)),
        ..norm::attach(operands, statistics, normalized, activated)
    }
}

/// Joined with a max pool behind it; without a kernel for the two, a node for each.
pub(super) fn register_max_pool<B: ConvBnBackend, C: CheckpointStrategy>(
    inputs: ConvBnInputs<Autodiff<B, C>>,
    options: ConvBnOptions,
    pool: MaxPoolOptions<2>,
) -> NormOutput<Autodiff<B, C>> {
    match ConvBnBackward
        .prepare::<C>(parents(&inputs))
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(mut prep) => {
            let plain = inner_inputs(inputs.clone());
            let shift = bias_shift::<B>(&plain);
            let joined = options.clone().joined();
            let mut plan = plan(&inputs, &joined);
            let forward =
                B::conv_bn_max_pool_forward(plain, joined.clone(), pool.clone(), plan.conv_output);
            let ConvBnMaxPoolForward::Pooled {
                output,
                argmax,
                mean,
                variance,
                running,
                conv_output,
                inverts,
            } = forward
            else {
                // This node was never registered; those of the two ops are.
                let normalized = register::<B, C>(inputs, options);
                return NormOutput {
                    output: max_pool::register::<B, C>(normalized.output, pool),
                    ..normalized
                };
            };
            if inverts {
                plan = plan.with_max_pool(&joined, inputs.present());
            }
            let mut state = state(&inputs, &joined, &plan, |tensor| prep.checkpoint(tensor));
            state.keep(&plan, &output, &mean, &variance);
            state.conv_output = conv_output.into_option();
            state.pool = Some(Pool {
                argmax,
                options: pool,
            });
            let mean = shifted_mean::<B>(mean, shift);
            normalized(prep.finish(state, output), (mean, variance, running))
        }
        OpsKind::UnTracked(prep) => {
            let result = B::conv_bn_max_pool(inner_inputs(inputs), options, pool);
            let statistics = (result.mean, result.variance, result.running);
            normalized(prep.finish(result.output), statistics)
        }
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
fn inner_inputs<B: ConvBnBackend, C: CheckpointStrategy>(
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
        running: inputs.running.map(|tensor| tensor.into_primitive()),
    }
}

/// The nodes that may want a gradient.
fn parents<B: ConvBnBackend, C: CheckpointStrategy>(
    inputs: &ConvBnInputs<Autodiff<B, C>>,
) -> [NodeGuard; 6] {
    let weight = inputs.weight.primitive();
    [
        inputs.input.node(),
        inputs.weight.node(),
        node_or_untracked::<B, C>(&inputs.bias, weight),
        node_or_untracked::<B, C>(&inputs.gamma, weight),
        node_or_untracked::<B, C>(&inputs.beta, weight),
        node_or_untracked::<B, C>(&inputs.residual, weight),
    ]
}

/// The plan of the op without a pool.
fn plan<B: ConvBnBackend, C: CheckpointStrategy>(
    inputs: &ConvBnInputs<Autodiff<B, C>>,
    options: &ConvBnOptions,
) -> SavePlan {
    let statistics = inputs.statistics.kind();
    SavePlan::new(options, statistics, inputs.present(), tracked(inputs))
}

/// The state with the parents that the plan keeps, before the forward pass.
fn state<B: ConvBnBackend, C: CheckpointStrategy>(
    inputs: &ConvBnInputs<Autodiff<B, C>>,
    options: &ConvBnOptions,
    plan: &SavePlan,
    mut checkpoint: impl FnMut(&FloatTensor<Autodiff<B, C>>) -> NodeId,
) -> State<B> {
    let mut keep = |kept: bool, tensor: Option<&FloatTensor<Autodiff<B, C>>>| {
        tensor.filter(|_| kept).map(&mut checkpoint)
    };
    State {
        input: keep(plan.input, Some(&inputs.input)),
        weight: keep(plan.weight, Some(&inputs.weight)),
        bias: keep(plan.bias, inputs.bias.as_option()),
        gamma: keep(plan.gamma, inputs.gamma.as_option()),
        beta: keep(plan.beta, inputs.beta.as_option()),
        residual: keep(plan.residual, inputs.residual.as_option()),
        mean: None,
        variance: None,
        conv_output: None,
        output: None,
        pool: None,
        options: ConvBnBackwardOptions {
            options: options.clone(),
            statistics: inputs.statistics.kind(),
            input_shape: inputs.input.shape(),
            weight_shape: inputs.weight.shape(),
            norm_dtype: inputs.norm_dtype(),
            wanted: tracked(inputs),
        },
    }
}

/// Flags of the tracked inputs.
fn tracked<B: ConvBnBackend, C: CheckpointStrategy>(
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
