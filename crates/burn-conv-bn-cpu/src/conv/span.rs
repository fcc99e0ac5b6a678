//! Outputs of one channel that follow one another, over images.

use std::ops::Range;

use crate::{Element, Geometry};

/// Output positions of every channel, counted over the images of the batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) start: usize,
    pub(crate) len: usize,
}

impl Span {
    /// The span of `len` values from `start` on in the output's tensor: of one image or, with one channel, of
    /// several.
    pub(crate) fn of_tensor(geometry: &Geometry, start: usize, len: usize) -> Self {
        let (image, within) = (start / geometry.output_len(), start % geometry.output_len());
        let positions = geometry.positions();
        Self {
            start: image * positions + within % positions,
            len,
        }
    }

    /// All output positions.
    pub(crate) fn all(geometry: &Geometry) -> Self {
        Self {
            start: 0,
            len: geometry.batch() * geometry.positions(),
        }
    }

    /// Its parts of `len` positions, and what is left.
    pub(crate) fn chunks(self, len: usize) -> impl Iterator<Item = Self> {
        let end = self.start + self.len;
        (self.start..end).step_by(len).map(move |start| Self {
            start,
            len: len.min(end - start),
        })
    }

    /// The parts in each image: the image, and the range of its positions.
    pub(crate) fn parts(self, geometry: &Geometry) -> impl Iterator<Item = (usize, Range<usize>)> {
        let (positions, end) = (geometry.positions(), self.start + self.len);
        (self.start / positions..end.div_ceil(positions)).map(move |image| {
            let first = image * positions;
            (
                image,
                self.start.max(first) - first..end.min(first + positions) - first,
            )
        })
    }

    /// The ranges of a channel's values in the output's tensor, in order.
    pub(crate) fn ranges(
        self,
        geometry: &Geometry,
        channel: usize,
    ) -> impl Iterator<Item = Range<usize>> {
        let (channels, positions) = (geometry.channels_out(), geometry.positions());
        self.parts(geometry).map(move |(image, part)| {
            let first = (image * channels + channel) * positions;
            first + part.start..first + part.end
        })
    }

    /// A channel's values in the compute type: themselves, or copied into `line`.
    pub(crate) fn read<'a, E: Element>(
        self,
        geometry: &Geometry,
        channel: usize,
        tensor: &'a [E],
        line: &'a mut Vec<E::Real>,
    ) -> &'a [E::Real] {
        let mut ranges = self.ranges(geometry, channel);
        if geometry.channels_out() == 1 {
            return E::read(&tensor[self.start..][..self.len], line);
        }
        match ranges.next() {
            Some(range) if range.len() == self.len => E::read(&tensor[range], line),
            _ => {
                line.resize(self.len, E::Real::default());
                self.load(geometry, channel, tensor, line);
                line
            }
        }
    }

    /// Copies a channel's values into `line`.
    pub(crate) fn load<E: Element>(
        self,
        geometry: &Geometry,
        channel: usize,
        tensor: &[E],
        line: &mut [E::Real],
    ) {
        let mut at = 0;
        for range in self.ranges(geometry, channel) {
            let len = range.len();
            E::load(&tensor[range], &mut line[at..][..len]);
            at += len;
        }
    }
}
