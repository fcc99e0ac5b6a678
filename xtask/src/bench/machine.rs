//! The machine of a run.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;
use std::process::Command;
use std::thread;

use anyhow::Result;
use burn_conv_bn_bench::device::CUDA;
use burn_conv_bn_bench::linux::value;
use time::UtcDateTime;
use time::format_description::well_known::Rfc3339;

use super::report::Machine;
use crate::workspace::root;

/// Vector instructions that kernels choose by, as Linux names them.
const VECTOR_UNITS: [&str; 8] = [
    "sse4_2",
    "avx",
    "fma",
    "avx2",
    "avx512f",
    "avx512_bf16",
    "asimd",
    "sve",
];

/// Variables that change a contender's time or memory, by the start of their names.
const VARIABLES: [&str; 11] = [
    "MALLOC_",
    "LD_PRELOAD",
    "OMP_",
    "GOMP_",
    "KMP_",
    "MKL_",
    "RAYON_",
    "RUSTFLAGS",
    "CUDA_",
    "CUBECL_",
    "NVIDIA_TF32_OVERRIDE",
];

/// Where Linux describes the caches of the first core.
const CACHES: &str = "/sys/devices/system/cpu/cpu0/cache";

/// Numbers that distinguish processors of one name, in `/proc/cpuinfo`: of x86, then of Arm.
const NUMBERS: [&str; 6] = [
    "cpu family",
    "model",
    "stepping",
    "CPU implementer",
    "CPU part",
    "CPU variant",
];

/// This machine, with a number of threads for each contender, a device, and the vectors in use by engine.
pub fn describe(threads: usize, device: &str, vectors: BTreeMap<String, String>) -> Machine {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let variables = env::vars_os().filter_map(|(name, value)| {
        let value = value.to_string_lossy().into_owned();
        Some((name.into_string().ok()?, value))
    });
    let matters = |name: &str| VARIABLES.iter().any(|start| name.starts_with(start));
    // The first GPU, where there are several, is the one to be used.
    let gpus = (device == CUDA)
        .then(|| answer("nvidia-smi", &["--query-gpu=name", "--format=csv,noheader"]))
        .flatten();
    Machine {
        cpu: processor(&cpuinfo),
        gpu: gpus.and_then(|names| names.lines().next().map(str::to_string)),
        vector_units: vector_units(&cpuinfo),
        vectors,
        caches: caches(Path::new(CACHES)),
        cores: thread::available_parallelism().map_or(1, NonZeroUsize::get),
        threads,
        system: format!("{} {}", env::consts::OS, env::consts::ARCH),
        environment: variables.filter(|(name, _)| matters(name)).collect(),
    }
}

/// Date and time in UTC, as RFC 3339.
pub fn date() -> Result<String> {
    Ok(UtcDateTime::now().truncate_to_second().format(&Rfc3339)?)
}

/// The commit of this repository, with `-dirty` behind it if something was changed since.
pub fn commit() -> Option<String> {
    commit_of(root())
}

fn commit_of(folder: &Path) -> Option<String> {
    let folder = folder.to_str()?;
    let commit = answer("git", &["-C", folder, "rev-parse", "HEAD"])?;
    let changes = answer("git", &["-C", folder, "status", "--porcelain"])?;
    Some(format!(
        "{commit}{}",
        if changes.is_empty() { "" } else { "-dirty" }
    ))
}

/// Name and version of the compiler.
pub fn rustc_version() -> Option<(String, String)> {
    let version = answer("rustc", &["--version"])?;
    let number = version.split_whitespace().nth(1)?;
    Some(("rustc".to_string(), number.to_string()))
}

/// Output of a program in the workspace, if it exists and succeeds. A GPU bundle runs without a workspace.
fn answer(program: &str, args: &[&str]) -> Option<String> {
    let mut command = Command::new(program);
    if root().is_dir() {
        command.current_dir(root());
    }
    let output = command.args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_string())
}

/// Name and numbers of the processor: in virtual machines the name is often the maker's alone.
fn processor(cpuinfo: &str) -> String {
    let name = value(cpuinfo, "model name").map(str::to_string);
    let name = name.or_else(|| answer("sysctl", &["-n", "machdep.cpu.brand_string"]));
    let numbers = NUMBERS.iter().filter_map(|key| {
        let (_, name) = key.split_once(' ').unwrap_or(("", key));
        Some(format!("{name} {}", value(cpuinfo, key)?))
    });
    let numbers: Vec<String> = numbers.collect();
    let mut parts = vec![name.unwrap_or_default(), numbers.join(" ")];
    parts.retain(|part| !part.is_empty());
    if parts.is_empty() {
        "unknown".to_string()
    } else {
        parts.join(", ")
    }
}

fn vector_units(cpuinfo: &str) -> Vec<String> {
    // x86 and Arm.
    let flags = value(cpuinfo, "flags").or_else(|| value(cpuinfo, "Features"));
    let flags: Vec<&str> = flags.unwrap_or_default().split_whitespace().collect();
    let there = VECTOR_UNITS.into_iter().filter(|unit| flags.contains(unit));
    there.map(str::to_string).collect()
}

/// The caches of data that a folder of Linux's describes.
fn caches(folder: &Path) -> Vec<String> {
    let read = |index: usize, name: &str| {
        let path = folder.join(format!("index{index}")).join(name);
        Some(fs::read_to_string(path).ok()?.trim().to_string())
    };
    let all = (0..).map_while(|index| {
        let level = read(index, "level")?;
        Some((
            read(index, "type")?,
            format!("L{level} {}", read(index, "size")?),
        ))
    });
    let of_data = all.filter(|(kind, _)| kind != "Instruction");
    of_data.map(|(_, cache)| cache).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_processor_of_either_kind() {
        let x86 = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\
                   stepping\t: 1\nflags\t\t: fpu avx avx2 fma xavx512f\nmodel name\t: other\n";
        assert_eq!(processor(x86), "AMD EPYC, family 25 model 17 stepping 1");
        assert_eq!(vector_units(x86), ["avx", "fma", "avx2"]);
        let arm = "model name\t: \nFeatures\t: fp asimd sve\nCPU implementer\t: 0x41\n\
                   CPU part\t: 0xd40\n";
        assert_eq!(processor(arm), "implementer 0x41 part 0xd40");
        assert_eq!(vector_units(arm), ["asimd", "sve"]);
        assert!(vector_units("").is_empty());
    }

    #[test]
    fn caches_are_those_of_data() {
        let folder = tempfile::tempdir().unwrap();
        let described = ["1 Data 32K", "1 Instruction 32K", "2 Unified 512K"];
        for (index, cache) in described.into_iter().enumerate() {
            let folder = folder.path().join(format!("index{index}"));
            fs::create_dir(&folder).unwrap();
            for (name, text) in ["level", "type", "size"].into_iter().zip(cache.split(' ')) {
                fs::write(folder.join(name), format!("{text}\n")).unwrap();
            }
        }
        assert_eq!(caches(folder.path()), ["L1 32K", "L2 512K"]);
        assert!(caches(&folder.path().join("none")).is_empty());
    }

    #[test]
    fn dates_are_in_utc() {
        let date = date().unwrap();
        assert_eq!((date.len(), date.find('T')), (20, Some(10)), "{date}");
        assert!(date.ends_with('Z'), "{date}");
    }

    #[test]
    fn a_commit_says_whether_something_was_changed_since() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        assert_eq!(commit_of(&folder.join("none")), None);
        fs::write(folder.join("file"), "one").unwrap();
        for args in ["init", "add file", "commit -m one"] {
            let mut all = vec!["-C", folder.to_str().unwrap()];
            all.extend(["-c", "user.name=a", "-c", "user.email=a@b.c"]);
            all.extend(args.split(' '));
            answer("git", &all).unwrap();
        }
        let clean = commit_of(folder).unwrap();
        assert!(
            clean.chars().all(|digit| digit.is_ascii_hexdigit()),
            "{clean}"
        );
        fs::write(folder.join("file"), "two").unwrap();
        assert_eq!(commit_of(folder), Some(format!("{clean}-dirty")));
    }

    #[test]
    fn a_program_that_is_not_there_answers_nothing() {
        assert_eq!(answer("no-such-program", &[]), None);
    }
}
