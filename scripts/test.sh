#!/bin/sh
# Runs tests as `cargo test` does with the same arguments, but two binaries at a time and all of them to their end: each starts servers of
# its own, and a test waits more than it computes. What a binary prints comes when it has ended. Tests in documentation are not run: there
# are none.
set -euf
cd "$(dirname "$0")/.."

what=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    [ "$1" = --no-fail-fast ] || what="$what $1"
    shift
done
[ $# -eq 0 ] || shift

results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
# shellcheck disable=SC2086
cargo test --no-run --message-format=json-render-diagnostics $what > "$results/built"
# Of each binary the folder of its package, its source and itself; the long ones happen to be at the end of the alphabet.
sed -n 's/.*"manifest_path":"\([^"]*\)\/Cargo.toml".*"src_path":"\([^"]*\)".*"overflow_checks":[a-z]*,"test":true.*"executable":"\([^"]*\)".*/\1\n\2\n\3/p' \
    "$results/built" | paste -d '\t' - - - | sort -r | tr '\t' '\n' > "$results/binaries"
touch "$results/failed"

# shellcheck disable=SC2016
xargs -d '\n' -n 3 -P 2 sh -fc '
	results=$1 arguments=$2 package=$3 source=${4#"$PWD/"} binary=$5
	output=$results/$(basename "$binary")
	(cd "$package" && CARGO_MANIFEST_DIR=$package "$binary" $arguments) > "$output" 2>&1 || echo "$source" >> "$results/failed"
	exec 9> "$results/lock"
	flock 9
	printf "\n     Running %s\n" "$source"
	cat "$output"' sh "$results" "$*" < "$results/binaries"
if [ -s "$results/failed" ]; then
    echo
    echo "failed, see above:" $(cat "$results/failed")
    exit 1
fi
