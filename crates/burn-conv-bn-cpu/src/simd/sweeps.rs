//! Sweeps over a channel's values, compiled for each vector unit and chosen at run time.
//!
//! Sums run in [`LANES`] partial sums, so that the compiler can use vectors: it may not reorder a sum
//! by itself.

use std::mem::MaybeUninit;

use pulp::{Arch, NullaryFnOnce};

use crate::activation::specialize;
use crate::{Activation, Real};

/// Partial sums of a sweep: two vectors of the widest unit in single precision, so that an addition
/// does not wait for the one before.
const LANES: usize = 32;

/// A closure, compiled for the vector unit of its dispatch.
///
/// Dispatching the closure itself goes through a shim that may stay a call, compiled for the oldest unit.
pub(crate) struct Sweep<F>(pub(crate) F);

impl<R, F: FnMut() -> R> NullaryFnOnce for Sweep<F> {
    type Output = R;

    #[inline(always)]
    fn call(mut self) -> R {
        (self.0)()
    }
}

/// `copy_from_slice` without its call, which takes longer than a row's few vectors.
///
/// # Panics
///
/// Panics if the slices differ in length.
#[inline(always)]
pub(crate) fn copy<T: Copy>(source: &[T], target: &mut [T]) {
    copy_as(source, target, |value| value);
}

/// As [`copy`], into uninitialized memory.
///
/// # Panics
///
/// Panics if the slices differ in length.
#[inline(always)]
pub(crate) fn write<T: Copy>(source: &[T], target: &mut [MaybeUninit<T>]) {
    copy_as(source, target, MaybeUninit::new);
}

#[inline(always)]
fn copy_as<T: Copy, U: Copy>(source: &[T], target: &mut [U], to: impl Fn(T) -> U + Copy) {
    const CHUNK: usize = 16;
    assert_eq!(source.len(), target.len());
    if source.len() < CHUNK {
        if !copy_ends::<T, U, 8>(source, target, to) && !copy_ends::<T, U, 4>(source, target, to) {
            for (target, source) in target.iter_mut().zip(source) {
                *target = to(*source);
            }
        }
        return;
    }
    let (targets, _) = target.as_chunks_mut::<CHUNK>();
    let (sources, _) = source.as_chunks::<CHUNK>();
    for (target, source) in targets.iter_mut().zip(sources) {
        *target = source.map(to);
    }
    // Remainder: redo the last full chunk, overlapping what is written.
    if let (Some(target), Some(source)) = (
        target.last_chunk_mut::<CHUNK>(),
        source.last_chunk::<CHUNK>(),
    ) {
        *target = source.map(to);
    }
}

/// Copies the first and the last `N` of at most `2 N` values, if there are as many.
#[inline(always)]
fn copy_ends<T: Copy, U: Copy, const N: usize>(
    source: &[T],
    target: &mut [U],
    to: impl Fn(T) -> U + Copy,
) -> bool {
    let (Some(first), Some(last)) = (source.first_chunk::<N>(), source.last_chunk::<N>()) else {
        return false;
    };
    if let Some(target) = target.first_chunk_mut::<N>() {
        *target = first.map(to);
    }
    if let Some(target) = target.last_chunk_mut::<N>() {
        *target = last.map(to);
    }
    true
}

/// `fill` without its call for the few zeros of a row's end.
#[inline(always)]
pub(crate) fn zero<T: Real>(values: &mut [T]) {
    const FEW: usize = 16;
    if values.len() > FEW {
        values.fill(T::ZERO);
        return;
    }
    for value in values {
        *value = T::ZERO;
    }
}

#[inline(always)]
fn total<T: Real>(lanes: [T; LANES]) -> T {
    let mut lanes = lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Mean and sum of squared deviations.
pub(crate) fn moments<T: Real>(arch: Arch, values: &[T]) -> (f64, f64) {
    arch.dispatch(Sweep(
        #[inline(always)]
        || {
            // Shifted by a value of the channel, a sum keeps the digits of the spread.
            let origin = values.first().copied().unwrap_or_default();
            let mut sums = [T::ZERO; LANES];
            let (chunks, rest) = values.as_chunks::<LANES>();
            for chunk in chunks {
                for lane in 0..LANES {
                    sums[lane] += chunk[lane] - origin;
                }
            }
            for (sum, value) in sums.iter_mut().zip(rest) {
                *sum += *value - origin;
            }
            let mean = origin.to_f64() + total(sums).to_f64() / values.len() as f64;

            let center = T::from_f64(mean);
            let mut squares = [T::ZERO; LANES];
            for chunk in chunks {
                for lane in 0..LANES {
                    let deviation = chunk[lane] - center;
                    squares[lane] += deviation * deviation;
                }
            }
            for (square, value) in squares.iter_mut().zip(rest) {
                let deviation = *value - center;
                *square += deviation * deviation;
            }
            (mean, total(squares).to_f64())
        },
    ))
}

/// One channel's mean, scale and shift.
#[derive(Clone, Copy)]
pub(crate) struct ChannelAffine<T> {
    pub(crate) mean: T,
    pub(crate) scale: T,
    pub(crate) shift: T,
}

impl<T: Real> ChannelAffine<T> {
    #[inline(always)]
    fn apply(self, value: T) -> T {
        (value - self.mean) * self.scale + self.shift
    }
}

/// `values = activation(affine(values) + residual)`.
pub(crate) fn normalize<T: Real>(
    arch: Arch,
    values: &mut [T],
    affine: ChannelAffine<T>,
    residual: Option<&[T]>,
    activation: Activation,
) {
    arch.dispatch(Sweep(
        #[inline(always)]
        || {
            specialize!(activation, function => match residual {
                None => {
                    for value in values.iter_mut() {
                        *value = function.forward(affine.apply(*value));
                    }
                }
                Some(residual) => {
                    for (value, residual) in values.iter_mut().zip(residual) {
                        *value = function.forward(affine.apply(*value) + *residual);
                    }
                }
            })
        },
    ))
}

/// The mask of a ReLU's gradient.
#[derive(Clone, Copy)]
pub(crate) enum Gate<'a, T> {
    /// No mask.
    Open,
    /// The sign of the pre-activation, recomputed from the convolution's output.
    PreActivation,
    /// The sign of the op's output.
    Output(&'a [T]),
}

/// `sum(g)` and `sum(g * (z - mean))` of one channel's values.
pub(crate) fn grad_sums<T: Real>(
    arch: Arch,
    conv_output: &[T],
    output_grad: &[T],
    affine: ChannelAffine<T>,
    gate: Gate<'_, T>,
) -> (T, T) {
    /// `grad` returns `g` from a value of `gates` and the output's gradient.
    #[inline(always)]
    fn sweep<T: Real>(
        conv_output: &[T],
        output_grad: &[T],
        gates: &[T],
        mean: T,
        grad: impl Fn(T, T) -> T,
    ) -> (T, T) {
        let mut grads = [T::ZERO; LANES];
        let mut products = [T::ZERO; LANES];
        let (z_chunks, z_rest) = conv_output.as_chunks::<LANES>();
        let (dy_chunks, dy_rest) = output_grad.as_chunks::<LANES>();
        let (gate_chunks, gate_rest) = gates.as_chunks::<LANES>();
        for ((z, dy), gate) in z_chunks.iter().zip(dy_chunks).zip(gate_chunks) {
            for lane in 0..LANES {
                let g = grad(gate[lane], dy[lane]);
                grads[lane] += g;
                products[lane] += g * (z[lane] - mean);
            }
        }
        for (lane, ((z, dy), gate)) in z_rest.iter().zip(dy_rest).zip(gate_rest).enumerate() {
            let g = grad(*gate, *dy);
            grads[lane] += g;
            products[lane] += g * (*z - mean);
        }
        (total(grads), total(products))
    }
    let mean = affine.mean;
    arch.dispatch(Sweep(
        #[inline(always)]
        || match gate {
            Gate::Open => sweep(
                conv_output,
                output_grad,
                conv_output,
                mean,
                #[inline(always)]
                |_, dy| dy,
            ),
            Gate::PreActivation => sweep(
                conv_output,
                output_grad,
                conv_output,
                mean,
                #[inline(always)]
                |z, dy| Activation::Relu.backward(affine.apply(z), dy),
            ),
            Gate::Output(output) => sweep(
                conv_output,
                output_grad,
                output,
                mean,
                #[inline(always)]
                |y, dy| Activation::Relu.backward(y, dy),
            ),
        },
    ))
}

/// Per-channel coefficients of `scale * g + slope * (z - mean) + offset`.
#[derive(Clone, Copy)]
pub(crate) struct ChannelGrad<T> {
    pub(crate) scale: T,
    pub(crate) slope: T,
    pub(crate) offset: T,
}

/// The argument of the activation's derivative.
#[derive(Clone, Copy)]
pub(crate) enum Argument<'a, T> {
    /// The pre-activation, recomputed from the convolution's output and the residual.
    PreActivation(Option<&'a [T]>),
    /// The op's output.
    Output(&'a [T]),
}

/// `g` of one channel's values.
pub(crate) fn activation_grad<T: Real>(
    arch: Arch,
    conv_output: &[T],
    output_grad: &[T],
    affine: ChannelAffine<T>,
    (activation, argument): (Activation, Argument<'_, T>),
    target: &mut [T],
) {
    arch.dispatch(Sweep(
        #[inline(always)]
        || {
            let targets = target.iter_mut().zip(output_grad);
            specialize!(activation, function => match argument {
                Argument::PreActivation(None) => {
                    for ((target, dy), z) in targets.zip(conv_output) {
                        *target = function.backward(affine.apply(*z), *dy);
                    }
                }
                Argument::PreActivation(Some(residual)) => {
                    for (((target, dy), z), residual) in targets.zip(conv_output).zip(residual) {
                        *target = function.backward(affine.apply(*z) + *residual, *dy);
                    }
                }
                Argument::Output(output) => {
                    for ((target, dy), y) in targets.zip(output) {
                        *target = function.backward(*y, *dy);
                    }
                }
            })
        },
    ));
}

/// Replaces one channel's values of the convolution's output `z` by their gradient or, without coefficients,
/// by `g`, which depends on `z` through the gate alone.
pub(crate) fn conv_output_grad<T: Real>(
    arch: Arch,
    conv_output: &mut [T],
    output_grad: &[T],
    affine: ChannelAffine<T>,
    gate: Gate<'_, T>,
    coefficients: Option<ChannelGrad<T>>,
) {
    #[inline(always)]
    fn sweep<T: Real>(
        conv_output: &mut [T],
        output_grad: &[T],
        affine: ChannelAffine<T>,
        gate: Gate<'_, T>,
        gradient: impl Fn(T, T) -> T,
    ) {
        let values = conv_output.iter_mut().zip(output_grad);
        match gate {
            Gate::Open => {
                for (z, dy) in values {
                    *z = gradient(*z, *dy);
                }
            }
            Gate::PreActivation => {
                for (z, dy) in values {
                    *z = gradient(*z, Activation::Relu.backward(affine.apply(*z), *dy));
                }
            }
            Gate::Output(output) => {
                for ((z, dy), y) in values.zip(output) {
                    *z = gradient(*z, Activation::Relu.backward(*y, *dy));
                }
            }
        }
    }
    let mean = affine.mean;
    arch.dispatch(Sweep(
        #[inline(always)]
        || match coefficients {
            Some(ChannelGrad {
                scale,
                slope,
                offset,
            }) => sweep(
                conv_output,
                output_grad,
                affine,
                gate,
                #[inline(always)]
                |z, g| (z - mean) * slope + offset + g * scale,
            ),
            None => sweep(
                conv_output,
                output_grad,
                affine,
                gate,
                #[inline(always)]
                |_, g| g,
            ),
        },
    ));
}

/// Sum of the values, in the vector unit of the caller's dispatch.
#[inline(always)]
pub(crate) fn sum<T: Real>(values: &[T]) -> T {
    let mut sums = [T::ZERO; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            sums[lane] += chunk[lane];
        }
    }
    for (sum, value) in sums.iter_mut().zip(rest) {
        *sum += *value;
    }
    total(sums)
}

/// As [`sum`], with a dispatch of its own.
pub(crate) fn total_of<T: Real>(arch: Arch, values: &[T]) -> T {
    arch.dispatch(Sweep(
        #[inline(always)]
        || sum(values),
    ))
}

/// `target += source`.
pub(crate) fn add<T: Real>(arch: Arch, target: &mut [T], source: &[T]) {
    arch.dispatch(Sweep(
        #[inline(always)]
        || {
            for (target, source) in target.iter_mut().zip(source) {
                *target += *source;
            }
        },
    ))
}
