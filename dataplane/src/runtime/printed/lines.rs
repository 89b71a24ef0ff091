//! What a worker prints, cut into lines that can be trusted to be lines: bounded in length and number, with nothing in them that a
//! terminal or a reader of logs would obey. Pure: bytes and a time in, lines out.

use std::fmt::Write;

/// Bytes of a line that are shown; the rest is counted. With every byte escaped, and what stands before it, a line still fits what a pipe
/// takes in one piece (`PIPE_BUF`, 4096).
pub(super) const LINE_BYTES_MAX: usize = 960;

/// Bytes of text that one byte of a line may become: `\x1b`. Of an escaped character of more than one byte (`\u{80}`) each has fewer.
pub(super) const ESCAPED_BYTES_MAX: usize = 4;

/// How long lines are counted together.
const WINDOW_NS: u64 = 1_000_000_000;

/// One stream of a worker, in the middle of a line.
#[derive(Debug, Default)]
pub(super) struct Splitter {
    line: Vec<u8>,
    /// Bytes of this line beyond those.
    beyond: u64,
}

impl Splitter {
    /// Takes what was read, and gives each line that ends in it, without its end, and how many of its bytes are missing.
    pub(super) fn take(&mut self, mut bytes: &[u8], mut line: impl FnMut(&[u8], u64)) {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            self.keep(&bytes[..end]);
            bytes = &bytes[end + 1..];
            self.end(&mut line);
        }
        self.keep(bytes);
    }

    /// Gives a line that was begun and will have no end.
    pub(super) fn finish(&mut self, mut line: impl FnMut(&[u8], u64)) {
        if !self.line.is_empty() {
            self.end(&mut line);
        }
    }

    fn end(&mut self, line: &mut impl FnMut(&[u8], u64)) {
        line(self.line.strip_suffix(b"\r").unwrap_or(&self.line), self.beyond);
        self.line.clear();
        self.beyond = 0;
    }

    fn keep(&mut self, bytes: &[u8]) {
        let (kept, beyond) = bytes.split_at(bytes.len().min(LINE_BYTES_MAX - self.line.len()));
        self.line.extend_from_slice(kept);
        self.beyond += beyond.len() as u64;
    }
}

/// Writes a line as text that says what it says and does nothing: bytes that are no UTF-8, and controls of one byte, as `\x1b`, other characters
/// that show nothing as `\u{202e}`.
pub(super) fn write_escaped(text: &mut String, line: &[u8]) {
    for chunk in line.utf8_chunks() {
        for character in chunk.valid().chars() {
            if is_harmless(character) {
                text.push(character);
            } else if character.is_ascii() {
                write_byte(text, character as u8);
            } else {
                text.extend(character.escape_unicode());
            }
        }
        for byte in chunk.invalid() {
            write_byte(text, *byte);
        }
    }
}

fn write_byte(text: &mut String, byte: u8) {
    write!(text, "\\x{byte:02x}").expect("a String takes everything");
}

/// Whether a character shows itself and moves nothing. Not: controls (C0, C1, DEL) but for the tabulator; ends of lines and paragraphs; what turns the
/// direction of writing, or has no width (Unicode 15, general category Cf, as far as it is that).
fn is_harmless(character: char) -> bool {
    match character {
        '\t' => true,
        '\u{ad}'
        | '\u{61c}'
        | '\u{200b}'..='\u{200f}'
        | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}'
        | '\u{feff}' => false,
        '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}' => false,
        _ => !character.is_control(),
    }
}

/// How many lines of a worker may be shown, counted by the second.
#[derive(Debug)]
pub(super) struct Allowance {
    lines_max: u32,
    since_ns: u64,
    shown: u32,
    dropped: u64,
}

impl Allowance {
    /// So many lines a second.
    pub(super) fn new(lines_max: u32) -> Self {
        Allowance { lines_max, since_ns: 0, shown: 0, dropped: 0 }
    }

    /// How many a second.
    pub(super) fn lines_max(&self) -> u32 {
        self.lines_max
    }

    /// Whether one more line may be shown; it is counted either way.
    pub(super) fn take(&mut self, now_ns: u64) -> bool {
        if now_ns.saturating_sub(self.since_ns) >= WINDOW_NS {
            (self.since_ns, self.shown) = (now_ns, 0);
        }
        if self.shown < self.lines_max {
            self.shown += 1;
            return true;
        }
        self.dropped += 1;
        false
    }

    /// When there will be something to tell about lines that were dropped. `u64::MAX`: never, as it is now.
    pub(super) fn due_ns(&self) -> u64 {
        if self.dropped == 0 { u64::MAX } else { self.since_ns + WINDOW_NS }
    }

    /// How many were dropped since the last time this was asked.
    pub(super) fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lines_of(pieces: &[&[u8]]) -> Vec<(Vec<u8>, u64)> {
        let (mut splitter, mut lines) = (Splitter::default(), Vec::new());
        for piece in pieces {
            splitter.take(piece, |line, beyond| lines.push((line.to_vec(), beyond)));
        }
        splitter.finish(|line, beyond| lines.push((line.to_vec(), beyond)));
        lines
    }

    fn escaped(line: &[u8]) -> String {
        let mut text = String::new();
        write_escaped(&mut text, line);
        text
    }

    #[test]
    fn a_line_ends_with_its_end_or_with_its_stream() {
        let whole = |text: &str| (text.as_bytes().to_vec(), 0);
        assert_eq!(lines_of(&[b"a\nb\r\n\nla", b"st"]), [whole("a"), whole("b"), whole(""), whole("last")]);
        assert_eq!(lines_of(&[b"", b"\n"]), [whole("")]);
        assert!(lines_of(&[b""]).is_empty());
    }

    #[test]
    fn g4_a_line_cannot_pass_for_two_or_speak_to_a_terminal() {
        assert_eq!(escaped(b"\x1b[2J\rworker 1"), "\\x1b[2J\\x0dworker 1");
        assert_eq!(escaped("a\u{2028}b\u{202e}c\u{9b}d".as_bytes()), "a\\u{2028}b\\u{202e}c\\u{9b}d");
        assert_eq!(escaped(b"\xff\xc3("), "\\xff\\xc3(");
        assert_eq!(escaped("tab\there, größe 日本".as_bytes()), "tab\there, größe 日本");
    }

    #[test]
    fn what_is_dropped_is_counted_and_told_once_a_second() {
        let mut allowance = Allowance::new(2);
        let second = 1_000_000_000;
        assert_eq!(allowance.due_ns(), u64::MAX);
        let shown = (0..5).filter(|_| allowance.take(second)).count();
        assert_eq!((shown, allowance.due_ns()), (2, 2 * second));
        assert!(allowance.take(2 * second));
        assert_eq!((allowance.take_dropped(), allowance.take_dropped(), allowance.due_ns()), (3, 0, u64::MAX));
    }

    proptest! {
        /// Oracle: all bytes at once, split by the standard library.
        #[test]
        fn lines_do_not_depend_on_the_pieces_they_came_in(
            bytes in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), any::<u8>()], 0..4000),
            long in 0..3 * LINE_BYTES_MAX,
            cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..8),
        ) {
            let bytes = [&bytes[..], &vec![b'x'; long], &bytes].concat();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).chain([0, bytes.len()]).collect();
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
            let mut expected: Vec<(Vec<u8>, u64)> = bytes
                .split(|byte| *byte == b'\n')
                .map(|line| {
                    let kept = &line[..line.len().min(LINE_BYTES_MAX)];
                    (kept.strip_suffix(b"\r").unwrap_or(kept).to_vec(), (line.len() - kept.len()) as u64)
                })
                .collect();
            // What follows the last end is a line only if there is something.
            if bytes.last().is_none_or(|byte| *byte == b'\n') {
                expected.pop();
            }
            prop_assert_eq!(lines_of(&pieces), expected);
        }

        #[test]
        fn an_escaped_line_is_one_line_of_bounded_length(line in proptest::collection::vec(any::<u8>(), 0..LINE_BYTES_MAX)) {
            let text = escaped(&line);
            prop_assert!(text.len() <= ESCAPED_BYTES_MAX * line.len().max(1));
            prop_assert!(text.chars().all(|character| character == '\t' || !character.is_control()));
        }
    }
}
