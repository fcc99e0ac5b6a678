//! Norm, activation and max pool as one op: no tensor between them in forward, nor its gradient in backward.

use pulp::Arch;
use rayon::prelude::*;

use super::forward::{Planes, pool_all};
use crate::blocks::BLOCKS;
use crate::norm::gradient::{Backward, GradSums, OutputGrad, PooledGrad};
use crate::scratch::ScratchPool;
use crate::simd::sweeps::{self, ChannelAffine, Gate};
use crate::{Activation, Affine, Element, Geometry, PoolGeometry, Real};

/// [`normalize`](crate::normalize) without a residual and [`max_pool`](crate::max_pool) in one pass, over
/// `[batch, channels]` planes: `values` is only read, and there is no tensor between the two.
///
/// # Panics
///
/// Panics if a slice is not of its geometry's size, if the planes are not those of the convolution's
/// output, or if the windows are not [regular](PoolGeometry::is_regular).
///
/// # Examples
///
/// ```
/// use burn_conv_bn_cpu::{Activation, Affine, Geometry, PoolGeometry, normalize_max_pool};
///
/// // A line of four pixels, in windows of two.
/// let one = [1; 3];
/// let geometry = Geometry::new(1, [1, 1], 1, [1, 1, 4], one, one, [(0, 0); 3], one)?;
/// let (window, stride) = ([1, 2], [1, 2]);
/// let pool = PoolGeometry::new(1, [1, 4], window, stride, [0, 0], [1, 1], false).unwrap();
/// let affine = Affine { mean: &[2.0], scale: &[10.0], shift: &[1.0] };
/// let (mut output, mut argmax) = (Vec::new(), Vec::new());
/// normalize_max_pool(
///     &geometry, &[1.0f32, 3.0, 0.0, 1.0], affine, Activation::Relu, &pool, &mut output, &mut argmax,
/// );
/// assert_eq!((output.as_slice(), argmax.as_slice()), (&[11.0, 0.0][..], &[1, 0][..]));
/// # Ok::<(), burn_conv_bn_cpu::GeometryError>(())
/// ```
pub fn normalize_max_pool<E: Element>(
    geometry: &Geometry,
    values: &[E],
    affine: Affine<'_, E::Real>,
    activation: Activation,
    pool: &PoolGeometry,
    output: &mut Vec<E>,
    argmax: &mut Vec<u8>,
) {
    assert_eq!(values.len(), geometry.batch() * geometry.output_len());
    pool.check_joins(geometry);
    let normalized = Normalized {
        geometry,
        values,
        affine,
        activation,
    };
    pool_all(pool, &normalized, output, Some(argmax));
}

/// Planes of a convolution's output, normalized and activated.
struct Normalized<'a, E: Element> {
    geometry: &'a Geometry,
    values: &'a [E],
    affine: Affine<'a, E::Real>,
    activation: Activation,
}

impl<E: Element> Planes<E> for Normalized<'_, E> {
    /// The plane, and a conversion of it.
    type Scratch = (Vec<E>, Vec<E::Real>);

    fn plane<'a>(&'a self, index: usize, scratch: &'a mut Self::Scratch) -> &'a [E] {
        let (plane, converted) = scratch;
        let len = self.geometry.positions();
        plane.clear();
        plane.extend_from_slice(&self.values[index * len..][..len]);
        let affine = self.affine.channel(index % self.geometry.channels_out());
        E::update(plane, converted, |values| {
            sweeps::normalize(Arch::new(), values, affine, None, self.activation);
        });
        plane
    }
}

/// [`grad_sums`](crate::grad_sums) from the pooled output, without the convolution's output: only maxima
/// have a gradient, and for these `scale * (z - mean)` is `output - shift`, wherever ReLU passes it.
///
/// The deviation `z - mean` has the rounding error of `output / scale`. [`grad_sums`](crate::grad_sums) is
/// more exact where the shift is much larger than `scale * (z - mean)`, and required where a scale is zero.
///
/// # Panics
///
/// Panics if a slice is not of its geometry's size, if the output's gradient is not a pooled one, if the
/// windows are not [regular](PoolGeometry::is_regular), or if the activation is neither `Identity` nor
/// `Relu`.
///
/// # Examples
///
/// ```
/// use burn_conv_bn_cpu::{
///     Activation, Affine, Backward, ConvOutput, Geometry, OutputGrad, PoolGeometry, PooledGrad,
///     grad_sums, normalize_max_pool, pooled_grad_sums,
/// };
///
/// // A line of four pixels and a weight of 2, in windows of two.
/// let one = [1; 3];
/// let geometry = Geometry::new(1, [1, 1], 1, [1, 1, 4], one, one, [(0, 0); 3], one)?;
/// let (window, stride) = ([1, 2], [1, 2]);
/// let pool = PoolGeometry::new(1, [1, 4], window, stride, [0, 0], [1, 1], false).unwrap();
/// let (x, z) = ([1.0f32, 2.0, 4.0, 3.0], [2.0, 4.0, 8.0, 6.0]);
/// let affine = Affine { mean: &[5.0], scale: &[0.5], shift: &[0.0] };
/// let (mut y, mut argmax) = (Vec::new(), Vec::new());
/// normalize_max_pool(&geometry, &z, affine, Activation::Relu, &pool, &mut y, &mut argmax);
/// assert_eq!(y, [0.0, 1.5]);
///
/// let pass = Backward {
///     geometry: &geometry,
///     input: Some(&x),
///     weight: Some(&[2.0]),
///     output_grad: OutputGrad::Pooled(PooledGrad {
///         geometry: &pool,
///         output_grad: &[7.0, 3.0],
///         argmax: &argmax,
///     }),
///     affine,
///     activation: Activation::Relu,
///     residual: None,
///     output: None,
/// };
/// let sums = pooled_grad_sums(&pass, &y);
/// assert_eq!((sums.grad[0], sums.grad_deviation[0]), (3.0, 3.0 * (8.0 - 5.0)));
/// assert_eq!(sums, grad_sums(&pass, ConvOutput::Recompute));
/// # Ok::<(), burn_conv_bn_cpu::GeometryError>(())
/// ```
pub fn pooled_grad_sums<E: Element>(pass: &Backward<'_, E>, output: &[E]) -> GradSums {
    let OutputGrad::Pooled(pooled) = pass.output_grad else {
        panic!("the output's gradient is not a max pool's");
    };
    pooled.check(pass.geometry);
    assert_eq!(output.len(), pooled.output_grad.len(), "the pool's output");
    let is_masked = match pass.activation {
        Activation::Identity => false,
        Activation::Relu => true,
        other => panic!("the output of {other:?} does not tell what went into it"),
    };
    let geometry = pass.geometry;
    let (batch, step) = (geometry.batch(), geometry.images_per_block(BLOCKS));
    let images = (0..batch).into_par_iter().step_by(step);
    let pool = ScratchPool::<(Vec<E::Real>, Vec<E::Real>)>::new();
    let sum = |start: usize| {
        pool.with(|scratch| {
            let mut sums = GradSums::new(geometry.channels_out());
            for image in start..(start + step).min(batch) {
                add_image(&mut sums, pass, pooled, output, image, is_masked, scratch);
            }
            sums
        })
    };
    let parts: Vec<GradSums> = images.map(sum).collect();
    let mut sums = GradSums::total(geometry.channels_out(), &parts);
    for (sum, scale) in sums.grad_deviation.iter_mut().zip(pass.affine.scale) {
        *sum /= scale.to_f64();
    }
    sums
}

/// Adds `g` and `g * (output - shift)` of an image.
fn add_image<E: Element>(
    sums: &mut GradSums,
    pass: &Backward<'_, E>,
    pooled: PooledGrad<'_, E>,
    output: &[E],
    image: usize,
    is_masked: bool,
    (converted, converted_grad): &mut (Vec<E::Real>, Vec<E::Real>),
) {
    let channels = pass.geometry.channels_out();
    let len = pooled.geometry.output_plane();
    for channel in 0..channels {
        let start = (image * channels + channel) * len;
        let output = E::read(&output[start..][..len], converted);
        let grad = E::read(&pooled.output_grad[start..][..len], converted_grad);
        let gate = if is_masked {
            Gate::Output(output)
        } else {
            Gate::Open
        };
        let affine = ChannelAffine {
            mean: pass.affine.shift[channel],
            scale: E::Real::ONE,
            shift: E::Real::ZERO,
        };
        let (grad, deviation) = sweeps::grad_sums(Arch::new(), output, grad, affine, gate);
        sums.grad[channel] += grad.to_f64();
        sums.grad_deviation[channel] += deviation.to_f64();
    }
}
