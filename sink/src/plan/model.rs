//! Random changes planned, sent to a real Redis and compared with a plain model of what the keys must hold: for hash,
//! string and JSON, with unchanged TOAST, key changes, lost keys, truncates, several batches, and every batch sent twice
//! now and then (INVARIANT I3). A failure prints its seed.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::expect_used
)]

use std::collections::{BTreeMap, BTreeSet};

use redis::Value;
use walmirror_proto::Lsn;
use walmirror_proto::pb::{Column, Encoding, Kind, Relation, ValueKind};
use walmirror_proto::row::TupleRef;
use walmirror_proto::writer::TupleBuilder;

use super::*;
use crate::progress::{Step, write_step};
use crate::redis::server::Server;
use crate::redis::{Claim, Connection, Identity, Segment, Writer};

const OID: u32 = 77;

/// A row of the test table: id text, small int, big text (TOASTed), note text.
#[derive(Clone, Debug, PartialEq)]
struct Row {
    id: String,
    small: Option<i64>,
    big: Option<String>,
    note: Option<String>,
}

fn relation(value: ValueKind) -> Relation {
    let column = |name: &str, encoding: Encoding, in_value| Column {
        name: name.into(),
        type_oid: 25,
        encoding: encoding.into(),
        in_value,
    };
    let all = value != ValueKind::String;
    Relation {
        index: 1,
        oid: OID,
        schema: "public".into(),
        name: "t".into(),
        value: value.into(),
        key: "t:{id}".into(),
        fingerprint: 5,
        columns: vec![
            column("id", Encoding::Text, all),
            column("small", Encoding::Int, all),
            column("big", Encoding::Text, true),
            column("a \"note\"", Encoding::Text, all),
        ],
        ..Relation::default()
    }
}

/// The bytes of a row; `unchanged`: the big column is not in the stream.
fn tuple(row: &Row, unchanged: bool, only_key: bool) -> Vec<u8> {
    let mut builder = TupleBuilder::default();
    builder.text(row.id.as_bytes());
    if only_key {
        (0..3).for_each(|_| builder.null());
    } else {
        match row.small {
            Some(value) => builder.int(value),
            None => builder.null(),
        }
        match (&row.big, unchanged) {
            (_, true) => builder.unchanged(),
            (Some(text), false) => builder.text(text.as_bytes()),
            (None, false) => builder.null(),
        }
        match &row.note {
            Some(text) => builder.text(text.as_bytes()),
            None => builder.null(),
        }
    }
    let mut bytes = Vec::new();
    builder.write_tuple(&mut bytes);
    bytes
}

/// What Redis must hold for a row: None for no key.
fn rendering(value: ValueKind, row: &Row) -> Option<BTreeMap<String, String>> {
    let json = |text: &String| serde_json::to_string(text).unwrap();
    let mut fields = BTreeMap::new();
    match value {
        ValueKind::Hash => {
            fields.insert("id".to_owned(), row.id.clone());
            fields.extend(row.small.map(|value| ("small".to_owned(), value.to_string())));
            fields.extend(row.big.clone().map(|value| ("big".to_owned(), value)));
            fields.extend(row.note.clone().map(|value| ("a \"note\"".to_owned(), value)));
        }
        ValueKind::String => {
            fields.insert(String::new(), row.big.clone()?);
        }
        ValueKind::Json => {
            let null = || "null".to_owned();
            let text = format!(
                "{{\"id\": {}, \"big\": {}, \"small\": {}, \"a \\\"note\\\"\": {}}}",
                json(&row.id),
                row.big.as_ref().map_or_else(null, json),
                row.small.map_or_else(null, |value| value.to_string()),
                row.note.as_ref().map_or_else(null, json),
            );
            fields.insert(String::new(), text);
        }
    }
    Some(fields)
}

fn stored(connection: &mut Connection, value: ValueKind) -> BTreeMap<String, BTreeMap<String, String>> {
    let text = |value: Value| {
        if let Value::BulkString(bytes) = value {
            String::from_utf8(bytes).unwrap()
        } else {
            panic!("{value:?}")
        }
    };
    let Value::Array(keys) = connection.call("list", &[b"KEYS", b"t:*"]).unwrap() else {
        panic!("no list")
    };
    let mut all = BTreeMap::new();
    for key in keys.into_iter().map(text) {
        let fields = if value == ValueKind::Hash {
            let Value::Array(items) = connection.call("read", &[b"HGETALL", key.as_bytes()]).unwrap() else {
                panic!("no hash")
            };
            let mut items = items.into_iter().map(text);
            let mut fields = BTreeMap::new();
            while let (Some(field), Some(value)) = (items.next(), items.next()) {
                fields.insert(field, value);
            }
            fields
        } else {
            BTreeMap::from([(
                String::new(),
                text(connection.call("read", &[b"GET", key.as_bytes()]).unwrap()),
            )])
        };
        all.insert(key, fields);
    }
    all
}

struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }

    fn text(&mut self) -> String {
        let pieces = [
            "a", "\"", "\\", "{", "}", "[", "]", ", ", ": ", "ü", "\n", "\u{1}", "null", "\\\"",
        ];
        let count = self.roll(6);
        (0..count)
            .map(|_| pieces[self.roll(pieces.len() as u64) as usize])
            .collect()
    }

    fn maybe(&mut self) -> Option<String> {
        (self.roll(4) > 0).then(|| self.text())
    }

    fn row(&mut self, id: String) -> Row {
        Row {
            id,
            small: (self.roll(3) > 0).then(|| self.roll(1000) as i64 - 500),
            big: self.maybe(),
            note: self.maybe(),
        }
    }
}

/// The table, and which of its rows Redis may not have, because a patch met no key.
#[derive(Default)]
struct Table {
    rows: BTreeMap<String, Row>,
    lost: BTreeSet<String>,
}

struct Fixture {
    planner: Planner,
    gate: Gate,
    mapping: Mapping,
    batch: Batch,
    replay: bool,
}

impl Fixture {
    fn plan(&mut self, trust: Trust, kind: Kind, tuple: &[u8], old_key: Option<&[u8]>) {
        let change = Change {
            kind,
            tuple: TupleRef::parse(tuple).unwrap(),
            old_key: old_key.map(|bytes| TupleRef::parse(bytes).unwrap()),
        };
        self.planner
            .change(&mut self.batch, &mut self.gate, 9, &self.mapping, trust, &change)
            .unwrap();
    }

    fn change(&mut self, dice: &mut Dice, table: &mut Table, trust: Trust) {
        let id = format!("k{}", dice.roll(8));
        let new = dice.row(id.clone());
        let Some(old) = table.rows.get(&id).cloned() else {
            self.plan(trust, Kind::Insert, &tuple(&new, false, false), None);
            table.lost.remove(&id);
            table.rows.insert(id, new);
            return;
        };
        match dice.roll(8) {
            0 => {
                self.plan(trust, Kind::Delete, &tuple(&old, false, true), None);
                table.lost.remove(&id);
                table.rows.remove(&id);
            }
            1 => {
                let moved = format!("k{}", 8 + dice.roll(4));
                if table.rows.contains_key(&moved) {
                    return;
                }
                // A rename is the one command that is not the same twice; the progress in its EXEC keeps it from that.
                let unchanged = old.big.is_some() && !self.replay && dice.roll(2) == 0;
                let new = Row {
                    id: moved.clone(),
                    big: if unchanged {
                        old.big.clone()
                    } else {
                        new.big.clone()
                    },
                    ..new
                };
                self.plan(
                    trust,
                    Kind::Update,
                    &tuple(&new, unchanged, false),
                    Some(&tuple(&old, false, true)),
                );
                let was_lost = table.lost.remove(&id);
                if unchanged && was_lost {
                    table.lost.insert(moved.clone());
                }
                table.rows.remove(&id);
                table.rows.insert(moved, new);
            }
            2..=4 if old.big.is_some() => {
                let new = Row {
                    big: old.big.clone(),
                    ..new
                };
                self.plan(trust, Kind::Update, &tuple(&new, true, false), None);
                table.rows.insert(id, new);
            }
            _ => {
                self.plan(trust, Kind::Update, &tuple(&new, false, false), None);
                table.lost.remove(&id);
                table.rows.insert(id, new);
            }
        }
    }
}

fn schedule(server: &Server, value: ValueKind, seed: u64) {
    let mut reader = server.connect();
    reader.call("empty", &[b"FLUSHALL"]).unwrap();
    let keys = RedisKeys::new("s");
    let claim = Claim::take(
        server.connect(),
        &keys,
        "s",
        &Identity::default(),
        Some(Lsn(1)),
        |_| Ok(()),
    )
    .unwrap();
    let mut fixture = Fixture {
        planner: Planner::new(keys.clone(), claim.scripts.clone()),
        gate: Gate::new(1 << 16, 0, 0),
        mapping: Mapping::new(&relation(value)).unwrap(),
        batch: Batch::new(),
        replay: false,
    };
    let mut writer = Writer::new(claim, keys.clone()).unwrap();
    let (mut dice, mut table) = (Dice(seed), Table::default());
    for round in 0..25u64 {
        let before = (dice.0, table.rows.clone(), table.lost.clone());
        let trust = if dice.roll(4) == 0 {
            Trust::Refreshing
        } else {
            Trust::Settled
        };
        let changes = dice.roll(12);
        fixture.replay = dice.roll(3) == 0;
        for twice in [false, true] {
            if twice {
                // The same batch again: planned anew from the same state, applied to the later one.
                if !fixture.replay {
                    break;
                }
                (dice.0, table.rows, table.lost) = before.clone();
                [4, 12, 3].iter().for_each(|sides| _ = dice.roll(*sides));
            }
            Writer::open(fixture.batch.bookkeeping());
            for _ in 0..changes {
                if dice.roll(40) == 0 {
                    fixture.batch.unlink_written(|writer, _| writer == OID);
                    let all: Vec<String> = table.rows.keys().cloned().collect();
                    for id in all {
                        let key = format!("t:{id}");
                        fixture.planner.remove(
                            &mut fixture.batch,
                            OID,
                            fixture.gate.hash(key.as_bytes()),
                            key.as_bytes(),
                        );
                    }
                    (table.rows, table.lost) = Default::default();
                }
                fixture.change(&mut dice, &mut table, trust);
            }
            let step = Step {
                lsn: Lsn(round + 2),
                last: None,
                part: None,
                clear_part: false,
            };
            write_step(fixture.batch.bookkeeping(), &keys, &step);
            Writer::close(fixture.batch.bookkeeping(), &keys);
            fixture.batch.seal();
            let batch = std::mem::take(&mut fixture.batch);
            let segment = Segment {
                batch,
                opens: true,
                step: Some(step),
                ..Segment::default()
            };
            let applied = writer.apply(segment, None, &|| false).unwrap().expect("an EXEC");
            assert_eq!(applied.step, step);
        }
        check(
            &mut reader,
            &keys,
            value,
            &table,
            &format!("{value:?} seed {seed} round {round}"),
        );
        if dice.roll(3) == 0 {
            // A key expires or is evicted.
            let id = format!("k{}", dice.roll(12));
            reader
                .call("lose", &[b"UNLINK", format!("t:{id}").as_bytes()])
                .unwrap();
            if table.rows.contains_key(&id) {
                table.lost.insert(id);
            }
        }
    }
}

/// Every key is its row, or absent where it was lost and no whole write came since; a key that a patch did not find is
/// noted as pending.
fn check(reader: &mut Connection, keys: &RedisKeys, value: ValueKind, table: &Table, context: &str) {
    let held = stored(reader, value);
    for (key, fields) in &held {
        let row = table.rows.get(key.trim_start_matches("t:"));
        let wanted = row.and_then(|row| rendering(value, row));
        assert_eq!(Some(fields), wanted.as_ref(), "{context}: {key}");
    }
    for (id, row) in &table.rows {
        let key = format!("t:{id}");
        if held.contains_key(&key) || rendering(value, row).is_none() {
            continue;
        }
        assert!(table.lost.contains(id), "{context}: {key} is missing");
    }
    let _ = keys;
}

#[test]
fn any_sequence_of_changes_leaves_what_the_table_says() {
    let Some(server) = Server::start() else { return };
    for value in [ValueKind::Hash, ValueKind::String, ValueKind::Json] {
        for seed in 0..60 {
            schedule(&server, value, seed);
        }
    }
}

#[test]
fn a_patch_that_finds_no_key_is_noted_and_writes_nothing() {
    let Some(server) = Server::start() else { return };
    for value in [ValueKind::Hash, ValueKind::String, ValueKind::Json] {
        let mut reader = server.connect();
        reader.call("empty", &[b"FLUSHALL"]).unwrap();
        let keys = RedisKeys::new("s");
        let claim = Claim::take(
            server.connect(),
            &keys,
            "s",
            &Identity::default(),
            Some(Lsn(1)),
            |_| Ok(()),
        )
        .unwrap();
        let mut fixture = Fixture {
            planner: Planner::new(keys.clone(), claim.scripts.clone()),
            gate: Gate::new(1 << 16, 0, 0),
            mapping: Mapping::new(&relation(value)).unwrap(),
            batch: Batch::new(),
            replay: false,
        };
        let mut writer = Writer::new(claim, keys.clone()).unwrap();
        let apply = |fixture: &mut Fixture, writer: &mut Writer, lsn| {
            let step = Step {
                lsn: Lsn(lsn),
                last: None,
                part: None,
                clear_part: false,
            };
            write_step(fixture.batch.bookkeeping(), &keys, &step);
            Writer::close(fixture.batch.bookkeeping(), &keys);
            let segment = Segment {
                batch: std::mem::take(&mut fixture.batch),
                opens: true,
                step: Some(step),
                ..Segment::default()
            };
            writer.apply(segment, None, &|| false).unwrap().unwrap()
        };
        let pending = |reader: &mut Connection, key: &[u8]| {
            let command = [b"HGET".as_slice(), &keys.pending, key];
            reader.call("read", &command).unwrap()
        };
        let noted = Value::BulkString(b"77".to_vec());
        let mut row = Row {
            id: "1".into(),
            small: Some(1),
            big: Some("x".into()),
            note: None,
        };
        Writer::open(fixture.batch.bookkeeping());
        fixture.plan(Trust::Settled, Kind::Update, &tuple(&row, true, false), None);
        assert!(apply(&mut fixture, &mut writer, 2).pending, "{value:?}");
        assert!(stored(&mut reader, value).is_empty());
        assert_eq!(pending(&mut reader, b"t:1"), noted);

        // What is not to be trusted is no better under another key.
        let stale: [&[u8]; 4] = match value {
            ValueKind::Hash => [b"HSET", b"t:1", b"big", b"stale"],
            _ => [b"SET", b"t:1", b"{\"big\": \"stale\"}", b"KEEPTTL"],
        };
        reader.call("write", &stale).unwrap();
        let old = tuple(&row, false, true);
        row.id = "2".into();
        Writer::open(fixture.batch.bookkeeping());
        fixture.plan(
            Trust::Settled,
            Kind::Update,
            &tuple(&row, true, false),
            Some(&old),
        );
        assert!(apply(&mut fixture, &mut writer, 3).pending, "{value:?}");
        assert_eq!(pending(&mut reader, b"t:2"), noted, "{value:?}");

        // What is of another type while the table is being filled goes: a change may come before the key is read again.
        let foreign = [b"LPUSH".as_slice(), b"t:3", b"x"];
        reader.call("write", &foreign).unwrap();
        row.id = "3".into();
        Writer::open(fixture.batch.bookkeeping());
        fixture.plan(Trust::Refreshing, Kind::Update, &tuple(&row, true, false), None);
        assert!(apply(&mut fixture, &mut writer, 4).pending, "{value:?}");
        let exists = reader.call("read", &[b"EXISTS", b"t:3"]).unwrap();
        assert_eq!(exists, Value::Int(0), "{value:?}");
    }
}
