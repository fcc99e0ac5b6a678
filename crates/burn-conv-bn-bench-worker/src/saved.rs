//! What a workload's blocks list as kept for the backward pass, as one number.

use burn_conv_bn::SavedTensor;

/// Roles of parameters, which are there in any case.
const PARAMETERS: [&str; 4] = ["weight", "bias", "gamma", "beta"];

/// One tensor of a list.
#[derive(Clone, Copy, Debug)]
pub struct Kept<'a> {
    /// Name of the block that lists it.
    pub block: &'a str,
    /// Its role there.
    pub role: &'a str,
    /// Size of its buffer.
    pub bytes: usize,
}

impl<'a> Kept<'a> {
    /// A tensor that a block lists.
    pub fn new(block: &'a str, tensor: &SavedTensor) -> Self {
        Self {
            block,
            role: tensor.name,
            bytes: tensor.bytes(),
        }
    }
}

/// Bytes of a list in the order of the forward pass: each buffer once, without parameters, and
/// without the first input where `images` says that this is data.
///
/// A buffer is listed twice in two places of the networks: the input of a residual block by its
/// first convolution and by that of its shortcut, and a block's output by itself and, as its input,
/// by the block after it.
pub fn bytes(listed: &[Kept<'_>], images: bool) -> u64 {
    let is_input = |kept: &Kept<'_>| kept.role == "input";
    let data = match images {
        true => listed.iter().position(is_input),
        false => None,
    };
    let last_input = listed.iter().rposition(is_input);
    let counts = |index: usize, kept: &Kept<'_>| match kept.role {
        "input" => Some(index) != data && !kept.block.ends_with("downsample"),
        "output" => Some(index) > last_input,
        role => !PARAMETERS.contains(&role),
    };
    let counted = listed.iter().enumerate();
    let counted = counted.filter(|(index, kept)| counts(*index, kept));
    counted.map(|(_, kept)| kept.bytes as u64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two residual blocks after a first convolution, each tensor with a bit of its own.
    const LISTED: [(&str, &str); 14] = [
        ("conv1", "input"),
        ("conv1", "weight"),
        ("conv1", "mean"),
        ("layer1.0.downsample", "input"),
        ("layer1.0.downsample", "conv_output"),
        ("layer1.0.conv1", "input"),
        ("layer1.0.conv1", "gamma"),
        ("layer1.0.conv2", "input"),
        ("layer1.0.conv2", "output"),
        ("layer1.1.conv1", "input"),
        ("layer1.1.conv1", "beta"),
        ("layer1.1.conv2", "input"),
        ("layer1.1.conv2", "bias"),
        ("layer1.1.conv2", "output"),
    ];

    fn listed() -> Vec<Kept<'static>> {
        let listed = LISTED.into_iter().enumerate();
        let kept = listed.map(|(index, (block, role))| Kept {
            block,
            role,
            bytes: 1 << index,
        });
        kept.collect()
    }

    #[test]
    fn each_buffer_counts_once() {
        let activations = [2, 4, 5, 7, 9, 11, 13].map(|index| 1u64 << index);
        assert_eq!(bytes(&listed(), true), activations.iter().sum::<u64>());
    }

    #[test]
    fn an_input_that_is_no_image_counts() {
        assert_eq!(bytes(&listed(), false), bytes(&listed(), true) + 1);
        assert_eq!(bytes(&[], true), 0);
    }
}
