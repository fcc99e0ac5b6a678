//! Tiles of the transformed planes, and the window that slides over a block's positions.
//!
//! An image's positions are *strips* of as many pairs of rows as the dilation, one slice after the other. Behind the
//! outputs' columns, strips and slices lie those that other parts of the kernel read. The planes hold a window of
//! the block's positions, so that what the next tile reads again is not transformed again.

use std::ops::Range;

use super::transforms::{E, STEP, pairs};
use crate::Geometry;
use crate::blocks::Block;
use crate::conv::tile::Piece;

/// Parts of a kernel in each dimension.
pub(super) fn parts(geometry: &Geometry) -> [usize; 3] {
    let [depth, rows, columns] = geometry.kernel;
    [depth, (rows - 1) / 2, (columns - 1) / 2]
}

/// Products of a tile with a kernel, for one depth slice of outputs.
pub(super) fn products(geometry: &Geometry) -> usize {
    let [depth, down, across] = parts(geometry);
    depth * (1 + (E - 1) * down) * (1 + (E - 1) * across)
}

/// Extents of an image's planes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Slices and strips of the input.
    pub(super) slices: usize,
    pub(super) strips: usize,
    /// Strips of a course: large slices are taken apart, and each course goes through all slices.
    course: usize,
    /// Pairs of columns of the input.
    pub(super) columns: usize,
    /// The same of the output.
    output_slices: usize,
    output_strips: usize,
    pub(super) output_columns: usize,
    /// Positions of a strip.
    pub(super) strip: usize,
    /// Strips behind a tile's that it reads.
    behind: usize,
}

/// Strips, of one image or of several.
#[derive(Debug)]
pub(crate) struct Tile {
    pub(super) positions: usize,
    /// The first position's place in the window.
    pub(super) at: usize,
    /// Positions from the first output to the last.
    pub(super) active: Range<usize>,
    /// Whether nothing is before it in the window.
    pub(super) is_first: bool,
    /// Where the window is moved to its start, before the tile and after it.
    pub(super) before: Option<usize>,
    pub(super) after: Option<usize>,
    /// Parts that this tile loads, by their place in the window, and the end of what is loaded.
    pub(super) loads: Vec<Part>,
    pub(super) loaded: usize,
    /// The input's strips, and the output's, by their place in the tile.
    pub(super) inputs: Vec<Part>,
    pub(super) outputs: Vec<Part>,
    pub(super) pieces: Vec<Piece>,
    /// Strips between the outputs'.
    pub(super) gaps: Vec<Range<usize>>,
}

/// Strips of one slice of an image.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) image: usize,
    pub(super) slice: usize,
    pub(super) strips: Range<usize>,
    pub(super) position: usize,
}

impl Shape {
    pub(super) fn new(geometry: &Geometry) -> Self {
        let [depth, height, width] = geometry.output();
        let [inward, down, across] = geometry.dilation;
        let [slices, rows, columns] = parts(geometry).map(|parts| parts - 1);
        let (output_strips, output_columns) = (height.div_ceil(STEP * down), pairs(width, across));
        let (strips, columns) = (output_strips + rows, output_columns + columns * across);
        Self {
            slices: depth + slices * inward,
            strips,
            course: strips,
            columns,
            output_slices: depth,
            output_strips,
            output_columns,
            strip: down * columns,
            behind: slices * inward * strips + rows,
        }
    }

    /// In courses of at most `positions` of a slice, if the kernel extends over slices and over one strip of each.
    pub(super) fn in_courses(mut self, positions: usize) -> Self {
        if self.slices > self.output_slices && self.strips == self.output_strips {
            let most = (positions / self.strip).max(1);
            let course = self.strips.div_ceil(self.strips.div_ceil(most));
            self.behind = self.behind / self.course * course;
            self.course = course;
        }
        self
    }

    /// Place of what a part of the kernel reads.
    pub(super) fn offset(&self, geometry: &Geometry, [slice, row, column]: [usize; 3]) -> usize {
        let [inward, _, across] = geometry.dilation;
        (slice * inward * self.course + row) * self.strip + column * across
    }

    /// The largest [`offset`](Self::offset).
    pub(super) fn reach(&self) -> usize {
        self.kept() + self.gap()
    }

    /// Positions behind a tile's that it reads, less than a strip.
    fn gap(&self) -> usize {
        self.columns - self.output_columns
    }

    /// The same in whole strips.
    pub(super) fn kept(&self) -> usize {
        self.behind * self.strip
    }

    /// Strips of a course of some images.
    fn all(&self, images: usize) -> usize {
        images * self.slices * self.course
    }

    /// Whether a strip is the first of a course, behind another one.
    pub(super) fn follows_course(&self, strip: usize) -> bool {
        strip > 0 && strip < self.strips && strip.is_multiple_of(self.course)
    }

    /// Whether there are several courses.
    pub(super) fn has_courses(&self) -> bool {
        self.course < self.strips
    }

    /// Strips of a block's courses, from the first of its images on.
    pub(super) fn of(&self, geometry: &Geometry, block: &Block) -> Range<usize> {
        let Some(band) = &block.band else {
            let images = block.images.len();
            return 0..self.all(if self.has_courses() { 1 } else { images });
        };
        let (strips, lines) = match geometry.outermost() {
            0 => (self.course, 1),
            _ => (1, STEP * geometry.dilation[1]),
        };
        let end = if band.lines.end == geometry.output[geometry.outermost()] {
            self.all(1)
        } else {
            band.lines.end / lines * strips
        };
        band.lines.start / lines * strips..end
    }

    /// Tiles of a block, and as `true` those of a halo, by their most strips and those that the window has room for
    /// beside what is behind them.
    pub(super) fn tiles(
        &self,
        geometry: &Geometry,
        block: &Block,
        has_halo: bool,
        sizes: (usize, usize),
    ) -> Vec<(Tile, bool)> {
        let strips = self.of(geometry, block);
        let images = block.images.len();
        let (windows, images) = match self.has_courses() {
            true => (images, 1),
            false => (1, images),
        };
        let mut tiles = Vec::new();
        for image in 0..windows {
            for course in 0..self.strips.div_ceil(self.course) {
                let first = Part {
                    image,
                    slice: 0,
                    strips: course * self.course..0,
                    position: 0,
                };
                let cut = |strips| self.cut(geometry, &first, (images, strips), sizes);
                let halo = has_halo.then(|| cut(self.halo(strips.start)));
                let halo = halo.unwrap_or_default();
                let mut own = cut(strips.clone());
                own[0].is_first = halo.is_empty();
                tiles.extend(halo.into_iter().map(|tile| (tile, true)));
                tiles.extend(own.into_iter().map(|tile| (tile, false)));
            }
        }
        tiles
    }

    /// Tiles of some strips of a course, of images that begin at `origin`.
    fn cut(
        &self,
        geometry: &Geometry,
        origin: &Part,
        (images, strips): (usize, Range<usize>),
        (most, room): (usize, usize),
    ) -> Vec<Tile> {
        let step = strips.len().div_ceil(strips.len().div_ceil(most).max(1));
        let mut tiles = Vec::new();
        let (mut at, mut loaded, mut before) = (0, strips.start, None);
        for start in strips.clone().step_by(step.max(1)) {
            let own = start..(start + step).min(strips.end);
            let place = |strip: usize| (at + strip - start) * self.strip;
            let end = (own.end + self.behind).min(self.all(images)).max(loaded);
            let loads = (loaded..end).step_by(most).flat_map(|first| {
                let some = first..(first + most).min(end);
                self.parts(origin, some, place(first))
            });
            let next = at + own.len();
            let is_full = next + step > room || own.end == strips.end;
            let mut tile = Tile {
                positions: own.len() * self.strip,
                at: place(start),
                is_first: start == strips.start,
                before,
                after: is_full.then_some(next * self.strip),
                loads: loads.collect(),
                loaded: place(end),
                inputs: self.parts(origin, own, 0).collect(),
                active: 0..0,
                outputs: Vec::new(),
                pieces: Vec::new(),
                gaps: Vec::new(),
            };
            self.add_outputs(geometry, &mut tile);
            (at, before) = (if is_full { 0 } else { next }, tile.after);
            loaded = end;
            tiles.push(tile);
        }
        tiles
    }

    /// The strips before a band whose outputs' gradients its input's gradient depends on.
    fn halo(&self, start: usize) -> Range<usize> {
        let count = self.behind + 1 + usize::from(self.gap() > 0);
        start.saturating_sub(count)..start
    }

    /// Some strips by slices, with their places from `position` on.
    fn parts(
        &self,
        origin: &Part,
        strips: Range<usize>,
        position: usize,
    ) -> impl Iterator<Item = Part> + use<> {
        let Self { slices, strip, .. } = *self;
        let (each, end) = (self.course, strips.end);
        let (image, course) = (origin.image, origin.strips.start);
        (strips.start / each..end.div_ceil(each)).map(move |index| {
            let first = index * each;
            let within = strips.start.max(first)..end.min(first + each);
            Part {
                image: image + index / slices,
                slice: index % slices,
                position: position + (within.start - strips.start) * strip,
                strips: course + within.start - first..course + within.end - first,
            }
        })
    }

    /// Finds a tile's output strips, and the gaps between them.
    fn add_outputs(&self, geometry: &Geometry, tile: &mut Tile) {
        let [_, height, width] = geometry.output();
        let lines_of_strip = STEP * geometry.dilation[1];
        // A last course may have fewer strips.
        for part in &mut tile.inputs {
            part.strips.end = part.strips.end.min(self.strips);
        }
        tile.inputs.retain(|part| !part.strips.is_empty());
        let mut end = 0;
        for part in &tile.inputs {
            let strips = part.strips.start..part.strips.end.min(self.output_strips);
            if part.slice >= self.output_slices || strips.is_empty() {
                continue;
            }
            let lines = lines_of_strip * strips.start..(lines_of_strip * strips.end).min(height);
            let slice = part.image * geometry.output_len() + part.slice * height * width;
            tile.pieces.push(Piece {
                start: slice + lines.start * width,
                len: lines.len() * width,
            });
            tile.gaps.push(end..part.position);
            end = part.position + strips.len() * self.strip;
            tile.outputs.push(Part {
                strips,
                ..part.clone()
            });
        }
        tile.gaps.push(end..tile.positions);
        tile.gaps.retain(|gap| !gap.is_empty());
        if let Some(first) = tile.outputs.first() {
            tile.active = first.position..end - self.gap();
        }
    }
}

/// Whether there are enough fewer products than in a direct sum to outweigh the transforms. Some positions are no
/// outputs, and with dilation some pairs of rows or columns lack the second: few in a large image.
pub(crate) fn saves_products(geometry: &Geometry) -> bool {
    let shape = Shape::new(geometry);
    let gaps = shape.kept() + shape.gap();
    let positions = shape.all(1) * shape.strip - gaps;
    let direct = geometry.positions() * geometry.kernel.iter().product::<usize>();
    let is_plain = geometry.kernel == [1, 3, 3] && geometry.dilation[1..] == [1, 1];
    is_plain || 4 * products(geometry) * positions <= 3 * direct
}
