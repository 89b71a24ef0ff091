//! Functions that run when a message is there under each of their keys (trigger *join*). Decides; has no clock and never looks into a payload.
//!
//! ```text
//! in the mailbox ──one under each key, and a place──► running ──answered, or lost with its worker──► gone
//!       ▲                                                │
//!       └────── the worker died before it began, or the function may run again ◄┘
//! ```
//! A run takes the oldest message under each key, all at once or none, so that what is missing keeps no other message from a receive. A receive
//! that waits has been given its message before it was stored, so it comes first; of what is stored, whoever asks first gets it. Of two functions
//! that want the same message the one that was registered first gets it.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Keep;
use super::mailbox::{Mailbox, Message, Sender};
use crate::numbered::NumberMap;

/// Keys of one function at most: their senders fit one record.
pub(crate) const KEYS_MAX: usize = 16;

/// Number of a run.
pub(crate) type RunId = u64;

/// When a function runs.
#[derive(Debug, Clone)]
pub(crate) struct Join {
    pub(crate) function: u16,
    /// 1 to [`KEYS_MAX`], all different.
    pub(crate) keys: Vec<Arc<[u8]>>,
    /// All messages of a run have the same sender.
    pub(crate) one_sender: bool,
    /// It may run again when its worker is lost.
    pub(crate) idempotent: bool,
}

/// What a run has taken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Begun<P> {
    pub(crate) run: RunId,
    pub(crate) function: u16,
    pub(crate) idempotent: bool,
    /// In the order of the keys.
    pub(crate) messages: Vec<Message<P>>,
}

/// How a run ended whose messages are gone.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ended<F> {
    pub(crate) function: u16,
    pub(crate) keys: Vec<Arc<[u8]>>,
    /// The first failure, if there was one.
    pub(crate) failure: Option<F>,
}

#[derive(Debug)]
struct Run<P, F> {
    join: usize,
    /// What its messages are besides their payloads.
    messages: Vec<Message<()>>,
    /// Payloads that came back, in the order of the keys.
    back: Vec<P>,
    /// Messages that were answered for.
    answered: usize,
    failure: Option<F>,
}

/// The functions of a process that run for messages. `P`: payloads; `F`: failures.
#[derive(Debug)]
pub(crate) struct Joins<P, F> {
    joins: Vec<Join>,
    /// Which of them want a key, by their order.
    wanting: BTreeMap<Arc<[u8]>, Vec<usize>>,
    runs_max: usize,
    runs: NumberMap<Run<P, F>>,
    made: RunId,
}

impl<P: Keep, F> Joins<P, F> {
    /// No more than `runs_max` at a time: the rest waits in the mailbox, which has bounds.
    pub(crate) fn new(joins: Vec<Join>, runs_max: usize) -> Self {
        let mut wanting = BTreeMap::<_, Vec<usize>>::new();
        for (at, join) in joins.iter().enumerate() {
            join.keys.iter().for_each(|key| wanting.entry(Arc::clone(key)).or_default().push(at));
        }
        Joins { joins, wanting, runs_max, runs: NumberMap::default(), made: 0 }
    }

    /// Whether there is any.
    pub(crate) fn is_empty(&self) -> bool {
        self.joins.is_empty()
    }

    /// The functions.
    pub(crate) fn functions(&self) -> impl Iterator<Item = u16> {
        self.joins.iter().map(|join| join.function)
    }

    /// A message was stored. Begins the run that it completes, if there is a place and `may` says that the function may run.
    pub(crate) fn stored(
        &mut self,
        mailbox: &mut Mailbox<P>,
        from: Sender,
        key: &[u8],
        may: impl Fn(u16) -> bool,
    ) -> Option<Begun<P>> {
        if self.runs.len() >= self.runs_max {
            return None;
        }
        let wanting = self.wanting.get(key)?;
        let (join, messages) = wanting.iter().find_map(|at| {
            let join = &self.joins[*at];
            let from = join.one_sender.then_some(from);
            let messages = may(join.function).then(|| mailbox.take_each(from, &join.keys))??;
            Some((*at, messages))
        })?;
        Some(self.begin(join, messages))
    }

    /// There is a place again, or messages are back, or a function may run again: begins a run that can; to be called until there is none.
    pub(crate) fn next(&mut self, mailbox: &mut Mailbox<P>, may: impl Fn(u16) -> bool) -> Option<Begun<P>> {
        if self.runs.len() >= self.runs_max {
            return None;
        }
        let (join, messages) = self.joins.iter().enumerate().find_map(|(at, join)| {
            if !may(join.function) {
                return None;
            }
            let messages = if join.one_sender {
                let senders = mailbox.senders_of(join.keys.first()?);
                senders.into_iter().find_map(|sender| mailbox.take_each(Some(sender), &join.keys))
            } else {
                mailbox.take_each(None, &join.keys)
            };
            Some((at, messages?))
        })?;
        Some(self.begin(join, messages))
    }

    fn begin(&mut self, join: usize, messages: Vec<Message<P>>) -> Begun<P> {
        self.made += 1;
        let Join { function, idempotent, .. } = self.joins[join];
        let about = |message: &Message<P>| Message {
            from: message.from,
            key: Arc::clone(&message.key),
            payload: (),
            number: message.number,
        };
        let run =
            Run { join, messages: messages.iter().map(about).collect(), back: Vec::new(), answered: 0, failure: None };
        self.runs.insert(self.made, run);
        Begun { run: self.made, function, idempotent, messages }
    }

    /// Who sent the messages of a run, in the order of the keys.
    pub(crate) fn senders(&self, run: RunId) -> impl Iterator<Item = Sender> {
        self.runs.get(&run).into_iter().flat_map(|run| run.messages.iter().map(|message| message.from))
    }

    /// The payload of the next message of a run is back: it does not run. Gives all of them when it was the last, the oldest first, to be
    /// [restored](Mailbox::restore).
    pub(crate) fn back(&mut self, run: RunId, payload: P) -> Vec<Message<P>> {
        let found = self.runs.get_mut(&run).expect("what comes back had begun");
        found.back.push(payload);
        if found.back.len() < found.messages.len() {
            return Vec::new();
        }
        let Run { messages, back, .. } = self.runs.remove(&run).expect("seen just now");
        let whole = |(Message { from, key, number, .. }, payload)| Message { from, key, payload, number };
        let mut messages: Vec<_> = messages.into_iter().zip(back).map(whole).collect();
        messages.sort_unstable_by_key(|message| message.number);
        messages
    }

    /// One message of a run is answered for. Says how the run ended when it was the last.
    pub(crate) fn answered(&mut self, run: RunId, failure: Option<F>) -> Option<Ended<F>> {
        let found = self.runs.get_mut(&run).expect("what is answered had begun");
        found.answered += 1;
        found.failure = found.failure.take().or(failure);
        if found.answered < found.messages.len() {
            return None;
        }
        let Run { join, failure, .. } = self.runs.remove(&run).expect("seen just now");
        let Join { function, keys, .. } = &self.joins[join];
        Some(Ended { function: *function, keys: keys.clone(), failure })
    }
}
