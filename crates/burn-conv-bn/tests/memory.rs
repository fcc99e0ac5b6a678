//! What a node and a layer keep, counted by the allocator, against the table in [`SavePlan`].
//!
//! One test, so that no other allocates at the same time.

use burn::module::{Module, Param};
use burn::nn::PaddingConfig2d;
use burn::nn::conv::Conv2dConfig;
use burn::tensor::{DType, Device, Distribution, Shape, Tensor};
use burn_conv_bn::backend::{ConvBnProblem, Parents, SavePlan, StatisticsKind};
use burn_conv_bn::functional::{
    BatchNormParams, ConvBnParams, batch_norm, cat_channels, conv, conv_bn,
};
use burn_conv_bn::{
    Activation, BatchNormOptions, ConvBn2d, ConvBn2dConfig, ConvBnOptions, ConvSpec,
    MaxPool2dConfig, NormSpec, Recompute, SavedTensor,
};
use burn_conv_bn_memory::CountingAllocator;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

/// Graph nodes, shapes, small vectors: well below the 200 KiB of any activation here.
const OVERHEAD: usize = 24 * 1024;

const INPUT: [usize; 4] = [8, 8, 32, 32];
const WEIGHT: [usize; 4] = [8, 8, 3, 3];
const OUTPUT: [usize; 4] = [8, 8, 30, 30];

#[derive(Clone, Copy, Debug)]
struct Case {
    recompute: Recompute,
    activation: Activation,
    residual: bool,
    statistics: StatisticsKind,
    /// Whether the input, the weight, and gamma and beta are tracked.
    tracked: [bool; 3],
}

impl Case {
    fn options(&self) -> ConvBnOptions {
        ConvBnOptions::new(ConvSpec::unit(2))
            .with_activation(self.activation)
            .with_recompute(self.recompute)
    }

    fn plan(&self) -> SavePlan {
        let [input, weight, affine] = self.tracked;
        let present = Parents {
            input: true,
            weight: true,
            bias: false,
            gamma: true,
            beta: true,
            residual: self.residual,
        };
        let tracked = Parents {
            input,
            weight,
            bias: false,
            gamma: affine,
            beta: affine,
            residual: self.residual,
        };
        SavePlan::new(&self.options(), self.statistics, present, tracked)
    }

    fn table(&self) -> Vec<SavedTensor> {
        let shapes = (Shape::from(INPUT), Shape::from(WEIGHT));
        let problem = ConvBnProblem::conv_bn(shapes.0, shapes.1, &self.options(), true).unwrap();
        self.plan().tensors(&problem, DType::F32, DType::F32)
    }
}

fn tensor<const D: usize>(shape: [usize; D], tracked: bool, device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Uniform(0.5, 1.5), device).set_require_grad(tracked)
}

fn bytes(shape: [usize; 4]) -> usize {
    4 * shape.iter().product::<usize>()
}

#[track_caller]
fn assert_bytes(what: &str, case: &Case, got: isize, wanted: usize) {
    let difference = got - wanted as isize;
    assert!(
        difference.unsigned_abs() < OVERHEAD,
        "{what}: got {got} bytes, wanted {wanted} ({case:?})"
    );
}

/// One step of a case, unmeasured.
fn step(case: &Case, device: &Device) {
    let [input_tracked, weight_tracked, affine_tracked] = case.tracked;
    let channels = || tensor([WEIGHT[0]], affine_tracked, device);
    let mut params = ConvBnParams::new(tensor(WEIGHT, weight_tracked, device))
        .with_affine(channels(), channels());
    params.residual = case.residual.then(|| tensor(OUTPUT, true, device));
    if case.statistics == StatisticsKind::Fixed {
        let one = Tensor::ones([WEIGHT[0]], device);
        params = params.with_statistics(one.clone(), one);
    }
    let input = tensor(INPUT, input_tracked, device);
    conv_bn(input, params, case.options())
        .unwrap()
        .output
        .sum()
        .backward();
}

fn check(case: &Case, device: &Device) {
    let start = ALLOCATOR.current() as isize;
    let grown = || ALLOCATOR.current() as isize - start;
    let [input_tracked, weight_tracked, affine_tracked] = case.tracked;

    let input = tensor(INPUT, input_tracked, device);
    let weight = tensor(WEIGHT, weight_tracked, device);
    let gamma = tensor([WEIGHT[0]], affine_tracked, device);
    let beta = tensor([WEIGHT[0]], affine_tracked, device);
    let mut params = ConvBnParams::new(weight.clone()).with_affine(gamma.clone(), beta.clone());
    let residual = case.residual.then(|| tensor(OUTPUT, true, device));
    params.residual = residual.clone();
    if case.statistics == StatisticsKind::Fixed {
        let one = Tensor::ones([WEIGHT[0]], device);
        params = params.with_statistics(one.clone(), one);
    }
    let leaves = bytes(INPUT) + usize::from(case.residual) * bytes(OUTPUT);
    assert_bytes("leaves", case, grown(), leaves);

    let output = conv_bn(input.clone(), params, case.options())
        .unwrap()
        .output;
    let own: usize = case
        .table()
        .iter()
        .filter(|tensor| !tensor.shared)
        .map(SavedTensor::bytes)
        .sum();
    assert_bytes(
        "end of forward",
        case,
        grown(),
        leaves + bytes(OUTPUT) + own,
    );

    // What is shared stays only if the node keeps it. The sum keeps no tensor.
    let plan = case.plan();
    let loss = output.sum();
    drop(input);
    drop(residual);
    let outputs = usize::from(plan.output) + usize::from(plan.residual);
    let kept = own + usize::from(plan.input) * bytes(INPUT) + outputs * bytes(OUTPUT);
    assert_bytes("kept", case, grown(), kept);

    let listed: usize = case.table().iter().map(SavedTensor::bytes).sum();
    assert_bytes("table", case, listed as isize, kept);

    let grads = loss.backward();
    assert_eq!(weight.grad(&grads).is_some(), weight_tracked, "{case:?}");
    assert_eq!(gamma.grad(&grads).is_some(), affine_tracked, "{case:?}");
    drop((grads, weight, gamma, beta));
    assert_bytes("after the graph", case, grown(), 0);
}

#[test]
fn a_node_keeps_what_its_table_lists() {
    let device = Device::flex().autodiff();
    let mut cases = Vec::new();
    for statistics in [StatisticsKind::Batch, StatisticsKind::Fixed] {
        for recompute in [Recompute::Conv, Recompute::Norm, Recompute::Never] {
            for activation in [
                Activation::Identity,
                Activation::Relu,
                Activation::Silu,
                Activation::Sigmoid,
            ] {
                for residual in [false, true] {
                    for mask in 1..8 {
                        cases.push(Case {
                            recompute,
                            activation,
                            residual,
                            statistics,
                            tracked: [mask & 1 != 0, mask & 2 != 0, mask & 4 != 0],
                        });
                    }
                }
            }
        }
    }
    // First runs pay for thread pools and for buffers that each thread keeps.
    for case in cases.iter().cycle().take(3 * cases.len()) {
        step(case, &device);
    }
    for case in &cases {
        check(case, &device);
    }

    // Design, section 4: one activation, two, and three where Burn's own layers are used.
    let all = |recompute, activation| Case {
        recompute,
        activation,
        residual: false,
        statistics: StatisticsKind::Batch,
        tracked: [true; 3],
    };
    let activations = |case: &Case| {
        let large = |tensor: &&SavedTensor| tensor.bytes() > 100_000;
        case.table().iter().filter(large).count()
    };
    assert_eq!(activations(&all(Recompute::Conv, Activation::Relu)), 1);
    assert_eq!(activations(&all(Recompute::Conv, Activation::Identity)), 1);
    assert_eq!(activations(&all(Recompute::Never, Activation::Relu)), 2);
    assert_eq!(activations(&all(Recompute::Conv, Activation::Silu)), 1);
    a_chain_keeps_one_activation_a_block(&device);
    a_rebuilt_output_is_kept_by_none(&device);
    the_halves_keep_what_their_gradients_need(&device);
    a_concatenation_is_kept_by_none(&device);
    frozen_layers_keep_no_input(&device);
    a_pool_keeps_what_it_lists(&device);
    nothing_is_kept_between_block_and_pool(&device);
    a_block_joined_with_its_pool_keeps_what_it_lists(&device);
    no_gradient_is_made_between_block_and_pool(&device);
    unfused_keeps_three(&device);
    workspace_is_bounded(&device);
}

fn same_block(recompute: Recompute, device: &Device) -> ConvBn2d {
    ConvBn2dConfig::new([INPUT[1]; 2], [3, 3])
        .with_padding(PaddingConfig2d::Same)
        .with_activation(Activation::Relu)
        .with_recompute(recompute)
        .init(device)
}

/// Activations of a tracked input's size in so many bytes, and what is left over.
fn activations_in(kept: usize) -> (usize, usize) {
    let one = bytes(INPUT);
    let count = (kept + one / 2) / one;
    (count, kept.abs_diff(count * one))
}

/// Four blocks keep their input, and: `Conv` three outputs, `Norm` four convolutions' outputs, `Never` both.
fn a_chain_keeps_one_activation_a_block(device: &Device) {
    for (recompute, wanted) in [
        (Recompute::Conv, 4),
        (Recompute::Norm, 5),
        (Recompute::Never, 8),
    ] {
        for device in [device, &Device::flex().autodiff().gradient_checkpointing()] {
            let chain: Vec<_> = (0..4).map(|_| same_block(recompute, device)).collect();
            let forward = |x: Tensor<4>| chain.iter().fold(x, |x, block| block.forward(x));
            let runs = (0..3).map(|_| kept_by(forward, INPUT, true, device));
            let (count, rest) = activations_in(runs.min().unwrap_or_default());
            assert_eq!(count, wanted, "{recompute:?}");
            assert!(
                rest < 4 * OVERHEAD,
                "{recompute:?}: {rest} bytes more or less"
            );
        }
    }
}

/// A block under `Norm` before what would keep its output keeps its input and the convolution's output.
fn a_rebuilt_output_is_kept_by_none(device: &Device) {
    let block = same_block(Recompute::Norm, device);
    let burn = Conv2dConfig::new([INPUT[1]; 2], [1, 1])
        .with_bias(false)
        .init(device);
    let pool = MaxPool2dConfig::new([17; 2]).init();
    let indices = pool.saved_for_backward(INPUT)[1].bytes();
    type Forward<'a> = &'a dyn Fn(Tensor<4>) -> Tensor<4>;
    let cases: [(&str, Forward, [usize; 2]); 4] = [
        (
            "Burn's convolution",
            &|x| burn.forward(block.forward(x)),
            [2, 0],
        ),
        (
            "Burn's ReLU",
            &|x| burn::tensor::activation::relu(block.forward(x)),
            [2, 0],
        ),
        (
            "Burn's max pool",
            &|x| pool.forward(block.forward(x)),
            [2, indices],
        ),
        (
            "two",
            &|x| {
                let y = block.forward(x);
                burn.forward(y.clone()) + burn.forward(y)
            },
            [2, 0],
        ),
    ];
    for (what, forward, [activations, more]) in cases {
        let runs = (0..5).map(|_| kept_by(forward, INPUT, true, device));
        let kept = runs.min().unwrap_or_default();
        let wanted = activations * bytes(INPUT) + more;
        assert!(
            kept.abs_diff(wanted) < 2 * OVERHEAD,
            "{what}: got {kept} bytes, wanted {wanted}"
        );
    }
    let list = block.saved_for_backward_max_pool(INPUT, &pool);
    let own = list.iter().filter(|tensor| !tensor.shared);
    let names: Vec<_> = own.map(|tensor| tensor.name).collect();
    assert_eq!(names, ["conv_output", "mean", "variance", "indices"]);
}

/// A convolution alone keeps its input for the weight's gradient, and a norm alone in any case, to rebuild its
/// output.
fn the_halves_keep_what_their_gradients_need(device: &Device) {
    // Any run may pay for what a thread keeps from then on.
    let least = |forward: &dyn Fn(Tensor<4>) -> Tensor<4>, tracked| {
        let runs = (0..5).map(|_| kept_by(forward, INPUT, tracked, device));
        runs.min().unwrap_or_default()
    };
    for mask in 1..8 {
        let [first, second, third] = [0, 1, 2].map(|bit| mask >> bit & 1 == 1);
        let convolution = |x: Tensor<4>| {
            let (weight, bias) = (tensor(WEIGHT, second, device), tensor([8], third, device));
            conv(x, weight, Some(bias), ConvSpec::unit(2)).unwrap()
        };
        let norm = |x: Tensor<4>, given: bool, activation| {
            let (gamma, beta) = (tensor([8], second, device), tensor([8], third, device));
            let mut params = BatchNormParams::default().with_affine(gamma, beta);
            if given {
                let [mean, variance] = [0; 2].map(|_| tensor([8], false, device));
                params = params.with_statistics(mean, variance.abs() + 1.0);
            }
            let options = BatchNormOptions::new(NormSpec::default()).with_activation(activation);
            batch_norm(x, params, options).unwrap().output
        };
        for (what, got, wanted) in [
            ("conv", least(&convolution, first), second),
            (
                "norm",
                least(&|x| norm(x, false, Activation::Identity), first),
                true,
            ),
            // Its gradients alone would not need the input without gamma's; the rebuilt output does.
            (
                "norm with given statistics",
                least(&|x| norm(x, true, Activation::Identity), first),
                true,
            ),
            (
                "norm and ReLU",
                least(&|x| norm(x, false, Activation::Relu), first),
                true,
            ),
        ] {
            let wanted = usize::from(wanted) * bytes(INPUT);
            assert!(
                got.abs_diff(wanted) < OVERHEAD,
                "{what}, {mask:03b}: kept {got} bytes, wanted {wanted}"
            );
        }
    }
    // Above the overhead, as WEIGHT is not.
    const LARGE: [usize; 4] = [64, 8, 5, 5];
    for (tracked, wanted) in [
        ([true, false], bytes(LARGE)),
        ([false, true], bytes(INPUT)),
        ([true, true], bytes(INPUT) + bytes(LARGE)),
    ] {
        let convolution = |x: Tensor<4>| {
            let weight = tensor(LARGE, tracked[1], device);
            conv(x, weight, None, ConvSpec::unit(2)).unwrap()
        };
        let got = least(&convolution, tracked[0]);
        assert!(
            got.abs_diff(wanted) < OVERHEAD,
            "input and weight tracked {tracked:?}: kept {got} bytes, wanted {wanted}"
        );
    }
}

/// Three convolutions, each over the input and all outputs before it: these are kept, and of their concatenations
/// nothing. Burn's concatenation makes a copy of each for every convolution.
fn a_concatenation_is_kept_by_none(device: &Device) {
    let convs = [1, 2, 3].map(|inputs| {
        Conv2dConfig::new([inputs * INPUT[1], INPUT[1]], [1, 1])
            .with_bias(false)
            .init(device)
    });
    let burns: fn(Vec<Tensor<4>>) -> Tensor<4> = |tensors| Tensor::cat(tensors, 1);
    let ours: fn(Vec<Tensor<4>>) -> Tensor<4> = |tensors| cat_channels(tensors).unwrap();
    for (cat, wanted) in [(ours, 3), (burns, 6)] {
        let forward = |x: Tensor<4>| {
            let mut features = vec![x];
            for conv in &convs {
                features.push(conv.forward(cat(features.clone())));
            }
            features.swap_remove(convs.len())
        };
        let runs = (0..5).map(|_| kept_by(forward, INPUT, true, device));
        let (count, rest) = activations_in(runs.min().unwrap_or_default());
        assert_eq!(count, wanted);
        assert!(rest < 4 * OVERHEAD, "{rest} bytes more or less");
    }
}

/// A layer whose norm is frozen keeps its input for the weight's gradient. With the weight frozen
/// too it does not, and of an input that is not tracked either it keeps nothing at all.
fn frozen_layers_keep_no_input(device: &Device) {
    for recompute in [Recompute::Conv, Recompute::Norm, Recompute::Never] {
        for (activation, handle) in [
            (Activation::Identity, None),
            (Activation::Relu, Some("output")),
        ] {
            let init = || {
                ConvBn2dConfig::new([WEIGHT[1], WEIGHT[0]], [3, 3])
                    .with_bias(true)
                    .with_activation(activation)
                    .with_recompute(recompute)
                    .init(device)
            };
            let frozen = init().freeze();
            let mut norm_frozen = init();
            norm_frozen.norm = norm_frozen.norm.freeze();
            for (block, keeps_input) in [(&frozen, false), (&norm_frozen, true)] {
                let context = format!("{activation:?}, {recompute:?}, input kept {keeps_input}");
                let activations: Vec<SavedTensor> = block
                    .saved_for_backward(INPUT)
                    .into_iter()
                    .filter(|tensor| tensor.shape.num_dims() == 4 && tensor.name != "weight")
                    .collect();
                let listed: Vec<_> = activations.iter().map(|tensor| tensor.name).collect();
                let input = keeps_input.then_some("input");
                let wanted: Vec<_> = input.into_iter().chain(handle).collect();
                assert_eq!(listed, wanted, "{context}");

                let bytes: usize = activations.iter().map(SavedTensor::bytes).sum();
                for tracked in [false, true] {
                    // The first run draws the parameters.
                    let run = || kept_by(|x| block.forward(x), INPUT, tracked, device);
                    let [_, kept] = [(); 2].map(|()| run());
                    let wanted = if tracked || keeps_input { bytes } else { 0 };
                    assert!(
                        kept.abs_diff(wanted) < OVERHEAD,
                        "got {kept} bytes, wanted {wanted} ({context}, input tracked {tracked})"
                    );
                }
            }
        }
    }
}

/// Bytes that are left of a forward pass while its loss is held, but not its input.
fn kept_by(
    forward: impl Fn(Tensor<4>) -> Tensor<4>,
    input: [usize; 4],
    tracked: bool,
    device: &Device,
) -> usize {
    let start = ALLOCATOR.current();
    let loss = forward(tensor(input, tracked, device)).sum();
    let kept = ALLOCATOR.current().saturating_sub(start);
    if loss.is_tracked() {
        loss.backward();
    }
    kept
}

/// A max pool keeps a byte for each output and lets its input go. Where Burn's own op pools, that keeps
/// its input, or the padded copy that Burn makes of it, and an index for each output. Of an input that
/// is not tracked either keeps nothing.
fn a_pool_keeps_what_it_lists(device: &Device) {
    const POOLED: [usize; 4] = [8, 16, 64, 64];
    let window = |size| MaxPool2dConfig::new([size; 2]).with_strides([2, 2]);
    let uneven = window(2).with_padding(PaddingConfig2d::Explicit(0, 0, 1, 1));
    for (config, names) in [
        (window(2), &["argmax"][..]),
        (window(17), &["input", "indices"][..]),
        (uneven, &["input", "indices"][..]),
    ] {
        let pool = config.init();
        let listed = pool.saved_for_backward(POOLED);
        let listed_names: Vec<_> = listed.iter().map(|kept| kept.name).collect();
        assert_eq!(listed_names, names);
        let bytes: usize = listed.iter().map(SavedTensor::bytes).sum();
        // Far more than what graph nodes take, and far less than the input where that is let go.
        assert!(bytes > 4 * OVERHEAD, "{bytes}");
        for (tracked, wanted) in [(true, bytes), (false, 0)] {
            // Any run may pay for what a thread keeps from then on: the least is without.
            let runs = (0..3).map(|_| kept_by(|x| pool.forward(x), POOLED, tracked, device));
            let kept = runs.min().unwrap_or_default();
            assert!(
                kept.abs_diff(wanted) < OVERHEAD,
                "got {kept} bytes, wanted {wanted} (input tracked {tracked}, {config})"
            );
        }
    }
}

/// A block before a max pool keeps its input, and the pool its argmax; the tensor between them is gone.
fn nothing_is_kept_between_block_and_pool(device: &Device) {
    let block = ConvBn2dConfig::new([WEIGHT[1], WEIGHT[0]], [3, 3])
        .with_activation(Activation::Relu)
        .init(device);
    let pool = MaxPool2dConfig::new([2, 2]).init();
    let argmax: usize = pool
        .saved_for_backward(OUTPUT)
        .iter()
        .map(SavedTensor::bytes)
        .sum();
    // The first run draws the parameters.
    let runs = (0..3).map(|_| kept_by(|x| pool.forward(block.forward(x)), INPUT, true, device));
    let kept = runs.min().unwrap_or_default();
    let wanted = bytes(INPUT) + argmax;
    assert!(
        kept.abs_diff(wanted) < OVERHEAD,
        "got {kept} bytes, wanted {wanted}"
    );
}

/// As one op they keep a handle on the output, too, and what they list.
fn a_block_joined_with_its_pool_keeps_what_it_lists(device: &Device) {
    let pool = MaxPool2dConfig::new([2, 2]).init();
    let kept_too = ["input", "conv_output", "pooled", "argmax"];
    for (activation, recompute, names) in [
        (
            Activation::Relu,
            Recompute::Conv,
            &["input", "pooled", "argmax"][..],
        ),
        (Activation::Silu, Recompute::Conv, &["input", "argmax"][..]),
        (Activation::Relu, Recompute::Never, &kept_too[..]),
        (Activation::Relu, Recompute::Norm, &kept_too[..]),
    ] {
        let block = ConvBn2dConfig::new([WEIGHT[1], WEIGHT[0]], [3, 3])
            .with_activation(activation)
            .with_recompute(recompute)
            .init(device);
        let listed = block.saved_for_backward_max_pool(INPUT, &pool);
        let activations = listed.iter().filter(|kept| kept.shape[0] == INPUT[0]);
        let activations =
            activations.filter(|kept| kept.name != "weight" && kept.shape.num_dims() == 4);
        let (listed, bytes): (Vec<_>, Vec<_>) =
            activations.map(|kept| (kept.name, kept.bytes())).unzip();
        assert_eq!(listed, names);
        let runs =
            (0..3).map(|_| kept_by(|x| block.forward_max_pool(x, &pool), INPUT, true, device));
        let (kept, wanted) = (runs.min().unwrap_or_default(), bytes.iter().sum());
        assert!(
            kept.abs_diff(wanted) < OVERHEAD,
            "got {kept} bytes, wanted {wanted} ({activation:?})"
        );
    }
}

/// Bytes at the peak of a backward pass, beyond those of what is handed in and returned: gradients of output
/// and input.
fn backward_workspace(output: Tensor<4>, input: [usize; 4]) -> usize {
    let fixed = bytes(output.dims()) + bytes(input);
    let loss = output.sum();
    let start = ALLOCATOR.reset_peak();
    let grads = loss.backward();
    let peak = ALLOCATOR.peak() - start;
    drop(grads);
    peak.saturating_sub(fixed)
}

/// The backward pass of the two as one op has no gradient of the tensor between them, whether its sums
/// come from the pooled output or, with a gamma of zero, from the recomputed one.
fn no_gradient_is_made_between_block_and_pool(device: &Device) {
    const INPUT: [usize; 4] = [256, 8, 32, 32];
    let pool = MaxPool2dConfig::new([2, 2]).init();
    for gamma in [1.0, 0.0] {
        let mut block = ConvBn2dConfig::new([8, 8], [3, 3])
            .with_activation(Activation::Relu)
            .with_max_workspace(Some(0))
            .init(device);
        block.norm.gamma = Param::from_tensor(Tensor::full([8], gamma, device));
        let workspace = |joined: bool| {
            let input = tensor::<4>(INPUT, true, device);
            let output = if joined {
                block.forward_max_pool(input, &pool)
            } else {
                pool.forward(block.forward(input))
            };
            backward_workspace(output, INPUT)
        };
        let (joined, apart) = (workspace(true), workspace(false));
        let between = bytes([256, 8, 30, 30]);
        assert!(joined < 4 << 20, "got {joined}");
        assert!(apart > between / 2, "got {apart}");
    }
}

/// Burn's own layers, for the comparison that the README makes.
fn unfused_keeps_three(device: &Device) {
    use burn::nn::BatchNormConfig;
    let conv = Conv2dConfig::new([8, 8], [3, 3])
        .with_bias(false)
        .init(device);
    let norm = BatchNormConfig::new(8).init(device);
    let input = tensor(INPUT, true, device);
    let run =
        |input: Tensor<4>| burn::tensor::activation::relu(norm.forward(conv.forward(input))).sum();
    // Burn's matrix product keeps a buffer for each thread, from its first use there on. The least
    // of several runs is without.
    let grown = (0..10).map(|_| {
        let start = ALLOCATOR.current() as isize;
        let loss = run(input.clone());
        let grown = ALLOCATOR.current() as isize - start;
        loss.backward();
        grown
    });
    let grown = grown.min().unwrap_or_default();
    // The input was there before: two more.
    let wanted = 2 * bytes(OUTPUT) as isize;
    assert!(
        (grown - wanted).unsigned_abs() < OVERHEAD,
        "got {grown}, wanted {wanted}"
    );
}

/// A bound on the workspace keeps the recomputed output and large tiles out of the backward pass's peak. Outputs of a
/// depthwise convolution, of nine taps, and of more than 128 MiB are not in it to begin with.
fn workspace_is_bounded(device: &Device) {
    const INPUT: [usize; 4] = [256, 8, 32, 32];
    let workspace = |input_shape, weight_shape: [usize; 4], max_workspace| {
        let input = tensor::<4>(input_shape, true, device);
        let conv = ConvSpec {
            groups: input_shape[1] / weight_shape[1],
            ..ConvSpec::unit(2)
        };
        let options = ConvBnOptions::new(conv)
            .with_activation(Activation::Relu)
            .with_max_workspace(max_workspace);
        let weight = tensor(weight_shape, true, device);
        let output = conv_bn(input, ConvBnParams::new(weight), options)
            .unwrap()
            .output;
        backward_workspace(output, input_shape)
    };
    let conv_output = bytes([256, 8, 30, 30]);
    // Tiles of each thread, a MiB or so.
    let scratch = 4 << 20;
    let free = workspace(INPUT, WEIGHT, None);
    let bounded = workspace(INPUT, WEIGHT, Some(conv_output - 1));
    let depthwise = workspace(INPUT, [8, 1, 3, 3], None);
    let large = workspace([583, 1, 36, 36], [64, 1, 7, 7], None);
    // Winograd's tiles are 6 MiB for each thread.
    let tiled = |most| workspace([8, 64, 56, 56], [64, 64, 3, 3], most);
    let (tiles_free, tiles_bounded) = (tiled(None), tiled(Some(1)));
    assert!(
        tiles_free > tiles_bounded + scratch,
        "got {tiles_free}, {tiles_bounded}"
    );
    for got in [bounded, depthwise, large, tiles_bounded] {
        assert!(got < scratch, "got {got}");
    }
    assert!(free < conv_output + scratch, "got {free}");
    assert!(
        bounded + conv_output - scratch < free,
        "got {bounded} bounded, {free} free"
    );
}
