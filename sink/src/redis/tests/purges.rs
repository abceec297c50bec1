//! TRUNCATE: the keys of a template go, those of large tables ahead of their transaction.

use super::*;
use crate::progress::Purging;

#[test]
fn a_purge_takes_the_keys_of_its_template_and_no_others() {
    let Some(server) = Server::start() else { return };
    let mut writer = claim(&server, Some(Lsn(1)));
    let mut reader = server.connect();
    // More than fit into one atomic step in the second round.
    for (round, count) in [(0, 50), (1, 25_000)] {
        get(
            &mut reader,
            &[
                "EVAL",
                "for i = 1, ARGV[1] do redis.call('SET', 't:' .. i, 1) end return 'ok'",
                "0",
                &count.to_string(),
            ],
        );
        for other in ["t2:1", "t:a:7", "other"] {
            get(&mut reader, &["SET", other, "1"]);
        }
        let template = |text: &str| KeyTemplate::parse(text).unwrap();
        let purge = Purge::new(77, &template("t:{id}"), &[template("t:a:{id}")]);
        let segment = Segment {
            purges: vec![purge],
            ..set(2 + round, "t:new")
        };
        assert!(writer.apply(segment, None, &|| false).unwrap().is_some());
        assert_eq!(
            get(&mut reader, &["EXISTS", "t:new", "t2:1", "t:a:7", "other"]),
            "int(4)"
        );
        assert_eq!(get(&mut reader, &["DBSIZE"]), "int(5)");
    }
}

#[test]
fn the_purges_of_many_tables_share_one_walk() {
    let Some(server) = Server::start() else { return };
    let mut writer = claim(&server, Some(Lsn(1)));
    let mut reader = server.connect();
    let fill = "for i = 1, 20000 do redis.call('SET', 't' .. i % 100 .. ':' .. i, 1) end return 'ok'";
    get(&mut reader, &["EVAL", fill, "0"]);
    get(&mut reader, &["CONFIG", "RESETSTAT"]);
    // All but those of the last ten.
    let purges = (0..90).map(|table| {
        let template = KeyTemplate::parse(&format!("t{table}:{{id}}")).unwrap();
        Purge::new(table, &template, &[])
    });
    let segment = Segment {
        purges: purges.collect(),
        ..set(2, "new")
    };
    writer.apply(segment, None, &|| false).unwrap();
    assert_eq!(get(&mut reader, &["DBSIZE"]), "int(2002)");
    let stats = get(&mut reader, &["INFO", "commandstats"]);
    let (_, scans) = stats.split_once("cmdstat_scan:calls=").unwrap();
    let scans: u32 = scans.split(',').next().unwrap().parse().unwrap();
    // Pages of 500 buckets.
    assert!(scans < 100, "{scans} calls of SCAN for 20,000 keys");
}

/// Between the first page and the EXEC Redis lacks keys that it should have at its position. A failover may make that the truth
/// for good, so it is noted.
#[test]
fn a_purge_that_goes_ahead_is_noted_until_its_transaction_is_applied() {
    let Some(server) = Server::start() else { return };
    let mut writer = claim(&server, Some(Lsn(1)));
    let mut reader = server.connect();
    let fill = "for i = 1, 25000 do redis.call('SET', 't:' .. i, 1) end return 'ok'";
    get(&mut reader, &["EVAL", fill, "0"]);
    let purging = |lsn| Purging {
        commit: Some(Commit {
            lsn: Lsn(lsn),
            xid: 8,
            time: 9,
        }),
    };
    let segment = |lsn| Segment {
        purges: vec![Purge::new(77, &KeyTemplate::parse("t:{id}").unwrap(), &[])],
        purging: purging(lsn),
        ..set(lsn + 1, "t:new")
    };
    let other = std::cell::RefCell::new(server.connect());
    let is_noted = || get(&mut other.borrow_mut(), &["HEXISTS", PROGRESS, "purging"]) == "int(1)";
    assert!(!is_noted());
    let error = writer.apply(segment(7), None, &is_noted).unwrap_err();
    assert_eq!(error.class(), Class::Retry);
    let mut stored = || {
        let progress = read_stored(&mut reader, &keys()).unwrap().progress.unwrap();
        (progress.purging, progress.lsn)
    };
    assert_eq!(stored(), (Some(purging(7)), Lsn(1)));
    // The next session may apply by itself what was in one batch with it, and asked for a purge before it.
    let mut writer = claim(&server, None);
    writer.apply(segment(5), None, &|| false).unwrap();
    assert_eq!(stored(), (Some(purging(7)), Lsn(6)));
    writer.apply(segment(7), None, &|| false).unwrap();
    assert_eq!(stored(), (None, Lsn(8)));
}

/// Ten thousand of them may be gigabytes.
#[test]
fn a_purge_of_long_keys_goes_ahead_too() {
    let Some(server) = Server::start() else { return };
    let mut writer = claim(&server, Some(Lsn(1)));
    let mut reader = server.connect();
    let fill = "local long = string.rep('x', 10000) \
                for i = 1, 1000 do redis.call('SET', 't:' .. long .. i, 1) end return 'ok'";
    get(&mut reader, &["EVAL", fill, "0"]);
    let segment = || Segment {
        purges: vec![Purge::new(77, &KeyTemplate::parse("t:{id}").unwrap(), &[])],
        ..set(8, "t:new")
    };
    let other = std::cell::RefCell::new(server.connect());
    let is_noted = || get(&mut other.borrow_mut(), &["HEXISTS", PROGRESS, "purging"]) == "int(1)";
    let error = writer.apply(segment(), None, &is_noted).unwrap_err();
    assert_eq!(error.class(), Class::Retry);
    let mut writer = claim(&server, None);
    writer.apply(segment(), None, &|| false).unwrap();
    assert_eq!(get(&mut reader, &["DBSIZE"]), "int(2)");
    assert!(!is_noted());
}
