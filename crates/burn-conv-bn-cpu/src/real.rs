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

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;

    fn to_f64(self) -> f64 {
        f64::from(self)
    }

    fn from_f64(value: f64) -> Self {
        value as f32
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
        libm::erfcf(self)
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;

    fn to_f64(self) -> f64 {
        self
    }

    fn from_f64(value: f64) -> Self {
        value
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
        libm::erfc(self)
    }
}

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

    impl Lanes for f32 {
        type Vector<S: Simd> = S::f32s;
        type Index = u32;
        type Indices<S: Simd> = S::u32s;
        type Mask<S: Simd> = S::m32s;

        #[inline(always)]
        fn splat<S: Simd>(simd: S, value: Self) -> S::f32s {
            simd.splat_f32s(value)
        }

        #[inline(always)]
        fn mul_add<S: Simd>(simd: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
            simd.mul_add_e_f32s(a, b, c)
        }

        #[inline(always)]
        fn sum<S: Simd>(simd: S, vector: S::f32s) -> Self {
            simd.reduce_sum_f32s(vector)
        }

        #[inline(always)]
        fn exceeds<S: Simd>(simd: S, values: S::f32s, others: S::f32s) -> S::m32s {
            let are_numbers = simd.equal_f32s(values, values);
            let are_greater = simd.greater_than_f32s(values, others);
            simd.or_m32s(are_greater, simd.not_m32s(are_numbers))
        }

        // As integers: pulp's selection of numbers may stay a call, compiled for the oldest unit.
        #[inline(always)]
        fn select<S: Simd>(simd: S, mask: S::m32s, if_true: S::f32s, if_false: S::f32s) -> S::f32s {
            pulp::cast(simd.select_u32s(mask, pulp::cast(if_true), pulp::cast(if_false)))
        }

        #[inline(always)]
        fn splat_index<S: Simd>(simd: S, index: u32) -> S::u32s {
            simd.splat_u32s(index)
        }

        #[inline(always)]
        fn add_index<S: Simd>(simd: S, a: S::u32s, b: S::u32s) -> S::u32s {
            simd.add_u32s(a, b)
        }

        #[inline(always)]
        fn select_index<S: Simd>(
            simd: S,
            mask: S::m32s,
            if_true: S::u32s,
            if_false: S::u32s,
        ) -> S::u32s {
            simd.select_u32s(mask, if_true, if_false)
        }

        #[inline(always)]
        fn low_byte(index: u32) -> u8 {
            index as u8
        }
    }

    impl Lanes for f64 {
        type Vector<S: Simd> = S::f64s;
        type Index = u64;
        type Indices<S: Simd> = S::u64s;
        type Mask<S: Simd> = S::m64s;

        #[inline(always)]
        fn splat<S: Simd>(simd: S, value: Self) -> S::f64s {
            simd.splat_f64s(value)
        }

        #[inline(always)]
        fn mul_add<S: Simd>(simd: S, a: S::f64s, b: S::f64s, c: S::f64s) -> S::f64s {
            simd.mul_add_e_f64s(a, b, c)
        }

        #[inline(always)]
        fn sum<S: Simd>(simd: S, vector: S::f64s) -> Self {
            simd.reduce_sum_f64s(vector)
        }

        #[inline(always)]
        fn exceeds<S: Simd>(simd: S, values: S::f64s, others: S::f64s) -> S::m64s {
            let are_numbers = simd.equal_f64s(values, values);
            let are_greater = simd.greater_than_f64s(values, others);
            simd.or_m64s(are_greater, simd.not_m64s(are_numbers))
        }

        // As integers: pulp's selection of numbers may stay a call, compiled for the oldest unit.
        #[inline(always)]
        fn select<S: Simd>(simd: S, mask: S::m64s, if_true: S::f64s, if_false: S::f64s) -> S::f64s {
            pulp::cast(simd.select_u64s(mask, pulp::cast(if_true), pulp::cast(if_false)))
        }

        #[inline(always)]
        fn splat_index<S: Simd>(simd: S, index: u64) -> S::u64s {
            simd.splat_u64s(index)
        }

        #[inline(always)]
        fn add_index<S: Simd>(simd: S, a: S::u64s, b: S::u64s) -> S::u64s {
            simd.add_u64s(a, b)
        }

        #[inline(always)]
        fn select_index<S: Simd>(
            simd: S,
            mask: S::m64s,
            if_true: S::u64s,
            if_false: S::u64s,
        ) -> S::u64s {
            simd.select_u64s(mask, if_true, if_false)
        }

        #[inline(always)]
        fn low_byte(index: u64) -> u8 {
            index as u8
        }
    }
}
