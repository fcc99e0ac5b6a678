use burn::tensor::Shape;

use super::{Activation, ConvBnError, ConvBnOptions, ConvSpec};

/// The shapes of one application of the op, checked against each other.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConvBnProblem {
    /// `[batch, channels_in, spatial..]`.
    pub input: Shape,
    /// `[channels_out, channels_in / groups, kernel..]`.
    pub weight: Shape,
    /// `[batch, channels_out, spatial_out..]`.
    pub output: Shape,
}

impl ConvBnProblem {
    /// Checks the shapes of a convolution and computes its output's. The batch may be empty.
    ///
    /// # Errors
    ///
    /// Any of the shape errors of [`ConvBnError`].
    pub fn conv(input: Shape, weight: Shape, conv: &ConvSpec) -> Result<Self, ConvBnError> {
        if !(3..=5).contains(&input.num_dims()) {
            return Err(ConvBnError::InputRank { got: input });
        }
        let spatial = input.num_dims() - 2;
        for (what, got, expected) in [
            ("weight", weight.num_dims(), spatial + 2),
            ("stride", conv.stride.len(), spatial),
            ("padding", conv.padding.len(), spatial),
            ("dilation", conv.dilation.len(), spatial),
        ] {
            if got != expected {
                return Err(ConvBnError::Rank {
                    what,
                    input,
                    expected,
                    got,
                });
            }
        }
        for (what, first, got) in [
            // The batch may be empty.
            ("input size", 1, input.to_vec()),
            ("weight size", 0, weight.to_vec()),
            ("stride", 0, conv.stride.clone()),
            ("dilation", 0, conv.dilation.clone()),
            ("groups", 0, vec![conv.groups]),
        ] {
            if got[first..].contains(&0) {
                return Err(ConvBnError::Zero { what, got });
            }
        }
        let (channels_out, expected) = (weight[0], weight[1] * conv.groups);
        if input[1] != expected {
            return Err(ConvBnError::InputChannels {
                got: input[1],
                input,
                weight,
                groups: conv.groups,
                expected,
            });
        }
        if !channels_out.is_multiple_of(conv.groups) {
            return Err(ConvBnError::Groups {
                weight,
                channels_out,
                groups: conv.groups,
            });
        }
        let mut output = vec![input[0], channels_out];
        for dim in 0..spatial {
            let (before, after) = conv.padding[dim];
            let padded = input[dim + 2] + before + after;
            let kernel = conv.dilation[dim] * (weight[dim + 2] - 1) + 1;
            if kernel > padded {
                return Err(ConvBnError::KernelTooLarge {
                    dim,
                    kernel,
                    padded,
                    input,
                    weight,
                });
            }
            output.push((padded - kernel) / conv.stride[dim] + 1);
        }
        Ok(Self {
            input,
            weight,
            output: Shape::from(output),
        })
    }

    /// Checks the shapes and options of the fused op, with batch statistics if `batch_statistics`.
    ///
    /// # Errors
    ///
    /// [`ConvBnError::Epsilon`]; [`ConvBnError::SoftplusBeta`]; for batch statistics [`ConvBnError::EmptyBatch`] and
    /// [`ConvBnError::SingleValue`]; and what [`conv`](Self::conv) returns.
    pub fn conv_bn(
        input: Shape,
        weight: Shape,
        options: &ConvBnOptions,
        batch_statistics: bool,
    ) -> Result<Self, ConvBnError> {
        check_epsilon(options.norm.epsilon, batch_statistics)?;
        check_activation(options.activation)?;
        let problem = Self::conv(input, weight, &options.conv)?;
        if batch_statistics {
            check_values(&problem.input, &problem.output)?;
        }
        Ok(problem)
    }

    /// Number of values that each channel's statistics are taken over: batch times spatial size
    /// of the output.
    pub fn values_per_channel(&self) -> usize {
        values_per_channel(&self.output)
    }
}

/// Batch times spatial size of `[batch, channels, spatial..]`.
pub(crate) fn values_per_channel(shape: &Shape) -> usize {
    shape
        .iter()
        .enumerate()
        .filter(|(dim, _)| *dim != 1)
        .map(|(_, size)| size)
        .product()
}

/// Checks that each channel of `output` has more than one value, as batch statistics need. `input` is for the
/// message.
pub(crate) fn check_values(input: &Shape, output: &Shape) -> Result<(), ConvBnError> {
    match values_per_channel(output) {
        0 => Err(ConvBnError::EmptyBatch {
            input: input.clone(),
        }),
        1 => Err(ConvBnError::SingleValue {
            input: input.clone(),
            output: output.clone(),
        }),
        _ => Ok(()),
    }
}

/// Checks a convolution's configuration, which depends on no input.
pub(crate) fn check_geometry(
    [channels_in, channels_out]: [usize; 2],
    kernel_size: Vec<usize>,
    stride: Vec<usize>,
    dilation: Vec<usize>,
    groups: usize,
) -> Result<(), ConvBnError> {
    for (what, got) in [
        ("channels", vec![channels_in, channels_out]),
        ("kernel size", kernel_size),
        ("stride", stride),
        ("dilation", dilation),
        ("groups", vec![groups]),
    ] {
        if got.contains(&0) {
            return Err(ConvBnError::Zero { what, got });
        }
    }
    if channels_in.is_multiple_of(groups) && channels_out.is_multiple_of(groups) {
        Ok(())
    } else {
        Err(ConvBnError::Channels {
            channels_in,
            channels_out,
            groups,
        })
    }
}

pub(crate) fn check_momentum(momentum: f64) -> Result<(), ConvBnError> {
    if (0.0..=1.0).contains(&momentum) {
        Ok(())
    } else {
        Err(ConvBnError::Momentum { got: momentum })
    }
}

/// Checks epsilon. It may be 0 with given statistics, whose variance need not be 0.
pub(crate) fn check_epsilon(epsilon: f64, batch_statistics: bool) -> Result<(), ConvBnError> {
    let allowed = epsilon > 0.0 || (epsilon == 0.0 && !batch_statistics);
    if epsilon.is_finite() && allowed {
        Ok(())
    } else {
        Err(ConvBnError::Epsilon { got: epsilon })
    }
}

/// Checks an activation's parameters.
pub(crate) fn check_activation(activation: Activation) -> Result<(), ConvBnError> {
    match activation {
        Activation::Softplus { beta } if beta == 0.0 || !beta.is_finite() => {
            Err(ConvBnError::SoftplusBeta { got: beta })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_of_a_block() -> Result<(), ConvBnError> {
        let (input, weight) = (Shape::new([8, 3, 32, 32]), Shape::new([16, 3, 3, 3]));
        let options = ConvBnOptions::new(ConvSpec::unit(2));
        let problem = ConvBnProblem::conv_bn(input, weight, &options, true)?;
        assert_eq!(problem.output, Shape::new([8, 16, 30, 30]));
        assert_eq!(problem.values_per_channel(), 8 * 30 * 30);
        Ok(())
    }
}
