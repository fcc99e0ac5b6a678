//! Forward and backward, chunk by chunk of output positions, parallel over channels.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::gradient::{Backward, GradSums, Gradients};
use super::lines::{Converted, Step, conv_output_grad, sums_of, write_residual_grad};
use crate::conv::channels::{ByChannels, Rows};
use crate::conv::span::Span;
use crate::conv::tile::Output;
use crate::scratch::{ScratchPool, room};
use crate::{Element, Geometry, Real};

/// Fewest lines of a channel and image that a thread copies at a time.
const LINES: usize = 64;

/// The convolution. `see` gets each channel's row of each chunk.
pub(super) fn conv<E: Element, P: ByChannels<E>>(
    algorithm: &P,
    input: &[E],
    weight: &[E::Real],
    output: &mut [MaybeUninit<E>],
    mut see: impl FnMut(usize, &[E::Real]),
) {
    let geometry = algorithm.geometry();
    let (mut scratch, mut rows) = (P::Scratch::default(), Rows::default());
    for chunk in algorithm.chunks(Span::all(geometry)) {
        rows.resize(geometry.channels_out(), chunk.len);
        algorithm.convolve(&mut scratch, input, weight, chunk, &mut rows, 0);
        round::<E>(geometry, chunk, &mut rows, 0);
        for channel in 0..geometry.channels_out() {
            see(channel, &rows.values[channel * rows.pitch..][..chunk.len]);
        }
        write(geometry, chunk, &rows, output);
    }
}

/// The two sums, with the convolution's output computed, stored or kept.
pub(super) fn sum<E: Element, P: ByChannels<E>>(
    pass: &Backward<'_, E>,
    algorithm: &P,
    output: Output<'_, E>,
    mut stored: Option<&mut [MaybeUninit<E>]>,
) -> GradSums {
    let kept = match output {
        Output::Kept(kept) => Some(kept),
        _ => None,
    };
    let geometry = pass.geometry;
    let channels = geometry.channels_out();
    let (mut scratch, mut rows) = (P::Scratch::default(), Rows::default());
    let lines = ScratchPool::<Converted<E::Real>>::new();
    let mut sums = GradSums::new(channels);
    for chunk in algorithm.chunks(Span::all(geometry)) {
        rows.resize(channels, chunk.len);
        compute(pass, algorithm, kept, &mut scratch, chunk, &mut rows, 0);
        if let Some(stored) = &mut stored {
            write(geometry, chunk, &rows, stored);
        }
        let pitch = rows.pitch;
        let of_channels: Vec<[f64; 2]> = rows
            .of(channels)
            .par_chunks_exact(pitch)
            .enumerate()
            .map(|(channel, row)| {
                let row = &row[..chunk.len];
                lines.with(|converted| sums_of(pass, channel, chunk, row, converted))
            })
            .collect();
        for (channel, of_channel) in of_channels.into_iter().enumerate() {
            sums.add(channel, of_channel);
        }
    }
    sums
}

/// The gradients. For the input's gradient, `scale` multiplies each channel of the output's.
#[allow(unsafe_code)]
pub(super) fn backward<E: Element, P: ByChannels<E>>(
    step: &Step<'_, E>,
    algorithm: &P,
    output: Output<'_, E>,
    scale: Option<&[E::Real]>,
    gradients: Gradients<'_, E>,
) {
    let pass = step.pass;
    let geometry = pass.geometry;
    let channels = geometry.channels_out();
    let Gradients {
        mut input,
        mut weight,
        mut residual,
    } = gradients;
    let input_len = geometry.batch() * geometry.input_len();
    let output_len = geometry.batch() * geometry.output_len();
    let mut input_grad = input
        .as_mut()
        .map(|(grad, weight)| (room(grad, input_len), *weight));
    let mut residual_grad = residual.as_mut().map(|grad| room(grad, output_len));
    if let Some(grad) = &mut weight {
        grad.clear();
        grad.resize(geometry.weight_len(), E::Real::ZERO);
    }
    let (mut scratch, mut rows, mut grad_rows) =
        (P::Scratch::default(), Rows::default(), Vec::new());
    let lines = ScratchPool::<(Converted<E::Real>, Vec<E::Real>)>::new();
    for block in algorithm.blocks() {
        rows.resize(channels, block.len);
        let room = input_grad.as_ref().map(|(grad, _)| &**grad);
        compute_block(
            step,
            algorithm,
            (output, room),
            &mut scratch,
            block,
            &mut rows,
        );
        if let Some(grad) = &mut residual_grad {
            for_each_line(geometry, block, &rows, grad, |channel, span, row, grad| {
                lines.with(|(converted, masked)| {
                    write_residual_grad(pass, channel, span, row, grad, converted, masked);
                });
            });
        }
        let pitch = rows.pitch;
        rows.of(channels)
            .par_chunks_exact_mut(pitch)
            .enumerate()
            .for_each(|(channel, row)| {
                let row = &mut row[..block.len];
                lines.with(|(converted, _)| conv_output_grad(step, channel, block, row, converted));
            });
        if let Some(grad) = &mut weight {
            let input = pass.input.unwrap_or_default();
            for chunk in algorithm.chunks(block) {
                let column = chunk.start - block.start;
                algorithm.add_weight_grad(&mut scratch, input, chunk, &rows, column, grad);
            }
        }
        if let Some((grad, weight)) = &mut input_grad {
            algorithm.input_grad(&mut scratch, weight, scale, block, &rows, &mut grad_rows);
            write_input_grad(geometry, block, &grad_rows, grad);
        }
    }
    if let Some((grad, _)) = input {
        // SAFETY: the capacity is at least this length, every value belongs to an image of a block, and
        // `write_input_grad` writes all of an image.
        unsafe { grad.set_len(input_len) };
    }
    if let Some(grad) = residual {
        // SAFETY: the capacity is at least this length, every value belongs to a block, and `for_each_line` passes
        // every channel of each of their images to `write_residual_grad`, which writes it.
        unsafe { grad.set_len(output_len) };
    }
}

/// Fills the rows of a block with the convolution's output, which may lie in the room for the input's gradient.
#[allow(unsafe_code)]
fn compute_block<E: Element, P: ByChannels<E>>(
    step: &Step<'_, E>,
    algorithm: &P,
    (output, room): (Output<'_, E>, Option<&[MaybeUninit<E>]>),
    scratch: &mut P::Scratch,
    block: Span,
    rows: &mut Rows<E::Real>,
) {
    let kept = match output {
        Output::Computed => None,
        Output::Kept(kept) => Some(kept),
        // SAFETY: `Overwritten` promises that all values are initialized.
        Output::Overwritten => room.map(|room| unsafe { room.assume_init_ref() }),
    };
    for chunk in algorithm.chunks(block) {
        let column = chunk.start - block.start;
        compute(step.pass, algorithm, kept, scratch, chunk, rows, column);
    }
}

/// Fills the columns of a chunk from `column` on with the convolution's output, kept or computed and rounded.
fn compute<E: Element, P: ByChannels<E>>(
    pass: &Backward<'_, E>,
    algorithm: &P,
    kept: Option<&[E]>,
    scratch: &mut P::Scratch,
    chunk: Span,
    rows: &mut Rows<E::Real>,
    column: usize,
) {
    let geometry = pass.geometry;
    let Some(kept) = kept else {
        let (input, weight) = (
            pass.input.unwrap_or_default(),
            pass.weight.unwrap_or_default(),
        );
        algorithm.convolve(scratch, input, weight, chunk, rows, column);
        return round::<E>(geometry, chunk, rows, column);
    };
    let pitch = rows.pitch;
    rows.of(geometry.channels_out())
        .par_chunks_exact_mut(pitch)
        .enumerate()
        .for_each(|(channel, row)| {
            chunk.load(geometry, channel, kept, &mut row[column..][..chunk.len]);
        });
}

/// Rounds the values of a chunk as they are stored.
fn round<E: Element>(geometry: &Geometry, chunk: Span, rows: &mut Rows<E::Real>, column: usize) {
    if size_of::<E>() == size_of::<E::Real>() {
        return;
    }
    let pitch = rows.pitch;
    let scratch = ScratchPool::new();
    rows.of(geometry.channels_out())
        .par_chunks_exact_mut(pitch)
        .for_each(|row| {
            scratch.with(|rounded| E::round(&mut row[column..][..chunk.len], rounded));
        });
}

/// Calls `task` for each channel of each image of a span with the part of its row, as a span and as values, and the
/// part of its line in `tensor`.
fn for_each_line<E: Element>(
    geometry: &Geometry,
    span: Span,
    rows: &Rows<E::Real>,
    tensor: &mut [MaybeUninit<E>],
    task: impl Fn(usize, Span, &[E::Real], &mut [MaybeUninit<E>]) + Sync,
) {
    let (channels, positions) = (geometry.channels_out(), geometry.positions());
    let (first, end) = (span.start / positions, span.start + span.len);
    let lines = first * channels * positions..end.div_ceil(positions) * channels * positions;
    tensor[lines]
        .par_chunks_exact_mut(positions)
        .with_min_len(LINES)
        .enumerate()
        .for_each(|(index, line)| {
            let (image, channel) = (first + index / channels, index % channels);
            let start = span.start.max(image * positions);
            let len = end.min((image + 1) * positions) - start;
            let row = &rows.values[channel * rows.pitch + start - span.start..][..len];
            let line = &mut line[start - image * positions..][..len];
            task(channel, Span { start, len }, row, line);
        });
}

/// Writes a chunk of the output.
fn write<E: Element>(
    geometry: &Geometry,
    chunk: Span,
    rows: &Rows<E::Real>,
    output: &mut [MaybeUninit<E>],
) {
    for_each_line(geometry, chunk, rows, output, |_, _, row, line| {
        E::write(row, line)
    });
}

/// Writes the input's gradient of a block of images, from a row for each channel.
fn write_input_grad<E: Element>(
    geometry: &Geometry,
    block: Span,
    rows: &[E::Real],
    grad: &mut [MaybeUninit<E>],
) {
    let (channels, plane) = (geometry.channels[0], geometry.input_plane());
    let first = block.start / geometry.positions();
    let images = block.len / geometry.positions();
    let len = geometry.input_len();
    grad[first * len..][..images * len]
        .par_chunks_exact_mut(plane)
        .with_min_len(LINES)
        .enumerate()
        .for_each(|(index, line)| {
            let (image, channel) = (index / channels, index % channels);
            E::write(&rows[(channel * images + image) * plane..][..plane], line);
        });
}
