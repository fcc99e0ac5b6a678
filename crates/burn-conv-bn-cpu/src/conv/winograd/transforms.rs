//! The maps `A`, `B`, `G` and their transposes.

use crate::Real;
use crate::simd::chunk::Chunk;
use crate::simd::planes::CHANNELS;

/// Inputs of a pair of outputs.
pub(super) const N: usize = 4;

/// Products for a pair of outputs.
pub(super) const E: usize = 4;

/// Distance of the pairs of outputs, in inputs.
pub(super) const STEP: usize = 2;

/// Pairs of values of a line, each with the one `distance` behind. The last may lack their second value.
pub(super) fn pairs(len: usize, distance: usize) -> usize {
    len / (2 * distance) * distance + (len % (2 * distance)).min(distance)
}

/// `B x`.
#[inline(always)]
pub(super) fn input<T: Real>([x0, x1, x2, x3]: [Chunk<T>; N]) -> [Chunk<T>; E] {
    [x0 - x2, x1 + x2, x2 - x1, x1 - x3]
}

/// `B' v`.
#[inline(always)]
pub(super) fn input_transposed<T: Real>([v0, v1, v2, v3]: [Chunk<T>; E]) -> [Chunk<T>; N] {
    [v0, v1 - v2 + v3, v1 + v2 - v0, -v3]
}

/// `A m`.
#[inline(always)]
pub(super) fn output<T: Real>([m0, m1, m2, m3]: [Chunk<T>; E]) -> [Chunk<T>; STEP] {
    [m0 + m1 + m2, m1 - m2 - m3]
}

/// `A' y`.
#[inline(always)]
pub(super) fn output_transposed<T: Real>([y0, y1]: [Chunk<T>; STEP]) -> [Chunk<T>; E] {
    [y0, y0 + y1, y0 - y1, -y1]
}

/// `G w` of a chunk of kernels.
#[inline(always)]
pub(super) fn filter_lanes<T: Real>([w0, w1, w2]: [Chunk<T>; 3]) -> [Chunk<T>; E] {
    let (sum, middle) = ((w0 + w2).half(), w1.half());
    [w0, sum + middle, sum - middle, w2]
}

/// `G' u` of a chunk of kernels.
#[inline(always)]
pub(super) fn filter_lanes_transposed<T: Real>([u0, u1, u2, u3]: [Chunk<T>; E]) -> [Chunk<T>; 3] {
    let (sum, difference) = ((u1 + u2).half(), (u1 - u2).half());
    [u0 + sum, difference, sum + u3]
}

/// One value of each of a block's channels.
type Lanes = [f64; CHANNELS];

#[inline(always)]
fn lanes(value: impl Fn(usize) -> f64) -> Lanes {
    std::array::from_fn(value)
}

/// `G w`.
#[inline(always)]
fn filter([w0, w1, w2]: [Lanes; 3]) -> [Lanes; E] {
    let sum = |sign: f64| lanes(|lane| (w0[lane] + w2[lane]) / 2.0 + sign * (w1[lane] / 2.0));
    [w0, sum(1.0), sum(-1.0), w2]
}

/// `G' u`.
pub(super) fn filter_transposed([u0, u1, u2, u3]: [f64; E]) -> [f64; 3] {
    let (sum, difference) = ((u1 + u2) / 2.0, (u1 - u2) / 2.0);
    [u0 + sum, difference, sum + u3]
}

/// `G w G'` of some kernels.
#[inline(always)]
pub(super) fn transformed<T: Real>(kernels: &[&[T; 9]; CHANNELS]) -> [[T; CHANNELS]; E * E] {
    let columns: [[Lanes; E]; 3] = std::array::from_fn(
        #[inline(always)]
        |column| {
            filter(std::array::from_fn(
                #[inline(always)]
                |row| lanes(|lane| kernels[lane][3 * row + column].to_f64()),
            ))
        },
    );
    let mut products = [[T::ZERO; CHANNELS]; E * E];
    for row in 0..E {
        let values = filter([columns[0][row], columns[1][row], columns[2][row]]);
        for column in 0..E {
            for lane in 0..CHANNELS {
                products[row * E + column][lane] = T::from_f64(values[column][lane]);
            }
        }
    }
    products
}

/// The contributions of a pair and of the one before to the inputs between the pair's first and the next
/// pair's first.
#[inline(always)]
pub(super) fn sums<T: Real>(this: [Chunk<T>; N], before: [Chunk<T>; N]) -> [Chunk<T>; STEP] {
    [this[0] + before[2], this[1] + before[3]]
}
