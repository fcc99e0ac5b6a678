//! The way of a launch's units over activations.
//!
//! All tensors of a launch have the shape `[batch, channels, spatial..]`. A *position* is an index without its
//! channel. Strides are arbitrary: Burn's convolutions return channels-last buffers viewed as channels-first,
//! CUDA pads rows, and slices of a batch have offsets. Position axes adjacent in the memory of every tensor
//! are merged: a dense channels-last tensor has one, a dense channels-first tensor two.

use burn_cubecl::cubecl;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::ops::permute;
use burn_cubecl::tensor::CubeTensor;
use cubecl::client::Client;
use cubecl::ir::AddressType;
use cubecl::prelude::*;
use cubecl::server::CubeCountSelection;
use cubecl::std::FastDivmod;
use cubecl::zspace::Shape;

/// Units of a cube, if the device takes that many.
const UNITS: usize = 256;
/// Neighbouring vectors of channels that a cube reads at once: whole cache lines.
const CHANNEL_LANES: usize = 32;
/// Neighbouring channels that a cube reads at once in many rows of few channels.
const ROW_CHANNELS: usize = 8;
/// Least positions of a unit that are worth another cube's partial result.
const POSITIONS_PER_UNIT: usize = 8;
/// Positions that a unit reads before it computes, at most.
const POSITIONS_AT_ONCE: usize = 4;
/// Vectors of these positions in registers: two positions of a launch over five tensors.
const VECTORS_AT_ONCE: usize = 10;
/// Cubes of a reduction: a few for each multiprocessor of a large GPU, and few partial results.
pub(crate) const REDUCTION_CUBES: usize = 512;
/// Cubes of a launch without partial results: enough to hide the latency of memory.
pub(crate) const MAP_CUBES: usize = 4096;

/// The axis that the components of a vector lie along.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Axis {
    Channels,
    Positions,
}

/// Division of a cube's units: `channels` vectors of channels times `positions`, a power of two. Units with
/// neighbouring channels are neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Lanes {
    pub(crate) axis: Axis,
    pub(crate) channels: usize,
    pub(crate) positions: usize,
    /// Positions that a unit reads before it computes.
    pub(crate) at_once: usize,
}

impl Lanes {
    pub(crate) fn units(self) -> usize {
        self.channels * self.positions
    }

    /// Distance between a unit's successive groups of positions.
    pub(crate) fn stride(self) -> usize {
        self.positions * self.at_once
    }

    pub(crate) fn cube_dim(self) -> CubeDim {
        CubeDim::new_1d(self.units() as u32)
    }
}

/// The extent of a launch.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Grid {
    /// Lengths of the position axes, outermost first. The innermost counts vectors if they lie along it.
    axes: Sequence<FastDivmod<usize>>,
    /// Product of `axes`.
    positions: usize,
    pub(crate) channels: usize,
    /// Positions of one cube.
    chunk: usize,
    /// Cubes with work. A launch over two dimensions may have more.
    cubes: usize,
}

/// Distances in a tensor's buffer, in vectors.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Steps {
    /// Along each position axis of the grid.
    axes: Sequence<usize>,
    /// From one channel (or vector of channels) to the next.
    channel: usize,
}

/// The work of one unit.
#[derive(CubeType)]
pub(crate) struct Unit {
    /// Index of the cube's channels, of as many as there are cubes for a chunk.
    pub(crate) block: usize,
    /// Number of chunks of positions, and the index of the cube's.
    pub(crate) chunks: usize,
    pub(crate) chunk: usize,
    /// Index of the unit's channel, or vector of channels; a unit without one has the last.
    pub(crate) vector: usize,
    /// First channel of the unit's vectors, and how many they have.
    pub(crate) channel: usize,
    #[cube(comptime)]
    pub(crate) width: usize,
    /// The unit's position lane.
    pub(crate) lane: usize,
    /// First position of the unit, and the end of its chunk; the same for a unit without a channel.
    pub(crate) start: usize,
    pub(crate) end: usize,
    /// Whether the unit has a channel.
    pub(crate) has_channel: bool,
}

#[cube]
pub(crate) fn is_idle(grid: &Grid) -> bool {
    CUBE_POS >= grid.cubes
}

#[cube]
pub(crate) fn unit<N: Size>(grid: &Grid, #[comptime] lanes: Lanes) -> Unit {
    let size = N::value();
    let width = comptime!(match lanes.axis {
        Axis::Channels => size,
        Axis::Positions => 1usize,
    });
    let vectors = grid.channels / width;
    let blocks = (vectors + comptime!(lanes.channels - 1)) / lanes.channels;
    let chunk = CUBE_POS / blocks;
    let block = CUBE_POS % blocks;
    let unit = UNIT_POS as usize;
    let lane = unit / lanes.channels;
    let vector = block * lanes.channels + unit % lanes.channels;
    let has_channel = vector < vectors;
    let vector = min(vector, vectors - 1);
    let start = chunk * grid.chunk + lane;
    let limit = min(chunk * grid.chunk + grid.chunk, grid.positions);
    Unit {
        block,
        chunks: grid.cubes / blocks,
        chunk,
        vector,
        channel: vector * width,
        width,
        lane,
        start,
        end: select(has_channel, limit, start),
        has_channel,
    }
}

/// Coordinates of a position along the axes of the grid, innermost first.
#[cube]
fn coordinates(grid: &Grid, position: usize) -> Sequence<usize> {
    let rank = comptime!(grid.axes.len());
    let mut rest = position;
    let mut coordinates = Sequence::<usize>::new();
    #[unroll]
    for i in 0..rank - 1 {
        let (quotient, remainder) = grid.axes.index(comptime!(rank - i - 1)).div_mod(rest);
        coordinates.push(remainder);
        rest = quotient;
    }
    coordinates.push(rest);
    coordinates
}

/// One of the positions that a unit reads before it computes.
#[derive(CubeType)]
pub(crate) struct Position {
    pub(crate) at: Sequence<usize>,
    /// Whether it is below the unit's end.
    pub(crate) is_there: bool,
}

/// Positions of a unit from `first` on, for several loads in one wait. Those behind the unit's end are read at `first`,
/// which no other unit writes.
#[cube]
pub(crate) fn positions_at_once(
    grid: &Grid,
    unit: &Unit,
    first: usize,
    #[comptime] lanes: Lanes,
) -> Sequence<Position> {
    let mut positions = Sequence::<Position>::new();
    #[unroll]
    for i in 0..lanes.at_once {
        let position = first + comptime!(i * lanes.positions);
        let is_there = position < unit.end;
        positions.push(Position {
            at: coordinates(grid, select(is_there, position, first)),
            is_there,
        });
    }
    positions
}

/// Index of a unit's vector at some [`coordinates`] in the buffer of a tensor with these steps.
#[cube]
pub(crate) fn index(steps: &Steps, coordinates: &Sequence<usize>, unit: &Unit) -> usize {
    let rank = comptime!(coordinates.len());
    let mut index = unit.vector * steps.channel;
    #[unroll]
    for i in 0..rank {
        index += *coordinates.index(comptime!(rank - i - 1)) * *steps.axes.index(i);
    }
    index
}

/// A vector for the same channels in another number of components: all components along positions are one channel's.
#[cube]
pub(crate) fn resized<T: Float, A: Size, B: Size>(
    vector: Vector<T, A>,
    #[comptime] lanes: Lanes,
) -> Vector<T, B> {
    match comptime!(lanes.axis) {
        Axis::Positions => Vector::new(vector.extract(0usize)),
        Axis::Channels => Vector::cast_from(vector),
    }
}

/// The values of one row of `[rows, channels]` for the components of a unit's vectors. Vectors of the table are of
/// [`Walk::table_vector_size`].
#[cube]
pub(crate) fn row<T: Float, N: Size, V: Size>(
    table: &Tensor<Vector<T, V>>,
    grid: &Grid,
    unit: &Unit,
    #[comptime] row: usize,
    #[comptime] lanes: Lanes,
) -> Vector<T, N> {
    resized(
        table[row * (grid.channels / unit.width) + unit.vector],
        lanes,
    )
}

/// The host's side of a launch over some tensors.
pub(crate) struct Walk {
    /// The tensors' axes that make up each position axis, outermost first.
    groups: Vec<Vec<usize>>,
    /// Lengths of the position axes, the innermost in vectors.
    lengths: Vec<usize>,
    pub(crate) lanes: Lanes,
    pub(crate) vector_size: usize,
    pub(crate) channels: usize,
    /// Chunks that the positions are cut into, at least one.
    pub(crate) chunks: usize,
    chunk: usize,
    pub(crate) channel_blocks: usize,
    /// Shared memory that a fold across a cube takes.
    pub(crate) shared_bytes: usize,
    address: AddressType,
}

impl Walk {
    /// A walk of at most `cubes` cubes, or one per block of channels, over tensors of one shape. The first one's
    /// layout decides the order.
    pub(crate) fn new(tensors: &[&CubeTensor], accumulator_size: usize, cubes: usize) -> Self {
        let groups = merged_positions(tensors);
        let axis = axis_of(tensors[0]);
        let vector_size = vector_size(tensors, &groups, axis);
        let reads = tensors.len();
        Self::over(
            tensors,
            groups,
            (axis, vector_size),
            reads,
            accumulator_size,
            cubes,
        )
    }

    /// As [`new`](Self::new) over `[batch, channels, height, width]`, with one axis each for images, rows and
    /// columns, and vectors along channels alone. Tensors after the first may have other heights and widths:
    /// units then index them by positions of their own, up to `windows` for each of the launch.
    pub(crate) fn over_pixels(
        tensors: &[&CubeTensor],
        windows: usize,
        accumulator_size: usize,
        cubes: usize,
    ) -> Self {
        let groups = vec![vec![0], vec![2], vec![3]];
        let axis = axis_of(tensors[0]);
        let vector_size = match axis {
            Axis::Channels => vector_size(tensors, &groups, axis),
            Axis::Positions => 1,
        };
        // Of each window a gradient and an argmax.
        let reads = tensors.len() + 2 * windows - 1;
        Self::over(
            tensors,
            groups,
            (axis, vector_size),
            reads,
            accumulator_size,
            cubes,
        )
    }

    /// A walk over the first tensor, with those position axes, vectors and reads of a position.
    fn over(
        tensors: &[&CubeTensor],
        groups: Vec<Vec<usize>>,
        (axis, vector_size): (Axis, usize),
        reads: usize,
        accumulator_size: usize,
        cubes: usize,
    ) -> Self {
        let first = tensors[0];
        let hardware = &first.client.properties().hardware;
        let channels = first.meta.shape()[1];
        let mut lengths = group_lengths(first, &groups);
        let mut vectors = channels;
        match axis {
            Axis::Channels => vectors /= vector_size,
            Axis::Positions => {
                if let Some(innermost) = lengths.last_mut() {
                    *innermost /= vector_size;
                }
            }
        }
        let positions: usize = lengths.iter().product();

        // Each unit has three vectors in shared memory.
        let unit_bytes = 3 * vector_size * accumulator_size;
        let units = UNITS
            .min(hardware.max_units_per_cube as usize)
            .min(hardware.max_shared_memory_size / unit_bytes)
            .max(1);
        let channel_lanes = match axis {
            Axis::Channels => vectors.clamp(1, CHANNEL_LANES.min(units)),
            Axis::Positions => 1,
        };
        let position_lanes = floor_power_of_two(units / channel_lanes)
            .min(positions.next_power_of_two())
            .max(1);

        let channel_blocks = vectors.div_ceil(channel_lanes);
        let chunks = positions
            .div_ceil(position_lanes * POSITIONS_PER_UNIT)
            .clamp(1, (cubes / channel_blocks.max(1)).max(1));
        let chunk = positions.div_ceil(chunks).max(1);
        Self {
            groups,
            lengths,
            lanes: Lanes {
                axis,
                channels: channel_lanes,
                positions: position_lanes,
                at_once: (VECTORS_AT_ONCE / reads).clamp(1, POSITIONS_AT_ONCE),
            },
            vector_size,
            channels,
            chunks: positions.div_ceil(chunk).max(1),
            chunk,
            channel_blocks,
            shared_bytes: channel_lanes * position_lanes * unit_bytes,
            address: tensors
                .iter()
                .map(|tensor| tensor.required_address_type())
                .max()
                .unwrap_or_default(),
        }
    }

    /// The walk with indices for a tensor of that many elements, too.
    pub(crate) fn reaching(self, elements: usize) -> Self {
        let address = self.address.max(AddressType::from_len(elements));
        Self { address, ..self }
    }

    /// A walk over partial results, `[planes, rows, channels]`, in one chunk.
    pub(crate) fn over_rows(table: &CubeTensor) -> Self {
        let (shape, strides) = (table.meta.shape(), table.meta.strides());
        let (rows, channels) = (shape[1], shape[2]);
        let vector_size = table
            .client
            .io_optimized_vector_sizes(table.dtype.size())
            .filter(|size| {
                [channels, strides[0], strides[1]]
                    .iter()
                    .all(|n| n.is_multiple_of(*size))
            })
            .max()
            .unwrap_or(1);
        let units = table.client.properties().hardware.max_units_per_cube as usize;
        let vectors = channels / vector_size;
        let channel_lanes = vectors.clamp(1, (ROW_CHANNELS / vector_size).clamp(1, units));
        let position_lanes = floor_power_of_two(UNITS.min(units) / channel_lanes);
        Self {
            groups: Vec::new(),
            lengths: vec![rows],
            lanes: Lanes {
                axis: Axis::Channels,
                channels: channel_lanes,
                positions: position_lanes.min(rows.next_power_of_two()),
                at_once: 1,
            },
            vector_size,
            channels,
            chunks: 1,
            chunk: rows,
            channel_blocks: vectors.div_ceil(channel_lanes),
            shared_bytes: 0,
            address: table.required_address_type(),
        }
    }

    /// Whether the tensors have no elements.
    pub(crate) fn is_empty(&self) -> bool {
        self.channels == 0 || self.lengths.contains(&0)
    }

    pub(crate) fn cube_count(&self, client: &Client) -> CubeCount {
        CubeCountSelection::new(client, self.cubes() as u32).cube_count()
    }

    pub(crate) fn address_type(&self) -> AddressType {
        self.address
    }

    /// Components of a vector of a table that has values for each channel.
    pub(crate) fn table_vector_size(&self) -> usize {
        match self.lanes.axis {
            Axis::Channels => self.vector_size,
            Axis::Positions => 1,
        }
    }

    pub(crate) fn grid(&self) -> GridLaunch {
        GridLaunch::new(
            self.lengths.iter().copied().collect(),
            self.lengths.iter().product::<usize>(),
            self.channels,
            self.chunk,
            self.cubes(),
        )
    }

    fn cubes(&self) -> usize {
        self.channel_blocks * self.chunks
    }

    /// The steps of a tensor of this walk; without a tensor, zeros.
    pub(crate) fn steps(&self, tensor: Option<&CubeTensor>) -> StepsLaunch {
        let stride = |axis: usize| tensor.map_or(0, |tensor| tensor.meta.strides()[axis]);
        let mut axes: Vec<usize> = self
            .groups
            .iter()
            .map(|group| stride(group[group.len() - 1]) / self.vector_size)
            .collect();
        let mut channel = stride(1);
        // A vector is one step along the axis that its components lie along.
        match (self.lanes.axis, axes.last_mut()) {
            (Axis::Positions, Some(innermost)) if self.vector_size > 1 => {
                *innermost = 1;
                channel /= self.vector_size;
            }
            _ => {}
        }
        StepsLaunch::new(axes.into_iter().collect(), channel)
    }
}

/// The position axes, merged where they are adjacent in the memory of every tensor. Axes of one element are left
/// out, unless there are no others.
fn merged_positions(tensors: &[&CubeTensor]) -> Vec<Vec<usize>> {
    let shape = tensors[0].meta.shape();
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for axis in (0..shape.num_dims()).filter(|&axis| axis != 1 && shape[axis] != 1) {
        let follows = |group: &Vec<usize>| {
            let outer = *group.last().expect("a group has axes");
            tensors.iter().all(|tensor| {
                let strides = tensor.meta.strides();
                strides[outer] == shape[axis] * strides[axis]
            })
        };
        match groups.last_mut() {
            Some(group) if follows(group) => group.push(axis),
            _ => groups.push(vec![axis]),
        }
    }
    if groups.is_empty() {
        groups.push(vec![0]);
    }
    groups
}

/// The axis that a tensor's vectors lie along.
fn axis_of(tensor: &CubeTensor) -> Axis {
    if tensor.meta.strides()[1] == 1 && tensor.meta.shape()[1] > 1 {
        Axis::Channels
    } else {
        Axis::Positions
    }
}

/// Length of each position axis, in elements.
fn group_lengths(tensor: &CubeTensor, groups: &[Vec<usize>]) -> Vec<usize> {
    let shape = tensor.meta.shape();
    let length = |group: &Vec<usize>| group.iter().map(|&axis| shape[axis]).product();
    groups.iter().map(length).collect()
}

/// Components of a vector: a divisor of its axis and of all other strides.
fn vector_size(tensors: &[&CubeTensor], groups: &[Vec<usize>], axis: Axis) -> usize {
    let first = tensors[0];
    let length = match axis {
        Axis::Channels => first.meta.shape()[1],
        Axis::Positions => group_lengths(first, groups).last().copied().unwrap_or(1),
    };
    let fits = |size: usize| {
        length.is_multiple_of(size)
            && tensors.iter().all(|tensor| {
                let strides = tensor.meta.strides();
                let mut steps: Vec<usize> = groups
                    .iter()
                    .filter_map(|group| group.last().map(|&axis| strides[axis]))
                    .collect();
                let along = match axis {
                    Axis::Channels => strides[1],
                    Axis::Positions => {
                        let along = steps.pop().unwrap_or(1);
                        steps.push(strides[1]);
                        along
                    }
                };
                along == 1 && steps.iter().all(|step| step.is_multiple_of(size))
            })
    };
    first
        .client
        .io_optimized_vector_sizes(first.dtype.size())
        .filter(|&size| size == 1 || fits(size))
        .max()
        .unwrap_or(1)
}

fn floor_power_of_two(value: usize) -> usize {
    if value == 0 { 0 } else { 1 << value.ilog2() }
}

/// Tensor of the same shape, dtype and order of axes in memory, without values.
pub(crate) fn empty_like(tensor: &CubeTensor) -> CubeTensor {
    let (shape, strides) = (tensor.meta.shape(), tensor.meta.strides());
    let mut order: Vec<usize> = (0..shape.num_dims()).collect();
    order.sort_by_key(|&axis| core::cmp::Reverse(strides[axis]));
    let mut inverse = vec![0; order.len()];
    for (position, &axis) in order.iter().enumerate() {
        inverse[axis] = position;
    }
    let sizes: Vec<usize> = order.iter().map(|&axis| shape[axis]).collect();
    let empty = empty_device_contiguous_dtype(
        tensor.client.clone(),
        tensor.device.clone(),
        Shape::from(sizes),
        tensor.dtype,
    );
    permute(empty, &inverse)
}

/// Whether gaps, as the padding of a pitched allocation's rows, are more than a tenth of the elements.
pub(crate) fn is_sparse(tensor: &CubeTensor) -> bool {
    let (shape, strides) = (tensor.meta.shape(), tensor.meta.strides());
    let reach = shape.iter().zip(strides.iter());
    let span = 1 + reach
        .map(|(size, stride)| size.saturating_sub(1) * stride)
        .sum::<usize>();
    10 * span > 11 * tensor.meta.num_elements()
}

/// Whether this is the buffer's only handle, and no two elements share memory.
pub(crate) fn is_writable(tensor: &CubeTensor) -> bool {
    tensor.can_mut() && tensor.is_nonoverlapping()
}

/// The tensor that a launch writes: `input` itself if `in_place`, otherwise a new one of its layout.
pub(crate) fn written_over(input: &CubeTensor, in_place: bool) -> CubeTensor {
    if in_place {
        input.clone()
    } else {
        empty_like(input)
    }
}

/// The argument for a written tensor, as an alias of the launch's tensor at that position or on its own.
pub(crate) fn written_arg(tensor: &CubeTensor, alias: Option<usize>) -> TensorArg {
    match alias {
        Some(position) => tensor.as_tensor_alias(position),
        None => tensor.clone().into_tensor_arg(),
    }
}

/// The argument for an optional tensor.
pub(crate) fn tensor_arg(tensor: Option<&CubeTensor>) -> Option<TensorArg> {
    tensor.map(|tensor| tensor.clone().into_tensor_arg())
}
