//! Makes a slot, and tells what that waits for: CREATE_REPLICATION_SLOT waits until every transaction that is running has ended.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use walmirror_proto::Lsn;

use super::create_slot;
use super::slot::PLUGIN;
use crate::error::Error;
use crate::pq::{Connection, PqError};

/// Between two looks, and how many of them there are between two lines of the log.
const LOOK_EVERY: Duration = Duration::from_secs(2);
const TELL_EVERY: u32 = 15;

/// Makes the slot on the replication connection; `sql` looks meanwhile.
pub fn make_slot(sql: &mut Connection, replication: &mut Connection, slot: &str) -> Result<Lsn, Error> {
    let pid = replication
        .simple("SELECT pg_catalog.pg_backend_pid()")
        .map_err(|error| Error::postgres("cannot tell the process of the connection", error))?;
    let pid = pid
        .first()
        .and_then(|result| result.text(0, 0))
        .map(str::to_owned);
    std::thread::scope(|scope| {
        let (made, is_made) = channel::<()>();
        std::thread::Builder::new()
            .name("slot".to_owned())
            .spawn_scoped(scope, move || {
                if let Some(pid) = pid {
                    look(sql, &pid, slot, &is_made);
                }
            })
            .map_err(|error| Error::io("cannot start a thread", error))?;
        let result = create_slot(replication, slot, PLUGIN, false);
        drop(made);
        result
    })
}

/// Until the slot is made, or the server does not answer.
fn look(sql: &mut Connection, pid: &str, slot: &str, is_made: &Receiver<()>) {
    let mut looks = 0;
    while is_made.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
        let Ok(blockers) = blockers(sql, pid) else {
            return;
        };
        let Some((who, waits_for_standby)) = blockers else {
            continue;
        };
        if looks % TELL_EVERY == 0 {
            tell(slot, &who, waits_for_standby);
        }
        looks += 1;
    }
}

fn tell(slot: &str, who: &str, waits_for_standby: bool) {
    if waits_for_standby {
        // With the sink itself as the standby each waits for the other.
        tracing::error!(
            slot,
            next = "ALTER SYSTEM RESET synchronous_standby_names; SELECT pg_reload_conf();",
            "the slot cannot be made before a COMMIT returns that waits for a synchronous standby: {who}"
        );
    } else {
        tracing::info!(slot, "making the slot waits for a transaction: {who}");
    }
}

/// Who keeps the process waiting, and whether he himself waits for a synchronous standby, which only some roles may see.
fn blockers(sql: &mut Connection, pid: &str) -> Result<Option<(String, bool)>, PqError> {
    let statement = "SELECT coalesce(format('pid %s (%s, state %s, since %s)', a.pid, a.application_name, a.state, a.xact_start), \
                       'a prepared transaction'), coalesce(a.wait_event = 'SyncRep', current_setting('synchronous_standby_names') <> '') \
                     FROM unnest(pg_catalog.pg_blocking_pids($1::int)) b LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = b \
                     ORDER BY 2 DESC, a.xact_start LIMIT 1";
    let result = sql.query(statement, &[Some(pid.as_bytes())])?;
    let row = result.rows().next();
    Ok(row.and_then(|row| Some((row.text(0)?.to_owned(), row.text(1)? == "t"))))
}
