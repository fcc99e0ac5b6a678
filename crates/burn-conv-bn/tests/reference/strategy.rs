//! Random cases, and the runner that draws, checks and shrinks them.

#![allow(dead_code, reason = "each test program uses a part of this")]

use std::cell::Cell;
use std::env;
use std::ops::RangeInclusive;

use burn_conv_bn::backend::Parents;
use burn_conv_bn::{Activation, ConvSpec, NormSpec, NormVariant, Recompute};
use proptest::arbitrary::any;
use proptest::array::{uniform4, uniform6};
use proptest::bool::weighted;
use proptest::collection::vec;
use proptest::prop_oneof;
use proptest::sample::select;
use proptest::strategy::{Just, Strategy};
use proptest::test_runner::{
    Config, FailurePersistence, FileFailurePersistence, RngSeed, TestCaseError, TestRunner,
};

use super::reference::case::{Case, Gamma, Layout, Tally, UNIT, Values};

/// Longest that a failing case is shrunk for, in milliseconds.
const SHRINK_TIME: u32 = 60_000;

/// Everything about a convolution but its values.
#[derive(Clone, Debug)]
pub struct Sizes {
    /// Number of images.
    pub batch: usize,
    /// Number of groups.
    pub groups: usize,
    /// Input and output channels of each group.
    pub channels: [usize; 2],
    /// The spatial dimensions, one to three.
    pub axes: Vec<Axis>,
}

/// One spatial dimension.
#[derive(Clone, Copy, Debug)]
pub struct Axis {
    /// Size of the input.
    pub size: usize,
    /// Size of the kernel.
    pub kernel: usize,
    /// Step between two outputs.
    pub stride: usize,
    /// Distance between two taps.
    pub dilation: usize,
    /// Zeros before and after.
    pub padding: (usize, usize),
}

impl Axis {
    /// The same, with an input that the kernel fits into.
    fn fitted(self) -> Self {
        let extent = self.dilation * (self.kernel - 1) + 1;
        let least = extent.saturating_sub(self.padding.0 + self.padding.1);
        Self {
            size: self.size.max(least),
            ..self
        }
    }

    fn outputs(self) -> usize {
        let extent = self.dilation * (self.kernel - 1) + 1;
        (self.size + self.padding.0 + self.padding.1 - extent) / self.stride + 1
    }
}

fn padding() -> impl Strategy<Value = (usize, usize)> {
    prop_oneof![
        2 => Just((0usize, 0usize)),
        1 => Just((1, 1)),
        3 => (0..=3usize, 0..=3usize),
    ]
}

fn one_or_more() -> impl Strategy<Value = usize> {
    prop_oneof![2 => Just(1usize), 1 => 2..=3usize]
}

/// Any dimension of about that size, with a kernel of that size.
fn axis(
    sizes: RangeInclusive<usize>,
    kernels: RangeInclusive<usize>,
) -> impl Strategy<Value = Axis> {
    (sizes, kernels, one_or_more(), one_or_more(), padding()).prop_map(
        |(size, kernel, stride, dilation, padding)| {
            Axis {
                size,
                kernel,
                stride,
                dilation,
                padding,
            }
            .fitted()
        },
    )
}

/// A dimension with a kernel of three taps next to each other.
fn three_taps(sizes: RangeInclusive<usize>, stride: usize) -> impl Strategy<Value = Axis> {
    (sizes, padding()).prop_map(move |(size, padding)| {
        Axis {
            size,
            kernel: 3,
            stride,
            dilation: 1,
            padding,
        }
        .fitted()
    })
}

fn sizes_of(
    batch: impl Strategy<Value = usize>,
    groups: impl Strategy<Value = usize>,
    channels: impl Strategy<Value = [usize; 2]>,
    axes: impl Strategy<Value = Vec<Axis>>,
) -> impl Strategy<Value = Sizes> {
    (batch, groups, channels, axes).prop_map(|(batch, groups, channels, axes)| Sizes {
        batch,
        groups,
        channels,
        axes,
    })
}

/// Sizes that are small, but reach every way that the kernels have of doing their work.
pub fn sizes() -> impl Strategy<Value = Sizes> {
    let any_rank = prop_oneof![
        vec(axis(1..=30, 1..=5), 1),
        vec(axis(1..=8, 1..=4), 2),
        vec(axis(1..=5, 1..=3), 3),
    ];
    let depthwise = prop_oneof![
        vec(axis(1..=12, 1..=4), 1),
        vec(axis(1..=7, 1..=3), 2),
        vec(axis(1..=4, 1..=3), 3),
    ];
    let large = prop_oneof![
        vec(axis(1000..=1500, 1..=3), 1),
        vec(axis(30..=40, 1..=3), 2),
        vec(axis(8..=10, 1..=3), 3),
    ];
    let few = || [1..=4usize, 1..=4usize];
    let ugly = || select(vec![1usize, 7, 65]);
    prop_oneof![
        10 => sizes_of(1..=3usize, 1..=3usize, few(), any_rank),
        3 => sizes_of(1..=3usize, 2..=9usize, [1..=1usize, 1..=2usize], depthwise),
        2 => sizes_of(1..=2usize, Just(1usize), [ugly(), ugly()], vec(axis(1..=4, 1..=2), 2)),
        // Channels enough for the algorithm with fewer products.
        3 => sizes_of(
            1..=5usize,
            1..=2usize,
            [16..=19usize, 16..=19usize],
            vec(three_taps(1..=9, 1), 2),
        ),
        // As many with a stride, for which the taps come in blocks.
        1 => sizes_of(
            1..=3usize,
            Just(1usize),
            [16..=18usize, 16..=18usize],
            vec(three_taps(3..=10, 2), 2),
        ),
        // Several tiles in an image.
        2 => sizes_of(1..=2usize, 1..=2usize, [1..=2usize, 1..=2usize], large),
        // More images than blocks that sums are taken over.
        1 => sizes_of(
            60..=75usize,
            1..=2usize,
            [1..=3usize, 1..=3usize],
            vec(axis(1..=3, 1..=3), 2),
        ),
    ]
}

/// Every activation; the output's sign is the value's for two of the slopes, and not for the third.
pub fn activations() -> Vec<Activation> {
    let negative_slope = 0.0;
    let relu = Activation::LeakyRelu { negative_slope };
    Activation::SAMPLES.into_iter().chain([relu]).collect()
}

/// Cases of those sizes with any other options.
pub fn cases(
    sizes: impl Strategy<Value = Sizes>,
    activations: Vec<Activation>,
) -> impl Strategy<Value = Case> {
    let norm = (
        select(vec![NormVariant::BatchNorm, NormVariant::Tutorial]),
        select(vec![1e-5f64, 1e-3, 0.25]),
    )
        .prop_map(|(variant, epsilon)| NormSpec::new(variant, epsilon));
    let options = (
        norm,
        select(activations),
        select(vec![Recompute::Conv, Recompute::Norm, Recompute::Never]),
        select(vec![None, Some(1usize), Some(1 << 10), Some(1 << 20)]),
    );
    let gamma = prop_oneof![
        3 => Just(Gamma::Random),
        1 => Just(Gamma::Absent),
        1 => Just(Gamma::SomeZero),
        1 => Just(Gamma::Zero),
    ];
    let tensors = (
        weighted(0.4),
        gamma,
        weighted(0.4),
        weighted(0.3),
        uniform6(weighted(0.8)),
    );
    let layout = prop_oneof![
        3 => Just(Layout::Contiguous),
        1 => Just(Layout::ChannelsLast),
        1 => Just(Layout::Slice),
        1 => Just(Layout::Expanded),
    ];
    let layouts = (uniform4(layout), weighted(0.2), weighted(0.5));
    // Far from 0 too, and with little between the values.
    let input_values = (
        select(vec![0.0f64, 0.0, 2.0]),
        select(vec![1.0f64, 1.0, 0.05]),
    )
        .prop_map(|(offset, spread)| Values { offset, spread });
    let seed = any::<u64>().no_shrink();
    (sizes, options, tensors, layouts, input_values, seed).prop_map(
        |(sizes, options, tensors, layouts, input_values, seed)| {
            let (norm, activation, recompute, max_workspace) = options;
            let (bias, gamma, residual, given_statistics, tracked) = tensors;
            let (layouts, vector_slices, half_norm) = layouts;
            let [input_layout, weight_layout, residual_layout, grad_layout] = layouts;
            let [
                track_input,
                track_weight,
                track_bias,
                track_gamma,
                track_beta,
                track_residual,
            ] = tracked;
            Case {
                norm,
                activation,
                recompute,
                max_workspace,
                bias,
                gamma,
                residual,
                given_statistics,
                tracked: Parents {
                    input: track_input,
                    weight: track_weight,
                    bias: track_bias,
                    gamma: track_gamma,
                    beta: track_beta,
                    residual: track_residual,
                },
                input_layout,
                weight_layout,
                residual_layout,
                grad_layout,
                vector_slices,
                half_norm,
                input_values,
                weight_values: UNIT,
                residual_values: Values {
                    offset: 0.0,
                    spread: 4.0,
                },
                grad_values: UNIT,
                seed,
                ..of_sizes(&sizes, given_statistics)
            }
        },
    )
}

/// A case of those sizes. One value in a channel has no batch statistics; it then is two.
fn of_sizes(sizes: &Sizes, given_statistics: bool) -> Case {
    let axes = &sizes.axes;
    let positions: usize = axes.iter().map(|axis| axis.outputs()).product();
    let batch = match sizes.batch * positions {
        1 if !given_statistics => 2,
        _ => sizes.batch,
    };
    let [channels_in, channels_out] = sizes.channels;
    let mut input = vec![batch, channels_in * sizes.groups];
    input.extend(axes.iter().map(|axis| axis.size));
    let mut weight = vec![channels_out * sizes.groups, channels_in];
    weight.extend(axes.iter().map(|axis| axis.kernel));
    let spec = ConvSpec {
        stride: axes.iter().map(|axis| axis.stride).collect(),
        padding: axes.iter().map(|axis| axis.padding).collect(),
        dilation: axes.iter().map(|axis| axis.dilation).collect(),
        groups: sizes.groups,
    };
    Case::new(spec, &input, &weight)
}

/// How much is to be drawn, and where failures are kept.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Number of cases, unless `PROPTEST_CASES` says another.
    pub cases: u32,
    /// Tells this draw from others. `PROPTEST_RNG_SEED` is added to it.
    pub seed: u64,
    /// The file that failures are kept in by their seeds, which are run first from then on.
    pub failures: &'static str,
}

/// Draws cases and checks each. Prints what was compared.
///
/// # Panics
///
/// Panics with the smallest case found that fails, and the seed that finds it again.
pub fn hold(
    name: &str,
    plan: Plan,
    cases: &impl Strategy<Value = Case>,
    check: impl Fn(&Case) -> Result<Tally, String>,
) -> Tally {
    let mut config = Config::default();
    if env::var_os("PROPTEST_CASES").is_none() {
        config.cases = plan.cases;
    }
    let seed = match config.rng_seed {
        RngSeed::Fixed(seed) => seed,
        RngSeed::Random => 0,
    };
    config.rng_seed = RngSeed::Fixed(seed.wrapping_add(plan.seed));
    config.max_shrink_time = SHRINK_TIME;
    // Named in full: proptest looks for a place of its own only beside a library's sources.
    config.failure_persistence =
        config
            .failure_persistence
            .map(|_| -> Box<dyn FailurePersistence> {
                Box::new(FileFailurePersistence::Direct(plan.failures))
            });

    let tally = Cell::new(Tally::default());
    let mut runner = TestRunner::new(config);
    let result = runner.run(cases, |case| {
        let part = check(&case).map_err(TestCaseError::fail)?;
        tally.set(tally.get() + part);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{name}: {error}\n{runner}\tPROPTEST_RNG_SEED={seed} draws these cases again");
    }
    println!("{name}: {}", tally.get());
    tally.get()
}
