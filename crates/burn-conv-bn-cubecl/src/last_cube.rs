//! Reductions that the last cube of a launch finishes, so that no launch of their own has to.

use std::sync::{Mutex, MutexGuard, PoisonError};

use burn_backend::StreamId;
use burn_cubecl::CubeDevice;
use burn_cubecl::cubecl;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::features::AtomicUsage;
use cubecl::ir::{ElemType, Type, UIntKind};
use cubecl::prelude::BufferArg;
use cubecl::server::Handle;

use crate::walk::Walk;

/// Streams whose counters are kept, at most.
const STREAMS: usize = 64;
/// Launches that share a buffer of counters.
const LAUNCHES: usize = 64;
/// Counters of a launch, one for each block of channels. No device aligns buffers to more bytes.
const COUNTERS: usize = 128;
const COUNTER_BYTES: usize = COUNTERS * size_of::<u32>();

/// Of all threads: Burn's fusion launches on one of its own.
static CHOICE: Mutex<Option<bool>> = Mutex::new(None);

fn choice() -> MutexGuard<'static, Option<bool>> {
    CHOICE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs launches whose reductions are finished in the last cube or by a second launch, whatever the device promises.
/// For tests, and not nested: on a device that promises nothing the last cube may read what is not there yet.
#[doc(hidden)]
pub fn with_last_cube<R>(finishes: bool, launches: impl FnOnce() -> R) -> R {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    *choice() = Some(finishes);
    let _reset = Reset;
    launches()
}

/// Ends a choice, also where the launches panic.
struct Reset;

impl Drop for Reset {
    fn drop(&mut self) {
        *choice() = None;
    }
}

/// Whether the last cube of a reduction finishes it: if the device promises that it sees what the other cubes wrote, and
/// binds that many tensors to a kernel.
pub(crate) fn finishes(walk: &Walk, like: &CubeTensor, tensors: u32) -> bool {
    let properties = like.client.properties();
    let counts = || {
        let counter = Type::atomic(ElemType::UInt(UIntKind::U32));
        let uses = properties.atomic_type_usage(counter);
        properties.features.device_memory_scope && uses.contains(AtomicUsage::Add)
    };
    // Twice the units' partial results: of their own positions, and of all cubes'.
    let fits = 2 * walk.shared_bytes <= properties.hardware.max_shared_memory_size;
    let is_counted = walk.channels > 0 && walk.channel_blocks <= COUNTERS;
    let is_bound = tensors <= properties.hardware.max_bindings;
    // A graph carries no copy from the host, as zeros are.
    let is_recorded = like.client.is_capturing();
    is_counted && fits && is_bound && !is_recorded && choice().unwrap_or_else(counts)
}

/// Zeros for the launches of a stream, and how many of these are left. CubeCL skips a launch that reads what a failed one
/// should have written: with counters of its own, no launch fails for another.
struct Zeros {
    device: CubeDevice,
    stream: StreamId,
    buffer: Handle,
    left: usize,
}

impl Zeros {
    fn new(like: &CubeTensor, stream: StreamId) -> Self {
        let bytes = [0; LAUNCHES * COUNTER_BYTES];
        Self {
            device: like.device.clone(),
            stream,
            buffer: like.client.create_from_slice(&bytes),
            left: LAUNCHES,
        }
    }
}

/// Zeros of type u32 for a launch with [`fold_of_all`](crate::fold::fold_of_all), and for no other.
pub(crate) fn arrivals(like: &CubeTensor) -> BufferArg {
    // The least recently used first.
    static KEPT: Mutex<Vec<Zeros>> = Mutex::new(Vec::new());
    let stream = StreamId::current();
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    let is_own = |zeros: &Zeros| zeros.device == like.device && zeros.stream == stream;
    let own = kept.iter().position(is_own).map(|place| kept.remove(place));
    let mut zeros = match own {
        Some(zeros) if zeros.left > 0 => zeros,
        _ => Zeros::new(like, stream),
    };
    zeros.left -= 1;
    let start = (zeros.left * COUNTER_BYTES) as u64;
    let end = ((LAUNCHES - zeros.left - 1) * COUNTER_BYTES) as u64;
    let counters = zeros.buffer.clone().offset_start(start).offset_end(end);
    if kept.len() == STREAMS {
        kept.remove(0);
    }
    kept.push(zeros);
    // SAFETY: between the offsets there are that many counters.
    unsafe { BufferArg::from_raw_parts(counters, COUNTERS) }
}
