//! 32 steps of whole networks, fused against Burn's own layers, from the same weights on the same
//! batches: each loss, and the weights and running statistics at the end.
//!
//! Double precision is held against itself. Single precision and mixed precision are held against
//! double precision, by how far Burn's own layers are from it.

mod training;

use std::sync::{Mutex, PoisonError};

use burn::tensor::{Device, FloatDType};
use burn_conv_bn::ConvBnModule;
use burn_conv_bn_models::{Form, NetConfig, ResNetBlockKind, ResNetConfig};

use training::{Bounds, CLASSES, Errors, Network, Order, Start, Task, judge, seed, train, values};

/// Steps of plain stochastic gradient descent.
const STEPS: usize = 32;

/// Of two runs in f64 that differ in the order of their sums alone: 2^-53 is 1e-16, a network has some
/// 20 layers of sums over thousands of values, and 32 steps of these tasks amplify a difference some
/// thousand times. A mistake of a millionth anywhere would be seen.
const DOUBLE: Bounds = Bounds {
    loss: 1e-9,
    weights: 1e-7,
    statistics: 1e-9,
};

/// Of f32, beside the two-times rule: rounding, amplified as above, is some 1e-6 of a loss, until it
/// makes a value fall on the other side of a ReLU's corner. In a deep network on few images one such
/// value moves a loss by up to a hundredth, at a step that chance decides, in Burn's runs as in ours. A
/// mistake in the maths is for double precision to find, in which no value falls so.
const SINGLE: Bounds = Bounds {
    loss: 1e-2,
    weights: 1e-1,
    statistics: 2e-3,
};

/// Of bf16 with norms in f32, beside the two-times rule: 2^-9 is 2e-3 for each activation, and half of
/// it for each weight at each step, which updates of these learning rates hardly exceed: where the
/// weights end is a matter of chance for both forms.
const HALF: Bounds = Bounds {
    loss: 5e-2,
    weights: 2e-1,
    statistics: 2e-2,
};

/// The orders that Burn's own layers run in, whose farthest run is the yardstick.
const ORDERS: [Order; 2] = [Order::AsIs, Order::Reversed];

/// Compares the forms of a network. Each run gets a network of its own from `init`: clones would share
/// running statistics.
fn check<N: Network>(name: &str, task: &Task, init: impl Fn(&Device) -> N) {
    let device = Device::flex().autodiff();
    let fresh = |dtype: FloatDType| {
        let network = {
            // Flex has one generator for the whole process, which the tests' threads share.
            static GENERATOR: Mutex<()> = Mutex::new(());
            let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
            device.seed(seed());
            init(&device)
        };
        match dtype {
            FloatDType::F64 | FloatDType::F32 => network.map(&mut Start(dtype)),
            half => network
                .map(&mut Start(FloatDType::F32))
                .with_precision(half),
        }
    };
    let run = |dtype, form, order| train(fresh(dtype), task, form, order, dtype, &device);

    let start = values(&fresh(FloatDType::F64));
    let exact = run(FloatDType::F64, Form::Unfused, Order::AsIs);
    println!("{name}: losses {:.4?}", exact.losses);
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (first, last) = (&exact.losses[..4], &exact.losses[STEPS - 4..]);
    assert!(
        mean(last) < 0.9 * mean(first),
        "{name}: a comparison of training wants a network that learns: {:?}",
        exact.losses
    );

    let double = run(FloatDType::F64, Form::Fused, Order::AsIs);
    let errors = Errors::of(&double, &exact, &start);
    judge(&format!("{name}, f64"), &errors, &[], DOUBLE);
    drop(double);
    for (dtype, bounds) in [(FloatDType::F32, SINGLE), (FloatDType::BF16, HALF)] {
        let errors = |form, order| Errors::of(&run(dtype, form, order), &exact, &start);
        let unfused = ORDERS.map(|order| errors(Form::Unfused, order));
        let fused = errors(Form::Fused, Order::AsIs);
        judge(&format!("{name}, {dtype:?}"), &fused, &unfused, bounds);
    }
}

/// At the tutorial's sizes, except the batch.
#[test]
fn the_tutorials_network() {
    let task = Task::new([8, 1, 28, 28], STEPS, 0.005);
    let config = NetConfig::new(Form::Fused)
        .with_classes(CLASSES)
        .with_dropout(0.0);
    check("tutorial", &task, |device| config.init(device));
}

/// ResNet-18 with one block in each of its layers: one whose shortcut is its input, and three that convolve it.
#[test]
fn residual_network() {
    let task = Task::new([8, 3, 32, 32], STEPS, 0.00025);
    let config =
        ResNetConfig::new(Form::Fused, ResNetBlockKind::Basic, [1, 1, 1, 1]).with_classes(CLASSES);
    check("residual", &task, |device| config.init(device));
}
