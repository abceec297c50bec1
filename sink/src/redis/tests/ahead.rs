//! Commands that are sent before their turn: they do nothing until then, and nothing that goes wrong meanwhile can make them.

use super::*;
use crate::config::OnBadRow;

fn exists(reader: &mut Connection, key: &str) -> bool {
    get(reader, &["EXISTS", key]) == "int(1)"
}

fn apply_before(writer: &mut Writer, segment: Segment, next: &Segment) -> Result<Option<Applied>, Error> {
    writer.apply(segment, Some(next), &|| false)
}

#[test]
fn what_is_sent_ahead_is_done_in_its_turn() {
    let Some(server) = Server::start() else { return };
    let mut writer = claim(&server, Some(Lsn(1)));
    let mut reader = server.connect();
    let mut next = set(2, "a2");
    for lsn in 2..6 {
        let segment = std::mem::replace(&mut next, set(lsn + 1, &format!("a{}", lsn + 1)));
        let applied = apply_before(&mut writer, segment, &next).unwrap().unwrap();
        assert_eq!(applied.step.lsn, Lsn(lsn));
        assert!(exists(&mut reader, &format!("a{lsn}")));
        assert!(!exists(&mut reader, &format!("a{}", lsn + 1)));
    }
    assert!(writer.apply(next, None, &|| false).unwrap().is_some());
    assert_eq!(get(&mut reader, &["HGET", PROGRESS, "lsn"]), "0/6");
}

#[test]
fn who_lost_the_claim_does_nothing_of_what_it_sent_ahead() {
    let Some(server) = Server::start() else { return };
    let mut old = claim(&server, Some(Lsn(1)));
    old.rename_for_test();
    let next = set(3, "b");
    apply_before(&mut old, set(2, "a"), &next).unwrap();
    let _new = claim(&server, None);
    let error = failed(&mut old, next);
    assert_eq!(error.class(), Class::Retry, "{error}");
    let mut reader = server.connect();
    assert!(exists(&mut reader, "a") && !exists(&mut reader, "b"));
    assert_eq!(get(&mut reader, &["HGET", PROGRESS, "lsn"]), "0/2");
}

#[test]
fn a_redis_that_was_emptied_takes_nothing_that_was_sent_ahead() {
    let Some(server) = Server::start() else { return };
    let mut writer = claim(&server, Some(Lsn(1)));
    let next = set(3, "b");
    apply_before(&mut writer, set(2, "a"), &next).unwrap();
    get(&mut server.connect(), &["FLUSHALL"]);
    assert_eq!(failed(&mut writer, next).class(), Class::Retry);
    assert_eq!(get(&mut server.connect(), &["DBSIZE"]), "int(0)");
}

/// The story: Redis lost its tail while the connection stayed, as that of a master that is made a replica and promoted again, so the epoch was
/// the same. The broken WATCH would have told, but the DISCARD before a WAIT takes that away: the next batch went on top of what was there, the
/// position passed what was lost, and nobody read that again.
#[test]
fn a_redis_that_went_back_takes_nothing_though_what_was_sent_ahead_is_taken_back() {
    let Some(server) = Server::start() else { return };
    let mut writer = claim(&server, Some(Lsn(1)));
    let mut reader = server.connect();
    let next = set(3, "b");
    apply_before(&mut writer, set(2, "a"), &next).unwrap();
    get(&mut reader, &["HSET", PROGRESS, "lsn", "0/1"]);
    let waited = writer.wait_replicas(0, 1);
    let error = waited
        .and_then(|_| writer.apply(next, None, &|| false))
        .unwrap_err();
    assert_eq!(error.class(), Class::Retry, "{error}");
    assert!(error.to_string().contains("went back"), "{error}");
    assert!(!exists(&mut reader, "b"));
    assert_eq!(get(&mut reader, &["HGET", PROGRESS, "lsn"]), "0/1");
}

#[test]
fn notes_and_questions_go_before_what_was_sent_ahead() {
    let Some(server) = Server::start() else { return };
    let mut writer = claim(&server, Some(Lsn(1)));
    writer.set_on_bad_row(OnBadRow::Skip);
    let mut reader = server.connect();
    get(&mut reader, &["SET", "foreign", "1"]);
    let next = segment(3, &[("b", &["SET"]), ("c", &["SET"])]);
    let refused = segment(2, &[("a", &["SET"]), ("foreign", &["HSET", "f"])]);
    let applied = apply_before(&mut writer, refused, &next).unwrap().unwrap();
    assert_eq!(applied.refused.len(), 1);
    let note = rejected();
    writer.note_rejected(std::slice::from_ref(&note)).unwrap();
    assert_eq!(
        crate::rejected::read(&mut reader, &keys(), 5).unwrap(),
        (1, vec![note])
    );
    assert!(!exists(&mut reader, "b"));
    let last = set(4, "d");
    apply_before(&mut writer, next, &last).unwrap();
    assert_eq!(get(&mut reader, &["EXISTS", "a", "b", "c", "d"]), "int(3)");
    // WAIT is answered only outside of a MULTI.
    assert_eq!(writer.wait_replicas(0, 1).unwrap(), 0);
    assert!(writer.apply(last, None, &|| false).unwrap().is_some());
    assert!(exists(&mut reader, "d"));
}

#[test]
fn a_refused_command_is_named_though_more_was_sent_ahead() {
    let Some(server) = Server::start() else { return };
    let mut writer = claim(&server, Some(Lsn(1)));
    let mut reader = server.connect();
    get(&mut reader, &["SET", "foreign", "1"]);
    let refused = segment(2, &[("a", &["SET"]), ("foreign", &["HSET", "f"])]);
    let error = apply_before(&mut writer, refused, &set(3, "b")).unwrap_err();
    assert!(error.to_string().contains("\"foreign\""), "{error}");
    let pending = "walmirror:{s}:pending";
    assert_eq!(get(&mut reader, &["HGET", pending, "foreign"]), "77");
    assert_eq!(get(&mut reader, &["HLEN", pending]), "int(1)");
    assert!(!exists(&mut reader, "b"));
}

#[test]
fn a_purge_has_nothing_sent_ahead_of_it() {
    let Some(server) = Server::start() else { return };
    let mut writer = claim(&server, Some(Lsn(1)));
    let mut reader = server.connect();
    let next = Segment {
        purges: vec![Purge::new(77, &KeyTemplate::parse("t:{id}").unwrap(), &[])],
        ..set(3, "t:new")
    };
    apply_before(&mut writer, set(2, "t:old"), &next).unwrap();
    assert!(exists(&mut reader, "t:old"));
    let last = set(4, "a");
    apply_before(&mut writer, next, &last).unwrap();
    assert_eq!(get(&mut reader, &["EXISTS", "t:old", "t:new", "a"]), "int(1)");
    assert!(writer.apply(last, None, &|| false).unwrap().is_some());
    assert_eq!(get(&mut reader, &["HGET", PROGRESS, "lsn"]), "0/4");
}

/// Found by a quarter of an hour of random faults: the commands were queued while Redis still took writes, and the EXEC says so in words of its own.
#[test]
fn an_exec_that_is_refused_itself_is_classed_by_its_reason() {
    let Some(server) = Server::start() else { return };
    let mut reader = server.connect();
    let faults: [(&str, &[&str], &[&str]); 2] = [
        (
            "READONLY",
            &["REPLICAOF", "127.0.0.1", "1"],
            &["REPLICAOF", "NO", "ONE"],
        ),
        (
            "OOM",
            &["CONFIG", "SET", "maxmemory", "1"],
            &["CONFIG", "SET", "maxmemory", "0"],
        ),
    ];
    for (number, (code, cause, mend)) in (1..).zip(faults) {
        let mut writer = claim(&server, (number == 1).then_some(Lsn(1)));
        let next = set(10 * number + 1, code);
        apply_before(&mut writer, set(10 * number, "a"), &next).unwrap();
        get(&mut reader, cause);
        let error = failed(&mut writer, next);
        assert_eq!(error.class(), Class::Retry, "{error}");
        assert!(error.to_string().contains(code), "{error}");
        get(&mut reader, mend);
        assert!(!exists(&mut reader, code));
    }
}

/// Redis looks at the rights once more when it executes what was queued. An MSET that is refused there is of several rows.
#[test]
fn all_keys_of_a_refused_mset_are_noted_for_repair() {
    let Some(server) = Server::start() else { return };
    let mut writer = claim(&server, Some(Lsn(1)));
    let mut reader = server.connect();
    let next = segment(3, &[("b", &["SET"]), ("c", &["SET"]), ("h", &["HSET", "f"])]);
    apply_before(&mut writer, set(2, "a"), &next).unwrap();
    get(&mut reader, &["ACL", "SETUSER", "default", "-mset"]);
    let error = failed(&mut writer, next);
    assert_eq!(error.class(), Class::Access, "{error}");
    assert!(
        error.to_string().contains("\"b\"") && error.to_string().contains("NOPERM"),
        "{error}"
    );
    let pending = "walmirror:{s}:pending";
    assert_eq!(get(&mut reader, &["HLEN", pending]), "int(2)");
    for key in ["b", "c"] {
        assert_eq!(get(&mut reader, &["HGET", pending, key]), "77");
        assert!(!exists(&mut reader, key));
    }
    assert!(exists(&mut reader, "h"));
}
