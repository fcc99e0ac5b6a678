//! The data: volumes of noise with spheres and cubes in them.

use burn::tensor::{Device, Int, Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Depth, height and width of a volume.
pub const SIZE: usize = 24;

/// A body of density 1.
struct Body {
    is_sphere: bool,
    center: [f32; 3],
    /// Of the sphere, or of one about the cube.
    radius: f32,
}

impl Body {
    fn draw(rng: &mut ChaCha8Rng) -> Self {
        let radius: f32 = rng.random_range(4.0..7.0);
        Self {
            is_sphere: rng.random(),
            center: [(); 3].map(|()| rng.random_range(radius..SIZE as f32 - radius)),
            radius,
        }
    }

    fn contains(&self, voxel: [usize; 3]) -> bool {
        let offsets = [0, 1, 2].map(|axis| voxel[axis] as f32 + 0.5 - self.center[axis]);
        if self.is_sphere {
            offsets.iter().map(|offset| offset * offset).sum::<f32>() < self.radius.powi(2)
        } else {
            let half = self.radius / 3.0f32.sqrt();
            offsets.iter().all(|offset| offset.abs() < half)
        }
    }
}

/// Draws so many volumes of one to three bodies, under more noise than a threshold could remove:
/// densities, `[count, 1, SIZE, SIZE, SIZE]`, and 1 in the voxels within a body, of the same shape.
pub fn batch(count: usize, seed: u64, device: &Device) -> (Tensor<5>, Tensor<5, Int>) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (mut densities, mut inside) = (Vec::<f32>::new(), Vec::<i64>::new());
    for _ in 0..count {
        let bodies = rng.random_range(1..=3);
        let bodies: Vec<Body> = (0..bodies).map(|_| Body::draw(&mut rng)).collect();
        for index in 0..SIZE.pow(3) {
            let voxel = [index / SIZE.pow(2), index / SIZE % SIZE, index % SIZE];
            let is_inside = bodies.iter().any(|body| body.contains(voxel));
            let noise: f32 = rng.random_range(-1.2..1.2);
            densities.push(f32::from(u8::from(is_inside)) + noise);
            inside.push(i64::from(is_inside));
        }
    }
    let shape = [count, 1, SIZE, SIZE, SIZE];
    (
        Tensor::from_data(TensorData::new(densities, shape), device),
        Tensor::from_data(TensorData::new(inside, shape), device),
    )
}
