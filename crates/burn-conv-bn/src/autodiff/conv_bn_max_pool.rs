use burn::backend::Autodiff;
use burn::tensor::ops::MaxPoolOptions;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::ops::{Backward, OpsKind};

use super::conv_bn::{ConvBnBackward, Pool, inner_inputs, parents, plan, state};
use super::{conv_bn, max_pool, untracked};
use crate::backend::{ConvBnBackend, ConvBnInputs, ConvBnMaxPoolForward, NormOutput};
use crate::definition::ConvBnOptions;
use crate::portable::{bias_shift, shifted_mean};

/// As the node of the fused op, with the pool's places and output in its state; or that node and the
/// pool's.
pub(super) fn register<B: ConvBnBackend, C: CheckpointStrategy>(
    inputs: ConvBnInputs<Autodiff<B, C>>,
    options: ConvBnOptions,
    pool: MaxPoolOptions<2>,
) -> NormOutput<Autodiff<B, C>> {
    match ConvBnBackward
        .prepare::<C>(parents(&inputs))
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(mut prep) => {
            let plain = inner_inputs(inputs.clone());
            let shift = bias_shift::<B>(&plain);
            let forward = B::conv_bn_max_pool_forward(plain, options.clone(), pool.clone());
            let ConvBnMaxPoolForward::Pooled {
                output,
                places,
                mean,
                variance,
            } = forward
            else {
                // This node was never registered; those of the two ops are.
                let normalized = conv_bn::register::<B, C>(inputs, options);
                return NormOutput {
                    output: max_pool::register::<B, C>(normalized.output, pool),
                    ..normalized
                };
            };
            let plan = plan(&inputs, &options).with_max_pool(&options, inputs.present());
            let mut state = state(&inputs, &options, &plan, |tensor| prep.checkpoint(tensor));
            if plan.statistics {
                state.mean = Some(mean.clone());
                state.variance = Some(variance.clone());
            }
            state.output = plan.output.then(|| output.clone());
            state.pool = Some(Pool {
                places,
                options: pool,
            });
            NormOutput {
                output: prep.finish(state, output),
                mean: untracked::<B, C>(shifted_mean::<B>(mean, shift)),
                variance: untracked::<B, C>(variance),
            }
        }
        OpsKind::UnTracked(prep) => {
            let result = B::conv_bn_max_pool(inner_inputs(inputs), options, pool);
            NormOutput {
                output: prep.finish(result.output),
                mean: untracked::<B, C>(result.mean),
                variance: untracked::<B, C>(result.variance),
            }
        }
    }
}
