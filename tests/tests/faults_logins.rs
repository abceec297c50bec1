//! A login is refused: passwords, rights and connections are taken away and given back, and passwords are changed for good.
//!
//! What Redis refuses to whoever is logged in, and a password that is changed and changed back: faults_redis_refuses.rs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use walmirror_tests::{DEADLINE, Dir, POSTGRES_AWAY, Pg, REDIS_AWAY, Scenario, Setup};

/// The password before it is changed, and after it.
const OLD: &str = "first";
const NEW: &str = "second-to-none";

/// A `pg_hba.conf` that lets the role `mirror` in like this, and everybody else as they are.
fn hba(how: &str) -> String {
    format!("local all mirror {how}\nlocal all all trust\nlocal replication all trust\n")
}

/// A server of which the sink's role has a password, which the sink finds so.
fn a_role_with_a_password(found: &str) -> Setup {
    let pg = Pg::start("password_encryption = 'scram-sha-256'");
    let role =
        format!("CREATE ROLE mirror LOGIN REPLICATION PASSWORD '{OLD}'; GRANT pg_read_all_data TO mirror");
    pg.connect("postgres").batch_execute(&role).unwrap();
    pg.set_hba(&hba("scram-sha-256"));
    pg.reload();
    Setup {
        pg: Arc::new(pg),
        user: format!("mirror {found}"),
        ..Setup::default()
    }
}

/// Whoever logs in is refused, in every way there is. Each is an ERROR line with the next command, until it is mended; only
/// that there are too many connections, which may pass by itself, is a warning.
#[test]
fn nobody_is_let_in() {
    let setup = a_role_with_a_password("password=first");
    let s = Scenario::start("nobody_is_let_in", setup);
    let hba_is = |how: &str| {
        s.m.db.pg.set_hba(&hba(how));
        s.m.db.pg.reload();
    };
    type Deed<'a> = &'a dyn Fn();
    let cases: [(&str, Deed<'_>, Deed<'_>); 5] = [
        (
            "password authentication failed",
            &|| s.m.sql("ALTER ROLE mirror PASSWORD 'second'"),
            &|| s.m.sql("ALTER ROLE mirror PASSWORD 'first'"),
        ),
        ("pg_hba.conf rejects", &|| hba_is("reject"), &|| {
            hba_is("scram-sha-256")
        }),
        (
            "is not permitted to log in",
            &|| s.m.sql("ALTER ROLE mirror NOLOGIN"),
            &|| s.m.sql("ALTER ROLE mirror LOGIN"),
        ),
        (
            "replication",
            &|| s.m.sql("ALTER ROLE mirror NOREPLICATION"),
            &|| s.m.sql("ALTER ROLE mirror REPLICATION"),
        ),
        (
            "too many connections for role",
            &|| s.m.sql("ALTER ROLE mirror CONNECTION LIMIT 0"),
            &|| s.m.sql("ALTER ROLE mirror CONNECTION LIMIT -1"),
        ),
    ];
    for (said, harm, heal) in cases {
        let seen = s.log().len();
        harm();
        s.pg_link.cut();
        s.tries_seldom(&s.pg_link);
        if said.starts_with("too many connections") {
            s.said(said, seen);
        } else {
            s.said_what_to_do(said, seen);
        }
        s.is_ready(false);
        heal();
        s.recovers();
        // With another process the pauses begin small again.
        s.kill_sink();
        s.flow();
    }
    assert!(!s.log().contains("password=first"), "{}", s.log());
    // Meanwhile the load goes on, and no sink lives for as long as --durability waits.
    let kept = "the slot keeps * MiB of WAL, and nothing limits it";
    s.finish(&[&POSTGRES_AWAY[..], &[kept]].concat());
}

/// Only the file that libpq takes the password from has the new one. It is read for each connection, so that the sink goes on as it is.
#[test]
fn a_postgres_password_is_changed_for_good() {
    let dir = Dir::new("pass");
    let file = dir.path().join("pgpass");
    let file_has = |password: &str| {
        fs::write(&file, format!("*:*:*:mirror:{password}\n")).unwrap();
        // libpq takes no other.
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    };
    file_has(OLD);
    let setup = a_role_with_a_password(&format!("passfile={}", file.display()));
    let s = Scenario::start("a_postgres_password_is_changed_for_good", setup);
    let process = s.m.sink(|sink| sink.pid());
    s.m.sql(&format!("ALTER ROLE mirror PASSWORD '{NEW}'"));
    // Who is logged in stays so.
    s.flow();
    let seen = s.log().len();
    s.m.sql(&format!("SELECT pg_terminate_backend({})", s.walsender()));
    s.said_what_to_do("password authentication failed", seen);
    s.is_ready(false);
    file_has(NEW);
    s.recovers();
    assert_eq!(s.m.sink(|sink| sink.pid()), process);
    assert!(!s.log().contains(NEW), "{}", s.log());
    s.finish(&POSTGRES_AWAY);
}

/// The sink's user in Redis has a password.
fn a_user_with_a_password() -> Setup {
    let setup = Setup {
        redis_login: format!("mirror:{OLD}@"),
        ..Setup::default()
    };
    let user = format!("ACL SETUSER mirror on >{OLD} ~* &* +@all");
    let _: String = setup.redis.command(&user);
    setup
}

/// Changes the passwords of that user.
fn user_has(s: &Scenario, passwords: &str) {
    let _: String = s.m.redis.command(&format!("ACL SETUSER mirror {passwords}"));
}

/// Ends the sink, which puts all in order, and starts it with the new password in its URL.
fn restart_with_the_new_one(s: &Scenario) {
    s.m.sink(|sink| {
        if sink.exited().is_none() {
            let status = sink.terminate();
            assert_eq!(status.code(), Some(0), "{}", sink.output());
        }
        let url = format!("redis://mirror:{NEW}@127.0.0.1:{}/0", s.redis_link.port());
        sink.set("--redis", &url);
    });
    s.restart_sink();
    s.recovers();
}

fn redis_takes(s: &Scenario, password: &str) -> bool {
    let mut redis = s.m.redis.connect();
    redis::cmd("AUTH")
        .arg("mirror")
        .arg(password)
        .exec(&mut redis)
        .is_ok()
}

/// The commands of docs/operations.md: a user of Redis may have two passwords at once, so that nobody is refused at any moment.
#[test]
fn a_redis_password_is_changed_for_good() {
    let s = Scenario::start("a_redis_password_is_changed_for_good", a_user_with_a_password());
    user_has(&s, &format!(">{NEW}"));
    assert!(redis_takes(&s, OLD) && redis_takes(&s, NEW));
    s.redis_link.cut();
    s.recovers();
    restart_with_the_new_one(&s);
    user_has(&s, &format!("<{OLD}"));
    assert!(!redis_takes(&s, OLD) && redis_takes(&s, NEW));
    s.flow();
    s.redis_link.cut();
    s.recovers();
    let log = s.log();
    assert!(!log.contains(" ERROR ") && !log.contains(NEW), "{log}");
    s.finish(&REDIS_AWAY);
}

/// Whoever changes it in one step has to start the sink again, which reads its URL once. Until then it says so; a start with the old one is
/// refused; and one with the new one goes on where the sink before it was.
#[test]
fn a_redis_password_is_changed_before_the_sink_has_it() {
    const REFUSED: &str = "Password authentication failed";
    let name = "a_redis_password_is_changed_before_the_sink_has_it";
    let s = Scenario::start(name, a_user_with_a_password());
    user_has(&s, &format!("resetpass >{NEW}"));
    // Who is logged in stays so.
    s.flow();
    let seen = s.log().len();
    s.redis_link.cut();
    s.said_what_to_do(REFUSED, seen);
    s.is_ready(false);
    let seen = s.m.sink(|sink| {
        assert_eq!(sink.terminate().code(), Some(0), "{}", sink.output());
        let seen = sink.output().len();
        sink.restart();
        assert_eq!(sink.wait(DEADLINE).code(), Some(4), "{}", sink.output());
        seen
    });
    let log = s.log();
    assert!(log[seen..].contains(REFUSED), "{log}");
    restart_with_the_new_one(&s);
    assert!(!s.log().contains(NEW), "{}", s.log());
    s.finish(&[&REDIS_AWAY[..], &[REFUSED]].concat());
}
