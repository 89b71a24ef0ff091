//! One connection to Redis: the commands that the experiments need, in RESP version 2 (redis.io, "Redis serialization protocol").
//!
//! Waits for answers as a wait mode says, as a floor's end does, but that it offers its core to others between two looks: the server has to
//! run somewhere, and where two ends spin on two cores it would get one at the next tick only, 4 ms later. The server itself always sleeps
//! when it has nothing to do. A value is written from the caller's memory and read into it, without a copy of ours in between but for what comes with an answer's first bytes.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::PollFlags;

use crate::end::until_ready;
use crate::placement::Wait;
use crate::stream::CONGESTION_CONTROL;

/// Bytes read ahead: an answer's first line, and the whole of a short one.
const AHEAD_BYTES: usize = 16 << 10;

/// Longest text of an answer that we look at (`INFO server`: 1.2 kB).
const TEXT_BYTES_MAX: usize = 64 << 10;

/// Longest a connection may take to be made.
const CONNECT_MAX: Duration = Duration::from_secs(5);

/// Why a command has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RedisError {
    /// The connection is of no use any more.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It refused the command, in its words.
    #[error("Redis answers `{0}`")]
    Refused(String),
    /// Whatever answers there is no Redis of ours, or we are out of step.
    #[error("`{answer}` is not {wanted}, as Redis would answer")]
    Strange { answer: String, wanted: &'static str },
    /// Somebody else wrote under this key.
    #[error("a value of {found_bytes} B where at most {room_bytes} B were expected")]
    TooLong { found_bytes: usize, room_bytes: usize },
}

impl From<RedisError> for io::Error {
    fn from(error: RedisError) -> Self {
        match error {
            RedisError::Io(error) => error,
            other => io::Error::other(other),
        }
    }
}

type Result<T> = std::result::Result<T, RedisError>;

/// A connection with one command under way at a time. After an error it is out of step: drop it.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    wait: Wait,
    /// What comes before the value of a command.
    head: Vec<u8>,
    /// Received and not yet taken: `ahead[start..end]`.
    ahead: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Connection {
    /// `TCP_NODELAY` and reno, as a floor's connection.
    pub(crate) fn open(address: SocketAddr, wait: Wait) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&address, CONNECT_MAX)?;
        stream.set_nodelay(true)?;
        socket2::SockRef::from(&stream).set_tcp_congestion(CONGESTION_CONTROL.as_bytes())?;
        stream.set_nonblocking(wait != Wait::Efficient)?;
        Ok(Self { stream, wait, head: Vec::new(), ahead: vec![0; AHEAD_BYTES].into(), start: 0, end: 0 })
    }

    /// Our end of the connection.
    #[cfg(test)]
    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.stream.local_addr()
    }

    /// SET: keeps a value under a key, over whatever was there.
    pub(crate) fn set(&mut self, key: &str, value: &[u8]) -> Result<()> {
        self.send(&[b"SET", key.as_bytes()], Some(value))?;
        let answer = self.line()?;
        match answer {
            b"+OK" => Ok(()),
            other => Err(unexpected(other, "+OK")),
        }
    }

    /// GET: the value's length, and its bytes at the front of `room`; `None` when there is none.
    pub(crate) fn get(&mut self, key: &str, room: &mut [u8]) -> Result<Option<usize>> {
        self.send(&[b"GET", key.as_bytes()], None)?;
        self.bulk(room)
    }

    /// DEL: whether there was one.
    pub(crate) fn delete(&mut self, key: &str) -> Result<bool> {
        self.send(&[b"DEL", key.as_bytes()], None)?;
        Ok(self.number(b':', "a number")? > 0)
    }

    /// RPUSH: adds a value to the end of the list under a key.
    pub(crate) fn push(&mut self, key: &str, value: &[u8]) -> Result<()> {
        self.send(&[b"RPUSH", key.as_bytes()], Some(value))?;
        self.number(b':', "a number").map(drop)
    }

    /// BLPOP: takes the first value of the list under a key into `room` as soon as there is one; `None` when there is none within
    /// `patience`, in whole seconds (0: for ever).
    pub(crate) fn pop(&mut self, key: &str, room: &mut [u8], patience: Duration) -> Result<Option<usize>> {
        let seconds = patience.as_secs().to_string();
        self.send(&[b"BLPOP", key.as_bytes(), seconds.as_bytes()], None)?;
        if self.number(b'*', "the key and its value")? < 0 {
            return Ok(None);
        }
        let mut found = [0; 256];
        let found_bytes = self.bulk(&mut found)?.unwrap_or(0);
        if &found[..found_bytes] != key.as_bytes() {
            return Err(unexpected(&found[..found_bytes], "the key that was asked for"));
        }
        self.bulk(room)
    }

    /// INFO server: the pid of whoever answers.
    pub(crate) fn server_pid(&mut self) -> Result<u32> {
        self.send(&[b"INFO", b"server"], None)?;
        let mut text = vec![0; TEXT_BYTES_MAX];
        let text_bytes = self.bulk(&mut text)?.unwrap_or(0);
        let text = String::from_utf8_lossy(&text[..text_bytes]);
        let pid = text.lines().find_map(|line| line.strip_prefix("process_id:")?.trim().parse().ok());
        pid.ok_or_else(|| unexpected(text.lines().next().unwrap_or_default().as_bytes(), "a text with process_id"))
    }

    /// Sends a command: an array of its words, of which the last may be a value of any length.
    fn send(&mut self, words: &[&[u8]], value: Option<&[u8]>) -> Result<()> {
        debug_assert!(self.start == self.end, "an answer nobody took");
        self.head.clear();
        write!(self.head, "*{}\r\n", words.len() + usize::from(value.is_some()))?;
        for word in words {
            write!(self.head, "${}\r\n", word.len())?;
            self.head.extend_from_slice(word);
            self.head.extend_from_slice(b"\r\n");
        }
        if let Some(value) = value {
            write!(self.head, "${}\r\n", value.len())?;
        }
        let mut parts = [
            IoSlice::new(&self.head),
            IoSlice::new(value.unwrap_or_default()),
            IoSlice::new(if value.is_some() { b"\r\n" } else { b"" }),
        ];
        let mut left = &mut parts[..];
        while !left.is_empty() {
            let mut stream = &self.stream;
            let sent =
                until_ready(self.wait, self.stream.as_fd(), PollFlags::OUT, || or_yield(stream.write_vectored(left)))?;
            if sent == 0 {
                return Err(io::Error::from(io::ErrorKind::WriteZero).into());
            }
            IoSlice::advance_slices(&mut left, sent);
        }
        Ok(())
    }

    /// The next line, without its end.
    fn line(&mut self) -> Result<&[u8]> {
        loop {
            if let Some(length) = self.ahead[self.start..self.end].windows(2).position(|pair| pair == b"\r\n") {
                let line = self.start..self.start + length;
                self.start += length + 2;
                return Ok(&self.ahead[line]);
            }
            if self.start == self.end {
                (self.start, self.end) = (0, 0);
            } else if self.end == self.ahead.len() {
                self.ahead.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            }
            if self.end == self.ahead.len() {
                return Err(unexpected(&self.ahead[..40], "a line of at most 16 KiB"));
            }
            let (mut stream, room) = (&self.stream, &mut self.ahead[self.end..]);
            let got = until_ready(self.wait, self.stream.as_fd(), PollFlags::IN, || or_yield(stream.read(room)))?;
            self.end += something(got)?;
        }
    }

    /// The next line as a number of the kind that begins with `mark`.
    fn number(&mut self, mark: u8, wanted: &'static str) -> Result<i64> {
        let line = self.line()?;
        let digits = line.strip_prefix(&[mark]).and_then(|digits| std::str::from_utf8(digits).ok());
        digits.and_then(|digits| digits.parse().ok()).ok_or_else(|| unexpected(line, wanted))
    }

    /// A value, to the front of `room`; `None` when there is none.
    fn bulk(&mut self, room: &mut [u8]) -> Result<Option<usize>> {
        let Ok(value_bytes) = usize::try_from(self.number(b'$', "a value")?) else { return Ok(None) };
        let room_bytes = room.len();
        let Some(value) = room.get_mut(..value_bytes) else {
            return Err(RedisError::TooLong { found_bytes: value_bytes, room_bytes });
        };
        let mut filled = value_bytes.min(self.end - self.start);
        value[..filled].copy_from_slice(&self.ahead[self.start..self.start + filled]);
        self.start += filled;
        while filled < value_bytes {
            let (mut stream, rest, ahead) = (&self.stream, &mut value[filled..], &mut self.ahead[..]);
            let rest_bytes = rest.len();
            // The line end behind the value comes in the same read.
            let got = until_ready(self.wait, self.stream.as_fd(), PollFlags::IN, || {
                or_yield(stream.read_vectored(&mut [IoSliceMut::new(rest), IoSliceMut::new(ahead)]))
            })?;
            let of_value = something(got)?.min(rest_bytes);
            filled += of_value;
            (self.start, self.end) = (0, got - of_value);
        }
        match self.line()? {
            b"" => Ok(Some(value_bytes)),
            other => Err(unexpected(other, "the end of a value")),
        }
    }
}

/// What a look gave; when it gave nothing, whoever waits for this core has it first.
fn or_yield<T>(looked: io::Result<T>) -> io::Result<T> {
    if matches!(&looked, Err(error) if error.kind() == io::ErrorKind::WouldBlock) {
        rustix::thread::sched_yield();
    }
    looked
}

/// So many bytes, unless the other side has closed.
fn something(got: usize) -> io::Result<usize> {
    if got == 0 { Err(io::Error::new(io::ErrorKind::UnexpectedEof, "Redis closed the connection")) } else { Ok(got) }
}

fn unexpected(answer: &[u8], wanted: &'static str) -> RedisError {
    let text = String::from_utf8_lossy(&answer[..answer.len().min(200)]);
    match text.strip_prefix('-') {
        Some(refusal) => RedisError::Refused(refusal.to_owned()),
        None => RedisError::Strange { answer: text.into_owned(), wanted },
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// A server that says `answer`, so many bytes at a time, whatever it is asked.
    fn saying(answer: &[u8], bytes_at_a_time: usize) -> Connection {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let answer = answer.to_vec();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_nodelay(true).unwrap();
            let mut question = [0; 64];
            let _ = stream.read(&mut question).unwrap();
            for piece in answer.chunks(bytes_at_a_time) {
                stream.write_all(piece).unwrap();
                std::thread::yield_now();
            }
        });
        Connection::open(address, Wait::Balanced).unwrap()
    }

    #[test]
    fn answers_are_read_however_they_are_cut() {
        let value: Vec<u8> = (0..50_000u32).map(|n| n.to_le_bytes()[0]).collect();
        let mut answer = format!("${}\r\n", value.len()).into_bytes();
        answer.extend_from_slice(&value);
        answer.extend_from_slice(b"\r\n");
        for bytes_at_a_time in [1, 3, 8191, usize::MAX] {
            let mut room = vec![0; value.len() + 10];
            let got = saying(&answer, bytes_at_a_time).get("k", &mut room).unwrap();
            assert_eq!((got, &room[..value.len()]), (Some(value.len()), &value[..]));
            let mut room = [0; 8];
            let popped = saying(b"*2\r\n$1\r\nk\r\n$3\r\nabc\r\n", bytes_at_a_time).pop("k", &mut room, Duration::ZERO);
            assert_eq!((popped.unwrap(), &room[..3]), (Some(3), &b"abc"[..]));
        }
        assert_eq!(saying(b"$-1\r\n", 1).get("k", &mut []).unwrap(), None);
        assert_eq!(saying(b"*-1\r\n", 1).pop("k", &mut [], Duration::ZERO).unwrap(), None);
        assert_eq!(saying(b"$0\r\n\r\n", 1).get("k", &mut []).unwrap(), Some(0));
    }

    #[test]
    fn what_is_no_answer_is_an_error_that_says_so() {
        let refused = saying(b"-OOM command not allowed\r\n", 5).set("k", b"v").unwrap_err();
        assert!(matches!(&refused, RedisError::Refused(text) if text == "OOM command not allowed"), "{refused}");
        let mut room = [0; 4];
        let long = saying(b"$5\r\nabcde\r\n", 100).get("k", &mut room).unwrap_err();
        assert!(matches!(long, RedisError::TooLong { found_bytes: 5, room_bytes: 4 }), "{long}");
        for nonsense in [&b"HTTP/1.1 400 Bad Request\r\n"[..], b"$x\r\n", b"+\r\n", b"$1\r\nabc\r\n", &[b'a'; 20_000]] {
            let error = saying(nonsense, 1 << 20).get("k", &mut room).unwrap_err();
            assert!(matches!(error, RedisError::Strange { .. }), "{error}");
        }
        let other_key = saying(b"*2\r\n$1\r\nx\r\n$1\r\na\r\n", 100).pop("k", &mut room, Duration::ZERO).unwrap_err();
        assert!(matches!(other_key, RedisError::Strange { .. }), "{other_key}");
        let cut = saying(b"$4\r\nab", 100).get("k", &mut room).unwrap_err();
        assert!(matches!(&cut, RedisError::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof), "{cut}");
    }
}
