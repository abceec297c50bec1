#!/bin/sh
# Installs the extension into the server that a pg_config belongs to: `scripts/install.sh PG_CONFIG LIB.so`.
# `make install` calls it for the user's server, scripts/postgres.sh for a private one.
set -eu

config=$1
library=$2
top=$(cd "$(dirname "$0")/.." && pwd)
libdir=$("$config" --pkglibdir)
extdir=$("$config" --sharedir)/extension

# A running server has the old library mapped: replace the file, never write into it.
put() {
    install -m "$1" "$2" "$3.new.$$"
    mv -f "$3.new.$$" "$3"
}

install -d "$libdir" "$extdir"
put 755 "$library" "$libdir/walmirror.so"
put 644 "$top/sql/walmirror.control" "$extdir/walmirror.control"
for script in "$top"/sql/walmirror--*.sql; do
    put 644 "$script" "$extdir/$(basename "$script")"
done
