//! Convolutions in naive loops over f64; `kernels` checks these by hand.

use burn_conv_bn_cpu::{Geometry, Method, Real};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A convolution's numbers, from which both the geometry and the naive loops are made.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub batch: usize,
    pub channels: [usize; 2],
    pub groups: usize,
    pub input: [usize; 3],
    pub kernel: [usize; 3],
    pub stride: [usize; 3],
    pub padding: [(usize, usize); 3],
    pub dilation: [usize; 3],
    /// On scratch.
    pub bound: Option<usize>,
    /// The algorithm; the rule's without one.
    pub method: Option<Method>,
}

pub const PLAIN: Case = Case {
    batch: 2,
    channels: [3, 4],
    groups: 1,
    input: [1, 6, 7],
    kernel: [1, 3, 3],
    stride: [1; 3],
    padding: [(0, 0); 3],
    dilation: [1; 3],
    bound: None,
    method: None,
};

impl Case {
    pub fn geometry(&self) -> Geometry {
        let mut geometry = self.unbounded();
        if let Some(bytes) = self.bound {
            geometry = geometry.with_max_scratch(bytes);
        }
        if let Some(method) = self.method {
            geometry = geometry.with_method(method);
        }
        geometry
    }

    pub fn unbounded(&self) -> Geometry {
        Geometry::new(
            self.batch,
            self.channels,
            self.groups,
            self.input,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
        )
        .unwrap()
    }

    /// Calls `visit` with the flat indices of each input, weight and output value that meet.
    pub fn for_each_product(&self, mut visit: impl FnMut(usize, usize, usize)) {
        let output = self.geometry().output();
        let [group_in, group_out] = self.channels.map(|channels| channels / self.groups);
        let flat = |index: [usize; 3], size: [usize; 3]| {
            (index[0] * size[1] + index[1]) * size[2] + index[2]
        };
        let indices = |size: [usize; 3]| {
            (0..size.iter().product())
                .map(move |i| [i / (size[1] * size[2]), i / size[2] % size[1], i % size[2]])
        };
        let planes = |size: [usize; 3]| size.iter().product::<usize>();
        for image in 0..self.batch {
            for out in 0..self.channels[1] {
                for within in 0..group_in {
                    let into = out / group_out * group_in + within;
                    for at in indices(output) {
                        for tap in indices(self.kernel) {
                            let position = |dim: usize| {
                                (at[dim] * self.stride[dim] + tap[dim] * self.dilation[dim])
                                    .checked_sub(self.padding[dim].0)
                                    .filter(|position| *position < self.input[dim])
                            };
                            let (Some(slice), Some(row), Some(column)) =
                                (position(0), position(1), position(2))
                            else {
                                continue;
                            };
                            visit(
                                (image * self.channels[0] + into) * planes(self.input)
                                    + flat([slice, row, column], self.input),
                                (out * group_in + within) * planes(self.kernel)
                                    + flat(tap, self.kernel),
                                (image * self.channels[1] + out) * planes(output)
                                    + flat(at, output),
                            );
                        }
                    }
                }
            }
        }
    }

    /// The channel of a value of the output.
    pub fn channel_of(&self) -> impl Fn(usize) -> usize {
        let (positions, channels) = (self.geometry().positions(), self.channels[1]);
        move |index| index / positions % channels
    }

    /// Mean of each channel of the output.
    pub fn means(&self, z: &[f64]) -> Vec<f64> {
        let channel_of = self.channel_of();
        let count = z.len() as f64 / self.channels[1] as f64;
        let mut means = vec![0.0; self.channels[1]];
        for (index, z) in z.iter().enumerate() {
            means[channel_of(index)] += z / count;
        }
        means
    }

    pub fn conv(&self, input: &[f64], weight: &[f64]) -> Vec<f64> {
        let geometry = self.geometry();
        let mut output = vec![0.0; self.batch * geometry.output_len()];
        self.for_each_product(|x, w, y| output[y] += input[x] * weight[w]);
        output
    }

    /// Sums of `g` and of `g * (z - mean)`, by channel.
    pub fn sums(&self, g: &[f64], z: &[f64], mean: &[f64]) -> [Vec<f64>; 2] {
        let channel_of = self.channel_of();
        let mut sums = [vec![0.0; mean.len()], vec![0.0; mean.len()]];
        for (index, (g, z)) in g.iter().zip(z).enumerate() {
            let channel = channel_of(index);
            sums[0][channel] += g;
            sums[1][channel] += g * (z - mean[channel]);
        }
        sums
    }

    /// Gradients of input and weight from `dz = scale * g + slope * (z - mean) + offset`.
    pub fn gradients(
        &self,
        [input, weight]: [&[f64]; 2],
        [g, z]: [&[f64]; 2],
        [mean, scale, slope, offset]: [&[f64]; 4],
    ) -> [Vec<f64>; 2] {
        let channel_of = self.channel_of();
        let of_channels = |(index, (g, z)): (usize, (&f64, &f64))| {
            let channel = channel_of(index);
            scale[channel] * g + slope[channel] * (z - mean[channel]) + offset[channel]
        };
        let dz: Vec<f64> = g.iter().zip(z).enumerate().map(of_channels).collect();
        let (mut of_input, mut of_weight) = (vec![0.0; input.len()], vec![0.0; weight.len()]);
        self.for_each_product(|x, w, y| {
            of_input[x] += dz[y] * weight[w];
            of_weight[w] += dz[y] * input[x];
        });
        [of_input, of_weight]
    }
}

/// From -1 to 1.
pub fn random(len: usize, seed: u64) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

pub fn rounded<T: Real>(values: &[f64]) -> Vec<T> {
    values.iter().map(|value| T::from_f64(*value)).collect()
}
