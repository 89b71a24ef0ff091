//! Messages: what functions of processes send each other, outside of calls.

use std::fmt;
use std::ops::Deref;
use std::rc::Rc;

use crate::error::Failure;
use crate::payload::{Bytes, Output, Payload};
use crate::wire::Code;

/// The name that stands for the process itself, as the destination of a message. No process is called so.
pub const SELF: &str = "";

/// Whose messages a receive takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source<'a> {
    /// Anybody's.
    Any,
    /// Those of functions of the same process.
    Own,
    /// Those of this process.
    Process(&'a str),
}

impl<'a> From<&'a str> for Source<'a> {
    fn from(name: &'a str) -> Source<'a> {
        if name == SELF { Source::Own } else { Source::Process(name) }
    }
}

/// Which messages a receive takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key<'a> {
    /// Whatever their key.
    Any,
    /// Those with this key.
    Is(&'a [u8]),
}

impl<'a, T: AsRef<[u8]> + ?Sized> From<&'a T> for Key<'a> {
    fn from(key: &'a T) -> Key<'a> {
        Key::Is(key.as_ref())
    }
}

/// Why a message was not sent, or none was received.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MessageError {
    /// A key has 1 to 1024 bytes.
    #[error("a key of {bytes} bytes: keys have 1 to 1024")]
    KeyLength {
        /// Of the key that was given.
        bytes: usize,
    },
    /// It is larger than the process, or the receiver's mailbox, allows. Not a byte of it was sent.
    #[error("message too large: {text}")]
    TooLarge {
        /// The size and the limit.
        text: String,
    },
    /// There is no memory for it here, or at the receiver's.
    #[error("no memory for the message: {text}")]
    NoSpace {
        /// What was needed and what is free.
        text: String,
    },
    /// The receiver's mailbox is full, or too much waits to be sent. Send it again later.
    #[error("busy: {text}")]
    Busy {
        /// Which bound.
        text: String,
    },
    /// No process of this name is a member of the application.
    #[error("unknown process `{name}`: tell this one of it with --peer {name}=HOST:PORT or a table of members")]
    UnknownProcess {
        /// The name.
        name: String,
    },
    /// The process that was to have it ended. It may have had it.
    #[error("process lost: {text}")]
    ProcessLost {
        /// What is known.
        text: String,
    },
    /// The process that was to have it is swapped out, and this one does not wait for it (`--when-swapped refuse`). It was not sent.
    #[error("swapped out: {text}")]
    Swapped {
        /// Which process.
        text: String,
    },
    /// The time was over. Of a message that was being sent: it may arrive yet, if the text says so.
    #[error("timeout: {text}")]
    Timeout {
        /// What did not happen.
        text: String,
    },
    /// Nobody waits for this invocation any more: it does not wait for a message either.
    #[error("cancelled: nobody waits for this invocation any more")]
    Cancelled,
    /// The other side broke the protocol.
    #[error("protocol error: {text}")]
    Protocol {
        /// What was wrong.
        text: String,
    },
}

impl MessageError {
    pub(crate) fn from_wire(code: Option<Code>, text: &[u8]) -> MessageError {
        let text = String::from_utf8_lossy(text).into_owned();
        match code {
            Some(Code::TooLarge) => MessageError::TooLarge { text },
            Some(Code::NoSpace) => MessageError::NoSpace { text },
            Some(Code::Busy) => MessageError::Busy { text },
            Some(Code::UnknownProcess) => MessageError::UnknownProcess { name: text },
            Some(Code::PeerLost) => MessageError::ProcessLost { text },
            Some(Code::Swapped) => MessageError::Swapped { text },
            Some(Code::Cancelled) => MessageError::Cancelled,
            Some(Code::Timeout) => MessageError::Timeout { text },
            _ => MessageError::Protocol { text },
        }
    }
}

impl From<MessageError> for Failure {
    fn from(error: MessageError) -> Self {
        Failure::new(-1, error.to_string())
    }
}

/// Who has a message that was sent to everybody.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Broadcast {
    /// Names of the processes whose mailbox it is in.
    pub reached: Vec<String>,
    /// Names of those that may not have it, and why.
    pub missed: Vec<(String, MessageError)>,
}

/// A message that was received: nobody else gets it. Reads as a byte slice, where the sender wrote it (rings, same process).
pub struct Message {
    pub(crate) bytes: Bytes<'static>,
    /// Bytes of it that are the payload; behind them may be its key.
    pub(crate) payload_bytes: usize,
    pub(crate) from: Rc<str>,
    pub(crate) key: Vec<u8>,
}

impl Message {
    /// Name of the process that sent it.
    #[must_use]
    pub fn from(&self) -> &str {
        &self.from
    }

    /// The key it was sent under.
    #[must_use]
    pub fn key(&self) -> &[u8] {
        &self.key
    }
}

impl Deref for Message {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes.as_ref()[..self.payload_bytes]
    }
}

impl From<Message> for Payload<'_> {
    /// Handed on without a copy.
    fn from(message: Message) -> Self {
        let bytes = match message.bytes.short() {
            Some(inline) if inline.as_slice().len() > message.payload_bytes => {
                inline.as_slice()[..message.payload_bytes].to_vec().into()
            }
            _ => message.bytes,
        };
        Payload { bytes, is_args: false }
    }
}

impl From<Message> for Output {
    fn from(message: Message) -> Output {
        Payload::<'static>::from(message).into()
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message")
            .field("from", &self.from)
            .field("key", &self.key)
            .field("bytes", &self.len())
            .finish_non_exhaustive()
    }
}
