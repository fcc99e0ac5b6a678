//! Random applications of the op on a CubeCL device against the reference, as `property.rs` has them
//! on Flex: fewer, and over a list of sizes, since each compiles kernels of its own.
//!
//! What the device lacks is skipped with a line that says so; with `BURN_CONV_BN_STRICT=1` a skip
//! fails. `PROPTEST_CASES` and `PROPTEST_RNG_SEED` are as for `property.rs`, and what failed is kept
//! in `cube_property.proptest-regressions`.

mod gpu;
mod reference;

#[path = "reference/strategy.rs"]
mod strategy;

use std::env;

use burn::tensor::DType;
use burn_conv_bn::Activation;
use proptest::sample::select;

use reference::ball::{SLACK, unit};
use strategy::{Axis, Plan, Sizes, cases, hold};

const FAILURES: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/cube_property.proptest-regressions"
);

fn axis(size: usize, kernel: usize) -> Axis {
    Axis {
        size,
        kernel,
        stride: 1,
        dilation: 1,
        padding: (0, 0),
    }
}

fn padded(size: usize) -> Axis {
    Axis {
        padding: (1, 1),
        ..axis(size, 3)
    }
}

/// Each rank; strides, padding on one side, dilation; groups, one channel in each; one, seven and 65
/// channels; one position.
fn sizes() -> Vec<Sizes> {
    let sizes = |batch, groups, channels, axes: &[Axis]| Sizes {
        batch,
        groups,
        channels,
        axes: axes.to_vec(),
    };
    let strided = [
        Axis {
            stride: 2,
            padding: (0, 2),
            ..axis(9, 3)
        },
        Axis {
            stride: 3,
            padding: (1, 0),
            ..axis(8, 2)
        },
    ];
    let dilated = Axis {
        dilation: 2,
        padding: (2, 1),
        ..axis(7, 3)
    };
    vec![
        sizes(3, 1, [4, 8], &[padded(6), padded(7)]),
        sizes(2, 1, [3, 5], &strided),
        sizes(2, 1, [1, 4], &[dilated, padded(5)]),
        sizes(2, 2, [2, 3], &[padded(5), padded(5)]),
        sizes(2, 7, [1, 1], &[padded(5), padded(4)]),
        sizes(4, 1, [9, 65], &[axis(3, 1), axis(4, 1)]),
        sizes(4, 1, [3, 16], &[axis(3, 3), axis(3, 3)]),
        sizes(3, 1, [4, 1], &[axis(9, 3)]),
        sizes(2, 1, [2, 4], &[axis(4, 2), axis(5, 3), axis(4, 2)]),
    ]
}

/// Checks so many random cases, where one operation is off by no more than `unit`. Returns which
/// part of the comparisons was sharp.
fn hold_on_device(dtype: DType, number: u32, seed: u64, unit: f64) -> f64 {
    let device = gpu::device();
    let plan = Plan {
        cases: number,
        seed,
        failures: FAILURES,
    };
    let tally = hold(
        &format!("{dtype:?} on {device:?}"),
        plan,
        &cases(select(sizes()), Activation::SAMPLES.to_vec()),
        |case| case.check(dtype, &device, unit),
    );
    tally.sharp as f64 / tally.compared.max(1) as f64
}

/// WGSL lets a division be off by two units and a half, and so on.
#[test]
fn random_cases_in_single_precision() {
    let sharp = hold_on_device(DType::F32, 32, 32, 2.0 * SLACK * unit(DType::F32));
    assert!(sharp >= 0.7, "the bounds are too wide to say much: {sharp}");
}

/// As if all were computed in f16, as Burn's direct convolution is: it sums in the data's type, and
/// a norm with given statistics is folded into weights of that type.
#[test]
fn random_cases_in_f16() {
    let device = gpu::device();
    if !device.supports_dtype(DType::F16) {
        println!("SKIPPED: F16 on {device:?}, which does not have it");
        let strict = env::var_os("BURN_CONV_BN_STRICT").is_some_and(|value| value != "0");
        assert!(!strict, "F16 is skipped, and BURN_CONV_BN_STRICT is set");
        return;
    }
    hold_on_device(DType::F16, 8, 16, 2.0 * unit(DType::F16));
}
