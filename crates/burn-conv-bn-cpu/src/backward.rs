//! The backward kernels, which mirror those of `forward`.

use pulp::Arch;
use rayon::prelude::*;

use crate::algorithm::{Algorithm, Task, choose};
use crate::forward::check;
use crate::pool::Pool;
use crate::simd::{self, ChannelGrad, Gate};
use crate::{Activation, Affine, Element, Geometry, Real};

/// Blocks of images that the norm's sums are taken over.
const SUM_BLOCKS: usize = 64;

/// Bytes that the blocks' weight gradients may take together, beyond two of them.
const WEIGHT_BYTES: usize = 16 << 20;

/// What both steps of the backward pass read.
#[derive(Clone, Copy, Debug)]
pub struct Backward<'a, E: Element> {
    /// Shapes.
    pub geometry: &'a Geometry,
    /// The convolution's input.
    pub input: &'a [E],
    /// The convolution's weight.
    pub weight: &'a [E::Real],
    /// Gradient of the output.
    pub output_grad: &'a [E],
    /// The norm, as in forward.
    pub affine: Affine<'a, E::Real>,
    /// The activation.
    pub activation: Activation,
    /// The output, if the pre-activation cannot be rebuilt from the convolution's output alone.
    pub output: Option<&'a [E]>,
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
pub struct Gradients<'a, E: Element> {
    /// The input's, and the weight that it goes through.
    pub input: Option<(&'a mut [E], &'a [E::Real])>,
    /// The weight's.
    pub weight: Option<&'a mut [E::Real]>,
    /// The residual's: `g`.
    pub residual: Option<&'a mut [E]>,
}

impl<'a, E: Element> Backward<'a, E> {
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
}

/// Sums of `g` and of `g * (z - mean)`, with the convolution's output `z` recomputed or at hand.
///
/// # Panics
///
/// Panics if a slice is not of the geometry's size.
pub fn grad_sums<E: Element>(pass: &Backward<'_, E>, conv_output: ConvOutput<'_, E>) -> GradSums {
    struct Sums<'a, E: Element> {
        pass: &'a Backward<'a, E>,
        conv_output: ConvOutput<'a, E>,
    }
    impl<E: Element> Task<E> for Sums<'_, E> {
        type Output = GradSums;

        fn run<A: Algorithm<E>>(self, algorithm: &A) -> GradSums {
            sum_blocks(self.pass, algorithm, self.conv_output)
        }
    }
    pass.check();
    let weight = match conv_output {
        ConvOutput::Kept(_) => None,
        ConvOutput::Recompute | ConvOutput::Store(_) => Some(pass.weight),
    };
    choose(pass.geometry, weight, None, Sums { pass, conv_output })
}

fn sum_blocks<E: Element, A: Algorithm<E>>(
    pass: &Backward<'_, E>,
    algorithm: &A,
    conv_output: ConvOutput<'_, E>,
) -> GradSums {
    let geometry = pass.geometry;
    let images = geometry.images_per_block(SUM_BLOCKS);
    let (input_len, output_len) = (geometry.input_len(), geometry.output_len());
    let blocks = geometry.batch().div_ceil(images);
    let conv_outputs: Vec<ConvOutput<'_, E>> = match conv_output {
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
    let pool = Pool::<Scratch<A::Scratch, E>>::new();
    let parts: Vec<GradSums> = conv_outputs
        .into_par_iter()
        .zip(pass.input.par_chunks(images * input_len))
        .enumerate()
        .map(|(block, (conv_output, input))| {
            pool.with(|scratch| {
                let mut sums = GradSums::new(geometry.channels_out());
                let start = block * images * output_len;
                match conv_output {
                    ConvOutput::Recompute => {
                        scratch.sum_block(pass, algorithm, input, start, &mut sums, None);
                    }
                    ConvOutput::Store(block) => {
                        scratch.sum_block(pass, algorithm, input, start, &mut sums, Some(block));
                    }
                    ConvOutput::Kept(block) => {
                        let positions = geometry.positions();
                        for (index, values) in block.chunks_exact(positions).enumerate() {
                            let channel = index % geometry.channels_out();
                            let values = E::read(values, &mut scratch.line);
                            let at = start + index * positions;
                            sums.add(pass, channel, at, values, &mut scratch.converted);
                        }
                    }
                }
                sums
            })
        })
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
    fn add<E: Element>(
        &mut self,
        pass: &Backward<'_, E>,
        channel: usize,
        start: usize,
        conv_output: &[E::Real],
        converted: &mut Converted<E::Real>,
    ) {
        let len = conv_output.len();
        let output_grad = E::read(
            &pass.output_grad[start..][..len],
            &mut converted.output_grad,
        );
        let (grad, grad_deviation) = simd::grad_sums(
            Arch::new(),
            conv_output,
            output_grad,
            pass.affine.channel(channel),
            gate(pass, start, len, &mut converted.output),
        );
        self.grad[channel] += grad.to_f64();
        self.grad_deviation[channel] += grad_deviation.to_f64();
    }
}

/// What tells where the activation passes the gradient, for `len` values from `start` on.
fn gate<'a, E: Element>(
    pass: &Backward<'a, E>,
    start: usize,
    len: usize,
    converted: &'a mut Vec<E::Real>,
) -> Gate<'a, E::Real> {
    match (pass.activation, pass.output) {
        (Activation::Identity, _) => Gate::Open,
        (Activation::Relu, None) => Gate::PreActivation,
        (Activation::Relu, Some(output)) => {
            Gate::Output(E::read(&output[start..][..len], converted))
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
pub fn backward<E: Element>(
    pass: &Backward<'_, E>,
    conv_output: ConvOutput<'_, E>,
    coefficients: InputGradCoefficients<'_, E::Real>,
    gradients: Gradients<'_, E>,
) {
    struct Grads<'a, E: Element> {
        pass: &'a Backward<'a, E>,
        kept: Option<&'a [E]>,
        coefficients: InputGradCoefficients<'a, E::Real>,
        input: Option<&'a mut [E]>,
        weight: Option<&'a mut [E::Real]>,
        residual: Option<&'a mut [E]>,
    }
    impl<E: Element> Task<E> for Grads<'_, E> {
        type Output = ();

        fn run<A: Algorithm<E>>(self, algorithm: &A) {
            let step = Step {
                pass: self.pass,
                algorithm,
                coefficients: self.coefficients,
            };
            backward_blocks(&step, self.kept, self.input, self.weight, self.residual);
        }
    }
    pass.check();
    let kept = match conv_output {
        ConvOutput::Recompute => None,
        ConvOutput::Kept(all) => {
            assert_eq!(all.len(), pass.output_grad.len());
            Some(all)
        }
        ConvOutput::Store(_) => panic!("the last step of the backward pass stores nothing"),
    };
    let (input, input_weight) = gradients.input.unzip();
    let (weight, residual) = (gradients.weight, gradients.residual);
    assert!(input_weight.is_none_or(|weight| weight.len() == pass.weight.len()));
    assert!(
        input
            .as_ref()
            .is_none_or(|grad| grad.len() == pass.input.len())
    );
    assert!(
        weight
            .as_ref()
            .is_none_or(|grad| grad.len() == pass.weight.len())
    );
    assert!(
        residual
            .as_ref()
            .is_none_or(|grad| grad.len() == pass.output_grad.len())
    );
    let grads = Grads {
        pass,
        kept,
        coefficients,
        input,
        weight,
        residual,
    };
    let weight = kept.is_none().then_some(pass.weight);
    choose(pass.geometry, weight, input_weight, grads);
}

fn backward_blocks<E: Element, A: Algorithm<E>>(
    step: &Step<'_, E, A>,
    kept: Option<&[E]>,
    input_grad: Option<&mut [E]>,
    weight_grad: Option<&mut [E::Real]>,
    residual_grad: Option<&mut [E]>,
) {
    let (pass, algorithm) = (step.pass, step.algorithm);
    let geometry = pass.geometry;
    let sums_len = match &weight_grad {
        Some(_) => algorithm.weight_grad_len(),
        None => 0,
    };
    let bytes = algorithm.weight_grad_len() * size_of::<E::Real>();
    let most = (WEIGHT_BYTES / bytes).clamp(2, SUM_BLOCKS);
    let images = geometry.images_per_block(most);
    let blocks = geometry.batch().div_ceil(images);
    let (input_len, output_len) = (geometry.input_len(), geometry.output_len());
    let input_blocks = split(input_grad, images * input_len, blocks);
    let residual_blocks = split(residual_grad, images * output_len, blocks);
    let pool = Pool::<Scratch<A::Scratch, E>>::new();
    let parts: Vec<Vec<E::Real>> = input_blocks
        .into_par_iter()
        .zip(residual_blocks)
        .zip(pass.input.par_chunks(images * input_len))
        .enumerate()
        .map(|(block, ((input_grad, residual_grad), input))| {
            pool.with(|scratch| {
                let mut sums = vec![E::Real::ZERO; sums_len];
                let start = block * images * output_len;
                let len = input.len() / input_len * output_len;
                scratch.backward_block(
                    step,
                    Block {
                        input,
                        start,
                        conv_output: kept.map(|kept| &kept[start..][..len]),
                        input_grad,
                        weight_grad: (!sums.is_empty()).then_some(sums.as_mut_slice()),
                        residual_grad,
                    },
                );
                sums
            })
        })
        .collect();
    if let Some(grad) = weight_grad {
        let arch = Arch::new();
        let mut parts = parts.into_iter();
        let mut sums = parts.next().unwrap_or_default();
        for part in parts {
            simd::add(arch, &mut sums, &part);
        }
        algorithm.weight_grad(&sums, grad);
    }
}

fn split<T>(all: Option<&mut [T]>, len: usize, blocks: usize) -> Vec<Option<&mut [T]>> {
    match all {
        Some(all) => all.chunks_mut(len).map(Some).collect(),
        None => (0..blocks).map(|_| None).collect(),
    }
}

/// What the backward pass of each block reads.
struct Step<'a, E: Element, A> {
    pass: &'a Backward<'a, E>,
    algorithm: &'a A,
    coefficients: InputGradCoefficients<'a, E::Real>,
}

/// A block of images and its share of [`Gradients`].
struct Block<'a, E: Element> {
    input: &'a [E],
    /// Where its output starts in the whole.
    start: usize,
    /// The convolution's output, if it is at hand.
    conv_output: Option<&'a [E]>,
    input_grad: Option<&'a mut [E]>,
    /// Added to, in the algorithm's form.
    weight_grad: Option<&'a mut [E::Real]>,
    residual_grad: Option<&'a mut [E]>,
}

/// Buffers of one thread.
struct Scratch<S, E: Element> {
    algorithm: S,
    /// A piece of one channel's output.
    line: Vec<E::Real>,
    rounded: Vec<E>,
    converted: Converted<E::Real>,
}

/// Lines converted to the type that is computed in.
struct Converted<T> {
    output: Vec<T>,
    output_grad: Vec<T>,
    residual_grad: Vec<T>,
}

impl<S: Default, E: Element> Default for Scratch<S, E> {
    fn default() -> Self {
        Self {
            algorithm: S::default(),
            line: Vec::new(),
            rounded: Vec::new(),
            converted: Converted {
                output: Vec::new(),
                output_grad: Vec::new(),
                residual_grad: Vec::new(),
            },
        }
    }
}

impl<S: Default, E: Element> Scratch<S, E> {
    /// Recomputes a block of images and adds to its sums. `start` is where the block's output
    /// stands in the whole.
    fn sum_block<A: Algorithm<E, Scratch = S>>(
        &mut self,
        pass: &Backward<'_, E>,
        algorithm: &A,
        input: &[E],
        start: usize,
        sums: &mut GradSums,
        mut store: Option<&mut [E]>,
    ) {
        let geometry = pass.geometry;
        let (group_out, positions) = (geometry.group_out(), geometry.positions());
        let tiles = algorithm.tiles(input.len() / geometry.input_len());
        for group in 0..geometry.groups() {
            for tile in &tiles {
                algorithm.load(&mut self.algorithm, input, group, tile);
                algorithm.convolve(&mut self.algorithm, group, tile);
                for index in 0..group_out {
                    let channel = group * group_out + index;
                    for (number, piece) in algorithm.pieces(tile).iter().enumerate() {
                        self.recomputed(algorithm, tile, number, piece.len, index);
                        let from = channel * positions + piece.start;
                        if let Some(store) = &mut store {
                            E::store(&self.line, &mut store[from..][..piece.len]);
                        }
                        let converted = &mut self.converted;
                        sums.add(pass, channel, start + from, &self.line, converted);
                    }
                }
            }
        }
    }

    /// Takes a piece of one of the group's channels to `self.line`, rounded as it was in forward.
    fn recomputed<A: Algorithm<E, Scratch = S>>(
        &mut self,
        algorithm: &A,
        tile: &A::Tile,
        piece: usize,
        len: usize,
        channel: usize,
    ) {
        self.line.resize(len, E::Real::ZERO);
        algorithm.gather(&mut self.algorithm, tile, piece, channel, &mut self.line);
        E::round(&mut self.line, &mut self.rounded);
    }

    fn backward_block<A: Algorithm<E, Scratch = S>>(
        &mut self,
        step: &Step<'_, E, A>,
        mut block: Block<'_, E>,
    ) {
        let (algorithm, geometry) = (step.algorithm, step.pass.geometry);
        let tiles = algorithm.tiles(block.input.len() / geometry.input_len());
        let group_sums = algorithm.weight_grad_len() / geometry.groups();
        for group in 0..geometry.groups() {
            algorithm.begin(&mut self.algorithm);
            for tile in &tiles {
                if block.conv_output.is_none() || block.weight_grad.is_some() {
                    algorithm.load(&mut self.algorithm, block.input, group, tile);
                }
                if block.conv_output.is_none() {
                    algorithm.convolve(&mut self.algorithm, group, tile);
                }
                self.conv_output_grad(step, &mut block, group, tile);
                if let Some(sums) = &mut block.weight_grad {
                    let sums = &mut sums[group * group_sums..][..group_sums];
                    algorithm.add_weight_grad(&mut self.algorithm, tile, sums);
                }
                if let Some(grad) = &mut block.input_grad {
                    algorithm.input_grad(&mut self.algorithm, group, tile, grad);
                }
            }
        }
    }

    /// Makes the gradient of the convolution's output at a tile of one group, in the place of that
    /// output if it is not at hand.
    fn conv_output_grad<A: Algorithm<E, Scratch = S>>(
        &mut self,
        step: &Step<'_, E, A>,
        block: &mut Block<'_, E>,
        group: usize,
        tile: &A::Tile,
    ) {
        let (pass, algorithm, coefficients) = (step.pass, step.algorithm, step.coefficients);
        let (group_out, positions) = (pass.geometry.group_out(), pass.geometry.positions());
        let arch = Arch::new();
        for index in 0..group_out {
            let channel = group * group_out + index;
            for (number, piece) in algorithm.pieces(tile).iter().enumerate() {
                let from = channel * positions + piece.start;
                let at = block.start + from;
                match block.conv_output {
                    Some(kept) => {
                        self.line.resize(piece.len, E::Real::ZERO);
                        E::load(&kept[from..][..piece.len], &mut self.line);
                    }
                    None => self.recomputed(algorithm, tile, number, piece.len, index),
                }
                let converted = &mut self.converted;
                let output_grad = E::read(
                    &pass.output_grad[at..][..piece.len],
                    &mut converted.output_grad,
                );
                let gate = gate(pass, at, piece.len, &mut converted.output);
                let affine = pass.affine.channel(channel);
                let coefficients = ChannelGrad {
                    scale: coefficients.scale[channel],
                    slope: coefficients.slope[channel],
                    offset: coefficients.offset[channel],
                };
                let line = &mut self.line;
                if let Some(grad) = &mut block.residual_grad {
                    let grad = &mut grad[from..][..piece.len];
                    E::update(grad, &mut converted.residual_grad, |grad| {
                        simd::activation_grad(arch, line, output_grad, affine, gate, grad);
                    });
                }
                simd::conv_output_grad(arch, line, output_grad, affine, gate, coefficients);
                algorithm.scatter(&mut self.algorithm, tile, number, index, line);
            }
            algorithm.seal(&mut self.algorithm, tile, index);
        }
    }
}
