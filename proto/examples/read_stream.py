#!/usr/bin/env python3
"""Reads the walmirror stream with protoc-generated code and prints every row as a line of JSON.

    protoc --python_out=DIR walmirror.proto
    psql -XAtc "SELECT encode(data, 'hex') FROM pg_logical_slot_peek_binary_changes('SLOT', NULL, NULL)" |
        read_stream.py DIR

stdin: one Frame a line, in hex. See docs/wire.md for what the fields mean.
"""

import datetime
import json
import math
import sys
import uuid

sys.path.insert(0, sys.argv[1])
import walmirror_pb2 as pb  # noqa: E402

EPOCH = datetime.datetime(2000, 1, 1)


def instant(count, unit, low, high, show):
    """A date or timestamp in ISO 8601; a bare count where Python's calendar (years 1 to 9999) ends."""
    if count in (low, high):
        return "infinity" if count == high else "-infinity"
    try:
        return show(EPOCH + datetime.timedelta(**{unit: count}))
    except OverflowError:
        return count


def date(days):
    return instant(days, "days", -(2**31), 2**31 - 1, lambda day: day.date().isoformat())


def timestamp(micros, zone=""):
    return instant(micros, "microseconds", -(2**63), 2**63 - 1, lambda time: time.isoformat() + zone)


def number(value):
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def numeric(ints, texts):
    scale = next(ints)
    if scale < 0:
        return next(texts).decode()
    digits = str(abs(mantissa := next(ints))).rjust(scale + 1, "0")
    point = len(digits) - scale
    return ("-" if mantissa < 0 else "") + digits[:point] + ("." + digits[point:] if scale else "")


def bit(bitmap, column):
    return column // 8 < len(bitmap) and bitmap[column // 8] >> column % 8 & 1


def read_row(columns, row):
    """Walks the columns and takes, for each that has a value, the next item of its group. Returns the values by name,
    and the names of the columns whose TOASTed value did not change and is not in the stream."""
    ints, texts, doubles, floats = iter(row.ints), iter(row.texts), iter(row.doubles), iter(row.floats)
    take = {
        pb.TEXT: lambda: next(texts).decode(errors="replace"),
        pb.BOOL: lambda: next(ints) == 1,
        pb.INT: lambda: next(ints),
        pb.OID: lambda: next(ints),
        pb.FLOAT4: lambda: number(next(floats)),
        pb.FLOAT8: lambda: number(next(doubles)),
        pb.NUMERIC: lambda: numeric(ints, texts),
        pb.DATE: lambda: date(next(ints)),
        pb.TIMESTAMP: lambda: timestamp(next(ints)),
        pb.TIMESTAMPTZ: lambda: timestamp(next(ints), "+00:00"),
        pb.UUID: lambda: str(uuid.UUID(bytes=next(texts))),
        pb.BYTEA: lambda: "\\x" + next(texts).hex(),
        pb.JSONB: lambda: next(texts).decode(errors="replace"),
    }
    values, unchanged = {}, []
    for place, column in enumerate(columns):
        if bit(row.nulls, place):
            values[column.name] = None
        elif bit(row.unchanged, place):
            unchanged.append(column.name)
        else:
            values[column.name] = take[column.encoding]()
    left = [*ints, *texts, *doubles, *floats]
    assert not left, "the row was written for another version of the table"
    return values, unchanged


def main():
    relations = {}
    for line in sys.stdin:
        relation = None
        for record in pb.Frame.FromString(bytes.fromhex(line)).records:
            if record.kind == pb.RELATION:
                relations[record.relation_def.index] = record.relation_def
            elif record.kind in (pb.INSERT, pb.UPDATE, pb.DELETE):
                relation = relations[record.relation] if record.relation else relation
                values, unchanged = read_row(relation.columns, record)
                out = {"kind": pb.Kind.Name(record.kind), "table": f"{relation.schema}.{relation.name}", "row": values}
                if unchanged:
                    out["unchanged"] = unchanged
                if record.HasField("old_key"):
                    out["old_key"], _ = read_row(relation.columns, record.old_key)
                print(json.dumps(out, ensure_ascii=False))


if __name__ == "__main__":
    main()
