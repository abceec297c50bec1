//! What Redis refuses within a batch: it is named, classed, and noted for repair or left out.

use super::*;
use crate::plan::Script;

#[test]
fn a_command_that_fails_inside_of_the_exec_is_named_and_noted_for_repair() {
    let Some(server) = Server::start() else { return };
    let mut writer = claim(&server, Some(Lsn(1)));
    writer.set_tables(|_| Some("public.t".to_owned()));
    let mut reader = server.connect();
    get(&mut reader, &["SET", "foreign", "1"]);
    let error = failed(
        &mut writer,
        segment(
            2,
            &[("a", &["SET"]), ("foreign", &["HSET", "f"]), ("b", &["SET"])],
        ),
    );
    assert_eq!(error.class(), Class::Operator);
    let text = error.to_string();
    assert!(
        text.contains("\"foreign\" of the table public.t")
            && text.contains("WRONGTYPE")
            && text.contains("0/2"),
        "{text}"
    );
    let next = error.next_command().unwrap();
    assert!(next.contains("redis-cli TYPE foreign"), "{next}");
    assert_eq!(
        get(&mut reader, &["HGET", "walmirror:{s}:pending", "foreign"]),
        "77"
    );
    assert_eq!(get(&mut reader, &["HLEN", "walmirror:{s}:pending"]), "int(1)");
}

/// The story: the answer to the question for the role was taken for that to the note, so that no key was noted and its row stayed out.
#[test]
fn what_is_refused_is_noted_also_where_the_role_is_asked() {
    let Some(server) = Server::start() else { return };
    let mut reader = server.connect();
    get(&mut reader, &["SET", "foreign", "1"]);
    for (start, is_ahead) in [(Some(Lsn(1)), false), (None, true)] {
        let mut writer = claim(&server, start);
        writer.ask_role();
        let next = set(3, "b");
        let error = writer
            .apply(
                segment(2, &[("foreign", &["HSET", "f"])]),
                Some(&next).filter(|_| is_ahead),
                &|| false,
            )
            .unwrap_err();
        assert!(error.to_string().contains("WRONGTYPE"), "{error}");
        assert_eq!(
            get(&mut reader, &["HGET", "walmirror:{s}:pending", "foreign"]),
            "77"
        );
        get(&mut reader, &["DEL", "walmirror:{s}:pending"]);
    }
}

#[test]
fn a_key_of_another_type_is_skipped_and_noted_if_that_is_wanted() {
    let Some(server) = Server::start() else { return };
    let mut writer = claim(&server, Some(Lsn(1)));
    writer.set_on_bad_row(crate::config::OnBadRow::Skip);
    let mut reader = server.connect();
    get(&mut reader, &["SET", "foreign", "1"]);
    let commands: [(&str, &[&str]); 4] = [
        ("a", &["SET"]),
        ("foreign", &["HSET", "f"]),
        ("foreign", &["HDEL"]),
        ("b", &["SET"]),
    ];
    let applied = writer
        .apply(segment(2, &commands), None, &|| false)
        .unwrap()
        .unwrap();
    let foreign = Refused {
        key: b"foreign".to_vec(),
        relation: 77,
    };
    assert_eq!(applied.refused, [foreign]);
    let note = rejected();
    writer.note_rejected(std::slice::from_ref(&note)).unwrap();
    let told = crate::rejected::read(&mut reader, &keys(), 5).unwrap();
    assert_eq!(told, (1, vec![note]));
    // The mirror goes on.
    assert!(writer.apply(set(3, "c"), None, &|| false).unwrap().is_some());
    assert_eq!(get(&mut reader, &["EXISTS", "a", "b", "c"]), "int(3)");
    assert_eq!(get(&mut reader, &["GET", "foreign"]), "1");
}

#[test]
fn a_command_that_is_not_queued_aborts_the_batch_and_is_classed() {
    let Some(server) = Server::start() else { return };
    let mut writer = claim(&server, Some(Lsn(1)));
    let mut reader = server.connect();
    get(&mut reader, &["CONFIG", "SET", "maxmemory", "1"]);
    let error = failed(&mut writer, set(2, "a"));
    assert_eq!(error.class(), Class::Retry, "{error}");
    assert!(error.to_string().contains("OOM"), "{error}");
    get(&mut reader, &["CONFIG", "SET", "maxmemory", "0"]);
    assert_eq!(get(&mut reader, &["HGET", PROGRESS, "lsn"]), "0/1");
}

/// The story: who may not write one key of a batch was told so without its name.
#[test]
fn a_right_that_lacks_for_one_key_is_told_with_key_and_table() {
    let Some(server) = Server::start() else { return };
    let mut reader = server.connect();
    let rules = ["resetkeys", "~walmirror:*", "~a*", "+@all"];
    get(
        &mut reader,
        &[&["ACL", "SETUSER", "default"], &rules[..]].concat(),
    );
    let mut writer = claim(&server, Some(Lsn(1)));
    writer.set_tables(|oid| (oid == 77).then(|| "public.t".to_owned()));
    let commands: [(&str, &[&str]); 3] = [("a", &["SET"]), ("a2", &["HSET", "f"]), ("b", &["HSET", "f"])];
    let error = failed(&mut writer, segment(2, &commands));
    assert_eq!(error.class(), Class::Access, "{error}");
    let text = error.to_string();
    assert!(
        text.contains("HSET for the key \"b\" of the table public.t") && text.contains("NOPERM"),
        "{text}"
    );
}

#[test]
fn a_key_of_the_sinks_own_is_told_as_one() {
    let Some(server) = Server::start() else { return };
    let mut writer = claim(&server, Some(Lsn(1)));
    let mut reader = server.connect();
    let own = "walmirror:{s}:relations";
    get(&mut reader, &["SET", own, "1"]);
    let mut segment = set(2, "a");
    let mut batch = Batch::new();
    Writer::open(batch.bookkeeping());
    batch
        .bookkeeping()
        .command(&[b"HSET", own.as_bytes(), b"f", b"v"]);
    write_step(batch.bookkeeping(), &keys(), &segment.step.unwrap());
    Writer::close(batch.bookkeeping(), &keys());
    batch.seal();
    segment.batch = batch;
    let error = failed(&mut writer, segment);
    let text = error.to_string();
    assert!(
        text.contains("HSET of the sink's own key") && text.contains(own),
        "{text}"
    );
    let next = error.next_command().unwrap();
    assert!(next.contains(&format!("UNLINK '{own}'")), "{next}");
}

/// The story: a login that may do all but RENAME moved no row whose large value did not change. The sink ended as over a bug, and the old key
/// stayed for good.
#[test]
fn a_move_that_the_script_may_not_do_is_told_as_a_right_and_both_keys_are_noted() {
    let Some(server) = Server::start() else { return };
    let mut writer = claim(&server, Some(Lsn(1)));
    let mut reader = server.connect();
    get(&mut reader, &["HSET", "old", "v", "1"]);
    let script = get(&mut reader, &["SCRIPT", "LOAD", Script::PatchHash.source()]);
    get(&mut reader, &["ACL", "SETUSER", "default", "-rename"]);
    let mut segment = set(2, "a");
    let mut batch = Batch::new();
    Writer::open(batch.bookkeeping());
    let mut op = batch.op(77, 1, OpKind::Other, b"new");
    op.commands()
        .begin(10)
        .arg(b"EVALSHA")
        .arg(script.as_bytes())
        .int(3);
    let rest = op.key(b"new").arg(&keys().pending);
    for arg in ["old", "77", "0", "m", "0"] {
        rest.arg(arg.as_bytes());
    }
    write_step(batch.bookkeeping(), &keys(), &segment.step.unwrap());
    Writer::close(batch.bookkeeping(), &keys());
    batch.seal();
    segment.batch = batch;
    let error = failed(&mut writer, segment);
    assert_eq!(error.class(), Class::Access, "{error}");
    assert!(error.next_command().unwrap().contains("ACL SETUSER"), "{error}");
    for key in ["new", "old"] {
        assert_eq!(get(&mut reader, &["HGET", "walmirror:{s}:pending", key]), "77");
    }
}
