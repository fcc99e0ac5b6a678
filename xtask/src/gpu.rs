//! What runs on a GPU: its tests here, and a bundle of them for a machine that has one.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{cargo, root};

/// What needs no GPU: the CubeCL crate takes minutes to build, and nothing else here uses it.
pub const WITHOUT: [&str; 3] = ["--workspace", "--exclude", "burn-conv-bn-cubecl"];

/// The build of the GPU tests on WebGPU. Autotuning is left out: it takes longer than the tests.
pub const WEBGPU: [&str; 12] = [
    "--profile",
    "gpu",
    "--target-dir",
    "target/gpu",
    "-p",
    "burn-conv-bn-cubecl",
    "-p",
    "burn-conv-bn",
    "-p",
    "burn-conv-bn-train",
    "--features",
    "burn-conv-bn-cubecl/webgpu,burn-conv-bn-train/webgpu,burn-conv-bn-train/fusion",
];

/// The test programs that run on a GPU.
const TESTS: [&str; 7] = [
    "kernels",
    "cube",
    "cube_memory",
    "cube_leaks",
    "cube_convergence",
    "cube_property",
    "device",
];

/// Where Vulkan's loader looks for drivers, on Linux.
const DRIVERS: [&str; 3] = [
    "/usr/share/vulkan/icd.d",
    "/usr/local/share/vulkan/icd.d",
    "/etc/vulkan/icd.d",
];

/// Whether a Vulkan driver is installed, or why the GPU tests cannot run.
pub fn vulkan() -> Result<(), String> {
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
    match DRIVERS.into_iter().any(has_driver) {
        true => Ok(()),
        false => Err(
            "no Vulkan driver is installed; Mesa's software driver will do, as in Debian's \
             mesa-vulkan-drivers and libvulkan1"
                .to_string(),
        ),
    }
}

/// The GPU tests, on whatever WebGPU finds. With `strict`, they fail where the device lacks what
/// they need.
pub fn tests(strict: bool) -> Command {
    let mut command = cargo(&["test"]);
    command.args(WEBGPU);
    for test in TESTS {
        command.args(["--test", test]);
    }
    if strict {
        command.env("BURN_CONV_BN_STRICT", "1");
    }
    // Mesa complains without one.
    if env::var_os("XDG_RUNTIME_DIR").is_none() {
        command.env("XDG_RUNTIME_DIR", env::temp_dir());
    }
    command
}

#[derive(Args, Debug)]
pub struct Bundle {
    /// Where to write the bundle: a shell script that unpacks itself and runs what is in it.
    #[arg(
        long,
        value_name = "FILE",
        default_value = "target/gpu-bundle/burn-conv-bn-cuda.sh"
    )]
    output: PathBuf,
}

/// The build of everything that runs on CUDA.
const CUDA: [&str; 12] = [
    "--target-dir",
    "target/gpu-cuda",
    "-p",
    "burn-conv-bn-cubecl",
    "-p",
    "burn-conv-bn",
    "-p",
    "burn-conv-bn-train",
    "-p",
    "burn-conv-bn-bench-worker",
    "--features",
    "burn-conv-bn-cubecl/cuda,burn-conv-bn-bench-worker/cuda,burn-conv-bn-bench-worker/fusion,\
     burn-conv-bn-bench-worker/autotune",
];

/// The programs of the bundle, as cargo chooses them.
const PROGRAMS: [&str; 10] = [
    "--test",
    "kernels",
    "--test",
    "cube",
    "--test",
    "cube_memory",
    "--bin",
    "bench-worker",
    "--bin",
    "mnist",
];

/// Largest bundle that is worth carrying, in bytes.
const LARGEST: u64 = 60 << 20;

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
const SCRIPT: &str = include_str!("gpu/run.sh");

/// Builds the tests and the benchmark for CUDA, and packs them.
pub fn bundle(args: &Bundle) -> Result<()> {
    let programs = build_programs()?;
    let output = root().join(&args.output);
    let folder = output
        .parent()
        .context("the bundle needs a folder")?
        .join("bundle");
    if folder.exists() {
        fs::remove_dir_all(&folder)
            .with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::create_dir_all(folder.join("lib"))
        .with_context(|| format!("cannot create {}", folder.display()))?;
    let xtask = env::current_exe().context("cannot find this program")?;
    let peer = root().join("crates/burn-conv-bn-bench/peer/pytorch.py");
    let files = programs
        .iter()
        .map(|(name, file)| (name.as_str(), file.as_path()))
        .chain([("xtask", xtask.as_path()), ("pytorch.py", peer.as_path())]);
    for (name, file) in files {
        copy(file, &folder.join(name))?;
    }
    for (_, program) in &programs {
        for library in libraries(program)? {
            let name = library.file_name().context("a library has a name")?;
            copy(&library, &folder.join("lib").join(name))?;
        }
    }

    let archive = archive(&folder)?;
    let mut file =
        File::create(&output).with_context(|| format!("cannot write {}", output.display()))?;
    let line = SCRIPT.lines().count() + 1;
    file.write_all(
        SCRIPT
            .replace("@ARCHIVE_LINE@", &line.to_string())
            .as_bytes(),
    )
    .and_then(|()| file.write_all(&archive))
    .with_context(|| format!("cannot write {}", output.display()))?;
    let size = file
        .metadata()
        .context("the bundle was just written")?
        .len();
    println!(
        "gpu-bundle: {}, {:.1} MB; run it with sh on a machine with CUDA",
        output.display(),
        size as f64 / 1e6
    );
    if size > LARGEST {
        bail!(
            "the bundle has {size} bytes, more than the {LARGEST} that are worth carrying around"
        );
    }
    Ok(())
}

/// Builds the programs without symbols. Returns their names and files.
fn build_programs() -> Result<Vec<(String, PathBuf)>> {
    let mut command = cargo(&["build", "--release", "--locked"]);
    command
        .args(CUDA)
        .args(PROGRAMS)
        .arg("--message-format=json-render-diagnostics")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .stderr(Stdio::inherit());
    println!(
        "$ cargo build --release --locked {} {}",
        CUDA.join(" "),
        PROGRAMS.join(" ")
    );
    let output = command.output().context("cannot start cargo")?;
    if !output.status.success() {
        bail!(
            "cannot build for CUDA; where LLVM is what is missing, CubeCL's CUDA runtime needs it"
        );
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let programs: Vec<_> = messages.lines().filter_map(program).collect();
    match programs.len() == PROGRAMS.len() / 2 {
        true => Ok(programs),
        false => bail!(
            "expected {} programs, cargo built {programs:?}",
            PROGRAMS.len() / 2
        ),
    }
}

/// Name and file of a program, if this is cargo's message that it was built.
fn program(message: &str) -> Option<(String, PathBuf)> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    let name = message["target"]["name"].as_str()?;
    let file = message["executable"].as_str()?;
    Some((name.to_string(), PathBuf::from(file)))
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

/// The folder's files as a compressed archive.
fn archive(folder: &Path) -> Result<Vec<u8>> {
    let output = Command::new("tar")
        .args(["--create", "--xz", "--file", "-", "--directory"])
        .arg(folder)
        .arg(".")
        // The programs have most of their code in common: a window that spans them sees it.
        .env("XZ_OPT", "-6e --lzma2=dict=256MiB -T1")
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run tar")?;
    match output.status.success() {
        true => Ok(output.stdout),
        false => bail!("tar failed ({}); it needs xz", output.status),
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
    fn programs_are_where_cargo_says() {
        let built = r#"{"reason":"compiler-artifact","target":{"kind":["test"],"name":"cube"},
            "executable":"/t/release/deps/cube-1"}"#;
        let wanted = ("cube".to_string(), "/t/release/deps/cube-1".into());
        assert_eq!(program(built), Some(wanted));
        let library = r#"{"target":{"name":"burn"},"executable":null}"#;
        assert_eq!(program(library), None);
        assert_eq!(program("Compiling"), None);
    }

    #[test]
    fn the_archive_starts_after_the_script() {
        assert_eq!(SCRIPT.matches("@ARCHIVE_LINE@").count(), 1);
        assert!(SCRIPT.ends_with('\n'));
    }
}
