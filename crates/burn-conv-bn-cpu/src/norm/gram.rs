//! Gradients of a pointwise convolution with its norm that need no output of the convolution.
//!
//! With `W` the weight, `x` the input less its mean and `dz = scale * g + slope * (z - mean) + offset`, whose sum over
//! the batch is zero:
//!
//! - `z - mean` is `W x`;
//! - a channel's `sum(g * (z - mean))` is its row of `W` times its row of `g x'`;
//! - the weight's gradient `dz x'` is `scale * g x' + slope * W (x x')`;
//! - the input's gradient `W' dz` is `W' (scale * g) + (W' (slope * W)) x + W' offset`.
//!
//! The first step sums `g x'` and the Gram matrix `x x'` over all positions. Where the convolution has fewer inputs than
//! outputs, that and the product with `x` in the second step are fewer operations than the convolution once more.

use pulp::Arch;
use rayon::prelude::*;

use super::gradient::{Backward, GradSums, Gradients, Gram, InputGradCoefficients, OutputGrad};
use super::lines::{Converted, Step, conv_output_grad};
use super::tiles::{self, prefetch_next, sum_in_order};
use crate::conv::direct::{Centered, Correction, Direct};
use crate::conv::span::Span;
use crate::conv::tile::{BlockGrads, Output, TileScratch, Transposed, Work};
use crate::conv::{Chosen, choose, weight_blocks};
use crate::scratch::ScratchPool;
use crate::simd::planes::{CHANNELS, Filter, correlate, plane_len, slack, taps_in_cache};
use crate::simd::sweeps;
use crate::{Activation, Element, Real};

/// Rows of a product that a thread computes at a time.
const ROWS: usize = 8 * CHANNELS;

/// Most operations beside those of the gradients, in convolutions: with more, recomputing is faster, although its output
/// goes to memory and back.
const MOST_OPERATIONS: f64 = 1.25;

/// Largest square of what is left of a channel's mean, in the mean squares of its `x`: subtracting it costs digits.
const MOST_SHIFT: f64 = 256.0;

/// Least and largest mean square of a channel of `x` whose products keep their digits in single precision.
const SQUARES: [f64; 2] = [1e-24, 1e24];

impl<E: Element> Backward<'_, E> {
    /// Whether [`ConvOutput::Gram`](crate::ConvOutput::Gram) applies, and saves time.
    ///
    /// The convolution is pointwise and has no padding. It has at least twice as many outputs as inputs. There is no
    /// activation, or [`Self::output`] gives its derivative. The output's gradient is a tensor.
    pub fn allows_gram(&self) -> bool {
        let geometry = self.geometry;
        let [inputs, outputs] = geometry.channels;
        // `x x'` and the product with `x` for each position, and two products of the weight for all.
        let for_each = 2.0 * inputs as f64 / outputs as f64;
        let for_all = 2.0 * inputs as f64 / (geometry.batch() * geometry.positions()) as f64;
        geometry.kernel == [1; 3]
            && geometry.padding == [(0, 0); 3]
            && geometry.groups() == 1
            && 2 * inputs <= outputs
            && for_each + for_all <= MOST_OPERATIONS
            && matches!(self.output_grad, OutputGrad::Whole(_))
            && (self.activation == Activation::Identity || self.output.is_some())
            && matches!(choose::<E>(geometry, None, None), Chosen::Direct(_))
    }

    fn whole_grad(&self) -> &[E] {
        match self.output_grad {
            OutputGrad::Whole(grad) => grad,
            OutputGrad::Pooled(_) => panic!("the output's gradient is a max pool's"),
        }
    }

    /// The convolution with its input less `origin`.
    fn centered(
        &self,
        origin: Vec<E::Real>,
        correction: Option<Correction<E::Real>>,
        transposed: Option<Transposed<'_, E::Real>>,
    ) -> Direct<'_, E::Real> {
        match choose::<E>(self.geometry, None, transposed) {
            Chosen::Direct(direct) => direct.centered(Centered { origin, correction }),
            _ => panic!("the pass does not allow products of its input"),
        }
    }
}

/// Mean of each input channel over the first image. Subtracted from every image, it keeps the products small.
fn first_means<E: Element>(pass: &Backward<'_, E>) -> Vec<E::Real> {
    let image = pass.input(&(0..1));
    let planes = image.par_chunks_exact(pass.geometry.input_plane());
    planes
        .map_init(Vec::new, |converted, plane| {
            let (mean, _) = sweeps::moments(Arch::new(), E::read(plane, converted));
            Real::from_f64(mean)
        })
        .collect()
}

impl<T: Real> Gram<T> {
    /// Whether [`Self::sum`] succeeded.
    pub(super) fn is_filled(&self) -> bool {
        !self.mean.is_empty()
    }

    /// The first step; none, and nothing stored, if a channel's squares are out of range.
    pub(super) fn sum<E: Element<Real = T>>(&mut self, pass: &Backward<'_, E>) -> Option<GradSums> {
        assert!(
            pass.allows_gram(),
            "ConvOutput::Gram is for passes with `allows_gram`, but this one needs the convolution's output"
        );
        *self = Self::default();
        let geometry = pass.geometry;
        let origin = first_means(pass);
        let algorithm = pass.centered(origin.clone(), None, None);
        let blocks = geometry.blocks(weight_blocks::<E, _>(&algorithm));
        let mut of_blocks = vec![GradSums::new(geometry.channels_out()); blocks.len()];
        let step = Step {
            pass,
            coefficients: None,
        };
        let pool = ScratchPool::<(TileScratch<_, E>, Converted<T>)>::new();
        let items = blocks.iter().zip(&mut of_blocks);
        let len = geometry.weight_len() + geometry.channels[0] * (geometry.channels[0] + 1);
        let products = sum_in_order(items, blocks.len(), len, |(block, grads), products| {
            let first = block.images.start * geometry.output_len();
            let work = Work {
                block,
                input: Some(pass.input(&block.images)),
                output: pass.of_images(Output::Kept(pass.whole_grad()), &block.images),
                grads: Some(BlockGrads {
                    weight: Some(products),
                    input: None,
                }),
            };
            pool.with(|(tiles, converted)| {
                tiles.run(&algorithm, work, |channel, range, line| {
                    let at = first + range.start;
                    prefetch_next(pass, at, range.len());
                    let span = Span::of_tensor(geometry, at, range.len());
                    conv_output_grad(&step, channel, span, line, converted);
                    grads.add(channel, [sweeps::total_of(Arch::new(), line).to_f64(), 0.0]);
                });
            });
        });
        let mut sums = GradSums::total(geometry.channels_out(), &of_blocks);
        self.center(
            origin,
            products,
            &sums.grad,
            geometry.batch() * geometry.positions(),
        )?;
        let inputs = geometry.channels[0];
        let weight = pass.weight.unwrap_or_default().chunks_exact(inputs);
        let rows = weight.zip(self.output_grad.chunks_exact(inputs));
        for (sum, (weight, products)) in sums.grad_deviation.iter_mut().zip(rows) {
            let products = weight.iter().zip(products);
            *sum = products.map(|(a, b)| a.to_f64() * b.to_f64()).sum();
        }
        Some(sums)
    }

    /// Converts sums over `count` positions of the input less `origin` to sums of the input less its mean.
    fn center(
        &mut self,
        origin: Vec<T>,
        products: Vec<T>,
        grad_sums: &[f64],
        count: usize,
    ) -> Option<()> {
        let inputs = origin.len();
        let mut output_grad = products;
        let mut input = output_grad.split_off(grad_sums.len() * inputs);
        let shifts: Vec<f64> = input
            .split_off(inputs * inputs)
            .iter()
            .map(|sum| sum.to_f64() / count as f64)
            .collect();
        let subtract = |row: &mut [T], factor: f64| {
            for (value, shift) in row.iter_mut().zip(&shifts) {
                *value = T::from_f64(value.to_f64() - factor * shift);
            }
        };
        for (row, sum) in output_grad.chunks_exact_mut(inputs).zip(grad_sums) {
            subtract(row, *sum);
        }
        for (channel, row) in input.chunks_exact_mut(inputs).enumerate() {
            subtract(row, shifts[channel] * count as f64);
            let (shift, square) = (shifts[channel], row[channel].to_f64() / count as f64);
            let is_constant = square == 0.0 && shift == 0.0;
            let is_near = shift * shift <= MOST_SHIFT * square;
            let is_in_range = is_near && (SQUARES[0]..SQUARES[1]).contains(&square);
            if !is_constant && !is_in_range {
                return None;
            }
        }
        let origins = origin.iter().zip(&shifts);
        *self = Self {
            mean: origins
                .map(|(origin, shift)| T::from_f64(origin.to_f64() + shift))
                .collect(),
            output_grad,
            input,
        };
        Some(())
    }

    /// The second step.
    pub(super) fn backward<E: Element<Real = T>>(
        &mut self,
        pass: &Backward<'_, E>,
        coefficients: InputGradCoefficients<'_, T>,
        mut gradients: Gradients<'_, E>,
    ) {
        let [inputs, outputs] = pass.geometry.channels;
        let weight = pass.weight.unwrap_or_default();
        if let Some(grad) = gradients.weight.take() {
            let slope = |input: usize| {
                move |output: usize| coefficients.slope[output] * weight[output * inputs + input]
            };
            let (products, pitch) = product(outputs, slope, &self.input, inputs);
            *grad = std::mem::take(&mut self.output_grad);
            let rows = grad
                .chunks_exact_mut(inputs)
                .zip(products.chunks_exact(pitch));
            for ((row, products), scale) in rows.zip(coefficients.scale) {
                for (value, product) in row.iter_mut().zip(products) {
                    *value = *value * *scale + *product;
                }
            }
        }
        let step = Step {
            pass,
            coefficients: None,
        };
        let transposed = gradients.input.as_ref().map(|(_, weight)| Transposed {
            weight,
            scale: Some(coefficients.scale),
        });
        let correction =
            transposed.map(|Transposed { weight, .. }| correction(weight, inputs, coefficients));
        let algorithm = pass.centered(std::mem::take(&mut self.mean), correction, transposed);
        if gradients.input.is_some() || gradients.residual.is_some() {
            let output = Output::Kept(pass.whole_grad());
            tiles::backward(&step, &algorithm, output, gradients);
        }
    }
}

/// `W' (slope * W)` and `W' offset`.
fn correction<T: Real>(
    weight: &[T],
    inputs: usize,
    coefficients: InputGradCoefficients<'_, T>,
) -> Correction<T> {
    let mut scaled = weight.to_vec();
    let mut constants = vec![0.0; inputs];
    for (output, row) in scaled.chunks_exact_mut(inputs).enumerate() {
        let (slope, offset) = (
            coefficients.slope[output],
            coefficients.offset[output].to_f64(),
        );
        for (value, constant) in row.iter_mut().zip(&mut constants) {
            *constant += value.to_f64() * offset;
            *value = *value * slope;
        }
    }
    let transposed = |output: usize| move |input: usize| weight[output * inputs + input];
    let (matrix, pitch) = product(inputs, transposed, &scaled, inputs);
    let block = taps_in_cache(inputs, 1, 1);
    let filter = Filter::new(inputs, inputs, block, |column| {
        let matrix = &matrix[column..];
        move |row| matrix[row * pitch]
    });
    Correction {
        matrix: filter,
        constants: constants.into_iter().map(T::from_f64).collect(),
    }
}

/// The product of two matrices: `left(k)(row)` returns the left one's value, `right` has rows of `columns`. Returns its rows
/// and their distance.
fn product<T: Real, F: Fn(usize) -> T>(
    rows: usize,
    left: impl Fn(usize) -> F + Sync,
    right: &[T],
    columns: usize,
) -> (Vec<T>, usize) {
    let depth = right.len() / columns;
    // Parts are whole blocks of channels, but for the last.
    let pitch = plane_len(columns + slack(CHANNELS).max(slack(rows % CHANNELS)));
    let mut planes = vec![T::ZERO; depth * pitch];
    for (plane, row) in planes
        .chunks_exact_mut(pitch)
        .zip(right.chunks_exact(columns))
    {
        plane[..columns].copy_from_slice(row);
    }
    let offsets: Vec<usize> = (0..depth).map(|k| k * pitch).collect();
    let mut target = vec![T::ZERO; rows * pitch];
    let block = taps_in_cache(depth, 1, 1);
    target
        .par_chunks_mut(ROWS * pitch)
        .enumerate()
        .for_each(|(part, target)| {
            let first = part * ROWS;
            let filter = Filter::new(target.len() / pitch, depth, block, |k| {
                let left = left(k);
                move |row| left(first + row)
            });
            correlate(&filter, &planes, &offsets, target, pitch, columns, false);
        });
    (target, pitch)
}
