//! What a convolution's algorithm does with a tile.

use std::mem::MaybeUninit;

use crate::{Element, Geometry};

/// A way to convolve blocks of images, tile by tile, and to carry gradients back.
///
/// A tile goes through a thread's scratch: [`load`](Self::load) brings the input there,
/// [`convolve`](Self::convolve) makes the output, of which [`gather`](Self::gather) reads and
/// [`scatter`](Self::scatter) replaces one channel's piece at a time. From what then stands for the
/// output's gradient come the weight's and the input's.
///
/// An output value's bits depend on the inputs near it, its place in the image and the weight, not
/// on the tile it is in.
pub(crate) trait Algorithm<E: Element>: Sync {
    /// What is done at a time.
    type Tile;
    /// Buffers of one thread.
    type Scratch: Default + Send;

    fn geometry(&self) -> &Geometry;

    /// The tiles of a block of images, in the order in which they have to come.
    fn tiles(&self, images: usize) -> Vec<Self::Tile>;

    /// A tile's share of its images.
    fn pieces<'a>(&self, tile: &'a Self::Tile) -> &'a [Piece];

    /// Takes a tile of one group from `input`, a block of images.
    fn load(&self, scratch: &mut Self::Scratch, input: &[E], group: usize, tile: &Self::Tile);

    /// Makes the output of what was loaded.
    fn convolve(&self, scratch: &mut Self::Scratch, group: usize, tile: &Self::Tile);

    /// One of the group's channels of one piece, as it lies in memory.
    fn gather(
        &self,
        scratch: &mut Self::Scratch,
        tile: &Self::Tile,
        piece: usize,
        channel: usize,
        line: &mut [E::Real],
    );

    /// Begins a group's gradients: no tile precedes the next one. Makes room for
    /// [`scatter`](Self::scatter) where nothing was convolved.
    fn begin(&self, scratch: &mut Self::Scratch);

    /// Puts the output's gradient in the place of the output. Each piece of each channel has to.
    fn scatter(
        &self,
        scratch: &mut Self::Scratch,
        tile: &Self::Tile,
        piece: usize,
        channel: usize,
        line: &[E::Real],
    );

    /// Ends a channel's scattering.
    fn seal(&self, scratch: &mut Self::Scratch, tile: &Self::Tile, channel: usize);

    /// Length of all groups' [`add_weight_grad`](Self::add_weight_grad).
    fn weight_grad_len(&self) -> usize;

    /// Adds a tile's share of one group's weight gradient, in whatever form adds up.
    fn add_weight_grad(&self, scratch: &mut Self::Scratch, tile: &Self::Tile, sums: &mut [E::Real]);

    /// The weight's gradient from the sum over all tiles, in the place of what `grad` holds.
    fn weight_grad(&self, sums: Vec<E::Real>, grad: &mut Vec<E::Real>);

    /// Writes the input's gradient, of one group of the block `grad`, as far as it is complete
    /// after this tile. All of it is written once the last tile of the last group is done.
    fn input_grad(
        &self,
        scratch: &mut Self::Scratch,
        group: usize,
        tile: &Self::Tile,
        grad: &mut [MaybeUninit<E>],
    );
}

/// A share of a tile that is contiguous in memory, in each channel: of one image or, with one
/// channel, of several.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    /// Where it starts in memory, for channel 0, from the block's first image on.
    pub(crate) start: usize,
    pub(crate) len: usize,
}
