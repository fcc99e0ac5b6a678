//! Blocks of images, or bands of one: the unit of parallel work, and the order of sums.

use std::mem::take;
use std::ops::Range;

use crate::Geometry;
use crate::simd::prefetch_range;

/// Most blocks of a batch: enough for the threads of large machines.
pub(crate) const BLOCKS: usize = 64;

/// Output positions that make a block worth its overhead.
const FILLED_POSITIONS: usize = 512;

/// Fewest blocks that small images are merged into: more would keep more threads busy, but each block
/// reads the weights once.
const LEAST_BLOCKS: usize = 2;

/// Most images that are divided into bands, and most blocks of these: each has a sum of the weight's gradient.
const FEW_IMAGES: usize = 7;
const BANDS: usize = 16;

/// Values of a band's input and output for each of the weight's, whose gradient is summed for each band.
const BAND_WEIGHTS: usize = 4;

/// Extent of a band, in reaches of the kernel: as much of the band before is computed again.
const BAND_REACHES: usize = 4;

/// Images of the batch, or a band of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) images: Range<usize>,
    pub(crate) band: Option<Band>,
}

/// A part of an image along the outermost dimension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Band {
    /// Slices, rows or columns of the output: before the band a multiple of twice the dilation.
    pub(crate) lines: Range<usize>,
    /// Positions of each channel of the output.
    pub(crate) outputs: Range<usize>,
    /// Positions of each channel of the input whose gradient the band completes.
    pub(crate) inputs: Range<usize>,
}

impl Geometry {
    /// Images of each of at most `most` blocks. A function of the geometry alone: results do not depend on
    /// the number of threads.
    ///
    /// Small images are merged until they fill a tile, as long as [`LEAST_BLOCKS`] remain.
    pub(crate) fn images_per_block(&self, most: usize) -> usize {
        let filling = FILLED_POSITIONS
            .div_ceil(self.positions())
            .min(self.batch().div_ceil(LEAST_BLOCKS));
        // A power of two of blocks: equal work for two threads, or four.
        let blocks = self.batch().div_ceil(filling).next_power_of_two().min(most);
        self.batch().div_ceil(blocks)
    }

    /// At most `most` blocks: some images each or, where large images are few, bands. A function of the geometry alone.
    pub(crate) fn blocks(&self, most: usize) -> Vec<Block> {
        let step = self.images_per_block(most);
        let images = (0..self.batch())
            .step_by(step)
            .map(|start| start..(start + step).min(self.batch()));
        let bands = match step {
            1 if self.batch() <= FEW_IMAGES => self.bands(most / self.batch()),
            _ => vec![None],
        };
        images
            .flat_map(|images| {
                bands.iter().map(move |band| Block {
                    images: images.clone(),
                    band: band.clone(),
                })
            })
            .collect()
    }

    /// At most `most` bands of an image, or the image.
    fn bands(&self, most: usize) -> Vec<Option<Band>> {
        let dim = self.outermost();
        let extent = self.output[dim];
        let reach = (self.kernel[dim] - 1) * self.dilation[dim] / self.stride[dim];
        let values = self.input_len() + self.output_len();
        let count = (BANDS / self.batch())
            .min(most)
            .min(extent / (BAND_REACHES * reach).max(2))
            .min(values / (BAND_WEIGHTS * self.weight_len()))
            // An image of twice as many may lie without gaps, as a whole.
            .min((self.positions() - 1) / FILLED_POSITIONS);
        if count < 2 {
            return vec![None];
        }
        let step = extent
            .div_ceil(1 << count.ilog2())
            .next_multiple_of(2 * self.dilation[dim]);
        let output: usize = self.output[dim + 1..].iter().product();
        let input: usize = self.input[dim + 1..].iter().product();
        let inputs = |line: usize| match line {
            0 => 0,
            _ if line == extent => self.input[dim],
            _ => (line * self.stride[dim])
                .saturating_sub(self.padding[dim].0)
                .min(self.input[dim]),
        };
        (0..extent)
            .step_by(step)
            .map(|start| {
                let lines = start..(start + step).min(extent);
                Some(Band {
                    outputs: lines.start * output..lines.end * output,
                    inputs: inputs(lines.start) * input..inputs(lines.end) * input,
                    lines,
                })
            })
            .collect()
    }

    /// Whether the input's gradient may be written over the output, block by block.
    ///
    /// Input and output have the same shape, and a gradient's place is never behind the outputs that it is made of: what
    /// is overwritten has been read. A band reads outputs of the band before.
    pub(crate) fn overwrites_output(&self) -> bool {
        self.group_in() == self.group_out()
            && self.input == self.output
            && self.stride == [1; 3]
            && self.blocks(BLOCKS).iter().all(|block| block.band.is_none())
    }

    /// The first dimension that the convolution extends over.
    pub(crate) fn outermost(&self) -> usize {
        let is_flat = |dim: usize| self.input[dim] * self.kernel[dim] * self.output[dim] == 1;
        (0..2).find(|dim| !is_flat(*dim)).unwrap_or(2)
    }
}

/// A block's share of a tensor: all of some images or, of a band, a part of each channel.
#[derive(Debug)]
pub(crate) struct Share<'a, T> {
    parts: Vec<&'a mut [T]>,
    /// Values of a channel.
    plane: usize,
    /// The first of these in each part.
    first: usize,
}

impl<'a, T> Share<'a, T> {
    /// Some images as a whole.
    pub(crate) fn whole(images: &'a mut [T]) -> Self {
        Self {
            parts: vec![images],
            plane: usize::MAX,
            first: 0,
        }
    }

    /// A range of one channel's values, counted from the first of the block's images; none if it is before the band.
    pub(crate) fn get(&mut self, range: Range<usize>) -> Option<&mut [T]> {
        let (channel, at) = (range.start / self.plane, range.start % self.plane);
        let at = at.checked_sub(self.first)?;
        Some(&mut self.parts[channel][at..at + range.len()])
    }

    /// Asks for a channel's values that follow a range of the one before, in an image of `plane` values a channel.
    pub(crate) fn prefetch_next(&self, range: &Range<usize>, plane: usize) {
        if let [image] = &self.parts[..] {
            prefetch_range(image, range.start + plane..range.end + plane);
        }
    }

    /// The values of a channel that starts at `start`, from the block's first on, and the place of that.
    pub(crate) fn channel(&mut self, start: usize) -> (&mut [T], usize) {
        let (channel, at) = (start / self.plane, start % self.plane);
        (&mut self.parts[channel][at..], self.first)
    }

    pub(crate) fn fill(&mut self, value: T)
    where
        T: Copy,
    {
        self.parts.iter_mut().for_each(|part| part.fill(value));
    }
}

/// Each block's share of a tensor. An image has `planes` planes of `plane` values; `range` returns a band's part of a
/// plane.
pub(crate) fn shares<'a, T>(
    mut tensor: &'a mut [T],
    blocks: &[Block],
    [planes, plane]: [usize; 2],
    range: impl Fn(&Band) -> Range<usize>,
) -> Vec<Share<'a, T>> {
    let mut rests: Vec<&mut [T]> = Vec::new();
    let mut split = |images: usize| {
        tensor
            .split_off_mut(..images * planes * plane)
            .expect("the blocks are those of the tensor")
    };
    let mut shares = Vec::with_capacity(blocks.len());
    for block in blocks {
        let Some(band) = &block.band else {
            shares.push(Share::whole(split(block.images.len())));
            continue;
        };
        if band.lines.start == 0 {
            rests = split(1).chunks_exact_mut(plane).collect();
        }
        let range = range(band);
        let parts = rests.iter_mut().map(|rest| {
            let (part, behind) = take(rest).split_at_mut(range.len());
            *rest = behind;
            part
        });
        shares.push(Share {
            parts: parts.collect(),
            plane,
            first: range.start,
        });
    }
    shares
}

/// Each block's share of a buffer, if there is one: `len` values, but for the last.
pub(crate) fn split<T>(all: Option<&mut [T]>, len: usize, blocks: usize) -> Vec<Option<&mut [T]>> {
    match all {
        Some(all) => all.chunks_mut(len).map(Some).collect(),
        None => (0..blocks).map(|_| None).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn square(batch: usize, channels: usize, size: usize) -> Geometry {
        let padding = [(0, 0), (1, 1), (1, 1)];
        let channels = [channels; 2];
        Geometry::new(
            batch,
            channels,
            1,
            [1, size, size],
            [1, 3, 3],
            [1; 3],
            padding,
            [1; 3],
        )
        .unwrap()
    }

    #[test]
    fn few_large_images_are_divided() {
        let blocks = |batch, channels, size| square(batch, channels, size).blocks(BLOCKS).len();
        assert_eq!(blocks(1, 64, 256), 16);
        assert_eq!(blocks(3, 64, 256), 3 * 4);
        assert_eq!(blocks(8, 64, 256), 8);
        // Few positions, or few values for the weight.
        assert_eq!(blocks(1, 8, 32), 1);
        assert_eq!(blocks(1, 512, 56), 1);
        // As many weight gradients as there is room for.
        assert_eq!(square(1, 64, 256).blocks(5).len(), 4);
    }

    #[test]
    fn bands_make_an_image() {
        for (padding, dilation) in [(0, 1), (1, 2), (40, 5)] {
            let rows = (padding, padding);
            let geometry = Geometry::new(
                2,
                [3, 4],
                1,
                [1, 200, 50],
                [1, 3, 1],
                [1, 3, 1],
                [(0, 0), rows, (0, 0)],
                [1, dilation, 1],
            )
            .unwrap();
            let [mut outputs, mut inputs] = [0, 0];
            let blocks = geometry.blocks(BLOCKS);
            assert!(blocks.len() > 2);
            for band in blocks
                .iter()
                .take(blocks.len() / 2)
                .flat_map(|block| &block.band)
            {
                assert_eq!([band.outputs.start, band.inputs.start], [outputs, inputs]);
                assert!(band.lines.start.is_multiple_of(2 * dilation));
                [outputs, inputs] = [band.outputs.end, band.inputs.end];
            }
            assert_eq!([outputs, inputs], [geometry.positions(), 200 * 50]);
        }
    }

    #[test]
    fn shares_are_parts_of_each_channel() {
        let geometry = square(2, 4, 64);
        let blocks = geometry.blocks(BLOCKS);
        let plane = geometry.positions();
        let mut tensor: Vec<usize> = (0..2 * 4 * plane).collect();
        let all = shares(&mut tensor, &blocks, [4, plane], |band| {
            band.outputs.clone()
        });
        for (block, mut share) in blocks.iter().zip(all) {
            let outputs = &block.band.as_ref().expect("two large images").outputs;
            let first = block.images.start * 4 * plane;
            for channel in 0..4 {
                let start = channel * plane + outputs.start;
                let part = share.get(start..start + outputs.len()).unwrap();
                assert!(
                    part.iter()
                        .copied()
                        .eq(first + start..first + start + outputs.len())
                );
                if outputs.start > 0 {
                    assert!(share.get(start - 1..start).is_none());
                }
                let (part, at) = share.channel(channel * plane);
                assert_eq!((part[0], at), (first + start, outputs.start));
            }
        }
    }
}
