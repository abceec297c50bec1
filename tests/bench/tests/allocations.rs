//! Keeps the hot paths from slipping back, without a clock: allocations are counted while rows are encoded, and while
//! frames become Redis commands. An expectation is what was measured when it was written; a run may need a tenth more.
//! Whoever makes the code allocate less lowers the number.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, missing_docs)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use walmirror_proto::frame::{FrameReader, RecordRef};
use walmirror_proto::pb::{Column, Encoding, Kind, Relation, ValueKind};
use walmirror_proto::writer::{FrameWriter, TupleBuilder};
use walmirror_sink::gate::Gate;
use walmirror_sink::plan::{Batch, Change, Mapping, Planner, RedisKeys, Scripts, Trust};

/// Rows of a frame, and of a batch: what fits into a write of the output plugin and into a MULTI.
const FRAME_ROWS: i64 = 500;
const BATCH_FRAMES: i64 = 20;
const ROWS: u64 = (FRAME_ROWS * BATCH_FRAMES) as u64;

struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call is passed on to the system's allocator unchanged; a counter on the side allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer came from `alloc` or `realloc` above with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        COUNT.with(|count| count.set(count.get() + 1));
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of this thread while `work` runs.
fn allocations(work: impl FnOnce()) -> u64 {
    let before = COUNT.with(Cell::get);
    work();
    COUNT.with(Cell::get) - before
}

#[track_caller]
fn at_most(what: &str, expected: u64, measured: u64) {
    println!("{what}: {measured} allocations for {ROWS} rows, expected {expected}");
    assert!(
        measured * 10 <= expected * 11,
        "{what}: {measured} allocations for {ROWS} rows, expected {expected} and a tenth more at most"
    );
}

/// The table that the benchmark measures on.
fn relation(value: ValueKind) -> Relation {
    let column = |name: &str, encoding: Encoding| Column {
        name: name.into(),
        type_oid: 25,
        encoding: encoding.into(),
        in_value: value != ValueKind::String || name == "name",
    };
    Relation {
        index: 1,
        oid: 77,
        schema: "public".into(),
        name: "bench".into(),
        value: value.into(),
        key: "bench:{id}".into(),
        columns: vec![
            column("id", Encoding::Int),
            column("name", Encoding::Text),
            column("email", Encoding::Text),
            column("age", Encoding::Int),
            column("balance", Encoding::Numeric),
            column("active", Encoding::Bool),
            column("created", Encoding::Timestamptz),
        ],
        ..Relation::default()
    }
}

/// One row of it. No `format!`: only the encoder is to be counted.
fn build(tuple: &mut TupleBuilder, id: i64) {
    tuple.clear();
    tuple.int(id);
    tuple.text(b"user name 123456");
    tuple.text(b"user123456@example.com");
    tuple.int(id % 100);
    tuple.numeric(2, id * 137);
    tuple.bool(id % 2 == 0);
    tuple.int(820_454_400_000_000 + id * 1_234_567);
}

fn frame(writer: &mut FrameWriter, tuple: &mut TupleBuilder, first: i64) {
    writer.clear();
    for id in first..first + FRAME_ROWS {
        build(tuple, id);
        writer.row(
            if id % 3 == 0 { Kind::Update } else { Kind::Insert },
            1,
            tuple,
            None,
        );
    }
}

#[test]
fn the_encoder_allocates_nothing_per_row() {
    let (mut writer, mut tuple) = (FrameWriter::new(), TupleBuilder::new());
    // Its buffers grow to their size once.
    frame(&mut writer, &mut tuple, 1_000_000);
    let measured = allocations(|| {
        for i in 0..BATCH_FRAMES {
            frame(&mut writer, &mut tuple, i * FRAME_ROWS);
        }
    });
    at_most("encoder", 0, measured);
}

#[test]
fn the_reader_allocates_nothing_per_row() {
    let (mut writer, mut tuple) = (FrameWriter::new(), TupleBuilder::new());
    frame(&mut writer, &mut tuple, 0);
    let mapping = Mapping::new(&relation(ValueKind::Hash)).unwrap();
    let measured = allocations(|| {
        for _ in 0..BATCH_FRAMES {
            for record in FrameReader::new(writer.as_bytes()) {
                let RecordRef::Row { tuple, .. } = record.unwrap() else {
                    panic!("only rows were written")
                };
                assert_eq!(tuple.datums(&mapping.encodings).map(Result::unwrap).count(), 7);
            }
        }
    });
    at_most("reader", 0, measured);
}

/// Frames into a new batch, as the planner's thread does it: the batch goes to another thread, so it is not reused.
fn plan(value: ValueKind) -> u64 {
    let mapping = Mapping::new(&relation(value)).unwrap();
    let mut planner = Planner::new(RedisKeys::new("bench"), Scripts::default());
    let mut gate = Gate::new(1 << 20, 0, 0);
    let (mut writer, mut tuple) = (FrameWriter::new(), TupleBuilder::new());
    let frames: Vec<Vec<u8>> = (0..BATCH_FRAMES)
        .map(|i| {
            frame(&mut writer, &mut tuple, i * FRAME_ROWS);
            writer.as_bytes().to_vec()
        })
        .collect();
    let mut pass = || {
        let mut batch = Batch::new();
        for record in frames.iter().flat_map(|frame| FrameReader::new(frame)) {
            let RecordRef::Row {
                kind, tuple, old_key, ..
            } = record.unwrap()
            else {
                panic!("only rows were written")
            };
            let change = Change { kind, tuple, old_key };
            planner
                .change(&mut batch, &mut gate, 9, &mapping, Trust::Settled, &change)
                .unwrap();
        }
        batch.seal();
        // SETs side by side are one MSET for each 128.
        let commands = if value == ValueKind::Hash {
            ROWS
        } else {
            ROWS.div_ceil(128)
        };
        assert_eq!(batch.commands().count() as u64, commands);
    };
    pass();
    allocations(pass)
}

#[test]
fn the_planner_allocates_once_per_row_for_a_hash() {
    at_most("planner, hash", 10_000, plan(ValueKind::Hash));
}

#[test]
fn the_planner_allocates_once_per_row_for_json() {
    at_most("planner, json", 10_000, plan(ValueKind::Json));
}

#[test]
fn the_planner_allocates_once_per_row_for_a_string() {
    at_most("planner, string", 10_000, plan(ValueKind::String));
}
