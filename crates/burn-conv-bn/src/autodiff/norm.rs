//! Norm and activation as a node whose output is rebuilt in the backward pass.
//!
//! burn-autodiff calls such a node memory-bound: under any strategy of the device, a consumer that checkpoints
//! the output stores the node's [`RetroForward`] instead. The first to retrieve the output rebuilds it.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend};
use burn::tensor::DType;
use burn_autodiff::NodeId;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::retro_forward::RetroForward;
use burn_autodiff::checkpoint::state::BackwardStates;
use burn_autodiff::checkpoint::strategy::{BalancedCheckpointing, CheckpointStrategy};
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};

use super::parents::{inner, is_tracked, node_or_untracked, retrieve, untracked};
use crate::backend::{
    BatchNormBackwardOptions, ConvBnBackend, NormInputs, NormOutput, NormSaved, NormStatistics,
    OptionalTensor, RunningStatistics,
};
use crate::spec::{BatchNormOptions, Parents, StatisticsKind};

#[derive(Debug)]
struct BatchNormBackward;

/// Parents as checkpoints, statistics as they are.
#[derive(Clone, Debug)]
struct State<B: Backend> {
    input: Option<NodeId>,
    gamma: Option<NodeId>,
    beta: Option<NodeId>,
    mean: FloatTensor<B>,
    variance: FloatTensor<B>,
    options: BatchNormBackwardOptions,
}

impl<B: ConvBnBackend> Backward<B, 3> for BatchNormBackward {
    type State = State<B>;

    fn backward(
        self,
        ops: Ops<State<B>, 3>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let state = ops.state;
        let saved = NormSaved {
            output_grad: grads.consume::<B>(&ops.node),
            input: retrieve::<B>(checkpointer, state.input).into(),
            gamma: retrieve::<B>(checkpointer, state.gamma).into(),
            beta: retrieve::<B>(checkpointer, state.beta).into(),
            mean: state.mean,
            variance: state.variance,
        };
        let result = B::batch_normalize_backward(saved, state.options);
        let results = [result.input, result.gamma, result.beta];
        for (node, grad) in ops.parents.into_iter().zip(results) {
            if let (Some(node), OptionalTensor::Present(grad)) = (node, grad) {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

/// How the output is rebuilt.
#[derive(Debug)]
struct Rebuild<B: Backend> {
    input: Source<B>,
    gamma: Option<Source<B>>,
    beta: Option<Source<B>>,
    mean: FloatTensor<B>,
    variance: FloatTensor<B>,
    statistics: StatisticsKind,
    options: BatchNormOptions,
}

/// An operand of the rebuilt output. A tracked one must be taken from its node's state, or that state lives
/// until the backward pass ends; an untracked one has none.
#[derive(Debug)]
pub(super) enum Source<B: Backend> {
    Node(NodeId),
    Value(FloatTensor<B>),
}

impl<B: Backend> Source<B> {
    pub(super) fn new<C: CheckpointStrategy>(tensor: &FloatTensor<Autodiff<B, C>>) -> Self {
        if tensor.is_tracked() {
            Self::Node(tensor.id())
        } else {
            Self::Value(tensor.primitive().clone())
        }
    }

    pub(super) fn get(&self, states: &mut BackwardStates) -> FloatTensor<B> {
        match self {
            Self::Node(id) => states.get_state::<FloatTensor<B>>(id),
            Self::Value(tensor) => tensor.clone(),
        }
    }
}

impl<B: ConvBnBackend> RetroForward for Rebuild<B> {
    fn forward(&self, states: &mut BackwardStates, out_node: NodeId) {
        let (mean, variance) = (self.mean.clone(), self.variance.clone());
        let mut optional = |source: &Option<Source<B>>| -> OptionalTensor<B> {
            source.as_ref().map(|source| source.get(states)).into()
        };
        let (gamma, beta) = (optional(&self.gamma), optional(&self.beta));
        let inputs = NormInputs {
            input: self.input.get(states),
            gamma,
            beta,
            statistics: match self.statistics {
                StatisticsKind::Batch => NormStatistics::Known { mean, variance },
                StatisticsKind::Fixed => NormStatistics::Fixed { mean, variance },
            },
            running: RunningStatistics::Absent,
        };
        let output = B::batch_normalize_forward(inputs, self.options).output;
        states.save(out_node, output);
    }
}

/// The tensors of a norm that may want a gradient.
pub(super) struct Operands<B: Backend, C: CheckpointStrategy> {
    pub(super) input: FloatTensor<Autodiff<B, C>>,
    pub(super) gamma: OptionalTensor<Autodiff<B, C>>,
    pub(super) beta: OptionalTensor<Autodiff<B, C>>,
}

impl<B: ConvBnBackend, C: CheckpointStrategy> Operands<B, C> {
    fn tracked(&self) -> Parents {
        Parents {
            input: self.input.is_tracked(),
            gamma: is_tracked::<B, C>(&self.gamma),
            beta: is_tracked::<B, C>(&self.beta),
            ..Parents::default()
        }
    }

    fn rebuild(
        &self,
        statistics: StatisticsKind,
        forward: &NormOutput<B>,
        options: BatchNormOptions,
    ) -> Rebuild<B> {
        Rebuild {
            input: Source::new::<C>(&self.input),
            gamma: self.gamma.as_option().map(Source::new::<C>),
            beta: self.beta.as_option().map(Source::new::<C>),
            mean: forward.mean.clone(),
            variance: forward.variance.clone(),
            statistics,
            options,
        }
    }
}

pub(super) fn register<B: ConvBnBackend, C: CheckpointStrategy>(
    inputs: NormInputs<Autodiff<B, C>>,
    options: BatchNormOptions,
) -> NormOutput<Autodiff<B, C>> {
    let norm_dtype = inputs.norm_dtype();
    let statistics = inputs.statistics.kind();
    let operands = Operands {
        input: inputs.input,
        gamma: inputs.gamma,
        beta: inputs.beta,
    };
    let given = match inputs.statistics {
        NormStatistics::Batch => NormStatistics::Batch,
        NormStatistics::Known { mean, variance } => NormStatistics::Known {
            mean: mean.into_primitive(),
            variance: variance.into_primitive(),
        },
        NormStatistics::Fixed { mean, variance } => NormStatistics::Fixed {
            mean: mean.into_primitive(),
            variance: variance.into_primitive(),
        },
    };
    let running = inputs.running.map(|tensor| tensor.into_primitive());
    let forward = |input, gamma, beta| {
        let inputs = NormInputs {
            input,
            gamma: OptionalTensor::from(inner::<B, C>(gamma)),
            beta: OptionalTensor::from(inner::<B, C>(beta)),
            statistics: given,
            running,
        };
        B::batch_normalize_forward(inputs, options)
    };
    if operands.tracked() == Parents::default() {
        // Compute-bound: the output of a memory-bound node that no backward pass visits cannot be rebuilt.
        let result = forward(
            operands.input.into_primitive(),
            operands.gamma,
            operands.beta,
        );
        return untracked_output::<B, C>(result);
    }
    let (input, gamma, beta) = (&operands.input, &operands.gamma, &operands.beta);
    let result = forward(input.primitive().clone(), gamma.clone(), beta.clone());
    attach(operands, (statistics, norm_dtype), result, options)
}

/// Registers a norm that has been computed, with the statistics that it was computed with. An operand is
/// tracked.
pub(super) fn attach<B: ConvBnBackend, C: CheckpointStrategy>(
    operands: Operands<B, C>,
    (statistics, norm_dtype): (StatisticsKind, DType),
    forward: NormOutput<B>,
    options: BatchNormOptions,
) -> NormOutput<Autodiff<B, C>> {
    let rebuild = operands.rebuild(statistics, &forward, options);
    let backward_options = BatchNormBackwardOptions {
        options,
        statistics,
        norm_dtype,
        wanted: operands.tracked(),
    };
    let Operands { input, gamma, beta } = operands;
    let nodes = [
        input.node(),
        node_or_untracked::<B, C>(&gamma, input.primitive()),
        node_or_untracked::<B, C>(&beta, input.primitive()),
    ];
    // An untracked parent among them would make the node compute-bound.
    let parents = [Some(&input), gamma.as_option(), beta.as_option()];
    let parents = parents.into_iter().flatten();
    let prep = Backward::<B, 3>::prepare::<BalancedCheckpointing>(BatchNormBackward, nodes)
        .memory_bound()
        .retro_forward(rebuild)
        .parents(parents.filter(|parent| parent.is_tracked()))
        .stateful();
    let OpsKind::Tracked(mut prep) = prep else {
        return untracked_output::<B, C>(forward);
    };
    let mut keep = |kept: bool, tensor: Option<&FloatTensor<Autodiff<B, C>>>| {
        tensor
            .filter(|_| kept)
            .map(|tensor| prep.checkpoint(tensor))
    };
    let needs_input = backward_options.needs_input();
    let state = State {
        input: keep(needs_input, Some(&input)),
        gamma: keep(
            needs_input || backward_options.wanted.input,
            gamma.as_option(),
        ),
        beta: keep(backward_options.needs_value(), beta.as_option()),
        mean: forward.mean.clone(),
        variance: forward.variance.clone(),
        options: backward_options,
    };
    NormOutput {
        output: prep.finish(state, forward.output),
        mean: untracked::<B, C>(forward.mean),
        variance: untracked::<B, C>(forward.variance),
        running: forward.running.map(untracked::<B, C>),
    }
}

fn untracked_output<B: ConvBnBackend, C: CheckpointStrategy>(
    result: NormOutput<B>,
) -> NormOutput<Autodiff<B, C>> {
    NormOutput {
        output: untracked::<B, C>(result.output),
        mean: untracked::<B, C>(result.mean),
        variance: untracked::<B, C>(result.variance),
        running: result.running.map(untracked::<B, C>),
    }
}
