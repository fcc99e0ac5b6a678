#!/bin/sh
# Tests and benchmarks of burn-conv-bn on CUDA, packed by `cargo xtask gpu-bundle`. Unpacks itself
# into a temporary folder, checks that the results are right, and then measures. Options after the
# script's name are passed on to the benchmark, as in `sh burn-conv-bn-cuda.sh --quick`. Results go
# to the folder that OUT names, or to the one it is started in.
set -u
results=$(cd "${OUT:-.}" && pwd) || exit 1
bundle=$(mktemp -d) || exit 1
trap 'rm -rf "$bundle"' EXIT
tail -n +@ARCHIVE_LINE@ "$0" | tar --extract --xz --file - --directory "$bundle" || {
    echo "error: cannot unpack the bundle; tar needs xz" >&2
    exit 1
}
cd "$bundle" || exit 1
