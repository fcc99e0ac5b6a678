//! What the driver by channels, `norm/channels.rs`, needs of an algorithm.

use super::span::Span;
use crate::scratch::Aligned;
use crate::simd::planes::plane_len;
use crate::{Element, Geometry, Real};

/// An algorithm whose threads divide the channels and not the images.
///
/// An output value's bits depend on the inputs near it, its place in the image and the weight, not on its chunk.
pub(crate) trait ByChannels<E: Element>: Sync {
    /// Buffers that the threads share, and those of each.
    type Scratch: Default;

    fn geometry(&self) -> &Geometry;

    /// The chunks of a span of whole images.
    fn chunks(&self, span: Span) -> Vec<Span>;

    /// The blocks of images whose gradients are made at once.
    fn blocks(&self) -> Vec<Span>;

    /// Computes a chunk of the output, into the columns of `rows` from `column` on.
    fn convolve(
        &self,
        scratch: &mut Self::Scratch,
        input: &[E],
        weight: &[E::Real],
        chunk: Span,
        rows: &mut Rows<E::Real>,
        column: usize,
    );

    /// Adds a chunk's share of the weight's gradient, with the output's gradient in the columns of `rows` from
    /// `column` on.
    fn add_weight_grad(
        &self,
        scratch: &mut Self::Scratch,
        input: &[E],
        chunk: Span,
        rows: &Rows<E::Real>,
        column: usize,
        grad: &mut [E::Real],
    );

    /// Computes the input's gradient of a block of images: a row of whole images for each channel.
    ///
    /// `rows` has the output's gradient. If there is a `scale`, each channel of it is multiplied by its own.
    fn input_grad(
        &self,
        scratch: &mut Self::Scratch,
        weight: &[E::Real],
        scale: Option<&[E::Real]>,
        block: Span,
        rows: &Rows<E::Real>,
        grad: &mut Vec<E::Real>,
    );
}

/// A row for each channel.
#[derive(Debug, Default)]
pub(crate) struct Rows<T> {
    pub(crate) values: Aligned<T>,
    pub(crate) pitch: usize,
}

impl<T: Real> Rows<T> {
    /// Makes room for `channels` rows of `len` values, each up to whole vectors.
    pub(crate) fn resize(&mut self, channels: usize, len: usize) {
        self.pitch = plane_len(len);
        self.values.resize(Self::room(channels, len), T::ZERO);
    }

    /// Values of `channels` rows of `len`.
    pub(crate) fn room(channels: usize, len: usize) -> usize {
        channels * plane_len(len)
    }

    /// The rows of `channels`.
    pub(crate) fn of(&mut self, channels: usize) -> &mut [T] {
        &mut self.values[..channels * self.pitch]
    }
}
