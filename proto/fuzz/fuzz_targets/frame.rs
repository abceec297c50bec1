//! Any bytes are read as a frame to the end, and every value in it is printed; nothing may panic or hang.

#![no_main]

use libfuzzer_sys::fuzz_target;
use walmirror_proto::frame::{FrameReader, RecordRef};
use walmirror_proto::pb::Encoding;
use walmirror_proto::row::{TupleRef, encodings};
use walmirror_proto::value::JsonShape;

fuzz_target!(|frame: &[u8]| {
    let mut columns: Vec<_> = (0..=12).filter_map(|number| Encoding::try_from(number).ok()).collect();
    let mut shape = JsonShape::default();
    for record in FrameReader::new(frame).map_while(Result::ok) {
        match record {
            RecordRef::Relation(relation) => {
                columns = encodings(&relation).unwrap_or_default();
                shape = JsonShape::new(&relation);
            }
            RecordRef::Row { tuple, old_key, .. } => {
                print(tuple, &columns, &shape);
                old_key.into_iter().for_each(|tuple| print(tuple, &columns, &shape));
            }
            RecordRef::Capture(capture) => capture.rows().for_each(|tuple| print(tuple, &columns, &shape)),
            _ => {}
        }
    }
});

fn print(tuple: TupleRef<'_>, columns: &[Encoding], shape: &JsonShape) {
    let mut out = Vec::new();
    let row: Vec<_> = tuple.datums(columns).map_while(Result::ok).collect();
    row.iter().for_each(|datum| datum.write_text(&mut out));
    let _ = shape.write(&row, &mut out);
}
