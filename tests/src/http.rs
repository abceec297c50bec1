//! What the admin server of a sink answers.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::free_port;

/// An address that nobody listens on now.
pub fn free_address() -> String {
    format!("127.0.0.1:{}", free_port())
}

/// Status and body of GET; None where nobody answers.
pub fn get(address: &str, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )
    .ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some((status, body.to_owned()))
}

/// The figure of this name in /metrics.
pub fn figure(address: &str, name: &str) -> Option<f64> {
    let (_, text) = get(address, "/metrics")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    line.parse().ok()
}
