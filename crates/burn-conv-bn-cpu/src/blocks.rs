//! Blocks of images: the unit of parallel work, and the order of sums over images.

use std::ops::Range;

use crate::Geometry;

/// Most blocks of a batch: enough for the threads of large machines.
pub(crate) const BLOCKS: usize = 64;

/// Output positions that make a block worth its overhead.
const FILLED_POSITIONS: usize = 512;

/// Fewest blocks that small images are merged into: more would keep more threads busy, but each block
/// reads the weights once.
const LEAST_BLOCKS: usize = 2;

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

    /// The images of each block, of `images` each but the last.
    pub(crate) fn blocks(&self, images: usize) -> Vec<Range<usize>> {
        (0..self.batch())
            .step_by(images)
            .map(|start| start..(start + images).min(self.batch()))
            .collect()
    }
}

/// Each block's share of a buffer, if there is one: `len` values, but for the last.
pub(crate) fn split<T>(all: Option<&mut [T]>, len: usize, blocks: usize) -> Vec<Option<&mut [T]>> {
    match all {
        Some(all) => all.chunks_mut(len).map(Some).collect(),
        None => (0..blocks).map(|_| None).collect(),
    }
}
