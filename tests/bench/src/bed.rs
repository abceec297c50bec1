//! The server that a case works on: a database with the extension, and slots that stand at the start of a workload.
//!
//! A slot can be read only once, so a workload is decoded from copies of one slot that was made before it. The copies
//! may have another plugin than the original: all contestants decode the same WAL from the same place.

use std::net::TcpListener;
use std::sync::Arc;

use walmirror_tests::{DEADLINE, Db, Lsn, Pg, wait_for};

use crate::peers::DEBEZIUM;

/// Settings of the server, beside what every private server of the harness has: no checkpoint and no vacuum disturbs a
/// round, and timestamps look as most people have them. Everything else is the server's default.
pub const SETTINGS: &str = "
shared_buffers = 1GB
max_wal_size = 32GB
checkpoint_timeout = 1h
autovacuum = off
fsync = off
logical_decoding_work_mem = 64MB
DateStyle = 'ISO, MDY'
TimeZone = 'UTC'
IntervalStyle = 'postgres'
extra_float_digits = 1
bytea_output = 'hex'
";

/// A server of its own and a database on it.
pub struct Bed {
    /// The database.
    pub db: Db,
    /// Where JDBC reaches the server.
    pub tcp: Option<Tcp>,
}

/// JDBC knows no Unix sockets, so for Debezium the server also listens on a loopback address of its own: the port is the
/// same for all servers of the harness. There the user postgres has a password.
pub struct Tcp {
    /// 127.x.y.z, port 5432.
    pub address: String,
    /// Of the user postgres.
    pub password: String,
}

impl Tcp {
    /// An address that is free; None where there is no Debezium, or no such address.
    fn find() -> Option<Tcp> {
        std::env::var_os(DEBEZIUM)?;
        let [x, y, z] = rand::random::<[u8; 3]>();
        let address = format!("127.{}.{y}.{}", x.max(1), z.clamp(1, 254));
        TcpListener::bind((address.as_str(), 5432)).ok()?;
        let password = format!("{:032x}", rand::random::<u128>());
        Some(Tcp { address, password })
    }
}

impl Bed {
    /// Starts the server, with further settings. Every plugin that is installed may be used.
    pub fn start(settings: &str) -> Bed {
        let pg = Pg::create(SETTINGS);
        if pg.knows("output_plugin_libraries") {
            pg.configure(
                "output_plugin_libraries = 'pgoutput, test_decoding, walmirror, wal2json, decoderbufs'",
            );
        }
        pg.configure(settings);
        let tcp = Tcp::find();
        if let Some(tcp) = &tcp {
            pg.configure(&format!("listen_addresses = '{}'", tcp.address));
            pg.set_hba(
                "local all all trust\nlocal replication all trust\nhost all all 127.0.0.0/8 scram-sha-256\n",
            );
        }
        pg.resume();
        let db = Db::create(Arc::new(pg));
        if let Some(tcp) = &tcp {
            db.sql(&format!("ALTER ROLE postgres PASSWORD '{}'", tcp.password));
        }
        Bed { db, tcp }
    }

    /// Whether a slot can be made with this plugin; the error if not.
    pub fn has_plugin(&self, plugin: &str) -> Result<(), String> {
        let mut client = self.db.connect();
        let query = "SELECT pg_create_logical_replication_slot('probe', $1)";
        match client.execute(query, &[&plugin]) {
            Ok(_) => {
                self.drop_slot("probe");
                Ok(())
            }
            Err(error) => {
                let message = error
                    .as_db_error()
                    .map_or(error.to_string(), |db| db.message().to_owned());
                Err(format!("not installed ({message})"))
            }
        }
    }

    /// A slot that a workload starts at.
    pub fn mark(&self, slot: &str) {
        self.db.sql(&format!(
            "SELECT pg_create_logical_replication_slot('{slot}', 'test_decoding')"
        ));
    }

    /// A fresh copy of a slot, for another plugin.
    pub fn copy_slot(&self, from: &str, to: &str, plugin: &str) {
        self.db.sql(&format!(
            "SELECT pg_copy_logical_replication_slot('{from}', '{to}', false, '{plugin}')"
        ));
    }

    /// Drops a slot as soon as nobody uses it.
    pub fn drop_slot(&self, slot: &str) {
        let query = format!("SELECT active FROM pg_replication_slots WHERE slot_name = '{slot}'");
        wait_for(DEADLINE, format!("slot {slot} to be free"), || {
            (self.db.value(&query) != "t").then_some(())
        });
        self.db.sql(&format!(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = '{slot}'"
        ));
    }

    /// The process that serves a slot, as soon as there is one; None when `give_up` says so.
    pub fn walsender(&self, slot: &str, mut give_up: impl FnMut() -> bool) -> Option<u32> {
        let query = format!("SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{slot}'");
        wait_for(DEADLINE, format!("slot {slot} to be used"), || {
            match self.db.value(&query).parse() {
                Ok(pid) => Some(Some(pid)),
                Err(_) => give_up().then_some(None),
            }
        })
    }

    /// Everything committed so far is before this position, and it is on disk: a commit that waits for the disk takes with
    /// it what earlier ones left in memory.
    pub fn end(&self) -> Lsn {
        self.db.sql("SELECT pg_logical_emit_message(true, 'bench', '')");
        self.db.lsn()
    }
}
