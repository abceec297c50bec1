//! TLS to both servers, and certificates that are not to be trusted: said at the start, and mended while the sink runs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use walmirror_tests::{DEADLINE, Dir, Mirror, Pg, Redis, Sink, free_port, skipped, wait_for};

/// Runs openssl in this directory. False where there is none.
fn openssl(dir: &Path, args: &str) -> bool {
    let output = Command::new("openssl")
        .args(args.split_whitespace())
        .current_dir(dir)
        .output();
    output.is_ok_and(|output| {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "openssl {args}: {said}");
        true
    })
}

/// An authority and two certificates of it for localhost: `valid`, and `expired` yesterday. None where there is no openssl.
fn certificates() -> Option<Dir> {
    let dir = Dir::new("tls");
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    let at = dir.path();
    if !openssl(
        at,
        &format!("req -x509 {key} -keyout ca.key -out ca.crt -days 30 -subj /CN=authority"),
    ) {
        skipped("there is no openssl");
        return None;
    }
    fs::write(at.join("names"), "subjectAltName=DNS:localhost\n").unwrap();
    for (name, days) in [("valid", 30), ("expired", -1)] {
        openssl(
            at,
            &format!("req {key} -keyout {name}.key -out {name}.csr -subj /CN=localhost"),
        );
        openssl(
            at,
            &format!(
                "x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out {name}.crt -days {days} -extfile names"
            ),
        );
    }
    Some(dir)
}

fn said(m: &Mirror, seen: usize, what: &str) {
    wait_for(DEADLINE, format!("the sink to say {what:?}"), || {
        m.sink(Sink::assert_running);
        let log = m.sink(|sink| sink.output());
        let mut lines = log.get(seen..)?.lines();
        lines
            .find(|line| line.contains(" ERROR ") && line.contains(what))
            .map(drop)
    });
}

fn a_table(m: &Mirror) {
    m.sql("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1); SELECT walmirror.mirror('t')");
}

#[test]
fn redis_over_tls() {
    let Some(dir) = certificates() else { return };
    let file = |name: &str| dir.path().join(name).display().to_string();
    let port = free_port();
    let options = format!(
        "--tls-port {port} --tls-cert-file {} --tls-key-file {} --tls-ca-cert-file {} --tls-auth-clients no",
        file("valid.crt"),
        file("valid.key"),
        file("ca.crt")
    );
    // Its plain port is for the test itself.
    let redis = match Redis::try_start_with(&options.split(' ').collect::<Vec<_>>()) {
        Ok(redis) => redis,
        Err(output) => {
            assert!(output.to_lowercase().contains("tls"), "{output}");
            skipped("this Redis has no TLS");
            return;
        }
    };
    let show = |redis: &Redis, name: &str| {
        let (certificate, key) = (file(&format!("{name}.crt")), file(&format!("{name}.key")));
        let _: String = redis.command(&format!(
            "CONFIG SET tls-cert-file {certificate} tls-key-file {key}"
        ));
    };
    let m = Mirror::between(walmirror_tests::Db::create(Pg::shared()), redis);
    a_table(&m);
    let (conninfo, url) = (
        m.db.pg.conninfo(&m.db.name),
        format!("rediss://localhost:{port}/0"),
    );
    let run = [
        "run",
        "--postgres",
        &conninfo,
        "--redis",
        &url,
        "--slot",
        &m.db.name,
    ];
    let (code, output) = Sink::run(&run, DEADLINE);
    assert_eq!(code, Some(4), "{output}");
    assert!(
        output.contains("UnknownIssuer") && output.contains("next: "),
        "{output}"
    );

    m.start_at(
        &conninfo,
        &url,
        &[],
        &[("SSL_CERT_FILE".to_owned(), file("ca.crt"))],
    );
    m.settle();
    let seen = m.sink(|sink| sink.output()).len();
    show(&m.redis, "expired");
    let _: i64 = m.redis.command("CLIENT KILL TYPE normal SKIPME yes");
    said(&m, seen, "Expired");
    m.sql("INSERT INTO t VALUES (2)");
    show(&m.redis, "valid");
    m.check();
}

#[test]
fn postgres_over_tls() {
    let Some(dir) = certificates() else { return };
    let pg = Pg::start("");
    let built = "SELECT FROM pg_config WHERE name = 'CONFIGURE' AND setting ~ 'openssl'";
    if pg.connect("postgres").query(built, &[]).unwrap().is_empty() {
        skipped("this Postgres has no TLS");
        return;
    }
    let install = |pg: &Pg, name: &str| {
        let owner = fs::metadata(pg.data()).unwrap();
        for end in ["crt", "key"] {
            let to: PathBuf = pg.data().join(format!("server.{end}"));
            fs::copy(dir.path().join(format!("{name}.{end}")), &to).unwrap();
            chown(&to, Some(owner.uid()), Some(owner.gid())).unwrap();
            fs::set_permissions(&to, fs::Permissions::from_mode(0o600)).unwrap();
        }
    };
    install(&pg, "valid");
    // TLS is for TCP only, and the port is what the socket is named by: so an address of its own.
    let address = format!(
        "127.{}.{}.1",
        rand::random_range(1..255),
        rand::random_range(1..255)
    );
    pg.configure(&format!("listen_addresses = '{address}'\nssl = on"));
    pg.set_hba("local all all trust\nlocal replication all trust\nhostssl all all 127.0.0.0/8 trust\n");
    pg.restart(walmirror_tests::Signal::INT);
    let m = Mirror::on(std::sync::Arc::new(pg));
    a_table(&m);
    let conninfo = |authority: &str| {
        format!(
            "host=localhost hostaddr={address} port=5432 user=postgres dbname={} sslmode=verify-full sslrootcert={}",
            m.db.name,
            dir.path().join(authority).display()
        )
    };
    // Any other certificate will do as an authority that has not signed the server's.
    let (wrong, url) = (conninfo("valid.crt"), m.redis.url());
    let run = ["run", "--postgres", &wrong, "--redis", &url, "--slot", &m.db.name];
    install(&m.db.pg, "expired");
    m.db.pg.reload();
    let (code, output) = Sink::run(&run, DEADLINE);
    assert!(matches!(code, Some(2 | 3)), "{code:?}: {output}");
    assert!(
        output.contains("certificate") && output.contains("next: psql"),
        "{output}"
    );

    install(&m.db.pg, "valid");
    m.db.pg.reload();
    m.start_at(&conninfo("ca.crt"), &url, &[], &[]);
    m.settle();
    let encrypted = "SELECT bool_and(ssl)::text FROM pg_stat_ssl JOIN pg_stat_replication USING (pid)";
    assert_eq!(m.db.value(encrypted), "true");
    let seen = m.sink(|sink| sink.output()).len();
    install(&m.db.pg, "expired");
    m.db.pg.reload();
    m.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_ssl WHERE ssl");
    said(&m, seen, "certificate");
    m.sql("INSERT INTO t VALUES (2)");
    install(&m.db.pg, "valid");
    m.db.pg.reload();
    m.check();
}
