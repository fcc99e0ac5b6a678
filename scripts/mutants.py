#!/usr/bin/env python3
"""Faults in the op's host code, one at a time: the tests of burn-conv-bn must find each.

    python3 scripts/mutants.py [--only TEXT] [--target FOLDER]

All faults are compiled into one build of a copy of the workspace, behind a variable of the environment, and the
test programs are run for each until one fails. Prints a line a fault; the status is 1 if one of them lives that
is not explained below. Needs cargo alone, and takes about half an hour on two cores.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = "crates/burn-conv-bn/src"

# In the order of what they cost.
PROGRAMS = ["concurrency", "stress", "memory", "property", "it"]

# A file, and a piece of it in which «this→becomes this». The piece stands there once.
MUTANTS = [
    # What is kept.
    ("spec/save_plan.rs", "let output = «wants_grad→true» && present.residual && derivative"),
    ("spec/save_plan.rs", "let output = wants_grad && «present.residual→true» && derivative"),
    ("spec/save_plan.rs", "let value = wants_grad && derivative != Derivative::One && «!output→true»;"),
    ("spec/save_plan.rs", "let conv_output = «input || weight || gamma || value→input || weight || value»;"),
    ("spec/save_plan.rs", "let recompute = conv_output && «options.recompute == Recompute::Conv→true»;"),
    ("spec/save_plan.rs", "input: «weight || recompute→recompute»,"),
    ("spec/save_plan.rs", "weight: «input || recompute→recompute»,"),
    ("spec/save_plan.rs", "gamma: present.gamma && («input || weight || value→input || weight»),"),
    ("spec/save_plan.rs", "conv_output: «conv_output && !recompute→conv_output»,"),
    ("spec/save_plan.rs", "let value = «any→true» && derivative == Derivative::OfValue;"),
    ("spec/save_plan.rs", "input: «weight || gamma || recompute→weight || recompute»,"),
    ("spec/save_plan.rs", "weight: «input || gamma || recompute→input || recompute»,"),
    ("spec/save_plan.rs", "bias: present.bias && («gamma || value→value»),"),
    ("spec/save_plan.rs", "gamma: present.gamma && («input || weight || bias || value→input || weight || value»),"),
    ("spec/save_plan.rs", "statistics: «input || weight || bias || gamma || value→input || weight || gamma || value»,"),
    ("spec/save_plan.rs", "output: «any→true» && derivative == Derivative::OfOutput,"),
    ("spec/save_plan.rs", "gamma: present.gamma && («self.gamma || inverts→self.gamma»),"),
    ("spec/save_plan.rs", "beta: present.beta && («self.beta || inverts→self.beta»),"),
    ("spec/save_plan.rs", "        «statistics == StatisticsKind::Batch→true» && !residual\n"),
    ("spec/save_plan.rs", "options.recompute == Recompute::Norm && «statistics == StatisticsKind::Batch→true» && !residual"),
    ("spec/save_plan.rs", "options.recompute == Recompute::Norm && statistics == StatisticsKind::Batch && «!residual→true»"),
    ("spec/save_plan.rs", "if «any→true» && Self::may_rebuild_output("),
    ("spec/save_plan.rs", "input: «weight→true»,\n                weight: input,"),
    # Shapes.
    ("spec/problem.rs", "let (channels_out, expected) = (weight[0], «weight[1] * conv.groups→weight[1]»);"),
    ("spec/problem.rs", "let padded = input[dim + 2] + before + «after→before»;"),
    ("spec/problem.rs", "let kernel = «conv.dilation[dim]→1» * (weight[dim + 2] - 1) + 1;"),
    ("spec/problem.rs", "if «kernel > padded→kernel >= padded» {"),
    ("spec/problem.rs", "(padded - kernel) / «conv.stride[dim]→1» + 1"),
    ("spec/problem.rs", "if «batch_statistics→false» {\n            check_values"),
    ("spec/pool.rs", "let is_narrow = |dim: usize| «2 * options.padding[dim].0 <= options.kernel_size[dim]→2 * options.padding[dim].0 < options.kernel_size[dim]»;"),
    ("spec/pool.rs", "«!options.is_asymmetric()→true»\n"),
    ("spec/pool.rs", "&& «!options.ceil_mode→true»\n"),
    ("spec/pool.rs", "&& «options.dilation == [1, 1]→true»\n"),
    ("spec/pool.rs", "count + usize::from(«count * stride < size + padding→count * stride <= size + padding»)"),
    ("spec/activation.rs", "«matches!(self, Self::Identity | Self::Relu)→matches!(self, Self::Identity | Self::Relu | Self::Relu6)»"),
    ("spec/activation.rs", "if «negative_slope >= 0.0→true» => Derivative::OfOutput,"),
    # The nodes.
    ("autodiff/conv_bn.rs", "if «plan.statistics→true» {"),
    ("autodiff/conv_bn.rs", "self.output = «plan.output→true».then(|| output.clone());"),
    ("autodiff/conv_bn.rs", "tensor.filter(|_| «kept→true»).map(&mut checkpoint)"),
    ("autodiff/conv_bn.rs", "let (forward, shift) = forward(inputs, options, «plan.conv_output→true»);"),
    ("autodiff/conv.rs", "input: «weight.is_tracked()→true».then(|| prep.checkpoint(&input)),"),
    ("autodiff/conv.rs", "weight: «input.is_tracked()→true».then(|| prep.checkpoint(&weight)),"),
    ("autodiff/norm.rs", "if «operands.tracked() == Parents::default()→false» {"),
    ("autodiff/norm.rs", "let needs_input = «backward_options.needs_input()→true»;"),
    ("backend/tensors.rs", "«self.wanted.gamma→false» || (self.wanted.input && is_of_batch)"),
    ("backend/tensors.rs", "self.wanted.gamma || (self.wanted.input && «is_of_batch→true»)"),
    ("backend/tensors.rs", "self.wanted.gamma || («self.wanted.input→true» && is_of_batch)"),
    # The layers.
    ("layer/block.rs", "let on_autodiff = input.is_autodiff()\n            || «weight.is_autodiff()→false»"),
    ("layer/block.rs", "|| «bias.as_ref().is_some_and(Tensor::is_autodiff)→false»;"),
    ("layer/block.rs", "let training = on_autodiff && «self.norm.training.is_enabled()→true»;"),
    ("layer/block.rs", "(«training→true» && self.settings.track_running_stats)"),
    ("layer/block.rs", "(training && «self.settings.track_running_stats→true»)"),
    ("layer/block.rs", "values / («values - 1.0→values»)\n"),
    ("layer/block.rs", "    «take_pending(running)→()»;\n    running.value()"),
    ("portable/norm.rs", "B::float_mul_scalar(batch, «momentum→(1.0 - momentum)».into()),"),
    # Flex.
    ("flex/backward.rs", "&& «shift <= MOST_SHIFT * spread→true»"),
    ("flex/backward.rs", "«spread.is_finite()→true» && spread >="),
    ("flex/backward.rs", "&& «spread >= LEAST_SPREAD * least→true»"),
    ("flex/backward.rs", "&& «geometry.is_worth_storing(bytes)→true»"),
    ("flex/backward.rs", ".is_none_or(|most| «bytes <= most→true»);"),
    ("flex/backward.rs", "let wants_fixed_gamma = «wanted.gamma && batch_norm.is_none()→wanted.gamma»;"),
    ("flex/backward.rs", "let wants_fixed_gamma = «wanted.gamma && batch_norm.is_none()→false»;"),
    ("spec/norm.rs", "NormVariant::Tutorial if «variance == 0.0→false» => 0.0,"),
    ("flex/norm.rs", "let degrees = (self.values - «self.norm.variant.degrees_of_freedom()→0») as f64;"),
    ("flex/norm.rs", "let degrees = values - «norm.variant.degrees_of_freedom()→0»;"),
]

# Faults that no result can show, and why.
EXPLAINED = {
    "autodiff/norm.rs: backward_options.needs_input() → true": "what rebuilds the output keeps the input anyway",
    "backend/tensors.rs: is_of_batch → true": "the same",
    "backend/tensors.rs: self.wanted.input → true": "the same",
}


def switched(sources):
    """Writes the faults into the copy; returns a description of each."""
    names = []
    texts = {}
    for index, (file, piece) in enumerate(MUTANTS):
        before, after = re.search("«(.*?)→(.*?)»", piece, re.S).groups()
        plain = re.sub("«(.*?)→(.*?)»", lambda found: found.group(1), piece, flags=re.S)
        if file not in texts:
            texts[file] = (sources / file).read_text()
        names.append((f"{file}: {before} → {after}", file, plain, piece, index))
    for name, file, plain, piece, index in names:
        count = texts[file].count(plain)
        if count != 1:
            sys.exit(f"error: {name}: the piece stands {count} times in the file, wanted once")
    # From the end of each file, so that a piece is found as it was.
    for file, text in texts.items():
        here = [row for row in names if row[1] == file]
        spots = {}
        for _, _, plain, piece, index in here:
            start = text.index(plain) + piece.index("«")
            before, after = re.search("«(.*?)→(.*?)»", piece, re.S).groups()
            spots.setdefault((start, start + len(before)), []).append((index, after))
        for (start, end), choices in sorted(spots.items(), reverse=True):
            code = text[start:end]
            for index, after in choices:
                code = f"(if crate::mutant({index}) {{ {after} }} else {{ {code} }})"
            text = text[:start] + code + text[end:]
        (sources / file).write_text(text)
    library = sources / "lib.rs"
    library.write_text(library.read_text() + '''
pub(crate) fn mutant(index: usize) -> bool {
    static CURRENT: std::sync::OnceLock<Option<usize>> = std::sync::OnceLock::new();
    let read = || std::env::var("MUTANT").ok().and_then(|text| text.parse().ok());
    *CURRENT.get_or_init(read) == Some(index)
}
''')
    return [name for name, *_ in names]


def build(folder, target):
    """Builds the test programs; returns them by name."""
    command = ["cargo", "test", "--release", "--workspace", "--no-default-features"]
    command += ["--features", "burn-conv-bn-train/flex", "--no-run"]
    command += ["--message-format", "json-render-diagnostics"]
    command += [word for name in PROGRAMS for word in ("--test", name)]
    environment = dict(os.environ, CARGO_TARGET_DIR=str(target))
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit("error: the faults do not compile")
    programs = {}
    for line in done.stdout.splitlines():
        message = json.loads(line)
        is_ours = "crates/burn-conv-bn#" in message.get("package_id", "")
        if is_ours and message.get("executable") and message.get("profile", {}).get("test"):
            programs[message["target"]["name"]] = message["executable"]
    return programs


def verdict(programs, folder, index):
    """The first program that fails, or none."""
    environment = dict(os.environ, MUTANT=str(index))
    for name in PROGRAMS:
        try:
            done = subprocess.run([programs[name]], cwd=folder / "crates/burn-conv-bn", env=environment,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=900)
        except subprocess.TimeoutExpired:
            return f"{name} (hangs)"
        if done.returncode != 0:
            return name
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose description has this text")
    parser.add_argument("--target", type=pathlib.Path, default=ROOT / "target/mutants", help="cargo's target folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder) / "workspace"
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        for name in listed.stdout.decode().split("\0"):
            if name and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        names = switched(folder / SOURCES)
        programs = build(folder, args.target)
        lived = 0
        if found := verdict(programs, folder, -1):
            sys.exit(f"error: {found} fails without a fault")
        for index, name in enumerate(names):
            if args.only not in name:
                continue
            start = time.time()
            found = verdict(programs, folder, index)
            explained = EXPLAINED.get(name)
            result = f"found by {found}" if found else f"LIVES{f': {explained}' if explained else ''}"
            lived += not found and not explained
            print(f"{name}: {result} ({time.time() - start:.0f} s)", flush=True)
        print(f"{lived} of {len(names)} faults live without an explanation")
        sys.exit(1 if lived else 0)


if __name__ == "__main__":
    main()
