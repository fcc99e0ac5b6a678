use burn::tensor::{DType, Shape};

/// Invalid arguments of an op or a layer. Every message names the expected and the actual value.
///
/// ```
/// use burn::tensor::Shape;
/// use burn_conv_bn::backend::ConvBnProblem;
/// use burn_conv_bn::{ConvBnError, ConvSpec};
///
/// let (input, weight) = (Shape::new([8, 3, 32, 32]), Shape::new([16, 4, 3, 3]));
/// let error = ConvBnProblem::conv(input, weight, &ConvSpec::unit(2)).unwrap_err();
/// assert!(matches!(
///     error,
///     ConvBnError::InputChannels { expected: 4, got: 3, .. }
/// ));
/// assert!(error.to_string().contains("expected 4 channels"));
/// ```
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConvBnError {
    /// The input is not `[batch, channels, spatial..]` with one to three spatial dimensions.
    #[error("input: expected rank 3, 4 or 5 ([batch, channels, spatial..]), got shape {got}")]
    InputRank {
        /// The input's shape.
        got: Shape,
    },
    /// A tensor or an option is of another rank than the input.
    #[error("{what}: expected {expected} dimensions for input {input}, got {got}")]
    Rank {
        /// What was of the wrong rank.
        what: &'static str,
        /// The input's shape.
        input: Shape,
        /// Expected dimensions.
        expected: usize,
        /// Actual dimensions.
        got: usize,
    },
    /// A size that must be positive is zero.
    #[error("{what} must be positive, got 0 in {got:?}")]
    Zero {
        /// What was zero.
        what: &'static str,
        /// The values it stands among.
        got: Vec<usize>,
    },
    /// The input's channels are not those that the weight expects.
    #[error(
        "input {input}: expected {expected} channels for weight {weight}{}, got {got}",
        in_groups(*groups)
    )]
    InputChannels {
        /// The input's shape.
        input: Shape,
        /// The weight's shape.
        weight: Shape,
        /// Number of groups.
        groups: usize,
        /// Expected channels.
        expected: usize,
        /// Actual channels.
        got: usize,
    },
    /// The output channels do not divide into the groups.
    #[error("weight {weight}: {channels_out} output channels do not divide into {groups} groups")]
    Groups {
        /// The weight's shape.
        weight: Shape,
        /// Number of output channels.
        channels_out: usize,
        /// Number of groups.
        groups: usize,
    },
    /// A configuration's channels do not divide into its groups.
    #[error(
        "{channels_in} input and {channels_out} output channels do not divide into {groups} groups"
    )]
    Channels {
        /// Number of input channels.
        channels_in: usize,
        /// Number of output channels.
        channels_out: usize,
        /// Number of groups.
        groups: usize,
    },
    /// The kernel does not fit into the padded input.
    #[error(
        "spatial dimension {dim}: a kernel of extent {kernel} does not fit into the padded input's \
         {padded} (input {input}, weight {weight})"
    )]
    KernelTooLarge {
        /// Index of the spatial dimension, from 0.
        dim: usize,
        /// Extent of the dilated kernel.
        kernel: usize,
        /// Extent of the padded input.
        padded: usize,
        /// The input's shape.
        input: Shape,
        /// The weight's shape.
        weight: Shape,
    },
    /// A pooling window does not fit into the padded input.
    #[error(
        "spatial dimension {dim}: a window of extent {window} does not fit into the padded input's \
         {padded} (input {input})"
    )]
    WindowTooLarge {
        /// Index of the spatial dimension, from 0.
        dim: usize,
        /// Extent of the dilated window.
        window: usize,
        /// Extent of the padded input.
        padded: usize,
        /// The input's shape.
        input: Shape,
    },
    /// A tensor's shape does not fit the others.
    #[error("{what}: expected shape {expected}{}, got {got}", per_channel(what))]
    Shape {
        /// Which tensor.
        what: &'static str,
        /// Expected shape.
        expected: Shape,
        /// Actual shape.
        got: Shape,
    },
    /// A tensor's dtype does not fit the input's.
    #[error("input is {input:?}, {what} is {got:?}: {}", cast(what, expected, *got))]
    DType {
        /// Which tensor.
        what: &'static str,
        /// The input's dtype.
        input: DType,
        /// Expected dtypes.
        expected: String,
        /// Actual dtype.
        got: DType,
    },
    /// A tensor is on another device than the input.
    #[error("input is on {expected}, {what} is on {got}: move one of the two with `to_device`")]
    Device {
        /// Which tensor.
        what: &'static str,
        /// The input's device.
        expected: String,
        /// Actual device.
        got: String,
    },
    /// The device is of a backend that this build of the crate does not know.
    #[error("input is on {device}, which this build of burn-conv-bn does not know: {}", remedy(*feature))]
    Backend {
        /// The input's device.
        device: String,
        /// The missing feature of this crate; `None` for a backend that it has none for.
        feature: Option<&'static str>,
    },
    /// Epsilon is not a finite positive number, or 0 with given statistics.
    #[error("epsilon must be finite and positive, got {got}; only given statistics go with 0")]
    Epsilon {
        /// The value seen.
        got: f64,
    },
    /// The beta of a softplus, which divides by it, is 0 or not finite.
    #[error("softplus: beta must be finite and not 0, got {got}")]
    SoftplusBeta {
        /// The value seen.
        got: f64,
    },
    /// The momentum is not between 0 and 1.
    #[error("momentum must be between 0 and 1, got {got}")]
    Momentum {
        /// The value seen.
        got: f64,
    },
    /// None of the layers whose settings were to change is in the module.
    #[error(
        "the module has none of this crate's layers (ConvBn1d, ConvBn2d, ConvBn3d, BatchNormActivation): settings \
         and `autocast` reach no `fuse`, which has methods of its own; `with_precision` casts any weight"
    )]
    NoLayer,
    /// An empty batch has no statistics.
    #[error(
        "batch statistics need more than one value per channel, got an empty batch: input {input}; skip \
         it, or normalize with given statistics, as `valid()` and frozen norms do"
    )]
    EmptyBatch {
        /// The input's shape.
        input: Shape,
    },
    /// Batch statistics over a single value per channel are meaningless.
    #[error(
        "batch statistics need more than one value per channel, got one: \
         input {input} gives output {output}; use more or larger images, or normalize with given statistics, as \
         `valid()` and frozen norms do"
    )]
    SingleValue {
        /// The input's shape.
        input: Shape,
        /// The output's shape.
        output: Shape,
    },
}

/// The groups of a weight that has any.
fn in_groups(groups: usize) -> String {
    match groups {
        1 => String::new(),
        groups => format!(" in {groups} groups"),
    }
}

/// What decides the expected shape of a norm's vectors.
fn per_channel(what: &str) -> &'static str {
    match what {
        "gamma" | "beta" | "mean" | "variance" => " of the channels to normalize",
        _ => "",
    }
}

/// What to do about a missing backend.
fn remedy(feature: Option<&str>) -> String {
    match feature {
        Some(feature) => format!("turn on its feature `{feature}`, as Burn's"),
        None => "it has no feature for that backend".to_string(),
    }
}

/// The cast that makes `what` of dtype `got` fit the input; both choices where `what` is a convolution's
/// parameter.
fn cast(what: &str, expected: &str, got: DType) -> String {
    match what {
        "weight" | "bias" => format!(
            "cast the input with `input.cast(DType::{got:?})`, or the {what} to {expected}, as a layer's with \
             `with_precision(FloatDType::{expected})`"
        ),
        _ => format!("cast {what} to {expected}"),
    }
}
