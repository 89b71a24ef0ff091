use std::collections::VecDeque;

use proptest::prelude::*;

use super::on_heap::Ring;
use super::*;
use crate::descriptor::tests::any_descriptor;

fn numbered(id: u64) -> Descriptor {
    Descriptor::bare(1, 0, id, !id)
}

#[derive(Clone, Debug)]
enum Operation {
    Send(Descriptor),
    Poll,
    Publish,
    Skip(u64),
    FreeSlots,
    Sent(u64),
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let operation = prop_oneof![
        8 => any_descriptor().prop_map(Operation::Send),
        7 => Just(Operation::Poll),
        1 => Just(Operation::Publish),
        1 => (0_u64..20).prop_map(Operation::Skip),
        1 => Just(Operation::FreeSlots),
        2 => (0_u64..12).prop_map(Operation::Sent),
    ];
    prop::collection::vec(operation, 1..400)
}

/// Positions around which something wraps, for a ring of 8 slots (R2).
fn starts() -> impl Strategy<Value = u64> {
    let wraps = [0, 8, 1_u64 << 32, 1 << 35, (1 << 35) - 8, u64::MAX - 7, u64::MAX / 2];
    (prop::sample::select(wraps.to_vec()), 0_u64..16).prop_map(|(wrap, before)| wrap.wrapping_sub(before))
}

proptest! {
    /// The oracle: a queue of what was sent, and how much of its reading was published.
    #[test]
    fn a_ring_is_a_bounded_queue(start in starts(), operations in operations()) {
        let ring = Ring::new(8);
        let (mut producer, mut consumer) = ring.after(start);
        let mut queue: VecDeque<Descriptor> = VecDeque::new();
        let mut history: Vec<Descriptor> = Vec::new();
        // Read but not published; the consumer publishes at every second (8 / 4) slot.
        let mut unpublished = 0;
        for operation in operations {
            let occupied = queue.len() as u64 + unpublished;
            match operation {
                Operation::Send(descriptor) => {
                    let sent = producer.try_send(&descriptor);
                    if occupied == 8 {
                        prop_assert_eq!(sent, Err(Full));
                    } else {
                        prop_assert_eq!(sent, Ok(start.wrapping_add(history.len() as u64)));
                        queue.push_back(descriptor);
                        history.push(descriptor);
                    }
                }
                Operation::Poll => {
                    prop_assert_eq!(consumer.ready(), !queue.is_empty());
                    let expected = queue.pop_front();
                    prop_assert_eq!(consumer.poll(), Ok(expected));
                    unpublished = (unpublished + u64::from(expected.is_some())) % 2;
                }
                Operation::Publish => {
                    consumer.publish();
                    unpublished = 0;
                }
                Operation::Skip(ahead) => {
                    let target = consumer.head().wrapping_add(ahead);
                    if ahead > 8 {
                        prop_assert!(consumer.skip_to(target).is_err());
                    } else if ahead <= queue.len() as u64 {
                        prop_assert_eq!(consumer.skip_to(target), Ok(()));
                        queue.drain(..host(ahead));
                        unpublished = 0;
                    }
                }
                Operation::FreeSlots => prop_assert_eq!(u64::from(producer.free_slots()), 8 - occupied),
                Operation::Sent(age) => {
                    let expected = if (1..=8).contains(&age) {
                        history.len().checked_sub(host(age)).map(|at| history[at])
                    } else {
                        None
                    };
                    let sent = producer.sent(producer.tail().wrapping_sub(age));
                    // Before the first message the slots carry stamps without content.
                    if age <= history.len() as u64 || age == 0 || age > 8 {
                        prop_assert_eq!(sent, expected);
                    }
                }
            }
            prop_assert!(!producer.peer_head_invalid());
        }
    }

    /// R2: whatever the consumer claims, the producer never sends beyond what an honest one could have freed, and says so.
    #[test]
    fn r2_a_head_that_is_a_lie_frees_nothing(start in starts(), lies in prop::collection::vec(any::<u64>(), 1..20)) {
        let ring = Ring::new(8);
        let (mut producer, _) = ring.after(start);
        for id in 0..8 {
            producer.try_send(&numbered(id)).unwrap();
        }
        for lie in lies {
            let oldest = producer.tail().wrapping_sub(8);
            let plausible = lie.wrapping_sub(oldest) <= 8;
            ring.consumer_line.publish_head(lie);
            let was_invalid = producer.peer_head_invalid();
            let free = producer.free_slots();
            prop_assert!(free <= 8);
            if !plausible {
                prop_assert_eq!(free, 0);
                prop_assert_eq!(producer.try_send(&numbered(9)), Err(Full));
                prop_assert!(producer.peer_head_invalid());
            } else if was_invalid {
                prop_assert!(producer.peer_head_invalid(), "once a liar, always one");
            }
            while producer.free_slots() > 0 {
                producer.try_send(&numbered(9)).unwrap();
            }
        }
    }

    /// R1, R2: a producer that scribbles over its whole ring makes us read at most what its stamps say, and never more
    /// than one slot for each poll.
    #[test]
    fn r2_a_scribbled_ring_is_polled_one_slot_at_a_time(
        start in starts(),
        words in prop::collection::vec((0_usize..8, 0_usize..8, any::<u64>(), any::<bool>()), 1..200),
    ) {
        let ring = Ring::new(8);
        let (_, mut consumer) = ring.after(start);
        for (slot, word, value, plausible) in words {
            let value = if plausible { value & !0xFFFF_FFFF | u64::from(consumer.shape.stamp(consumer.head)) } else { value };
            ring.scribble(slot, word, value);
            let head = consumer.head();
            let polled = consumer.poll();
            let moved = consumer.head().wrapping_sub(head);
            prop_assert_eq!(moved, u64::from(polled != Ok(None)));
        }
    }
}

#[test]
fn a_bad_slot_is_reported_once_and_passed() {
    let ring = Ring::new(8);
    let (mut producer, mut consumer) = (ring.producer(), ring.consumer());
    producer.try_send(&numbered(1)).unwrap();
    producer.try_send(&numbered(2)).unwrap();
    ring.scribble(0, 0, 1 | 41 << 40);
    assert_eq!(consumer.poll(), Err(BadDescriptor::InlineLength { claimed: 41 }));
    assert_eq!(consumer.poll(), Ok(Some(numbered(2))));
}

#[test]
fn skip_to_goes_forward_only() {
    let ring = Ring::new(8);
    let (mut producer, mut consumer) = (ring.producer(), ring.consumer());
    for id in 0..4 {
        producer.try_send(&numbered(id)).unwrap();
    }
    consumer.skip_to(3).unwrap();
    assert_eq!(consumer.skip_to(2), Err(BadPosition { asked: 2, head: 3, slots: 8 }));
    assert_eq!(consumer.poll(), Ok(Some(numbered(3))));
    assert_eq!(producer.free_slots(), 7, "skipping publishes, polling once does not yet");
}

/// Also the ThreadSanitizer and AddressSanitizer case: real threads, heap memory, every lap checked.
#[test]
fn two_threads_pass_everything_in_order() {
    let count = if cfg!(debug_assertions) { 100_000 } else { 2_000_000 };
    let ring = Ring::new(64);
    let (mut producer, mut consumer) = (ring.producer(), ring.consumer());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for id in 0..count {
                while producer.try_send(&numbered(id)).is_err() {
                    std::thread::yield_now();
                }
            }
            assert!(!producer.peer_head_invalid());
        });
        let mut expected = 0;
        while expected < count {
            match consumer.poll().unwrap() {
                Some(descriptor) => {
                    assert_eq!(descriptor, numbered(expected));
                    expected += 1;
                }
                None => std::thread::yield_now(),
            }
        }
    });
}

/// R3 (b): a producer that changes every word at full speed while we read. We must get answers or errors, and stop.
#[test]
fn r3_a_scribbler_at_full_speed_gets_no_further_than_its_ring() {
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
    let ring = Ring::new(64);
    let mut consumer = ring.consumer();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut word = 0x9E37_79B9_7F4A_7C15_u64;
            while !stop.load(Relaxed) {
                for slot in 0..64 {
                    word = word.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1);
                    ring.scribble(slot, host(word >> 61), word >> (word & 31));
                    ring.scribble(slot, 0, word & !0xFFFF_FFFF | word >> 63);
                }
            }
        });
        let mut seen = 0_u64;
        for _ in 0..200_000 {
            match consumer.poll() {
                Ok(None) => std::hint::spin_loop(),
                Ok(Some(descriptor)) => {
                    assert!(descriptor.inline().is_none_or(|inline| inline.as_slice().len() <= 40));
                    seen += 1;
                }
                Err(_) => seen += 1,
            }
        }
        stop.store(true, Relaxed);
        assert!(seen <= 200_000);
    });
}
