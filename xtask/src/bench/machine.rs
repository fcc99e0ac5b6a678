//! What a benchmark ran on.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;
use std::process::Command;
use std::thread;

use anyhow::Result;
use burn_conv_bn_bench::device::CUDA;
use burn_conv_bn_bench::report::Machine;
use time::UtcDateTime;
use time::format_description::well_known::Rfc3339;

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

/// Variables whose value decides how fast or how large contenders are.
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

/// Numbers that tell processors of one name apart, as `/proc/cpuinfo` and as people call them: first
/// those of x86, then those of Arm.
const NUMBERS: [(&str, &str); 6] = [
    ("cpu family", "family"),
    ("model", "model"),
    ("stepping", "stepping"),
    ("CPU implementer", "implementer"),
    ("CPU part", "part"),
    ("CPU variant", "variant"),
];

/// This machine, with contenders of so many threads on a device, and the vectors that they use, by
/// who uses them.
pub fn describe(threads: usize, device: &str, vectors: BTreeMap<String, String>) -> Machine {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let variables = env::vars_os().filter_map(|(name, value)| {
        Some((
            name.into_string().ok()?,
            value.to_string_lossy().into_owned(),
        ))
    });
    Machine {
        cpu: processor(&cpuinfo),
        gpu: gpu(device),
        vector_units: vector_units(&cpuinfo),
        vectors,
        caches: caches(Path::new(CACHES)),
        cores: thread::available_parallelism().map_or(1, NonZeroUsize::get),
        threads,
        system: format!("{} {}", env::consts::OS, env::consts::ARCH),
        environment: telling(variables),
    }
}

/// Date and time in UTC.
pub fn date() -> Result<String> {
    Ok(UtcDateTime::now().truncate_to_second().format(&Rfc3339)?)
}

/// Name and numbers of the processor: those who virtualize one often leave no more of its name than
/// its maker's.
fn processor(cpuinfo: &str) -> String {
    let name = value(cpuinfo, "model name").map(str::to_string);
    let name = name.or_else(|| {
        let mut command = Command::new("sysctl");
        command.args(["-n", "machdep.cpu.brand_string"]);
        answer(command)
    });
    let numbers = NUMBERS.iter();
    let numbers =
        numbers.filter_map(|(key, name)| Some(format!("{name} {}", value(cpuinfo, key)?)));
    let numbers: Vec<String> = numbers.collect();
    let parts = [name, Some(numbers.join(" "))].into_iter().flatten();
    let parts: Vec<String> = parts.filter(|part| !part.is_empty()).collect();
    match parts.is_empty() {
        true => "unknown".to_string(),
        false => parts.join(", "),
    }
}

/// The caches that a folder of Linux's describes, but for those of instructions.
fn caches(folder: &Path) -> Vec<String> {
    let cache = |index: usize| {
        let folder = folder.join(format!("index{index}"));
        let read = |name: &str| {
            let text = fs::read_to_string(folder.join(name)).ok()?;
            Some(text.trim().to_string())
        };
        let level = read("level")?;
        let kind = match read("type")?.as_str() {
            "Data" => "d",
            "Unified" => "",
            _ => return Some(None),
        };
        Some(Some(format!("L{level}{kind} {}", read("size")?)))
    };
    (0..).map_while(cache).flatten().collect()
}

/// Name of the GPU that a device is, if a program tells it: of the first where there are several,
/// because that is the one to be used.
fn gpu(device: &str) -> Option<String> {
    if device != CUDA {
        return None;
    }
    let mut command = Command::new("nvidia-smi");
    command.args(["--query-gpu=name", "--format=csv,noheader"]);
    let names = answer(command)?;
    names.lines().next().map(|name| name.trim().to_string())
}

/// The commit of this repository, with `-dirty` behind it if something was changed since.
pub fn commit() -> Option<String> {
    commit_of(root())
}

fn commit_of(folder: &Path) -> Option<String> {
    let git = |args: &[&str]| answer(in_folder(folder, "git", args));
    let mut commit = git(&["rev-parse", "HEAD"])?;
    if !git(&["status", "--porcelain"])?.is_empty() {
        commit.push_str("-dirty");
    }
    Some(commit)
}

/// The compiler's version, by its name.
pub fn rustc_version() -> Option<(String, String)> {
    let version = answer(in_folder(root(), "rustc", &["--version"]))?;
    let number = version.split_whitespace().nth(1)?;
    Some(("rustc".to_string(), number.to_string()))
}

/// A program in a folder, which need not be there where a bundle runs: then it answers nothing.
fn in_folder(folder: &Path, program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args).current_dir(folder);
    command
}

/// What a program says, if it succeeds.
fn answer(mut command: Command) -> Option<String> {
    let output = command.output();
    let output = output.ok().filter(|output| output.status.success())?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.trim().to_string())
}

/// The value of the first line `name : value` of `/proc/cpuinfo`.
fn value<'a>(cpuinfo: &'a str, name: &str) -> Option<&'a str> {
    cpuinfo.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then_some(value.trim())
    })
}

fn vector_units(cpuinfo: &str) -> Vec<String> {
    // x86 and Arm.
    let flags = value(cpuinfo, "flags").or_else(|| value(cpuinfo, "Features"));
    let flags: Vec<&str> = flags.unwrap_or_default().split_whitespace().collect();
    let there = VECTOR_UNITS.into_iter().filter(|unit| flags.contains(unit));
    there.map(str::to_string).collect()
}

/// The variables that matter.
fn telling(variables: impl Iterator<Item = (String, String)>) -> BTreeMap<String, String> {
    let matters = |name: &str| VARIABLES.iter().any(|start| name.starts_with(*start));
    variables.filter(|(name, _)| matters(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_processor_of_either_kind() {
        let x86 = "processor\t: 0\nmodel name\t: AMD EPYC 9R14\nflags\t\t: fpu avx avx2 fma xavx512f\n\
                   processor\t: 1\nmodel name\t: other\n";
        assert_eq!(value(x86, "model name"), Some("AMD EPYC 9R14"));
        assert_eq!(vector_units(x86), ["avx", "fma", "avx2"]);
        let arm = "processor\t: 0\nFeatures\t: fp asimd sve\n";
        assert_eq!(value(arm, "model name"), None);
        assert_eq!(vector_units(arm), ["asimd", "sve"]);
        assert!(vector_units("").is_empty());
    }

    #[test]
    fn names_processors_by_their_numbers_too() {
        let x86 = "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nstepping\t: 1\n";
        assert_eq!(processor(x86), "AMD EPYC, family 25 model 17 stepping 1");
        let arm = "model name\t: \nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n";
        assert_eq!(processor(arm), "implementer 0x41 part 0xd40");
    }

    #[test]
    fn caches_are_those_of_data() {
        let folder = tempfile::tempdir().unwrap();
        let caches_of = [
            ("1", "Data", "32K"),
            ("1", "Instruction", "32K"),
            ("2", "Unified", "512K"),
        ];
        for (index, (level, kind, size)) in caches_of.into_iter().enumerate() {
            let folder = folder.path().join(format!("index{index}"));
            fs::create_dir(&folder).unwrap();
            for (name, text) in [("level", level), ("type", kind), ("size", size)] {
                fs::write(folder.join(name), format!("{text}\n")).unwrap();
            }
        }
        assert_eq!(caches(folder.path()), ["L1d 32K", "L2 512K"]);
        assert!(caches(&folder.path().join("none")).is_empty());
    }

    #[test]
    fn dates_are_in_utc() {
        let date = date().unwrap();
        assert_eq!((date.len(), date.find('T')), (20, Some(10)), "{date}");
        assert!(date.ends_with('Z'), "{date}");
    }

    #[test]
    fn keeps_the_variables_that_matter() {
        let pairs = [
            ("HOME", "/home"),
            ("OMP_NUM_THREADS", "2"),
            ("MALLOC_TOP_PAD_", "1"),
        ];
        let variables = pairs.map(|(name, value)| (name.to_string(), value.to_string()));
        let kept = telling(variables.into_iter());
        let names: Vec<_> = kept.keys().map(String::as_str).collect();
        assert_eq!(names, ["MALLOC_TOP_PAD_", "OMP_NUM_THREADS"]);
    }

    #[test]
    fn a_commit_says_whether_something_was_changed_since() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        assert_eq!(commit_of(&folder.join("none")), None);
        fs::write(folder.join("file"), "one").unwrap();
        for args in ["init", "add file", "commit -m one"] {
            let names = ["-c", "user.name=a", "-c", "user.email=a@b.c"];
            let args: Vec<&str> = names.into_iter().chain(args.split(' ')).collect();
            answer(in_folder(folder, "git", &args)).unwrap();
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
        assert_eq!(answer(in_folder(root(), "no-such-program", &[])), None);
        let machine = describe(3, "flex", BTreeMap::new());
        assert_eq!((machine.threads, machine.gpu), (3, None));
    }
}
