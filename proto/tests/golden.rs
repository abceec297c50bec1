//! The wire format, fixed: tests/golden/*.bin are frames as version 1 writes them, *.txt is what they say. A change that
//! breaks readers in the field shows here as a failing test.
//!
//! `WALMIRROR_GOLDEN=write cargo test -p walmirror-proto --test golden` writes the files anew. That is right for a new
//! case, and for a changed one only together with a new protocol version (docs/wire.md, Compatibility).

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, missing_docs)]

use std::collections::HashMap;
use std::fmt::Write;
use std::path::Path;

use walmirror_proto::frame::{FrameReader, RecordRef};
use walmirror_proto::pb::{self, Encoding, Kind};
use walmirror_proto::row::{Datum, TupleRef, encodings};
use walmirror_proto::value::JsonShape;
use walmirror_proto::writer::{FrameWriter, TupleBuilder};

/// A column of every encoding, named for it.
fn columns() -> Vec<pb::Column> {
    (0..=12)
        .map(|number| {
            let encoding = Encoding::try_from(number).unwrap();
            let name = encoding.as_str_name().to_lowercase();
            pb::Column {
                name,
                type_oid: 100 + number as u32,
                encoding: number,
                in_value: true,
            }
        })
        .collect()
}

fn relation(index: u32, columns: Vec<pb::Column>) -> pb::Relation {
    pb::Relation {
        index,
        oid: 16_384 + index,
        schema: "public".into(),
        name: format!("t{index}"),
        mode: pb::Mode::Mirror.into(),
        value: pb::ValueKind::Json.into(),
        key: "t:{text}".into(),
        ttl_ms: 86_400_000,
        on_write: pb::OnWrite::Populate.into(),
        capture: true,
        fingerprint: 0x0123_4567_89AB_CDEF,
        columns,
        announced: true,
        refresh: true,
    }
}

fn tuple(fill: impl FnOnce(&mut TupleBuilder)) -> TupleBuilder {
    let mut tuple = TupleBuilder::new();
    fill(&mut tuple);
    tuple
}

fn begin() -> pb::Record {
    pb::Begin {
        xid: 1 << 33,
        commit_lsn: 0x16_B374_D848,
        commit_time: 631_249_445_600_000,
    }
    .into()
}

fn commit() -> pb::Record {
    pb::Commit {
        end_lsn: 0x16_B374_D878,
    }
    .into()
}

fn every_encoding() -> FrameWriter {
    let mut frame = FrameWriter::new();
    frame.record(&begin());
    frame.record(&relation(1, columns()).into());
    let row = |text: &[u8], n: i64, sign: f64| {
        tuple(|tuple| {
            tuple.text(text);
            tuple.bool(n > 0);
            tuple.int(n);
            tuple.oid(4_294_967_295);
            tuple.float4(1.5 * sign as f32);
            tuple.float8(0.1 * sign);
            tuple.numeric(2, n);
            tuple.int(7_364);
            tuple.int(n);
            tuple.int(631_249_445_600_000);
            tuple.text(b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff");
            tuple.text(b"\x00\xff");
            tuple.text(br#"{"a": [1, 2]}"#);
        })
    };
    frame.row(Kind::Insert, 1, &row("é \"\\\n".as_bytes(), i64::MAX, 1.0), None);
    frame.row(Kind::Insert, 1, &row(b"", -1, -1.0), None);
    let special = tuple(|tuple| {
        tuple.text(b"special");
        tuple.bool(true);
        tuple.int(i64::MIN);
        tuple.oid(0);
        tuple.float4(f32::NAN);
        tuple.float8(f64::NEG_INFINITY);
        tuple.numeric_text(b"12345678901234567890.123");
        tuple.int(i32::MAX.into());
        tuple.int(i64::MAX);
        tuple.int(i64::MIN);
        tuple.null();
        tuple.unchanged();
        tuple.null();
    });
    frame.row(
        Kind::Update,
        1,
        &special,
        Some(&tuple(|old| {
            (0..13).for_each(|i| if i == 0 { old.text(b"old") } else { old.null() })
        })),
    );
    frame.row(
        Kind::Delete,
        1,
        &tuple(|old| (0..13).for_each(|i| if i == 0 { old.text(b"special") } else { old.null() })),
        None,
    );
    frame.record(&commit());
    frame
}

fn several_relations() -> FrameWriter {
    let int = |name: &str| pb::Column {
        name: name.into(),
        type_oid: 20,
        encoding: Encoding::Int.into(),
        in_value: true,
    };
    let one = |value| tuple(|tuple| tuple.int(value));
    let mut frame = FrameWriter::new();
    frame.record(&begin());
    frame.record(&relation(1, vec![int("a")]).into());
    frame.row(Kind::Insert, 1, &one(1), None);
    frame.record(&relation(300, vec![int("b")]).into());
    // Relation 1 again: left out although a Relation record stands between.
    frame.row(Kind::Insert, 1, &one(2), None);
    frame.row(Kind::Insert, 300, &one(3), None);
    frame.row(Kind::Update, 300, &one(4), Some(&one(3)));
    frame.row(Kind::Delete, 1, &one(2), None);
    frame.record(&commit());
    frame
}

fn many_columns() -> FrameWriter {
    let column = |i| pb::Column {
        name: format!("c{i}"),
        type_oid: 23,
        encoding: Encoding::Int.into(),
        in_value: i != 3,
    };
    let mut frame = FrameWriter::new();
    frame.record(&relation(1, (0..20).map(column).collect()).into());
    frame.row(
        Kind::Insert,
        1,
        &tuple(|tuple| (0..20).for_each(|i| if i % 9 == 8 { tuple.null() } else { tuple.int(i) })),
        None,
    );
    frame
}

fn everything_else() -> FrameWriter {
    let mut frame = FrameWriter::new();
    frame.record(
        &pb::Truncate {
            relations: vec![1, 300],
        }
        .into(),
    );
    frame.record(
        &pb::Forget {
            oid: 16_385,
            keep_keys: true,
        }
        .into(),
    );
    frame.record(
        &pb::Marker {
            content: b"backfill 16385 7".to_vec(),
            lsn: 0x16_B374_D848,
        }
        .into(),
    );
    let rows = [1, 2]
        .map(|n| pb::Tuple {
            ints: vec![n],
            ..pb::Tuple::default()
        })
        .to_vec();
    let snapshot = Some(pb::Snapshot {
        xmin: 700,
        xmax: 705,
        xip: vec![700, 703],
    });
    frame.record(
        &pb::Capture {
            oid: 16_385,
            fingerprint: 7,
            snapshot,
            rows,
        }
        .into(),
    );
    let (table, key, reason) = (
        "public.t1".into(),
        "t:1".into(),
        "invalid byte sequence for encoding".into(),
    );
    frame.record(&pb::Record {
        relation: 1,
        ..pb::Error {
            table,
            key,
            reason,
            lsn: 0x16_B374_D848,
            oid: 0,
            refresh: false,
        }
        .into()
    });
    frame.record(&begin());
    frame
}

fn in_progress() -> FrameWriter {
    let mut frame = FrameWriter::new();
    let columns = vec![pb::Column {
        name: "id".into(),
        encoding: Encoding::Int.into(),
        in_value: true,
        ..pb::Column::default()
    }];
    let xid = 1 << 33;
    frame.record(&pb::InProgress { xid, sub_xid: xid }.into());
    frame.record(&relation(1, columns).into());
    frame.row(Kind::Insert, 1, &tuple(|row| row.int(1)), None);
    let sub_xid = xid + 1;
    frame.record(&pb::InProgress { xid, sub_xid }.into());
    frame.row(Kind::Insert, 1, &tuple(|row| row.int(2)), None);
    frame.record(&pb::Rollback { xid, sub_xid }.into());
    let late = pb::LateCommit {
        begin: begin().begin,
        commit: commit().commit,
    };
    frame.record(&late.into());
    frame
}

/// What a frame says, a line a record; rows value by value as text, and as the JSON object.
fn explain(frame: &[u8]) -> String {
    let mut relations = HashMap::new();
    let mut out = String::new();
    for record in FrameReader::new(frame) {
        match record.unwrap() {
            RecordRef::Relation(relation) => {
                writeln!(out, "{relation:?}").unwrap();
                relations.insert(relation.index, relation);
            }
            RecordRef::Row {
                kind,
                relation,
                tuple,
                old_key,
            } => {
                let relation = &relations[&relation];
                writeln!(
                    out,
                    "{} {} {}",
                    kind.as_str_name(),
                    relation.name,
                    explain_row(relation, tuple)
                )
                .unwrap();
                if let Some(old_key) = old_key {
                    writeln!(out, "  old key {}", explain_row(relation, old_key)).unwrap();
                }
            }
            RecordRef::Capture(capture) => {
                let rows: Vec<Vec<_>> = capture
                    .rows()
                    .map(|row| row.datums(&[Encoding::Int]).map(Result::unwrap).collect())
                    .collect();
                let (oid, fingerprint, snapshot) = (capture.oid, capture.fingerprint, &capture.snapshot);
                writeln!(out, "Capture {oid} {fingerprint} {snapshot:?} {rows:?}").unwrap();
            }
            record => writeln!(out, "{record:?}").unwrap(),
        }
    }
    out
}

fn explain_row(relation: &pb::Relation, tuple: TupleRef<'_>) -> String {
    let encodings = encodings(relation).unwrap();
    let datums: Vec<_> = tuple.datums(&encodings).map(Result::unwrap).collect();
    let mut out = String::new();
    for (column, datum) in relation.columns.iter().zip(&datums) {
        let mut text = Vec::new();
        datum.write_text(&mut text);
        match datum {
            Datum::Null => {}
            Datum::Unchanged => write!(out, "{}=(unchanged) ", column.name).unwrap(),
            _ => write!(out, "{}={:?} ", column.name, String::from_utf8(text).unwrap()).unwrap(),
        }
    }
    let mut json = Vec::new();
    if JsonShape::new(relation).write(&datums, &mut json) {
        write!(out, "{}", String::from_utf8(json).unwrap()).unwrap();
    }
    out.trim_end().to_owned()
}

#[track_caller]
fn check(name: &str, frame: &FrameWriter) {
    let path = |extension| {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden")
            .join(name)
            .with_extension(extension)
    };
    let said = explain(frame.as_bytes());
    if std::env::var_os("WALMIRROR_GOLDEN").is_some_and(|value| value == "write") {
        std::fs::write(path("bin"), frame.as_bytes()).unwrap();
        std::fs::write(path("txt"), &said).unwrap();
    }
    let golden = std::fs::read(path("bin")).unwrap();
    assert_eq!(
        frame.as_bytes(),
        golden,
        "{name}: this version writes other bytes"
    );
    assert_eq!(
        explain(&golden),
        std::fs::read_to_string(path("txt")).unwrap(),
        "{name}: this version reads other values"
    );
}

#[test]
fn every_encoding_as_in_version_1() {
    check("every_encoding", &every_encoding());
}

#[test]
fn several_relations_as_in_version_1() {
    check("several_relations", &several_relations());
}

#[test]
fn many_columns_as_in_version_1() {
    check("many_columns", &many_columns());
}

#[test]
fn everything_else_as_in_version_1() {
    check("everything_else", &everything_else());
}

#[test]
fn transactions_in_progress_as_in_version_1() {
    check("in_progress", &in_progress());
}
