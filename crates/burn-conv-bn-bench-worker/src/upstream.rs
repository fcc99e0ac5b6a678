//! A backward pass from a given gradient of the output, as PyTorch's `output.backward(gradient)`.
//!
//! Burn starts from a scalar. `(output * gradient).sum()` would do, at the price of two more
//! passes over the output and a copy of it, which would be timed and measured with the layer.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::{FloatDType, Gradients, Shape, Tensor};
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients as NodeGradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};

/// Runs the backward pass from `gradient`, the gradient of `output`.
pub fn backward_from<const D: usize>(output: Tensor<D>, gradient: Tensor<D>) -> Gradients {
    let seed = Dispatch::seed_backward(output.into_dispatch(), gradient.into_dispatch());
    Tensor::<1>::from_dispatch(seed).backward()
}

/// Burn's [`Backend`], extended with the start of such a backward pass.
#[backend_extension(Autodiff, Flex, Cube: cfg(feature = "cubecl"))]
pub trait SeedBackend: Backend {
    /// A scalar zero, in whose backward pass `output` gets the gradient `gradient`.
    fn seed_backward(output: FloatTensor<Self>, gradient: FloatTensor<Self>) -> FloatTensor<Self> {
        assert_eq!(output.shape(), gradient.shape(), "one gradient a value");
        Self::float_zeros(Shape::new([1]), &output.device(), FloatDType::F32)
    }
}

impl SeedBackend for Flex {}

// With Burn's fusion or without it, whichever the build has: the default body needs no kernel.
#[cfg(feature = "cubecl")]
impl SeedBackend for burn::backend::Cube {}

impl<B: SeedBackend, C: CheckpointStrategy> SeedBackend for Autodiff<B, C> {
    fn seed_backward(output: FloatTensor<Self>, gradient: FloatTensor<Self>) -> FloatTensor<Self> {
        let nodes = [output.node()];
        let gradient = gradient.into_primitive();
        let seed = B::seed_backward(output.into_primitive(), gradient.clone());
        let prep = <SeedBackward as Backward<B, 1>>::prepare::<C>(SeedBackward, nodes);
        match prep.compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(gradient, seed),
            OpsKind::UnTracked(prep) => prep.finish(seed),
        }
    }
}

#[derive(Debug)]
struct SeedBackward;

impl<B: Backend> Backward<B, 1> for SeedBackward {
    /// The gradient.
    type State = FloatTensor<B>;

    fn backward(
        self,
        ops: Ops<FloatTensor<B>, 1>,
        grads: &mut NodeGradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let [output] = ops.parents;
        drop(grads.consume::<B>(&ops.node));
        if let Some(node) = output {
            grads.register::<B>(node.id, ops.state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, Distribution};

    #[test]
    fn is_the_backward_pass_of_the_weighted_sum() {
        for device in [
            Device::flex().autodiff(),
            Device::flex().autodiff().gradient_checkpointing(),
        ] {
            let random = || {
                let distribution = Distribution::Uniform(-1.0, 1.0);
                Tensor::<4>::random([2, 3, 4, 5], distribution, &device)
            };
            let (leaf, gradient) = (random().require_grad(), random());
            let output = || leaf.clone().exp();

            let expected = (output() * gradient.clone()).sum().backward();
            let grads = backward_from(output(), gradient);
            let values = |grads: &Gradients| leaf.grad(grads).unwrap().into_data();
            values(&grads).assert_eq(&values(&expected), true);
        }
    }
}
