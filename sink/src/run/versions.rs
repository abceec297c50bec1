//! What to type where the extension and this program do not understand each other.

use crate::error::Error;

/// The version of this program.
const OWN: &str = env!("CARGO_PKG_VERSION");

/// Whether the plugin refused an option of START_REPLICATION, as one does that no longer writes the version that is asked for, or does not
/// know what is asked for yet.
fn is_refused(error: &Error) -> bool {
    matches!(error, Error::Postgres(_, source) if source.is("22023") && source.message.contains("walmirror option"))
}

/// Adds both versions to an error that comes of it that they differ too much: a stream that is refused, or that cannot be read.
pub(super) fn explain(error: Error, slot: &str, extension: &str) -> Error {
    if is_refused(&error) || matches!(error, Error::Stream(..)) {
        return error.next_instead(format!(
            "walmirror doctor --slot {slot}   # the extension is version {extension}, this program {OWN}: install one version of both"
        ));
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Class, exit};
    use crate::pq::{ErrorKind, PqError};

    #[test]
    fn a_stream_of_another_version_names_both() {
        let refused = |message: &str| {
            let mut source = PqError::new(ErrorKind::Server, message);
            source.sqlstate = Some("22023".to_owned());
            Error::postgres("cannot stream from the slot \"s\"", source)
        };
        let unknown = walmirror_proto::frame::WireError::UnknownKind(40);
        for (error, code) in [
            (
                refused("invalid value \"1\" for walmirror option \"proto_version\""),
                exit::POSTGRES,
            ),
            (Error::stream("a frame cannot be read", unknown), exit::INTERNAL),
        ] {
            let error = explain(error, "s", "7.0.0");
            assert_ne!(error.class(), Class::Retry, "it would come again");
            assert_eq!(error.exit_code(), code);
            let next = error.next_command().unwrap_or_default();
            assert!(
                next.starts_with("walmirror doctor --slot s ")
                    && next.contains("version 7.0.0")
                    && next.contains(OWN),
                "{next}"
            );
        }
        let error = explain(refused("invalid value"), "s", "7.0.0");
        assert_eq!(error.next_command(), None);
    }
}
