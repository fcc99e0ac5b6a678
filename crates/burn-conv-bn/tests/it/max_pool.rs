//! The max pool against Burn's own, whose place it takes: outputs and gradients, to the bit where Burn
//! does not round sums in between.

use std::env;
use std::ops::RangeInclusive;

use burn::backend::Dispatch;
use burn::config::Config;
use burn::nn::PaddingConfig2d;
use burn::nn::pool::MaxPool2dConfig as BurnMaxPool2dConfig;
use burn::tensor::activation::relu;
use burn::tensor::ops::MaxPoolOptions;
use burn::tensor::{DType, Device, Slice, Tensor, TensorData};
use burn_conv_bn::MaxPool2dConfig;
use burn_conv_bn::backend::{ConvBnBackend, MaxPoolForward};
use burn_conv_bn::functional::max_pool2d;
use burn_conv_bn::gradcheck::{GradCheck, Upstream};
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::common::{device, random, tensor, values};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

type Pool = fn(Tensor<4>, MaxPoolOptions<2>) -> Tensor<4>;

fn ours(input: Tensor<4>, options: MaxPoolOptions<2>) -> Tensor<4> {
    max_pool2d(input, options).unwrap()
}

fn burns(input: Tensor<4>, options: MaxPoolOptions<2>) -> Tensor<4> {
    burn::tensor::module::max_pool2d(input, options)
}

/// The output, and the gradient of the tensor that the input is a view of. Values are those that
/// `stored` holds, and are computed with in `dtype`.
fn step(
    pool: Pool,
    data: &TensorData,
    [stored, dtype]: [DType; 2],
    view: impl Fn(Tensor<4>) -> Tensor<4>,
    options: &MaxPoolOptions<2>,
) -> [TensorData; 2] {
    let rounded = |data: TensorData| {
        let stored = tensor::<4>(data, stored).into_data();
        tensor::<4>(stored, dtype)
    };
    let leaf = rounded(data.clone()).require_grad();
    let output = pool(view(leaf.clone()), options.clone());
    let upstream = rounded(random(&output.dims(), 2));
    let grads = (output.clone() * upstream).sum().backward();
    let grad = leaf.grad(&grads).expect("the leaf is tracked");
    [output.into_data(), grad.into_data()]
}

/// Asserts that both are of one shape and dtype, and of the same bits but for those of NaN.
#[track_caller]
fn assert_same(what: &str, got: &TensorData, wanted: &TensorData) {
    assert_eq!(got.shape(), wanted.shape(), "{what}");
    assert_eq!(got.dtype(), wanted.dtype(), "{what}");
    let pairs = got.iter::<f64>().zip(wanted.iter::<f64>());
    for (index, (got, wanted)) in pairs.enumerate() {
        let same = got.to_bits() == wanted.to_bits() || (got.is_nan() && wanted.is_nan());
        assert!(same, "{what}, at {index}: got {got:e}, Burn's {wanted:e}");
    }
}

/// Asserts that sums in f16 are those in f64 rounded once, up to the rounding of f32 before.
#[track_caller]
fn assert_rounded_once(what: &str, got: &TensorData, exact: &TensorData) {
    assert_eq!(got.shape(), exact.shape(), "{what}");
    assert_eq!(got.dtype(), DType::F16, "{what}");
    let pairs = got.iter::<f64>().zip(exact.iter::<f64>());
    for (index, (got, exact)) in pairs.enumerate() {
        let tolerance = exact.abs() / 2048.0 + 2e-5;
        assert!(
            (got - exact).abs() <= tolerance,
            "{what}, at {index}: got {got:e}, in f64 {exact:e}"
        );
    }
}

/// Compares a step of ours with Burn's.
#[track_caller]
fn compare(data: &TensorData, dtype: DType, options: &MaxPoolOptions<2>, context: &str) {
    compare_view(data, dtype, |leaf| leaf, options, context);
}

/// Both are equal to the bit, except gradients in f16: where windows overlap, Burn rounds after each sum, and
/// ours are summed in f32.
#[track_caller]
fn compare_view(
    data: &TensorData,
    dtype: DType,
    view: impl Fn(Tensor<4>) -> Tensor<4>,
    options: &MaxPoolOptions<2>,
    context: &str,
) {
    let [output, grad] = step(ours, data, [dtype; 2], &view, options);
    let [wanted_output, wanted_grad] = step(burns, data, [dtype; 2], &view, options);
    let what = format!("{dtype:?}, {:?}, {options:?}{context}", data.shape());
    assert_same(&format!("output of {what}"), &output, &wanted_output);
    let what = format!("gradient of {what}");
    let is_ours = !options.is_asymmetric() && options.kernel_size.iter().product::<usize>() <= 256;
    let overlap = (0..2).any(|dim| options.stride[dim] < options.kernel_size[dim]);
    let dilated = options.dilation != [1, 1];
    if dtype == DType::F16 && is_ours && (overlap || dilated) {
        let [_, exact] = step(burns, data, [dtype, DType::F64], &view, options);
        assert_rounded_once(&what, &grad, &exact);
    } else {
        assert_same(&what, &grad, &wanted_grad);
    }
}

/// Windows that leave nothing to chance, each with an input's shape: a rest that no window reaches,
/// windows that overlap and that do not touch, ones that reach past the input or lie wholly in the
/// padding, dilation, as many positions as a byte holds, a single pixel, many planes.
fn windows() -> Vec<(MaxPoolOptions<2>, [usize; 4])> {
    let window = |kernel: [usize; 2], stride: [usize; 2], padding: [usize; 2]| {
        MaxPoolOptions::new(kernel)
            .with_stride(stride)
            .with_padding(padding)
    };
    let none = [0, 0];
    vec![
        (MaxPoolOptions::new([2, 2]), [2, 3, 8, 6]),
        (MaxPoolOptions::new([2, 2]), [1, 2, 7, 5]),
        (MaxPoolOptions::new([2, 2]), [64, 8, 12, 12]),
        (window([3, 3], [2, 2], [1, 1]), [2, 2, 9, 7]),
        (window([3, 3], [2, 2], [1, 1]), [3, 17, 33, 29]),
        (
            window([3, 3], [2, 2], [1, 1]).with_ceil_mode(true),
            [3, 5, 8, 8],
        ),
        (
            window([2, 3], [3, 2], none).with_ceil_mode(true),
            [1, 2, 7, 8],
        ),
        (
            window([2, 2], [3, 3], none).with_ceil_mode(true),
            [1, 2, 6, 9],
        ),
        (
            window([3, 2], [1, 1], [1, 0]).with_dilation([2, 3]),
            [2, 1, 7, 9],
        ),
        (window([1, 3], [2, 1], [0, 1]), [1, 7, 5, 4]),
        (window([3, 3], [1, 1], none), [2, 2, 6, 5]),
        (window([2, 2], [3, 4], none), [1, 2, 9, 10]),
        (MaxPoolOptions::new([1, 1]), [2, 65, 1, 1]),
        (
            window([5, 5], [5, 5], none).with_ceil_mode(true),
            [1, 2, 3, 4],
        ),
        (window([2, 2], [1, 1], [2, 3]), [1, 2, 3, 3]),
        (window([16, 16], [1, 2], none), [1, 2, 20, 19]),
    ]
}

#[test]
fn outputs_and_gradients_are_burns() {
    for (options, shape) in windows() {
        for dtype in DTYPES {
            compare(&random(&shape, 1), dtype, &options, "");
        }
    }
}

/// Which of equal values wins, and what NaN, infinities and zeros of either sign do.
#[test]
fn equal_and_extreme_values_are_burns() {
    let some = [-1.0, -0.0, 0.0, 1.0];
    let all = [
        -1.0,
        -0.0,
        0.0,
        1.0,
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
    ];
    let none = [f64::NEG_INFINITY];
    let lost = [f64::NAN];
    for (seed, (options, shape)) in (0..).zip(windows()) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for among in [&some[..], &all, &none, &lost] {
            let drawn: Vec<f64> = (0..shape.iter().product::<usize>())
                .map(|_| *among.choose(&mut rng).expect("there is a value"))
                .collect();
            let data = TensorData::new(drawn, shape);
            for dtype in DTYPES {
                compare(&data, dtype, &options, &format!(", of {among:?}"));
            }
        }
    }
}

/// Drawn from a seed that `BURN_CONV_BN_SEED` changes.
#[test]
fn random_windows_are_burns() {
    const CASES: u64 = 300;
    let chosen = env::var("BURN_CONV_BN_SEED").unwrap_or_else(|_| "0".to_string());
    let chosen: u64 = chosen.parse().expect("BURN_CONV_BN_SEED is a number");
    let mut pooled = 0;
    for case in 0..CASES {
        let seed = chosen.wrapping_mul(1 << 20).wrapping_add(case);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut pair = |range: RangeInclusive<usize>| {
            [rng.random_range(range.clone()), rng.random_range(range)]
        };
        let [batch, channels] = pair(1..=4);
        let [height, width] = pair(1..=14);
        let options = MaxPoolOptions::new(pair(1..=5))
            .with_stride(pair(1..=4))
            .with_padding(pair(0..=3))
            .with_dilation(pair(1..=3))
            .with_ceil_mode(case.is_multiple_of(3));
        let fits = [height, width].into_iter().enumerate().all(|(dim, size)| {
            let (before, after) = options.padding[dim];
            options.dilation[dim] * (options.kernel_size[dim] - 1) < size + before + after
        });
        if !fits && !options.ceil_mode {
            continue;
        }
        pooled += 1;
        let data = random(&[batch, channels, height, width], seed);
        let dtype = DTYPES[case as usize % DTYPES.len()];
        let context = format!(", case {case} with BURN_CONV_BN_SEED={chosen}");
        compare(&data, dtype, &options, &context);
    }
    assert!(pooled > CASES / 2, "{pooled} of {CASES}");
}

/// Views in which rows, columns or channels are not neighbours, or begin elsewhere.
#[test]
fn views_are_pooled_as_they_are() {
    let every = |step| Slice::new(0, None, step);
    let views: [(&str, &dyn Fn(Tensor<4>) -> Tensor<4>); 6] = [
        ("turned", &|leaf| leaf.swap_dims(2, 3)),
        ("channels first", &|leaf| leaf.permute([1, 0, 2, 3])),
        ("inner columns", &|leaf| leaf.narrow(3, 1, 6)),
        ("last images", &|leaf| leaf.narrow(0, 1, 2)),
        ("mirrored", &|leaf| leaf.flip([2])),
        ("every other row", &|leaf| {
            leaf.slice([every(1), every(1), every(2), every(1)])
        }),
    ];
    let options = MaxPoolOptions::new([3, 2])
        .with_stride([2, 2])
        .with_padding([1, 1]);
    for (name, view) in views {
        for dtype in DTYPES {
            let data = random(&[3, 4, 9, 8], 5);
            compare_view(&data, dtype, view, &options, &format!(", {name}"));
        }
    }
}

/// The gradient that comes in may be a view, too.
#[test]
fn gradients_may_be_views() {
    let gradient = |pool: Pool| {
        let leaf = tensor::<4>(random(&[2, 3, 8, 6], 1), DType::F32).require_grad();
        let output = pool(leaf.clone(), MaxPoolOptions::new([2, 2])).swap_dims(2, 3);
        let upstream = tensor::<4>(random(&output.dims(), 2), DType::F32);
        let grads = (output * upstream).sum().backward();
        leaf.grad(&grads).expect("it is tracked").into_data()
    };
    assert_same("gradient", &gradient(ours), &gradient(burns));
}

/// Away from kinks: no two values are nearer than a hundredth, and the step is far smaller.
#[test]
fn gradients_are_those_of_finite_differences() {
    let mut checked = 0;
    for (options, shape) in windows() {
        let count = shape.iter().product::<usize>();
        // The larger ones take as many steps as they have values, and are like the others. A window
        // that lies wholly in the padding has no maximum to differentiate.
        let in_padding = (0..2).any(|dim| options.padding[dim].0 >= options.kernel_size[dim]);
        if count > 400 || in_padding {
            continue;
        }
        checked += 1;
        let mut distinct: Vec<f64> = (0..count).map(|index| index as f64 / 100.0).collect();
        distinct.shuffle(&mut ChaCha8Rng::seed_from_u64(3));
        let report = GradCheck::new(&Device::flex())
            .input("x", TensorData::new(distinct, shape))
            .upstream(Upstream::Random(4))
            .check(|inputs| max_pool2d(inputs.get::<4>("x"), options.clone()).unwrap())
            .unwrap_or_else(|error| panic!("{options:?}: {error}"));
        assert_eq!(report.compared, count, "{options:?}");
    }
    assert!(checked > 8, "{checked}");
}

#[test]
fn what_is_not_tracked_stays_so() {
    for (options, shape) in windows() {
        for device in [device(), Device::flex()] {
            for dtype in DTYPES {
                let input = Tensor::<4>::from_data(random(&shape, 1), (&device, dtype));
                let output = max_pool2d(input.clone(), options.clone()).unwrap();
                assert!(!output.is_tracked());
                assert_eq!(output.device(), device);
                let wanted = burns(input, options.clone()).into_data();
                assert_same(&format!("{options:?}"), &output.into_data(), &wanted);
            }
        }
    }
}

fn has_kernel(options: &MaxPoolOptions<2>, device: &Device, dtype: DType) -> bool {
    let input = Tensor::<4>::zeros([1, 2, 20, 20], (device, dtype)).into_dispatch();
    let result = Dispatch::max_pool_forward(input, options.clone());
    matches!(result, MaxPoolForward::Pooled { .. })
}

#[test]
fn the_rest_is_left_to_burn() {
    let largest = MaxPoolOptions::new([16, 16]);
    for dtype in DTYPES {
        assert!(has_kernel(&largest, &Device::flex(), dtype), "{dtype:?}");
        // The kernel itself does not differentiate.
        assert!(!has_kernel(&largest, &device(), dtype), "{dtype:?}");
    }
    let larger = MaxPoolOptions::new([17, 17]).with_stride([1, 1]);
    let long = MaxPoolOptions::new([1, 257]);
    for options in [&larger, &long] {
        assert!(!has_kernel(options, &Device::flex(), DType::F32));
    }
    let uneven = |pairs| {
        MaxPoolOptions::new([3, 2])
            .with_stride([2, 1])
            .with_padding_pairs(pairs)
    };
    for (options, shape) in [
        (larger, [1, 2, 19, 18]),
        (long, [2, 1, 2, 514]),
        (uneven([(0, 1), (1, 1)]), [2, 3, 6, 5]),
        (uneven([(2, 0), (0, 1)]).with_ceil_mode(true), [2, 3, 6, 5]),
    ] {
        for dtype in DTYPES {
            compare(&random(&shape, 1), dtype, &options, "");
        }
    }
}

/// Burn's gradient checkpointing, with cheap operations on either side to be recomputed.
#[test]
fn gradients_under_burns_checkpointing() {
    let gradient = |device: &Device| {
        let data = random(&[2, 3, 6, 6], 1);
        let leaf = Tensor::<4>::from_data(data, (device, DType::F64)).require_grad();
        let hidden = (leaf.clone() * leaf.clone()).tanh() + leaf.clone();
        let output = relu(max_pool2d(hidden, MaxPoolOptions::new([2, 2])).unwrap());
        let grads = (output.clone() * output).sum().backward();
        values(leaf.grad(&grads).expect("it is tracked"))
    };
    let plain = gradient(&device());
    assert!(plain.iter().any(|grad| *grad != 0.0));
    assert_eq!(plain, gradient(&device().gradient_checkpointing()));
}

#[test]
fn the_layer_is_burns() {
    let data = random(&[2, 3, 7, 8], 1);
    for padding in [
        PaddingConfig2d::Valid,
        PaddingConfig2d::Same,
        PaddingConfig2d::Explicit(1, 1, 1, 1),
        PaddingConfig2d::Explicit(0, 1, 2, 1),
    ] {
        for kernel_size in [[2, 2], [3, 3], [1, 3]] {
            for strides in [None, Some([2, 1])] {
                for ceil_mode in [false, true] {
                    let mut config = MaxPool2dConfig::new(kernel_size)
                        .with_padding(padding.clone())
                        .with_ceil_mode(ceil_mode);
                    let mut burns = BurnMaxPool2dConfig::new(kernel_size)
                        .with_padding(padding.clone())
                        .with_ceil_mode(ceil_mode);
                    if let Some(strides) = strides {
                        config = config.with_strides(strides);
                        burns = burns.with_strides(strides);
                    }
                    let input = tensor::<4>(data.clone(), DType::F32);
                    let got = config.init().forward(input.clone()).into_data();
                    let wanted = burns.init().forward(input).into_data();
                    assert_same(&format!("{config}"), &got, &wanted);
                }
            }
        }
    }
}

#[test]
fn the_configuration_is_burns() {
    let config = MaxPool2dConfig::new([3, 2])
        .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
        .with_dilation([2, 1])
        .with_ceil_mode(true);
    assert_eq!(config.strides, [3, 2]);
    let copy = MaxPool2dConfig::load_binary(config.to_string().as_bytes()).unwrap();
    assert_eq!(copy.to_string(), config.to_string());

    // A file that Burn's layer was configured by says the same here.
    let burns = BurnMaxPool2dConfig::new([3, 2]).with_dilation([1, 2]);
    let read = MaxPool2dConfig::load_binary(burns.to_string().as_bytes()).unwrap();
    assert_eq!(read.to_string(), burns.to_string());
}

#[test]
fn display_says_what_it_is() {
    let text = MaxPool2dConfig::new([3, 2]).init().to_string();
    for part in ["MaxPool2d", "kernel_size", "[3, 2]", "Valid", "false"] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn what_is_saved_is_listed() {
    let layer = |options: &MaxPoolOptions<2>| {
        let [(top, bottom), (left, right)] = options.padding;
        MaxPool2dConfig::new(options.kernel_size)
            .with_strides(options.stride)
            .with_padding(PaddingConfig2d::Explicit(top, left, bottom, right))
            .with_dilation(options.dilation)
            .with_ceil_mode(options.ceil_mode)
            .init()
    };
    let listed = |options: &MaxPoolOptions<2>, shape| {
        let saved = layer(options).saved_for_backward(shape);
        let rows = saved.into_iter();
        let rows = rows.map(|kept| (kept.name, kept.dtype, kept.shared, kept.shape.to_vec()));
        rows.collect::<Vec<_>>()
    };
    for (options, shape) in windows() {
        let output = layer(&options).forward(Tensor::zeros(shape, &Device::flex()));
        let wanted = [("argmax", DType::U8, false, output.dims().to_vec())];
        assert_eq!(listed(&options, shape), wanted, "{options:?}");
    }
    // Burn's list, with the input as it is or as the padded copy that Burn makes.
    let shape = [2, 3, 20, 19];
    let large = MaxPoolOptions::new([17, 17]).with_stride([2, 1]);
    assert_eq!(
        listed(&large, shape),
        [
            ("input", DType::F32, true, shape.to_vec()),
            ("indices", DType::I32, false, vec![2, 3, 2, 3]),
        ]
    );
    let uneven = MaxPoolOptions::new([2, 2]).with_padding_pairs([(0, 1), (1, 1)]);
    assert_eq!(
        listed(&uneven, shape),
        [
            ("input", DType::F32, false, vec![2, 3, 21, 21]),
            ("indices", DType::I32, false, vec![2, 3, 10, 10]),
        ]
    );
}
