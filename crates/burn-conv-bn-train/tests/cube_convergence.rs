//! Steps of whole networks of toy size on a CubeCL device, fused against Burn's own layers, from the
//! same weights on the same batches: each loss, and the weights and running statistics at the end.
//!
//! There is no double precision on most of these devices. What the fused form is held against are
//! Burn's own layers, by how far these are from themselves with the images of each batch in another
//! order; in f16, by how far they are from f32.

#[path = "../../burn-conv-bn/tests/gpu/mod.rs"]
mod gpu;
#[path = "../../burn-conv-bn-models/tests/training/mod.rs"]
mod training;

use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::tensor::{Device, FloatDType};
use burn_conv_bn::ConvBnModule;
use burn_conv_bn_models::{Form, NetConfig, ResNetBlockKind, ResNetConfig};

use training::{Bounds, CLASSES, Errors, Network, Order, Start, Task, judge, seed, train, values};

/// Of f32, beside the two-times rule: 2^-24 is 6e-8 for each operation, some 20 layers of sums, and
/// steps that amplify a difference up to a thousand times. Kernels sum in other orders than Burn's do,
/// and the spread is that of a single other order, which by chance may be far less, all the more where a
/// value falls on the other side of a ReLU's corner.
const SINGLE: Bounds = Bounds {
    loss: 1e-2,
    weights: 1e-1,
    statistics: 2e-3,
};

/// Of f16, beside the two-times rule: 2^-11 is 5e-4 for each activation and weight, so that many values
/// fall on the other side of a corner. In the tutorial's network both forms come far closer than this.
const HALF: Bounds = Bounds {
    loss: 2e-1,
    weights: 2e-1,
    statistics: 1e-2,
};

/// Steps of the tutorial's network, in which each batch comes three times, and of the residual one.
const STEPS: usize = 12;
const RESIDUAL_STEPS: usize = 6;

/// Devices have one generator for the whole process, and one network at a time is enough for a
/// software driver.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn check<N: Network>(name: &str, task: &Task, init: impl Fn(&Device) -> N) {
    let _alone = alone();
    let device = gpu::device().autodiff();
    let fresh = |dtype: FloatDType| {
        device.seed(seed());
        let network = init(&device).map(&mut Start(FloatDType::F32));
        match dtype {
            FloatDType::F32 => network,
            half => network.with_precision(half),
        }
    };
    let run = |dtype, form, order| train(fresh(dtype), task, form, order, dtype, &device);

    let start = values(&fresh(FloatDType::F32));
    let own = run(FloatDType::F32, Form::Unfused, Order::AsIs);
    println!("{name}: losses {:.4?}", own.losses);
    let errors = |dtype, form, order| Errors::of(&run(dtype, form, order), &own, &start);
    let spread = [errors(FloatDType::F32, Form::Unfused, Order::Reversed)];
    let fused = errors(FloatDType::F32, Form::Fused, Order::AsIs);
    judge(&format!("{name}, F32"), &fused, &spread, SINGLE);

    if !device.supports_dtype(FloatDType::F16) {
        println!("SKIPPED: {name} in f16 on {device:?}, which does not have it");
        let strict = std::env::var_os("BURN_CONV_BN_STRICT").is_some_and(|value| value != "0");
        assert!(!strict, "f16 is skipped, and BURN_CONV_BN_STRICT is set");
        return;
    }
    let unfused = [errors(FloatDType::F16, Form::Unfused, Order::AsIs)];
    let fused = errors(FloatDType::F16, Form::Fused, Order::AsIs);
    judge(&format!("{name}, F16"), &fused, &unfused, HALF);
}

#[test]
fn the_tutorials_network() {
    let task = Task::new([8, 1, 12, 12], STEPS, 0.01);
    let config = NetConfig::new(Form::Fused)
        .with_image_size(12)
        .with_channels([4, 8])
        .with_hidden(16)
        .with_classes(CLASSES)
        .with_dropout(0.0);
    check("tutorial", &task, |device| config.init(device));
}

/// ResNet-18 with one block in each of its layers: one whose shortcut is its input, and three that convolve
/// it. Its 5 million weights take most of a software driver's time.
#[test]
fn residual_network() {
    let task = Task::new([8, 3, 16, 16], RESIDUAL_STEPS, 0.0005);
    let config =
        ResNetConfig::new(Form::Fused, ResNetBlockKind::Basic, [1, 1, 1, 1]).with_classes(CLASSES);
    check("residual", &task, |device| config.init(device));
}
