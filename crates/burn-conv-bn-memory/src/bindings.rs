//! What the kernels of a wgpu device are bound to.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::PathBuf;

use cubecl::future::block_on;
use cubecl::wgpu::WgpuSetup;
use tempfile::TempDir;
use thiserror::Error;

use crate::trace::{Launch, Trace, TraceError};

/// The file of a trace, in the folder that wgpu is given.
const FILE: &str = "trace.ron";

/// What precedes the first action in it, for it is a list of them.
const OPENING: &str = "[\n";

/// Counts the bytes of the buffers that each launch of a kernel is bound to, on a wgpu device that
/// it opens.
///
/// CubeCL tells an observer of its launches the kernel's name and nothing else. What CubeCL asks of wgpu,
/// wgpu can write down: the buffers, and which part of them, that a launch is bound to. The device of
/// this meter does, into a temporary folder, and is to be registered with CubeCL or Burn by its
/// [`setup`](Self::setup).
///
/// A part of a buffer counts once for each launch that is bound to it. So the sum over the launches
/// is what kernels move that read or write all that they are given exactly once. One that writes over
/// what it has read moves more, as does one that reads a value again where no cache holds it; one that
/// leaves a part alone moves less.
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
///
/// [`BindingMeter`] has an example.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BindingError {
    /// No folder for the trace.
    #[error("cannot create a folder for wgpu's trace")]
    Folder(#[source] io::Error),
    /// No device; in wgpu's words.
    #[error("no wgpu device that writes a trace: {0}")]
    Device(String),
    /// The trace is not there, or cannot be read.
    #[error("cannot read wgpu's trace, {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// The trace is in another form than that of wgpu 30.
    #[error("cannot understand wgpu's trace")]
    Trace(#[from] TraceError),
}

impl BindingMeter {
    /// Opens a device of the best adapter that is there, with all that CubeCL makes use of.
    ///
    /// # Errors
    ///
    /// Where there is no adapter, no device, or no folder for temporary files.
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
        // Those of CubeCL's own devices, but for the experimental ones, which WGSL has no use for.
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
        // wgpu opens a device without a trace where it cannot write one.
        meter.launches()?;
        Ok(meter)
    }

    /// The device, to be registered once: by `cubecl::wgpu::init_device`, or with Burn by
    /// `Device::wgpu_options().setup(..)`.
    pub fn setup(&self) -> WgpuSetup {
        self.setup.clone()
    }

    /// The launches that the device was given since the last call, in their order. What is still
    /// queued has not happened: synchronize first.
    ///
    /// # Errors
    ///
    /// Where the trace cannot be read or understood.
    pub fn launches(&mut self) -> Result<Vec<Launch>, BindingError> {
        let text = self.unread()?;
        let (launches, length) = self.trace.follow(&text)?;
        self.position += length as u64;
        Ok(launches)
    }

    /// The trace from where it was last read to.
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
