//! Tensors as numbers, and how far apart they are.

use burn::tensor::Tensor;

pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

/// Largest absolute difference; infinite where one is not a number.
pub fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, |max, d| {
        if d.is_nan() {
            f64::INFINITY
        } else {
            d.max(max)
        }
    })
}
