//! One pass of pg_recvlogical over a workload: what every plugin is measured by, and how its output is counted.

use std::io::Read;
use std::process::Stdio;
use std::time::Instant;

use walmirror_tests::Lsn;

use crate::bed::Bed;
use crate::meter::{Usage, Watch};

/// An output plugin with its options.
pub struct Plugin {
    /// How the contestant is called.
    pub name: &'static str,
    /// The library.
    pub library: &'static str,
    /// What pg_recvlogical passes on with -o.
    pub options: &'static [(&'static str, &'static str)],
    /// Which messages are inserted and which are updated rows: conditions over `d`, a message as bytea. None where a
    /// message holds many rows and has to be parsed here.
    pub count: Option<(&'static str, &'static str)>,
}

/// What the limit is called: decoding with nothing to send.
pub const LIMIT: &str = "nothing sent";

/// The contestants; the first is what the others are set against, with the options of the sink. The limits come last:
/// decoding with nothing to send. With streaming on, what has outgrown logical_decoding_work_mem is not written to disk and
/// read back; of the peers only pgoutput can do that, with a protocol of its own.
pub const PLUGINS: [Plugin; 10] = [
    Plugin {
        name: "walmirror",
        library: "walmirror",
        options: &[("streaming", "on")],
        count: None,
    },
    Plugin {
        name: "walmirror, streaming off",
        library: "walmirror",
        options: &[],
        count: None,
    },
    Plugin {
        name: "pgoutput binary, streaming",
        library: "pgoutput",
        options: &[
            ("proto_version", "2"),
            ("publication_names", "bench"),
            ("binary", "true"),
            ("streaming", "on"),
        ],
        count: Some(("get_byte(d, 0) = ascii('I')", "get_byte(d, 0) = ascii('U')")),
    },
    Plugin {
        name: "pgoutput binary",
        library: "pgoutput",
        options: &[
            ("proto_version", "1"),
            ("publication_names", "bench"),
            ("binary", "true"),
        ],
        count: Some(("get_byte(d, 0) = ascii('I')", "get_byte(d, 0) = ascii('U')")),
    },
    Plugin {
        name: "pgoutput text",
        library: "pgoutput",
        options: &[("proto_version", "1"), ("publication_names", "bench")],
        count: Some(("get_byte(d, 0) = ascii('I')", "get_byte(d, 0) = ascii('U')")),
    },
    Plugin {
        name: "test_decoding",
        library: "test_decoding",
        options: &[],
        count: Some((
            "substring(d, 1, 27) = 'table public.bench: INSERT:'::bytea",
            "substring(d, 1, 27) = 'table public.bench: UPDATE:'::bytea",
        )),
    },
    Plugin {
        name: "wal2json",
        library: "wal2json",
        options: &[("format-version", "2")],
        count: Some((
            "substring(d, 1, 13) = '{\"action\":\"I\"'::bytea",
            "substring(d, 1, 13) = '{\"action\":\"U\"'::bytea",
        )),
    },
    Plugin {
        name: "decoderbufs",
        library: "decoderbufs",
        options: &[],
        // Field 4 of its message is the operation: 0 inserts, 1 updates. It stands behind the name of the table, public.bench.
        count: Some((
            "position('\\x7075626c69632e62656e63682000'::bytea IN substring(d, 1, 60)) > 0",
            "position('\\x7075626c69632e62656e63682001'::bytea IN substring(d, 1, 60)) > 0",
        )),
    },
    Plugin {
        name: LIMIT,
        library: "walmirror",
        options: &[("tables", "none.none"), ("streaming", "on")],
        count: None,
    },
    Plugin {
        name: "nothing sent, streaming off",
        library: "walmirror",
        options: &[("tables", "none.none")],
        count: None,
    },
];

/// What a pass took.
pub struct Pass {
    /// From the start of pg_recvlogical to its end.
    pub seconds: f64,
    /// What it wrote.
    pub bytes: u64,
    /// What the walsender used.
    pub walsender: Usage,
}

/// Decodes from a copy of `mark` to `end` into a pipe.
pub fn receive(bed: &Bed, plugin: &Plugin, mark: &str, end: Lsn) -> Pass {
    bed.copy_slot(mark, "pass", plugin.library);
    let mut command = bed.db.pg.program("pg_recvlogical", &bed.db.name);
    command.args([
        "--start",
        "--no-loop",
        "-f",
        "-",
        "-S",
        "pass",
        "-E",
        &end.to_string(),
    ]);
    command.args(["-d", &bed.db.name]);
    for (name, value) in plugin.options {
        command.args(["-o", &format!("{name}={value}")]);
    }
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn().expect("run pg_recvlogical");
    let mut pipe = child.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 18];
        let mut bytes = 0;
        loop {
            match pipe.read(&mut buffer).expect("read the pipe") {
                0 => return (bytes, Instant::now()),
                n => bytes += n as u64,
            }
        }
    });
    let watch = bed
        .walsender("pass", || child.try_wait().unwrap().is_some())
        .map(Watch::start);
    let (bytes, ended) = reader.join().unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{}: {}",
        plugin.name,
        String::from_utf8_lossy(&output.stderr)
    );
    let walsender = watch.expect("pg_recvlogical connected").until_gone();
    bed.drop_slot("pass");
    Pass {
        seconds: (ended - start).as_secs_f64(),
        bytes,
        walsender,
    }
}

/// Inserted and updated rows in a plugin's output of the same stretch of WAL.
pub fn count(bed: &Bed, plugin: &Plugin, mark: &str, end: Lsn) -> (u64, u64) {
    bed.copy_slot(mark, "pass", plugin.library);
    let options: String = plugin
        .options
        .iter()
        .map(|(name, value)| format!(", '{name}', '{value}'"))
        .collect();
    let messages = format!("pg_logical_slot_peek_binary_changes('pass', '{end}', NULL{options})");
    let counted = match plugin.count {
        Some((inserts, updates)) => {
            let query = format!(
                "SELECT count(*) FILTER (WHERE {inserts}), count(*) FILTER (WHERE {updates}) FROM {messages} m(lsn, xid, d)"
            );
            let row = bed
                .db
                .connect()
                .query_one(&query, &[])
                .unwrap_or_else(|e| panic!("{}: {e:?}", plugin.name));
            (row.get::<_, i64>(0) as u64, row.get::<_, i64>(1) as u64)
        }
        None => {
            let rows = bed
                .db
                .connect()
                .query(&format!("SELECT data FROM {messages}"), &[])
                .unwrap();
            let mut counted = (0, 0);
            for row in rows {
                count_frame(row.get(0), &mut counted);
            }
            counted
        }
    };
    bed.drop_slot("pass");
    counted
}

/// Counts rows by nothing but the wire format: records are field 1 of a frame, and a record's kind is its field 1, absent
/// for INSERT. (The product's reader would count a bug of its own writer as right.)
fn count_frame(mut frame: &[u8], counted: &mut (u64, u64)) {
    while !frame.is_empty() {
        assert_eq!(varint(&mut frame), 1 << 3 | 2, "a frame consists of records");
        let length = varint(&mut frame) as usize;
        let (mut record, rest) = frame.split_at(length);
        frame = rest;
        match varint(&mut record) {
            8 if varint(&mut record) == 1 => counted.1 += 1,
            8 => {}
            _ => counted.0 += 1,
        }
    }
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first().expect("a whole varint");
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            break;
        }
    }
    value
}
