//! What runs on a GPU: its tests here, and a bundle of them for a machine that has one.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use burn_conv_bn_bench::device::{CUDA, WEBGPU};
use burn_conv_bn_files::{self as files, Survives};
use burn_conv_bn_gpu_tests::TESTS;
use clap::Args;

use crate::programs::{self, Program};
use crate::say::say;
use crate::workspace::{cargo, root};

/// The build without a GPU: without the features for one, which `burn-conv-bn` has by default.
pub const WITHOUT: [&str; 4] = [
    "--workspace",
    "--no-default-features",
    "--features",
    "burn-conv-bn-train/flex",
];

/// Whether Burn's fusion is between the tests and the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fusion {
    /// As in Burn's default features.
    On,
    /// Operations run one by one.
    Off,
}

/// Why the tests cannot run here on a runtime of CubeCL, as far as that is known before they are built.
pub fn unavailable(runtime: &str) -> Result<(), String> {
    match runtime {
        "vulkan" | WEBGPU | "wgpu" => vulkan(),
        _ => Ok(()),
    }
}

/// The build of the GPU tests on WebGPU. Autotuning is left out: it takes longer than the tests.
pub fn webgpu(fusion: Fusion) -> Vec<&'static str> {
    let mut arguments = vec![
        "--profile",
        "gpu",
        "--target-dir",
        "target/gpu",
        "--no-default-features",
        "-p",
        "burn-conv-bn-cubecl",
        "-p",
        "burn-conv-bn",
        "-p",
        "burn-conv-bn-train",
        "-p",
        "burn-conv-bn-gpu-tests",
        "-p",
        "burn-conv-bn-memory",
        "--features",
        "burn-conv-bn-cubecl/webgpu,burn-conv-bn-gpu-tests/webgpu,burn-conv-bn-memory/wgpu,\
         burn-conv-bn-train/flex,burn-conv-bn-train/webgpu",
    ];
    if fusion == Fusion::On {
        arguments.extend(["--features", "burn-conv-bn-train/fusion"]);
    }
    arguments
}

/// The test programs for WebGPU alone: one reads wgpu's trace, and the bundle's script runs `mnist` itself.
const WEBGPU_TESTS: [&str; 2] = ["cube_traffic", "device"];

/// Where Vulkan's loader looks for drivers, on Linux.
const DRIVERS: [&str; 3] = [
    "/usr/share/vulkan/icd.d",
    "/usr/local/share/vulkan/icd.d",
    "/etc/vulkan/icd.d",
];

/// Whether a Vulkan driver is installed, or why the GPU tests cannot run.
fn vulkan() -> Result<(), String> {
    if cfg!(any(target_os = "macos", target_os = "windows")) {
        // The system's own API is there.
        return Ok(());
    }
    let named = ["VK_DRIVER_FILES", "VK_ICD_FILENAMES"];
    if named.iter().any(|name| env::var_os(name).is_some()) {
        return Ok(());
    }
    let has_driver = |folder: &str| {
        fs::read_dir(folder)
            .into_iter()
            .flatten()
            .flatten()
            .any(|file| file.path().extension() == Some(OsStr::new("json")))
    };
    if DRIVERS.into_iter().any(has_driver) {
        Ok(())
    } else {
        Err(
            "no Vulkan driver is installed; Mesa's software driver will do, as in Debian's \
             mesa-vulkan-drivers and libvulkan1"
                .to_string(),
        )
    }
}

/// The GPU tests, on whatever WebGPU finds. With `strict`, they fail where the device lacks what
/// they need.
pub fn tests(strict: bool, fusion: Fusion) -> Command {
    let mut command = cargo(&["test"]);
    command.args(webgpu(fusion));
    for test in TESTS.iter().chain(&WEBGPU_TESTS) {
        command.args(["--test", *test]);
    }
    set_up(&mut command, strict);
    command
}

/// The test programs with autotuning, on WebGPU: of every candidate, and without CubeCL's probes of the device's
/// bandwidth, which take 256 MiB and end a tuning early.
pub fn tuned_tests(strict: bool, fusion: Fusion) -> Command {
    let mut command = cargo(&["test"]);
    command.args(webgpu(fusion));
    command.args([
        "--features",
        "burn-conv-bn/autotune,burn-conv-bn-train/autotune",
        "--test",
        "cube_tuned",
        "--test",
        "tuning",
    ]);
    command.env("CUBECL_AUTOTUNE_LEVEL", "full");
    set_up(&mut command, strict);
    command
}

/// The GPU tests on another runtime, one command for each name of the list with the filter for its test
/// program: they are one program there, and each wants a process of its own.
pub fn tests_on(
    runtime: &str,
    strict: bool,
    fusion: Fusion,
) -> impl Iterator<Item = (Command, String)> {
    let build = one_program(runtime, fusion);
    let folder = format!("target/gpu-tests-{runtime}");
    TESTS.iter().map(move |test| {
        let mut command = cargo(&["test", "--profile", "gpu", "--target-dir", &folder]);
        command.args(&build);
        set_up(&mut command, strict);
        (command, format!("{test}::"))
    })
}

/// The build of all tests of the list for a runtime, as one program.
fn one_program(runtime: &str, fusion: Fusion) -> Vec<String> {
    let package = "burn-conv-bn-gpu-tests";
    let mut features = format!("{package}/{runtime}");
    if fusion == Fusion::On {
        features.push_str(&format!(",{package}/fusion"));
    }
    ["--lib", "-p", package, "--features", &features]
        .map(String::from)
        .to_vec()
}

/// A check that the code for the runtimes compiles which no machine of ours runs.
pub fn other_runtimes() -> Command {
    let mut command = cargo(&["check", "--profile", "gpu", "--all-targets"]);
    command.args([
        "--target-dir",
        "target/gpu-others",
        "-p",
        "burn-conv-bn-gpu-tests",
        "-p",
        "burn-conv-bn-bench-worker",
        "-p",
        "burn-conv-bn-train",
        "--features",
        "burn-conv-bn-gpu-tests/metal,burn-conv-bn-gpu-tests/rocm,burn-conv-bn-gpu-tests/vulkan,\
         burn-conv-bn-gpu-tests/fusion,burn-conv-bn-bench-worker/metal,\
         burn-conv-bn-bench-worker/rocm,burn-conv-bn-bench-worker/vulkan",
    ]);
    command
}

/// The examples of the documentation, in the build of the GPU tests: those of the kernels are
/// compiled nowhere else.
pub fn doc_tests(fusion: Fusion) -> Command {
    let mut command = cargo(&["test", "--doc"]);
    command.args(webgpu(fusion));
    set_up(&mut command, false);
    command
}

/// What tests on a GPU find in their environment.
fn set_up(command: &mut Command, strict: bool) {
    if strict {
        command.env("BURN_CONV_BN_STRICT", "1");
    }
    // Mesa complains without one.
    if env::var_os("XDG_RUNTIME_DIR").is_none() {
        command.env("XDG_RUNTIME_DIR", env::temp_dir());
    }
}

#[derive(Args, Debug)]
pub struct Bundle {
    /// Where to write the bundle: a shell script that unpacks itself and runs what is in it
    /// [default: target/gpu-bundle/burn-conv-bn-cuda.sh].
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Where the bundle is put together, from the workspace's root.
const BUNDLE_FOLDER: &str = "target/gpu-bundle";

/// Its name there by default.
const BUNDLE: &str = "burn-conv-bn-cuda.sh";

/// The build of what trains and is timed on CUDA.
const CUDA_PROGRAMS: [&str; 10] = [
    "-p",
    "burn-conv-bn-train",
    "-p",
    "burn-conv-bn-bench-worker",
    "--features",
    "burn-conv-bn-bench-worker/cuda,burn-conv-bn-bench-worker/fusion,\
     burn-conv-bn-bench-worker/autotune,burn-conv-bn-bench-worker/persistence",
    "--bin",
    "bench-worker",
    "--bin",
    "mnist",
];

/// Largest bundle that is worth carrying, in bytes. A larger one is an error, and is not written.
const LARGEST: usize = 60_000_000;

/// Libraries of the C runtime: those of the machine that runs the bundle are to be used.
const SYSTEM: [&str; 8] = [
    "ld-linux",
    "libc.so",
    "libdl.so",
    "libm.so",
    "libpthread.so",
    "libresolv.so",
    "librt.so",
    "linux-vdso",
];

/// What unpacks and runs the bundle, in front of the archive.
const SCRIPT: &str = concat!(
    include_str!("gpu/unpack.sh"),
    "\n",
    include_str!("gpu/run.sh")
);

/// CubeCL's configuration for the programs: every one of them is a process of its own.
const CONFIGURATION: &str = include_str!("gpu/cubecl.toml");

/// Builds the tests and the benchmark for CUDA, and packs them.
pub fn bundle(args: &Bundle) -> Result<()> {
    let own = root().join(BUNDLE_FOLDER);
    fs::create_dir_all(&own).with_context(|| format!("cannot create {}", own.display()))?;
    let output = match &args.output {
        Some(output) => output.clone(),
        None => own.join(BUNDLE),
    };
    files::check(&output)?;
    // Without autotuning, as on WebGPU, and because that may choose kernels which multiply f32 as TF32:
    // the tests' bounds are those of f32.
    let tests = build_for_cuda(&["test", "--no-run"], one_program(CUDA, Fusion::On))?;
    let others = build_for_cuda(&["build"], CUDA_PROGRAMS)?;
    // Neighbours in the archive are programs that share the most.
    let programs = [
        ("gpu-tests", file(&tests, "burn_conv_bn_gpu_tests")?),
        ("bench-worker", file(&others, "bench-worker")?),
        ("mnist", file(&others, "mnist")?),
    ];
    let staging =
        tempfile::tempdir_in(&own).with_context(|| format!("cannot write to {}", own.display()))?;
    let folder = staging.path();
    fs::create_dir(folder.join("lib"))
        .with_context(|| format!("cannot create a folder in {}", folder.display()))?;
    for (_, program) in &programs {
        for library in libraries(program)? {
            let name = library.file_name().context("a library has a name")?;
            copy(&library, &folder.join("lib").join(name))?;
        }
    }
    let xtask = env::current_exe().context("cannot find this program")?;
    let peer = root().join("crates/burn-conv-bn-bench/peer/pytorch.py");
    let mut names = Vec::new();
    for (name, file) in programs
        .iter()
        .map(|(name, file)| (*name, file.as_path()))
        .chain([("xtask", xtask.as_path()), ("pytorch.py", peer.as_path())])
    {
        copy(file, &folder.join(name))?;
        names.push(name);
    }
    let configuration = folder.join("cubecl.toml");
    fs::write(&configuration, CONFIGURATION)
        .with_context(|| format!("cannot write {}", configuration.display()))?;
    names.extend(["cubecl.toml", "lib"]);

    let mut bytes = script().into_bytes();
    bytes.extend(archive(folder, &names)?);
    check_size(bytes.len())?;
    files::write(&output, &bytes, Survives::Kill)?;
    say!(
        "gpu-bundle: {}, {:.1} MB; run it with sh on a machine with CUDA",
        output.display(),
        megabytes(bytes.len())
    )
}

/// The script with the names of the tests, and the line after it.
fn script() -> String {
    let line = SCRIPT.lines().count() + 1;
    SCRIPT
        .replace("@ARCHIVE_LINE@", &line.to_string())
        .replace("@TESTS@", &TESTS.join(" "))
}

fn check_size(bytes: usize) -> Result<()> {
    if bytes > LARGEST {
        bail!(
            "the bundle would have {:.1} MB ({bytes} bytes), more than the {:.1} MB that are worth \
             carrying around; it was not written",
            megabytes(bytes),
            megabytes(LARGEST)
        );
    }
    Ok(())
}

fn megabytes(bytes: usize) -> f64 {
    bytes as f64 / 1e6
}

fn build_for_cuda(
    subcommand: &[&str],
    arguments: impl IntoIterator<Item: AsRef<OsStr>>,
) -> Result<Vec<Program>> {
    let mut command = cargo(subcommand);
    command
        .args(["--release", "--locked", "--target-dir", "target/gpu-cuda"])
        .args(arguments)
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols");
    programs::build(command).context(
        "cannot build for CUDA; where LLVM is what is missing, CubeCL's CUDA runtime needs it",
    )
}

fn file(built: &[Program], name: &str) -> Result<PathBuf> {
    let program = built.iter().find(|program| program.name == name);
    let program = program.with_context(|| format!("cargo built no {name}, only {built:?}"))?;
    Ok(program.file.clone())
}

/// The shared libraries that a program needs besides the system's.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("cannot run ldd, which names the libraries of a program")?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().filter_map(library).collect())
}

/// The file in a line like `libz3.so.4 => /lib/libz3.so.4 (0x7f1c)`, if it is to be carried.
fn library(line: &str) -> Option<PathBuf> {
    let (name, rest) = line.trim().split_once(" => ")?;
    let file = rest.split(" (").next()?;
    let system = SYSTEM.iter().any(|system| name.starts_with(system));
    (!system && file.starts_with('/')).then(|| PathBuf::from(file))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to)
        .map(drop)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

/// Files of the folder, in that order, as a compressed archive.
fn archive(folder: &Path, names: &[&str]) -> Result<Vec<u8>> {
    let output = Command::new("tar")
        .args(["--create", "--xz", "--file", "-", "--directory"])
        .arg(folder)
        .args(names)
        // The programs have most of their code in common: a window that spans two of them sees it.
        // It takes 3 GB to pack, and as much as the window to unpack.
        .env("XZ_OPT", "--lzma2=preset=9e,dict=256MiB -T1")
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run tar")?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        bail!("tar failed ({}); it needs xz", output.status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_of_the_system_stay_behind() {
        let carried = library("\tlibz3.so.4 => /lib/x86_64-linux-gnu/libz3.so.4 (0x00007f)");
        assert_eq!(carried, Some("/lib/x86_64-linux-gnu/libz3.so.4".into()));
        for line in [
            "\tlinux-vdso.so.1 (0x00007ffd)",
            "\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)",
            "\t/lib64/ld-linux-x86-64.so.2 (0x00007f)",
            "\tlibmissing.so => not found",
        ] {
            assert_eq!(library(line), None, "{line}");
        }
    }

    #[test]
    fn the_archive_starts_after_the_script() {
        let script = script();
        for place in ["@ARCHIVE_LINE@", "@TESTS@"] {
            assert_eq!(SCRIPT.matches(place).count(), 1);
            assert!(!script.contains(place));
        }
        assert!(script.ends_with("\nexit 0\n"), "no shell reads on");
        let line = format!("tail -n +{} ", script.lines().count() + 1);
        assert_eq!(script.matches(&line).count(), 1);
    }

    #[test]
    fn a_bundle_that_is_too_large_is_an_error() {
        assert!(check_size(LARGEST).is_ok());
        let error = check_size(72_345_678).unwrap_err().to_string();
        for part in ["72.3 MB", "72345678 bytes", "60.0 MB"] {
            assert!(error.contains(part), "no {part:?} in {error}");
        }
    }
}

/// The script on stand-ins for the programs.
#[cfg(all(test, unix))]
mod script_tests;
