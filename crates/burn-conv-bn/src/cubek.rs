//! Faults of cubek 0.3.1, whose matrix products autotuning tries for convolutions on CubeCL devices.

use burn::tensor::DType;
use burn::tensor::ops::ConvOptions;

/// Whether the matrix products for this gradient of a convolution's input are wrong: they pad the output's channels
/// to the device's loads, of `width` bytes, and read zeros there only if the *input* has another number of
/// channels.
pub(crate) fn reads_padding<const N: usize>(
    [channels_in, channels_out]: [usize; 2],
    width: usize,
    dtype: DType,
    options: &ConvOptions<N>,
) -> bool {
    let padded = channels_out.next_multiple_of((width / dtype.size()).max(1));
    let is_tried = options.groups == 1 && options.stride.iter().all(|&stride| stride == 1);
    is_tried && channels_out != padded && channels_in == padded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_that_are_padded_to_those_of_the_input() {
        let reads = |channels, dtype, stride, groups| {
            let options = ConvOptions::new([stride; 2], [1; 2], [1; 2], groups);
            // Loads of 128 bits: four values of f32, eight of f16.
            reads_padding(channels, 16, dtype, &options)
        };
        let dense = |channels, dtype| reads(channels, dtype, 1, 1);
        for channels in [[8, 7], [8, 5], [16, 14], [4, 1]] {
            assert!(dense(channels, DType::F32), "{channels:?}");
        }
        for channels in [[8, 8], [7, 8], [8, 4], [8, 3], [12, 7], [7, 7]] {
            assert!(!dense(channels, DType::F32), "{channels:?}");
        }
        assert!(dense([8, 3], DType::F16) && !dense([4, 3], DType::F16));
        // Those with a stride or groups are no such products.
        assert!(!reads([8, 7], DType::F32, 2, 1));
        assert!(!reads([8, 7], DType::F32, 1, 7));
    }
}
