# From here on in the folder with the programs. Results go to the folder $results; relative names that
# the environment gives are from the folder $caller.
# The system's libraries go first where they will do: PyTorch may want newer ones than the bundle's.
if ldd ./gpu-tests 2>&1 | grep -q 'not found'; then
    export LD_LIBRARY_PATH="$PWD/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
fi
export BURN_CONV_BN_OFFLINE=1

# Options but --prepared are the benchmark's.
prepared=
for option do
    shift
    case $option in
    --prepared) prepared=yes ;;
    *) set -- "$@" "$option" ;;
    esac
done
if [ -n "$prepared" ] && ! command -v timeout >/dev/null 2>&1; then
    echo "error: --prepared needs the program timeout; nothing was run" >&2
    exit 1
fi

summary=
failed=
# When the part that runs must have ended, in seconds as `date +%s` has them; empty without --prepared.
end=
[ -z "$prepared" ] || end=$(date +%s)

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
    "$@"
    status=$?
    if [ "$status" -eq 0 ]; then
        note "$name" passed
        return
    fi
    failed="$failed $name"
    case $end,$status in
    ?*,124 | ?*,137) note "$name" "TIMED OUT" ;;
    *) note "$name" "FAILED (exit status $status)" ;;
    esac
}

# limited COMMAND..: runs a program, until $end at most. A program that ignores SIGTERM is killed 2 s later.
limited() {
    if [ -z "$end" ]; then
        "$@"
        return
    fi
    limit=$((end - $(date +%s)))
    [ "$limit" -ge 1 ] || limit=1
    timeout -k 2 "$limit" "$@"
}

# part SECONDS NAME COMMAND..: a check that has so many seconds, and what the parts before it left of theirs.
part() {
    end=$((end + $1))
    shift
    check "$@"
}

# The tests of that name, in a process of their own, one after the other.
run_tests() {
    if ! limited ./gpu-tests --list "$1::" | grep -q ': test$'; then
        echo "error: there are no tests of that name" >&2
        return 1
    fi
    limited ./gpu-tests --test-threads 1 --nocapture "$1::"
}

# Whether there is a PyTorch with CUDA.
has_torch() {
    limited python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null
}

# bench PRECISION RESULTS OPTIONS..
bench() {
    precision=$1
    json=$2
    shift 2
    limited ./xtask bench --device cuda --precision "$precision" \
        --worker "$PWD/bench-worker" --peer-script "$PWD/pytorch.py" $peer \
        --json "$results/$json.json" "$@"
}

# Packs what autotuning has found. The old archive stays until the new one is whole.
pack() {
    new=$results/tuning.tar.gz.new
    tar --create --gzip --file "$new" --directory "$tuning" . && mv "$new" "$results/tuning.tar.gz" && return
    rm -f "$new"
    return 1
}

# The end of either run.
conclude() {
    # Not under a timeout: it takes seconds.
    end=
    if [ -n "$(ls -A "$tuning")" ]; then
        check tuning.tar.gz pack
    fi
    echo "== summary =="
    printf '%s' "$summary"
    if [ -n "$failed" ]; then
        echo "FAILED:$failed" >&2
        exit 1
    fi
    echo "All passed."
    exit 0
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

# The folder of what autotuning finds, which cubecl.toml names by the link.
tuning=${TUNING:-$results/tuning}
tuning=$(cd "$caller" && mkdir -p "$tuning" && cd "$tuning" && pwd) || exit 1
ln -s "$tuning" tuned || exit 1
archive=${TUNING_ARCHIVE:-}
case $archive in
'') archive=$results/tuning.tar.gz ;;
/*) ;;
*) archive=$caller/$archive ;;
esac
if [ -n "${TUNING_ARCHIVE:-}" ] && ! [ -f "$archive" ]; then
    echo "error: there is no file $archive, which TUNING_ARCHIVE names" >&2
    exit 1
fi
if [ -n "$(ls -A "$tuning")" ]; then
    echo "tuning: goes on with what is in $tuning"
elif [ -f "$archive" ]; then
    mkdir unpacked || exit 1
    if tar --extract --gzip --file "$archive" --directory unpacked && cp -R unpacked/. "$tuning"; then
        echo "tuning: goes on with what is in $archive"
    elif [ -n "${TUNING_ARCHIVE:-}" ]; then
        echo "error: cannot unpack $archive" >&2
        exit 1
    else
        echo "tuning: starts anew, since $archive cannot be unpacked" >&2
    fi
    rm -rf unpacked
else
    echo "tuning: starts anew, in $tuning"
fi

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null

# The prepared run: 560 s at most, which leaves 40 s of ten minutes for unpacking and packing. A part has
# the seconds before its name, and what the parts before it left. A benchmark that is ended has no figures,
# but what it tuned is kept.
if [ -n "$prepared" ]; then
    # 160 s: whether the results are right.
    part 60 kernels run_tests kernels
    part 60 cube run_tests cube
    part 20 cube_launches run_tests cube_launches
    part 20 cube_memory run_tests cube_memory
    # 20 s: the import of PyTorch, which may be read from a slow disk.
    end=$((end + 20))
    peer=
    contenders="--contender fused --contender norm-conv --contender unfused"
    if has_torch; then
        peer="--peer pytorch"
        contenders="$contenders --contender eager --contender compile"
    else
        note PyTorch "left out: python3 has none that finds CUDA"
    fi
    # 380 s: steps. ResNet-50 has the most shapes to tune, and those of f32 come first.
    options="--rounds 5 --profile $contenders"
    part 70 "net-2048 in f32" bench f32 gpu-bench-net-2048-f32 --only net-2048 $options "$@"
    part 60 "net-2048 in bf16" bench bf16 gpu-bench-net-2048-bf16 --only net-2048 $options "$@"
    part 150 "resnet50 in f32" bench f32 gpu-bench-resnet50-f32 --only resnet50 --batch 64 $options "$@"
    part 100 "resnet50 in bf16" bench bf16 gpu-bench-resnet50-bf16 --only resnet50 --batch 64 $options "$@"
    conclude
fi

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
if has_torch; then
    peer="--peer pytorch"
    precisions="f32 tf32 f16 bf16"
fi
for precision in ${BURN_CONV_BN_PRECISIONS:-$precisions}; do
    check "benchmark in $precision" bench "$precision" "gpu-bench-$precision" "$@"
done

conclude
exit 0
