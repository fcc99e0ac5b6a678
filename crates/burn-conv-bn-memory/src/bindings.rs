//! Buffers that kernels of a wgpu device are bound to.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::PathBuf;

use cubecl::future::block_on;
use cubecl::wgpu::WgpuSetup;
use tempfile::TempDir;
use thiserror::Error;

use crate::trace::{Launch, Trace, TraceError};

/// Name of a trace's file, in the folder given to wgpu.
const FILE: &str = "trace.ron";

/// What precedes the first action: a trace is a list.
const OPENING: &str = "[\n";

/// Counts the bytes of the buffers that each kernel launch is bound to, on a wgpu device that it opens.
///
/// CubeCL's observers of launches get a kernel's name alone. wgpu can trace its calls, with the parts of
/// buffers that each launch is bound to: this meter's device does, to a temporary folder. Register it with
/// CubeCL or Burn by its [`setup`](Self::setup).
///
/// A part of a buffer counts once for each launch that is bound to it. The sum over launches is the memory
/// traffic of kernels that read or write each of their values once. A kernel that overwrites its input, or
/// reads a value again without a cache, moves more; one that skips a part of a buffer moves less.
///
/// ```no_run
/// use burn_conv_bn_memory::{BindingError, BindingMeter};
/// use cubecl::client::Client;
/// use cubecl::wgpu::{RuntimeOptions, init_device};
///
/// /// The bytes that the launches of a step are bound to. The step must wait until the device is done.
/// fn measure(step: impl FnOnce(Client)) -> Result<u64, BindingError> {
///     let mut meter = BindingMeter::new()?;
///     let device = init_device(meter.setup(), RuntimeOptions::default());
///     step(cubecl::Device::from(device).client());
///     Ok(meter.launches()?.iter().map(|launch| launch.bytes).sum())
/// }
/// ```
#[derive(Debug)]
pub struct BindingMeter {
    /// Removed with the meter.
    folder: TempDir,
    setup: WgpuSetup,
    /// Bytes of the trace that have been read.
    position: u64,
    trace: Trace,
}

/// Why launches cannot be counted.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BindingError {
    /// No folder for the trace.
    #[error("cannot create a folder for wgpu's trace")]
    Folder(#[source] io::Error),
    /// No device; in wgpu's words.
    #[error("no wgpu device that writes a trace: {0}")]
    Device(String),
    /// The trace is absent or cannot be read.
    #[error("cannot read wgpu's trace, {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The trace is not in wgpu 30's form.
    #[error("cannot understand wgpu's trace, expected that of wgpu 30")]
    Trace(#[from] TraceError),
}

impl BindingMeter {
    /// Opens the best adapter's device, with all features that CubeCL uses.
    ///
    /// # Errors
    ///
    /// If there is no adapter, no device, or no folder for temporary files.
    pub fn new() -> Result<Self, BindingError> {
        let folder = TempDir::new().map_err(BindingError::Folder)?;
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
            backends: wgpu::Backends::PRIMARY,
            ..wgpu::InstanceDescriptor::new_without_display_handle()
        });
        let adapter = block_on(instance.request_adapter(&wgpu::RequestAdapterOptions {
            power_preference: wgpu::PowerPreference::HighPerformance,
            ..wgpu::RequestAdapterOptions::default()
        }))
        .map_err(|error| BindingError::Device(error.to_string()))?;
        // As CubeCL's own devices, without the experimental features, which WGSL does not use.
        let left_out =
            wgpu::Features::MAPPABLE_PRIMARY_BUFFERS | wgpu::Features::all_experimental_mask();
        let (device, queue) = block_on(adapter.request_device(&wgpu::DeviceDescriptor {
            required_features: adapter.features().difference(left_out),
            required_limits: adapter.limits(),
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            trace: wgpu::Trace::Directory(folder.path().to_path_buf()),
            ..wgpu::DeviceDescriptor::default()
        }))
        .map_err(|error| BindingError::Device(error.to_string()))?;
        let mut meter = Self {
            folder,
            setup: WgpuSetup {
                backend: adapter.get_info().backend,
                instance,
                adapter,
                device,
                queue,
            },
            position: OPENING.len() as u64,
            trace: Trace::default(),
        };
        // Where wgpu cannot write a trace, it opens a device without one.
        meter.launches()?;
        Ok(meter)
    }

    /// The device. Register it once: by `cubecl::wgpu::init_device`, or with Burn by
    /// `Device::wgpu_options().setup(..)`.
    pub fn setup(&self) -> WgpuSetup {
        self.setup.clone()
    }

    /// Launches since the last call, in order. Queued work does not count: synchronize first.
    ///
    /// # Errors
    ///
    /// [`BindingError::Read`] and [`BindingError::Trace`].
    pub fn launches(&mut self) -> Result<Vec<Launch>, BindingError> {
        let text = self.unread()?;
        let (launches, length) = self.trace.follow(&text)?;
        self.position += length as u64;
        Ok(launches)
    }

    /// The part of the trace that has not been read.
    fn unread(&self) -> Result<String, BindingError> {
        let path = self.folder.path().join(FILE);
        let text = File::open(&path).and_then(|mut file| {
            file.seek(SeekFrom::Start(self.position))?;
            let mut text = String::new();
            file.read_to_string(&mut text)?;
            Ok(text)
        });
        text.map_err(|source| BindingError::Read { path, source })
    }
}
