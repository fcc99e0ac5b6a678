//! Between files and tensors.

use std::path::Path;

use anyhow::{Result, anyhow, bail};
use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};

use crate::files::{read, tensor_file, write};

/// Reads a tensor's values, of which there must be so many.
pub fn values(folder: &Path, name: &str, count: usize) -> Result<Vec<f32>> {
    let values = read(folder, name)?;
    if values.len() != count {
        bail!(
            "{} holds {} values instead of {count}",
            tensor_file(folder, name).display(),
            values.len()
        );
    }
    Ok(values)
}

/// Reads a tensor.
pub fn tensor<const D: usize>(
    folder: &Path,
    name: &str,
    shape: [usize; D],
    device: &Device,
) -> Result<Tensor<D>> {
    let values = values(folder, name, shape.iter().product())?;
    Ok(Tensor::from_data(TensorData::new(values, shape), device))
}

/// Reads a parameter.
pub fn parameter<const D: usize>(
    folder: &Path,
    name: &str,
    shape: [usize; D],
    device: &Device,
) -> Result<Param<Tensor<D>>> {
    Ok(Param::from_tensor(tensor(folder, name, shape, device)?))
}

/// Reads a tensor back.
pub fn into_values<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>> {
    let values = tensor.try_into_vec_as::<f32>();
    values.map_err(|error| anyhow!("cannot read a tensor back: {error}"))
}

/// Writes a tensor.
pub fn write_tensor<const D: usize>(folder: &Path, name: &str, tensor: Tensor<D>) -> Result<()> {
    write(folder, name, &into_values(tensor)?)
}
