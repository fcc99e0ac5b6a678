use crate::Real;

/// Element-wise function at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `y = v`.
    Identity,
    /// `y = max(v, 0)`, derivative 0 at 0; NaN stays NaN.
    Relu,
}

impl Activation {
    #[inline(always)]
    pub(crate) fn forward<T: Real>(self, value: T) -> T {
        match self {
            Self::Identity => value,
            Self::Relu => match relu_passes(value) {
                true => value,
                false => T::ZERO,
            },
        }
    }

    /// `grad * activation'(value)`. For Relu, `value` may be the output too.
    #[inline(always)]
    pub(crate) fn backward<T: Real>(self, value: T, grad: T) -> T {
        match self {
            Self::Identity => grad,
            Self::Relu => match relu_passes(value) {
                true => grad,
                false => T::ZERO,
            },
        }
    }
}

/// Positive, or not a number.
#[inline(always)]
#[allow(clippy::neg_cmp_op_on_partial_ord)]
fn relu_passes<T: Real>(value: T) -> bool {
    !(value <= T::ZERO)
}
