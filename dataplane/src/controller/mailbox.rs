//! Messages that were sent to the process, and the functions that wait for some. Decides; has no clock and never looks into a payload.
//!
//! A receive names a sender or takes [any](Wanted::from), and names a key or takes [any](Wanted::key). It gets the oldest message that matches,
//! and nobody else gets that one. Hence two messages of one sender under one key come out in the order they came in. A message
//! that comes while receives wait goes to the one of those it matches that has waited longest, so never is there a message *and* a
//! receive that waits for it.
//!
//! A message answers to four [patterns](Pattern): its sender or any, with its key or any. It stands under each of them in an
//! ordered set, so what a receive wants is the first of a range there. A receive that waits stands under the one it asks for, and
//! a new message looks under its four. Everything is O(log n), with no pause to grow a table and no hash to flood, and what is
//! not there takes no memory.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use praas_shm::KEY_BYTES_MAX;

use super::peers::PeerNumber;
use super::{Keep, WorkerId};
use crate::wire::Code;

/// Who sent a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Sender {
    /// A function of this process: `SELF`.
    Own,
    Peer(PeerNumber),
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Message<P> {
    pub(crate) from: Sender,
    /// 1 to [`KEY_BYTES_MAX`] bytes, any. Shared by all messages of that key.
    pub(crate) key: Arc<[u8]>,
    pub(crate) payload: P,
    /// How many came before it.
    pub(crate) number: u64,
}

impl<P: Keep> Message<P> {
    /// What it counts for: key and payload.
    fn len_bytes(&self) -> usize {
        self.key.len() + self.payload.len_bytes()
    }
}

/// What a receive asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted<'a> {
    /// `None`: `ANY`.
    pub(crate) from: Option<Sender>,
    /// `None`: any.
    pub(crate) key: Option<&'a [u8]>,
}

/// Who waits: a worker, and its number for the receive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Receiver {
    pub(crate) worker: WorkerId,
    pub(crate) call: u64,
}

/// Where a message went.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Delivered<P> {
    Stored,
    /// To a receive that waited, and waits no longer.
    Handed {
        to: Receiver,
        message: Message<P>,
    },
}

/// What a receive got.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received<P> {
    Message(Message<P>),
    /// Nothing yet. It ends as [`Delivered::Handed`], in [`Mailbox::restore`], in [`Mailbox::expire`], or is withdrawn.
    Waits,
    /// There is none, and its deadline has passed: a receive that does not wait has none ahead.
    Nothing,
    Refused(Refusal),
}

/// A message that was not taken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Refused<P> {
    pub(crate) why: Refusal,
    pub(crate) payload: P,
}

/// Why a message or a receive was not taken. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("the key has {found_bytes} bytes; give it 1 to {KEY_BYTES_MAX}")]
    Key { found_bytes: usize },
    #[error(
        "the mailbox holds {has} messages, and takes one of this sender below {max}; send again when some were received, or let it hold more"
    )]
    Messages { has: usize, max: usize },
    #[error(
        "the mailbox holds {has_bytes} bytes, the message has {needs_bytes} with its key, and together they may be {max_bytes} for \
         this sender; send again when some were received, or let it hold more"
    )]
    Bytes { has_bytes: usize, needs_bytes: usize, max_bytes: usize },
    #[error(
        "the message has {needs_bytes} bytes with its key, and the mailbox may hold {max_bytes}; \
         send it in parts, or let the mailbox hold more"
    )]
    TooLarge { needs_bytes: usize, max_bytes: usize },
    #[error("{has} receives wait already, and {max} may; receive with fewer functions at a time, or let more wait")]
    Receivers { has: usize, max: usize },
    #[error("receive {call} of worker {worker} waits already; give each its own number")]
    WaitsAlready { worker: WorkerId, call: u64 },
}

impl Refusal {
    /// What the caller is told.
    pub(crate) fn code(&self) -> Code {
        match self {
            Refusal::Messages { .. } | Refusal::Bytes { .. } | Refusal::Receivers { .. } => Code::Busy,
            Refusal::TooLarge { .. } => Code::TooLarge,
            Refusal::Key { .. } | Refusal::WaitsAlready { .. } => Code::Protocol,
        }
    }
}

/// How much a mailbox may hold. Of either, the last [eighth](kept) is for senders who have [little](little) there, so that one who sends without
/// end leaves room for others (A8).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) messages_max: usize,
    /// Keys and payloads of the messages together. What a message takes besides is a few hundred bytes, and those of all are
    /// bounded by `messages_max`.
    pub(crate) bytes_max: usize,
    /// Receives that wait.
    pub(crate) receivers_max: usize,
}

/// Of so much, what is kept for senders who have little: an eighth, or nothing where that is next to nothing.
fn kept(max: usize) -> usize {
    if max < 64 { 0 } else { max / 8 }
}

/// Of so much, what is little: an eighth of what is kept.
fn little(max: usize) -> usize {
    kept(max) / 8
}

/// What a sender has in the mailbox.
#[derive(Debug, Clone, Copy, Default)]
struct Held {
    messages: usize,
    bytes: usize,
}

/// How much a mailbox holds.
#[cfg(test)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Stats {
    pub(crate) messages: usize,
    /// Keys and payloads of the messages.
    pub(crate) bytes: usize,
    /// Different keys, of messages and of receives that wait.
    pub(crate) keys: usize,
    /// Receives that wait.
    pub(crate) receivers: usize,
}

/// Names a key while anybody uses it. Never used again.
type KeyId = u64;
/// Names none: nothing is stored under it, and nobody waits for it.
const NO_KEY: KeyId = 0;

/// What a receive asks for, and what a message answers to. `None`: any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Pattern {
    from: Option<Sender>,
    key: Option<KeyId>,
}

impl Pattern {
    /// What every message answers to.
    const ANY: Pattern = Pattern { from: None, key: None };

    /// What else a message answers to.
    fn of(from: Sender, key: KeyId) -> [Pattern; 3] {
        let (from, key) = (Some(from), Some(key));
        [Pattern { from, key }, Pattern { from, key: None }, Pattern { from: None, key }]
    }
}

/// Numbers under patterns: of messages those they answer to, of receives the one they ask for.
#[derive(Debug, Default)]
struct Index(BTreeSet<(Pattern, u64)>);

impl Index {
    fn insert(&mut self, pattern: Pattern, number: u64) {
        assert!(self.0.insert((pattern, number)), "{number} is in the mailbox already");
    }

    fn remove(&mut self, pattern: Pattern, number: u64) {
        assert!(self.0.remove(&(pattern, number)), "{number} is in the mailbox");
    }

    /// The lowest under a pattern.
    fn first(&self, pattern: Pattern) -> Option<u64> {
        self.0.range((pattern, 0)..=(pattern, u64::MAX)).next().map(|(_, number)| *number)
    }
}

/// The keys in use.
#[derive(Debug, Default)]
struct Keys {
    known: BTreeMap<Arc<[u8]>, Key>,
    made: KeyId,
}

#[derive(Debug)]
struct Key {
    id: KeyId,
    bytes: Arc<[u8]>,
    /// Messages stored under it and receives that wait for it.
    users: usize,
}

impl Keys {
    fn find(&self, key: &[u8]) -> Option<KeyId> {
        self.known.get(key).map(|key| key.id)
    }

    /// One more uses it.
    fn hold(&mut self, key: &[u8]) -> (KeyId, Arc<[u8]>) {
        if let Some(known) = self.known.get_mut(key) {
            known.users += 1;
            return (known.id, known.bytes.clone());
        }
        self.made += 1;
        let bytes: Arc<[u8]> = key.into();
        self.known.insert(bytes.clone(), Key { id: self.made, bytes: bytes.clone(), users: 1 });
        (self.made, bytes)
    }

    /// One uses it no longer.
    fn release(&mut self, key: &[u8]) -> KeyId {
        let known = self.known.get_mut(key).expect("a key that is used is known");
        known.users -= 1;
        let (id, users) = (known.id, known.users);
        if users == 0 {
            self.known.remove(key);
        }
        id
    }
}

/// A receive that waits.
#[derive(Debug)]
struct Waiting {
    by: Receiver,
    from: Option<Sender>,
    key: Option<Arc<[u8]>>,
    deadline_ns: u64,
}

/// The mailbox of a process.
#[derive(Debug)]
pub(crate) struct Mailbox<P> {
    bounds: Bounds,
    keys: Keys,
    /// By number: the oldest first.
    messages: BTreeMap<u64, Message<P>>,
    message_bytes: usize,
    /// Of those who have some there.
    held: BTreeMap<Sender, Held>,
    /// Under all they answer to but [`Pattern::ANY`], for which `messages` will do.
    answering: Index,
    /// Messages that came.
    numbers: u64,
    /// Receives that wait, by turn: those that wait longest first.
    waiting: BTreeMap<u64, Waiting>,
    asking: Index,
    turn_of: BTreeMap<Receiver, u64>,
    /// Deadlines and turns of receives that wait.
    deadlines: BTreeSet<(u64, u64)>,
    /// Receives that had to wait.
    turns: u64,
}

impl<P: Keep> Mailbox<P> {
    pub(crate) fn new(bounds: Bounds) -> Self {
        Mailbox {
            bounds,
            keys: Keys::default(),
            messages: BTreeMap::new(),
            message_bytes: 0,
            held: BTreeMap::new(),
            answering: Index::default(),
            numbers: 0,
            waiting: BTreeMap::new(),
            asking: Index::default(),
            turn_of: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            turns: 0,
        }
    }

    /// A message comes. A receive whose deadline has passed still gets it unless [`Mailbox::expire`] has ended that.
    ///
    /// # Errors
    /// No receive waits for it and it would be one message or byte too many, or its key is too short or too long.
    pub(crate) fn deliver(&mut self, from: Sender, key: &[u8], payload: P) -> Result<Delivered<P>, Refused<P>> {
        if let Err(why) = check_key(key) {
            return Err(Refused { why, payload });
        }
        let waits = self.longest_waiting(from, key);
        if waits.is_none()
            && let Err(why) = self.check_room(from, key.len() + payload.len_bytes())
        {
            return Err(Refused { why, payload });
        }
        let number = self.numbers;
        self.numbers += 1;
        Ok(match waits {
            Some(turn) => {
                let Waiting { by, key: asked, .. } = self.end_waiting(turn);
                let key = asked.unwrap_or_else(|| key.into());
                Delivered::Handed { to: by, message: Message { from, key, payload, number } }
            }
            None => {
                self.store(from, key, payload, number);
                Delivered::Stored
            }
        })
    }

    /// A function asks for a message, until `deadline_ns`; one that has passed, such as 0, does not wait, and `u64::MAX` never passes.
    pub(crate) fn receive(&mut self, now_ns: u64, by: Receiver, wanted: Wanted<'_>, deadline_ns: u64) -> Received<P> {
        if let Some(Err(why)) = wanted.key.map(check_key) {
            return Received::Refused(why);
        }
        if self.turn_of.contains_key(&by) {
            return Received::Refused(Refusal::WaitsAlready { worker: by.worker, call: by.call });
        }
        if let Some(number) = self.oldest(wanted) {
            return Received::Message(self.take(number));
        }
        if deadline_ns <= now_ns {
            return Received::Nothing;
        }
        let (has, max) = (self.waiting.len(), self.bounds.receivers_max);
        if has >= max {
            return Received::Refused(Refusal::Receivers { has, max });
        }
        self.begin_waiting(by, wanted, deadline_ns);
        Received::Waits
    }

    /// A message that was handed to a worker comes back, as that died before it took it: to its place before all later ones, even
    /// above a bound, as it was taken before; or to the receive given back, which waited longest of those that match. Several
    /// come back the oldest first, so that a receive that waits gets that. A message that was swapped out comes back this way,
    /// too: into an empty mailbox, under a number that keeps their order.
    pub(crate) fn restore(&mut self, message: Message<P>) -> Option<(Receiver, Message<P>)> {
        self.numbers = self.numbers.max(message.number + 1);
        if let Some(turn) = self.longest_waiting(message.from, &message.key) {
            return Some((self.end_waiting(turn).by, message));
        }
        self.store(message.from, &message.key, message.payload, message.number);
        None
    }

    /// The oldest message under each of these keys, of this sender or of any: all of them, or none. Those of receives that wait are not here.
    pub(crate) fn take_each(&mut self, from: Option<Sender>, keys: &[Arc<[u8]>]) -> Option<Vec<Message<P>>> {
        let oldest = |key: &Arc<[u8]>| self.oldest(Wanted { from, key: Some(key) });
        let numbers: Vec<u64> = keys.iter().map(oldest).collect::<Option<_>>()?;
        Some(numbers.into_iter().map(|number| self.take(number)).collect())
    }

    /// Who has sent messages that are stored under this key.
    pub(crate) fn senders_of(&self, key: &[u8]) -> Vec<Sender> {
        let Some(id) = self.keys.find(key) else { return Vec::new() };
        let (mut senders, mut after) =
            (Vec::new(), Bound::Included((Pattern { from: Some(Sender::Own), key: None }, 0)));
        // From sender to sender, over what each has stored.
        while let Some((Pattern { from: Some(sender), .. }, _)) =
            self.answering.0.range((after, Bound::Unbounded)).next()
        {
            let from = Some(*sender);
            if self.answering.first(Pattern { from, key: Some(id) }).is_some() {
                senders.push(*sender);
            }
            after = Bound::Excluded((Pattern { from, key: Some(KeyId::MAX) }, u64::MAX));
        }
        senders
    }

    /// A message that was sent for good comes another way than others do, as the last of all: even above a bound. To a receive that waits for it, or to be
    /// kept.
    pub(crate) fn inherit(&mut self, from: Sender, key: &[u8], payload: P) -> Option<(Receiver, Message<P>)> {
        self.restore(Message { from, key: key.into(), payload, number: self.numbers })
    }

    /// Whether this receive waits, and for messages of this sender alone.
    pub(crate) fn waits_from(&self, by: Receiver, from: Sender) -> bool {
        self.turn_of.get(&by).is_some_and(|turn| self.waiting[turn].from == Some(from))
    }

    /// Whether receives but this one wait that may get a message of this sender.
    pub(crate) fn others_wait(&self, from: Sender, but: Option<Receiver>) -> bool {
        self.waiting.values().any(|waiting| waiting.from.is_none_or(|its| its == from) && Some(waiting.by) != but)
    }

    /// Whether it holds any of this sender.
    pub(crate) fn has_of(&self, from: Sender) -> bool {
        self.answering.first(Pattern { from: Some(from), key: None }).is_some()
    }

    /// Whether it holds one that is wanted.
    pub(crate) fn has(&self, wanted: Wanted<'_>) -> bool {
        self.oldest(wanted).is_some()
    }

    /// Time passes. Ends a receive whose deadline it was and gives it; to be called until there is none.
    pub(crate) fn expire(&mut self, now_ns: u64) -> Option<Receiver> {
        let (_, turn) = self.deadlines.first().copied().filter(|(deadline_ns, _)| *deadline_ns <= now_ns)?;
        Some(self.end_waiting(turn).by)
    }

    /// When [`Mailbox::expire`] has to be called next, ns.
    pub(crate) fn wake_ns(&self) -> u64 {
        self.deadlines.first().map_or(u64::MAX, |(deadline_ns, _)| *deadline_ns)
    }

    /// A receive is called off. False when it does not wait, as when a message is already on its way to it.
    pub(crate) fn withdraw(&mut self, by: Receiver) -> bool {
        let turn = self.turn_of.get(&by).copied();
        turn.is_some_and(|turn| self.end_waiting(turn).by == by)
    }

    /// A sender is gone for good. Ends a receive that waits for messages of it alone and gives it; to be called until there is none.
    pub(crate) fn sender_gone(&mut self, from: Sender) -> Option<Receiver> {
        let (turn, _) = self.waiting.iter().find(|(_, waiting)| waiting.from == Some(from))?;
        let turn = *turn;
        Some(self.end_waiting(turn).by)
    }

    /// A worker is gone, and with it all its receives. What was handed to it and not taken is to be [restored](Mailbox::restore).
    pub(crate) fn worker_died(&mut self, worker: WorkerId) {
        let all = Receiver { worker, call: 0 }..=Receiver { worker, call: u64::MAX };
        while let Some(turn) = self.turn_of.range(all.clone()).next().map(|(_, turn)| *turn) {
            self.end_waiting(turn);
        }
    }

    /// What the stored messages carry, to be replaced by the same in another place.
    pub(crate) fn payloads_mut(&mut self) -> impl Iterator<Item = &mut P> {
        self.messages.values_mut().map(|message| &mut message.payload)
    }

    /// The message, when there is one and no other.
    pub(crate) fn only(&self) -> Option<&Message<P>> {
        self.messages.values().next().filter(|_| self.messages.len() == 1)
    }

    #[cfg(test)]
    pub(crate) fn stats(&self) -> Stats {
        Stats {
            messages: self.messages.len(),
            bytes: self.message_bytes,
            keys: self.keys.known.len(),
            receivers: self.waiting.len(),
        }
    }

    /// All messages, the oldest first.
    #[cfg(test)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Message<P>> {
        self.messages.values()
    }

    // ---- messages ---------------------------------------------------------------------------------------------

    fn check_room(&self, from: Sender, needs_bytes: usize) -> Result<(), Refusal> {
        let Bounds { messages_max: mut max, bytes_max: mut max_bytes, .. } = self.bounds;
        let (has, has_bytes) = (self.messages.len(), self.message_bytes);
        let held = self.held.get(&from).copied().unwrap_or_default();
        if held.messages >= little(max) || held.bytes.saturating_add(needs_bytes) > little(max_bytes) {
            (max, max_bytes) = (max - kept(max), max_bytes - kept(max_bytes));
        }
        if needs_bytes > max_bytes {
            return Err(Refusal::TooLarge { needs_bytes, max_bytes });
        }
        if has >= max {
            return Err(Refusal::Messages { has, max });
        }
        // What was restored may have filled it beyond its bounds.
        if has_bytes > max_bytes - needs_bytes {
            return Err(Refusal::Bytes { has_bytes, needs_bytes, max_bytes });
        }
        Ok(())
    }

    fn store(&mut self, from: Sender, key: &[u8], payload: P, number: u64) {
        let (id, key) = self.keys.hold(key);
        for pattern in Pattern::of(from, id) {
            self.answering.insert(pattern, number);
        }
        let message = Message { from, key, payload, number };
        self.message_bytes += message.len_bytes();
        let held = self.held.entry(from).or_default();
        (held.messages, held.bytes) = (held.messages + 1, held.bytes + message.len_bytes());
        self.messages.insert(number, message);
    }

    /// The number of the oldest that is wanted.
    fn oldest(&self, wanted: Wanted<'_>) -> Option<u64> {
        let key = match wanted.key {
            Some(key) => Some(self.keys.find(key)?),
            None => None,
        };
        match (Pattern { from: wanted.from, key }) {
            Pattern::ANY => self.messages.first_key_value().map(|(number, _)| *number),
            pattern => self.answering.first(pattern),
        }
    }

    fn take(&mut self, number: u64) -> Message<P> {
        let message = self.messages.remove(&number).expect("a message in the index is there");
        let key = self.keys.release(&message.key);
        for pattern in Pattern::of(message.from, key) {
            self.answering.remove(pattern, number);
        }
        self.message_bytes -= message.len_bytes();
        let held = self.held.get_mut(&message.from).expect("a sender of a message has some there");
        (held.messages, held.bytes) = (held.messages - 1, held.bytes - message.len_bytes());
        if held.messages == 0 {
            self.held.remove(&message.from);
        }
        message
    }

    // ---- receives that wait -----------------------------------------------------------------------------------

    fn begin_waiting(&mut self, by: Receiver, wanted: Wanted<'_>, deadline_ns: u64) {
        let turn = self.turns;
        self.turns += 1;
        let (id, key) = wanted.key.map(|key| self.keys.hold(key)).unzip();
        self.asking.insert(Pattern { from: wanted.from, key: id }, turn);
        self.deadlines.insert((deadline_ns, turn));
        self.turn_of.insert(by, turn);
        self.waiting.insert(turn, Waiting { by, from: wanted.from, key, deadline_ns });
    }

    /// The turn of the receive that gets a message.
    fn longest_waiting(&self, from: Sender, key: &[u8]) -> Option<u64> {
        let key = self.keys.find(key).unwrap_or(NO_KEY);
        let patterns = Pattern::of(from, key).into_iter().chain([Pattern::ANY]);
        patterns.filter_map(|pattern| self.asking.first(pattern)).min()
    }

    fn end_waiting(&mut self, turn: u64) -> Waiting {
        let waiting = self.waiting.remove(&turn).expect("it waits");
        let key = waiting.key.as_deref().map(|key| self.keys.release(key));
        self.asking.remove(Pattern { from: waiting.from, key }, turn);
        self.deadlines.remove(&(waiting.deadline_ns, turn));
        self.turn_of.remove(&waiting.by);
        waiting
    }
}

fn check_key(key: &[u8]) -> Result<(), Refusal> {
    match key.len() {
        1..=KEY_BYTES_MAX => Ok(()),
        found_bytes => Err(Refusal::Key { found_bytes }),
    }
}
