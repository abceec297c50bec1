"""The consumer that people write by hand: psycopg2 reads wal2json, redis-py (with hiredis) writes pipelines of 1000.

    consumer.py CONNINFO REDIS_PORT SLOT

It does what a careful author would do for speed: format version 2 (a row a message, so memory is bounded), numbers kept as
text, pipelines without MULTI, feedback once a pipeline; what is queued goes out when nothing more is there to read. It keeps
no progress, takes every table to have the key column id, and ends at a logical message with the prefix bench, which the
benchmark writes behind a load.
"""
import json
import select
import sys

import psycopg2
import psycopg2.extras
import redis

BATCH = 1000


def text(value):
    if value is True:
        return "true"
    if value is False:
        return "false"
    return value


def main():
    conninfo, port, slot = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    connection = psycopg2.connect(conninfo, connection_factory=psycopg2.extras.LogicalReplicationConnection)
    cursor = connection.cursor()
    cursor.start_replication(slot_name=slot, decode=True, options={"format-version": "2", "include-transaction": "true"})
    pipeline = redis.Redis(port=port).pipeline(transaction=False)
    loads = json.JSONDecoder(parse_float=str, parse_int=str).decode
    queued = 0
    position = 0
    while True:
        message = cursor.read_message()
        if message is None:
            if queued:
                pipeline.execute()
                queued = 0
                continue
            select.select([cursor], [], [], 1.0)
            continue
        change = loads(message.payload)
        action = change["action"]
        if action in "IU":
            row = {c["name"]: text(c["value"]) for c in change["columns"] if c["value"] is not None}
            pipeline.hset(change["table"] + ":" + row["id"], mapping=row)
            queued += 1
        elif action == "D":
            pipeline.delete(change["table"] + ":" + change["identity"][0]["value"])
            queued += 1
        elif action == "C":
            position = message.data_start
        elif action == "M" and change["prefix"] == "bench":
            break
        if queued >= BATCH:
            pipeline.execute()
            queued = 0
            cursor.send_feedback(flush_lsn=position)
    pipeline.execute()
    cursor.send_feedback(flush_lsn=position, force=True)


main()
