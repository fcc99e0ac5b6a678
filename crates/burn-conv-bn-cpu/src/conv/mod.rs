//! The convolution and its gradients, and the choice of the algorithm for a geometry.

pub(crate) mod channels;
pub(crate) mod direct;
pub(crate) mod span;
pub(crate) mod tile;

mod layout;
mod limit;
mod method;
mod packed;
mod phases;
mod winograd;

pub(crate) use self::limit::weight_blocks;

use self::direct::Direct;
use self::layout::has_few_gaps;
use self::limit::{fits, has_tiles, is_alone, is_deep, slices, winograd_tile};
use self::packed::Packed;
use self::tile::Transposed;
use self::winograd::{Slices, Winograd, saves_products};
use crate::{Element, Geometry, Real};

/// Fewest channels, in and out, for which Winograd's savings outweigh its transforms, and fewest of one of several
/// groups in rows shorter than [`WIDE`].
const LEAST_CHANNELS: usize = 16;
const MANY_CHANNELS: usize = 32;
const WIDE: usize = 28;

/// Fewest channels of a group, in and out, for slices of a weight that outweighs the activations.
const SLICE_CHANNELS: usize = 64;

/// Activations, in weights, below which slices are faster than Winograd's algorithm with copies of the weight, and below
/// which they are faster than sums of planes.
const DEEP: usize = 4;
const DEEP_FOR_PLANES: usize = 8;

/// Fewest channels for slices to be faster than both, whatever the activations. A slice is 32 channels: fewer keep fewer
/// threads busy.
const ALWAYS_SLICES: usize = 256;
const SLICES_FOR_PLANES: usize = 128;

/// The algorithm for a geometry.
pub(crate) enum Chosen<'a, T> {
    Direct(Direct<'a, T>),
    Winograd(Winograd<'a, T>),
    Packed(Packed<'a>),
    Slices(Slices<'a>),
}

impl<T: Real> Chosen<'_, T> {
    /// Prepares each of the weights if it is needed, by algorithms that hold copies of them.
    fn with_weights(self, weight: Option<&[T]>, transposed: Option<Transposed<'_, T>>) -> Self {
        match self {
            Self::Direct(direct) => Self::Direct(direct.with_weights(weight, transposed)),
            Self::Winograd(winograd) => Self::Winograd(winograd.with_weights(weight, transposed)),
            Self::Packed(_) | Self::Slices(_) => self,
        }
    }
}

/// Prepares the algorithm for a geometry, each of the weights if it is needed. A function of the geometry and the
/// type alone, so that forward and backward are by the same algorithm.
pub(crate) fn choose<'a, E: Element>(
    geometry: &'a Geometry,
    weight: Option<&[E::Real]>,
    transposed: Option<Transposed<'_, E::Real>>,
) -> Chosen<'a, E::Real> {
    let forced = geometry.method.and_then(|method| method.of::<E>(geometry));
    let chosen = forced.unwrap_or_else(|| rule::<E>(geometry));
    chosen.with_weights(weight, transposed)
}

/// The algorithm that is likely to be the fastest of those that fit the limits. docs/cpu.md has the measurements.
fn rule<E: Element>(geometry: &Geometry) -> Chosen<'_, E::Real> {
    let is_for_winograd = is_for_winograd(geometry);
    let channels = geometry.group_in().min(geometry.group_out());
    let is_deep = |weights| channels >= SLICE_CHANNELS && is_deep(geometry, weights);
    let slices = slices::<E>(geometry).filter(|_| is_for_slices(geometry) && has_tiles(geometry));
    if let Some(slices) = slices.filter(|_| is_deep(DEEP) || channels >= ALWAYS_SLICES) {
        return Chosen::Slices(slices);
    }
    let is_narrow = geometry.groups() > 1 && channels < MANY_CHANNELS && geometry.output[2] < WIDE;
    if is_for_winograd && !is_narrow {
        let winograd = Winograd::new(geometry, winograd_tile::<E>(geometry));
        if fits::<E, _>(&winograd) {
            return Chosen::Winograd(winograd);
        }
    }
    let slices_for_planes = is_deep(DEEP_FOR_PLANES) || channels >= SLICES_FOR_PLANES;
    if let Some(slices) = slices.filter(|_| slices_for_planes) {
        return Chosen::Slices(slices);
    }
    if !is_alone(geometry) {
        let mut direct = Direct::new(geometry);
        if direct.is_dense() && !fits::<E, _>(&direct) && has_few_gaps(geometry) {
            direct = Direct::shifted(geometry);
        }
        if fits::<E, _>(&direct) {
            return Chosen::Direct(direct);
        }
    }
    match slices {
        Some(slices) => Chosen::Slices(slices),
        None => Chosen::Packed(Packed::new(geometry, size_of::<E::Real>())),
    }
}

/// Whether Winograd's algorithm by slices applies, and saves enough as well.
fn is_for_slices(geometry: &Geometry) -> bool {
    geometry.kernel == [1, 3, 3] && geometry.outermost() > 0 && is_for_winograd(geometry)
}

/// Whether Winograd's algorithm applies, and saves enough products on enough channels to outweigh its transforms.
fn is_for_winograd(geometry: &Geometry) -> bool {
    geometry.kernel[1..]
        .iter()
        .all(|len| matches!(len, 3 | 5 | 7))
        && geometry.stride == [1; 3]
        && geometry.group_in().min(geometry.group_out()) >= LEAST_CHANNELS
        && saves_products(geometry)
}

/// Panics if a slice is not of the geometry's size.
pub(crate) fn check<E: Element>(
    geometry: &Geometry,
    input: Option<&[E]>,
    weight: Option<&[E::Real]>,
) {
    let batch = geometry.batch();
    if let Some(input) = input {
        assert_eq!(input.len(), batch * geometry.input_len(), "input");
    }
    if let Some(weight) = weight {
        assert_eq!(weight.len(), geometry.weight_len(), "weight");
    }
}

#[cfg(test)]
mod tests {
    use std::mem::MaybeUninit;

    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::channels::{ByChannels, Rows};
    use super::tile::{Algorithm, BlockGrads, Output, TileScratch, Work};
    use super::*;
    use crate::blocks::{Block, Share};

    fn random(len: usize, seed: u64) -> Vec<f64> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // Representable in f32, so that what is compared is the arithmetic alone.
        (0..len)
            .map(|_| f64::from(rng.random_range(-1.0f32..1.0)))
            .collect()
    }

    fn rounded<E>(values: &[f64]) -> Vec<E>
    where
        E: Element<Real = E> + Real,
    {
        values.iter().map(|value| E::from_f64(*value)).collect()
    }

    /// Output, weight gradient and input gradient of one block, with the data as the gradient of
    /// the output.
    fn results<E, A>(algorithm: &A, input: &[f64], grad: &[f64]) -> [Vec<f64>; 3]
    where
        E: Element<Real = E> + Real,
        A: Algorithm<E>,
    {
        let geometry = algorithm.geometry();
        let input = rounded::<E>(input);
        let grad = rounded::<E>(grad);
        let mut output = vec![E::ZERO; grad.len()];
        let mut sums = vec![E::ZERO; algorithm.weight_grad_len()];
        // An unwritten value shows.
        let mut input_grad = vec![MaybeUninit::new(E::from_f64(f64::NAN)); input.len()];
        let mut input_share = Share::whole(&mut input_grad);
        let block = Block {
            images: 0..geometry.batch(),
            band: None,
        };
        let work = Work {
            block: &block,
            input: Some(&input),
            output: Output::Computed,
            grads: Some(BlockGrads {
                weight: Some(&mut sums),
                input: Some(&mut input_share),
            }),
        };
        let mut scratch = TileScratch::<A::Scratch, E>::default();
        scratch.run(algorithm, work, |_, range, line| {
            output[range.clone()].copy_from_slice(line);
            line.copy_from_slice(&grad[range]);
        });
        let mut weight_grad = Vec::new();
        algorithm.weight_grad(sums, &mut weight_grad);
        let input_grad = input_grad.into_iter().map(|value| {
            // SAFETY: it was NaN, if it was not written.
            #[allow(unsafe_code)]
            unsafe {
                value.assume_init()
            }
        });
        [output, weight_grad, input_grad.collect()]
            .map(|values| values.iter().map(|value| value.to_f64()).collect())
    }

    /// The same by slices.
    fn slices_results(
        algorithm: &Slices<'_>,
        weight: &[f32],
        input: &[f64],
        grad: &[f64],
    ) -> [Vec<f64>; 3] {
        let geometry = ByChannels::<f32>::geometry(algorithm);
        let (input, grad) = (rounded::<f32>(input), rounded::<f32>(grad));
        let (mut scratch, mut rows) = (Default::default(), Rows::default());
        let [mut output, mut input_grad] = [grad.clone(), input.clone()];
        let mut weight_grad = vec![0.0; weight.len()];
        for block in ByChannels::<f32>::blocks(algorithm) {
            rows.resize(geometry.channels_out(), block.len);
            let chunks = ByChannels::<f32>::chunks(algorithm, block);
            for chunk in &chunks {
                let column = chunk.start - block.start;
                algorithm.convolve(&mut scratch, &input, weight, *chunk, &mut rows, column);
            }
            for channel in 0..geometry.channels_out() {
                let mut row = &mut rows.values[channel * rows.pitch..][..block.len];
                for range in block.ranges(geometry, channel) {
                    let (line, rest) = row.split_at_mut(range.len());
                    output[range.clone()].copy_from_slice(line);
                    line.copy_from_slice(&grad[range]);
                    row = rest;
                }
            }
            for chunk in chunks {
                let column = chunk.start - block.start;
                let grad = &mut weight_grad;
                algorithm.add_weight_grad(&mut scratch, &input, chunk, &rows, column, grad);
            }
            let mut lines = Vec::new();
            let scratch = &mut scratch;
            ByChannels::<f32>::input_grad(
                algorithm, scratch, weight, None, block, &rows, &mut lines,
            );
            let (plane, first) = (geometry.input_plane(), block.start / geometry.positions());
            let images = block.len / geometry.positions();
            for (index, line) in lines.chunks_exact(plane).enumerate() {
                let (channel, image) = (index / images, first + index % images);
                let at = image * geometry.input_len() + channel * plane;
                input_grad[at..][..plane].copy_from_slice(line);
            }
        }
        [output, weight_grad, input_grad].map(|values| values.into_iter().map(f64::from).collect())
    }

    /// Root mean square of the difference, relative to that of the expected values.
    fn error(got: &[f64], wanted: &[f64]) -> f64 {
        let squares: f64 = got
            .iter()
            .zip(wanted)
            .map(|(got, wanted)| (got - wanted).powi(2))
            .sum();
        (squares / wanted.iter().map(|wanted| wanted.powi(2)).sum::<f64>()).sqrt()
    }

    fn transposed<T>(weight: &[T]) -> Option<Transposed<'_, T>> {
        let scale = None;
        Some(Transposed { weight, scale })
    }

    fn square(batch: usize, size: usize, dilation: usize) -> Geometry {
        let padding = (dilation, dilation);
        Geometry::new(
            batch,
            [64, 64],
            1,
            [1, size, size],
            [1, 3, 3],
            [1; 3],
            [(0, 0), padding, padding],
            [1, dilation, dilation],
        )
        .unwrap()
    }

    #[test]
    fn dilated_kernels_take_winograd_where_it_saves_products() {
        for (size, dilation, is_winograd) in [
            (28, 2, true),
            (28, 4, true),
            (33, 6, true),
            (33, 12, false),
            (8, 8, false),
        ] {
            let geometry = square(32, size, dilation);
            let chosen = choose::<f32>(&geometry, None, None);
            assert_eq!(
                matches!(chosen, Chosen::Winograd(_)),
                is_winograd,
                "{geometry:?}"
            );
        }
    }

    #[test]
    fn winograd_keeps_the_two_times_rule() {
        for dilation in [1, 2] {
            keeps_the_two_times_rule(&square(2, 28, dilation));
        }
    }

    #[test]
    fn winograd_keeps_the_two_times_rule_for_larger_kernels() {
        for kernel in [[1, 5, 5], [1, 7, 7], [3, 3, 3]] {
            let input = [3 * kernel[0] - 2, 28, 28];
            let padding = kernel.map(|len| (len / 2, len / 2));
            let one = [1; 3];
            let geometry = Geometry::new(2, [64, 64], 1, input, kernel, one, padding, one);
            keeps_the_two_times_rule(&geometry.unwrap());
        }
    }

    fn keeps_the_two_times_rule(geometry: &Geometry) {
        let weight = random(geometry.weight_len(), 1);
        let input = random(2 * geometry.input_len(), 2);
        let grad = random(2 * geometry.output_len(), 3);
        let exact = Direct::new(geometry).with_weights(Some(&weight), transposed(&weight));
        let exact = results::<f64, _>(&exact, &input, &grad);
        let weight = rounded::<f32>(&weight);
        let direct = Direct::new(geometry).with_weights(Some(&weight), transposed(&weight));
        let direct = results::<f32, _>(&direct, &input, &grad);
        let winograd = Winograd::new(geometry, usize::MAX);
        let winograd = winograd.with_weights(Some(&weight), transposed(&weight));
        let winograd = results::<f32, _>(&winograd, &input, &grad);
        let mut all = vec![("Winograd", winograd)];
        if is_for_slices(geometry) {
            let slices = Slices::new(geometry, 128, 64);
            all.push(("slices", slices_results(&slices, &weight, &input, &grad)));
        }
        println!("{geometry:?}");
        for (how, got) in all {
            for (index, what) in ["output", "weight gradient", "input gradient"]
                .into_iter()
                .enumerate()
            {
                let direct = error(&direct[index], &exact[index]);
                let got = error(&got[index], &exact[index]);
                let ratio = got / direct;
                println!(
                    "{what}: error of the direct sum {direct:.1e}, of {how} {got:.1e}, ratio {ratio:.2}"
                );
                assert!(direct < 1e-6, "{what}: {direct:e}");
                assert!(got < 2.0 * direct, "{what}, {how}: {got:e} for {direct:e}");
            }
        }
    }
}
