//! Drawn digits in the manner of MNIST, for machines that do not have MNIST.
//!
//! Only exactly rounded arithmetic is used (no `sin`, no `exp`), so a seed
//! gives the same bytes on every platform.

use std::sync::LazyLock;

use chacha20::ChaCha8Rng;
use chacha20::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;

use super::idx::{CLASSES, Digits, PIXELS, SIDE};

/// Points of a pen stroke.
type Stroke = Vec<[f32; 2]>;

/// The ways to write each digit, indexed by class, and of each its strokes.
static GLYPHS: LazyLock<Vec<Vec<Vec<Stroke>>>> = LazyLock::new(|| {
    let mut table: toml::Table =
        toml::from_str(include_str!("synthetic/glyphs.toml")).expect("the file is TOML");
    let digits = table.remove("digits").expect("the file has digits");
    digits.try_into().expect("strokes are lists of points")
});

/// Draws `count` digits of uniformly random classes.
///
/// Digit `i` depends on `seed` and `i` alone: the first digits of a larger set are the smaller set. The
/// work is spread over rayon's threads; a digit takes [`PIXELS`] + 1 bytes of memory.
pub fn generate(count: usize, seed: u64) -> Digits {
    let mut images = vec![0_u8; count * PIXELS];
    let mut labels = vec![0_u8; count];
    let (pictures, _) = images.as_chunks_mut::<PIXELS>();
    let digits = pictures.par_iter_mut().zip(&mut labels).enumerate();
    digits.for_each(|(index, (picture, label))| {
        *label = draw(picture, &mut Dice::new(seed, index));
    });
    Digits::from_parts(images, labels)
}

/// Draws one digit on a black image and returns its class.
fn draw(image: &mut [u8; PIXELS], dice: &mut Dice) -> u8 {
    let class = dice.below(CLASSES);
    let styles = &GLYPHS[class];
    let glyph = &styles[dice.below(styles.len())];

    let hand = Hand::new(dice);
    let mut lines: Vec<Vec<Dot>> = glyph
        .iter()
        .map(|stroke| hand.write(stroke, dice))
        .collect();
    fit(&mut lines, hand.radius, dice);
    ink(image, &lines, dice);
    class as u8
}

/// Random numbers of one digit.
struct Dice(ChaCha8Rng);

impl Dice {
    fn new(seed: u64, index: usize) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(index as u64);
        Self(rng)
    }

    /// Uniform in `0..bound`, up to a bias of `bound` / 2^32.
    fn below(&mut self, bound: usize) -> usize {
        ((u64::from(self.0.next_u32()) * bound as u64) >> 32) as usize
    }

    /// Uniform in `low..high`.
    fn between(&mut self, low: f32, high: f32) -> f32 {
        let unit = (self.0.next_u32() >> 8) as f32 / (1 << 24) as f32;
        low + (high - low) * unit
    }

    /// Bell-shaped around zero: four uniform numbers summed to the given deviation.
    fn bell(&mut self, deviation: f32) -> f32 {
        let sum: f32 = (0..4).map(|_| self.between(-1.0, 1.0)).sum();
        // A uniform number in -1..1 has the variance 1/3.
        sum * deviation * 0.866
    }
}

/// A point of the pen's path with half the pen's width there.
#[derive(Clone, Copy)]
struct Dot {
    x: f32,
    y: f32,
    radius: f32,
}

/// How a digit is written, in units of the digit's height and around its middle.
struct Hand {
    /// Rows of the linear map that scales, slants and turns.
    linear: [[f32; 2]; 2],
    /// Bend of `x` and `y` by `[x², x y, y²]`.
    bend: [[f32; 3]; 2],
    /// Deviation of the points of a stroke.
    jitter: f32,
    /// Half the pen's width, in pixels.
    radius: f32,
}

impl Hand {
    fn new(dice: &mut Dice) -> Self {
        let width = dice.between(0.75, 1.25);
        let slant = dice.bell(0.19) - 0.10;
        // The tangent of half the angle gives its sine and cosine by divisions alone.
        let tangent = dice.between(-0.10, 0.10);
        let (sine, cosine) = {
            let square = tangent * tangent;
            (
                2.0 * tangent / (1.0 + square),
                (1.0 - square) / (1.0 + square),
            )
        };
        Self {
            linear: [
                [cosine * width, cosine * slant - sine],
                [sine * width, sine * slant + cosine],
            ],
            bend: [(); 2].map(|()| [(); 3].map(|()| dice.bell(0.12))),
            jitter: dice.between(0.012, 0.040),
            radius: dice.between(0.60, 1.40) + dice.between(0.0, 0.60),
        }
    }

    /// The pen's path along a stroke, not yet scaled to the image.
    fn write(&self, stroke: &[[f32; 2]], dice: &mut Dice) -> Vec<Dot> {
        let mut points: Vec<[f32; 2]> = Vec::with_capacity(stroke.len());
        for (i, &point) in stroke.iter().enumerate() {
            let placed = match points.last() {
                // Both points of a corner move together.
                Some(&last) if stroke[i - 1] == point => last,
                _ => self.place(point, dice),
            };
            points.push(placed);
        }
        if let [first, second, .., before, last] = points.as_mut_slice() {
            overshoot(first, *second, dice);
            overshoot(last, *before, dice);
        }

        let (start, end) = (self.press(dice), self.press(dice));
        let path = smooth(&points);
        let steps = path.len() as f32;
        path.into_iter()
            .enumerate()
            .map(|(i, [x, y])| Dot {
                x,
                y,
                radius: start + (end - start) * i as f32 / steps,
            })
            .collect()
    }

    fn place(&self, [x, y]: [f32; 2], dice: &mut Dice) -> [f32; 2] {
        let (x, y) = (
            x - 0.5 + dice.bell(self.jitter),
            y - 0.5 + dice.bell(self.jitter),
        );
        let [u, v] = [0, 1].map(|axis| {
            let [xx, xy, yy] = self.bend[axis];
            [x, y][axis] + xx * x * x + xy * x * y + yy * y * y
        });
        self.linear.map(|[a, b]| a * u + b * v)
    }

    fn press(&self, dice: &mut Dice) -> f32 {
        self.radius * dice.between(0.85, 1.15)
    }
}

/// Lengthens or shortens a stroke at its end.
fn overshoot(end: &mut [f32; 2], next: [f32; 2], dice: &mut Dice) {
    let by = dice.between(-0.15, 0.20);
    for (end, next) in end.iter_mut().zip(next) {
        *end += (*end - next) * by;
    }
}

/// A Catmull-Rom curve through the points, sampled at less than a pixel's distance or so.
fn smooth(points: &[[f32; 2]]) -> Vec<[f32; 2]> {
    const STEPS: usize = 6;

    let mut path = Vec::with_capacity(points.len() * STEPS + 1);
    let last = points.len() - 1;
    for i in 0..last {
        let [a, b, c, d] = [i.saturating_sub(1), i, i + 1, (i + 2).min(last)].map(|i| points[i]);
        if b == c {
            continue;
        }
        for step in 0..STEPS {
            let t = step as f32 / STEPS as f32;
            path.push([0, 1].map(|k| {
                let linear = c[k] - a[k];
                let square = 2.0 * a[k] - 5.0 * b[k] + 4.0 * c[k] - d[k];
                let cube = 3.0 * (b[k] - c[k]) + d[k] - a[k];
                b[k] + 0.5 * t * (linear + t * (square + t * cube))
            }));
        }
    }
    path.push(points[last]);
    path
}

/// Scales the paths to a box of 20 pixels and puts their centre of mass where MNIST has it, up to
/// whole pixels: [`CENTRE`] from the upper left corner, and half a pixel about it.
fn fit(lines: &mut [Vec<Dot>], radius: f32, dice: &mut Dice) {
    const CENTRE: f32 = 14.5;

    let mut low = [f32::INFINITY; 2];
    let mut high = [f32::NEG_INFINITY; 2];
    for dot in lines.iter().flatten() {
        for (axis, value) in [dot.x, dot.y].into_iter().enumerate() {
            low[axis] = low[axis].min(value);
            high[axis] = high[axis].max(value);
        }
    }
    let extent = (high[0] - low[0]).max(high[1] - low[1]);
    let scale = (19.5 - 2.0 * radius) / extent;

    let mut mass = 0.0;
    let mut moment = [0.0; 2];
    for pair in lines.iter().flat_map(|line| line.windows(2)) {
        let [from, to] = [pair[0], pair[1]];
        let (dx, dy) = (to.x - from.x, to.y - from.y);
        let weight = (dx * dx + dy * dy).sqrt() * (from.radius + to.radius);
        mass += weight;
        moment[0] += weight * (from.x + to.x) / 2.0;
        moment[1] += weight * (from.y + to.y) / 2.0;
    }
    let [dx, dy] = moment.map(|moment| CENTRE + dice.between(-0.5, 0.5) - scale * moment / mass);
    for dot in lines.iter_mut().flatten() {
        dot.x = dot.x * scale + dx;
        dot.y = dot.y * scale + dy;
    }
}

/// Inks every pixel by its distance to the nearest stroke.
fn ink(image: &mut [u8; PIXELS], lines: &[Vec<Dot>], dice: &mut Dice) {
    let soft = dice.between(0.40, 0.70);
    let mut gaps = [f32::INFINITY; PIXELS];
    for pair in lines.iter().flat_map(|line| line.windows(2)) {
        trace(&mut gaps, pair[0], pair[1], soft);
    }

    let black = dice.between(250.0, 256.0);
    for (pixel, gap) in image.iter_mut().zip(gaps) {
        let cover = ((soft - gap) / (2.0 * soft)).clamp(0.0, 1.0);
        if cover > 0.0 {
            let shade = cover * cover * (3.0 - 2.0 * cover);
            *pixel = (black * shade * dice.between(0.95, 1.0)) as u8;
        }
    }
}

/// Lowers each pixel's gap to its distance from the edge of the stroke
/// between two dots (negative inside).
fn trace(gaps: &mut [f32; PIXELS], from: Dot, to: Dot, soft: f32) {
    let reach = from.radius.max(to.radius) + soft;
    let (dx, dy) = (to.x - from.x, to.y - from.y);
    let length = (dx * dx + dy * dy).max(f32::MIN_POSITIVE);
    for row in pixels(from.y, to.y, reach) {
        for column in pixels(from.x, to.x, reach) {
            // The middle of a pixel lies half a pixel inside it.
            let (x, y) = (column as f32 + 0.5 - from.x, row as f32 + 0.5 - from.y);
            let along = ((x * dx + y * dy) / length).clamp(0.0, 1.0);
            let (x, y) = (x - along * dx, y - along * dy);
            let radius = from.radius + (to.radius - from.radius) * along;
            let gap = &mut gaps[row * SIDE + column];
            *gap = gap.min((x * x + y * y).sqrt() - radius);
        }
    }
}

/// Rows or columns within `reach` of the range between two coordinates.
fn pixels(a: f32, b: f32, reach: f32) -> std::ops::Range<usize> {
    // Casts from float to integer saturate, so what lies outside is cut off.
    let first = (a.min(b) - reach) as usize;
    let end = (a.max(b) + reach) as usize + 1;
    first..end.min(SIDE)
}

#[cfg(test)]
mod tests;
