//! What can go wrong in the decoder, and how it is told to the client.

use pgrx::{PgLogLevel, PgSqlErrorCode, pg_sys::panic::ErrorReport};

/// A refusal: one message, and what to do about it.
#[derive(Debug)]
pub struct Refusal {
    /// The SQLSTATE.
    pub code: PgSqlErrorCode,
    /// What failed, on which object.
    pub message: String,
    /// The next step.
    pub hint: String,
}

impl Refusal {
    /// A refusal because a value that the user wrote is wrong.
    pub fn invalid(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, message, hint)
    }

    /// A refusal because the object is not of a kind that can be mirrored.
    pub fn object(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            message,
            hint,
        )
    }

    /// Any refusal.
    pub fn new(code: PgSqlErrorCode, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            hint: hint.into(),
        }
    }

    /// Ends the statement with an ERROR that carries this refusal (`ereport(ERROR, …)`).
    pub fn raise(self) -> ! {
        ErrorReport::new(self.code, self.message, "walmirror")
            .set_hint(self.hint)
            .report(PgLogLevel::ERROR);
        unreachable!("ereport(ERROR) does not return")
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}
