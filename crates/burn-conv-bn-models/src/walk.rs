//! What a network keeps for its backward pass, each buffer counted once.

use std::mem::replace;

use burn::nn::conv::Conv2d;
use burn::nn::{Dropout, Linear};
use burn::tensor::{DType, Shape};
use burn_conv_bn::{BatchNormActivation, ConvBn2d, MaxPool2d, SavedTensor};

use crate::Form;

/// A tensor on its way through a network.
#[derive(Clone)]
pub(crate) struct Activation {
    shape: Shape,
    dtype: DType,
    /// Its index in [`Walk::held`]. Views have their tensor's.
    buffer: usize,
}

/// The convolution of a block.
pub(crate) struct Convolution {
    /// The block's name.
    pub(crate) name: String,
    /// Values of its output.
    pub(crate) outputs: u64,
    /// Multiply-adds of one run.
    pub(crate) multiply_adds: u64,
}

/// Goes through a network in the order of its forward pass, without running it, and lists what it keeps.
///
/// In a block's own list its neighbours' tensors are shared. Here the first block to keep such a tensor
/// lists it as its own, and later blocks share it: the tensors that are not shared are those that the
/// forward pass leaves alive.
pub(crate) struct Walk {
    pub(crate) form: Form,
    pub(crate) current: Activation,
    /// For each buffer, whether an entry lists it as its own, it was there before, or it is rebuilt.
    held: Vec<bool>,
    saved: Vec<(String, SavedTensor)>,
    /// Of the blocks so far.
    pub(crate) convolutions: Vec<Convolution>,
}

impl Walk {
    /// Starts with images in the type of `first`, a block's weight.
    pub(crate) fn new(form: Form, images: [usize; 4], first: &ConvBn2d) -> Self {
        Self {
            form,
            current: Activation {
                shape: images.into(),
                dtype: first.conv.weight.val().dtype(),
                buffer: 0,
            },
            held: vec![true],
            saved: Vec::new(),
            convolutions: Vec::new(),
        }
    }

    pub(crate) fn into_saved(self) -> Vec<(String, SavedTensor)> {
        self.saved
    }

    pub(crate) fn block(&mut self, name: &str, block: &ConvBn2d) {
        let input = self.current.shape.dims();
        let saved = self.form.saved_for_backward(block, input);
        self.convolution(name, block);
        self.pass(name, saved, None, block.output_shape(input));
        // What keeps the output keeps how to rebuild it.
        self.held[self.current.buffer] |= self.form.rebuilds_output(block);
    }

    pub(crate) fn block_residual(&mut self, name: &str, block: &ConvBn2d, residual: &Activation) {
        let input = self.current.shape.dims();
        let saved = self.form.saved_for_backward_residual(block, input);
        let residual = Some(residual.buffer);
        self.convolution(name, block);
        self.pass(name, saved, residual, block.output_shape(input));
    }

    pub(crate) fn block_max_pool(&mut self, name: &str, block: &ConvBn2d, pool: &MaxPool2d) {
        let input = self.current.shape.dims();
        let saved = self.form.saved_for_backward_max_pool(block, input, pool);
        let output = pool.output_shape(block.output_shape(input));
        self.convolution(name, block);
        self.pass(name, saved, None, output);
    }

    /// Passes a max pool alone.
    pub(crate) fn max_pool(&mut self, name: &str, pool: &MaxPool2d) {
        let Activation { shape, dtype, .. } = self.current.clone();
        let saved = self.form.saved_by_max_pool(pool, shape.dims(), dtype);
        self.pass(name, saved, None, pool.output_shape(shape.dims()));
    }

    /// Passes a norm and its activation, whose output is rebuilt in the fused form.
    pub(crate) fn norm(&mut self, name: &str, layer: &BatchNormActivation) {
        let Activation { shape, dtype, .. } = self.current.clone();
        let saved = self.form.saved_by_norm(layer, &shape, dtype);
        self.pass(name, saved, None, shape.dims());
        self.held[self.current.buffer] = self.form == Form::Fused;
    }

    /// Passes a convolution alone that keeps height and width. It keeps its weight, or a cast of that.
    pub(crate) fn conv(&mut self, name: &str, layer: &Conv2d) {
        let weight = layer.weight.val();
        if self.form == Form::Unfused || weight.is_tracked() {
            self.keep_input(name);
        }
        let is_weight = weight.dtype() == self.current.dtype;
        self.keep(name, "weight", weight.shape(), is_weight);
        let mut output = self.current.shape.clone();
        output[1] = weight.dims()[0];
        self.advance(output);
    }

    /// Passes a concatenation along channels. In the fused form it keeps what it concatenates, and its output is
    /// rebuilt.
    pub(crate) fn concatenate(&mut self, name: &str, tensors: &[Activation]) {
        if let [single] = tensors {
            self.current = single.clone();
            return;
        }
        let is_rebuilt = self.form == Form::Fused;
        for tensor in tensors.iter().filter(|_| is_rebuilt) {
            if !replace(&mut self.held[tensor.buffer], true) {
                self.keep(name, "input", tensor.shape.clone(), false);
            }
        }
        let mut output = tensors[0].shape.clone();
        output[1] = tensors.iter().map(|tensor| tensor.shape[1]).sum();
        self.advance(output);
        self.held[self.current.buffer] = is_rebuilt;
    }

    /// Passes a sum, which keeps nothing.
    pub(crate) fn sum(&mut self) {
        self.advance(self.current.shape.clone());
    }

    /// Passes the copy that makes channels of blocks of 2x2 pixels.
    pub(crate) fn pixel_blocks(&mut self) {
        let [batch, channels, height, width] = self.current.shape.dims();
        self.advance([batch, 4 * channels, height / 2, width / 2]);
    }

    /// Passes Burn's 2x2 average pool, which keeps its input.
    pub(crate) fn halve(&mut self, name: &str) {
        self.keep_input(name);
        let [batch, channels, height, width] = self.current.shape.dims();
        self.advance([batch, channels, height / 2, width / 2]);
    }

    /// Passes Burn's adaptive average pool, which keeps its input.
    pub(crate) fn average_pool(&mut self, [height, width]: [usize; 2]) {
        self.keep_input("average_pool");
        let [batch, channels, ..] = self.current.shape.dims::<4>();
        self.advance([batch, channels, height, width]);
    }

    /// Passes [`rows`](crate::head::rows): a view, or a cast.
    pub(crate) fn rows(&mut self, layer: &Linear) {
        let weight = layer.weight.val();
        let rows = [self.current.shape[0], weight.dims()[0]];
        self.current.shape = rows.into();
        if self.current.dtype != weight.dtype() {
            self.advance(rows);
            self.current.dtype = weight.dtype();
        }
    }

    /// Passes a linear layer, which keeps its input.
    pub(crate) fn linear(&mut self, name: &str, layer: &Linear) {
        let weight = layer.weight.val();
        if weight.is_tracked() {
            self.keep_input(name);
        }
        self.keep(name, "weight", weight.shape(), true);
        self.advance([self.current.shape[0], weight.dims()[1]]);
    }

    /// Passes a squeeze and excitation, given its two convolutions: the pool and the product keep its input.
    pub(crate) fn squeeze(&mut self, name: &str, [fc1, fc2]: [&Conv2d; 2]) {
        let map = self.current.clone();
        self.keep_input(name);
        self.current.dtype = fc1.weight.val().dtype();
        let batch = map.shape[0];
        let mut keep = |name: &str, role, channels| {
            self.keep(name, role, Shape::new([batch, channels, 1, 1]), false);
        };
        let [squeezed, channels, ..] = fc1.weight.dims();
        keep(&format!("{name}.fc1"), "input", channels);
        keep(&format!("{name}.silu"), "input", squeezed);
        keep(&format!("{name}.silu"), "gate", squeezed);
        keep(&format!("{name}.fc2"), "input", squeezed);
        keep(&format!("{name}.sigmoid"), "input", channels);
        for (layer, conv) in [("fc1", fc1), ("fc2", fc2)] {
            let weight = conv.weight.shape();
            let bias = Shape::new([weight[0]]);
            self.keep(&format!("{name}.{layer}"), "weight", weight, true);
            self.keep(&format!("{name}.{layer}"), "bias", bias, true);
        }
        self.current.dtype = map.dtype;
        self.keep(name, "gate", Shape::new([batch, channels, 1, 1]), false);
        self.advance(map.shape);
    }

    /// Passes a product with a number for each image, and a sum.
    pub(crate) fn stochastic_depth(&mut self, name: &str) {
        let mask = Shape::new([self.current.shape[0], 1, 1, 1]);
        self.keep(name, "mask", mask, false);
        self.advance(self.current.shape.clone());
    }

    pub(crate) fn relu(&mut self) {
        self.keep_input("relu");
        self.advance(self.current.shape.clone());
    }

    /// Passes a dropout, which keeps its draws.
    pub(crate) fn dropout(&mut self, dropout: &Dropout) {
        if dropout.training.is_enabled() && dropout.prob > 0.0 {
            self.keep("dropout", "mask", self.current.shape.clone(), false);
            self.advance(self.current.shape.clone());
        }
    }

    /// Passes Burn's log-softmax, which keeps the scores below their maximum and the sum of exponentials.
    pub(crate) fn log_softmax(&mut self) {
        self.keep("log_softmax", "shifted", self.current.shape.clone(), false);
        let sums = [self.current.shape[0], 1];
        self.keep("log_softmax", "sum", sums.into(), false);
        self.advance(self.current.shape.clone());
    }

    /// Notes a block's convolution of the current tensor.
    fn convolution(&mut self, name: &str, block: &ConvBn2d) {
        let output = block.output_shape(self.current.shape.dims());
        let outputs: usize = output.iter().product();
        let taps: usize = block.conv.weight.dims()[1..].iter().product();
        self.convolutions.push(Convolution {
            name: name.to_owned(),
            outputs: outputs as u64,
            multiply_adds: (outputs * taps) as u64,
        });
    }

    fn pass(
        &mut self,
        name: &str,
        saved: Vec<SavedTensor>,
        residual: Option<usize>,
        output: [usize; 4],
    ) {
        let input = self.current.buffer;
        self.advance(output);
        for mut tensor in saved {
            let neighbour = match tensor.name {
                "input" => Some(input),
                "output" | "pooled" => Some(self.current.buffer),
                "residual" => residual,
                _ => None,
            };
            if let Some(buffer) = neighbour.filter(|_| tensor.shared) {
                tensor.shared = replace(&mut self.held[buffer], true);
            }
            self.saved.push((name.to_owned(), tensor));
        }
    }

    fn keep_input(&mut self, name: &str) {
        let shared = replace(&mut self.held[self.current.buffer], true);
        self.keep(name, "input", self.current.shape.clone(), shared);
    }

    /// Adds an entry in the current type.
    fn keep(&mut self, name: &str, role: &'static str, shape: Shape, shared: bool) {
        let tensor = SavedTensor {
            name: role,
            shape,
            dtype: self.current.dtype,
            shared,
        };
        self.saved.push((name.to_owned(), tensor));
    }

    /// Goes on with a buffer that nothing keeps yet.
    fn advance(&mut self, shape: impl Into<Shape>) {
        self.current.shape = shape.into();
        self.current.buffer = self.held.len();
        self.held.push(false);
    }
}
