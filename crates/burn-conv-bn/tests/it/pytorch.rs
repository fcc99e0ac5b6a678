//! Every value that PyTorch gives for the cases in `data/pytorch_conv_bn.json`, which
//! `scripts/pytorch_reference.py` writes, in f64.

use std::collections::HashMap;

use burn::tensor::{DType, Tensor, TensorData};
use burn_conv_bn::functional::{ConvBnParams, Normalized, conv_bn};
use burn_conv_bn::{Activation, ConvBnOptions, ConvSpec, NormSpec, NormVariant, Recompute};
use serde::Deserialize;

use crate::common::{assert_close, tensor, values};

#[derive(Deserialize)]
struct File {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    mode: String,
    options: Options,
    tensors: HashMap<String, Values>,
    results: HashMap<String, Values>,
}

#[derive(Deserialize)]
struct Options {
    stride: Vec<usize>,
    padding: Vec<(usize, usize)>,
    dilation: Vec<usize>,
    groups: usize,
    epsilon: f64,
    norm: String,
    activation: String,
}

#[derive(Clone, Deserialize)]
struct Values {
    shape: Vec<usize>,
    data: Vec<f64>,
}

impl Case {
    fn tensor<const D: usize>(&self, name: &str) -> Option<Tensor<D>> {
        let values = self.tensors.get(name)?;
        let data = TensorData::new(values.data.clone(), values.shape.clone());
        Some(tensor(data, DType::F64))
    }

    fn leaf<const D: usize>(&self, name: &str) -> Option<Tensor<D>> {
        self.tensor(name).map(Tensor::require_grad)
    }

    fn options(&self) -> ConvBnOptions {
        let options = &self.options;
        let norm = match options.norm.as_str() {
            "batch_norm" => NormVariant::BatchNorm,
            "tutorial" => NormVariant::Tutorial,
            other => panic!("unknown norm {other}"),
        };
        let activation = match options.activation.as_str() {
            "identity" => Activation::Identity,
            "relu" => Activation::Relu,
            other => panic!("unknown activation {other}"),
        };
        ConvBnOptions::new(ConvSpec {
            stride: options.stride.clone(),
            padding: options.padding.clone(),
            dilation: options.dilation.clone(),
            groups: options.groups,
        })
        .with_norm(NormSpec::new(norm, options.epsilon))
        .with_activation(activation)
    }

    fn compare(&self, what: &str, got: Vec<f64>) {
        let wanted = &self.results[what];
        // PyTorch itself carries 1e-11 where the mean is 1e5 standard deviations away.
        let relative = if self.name == "large_mean" {
            1e-9
        } else {
            1e-10
        };
        // Under batch statistics the bias's gradient is zero here and rounding noise there.
        let absolute = if what == "grad_bias" { 1e-8 } else { 1e-12 };
        let what = format!("{}: {what}", self.name);
        assert_close(&what, &got, &wanted.data, relative, absolute);
    }

    fn run<const D: usize>(&self, recompute: Recompute, max_workspace: Option<usize>) {
        let options = self
            .options()
            .with_recompute(recompute)
            .with_max_workspace(max_workspace);
        let x = self.leaf::<D>("x").unwrap();
        let mut params = ConvBnParams::new(self.leaf::<D>("weight").unwrap());
        params.bias = self.leaf("bias");
        params.affine = self.leaf("gamma").zip(self.leaf("beta"));
        params.residual = self.leaf("residual");
        params.statistics = self.tensor("running_mean").zip(self.tensor("running_var"));
        assert_eq!(params.statistics.is_some(), self.mode == "frozen");

        let Normalized {
            output,
            mean,
            variance,
            ..
        } = conv_bn(x.clone(), params.clone(), options).unwrap();
        self.compare("output", values(output.clone()));
        if self.mode == "train" {
            self.compare("mean", values(mean));
            self.compare("variance_biased", values(variance));
        }
        let grads = (output * self.tensor::<D>("upstream").unwrap())
            .sum()
            .backward();
        self.compare("grad_x", values(x.grad(&grads).unwrap()));
        self.compare("grad_weight", values(params.weight.grad(&grads).unwrap()));
        if let Some(bias) = &params.bias {
            self.compare("grad_bias", values(bias.grad(&grads).unwrap()));
        }
        if let Some((gamma, beta)) = &params.affine {
            self.compare("grad_gamma", values(gamma.grad(&grads).unwrap()));
            self.compare("grad_beta", values(beta.grad(&grads).unwrap()));
        }
        if let Some(residual) = &params.residual {
            self.compare("grad_residual", values(residual.grad(&grads).unwrap()));
        }
    }
}

#[test]
fn values_of_pytorch() {
    let file: File = serde_json::from_str(include_str!("../data/pytorch_conv_bn.json")).unwrap();
    assert!(file.cases.len() >= 49, "got {} cases", file.cases.len());
    for case in &file.cases {
        for recompute in [Recompute::Conv, Recompute::Norm, Recompute::Never] {
            for max_workspace in [None, Some(1)] {
                match case.options.stride.len() {
                    1 => case.run::<3>(recompute, max_workspace),
                    2 => case.run::<4>(recompute, max_workspace),
                    3 => case.run::<5>(recompute, max_workspace),
                    rank => panic!("{}: rank {rank}", case.name),
                }
            }
        }
    }
}
