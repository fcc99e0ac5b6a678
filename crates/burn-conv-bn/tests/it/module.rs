//! Whole models: settings, precision, records.

use burn::module::{Module, Param, Quantizer, RunningState};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{BatchNorm, BatchNormConfig, Linear, LinearConfig, PaddingConfig2d};
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::activation::relu;
use burn::tensor::quantization::{Calibration, QuantValue};
use burn::tensor::{DType, Device, FloatDType, Tensor};
use burn_conv_bn::{
    Activation, ConvBn1d, ConvBn1dConfig, ConvBn2d, ConvBn2dConfig, ConvBnModule, ConvBnSettings,
    Recompute, RunningVariance, fuse,
};

use crate::common::{assert_close, device, random, tensor, values};

/// Blocks wherever a module may be.
#[derive(Module, Debug)]
struct Model {
    stem: ConvBn2d,
    stages: Vec<Stage>,
    line: Option<ConvBn1d>,
    absent: Option<ConvBn2d>,
    head: Linear,
}

#[derive(Module, Debug)]
struct Stage {
    blocks: (ConvBn2d, ConvBn2d),
}

impl Model {
    fn new(device: &Device) -> Self {
        let block = |channels| {
            ConvBn2dConfig::new(channels, [3, 3])
                .with_padding(PaddingConfig2d::Same)
                .with_activation(Activation::Relu)
                .init(device)
        };
        Self {
            stem: block([3, 4]),
            stages: vec![Stage {
                blocks: (block([4, 4]), block([4, 4])),
            }],
            line: Some(ConvBn1dConfig::new(4, 4, 3).init(device)),
            absent: None,
            head: LinearConfig::new(4, 2).init(device),
        }
    }

    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let mut x = self.stem.forward(images);
        for Stage { blocks } in &self.stages {
            let inner = blocks.0.forward(x.clone());
            x = blocks.1.forward_residual(inner, x);
        }
        let line = self
            .line
            .as_ref()
            .expect("present")
            .forward(x.flatten(2, 3));
        self.head.forward(line.mean_dim(2).squeeze_dim(2))
    }

    fn settings(&self) -> Vec<ConvBnSettings> {
        let Stage { blocks } = &self.stages[0];
        let line = self.line.as_ref().expect("present");
        vec![
            self.stem.settings.clone(),
            blocks.0.settings.clone(),
            blocks.1.settings.clone(),
            line.settings.clone(),
        ]
    }
}

#[test]
fn one_call_sets_every_layer() {
    let model = Model::new(&device());
    let before = values(model.stem.conv.weight.val());
    let model = model
        .with_recompute(Recompute::Never)
        .with_max_workspace(Some(1 << 16))
        .with_running_variance(RunningVariance::Unbiased);
    for settings in model.settings() {
        assert_eq!(settings.recompute, Recompute::Never);
        assert_eq!(settings.max_workspace, Some(1 << 16));
        assert_eq!(settings.running_variance, RunningVariance::Unbiased);
    }
    assert_eq!(values(model.stem.conv.weight.val()), before);
    assert!(model.stem.conv.weight.val().is_require_grad());

    // What maps a model otherwise leaves the settings alone.
    let settings = model.settings();
    let model = model.freeze().unfreeze().valid().train();
    assert_eq!(model.settings(), settings);
    let fresh = Model::new(&device()).load_record(model.into_record());
    assert_eq!(fresh.settings()[0].recompute, Recompute::Conv);
}

#[test]
fn a_change_of_the_settings_ends_with_its_model() {
    let model = Model::new(&device()).map_settings(|settings| {
        // A change may change models itself.
        let other = ConvBn1dConfig::new(1, 1, 1)
            .init(&Device::flex())
            .with_max_workspace(Some(7));
        assert_eq!(other.settings.max_workspace, Some(7));
        settings.recompute = Recompute::Never;
    });
    assert!(
        model
            .settings()
            .iter()
            .all(|settings| settings.recompute == Recompute::Never
                && settings.max_workspace.is_none())
    );
    let failing = std::panic::catch_unwind(|| {
        ConvBn1dConfig::new(1, 1, 1)
            .init(&Device::flex())
            .map_settings(|_| panic!("no"))
    });
    assert!(failing.is_err());
    let untouched = ConvBn1dConfig::new(1, 1, 1).init(&Device::flex()).no_grad();
    assert_eq!(
        untouched.settings,
        ConvBnSettings::new(Activation::Identity)
    );
}

#[test]
fn unbiased_running_variance_by_hand() {
    // One input channel and weight 1: z is the input. Values 1, 2, 3, 6: mean 3, biased variance
    // (4 + 1 + 0 + 9) / 4 = 3.5, unbiased 14 / 3.
    for (kind, variance) in [
        (RunningVariance::Biased, 3.5),
        (RunningVariance::Unbiased, 14.0 / 3.0),
    ] {
        let block = ConvBn1dConfig::new(1, 1, 1)
            .with_initializer(burn::nn::Initializer::Ones)
            .with_running_variance(kind)
            .with_momentum(0.25)
            .init(&device());
        let x = Tensor::<3>::from_floats([[[1.0, 2.0], [3.0, 6.0]]], &device()).swap_dims(0, 1);
        block.forward(x.reshape([2, 1, 2]));
        let mean = values(block.norm.running_mean.value_sync());
        let running = values(block.norm.running_var.value_sync());
        assert_close("mean", &mean, &[0.75 * 0.0 + 0.25 * 3.0], 1e-6, 0.0);
        let wanted = 0.75 * 1.0 + 0.25 * variance;
        assert_close("variance", &running, &[wanted], 1e-6, 0.0);
    }
}

/// What a block replaces, with the fields of [`ConvBn2d`].
#[derive(Module, Debug)]
struct Unfused {
    conv: Conv2d,
    norm: BatchNorm,
}

#[test]
fn records_move_between_the_fused_and_the_unfused_form() {
    let unfused = Unfused {
        conv: Conv2dConfig::new([3, 4], [3, 3])
            .with_bias(false)
            .init(&device()),
        norm: BatchNormConfig::new(4).init(&device()),
    };
    let images = || tensor::<4>(random(&[2, 3, 8, 8], 1), DType::F32);
    // Burn folds the newest running statistics in when a module turns to evaluation; a record
    // taken before misses them.
    unfused.norm.forward(unfused.conv.forward(images()));
    let fused = ConvBn2dConfig::new([3, 4], [3, 3])
        .init(&device())
        .load_record(unfused.valid().into_record());
    let (a, b) = (fused.valid(), unfused.valid());
    let x = images().inner();
    let wanted = values(b.norm.forward(b.conv.forward(x.clone())));
    assert_close(
        "into fused",
        &values(a.forward(x.clone())),
        &wanted,
        1e-5,
        1e-6,
    );
    assert_eq!(
        values(fused.norm.running_var.value_sync()),
        values(unfused.norm.running_var.value_sync())
    );

    // And back, after another step, through a file.
    fused.forward(images() * 2.0);
    let folder = std::env::temp_dir().join(format!("conv-bn-record-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("block");
    fused.valid().save_file(&path).unwrap();
    let back = Unfused {
        conv: Conv2dConfig::new([3, 4], [3, 3])
            .with_bias(false)
            .init(&device()),
        norm: BatchNormConfig::new(4).init(&device()),
    }
    .load_file(&path);
    let (a, b) = (fused.valid(), back.valid());
    let wanted = values(a.forward(x.clone()));
    assert_close(
        "and back",
        &values(b.norm.forward(b.conv.forward(x))),
        &wanted,
        1e-5,
        1e-6,
    );
    // Loaded tensors are read from the file when they are first used.
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_zero_gamma_leaves_the_shortcut() {
    let mut block = ConvBn2dConfig::new([4, 4], [3, 3])
        .with_padding(PaddingConfig2d::Same)
        .with_activation(Activation::Relu)
        .init(&device());
    block.norm.gamma = block
        .norm
        .gamma
        .map(|gamma| gamma.zeros_like().require_grad());
    let x = tensor::<4>(random(&[2, 4, 6, 6], 1), DType::F32).require_grad();
    let output = block.forward_residual(x.clone(), x.clone());
    assert_eq!(values(output.clone()), values(relu(x.clone())));
    let upstream = tensor::<4>(random(&[2, 4, 6, 6], 2), DType::F32);
    let grads = (output * upstream.clone()).sum().backward();
    // The branch passes nothing back, but its scale learns.
    let mask = x.clone().greater_elem(0.0).float();
    assert_eq!(
        values(x.grad(&grads).unwrap()),
        values((upstream * mask).inner())
    );
    assert!(
        values(block.norm.gamma.val().grad(&grads).unwrap())
            .iter()
            .all(|g| *g != 0.0)
    );
    assert!(
        values(block.conv.weight.val().grad(&grads).unwrap())
            .iter()
            .all(|g| *g == 0.0)
    );
}

#[test]
fn mixed_precision_leaves_the_norms_alone() {
    let model = Model::new(&device()).with_precision(FloatDType::BF16);
    assert_eq!(model.stem.conv.weight.val().dtype(), DType::BF16);
    assert_eq!(model.head.weight.val().dtype(), DType::BF16);
    assert_eq!(model.stem.norm.gamma.val().dtype(), DType::F32);
    assert_eq!(model.stem.norm.running_var.value_sync().dtype(), DType::F32);
    assert!(model.stem.conv.weight.val().is_require_grad());
    let saved = model.stem.saved_for_backward([2, 3, 8, 8]);
    let bytes = |name| saved.iter().find(|t| t.name == name).unwrap().bytes();
    assert_eq!(bytes("input"), 2 * 2 * 3 * 64);
    assert_eq!((bytes("gamma"), bytes("mean")), (16, 16));
}

/// A model trains in mixed precision as it does in single: the reference casts around the same
/// layers in f32, as one would without the fused op.
#[test]
fn mixed_precision_trains() {
    let images = tensor::<4>(random(&[8, 3, 8, 8], 1), DType::F32);
    let targets = tensor::<2>(random(&[8, 2], 2), DType::F32);
    let record = Model::new(&device()).into_record();
    let train = |dtype: FloatDType| {
        let mut model = Model::new(&device())
            .load_record(record.clone())
            .with_precision(dtype);
        let mut optimizer = SgdConfig::new().init();
        let data = DType::from(dtype);
        let mut losses = Vec::new();
        for step in 0..30 {
            let output = model.forward(images.clone().cast(data));
            assert_eq!(output.dtype(), data);
            let error = output.cast(DType::F32) - targets.clone();
            let loss = (error.clone() * error).mean();
            losses.push(values(loss.clone())[0]);
            let grads = loss.backward();
            if step == 0 {
                let stem = &model.stem;
                let weight = stem.conv.weight.val().grad(&grads).unwrap();
                let gamma = stem.norm.gamma.val().grad(&grads).unwrap();
                assert_eq!((weight.dtype(), gamma.dtype()), (data, DType::F32));
            }
            let grads = GradientsParams::from_grads(grads, &model);
            model = optimizer.step(0.05, model, grads);
        }
        assert_eq!(
            model.stem.norm.running_mean.value_sync().dtype(),
            DType::F32
        );
        losses
    };
    let single = train(FloatDType::F32);
    assert!(single[29] < 0.7 * single[0], "the model learns: {single:?}");
    // Rounding of the weights: 2^-11 and 2^-8, over 30 steps.
    for (dtype, tolerance) in [(FloatDType::F16, 5e-3), (FloatDType::BF16, 4e-2)] {
        assert_close(
            &format!("{dtype:?}"),
            &train(dtype),
            &single,
            tolerance,
            0.0,
        );
    }
}

/// The same bits as with weights in half, on the weights themselves.
#[test]
fn autocast_leads_gradients_back_to_the_weights() {
    let block = ConvBn2dConfig::new([3, 4], [3, 3])
        .with_bias(true)
        .with_activation(Activation::Relu)
        .init(&device());
    let images = tensor::<4>(random(&[8, 3, 8, 8], 1), DType::F32);
    let upstream = tensor::<4>(random(&[8, 4, 6, 6], 2), DType::F32);
    for dtype in [DType::F16, DType::BF16] {
        let backward = |block: &ConvBn2d| {
            let output = block.forward(images.clone().cast(dtype));
            assert_eq!(output.dtype(), dtype);
            (output.cast(DType::F32) * upstream.clone())
                .sum()
                .backward()
        };
        let grads = backward(&block.autocast(dtype.into()));
        let half = block.clone().with_precision(dtype.into());
        let wanted = backward(&half);
        let weights = [&block, &half].map(|block| block.conv.weight.val());
        let gammas = [&block, &half].map(|block| block.norm.gamma.val());
        assert_eq!(weights[0].dtype(), DType::F32);
        let grad = weights[0].grad(&grads).expect("it is tracked");
        assert_eq!(grad.dtype(), DType::F32);
        assert_eq!(values(grad), values(weights[1].grad(&wanted).unwrap()));
        assert_eq!(
            values(gammas[0].grad(&grads).unwrap()),
            values(gammas[1].grad(&wanted).unwrap())
        );
        let bias = block.conv.bias.as_ref().expect("it has one").val();
        let grad = bias.grad(&grads).expect("zeros are registered");
        assert_eq!(grad.dtype(), DType::F32);
    }
}

/// The module's own, whose norms and other layers stay as they are.
#[test]
fn autocast_moves_the_running_statistics() {
    let model = Model::new(&device());
    let images = || tensor::<4>(random(&[2, 3, 8, 8], 1), DType::F32);
    let cast = model.autocast(FloatDType::BF16);
    assert_eq!(cast.stem.conv.weight.val().dtype(), DType::BF16);
    let line = cast.line.as_ref().expect("present");
    assert_eq!(line.conv.weight.val().dtype(), DType::BF16);
    let half = model.clone().with_precision(FloatDType::BF16);
    let saved = |model: &Model| model.stem.saved_for_backward([2, 3, 8, 8]);
    assert_eq!(saved(&cast), saved(&half));
    assert_eq!(cast.stages[0].blocks.1.norm.gamma.val().dtype(), DType::F32);
    assert_eq!(cast.head.weight.val().dtype(), DType::F32);
    assert_eq!(model.stem.conv.weight.val().dtype(), DType::F32);

    // From the same start, without sharing it.
    let single = model.valid().train();
    cast.stem.forward(images().cast(DType::BF16));
    single.stem.forward(images());
    for (of_model, wanted) in [
        (
            &model.stem.norm.running_mean,
            &single.stem.norm.running_mean,
        ),
        (&model.stem.norm.running_var, &single.stem.norm.running_var),
    ] {
        let (of_model, wanted) = (of_model.value_sync(), wanted.value_sync());
        assert_eq!(of_model.dtype(), DType::F32);
        let (of_model, wanted) = (values(of_model), values(wanted));
        assert!(of_model.iter().all(|value| ![0.0, 1.0].contains(value)));
        assert_close("bf16", &of_model, &wanted, 2e-2, 0.0);
    }
}

/// A user's own, of a layer's name.
mod own {
    use burn::module::Module;
    use burn::nn::conv::Conv2d;

    #[derive(Module, Debug)]
    pub struct ConvBn2d {
        pub conv: Conv2d,
    }
}

#[derive(Module, Debug)]
struct Namesakes {
    before: own::ConvBn2d,
    fused: Vec<ConvBn2d>,
    after: own::ConvBn2d,
}

#[test]
fn autocast_leaves_a_users_namesake_alone() {
    let conv = || Conv2dConfig::new([3, 4], [3, 3]).init(&device());
    let model = Namesakes {
        before: own::ConvBn2d { conv: conv() },
        fused: vec![ConvBn2dConfig::new([4, 4], [3, 3]).init(&device())],
        after: own::ConvBn2d { conv: conv() },
    };
    let cast = model.autocast(FloatDType::BF16);
    for namesake in [&cast.before, &cast.after] {
        assert_eq!(namesake.conv.weight.val().dtype(), DType::F32);
    }
    assert_eq!(cast.fused[0].conv.weight.val().dtype(), DType::BF16);
    assert_eq!(cast.fused[0].norm.gamma.val().dtype(), DType::F32);
    // A layer alone, too.
    let line = ConvBn1dConfig::new(3, 4, 3).init(&device());
    let cast = line.autocast(FloatDType::BF16);
    assert_eq!(cast.conv.weight.val().dtype(), DType::BF16);
}

#[test]
fn unused_parameters_are_those_that_settings_turn_off() {
    let mut model = Model::new(&device());
    assert!(model.unused_parameters().is_empty());
    model.stages[0].blocks.1.settings.affine = false;
    if let Some(line) = &mut model.line {
        line.settings.track_running_stats = false;
    }
    assert_eq!(
        model.unused_parameters(),
        [
            "stages.0.blocks.1.norm.gamma",
            "stages.0.blocks.1.norm.beta",
            "line.norm.running_mean",
            "line.norm.running_var",
        ]
    );
}

/// The same values at every call, and with every float tensor in 8 bits.
fn quantized(device: &Device) -> ConvBn2d {
    let mut block = ConvBn2dConfig::new([4, 32], [3, 3])
        .with_bias(true)
        .with_activation(Activation::Relu)
        .init(device);
    let vector = |seed| Tensor::<1>::from_data(random(&[32], seed), (device, DType::F32));
    let weight = Tensor::<4>::from_data(random(&[32, 4, 3, 3], 1), (device, DType::F32));
    block.conv.weight = Param::from_tensor(weight);
    block.conv.bias = Some(Param::from_tensor(vector(2)));
    block.norm.gamma = Param::from_tensor(vector(3));
    block.norm.beta = Param::from_tensor(vector(4));
    block.norm.running_mean = RunningState::new(vector(5));
    block.norm.running_var = RunningState::new(vector(6).abs() + 0.5);
    let scheme = device.settings().quantization.scheme;
    let scheme = scheme.with_value(QuantValue::Q8S);
    let mut quantizer = Quantizer::new(Calibration::MinMax, scheme);
    let block = block.quantize_weights(&mut quantizer);
    assert!(matches!(block.conv.weight.val().dtype(), DType::QFloat(_)));
    assert!(matches!(block.norm.gamma.val().dtype(), DType::QFloat(_)));
    block
}

#[test]
fn quantized_weights_evaluate_as_burns() {
    let device = Device::flex();
    let x = Tensor::<4>::from_data(random(&[2, 4, 8, 8], 7), (&device, DType::F32));
    let block = quantized(&device);
    let (conv, norm) = quantized(&device).into_parts();
    let wanted = values(relu(norm.forward(conv.forward(x.clone()))));
    let borrowed = fuse(&block.conv, &block.norm).with_activation(Activation::Relu);
    let y = values(block.forward(x.clone()));
    assert_close("forward", &y, &wanted, 1e-5, 0.0);
    assert_eq!(values(borrowed.forward(x.clone())), y);
    let folded = block.fold().unwrap();
    assert_eq!(folded.weight.val().dtype(), DType::F32);
    assert_close("fold", &values(relu(folded.forward(x))), &wanted, 1e-5, 0.0);
}

#[test]
fn quantized_weights_train_as_burns() {
    let x = || tensor::<4>(random(&[2, 4, 8, 8], 7), DType::F32).require_grad();
    let upstream = tensor::<4>(random(&[2, 32, 6, 6], 8), DType::F32);
    let block = quantized(&device());
    let saved = block.saved_for_backward([2, 4, 8, 8]);
    let (conv, norm) = quantized(&device()).into_parts();

    let (fused_x, borrowed_x, unfused_x) = (x(), x(), x());
    let fused = block.forward(fused_x.clone());
    let again = quantized(&device());
    let borrowed = fuse(&again.conv, &again.norm).with_activation(Activation::Relu);
    assert_eq!(borrowed.saved_for_backward([2, 4, 8, 8]), saved);
    let borrowed = borrowed.forward(borrowed_x.clone());
    assert_eq!(values(borrowed.clone()), values(fused.clone()));
    let unfused = relu(norm.forward(conv.forward(unfused_x.clone())));
    assert_close(
        "output",
        &values(fused.clone()),
        &values(unfused.clone()),
        1e-5,
        0.0,
    );
    let fused_grads = (fused * upstream.clone()).sum().backward();
    let borrowed_grads = (borrowed * upstream.clone()).sum().backward();
    assert_eq!(
        values(borrowed_x.grad(&borrowed_grads).unwrap()),
        values(fused_x.grad(&fused_grads).unwrap())
    );
    let unfused_grads = (unfused * upstream).sum().backward();
    assert_close(
        "input",
        &values(fused_x.grad(&fused_grads).unwrap()),
        &values(unfused_x.grad(&unfused_grads).unwrap()),
        1e-4,
        0.0,
    );
    assert!(block.conv.weight.val().grad(&fused_grads).is_none());
    for (got, wanted) in [
        (&block.norm.running_mean, &norm.running_mean),
        (&block.norm.running_var, &norm.running_var),
    ] {
        let (got, wanted) = (values(got.value_sync()), values(wanted.value_sync()));
        assert_close("running", &got, &wanted, 1e-5, 0.0);
    }

    // The step keeps the values that were dequantized for it.
    let weight = saved.iter().find(|tensor| tensor.name == "weight").unwrap();
    assert_eq!((weight.bytes(), weight.shared), (4 * 32 * 4 * 9, false));
    assert!(
        saved
            .iter()
            .any(|tensor| tensor.name == "input" && tensor.shared)
    );
    assert!(saved.iter().all(|tensor| tensor.dtype == DType::F32));
}
