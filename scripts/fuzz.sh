#!/bin/sh
# Builds the fuzz targets with the stable compiler and runs each for so many seconds, two at once: scripts/fuzz.sh 60 [target…]
# What a run finds is kept in tests/fuzz/corpus for the next one; an input that breaks something, in tests/fuzz/artifacts.
# Run one again with it: tests/fuzz/target/<host>/release/<target> tests/fuzz/artifacts/<file>
set -eu
cd "$(dirname "$0")/../tests/fuzz"
seconds=$1
shift
[ $# -gt 0 ] || set -- frame key_template label connection_string
host=$(rustc -vV | sed -n 's/^host: //p')
# What cargo-fuzz passes, but for the address sanitizer, which only a nightly compiler has. A target of its own keeps the
# flags away from build scripts.
RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
-Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing -Cdebug-assertions" \
	cargo build --release --quiet --target "$host" --target-dir target
mkdir -p artifacts logs
echo "fuzzing for $seconds s each: $*"
# shellcheck disable=SC2016
printf '%s\n' "$@" | xargs -P 2 -I '{}' sh -c '
	seeds=seeds/$1
	[ "$1" = frame ] && seeds=../../proto/tests/golden
	mkdir -p "corpus/$1"
	if "target/$2/release/$1" "corpus/$1" "$seeds" -max_total_time="$3" -timeout=10 -rss_limit_mb=1024 -max_len=4096 \
		-print_final_stats=1 -artifact_prefix="artifacts/$1-" > "logs/$1" 2>&1; then
		echo "$1: $(sed -n "s/^stat::number_of_executed_units: *//p" "logs/$1") executions, nothing found"
	else
		tail -40 "logs/$1"
		echo "$1: FOUND SOMETHING, see above and tests/fuzz/artifacts"
		exit 255
	fi' sh '{}' "$host" "$seconds"
