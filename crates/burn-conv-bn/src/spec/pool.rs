use burn::tensor::ops::MaxPoolOptions;
use burn::tensor::{DType, Shape};

use super::{ConvBnError, SavedTensor};
#[cfg(any(feature = "cubecl", feature = "fusion"))]
use super::{SavePlan, StatisticsKind};

/// Largest window, in pixels, whose argmax fits a byte.
const MOST_PLACES: usize = 1 << u8::BITS;

/// A checked max pool over height and width.
#[derive(Clone, Debug)]
pub(crate) struct MaxPoolProblem {
    /// `[batch, channels, height, width]`.
    input: Shape,
    options: MaxPoolOptions<2>,
}

impl MaxPoolProblem {
    /// Checks the options, and the input's shape against them. In ceil mode a window may reach past
    /// the padded input, as in Burn.
    pub(crate) fn new(input: Shape, options: MaxPoolOptions<2>) -> Result<Self, ConvBnError> {
        check_window(options.kernel_size, options.stride, options.dilation)?;
        let problem = Self { input, options };
        for dim in 0..2 {
            let (before, after) = problem.options.padding[dim];
            let padded = problem.input[dim + 2]
                .saturating_add(before)
                .saturating_add(after);
            let window = problem.window(dim);
            if window > padded && !problem.options.ceil_mode {
                return Err(ConvBnError::WindowTooLarge {
                    dim,
                    window,
                    padded,
                    input: problem.input,
                });
            }
        }
        Ok(problem)
    }

    /// Whether the pool can be one op with the block before it: the input has elements, each window overlaps
    /// it and stays within the padding, and the argmax fits a byte.
    pub(crate) fn is_regular(&self) -> bool {
        let options = &self.options;
        let [rows, columns] = options.kernel_size;
        let is_narrow = |dim: usize| 2 * options.padding[dim].0 <= options.kernel_size[dim];
        self.input.num_elements() > 0
            && !options.is_asymmetric()
            && !options.ceil_mode
            && options.dilation == [1, 1]
            && rows.saturating_mul(columns) <= MOST_PLACES
            && (0..2).all(is_narrow)
    }

    /// Saved tensors of a tracked node on Flex, with activations of `dtype`: the argmax, or those of Burn's
    /// op where Flex has no kernel for the window.
    pub(crate) fn saved(&self, dtype: DType) -> Vec<SavedTensor> {
        let [rows, columns] = self.options.kernel_size;
        if self.options.is_asymmetric() || rows.saturating_mul(columns) > MOST_PLACES {
            return self.saved_by_burn(dtype);
        }
        vec![SavedTensor {
            name: "argmax",
            shape: self.output(),
            dtype: DType::U8,
            shared: false,
        }]
    }

    /// Saved tensors of Burn's op.
    pub(crate) fn saved_by_burn(&self, dtype: DType) -> Vec<SavedTensor> {
        vec![
            SavedTensor {
                name: "input",
                shape: self.pooled().0,
                dtype,
                shared: !self.options.is_asymmetric(),
            },
            SavedTensor {
                name: "indices",
                shape: self.output(),
                // The device's integers: here Flex's.
                dtype: DType::I32,
                shared: false,
            },
        ]
    }

    /// `[batch, channels, height_out, width_out]`.
    pub(crate) fn output(&self) -> Shape {
        let (input, padding) = self.pooled();
        let count = |dim: usize| self.windows(dim, input[dim + 2], padding[dim]);
        Shape::new([input[0], input[1], count(0), count(1)])
    }

    /// Shape and padding of the tensor that is pooled. For asymmetric padding Burn pools a padded copy.
    fn pooled(&self) -> (Shape, [usize; 2]) {
        if self.options.is_asymmetric() {
            (self.padded(), [0; 2])
        } else {
            let padding = self.options.padding.map(|(before, _)| before);
            (self.input.clone(), padding)
        }
    }

    /// Extent of the dilated window.
    fn window(&self, dim: usize) -> usize {
        let steps = self.options.kernel_size[dim] - 1;
        self.options.dilation[dim]
            .saturating_mul(steps)
            .saturating_add(1)
    }

    /// The input's shape with its padding.
    fn padded(&self) -> Shape {
        let mut padded = self.input.clone();
        for (dim, (before, after)) in self.options.padding.into_iter().enumerate() {
            padded[dim + 2] += before + after;
        }
        padded
    }

    /// Number of windows over `size` pixels with that padding on either side: Burn's rule.
    fn windows(&self, dim: usize, size: usize, padding: usize) -> usize {
        let stride = self.options.stride[dim];
        match (size + 2 * padding).checked_sub(self.window(dim)) {
            // In ceil mode alone.
            None => 1,
            Some(slack) if !self.options.ceil_mode => slack / stride + 1,
            Some(slack) => {
                let count = slack.div_ceil(stride);
                // No window begins in the padding at the end.
                count + usize::from(count * stride < size + padding)
            }
        }
    }
}

#[cfg(any(feature = "cubecl", feature = "fusion"))]
impl MaxPoolProblem {
    /// The pool, if [its windows are regular](Self::is_regular).
    pub(crate) fn of_regular_windows(input: Shape, options: MaxPoolOptions<2>) -> Option<Self> {
        let problem = Self::new(input, options).ok()?;
        problem.is_regular().then_some(problem)
    }

    /// The pool behind a block with that output, if the two can be one op.
    pub(crate) fn behind_block(
        output: Shape,
        statistics: StatisticsKind,
        residual: bool,
        options: MaxPoolOptions<2>,
    ) -> Option<Self> {
        let joins = SavePlan::joins_max_pool(statistics, residual);
        Self::of_regular_windows(output, options).filter(|_| joins)
    }
}

/// Checks a max pool's options that depend on no input.
pub(crate) fn check_window(
    kernel_size: [usize; 2],
    stride: [usize; 2],
    dilation: [usize; 2],
) -> Result<(), ConvBnError> {
    for (what, got) in [
        ("kernel size", kernel_size),
        ("stride", stride),
        ("dilation", dilation),
    ] {
        if got.contains(&0) {
            return Err(ConvBnError::Zero {
                what,
                got: got.to_vec(),
            });
        }
    }
    Ok(())
}
