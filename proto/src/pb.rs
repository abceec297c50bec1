//! The types of walmirror.proto, as prost generates them. The writer and the frame reader go around them for rows, which
//! are too many to pay for owned values; everything else is read and written through them.

#![allow(missing_docs, clippy::all, clippy::indexing_slicing)]

include!(concat!(env!("OUT_DIR"), "/walmirror.v1.rs"));

macro_rules! record_from {
    ($($message:ident => $kind:ident, $field:ident;)*) => {$(
        impl From<$message> for Record {
            fn from(message: $message) -> Self {
                Self { kind: Kind::$kind.into(), $field: Some(message), ..Self::default() }
            }
        }
    )*};
}

record_from! {
    Begin => Begin, begin;
    Commit => Commit, commit;
    Relation => Relation, relation_def;
    Truncate => Truncate, truncate;
    Forget => Forget, forget;
    Marker => Marker, marker;
    Capture => Capture, capture;
    Error => Error, error;
    InProgress => InProgress, in_progress;
    Rollback => Rollback, rollback;
    LateCommit => LateCommit, late_commit;
}
