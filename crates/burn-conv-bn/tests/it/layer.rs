//! The layer: modes, parts, configuration.

use burn::config::Config;
use burn::module::Module;
use burn::nn::{PaddingConfig1d, PaddingConfig2d};
use burn::tensor::{DType, Device, Distribution, Tensor};
use burn_conv_bn::{
    Activation, ConvBn1dConfig, ConvBn2d, ConvBn2dConfig, ConvBn3dConfig, ConvBnModule,
    MaxPool2dConfig, NormVariant, Recompute, RunningVariance,
};

use crate::common::{assert_close, device, distance, random, tensor, values};

fn config() -> ConvBn2dConfig {
    ConvBn2dConfig::new([3, 4], [3, 3]).with_activation(Activation::Relu)
}

fn input(device: &Device) -> Tensor<4> {
    Tensor::random([2, 3, 8, 8], Distribution::Normal(0.0, 1.0), device)
}

#[test]
fn evaluation_uses_and_keeps_running_statistics() {
    let block = config().init(&device());
    for _ in 0..20 {
        block.forward(input(&device()) * 2.0 + 1.0);
    }
    let evaluated = block.valid();
    let before = values(evaluated.norm.running_mean.value_sync());
    let x = input(&Device::flex());
    let output = evaluated.forward(x.clone());
    assert_eq!(values(evaluated.norm.running_mean.value_sync()), before);
    let unfused = burn::tensor::activation::relu(evaluated.norm.forward(evaluated.conv.forward(x)));
    assert_close("evaluation", &values(output), &values(unfused), 1e-5, 1e-6);
    assert!(
        distance(&before, &[0.0; 4]) > 0.1,
        "the running mean has moved: {before:?}"
    );
}

#[test]
fn without_tracking_evaluation_uses_the_batch() {
    let block = config().with_track_running_stats(false).init(&device());
    let x = input(&Device::flex());
    let trained = block.forward(x.clone().autodiff());
    let evaluated = block.valid().forward(x);
    assert_eq!(values(trained), values(evaluated));
    assert_eq!(values(block.norm.running_mean.value_sync()), [0.0; 4]);
    assert_eq!(values(block.norm.running_var.value_sync()), [1.0; 4]);
}

#[test]
fn a_frozen_layer_leaves_its_statistics_alone() {
    let block = config().init(&device()).freeze();
    let x = input(&device()).require_grad();
    let output = block.forward(x.clone());
    let grads = output.sum().backward();
    assert!(x.grad(&grads).is_some());
    assert!(block.conv.weight.val().grad(&grads).is_none());
    assert_eq!(values(block.norm.running_mean.value_sync()), [0.0; 4]);
}

#[test]
fn a_layer_without_affine_has_no_such_gradients() {
    let block = config().with_affine(false).init(&device());
    let grads = block.forward(input(&device())).sum().backward();
    assert!(block.conv.weight.val().grad(&grads).is_some());
    assert!(block.norm.gamma.val().grad(&grads).is_none());
    assert!(block.norm.beta.val().grad(&grads).is_none());
}

#[test]
fn weights_start_as_the_tutorials() {
    // kaiming_uniform with a = sqrt(5) is uniform within 1 / sqrt(fan_in).
    let block = ConvBn2dConfig::new([16, 64], [3, 3]).init(&device());
    let weight = values(block.conv.weight.val());
    let bound = 1.0 / f64::sqrt(16.0 * 9.0);
    let largest = weight
        .iter()
        .fold(0.0f64, |max, value| max.max(value.abs()));
    assert!(
        largest <= bound && largest > 0.99 * bound,
        "{largest} of {bound}"
    );
    let variance = weight.iter().map(|w| w * w).sum::<f64>() / weight.len() as f64;
    assert!(
        (variance / (bound * bound / 3.0) - 1.0).abs() < 0.05,
        "{variance}"
    );
}

#[test]
fn parts_go_in_and_come_out() {
    let block = config().init(&device());
    let weight = values(block.conv.weight.val());
    let (conv, norm) = block.into_parts();
    let block = ConvBn2d::from_parts(conv, norm, Activation::Identity);
    assert_eq!(values(block.conv.weight.val()), weight);
    assert_eq!(block.settings.activation, Activation::Identity);
    assert_eq!(block.settings.recompute, Recompute::Conv);
}

#[test]
fn a_residual_is_added_before_the_activation() {
    let block = config().init(&device());
    let x = input(&device());
    let shortcut = tensor::<4>(random(&[2, 4, 6, 6], 3), DType::F32).require_grad();
    let output = block.forward_residual(x.clone(), shortcut.clone());
    let plain = {
        let mut plain = block.clone();
        plain.settings.activation = Activation::Identity;
        plain.forward(x)
    };
    let wanted = burn::tensor::activation::relu(plain + shortcut.clone());
    assert_close(
        "residual",
        &values(output.clone()),
        &values(wanted),
        1e-6,
        1e-6,
    );
    let grads = output.clone().sum().backward();
    let mask: Vec<f64> = values(output).iter().map(|y| f64::from(*y > 0.0)).collect();
    assert_eq!(values(shortcut.grad(&grads).unwrap()), mask);
}

#[test]
fn same_padding_keeps_the_size() {
    for (kernel, stride) in [([3, 3], [1, 1]), ([2, 4], [1, 1]), ([5, 3], [2, 3])] {
        let block = ConvBn2dConfig::new([3, 4], kernel)
            .with_stride(stride)
            .with_padding(PaddingConfig2d::Same)
            .init(&device());
        let x = input(&device());
        let output = block.forward(x.clone());
        assert_eq!(
            output.dims()[2..],
            [8usize.div_ceil(stride[0]), 8usize.div_ceil(stride[1])]
        );
        assert_eq!(output.dims(), block.conv.forward(x).dims());
    }
}

#[test]
fn configuration_survives_json() {
    let config = config()
        .with_stride([2, 1])
        .with_padding(PaddingConfig2d::Explicit(1, 2, 3, 4))
        .with_norm_variant(NormVariant::Tutorial)
        .with_running_variance(RunningVariance::Unbiased)
        .with_recompute(Recompute::Never)
        .with_max_workspace(Some(1 << 20));
    let folder = std::env::temp_dir().join(format!("conv-bn-config-{}.json", std::process::id()));
    config.save(&folder).unwrap();
    let loaded = ConvBn2dConfig::load(&folder).unwrap();
    std::fs::remove_file(&folder).unwrap();
    assert_eq!(loaded.to_string(), config.to_string());
    assert_eq!(loaded.max_workspace, Some(1 << 20));
    assert_eq!(loaded.norm_variant, NormVariant::Tutorial);
}

#[test]
fn a_layer_prints_one_line() {
    // Burn counts running statistics among the parameters.
    let plain = config().init(&device());
    assert_eq!(
        plain.to_string(),
        "ConvBn2d {channels: 3 -> 4, kernel: [3, 3], stride: [1, 1], padding: Valid, \
         activation: Relu, recompute: Conv, params: 124}"
    );
    let odd = ConvBn1dConfig::new(4, 6, 5)
        .with_stride(2)
        .with_padding(PaddingConfig1d::Same)
        .with_dilation(3)
        .with_groups(2)
        .with_bias(true)
        .with_activation(Activation::Elu { alpha: 1.0 })
        .with_recompute(Recompute::Never)
        .with_max_workspace(Some(64))
        .with_epsilon(1e-3)
        .with_momentum(0.01)
        .init(&device())
        .freeze();
    assert_eq!(
        odd.to_string(),
        "ConvBn1d {channels: 4 -> 6, kernel: [5], stride: [2], padding: Same, dilation: [3], \
         groups: 2, bias: true, activation: Elu { alpha: 1.0 }, recompute: Never, \
         max_workspace: 64, epsilon: 0.001, momentum: 0.01, training: disabled, params: 90}"
    );
}

#[test]
fn what_is_saved_is_listed() {
    let block = config().init(&device());
    let saved = block.saved_for_backward([2, 3, 8, 8]);
    let find = |name| saved.iter().find(|tensor| tensor.name == name);
    assert_eq!(find("input").unwrap().bytes(), 4 * 2 * 3 * 64);
    assert_eq!(find("weight").unwrap().bytes(), 4 * 4 * 3 * 9);
    assert_eq!(find("mean").unwrap().bytes(), 16);
    assert!(find("conv_output").is_none() && find("output").is_none());

    let mut block = block;
    block.settings.recompute = Recompute::Never;
    let saved = block.saved_for_backward([2, 3, 8, 8]);
    assert!(
        saved
            .iter()
            .any(|t| t.name == "conv_output" && t.bytes() == 4 * 2 * 4 * 36)
    );
}

#[test]
fn half_precision_keeps_its_statistics_in_single() {
    for (dtype, tolerance) in [(DType::F16, 6e-3), (DType::BF16, 3e-2)] {
        let run = |data: DType, norm: DType| {
            use burn_conv_bn::functional::{ConvBnParams, conv_bn};
            let x = tensor::<4>(random(&[4, 3, 8, 8], 1), data).require_grad();
            let weight = tensor::<4>(random(&[5, 3, 3, 3], 2), data).require_grad();
            let gamma = tensor::<1>(random(&[5], 3), norm).require_grad();
            let beta = tensor::<1>(random(&[5], 4), norm).require_grad();
            let params = ConvBnParams::new(weight.clone()).with_affine(gamma.clone(), beta.clone());
            let options = burn_conv_bn::ConvBnOptions::new(burn_conv_bn::ConvSpec::unit(2));
            let result = conv_bn(x.clone(), params, options).unwrap();
            assert_eq!(result.output.dtype(), data);
            let upstream = tensor::<4>(random(&result.output.dims(), 5), data);
            let grads = (result.output.clone() * upstream).sum().backward();
            let grad_x = x.grad(&grads).unwrap();
            let grad_gamma = gamma.grad(&grads).unwrap();
            assert_eq!((grad_x.dtype(), grad_gamma.dtype()), (data, norm));
            (
                result.mean.dtype(),
                [
                    values(result.output),
                    values(grad_x),
                    values(weight.grad(&grads).unwrap()),
                    values(grad_gamma),
                    values(beta.grad(&grads).unwrap()),
                ],
            )
        };
        let (statistics, half) = run(dtype, DType::F32);
        assert_eq!(statistics, DType::F32);
        let (_, exact) = run(DType::F64, DType::F64);
        for (half, exact) in half.iter().zip(&exact) {
            assert_close(&format!("{dtype:?}"), half, exact, tolerance, 0.0);
        }
    }
}

#[test]
fn large_means_come_out_right() {
    use burn_conv_bn::functional::batch_norm;
    // Mean 1e3, standard deviation 1e-2: f32 has 6e-5 between neighbours there.
    let run = |dtype| {
        let x = tensor::<4>(random(&[8, 2, 16, 16], 7), dtype) * 1.7e-2 + 1e3;
        let result = batch_norm(x, Default::default(), burn_conv_bn::NormSpec::default()).unwrap();
        (values(result.mean), values(result.variance))
    };
    let ((mean, variance), (exact_mean, exact_variance)) = (run(DType::F32), run(DType::F64));
    assert!(distance(&mean, &exact_mean) < 1e-4);
    for (got, exact) in variance.iter().zip(&exact_variance) {
        assert!((got / exact - 1.0).abs() < 2e-3, "{got} for {exact}");
    }
}

#[test]
fn constant_channels_give_finite_gradients() {
    use burn_conv_bn::functional::{ConvBnParams, conv_bn};
    for norm in [
        burn_conv_bn::NormSpec::default(),
        burn_conv_bn::NormSpec::new(NormVariant::Tutorial, 1e-3),
    ] {
        let x = Tensor::<4>::ones([2, 1, 4, 4], &device()).require_grad();
        let weight = Tensor::<4>::ones([2, 1, 1, 1], &device()).require_grad();
        let options =
            burn_conv_bn::ConvBnOptions::new(burn_conv_bn::ConvSpec::unit(2)).with_norm(norm);
        let output = conv_bn(x.clone(), ConvBnParams::new(weight.clone()), options)
            .unwrap()
            .output;
        assert_eq!(values(output.clone()), [0.0; 64]);
        let upstream = tensor::<4>(random(&[2, 2, 4, 4], 9), DType::F32);
        let grads = (output * upstream).sum().backward();
        assert!(
            values(x.grad(&grads).unwrap())
                .iter()
                .all(|g| g.is_finite())
        );
        assert!(
            values(weight.grad(&grads).unwrap())
                .iter()
                .all(|g| g.is_finite())
        );
    }
}

/// Statistics are not taken from it.
#[test]
fn an_empty_batch_is_evaluated() {
    let device = Device::flex();
    let line = ConvBn1dConfig::new(3, 4, 3)
        .with_padding(PaddingConfig1d::Same)
        .init(&device);
    assert_eq!(
        line.forward(Tensor::zeros([0, 3, 8], &device)).dims(),
        [0, 4, 8]
    );
    let volume = ConvBn3dConfig::new([3, 4], [3, 3, 3]).init(&device);
    let x = Tensor::zeros([0, 3, 8, 6, 4], &device);
    assert_eq!(volume.forward(x).dims(), [0, 4, 6, 4, 2]);

    let frozen = config().init(&self::device()).freeze();
    for (block, device) in [(config().init(&device), device), (frozen, self::device())] {
        let x = || Tensor::<4>::zeros([0, 3, 8, 8], &device);
        let output = block.forward(x());
        assert_eq!(output.dims(), [0, 4, 6, 6]);
        assert_eq!(output.device().is_autodiff(), device.is_autodiff());
        let shortcut = Tensor::zeros([0, 4, 6, 6], &device);
        assert_eq!(block.forward_residual(x(), shortcut).dims(), [0, 4, 6, 6]);
        for padding in [
            PaddingConfig2d::Valid,
            PaddingConfig2d::Explicit(1, 1, 1, 1),
            PaddingConfig2d::Explicit(0, 0, 1, 1),
        ] {
            for ceil_mode in [false, true] {
                let pool = MaxPool2dConfig::new([3, 3])
                    .with_strides([2, 2])
                    .with_padding(padding.clone())
                    .with_ceil_mode(ceil_mode)
                    .init();
                let full = Tensor::<4>::zeros([1, 4, 6, 6], &device);
                let [_, channels, height, width] = pool.forward(full).dims();
                let wanted = [0, channels, height, width];
                assert_eq!(pool.forward(output.clone()).dims(), wanted);
                assert_eq!(block.forward_max_pool(x(), &pool).dims(), wanted);
            }
        }
        assert_eq!(values(block.norm.running_mean.value_sync()), [0.0; 4]);
    }
    let frozen = config().init(&self::device()).freeze();
    assert!(frozen.saved_for_backward([0, 3, 8, 8]).is_empty());
}

/// Whether the setting was there from the start, or comes and goes.
#[test]
fn affine_can_be_switched() {
    let x = input(&device());
    let affine = config().init(&device());
    let mut switched = affine
        .clone()
        .map_settings(|settings| settings.affine = false);
    let made = ConvBn2d::with_settings(
        affine.conv.clone(),
        affine.norm.clone(),
        switched.settings.clone(),
    );
    let gradients = |block: &ConvBn2d| {
        let y = block.forward(x.clone());
        let grads = (y.clone() * y).sum().backward();
        let [gamma, beta] = [&block.norm.gamma, &block.norm.beta]
            .map(|parameter| parameter.val().grad(&grads).is_some());
        assert!(block.conv.weight.val().grad(&grads).is_some());
        (gamma, beta)
    };
    for block in [&switched, &made] {
        assert_eq!(gradients(block), (false, false));
        let names = block.saved_for_backward([2, 3, 8, 8]);
        assert!(
            names
                .iter()
                .all(|tensor| !["gamma", "beta"].contains(&tensor.name))
        );
    }
    switched.settings.affine = true;
    let mut made = made;
    made.settings.affine = true;
    for block in [&affine, &switched, &made] {
        assert_eq!(gradients(block), (true, true));
    }
}
