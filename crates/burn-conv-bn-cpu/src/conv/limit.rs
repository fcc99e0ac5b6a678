//! Bytes of scratch: what an algorithm takes, and what it may.
//!
//! A layer must not need more than Burn's own. In a training step that copies weight and input to another order, and
//! the gradients of both and of the output. In evaluation it copies weight and input alone, and for pointwise and
//! depthwise kernels, and unpadded ones over one dimension, nothing.

use super::tile::Algorithm;
use super::winograd::{Slices, transformed_len};
use crate::blocks::BLOCKS;
use crate::{Element, Geometry};

/// Bytes that are always granted, less than the 2 MiB by which a layer may exceed Burn's: a few go to values of
/// the channels, and to lists of the work.
const GRANTED: usize = 1792 << 10;

/// Threads whose tiles are counted. Not the machine's, or its threads would choose the order of sums.
const THREADS: usize = 2;

/// Fewest taps, and output channels of a group, for which packed products are as fast as sums of planes.
const LEAST_TAPS: usize = 64;
const LEAST_CHANNELS: usize = 64;

/// Activations of a single image, in weights, below which packed products are faster on two threads and more.
const ALONE: usize = 4;

/// Bytes of one channel's moments in one block.
const MOMENTS_BYTES: usize = 24;

/// Fewest tiles, of all images, for which the transforms of the weight pay.
const LEAST_TILES: usize = 24;

/// Any number of channels.
const ALL: usize = usize::MAX >> 1;

/// Tiles of a chunk of slices, and channels whose tiles are transformed at a time, from the fastest on: first one image of
/// 28x28 or four of 14x14.
const SLICES: [(usize, usize); 6] = [
    (196, ALL),
    (128, ALL),
    (128, 256),
    (64, ALL),
    (64, 256),
    (32, 256),
];

/// Most bytes of all blocks' weight gradients.
const WEIGHT_BYTES: usize = 16 << 20;

/// Fewest blocks with a weight gradient each: fewer leave threads idle.
const LEAST_BLOCKS: usize = 2;

/// Bytes of the activations and the weight of a step.
struct Bytes {
    input: usize,
    output: usize,
    weight: usize,
}

impl Bytes {
    fn new<E: Element>(geometry: &Geometry) -> Self {
        let activation = geometry.batch() * size_of::<E>();
        Self {
            input: activation * geometry.input_len(),
            output: activation * geometry.output_len(),
            weight: geometry.weight_len() * size_of::<E::Real>(),
        }
    }
}

/// Most bytes of scratch of the output.
fn forward_limit<E: Element>(geometry: &Geometry) -> usize {
    let bytes = Bytes::new::<E>(geometry);
    let is_unpadded = geometry.padding == [(0, 0); 3];
    let is_pointwise = geometry.kernel == [1; 3] && geometry.stride == [1; 3] && is_unpadded;
    let is_depthwise = geometry.group_in() == 1;
    let is_flat = geometry.input[..2] == [1; 2] && is_unpadded;
    let is_in_place = is_pointwise || is_depthwise || is_flat;
    let copied = match (geometry.has_given_statistics, is_in_place) {
        (true, true) => 0,
        (true, false) => bytes.input + bytes.weight,
        (false, _) => bytes.weight + 2 * bytes.input + bytes.output,
    };
    (GRANTED + copied).min(geometry.max_scratch)
}

/// Most bytes of scratch of the gradients, beside a stored output.
fn backward_limit<E: Element>(geometry: &Geometry) -> usize {
    let bytes = Bytes::new::<E>(geometry);
    (GRANTED + 2 * bytes.input + bytes.output).min(geometry.max_scratch)
}

/// Bytes of a weight's gradient in an algorithm's form, with the input's own products where these are summed too.
fn filter_bytes<E: Element, A: Algorithm<E>>(algorithm: &A) -> usize {
    algorithm.weight_grad_len() * size_of::<E::Real>()
}

/// Number of transformed weights that the gradients hold beside their sums: the transposed weight, and without a
/// stored output the forward one.
fn filters<E: Element>(geometry: &Geometry) -> usize {
    let output = Bytes::new::<E>(geometry).output;
    if geometry.is_worth_storing(output) && output <= geometry.max_scratch {
        1
    } else {
        2
    }
}

/// Bytes that the gradients take beside the sums of the weight's.
fn backward_bytes<E: Element, A: Algorithm<E>>(algorithm: &A) -> usize {
    filters::<E>(algorithm.geometry()) * filter_bytes::<E, A>(algorithm)
        + THREADS * algorithm.tile_bytes(true)
        + algorithm.offset_bytes(true)
        + share_bytes(algorithm.geometry())
}

/// Bytes of the lists of bands' channels, of input, output and residual.
fn share_bytes(geometry: &Geometry) -> usize {
    let blocks = geometry.blocks(BLOCKS).len();
    if blocks <= geometry.batch() {
        return 0;
    }
    let channels = geometry.channels[0] + 2 * geometry.channels_out();
    blocks * channels * size_of::<&mut [u8]>()
}

/// Whether an algorithm fits the limits of its geometry, with two blocks' sums of the weight's gradient.
pub(super) fn fits<E: Element, A: Algorithm<E>>(algorithm: &A) -> bool {
    let geometry = algorithm.geometry();
    let filter = filter_bytes::<E, A>(algorithm);
    let blocks = geometry.blocks(BLOCKS).len();
    let moments = blocks * geometry.channels_out() * MOMENTS_BYTES + share_bytes(geometry);
    let tiles = THREADS * algorithm.tile_bytes(false);
    let forward = filter + tiles + algorithm.offset_bytes(false) + moments;
    let backward = backward_bytes::<E, A>(algorithm) + LEAST_BLOCKS * filter;
    forward <= forward_limit::<E>(geometry) && backward <= backward_limit::<E>(geometry)
}

/// Whether threads are better divided by channels: an image is alone, smaller than a few weights, and has products
/// enough for all.
pub(super) fn is_alone(geometry: &Geometry) -> bool {
    geometry.batch() == 1
        && is_deep(geometry, ALONE)
        && geometry.depth() >= LEAST_TAPS
        && geometry.group_out() >= LEAST_CHANNELS
}

/// Whether the activations have fewer values than `weights` weights.
pub(super) fn is_deep(geometry: &Geometry, weights: usize) -> bool {
    let activations = geometry.batch() * (geometry.input_len() + geometry.output_len());
    activations < weights * geometry.weight_len()
}

/// Blocks of images of the weight's gradient, for an algorithm that fits: as many as have room for their sums.
pub(crate) fn weight_blocks<E: Element, A: Algorithm<E>>(algorithm: &A) -> usize {
    let limit = backward_limit::<E>(algorithm.geometry());
    let room = limit
        .saturating_sub(backward_bytes::<E, A>(algorithm))
        .min(WEIGHT_BYTES);
    (room / filter_bytes::<E, A>(algorithm)).clamp(LEAST_BLOCKS, BLOCKS)
}

/// Bytes of a thread's tile that the limits of a geometry leave to Winograd's algorithm.
pub(super) fn winograd_tile<E: Element>(geometry: &Geometry) -> usize {
    let filter = transformed_len(geometry) * size_of::<E::Real>();
    // A tile has three planes for each product: forward uses two of them.
    let forward = forward_limit::<E>(geometry).saturating_sub(filter) / 2 * 3;
    let filters = (filters::<E>(geometry) + LEAST_BLOCKS) * filter;
    let backward = backward_limit::<E>(geometry).saturating_sub(filters);
    // Planes are rounded up to cache lines.
    forward.min(backward) / THREADS / 6 * 5
}

/// Whether there are enough tiles for Winograd's algorithm by slices to be faster than packed products.
pub(super) fn has_tiles(geometry: &Geometry) -> bool {
    let [_, rows, columns] = geometry.output().map(|len| len.div_ceil(2));
    geometry.positions() > 1 && geometry.batch() * rows * columns >= LEAST_TILES
}

/// Winograd's algorithm by slices, with the largest parts that fit.
pub(super) fn slices<E: Element>(geometry: &Geometry) -> Option<Slices<'_>> {
    let fitting = |(tiles, channels)| {
        let slices = Slices::new(geometry, tiles, channels);
        let bytes = |gradients| slices.bytes(size_of::<E::Real>(), THREADS, gradients);
        let fits = bytes(false) <= forward_limit::<E>(geometry)
            && bytes(true) <= backward_limit::<E>(geometry);
        fits.then_some(slices)
    };
    SLICES.into_iter().find_map(fitting)
}
