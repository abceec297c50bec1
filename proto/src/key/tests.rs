//! Templates: what is one, what keys it makes, and that a key gives back its values.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::time::Duration;

use super::*;
use proptest::collection::vec;
use proptest::prelude::*;

/// What takes a second here, also where others have the processors, took minutes or for ever when it was wrong.
const PATIENCE: Duration = Duration::from_secs(60);

fn render(template: &KeyTemplate, values: &[Vec<u8>]) -> Vec<u8> {
    let mut out = b"kept".to_vec();
    template
        .render(|i, out| out.extend_from_slice(&values[i]), &mut out)
        .unwrap();
    out.strip_prefix(b"kept").unwrap().to_vec()
}

fn key(template: &str, values: &[&str]) -> String {
    let values: Vec<_> = values.iter().map(|value| value.as_bytes().to_vec()).collect();
    String::from_utf8(render(&KeyTemplate::parse(template).unwrap(), &values)).unwrap()
}

fn matched(template: &str, key: &str) -> Option<Vec<String>> {
    let values = KeyTemplate::parse(template).unwrap().match_key(key.as_bytes())?;
    Some(
        values
            .into_iter()
            .map(|value| String::from_utf8(value).unwrap())
            .collect(),
    )
}

#[test]
fn every_reading_of_an_ambiguous_key_is_found() {
    let template = KeyTemplate::parse("stats-{day}-{id}").unwrap();
    assert!(template.is_ambiguous());
    let any = |_: usize, _: &[u8]| true;
    let Readings { all, is_cut_short } = template.match_all(b"stats-2024-01-02-7", &any);
    assert!(!is_cut_short);
    let text = |values: &[Vec<u8>]| {
        values
            .iter()
            .map(|value| String::from_utf8_lossy(value).into_owned())
            .collect::<Vec<_>>()
    };
    let all: Vec<Vec<String>> = all.iter().map(|values| text(values)).collect();
    assert_eq!(
        all,
        [["2024", "01-02-7"], ["2024-01", "02-7"], ["2024-01-02", "7"]]
    );
    assert_eq!(template.match_all(b"other", &any), Readings::default());
    for clear in ["t:{a}:{b}", "t:{a}", "{a}:x-{b}"] {
        assert!(!KeyTemplate::parse(clear).unwrap().is_ambiguous(), "{clear}");
    }
    assert!(KeyTemplate::parse("{a}{b}").unwrap().is_ambiguous());
}

/// Whoever took the first 64 readings for all of them removed the keys of rows.
#[test]
fn readings_that_are_too_many_are_said_to_be_cut_short() {
    let uuid = "0ab4a6b0-1111-4222-8333-444455556666";
    let template = KeyTemplate::parse("u4:{a}-{b}-{c}-{d}").unwrap();
    let rendered = key("u4:{a}-{b}-{c}-{d}", &[uuid; 4]);
    let readings = template.match_all(rendered.as_bytes(), &|_, _| true);
    assert!(readings.is_cut_short && readings.all.len() == 64);
    // Where it is known what values look like, there is one.
    let readings = template.match_all(rendered.as_bytes(), &|_, value| value.len() == uuid.len());
    assert!(!readings.is_cut_short);
    assert_eq!(readings.all, [vec![uuid.as_bytes().to_vec(); 4]]);
}

#[test]
fn a_long_key_is_read_back() {
    let long = "x".repeat(200_000);
    assert_eq!(matched("t:{a}-{b}", &format!("t:{long}-7")).unwrap()[1], "7");
    assert_eq!(matched("t:{a}-{b}", &format!("t:7-{long}")).unwrap()[0], "7");
}

#[test]
fn a_template_is_an_expression_too() {
    let expression = |template: &str| {
        KeyTemplate::parse(template)
            .unwrap()
            .expression(|index| format!("c{index}"), |text| format!("'{text}'"))
    };
    assert_eq!(expression("user:{id}"), "'user:' || c0");
    let escaped = |column: &str| format!("replace(replace({column}, '%', '%25'), ':', '%3A')");
    assert_eq!(
        expression("{a}-{b}{a}"),
        format!(
            "{} || '-' || {} || {}",
            escaped("c0"),
            escaped("c1"),
            escaped("c0")
        )
    );
}

#[test]
fn templates_render() {
    assert_eq!(key("user:{id}", &["7"]), "user:7");
    assert_eq!(key("{id}", &["a:b%"]), "a:b%", "one placeholder is not escaped");
    assert_eq!(key("p:{a}:{b}", &["x:y", "100%"]), "p:x%3Ay:100%25");
    assert_eq!(key("{{{a}}}:x", &["1"]), "{1}:x");
    assert_eq!(key("{a}:{a}:{b}", &["1", "2"]), "1:1:2");
    assert_eq!(key("Ünï:{Größe \"x\"}", &["1"]), "Ünï:1");
}

#[test]
fn no_two_rows_share_a_key() {
    assert_ne!(key("t:{a}:{b}", &["a:b", "c"]), key("t:{a}:{b}", &["a", "b:c"]));
    assert_ne!(key("t:{a}:{b}", &["a%3A", "b"]), key("t:{a}:{b}", &["a:", "b"]));
}

#[test]
fn placeholders_are_columns_each_once() {
    let template = KeyTemplate::parse("x{b}:{a}:{b}{{").unwrap();
    assert_eq!(template.placeholders(), ["b", "a"]);
    assert_eq!(template.skeleton(), "x{}:{}:{}{{");
}

#[test]
fn errors_say_what_and_where() {
    for (template, error, message) in [
        ("", KeyError::NoPlaceholder, "no {column} placeholder"),
        ("users{{}}", KeyError::NoPlaceholder, "no {column} placeholder"),
        (
            "user:{id",
            KeyError::Unclosed(6),
            "\"{\" at position 6 is not closed",
        ),
        ("user:{", KeyError::Unclosed(6), "position 6"),
        ("é:}", KeyError::Unopened(4), "\"}\" at position 4 closes nothing"),
        ("{id}}", KeyError::Unopened(5), "position 5"),
        ("{a{b}", KeyError::Nested(3), "\"{\" at position 3 inside"),
        ("{a{{b}}}", KeyError::Nested(3), "position 3"),
        ("x{}", KeyError::Empty(2), "position 2 names no column"),
    ] {
        let found = KeyTemplate::parse(template).unwrap_err();
        assert_eq!(found, error, "{template}");
        assert!(found.to_string().contains(message), "{found}");
    }
}

#[test]
fn a_key_that_redis_would_refuse_is_an_error() {
    let template = KeyTemplate::parse("t:{a}").unwrap();
    let mut out = b"kept".to_vec();
    let result = template.render(|_, out| out.resize(out.len() + MAX_KEY_BYTES - 1, b'x'), &mut out);
    assert_eq!(result, Err(KeyError::TooLong(MAX_KEY_BYTES + 1)));
    assert_eq!(out, b"kept");
}

#[test]
fn keys_of_one_placeholder_match_by_prefix_and_suffix() {
    assert_eq!(matched("u:{id}:x", "u:7:x"), Some(vec!["7".into()]));
    assert_eq!(matched("u:{id}:x", "u:a:b%:x"), Some(vec!["a:b%".into()]));
    assert_eq!(matched("u:{id}:x", "u::x"), Some(vec![String::new()]));
    assert_eq!(
        matched("u:{id}:x", "u:x"),
        None,
        "prefix and suffix do not overlap"
    );
    assert_eq!(matched("u:{id}:x", "v:7:x"), None);
}

#[test]
fn keys_of_several_placeholders_match_exactly() {
    assert_eq!(
        matched("t:{a}:{b}", "t:x%3Ay:100%25"),
        Some(vec!["x:y".into(), "100%".into()])
    );
    assert_eq!(matched("t:{a}:{b}", "t:x:y:z"), None, "a raw colon");
    assert_eq!(matched("t:{a}:{b}", "t:x"), None);
    for broken in ["t:%:b", "t:%2:b", "t:%3a:b", "t:%41:b", "t:a:b%"] {
        assert_eq!(matched("t:{a}:{b}", broken), None, "{broken}");
    }
    assert_eq!(
        matched("{a}:{b}-end", "1:x-end-end"),
        Some(vec!["1".into(), "x-end".into()])
    );
    assert_eq!(matched("{a}-:{b}", "1--:2"), Some(vec!["1-".into(), "2".into()]));
}

#[test]
fn a_column_named_twice_has_one_value() {
    assert_eq!(
        matched("{a}:{a}:{b}", "1:1:2"),
        Some(vec!["1".into(), "2".into()])
    );
    assert_eq!(matched("{a}:{a}:{b}", "1:3:2"), None);
    assert_eq!(
        matched("{a}{b}{a}", "xyzx"),
        Some(vec![String::new(), "xyzx".into()])
    );
    assert_eq!(
        matched("{a}{b}{a}!", "x%3Ayx%3A!"),
        Some(vec![String::new(), "x:yx:".into()])
    );
}

#[test]
fn ambiguous_templates_match_leftmost_shortest() {
    assert_eq!(matched("{a}{b}", "xy"), Some(vec![String::new(), "xy".into()]));
    assert_eq!(matched("{a}-{b}", "1-2-3"), Some(vec!["1".into(), "2-3".into()]));
    // The first "%2" would leave "5y%2b" for b, which no value is written as.
    assert_eq!(
        matched("{a}%2{b}", "x%25y%2b"),
        Some(vec!["x%y".into(), "b".into()])
    );
}

#[test]
fn a_hostile_key_does_not_take_for_ever() {
    let template = KeyTemplate::parse("{a}{b}{c}{d}{e}{f}{g}{h}!").unwrap();
    assert_eq!(template.match_key(&[b'x'; 300]), None);
}

#[test]
fn scan_patterns_escape_what_globs_mean() {
    let pattern =
        |template: &str| String::from_utf8(KeyTemplate::parse(template).unwrap().scan_pattern()).unwrap();
    assert_eq!(pattern("user:{id}"), "user:*");
    assert_eq!(pattern("{a}{b}:x"), "*:x");
    assert_eq!(pattern(r"{{a*b}}?[c]\:{id}*"), r"{a\*b}\?\[c\]\\:*\*");
}

#[test]
fn a_template_has_a_key_space_of_its_own_or_everybodys() {
    let has = |text: &str| KeyTemplate::parse(text).unwrap().has_own_space();
    for own in ["user:{id}", "#{id}", "{{{id}}}", "{t}:users:{id}", "{id}ä"] {
        assert!(has(own), "{own}");
    }
    for everybodys in ["{id}", "{a}:{b}", "{a}{b}", "{a}-{b}_"] {
        assert!(!has(everybodys), "{everybodys}");
    }
}

#[test]
fn templates_that_can_make_one_key() {
    let overlap = |one: &str, other: &str| {
        let (one, other) = (
            KeyTemplate::parse(one).unwrap(),
            KeyTemplate::parse(other).unwrap(),
        );
        assert_eq!(one.overlaps(&other), other.overlaps(&one));
        (one.overlaps(&other), one.ties_with(&other))
    };
    for (one, other) in [
        ("x:{a}-{b}", "x:{a}_{b}"),
        ("x:{a}-", "x:{a}{b}-"),
        ("{a}a{b}", "{a}b{b}"),
        // A single placeholder takes colons.
        ("x:{a}", "x:{b}{c}"),
        // What is escaped may be another's literal.
        ("x:{a}%25{b}", "x:{a}-{b}--"),
    ] {
        assert_eq!(overlap(one, other), (true, true), "{one} {other}");
    }
    for (one, other) in [
        ("x:{a}", "y:{a}"),
        ("{t}:users:{id}", "{t}:items:{id}"),
        ("x:{a}-a", "x:{a}-b"),
    ] {
        assert_eq!(overlap(one, other), (false, false), "{one} {other}");
    }
    // No value has a percent sign by itself.
    for (one, other) in [("x:{a}%2{b}", "x:{a}%{b}:"), ("x:{a}:{b}:", "x:{a}-{b}-")] {
        assert!(!overlap(one, other).0, "{one} {other}");
    }
    // The more specific one has it, or it is the same template.
    for (one, other) in [
        ("user:{id}", "user:{id}:profile"),
        ("user:{id}", "user:a{id}"),
        ("x:{a}", "x:{b}"),
    ] {
        assert_eq!(overlap(one, other), (true, false), "{one} {other}");
    }
    let long = |end: &str| format!("{}{end}", "{a}-".repeat(3_000));
    let started = std::time::Instant::now();
    assert!(!overlap(&long("a"), &long("b")).0, "they end in another way");
    // No value has a percent sign by itself, so no key is of both.
    assert!(overlap(&long("%a{z}"), &long("%b{z}")).0, "nobody knows");
    assert!(started.elapsed() < PATIENCE);
}

/// The sink asks it of each pair of tables when a session begins, and thousands of them may begin with the tenant.
#[test]
fn of_usual_templates_it_is_told_at_a_glance() {
    let parse = |text: String| KeyTemplate::parse(&text).unwrap();
    let started = std::time::Instant::now();
    for shape in ["{t}:table@:{id}", "{id}:table@"] {
        // Of many lengths, so that each pair has one that is more specific.
        let name = |i: usize| format!("{}{i}", "x".repeat(i % 9));
        let all: Vec<_> = (0..700).map(|i| parse(shape.replace('@', &name(i)))).collect();
        for one in &all {
            assert!(all.iter().all(|other| !one.takes_from(other)));
        }
    }
    assert!(started.elapsed() < PATIENCE);
}

proptest! {
    /// A key that both templates match is found by trying all short ones.
    #[test]
    fn templates_overlap_if_there_is_a_key_of_both(
        one in "[-a:]{0,2}\\{x\\}([-a:]{0,2}\\{y\\})?[-a:]{0,1}",
        other in "[-a:]{0,2}\\{x\\}([-a:]{0,2}\\{y\\})?[-a:]{0,1}",
    ) {
        let (one, other) = (KeyTemplate::parse(&one).unwrap(), KeyTemplate::parse(&other).unwrap());
        let is_of_both = |key: &Vec<u8>| one.match_key(key).is_some() && other.match_key(key).is_some();
        let (mut keys, mut found) = (vec![Vec::new()], false);
        // Each byte of the shortest is one of a literal, of one or the other.
        for _ in 0..=one.specificity().1 + other.specificity().1 {
            found |= keys.iter().any(is_of_both);
            if found {
                break;
            }
            let longer = |key: &Vec<u8>| {
                let key = key.clone();
                b"-a:".iter().map(move |byte| [key.as_slice(), &[*byte]].concat())
            };
            keys = keys.iter().flat_map(longer).collect();
            if keys.len() > 20_000 {
                break;
            }
        }
        if keys.len() <= 20_000 || found {
            prop_assert_eq!(one.overlaps(&other), found);
        }
    }

    #[test]
    fn a_key_gives_back_its_values(
        first in "[a-z:%*{}]{0,4}",
        separators in vec("[a-z0-9%*{}]{0,3}:[a-z0-9%:*{}]{0,3}", 0..4),
        last in "[a-z0-9%{}]{0,3}",
        values in vec(vec(prop_oneof![Just(b':'), Just(b'%'), Just(b'2'), Just(b'a'), any::<u8>()], 0..12), 5),
    ) {
        let literal = |text: &str| text.replace('{', "{{").replace('}', "}}");
        let mut text = literal(&first) + "{c0}";
        for (i, separator) in separators.iter().enumerate() {
            text += &format!("{}{{c{}}}", literal(separator), i + 1);
        }
        text += &literal(&last);
        let template = KeyTemplate::parse(&text).unwrap();
        let values = &values[..=separators.len()];
        let matched = template.match_key(&render(&template, values));
        prop_assert_eq!(matched.as_deref(), Some(values));
    }

    #[test]
    fn what_matches_renders_to_the_same_key(
        text in "[a:%2]?(\\{[ab]\\}[a:%23A]{0,2}){1,3}|[{}a:%]{0,12}",
        key in vec(prop_oneof![Just(b':'), Just(b'%'), Just(b'2'), Just(b'3'), Just(b'5'), Just(b'A'), Just(b'a')], 0..16),
    ) {
        if let Ok(template) = KeyTemplate::parse(&text) {
            if let Some(values) = template.match_key(&key) {
                prop_assert_eq!(render(&template, &values), key);
            }
            prop_assert!(KeyTemplate::parse(&template.skeleton()).is_err(), "a skeleton names no column");
        }
    }
}

/// Found by fuzzing: with a column named twice, no dead end was remembered, and this took for ever.
#[test]
fn no_key_makes_the_search_exponential() {
    let template = KeyTemplate::parse(&"{a}{b}{c}{d}{a}{e}{f}{c}{g}x".repeat(4)).unwrap();
    let key = "dretdretd".repeat(100);
    let started = std::time::Instant::now();
    assert_eq!(template.match_key(key.as_bytes()), None);
    assert!(started.elapsed() < PATIENCE);
}
