//! Devices, data and comparison for the tests.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::tensor::{DType, Device, Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub fn device() -> Device {
    Device::flex().autodiff()
}

/// Uniform values in `[-1, 1)`, the same for the same seed.
pub fn random(shape: &[usize], seed: u64) -> TensorData {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f64> = (0..shape.iter().product())
        .map(|_| rng.random_range(-1.0..1.0))
        .collect();
    TensorData::new(values, shape.to_vec())
}

pub fn tensor<const D: usize>(data: TensorData, dtype: DType) -> Tensor<D> {
    Tensor::from_data(data, (&device(), dtype))
}

pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

/// Largest absolute difference.
pub fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| {
            let difference = (a - b).abs();
            if difference.is_nan() {
                f64::INFINITY
            } else {
                difference
            }
        })
        .fold(0.0, f64::max)
}

/// Asserts that `got` is within `relative` of the largest wanted value plus `absolute`, and says
/// how many differ and where it is worst.
pub fn assert_close(what: &str, got: &[f64], wanted: &[f64], relative: f64, absolute: f64) {
    assert_eq!(got.len(), wanted.len(), "{what}: length");
    let scale = wanted
        .iter()
        .fold(0.0f64, |max, value| max.max(value.abs()));
    let tolerance = relative * scale + absolute;
    let differences = got
        .iter()
        .zip(wanted)
        .map(|(got, wanted)| (got - wanted).abs());
    let failed = differences
        .clone()
        .filter(|d| *d > tolerance || d.is_nan())
        .count();
    let (worst, difference) = differences
        .enumerate()
        .max_by(|(_, a), (_, b)| a.total_cmp(b))
        .expect("something to compare");
    assert!(
        failed == 0,
        "{what}: {failed} of {} differ by more than {tolerance:e}; worst at {worst}: got {}, \
         wanted {} (difference {difference:e})",
        got.len(),
        got[worst],
        wanted[worst],
    );
}

/// The message that something panics with.
pub fn panic_message<T>(run: impl FnOnce() -> T) -> String {
    let payload = catch_unwind(AssertUnwindSafe(run)).err().expect("a panic");
    match payload.downcast::<String>() {
        Ok(message) => *message,
        Err(payload) => payload.downcast::<&str>().expect("a message").to_string(),
    }
}
