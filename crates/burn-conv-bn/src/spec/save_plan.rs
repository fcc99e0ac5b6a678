use std::fmt;

use burn::tensor::{DType, Shape};

use super::{ConvBnOptions, ConvBnProblem, Derivative, Recompute};

/// One flag for each differentiable input of the fused op: the given ones, or the tracked ones, which
/// want a gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parents {
    /// The convolution's input.
    pub input: bool,
    /// The convolution's weight.
    pub weight: bool,
    /// The convolution's bias.
    pub bias: bool,
    /// The norm's scale.
    pub gamma: bool,
    /// The norm's shift.
    pub beta: bool,
    /// The tensor added before the activation.
    pub residual: bool,
}

/// Where mean and variance come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatisticsKind {
    /// From this batch; gradients flow through them.
    Batch,
    /// Given, as running statistics are; constants to the gradient.
    Fixed,
}

/// Which tensors one node of the fused op keeps for its backward pass.
///
/// The autodiff node saves the tensors that are set here, and
/// [`tensors`](Self::tensors) lists the same with shapes and bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SavePlan {
    /// The convolution's input.
    pub input: bool,
    /// The convolution's weight.
    pub weight: bool,
    /// The convolution's bias.
    pub bias: bool,
    /// The norm's scale.
    pub gamma: bool,
    /// The norm's shift.
    pub beta: bool,
    /// Mean and variance, `[channels_out]` each.
    pub statistics: bool,
    /// The convolution's output.
    pub conv_output: bool,
    /// The op's own output, for the derivative of a ReLU and its kin. Its consumer usually keeps it
    /// anyway: then it is the same buffer.
    pub output: bool,
    /// The tensor added before the activation, where the derivative needs the sum itself.
    pub residual: bool,
    /// Whether consumers keep no output of the op: their backward pass gets it rebuilt, see
    /// [`Recompute::Norm`].
    pub rebuilds_output: bool,
}

impl SavePlan {
    /// Decides what to keep for the gradients of `tracked`, given which inputs are `present`.
    pub fn new(
        options: &ConvBnOptions,
        statistics: StatisticsKind,
        present: Parents,
        tracked: Parents,
    ) -> Self {
        let Parents {
            input,
            weight,
            bias,
            gamma,
            beta,
            residual,
        } = tracked;
        let any = input || weight || bias || gamma || beta || residual;
        if any && Self::may_rebuild_output(options, statistics, present.residual) {
            // A node of the convolution, and one of norm and activation, which rebuilds its output from all of
            // its inputs.
            return Self {
                input: weight,
                weight: input,
                bias: false,
                gamma: present.gamma,
                beta: present.beta,
                statistics: true,
                conv_output: true,
                output: false,
                residual: false,
                rebuilds_output: true,
            };
        }
        let derivative = options.activation.derivative();
        match statistics {
            StatisticsKind::Batch => {
                // A bias shifts the mean by as much as the value: its gradient is zero.
                let wants_grad = input || weight || gamma || beta || residual;
                let output = wants_grad && present.residual && derivative == Derivative::OfOutput;
                let value = wants_grad && derivative != Derivative::One && !output;
                let conv_output = input || weight || gamma || value;
                let recompute = conv_output && options.recompute == Recompute::Conv;
                Self {
                    input: weight || recompute,
                    weight: input || recompute,
                    bias: false,
                    gamma: present.gamma && (input || weight || value),
                    beta: present.beta && value,
                    statistics: conv_output,
                    conv_output: conv_output && !recompute,
                    output,
                    residual: present.residual && value,
                    rebuilds_output: false,
                }
            }
            StatisticsKind::Fixed => {
                let value = any && derivative == Derivative::OfValue;
                let recompute = value && options.recompute == Recompute::Conv;
                Self {
                    input: weight || gamma || recompute,
                    weight: input || gamma || recompute,
                    bias: present.bias && (gamma || value),
                    gamma: present.gamma && (input || weight || bias || value),
                    beta: present.beta && value,
                    statistics: input || weight || bias || gamma || value,
                    conv_output: value && !recompute,
                    output: any && derivative == Derivative::OfOutput,
                    residual: present.residual && value,
                    rebuilds_output: false,
                }
            }
        }
    }

    /// Whether the output of a tracked op is rebuilt in the backward pass: under [`Recompute::Norm`] with
    /// batch statistics and without a residual.
    pub(crate) fn may_rebuild_output(
        options: &ConvBnOptions,
        statistics: StatisticsKind,
        residual: bool,
    ) -> bool {
        options.recompute == Recompute::Norm && statistics == StatisticsKind::Batch && !residual
    }

    /// Plan for the op joined with a max pool, for options of [`ConvBnOptions::joined`]: also saves the
    /// pooled output and the parameters that invert it. The pool's argmax comes on top.
    #[must_use]
    pub fn with_max_pool(self, options: &ConvBnOptions, present: Parents) -> Self {
        let inverts = self.statistics && options.activation.passes_unchanged();
        Self {
            gamma: present.gamma && (self.gamma || inverts),
            beta: present.beta && (self.beta || inverts),
            output: inverts,
            ..self
        }
    }

    /// Whether the op joins with the max pool behind it, given kernels and
    /// [`MaxPoolProblem::is_regular`](super::MaxPoolProblem::is_regular): under batch statistics
    /// and without a residual.
    pub(crate) fn joins_max_pool(statistics: StatisticsKind, residual: bool) -> bool {
        statistics == StatisticsKind::Batch && !residual
    }

    /// The kept tensors by name, largest kinds first, for data of `dtype` with gamma and beta in
    /// `norm_dtype`. The statistics are f32, or f64 with data of f64.
    pub fn tensors(
        &self,
        problem: &ConvBnProblem,
        dtype: DType,
        norm_dtype: DType,
    ) -> Vec<SavedTensor> {
        let channels = Shape::new([problem.weight[0]]);
        let statistics_dtype = accumulator_dtype(dtype);
        [
            (self.input, "input", &problem.input, dtype, true),
            (
                self.conv_output,
                "conv_output",
                &problem.output,
                dtype,
                false,
            ),
            (self.output, "output", &problem.output, dtype, true),
            (self.residual, "residual", &problem.output, dtype, true),
            (self.weight, "weight", &problem.weight, dtype, true),
            (self.bias, "bias", &channels, dtype, true),
            (self.gamma, "gamma", &channels, norm_dtype, true),
            (self.beta, "beta", &channels, norm_dtype, true),
            (self.statistics, "mean", &channels, statistics_dtype, false),
            (
                self.statistics,
                "variance",
                &channels,
                statistics_dtype,
                false,
            ),
        ]
        .into_iter()
        .filter(|(kept, ..)| *kept)
        .map(|(_, name, shape, dtype, shared)| SavedTensor {
            name,
            shape: shape.clone(),
            dtype,
            shared,
        })
        .collect()
    }
}

/// A tensor that a node keeps for its backward pass.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::Device;
/// use burn_conv_bn::ConvBn2dConfig;
///
/// let block = ConvBn2dConfig::new([3, 8], [3, 3]).init(&Device::flex().autodiff());
/// let saved = block.saved_for_backward([2, 3, 16, 16]);
/// assert_eq!(saved[0].to_string(), "input [2, 3, 16, 16] F32, 6144 bytes, shared");
/// assert_eq!(saved[0].bytes(), 4 * 2 * 3 * 16 * 16);
/// // The input exists anyway; the statistics are kept for this block alone.
/// let own = saved.iter().filter(|tensor| !tensor.shared);
/// assert_eq!(own.map(|tensor| tensor.name).collect::<Vec<_>>(), ["mean", "variance"]);
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedTensor {
    /// Its role in the op.
    pub name: &'static str,
    /// Its shape.
    pub shape: Shape,
    /// Its element type.
    pub dtype: DType,
    /// Whether it is a handle on a buffer that exists anyway (a parameter, the neighbour's
    /// activation) rather than one that lives for this node alone.
    pub shared: bool,
}

impl SavedTensor {
    /// Size of the buffer in bytes.
    pub fn bytes(&self) -> usize {
        self.shape.num_elements() * self.dtype.size()
    }
}

/// `input [2, 3, 16, 16] F32, 6144 bytes`, and `, shared` if it is.
impl fmt::Display for SavedTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name,
            shape,
            dtype,
            shared,
        } = self;
        write!(f, "{name} {shape} {dtype:?}, {} bytes", self.bytes())?;
        f.write_str(if *shared { ", shared" } else { "" })
    }
}

/// Dtype of statistics, sums and per-channel coefficients for data of `dtype`.
pub(crate) fn accumulator_dtype(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Activation, ConvSpec};

    fn given() -> Parents {
        Parents {
            input: true,
            weight: true,
            gamma: true,
            beta: true,
            ..Parents::default()
        }
    }

    #[test]
    fn relu_saves_the_input_or_the_output() {
        let options = ConvBnOptions::new(ConvSpec::unit(2)).with_activation(Activation::Relu);
        let plan = SavePlan::new(&options, StatisticsKind::Batch, given(), given());
        assert!(plan.input && !plan.conv_output && !plan.output);

        // Frozen norm and only the input tracked: the sign of the output is enough.
        let tracked = Parents {
            input: true,
            ..Parents::default()
        };
        assert!(!tracked.weight);
        let plan = SavePlan::new(&options, StatisticsKind::Fixed, given(), tracked);
        assert!(!plan.input && plan.output);
    }

    #[test]
    fn beta_alone_needs_no_statistics() {
        let options = ConvBnOptions::new(ConvSpec::unit(2));
        let shift = Parents {
            beta: true,
            ..Parents::default()
        };
        let plan = |kind| SavePlan::new(&options, kind, shift, shift);
        assert_eq!(plan(StatisticsKind::Batch), plan(StatisticsKind::Fixed));
    }

    #[test]
    fn norm_saves_the_convolutions_output_where_it_can_rebuild_the_ops() {
        let options = ConvBnOptions::new(ConvSpec::unit(2)).with_recompute(Recompute::Norm);
        let never = options.clone().with_recompute(Recompute::Never);
        let plan = SavePlan::new(&options, StatisticsKind::Batch, given(), given());
        assert!(plan.rebuilds_output && plan.conv_output && plan.input && plan.beta);

        // Only the input wants a gradient: nothing needs it again.
        let tracked = Parents {
            input: true,
            ..Parents::default()
        };
        let plan = SavePlan::new(&options, StatisticsKind::Batch, given(), tracked);
        assert!(plan.rebuilds_output && plan.conv_output && plan.weight && !plan.input);

        let residual = Parents {
            residual: true,
            ..given()
        };
        for (kind, present) in [
            (StatisticsKind::Batch, residual),
            (StatisticsKind::Fixed, given()),
        ] {
            let plan = |options| SavePlan::new(options, kind, present, present);
            assert_eq!(plan(&options), plan(&never));
        }
        let nothing = Parents::default();
        let plan = SavePlan::new(&options, StatisticsKind::Batch, given(), nothing);
        assert!(!plan.rebuilds_output && !plan.conv_output);
        assert_eq!(options.joined(), never);
    }

    #[test]
    fn a_joined_pool_saves_output_and_beta() {
        let options = ConvBnOptions::new(ConvSpec::unit(2));
        let plan = SavePlan::new(&options, StatisticsKind::Batch, given(), given());
        let joined = plan.with_max_pool(&options, given());
        assert!(joined.output && joined.beta && !plan.output && !plan.beta);
    }

    #[test]
    fn tensors_of_a_plan() {
        let options = ConvBnOptions::new(ConvSpec::unit(2));
        let (input, weight) = (Shape::new([8, 3, 32, 32]), Shape::new([16, 3, 3, 3]));
        let problem = ConvBnProblem::conv_bn(input, weight, &options, true).unwrap();
        let given = Parents {
            input: true,
            weight: true,
            ..Parents::default()
        };
        let plan = SavePlan::new(&options, StatisticsKind::Batch, given, given);
        let tensors = plan.tensors(&problem, DType::BF16, DType::F32);
        let names: Vec<_> = tensors.iter().map(|tensor| tensor.name).collect();
        assert_eq!(names, ["input", "weight", "mean", "variance"]);
        assert_eq!(tensors[0].bytes(), 2 * 8 * 3 * 32 * 32);
    }
}
