//! First against lists that are searched from front to back, then what must hold at the bounds and with a great many.
#![allow(clippy::cast_possible_truncation, reason = "small numbers are cut to size on purpose")]

use proptest::prelude::*;

use super::*;

/// Never twice: neither `Clone` nor `Copy`.
#[derive(Debug, PartialEq, Eq)]
struct Letter {
    name: u64,
    bytes: usize,
}

impl Keep for Letter {
    fn len_bytes(&self) -> usize {
        self.bytes
    }

    fn copy(&self) -> Self {
        unreachable!("a mailbox copies nothing")
    }
}

fn letter(name: u64) -> Letter {
    Letter { name, bytes: 1 }
}

fn roomy() -> Mailbox<Letter> {
    Mailbox::new(Bounds { messages_max: usize::MAX, bytes_max: usize::MAX, receivers_max: usize::MAX })
}

const ANY: Wanted<'static> = Wanted { from: None, key: None };
const OWN: Wanted<'static> = Wanted { from: Some(Sender::Own), key: None };
const EVER: u64 = u64::MAX;

fn keyed(key: &[u8]) -> Wanted<'_> {
    Wanted { from: None, key: Some(key) }
}

fn by(worker: WorkerId, call: u64) -> Receiver {
    Receiver { worker, call }
}

/// Receives without waiting, as worker 63.
fn take(mailbox: &mut Mailbox<Letter>, wanted: Wanted<'_>) -> Option<u64> {
    match mailbox.receive(1, by(63, 0), wanted, 0) {
        Received::Message(message) => Some(message.payload.name),
        Received::Nothing => None,
        other => panic!("{other:?}"),
    }
}

fn handed(delivered: Result<Delivered<Letter>, Refused<Letter>>) -> Option<(Receiver, u64)> {
    match delivered {
        Ok(Delivered::Handed { to, message }) => Some((to, message.payload.name)),
        Ok(Delivered::Stored) => None,
        Err(refused) => panic!("{}", refused.why),
    }
}

// ---- the oracle -------------------------------------------------------------------------------------------------

#[derive(Debug, Clone)]
struct Ask {
    by: Receiver,
    from: Option<Sender>,
    key: Option<Vec<u8>>,
    deadline_ns: u64,
}

impl Ask {
    fn matches(&self, message: &Message<Letter>) -> bool {
        self.from.is_none_or(|from| from == message.from) && self.key.as_ref().is_none_or(|key| **key == *message.key)
    }

    fn wanted(&self) -> Wanted<'_> {
        Wanted { from: self.from, key: self.key.as_deref() }
    }
}

/// What the mailbox is to be like, in so many words.
#[derive(Debug)]
struct Lists {
    bounds: Bounds,
    /// By number.
    messages: Vec<Message<Letter>>,
    /// Those that wait longest first.
    waiting: Vec<Ask>,
    numbers: u64,
}

impl Lists {
    fn bytes(&self) -> usize {
        self.messages.iter().map(|message| message.key.len() + message.payload.bytes).sum()
    }

    fn hand(&mut self, message: Message<Letter>) -> Result<(Receiver, Message<Letter>), Message<Letter>> {
        match self.waiting.iter().position(|ask| ask.matches(&message)) {
            Some(at) => Ok((self.waiting.remove(at).by, message)),
            None => Err(message),
        }
    }

    fn deliver(&mut self, from: Sender, key: &[u8], payload: Letter) -> Result<Delivered<Letter>, Refused<Letter>> {
        if key.is_empty() || key.len() > 1024 {
            return Err(Refused { why: Refusal::Key { found_bytes: key.len() }, payload });
        }
        let needs_bytes = key.len() + payload.bytes;
        let message = Message { from, key: key.into(), payload, number: self.numbers };
        let message = match self.hand(message) {
            Ok((to, message)) => {
                self.numbers += 1;
                return Ok(Delivered::Handed { to, message });
            }
            Err(message) => message,
        };
        let Bounds { messages_max: mut max, bytes_max: mut max_bytes, .. } = self.bounds;
        let its = || self.messages.iter().filter(|message| message.from == from);
        let its_bytes: usize = its().map(|message| message.key.len() + message.payload.bytes).sum();
        let eighth = |max: usize| if max < 64 { 0 } else { max / 8 };
        if its().count() >= eighth(max) / 8 || its_bytes.saturating_add(needs_bytes) > eighth(max_bytes) / 8 {
            (max, max_bytes) = (max - eighth(max), max_bytes - eighth(max_bytes));
        }
        let why = if needs_bytes > max_bytes {
            Refusal::TooLarge { needs_bytes, max_bytes }
        } else if self.messages.len() >= max {
            Refusal::Messages { has: self.messages.len(), max }
        } else if self.bytes() + needs_bytes > max_bytes {
            Refusal::Bytes { has_bytes: self.bytes(), needs_bytes, max_bytes }
        } else {
            self.numbers += 1;
            self.messages.push(message);
            return Ok(Delivered::Stored);
        };
        Err(Refused { why, payload: message.payload })
    }

    fn receive(&mut self, now_ns: u64, ask: Ask) -> Received<Letter> {
        if let Some(found_bytes) = ask.key.as_ref().map(Vec::len)
            && !(1..=1024).contains(&found_bytes)
        {
            return Received::Refused(Refusal::Key { found_bytes });
        }
        if self.waiting.iter().any(|other| other.by == ask.by) {
            return Received::Refused(Refusal::WaitsAlready { worker: ask.by.worker, call: ask.by.call });
        }
        if let Some(at) = self.messages.iter().position(|message| ask.matches(message)) {
            return Received::Message(self.messages.remove(at));
        }
        let (has, max) = (self.waiting.len(), self.bounds.receivers_max);
        if ask.deadline_ns <= now_ns {
            Received::Nothing
        } else if has >= max {
            Received::Refused(Refusal::Receivers { has, max })
        } else {
            self.waiting.push(ask);
            Received::Waits
        }
    }

    fn restore(&mut self, message: Message<Letter>) -> Option<(Receiver, Message<Letter>)> {
        match self.hand(message) {
            Ok(handed) => Some(handed),
            Err(message) => {
                self.messages.push(message);
                self.messages.sort_by_key(|message| message.number);
                None
            }
        }
    }

    /// Those whose deadline it was, the earliest deadline first, then the longest waiting.
    fn expire(&mut self, now_ns: u64) -> Vec<Receiver> {
        let mut over: Vec<_> = self.waiting.iter().filter(|ask| ask.deadline_ns <= now_ns).cloned().collect();
        over.sort_by_key(|ask| ask.deadline_ns);
        self.waiting.retain(|ask| ask.deadline_ns > now_ns);
        over.into_iter().map(|ask| ask.by).collect()
    }

    fn stats(&self) -> Stats {
        let mut keys: Vec<_> = self.messages.iter().map(|message| message.key.to_vec()).collect();
        keys.extend(self.waiting.iter().filter_map(|ask| ask.key.clone()));
        keys.sort();
        keys.dedup();
        Stats { messages: self.messages.len(), bytes: self.bytes(), keys: keys.len(), receivers: self.waiting.len() }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Deliver {
        from: Sender,
        key: Vec<u8>,
        bytes: usize,
    },
    /// To wait for so long; `None`: for ever.
    Receive {
        by: Receiver,
        from: Option<Sender>,
        key: Option<Vec<u8>>,
        wait_ns: Option<u64>,
    },
    /// Of the messages that are out, the one at this place comes back.
    Restore(usize),
    Expire {
        pass_ns: u64,
    },
    Withdraw(Receiver),
    Died(WorkerId),
    /// A sender is deleted.
    Gone(Sender),
}

fn step() -> impl Strategy<Value = Step> {
    let sender = || prop_oneof![Just(Sender::Own), (0..2_usize).prop_map(Sender::Peer)];
    // An empty one now and then; a NUL in them, and one is the beginning of another.
    const KEYS: &[&[u8]] = &[b"", b"a", b"a", b"a\0", b"a\0", b"b", b"b"];
    let key = || prop::sample::select(KEYS).prop_map(<[u8]>::to_vec);
    let receiver = || (1..4_u8, 0..4_u64).prop_map(|(worker, call)| by(worker, call));
    let wait_ns = prop_oneof![2 => Just(Some(0)), 3 => (1..20_u64).prop_map(Some), 2 => Just(None)];
    prop_oneof![
        8 => (sender(), key(), 0..8_usize).prop_map(|(from, key, bytes)| Step::Deliver { from, key, bytes }),
        6 => (receiver(), prop::option::of(sender()), prop::option::of(key()), wait_ns)
            .prop_map(|(by, from, key, wait_ns)| Step::Receive { by, from, key, wait_ns }),
        3 => (0..8_usize).prop_map(Step::Restore),
        1 => (0..10_u64).prop_map(|pass_ns| Step::Expire { pass_ns }),
        1 => receiver().prop_map(Step::Withdraw),
        1 => (1..4_u8).prop_map(Step::Died),
        1 => sender().prop_map(Step::Gone),
    ]
}

/// What a message is, but for what cannot be had twice.
fn told(message: &Message<Letter>) -> (Sender, Vec<u8>, u64, u64) {
    (message.from, message.key.to_vec(), message.payload.name, message.number)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Whatever is asked of a mailbox and of the lists, they answer the same.
    #[test]
    fn m1_m3_g8_a_mailbox_is_two_lists(
        messages_max in prop_oneof![0..5_usize, 64..80_usize],
        bytes_max in prop_oneof![0..24_usize, 64..600_usize],
        receivers_max in 0..4_usize,
        steps in prop::collection::vec(step(), 1..150),
    ) {
        let bounds = Bounds { messages_max, bytes_max, receivers_max };
        let mut mailbox = Mailbox::new(bounds);
        let mut lists = Lists { bounds, messages: Vec::new(), waiting: Vec::new(), numbers: 0 };
        // Messages that were given out, as the mailbox gave them and as the lists did.
        let mut out: Vec<[Message<Letter>; 2]> = Vec::new();
        let mut now_ns = 1;
        for (name, step) in (0..).zip(steps) {
            match step {
                Step::Deliver { from, key, bytes } => {
                    let [one, two] = [0, 1].map(|_| Letter { name, bytes });
                    let (got, expected) = (mailbox.deliver(from, &key, one), lists.deliver(from, &key, two));
                    prop_assert_eq!(&got, &expected);
                    if let (Ok(Delivered::Handed { message: one, .. }), Ok(Delivered::Handed { message: two, .. })) = (got, expected) {
                        out.push([one, two]);
                    }
                }
                Step::Receive { by, from, key, wait_ns } => {
                    let deadline_ns = wait_ns.map_or(EVER, |wait_ns| now_ns + wait_ns);
                    let ask = Ask { by, from, key, deadline_ns };
                    let (got, expected) =
                        (mailbox.receive(now_ns, by, ask.wanted(), deadline_ns), lists.receive(now_ns, ask));
                    prop_assert_eq!(&got, &expected);
                    if let (Received::Message(one), Received::Message(two)) = (got, expected) {
                        out.push([one, two]);
                    }
                }
                Step::Restore(at) if at < out.len() => {
                    let [one, two] = out.remove(at);
                    let (got, expected) = (mailbox.restore(one), lists.restore(two));
                    prop_assert_eq!(&got, &expected);
                    if let (Some((_, one)), Some((_, two))) = (got, expected) {
                        out.push([one, two]);
                    }
                }
                Step::Restore(_) => {}
                Step::Expire { pass_ns } => {
                    now_ns += pass_ns;
                    let got: Vec<_> = std::iter::from_fn(|| mailbox.expire(now_ns)).collect();
                    prop_assert_eq!(got, lists.expire(now_ns));
                }
                Step::Withdraw(by) => {
                    let at = lists.waiting.iter().position(|ask| ask.by == by);
                    prop_assert_eq!(mailbox.withdraw(by), at.map(|at| lists.waiting.remove(at)).is_some());
                }
                Step::Died(worker) => {
                    mailbox.worker_died(worker);
                    lists.waiting.retain(|ask| ask.by.worker != worker);
                }
                Step::Gone(sender) => {
                    let got: Vec<_> = std::iter::from_fn(|| mailbox.sender_gone(sender)).collect();
                    let (over, left) = lists.waiting.drain(..).partition(|ask| ask.from == Some(sender));
                    lists.waiting = left;
                    let over: Vec<Ask> = over;
                    prop_assert_eq!(got, over.into_iter().map(|ask| ask.by).collect::<Vec<_>>());
                }
            }
            prop_assert_eq!(mailbox.stats(), lists.stats());
            let due_ns = lists.waiting.iter().map(|ask| ask.deadline_ns).min();
            prop_assert_eq!(mailbox.wake_ns(), due_ns.unwrap_or(u64::MAX));
            prop_assert!(mailbox.iter().map(told).eq(lists.messages.iter().map(told)));
            for message in mailbox.iter() {
                prop_assert!(!lists.waiting.iter().any(|ask| ask.matches(message)), "{message:?} is waited for");
            }
        }
        // What is left comes out, and leaves nothing behind.
        (1..4).for_each(|worker| mailbox.worker_died(worker));
        while take(&mut mailbox, ANY).is_some() {}
        assert_is_empty(&mailbox);
    }
}

fn assert_is_empty(mailbox: &Mailbox<Letter>) {
    assert_eq!(mailbox.stats(), Stats::default());
    assert!(mailbox.keys.known.is_empty() && mailbox.answering.0.is_empty() && mailbox.asking.0.is_empty());
    assert!(mailbox.turn_of.is_empty() && mailbox.deadlines.is_empty() && mailbox.held.is_empty());
}

// ---- one by one -------------------------------------------------------------------------------------------------

#[test]
fn m1_a_receive_names_its_sender_or_takes_any() {
    let mut mailbox = roomy();
    for (name, from) in [(0, Sender::Peer(1)), (1, Sender::Own), (2, Sender::Peer(0)), (3, Sender::Own)] {
        mailbox.deliver(from, b"k", letter(name)).expect("there is room");
    }
    let from = |peer| Wanted { from: Some(Sender::Peer(peer)), key: Some(b"k") };
    assert_eq!(take(&mut mailbox, OWN), Some(1));
    assert_eq!(take(&mut mailbox, from(0)), Some(2));
    assert_eq!(take(&mut mailbox, from(0)), None);
    assert_eq!(
        [take(&mut mailbox, ANY), take(&mut mailbox, keyed(b"k")), take(&mut mailbox, ANY)],
        [Some(0), Some(3), None]
    );
    assert_is_empty(&mailbox);
}

#[test]
fn m1_a_receive_waits_until_its_deadline_and_not_at_all_without_one_ahead() {
    let mut mailbox = roomy();
    for past_ns in [0, 9, 10] {
        assert_eq!(mailbox.receive(10, by(1, 1), ANY, past_ns), Received::Nothing);
    }
    assert_eq!(mailbox.receive(10, by(1, 1), ANY, 30), Received::Waits);
    assert_eq!(mailbox.receive(10, by(1, 2), ANY, 20), Received::Waits);
    assert_eq!(mailbox.receive(10, by(1, 3), ANY, EVER), Received::Waits);
    assert_eq!((mailbox.expire(19), mailbox.wake_ns()), (None, 20));
    let over: Vec<_> = std::iter::from_fn(|| mailbox.expire(40)).collect();
    assert_eq!(over, [by(1, 2), by(1, 1)]);
    assert_eq!(mailbox.wake_ns(), EVER);
    assert_eq!(handed(mailbox.deliver(Sender::Own, b"k", letter(7))), Some((by(1, 3), 7)));
    assert_is_empty(&mailbox);
}

#[test]
fn m2_a_message_goes_to_one_receive_the_longest_waiting_that_matches() {
    let mut mailbox = roomy();
    let wanted = [keyed(b"other"), Wanted { from: Some(Sender::Peer(0)), key: Some(b"k") }, keyed(b"k"), OWN, ANY];
    for (call, wanted) in (0..).zip(wanted) {
        assert_eq!(mailbox.receive(1, by(1, call), wanted, EVER), Received::Waits);
    }
    let got: Vec<_> = (0..4).map(|name| handed(mailbox.deliver(Sender::Own, b"k", letter(name)))).collect();
    assert_eq!(got, [Some((by(1, 2), 0)), Some((by(1, 3), 1)), Some((by(1, 4), 2)), None]);
    assert_eq!(mailbox.stats(), Stats { messages: 1, bytes: 2, keys: 2, receivers: 2 });
    assert!(mailbox.withdraw(by(1, 0)) && !mailbox.withdraw(by(1, 0)) && !mailbox.withdraw(by(1, 2)));
    assert_eq!(take(&mut mailbox, ANY), Some(3));
    assert_eq!(handed(mailbox.deliver(Sender::Peer(0), b"k", letter(4))), Some((by(1, 1), 4)));
    assert_is_empty(&mailbox);
}

#[test]
fn m2_a_receive_that_waits_is_not_begun_again() {
    let mut mailbox = roomy();
    assert_eq!(mailbox.receive(1, by(5, 8), keyed(b"a"), EVER), Received::Waits);
    mailbox.deliver(Sender::Own, b"b", letter(0)).expect("there is room");
    let Received::Refused(why) = mailbox.receive(1, by(5, 8), keyed(b"b"), EVER) else { panic!("it waits") };
    assert_eq!(why.to_string(), "receive 8 of worker 5 waits already; give each its own number");
    assert_eq!(why.code(), Code::Protocol);
}

#[test]
fn m3_each_sender_keeps_its_order_under_each_key() {
    let mut mailbox = roomy();
    for name in 0..100 {
        let from = if name % 3 == 0 { Sender::Own } else { Sender::Peer(2) };
        mailbox.deliver(from, if name % 2 == 0 { b"even" } else { b"odd" }, letter(name)).expect("there is room");
    }
    let odd_own = Wanted { from: Some(Sender::Own), key: Some(b"odd") };
    let got: Vec<_> = std::iter::from_fn(|| take(&mut mailbox, odd_own)).collect();
    assert_eq!(got, (0..100).filter(|name| name % 3 == 0 && name % 2 == 1).collect::<Vec<_>>());
    let got: Vec<_> = std::iter::from_fn(|| take(&mut mailbox, keyed(b"even"))).collect();
    assert_eq!(got, (0..100).step_by(2).collect::<Vec<_>>());
    let got: Vec<_> = std::iter::from_fn(|| take(&mut mailbox, ANY)).collect();
    assert_eq!(got, (0..100).filter(|name| name % 3 != 0 && name % 2 == 1).collect::<Vec<_>>());
    assert_is_empty(&mailbox);
}

#[test]
fn m3_what_a_dead_worker_did_not_take_comes_before_what_came_later() {
    let mut mailbox = roomy();
    assert_eq!(mailbox.receive(1, by(1, 0), ANY, EVER), Received::Waits);
    let Ok(Delivered::Handed { message: first, .. }) = mailbox.deliver(Sender::Own, b"k", letter(0)) else {
        panic!("a receive waits")
    };
    for name in 1..3 {
        mailbox.deliver(Sender::Own, b"k", letter(name)).expect("there is room");
    }
    let Received::Message(second) = mailbox.receive(1, by(1, 1), ANY, 0) else { panic!("there is one") };
    assert_eq!((mailbox.restore(first), mailbox.restore(second)), (None, None));
    let got: Vec<_> = std::iter::from_fn(|| take(&mut mailbox, keyed(b"k"))).collect();
    assert_eq!(got, [0, 1, 2]);
    assert_is_empty(&mailbox);
}

#[test]
fn m2_what_a_dead_worker_did_not_take_goes_to_a_receive_that_waits_and_not_to_its_own() {
    let mut mailbox = roomy();
    for receiver in [by(1, 0), by(1, 1), by(2, 0)] {
        assert_eq!(mailbox.receive(1, receiver, ANY, EVER), Received::Waits);
    }
    let Ok(Delivered::Handed { to, message }) = mailbox.deliver(Sender::Own, b"k", letter(0)) else {
        panic!("a receive waits")
    };
    assert_eq!(to, by(1, 0));
    mailbox.worker_died(1);
    let (to, message) = mailbox.restore(message).expect("a receive waits");
    assert_eq!((to, message.payload.name), (by(2, 0), 0));
    assert_is_empty(&mailbox);
}

#[test]
fn messages_move_to_another_mailbox_in_their_order() {
    let mut before = roomy();
    for name in 0..10 {
        before.deliver(Sender::Peer(name as usize % 2), &[name as u8 % 3], letter(name)).expect("there is room");
    }
    let mut after = roomy();
    let image = before.iter().map(|message| (message.from, message.key.clone(), message.payload.name));
    for (number, (from, key, name)) in (0..).zip(image) {
        assert_eq!(after.restore(Message { from, key, payload: letter(name), number }), None);
    }
    assert_eq!(after.stats(), before.stats());
    after.deliver(Sender::Own, b"new", letter(10)).expect("there is room");
    let got: Vec<_> = std::iter::from_fn(|| take(&mut after, ANY)).collect();
    assert_eq!(got, (0..=10).collect::<Vec<_>>());
}

// ---- bounds -----------------------------------------------------------------------------------------------------

#[test]
fn m1_g8_a_key_has_1_to_1024_bytes() {
    let mut mailbox = roomy();
    for key in [&[][..], &[7; 1025]] {
        let refused = mailbox.deliver(Sender::Own, key, letter(0)).expect_err("the key is wrong");
        assert_eq!(refused, Refused { why: Refusal::Key { found_bytes: key.len() }, payload: letter(0) });
        assert_eq!(mailbox.receive(1, by(1, 0), keyed(key), EVER), Received::Refused(refused.why));
    }
    let refused = mailbox.deliver(Sender::Own, &[], letter(0)).expect_err("the key is wrong");
    assert_eq!(refused.why.to_string(), "the key has 0 bytes; give it 1 to 1024");
    for key in [&[0][..], &[0xff; 1024], b"/../\0"] {
        mailbox.deliver(Sender::Own, key, letter(1)).expect("the key is right");
        assert_eq!(take(&mut mailbox, keyed(key)), Some(1));
    }
    assert_is_empty(&mailbox);
}

#[test]
fn g8_a_full_mailbox_gives_the_message_back_and_says_how_full_it_is() {
    let mut mailbox = Mailbox::new(Bounds { messages_max: 2, bytes_max: 1000, receivers_max: 1 });
    for name in 0..2 {
        mailbox.deliver(Sender::Own, b"k", letter(name)).expect("there is room");
    }
    let refused = mailbox.deliver(Sender::Own, b"k", letter(2)).expect_err("it is full");
    assert_eq!(refused.payload, letter(2));
    assert_eq!(refused.why.code(), Code::Busy);
    assert_eq!(
        refused.why.to_string(),
        "the mailbox holds 2 messages, and takes one of this sender below 2; send again when some were received, or let it hold more"
    );
    // Whoever waits is served all the same, and what was taken before comes back.
    assert_eq!(mailbox.receive(1, by(1, 0), keyed(b"x"), EVER), Received::Waits);
    let Ok(Delivered::Handed { message, .. }) = mailbox.deliver(Sender::Own, b"x", letter(3)) else {
        panic!("a receive waits")
    };
    assert_eq!(mailbox.restore(message), None);
    let refused = mailbox.deliver(Sender::Own, b"k", letter(2)).expect_err("it is full");
    assert_eq!(refused.why, Refusal::Messages { has: 3, max: 2 });
    let got: Vec<_> = std::iter::from_fn(|| take(&mut mailbox, ANY)).collect();
    assert_eq!(got, [0, 1, 3]);
    mailbox.deliver(Sender::Own, b"k", letter(4)).expect("there is room");
}

#[test]
fn g8_bytes_of_keys_and_payloads_are_counted_together() {
    let mut mailbox = Mailbox::new(Bounds { messages_max: 1000, bytes_max: 60, receivers_max: 1 });
    let parcel = |bytes| Letter { name: 0, bytes };
    mailbox.deliver(Sender::Own, b"1234", parcel(26)).expect("there is room");
    let refused = mailbox.deliver(Sender::Own, b"12", parcel(29)).expect_err("one byte too many");
    assert_eq!(refused.why, Refusal::Bytes { has_bytes: 30, needs_bytes: 31, max_bytes: 60 });
    assert_eq!((refused.payload, refused.why.code()), (parcel(29), Code::Busy));
    mailbox.deliver(Sender::Own, b"12", parcel(28)).expect("there is room");
    assert_eq!(mailbox.stats(), Stats { messages: 2, bytes: 60, keys: 2, receivers: 0 });
    // Not now, and never.
    for bytes in [59, usize::MAX - 2] {
        let refused = mailbox.deliver(Sender::Own, b"12", parcel(bytes)).expect_err("too large");
        assert_eq!(refused.why, Refusal::TooLarge { needs_bytes: bytes + 2, max_bytes: 60 });
        assert_eq!(refused.why.code(), Code::TooLarge);
    }
}

/// A8, G8: one who sends without end does not keep others from sending.
#[test]
fn a8_a_flood_of_one_sender_leaves_room_for_others() {
    let mut mailbox = Mailbox::new(Bounds { messages_max: 640, bytes_max: 64_000, receivers_max: 1 });
    let flood = |mailbox: &mut Mailbox<Letter>, from, bytes| {
        let mut refused = (0..).filter_map(|name| mailbox.deliver(from, b"k", Letter { name, bytes }).err());
        refused.next().expect("it ends").why
    };
    // By their number, then by their bytes, of which one message may be too many.
    assert_eq!(flood(&mut mailbox, Sender::Peer(0), 0), Refusal::Messages { has: 560, max: 560 });
    assert_eq!(flood(&mut mailbox, Sender::Own, 0), Refusal::Messages { has: 570, max: 560 });
    assert_eq!(flood(&mut mailbox, Sender::Peer(1), 999), Refusal::Messages { has: 571, max: 560 });
    for peer in 2..9 {
        for _ in 0..9 {
            mailbox.deliver(Sender::Peer(peer), b"k", letter(1)).expect("it has little there");
        }
    }
    // What was received is room again, for those who have little first.
    while take(&mut mailbox, ANY).is_some() {}
    assert_is_empty(&mailbox);
    let Refusal::Bytes { max_bytes: 56_000, .. } = flood(&mut mailbox, Sender::Peer(0), 10_000) else {
        panic!("it is full")
    };
    mailbox.deliver(Sender::Peer(1), b"k", Letter { name: 1, bytes: 900 }).expect("it has little there");
}

#[test]
fn g8_one_receive_too_many_is_told_how_many_wait() {
    let mut mailbox = Mailbox::<Letter>::new(Bounds { messages_max: 1, bytes_max: 100, receivers_max: 3 });
    for call in 0..3 {
        assert_eq!(mailbox.receive(1, by(1, call), ANY, EVER), Received::Waits);
    }
    let Received::Refused(why) = mailbox.receive(1, by(2, 0), ANY, EVER) else { panic!("too many") };
    assert_eq!((why, why.code()), (Refusal::Receivers { has: 3, max: 3 }, Code::Busy));
    assert_eq!(
        why.to_string(),
        "3 receives wait already, and 3 may; receive with fewer functions at a time, or let more wait"
    );
    // One that does not wait is none too many.
    assert_eq!(mailbox.receive(1, by(2, 0), ANY, 1), Received::Nothing);
    mailbox.worker_died(1);
    assert_eq!(mailbox.receive(1, by(2, 0), ANY, EVER), Received::Waits);
}

// ---- a great many -----------------------------------------------------------------------------------------------

/// How many: not optimised, a million take 15 s, and what is searched from front to back shows with fewer, too.
const MANY: u64 = if cfg!(debug_assertions) { 150_000 } else { 1_000_000 };

/// Ends soon or, if anything is searched from front to back, not before we are old.
#[test]
fn g8_very_many_keys_and_ten_thousand_receives_that_wait_in_vain_slow_nothing_down() {
    let mut mailbox = roomy();
    for call in 0..10_000_u64 {
        let key = [&b"in vain"[..], &call.to_le_bytes()].concat();
        let wanted = Wanted { from: (call % 2 == 0).then_some(Sender::Peer(7)), key: Some(&key) };
        assert_eq!(mailbox.receive(1, by(1, call), wanted, EVER), Received::Waits);
    }
    for name in 0..MANY {
        mailbox.deliver(Sender::Own, &name.to_le_bytes(), letter(name)).expect("there is room");
    }
    let many = MANY as usize;
    assert_eq!(mailbox.stats(), Stats { messages: many, bytes: 9 * many, keys: many + 10_000, receivers: 10_000 });
    // A third by key, the latest first; a third in order from their sender; the rest in order from any.
    let third = MANY / 3;
    for name in (2 * third..MANY).rev() {
        assert_eq!(take(&mut mailbox, keyed(&name.to_le_bytes())), Some(name));
    }
    for name in 0..2 * third {
        assert_eq!(take(&mut mailbox, if name < third { OWN } else { ANY }), Some(name));
    }
    assert_eq!(mailbox.stats(), Stats { messages: 0, bytes: 0, keys: 10_000, receivers: 10_000 });
    mailbox.worker_died(1);
    assert_is_empty(&mailbox);
}
