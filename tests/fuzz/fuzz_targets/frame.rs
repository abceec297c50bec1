//! Any bytes are read as a frame to the end, and every value in it is printed; the same bytes are read as one row, as
//! `walmirror.pack` makes them. Nothing may panic or hang, and what two readers read must be the same.

#![no_main]

use libfuzzer_sys::fuzz_target;
use walmirror_proto::frame::{FrameReader, RecordRef};
use walmirror_proto::pb::{self, Encoding};
use walmirror_proto::row::{TupleRef, encodings};
use walmirror_proto::value::JsonShape;

fuzz_target!(|bytes: &[u8]| {
    let all: Vec<_> = (0..=12)
        .filter_map(|number| Encoding::try_from(number).ok())
        .collect();
    let mut columns = all.clone();
    let mut shape = JsonShape::default();
    for record in FrameReader::new(bytes).map_while(Result::ok) {
        match record {
            RecordRef::Relation(relation) => {
                columns = encodings(&relation).unwrap_or_default();
                shape = JsonShape::new(&relation);
            }
            RecordRef::Row { tuple, old_key, .. } => {
                print(tuple, &columns, &shape);
                old_key
                    .into_iter()
                    .for_each(|tuple| print(tuple, &columns, &shape));
            }
            RecordRef::Capture(capture) => capture.rows().for_each(|tuple| print(tuple, &columns, &shape)),
            _ => {}
        }
    }
    // A frame that is read to its end has as many records as for prost, which reads it in its own way.
    if let Ok(records) = FrameReader::new(bytes).collect::<Result<Vec<_>, _>>()
        && let Ok(frame) = <pb::Frame as prost::Message>::decode(bytes)
    {
        assert_eq!(frame.records.len(), records.len());
    }
    if let Ok(tuple) = TupleRef::parse(bytes) {
        print(tuple, &all, &JsonShape::default());
    }
});

fn print(tuple: TupleRef<'_>, columns: &[Encoding], shape: &JsonShape) {
    let mut out = Vec::new();
    let row: Vec<_> = tuple.datums(columns).map_while(Result::ok).collect();
    row.iter().for_each(|datum| datum.write_text(&mut out));
    let _ = shape.write(&row, &mut out);
}
