//! Activations against Burn's own modules and functions, and configurations to and from Burn's.

use burn::nn::activation::{
    Activation as BurnActivation, ActivationConfig, EluConfig, HardSigmoidConfig, LeakyReluConfig,
    Mish, PReluConfig, Relu6, SiLU, SoftplusConfig,
};
use burn::tensor::{DType, Tensor, TensorData};
use burn_conv_bn::functional::{ConvBnParams, conv_bn};
use burn_conv_bn::{
    Activation, ActivationError, ConvBnOptions, ConvSpec, NormSpec, NormVariant, Recompute,
};

use crate::common::{assert_close, device, random, tensor, values};

/// Burn's configurations that have a counterpart, with parameters other than the defaults.
fn configs() -> Vec<ActivationConfig> {
    vec![
        ActivationConfig::Identity,
        ActivationConfig::Relu,
        LeakyReluConfig::new().with_negative_slope(0.3).into(),
        ActivationConfig::Gelu,
        ActivationConfig::GeluApproximate,
        ActivationConfig::HardSwish,
        ActivationConfig::Sigmoid,
        HardSigmoidConfig::new()
            .with_alpha(0.3)
            .with_beta(0.25)
            .into(),
        ActivationConfig::Tanh,
        EluConfig::new().with_alpha(0.6).into(),
        SoftplusConfig::new().with_beta(2.5).into(),
    ]
}

type Function = Box<dyn Fn(Tensor<3>) -> Tensor<3>>;

/// Output and gradient of a norm that changes nothing, before each activation, are those of Burn's module.
#[test]
fn outputs_and_gradients_are_those_of_burns_modules() {
    let modules = configs().into_iter().map(|config| {
        let activation = Activation::try_from(config.clone()).unwrap();
        let module: BurnActivation = config.init(&device());
        let function: Function = Box::new(move |value| module.forward(value));
        (activation, function)
    });
    let others: [(Activation, Function); 3] = [
        (Activation::Relu6, Box::new(|v| Relu6::new().forward(v))),
        (Activation::Silu, Box::new(|v| SiLU::new().forward(v))),
        (Activation::Mish, Box::new(|v| Mish::new().forward(v))),
    ];
    // Next to no kink.
    let points: Vec<f64> = (-900..900)
        .map(|step| f64::from(step) * 0.0101 + 0.003)
        .collect();
    let shape = [1, 1, points.len()];
    let input = TensorData::new(points, shape);
    let upstream = tensor::<3>(random(&shape, 1), DType::F32);
    for (activation, function) in modules.chain(others) {
        let step = |run: &dyn Fn(Tensor<3>) -> Tensor<3>| {
            let x = tensor::<3>(input.clone(), DType::F32).require_grad();
            let output = run(x.clone());
            let grads = (output.clone() * upstream.clone()).sum().backward();
            (values(output), values(x.grad(&grads).unwrap()))
        };
        let wanted = step(&function);
        // Burn's gradient of the exact GELU is the approximation's.
        let approximate = if activation == Activation::Gelu {
            2e-3
        } else {
            2e-6
        };
        for recompute in [Recompute::Conv, Recompute::Never] {
            let got = step(&|x| {
                let params = ConvBnParams::new(Tensor::ones([1, 1, 1], &device()))
                    .with_statistics(Tensor::zeros([1], &device()), Tensor::ones([1], &device()));
                let options = ConvBnOptions::new(ConvSpec::unit(1))
                    .with_norm(NormSpec::new(NormVariant::BatchNorm, 0.0))
                    .with_activation(activation)
                    .with_recompute(recompute);
                conv_bn(x, params, options).unwrap().output
            });
            let what = format!("{activation:?}, {recompute:?}");
            assert_close(&format!("{what}: output"), &got.0, &wanted.0, 1e-6, 0.0);
            let gradient = format!("{what}: gradient");
            assert_close(&gradient, &got.1, &wanted.1, approximate, 0.0);
        }
        let forward = |x: Tensor<3>| activation.forward(x);
        let what = format!("{activation:?}, on its own");
        assert_close(&what, &step(&forward).0, &wanted.0, 0.0, 0.0);
    }
}

#[test]
fn configurations_go_to_burn_and_back() {
    for config in configs() {
        let activation = Activation::try_from(config.clone()).unwrap();
        let back = ActivationConfig::try_from(activation).unwrap();
        assert_eq!(format!("{back:?}"), format!("{config:?}"));
    }
}

#[test]
fn what_has_no_counterpart_is_named() {
    for (config, name) in [
        (ActivationConfig::Selu, "Burn's Selu"),
        (PReluConfig::new().into(), "Burn's PRelu"),
    ] {
        let error = Activation::try_from(config).unwrap_err();
        assert!(
            matches!(error, ActivationError::NoActivation { .. }),
            "{error:?}"
        );
        assert!(error.to_string().contains(name), "{error}");
    }
    for threshold in [19.0, f64::NAN] {
        let config = SoftplusConfig::new().with_threshold(threshold);
        let error = Activation::try_from(ActivationConfig::from(config)).unwrap_err();
        let message = format!("at least 20, got {threshold}");
        assert!(error.to_string().contains(&message), "{error}");
    }
    for activation in [Activation::Relu6, Activation::Silu, Activation::Mish] {
        let error = ActivationConfig::try_from(activation).unwrap_err();
        assert_eq!(error, ActivationError::NoConfig { activation });
        assert!(error.to_string().contains(&format!("{activation:?}")));
    }
}
