use std::mem::MaybeUninit;

use crate::direct::Direct;
use crate::minimal::Minimal;
use crate::{Element, Geometry, Real};

/// Fewest channels, in and out, for which fewer products outweigh the transforms.
const LEAST_CHANNELS: usize = 16;

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

/// Whichever algorithm suits a geometry.
pub(crate) enum Chosen<'a, T> {
    Direct(Direct<'a, T>),
    Minimal(Minimal<'a, T>),
}

/// Makes the algorithm for the geometry ready. `weight` is what is convolved with, and
/// `input_weight` what the input's gradient goes through, each if that is wanted.
pub(crate) fn choose<'a, T: Real>(
    geometry: &'a Geometry,
    weight: Option<&[T]>,
    input_weight: Option<&[T]>,
) -> Chosen<'a, T> {
    let plain = geometry.kernel == [1, 3, 3]
        && geometry.stride == [1; 3]
        && geometry.dilation == [1; 3]
        && geometry.input[0] == 1
        && geometry.padding[0] == (0, 0)
        && geometry.group_in().min(geometry.group_out()) >= LEAST_CHANNELS;
    match plain {
        true => Chosen::Minimal(Minimal::new(geometry, weight, input_weight)),
        false => Chosen::Direct(Direct::new(geometry, weight, input_weight)),
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

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
        let positions = geometry.positions();
        let input = rounded::<E>(input);
        let grad = rounded::<E>(grad);
        let mut scratch = A::Scratch::default();
        let mut output = vec![E::ZERO; grad.len()];
        let mut sums = vec![E::ZERO; algorithm.weight_grad_len()];
        // What is not written shows.
        let mut input_grad = vec![MaybeUninit::new(E::from_f64(f64::NAN)); input.len()];
        algorithm.begin(&mut scratch);
        for tile in algorithm.tiles(geometry.batch()) {
            algorithm.load(&mut scratch, &input, 0, &tile);
            algorithm.convolve(&mut scratch, 0, &tile);
            for channel in 0..geometry.channels_out() {
                for (number, piece) in algorithm.pieces(&tile).iter().enumerate() {
                    let range = channel * positions + piece.start..;
                    let line = &mut output[range.clone()][..piece.len];
                    algorithm.gather(&mut scratch, &tile, number, channel, line);
                    let line = &grad[range][..piece.len];
                    algorithm.scatter(&mut scratch, &tile, number, channel, line);
                }
                algorithm.seal(&mut scratch, &tile, channel);
            }
            algorithm.add_weight_grad(&mut scratch, &tile, &mut sums);
            algorithm.input_grad(&mut scratch, 0, &tile, &mut input_grad);
        }
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

    /// Root mean square of the difference, relative to that of what is wanted.
    fn error(got: &[f64], wanted: &[f64]) -> f64 {
        let squares: f64 = got
            .iter()
            .zip(wanted)
            .map(|(got, wanted)| (got - wanted).powi(2))
            .sum();
        (squares / wanted.iter().map(|wanted| wanted.powi(2)).sum::<f64>()).sqrt()
    }

    #[test]
    fn fewer_products_keep_the_two_times_rule() {
        let geometry = Geometry::new(
            2,
            [64, 64],
            1,
            [1, 28, 28],
            [1, 3, 3],
            [1; 3],
            [(0, 0), (1, 1), (1, 1)],
            [1; 3],
        )
        .unwrap();
        let weight = random(geometry.weight_len(), 1);
        let input = random(2 * geometry.input_len(), 2);
        let grad = random(2 * geometry.output_len(), 3);
        let exact = Direct::new(&geometry, Some(&weight), Some(&weight));
        let exact = results::<f64, _>(&exact, &input, &grad);
        let weight = rounded::<f32>(&weight);
        let direct = Direct::new(&geometry, Some(&weight), Some(&weight));
        let direct = results::<f32, _>(&direct, &input, &grad);
        let minimal = Minimal::new(&geometry, Some(&weight), Some(&weight));
        let minimal = results::<f32, _>(&minimal, &input, &grad);
        for (index, what) in ["output", "weight gradient", "input gradient"]
            .into_iter()
            .enumerate()
        {
            let direct = error(&direct[index], &exact[index]);
            let minimal = error(&minimal[index], &exact[index]);
            println!(
                "{what}: error of the direct sum {direct:.1e}, with fewer \
                     products {minimal:.1e}, ratio {:.2}",
                minimal / direct
            );
            assert!(direct < 1e-6, "{what}: {direct:e}");
            assert!(minimal < 2.0 * direct, "{what}: {minimal:e} for {direct:e}");
        }
    }
}
