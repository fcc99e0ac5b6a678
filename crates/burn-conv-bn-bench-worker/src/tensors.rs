//! Tensors from and to files.

use std::path::Path;

use anyhow::{Result, anyhow, ensure};
use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};
use burn_conv_bn_bench::tensor_file::{read, write};

pub fn tensor<const D: usize>(
    folder: &Path,
    name: &str,
    shape: [usize; D],
    device: &Device,
) -> Result<Tensor<D>> {
    let values = read(folder, name)?;
    let (found, wanted) = (values.len(), shape.iter().product::<usize>());
    ensure!(
        found == wanted,
        "{name} has {found} values instead of {wanted}"
    );
    Ok(Tensor::from_data(TensorData::new(values, shape), device))
}

pub fn parameter<const D: usize>(
    folder: &Path,
    name: &str,
    shape: [usize; D],
    device: &Device,
) -> Result<Param<Tensor<D>>> {
    Ok(Param::from_tensor(tensor(folder, name, shape, device)?))
}

pub fn into_values<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>> {
    let values = tensor.try_into_vec_as::<f32>();
    values.map_err(|error| anyhow!("cannot read a tensor back: {error}"))
}

pub fn write_tensor<const D: usize>(folder: &Path, name: &str, tensor: Tensor<D>) -> Result<()> {
    write(folder, name, &into_values(tensor)?)
}
