//! How the backward pass cuts a batch, so that what it holds beyond saved tensors and results is bounded.

use core::ops::Range;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{DType, Shape};

use super::sweeps::Sweeps;
use crate::backend::tensors::ConvBnBackwardOptions;

/// Bound on the memory of convolution gradients without `max_workspace`, unless input and gradient are larger.
const DEFAULT_BOUND: usize = 64 << 20;

/// How a device allocates tensors.
#[derive(Clone, Copy, Debug)]
struct Allocator {
    dtype: DType,
    /// [`Layouts::row_alignment`](super::layout::Layouts::row_alignment).
    row_alignment: Option<usize>,
}

impl Allocator {
    /// Bytes of a row of that many values.
    fn row(&self, values: usize) -> usize {
        let bytes = values * self.dtype.size();
        self.row_alignment
            .filter(|_| values > 1)
            .map_or(bytes, |alignment| pitched(bytes, alignment))
    }
}

/// Bytes of a row of several values in a pitched allocation, after CubeCL's `PitchedMemoryLayoutPolicy`.
fn pitched(bytes: usize, alignment: usize) -> usize {
    bytes.next_multiple_of(bytes.next_power_of_two().clamp(16, alignment))
}

/// Bytes that the backward pass takes for an image, unless said otherwise. Tensors have channels innermost.
#[derive(Clone, Copy, Debug)]
pub(super) struct Costs {
    allocator: Allocator,
    /// z and what the sweeps make of it.
    sweeps: usize,
    /// Gradient of z.
    output: usize,
    input: usize,
    /// The input's gradient as a convolution returns it; twice where padding has to be cropped.
    input_grad: usize,
    /// Number of values of input and output.
    values: usize,
    /// What matrix products for a convolution's gradient allocate.
    products: usize,
    /// Bound of the convolution's gradients for the whole batch without `max_workspace`.
    default_bound: usize,
}

impl Costs {
    pub(super) fn new<B: Backend, S: Sweeps<B>>(
        options: &ConvBnBackwardOptions,
        output_shape: &Shape,
        output_grad: &FloatTensor<B>,
    ) -> Self {
        let allocator = Allocator {
            dtype: output_grad.dtype(),
            row_alignment: S::row_alignment(output_grad),
        };
        let costs = Self::of(options, output_shape, allocator, S::TUNES_PRODUCTS);
        let dtype = allocator.dtype;
        Self {
            sweeps: S::workspace(costs.output / dtype.size(), dtype),
            ..costs
        }
    }

    /// The costs, with z alone for the sweeps.
    fn of(
        options: &ConvBnBackwardOptions,
        output_shape: &Shape,
        allocator: Allocator,
        tunes_products: bool,
    ) -> Self {
        let spec = &options.options.conv;
        let [channels_in, channels_out] = [options.input_shape[1], output_shape[1]];
        let sizes = || options.input_shape.iter().skip(2);
        let inputs: usize = sizes().product();
        let outputs: usize = output_shape.iter().skip(2).product();
        let taps: usize = options.weight_shape.iter().skip(2).product();
        let input = inputs * allocator.row(channels_in);
        let output = outputs * allocator.row(channels_out);
        let is_cropped = spec.padding.iter().any(|(before, after)| before != after);
        let padded = sizes().zip(&spec.padding);
        let padded = padded.map(|(size, (before, after))| size + before + after);
        let cropped = padded.product::<usize>() * allocator.row(channels_in);
        let columns = if is_depthwise(spec.groups, &options.weight_shape) {
            0
        } else {
            outputs * allocator.row(taps * channels_in)
        };
        // Tuning gives each product a second output. For the input's gradient that is columns, beside a copy of z's
        // gradient. For the weight's gradient it is partial sums, one for every 2048 positions at most.
        let products = if tunes_products && columns > 0 {
            columns * (1 + channels_out.div_ceil(1024)) + output
        } else {
            columns
        };
        let values = inputs * channels_in + outputs * channels_out;
        let is_pointwise = taps == 1 && inputs == outputs;
        let default_bound = if tunes_products && columns > 0 && !is_pointwise {
            DEFAULT_BOUND.max(options.input_shape[0] * values * allocator.dtype.size())
        } else {
            usize::MAX
        };
        Self {
            allocator,
            sweeps: output,
            output,
            input,
            input_grad: input + if is_cropped { cropped } else { 0 },
            values,
            products,
            default_bound,
        }
    }

    /// What a convolution's gradient allocates for that many images: for matrix products, or for both operands
    /// with images innermost.
    fn scratch(&self, images: usize) -> usize {
        let copies = self.values * self.allocator.row(images);
        copies.max(images * self.products)
    }

    /// A chunk of convolution gradients: with its own gradient of the input, and unless the chunk is a view, its
    /// copies.
    fn chunk(&self, images: usize, is_view: bool) -> usize {
        let copies = if is_view { 0 } else { self.input + self.output };
        self.scratch(images) + images * (self.input_grad + copies)
    }

    /// Chunks of the batch that z is recomputed for. More than one only if z and one image of the
    /// convolution gradients do not fit `max_workspace`; then each is recomputed twice.
    pub(super) fn sweep_chunks(
        &self,
        batch: usize,
        max_workspace: Option<usize>,
        view: Option<usize>,
    ) -> Vec<Range<usize>> {
        let Some(bytes) = max_workspace else {
            return chunks(0..batch, batch);
        };
        let convolution = self.chunk(1, false).min(self.scratch(batch));
        if batch * self.sweeps <= bytes && batch * self.output + convolution <= bytes {
            return chunks(0..batch, batch);
        }
        let fits = |images, is_view| {
            let gradients = images * self.output + self.chunk(images, is_view);
            gradients.max(images * self.sweeps) <= bytes
        };
        chunks(0..batch, most(batch, view, fits))
    }

    /// Chunks of `chunk` for the convolution's gradients, once z's gradient of `chunk` exists.
    pub(super) fn conv_chunks(
        &self,
        chunk: &Range<usize>,
        max_workspace: Option<usize>,
        view: Option<usize>,
    ) -> Vec<Range<usize>> {
        let beside = chunk.len() * self.output;
        let bytes = max_workspace.map_or(self.default_bound, |bytes| bytes.saturating_sub(beside));
        if self.scratch(chunk.len()) <= bytes {
            return vec![chunk.clone()];
        }
        // Slices of the whole batch begin and end with the chunk.
        let view =
            view.filter(|&view| chunk.start.is_multiple_of(view) && chunk.end.is_multiple_of(view));
        let fits = |images, is_view| self.chunk(images, is_view) <= bytes;
        chunks(chunk.clone(), most(chunk.len(), view, fits))
    }
}

/// Whether each input channel has outputs of its own. No columns are counted for these: CubeCL's devices are asked
/// for their direct algorithm.
pub(crate) fn is_depthwise(groups: usize, weight_shape: &Shape) -> bool {
    groups != 1 && weight_shape[1] == 1
}

/// The number of images whose multiples are views of a batch with that many bytes from one image to the next. A view
/// begins and ends at offsets of that alignment, a power of two, and what its end is counted from is the batch's.
#[cfg(any(feature = "cubecl", test))]
pub(crate) fn images_of_a_view(batch: usize, stride: usize, alignment: usize) -> Option<usize> {
    // Both are powers of two.
    let images = alignment / alignment.min(1usize << stride.trailing_zeros().min(31));
    batch.is_multiple_of(images).then_some(images)
}

/// Most of that many images that fit: a multiple of `view`, unless not even that fits, and at least one.
fn most(images: usize, view: Option<usize>, fits: impl Fn(usize, bool) -> bool) -> usize {
    let views = view.and_then(|view| {
        let mut multiples = (1..=images / view).rev().map(|count| count * view);
        multiples.find(|&images| fits(images, true))
    });
    views
        .or_else(|| (1..=images).rev().find(|&images| fits(images, false)))
        .unwrap_or(1)
}

/// `range` in chunks of that many images.
fn chunks(range: Range<usize>, images: usize) -> Vec<Range<usize>> {
    let starts = range.clone().step_by(images.max(1));
    starts
        .map(|start| start..(start + images).min(range.end))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{ConvBnOptions, ConvSpec, Parents, StatisticsKind};

    const MIB: usize = 1 << 20;

    /// Of an image whose gradients take ten times its size.
    fn costs() -> Costs {
        Costs {
            allocator: Allocator {
                dtype: DType::F32,
                row_alignment: None,
            },
            sweeps: MIB,
            output: MIB,
            input: MIB,
            input_grad: MIB,
            values: MIB / 2,
            products: 9 * MIB,
            default_bound: usize::MAX,
        }
    }

    /// On CUDA or, without pitched rows, on WebGPU.
    fn costs_of(input: [usize; 4], weight: [usize; 4], spec: &ConvSpec, is_pitched: bool) -> Costs {
        let [batch, channels_in, height, width] = input;
        let output = |dim: usize, size: usize| {
            let (before, after) = spec.padding[dim];
            (size + before + after - weight[dim + 2]) / spec.stride[dim] + 1
        };
        let output = [batch, weight[0], output(0, height), output(1, width)];
        assert_eq!(weight[1] * spec.groups, channels_in);
        let options = ConvBnBackwardOptions {
            options: ConvBnOptions::new(spec.clone()),
            statistics: StatisticsKind::Batch,
            input_shape: Shape::from(input),
            weight_shape: Shape::from(weight),
            norm_dtype: DType::F32,
            wanted: Parents::default(),
        };
        let allocator = Allocator {
            dtype: DType::F32,
            row_alignment: is_pitched.then_some(512),
        };
        Costs::of(&options, &Shape::from(output), allocator, true)
    }

    fn padded(groups: usize) -> ConvSpec {
        ConvSpec {
            padding: vec![(1, 1); 2],
            groups,
            ..ConvSpec::unit(2)
        }
    }

    #[test]
    fn rows_are_pitched() {
        let row = |values, row_alignment| {
            let dtype = DType::F32;
            Allocator {
                dtype,
                row_alignment,
            }
            .row(values)
        };
        let pitched = [1, 2, 4, 5, 24, 144, 288].map(|values| row(values, Some(512)));
        assert_eq!(pitched, [4, 16, 16, 32, 128, 1024, 1536]);
        assert_eq!([1, 5, 144].map(|values| row(values, None)), [4, 20, 576]);
    }

    /// Bytes of each tensor of an image, by rows of channels: 24 and 144 of them are padded, and 9 x 24.
    #[test]
    fn padding_of_rows_is_counted() {
        let (input, weight) = ([8, 24, 10, 10], [144, 24, 3, 3]);
        for (is_pitched, [input_row, output_row, column_row]) in
            [(true, [128, 1024, 1024]), (false, [96, 576, 864])]
        {
            let costs = costs_of(input, weight, &padded(1), is_pitched);
            assert_eq!(costs.sweeps, 100 * output_row);
            assert_eq!(costs.output, 100 * output_row);
            assert_eq!([costs.input, costs.input_grad], [100 * input_row; 2]);
            // Columns as a product's output, twice while it is tuned, and a copy of z's gradient.
            assert_eq!(costs.products, 100 * (2 * column_row + output_row));
            let view = 100 * (2 * column_row + output_row + input_row);
            assert_eq!(costs.chunk(3, true), 3 * view);
            assert_eq!(
                costs.chunk(3, false),
                3 * (view + 100 * (input_row + output_row))
            );
        }
    }

    #[test]
    fn partial_sums_of_many_channels_are_counted() {
        let products = |channels_out| {
            let weight = [channels_out, 8, 3, 3];
            costs_of([2, 8, 4, 4], weight, &padded(1), false).products
        };
        let columns = 16 * 72 * 4;
        assert_eq!(products(1024), 2 * columns + 16 * 1024 * 4);
        // A sum for 2048 positions, of 4096 rows of columns each, twice.
        assert_eq!(products(4096), 5 * columns + 16 * 4096 * 4);
    }

    #[test]
    fn a_cropped_gradient_is_counted_twice() {
        let spec = ConvSpec {
            padding: vec![(0, 2), (1, 1)],
            ..ConvSpec::unit(2)
        };
        let costs = costs_of([2, 8, 6, 6], [8, 8, 3, 3], &spec, false);
        assert_eq!(costs.input_grad, (36 + 64) * 8 * 4);
    }

    /// Both operands of the weight's gradient with images innermost, in rows of 4, 8 and 12 bytes.
    #[test]
    fn copies_of_few_images_are_padded() {
        let costs = costs_of([8, 16, 5, 5], [16, 1, 3, 3], &padded(16), true);
        assert_eq!(costs.products, 0);
        let values = 2 * 25 * 16;
        let scratch = [1, 2, 3, 8].map(|images| costs.scratch(images));
        assert_eq!(scratch, [4, 16, 16, 32].map(|row| row * values));
    }

    #[test]
    fn columns_are_bounded_without_max_workspace() {
        let largest = |costs: Costs, batch| {
            let chunks = costs.conv_chunks(&(0..batch), None, Some(1));
            assert_eq!(chunks.last().unwrap().end, batch);
            chunks.into_iter().map(|chunk| chunk.len()).max().unwrap()
        };
        // Twice 576 KiB and 64 an image: 53 fit 64 MiB, 51 with 64 for their own gradient.
        let square = |batch| costs_of([batch, 64, 16, 16], [64, 64, 3, 3], &padded(1), false);
        assert_eq!(largest(square(53), 53), 53);
        assert_eq!(largest(square(60), 60), 51);
        // Input and gradient: 128 MiB.
        assert_eq!(largest(square(1024), 1024), 102);
        // Without columns, or with those of a pointwise convolution.
        let depthwise = [4096, 64, 16, 16];
        let depthwise = costs_of(depthwise, [64, 1, 3, 3], &padded(64), false);
        assert_eq!(largest(depthwise, 4096), 4096);
        let pointwise = [4096, 64, 16, 16];
        let pointwise = costs_of(pointwise, [64, 64, 1, 1], &ConvSpec::unit(2), false);
        assert_eq!(largest(pointwise, 4096), 4096);
    }

    #[test]
    fn z_is_cut_only_if_it_does_not_fit_beside_one_image() {
        let costs = costs();
        for (mib, wanted) in [
            (None, 1),
            (Some(1000), 1),
            (Some(28), 1),
            (Some(27), 8),
            (Some(1), 16),
        ] {
            let bytes = mib.map(|mib: usize| mib * MIB);
            let chunks = costs.sweep_chunks(16, bytes, Some(1));
            assert_eq!(chunks.len(), wanted, "{mib:?}");
            assert_eq!(chunks.first().unwrap().start, 0);
            assert_eq!(chunks.last().unwrap().end, 16);
        }
    }

    #[test]
    fn max_workspace_takes_the_place_of_the_default() {
        let largest = |mib: usize| {
            let chunks = costs().conv_chunks(&(0..16), Some(mib * MIB), Some(1));
            chunks.into_iter().map(|chunk| chunk.len()).max().unwrap()
        };
        // z's gradient takes 16 MiB of it.
        assert_eq!([largest(1), largest(36), largest(160)], [1, 2, 16]);
    }

    #[test]
    fn a_batch_that_ends_within_a_view_has_none() {
        // Images of 64 bytes, four in an alignment of 256; of 256 and 1024, one.
        assert_eq!(images_of_a_view(8, 64, 256), Some(4));
        assert_eq!(images_of_a_view(10, 64, 256), None);
        assert_eq!(images_of_a_view(3, 64, 256), None);
        assert_eq!(images_of_a_view(10, 192, 256), None);
        assert_eq!(images_of_a_view(10, 256, 256), Some(1));
        assert_eq!(images_of_a_view(7, 1024, 256), Some(1));
        // A repeated image has a stride of 0.
        assert_eq!(images_of_a_view(7, 0, 256), Some(1));
    }

    #[test]
    fn chunks_off_a_view_cost_their_copies() {
        let largest = |chunk: Range<usize>| {
            // 100 MiB beside z's gradient: ten images as views, eight with copies.
            let bytes = Some((100 + chunk.len()) * MIB);
            let chunks = costs().conv_chunks(&chunk, bytes, Some(2));
            assert_eq!(chunks.first().unwrap().start, chunk.start);
            assert_eq!(chunks.last().unwrap().end, chunk.end);
            chunks.into_iter().map(|chunk| chunk.len()).max().unwrap()
        };
        assert_eq!([largest(0..16), largest(16..32)], [10, 10]);
        assert_eq!([largest(1..17), largest(16..31)], [8, 8]);
    }

    #[test]
    fn chunks_are_views_where_one_fits() {
        let largest = |mib: usize, view| {
            most(16, view, |images, is_view| {
                costs().chunk(images, is_view) <= mib * MIB
            })
        };
        // Ten MiB an image, twelve with copies.
        assert_eq!(largest(100, Some(1)), 10);
        assert_eq!(largest(100, Some(4)), 8);
        assert_eq!(largest(100, Some(16)), 8);
        assert_eq!(largest(100, None), 8);
        assert_eq!(largest(1, None), 1);
    }
}
