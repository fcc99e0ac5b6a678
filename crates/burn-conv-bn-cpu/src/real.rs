use std::fmt::Debug;
use std::ops::{Add, AddAssign, Div, Mul, Sub};

/// The types that the kernels compute in: `f32` and `f64`.
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

    fn erfc(self) -> Self {
        libm::erfc(self)
    }
}

pub(crate) mod vector {
    use pulp::Simd;

    /// Vectors of a number type, on whatever unit there is. Seals [`Real`](super::Real).
    pub trait Lanes: Sized {
        /// As many values as the unit's registers hold.
        type Vector<S: Simd>: Copy;

        fn splat<S: Simd>(simd: S, value: Self) -> Self::Vector<S>;

        /// `a * b + c`.
        fn mul_add<S: Simd>(
            simd: S,
            a: Self::Vector<S>,
            b: Self::Vector<S>,
            c: Self::Vector<S>,
        ) -> Self::Vector<S>;

        fn sum<S: Simd>(simd: S, vector: Self::Vector<S>) -> Self;
    }

    impl Lanes for f32 {
        type Vector<S: Simd> = S::f32s;

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
    }

    impl Lanes for f64 {
        type Vector<S: Simd> = S::f64s;

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
    }
}
