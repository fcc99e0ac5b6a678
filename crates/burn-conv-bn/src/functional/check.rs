use burn::tensor::{DType, Device, Shape, Tensor};

use crate::spec::ConvBnError;

/// Checks tensors against the op's input.
pub(super) struct Check {
    pub(super) dtype: DType,
    device: Device,
}

impl Check {
    pub(super) fn new<const D: usize>(input: &Tensor<D>) -> Self {
        Self {
            dtype: input.dtype(),
            device: input.device(),
        }
    }

    /// An op's output of no elements, which is no part of the graph, as Burn's empty tensors are not.
    pub(super) fn empty<const D: usize>(&self, shape: Shape) -> Tensor<D> {
        Tensor::empty(shape, (&self.device, self.dtype))
    }

    pub(super) fn data<const D: usize>(
        &self,
        what: &'static str,
        tensor: &Tensor<D>,
    ) -> Result<(), ConvBnError> {
        self.dtype_among(what, tensor, &[self.dtype])
    }

    pub(super) fn data_channels(
        &self,
        what: &'static str,
        tensor: Option<&Tensor<1>>,
        channels: usize,
    ) -> Result<(), ConvBnError> {
        let Some(tensor) = tensor else { return Ok(()) };
        self.shape(what, tensor, Shape::new([channels]))?;
        self.data(what, tensor)
    }

    pub(super) fn norm_channels(
        &self,
        what: &'static str,
        tensor: Option<&Tensor<1>>,
        channels: usize,
    ) -> Result<(), ConvBnError> {
        let Some(tensor) = tensor else { return Ok(()) };
        self.shape(what, tensor, Shape::new([channels]))?;
        match self.dtype {
            DType::F16 | DType::BF16 => self.dtype_among(what, tensor, &[self.dtype, DType::F32]),
            dtype => self.dtype_among(what, tensor, &[dtype]),
        }
    }

    pub(super) fn shape<const D: usize>(
        &self,
        what: &'static str,
        tensor: &Tensor<D>,
        expected: Shape,
    ) -> Result<(), ConvBnError> {
        let got = tensor.shape();
        if got == expected {
            Ok(())
        } else {
            Err(ConvBnError::Shape {
                what,
                expected,
                got,
            })
        }
    }

    fn dtype_among<const D: usize>(
        &self,
        what: &'static str,
        tensor: &Tensor<D>,
        expected: &[DType],
    ) -> Result<(), ConvBnError> {
        let got = tensor.dtype();
        if !expected.contains(&got) {
            let expected: Vec<String> = expected.iter().map(|dtype| format!("{dtype:?}")).collect();
            return Err(ConvBnError::DType {
                what,
                input: self.dtype,
                expected: expected.join(" or "),
                got,
            });
        }
        let device = tensor.device();
        if device == self.device {
            Ok(())
        } else {
            Err(ConvBnError::Device {
                what,
                expected: format!("{:?}", self.device),
                got: format!("{device:?}"),
            })
        }
    }
}
