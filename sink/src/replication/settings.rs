//! Settings of the server that hold lists of libraries. Read by `create_slot`, which refuses to go on without the library
//! preloaded, and by `doctor`.

use crate::error::Error;
use crate::pq::{Connection, PqError};

use super::slot::PLUGIN;

/// The value of shared_preload_libraries. Not every role may see it (SQLSTATE 42501).
pub fn preloaded(connection: &mut Connection) -> Result<String, PqError> {
    let results = connection.simple("SELECT pg_catalog.current_setting('shared_preload_libraries')")?;
    Ok(results
        .first()
        .and_then(|result| result.text(0, 0))
        .unwrap_or_default()
        .to_owned())
}

/// Whether the list names walmirror, perhaps with a path.
pub fn is_preloaded(list: &str) -> bool {
    let file = |name: &String| {
        name.rsplit('/')
            .next()
            .map(|file| file.trim_end_matches(".so") == PLUGIN)
    };
    names(list).iter().any(|name| file(name) == Some(true))
}

/// What is wrong with a list that does not.
pub fn not_preloaded(list: &str) -> String {
    format!(
        "walmirror is not in shared_preload_libraries ({})",
        if list.is_empty() { "empty" } else { list }
    )
}

/// The command that puts it there.
pub fn preload_command(list: &str) -> String {
    format!(
        "ALTER SYSTEM SET shared_preload_libraries = {};   -- then restart Postgres",
        with_walmirror(list)
    )
}

/// An error when walmirror is not preloaded: sessions that have not loaded it do not tell of DROP TABLE, so that keys
/// would stay for ever. Says nothing where this role may not look.
pub fn require_preload(connection: &mut Connection) -> Result<(), Error> {
    match preloaded(connection) {
        Ok(list) if !is_preloaded(&list) => {
            Err(Error::setup(not_preloaded(&list)).next(preload_command(&list)))
        }
        Ok(_) => Ok(()),
        Err(error) if error.is("42501") => Ok(()),
        Err(error) => Err(Error::postgres("cannot look at shared_preload_libraries", error)),
    }
}

/// The names of a list setting.
pub fn names(list: &str) -> Vec<String> {
    list.split(',')
        .map(|name| name.trim().trim_matches('"').to_owned())
        .filter(|name| !name.is_empty())
        .collect()
}

/// The list with walmirror at its end, as ALTER SYSTEM takes it: one word each, not one string with commas.
pub fn with_walmirror(list: &str) -> String {
    let plain = |name: &String| {
        name.bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
    };
    let mut names: Vec<String> = names(list)
        .into_iter()
        .map(|name| if plain(&name) { name } else { format!("'{name}'") })
        .collect();
    names.push(PLUGIN.to_owned());
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_may_be_named_with_its_path() {
        for list in [
            "walmirror",
            "pg_stat_statements, walmirror",
            "\"walmirror\"",
            "$libdir/walmirror",
            "/x/walmirror.so",
        ] {
            assert!(is_preloaded(list), "{list}");
        }
        for list in ["", "walmirror2", "xwalmirror, walmirror/x"] {
            assert!(!is_preloaded(list), "{list}");
        }
    }

    #[test]
    fn the_list_is_extended_and_never_replaced() {
        assert_eq!(
            with_walmirror("pgoutput, test_decoding"),
            "pgoutput, test_decoding, walmirror"
        );
        assert_eq!(with_walmirror(""), "walmirror");
        assert_eq!(with_walmirror("\"Odd-Name\", x"), "'Odd-Name', x, walmirror");
    }
}
