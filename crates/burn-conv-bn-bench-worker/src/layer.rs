//! A conv -> batch norm -> ReLU block in each of Burn's forms.

use std::path::Path;

use anyhow::{Context, Result};
use burn::module::Param;
use burn::nn::conv::Conv2dConfig;
use burn::nn::{BatchNormConfig, PaddingConfig2d};
use burn::tensor::module::batch_norm_train;
use burn::tensor::{Device, Distribution, Gradients, Tensor};
use burn_conv_bn::{Activation, ConvBn2d};
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
/// an estimated 3e-3: on which side of ReLU's kink rounding puts such a value then changes nothing.
const KINK: f32 = 1e-2;

/// Draws the input, the parameters and the upstream gradient from a seed.
pub fn prepare(layer: &Layer, seed: u64, folder: &Path) -> Result<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut uniform = |count: usize, low: f32, high: f32| -> Vec<f32> {
        (0..count).map(|_| rng.random_range(low..high)).collect()
    };
    let count = |shape: [usize; 4]| -> usize { shape.iter().product() };
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
    for (gradient, value) in upstream.iter_mut().zip(pre_activation(layer, folder)?) {
        if value.abs() < KINK {
            *gradient = 0.0;
        }
    }
    write(folder, "upstream", &upstream)
}

/// The input of the ReLU, by Burn's own layers.
fn pre_activation(layer: &Layer, folder: &Path) -> Result<Vec<f32>> {
    let device = Device::flex();
    let block = read_block(layer, folder, &device)?;
    let input = tensor(folder, "input", layer.input_shape(), &device)?;
    let norm = &block.norm;
    let normalized = batch_norm_train(
        block.conv.forward(input),
        norm.gamma.val(),
        norm.beta.val(),
        norm.epsilon,
    );
    into_values(normalized.output)
}

/// A block with its data.
pub struct LayerWork {
    layer: Layer,
    form: Form,
    computing: Computing,
    block: ConvBn2d,
    input: Tensor<4>,
    upstream: Tensor<4>,
    device: Device,
}

impl LayerWork {
    /// Reads the data that `prepare` wrote.
    pub fn load(
        layer: &Layer,
        contender: Contender,
        computing: Computing,
        device: Device,
        data: &Path,
    ) -> Result<Self> {
        let mut block = read_block(layer, data, &device)?;
        block.settings.recompute = recompute(contender);
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

    fn forward(&self, input: Tensor<4>) -> Tensor<4> {
        self.form
            .forward(&self.computing.module(&self.block), input)
    }
}

/// The block with its parameters. The form that runs it is another question.
pub fn read_block(layer: &Layer, data: &Path, device: &Device) -> Result<ConvBn2d> {
    let padding = layer.padding;
    let mut conv = Conv2dConfig::new(layer.channels, [layer.kernel; 2])
        .with_stride([layer.stride; 2])
        .with_padding(PaddingConfig2d::Explicit(
            padding, padding, padding, padding,
        ))
        .with_groups(layer.groups)
        .with_bias(false)
        .init(device);
    conv.weight = parameter(data, "weight", layer.weight_shape(), device)?;
    let channels = layer.channels[1];
    let mut norm = BatchNormConfig::new(channels).init(device);
    norm.gamma = parameter(data, "gamma", [channels], device)?;
    norm.beta = parameter(data, "beta", [channels], device)?;
    Ok(ConvBn2d::from_parts(conv, norm, Activation::Relu))
}

impl Workload for LayerWork {
    fn check(&self, folder: &Path) -> Result<Vec<String>> {
        let output = self.forward(self.input.clone());
        let grads = backward_from(output.clone(), self.upstream.clone());
        let (conv, norm) = (&self.block.conv, &self.block.norm);
        let vector = |parameter: &Param<Tensor<1>>| parameter.val().grad(&grads).map(into_values);
        let mut results = vec![
            ("output", Some(into_values(output))),
            (
                "weight_grad",
                conv.weight.val().grad(&grads).map(into_values),
            ),
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
            let [batch, least] = SMALL;
            let size = least.max(self.layer.kernel);
            let shape = [batch, self.layer.channels[0], size, size];
            let input = Tensor::random(shape, Distribution::Default, &self.device);
            (self.computing.activations(input), None)
        } else {
            (self.input.clone(), Some(self.upstream.clone()))
        };
        let output = self.forward(input.set_require_grad(self.layer.input_grad));
        forward_end();
        let upstream = upstream.unwrap_or_else(|| output.clone().detach().ones_like());
        (backward_from(output.clone(), upstream), Some(output))
    }

    fn optimize(&mut self, _grads: Gradients) -> bool {
        false
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn saved(&self) -> u64 {
        let block = self.computing.module(&self.block);
        let mut listed = self
            .form
            .saved_for_backward(&block, self.layer.input_shape());
        // In a network an input whose gradient is wanted is no data, and there for the block.
        for tensor in listed.iter_mut().filter(|tensor| tensor.name == "input") {
            tensor.shared = !self.layer.input_grad;
        }
        saved_bytes(&listed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn_conv_bn_bench::tensor_file::read;

    const LAYER: Layer = Layer {
        batch: 8,
        channels: [2, 3],
        size: 40,
        kernel: 3,
        stride: 1,
        padding: 1,
        groups: 1,
        input_grad: true,
    };

    #[test]
    fn rounding_cannot_decide_where_a_gradient_flows() {
        let folder = tempfile::tempdir().unwrap();
        prepare(&LAYER, 4, folder.path()).unwrap();
        let upstream = read(folder.path(), "upstream").unwrap();
        let values = pre_activation(&LAYER, folder.path()).unwrap();
        assert_eq!(upstream.len(), values.len());
        let near = values.iter().filter(|value| value.abs() < KINK).count();
        let zeros = upstream.iter().filter(|gradient| **gradient == 0.0).count();
        // 38,400 values, of which a fraction of about 1e-2 is that near.
        assert!(near > 0 && near < 1000, "{near}");
        assert!(zeros >= near && zeros < near + 5, "{zeros} for {near}");
        for (gradient, value) in upstream.iter().zip(&values) {
            assert!(*gradient == 0.0 || value.abs() >= KINK);
        }
    }
}
