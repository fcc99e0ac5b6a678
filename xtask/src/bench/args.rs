//! The options of `cargo xtask bench`.

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;

use anyhow::{Result, bail};
use burn_conv_bn_bench::catalogue::{Entry, Work, catalogue, more};
use burn_conv_bn_bench::device::{CUDA, DEVICES, FLEX};
use burn_conv_bn_bench::precision::Precision;
use burn_conv_bn_bench::protocol::{Contender, Engine};
use clap::{Args, ValueEnum};

/// Largest values of the options, for runs that begin and end: a rayon pool of 100,000 threads takes minutes
/// to start.
const MOST_ROUNDS: usize = 1000;
pub const MOST_IMAGES: usize = 1 << 16;
const MOST_THREADS: usize = 1024;

#[derive(Args, Debug)]
pub struct Bench {
    /// Device, by the name of Burn's feature; PyTorch computes on the same kind.
    #[arg(long, value_name = "DEVICE", default_value = FLEX, value_parser = DEVICES)]
    pub device: String,
    /// Precision: f16 and bf16 are mixed, with Burn's norms and linear layers in f32 and PyTorch's under
    /// its autocast; tf32 is for CUDA.
    #[arg(long, value_enum, value_name = "PRECISION", default_value_t = Precision::F32)]
    pub precision: Precision,
    /// Smaller batches and images: without a peer five minutes at most on two cores; ratios mean less.
    #[arg(long)]
    pub quick: bool,
    /// Images of each entry, instead of the catalogue's, which are for CPUs.
    #[arg(long, value_name = "N", value_parser = up_to::<MOST_IMAGES>)]
    pub batch: Option<NonZeroUsize>,
    /// Run this entry alone, also one of --more; may be given several times.
    #[arg(long, value_name = "ID", value_parser = id)]
    pub only: Vec<String>,
    /// Run the further entries instead: one image, dilation, 5x5, groups, volumes, small images of many
    /// channels, ResNet-18 for 32x32 pixels, and YOLOX-nano's backbone.
    #[arg(long, conflicts_with = "only")]
    pub more: bool,
    /// Run the layers alone.
    #[arg(long)]
    pub layers: bool,
    /// Run the networks alone.
    #[arg(long)]
    pub networks: bool,
    /// Find the largest batch of each network that trains within so many bytes, as 4GiB, by running:
    /// bytes of the resident set, or of a device's pool, with parameters and optimizer state.
    #[arg(long, value_name = "BYTES", value_parser = bytes, conflicts_with_all = [
        "layers", "batch", "rounds", "no_memory", "profile", "plot",
    ])]
    pub largest_batch: Option<NonZeroU64>,
    /// Timed steps of each contender [default: 3 to 7, as many as fit two minutes, or 8 s with
    /// --quick].
    #[arg(long, value_name = "N", value_parser = up_to::<MOST_ROUNDS>)]
    pub rounds: Option<NonZeroUsize>,
    /// Threads of each contender [default: as many as the machine runs at once].
    #[arg(long, value_name = "N", value_parser = up_to::<MOST_THREADS>)]
    pub threads: Option<NonZeroUsize>,
    /// Another framework to compare with. An error if it is not there.
    #[arg(long, value_enum, value_name = "PEER")]
    pub peer: Option<Peer>,
    /// The python that has torch [default: $PYTHON, else python3].
    #[arg(long, value_name = "PATH")]
    pub python: Option<PathBuf>,
    /// Use this worker instead of building one. It must have been built for the device.
    #[arg(long, value_name = "FILE")]
    pub worker: Option<PathBuf>,
    /// Use this program for PyTorch instead of the repository's.
    #[arg(long, value_name = "FILE", hide = true)]
    pub peer_script: Option<PathBuf>,
    /// Write everything that was measured to this file.
    #[arg(long, value_name = "PATH")]
    pub json: Option<PathBuf>,
    /// Write the figures to this file, a line for each contender of each entry.
    #[arg(long, value_name = "PATH")]
    pub csv: Option<PathBuf>,
    /// Draw the ratios of times and peaks to this SVG file.
    #[arg(long, value_name = "PATH")]
    pub plot: Option<PathBuf>,
    /// Do not measure memory.
    #[arg(long)]
    pub no_memory: bool,
    /// Time the kernels of one more step of each contender, on a device that has kernels.
    #[arg(long)]
    pub profile: bool,
    /// Run this contender alone, and Burn's unfused layers, which all are compared with; may be
    /// given several times.
    #[arg(long, value_enum, value_name = "NAME")]
    pub contender: Vec<Contender>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Peer {
    /// PyTorch, on the CPU or on CUDA.
    Pytorch,
}

/// A whole number from 1 to `MOST`.
fn up_to<const MOST: usize>(text: &str) -> Result<NonZeroUsize, String> {
    let number = text.parse().ok();
    number
        .filter(|number: &NonZeroUsize| number.get() <= MOST)
        .ok_or_else(|| format!("expected a whole number from 1 to {MOST}"))
}

/// A number of bytes, in units of 1024, its square or cube, or in bytes.
fn bytes(text: &str) -> Result<NonZeroU64, String> {
    let units = [("KiB", 1u64 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)];
    let mut units = units.into_iter();
    let with_unit = units.find_map(|(name, unit)| Some((text.strip_suffix(name)?, unit)));
    let (number, unit) = with_unit.unwrap_or((text, 1));
    let number = number.trim_end().parse::<f64>().ok();
    let bytes = number.filter(|number| number.is_finite());
    let bytes = bytes.and_then(|number| NonZeroU64::new((number * unit as f64) as u64));
    bytes.ok_or_else(|| "expected a number of bytes, such as 4GiB, 1.5GiB or 512MiB".to_string())
}

/// The id of an entry.
fn id(text: &str) -> Result<String, String> {
    let all = [catalogue(true), more(true)].concat();
    let ids: Vec<String> = all.into_iter().map(|entry| entry.id).collect();
    let found = ids.iter().any(|id| id == text).then(|| text.to_string());
    found.ok_or_else(|| format!("there is no such entry; there are {}", ids.join(", ")))
}

impl Bench {
    /// Checks options that exclude each other.
    pub fn check(&self) -> Result<()> {
        if self.entries().is_empty() {
            bail!(
                "no entry is both in --only and of the kind that was asked for; --largest-batch \
                 trains networks"
            );
        }
        if self.precision == Precision::Tf32 && self.device != CUDA {
            bail!(
                "{} is computed by NVIDIA's tensor cores: with --device {CUDA}, not {}",
                self.precision,
                self.device
            );
        }
        if self.profile && self.device == FLEX {
            bail!("--profile times the kernels of a device, and {FLEX} launches none");
        }
        let mut named = self.contender.iter();
        if let (None, Some(name)) = (self.peer, named.find(|c| c.engine() == Engine::PyTorch)) {
            bail!("{name} is PyTorch's, which --peer pytorch adds");
        }
        if self.peer.is_some() && self.contenders(Engine::PyTorch).is_empty() {
            bail!("--peer pytorch adds nothing: no --contender is PyTorch's");
        }
        Ok(())
    }

    /// The selected entries, in the catalogue's order.
    pub fn entries(&self) -> Vec<Entry> {
        let mut entries = match (self.only.is_empty(), self.more) {
            (true, false) => catalogue(self.quick),
            (true, true) => more(self.quick),
            (false, _) => [catalogue(self.quick), more(self.quick)].concat(),
        };
        entries.retain(|entry| {
            let is_layer = matches!(entry.work, Work::Layer(_));
            let networks = self.networks || self.largest_batch.is_some();
            let kind = self.layers == networks || self.layers == is_layer;
            kind && (self.only.is_empty() || self.only.contains(&entry.id))
        });
        if let Some(batch) = self.batch {
            for entry in &mut entries {
                entry.work = entry.work.clone().with_batch(batch.get());
            }
        }
        entries
    }

    /// The contenders that an engine runs.
    pub fn contenders(&self, engine: Engine) -> Vec<Contender> {
        let wanted = |contender: &Contender| {
            let named = self.contender.is_empty() || self.contender.contains(contender);
            named || *contender == Contender::Unfused
        };
        Contender::of(engine).filter(wanted).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::testing::parse;

    #[test]
    fn devices_precisions_and_entries_are_checked_by_name() {
        let default = parse(&[]).unwrap();
        assert_eq!(
            (default.device.as_str(), default.precision),
            (FLEX, Precision::F32)
        );
        for device in DEVICES {
            assert_eq!(parse(&["--device", device]).unwrap().device, device);
        }
        let bf16 = parse(&["--precision", "bf16"]).unwrap();
        assert_eq!(bf16.precision, Precision::Bf16);
        for (option, wanted) in [
            ("--device", "vulkan"),
            ("--precision", "bf16"),
            ("--only", "k7-s2"),
        ] {
            let error = parse(&[option, "abacus"]).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn what_makes_no_sense_together_is_refused() {
        for (options, wanted) in [
            (&["--precision", "tf32"][..], "cuda, not flex"),
            (&["--contender", "eager"], "--peer pytorch"),
            (
                &["--peer", "pytorch", "--contender", "fused"],
                "--contender",
            ),
            (&["--profile", "--quick"], "--profile"),
            (&["--only", "k3", "--networks"], "--only"),
            (&["--only", "k3", "--largest-batch", "1GiB"], "networks"),
        ] {
            let error = parse(options).unwrap().check().unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
        parse(&["--precision", "bf16"]).unwrap().check().unwrap();
    }

    #[test]
    fn entries_are_selected_by_id_and_by_kind() {
        let ids = |options: &[&str]| -> Vec<String> {
            let entries = parse(options).unwrap().entries().into_iter();
            entries.map(|entry| entry.id).collect()
        };
        let all = ids(&[]);
        let [layers, networks] = ["--layers", "--networks"].map(|kind| ids(&[kind]));
        assert_eq!([layers, networks.clone()].concat(), all);
        assert_eq!(networks[..3], ["net-256", "net-2048", "resnet18"]);
        assert_eq!(ids(&["--layers", "--networks"]), all);
        assert_eq!(ids(&["--largest-batch", "1GiB"]), networks);
        let named = ["--only", "net-256", "--only", "dw"];
        assert_eq!(ids(&named), ["dw", "net-256"]);
        assert_eq!(ids(&[&named[..], &["--layers"]].concat()), ["dw"]);
        let more = ids(&["--more"]);
        assert!(more.iter().all(|id| !all.contains(id)));
        assert!(ids(&["--more", "--layers"]).contains(&"deep-1".to_string()));
        assert_eq!(ids(&["--only", "deep-1", "--only", "k3"]), ["k3", "deep-1"]);
        assert!(parse(&["--more", "--only", "k3"]).is_err());
        let entries = parse(&["--batch", "77"]).unwrap().entries();
        assert!(entries.iter().all(|entry| entry.work.batch() == 77));
    }

    #[test]
    fn contenders_are_those_asked_for_and_the_reference() {
        let contenders = |options: &[&str]| {
            let bench = parse(options).unwrap();
            [Engine::Burn, Engine::PyTorch].map(|engine| bench.contenders(engine))
        };
        assert_eq!(contenders(&[]).concat(), Contender::value_variants());
        let [burn, torch] = contenders(&["--contender", "fused", "--contender", "eager"]);
        assert_eq!(burn, [Contender::Fused, Contender::Unfused]);
        assert_eq!(torch, [Contender::Eager]);
    }

    #[test]
    fn bytes_have_units() {
        for (text, wanted) in [
            ("4GiB", 4 << 30),
            ("1.5 GiB", 3 << 29),
            ("512MiB", 512 << 20),
            ("2KiB", 2048),
            ("77", 77),
        ] {
            let bench = parse(&["--largest-batch", text]).unwrap();
            assert_eq!(
                bench.largest_batch.map(NonZeroU64::get),
                Some(wanted),
                "{text}"
            );
        }
        for wrong in [
            "0", "-1GiB", "GiB", "4GB", "4gib", "nan", "infGiB", "1e-9KiB",
        ] {
            let error = parse(&[&format!("--largest-batch={wrong}")]).unwrap_err();
            assert!(
                error.to_string().contains("such as 4GiB"),
                "{wrong}: {error}"
            );
        }
        for other in ["--layers", "--batch=4", "--rounds=3", "--profile"] {
            assert!(
                parse(&["--largest-batch", "4GiB", other]).is_err(),
                "{other}"
            );
        }
    }

    #[test]
    fn numbers_have_bounds_which_are_named() {
        for (option, most) in [
            ("--rounds", "1000"),
            ("--batch", "65536"),
            ("--threads", "1024"),
        ] {
            assert!(parse(&[option, most]).is_ok());
            let beyond = (most.parse::<usize>().unwrap() + 1).to_string();
            for wrong in ["0", "-1", "1.5", &beyond, "18446744073709551615", "1e99"] {
                let error = parse(&[&format!("{option}={wrong}")])
                    .unwrap_err()
                    .to_string();
                assert!(
                    error.contains(&format!("from 1 to {most}")),
                    "{wrong}: {error}"
                );
            }
        }
    }
}
