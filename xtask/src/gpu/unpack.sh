#!/bin/sh
# Tests and benchmarks of burn-conv-bn on CUDA, packed by `cargo xtask gpu-bundle`. Unpacks itself
# into a temporary folder, checks that the results are right, and then measures. Options after the
# script's name are passed on to the benchmark, as in `sh burn-conv-bn-cuda.sh --quick`. With
# `--prepared` it runs a selection within ten minutes. Results go to the folder that OUT names, or to
# the one it is started in.
#
# What autotuning finds is kept in the folder that TUNING names, by default `tuning` in that of the
# results, and packed as tuning.tar.gz in the results. If the folder is empty, the archive that
# TUNING_ARCHIVE names is unpacked there first, by default the one in the results.
set -u
caller=$PWD
results=$(cd "${OUT:-.}" && pwd) || exit 1
bundle=$(mktemp -d) || exit 1
trap 'rm -rf "$bundle"' EXIT
tail -n +@ARCHIVE_LINE@ "$0" | tar --extract --xz --file - --directory "$bundle" || {
    echo "error: cannot unpack the bundle; tar needs xz" >&2
    exit 1
}
cd "$bundle" || exit 1
