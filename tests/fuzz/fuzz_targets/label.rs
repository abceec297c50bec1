//! Any text as the security label of a table: the decoder's own parser, which runs in a backend, gives a label or a refusal.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../../decoder/src/label.rs"]
#[allow(dead_code)]
mod label;

#[path = "../refusal.rs"]
mod error;

fuzz_target!(|text: &str| {
    match label::Label::parse(text) {
        Ok(label) => {
            let object = text.trim_start().starts_with('{') && text.contains("mode");
            assert!(object, "no object with a mode: {label:?}");
            let _ = label.key.as_deref().map(walmirror_proto::key::KeyTemplate::parse);
        }
        Err(refusal) => assert!(!refusal.message.is_empty() && !refusal.hint.is_empty()),
    }
});
