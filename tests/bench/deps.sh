#!/bin/sh
# What `make bench` needs beside the product: the plugins of the peers and the Python client libraries of the hand-written
# consumer. What cannot be had is left out; the benchmark then skips the contestants that need it, and says so.
#
#   tests/bench/deps.sh        prints the environment that the benchmark finds them by
set -u

if [ "$(id -u)" = 0 ]; then
    cache=/var/cache/walmirror
    apt=apt-get
else
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/walmirror
    apt="sudo -n apt-get"
fi

# The system's server is where Debian puts the plugins; the private server has a library directory of its own.
system=/usr/lib/postgresql/15/lib
private=$("$WALMIRROR_PG_BIN/pg_config" --pkglibdir)
case $("$WALMIRROR_PG_BIN/pg_config" --version) in
    "PostgreSQL 15."*)
        for plugin in wal2json decoderbufs; do
            [ -f "$system/$plugin.so" ] ||
                DEBIAN_FRONTEND=noninteractive $apt install -y -q --no-install-recommends "postgresql-15-$plugin" >&2 ||
                echo "no $plugin: install the package postgresql-15-$plugin" >&2
            [ -f "$private/$plugin.so" ] || cp "$system/$plugin.so" "$private/" || true
        done
        ;;
esac

# --system-site-packages would make the result depend on the machine.
venv=$cache/bench-python
if ! [ -f "$venv/complete" ]; then
    python3 -m venv "$venv" >&2 2>&1 || { DEBIAN_FRONTEND=noninteractive $apt install -y -q python3-venv >&2 && python3 -m venv "$venv" >&2; }
    "$venv/bin/pip" install --quiet psycopg2-binary==2.9.11 redis==7.1.0 hiredis==3.3.0 >&2 && touch "$venv/complete"
fi
[ -f "$venv/complete" ] && echo "export WALMIRROR_BENCH_PYTHON='$venv/bin/python'"
exit 0
