use super::*;

use crate::choice::Choice;

use burn::module::Param;
use burn::nn::Linear;
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Tensor, TensorData, Tolerance};

/// A bias-free 2 -> 1 layer, so that the gradient of the sum of its outputs for one input
/// row is that row.
fn layer(weight: [f64; 2], dtype: FloatDType, device: &Device) -> Linear {
    let weight = Tensor::<2>::from_data(
        TensorData::new(weight.to_vec(), [2, 1]),
        (device, DType::from(dtype)),
    );
    Linear {
        weight: Param::from_tensor(weight),
        bias: None,
    }
}

fn step(optimizer: &mut ModuleOptimizer, layer: Linear, lr: f64, grad: [f64; 2]) -> Linear {
    let weight = layer.weight.val();
    let input = Tensor::<2>::from_data(
        TensorData::new(grad.to_vec(), [1, 2]),
        (&weight.device(), weight.dtype()),
    );
    let grads = layer.forward(input).sum().backward();
    let grads = GradientsParams::from_grads(grads, &layer);
    optimizer.step(lr, layer, grads)
}

/// Whether a record of the state after one step, restored, gives the same record again.
fn comes_back(choice: OptimizerChoice, dtype: FloatDType) -> bool {
    let device = Device::flex().autodiff();
    let mut original = choice.init();
    let layer = layer([0.75, -1.5], dtype, &device);
    step(&mut original, layer, 0.125, [1.0 / 3.0, -3.0]);
    let record = || original.into_bytes().expect("the state is serializable");
    let restored = choice.init().from_bytes(record());
    let restored = restored.expect("the record was just written");
    restored.into_bytes().expect("the state is serializable") == record()
}

#[test]
fn what_restores_comes_back() {
    for &choice in OptimizerChoice::value_variants() {
        for dtype in [FloatDType::F32, FloatDType::F64] {
            assert_eq!(
                comes_back(choice, dtype),
                choice.restores(dtype),
                "{choice:?}, {dtype:?}"
            );
        }
    }
}

/// Files have the names of the command line.
#[test]
fn names_are_those_of_json() {
    for choice in OptimizerChoice::value_variants() {
        let json = serde_json::to_string(choice).expect("a name is JSON");
        assert_eq!(json, format!("{:?}", choice.name()));
    }
}

/// Each takes the loss of a linear layer down, at the rate that it has by default.
#[test]
fn every_choice_descends() {
    let device = Device::flex().autodiff();
    for choice in OptimizerChoice::value_variants() {
        let mut optimizer = choice.init();
        let mut layer = layer([0.75, -1.5], FloatDType::F32, &device);
        for _ in 0..3 {
            layer = step(
                &mut optimizer,
                layer,
                choice.default_learning_rate(),
                [2.0, -1.0],
            );
        }
        let weight = layer.weight.val().into_data();
        let weight: Vec<f64> = weight.iter::<f64>().collect();
        assert!(
            weight[0] < 0.75 && weight[1] > -1.5,
            "{choice:?}: {weight:?}"
        );
    }
}

/// PyTorch's: the velocity is 0.9 of the last one and all of the gradient.
#[test]
fn sgd_has_an_undampened_momentum() {
    let device = Device::flex().autodiff();
    let mut optimizer = OptimizerChoice::Sgd.init();
    let mut layer = layer([0.0, 0.0], FloatDType::F64, &device);
    for _ in 0..2 {
        layer = step(&mut optimizer, layer, 0.5, [1.0, -2.0]);
    }
    let wanted = TensorData::new(vec![-0.5 * (1.0 + 1.9), 0.5 * (2.0 + 3.8)], [2, 1]);
    let weight = layer.weight.val().into_data();
    weight.assert_approx_eq::<f64>(&wanted, Tolerance::absolute(1e-6));
}
