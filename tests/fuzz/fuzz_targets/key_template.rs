//! A template and a key: what parses, matches; and what matches is what the key was rendered from, up to the ambiguity
//! that module key documents (so the values found must render the same key). What is rendered is matched.

#![no_main]

use libfuzzer_sys::fuzz_target;
use walmirror_proto::key::KeyTemplate;

fuzz_target!(|input: (&str, &[u8])| {
    let (template, key) = input;
    let Ok(template) = KeyTemplate::parse(template) else {
        return;
    };
    let _ = (template.skeleton(), template.scan_pattern());
    if let Some(values) = template.match_key(key) {
        let mut rendered = Vec::new();
        template
            .render(|i, out| out.extend_from_slice(&values[i]), &mut rendered)
            .expect("values that match can be rendered");
        assert_eq!(rendered, key);
    }
    let mut values = key.split(|byte| *byte == 0).cycle();
    let values: Vec<&[u8]> = template
        .placeholders()
        .iter()
        .filter_map(|_| values.next())
        .collect();
    let mut rendered = Vec::new();
    if template
        .render(|i, out| out.extend_from_slice(values[i]), &mut rendered)
        .is_ok()
        // With more, the search may give up.
        && (values.len() <= 2 && rendered.len() <= 128)
    {
        assert!(
            template.match_key(&rendered).is_some(),
            "what was rendered does not match"
        );
    }
});
