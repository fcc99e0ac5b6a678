#!/bin/sh
# The tests of the CPU kernels, the one place with pointer arithmetic, under AddressSanitizer: without and
# with AVX-512, which is compiled in and chosen where the processor has it.
set -eu
cd "$(dirname "$0")/.."

# A sanitizer is an unstable option of the compiler, which this opens on a stable toolchain.
export RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address
host=$(rustc -vV | sed -n 's/^host: //p')

# Doc tests would need the sanitizer in rustdoc too, and have no code of their own here.
for features in "" x86-v4; do
    cargo test --release -p burn-conv-bn-cpu --target "$host" --target-dir target/sanitize \
        --lib --tests --no-fail-fast --no-default-features --features "$features"
done
if ! grep -qs avx512f /proc/cpuinfo; then
    echo "sanitize: this processor lacks AVX-512: its code was built, and did not run" >&2
fi
