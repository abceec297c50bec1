//! JSON strings and rows as jsonb prints them.

use crate::pb;
use crate::row::Datum;

use super::hex_digit;

/// Appends a JSON string with exactly the escapes that jsonb prints; every other byte stays as it is.
pub fn write_json_string(out: &mut Vec<u8>, text: &[u8]) {
    out.reserve(text.len() + 2);
    out.push(b'"');
    let mut rest = text;
    while let Some(at) = rest
        .iter()
        .position(|&byte| byte < 0x20 || byte == b'"' || byte == b'\\')
    {
        let (plain, tail) = rest.split_at_checked(at).unwrap_or((rest, &[]));
        out.extend_from_slice(plain);
        let Some((&special, tail)) = tail.split_first() else {
            break;
        };
        write_escape(out, special);
        rest = tail;
    }
    out.extend_from_slice(rest);
    out.push(b'"');
}

fn write_escape(out: &mut Vec<u8>, byte: u8) {
    let short = match byte {
        b'"' | b'\\' => byte,
        0x08 => b'b',
        0x0C => b'f',
        b'\n' => b'n',
        b'\r' => b'r',
        b'\t' => b't',
        _ => {
            out.extend_from_slice(b"\\u00");
            out.extend_from_slice(&[hex_digit(byte >> 4), hex_digit(byte & 15)]);
            return;
        }
    };
    out.extend_from_slice(&[b'\\', short]);
}

/// How the rows of one relation look as JSON objects: worked out once, so that a row costs only its values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JsonShape {
    /// In jsonb's order of keys: the column's place in the row, and `"name": ` ready to copy.
    members: Vec<(usize, Vec<u8>)>,
}

impl JsonShape {
    /// The shape of a relation's rows: the columns that are part of the value.
    pub fn new(relation: &pb::Relation) -> Self {
        let columns = relation.columns.iter().enumerate();
        Self::of_names(
            columns
                .filter(|(_, column)| column.in_value)
                .map(|(at, column)| (at, column.name.as_str())),
        )
    }

    /// The same of places and names.
    pub fn of_names<'n>(names: impl IntoIterator<Item = (usize, &'n str)>) -> Self {
        let mut names: Vec<_> = names.into_iter().collect();
        // jsonb sorts keys by length in bytes first, then by their bytes.
        names.sort_unstable_by_key(|(_, name)| (name.len(), *name));
        let member = |(at, name): (usize, &str)| {
            let mut prefix = Vec::with_capacity(name.len() + 4);
            write_json_string(&mut prefix, name.as_bytes());
            prefix.extend_from_slice(b": ");
            (at, prefix)
        };
        Self {
            members: names.into_iter().map(member).collect(),
        }
    }

    /// Appends the row as `to_jsonb(row)::text` prints it; `row` holds all columns of the relation. False: a column is
    /// unchanged TOAST (or missing from `row`), so nothing was appended, because the object would not be the row.
    #[must_use = "an incomplete row is not written"]
    pub fn write(&self, row: &[Datum<'_>], out: &mut Vec<u8>) -> bool {
        let start = out.len();
        out.push(b'{');
        for (i, (column, prefix)) in self.members.iter().enumerate() {
            let Some(datum) = row.get(*column).filter(|datum| **datum != Datum::Unchanged) else {
                out.truncate(start);
                return false;
            };
            if i > 0 {
                out.extend_from_slice(b", ");
            }
            out.extend_from_slice(prefix);
            datum.write_json(out);
        }
        out.push(b'}');
        true
    }
}
