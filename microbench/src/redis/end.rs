//! One end of an exchange of messages that are values in Redis, each under a key of its own.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::client::{Connection, RedisError};
use crate::end::End;
use crate::placement::Wait;

/// Longest an end waits for a message: then the other end is gone.
const PATIENCE: Duration = Duration::from_secs(30);

/// How much longer each pause between two looks is than the one before, and the first.
const PAUSE_STEP: Duration = Duration::from_millis(1);

/// How an end learns of a message.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub(crate) enum Pace {
    /// As published: SET, and GET at once, after 1 ms, after 2 ms more, after 3 ms more, ... until it is there, then DEL.
    Poll,
    /// RPUSH, and BLPOP, which the server answers as soon as the message is there.
    Block,
}

/// Which of the two ends.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub(crate) enum Side {
    Asking,
    Answering,
}

/// Sends and receives whole messages; the nth of a side is under a key that ends with n, so that none is seen twice.
#[derive(Debug)]
pub(crate) struct RedisEnd {
    connection: Connection,
    pace: Pace,
    out: Keys,
    inward: Keys,
}

impl RedisEnd {
    /// `name` is what both ends of an exchange have in common and nobody else has.
    pub(crate) fn open(
        address: SocketAddr,
        wait: Wait,
        pace: Pace,
        side: Side,
        name: &str,
    ) -> Result<Self, RedisError> {
        let [questions, answers] = ["question", "answer"].map(|kind| Keys::new(name, kind));
        let (out, inward) = match side {
            Side::Asking => (questions, answers),
            Side::Answering => (answers, questions),
        };
        Ok(Self { connection: Connection::open(address, wait)?, pace, out, inward })
    }

    fn poll(&mut self, message: &mut [u8]) -> io::Result<usize> {
        let key = self.inward.next();
        let give_up = Instant::now() + PATIENCE;
        let mut pause = Duration::ZERO;
        loop {
            if let Some(bytes) = self.connection.get(key, message)? {
                self.connection.delete(key)?;
                return Ok(bytes);
            }
            pause += PAUSE_STEP;
            if Instant::now() + pause > give_up {
                return Err(nothing_came(key));
            }
            std::thread::sleep(pause);
        }
    }
}

impl End for RedisEnd {
    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        let key = self.out.next();
        match self.pace {
            Pace::Poll => self.connection.set(key, message)?,
            Pace::Block => self.connection.push(key, message)?,
        }
        Ok(())
    }

    fn receive(&mut self, message: &mut [u8]) -> io::Result<()> {
        let got = match self.pace {
            Pace::Poll => self.poll(message)?,
            Pace::Block => {
                let key = self.inward.next();
                self.connection.pop(key, message, PATIENCE)?.ok_or_else(|| nothing_came(key))?
            }
        };
        if got == message.len() {
            return Ok(());
        }
        Err(io::Error::other(format!("a message of {got} B where {} B were due", message.len())))
    }
}

fn nothing_came(key: &str) -> io::Error {
    let text = format!("no message under {key} within {} s: the other end is gone", PATIENCE.as_secs());
    io::Error::new(io::ErrorKind::TimedOut, text)
}

/// The keys of one direction, in order.
#[derive(Debug)]
struct Keys {
    key: String,
    prefix_bytes: usize,
    used: u64,
}

impl Keys {
    fn new(name: &str, kind: &str) -> Self {
        let key = format!("{name}:{kind}:");
        Self { prefix_bytes: key.len(), key, used: 0 }
    }

    fn next(&mut self) -> &str {
        use std::fmt::Write;
        self.used += 1;
        self.key.truncate(self.prefix_bytes);
        // Writing to a string does not fail.
        let _ = write!(self.key, "{}", self.used);
        &self.key
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_key_is_used_twice() {
        let mut keys = Keys::new("praas-bench:1", "question");
        assert_eq!(keys.next(), "praas-bench:1:question:1");
        assert_eq!(keys.next(), "praas-bench:1:question:2");
    }
}
