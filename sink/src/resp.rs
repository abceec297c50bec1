//! Builds Redis commands as RESP bytes, ready to be sent. Used by the planner, which writes a whole batch into one
//! buffer, and by the Redis layer for its own commands. No allocation per command once the buffer has grown.

use std::fmt;

/// What Redis and this process keep for a command besides its bytes: the reply, the argument vector. Counted with the
/// bytes so that a transaction of a million tiny commands is bounded as well.
const OVERHEAD_BYTES: usize = 64;

/// A sequence of commands.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Commands {
    bytes: Vec<u8>,
    count: usize,
}

impl fmt::Debug for Commands {
    // INVARIANT I8: the bytes are rows.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Commands({} commands, {} bytes)", self.count, self.bytes.len())
    }
}

impl Commands {
    /// No commands.
    pub fn new() -> Self {
        Self::default()
    }

    /// The commands, as they go over the wire.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// How many commands, and so how many replies.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Length of the bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// What the commands weigh against a limit in bytes.
    pub fn weight(&self) -> usize {
        self.bytes.len() + self.count * OVERHEAD_BYTES
    }

    /// Forgets the commands and keeps the memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.count = 0;
    }

    /// Starts a command of `args` arguments, its name included. Exactly that many have to follow.
    #[inline]
    pub fn begin(&mut self, args: usize) -> &mut Self {
        self.count += 1;
        self.header(b'*', args)
    }

    /// Appends an argument.
    #[inline]
    pub fn arg(&mut self, value: &[u8]) -> &mut Self {
        self.header(b'$', value.len());
        self.bytes.extend_from_slice(value);
        self.bytes.extend_from_slice(b"\r\n");
        self
    }

    /// Appends an argument and says where in [`Self::as_bytes`] it stands.
    #[inline]
    pub fn arg_at(&mut self, value: &[u8]) -> usize {
        self.arg(value);
        self.bytes.len() - value.len() - 2
    }

    /// Appends a number as an argument.
    #[inline]
    pub fn int(&mut self, value: u64) -> &mut Self {
        let mut digits = itoa::Buffer::new();
        self.arg(digits.format(value).as_bytes())
    }

    /// Appends an argument that [`bulk`] has encoded before.
    #[inline]
    pub fn encoded(&mut self, argument: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(argument);
        self
    }

    /// Appends a whole command.
    pub fn command(&mut self, args: &[&[u8]]) -> &mut Self {
        self.begin(args.len());
        for arg in args {
            self.arg(arg);
        }
        self
    }

    /// Appends `count` commands that were encoded elsewhere.
    pub fn append(&mut self, encoded: &[u8], count: usize) {
        self.bytes.extend_from_slice(encoded);
        self.count += count;
    }

    /// The name of the command with this number, and its first argument, which is a key of most.
    pub fn name_and_key(&self, number: usize) -> Option<(&[u8], &[u8])> {
        let args = self.args(number, 2)?;
        Some((args.first()?, args.get(1).copied().unwrap_or_default()))
    }

    /// The first arguments of the command with this number, its name among them, and `most` at most.
    pub fn args(&self, number: usize, most: usize) -> Option<Vec<&[u8]>> {
        let mut rest = self.bytes.as_slice();
        for _ in 0..number {
            for _ in 0..read_header(&mut rest, b'*')? {
                read_arg(&mut rest)?;
            }
        }
        let count = read_header(&mut rest, b'*')?.min(most);
        (0..count).map(|_| read_arg(&mut rest)).collect()
    }

    #[inline]
    fn header(&mut self, sign: u8, number: usize) -> &mut Self {
        // Counts and short lengths are what nearly all headers hold.
        if let (0..=9, Ok(digit)) = (number, u8::try_from(number)) {
            self.bytes.extend_from_slice(&[sign, b'0' + digit, b'\r', b'\n']);
            return self;
        }
        let mut digits = itoa::Buffer::new();
        self.bytes.push(sign);
        self.bytes.extend_from_slice(digits.format(number).as_bytes());
        self.bytes.extend_from_slice(b"\r\n");
        self
    }
}

/// Reads what [`Commands::header`] has written.
fn read_header(rest: &mut &[u8], sign: u8) -> Option<usize> {
    let line = rest.strip_prefix(&[sign])?;
    let end = line.iter().position(|byte| *byte == b'\r')?;
    *rest = line.get(end + 2..)?;
    std::str::from_utf8(line.get(..end)?).ok()?.parse().ok()
}

fn read_arg<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = read_header(rest, b'$')?;
    let arg = rest.get(..length)?;
    *rest = rest.get(length + 2..)?;
    Some(arg)
}

/// Encodes an argument that is used again and again.
pub fn bulk(value: &[u8]) -> Vec<u8> {
    let mut commands = Commands::new();
    commands.arg(value);
    commands.bytes
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]
    use super::*;

    /// Reads commands back: a test's eye.
    pub(crate) fn parse(mut bytes: &[u8]) -> Vec<Vec<Vec<u8>>> {
        fn header(bytes: &mut &[u8], sign: u8) -> usize {
            assert_eq!(bytes[0], sign);
            let end = bytes.windows(2).position(|pair| pair == b"\r\n").unwrap();
            let number = std::str::from_utf8(&bytes[1..end]).unwrap().parse().unwrap();
            *bytes = &bytes[end + 2..];
            number
        }
        let mut commands = Vec::new();
        while !bytes.is_empty() {
            let args = header(&mut bytes, b'*');
            let mut command = Vec::new();
            for _ in 0..args {
                let length = header(&mut bytes, b'$');
                command.push(bytes[..length].to_vec());
                assert_eq!(&bytes[length..length + 2], b"\r\n");
                bytes = &bytes[length + 2..];
            }
            commands.push(command);
        }
        commands
    }

    #[test]
    fn commands_are_resp() {
        let mut commands = Commands::new();
        commands.begin(3).arg(b"SET").arg(b"a\r\nb");
        let at = commands.arg_at(b"");
        assert_eq!(at, commands.len() - 2);
        commands.command(&[b"PEXPIRE", b"k", b"12345678901"]);
        assert_eq!(
            commands.as_bytes(),
            b"*3\r\n$3\r\nSET\r\n$4\r\na\r\nb\r\n$0\r\n\r\n*3\r\n$7\r\nPEXPIRE\r\n$1\r\nk\r\n$11\r\n12345678901\r\n"
        );
        assert_eq!(commands.count(), 2);
        let read = parse(commands.as_bytes());
        assert_eq!(read[0], [b"SET".to_vec(), b"a\r\nb".to_vec(), b"".to_vec()]);
    }

    #[test]
    fn numbers_and_long_arguments_have_the_right_length() {
        let mut commands = Commands::new();
        let long = vec![b'x'; 1234];
        commands.begin(3).arg(b"SET").encoded(&bulk(b"key")).arg(&long);
        commands.begin(2).arg(b"X").int(u64::MAX);
        let read = parse(commands.as_bytes());
        assert_eq!(read[0][2], long);
        assert_eq!(read[1][1], b"18446744073709551615");
        assert!(commands.weight() > commands.len());
        commands.clear();
        assert!(commands.is_empty() && commands.as_bytes().is_empty());
    }

    #[test]
    fn debug_output_shows_no_values() {
        let mut commands = Commands::new();
        commands.command(&[b"SET", b"key", b"secret"]);
        assert!(!format!("{commands:?}").contains("secret"));
    }
}
