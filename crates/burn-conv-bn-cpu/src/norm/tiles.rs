//! Forward's convolution again and backward, tile by tile, parallel over blocks of images.

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pulp::Arch;
use rayon::prelude::*;

use super::gradient::{Backward, GradSums, Gradients, OutputGrad};
use super::lines::{Converted, Step, conv_output_grad, sums_of, write_residual_grad};
use crate::blocks::{BLOCKS, Block, Share, shares};
use crate::conv::span::Span;
use crate::conv::tile::{Algorithm, BlockGrads, Output, TileScratch, Work};
use crate::conv::weight_blocks;
use crate::scratch::{ScratchPool, room};
use crate::simd::{prefetch_range, sweeps};
use crate::{Element, Real};

/// The two sums, with the convolution's output computed, stored or kept.
pub(super) fn sum<E: Element, A: Algorithm<E>>(
    pass: &Backward<'_, E>,
    algorithm: &A,
    output: Output<'_, E>,
    stored: Option<&mut [MaybeUninit<E>]>,
) -> GradSums {
    let geometry = pass.geometry;
    let blocks = geometry.blocks(BLOCKS);
    let pool = ScratchPool::<Scratch<A::Scratch, E>>::new();
    let parts: Vec<GradSums> = blocks
        .par_iter()
        .zip(output_shares(pass, stored, &blocks))
        .map(|(block, stored)| {
            pool.with(|scratch| {
                let mut sums = GradSums::new(geometry.channels_out());
                scratch.sum_block(pass, algorithm, block, (output, stored), &mut sums);
                sums
            })
        })
        .collect();
    GradSums::total(geometry.channels_out(), &parts)
}

/// Each block's share of a tensor of the output's shape, if there is one.
fn output_shares<'a, E: Element>(
    pass: &Backward<'_, E>,
    tensor: Option<&'a mut [MaybeUninit<E>]>,
    blocks: &[Block],
) -> Vec<Option<Share<'a, MaybeUninit<E>>>> {
    let planes = [pass.geometry.channels_out(), pass.geometry.positions()];
    let of_tensor = |all| shares(all, blocks, planes, |band| band.outputs.clone());
    optional(tensor.map(of_tensor), blocks)
}

fn optional<S>(shares: Option<Vec<S>>, blocks: &[Block]) -> Vec<Option<S>> {
    match shares {
        Some(shares) => shares.into_iter().map(Some).collect(),
        None => blocks.iter().map(|_| None).collect(),
    }
}

/// The gradients.
#[allow(unsafe_code)]
pub(super) fn backward<E: Element, A: Algorithm<E>>(
    step: &Step<'_, E>,
    algorithm: &A,
    output: Output<'_, E>,
    mut gradients: Gradients<'_, E>,
) {
    let pass = step.pass;
    let geometry = pass.geometry;
    let sums_len = match &gradients.weight {
        Some(_) => algorithm.weight_grad_len(),
        None => 0,
    };
    let blocks = geometry.blocks(match sums_len {
        0 => BLOCKS,
        _ => weight_blocks::<E, A>(algorithm),
    });
    let input_len = geometry.batch() * geometry.input_len();
    let input = gradients.input.as_mut();
    let input = input.map(|(grad, _)| room(grad, input_len));
    let planes = [geometry.channels[0], geometry.input_plane()];
    let of_input = |all| shares(all, &blocks, planes, |band| band.inputs.clone());
    let input_shares = optional(input.map(of_input), &blocks);
    let residual = gradients.residual.as_mut();
    let residual = residual.map(|grad| room(grad, pass.output_len()));
    let residual_shares = output_shares(pass, residual, &blocks);
    let pool = ScratchPool::<Scratch<A::Scratch, E>>::new();
    let items = blocks.iter().zip(input_shares).zip(residual_shares);
    let sums = sum_in_order(
        items,
        blocks.len(),
        sums_len,
        |((block, input), residual), sums| {
            let grads = BlockGradients {
                input,
                weight: (!sums.is_empty()).then_some(sums),
                residual,
            };
            pool.with(|scratch| scratch.backward_block(step, algorithm, block, output, grads));
        },
    );
    if let Some(grad) = gradients.weight {
        algorithm.weight_grad(sums, grad);
    }
    if let Some((grad, _)) = gradients.input {
        // SAFETY: the capacity is at least this length, and every value belongs to a block's share; and of a
        // share, all is written once the last tile of the last group is done.
        unsafe { grad.set_len(input_len) };
    }
    if let Some(grad) = gradients.residual {
        // SAFETY: the capacity is at least this length, and every value belongs to a block's share; and a block's
        // tiles have pieces for all of its channels and positions, which `write_residual_grad` writes.
        unsafe { grad.set_len(pass.output_len()) };
    }
}

/// Calls `task` with the items of all blocks, on all threads, and with a block's sums; returns these added in order.
pub(super) fn sum_in_order<I: Send, T: Real>(
    items: impl Iterator<Item = I> + Send,
    blocks: usize,
    len: usize,
    task: impl Fn(I, &mut [T]) + Sync,
) -> Vec<T> {
    let total = Mutex::new(InOrder::<T>::default());
    // In order, unlike rayon's halves: few blocks' sums wait for the one before.
    let queue = Mutex::new(items.enumerate());
    let next = || lock(&queue).next();
    (0..rayon::current_num_threads().min(blocks))
        .into_par_iter()
        .for_each(|_| {
            while let Some((index, item)) = next() {
                let mut sums = vec![T::ZERO; len];
                task(item, &mut sums);
                lock(&total).add(index, sums);
            }
        });
    std::mem::take(&mut lock(&total).sums)
}

/// A panic elsewhere leaves nothing behind that is read.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Asks for the next channel's values of all tensors of the output's shape, where a line of `len` starts at `at`.
pub(super) fn prefetch_next<E: Element>(pass: &Backward<'_, E>, at: usize, len: usize) {
    let next = at + pass.geometry.positions();
    let output_grad = match pass.output_grad {
        OutputGrad::Whole(all) => Some(all),
        OutputGrad::Pooled(_) => None,
    };
    for values in [output_grad, pass.output, pass.residual]
        .into_iter()
        .flatten()
    {
        prefetch_range(values, next..next + len);
    }
}

/// Sums of blocks, added in the blocks' order as they are made.
#[derive(Default)]
struct InOrder<T> {
    sums: Vec<T>,
    /// Blocks that are added, and the sums of later ones.
    added: usize,
    waiting: BTreeMap<usize, Vec<T>>,
}

impl<T: Real> InOrder<T> {
    fn add(&mut self, index: usize, sums: Vec<T>) {
        self.waiting.insert(index, sums);
        while let Some(sums) = self.waiting.remove(&self.added) {
            if self.added == 0 {
                self.sums = sums;
            } else {
                sweeps::add(Arch::new(), &mut self.sums, &sums);
            }
            self.added += 1;
        }
    }
}

/// A block's share of [`Gradients`].
struct BlockGradients<'a, 'b, E: Element> {
    input: Option<Share<'b, MaybeUninit<E>>>,
    /// In the algorithm's own form; added to.
    weight: Option<&'a mut [E::Real]>,
    residual: Option<Share<'b, MaybeUninit<E>>>,
}

/// Buffers of one thread.
#[derive(Default)]
struct Scratch<S, E: Element> {
    tiles: TileScratch<S, E>,
    converted: Converted<E::Real>,
    residual_grad: Vec<E::Real>,
}

impl<S: Default, E: Element> Scratch<S, E> {
    /// Adds a block to the sums, piece by piece whether `z` is kept or recomputed: the bits are the same.
    fn sum_block<A: Algorithm<E, Scratch = S>>(
        &mut self,
        pass: &Backward<'_, E>,
        algorithm: &A,
        block: &Block,
        (output, mut stored): (Output<'_, E>, Option<Share<'_, MaybeUninit<E>>>),
        sums: &mut GradSums,
    ) {
        let start = block.images.start * pass.geometry.output_len();
        let recomputes = matches!(output, Output::Computed);
        let work = Work {
            block,
            input: recomputes.then(|| pass.input(&block.images)),
            output: pass.of_images(output, &block.images),
            grads: None,
        };
        let converted = &mut self.converted;
        self.tiles.run(algorithm, work, |channel, range, line| {
            let at = start + range.start;
            prefetch_next(pass, at, range.len());
            if let Some(stored) = &mut stored {
                stored.prefetch_next(&range, pass.geometry.positions());
                E::write(line, stored.get(range).expect("there is no halo"));
            }
            let span = Span::of_tensor(pass.geometry, at, line.len());
            sums.add(channel, sums_of(pass, channel, span, line, converted));
        });
    }

    fn backward_block<A: Algorithm<E, Scratch = S>>(
        &mut self,
        step: &Step<'_, E>,
        algorithm: &A,
        block: &Block,
        output: Output<'_, E>,
        mut grads: BlockGradients<'_, '_, E>,
    ) {
        let start = block.images.start * step.pass.geometry.output_len();
        let loads = matches!(output, Output::Computed)
            || grads.weight.is_some()
            || (grads.input.is_some() && algorithm.input_grad_reads_input());
        let work = Work {
            block,
            input: loads.then(|| step.pass.input(&block.images)),
            output: step.pass.of_images(output, &block.images),
            grads: Some(BlockGrads {
                weight: grads.weight,
                input: grads.input.as_mut(),
            }),
        };
        let (converted, masked) = (&mut self.converted, &mut self.residual_grad);
        self.tiles.run(algorithm, work, |channel, range, line| {
            let at = start + range.start;
            prefetch_next(step.pass, at, range.len());
            let span = Span::of_tensor(step.pass.geometry, at, range.len());
            let residual = grads.residual.as_mut();
            if let Some(grad) = &residual {
                grad.prefetch_next(&range, step.pass.geometry.positions());
            }
            // The halo's belongs to the band before.
            if let Some(grad) = residual.and_then(|grad| grad.get(range)) {
                write_residual_grad(step.pass, channel, span, line, grad, converted, masked);
            }
            conv_output_grad(step, channel, span, line, converted);
        });
    }
}
