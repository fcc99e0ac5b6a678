# From here on in the folder with the programs. Results go to the folder $results.
# The system's libraries go first where they will do: PyTorch may want newer ones than the bundle's.
if ldd ./gpu-tests 2>&1 | grep -q 'not found'; then
    export LD_LIBRARY_PATH="$PWD/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
fi
export BURN_CONV_BN_OFFLINE=1

summary=
failed=

# note NAME HOW: adds a line to the summary.
note() {
    summary="$summary$(printf '%-19s%s' "$1" "$2")
"
}

# check NAME COMMAND..: runs the command. Whatever fails is named at the end, and in the exit status.
check() {
    name=$1
    shift
    echo "== $name =="
    if "$@"; then
        note "$name" passed
    else
        note "$name" "FAILED (exit status $?)"
        failed="$failed $name"
    fi
}

# The tests of that name, in a process of their own, one after the other.
run_tests() {
    if ! ./gpu-tests --list "$1::" | grep -q ': test$'; then
        echo "error: there are no tests of that name" >&2
        return 1
    fi
    ./gpu-tests --test-threads 1 --nocapture "$1::"
}

# Why there may be no CUDA.
why() {
    if ! command -v nvidia-smi >/dev/null 2>&1; then
        echo "nvidia-smi, which comes with NVIDIA's driver, is not installed"
    elif ! nvidia-smi >/dev/null 2>&1; then
        echo "nvidia-smi finds no device"
    else
        echo "nvidia-smi does find a device, so the reason is what is printed above"
    fi
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null

# The first to use the device: it tells whether there is one.
job="--device cuda --dataset synthetic --train-limit 256 --test-limit 64"
./mnist compare $job --batch-size 128 || {
    echo "error: nothing trains on CUDA here ($(why)); nothing else was run" >&2
    exit 1
}
note "mnist compare" passed

for tests in @TESTS@; do
    check "$tests" run_tests "$tests"
done

# TF32 may be what a device's tensor cores compute f32 in: the losses need not be those of f64.
echo "== mnist parity =="
if ./mnist parity --device cuda --dataset synthetic --train-limit 1024 --batch-size 64 --steps 8; then
    note "mnist parity" passed
else
    note "mnist parity" "failed, which does not count where f32 is computed as TF32"
fi

# Only PyTorch tells TF32 from f32.
peer=
precisions="f32 f16 bf16"
if python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    peer="--peer pytorch"
    precisions="f32 tf32 f16 bf16"
fi
for precision in ${BURN_CONV_BN_PRECISIONS:-$precisions}; do
    check "benchmark in $precision" ./xtask bench --device cuda --precision "$precision" \
        --worker "$PWD/bench-worker" --peer-script "$PWD/pytorch.py" $peer \
        --json "$results/gpu-bench-$precision.json" "$@"
done

echo "== summary =="
printf '%s' "$summary"
if [ -n "$failed" ]; then
    echo "FAILED:$failed" >&2
    exit 1
fi
echo "All passed."
exit 0
