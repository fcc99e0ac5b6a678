use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Backend, TensorMetadata};
use burn::tensor::ops::MaxPoolOptions;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};

use crate::backend::{ConvBnBackend, MaxPoolBackwardOptions, MaxPoolForward};
use crate::portable::max_pool;

#[derive(Debug)]
struct MaxPoolBackward;

/// The argmax alone: neither the input nor the output is needed.
#[derive(Clone, Debug)]
struct State<B: Backend> {
    argmax: IntTensor<B>,
    options: MaxPoolBackwardOptions,
}

impl<B: ConvBnBackend> Backward<B, 1> for MaxPoolBackward {
    type State = State<B>;

    fn backward(
        self,
        ops: Ops<State<B>, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let [node_input] = ops.parents;
        let output_grad = grads.consume::<B>(&ops.node);
        if let Some(node) = node_input {
            let State { argmax, options } = ops.state;
            let grad = B::max_pool_backward(output_grad, argmax, options);
            grads.register::<B>(node.id, grad);
        }
    }
}

pub(super) fn register<B: ConvBnBackend, C: CheckpointStrategy>(
    input: FloatTensor<Autodiff<B, C>>,
    options: MaxPoolOptions<2>,
) -> FloatTensor<Autodiff<B, C>> {
    match MaxPoolBackward
        .prepare::<C>([input.node()])
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => {
            match B::max_pool_forward(input.primitive().clone(), options.clone()) {
                MaxPoolForward::Pooled { output, argmax } => {
                    let options = MaxPoolBackwardOptions {
                        options,
                        input_shape: input.shape(),
                    };
                    prep.finish(State::<B> { argmax, options }, output)
                }
                // This node was never registered; Burn's own is.
                MaxPoolForward::Unsupported => max_pool::forward::<Autodiff<B, C>>(input, &options),
            }
        }
        OpsKind::UnTracked(prep) => prep.finish(B::max_pool(input.into_primitive(), options)),
    }
}
