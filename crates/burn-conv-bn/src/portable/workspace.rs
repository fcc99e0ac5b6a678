//! How the backward pass cuts a batch, so that what it holds beyond saved tensors and results is bounded.

use core::ops::Range;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::Shape;

use super::sweeps::Sweeps;
use crate::backend::tensors::ConvBnBackwardOptions;

/// Bound on the memory of convolution gradients without `max_workspace`, unless input and gradient are larger.
const DEFAULT_BOUND: usize = 64 << 20;

/// Bytes that the backward pass takes for one image.
#[derive(Clone, Copy, Debug)]
pub(super) struct Costs {
    /// z and what the sweeps make of it.
    sweeps: usize,
    /// Gradient of z.
    output: usize,
    /// Input, or its gradient.
    input: usize,
    /// What a convolution's gradient allocates: im2col columns, or both operands in another layout.
    scratch: usize,
}

impl Costs {
    pub(super) fn new<B: Backend, S: Sweeps<B>>(
        options: &ConvBnBackwardOptions,
        output_shape: &Shape,
        output_grad: &FloatTensor<B>,
    ) -> Self {
        let spec = &options.options.conv;
        let dtype = output_grad.dtype();
        let image = |shape: &Shape| shape.iter().skip(1).product::<usize>();
        let output = image(output_shape) * dtype.size();
        let input = image(&options.input_shape) * dtype.size();
        let kernel = options.weight_shape.iter().skip(2);
        let taps: usize = kernel.product();
        let has_stride = spec.stride.iter().any(|&stride| stride != 1);
        let is_padded = spec.padding.iter().any(|&padding| padding != (0, 0));
        let is_pointwise = taps == 1 && !has_stride && !is_padded;
        let columns = if spec.groups != 1 || is_pointwise {
            0
        } else {
            let channels = options.input_shape[1];
            let positions: usize = output_shape.iter().skip(2).product();
            // With a stride the values of one tap are gathered first.
            let gathered = if has_stride { channels } else { 0 };
            let bytes = |length| S::row_bytes(output_grad, length);
            positions * (bytes(taps * channels) + bytes(gathered))
        };
        Self {
            sweeps: S::workspace(image(output_shape), dtype),
            output,
            input,
            scratch: columns.max(input + output),
        }
    }

    /// Bytes for an image of a chunk of convolution gradients: with the chunk's own gradient of the input,
    /// and unless the chunk is a view, its copies.
    fn chunk(&self, is_view: bool) -> usize {
        let copies = if is_view { 0 } else { self.input + self.output };
        self.scratch + self.input + copies
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
        let convolution = self.chunk(false).min(batch * self.scratch);
        if batch * self.sweeps <= bytes && batch * self.output + convolution <= bytes {
            return chunks(0..batch, batch);
        }
        let per_image = |is_view| self.sweeps.max(self.output + self.chunk(is_view));
        chunks(0..batch, most(bytes, per_image, view))
    }

    /// Chunks of `chunk` for the convolution's gradients, once z's gradient of `chunk` exists. Without
    /// `max_workspace` they are bounded where they may allocate columns.
    pub(super) fn conv_chunks(
        &self,
        chunk: &Range<usize>,
        batch: usize,
        max_workspace: Option<usize>,
        may_allocate_columns: bool,
        view: Option<usize>,
    ) -> Vec<Range<usize>> {
        let bytes = match max_workspace {
            Some(bytes) => bytes.saturating_sub(chunk.len() * self.output),
            None if may_allocate_columns => DEFAULT_BOUND.max(batch * (self.input + self.output)),
            None => usize::MAX,
        };
        if chunk.len() * self.scratch <= bytes {
            return vec![chunk.clone()];
        }
        // Slices of the whole batch begin and end with the chunk.
        let view =
            view.filter(|&view| chunk.start.is_multiple_of(view) && chunk.end.is_multiple_of(view));
        chunks(
            chunk.clone(),
            most(bytes, |is_view| self.chunk(is_view), view),
        )
    }
}

/// The number of images whose multiples are views of a batch with that many bytes from one image to the next. A view
/// begins and ends at offsets of that alignment, a power of two, and what its end is counted from is the batch's.
#[cfg(any(feature = "cubecl", test))]
pub(crate) fn images_of_a_view(batch: usize, stride: usize, alignment: usize) -> Option<usize> {
    // Both are powers of two.
    let images = alignment / alignment.min(1usize << stride.trailing_zeros().min(31));
    batch.is_multiple_of(images).then_some(images)
}

/// Most images that fit: a multiple of `view`, unless not even that fits, and at least one.
fn most(bytes: usize, per_image: impl Fn(bool) -> usize, view: Option<usize>) -> usize {
    let views = view.map_or(0, |view| bytes / per_image(true).max(1) / view * view);
    if views > 0 {
        views
    } else {
        (bytes / per_image(false).max(1)).max(1)
    }
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

    const MIB: usize = 1 << 20;

    /// Of an image whose gradients take ten times its size.
    fn costs() -> Costs {
        Costs {
            sweeps: MIB,
            output: MIB,
            input: MIB,
            scratch: 9 * MIB,
        }
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
    fn columns_are_bounded_without_max_workspace() {
        let largest = |batch, may_allocate_columns| {
            let chunks =
                costs().conv_chunks(&(0..batch), batch, None, may_allocate_columns, Some(1));
            assert_eq!(chunks.last().unwrap().end, batch);
            chunks.into_iter().map(|chunk| chunk.len()).max().unwrap()
        };
        // All of seven images in 63 MiB; then ten MiB an image in 64, and in input and gradient.
        assert_eq!(largest(7, true), 7);
        assert_eq!(largest(16, true), 6);
        assert_eq!(largest(100, true), 20);
        assert_eq!(largest(100, false), 100);
    }

    #[test]
    fn max_workspace_takes_the_place_of_the_default() {
        let largest = |mib: usize| {
            let chunks = costs().conv_chunks(&(0..16), 16, Some(mib * MIB), true, Some(1));
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
            let chunks = costs().conv_chunks(&chunk, 64, bytes, true, Some(2));
            assert_eq!(chunks.first().unwrap().start, chunk.start);
            assert_eq!(chunks.last().unwrap().end, chunk.end);
            chunks.into_iter().map(|chunk| chunk.len()).max().unwrap()
        };
        assert_eq!([largest(0..16), largest(16..32)], [10, 10]);
        assert_eq!([largest(1..17), largest(16..31)], [8, 8]);
    }

    #[test]
    fn chunks_are_views_where_one_fits() {
        let largest = |mib: usize, view| most(mib * MIB, |is_view| costs().chunk(is_view), view);
        // Ten MiB an image, twelve with copies.
        assert_eq!(largest(100, Some(1)), 10);
        assert_eq!(largest(100, Some(4)), 8);
        assert_eq!(largest(100, Some(16)), 8);
        assert_eq!(largest(100, None), 8);
        assert_eq!(largest(1, None), 1);
    }
}
