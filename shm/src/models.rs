//! Models: loom runs the code of this crate under every order of loads and stores that the memory model allows.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p praas-shm --release --lib --target-dir target-loom`. The bound is
//! three preemptions; the counts of messages are the smallest that reuse a slot, an epoch or a line.

use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::sync::{Condvar, Mutex};
use loom::thread;

use crate::descriptor::Descriptor;
use crate::doorbell::{Ringer, SleepLine, Sleeper};
use crate::exchange::{ExchangeCallee, ExchangeCaller, ExchangeLine, ExchangeReply};
use crate::index::entry::{Entry, Seen};
use crate::lane::on_heap::Lane;
use crate::lane::{Closed, LaneReceiver, Polled, Unsent};
use crate::mapping::Window;
use crate::peer_line::{PeerLine, Take};
use crate::pins::{PinPage, Pins, fence_before_looking};
use crate::ring::on_heap::Ring;
use crate::ring::{Consumer, Producer};

fn model(run: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(run);
}

fn numbered(id: u64) -> Descriptor {
    Descriptor::bare(1, 2, id, !id)
}

fn send(producer: &mut Producer, id: u64) {
    while producer.try_send(&numbered(id)).is_err() {
        thread::yield_now();
    }
}

fn receive(consumer: &mut Consumer) -> u64 {
    loop {
        if let Some(descriptor) = consumer.poll().expect("a torn slot") {
            assert_eq!(descriptor, numbered(descriptor.id()), "words of two messages in one slot");
            return descriptor.id();
        }
        thread::yield_now();
    }
}

/// Bytes of a block: loom reports two threads that touch them without an edge in between.
struct Payload(UnsafeCell<u64>);

// SAFETY: that the accesses are ordered is what the model proves.
unsafe impl Sync for Payload {}

impl Payload {
    fn new() -> Arc<Self> {
        Arc::new(Self(UnsafeCell::new(0)))
    }

    fn write(&self, value: u64) {
        // SAFETY: in bounds: a live cell. Unshared, unique: checked by loom at this very access.
        self.0.with_mut(|payload| unsafe { *payload = value });
    }

    fn read(&self) -> u64 {
        // SAFETY: as above.
        self.0.with(|payload| unsafe { *payload })
    }
}

/// R9, edges *published* and *drained*: a slot is reused, and no message is lost, repeated or torn.
#[test]
fn ring_delivers_in_order_through_reused_slots() {
    model(|| {
        let ring = Ring::new(2);
        let (mut producer, mut consumer) = (ring.producer(), ring.consumer());
        let sender = thread::spawn(move || (0..4).for_each(|id| send(&mut producer, id)));
        (0..4).for_each(|id| assert_eq!(receive(&mut consumer), id));
        sender.join().unwrap();
    });
}

/// R9: the bytes of a block are visible with its descriptor, and free to rewrite when its release has come back.
#[test]
fn release_hands_a_block_back() {
    model(|| {
        let (there, back) = (Ring::new(2), Ring::new(2));
        let (mut lend, mut lent) = (there.producer(), there.consumer());
        let (mut release, mut released) = (back.producer(), back.consumer());
        let block = Payload::new();
        let borrowed = Arc::clone(&block);
        let borrower = thread::spawn(move || {
            for round in 1..=2 {
                let id = receive(&mut lent);
                assert_eq!(borrowed.read(), round);
                send(&mut release, id);
            }
        });
        for round in 1..=2 {
            block.write(round);
            send(&mut lend, round);
            assert_eq!(receive(&mut released), round);
        }
        borrower.join().unwrap();
    });
}

/// R9, edge *linked*: what a predecessor left in ring and line is never read, however early the successor looks.
#[test]
fn linked_ring_shows_nothing_of_a_predecessor() {
    model(|| {
        let ring = Ring::new(2);
        ring.producer_line.link(1);
        let mut old = ring.producer();
        old.try_send(&numbered(66)).unwrap();
        old.try_send(&numbered(67)).unwrap();
        let mut consumer = ring.consumer();
        let successor = thread::spawn(move || {
            ring.producer_line.clear();
            ring.slots.iter().for_each(crate::ring::Slot::clear);
            ring.relink();
            send(&mut ring.producer(), 5);
        });
        assert_eq!(receive(&mut consumer), 5);
        successor.join().unwrap();
    });
}

/// An eventfd as the kernel makes it: a counter that wakes.
#[derive(Default)]
struct Eventfd {
    count: Mutex<u64>,
    readable: Condvar,
}

impl Eventfd {
    fn write(&self) {
        *self.count.lock().unwrap() += 1;
        self.readable.notify_all();
    }

    fn wait(&self) {
        let mut count = self.count.lock().unwrap();
        while *count == 0 {
            count = self.readable.wait(count).unwrap();
        }
    }

    /// As `wait` on its edges: what was written until now is told once.
    fn wait_for_edge(&self) {
        self.wait();
        self.drain();
    }

    fn drain(&self) {
        *self.count.lock().unwrap() = 0;
    }
}

/// R9, R7, edge *asleep*: a sleeper that polls once more after arming is always woken, although a ringer that has rung in
/// an epoch does not ring again. A lost wake-up is a deadlock, which loom reports.
#[test]
fn doorbell_loses_no_wake_up() {
    doorbell(|sleeper, eventfd| {
        eventfd.wait();
        sleeper.disarm();
        eventfd.drain();
    });
}

/// The same for one that sleeps on edges and never reads: a ring between waking up and disarming wakes it once more.
#[test]
fn doorbell_on_edges_loses_no_wake_up() {
    doorbell(|sleeper, eventfd| {
        eventfd.wait_for_edge();
        sleeper.disarm();
    });
}

fn doorbell(sleep: impl Fn(&Sleeper, &Eventfd) + Sync + Send + Copy + 'static) {
    model(move || {
        let ring = Ring::new(2);
        let (mut producer, mut consumer) = (ring.producer(), ring.consumer());
        let line = Window::on_heap(SleepLine::blank());
        let (sleeper, ringer) = (Sleeper::new(line.clone()), Ringer::new(line));
        let eventfd = Arc::new(Eventfd { count: Mutex::new(0), readable: Condvar::new() });
        let bell = Arc::clone(&eventfd);
        let sender = thread::spawn(move || {
            for id in 0..2 {
                producer.try_send(&numbered(id)).unwrap();
                if ringer.must_ring() {
                    bell.write();
                }
            }
        });
        let mut received = 0;
        let mut poll = || {
            while let Some(descriptor) = consumer.poll().unwrap() {
                assert_eq!(descriptor.id(), received);
                received += 1;
            }
            received == 2
        };
        while !poll() {
            sleeper.arm();
            if poll() {
                break;
            }
            sleep(&sleeper, &eventfd);
        }
        sender.join().unwrap();
    });
}

/// R9, edges *requested* and *replied*: one line carries both ways, twice, with a block each way.
#[test]
fn exchange_turns_carry_their_payload() {
    model(|| {
        let line = Window::on_heap(ExchangeLine::blank());
        let (mut caller, mut callee) = (ExchangeCaller::on(line.clone()), ExchangeCallee::on(line));
        let block = Payload::new();
        let callees = Arc::clone(&block);
        let serving = thread::spawn(move || {
            for round in 0..2 {
                let (_, request) = loop {
                    match callee.poll().unwrap() {
                        Some(request) => break request,
                        None => thread::yield_now(),
                    }
                };
                assert_eq!((request.aux(), callees.read()), (round, round));
                callees.write(round + 10);
                callee.reply(&Descriptor::bare(3, 4, 0, round + 10));
            }
        });
        for round in 0..2 {
            block.write(round);
            caller.submit(&Descriptor::bare(1, 2, 0, round));
            let reply = loop {
                match caller.poll().unwrap() {
                    Some(ExchangeReply::Reply(reply)) => break reply,
                    Some(ExchangeReply::Closed) => panic!("nobody closed"),
                    None => thread::yield_now(),
                }
            };
            assert_eq!((reply.aux(), block.read()), (round + 10, round + 10));
        }
        serving.join().unwrap();
    });
}

/// R9, edge *closed*: a request that meets a closing callee is answered if it was taken, and `Closed` if it was not.
#[test]
fn exchange_close_tells_taken_from_not_taken() {
    model(|| {
        let line = Window::on_heap(ExchangeLine::blank());
        let (mut caller, mut callee) = (ExchangeCaller::on(line.clone()), ExchangeCallee::on(line));
        let serving = thread::spawn(move || {
            let mut taken = 0;
            for _ in 0..2 {
                if let Some((_, request)) = callee.poll().unwrap() {
                    taken += 1;
                    callee.reply(&Descriptor::bare(3, 4, 0, !request.aux()));
                }
            }
            callee.close();
            taken
        });
        let mut answered = 0;
        for call in 1..=2 {
            caller.submit(&numbered(call));
            let reply = loop {
                match caller.poll().unwrap() {
                    Some(reply) => break reply,
                    None => thread::yield_now(),
                }
            };
            match reply {
                ExchangeReply::Reply(reply) => {
                    assert_eq!(reply.aux(), call);
                    answered += 1;
                }
                ExchangeReply::Closed => break,
            }
        }
        assert_eq!(serving.join().unwrap(), answered, "taken and answered are the same calls");
    });
}

/// R9, edge *closed* of the peer line: a lease is never seen with another lease's position.
#[test]
fn closed_lease_comes_with_its_own_position() {
    model(|| {
        let line = Window::on_heap(PeerLine::blank());
        let reader = line.clone();
        let closing = thread::spawn(move || {
            line.close(5, 50);
            line.close(6, 60);
        });
        let mut last = 0;
        for _ in 0..2 {
            let (lease, position) = reader.closed();
            assert_eq!(position, lease * 10);
            assert!(lease == 0 || lease >= last);
            last = lease.max(last);
        }
        closing.join().unwrap();
        assert_eq!(reader.closed(), (6, 60));
    });
}

/// Edge *taken*: who sees an effect of user code sees the mark that was made before it.
#[test]
fn taken_mark_is_seen_with_the_effects() {
    model(|| {
        let ring = Ring::new(2);
        let (mut producer, mut consumer) = (ring.producer(), ring.consumer());
        let line = Window::on_heap(PeerLine::blank());
        let judge = line.clone();
        let worker = thread::spawn(move || {
            line.mark_taken(9);
            producer.try_send(&numbered(1)).unwrap();
        });
        if consumer.poll().unwrap().is_some() {
            assert_eq!(judge.taken(), 9);
        }
        worker.join().unwrap();
    });
}

/// A withdrawal and a mark that cross: a request that the withdrawer does not see taken does not run.
#[test]
fn withdrawn_request_never_runs_unseen() {
    model(|| {
        let (takers, withdrawers) = (Window::on_heap(PeerLine::blank()), Window::on_heap(PeerLine::blank()));
        let (marks, withdrawn) = (takers.clone(), withdrawers.clone());
        let taker = thread::spawn(move || takers.take(&withdrawn, 0));
        withdrawers.withdraw(1);
        let seen_taken = marks.taken() > 0;
        let take = taker.join().unwrap();
        match take {
            Take::Mine => assert!(seen_taken, "it runs, and its sender gives it to another"),
            Take::Void => assert!(!seen_taken),
            Take::Crossed => {}
        }
    });
}

/// A retraction and an acceptance that cross: what its owner sees unaccepted, and gives to another, is not used.
#[test]
fn what_is_retracted_in_time_is_not_accepted() {
    model(|| {
        let (takers, offerers) = (Window::on_heap(PeerLine::blank()), Window::on_heap(PeerLine::blank()));
        let (marks, retracted) = (takers.clone(), offerers.clone());
        let taker = thread::spawn(move || takers.accept(&retracted, 1));
        offerers.retract(1);
        let given_to_another = marks.received() < 1;
        let accepted = taker.join().unwrap();
        assert!(!(accepted && given_to_another), "two have it");
        assert_eq!(marks.received() >= 1, accepted, "what it says in the end");
    });
}

/// R9, edges *written*, *writing*, *pinned*, *unpinned*: a reader that has pinned an object reads it whole, while it is replaced and the
/// memory of what nobody reads any more is written again.
#[test]
fn a_pinned_object_is_neither_torn_nor_freed() {
    model(|| {
        let entry = Window::on_heap(Entry::blank());
        let page = Window::on_heap(PinPage::blank());
        let blocks = [Payload::new(), Payload::new()];
        blocks[0].write(1);
        entry.write(1, [(1, 1), (2, 1)]);
        let (readers, pins, read) = (entry.clone(), Pins::new(page.clone()), blocks.clone());
        let reader = thread::spawn(move || {
            loop {
                match readers.pin(&pins, |words| words[1] > 0).unwrap() {
                    Seen::It((version, words, pin)) => {
                        assert_eq!((words[1], words[2]), (version, version), "words of two writings");
                        let block = &read[usize::from(version == 2)];
                        assert_eq!(block.read(), version);
                        pins.unpin(pin);
                        return;
                    }
                    Seen::Changing => thread::yield_now(),
                    Seen::Other => panic!("there always is an object"),
                }
            }
        });
        blocks[1].write(2);
        entry.write(2, [(1, 2), (2, 2)]);
        fence_before_looking();
        if !page.holds(1) {
            blocks[0].write(99);
        }
        reader.join().unwrap();
    });
}

/// R9, edges *sent*, *taken* and *closed* of a lane: whenever it is closed, each message that was sent goes to receiver or arbiter, once and in order, and the
/// sender knows which were. Nobody waits for anybody; what is still to be found is found when the other two are through.
#[test]
fn lane_gives_each_message_to_one_of_two() {
    model(|| {
        let lane = Lane::new();
        let (mut sender, mut receiver, arbiter) = lane.ends();
        let block = Payload::new();
        let (theirs, arbiters) = (Arc::clone(&block), Arc::clone(&block));
        let sending = thread::spawn(move || {
            block.write(7);
            let mut tries = [Err(Unsent::Closed); 3];
            for (id, tried) in tries.iter_mut().enumerate() {
                sender.released();
                *tried = sender.try_send(&numbered(id as u64), None);
                // A third needs a slot that is used again.
                if tried.is_err() {
                    break;
                }
            }
            (sender, tries)
        });
        let receiving = thread::spawn(move || {
            let mut received = 0;
            for _ in 0..2 {
                received += receive_from_lane(&mut receiver, received, &theirs);
            }
            (receiver, received, theirs)
        });
        let mut inherited = Vec::new();
        let mut first = 0;
        arbiter.close(|from, messages| {
            if from == 0 && !messages.is_empty() {
                assert_eq!(arbiters.read(), 7);
            }
            first = from;
            inherited.append(messages);
        });
        let (sender, tries) = sending.join().unwrap();
        let (mut receiver, mut received, theirs) = receiving.join().unwrap();
        // A claim that was not judged yet is one message at most.
        received += receive_from_lane(&mut receiver, received, &theirs);
        assert_eq!(receiver.poll(), Ok(Polled::Closed));
        let Closed { from, to } = sender.closed().expect("it was closed");
        let counts = |tried: &Result<u64, Unsent>| match *tried {
            Ok(_) => true,
            Err(Unsent::Unsure(position)) => position < to,
            Err(Unsent::Full | Unsent::Closed) => false,
        };
        let sent = tries.iter().filter(|tried| counts(tried)).count() as u64;
        let inherited: Vec<_> = inherited.into_iter().map(|message| message.expect("a torn slot").0).collect();
        assert_eq!((received, from), (first, first), "they agree where one ends and the other begins");
        assert_eq!(inherited, (received..sent).map(numbered).collect::<Vec<_>>());
    });
}

/// How many messages one look brings: the next, or none.
fn receive_from_lane(receiver: &mut LaneReceiver, expected: u64, block: &Payload) -> u64 {
    let Polled::Message { position, first, .. } = receiver.poll().expect("a torn slot") else { return 0 };
    assert_eq!((first, position), (numbered(expected), expected));
    if position == 0 {
        assert_eq!(block.read(), 7);
    }
    receiver.release(position);
    1
}
