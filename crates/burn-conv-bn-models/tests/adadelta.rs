//! Adadelta: every value that PyTorch gives for the runs in `data/pytorch_adadelta.json`, which
//! `scripts/pytorch_reference.py` writes, and a run that is stopped and taken up again.

mod close;

use burn::config::Config;
use burn::grad_clipping::GradientClippingConfig;
use burn::module::Param;
use burn::nn::Linear;
use burn::optim::decay::WeightDecayConfig;
use burn::optim::{GradientsParams, ModuleOptimizer, Optimizer};
use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_conv_bn_models::optim::{Adadelta, AdadeltaConfig, AdadeltaState};
use serde::Deserialize;

use close::{distance, values};

#[derive(Deserialize)]
struct File {
    runs: Vec<Run>,
}

#[derive(Deserialize)]
struct Run {
    name: String,
    rho: f64,
    epsilon: f64,
    weight_decay: f64,
    learning_rates: Vec<f64>,
    parameters: Vec<Parameter>,
}

#[derive(Deserialize)]
struct Parameter {
    name: String,
    shape: Vec<usize>,
    initial: Vec<f64>,
    gradients: Vec<Vec<f64>>,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    parameter: Vec<f64>,
    square_avg: Vec<f64>,
    acc_delta: Vec<f64>,
}

impl Run {
    fn optimizer(&self) -> Adadelta {
        let decay = WeightDecayConfig::new(self.weight_decay as f32);
        AdadeltaConfig::new()
            .with_rho(self.rho)
            .with_epsilon(self.epsilon)
            .with_weight_decay((self.weight_decay != 0.0).then_some(decay))
            .build()
    }

    /// Relative to the largest value of a tensor.
    fn tolerance(&self, dtype: DType) -> f64 {
        // Burn's weight decay is in single precision whatever the parameters are.
        let exact = f64::from(self.weight_decay as f32) == self.weight_decay;
        match dtype {
            DType::F64 if exact => 1e-12,
            DType::F64 => 1e-7,
            _ => 1e-5,
        }
    }

    fn check<const D: usize>(&self, parameter: &Parameter, dtype: DType) {
        let tensor = |values: &[f64]| {
            let data = TensorData::new(values.to_vec(), parameter.shape.clone());
            Tensor::<D>::from_data(data, (&Device::flex(), dtype))
        };
        let optimizer = self.optimizer();
        let mut value = tensor(&parameter.initial);
        let mut state: Option<AdadeltaState<D>> = None;
        assert_eq!(parameter.steps.len(), self.learning_rates.len());
        let steps = parameter.gradients.iter().zip(&parameter.steps);
        for (index, (&rate, (gradient, wanted))) in
            self.learning_rates.iter().zip(steps).enumerate()
        {
            let (stepped, new) = optimizer.step(rate, value, tensor(gradient), state);
            let new = new.expect("Adadelta has a state");
            for (what, got, wanted) in [
                ("parameter", &stepped, &wanted.parameter),
                ("square_avg", &new.square_avg, &wanted.square_avg),
                ("acc_delta", &new.acc_delta, &wanted.acc_delta),
            ] {
                assert_eq!(got.dtype(), dtype);
                let difference = distance(&values(got.clone()), wanted);
                let allowed = self.tolerance(dtype) * distance(wanted, &vec![0.0; wanted.len()]);
                assert!(
                    difference <= allowed,
                    "{}, {dtype:?}: {what} of {} after step {index} is {difference:e} off, \
                     {allowed:e} allowed",
                    self.name,
                    parameter.name,
                );
            }
            (value, state) = (stepped, Some(new));
        }
    }
}

#[test]
fn values_of_pytorch() {
    let file: File = serde_json::from_str(include_str!("data/pytorch_adadelta.json")).unwrap();
    assert_eq!(file.runs.len(), 2);
    for run in &file.runs {
        for parameter in &run.parameters {
            for dtype in [DType::F64, DType::F32] {
                match parameter.shape.len() {
                    1 => run.check::<1>(parameter, dtype),
                    2 => run.check::<2>(parameter, dtype),
                    rank => panic!("{}: rank {rank}", parameter.name),
                }
            }
        }
    }
}

fn layer(dtype: DType) -> Linear {
    let device = Device::flex().autodiff();
    let weight = TensorData::new(vec![0.75, -1.5, 0.25, -0.5], [2, 2]);
    let bias = TensorData::new(vec![0.1, -0.2], [2]);
    Linear {
        weight: Param::from_tensor(Tensor::from_data(weight, (&device, dtype))),
        bias: Some(Param::from_tensor(Tensor::from_data(
            bias,
            (&device, dtype),
        ))),
    }
}

/// One step on inputs that depend on `index`, with gradients that depend on the parameters.
fn step(optimizer: &mut ModuleOptimizer, layer: Linear, index: usize) -> Linear {
    let input: Vec<f64> = (0..4).map(|i| ((3 * index + i) as f64).sin()).collect();
    let weight = layer.weight.val();
    let input = Tensor::<2>::from_data(
        TensorData::new(input, [2, 2]),
        (&weight.device(), weight.dtype()),
    );
    let grads = layer.forward(input).square().sum().backward();
    let grads = GradientsParams::from_grads(grads, &layer);
    optimizer.step(1.0, layer, grads)
}

#[test]
fn a_record_takes_a_run_up_where_it_stopped() {
    for dtype in [DType::F32, DType::F64] {
        let config = AdadeltaConfig::new();
        let mut optimizer = config.init();
        let stopped = (0..5).fold(layer(dtype), |layer, i| step(&mut optimizer, layer, i));
        let record = optimizer.into_bytes().expect("the state is serializable");

        let finish = |mut optimizer: ModuleOptimizer| {
            let layer = (5..9).fold(stopped.clone(), |layer, i| step(&mut optimizer, layer, i));
            let bias = layer.bias.expect("the layer has a bias").val();
            assert_eq!(bias.dtype(), dtype);
            [values(layer.weight.val()), values(bias)].concat()
        };
        let wanted = finish(optimizer);
        let resumed = config.init().from_bytes(record);
        let resumed = finish(resumed.expect("the record was just written"));
        assert_eq!(resumed, wanted, "{dtype:?}");
        assert!(
            distance(&finish(config.init()), &wanted) > 1e-5,
            "the state makes no difference"
        );
    }
}

/// One element, by Zeiler's Algorithm 1 with PyTorch's learning rate.
#[test]
fn follows_the_published_formulae() {
    let (rho, epsilon, decay, rate) = (0.8_f64, 1e-5_f64, 0.125_f64, 0.7_f64);
    let optimizer = AdadeltaConfig::new()
        .with_rho(rho)
        .with_epsilon(epsilon)
        .with_weight_decay(Some(WeightDecayConfig::new(decay as f32)))
        .build();
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F64, 1e-12)] {
        let tensor = |value: f64| {
            let data = TensorData::new(vec![value], [1]);
            Tensor::<1>::from_data(data, (&Device::flex(), dtype))
        };
        let (mut wanted, mut square_avg, mut acc_delta) = (0.75_f64, 0.0_f64, 0.0_f64);
        let (mut value, mut state) = (tensor(wanted), None);
        for gradient in [0.5, -3.0, 1e-4, 0.0, 40.0] {
            (value, state) = optimizer.step(rate, value, tensor(gradient), state);
            let gradient = gradient + decay * wanted;
            square_avg = rho * square_avg + (1.0 - rho) * gradient * gradient;
            let delta = ((acc_delta + epsilon) / (square_avg + epsilon)).sqrt() * gradient;
            acc_delta = rho * acc_delta + (1.0 - rho) * delta * delta;
            wanted -= rate * delta;
        }
        let difference = distance(&values(value), &[wanted]);
        assert!(difference <= tolerance, "{dtype:?}: {difference:e}");
    }
}

#[test]
fn config_survives_json() {
    let config = AdadeltaConfig::new()
        .with_rho(0.95)
        .with_grad_clipping(Some(GradientClippingConfig::Norm(2.0)));
    let copy = AdadeltaConfig::load_binary(config.to_string().as_bytes())
        .expect("a printed config is its JSON");

    assert_eq!(copy.to_string(), config.to_string());
    assert!(copy.init().has_gradient_clipping());
}
