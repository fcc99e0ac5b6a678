//! What a convolution's algorithm does with a tile.

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::blocks::{Block, Share};
use crate::simd::prefetch_range;
use crate::{Element, Geometry, Real};

/// An algorithm that convolves blocks of images, tile by tile, and carries gradients back.
/// [`TileScratch::run`] calls its methods, in the only order that they are written for.
///
/// An output value's bits depend on the inputs near it, its place in the image and the weight, not
/// on its tile.
pub(crate) trait Algorithm<E: Element>: Sync {
    /// A part of a block whose planes fit the cache.
    type Tile;
    /// Buffers of one thread.
    type Scratch: Default + Send;

    fn geometry(&self) -> &Geometry;

    /// Bytes of a thread's scratch: for the output alone, or with `gradients` for the gradients too.
    fn tile_bytes(&self, gradients: bool) -> usize;

    /// Bytes of the tables that all threads share.
    fn offset_bytes(&self, gradients: bool) -> usize;

    /// The tiles of a block, in the order of the calls; with `has_halo` also, as `true`, those before a band whose
    /// outputs' gradients its input's gradient depends on.
    fn tiles(&self, block: &Block, has_halo: bool) -> Vec<(Self::Tile, bool)>;

    /// The contiguous parts of a tile.
    fn pieces<'a>(&self, tile: &'a Self::Tile) -> &'a [Piece];

    /// Copies a tile of one group from `input`, the images of a block, into scratch.
    fn load(&self, scratch: &mut Self::Scratch, input: &[E], group: usize, tile: &Self::Tile);

    /// Computes the output of the loaded tile.
    fn convolve(&self, scratch: &mut Self::Scratch, group: usize, tile: &Self::Tile);

    /// Reads one of the group's channels of one piece of the output.
    fn gather(
        &self,
        scratch: &mut Self::Scratch,
        tile: &Self::Tile,
        piece: usize,
        channel: usize,
        line: &mut [E::Real],
    );

    /// Begins a group's gradients: the next tile is the first. Makes room for
    /// [`scatter`](Self::scatter) where nothing was convolved.
    fn begin(&self, scratch: &mut Self::Scratch);

    /// Replaces a piece of the output by its gradient. Required of each piece of each channel.
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

    /// Adds a tile's share of one group's weight gradient, in the algorithm's own form.
    fn add_weight_grad(&self, scratch: &mut Self::Scratch, tile: &Self::Tile, sums: &mut [E::Real]);

    /// Overwrites `grad` with the weight's gradient, from the sums over all tiles.
    fn weight_grad(&self, sums: Vec<E::Real>, grad: &mut Vec<E::Real>);

    /// Whether [`input_grad`](Self::input_grad) reads the loaded tile.
    fn input_grad_reads_input(&self) -> bool {
        false
    }

    /// Writes what this tile completes of the input's gradient, in one group of the block's share `grad`. All of
    /// it is written after the last tile of the last group. Of a halo, without `grad`, the next tile's part is kept.
    fn input_grad(
        &self,
        scratch: &mut Self::Scratch,
        group: usize,
        tile: &Self::Tile,
        grad: Option<&mut Share<'_, MaybeUninit<E>>>,
    );
}

/// The weight of the input's gradient, with a factor for each output channel if there is one.
#[derive(Clone, Copy)]
pub(crate) struct Transposed<'a, T> {
    pub(crate) weight: &'a [T],
    pub(crate) scale: Option<&'a [T]>,
}

/// A part of a tile that is contiguous in memory in each channel: of one image or, with one channel,
/// of several.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    /// Offset of channel 0 from the block's first value.
    pub(crate) start: usize,
    pub(crate) len: usize,
}

/// What to do with a block.
pub(crate) struct Work<'a, 'b, E: Element> {
    pub(crate) block: &'a Block,
    /// The input of the block's images; required for the output, for the weight's gradient, and for the input's where
    /// [`Algorithm::input_grad_reads_input`] says so.
    pub(crate) input: Option<&'a [E]>,
    pub(crate) output: Output<'a, E>,
    /// Whether each line is replaced by its gradient, and what is made of these.
    pub(crate) grads: Option<BlockGrads<'a, 'b, E>>,
}

/// Where the output's values come from.
#[derive(Clone, Copy)]
pub(crate) enum Output<'a, E> {
    /// The input.
    Computed,
    /// A tensor of the batch; in [`Work`], of the block's images.
    Kept(&'a [E]),
    /// The room for the input's gradient, which holds the output: every value is initialized, and has the place of
    /// the input's. See [`Geometry::overwrites_output`].
    Overwritten,
}

impl<E: Element> Output<'_, E> {
    /// Copies a range of the block's output that is not computed, and asks for the next channel's, `plane` behind.
    #[allow(unsafe_code)]
    fn load(
        self,
        input_grad: Option<&mut Share<'_, MaybeUninit<E>>>,
        range: &Range<usize>,
        plane: usize,
        line: &mut [E::Real],
    ) {
        match (self, input_grad) {
            (Self::Kept(values), _) => {
                prefetch_range(values, range.start + plane..range.end + plane);
                E::load(&values[range.clone()], line);
            }
            (Self::Overwritten, Some(grad)) => {
                grad.prefetch_next(range, plane);
                let values = grad.get(range.clone()).expect("there is no halo");
                // SAFETY: `Overwritten` promises that all values are initialized.
                E::load(unsafe { values.assume_init_ref() }, line);
            }
            (Self::Overwritten, None) | (Self::Computed, _) => {
                unreachable!("computed, or overwritten by a gradient that is requested")
            }
        }
    }
}

/// Buffers for a block's requested gradients.
pub(crate) struct BlockGrads<'a, 'b, E: Element> {
    /// All groups' sums, in the algorithm's own form; added to.
    pub(crate) weight: Option<&'a mut [E::Real]>,
    /// Overwritten.
    pub(crate) input: Option<&'a mut Share<'b, MaybeUninit<E>>>,
}

/// Buffers of one thread.
#[derive(Default)]
pub(crate) struct TileScratch<S, E: Element> {
    algorithm: S,
    /// A piece of one channel's output.
    line: Vec<E::Real>,
    rounded: Vec<E>,
}

impl<S: Default, E: Element> TileScratch<S, E> {
    /// Runs an algorithm over a block.
    ///
    /// `visit` gets each piece of each channel: the channel, the range of its values in the output of the
    /// block's images, and a line. The line holds these values, rounded as they are stored. With gradients, `visit`
    /// leaves the output's gradient in the line; pieces of the halo, before the band, come too.
    pub(crate) fn run<A: Algorithm<E, Scratch = S>>(
        &mut self,
        algorithm: &A,
        work: Work<'_, '_, E>,
        mut visit: impl FnMut(usize, Range<usize>, &mut Vec<E::Real>),
    ) {
        let Work {
            block,
            input,
            output,
            mut grads,
        } = work;
        let convolves = matches!(output, Output::Computed);
        let geometry = algorithm.geometry();
        let (group_out, positions) = (geometry.group_out(), geometry.positions());
        let group_sums = algorithm.weight_grad_len() / geometry.groups();
        let has_halo = matches!(&grads, Some(BlockGrads { input: Some(_), .. }));
        let tiles = algorithm.tiles(block, has_halo);
        for group in 0..geometry.groups() {
            if grads.is_some() {
                algorithm.begin(&mut self.algorithm);
            }
            for (tile, is_halo) in &tiles {
                let is_halo = *is_halo;
                if let Some(input) = input.filter(|_| convolves || !is_halo) {
                    algorithm.load(&mut self.algorithm, input, group, tile);
                }
                if convolves {
                    algorithm.convolve(&mut self.algorithm, group, tile);
                }
                for index in 0..group_out {
                    let channel = group * group_out + index;
                    for (number, piece) in algorithm.pieces(tile).iter().enumerate() {
                        let start = channel * positions + piece.start;
                        let range = start..start + piece.len;
                        self.line.resize(piece.len, E::Real::ZERO);
                        if convolves {
                            algorithm.gather(
                                &mut self.algorithm,
                                tile,
                                number,
                                index,
                                &mut self.line,
                            );
                            E::round(&mut self.line, &mut self.rounded);
                        } else {
                            let input_grad =
                                grads.as_mut().and_then(|grads| grads.input.as_deref_mut());
                            output.load(input_grad, &range, positions, &mut self.line);
                        }
                        visit(channel, range, &mut self.line);
                        if grads.is_some() {
                            algorithm.scatter(&mut self.algorithm, tile, number, index, &self.line);
                        }
                    }
                    if grads.is_some() {
                        algorithm.seal(&mut self.algorithm, tile, index);
                    }
                }
                let Some(grads) = &mut grads else {
                    continue;
                };
                if let Some(sums) = grads.weight.as_mut().filter(|_| !is_halo) {
                    let sums = &mut sums[group * group_sums..][..group_sums];
                    algorithm.add_weight_grad(&mut self.algorithm, tile, sums);
                }
                if let Some(grad) = &mut grads.input {
                    let grad = (!is_halo).then_some(&mut **grad);
                    algorithm.input_grad(&mut self.algorithm, group, tile, grad);
                }
            }
        }
    }
}
