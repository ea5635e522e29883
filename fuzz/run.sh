#!/usr/bin/env bash
# Runs each fuzz target for so many seconds (60 unless given), from the corpus of the repository:
#   fuzz/run.sh [SECONDS] [TARGET ...]
# Needs `cargo install cargo-fuzz` and a nightly toolchain. What is found lies in fuzz/artifacts/TARGET; new inputs in fuzz/corpus-grown.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
shift || true
targets=("$@")
[ ${#targets[@]} -gt 0 ] || mapfile -t targets < <(cargo +nightly fuzz list)
failed=0
for target in "${targets[@]}"; do
  mkdir -p "fuzz/corpus-grown/$target" "fuzz/artifacts/$target"
  printf '== %s\n' "$target"
  # Memory: 3 GiB for all, 1 GiB for one allocation. Time: 20 s for one input.
  cargo +nightly fuzz run --sanitizer none "$target" "fuzz/corpus-grown/$target" "fuzz/corpus/$target" -- \
    -max_total_time="$seconds" -rss_limit_mb=3072 -malloc_limit_mb=1024 -timeout=20 -max_len=16384 -print_final_stats=1 \
    2>&1 | grep -E 'ERROR|panicked|SUMMARY|Test unit written|number_of_executed_units|peak_rss_mb|slowest_unit' || failed=1
done
exit $failed
