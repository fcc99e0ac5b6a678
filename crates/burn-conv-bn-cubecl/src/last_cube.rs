//! Reductions that the last cube of a launch finishes, so that no launch of their own has to.

use std::sync::{Mutex, MutexGuard, PoisonError};

use burn_backend::{DType, StreamId};
use burn_cubecl::CubeDevice;
use burn_cubecl::ops::numeric::zeros;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::features::AtomicUsage;
use cubecl::ir::{ElemType, Type, UIntKind};
use cubecl::zspace::Shape;

use crate::walk::{REDUCTION_CUBES, Walk};

/// Streams whose counters are kept, at most: 2 KiB each.
const STREAMS: usize = 64;

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

/// Whether the last cube of a reduction finishes it: if the device promises that it sees what the other cubes wrote.
pub(crate) fn finishes(walk: &Walk, like: &CubeTensor) -> bool {
    let properties = like.client.properties();
    let counts = || {
        let counter = Type::atomic(ElemType::UInt(UIntKind::U32));
        let uses = properties.atomic_type_usage(counter);
        properties.features.device_memory_scope && uses.contains(AtomicUsage::Add)
    };
    // Twice the units' partial results: of their own positions, and of all cubes'.
    let fits = 2 * walk.shared_bytes <= properties.hardware.max_shared_memory_size;
    let is_counted = walk.channels > 0 && walk.channel_blocks <= REDUCTION_CUBES;
    is_counted && fits && choice().unwrap_or_else(counts)
}

/// Zeros of type u32 for [`fold_of_all`](crate::fold::fold_of_all), which leaves zeros. Launches on one stream of a
/// device run one after the other and share them.
pub(crate) fn arrivals(like: &CubeTensor) -> CubeTensor {
    static COUNTERS: Mutex<Vec<(CubeDevice, StreamId, CubeTensor)>> = Mutex::new(Vec::new());
    let stream = StreamId::current();
    let mut counters = COUNTERS.lock().unwrap_or_else(PoisonError::into_inner);
    let known = counters
        .iter()
        .find(|(device, of, _)| *device == like.device && *of == stream);
    if let Some((.., counter)) = known {
        return counter.clone();
    }
    if counters.len() == STREAMS {
        counters.remove(0);
    }
    let counter = zeros(
        like.device.clone(),
        Shape::from(vec![REDUCTION_CUBES]),
        DType::U32,
    );
    counters.push((like.device.clone(), stream, counter.clone()));
    counter
}
