//! Error bounds that are computed along with the values they belong to.
//!
//! A tolerance that suits every shape, spread and epsilon that a generator may draw would catch
//! little. This computes one for each value instead, as running error analysis does (N. Higham,
//! Accuracy and Stability of Numerical Algorithms, section 3.3): every operation adds what it
//! rounds, and carries on what its operands are off by. Sums of many terms, a small variance or a
//! large gamma thus widen the bound by as much as they may widen the error, and nothing else does.

use std::ops::{Add, AddAssign, Div, Mul, Sub};

use burn::tensor::DType;

use super::{Number, rounded};

/// How many times the rounding of one operation the bound allows for each: kernels take sums in
/// another order, and round a few times more or less often than the reference.
pub const SLACK: f64 = 4.0;

/// Roundings on the way to an activation or its derivative.
const FUNCTION_ROUNDINGS: f64 = 4.0;

/// Roundings of a sum that are not bounded by its own terms, but by the largest values that go into
/// sums like it. The algorithm with fewer products for 3x3 kernels has this kind of error: it adds
/// up neighbours first, and the large ones cancel later with errors of their own size (Higham,
/// chapter 23).
const FOREIGN_ROUNDINGS: f64 = 4.0;

/// Half of the smallest f32 above 0, by which results near it are rounded, as often as [`SLACK`] has it.
const UNDERFLOW: f64 = SLACK * 0.7e-45;

/// A value, and how far from it the same computation may end up in a shorter type.
#[derive(Clone, Copy, Debug)]
pub struct Ball {
    value: f64,
    radius: f64,
    /// Largest relative error of one operation.
    unit: f64,
}

impl Ball {
    /// A value that is exact, on the way into operations whose relative error is up to `unit`.
    pub fn new(value: f64, unit: f64) -> Self {
        Self {
            value,
            radius: 0.0,
            unit,
        }
    }

    /// The largest error.
    pub fn radius(self) -> f64 {
        self.radius
    }

    /// The same, off by so much more.
    pub fn widened_by(self, radius: f64) -> Self {
        Self {
            radius: self.radius + radius,
            ..self
        }
    }

    /// The largest error once the result is stored as that type.
    pub fn allowance(self, dtype: DType) -> f64 {
        self.radius + unit(dtype) * (self.value.abs() + self.radius) + smallest(dtype)
    }

    /// Whether a comparison with that number may go either way once the value is stored as that
    /// type.
    pub fn is_near(self, number: f64, dtype: DType) -> bool {
        let rounding = 2.0 * unit(dtype) * number.abs() + smallest(dtype);
        // A radius that is not a number is no bound.
        let apart = (self.value - number).abs() > self.radius + rounding;
        !apart
    }

    /// The result of an operation before it is rounded.
    fn computed(value: f64, radius: f64, unit: f64) -> Self {
        Self {
            value,
            radius: radius + unit * (value.abs() + radius) + UNDERFLOW,
            unit,
        }
    }

    fn common_unit(self, other: Self) -> f64 {
        self.unit.max(other.unit)
    }
}

impl Add for Ball {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self::computed(
            self.value + other.value,
            self.radius + other.radius,
            self.common_unit(other),
        )
    }
}

impl AddAssign for Ball {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sub for Ball {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self::computed(
            self.value - other.value,
            self.radius + other.radius,
            self.common_unit(other),
        )
    }
}

impl Mul for Ball {
    type Output = Self;

    fn mul(self, other: Self) -> Self {
        Self::computed(
            self.value * other.value,
            times(self.value.abs(), other.radius)
                + times(other.value.abs(), self.radius)
                + times(self.radius, other.radius),
            self.common_unit(other),
        )
    }
}

impl Div for Ball {
    type Output = Self;

    fn div(self, other: Self) -> Self {
        let quotient = self.value / other.value;
        // The least that the divisor may be.
        let least = other.value.abs() - other.radius;
        let radius = if least > 0.0 {
            (self.radius + times(quotient.abs(), other.radius)) / least
        } else {
            f64::INFINITY
        };
        Self::computed(quotient, radius, self.common_unit(other))
    }
}

/// The product of two bounds: 0 if one is 0, also with an infinite one.
fn times(a: f64, b: f64) -> f64 {
    if a == 0.0 || b == 0.0 { 0.0 } else { a * b }
}

impl Number for Ball {
    fn exact(value: f64) -> Self {
        Self::new(value, 0.0)
    }

    fn value(self) -> f64 {
        self.value
    }

    fn is_zero(self) -> bool {
        self.value == 0.0 && self.radius == 0.0
    }

    /// `|sqrt(a) - sqrt(b)|` is at most `|a - b| / sqrt(a)`, and at most `sqrt(|a - b|)`.
    fn sqrt(self) -> Self {
        let root = self.value.sqrt();
        let radius = (self.radius / root).min(self.radius.sqrt());
        Self::computed(root, radius, self.unit)
    }

    fn function(self, value: f64, steepest: f64, size: f64) -> Self {
        Self {
            value,
            radius: times(steepest, self.radius) + FUNCTION_ROUNDINGS * self.unit * size,
            unit: self.unit,
        }
    }

    /// The half types are what something between is rounded to: where both ends of the ball go to
    /// the same value there is no error left. Rounding to the others is part of every operation.
    fn stored(self, dtype: DType) -> Self {
        match dtype {
            DType::F16 | DType::BF16 => {
                let value = rounded(self.value, dtype);
                let above = rounded(self.value + self.radius, dtype) - value;
                let below = value - rounded(self.value - self.radius, dtype);
                Self {
                    value,
                    radius: above.max(below),
                    unit: self.unit,
                }
            }
            _ => self,
        }
    }

    fn magnitude(self) -> f64 {
        let magnitude = self.value.abs() + self.radius;
        if magnitude.is_nan() {
            f64::INFINITY
        } else {
            magnitude
        }
    }

    /// A factor that is rounded below the smallest normal number is off by [`UNDERFLOW`], times the
    /// other one.
    fn loosened(self, like: Self, size: f64, factors: f64) -> Self {
        let rounding = self.common_unit(like) * size + UNDERFLOW * factors;
        self.widened_by(FOREIGN_ROUNDINGS * rounding)
    }
}

/// Largest relative error of rounding to a type.
pub fn unit(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 2f64.powi(-53),
        DType::F32 => 2f64.powi(-24),
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        _ => panic!("{dtype:?} is no type of the op's tensors"),
    }
}

/// Largest error of rounding to a type where that is relative to nothing: half the smallest value.
fn smallest(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 0.0,
        DType::F32 => 2f64.powi(-150),
        DType::F16 => 2f64.powi(-25),
        DType::BF16 => 2f64.powi(-134),
        _ => panic!("{dtype:?} is no type of the op's tensors"),
    }
}
