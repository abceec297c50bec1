//! Case `workloads`: what is not one plain table. Each is a backlog that the sink works off; what it is set against differs.

use std::io::{BufWriter, Write};
use std::path::PathBuf;

use serde_json::Value;

use crate::backlog::{Backlog, ORIGIN};
use crate::bed::Bed;
use crate::e2e::{CLIENT_CPU, note};
use crate::figures::{Contestant, Goal, Outcome, RATE, WALSENDER_CPU};
use crate::options::Options;
use crate::receive::{LIMIT, PLUGINS, receive};
use crate::rivals::{self, Shape, pipe, ready_made, write_command};
use crate::workload;

/// A case by its name.
type Case = (&'static str, fn(&Options) -> Outcome);

/// W3 to W7.
pub fn run(options: &Options) -> Vec<Outcome> {
    let cases: [Case; 5] = [
        ("workloads-w3", zipfian),
        ("workloads-w4", wide),
        ("workloads-w5", documents),
        ("workloads-w6", tables),
        ("workloads-w7", elsewhere),
    ];
    cases
        .iter()
        .filter(|(name, _)| options.wants(name))
        .map(|(_, case)| case(options))
        .collect()
}

/// The sink and a file of commands in turns, until both have run in every round.
fn against_pipe(
    options: &Options,
    name: &str,
    title: String,
    backlog: &Backlog,
    (rival, file): (&str, Option<PathBuf>),
    rows: u64,
) -> Outcome {
    let mut ours = Contestant::new("walmirror");
    let mut piped = match file {
        Some(_) => Contestant::new(rival),
        None => Contestant::skipped(rival, "wal2json is not installed"),
    };
    for round in 0..options.rounds {
        let run = backlog.sink();
        note(&mut ours, &run, rows);
        let digest = backlog.digest();
        eprintln!(
            "  {name} round {} {:<20} {:.2} s",
            round + 1,
            "walmirror",
            run.seconds
        );
        if let Some(file) = &file {
            backlog.rewind("walmirror");
            let run = rivals::run(
                &mut pipe(file, &backlog.redis),
                rival,
                &backlog.bed,
                &backlog.redis,
                None,
            );
            note(&mut piped, &run, rows);
            assert_eq!(backlog.digest(), digest, "Redis after {rival} and after the sink");
            eprintln!("  {name} round {} {rival:<20} {:.2} s", round + 1, run.seconds);
        }
    }
    Outcome {
        name: name.to_owned(),
        title,
        compared: "After every run all of Redis had the same digest.".to_owned(),
        headline: RATE,
        contestants: vec![ours, piped],
        goals: Vec::new(),
    }
}

/// W3: inserts, updates and deletes of few hot and many cold keys, each in a transaction of its own. The rival is every
/// change as a command: what a consumer that does not coalesce has Redis do.
fn zipfian(options: &Options) -> Outcome {
    let changes = options.rows(200_000);
    let script = "\\set id random_zipfian(1, 100000, 1.2)\n\\set dice random(1, 10)\n\\if :dice > 1\n\
         INSERT INTO bench VALUES (:id, 'name ' || :id, 1, md5(:dice::text)) \
           ON CONFLICT (id) DO UPDATE SET visits = bench.visits + 1;\n\
         \\else\nDELETE FROM bench WHERE id = :id;\n\\endif\n";
    let backlog = Backlog::make(
        "",
        |bed| {
            bed.db.sql(
                "CREATE TABLE bench (id bigint PRIMARY KEY, name text, visits bigint, note text); \
                 SELECT walmirror.mirror('bench')",
            );
        },
        |bed| {
            let each = (changes / 4).to_string();
            workload::pgbench(
                bed,
                script,
                &["-c", "4", "-j", "2", "-M", "prepared", "-t", &each],
            );
        },
    );
    let (file, rows) = every_change(&backlog);
    let title = format!("W3: {changes} zipfian transactions");
    let mut outcome = against_pipe(
        options,
        "workloads-w3",
        title,
        &backlog,
        ("--pipe, each change", file),
        rows.unwrap_or(changes),
    );
    if let Some(ratio) = outcome.ratio("--pipe, each change", RATE) {
        outcome.goals.push(Goal::at_least(
            "rows/s against Redis doing each change",
            1.0,
            "×",
            ratio,
        ));
    }
    outcome
}

/// Each change of a backlog as a command, as wal2json tells it, and how many there are.
fn every_change(backlog: &Backlog) -> (Option<PathBuf>, Option<u64>) {
    let bed = &backlog.bed;
    if bed.has_plugin("wal2json").is_err() {
        return (None, None);
    }
    bed.copy_slot(ORIGIN, "changes", "wal2json");
    let query = "SELECT data FROM pg_logical_slot_peek_changes('changes', NULL, NULL, 'format-version', '2')";
    let rows = bed.db.connect().query(query, &[]).unwrap();
    bed.drop_slot("changes");
    let path = bed.db.pg.data().with_file_name("commands");
    let mut file = BufWriter::new(std::fs::File::create(&path).unwrap());
    let mut count = 0;
    for row in rows {
        let change: Value = serde_json::from_str(row.get(0)).unwrap();
        let text = |value: &Value| {
            value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned)
                .into_bytes()
        };
        let key = |columns: &Value| [b"bench:".to_vec(), text(&columns[0]["value"])].concat();
        match change["action"].as_str() {
            Some("I" | "U") => {
                let columns = &change["columns"];
                let mut arguments = vec![key(columns)];
                for column in columns.as_array().unwrap() {
                    arguments.extend([text(&column["name"]), text(&column["value"])]);
                }
                write_command(&mut file, "HSET", &arguments);
                count += 1;
            }
            Some("D") => {
                write_command(&mut file, "UNLINK", &[key(&change["identity"])]);
                count += 1;
            }
            _ => {}
        }
    }
    file.flush().unwrap();
    (Some(path), Some(count))
}

/// W4: 50 columns, 4 KB a row.
fn wide(options: &Options) -> Outcome {
    let rows = options.rows(100_000);
    let list = |text: &str| {
        (1..50)
            .map(|i| text.replace('#', &i.to_string()))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let columns = list("c# text");
    let values = list("repeat(chr(97 + (i + #)::int % 26), 80)");
    let query = format!(
        "SELECT 'bench:' || id, 'id', id, {} FROM bench ORDER BY id",
        list("'c#', c#")
    );
    let backlog = Backlog::make(
        "",
        |bed| {
            bed.db.sql(&format!(
                "CREATE TABLE bench (id bigint PRIMARY KEY, {columns}); SELECT walmirror.mirror('bench')"
            ));
        },
        |bed| {
            bed.db.sql(&format!(
                "INSERT INTO bench SELECT i, {values} FROM generate_series(1, {rows}) i"
            ))
        },
    );
    let file = ready_made(&backlog.bed, &query, Shape::Hset, "commands");
    let title = format!("W4: {rows} rows of 50 columns, 4 KB");
    against_pipe(
        options,
        "workloads-w4",
        title,
        &backlog,
        ("--pipe HSET", Some(file)),
        rows,
    )
}

/// W5: documents of 8 KB that stay as they are while a counter beside them changes.
fn documents(options: &Options) -> Outcome {
    let rows = options.rows(20_000);
    let document = "(SELECT string_agg(md5((i * 1000 + j)::text), '') FROM generate_series(1, 250) j)";
    let backlog = Backlog::make(
        "",
        |bed| {
            bed.db
                .sql("CREATE TABLE bench (id bigint PRIMARY KEY, visits int, doc text); ALTER TABLE bench ALTER doc SET STORAGE EXTERNAL");
            bed.db.sql(&format!(
                "INSERT INTO bench SELECT i, 0, {document} FROM generate_series(1, {rows}) i"
            ));
            bed.db.sql("SELECT walmirror.mirror('bench')");
        },
        |bed| bed.db.sql("UPDATE bench SET visits = visits + 1"),
    );
    let query = "SELECT 'bench:' || id, 'visits', visits FROM bench ORDER BY id";
    let file = ready_made(&backlog.bed, query, Shape::Hset, "commands");
    let title = format!("W5: {rows} updates beside an unchanged document of 8 KB");
    against_pipe(
        options,
        "workloads-w5",
        title,
        &backlog,
        ("--pipe HSET, one field", Some(file)),
        rows,
    )
}

/// W6: the rows of one table, and the same number in a thousand.
fn tables(options: &Options) -> Outcome {
    const TABLES: u64 = 1_000;
    let rows = options.rows(1_000_000);
    let create = |bed: &Bed, name: &str| {
        bed.db.sql(&workload::TABLE.replace("bench", name));
        bed.db.sql(&format!("SELECT walmirror.mirror('{name}')"));
    };
    // In both cases a thousand transactions, so that only the number of tables differs.
    let fill = |bed: &Bed, table: &dyn Fn(u64) -> String| {
        for n in 0..TABLES {
            let (first, last) = (n * rows / TABLES + 1, (n + 1) * rows / TABLES);
            let (table, row) = (table(n), workload::ROW);
            bed.db.sql(&format!(
                "INSERT INTO {table} SELECT {row} FROM generate_series({first}, {last}) i"
            ));
        }
    };
    let many = Backlog::make(
        "",
        |bed| (0..TABLES).for_each(|n| create(bed, &format!("bench{n}"))),
        |bed| fill(bed, &|n| format!("bench{n}")),
    );
    let one = Backlog::make(
        "",
        |bed| create(bed, "bench"),
        |bed| fill(bed, &|_| "bench".to_owned()),
    );
    let mut contestants = vec![Contestant::new("1000 tables"), Contestant::new("one table")];
    for round in 0..options.rounds {
        for (backlog, contestant) in [&many, &one].into_iter().zip(&mut contestants) {
            let run = backlog.sink();
            let digest = backlog.digest();
            assert!(digest.starts_with(&format!("{rows} keys")), "{digest}");
            note(contestant, &run, rows);
            eprintln!(
                "  workloads-w6 round {} {:<20} {:.2} s",
                round + 1,
                contestant.name,
                run.seconds
            );
        }
    }
    let mut outcome = Outcome {
        name: "workloads-w6".to_owned(),
        title: format!("W6: {rows} rows in 1000 transactions"),
        compared: "After every run Redis held as many keys as there are rows.".to_owned(),
        headline: RATE,
        contestants,
        goals: Vec::new(),
    };
    let ratio = outcome.ratio("one table", RATE).unwrap();
    outcome.goals.push(Goal::at_least(
        "rows/s of 1000 tables against one",
        0.95,
        "×",
        ratio,
    ));
    outcome
}

/// W7: one row in a hundred is of a mirrored table. The limit is decoding with nothing to send.
fn elsewhere(options: &Options) -> Outcome {
    // So many that a session's start and end, a twentieth of a second, do not count.
    let rows = options.rows(4_000_000);
    let backlog = Backlog::make(
        "",
        |bed| {
            bed.db.sql(&workload::TABLE.replace("bench", "other"));
            bed.db.sql(workload::TABLE);
            bed.db.sql("SELECT walmirror.mirror('bench')");
        },
        |bed| {
            let row = workload::ROW;
            for n in 0..100 {
                let (first, last) = (n * rows / 100 + 1, (n + 1) * rows / 100);
                let middle = last - rows / 10_000;
                bed.db.sql(&format!(
                    "INSERT INTO other SELECT {row} FROM generate_series({first}, {middle}) i; \
                     INSERT INTO bench SELECT {row} FROM generate_series({middle} + 1, {last}) i"
                ));
            }
        },
    );
    let mut ours = Contestant::new("walmirror");
    let limit_plugin = PLUGINS.iter().find(|plugin| plugin.name == LIMIT).unwrap();
    let mut limit = Contestant::new(limit_plugin.name);
    for round in 0..options.rounds {
        let run = backlog.sink();
        let digest = backlog.digest();
        assert!(digest.starts_with(&format!("{} keys", rows / 100)), "{digest}");
        note(&mut ours, &run, rows);
        eprintln!(
            "  workloads-w7 round {} {:<20} {:.2} s",
            round + 1,
            "walmirror",
            run.seconds
        );
        let pass = receive(&backlog.bed, limit_plugin, ORIGIN, backlog.end);
        limit.add(RATE, rows as f64 / pass.seconds);
        limit.add(WALSENDER_CPU, pass.walsender.cpu * 1e6 / rows as f64);
        eprintln!(
            "  workloads-w7 round {} {:<20} {:.2} s",
            round + 1,
            limit.name,
            pass.seconds
        );
    }
    let mut outcome = Outcome {
        name: "workloads-w7".to_owned(),
        title: format!("W7: {rows} rows, 1 % of them mirrored"),
        compared: "After every run Redis held as many keys as the mirrored table has rows.".to_owned(),
        headline: RATE,
        contestants: vec![ours, limit],
        goals: Vec::new(),
    };
    let ratio = outcome.ratio(limit_plugin.name, RATE).unwrap();
    outcome.goals.push(Goal::at_least(
        "rows/s against decoding with nothing sent",
        0.95,
        "×",
        ratio,
    ));
    let cpu = outcome.contestants[0].median(CLIENT_CPU).unwrap();
    outcome
        .goals
        .push(Goal::at_most("CPU of the sink", 0.1, " µs/row", cpu));
    outcome
}
