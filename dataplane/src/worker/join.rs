//! Functions that run for messages.

use super::Context;
use super::messages::Message;
use super::session::{Fatal, Incoming, Origin, Session};
use crate::controller::join::KEYS_MAX;
use crate::error::{Failure, InvokeError};
use crate::payload::Output;
use crate::wire::{Trigger, record};

/// When a function of [`Worker::join`](super::Worker::join) runs: when a message is in the mailbox under each of these keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Join {
    /// 1 to [`Join::KEYS_MAX`] different ones, each of 1 to 1024 bytes.
    pub keys: Vec<Vec<u8>>,
    /// All messages of one run are from the same process; else each is from whoever sent it first.
    pub one_sender: bool,
    /// Running it twice does no harm: when its worker dies in the middle of it, it runs again with the same messages.
    pub idempotent: bool,
}

impl Join {
    /// Most keys that one function may have.
    pub const KEYS_MAX: usize = KEYS_MAX;

    /// Under these keys, from anybody, at most once.
    #[must_use]
    pub fn of<K: AsRef<[u8]>>(keys: impl IntoIterator<Item = K>) -> Join {
        let keys = keys.into_iter().map(|key| key.as_ref().to_vec()).collect();
        Join { keys, one_sender: false, idempotent: false }
    }

    /// The same, with all messages of one run from one process.
    #[must_use]
    pub fn from_one_sender(self) -> Join {
        Join { one_sender: true, ..self }
    }

    /// The same, for a function that may run again.
    #[must_use]
    pub fn idempotent(self) -> Join {
        Join { idempotent: true, ..self }
    }

    /// # Panics
    /// When it is out of range.
    pub(super) fn trigger(&self) -> Trigger {
        let Join { keys, one_sender, idempotent } = self.clone();
        assert!((1..=KEYS_MAX).contains(&keys.len()), "a join of {} keys; 1 to {KEYS_MAX} are possible", keys.len());
        for (at, key) in keys.iter().enumerate() {
            let bytes = key.len();
            assert!((1..=praas_shm::KEY_BYTES_MAX).contains(&bytes), "a key of {bytes} bytes; keys have 1 to 1024");
            assert!(!keys[..at].contains(key), "the same key twice: a run takes one message of each");
        }
        Trigger::Join { keys, one_sender, idempotent }
    }
}

/// Runs the function for the messages that have come.
pub(super) fn serve<F>(
    session: &mut Session,
    incoming: &mut Incoming,
    keys: &[Vec<u8>],
    function: &mut F,
) -> Result<(), Fatal>
where
    F: FnMut(&mut Context<'_>, Vec<Message>) -> Result<(), Failure>,
{
    let head = incoming.request;
    if head.kind() & record::KIND != record::JOIN {
        let Some((input, block)) = session.open(incoming)? else { return Ok(()) };
        drop(input);
        let text = String::from("it is not called: it runs when there is a message under each of its keys");
        return session.reply_error(incoming.origin, head.id(), block, &InvokeError::UnknownFunction { text });
    }
    let messages = session.gather_messages(&head, keys)?;
    let mut context = Context::new(session, Origin::Controller, head.id(), head.tag(), head.aux());
    let ended = function(&mut context, messages);
    context.finish();
    // The first answer says how it ended; the others, that their messages were taken.
    let first = ended.map(|()| Output::empty());
    session.answer_batch(std::iter::once(first).chain(std::iter::repeat_with(|| Ok(Output::empty()))), || {
        unreachable!("there is an answer for each")
    })
}
