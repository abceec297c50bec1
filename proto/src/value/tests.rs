//! Values next to what a Postgres 15 server printed for them (`v::text` and `to_jsonb(v)::text`).

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use super::*;
use crate::pb;
use proptest::prelude::*;

fn text(datum: Datum<'_>) -> String {
    let mut out = Vec::new();
    datum.write_text(&mut out);
    String::from_utf8(out).unwrap()
}

fn json(datum: Datum<'_>) -> String {
    let mut out = Vec::new();
    datum.write_json(&mut out);
    String::from_utf8(out).unwrap()
}

#[track_caller]
fn check(datum: Datum<'_>, expect_text: &str, expect_json: &str) {
    assert_eq!(text(datum), expect_text);
    assert_eq!(json(datum), expect_json);
}

#[test]
fn booleans_and_integers() {
    check(Datum::Bool(true), "true", "true");
    check(Datum::Bool(false), "false", "false");
    check(Datum::Int(0), "0", "0");
    check(
        Datum::Int(i64::MIN),
        "-9223372036854775808",
        "-9223372036854775808",
    );
    check(Datum::Oid(u32::MAX), "4294967295", "\"4294967295\"");
    check(Datum::Null, "", "null");
}

#[test]
fn double_precision() {
    for (value, expect_text, expect_json) in [
        (0.0, "0", "0"),
        (-0.0, "-0", "0"),
        (1.0, "1", "1"),
        (0.1, "0.1", "0.1"),
        (0.30000000000000004, "0.30000000000000004", "0.30000000000000004"),
        (-1234.5, "-1234.5", "-1234.5"),
        (123456789012345.0, "123456789012345", "123456789012345"),
        (999999999999999.0, "999999999999999", "999999999999999"),
        (1e15, "1e+15", "1000000000000000"),
        (1234567890123456.0, "1.234567890123456e+15", "1234567890123456"),
        (0.0001, "0.0001", "0.0001"),
        (0.00001, "1e-05", "0.00001"),
        (1.5e-10, "1.5e-10", "0.00000000015"),
        (9007199254740993.0, "9.007199254740992e+15", "9007199254740992"),
        (f64::NAN, "NaN", "\"NaN\""),
        (-f64::NAN, "NaN", "\"NaN\""),
        (f64::INFINITY, "Infinity", "\"Infinity\""),
        (f64::NEG_INFINITY, "-Infinity", "\"-Infinity\""),
    ] {
        check(Datum::Float8(value), expect_text, expect_json);
    }
    check(Datum::Float8(1e300), "1e+300", &format!("1{}", "0".repeat(300)));
    check(
        Datum::Float8(5e-324),
        "5e-324",
        &format!("0.{}5", "0".repeat(323)),
    );
    check(
        Datum::Float8(f64::MAX),
        "1.7976931348623157e+308",
        &format!("17976931348623157{}", "0".repeat(292)),
    );
}

#[test]
fn the_end_of_the_rounding_interval_is_not_inside_it() {
    // 1e+23 is the midpoint of two floats, so Postgres prints the lower one longer than most others do.
    check(
        Datum::Float8(1e23),
        "9.999999999999999e+22",
        "99999999999999990000000",
    );
    check(
        Datum::Float8(1.0000000000000001e23),
        "1.0000000000000001e+23",
        "100000000000000010000000",
    );
    check(
        Datum::Float8(9007199254740994.0),
        "9.007199254740994e+15",
        "9007199254740994",
    );
    check(
        Datum::Float8(2f64.powi(-44)),
        "5.684341886080802e-14",
        "0.00000000000005684341886080802",
    );
    assert_eq!(text(Datum::Float4(33554432.0)), "3.3554432e+07");
    assert_eq!(text(Datum::Float4(8589934592.0)), "8.589935e+09");
}

#[test]
fn real() {
    for (value, expect_text, expect_json) in [
        (0.0, "0", "0"),
        (0.1, "0.1", "0.1"),
        (16777216.0, "1.6777216e+07", "16777216"),
        (99999.0, "99999", "99999"),
        (999999.0, "999999", "999999"),
        (1e6, "1e+06", "1000000"),
        (1.23456e-4, "0.000123456", "0.000123456"),
        (1e-5, "1e-05", "0.00001"),
        (f32::NEG_INFINITY, "-Infinity", "\"-Infinity\""),
    ] {
        check(Datum::Float4(value), expect_text, expect_json);
    }
    check(
        Datum::Float4(f32::MAX),
        "3.4028235e+38",
        "340282350000000000000000000000000000000",
    );
    check(
        Datum::Float4(f32::from_bits(1)),
        "1e-45",
        "0.000000000000000000000000000000000000000000001",
    );
}

#[test]
fn numeric() {
    for (scale, mantissa, expect) in [
        (0, 0, "0"),
        (2, 0, "0.00"),
        (0, -7, "-7"),
        (2, -7, "-0.07"),
        (2, 700, "7.00"),
        (5, 123456, "1.23456"),
        (18, i64::MIN, "-9.223372036854775808"),
    ] {
        check(Datum::Numeric { scale, mantissa }, expect, expect);
    }
    check(Datum::NumericText(b"NaN"), "NaN", "\"NaN\"");
    check(Datum::NumericText(b"-Infinity"), "-Infinity", "\"-Infinity\"");
    check(
        Datum::NumericText(b"-12345678901234567890.5"),
        "-12345678901234567890.5",
        "-12345678901234567890.5",
    );
}

#[test]
fn dates() {
    for (days, expect) in [
        (0, "2000-01-01"),
        (7364, "2020-02-29"),
        (-730_119, "0001-01-01"),
        (-730_120, "0001-12-31 BC"),
        (-2_451_545, "4714-11-24 BC"),
        (2_921_940, "10000-01-01"),
        (2_145_031_948, "5874897-12-31"),
        (i32::MAX, "infinity"),
        (i32::MIN, "-infinity"),
    ] {
        check(Datum::Date(days), expect, &format!("\"{expect}\""));
    }
}

#[test]
fn timestamps() {
    for (micros, day, time, era) in [
        (0, "2000-01-01", "00:00:00", ""),
        (631_249_445_600_000, "2020-01-02", "03:04:05.6", ""),
        (-1, "1999-12-31", "23:59:59.999999", ""),
        (120_000, "2000-01-01", "00:00:00.12", ""),
        (-63_082_281_600_000_001, "0001-12-31", "23:59:59.999999", " BC"),
        (-211_813_488_000_000_000, "4714-11-24", "00:00:00", " BC"),
        (9_223_371_331_199_999_999, "294276-12-31", "23:59:59.999999", ""),
    ] {
        check(
            Datum::Timestamp(micros),
            &format!("{day} {time}{era}"),
            &format!("\"{day}T{time}{era}\""),
        );
        check(
            Datum::Timestamptz(micros),
            &format!("{day} {time}+00{era}"),
            &format!("\"{day}T{time}+00:00{era}\""),
        );
    }
    check(Datum::Timestamp(i64::MAX), "infinity", "\"infinity\"");
    check(Datum::Timestamptz(i64::MIN), "-infinity", "\"-infinity\"");
}

#[test]
fn bytes_and_texts() {
    let uuid = *b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff";
    check(
        Datum::Uuid(&uuid),
        "00112233-4455-6677-8899-aabbccddeeff",
        "\"00112233-4455-6677-8899-aabbccddeeff\"",
    );
    check(Datum::Bytea(b""), "\\x", "\"\\\\x\"");
    check(Datum::Bytea(b"\x00hi\xff"), "\\x006869ff", "\"\\\\x006869ff\"");
    check(
        Datum::Text("plain é 😀 / \u{7f}".as_bytes()),
        "plain é 😀 / \u{7f}",
        "\"plain é 😀 / \u{7f}\"",
    );
    check(
        Datum::Text(b"\x01\x08\t\n\x0b\x0c\r\x1f\"\\"),
        "\x01\x08\t\n\x0b\x0c\r\x1f\"\\",
        r#""\u0001\b\t\n\u000b\f\r\u001f\"\\""#,
    );
    check(
        Datum::Json(br#"{"a": [1, 2]}"#),
        r#"{"a": [1, 2]}"#,
        r#"{"a": [1, 2]}"#,
    );
}

#[test]
fn text_that_is_not_utf8_passes_through() {
    // A SQL_ASCII database stores whatever bytes it is given.
    let mut out = Vec::new();
    Datum::Text(b"\xff\xfe").write_text(&mut out);
    assert_eq!(out, b"\xff\xfe");
}

#[test]
fn objects_have_the_order_and_spacing_of_jsonb() {
    let names = ["id", "name", "Zz", "é", "a\"b", "b", "B"];
    let columns = names.iter().map(|name| pb::Column {
        name: (*name).into(),
        in_value: true,
        ..pb::Column::default()
    });
    let mut relation = pb::Relation {
        columns: columns.collect(),
        ..pb::Relation::default()
    };
    relation.columns.push(pb::Column {
        name: "only_in_key".into(),
        ..pb::Column::default()
    });
    let row = [
        Datum::Int(1),
        Datum::Text(b"x"),
        Datum::Null,
        Datum::Bool(true),
        Datum::Oid(7),
        Datum::Numeric {
            scale: 2,
            mantissa: 150,
        },
        Datum::Json(b"[]"),
        Datum::Int(9),
    ];
    let mut out = b"before ".to_vec();
    assert!(JsonShape::new(&relation).write(&row, &mut out));
    let expect = r#"before {"B": [], "b": 1.50, "Zz": null, "id": 1, "é": true, "a\"b": "7", "name": "x"}"#;
    assert_eq!(String::from_utf8(out).unwrap(), expect);

    let mut empty = Vec::new();
    assert!(JsonShape::default().write(&[], &mut empty));
    assert_eq!(empty, b"{}");
}

#[test]
fn an_object_with_an_unchanged_column_is_not_written() {
    let shape = JsonShape::of_names([(0, "a"), (1, "b")]);
    let mut out = b"before".to_vec();
    assert!(!shape.write(&[Datum::Int(1), Datum::Unchanged], &mut out));
    assert!(!shape.write(&[Datum::Int(1)], &mut out));
    assert_eq!(out, b"before");
}

proptest! {
    #[test]
    fn every_float_reads_back(bits: u64) {
        let value = f64::from_bits(bits);
        prop_assume!(!value.is_nan());
        prop_assert_eq!(text(Datum::Float8(value)).parse::<f64>().unwrap().to_bits(), bits);
        if value.is_finite() && value != 0.0 {
            prop_assert_eq!(json(Datum::Float8(value)).parse::<f64>().unwrap().to_bits(), bits);
        }
    }

    #[test]
    fn every_real_reads_back_and_has_no_digit_too_many(bits: u32) {
        let value = f32::from_bits(bits);
        prop_assume!(value.is_finite());
        let printed = text(Datum::Float4(value));
        prop_assert_eq!(printed.parse::<f32>().unwrap().to_bits(), bits);
        // No decimal with a digit less lies strictly between the midpoints to the neighbours, where one has to lie: Postgres
        // does not take the ends. The midpoints are exact in double precision.
        let digits = |text: &str| {
            let mantissa = text.split('e').next().unwrap_or_default();
            mantissa.bytes().filter(u8::is_ascii_digit).skip_while(|digit| *digit == b'0').count()
        };
        let has_even_neighbours = bits & 0x7F_FFFF != 0;
        if printed.contains('e') && digits(&printed) > 1 && has_even_neighbours {
            let shorter: f64 = format!("{:.*e}", digits(&printed) - 2, f64::from(value)).parse().unwrap();
            let half = (f64::from(value.next_up()) - f64::from(value)) / 2.0;
            prop_assert!((shorter - f64::from(value)).abs() >= half, "{} for {}", printed, shorter);
        }
    }

    #[test]
    fn json_strings_are_json(text: String) {
        let mut out = Vec::new();
        write_json_string(&mut out, text.as_bytes());
        prop_assert!(out.iter().all(|&byte| byte >= 0x20));
        let printed = String::from_utf8(out).unwrap();
        let inner = printed.strip_prefix('"').unwrap().strip_suffix('"').unwrap();
        let plain = inner.replace("\\\\", "\0").replace("\\\"", "\u{1}");
        prop_assert!(!plain.contains('"'));
    }
}
