//! Concatenation along channels as a node whose output is rebuilt in the backward pass, as in
//! [`norm`](super::norm).

use std::array::from_fn;
use std::ops::Range;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, TensorMetadata};
use burn::tensor::Slice;
use burn_autodiff::NodeId;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::retro_forward::RetroForward;
use burn_autodiff::checkpoint::state::BackwardStates;
use burn_autodiff::checkpoint::strategy::{BalancedCheckpointing, CheckpointStrategy};
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};

use super::norm::Source;
use super::parents::untracked;

/// Parents of a node, whose number burn-autodiff wants to know at compile time. What is left over are
/// untracked ones.
const PARENTS: usize = 64;

#[derive(Debug)]
struct ConcatenateBackward;

impl<B: Backend> Backward<B, PARENTS> for ConcatenateBackward {
    /// Channels of each tracked parent. These are the node's first.
    type State = Vec<Range<usize>>;

    fn backward(
        self,
        ops: Ops<Self::State, PARENTS>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let shape = grad.shape();
        for (node, channels) in ops.parents.into_iter().flatten().zip(ops.state) {
            let mut slices: Vec<Slice> = shape.iter().map(|&size| Slice::from(0..size)).collect();
            slices[1] = Slice::from(channels);
            grads.register::<B>(node.id, B::float_slice(grad.clone(), &slices));
        }
    }
}

/// How the output is rebuilt.
#[derive(Debug)]
struct Rebuild<B: Backend>(Vec<Source<B>>);

impl<B: Backend> RetroForward for Rebuild<B> {
    fn forward(&self, states: &mut BackwardStates, out_node: NodeId) {
        let tensors = self.0.iter().map(|source| source.get(states)).collect();
        states.save(out_node, B::float_cat(tensors, 1));
    }
}

pub(super) fn register<B: Backend, C: CheckpointStrategy>(
    tensors: Vec<FloatTensor<Autodiff<B, C>>>,
) -> FloatTensor<Autodiff<B, C>> {
    if tensors.len() > PARENTS {
        let groups = tensors.chunks(PARENTS);
        return register::<B, C>(
            groups
                .map(|group| register::<B, C>(group.to_vec()))
                .collect(),
        );
    }
    let primitives = tensors.iter().map(|tensor| tensor.primitive().clone());
    let output = B::float_cat(primitives.collect(), 1);
    let mut start = 0;
    let (mut tracked, mut channels) = (Vec::new(), Vec::new());
    for tensor in &tensors {
        let end = start + tensor.shape()[1];
        if tensor.is_tracked() {
            tracked.push(tensor);
            channels.push(start..end);
        }
        start = end;
    }
    let other = untracked::<B, C>(output.clone());
    if tracked.is_empty() {
        // Compute-bound: the output of a memory-bound node that no backward pass visits cannot be rebuilt.
        return other;
    }
    let nodes = from_fn(|index| {
        tracked
            .get(index)
            .map_or_else(|| other.node(), |parent| parent.node())
    });
    let rebuild = Rebuild(tensors.iter().map(Source::new::<C>).collect());
    let prep = Backward::<B, PARENTS>::prepare::<BalancedCheckpointing>(ConcatenateBackward, nodes)
        .memory_bound()
        .retro_forward(rebuild)
        .parents(tracked)
        .stateful();
    match prep {
        OpsKind::Tracked(prep) => prep.finish(channels, output),
        OpsKind::UnTracked(prep) => prep.finish(output),
    }
}
