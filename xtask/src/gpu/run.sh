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
export LD_LIBRARY_PATH="$bundle/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export BURN_CONV_BN_OFFLINE=1

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null

# The first to use the device: it says so if there is none.
job="--device cuda --dataset synthetic --train-limit 256 --test-limit 64"
./mnist compare $job --batch-size 128 --artifacts "$bundle/warm-up" || {
    echo "error: the network does not train on CUDA here; nothing else was run" >&2
    exit 1
}

failed=
check() {
    echo "== $* =="
    "$@" || failed="$failed $1"
}
check ./kernels --test-threads 1 --nocapture
check ./cube --test-threads 1
check ./cube_memory --nocapture
# TF32 may be what a device's tensor cores compute f32 in: the losses need not be those of f64.
echo "== mnist parity =="
./mnist parity --device cuda --dataset synthetic --train-limit 1024 --batch-size 64 --steps 8

peer=
python3 -c 'import torch' 2>/dev/null && peer="--peer pytorch"
echo "== benchmark =="
./xtask bench --device cuda --worker "$bundle/bench-worker" --peer-script "$bundle/pytorch.py" \
    $peer --json "$results/gpu-bench.json" "$@" || failed="$failed bench"

if [ -n "$failed" ]; then
    echo "FAILED:$failed" >&2
    exit 1
fi
echo "All passed."
exit 0
