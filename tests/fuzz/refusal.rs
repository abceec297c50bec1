//! What the extension has for refusals ends in an ereport; files of the decoder that run without a server need only this much of it.

#[derive(Debug)]
pub struct Refusal {
    pub message: String,
    pub hint: String,
}

impl Refusal {
    pub fn invalid(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: hint.into(),
        }
    }
}
