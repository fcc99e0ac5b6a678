use burn::module::Param;
use burn::nn::conv::{Conv1d, Conv2d, Conv3d};
use burn::nn::{PaddingConfig1d, PaddingConfig2d, PaddingConfig3d};
use burn::tensor::{Shape, Tensor};

use super::FoldError;
use crate::spec::ConvSpec;

/// Burn's convolutions over tensors of rank `D`: `Conv1d` for 3, `Conv2d` for 4, `Conv3d` for 5.
///
/// Sealed: it bounds code that is generic in the convolution, and cannot be implemented elsewhere.
pub trait Convolution<const D: usize>: Clone + Sealed {
    /// `[channels_out, channels_in / groups, kernel..]`.
    fn weight(&self) -> &Param<Tensor<D>>;

    /// `[channels_out]`.
    fn bias(&self) -> Option<&Param<Tensor<1>>>;

    /// The same geometry with other parameters.
    fn with_parameters(self, weight: Param<Tensor<D>>, bias: Param<Tensor<1>>) -> Self;

    /// The geometry for an input of that shape, on which `Same` padding depends.
    fn spec(&self, input: &Shape) -> ConvSpec;

    /// The padding as Burn's module has it, for a reader.
    fn padding(&self) -> String;

    /// Checks that Burn's module computes the padding for every size of the input.
    ///
    /// # Errors
    ///
    /// [`FoldError::SamePadding`] if it does not.
    fn check_padding(&self) -> Result<(), FoldError> {
        Ok(())
    }
}

/// Bound that no other crate can meet.
pub trait Sealed {}

macro_rules! convolution {
    ($conv:ty, $rank:literal, |$this:ident, $same:ident| $padding:expr; $($method:tt)*) => {
        impl Sealed for $conv {}

        impl Convolution<$rank> for $conv {
            fn weight(&self) -> &Param<Tensor<$rank>> {
                &self.weight
            }

            fn bias(&self) -> Option<&Param<Tensor<1>>> {
                self.bias.as_ref()
            }

            fn with_parameters(
                mut self,
                weight: Param<Tensor<$rank>>,
                bias: Param<Tensor<1>>,
            ) -> Self {
                self.weight = weight;
                self.bias = Some(bias);
                self
            }

            fn padding(&self) -> String {
                format!("{:?}", self.padding)
            }

            fn spec(&self, input: &Shape) -> ConvSpec {
                let (kernel, stride) = (self.kernel_size.sizes(), self.stride.sizes());
                let $this = self;
                let $same = |dim: usize| same_padding(input[dim + 2], kernel[dim], stride[dim]);
                let padding = $padding;
                ConvSpec {
                    padding,
                    dilation: self.dilation.sizes(),
                    groups: self.groups,
                    stride,
                }
            }

            $($method)*
        }
    };
}

convolution!(Conv1d, 3, |conv, same| match conv.padding {
    PaddingConfig1d::Valid => vec![(0, 0)],
    PaddingConfig1d::Same => vec![same(0)],
    PaddingConfig1d::Explicit(left, right) => vec![(left, right)],
};);
convolution!(Conv2d, 4, |conv, same| {
    plane_padding(&conv.padding, same).to_vec()
};);
convolution!(
    Conv3d,
    5,
    |conv, same| match conv.padding {
        PaddingConfig3d::Valid => vec![(0, 0); 3],
        PaddingConfig3d::Same => (0..3).map(same).collect(),
        PaddingConfig3d::Explicit(depth, height, width) =>
            [depth, height, width].map(|size| (size, size)).to_vec(),
    };
    // Burn's Conv3d pads both sides alike, and panics where `Same` wants them uneven. With stride s that is
    // max(0, kernel - r) in all, r from 1 to s by the input's size: even for every r if the kernel is 1, or
    // odd with s = 1.
    fn check_padding(&self) -> Result<(), FoldError> {
        if self.padding != PaddingConfig3d::Same {
            return Ok(());
        }
        for (dim, (&kernel, &stride)) in self.kernel_size.iter().zip(&self.stride).enumerate() {
            if kernel > 1 && (stride > 1 || kernel.is_multiple_of(2)) {
                return Err(FoldError::SamePadding {
                    dim,
                    kernel,
                    stride,
                });
            }
        }
        Ok(())
    }
);

/// Sizes of the spatial dimensions; Burn's one-dimensional modules hold a bare number.
pub(super) trait Sizes {
    fn sizes(&self) -> Vec<usize>;
}

impl Sizes for usize {
    fn sizes(&self) -> Vec<usize> {
        vec![*self]
    }
}

impl<const N: usize> Sizes for [usize; N] {
    fn sizes(&self) -> Vec<usize> {
        self.to_vec()
    }
}

/// Padding of height and width `(before, after)`, from that of either under `Same`.
pub(super) fn plane_padding(
    padding: &PaddingConfig2d,
    same: impl Fn(usize) -> (usize, usize),
) -> [(usize, usize); 2] {
    match *padding {
        PaddingConfig2d::Valid => [(0, 0); 2],
        PaddingConfig2d::Same => [0, 1].map(same),
        PaddingConfig2d::Explicit(top, left, bottom, right) => [(top, bottom), (left, right)],
    }
}

/// Burn computes `Same` in a private function of its own; this is the same rule: as much as keeps
/// `ceil(size / stride)` outputs, the odd one after.
pub(super) fn same_padding(size: usize, kernel: usize, stride: usize) -> (usize, usize) {
    // A stride of zero is refused later, with a message.
    let outputs = size.div_ceil(stride.max(1));
    let covered = outputs.saturating_sub(1) * stride + kernel;
    let total = covered.saturating_sub(size);
    (total / 2, total - total / 2)
}
