//! The plan at its edges: nothing is kept that no gradient needs.

use burn_conv_bn::backend::{Parents, SavePlan, StatisticsKind};
use burn_conv_bn::{Activation, ConvBnOptions, ConvSpec, Recompute};

const ALL: Parents = Parents {
    input: true,
    weight: true,
    bias: true,
    gamma: true,
    beta: true,
    residual: true,
};

const NONE: Parents = Parents {
    input: false,
    weight: false,
    bias: false,
    gamma: false,
    beta: false,
    residual: false,
};

/// Names of the flags that are set.
fn kept(plan: SavePlan) -> Vec<&'static str> {
    let SavePlan {
        input,
        weight,
        bias,
        gamma,
        beta,
        statistics,
        conv_output,
        output,
        residual,
        ..
    } = plan;
    let flags = [
        (input, "input"),
        (weight, "weight"),
        (bias, "bias"),
        (gamma, "gamma"),
        (beta, "beta"),
        (statistics, "statistics"),
        (conv_output, "conv_output"),
        (output, "output"),
        (residual, "residual"),
    ];
    let set = flags.into_iter().filter(|(set, _)| *set);
    set.map(|(_, name)| name).collect()
}

fn all_options() -> impl Iterator<Item = ConvBnOptions> {
    let activations = [Activation::Identity, Activation::Relu, Activation::Silu];
    activations.into_iter().flat_map(|activation| {
        [Recompute::Conv, Recompute::Norm, Recompute::Never].map(|recompute| {
            ConvBnOptions::new(ConvSpec::unit(2))
                .with_activation(activation)
                .with_recompute(recompute)
        })
    })
}

#[test]
fn without_a_tracked_parent_nothing_is_kept() {
    for options in all_options() {
        for statistics in [StatisticsKind::Batch, StatisticsKind::Fixed] {
            let plan = SavePlan::new(&options, statistics, ALL, NONE);
            assert_eq!(kept(plan), [""; 0], "{options:?} {statistics:?}");
        }
    }
}

/// Under batch statistics its gradient is zero.
#[test]
fn a_bias_alone_keeps_nothing() {
    let tracked = Parents { bias: true, ..NONE };
    for options in all_options() {
        let plan = SavePlan::new(&options, StatisticsKind::Batch, ALL, tracked);
        assert_eq!(kept(plan), [""; 0], "{options:?}");
    }
}
