//! Drawn tensors on Flex, which several test programs use.

use std::env;

use burn::tensor::{DType, Device, Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub fn device() -> Device {
    Device::flex().autodiff()
}

/// Uniform values in `[-1, 1)`, the same for the same seed. `BURN_CONV_BN_SEED` chooses others.
pub fn random<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
    let chosen = env::var("BURN_CONV_BN_SEED").unwrap_or_else(|_| "0".to_string());
    let chosen: u64 = chosen.parse().expect("BURN_CONV_BN_SEED is a number");
    let mut rng = ChaCha8Rng::seed_from_u64(chosen.wrapping_mul(1 << 20).wrapping_add(seed));
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| rng.random_range(-1.0..1.0))
        .collect();
    Tensor::from_data(TensorData::new(values, shape), (&device(), DType::F32))
}
