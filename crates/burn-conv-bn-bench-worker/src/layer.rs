//! A conv -> batch norm -> ReLU block in each of Burn's forms.

use std::path::Path;

use anyhow::{Context, Result};
use burn::module::Param;
use burn::nn::conv::{Conv2dConfig, Conv3dConfig};
use burn::nn::{BatchNorm, BatchNormConfig, PaddingConfig2d, PaddingConfig3d};
use burn::tensor::activation::relu;
use burn::tensor::module::batch_norm_train;
use burn::tensor::{Device, Distribution, Gradients, Tensor};
use burn_conv_bn::{Activation, ConvBn2d, ConvBn3d, ConvBnModule, SavedTensor};
use burn_conv_bn_bench::catalogue::Layer;
use burn_conv_bn_bench::protocol::Contender;
use burn_conv_bn_bench::tensor_file::write;
use burn_conv_bn_models::Form;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::precision::Computing;
use crate::tensors::{into_values, parameter, tensor};
use crate::upstream::backward_from;
use crate::workload::{Passed, Workload, form, recompute, saved_bytes};

/// Images and least size of the step that warms up before memory is measured.
const SMALL: [usize; 2] = [2, 8];

/// Pre-activations nearer to zero than this get no upstream gradient. They have a variance of
/// about one, and correct results differ by less than this, on a GPU that multiplies f32 as TF32 by
/// an estimated 3e-3: rounding, which decides the side of ReLU's kink, then changes no gradient.
const KINK: f32 = 1e-2;

/// A block over tensors of rank `D`: 4 for images, 5 for volumes.
trait Block<const D: usize>: ConvBnModule + 'static {
    /// Reads the parameters that [`prepare`] wrote.
    fn read(layer: &Layer, data: &Path, device: &Device) -> Result<Self>;

    fn weight(&self) -> &Param<Tensor<D>>;

    fn norm(&self) -> &BatchNorm;

    /// Burn's own convolution.
    fn convolve(&self, input: Tensor<D>) -> Tensor<D>;

    /// The fused op.
    fn fused(&self, input: Tensor<D>) -> Tensor<D>;

    /// What a form keeps for the backward pass, where it has a list.
    fn saved(&self, form: Form, input_shape: [usize; D]) -> Option<Vec<SavedTensor>>;
}

macro_rules! block {
    ($block:ident, $rank:literal, $conv:ident, |$side:ident| $padding:expr, $saved:expr) => {
        impl Block<$rank> for $block {
            fn read(layer: &Layer, data: &Path, device: &Device) -> Result<Self> {
                let $side = layer.padding;
                let mut conv = $conv::new(layer.channels, [layer.kernel; $rank - 2])
                    .with_stride([layer.stride; $rank - 2])
                    .with_dilation([layer.dilation; $rank - 2])
                    .with_padding($padding)
                    .with_groups(layer.groups)
                    .with_bias(false)
                    .init(device);
                conv.weight = parameter(data, "weight", layer.weight_shape(), device)?;
                let channels = layer.channels[1];
                let mut norm = BatchNormConfig::new(channels).init(device);
                norm.gamma = parameter(data, "gamma", [channels], device)?;
                norm.beta = parameter(data, "beta", [channels], device)?;
                Ok(Self::from_parts(conv, norm, Activation::Relu))
            }

            fn weight(&self) -> &Param<Tensor<$rank>> {
                &self.conv.weight
            }

            fn norm(&self) -> &BatchNorm {
                &self.norm
            }

            fn convolve(&self, input: Tensor<$rank>) -> Tensor<$rank> {
                self.conv.forward(input)
            }

            fn fused(&self, input: Tensor<$rank>) -> Tensor<$rank> {
                self.forward(input)
            }

            fn saved(&self, form: Form, input_shape: [usize; $rank]) -> Option<Vec<SavedTensor>> {
                ($saved)(self, form, input_shape)
            }
        }
    };
}

block!(
    ConvBn2d,
    4,
    Conv2dConfig,
    |side| PaddingConfig2d::Explicit(side, side, side, side),
    |block: &ConvBn2d, form: Form, shape: [usize; 4]| Some(form.saved_for_backward(block, shape))
);
block!(
    ConvBn3d,
    5,
    Conv3dConfig,
    |side| PaddingConfig3d::Explicit(side, side, side),
    |block: &ConvBn3d, form: Form, shape: [usize; 5]| (form == Form::Fused)
        .then(|| block.saved_for_backward(shape))
);

/// Draws the input, the parameters and the upstream gradient from a seed.
pub fn prepare(layer: &Layer, seed: u64, folder: &Path) -> Result<()> {
    if layer.dims == 3 {
        draw::<ConvBn3d, 5>(layer, seed, folder)
    } else {
        draw::<ConvBn2d, 4>(layer, seed, folder)
    }
}

/// A layer in the form of a contender, with the data that [`prepare`] wrote.
pub fn load(
    layer: &Layer,
    contender: Contender,
    computing: Computing,
    device: Device,
    data: &Path,
) -> Result<Box<dyn Workload>> {
    if layer.dims == 3 {
        let work = LayerWork::<ConvBn3d, 5>::load(layer, contender, computing, device, data)?;
        Ok(Box::new(work))
    } else {
        let work = LayerWork::<ConvBn2d, 4>::load(layer, contender, computing, device, data)?;
        Ok(Box::new(work))
    }
}

fn draw<B: Block<D>, const D: usize>(layer: &Layer, seed: u64, folder: &Path) -> Result<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut uniform = |count: usize, low: f32, high: f32| -> Vec<f32> {
        (0..count).map(|_| rng.random_range(low..high)).collect()
    };
    let count = |shape: [usize; D]| -> usize { shape.iter().product() };
    let channels = layer.channels[1];
    // As initialized by default.
    let bound = 1.0 / (layer.fan_in() as f32).sqrt();
    for (name, values) in [
        ("input", uniform(count(layer.input_shape()), -1.0, 1.0)),
        (
            "weight",
            uniform(count(layer.weight_shape()), -bound, bound),
        ),
        ("gamma", uniform(channels, 0.5, 1.5)),
        ("beta", uniform(channels, -0.5, 0.5)),
    ] {
        write(folder, name, &values)?;
    }
    let mut upstream = uniform(count(layer.output_shape()), -1.0, 1.0);
    for (gradient, value) in upstream
        .iter_mut()
        .zip(pre_activation::<B, D>(layer, folder)?)
    {
        if value.abs() < KINK {
            *gradient = 0.0;
        }
    }
    write(folder, "upstream", &upstream)
}

/// The input of the ReLU, by Burn's own layers.
fn pre_activation<B: Block<D>, const D: usize>(layer: &Layer, folder: &Path) -> Result<Vec<f32>> {
    let device = Device::flex();
    let block = B::read(layer, folder, &device)?;
    let input = tensor(folder, "input", layer.input_shape(), &device)?;
    let norm = block.norm();
    let normalized = batch_norm_train(
        block.convolve(input),
        norm.gamma.val(),
        norm.beta.val(),
        norm.epsilon,
    );
    into_values(normalized.output)
}

/// A block with its data.
struct LayerWork<B, const D: usize> {
    layer: Layer,
    form: Form,
    computing: Computing,
    block: B,
    input: Tensor<D>,
    upstream: Tensor<D>,
    device: Device,
}

impl<B: Block<D>, const D: usize> LayerWork<B, D> {
    fn load(
        layer: &Layer,
        contender: Contender,
        computing: Computing,
        device: Device,
        data: &Path,
    ) -> Result<Self> {
        let block = B::read(layer, data, &device)?.with_recompute(recompute(contender));
        let input = tensor(data, "input", layer.input_shape(), &device)?;
        let upstream = tensor(data, "upstream", layer.output_shape(), &device)?;
        Ok(Self {
            form: form(contender),
            computing,
            block,
            input: computing
                .activations(input)
                .set_require_grad(layer.input_grad),
            upstream: computing.activations(upstream),
            layer: layer.clone(),
            device,
        })
    }

    fn forward(&self, input: Tensor<D>) -> Tensor<D> {
        let block = self.computing.module(&self.block);
        match self.form {
            Form::Fused => block.fused(input),
            // In mixed precision Burn's norm stands between casts.
            Form::Unfused => {
                let (convolved, norm) = (block.convolve(input), block.norm());
                let dtype = convolved.dtype();
                let normalized = norm.forward(convolved.cast(norm.gamma.val().dtype()));
                relu(normalized.cast(dtype))
            }
        }
    }
}

impl<B: Block<D>, const D: usize> Workload for LayerWork<B, D> {
    fn check(&self, folder: &Path) -> Result<Vec<String>> {
        let output = self.forward(self.input.clone());
        let grads = backward_from(output.clone(), self.upstream.clone());
        let (weight, norm) = (self.block.weight(), self.block.norm());
        let vector = |parameter: &Param<Tensor<1>>| parameter.val().grad(&grads).map(into_values);
        let mut results = vec![
            ("output", Some(into_values(output))),
            ("weight_grad", weight.val().grad(&grads).map(into_values)),
            ("gamma_grad", vector(&norm.gamma)),
            ("beta_grad", vector(&norm.beta)),
        ];
        if self.layer.input_grad {
            results.push(("input_grad", self.input.grad(&grads).map(into_values)));
        }
        let mut names = Vec::new();
        for (name, values) in results {
            let values = values.with_context(|| format!("there is no {name}"))?;
            write(folder, name, &values?)?;
            names.push(name.to_string());
        }
        Ok(names)
    }

    fn pass(&self, is_small: bool, forward_end: &mut dyn FnMut()) -> Passed {
        let (input, upstream) = if is_small {
            let ([batch, least], layer) = (SMALL, self.layer.clone());
            let size = least.max(layer.dilation * (layer.kernel - 1) + 1);
            let small = Layer {
                batch,
                size,
                ..layer
            };
            let shape = small.input_shape::<D>();
            let input = Tensor::random(shape, Distribution::Default, &self.device);
            (self.computing.activations(input), None)
        } else {
            (self.input.clone(), Some(self.upstream.clone()))
        };
        let output = self.forward(input.set_require_grad(self.layer.input_grad));
        forward_end();
        let upstream = upstream.unwrap_or_else(|| output.clone().detach().ones_like());
        let grads = backward_from(output.clone(), upstream);
        (grads, Some(Box::new(output)))
    }

    fn optimize(&mut self, _grads: Gradients) -> bool {
        false
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn saved(&self) -> Option<u64> {
        let block = self.computing.module(&self.block);
        let mut listed = block.saved(self.form, self.layer.input_shape())?;
        // In a network an input with a gradient is an activation, which the block keeps alive.
        for tensor in listed.iter_mut().filter(|tensor| tensor.name == "input") {
            tensor.shared = !self.layer.input_grad;
        }
        Some(saved_bytes(&listed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn_conv_bn_bench::tensor_file::read;

    #[test]
    fn rounding_cannot_decide_where_a_gradient_flows() {
        let folder = tempfile::tempdir().unwrap();
        let layer = Layer::new(8, [2, 3], 40, 3);
        prepare(&layer, 4, folder.path()).unwrap();
        let upstream = read(folder.path(), "upstream").unwrap();
        let values = pre_activation::<ConvBn2d, 4>(&layer, folder.path()).unwrap();
        assert_eq!(upstream.len(), values.len());
        let near = values.iter().filter(|value| value.abs() < KINK).count();
        let zeros = upstream.iter().filter(|gradient| **gradient == 0.0).count();
        // About 1e-2 of 38,400 values.
        assert!(near > 0 && near < 1000, "{near}");
        assert!(zeros >= near && zeros < near + 5, "{zeros} for {near}");
        for (gradient, value) in upstream.iter().zip(&values) {
            assert!(*gradient == 0.0 || value.abs() >= KINK);
        }
    }
}
