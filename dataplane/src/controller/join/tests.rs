//! By hand, and then at random against a list.

use proptest::prelude::*;

use super::*;
use crate::controller::mailbox::{Bounds, Delivered, Received, Receiver, Wanted};

#[derive(Debug, Clone, PartialEq, Eq)]
struct Text(u64);

impl Keep for Text {
    fn len_bytes(&self) -> usize {
        8
    }

    fn copy(&self) -> Text {
        self.clone()
    }
}

fn mailbox() -> Mailbox<Text> {
    Mailbox::new(Bounds { messages_max: 1000, bytes_max: 1 << 20, receivers_max: 10 })
}

fn join(function: u16, keys: &[&str], one_sender: bool) -> Join {
    let keys = keys.iter().map(|key| Arc::from(key.as_bytes())).collect();
    Join { function, keys, one_sender, idempotent: false }
}

/// Stores a message, and says what begins with it.
fn send(
    joins: &mut Joins<Text, ()>,
    mailbox: &mut Mailbox<Text>,
    from: Sender,
    key: &str,
    number: u64,
) -> Option<(u16, Vec<u64>)> {
    assert_eq!(mailbox.deliver(from, key.as_bytes(), Text(number)), Ok(Delivered::Stored));
    joins.stored(mailbox, from, key.as_bytes(), |_| true).map(what)
}

fn what(begun: Begun<Text>) -> (u16, Vec<u64>) {
    (begun.function, begun.messages.iter().map(|message| message.payload.0).collect())
}

const B: Sender = Sender::Peer(0);

#[test]
fn m3_a_run_takes_the_oldest_under_each_key_from_anybody() {
    let (mut joins, mut mailbox) = (Joins::new(vec![join(7, &["x", "y", "z"], false)], 10), mailbox());
    for (from, key, number) in [(B, "x", 1), (Sender::Own, "x", 2), (B, "z", 3), (B, "other", 4)] {
        assert_eq!(send(&mut joins, &mut mailbox, from, key, number), None);
    }
    assert_eq!(send(&mut joins, &mut mailbox, Sender::Own, "y", 5), Some((7, vec![1, 5, 3])));
    assert_eq!(joins.senders(1).collect::<Vec<_>>(), [B, Sender::Own, B]);
    assert_eq!(send(&mut joins, &mut mailbox, B, "z", 6), None);
    assert_eq!(send(&mut joins, &mut mailbox, B, "y", 7), Some((7, vec![2, 7, 6])));
    assert_eq!(mailbox.stats().messages, 1, "the other one");
}

#[test]
fn m3_with_one_sender_messages_of_two_are_not_mixed() {
    let (mut joins, mut mailbox) = (Joins::new(vec![join(7, &["x", "y"], true)], 1), mailbox());
    assert_eq!(send(&mut joins, &mut mailbox, B, "x", 1), None);
    assert_eq!(send(&mut joins, &mut mailbox, Sender::Own, "y", 2), None);
    assert_eq!(send(&mut joins, &mut mailbox, Sender::Own, "x", 3), Some((7, vec![3, 2])));
    // There is no place for the next; when there is, it is found.
    assert_eq!(send(&mut joins, &mut mailbox, B, "y", 4), None);
    assert_eq!((joins.answered(1, None), joins.next(&mut mailbox, |_| true).is_none()), (None, true));
    assert_eq!(joins.answered(1, None).map(|ended| ended.function), Some(7));
    assert_eq!(joins.next(&mut mailbox, |_| false).map(what), None, "it may not run now");
    assert_eq!(joins.next(&mut mailbox, |_| true).map(what), Some((7, vec![1, 4])));
}

#[test]
fn m2_a_receive_that_waits_comes_first_and_what_is_incomplete_can_be_received() {
    let (mut joins, mut mailbox) = (Joins::<Text, ()>::new(vec![join(7, &["x", "y"], false)], 10), mailbox());
    let by = Receiver { worker: 1, call: 1 };
    let wanted = Wanted { from: None, key: Some(b"x") };
    assert_eq!(mailbox.receive(0, by, wanted, 100), Received::Waits);
    assert!(matches!(mailbox.deliver(B, b"x", Text(1)), Ok(Delivered::Handed { to, .. }) if to == by));
    assert_eq!(send(&mut joins, &mut mailbox, B, "x", 2), None);
    assert!(matches!(mailbox.receive(0, by, wanted, 0), Received::Message(message) if message.payload == Text(2)));
    assert_eq!(send(&mut joins, &mut mailbox, B, "y", 3), None);
    assert_eq!(send(&mut joins, &mut mailbox, B, "x", 4), Some((7, vec![4, 3])));
}

#[test]
fn w1_what_comes_back_is_where_it_was_before_all_later_ones() {
    let (mut joins, mut mailbox) = (Joins::new(vec![join(7, &["x", "y"], false)], 10), mailbox());
    send(&mut joins, &mut mailbox, B, "y", 1);
    assert_eq!(send(&mut joins, &mut mailbox, B, "x", 2), Some((7, vec![2, 1])));
    send(&mut joins, &mut mailbox, B, "x", 3);
    assert_eq!(joins.back(1, Text(2)), []);
    let back = joins.back(1, Text(1));
    assert_eq!(back.iter().map(|message| message.payload.0).collect::<Vec<_>>(), [1, 2], "the oldest first");
    back.into_iter().for_each(|message| assert_eq!(mailbox.restore(message), None));
    assert_eq!(joins.next(&mut mailbox, |_| true).map(what), Some((7, vec![2, 1])));
    assert_eq!(send(&mut joins, &mut mailbox, B, "y", 4), Some((7, vec![3, 4])));
    let failed = joins.answered(2, Some(()));
    assert_eq!((failed, joins.answered(2, None).and_then(|ended| ended.failure)), (None, Some(())));
}

/// A message of the oracle: its number, sender and key.
type Known = (u64, Sender, &'static str);

/// What a run of this kind would take, with its sender if they are to have one.
fn oldest(stored: &[Known], kind: &Join, from: Option<Sender>) -> Option<Vec<Known>> {
    let of = |key: &Arc<[u8]>| {
        let matching = stored.iter().filter(|(_, sender, _)| from.is_none_or(|from| from == *sender));
        matching.copied().find(|(_, _, found)| found.as_bytes() == &**key)
    };
    kind.keys.iter().map(of).collect()
}

proptest! {
    /// Against a list of the messages that are stored: a run begins as soon as one can, with the oldest of each, and nothing is lost or taken twice.
    #[test]
    fn a_run_begins_whenever_one_can_and_no_message_is_lost(
        runs_max in 1..4_usize,
        one_sender in any::<bool>(),
        steps in prop::collection::vec((0..10_u8, 0..3_usize, 0..4_usize), 1..200),
    ) {
        const KEYS: [&str; 4] = ["x", "y", "z", "other"];
        let kinds = [join(1, &["x", "y"], one_sender), join(2, &["y", "z", "x"], false), join(3, &["z"], one_sender)];
        let (mut joins, mut mailbox) = (Joins::<Text, ()>::new(kinds.to_vec(), runs_max), mailbox());
        // (number, sender, key); those that run: (run, numbers in the order of the keys).
        let (mut stored, mut runs) = (Vec::<Known>::new(), Vec::<(u64, Vec<Known>)>::new());
        let mut numbers = 0;
        for (step, at, key) in steps {
            let mut begun = Vec::new();
            match step {
                0..=5 => {
                    let from = [Sender::Own, Sender::Peer(0), Sender::Peer(5)][at];
                    numbers += 1;
                    prop_assert_eq!(mailbox.deliver(from, KEYS[key].as_bytes(), Text(numbers)), Ok(Delivered::Stored));
                    stored.push((numbers, from, KEYS[key]));
                    begun.extend(joins.stored(&mut mailbox, from, KEYS[key].as_bytes(), |_| true));
                }
                6 | 7 if !runs.is_empty() => {
                    let (run, of) = runs.remove(at % runs.len());
                    let last = of.len() - 1;
                    for nth in 0..of.len() {
                        prop_assert_eq!(joins.answered(run, None).is_some(), nth == last);
                    }
                }
                8 if !runs.is_empty() => {
                    let (run, of) = runs.remove(at % runs.len());
                    let mut back = Vec::new();
                    for (number, ..) in &of {
                        back = joins.back(run, Text(*number));
                    }
                    for message in back {
                        prop_assert_eq!(mailbox.restore(message), None);
                    }
                    stored.extend(of);
                    stored.sort_unstable_by_key(|(number, ..)| *number);
                }
                9 if !stored.is_empty() => {
                    // A function receives one.
                    let (_, from, key) = stored[at % stored.len()];
                    let first = stored.iter().position(|(_, of, under)| (*of, *under) == (from, key));
                    let (number, ..) = stored.remove(first.expect("one is"));
                    let wanted = Wanted { from: Some(from), key: Some(key.as_bytes()) };
                    let received = mailbox.receive(0, Receiver { worker: 1, call: 1 }, wanted, 0);
                    prop_assert!(matches!(&received, Received::Message(message) if message.payload == Text(number)), "{received:?}");
                }
                _ => {}
            }
            begun.extend(std::iter::from_fn(|| joins.next(&mut mailbox, |_| true)));
            for begun in begun {
                prop_assert!(runs.len() < runs_max);
                let kind = &kinds[usize::from(begun.function) - 1];
                let from = kind.one_sender.then(|| begun.messages[0].from);
                let expected = oldest(&stored, kind, from).expect("it can run");
                let found: Vec<_> = begun.messages.iter().map(|message| message.payload.0).collect();
                prop_assert_eq!(&found, &expected.iter().map(|(number, ..)| *number).collect::<Vec<_>>());
                stored.retain(|known| !expected.contains(known));
                runs.push((begun.run, expected));
            }
            if runs.len() < runs_max {
                for kind in &kinds {
                    let senders = [Some(Sender::Own), Some(Sender::Peer(0)), Some(Sender::Peer(5))];
                    let from = if kind.one_sender { &senders[..] } else { &[None] };
                    for from in from {
                        prop_assert_eq!(oldest(&stored, kind, *from), None, "{:?} could run", kind);
                    }
                }
            }
            prop_assert_eq!(mailbox.stats().messages, stored.len());
        }
    }
}
