//! Rows that change while they are read again.

use super::*;
use crate::plan::Scripts;

const KEY: &[u8] = b"t:1";

/// The row with an unchanged `v`.
fn patch(frame: &mut FrameWriter) {
    let mut tuple = TupleBuilder::new();
    tuple.text(b"1");
    tuple.unchanged();
    frame.row(Kind::Update, 1, &tuple, None);
}

/// A transaction that the snapshot of chunks, 105:105, does not see, unless its id is below that.
fn transaction(planning: &mut Planning, xid: u64, lsn: u64, rows: impl FnOnce(&mut FrameWriter)) {
    let mut frame = Frame::default().relation(relation(1, "t:{id}")).begin(xid, lsn);
    rows(&mut frame.0);
    frame.commit(lsn + 1).feed(planning);
}

/// What the row gives that was read as `read` in this snapshot.
fn read_again(planning: &mut Planning, read: &str, snapshot: Snapshot) -> Vec<String> {
    flushed(planning);
    let window = Arc::new(Window::default());
    let keys = Content::Keys(vec![(KEY.to_vec(), Some(packed(1, "1", read)))]);
    planning.chunk(Chunk {
        snapshot,
        ..chunk(planning, 7, keys, None, &window)
    });
    let marker = pb::Marker {
        content: b"m:7".to_vec(),
        lsn: 100,
    };
    Frame::default().record(marker).feed(planning);
    planning.piece().unwrap();
    let mut written = flushed(planning);
    written.retain(|line| line.contains("t:1") && !line.starts_with("SCRIPT"));
    written
}

fn old() -> Snapshot {
    Snapshot::new(105, 105, vec![])
}

const WRITTEN: [&str; 2] = ["UNLINK t:1", "HSET t:1 id 1 v read"];
const SETTLED: &str = "HDEL walmirror:{s}:pending t:1";

fn patched() -> String {
    let script = Scripts::default();
    let hash = String::from_utf8_lossy(script.hash(crate::plan::Script::PatchHash)).into_owned();
    format!("EVALSHA {hash} 2 t:1 walmirror:{{s}}:pending {OID} 0 m 1 id 1")
}

#[test]
fn a_row_that_changed_since_is_written_with_its_changes_behind_it() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    planning.reread(OID, &[KEY.to_vec()]);
    transaction(&mut planning, 110, 20, patch);
    transaction(&mut planning, 111, 30, patch);
    // The second stands for the first.
    let written = read_again(&mut planning, "read", old());
    assert_eq!(written, [WRITTEN[0], WRITTEN[1], &patched(), SETTLED]);
    // And nothing is kept of it.
    transaction(&mut planning, 112, 40, patch);
    assert_eq!(read_again(&mut planning, "read", old()), [""; 0]);
}

#[test]
fn a_change_with_a_value_is_kept_beside_a_later_one_without() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    planning.reread(OID, &[KEY.to_vec()]);
    transaction(&mut planning, 110, 20, |frame| {
        frame.row(Kind::Update, 1, &tuple("1", Some("new")), None);
    });
    transaction(&mut planning, 111, 30, patch);
    let written = read_again(&mut planning, "read", old());
    // A whole row takes the place of what was read.
    let new = "HSET t:1 id 1 v new";
    assert_eq!(written, [WRITTEN[0], new, &patched(), SETTLED]);
}

/// The snapshot misses a change from before it was told that the key is read.
#[test]
fn a_row_is_not_written_where_a_change_is_not_known() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    transaction(&mut planning, 110, 20, patch);
    planning.reread(OID, &[KEY.to_vec()]);
    transaction(&mut planning, 111, 30, patch);
    assert_eq!(read_again(&mut planning, "read", old()), [""; 0]);
    // It is read again, and this one sees it.
    planning.reread(OID, &[KEY.to_vec()]);
    transaction(&mut planning, 113, 40, patch);
    let snapshot = Snapshot::new(112, 112, vec![]);
    let written = read_again(&mut planning, "read", snapshot);
    assert_eq!(written, [WRITTEN[0], WRITTEN[1], &patched(), SETTLED]);
}

/// What became of another key with the same hash is not written behind this one.
#[test]
fn changes_of_another_key_with_the_same_hash_are_not_written() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    planning.reread(OID, &[KEY.to_vec()]);
    transaction(&mut planning, 110, 20, patch);
    planning.rereads.collide();
    assert_eq!(read_again(&mut planning, "read", old()), [""; 0]);
    // Nor is such a change kept.
    planning.reread(OID, &[KEY.to_vec()]);
    planning.rereads.collide();
    transaction(&mut planning, 111, 30, patch);
    assert_eq!(planning.rereads.len(), 0);
}

/// The gate has no memory, and the snapshot misses what it has forgotten.
#[test]
fn a_row_is_not_written_where_the_gate_may_have_forgotten_a_change() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    planning.gate = Gate::new(0, 200, 0);
    planning.reread(OID, &[KEY.to_vec()]);
    transaction(&mut planning, 210, 20, patch);
    let written = read_again(&mut planning, "read", old());
    assert!(!written.contains(&WRITTEN[1].to_owned()), "{written:?}");
}

#[test]
fn what_is_more_than_a_change_of_values_is_not_written_over() {
    type Change = fn(&mut Planning);
    let changes: [(&str, Change); 4] = [
        ("the row goes and comes back", |planning| {
            transaction(planning, 110, 20, |frame| {
                frame.row(Kind::Delete, 1, &tuple("1", None), None);
            });
            transaction(planning, 111, 30, patch);
        }),
        ("another row takes its key", |planning| {
            transaction(planning, 110, 20, |frame| {
                frame.row(
                    Kind::Update,
                    1,
                    &tuple("1", Some("moved")),
                    Some(&tuple("2", None)),
                );
            });
        }),
        ("the row gets another key", |planning| {
            transaction(planning, 110, 20, |frame| {
                frame.row(
                    Kind::Update,
                    1,
                    &tuple("2", Some("moved")),
                    Some(&tuple("1", None)),
                );
            });
        }),
        ("its table is truncated", |planning| {
            transaction(planning, 110, 20, |frame| {
                let relations = vec![1];
                frame.record(&pb::Truncate { relations }.into());
            });
            transaction(planning, 111, 30, patch);
        }),
    ];
    for (what, change) in changes {
        let mut planning = planning(settled(), 1 << 20, 1 << 24);
        planning.reread(OID, &[KEY.to_vec()]);
        change(&mut planning);
        assert_eq!(read_again(&mut planning, "read", old()), [""; 0], "{what}");
    }
}

#[test]
fn what_is_kept_is_bounded() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    let keys: Vec<Vec<u8>> = (0..100_000).map(|id| format!("t:{id}").into_bytes()).collect();
    planning.reread(OID, &keys);
    assert!(planning.rereads.len() < 40_000);
    planning.reread_over();
    assert!(planning.rereads.is_empty());
    // What a key gives up as others stand for it is room again.
    planning.reread(OID, &[KEY.to_vec()]);
    let large = "x".repeat(1 << 20);
    for lsn in 20..40 {
        transaction(&mut planning, 110, lsn, |frame| {
            frame.row(Kind::Update, 1, &tuple("1", Some(&large)), None);
        });
    }
    assert!(!planning.rereads.is_empty());
}
