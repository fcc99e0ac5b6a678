use std::fmt::Debug;
use std::ops::{Add, AddAssign, Div, Mul, Sub};

/// Compute types: `f32` and `f64`.
///
/// ```
/// use burn_conv_bn_cpu::Real;
///
/// fn sigmoid<T: Real>(value: T) -> T {
///     T::ONE / (T::ONE + (T::ZERO - value).exp())
/// }
/// assert_eq!(sigmoid(0.0f32), 0.5);
/// assert_eq!(sigmoid(0.0f64), 0.5);
/// ```
pub trait Real:
    Copy
    + Debug
    + Default
    + PartialOrd
    + Send
    + Sync
    + Add<Output = Self>
    + AddAssign
    + Div<Output = Self>
    + Mul<Output = Self>
    + Sub<Output = Self>
    + vector::Lanes
    + 'static
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// Exact.
    fn to_f64(self) -> f64;
    /// Rounded to nearest.
    fn from_f64(value: f64) -> Self;
    /// `e^self`.
    fn exp(self) -> Self;
    /// `e^self - 1`, exact where that is small.
    fn exp_m1(self) -> Self;
    /// `ln(1 + self)`, exact where that is small.
    fn ln_1p(self) -> Self;
    /// The hyperbolic tangent.
    fn tanh(self) -> Self;
    /// The complementary error function, `1 - erf(self)`.
    fn erfc(self) -> Self;
}

macro_rules! real {
    ($real:ident, $erfc:path) => {
        impl Real for $real {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;

            fn to_f64(self) -> f64 {
                self as f64
            }

            fn from_f64(value: f64) -> Self {
                value as Self
            }

            fn exp(self) -> Self {
                self.exp()
            }

            fn exp_m1(self) -> Self {
                self.exp_m1()
            }

            fn ln_1p(self) -> Self {
                self.ln_1p()
            }

            fn tanh(self) -> Self {
                self.tanh()
            }

            fn erfc(self) -> Self {
                $erfc(self)
            }
        }
    };
}

real!(f32, libm::erfcf);
real!(f64, libm::erfc);

pub(crate) mod vector {
    use pulp::Simd;

    /// Vectors of a number type, on any unit. Seals [`Real`](super::Real).
    pub trait Lanes: Sized {
        /// As many values as the unit's registers hold.
        type Vector<S: Simd>: Copy;

        /// An integer of the number's size, for a lane beside it.
        type Index: Copy + Default + From<u8> + Send + Sync + 'static;

        /// A vector of them.
        type Indices<S: Simd>: Copy;

        /// A vector of booleans.
        type Mask<S: Simd>: Copy;

        fn splat<S: Simd>(simd: S, value: Self) -> Self::Vector<S>;

        /// `a * b + c`.
        fn mul_add<S: Simd>(
            simd: S,
            a: Self::Vector<S>,
            b: Self::Vector<S>,
            c: Self::Vector<S>,
        ) -> Self::Vector<S>;

        fn sum<S: Simd>(simd: S, vector: Self::Vector<S>) -> Self;

        /// Where values are greater than others, or NaN.
        fn exceeds<S: Simd>(
            simd: S,
            values: Self::Vector<S>,
            others: Self::Vector<S>,
        ) -> Self::Mask<S>;

        fn select<S: Simd>(
            simd: S,
            mask: Self::Mask<S>,
            if_true: Self::Vector<S>,
            if_false: Self::Vector<S>,
        ) -> Self::Vector<S>;

        fn splat_index<S: Simd>(simd: S, index: Self::Index) -> Self::Indices<S>;

        fn add_index<S: Simd>(
            simd: S,
            a: Self::Indices<S>,
            b: Self::Indices<S>,
        ) -> Self::Indices<S>;

        fn select_index<S: Simd>(
            simd: S,
            mask: Self::Mask<S>,
            if_true: Self::Indices<S>,
            if_false: Self::Indices<S>,
        ) -> Self::Indices<S>;

        fn low_byte(index: Self::Index) -> u8;
    }

    macro_rules! lanes {
        (
            $real:ident $vector:ident $index:ident $indices:ident $mask:ident
            $splat:ident $mul_add:ident $sum:ident $equal:ident $greater:ident $or:ident $not:ident
            $splat_index:ident $add_index:ident $select_index:ident
        ) => {
            impl Lanes for $real {
                type Vector<S: Simd> = S::$vector;
                type Index = $index;
                type Indices<S: Simd> = S::$indices;
                type Mask<S: Simd> = S::$mask;

                #[inline(always)]
                fn splat<S: Simd>(simd: S, value: Self) -> S::$vector {
                    simd.$splat(value)
                }

                #[inline(always)]
                fn mul_add<S: Simd>(
                    simd: S,
                    a: S::$vector,
                    b: S::$vector,
                    c: S::$vector,
                ) -> S::$vector {
                    simd.$mul_add(a, b, c)
                }

                #[inline(always)]
                fn sum<S: Simd>(simd: S, vector: S::$vector) -> Self {
                    simd.$sum(vector)
                }

                #[inline(always)]
                fn exceeds<S: Simd>(simd: S, values: S::$vector, others: S::$vector) -> S::$mask {
                    let are_numbers = simd.$equal(values, values);
                    let are_greater = simd.$greater(values, others);
                    simd.$or(are_greater, simd.$not(are_numbers))
                }

                // As integers: pulp's selection of numbers may stay a call, compiled for the oldest unit.
                #[inline(always)]
                fn select<S: Simd>(
                    simd: S,
                    mask: S::$mask,
                    if_true: S::$vector,
                    if_false: S::$vector,
                ) -> S::$vector {
                    pulp::cast(simd.$select_index(mask, pulp::cast(if_true), pulp::cast(if_false)))
                }

                #[inline(always)]
                fn splat_index<S: Simd>(simd: S, index: $index) -> S::$indices {
                    simd.$splat_index(index)
                }

                #[inline(always)]
                fn add_index<S: Simd>(simd: S, a: S::$indices, b: S::$indices) -> S::$indices {
                    simd.$add_index(a, b)
                }

                #[inline(always)]
                fn select_index<S: Simd>(
                    simd: S,
                    mask: S::$mask,
                    if_true: S::$indices,
                    if_false: S::$indices,
                ) -> S::$indices {
                    simd.$select_index(mask, if_true, if_false)
                }

                #[inline(always)]
                fn low_byte(index: $index) -> u8 {
                    index as u8
                }
            }
        };
    }

    lanes! {
        f32 f32s u32 u32s m32s
        splat_f32s mul_add_e_f32s reduce_sum_f32s equal_f32s greater_than_f32s or_m32s not_m32s
        splat_u32s add_u32s select_u32s
    }
    lanes! {
        f64 f64s u64 u64s m64s
        splat_f64s mul_add_e_f64s reduce_sum_f64s equal_f64s greater_than_f64s or_m64s not_m64s
        splat_u64s add_u64s select_u64s
    }
}
