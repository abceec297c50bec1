//! The two messages that a walsender sends inside CopyData, and the one that it gets back.
//!
//! Pure functions of bytes, called by `stream`; no bytes make them panic.

use walmirror_proto::lsn::Lsn;

/// The length of what stands before the data of a `w` message.
pub(super) const DATA_HEADER_BYTES: usize = 1 + 8 + 8 + 8;

/// A message of the walsender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// `w`: data of the output plugin, which starts at byte `header_bytes` of the message.
    Data {
        /// Where the plugin was when it wrote.
        wal_start: Lsn,
        /// The end of the WAL on the server, as far as the walsender knew.
        wal_end: Lsn,
        /// How many bytes of the message come before the data.
        header_bytes: usize,
    },
    /// `k`: nothing to send.
    Keepalive {
        /// Everything before this has been sent.
        wal_end: Lsn,
        /// The server wants a status update at once, or it will end the connection.
        reply_requested: bool,
    },
}

/// Bytes that are no message of a walsender.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Another first byte than `w` or `k`.
    #[error("unknown replication message of type 0x{0:02x}")]
    UnknownType(u8),
    /// Too short for its type.
    #[error("replication message of type 0x{0:02x} cut after {1} bytes")]
    Cut(u8, usize),
    /// No byte at all.
    #[error("empty replication message")]
    Empty,
}

/// Reads the header of a message.
pub fn parse(bytes: &[u8]) -> Result<Message, MessageError> {
    let (&kind, rest) = bytes.split_first().ok_or(MessageError::Empty)?;
    let cut = || MessageError::Cut(kind, bytes.len());
    match kind {
        b'w' => {
            let (wal_start, rest) = lsn(rest).ok_or_else(cut)?;
            let (wal_end, rest) = lsn(rest).ok_or_else(cut)?;
            rest.get(..8).ok_or_else(cut)?;
            Ok(Message::Data {
                wal_start,
                wal_end,
                header_bytes: DATA_HEADER_BYTES,
            })
        }
        b'k' => {
            let (wal_end, rest) = lsn(rest).ok_or_else(cut)?;
            let reply = rest.get(8).ok_or_else(cut)?;
            Ok(Message::Keepalive {
                wal_end,
                reply_requested: *reply != 0,
            })
        }
        other => Err(MessageError::UnknownType(other)),
    }
}

fn lsn(bytes: &[u8]) -> Option<(Lsn, &[u8])> {
    bytes
        .split_first_chunk::<8>()
        .map(|(first, rest)| (Lsn(u64::from_be_bytes(*first)), rest))
}

/// Writes a standby status update. `clock` is microseconds since 2000-01-01.
pub(super) fn status_update(
    written: Lsn,
    flushed: Lsn,
    applied: Lsn,
    clock: i64,
    reply_requested: bool,
) -> [u8; 34] {
    let mut message = [0; 34];
    let parts = std::iter::once(b'r')
        .chain(written.0.to_be_bytes())
        .chain(flushed.0.to_be_bytes())
        .chain(applied.0.to_be_bytes())
        .chain(clock.to_be_bytes())
        .chain([u8::from(reply_requested)]);
    message.iter_mut().zip(parts).for_each(|(to, from)| *to = from);
    message
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn data(start: u64, end: u64, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![b'w'];
        bytes.extend(start.to_be_bytes());
        bytes.extend(end.to_be_bytes());
        bytes.extend([7; 8]);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn a_keepalive_says_whether_it_wants_a_reply() {
        let mut bytes = vec![b'k'];
        bytes.extend(0x16_B374_D848u64.to_be_bytes());
        bytes.extend([0; 8]);
        assert_eq!(parse(&bytes), Err(MessageError::Cut(b'k', 17)));
        bytes.push(1);
        assert_eq!(
            parse(&bytes),
            Ok(Message::Keepalive {
                wal_end: Lsn(0x16_B374_D848),
                reply_requested: true
            })
        );
    }

    #[test]
    fn unknown_and_empty_messages_are_errors() {
        assert_eq!(parse(b"x"), Err(MessageError::UnknownType(b'x')));
        assert_eq!(parse(b""), Err(MessageError::Empty));
    }

    #[test]
    fn a_status_update_holds_the_three_positions_in_order() {
        let bytes = status_update(Lsn(3), Lsn(1), Lsn(2), 4, true);
        assert_eq!(bytes[0], b'r');
        assert_eq!(
            (bytes[8], bytes[16], bytes[24], bytes[32], bytes[33]),
            (3, 1, 2, 4, 1)
        );
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn data_is_found_behind_its_header(start: u64, end: u64, body in proptest::collection::vec(any::<u8>(), 0..64)) {
            let bytes = data(start, end, &body);
            let Ok(Message::Data { wal_start, wal_end, header_bytes }) = parse(&bytes) else { panic!("no data") };
            prop_assert_eq!((wal_start, wal_end), (Lsn(start), Lsn(end)));
            prop_assert_eq!(&bytes[header_bytes..], &body[..]);
            for cut in 0..header_bytes {
                prop_assert!(parse(&bytes[..cut]).is_err());
            }
        }
    }
}
