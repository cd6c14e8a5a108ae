//! Names from outside as text that a terminal, a log and a format of lines can take.
//!
//! Whoever may push, write to the store or start a process chooses tags, repository names, command lines, reasons in
//! `txn.json`, the text of a lock, answers of a server. Shown as they are, such a name can clear a screen, set the title of a
//! terminal, hide a line or forge one.
//!
//! # Rules kept here
//! 1. A name is shown through [`Printable::printable`], in each place that puts one into a text. Control characters (C0, DEL,
//!    C1), line and paragraph separators, what turns the direction of writing, and bytes that are no UTF-8 become `\n`,
//!    `\x1b`, `\u{202e}`; everything else stays, so names in any language can be read. clippy refuses `Path::display`.
//! 2. The few exits (stdout, stderr, the log, the files below `control/`) escape once more what is no line of ours:
//!    [`lines`] and [`Safely`] let newlines and tabs pass. Rule 1 alone would trust every place that makes a text, rule 2
//!    alone would let a name forge a line.
//! 3. Formats of programs stay exact: in JSON the same characters are `\u001b` ([`json`]), which every parser reads back.
//!    Tables of tab-separated values hold valid names only.
//!
//! A backslash stays a backslash, so to escape twice changes nothing.

use std::ffi::OsStr;
use std::fmt::{self, Write as _};
use std::io;
use std::os::unix::ffi::OsStrExt;

/// What came from outside and is to be shown.
pub trait Printable {
    /// The text with everything escaped that is not plainly a letter, a sign or a space.
    fn printable(&self) -> Escaped<'_>;
}

impl<T: AsRef<OsStr> + ?Sized> Printable for T {
    fn printable(&self) -> Escaped<'_> {
        Escaped(self.as_ref())
    }
}

/// See [`Printable::printable`].
#[derive(Clone, Copy, Debug)]
pub struct Escaped<'a>(&'a OsStr);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.to_str() {
            Some(text) if !text.contains(is_unsafe) => f.pad(text),
            _ => f.pad(&escaped(self.0.as_bytes(), &|_| false)),
        }
    }
}

/// A text of several lines, as far as it is safe already.
pub fn lines(text: &str) -> String {
    escaped(text.as_bytes(), &is_layout)
}

/// JSON without a character that a terminal obeys; it means the same.
pub fn json(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        // JSON itself has newlines between its values, never in a string, and none of the others anywhere else.
        match is_unsafe(c) && !is_layout(c) {
            true => push_json(&mut safe, c),
            false => safe.push(c),
        }
    }
    safe
}

/// Passes on what is written to it as [`lines`] or as [`json`] would have it.
///
/// Each call is to bring whole characters, as `write!` does.
#[derive(Debug)]
pub struct Safely<W> {
    inner: W,
    is_json: bool,
}

impl<W: io::Write> Safely<W> {
    /// For text.
    pub fn lines(inner: W) -> Safely<W> {
        Safely { inner, is_json: false }
    }

    /// For JSON.
    pub fn json(inner: W) -> Safely<W> {
        Safely { inner, is_json: true }
    }
}

impl<W: io::Write> io::Write for Safely<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let safe = match std::str::from_utf8(bytes) {
            Ok(text) if !text.contains(|c| is_unsafe(c) && !is_layout(c)) => return self.inner.write(bytes),
            Ok(text) if self.is_json => json(text),
            _ => escaped(bytes, &is_layout),
        };
        self.inner.write_all(safe.as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// What gives a text of ours its lines and columns.
fn is_layout(c: char) -> bool {
    matches!(c, '\n' | '\t')
}

/// Control characters, separators of lines, and what turns the direction of writing.
pub fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{061c}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn escaped(bytes: &[u8], passes: &dyn Fn(char) -> bool) -> String {
    let mut safe = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match is_unsafe(c) && !passes(c) {
                true => push_escaped(&mut safe, c),
                false => safe.push(c),
            }
        }
        for byte in chunk.invalid() {
            push(&mut safe, format_args!("\\x{byte:02x}"));
        }
    }
    safe
}

fn push_escaped(safe: &mut String, c: char) {
    match c {
        '\n' => safe.push_str("\\n"),
        '\r' => safe.push_str("\\r"),
        '\t' => safe.push_str("\\t"),
        c if c.is_ascii() => push(safe, format_args!("\\x{:02x}", u32::from(c))),
        c => push(safe, format_args!("\\u{{{:x}}}", u32::from(c))),
    }
}

fn push_json(safe: &mut String, c: char) {
    // All of them take one unit of UTF-16.
    push(safe, format_args!("\\u{:04x}", u32::from(c)));
}

fn push(safe: &mut String, text: fmt::Arguments<'_>) {
    // Writing to a String can't fail.
    let _ = safe.write_fmt(text);
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::io::Write as _;
    use std::os::unix::ffi::OsStringExt;
    use std::path::Path;

    use super::*;

    #[test]
    fn names_keep_their_letters_and_lose_their_power() {
        let cases: &[(&[u8], &str)] = &[
            (b"library/alpine:3.20", "library/alpine:3.20"),
            ("größe/日本-🦀".as_bytes(), "größe/日本-🦀"),
            (b"a\x1b]0;pwned\x07b", "a\\x1b]0;pwned\\x07b"),
            (b"one\ntwo\r\tthree\0\x7f", "one\\ntwo\\r\\tthree\\x00\\x7f"),
            ("c1 \u{9b}31m \u{85}".as_bytes(), "c1 \\u{9b}31m \\u{85}"),
            (
                "\u{2028}\u{2029}\u{202e}x\u{2066}\u{2069}\u{200f}".as_bytes(),
                "\\u{2028}\\u{2029}\\u{202e}x\\u{2066}\\u{2069}\\u{200f}",
            ),
            (b"half \xc3( \x9b \xff", "half \\xc3( \\x9b \\xff"),
            (b"back\\slash", "back\\slash"),
        ];
        for (name, shown) in cases {
            let name = OsString::from_vec(name.to_vec());
            assert_eq!(name.printable().to_string(), *shown);
            assert_eq!(shown.printable().to_string(), *shown, "to escape twice changes nothing");
            assert_eq!(Path::new(&name).printable().to_string(), *shown);
        }
        assert_eq!(format!("{:<6}|{:>4}|", "a\n".printable(), "b".printable()), "a\\n   |   b|");
    }

    #[test]
    fn exits_let_lines_and_columns_pass_and_nothing_else() {
        assert_eq!(lines("a\tb\n\x1b[2J\r\u{9b}\n"), "a\tb\n\\x1b[2J\\r\\u{9b}\n");
        let mut written = Safely::lines(Vec::new());
        let escape = "\x1b";
        write!(written, "a\tb\n{escape}é\u{202e}").expect("a Vec takes everything");
        written.write_all(b"\xff\n").expect("a Vec takes everything");
        assert_eq!(String::from_utf8_lossy(&written.inner), "a\tb\n\\x1bé\\u{202e}\\xff\n");
    }

    #[test]
    fn json_stays_the_same_value() {
        let value = serde_json::json!({ "name": "a\u{1b}\n\u{7f}\u{9b}\u{2028}\u{202e}\t日本\"\\" });
        let text = json(&serde_json::to_string_pretty(&value).expect("a value"));
        assert!(!text.contains(|c| is_unsafe(c) && c != '\n'), "{text:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).expect("JSON"), value);
        let mut written = Safely::json(Vec::new());
        serde_json::to_writer_pretty(&mut written, &value).expect("a Vec takes everything");
        assert_eq!(String::from_utf8_lossy(&written.inner), text);
    }
}
