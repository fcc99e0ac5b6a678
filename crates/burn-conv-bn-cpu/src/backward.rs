//! The backward kernels, which mirror those of `forward`.

use pulp::Arch;
use rayon::prelude::*;

use crate::columns::add_back;
use crate::forward::{Columns, check, conv_tile, group_of};
use crate::matmul::{Matrix, multiply};
use crate::simd::{self, ChannelGrad, Gate};
use crate::{Activation, Affine, Geometry, Real};

/// Blocks of images that the norm's sums are taken over.
const SUM_BLOCKS: usize = 64;

/// Bytes that the blocks' weight gradients may take together, beyond two of them.
const WEIGHT_BYTES: usize = 16 << 20;

/// What both steps of the backward pass read.
#[derive(Clone, Copy, Debug)]
pub struct Backward<'a, T> {
    /// Shapes.
    pub geometry: &'a Geometry,
    /// The convolution's input.
    pub input: &'a [T],
    /// The convolution's weight.
    pub weight: &'a [T],
    /// Gradient of the output.
    pub output_grad: &'a [T],
    /// The norm, as in forward.
    pub affine: Affine<'a, T>,
    /// The activation.
    pub activation: Activation,
    /// The output, if the pre-activation cannot be rebuilt from the convolution's output alone.
    pub output: Option<&'a [T]>,
}

/// The convolution's output in the backward pass.
#[derive(Debug)]
pub enum ConvOutput<'a, T> {
    /// Recompute it, tile by tile, and keep none of it.
    Recompute,
    /// Recompute it into this buffer, for the next step.
    Store(&'a mut [T]),
    /// It is here.
    Kept(&'a [T]),
}

/// The two sums of each channel that the norm's gradient is made of, `[channels_out]` each.
#[derive(Clone, Debug, PartialEq)]
pub struct GradSums {
    /// `sum(g)`.
    pub grad: Vec<f64>,
    /// `sum(g * (z - mean))`.
    pub grad_deviation: Vec<f64>,
}

/// Per-channel coefficients of the gradient of the convolution's output,
/// `scale * g + slope * (z - mean) + offset`, `[channels_out]` each.
#[derive(Clone, Copy, Debug)]
pub struct InputGradCoefficients<'a, T> {
    /// Of `g`.
    pub scale: &'a [T],
    /// Of `z - mean`.
    pub slope: &'a [T],
    /// Constant.
    pub offset: &'a [T],
}

/// Where the wanted gradients go. Buffers are overwritten.
#[derive(Debug)]
pub struct Gradients<'a, T> {
    /// The input's, and the weight that it goes through.
    pub input: Option<(&'a mut [T], &'a [T])>,
    /// The weight's.
    pub weight: Option<&'a mut [T]>,
    /// The residual's: `g`.
    pub residual: Option<&'a mut [T]>,
}

impl<'a, T: Real> Backward<'a, T> {
    fn check(&self) {
        check(
            self.geometry,
            self.input,
            self.weight,
            self.output_grad.len(),
        );
        assert!(
            self.output
                .is_none_or(|output| output.len() == self.output_grad.len())
        );
    }

    /// What tells where the activation passes the gradient, for `len` values from `start` on.
    fn gate(&self, start: usize, len: usize) -> Gate<'a, T> {
        match (self.activation, self.output) {
            (Activation::Identity, _) => Gate::Open,
            (Activation::Relu, None) => Gate::PreActivation,
            (Activation::Relu, Some(output)) => Gate::Output(&output[start..][..len]),
        }
    }
}

/// Sums of `g` and of `g * (z - mean)`, with the convolution's output `z` recomputed or at hand.
///
/// # Panics
///
/// Panics if a slice is not of the geometry's size.
pub fn grad_sums<T: Real>(pass: &Backward<'_, T>, conv_output: ConvOutput<'_, T>) -> GradSums {
    pass.check();
    let geometry = pass.geometry;
    let images = geometry.images_per_block(SUM_BLOCKS);
    let (input_len, output_len) = (geometry.input_len(), geometry.output_len());
    let blocks = geometry.batch().div_ceil(images);
    let conv_outputs: Vec<ConvOutput<'_, T>> = match conv_output {
        ConvOutput::Recompute => (0..blocks).map(|_| ConvOutput::Recompute).collect(),
        ConvOutput::Store(all) => {
            assert_eq!(all.len(), pass.output_grad.len());
            all.chunks_mut(images * output_len)
                .map(ConvOutput::Store)
                .collect()
        }
        ConvOutput::Kept(all) => {
            assert_eq!(all.len(), pass.output_grad.len());
            all.chunks(images * output_len)
                .map(ConvOutput::Kept)
                .collect()
        }
    };
    let parts: Vec<GradSums> = conv_outputs
        .into_par_iter()
        .zip(pass.input.par_chunks(images * input_len))
        .enumerate()
        .map_init(
            Scratch::new,
            |scratch, (block, (mut conv_output, input))| {
                let mut sums = GradSums::new(geometry.channels_out());
                for (index, image) in input.chunks_exact(input_len).enumerate() {
                    let start = (block * images + index) * output_len;
                    let local = index * output_len..(index + 1) * output_len;
                    match &mut conv_output {
                        ConvOutput::Recompute => {
                            scratch.sum_tiles(pass, image, start, &mut sums, None)
                        }
                        ConvOutput::Store(block) => {
                            let target = Some(&mut block[local]);
                            scratch.sum_tiles(pass, image, start, &mut sums, target);
                        }
                        ConvOutput::Kept(block) => sums.add_image(pass, start, &block[local]),
                    }
                }
                sums
            },
        )
        .collect();
    let mut sums = GradSums::new(geometry.channels_out());
    for part in &parts {
        for (sum, part) in sums.grad.iter_mut().zip(&part.grad) {
            *sum += part;
        }
        for (sum, part) in sums.grad_deviation.iter_mut().zip(&part.grad_deviation) {
            *sum += part;
        }
    }
    sums
}

impl GradSums {
    fn new(channels: usize) -> Self {
        Self {
            grad: vec![0.0; channels],
            grad_deviation: vec![0.0; channels],
        }
    }

    /// Adds `conv_output`'s values of one channel, which stand at `start` in the whole.
    fn add<T: Real>(
        &mut self,
        pass: &Backward<'_, T>,
        channel: usize,
        start: usize,
        conv_output: &[T],
    ) {
        let (grad, grad_deviation) = simd::grad_sums(
            Arch::new(),
            conv_output,
            &pass.output_grad[start..][..conv_output.len()],
            pass.affine.channel(channel),
            pass.gate(start, conv_output.len()),
        );
        self.grad[channel] += grad.to_f64();
        self.grad_deviation[channel] += grad_deviation.to_f64();
    }

    fn add_image<T: Real>(&mut self, pass: &Backward<'_, T>, start: usize, conv_output: &[T]) {
        let positions = pass.geometry.positions();
        for (channel, values) in conv_output.chunks_exact(positions).enumerate() {
            self.add(pass, channel, start + channel * positions, values);
        }
    }
}

/// The gradients, from the norm's coefficients.
///
/// With given statistics and no need of `z`, pass zero slopes and `ConvOutput::Kept` of the
/// output or the output's gradient: any finite values do.
///
/// # Panics
///
/// Panics if a slice is not of the geometry's size, or if the convolution's output is to be
/// stored, which no step after this one would read.
pub fn backward<T: Real>(
    pass: &Backward<'_, T>,
    conv_output: ConvOutput<'_, T>,
    coefficients: InputGradCoefficients<'_, T>,
    gradients: Gradients<'_, T>,
) {
    pass.check();
    let geometry = pass.geometry;
    let kept = match conv_output {
        ConvOutput::Recompute => None,
        ConvOutput::Kept(all) => {
            assert_eq!(all.len(), pass.output_grad.len());
            Some(all)
        }
        ConvOutput::Store(_) => panic!("the last step of the backward pass stores nothing"),
    };
    let weight_len = geometry.weight_len();
    let wants_weight = gradients.weight.is_some();
    // Without a weight gradient there is no sum over images, and a block for each would do.
    let most = (WEIGHT_BYTES / (weight_len * size_of::<T>())).clamp(2, SUM_BLOCKS);
    let images = geometry.images_per_block(most);
    let blocks = geometry.batch().div_ceil(images);
    let (input_len, output_len) = (geometry.input_len(), geometry.output_len());

    let (input_grad, input_weight) = gradients.input.unzip();
    if let Some(grad) = &input_grad {
        assert_eq!(grad.len(), pass.input.len());
    }
    if let Some(grad) = &gradients.residual {
        assert_eq!(grad.len(), pass.output_grad.len());
    }
    let input_blocks = split(input_grad, images * input_len, blocks);
    let residual_blocks = split(gradients.residual, images * output_len, blocks);
    let parts: Vec<Vec<T>> = input_blocks
        .into_par_iter()
        .zip(residual_blocks)
        .zip(pass.input.par_chunks(images * input_len))
        .enumerate()
        .map_init(
            Scratch::new,
            |scratch, (block, ((input_grad, residual_grad), input))| {
                let mut weight_grad = vec![T::ZERO; if wants_weight { weight_len } else { 0 }];
                let mut input_grad = input_grad;
                let mut residual_grad = residual_grad;
                for (index, image) in input.chunks_exact(input_len).enumerate() {
                    let start = (block * images + index) * output_len;
                    scratch.backward_image(
                        pass,
                        image,
                        start,
                        kept.map(|kept| &kept[start..][..output_len]),
                        coefficients,
                        ImageGradients {
                            input: input_grad
                                .as_deref_mut()
                                .map(|grad| &mut grad[index * input_len..][..input_len]),
                            input_weight,
                            weight: wants_weight.then_some(weight_grad.as_mut_slice()),
                            residual: residual_grad
                                .as_deref_mut()
                                .map(|grad| &mut grad[index * output_len..][..output_len]),
                        },
                    );
                }
                weight_grad
            },
        )
        .collect();
    if let Some(grad) = gradients.weight {
        assert_eq!(grad.len(), weight_len);
        let arch = Arch::new();
        let mut parts = parts.into_iter();
        let mut sum = parts.next().unwrap_or_default();
        for part in parts {
            simd::add(arch, &mut sum, &part);
        }
        // The blocks hold each group's gradient as [depth, channels].
        let (depth, group_out) = (geometry.depth(), geometry.group_out());
        for (sum, grad) in sum
            .chunks_exact(depth * group_out)
            .zip(grad.chunks_exact_mut(depth * group_out))
        {
            for (channel, grad) in grad.chunks_exact_mut(depth).enumerate() {
                for (tap, grad) in grad.iter_mut().enumerate() {
                    *grad = sum[tap * group_out + channel];
                }
            }
        }
    }
}

fn split<T>(all: Option<&mut [T]>, len: usize, blocks: usize) -> Vec<Option<&mut [T]>> {
    match all {
        Some(all) => all.chunks_mut(len).map(Some).collect(),
        None => (0..blocks).map(|_| None).collect(),
    }
}

/// One image's share of [`Gradients`].
struct ImageGradients<'a, T> {
    input: Option<&'a mut [T]>,
    input_weight: Option<&'a [T]>,
    /// `[groups, depth, group's channels]`, added to.
    weight: Option<&'a mut [T]>,
    residual: Option<&'a mut [T]>,
}

/// Buffers of one thread, each for one tile.
struct Scratch<T> {
    columns: Columns<T>,
    /// The convolution's output, then its gradient.
    tile: Vec<T>,
    /// Gradient of the columns.
    column_grads: Vec<T>,
}

impl<T: Real> Scratch<T> {
    fn new() -> Self {
        Self {
            columns: Columns::new(),
            tile: Vec::new(),
            column_grads: Vec::new(),
        }
    }

    /// Recomputes one image and adds to its sums. `start` is where the image's output stands in
    /// the whole.
    fn sum_tiles(
        &mut self,
        pass: &Backward<'_, T>,
        image: &[T],
        start: usize,
        sums: &mut GradSums,
        mut store: Option<&mut [T]>,
    ) {
        let geometry = pass.geometry;
        let (groups, group_out) = (geometry.groups(), geometry.group_out());
        let (positions, width) = (geometry.positions(), geometry.width());
        for group in 0..groups {
            let image = group_of(image, group, groups);
            let weight = group_of(pass.weight, group, groups);
            for rows in geometry.tiles() {
                let columns = self.columns.of(geometry, image, &rows);
                let tile = rows.len() * width;
                let first = group * group_out * positions + rows.start * width;
                let (values, row_stride) = match &mut store {
                    Some(store) => (&mut store[first..], positions),
                    None => {
                        self.tile.resize(group_out * tile, T::ZERO);
                        (self.tile.as_mut_slice(), tile)
                    }
                };
                conv_tile(geometry, columns, weight, values, row_stride);
                for channel in 0..group_out {
                    let values = &values[channel * row_stride..][..tile];
                    let start = start + first + channel * positions;
                    sums.add(pass, group * group_out + channel, start, values);
                }
            }
        }
    }

    fn backward_image(
        &mut self,
        pass: &Backward<'_, T>,
        image: &[T],
        start: usize,
        kept: Option<&[T]>,
        coefficients: InputGradCoefficients<'_, T>,
        mut gradients: ImageGradients<'_, T>,
    ) {
        let geometry = pass.geometry;
        let arch = Arch::new();
        let (groups, group_out, depth) =
            (geometry.groups(), geometry.group_out(), geometry.depth());
        let (positions, width) = (geometry.positions(), geometry.width());
        let pointwise = geometry.is_pointwise();
        let group_input = geometry.group_in() * geometry.input_plane();
        if let (Some(grad), false) = (&mut gradients.input, pointwise) {
            grad.fill(T::ZERO);
        }
        for group in 0..groups {
            let image = group_of(image, group, groups);
            let weight = group_of(pass.weight, group, groups);
            for rows in geometry.tiles() {
                let tile = rows.len() * width;
                let first = group * group_out * positions + rows.start * width;
                self.tile.resize(group_out * tile, T::ZERO);
                let needs_columns = kept.is_none() || gradients.weight.is_some();
                let columns = needs_columns.then(|| self.columns.of(geometry, image, &rows));
                match (kept, columns) {
                    (Some(kept), _) => {
                        for (channel, values) in self.tile.chunks_exact_mut(tile).enumerate() {
                            let from = first + channel * positions;
                            values.copy_from_slice(&kept[from..][..tile]);
                        }
                    }
                    (None, Some(columns)) => {
                        conv_tile(geometry, columns, weight, &mut self.tile, tile);
                    }
                    (None, None) => unreachable!("columns are laid out for the recomputation"),
                }
                for (index, values) in self.tile.chunks_exact_mut(tile).enumerate() {
                    let channel = group * group_out + index;
                    let from = first + index * positions;
                    simd::conv_output_grad(
                        arch,
                        values,
                        &pass.output_grad[start + from..][..tile],
                        pass.affine.channel(channel),
                        pass.gate(start + from, tile),
                        ChannelGrad {
                            scale: coefficients.scale[channel],
                            slope: coefficients.slope[channel],
                            offset: coefficients.offset[channel],
                        },
                        gradients
                            .residual
                            .as_deref_mut()
                            .map(|grad| &mut grad[from..][..tile]),
                    );
                }
                let conv_grad = Matrix::by_rows(self.tile.as_slice(), group_out, tile, tile);
                if let (Some(grad), Some(columns)) = (&mut gradients.weight, columns) {
                    // Transposed, the gradient's long side is the columns', which need no
                    // packing then; the short one is the tile's.
                    let grad = &mut grad[group * depth * group_out..][..depth * group_out];
                    if group_out == 1 {
                        for (tap, grad) in grad.iter_mut().enumerate() {
                            *grad += simd::dot(arch, columns.row(tap), &self.tile);
                        }
                    } else {
                        multiply(
                            Matrix::by_rows(grad, depth, group_out, group_out),
                            columns,
                            conv_grad.transposed(),
                            true,
                        );
                    }
                }
                if let (Some(grad), Some(weight)) = (&mut gradients.input, gradients.input_weight) {
                    let taps = group_of(weight, group, groups);
                    let weight = Matrix::by_rows(taps, group_out, depth, depth).transposed();
                    let grad = &mut grad[group * group_input..][..group_input];
                    if pointwise {
                        let plane = geometry.input_plane();
                        let grad = &mut grad[rows.start * width..];
                        let target = Matrix::by_rows(grad, depth, tile, plane);
                        multiply(target, weight, conv_grad, false);
                    } else {
                        self.column_grads.resize(depth * tile, T::ZERO);
                        let columns = self.column_grads.as_mut_slice();
                        if group_out == 1 {
                            for (tap, line) in taps.iter().zip(columns.chunks_exact_mut(tile)) {
                                simd::scale(arch, line, *tap, &self.tile);
                            }
                        } else {
                            let target = Matrix::by_rows(columns, depth, tile, tile);
                            multiply(target, weight, conv_grad, false);
                        }
                        add_back(geometry, &self.column_grads, rows.clone(), grad);
                    }
                }
            }
        }
    }
}
