//! Answers of the server: rows by their keys, several put together; values that rule out readings of a key.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use super::query::{array, refuses_a_value};
use super::*;
use walmirror_proto::pb;
use walmirror_proto::writer::TupleBuilder;

fn mapping(fingerprint: u64, key: &str) -> Mapping {
    let column = |name: &str| pb::Column {
        name: name.into(),
        encoding: pb::Encoding::Text.into(),
        in_value: true,
        ..pb::Column::default()
    };
    let relation = pb::Relation {
        schema: "public".into(),
        name: "t".into(),
        key: key.into(),
        fingerprint,
        columns: vec![column("a"), column("b")],
        ..pb::Relation::default()
    };
    Mapping::new(&relation).unwrap()
}

fn packed(fingerprint: u64, values: &[&str]) -> Vec<u8> {
    let mut bytes = fingerprint.to_be_bytes().to_vec();
    let mut tuple = TupleBuilder::new();
    values.iter().for_each(|value| tuple.text(value.as_bytes()));
    tuple.write_tuple(&mut bytes);
    bytes
}

/// The story: a row that no longer fitted what the table was known as counted as none, and its key was removed.
#[test]
fn a_row_of_another_version_is_not_taken_for_none() {
    let mapping = mapping(7, "t:{a}");
    let row = packed(7, &["1", "x"]);
    let rows = by_key(&mapping, [Some(row.as_slice())].into_iter()).unwrap();
    assert_eq!(rows, HashMap::from([(b"t:1".to_vec(), row.clone())]));
    for other in [
        Some(packed(8, &["1", "x"])),
        Some(packed(7, &["1"])),
        Some(vec![0, 0, 7]),
        None,
    ] {
        let both = [Some(row.as_slice()), other.as_deref()];
        assert_eq!(by_key(&mapping, both.into_iter()), None, "{other:?}");
    }
}

/// Keys whose values were refused come last, and were asked for before.
#[test]
fn several_answers_have_the_oldest_snapshot() {
    let found = |text: &str, row: Option<()>| Found {
        snapshot: text.parse().unwrap(),
        keys: vec![(b"t:1-2-3".to_vec(), row)],
    };
    let mapping = mapping(7, "t:{a}-{b}");
    for texts in [
        ["20:30:20", "10:30:10,20"],
        ["30:40:", "20:30:"],
        ["10:30:10,20", "30:30:"],
    ] {
        let answers = vec![found(texts[0], None), found(texts[1], Some(()))];
        let answer = one_answer_a_key(&mapping, answers);
        assert_eq!(answer.len(), 1);
        let oldest = texts
            .iter()
            .find(|text| text.ends_with(",20") || **text == "20:30:");
        assert_eq!(Ok(answer[0].snapshot.clone()), oldest.unwrap().parse());
        assert_eq!(answer[0].keys, [(b"t:1-2-3".to_vec(), Some(()))]);
    }
}

/// As many as have room, which is looked for by halves; and one in any case.
#[test]
fn what_is_read_at_once_is_bounded_in_bytes() {
    let row = |key: &ParsedKey| key.0[0] as usize * 100_000;
    let mut keys: Vec<ParsedKey> = [1, 2, 3, 4, 5, 200, 1, 1]
        .into_iter()
        .map(|size: u8| (vec![size], Vec::new()))
        .collect();
    let mut read = Vec::new();
    while !keys.is_empty() {
        let found = as_many(&mut keys, |keys, most| {
            let bytes: usize = keys.iter().map(row).sum();
            Ok((bytes <= most).then_some(keys))
        });
        read.push(found.unwrap().iter().map(|key| key.0[0]).collect::<Vec<_>>());
    }
    assert_eq!(read, [vec![1, 2, 3, 4], vec![5], vec![200], vec![1, 1]]);
}

#[test]
fn arrays_are_quoted() {
    let values = [
        b"a".to_vec(),
        b"b\"\\,{}".to_vec(),
        b"".to_vec(),
        b"NULL".to_vec(),
    ];
    assert_eq!(array(values.iter().map(Some)), br#"{"a","b\"\\,{}","","NULL"}"#);
    assert_eq!(array(std::iter::empty()), b"{}");
}

#[test]
fn bad_values_are_told_from_real_errors() {
    let error = |state: &str| PqError {
        sqlstate: Some(state.to_owned()),
        ..PqError::new(ErrorKind::Server, "x")
    };
    for state in ["22P02", "22003", "23514", "42883", "42P01", "54001", "P0001"] {
        assert!(refuses_a_value(&error(state), false), "{state}");
    }
    for state in [
        "08006", "40001", "42501", "53200", "55P03", "57P01", "72000", "XX000", "XX002",
    ] {
        assert!(!refuses_a_value(&error(state), false), "{state}");
    }
    // The story: a collation in which nothing can be searched for was taken for keys without rows, which went.
    for (state, is_refused) in [
        ("22021", true),
        ("22P05", true),
        ("0A000", false),
        ("22P02", false),
    ] {
        assert_eq!(refuses_a_value(&error(state), true), is_refused, "{state}");
    }
    // A damaged row can be left out; that there is none cannot be said.
    let query = |takes_any_text, rows_up_to| Query {
        statement: String::new(),
        arrays: 1,
        takes_any_text,
        rows_up_to,
        is_sound: false,
    };
    let damaged = error("XX001");
    assert!(query(false, Some(1)).is_of_a_value(&damaged));
    assert!(!query(false, None).is_of_a_value(&damaged) && !query(true, Some(1)).is_of_a_value(&damaged));
    assert!(query(true, Some(1)).is_of_a_value(&error("54000")));
    assert!(is_text(&[b"x".to_vec()], false) && !is_text(&[vec![0]], true) && !is_text(&[vec![0xff]], false));
}

#[test]
fn shapes_rule_out_readings() {
    let uuid = b"11111111-2222-3333-4444-555555555555".as_slice();
    assert!(Shape::of("uuid").takes(uuid) && !Shape::of("uuid").takes(b"11111111"));
    assert!(Shape::of("integer").takes(b"-7") && !Shape::of("bigint").takes(b"7-8"));
    assert!(!Shape::of("smallint").takes(b"-") && Shape::of("text").takes(b"7-8"));
}
