use std::mem::MaybeUninit;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::Arch;

use crate::Real;
use crate::simd::sweeps::{self, Sweep};

/// Storage types of activations: `f32` and `f64`, which are also the compute types, and `f16` and `bf16`,
/// which are computed in tiles of `f32`.
///
/// The convolution's output is rounded to this type at its tile, whether it is stored or not, so that the
/// recomputed output is the same.
///
/// ```
/// use burn_conv_bn_cpu::Element;
/// use half::bf16;
///
/// let mut stored = [bf16::ZERO; 2];
/// bf16::store(&[1.0, 1.001], &mut stored);
/// let mut loaded = [0.0; 2];
/// bf16::load(&stored, &mut loaded);
/// assert_eq!(loaded, [1.0, 1.0]);
/// ```
pub trait Element: Copy + Default + Send + Sync + private::Sealed + 'static {
    /// The compute type.
    type Real: Real;

    /// Converts each value; rounded to nearest.
    ///
    /// # Panics
    ///
    /// Panics if the slices differ in length.
    fn store(values: &[Self::Real], target: &mut [Self]);

    /// As [`store`](Self::store), into uninitialized memory.
    ///
    /// # Panics
    ///
    /// Panics if the slices differ in length.
    fn write(values: &[Self::Real], target: &mut [MaybeUninit<Self>]);

    /// As [`write`](Self::write), for one value.
    fn write_one(value: Self::Real, target: &mut MaybeUninit<Self>);

    /// Converts each value; exact.
    ///
    /// # Panics
    ///
    /// Panics if the slices differ in length.
    fn load(values: &[Self], target: &mut [Self::Real]);

    /// The values in the compute type: themselves, or converted into `scratch`.
    fn read<'a>(values: &'a [Self], scratch: &'a mut Vec<Self::Real>) -> &'a [Self::Real];

    /// Rounds each value to this type.
    fn round(values: &mut [Self::Real], scratch: &mut Vec<Self>);

    /// Calls `change` on the values: in place, or converted into `scratch` and back.
    fn update(
        values: &mut [Self],
        scratch: &mut Vec<Self::Real>,
        change: impl FnOnce(&mut [Self::Real]),
    );
}

/// [`Element::write`], compiled for the vector unit.
pub(crate) fn write_vectorized<E: Element>(values: &[E::Real], target: &mut [MaybeUninit<E>]) {
    Arch::new().dispatch(Sweep(
        #[inline(always)]
        || E::write(values, target),
    ));
}

mod private {
    pub trait Sealed {}
}

macro_rules! computed_as_stored {
    ($($real:ty),*) => {$(
        impl private::Sealed for $real {}

        impl Element for $real {
            type Real = $real;

            #[inline(always)]
            fn store(values: &[$real], target: &mut [Self]) {
                sweeps::copy(values, target);
            }

            #[inline(always)]
            fn write(values: &[$real], target: &mut [MaybeUninit<Self>]) {
                sweeps::write(values, target);
            }

            #[inline(always)]
            fn write_one(value: $real, target: &mut MaybeUninit<Self>) {
                target.write(value);
            }

            #[inline(always)]
            fn load(values: &[Self], target: &mut [$real]) {
                sweeps::copy(values, target);
            }

            #[inline(always)]
            fn read<'a>(values: &'a [Self], _: &'a mut Vec<$real>) -> &'a [$real] {
                values
            }

            #[inline(always)]
            fn round(_: &mut [$real], _: &mut Vec<Self>) {}

            #[inline(always)]
            fn update(
                values: &mut [Self],
                _: &mut Vec<$real>,
                change: impl FnOnce(&mut [$real]),
            ) {
                change(values);
            }
        }
    )*};
}

macro_rules! computed_in_f32 {
    ($($half:ty),*) => {$(
        impl private::Sealed for $half {}

        impl Element for $half {
            type Real = f32;

            fn store(values: &[f32], target: &mut [Self]) {
                target.convert_from_f32_slice(values);
            }

            fn write(values: &[f32], target: &mut [MaybeUninit<Self>]) {
                const CHUNK: usize = 64;
                assert_eq!(values.len(), target.len());
                let mut converted = [Self::ZERO; CHUNK];
                for (values, target) in values.chunks(CHUNK).zip(target.chunks_mut(CHUNK)) {
                    let converted = &mut converted[..values.len()];
                    Self::store(values, converted);
                    target.write_copy_of_slice(converted);
                }
            }

            fn write_one(value: f32, target: &mut MaybeUninit<Self>) {
                target.write(Self::from_f32(value));
            }

            fn load(values: &[Self], target: &mut [f32]) {
                values.convert_to_f32_slice(target);
            }

            fn read<'a>(values: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32] {
                scratch.resize(values.len(), 0.0);
                Self::load(values, scratch);
                scratch
            }

            fn round(values: &mut [f32], scratch: &mut Vec<Self>) {
                scratch.resize(values.len(), Self::ZERO);
                Self::store(values, scratch);
                Self::load(scratch, values);
            }

            fn update(
                values: &mut [Self],
                scratch: &mut Vec<f32>,
                change: impl FnOnce(&mut [f32]),
            ) {
                scratch.resize(values.len(), 0.0);
                Self::load(values, scratch);
                change(scratch);
                Self::store(scratch, values);
            }
        }
    )*};
}

computed_as_stored!(f32, f64);
computed_in_f32!(f16, bf16);
