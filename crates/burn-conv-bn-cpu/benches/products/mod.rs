//! Large matrix products, whose rate is the most that a layer's operations can have.

use std::hint::black_box;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

const SIZE: usize = 768;

/// A product for each of rayon's threads: the library's own threads wait for each other.
pub struct Products {
    factors: [Vec<f32>; 2],
    products: Vec<Vec<f32>>,
}

impl Products {
    pub fn new() -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut random = || {
            (0..SIZE * SIZE)
                .map(|_| rng.random_range(-1.0..1.0))
                .collect()
        };
        Self {
            factors: [random(), random()],
            products: vec![vec![0.0; SIZE * SIZE]; rayon::current_num_threads()],
        }
    }

    /// Additions and multiplications of [`run`](Self::run).
    pub fn operations(&self) -> u64 {
        2 * (self.products.len() * SIZE.pow(3)) as u64
    }

    pub fn run(&mut self) {
        let [a, b] = &self.factors;
        self.products.par_iter_mut().for_each(|product| {
            let (column, row) = (SIZE as isize, 1);
            // SAFETY: each matrix is SIZE by SIZE, its columns SIZE apart.
            #[allow(unsafe_code)]
            unsafe {
                gemm::gemm(
                    SIZE,
                    SIZE,
                    SIZE,
                    product.as_mut_ptr(),
                    column,
                    row,
                    false,
                    a.as_ptr(),
                    column,
                    row,
                    b.as_ptr(),
                    column,
                    row,
                    0.0,
                    1.0,
                    false,
                    false,
                    false,
                    gemm::Parallelism::None,
                );
            }
        });
        black_box(&self.products);
    }
}
