//! Two participants in one OS process: each owns a segment and reads the other's. What the API promises, end to end.

use std::sync::Arc;
use std::time::Duration;

use praas_shm::{
    Body, Descriptor, Identity, Inline, LentConnection, Link, LinkError, OwnSegment, ParticipantId, PeerSegment,
    SegmentConfig, SegmentError, SegmentFile, Take, eventfd,
};

const CONFIG: SegmentConfig = SegmentConfig { ring_slots: 64, arena_bytes: 4 << 20 };

fn identity(number: u8) -> Identity {
    Identity { participant: ParticipantId::new(number).unwrap(), incarnation: 7, process: *b"a process's name" }
}

struct Side {
    own: OwnSegment,
    file: SegmentFile,
    bell: std::os::fd::OwnedFd,
}

impl Side {
    fn new(number: u8) -> Self {
        let file = SegmentFile::create(&CONFIG).unwrap();
        let own = OwnSegment::map(&file, &identity(number), &CONFIG).unwrap();
        file.seal_future_write().unwrap();
        Self { own, file, bell: eventfd().unwrap() }
    }

    fn as_peer(&self) -> Arc<PeerSegment> {
        PeerSegment::attach(&self.file, self.own.identity(), &CONFIG).unwrap()
    }

    fn link(&self, peer: &Side) -> Link {
        Link::establish(&self.own, peer.as_peer(), peer.bell.try_clone().unwrap()).unwrap()
    }
}

fn text(bytes: &[u8]) -> Descriptor {
    Descriptor::new(1, 2, 3, 4, Body::Inline(Inline::new(bytes).unwrap()))
}

#[test]
fn inline_and_block_travel_and_come_back() {
    let (a, b) = (Side::new(0), Side::new(1));
    let (mut to_b, mut to_a) = (a.link(&b), b.link(&a));
    let mut arena = a.own.arena().unwrap();

    assert_eq!(to_b.producer.try_send(&text(b"hello")), Ok(0));
    assert_eq!(to_a.consumer.poll(), Ok(Some(text(b"hello"))));
    assert_eq!(to_a.consumer.poll(), Ok(None));

    let mut block = arena.loan(5 << 10).unwrap();
    block.fill(0xAB);
    let lent = arena.lend(block, 5000, b.own.identity().participant);
    to_b.producer.try_send(&Descriptor::new(1, 2, 3, 4, lent)).unwrap();
    let received = to_a.consumer.poll().unwrap().and_then(|descriptor| descriptor.block()).expect("a block was sent");
    let view = to_a.peer().view(&received).unwrap();
    assert_eq!(&*view, &[0xAB; 5000]);
    assert_eq!(arena.lent_view(&lent).unwrap(), &*view);
    assert_eq!(arena.stats().lent_bytes, 5 << 10);

    let back = arena.take_back(b.own.identity().participant, view.block()).unwrap();
    assert_eq!(back.len(), 5000);
    arena.free(back);
    assert_eq!(arena.stats().used_bytes, 0);
}

#[test]
fn what_is_sent_before_the_peer_links_waits_for_it() {
    let (a, b) = (Side::new(0), Side::new(1));
    let mut to_b = a.link(&b);
    to_b.producer.try_send(&text(b"early")).unwrap();
    assert!(!to_b.is_mutual());
    let mut to_a = b.link(&a);
    assert!(to_a.consumer.ready());
    assert_eq!(to_a.consumer.poll(), Ok(Some(text(b"early"))));
    assert!(to_b.is_mutual());
}

#[test]
fn a_successor_of_the_same_number_sees_nothing_of_its_predecessor() {
    let (a, b) = (Side::new(0), Side::new(1));
    let mut to_b = a.link(&b);
    for _ in 0..64 {
        to_b.producer.try_send(&text(b"for the first b")).unwrap();
    }
    to_b.mark_taken(9);
    to_b.close(5, 6);
    let mut b_to_a = b.link(&a);
    for _ in 0..40 {
        b_to_a.producer.try_send(&text(b"from the first b")).unwrap();
        b_to_a.consumer.poll().unwrap().unwrap();
    }
    drop((b, b_to_a, to_b));

    // The second b links before a does: it must not read what still stands in a's ring, nor believe a's line.
    let b = Side::new(1);
    let mut to_a = b.link(&a);
    assert!(!to_a.consumer.ready());
    assert_eq!(to_a.consumer.poll(), Ok(None));
    assert_eq!((to_a.peer_taken(), to_a.peer_closed()), (0, (0, 0)));
    for _ in 0..64 {
        to_a.producer.try_send(&text(b"from the second b")).unwrap();
    }
    assert!(to_a.producer.try_send(&text(b"one too many")).is_err());
    assert!(!to_a.producer.peer_head_invalid(), "a stale head is not a lie");

    let mut to_b = a.link(&b);
    assert_eq!(to_a.consumer.poll(), Ok(None));
    to_b.producer.try_send(&text(b"for the second b")).unwrap();
    assert_eq!(to_a.consumer.poll(), Ok(Some(text(b"for the second b"))));
    assert_eq!(to_b.consumer.poll(), Ok(Some(text(b"from the second b"))));
}

#[test]
fn the_lines_say_what_was_said() {
    let (a, b) = (Side::new(0), Side::new(1));
    let (to_b, to_a) = (a.link(&b), b.link(&a));
    assert_eq!((to_a.peer_taken(), to_a.peer_exchange_taken()), (0, 0));
    assert_eq!((to_a.peer_closed(), to_a.peer_cancelled()), ((0, 0), 0));
    to_b.mark_taken(17);
    to_b.mark_exchange_taken(18);
    to_b.close(19, 20);
    to_b.cancel(21);
    assert_eq!((to_a.peer_taken(), to_a.peer_exchange_taken()), (17, 18));
    assert_eq!((to_a.peer_closed(), to_a.peer_cancelled()), ((19, 20), 21));
    a.own.set_activity(99);
    assert_eq!(to_a.peer().activity(), 99);
}

#[test]
fn a_withdrawn_request_is_void_unless_it_was_taken() {
    let (a, b) = (Side::new(0), Side::new(1));
    let (mut to_b, to_a) = (a.link(&b), b.link(&a));
    for _ in 0..3 {
        to_b.producer.try_send(&text(b"request")).unwrap();
    }
    assert_eq!(to_a.take(0), Take::Mine);
    assert_eq!(to_b.withdraw(), 1, "the first is taken, the others come back");
    assert_eq!((to_a.take(1), to_a.take(2)), (Take::Void, Take::Void));
    assert_eq!(to_b.peer_taken(), 1, "what is void is not taken");
    to_b.producer.try_send(&text(b"later request")).unwrap();
    assert_eq!(to_a.take(3), Take::Mine);
    assert_eq!(to_b.withdraw(), 4);
}

#[test]
fn there_is_one_of_each() {
    let (a, b) = (Side::new(0), Side::new(1));
    let link = a.link(&b);
    let again = Link::establish(&a.own, b.as_peer(), eventfd().unwrap());
    assert!(matches!(again, Err(LinkError::AlreadyLinked(peer)) if peer.get() == 1));
    drop(link);
    a.link(&b);
    assert!(matches!(Link::establish(&a.own, a.as_peer(), eventfd().unwrap()), Err(LinkError::Oneself(_))));
    let _arena = a.own.arena().unwrap();
    assert!(matches!(a.own.arena(), Err(SegmentError::AlreadyTaken)));
    assert!(matches!(OwnSegment::map(&a.file, &identity(3), &CONFIG), Err(SegmentError::Map(_))), "sealed");
    let file = SegmentFile::create(&CONFIG).unwrap();
    let _own = OwnSegment::map(&file, &identity(3), &CONFIG).unwrap();
    assert!(matches!(OwnSegment::map(&file, &identity(3), &CONFIG), Err(SegmentError::AlreadyOwned)));
}

#[test]
fn a_sleeper_is_woken_once_per_sleep() {
    let (a, b) = (Side::new(0), Side::new(1));
    let doorbell = b.own.doorbell(b.bell.try_clone().unwrap());
    let to_b = a.link(&b);
    assert!(!to_b.bell.ring(), "nobody sleeps");
    doorbell.arm();
    assert!(to_b.bell.ring());
    assert!(!to_b.bell.ring(), "R7: rung already in this sleep");
    doorbell.sleep(None).unwrap();
    assert!(!to_b.bell.ring(), "awake");
    doorbell.arm();
    assert!(to_b.bell.ring());
    doorbell.drain();
    doorbell.arm();
    let before = std::time::Instant::now();
    doorbell.sleep(Some(Duration::from_millis(20))).unwrap();
    assert!(before.elapsed() >= Duration::from_millis(20), "an old ring does not wake a new sleep");
}

/// The ringer has no fence; the sleeper's system call stands in for it. Without that a release build loses a ring within
/// some thousand rounds; `scripts/deep-test` runs one.
#[test]
fn a_sleeper_that_raises_the_barrier_misses_no_unfenced_ring() {
    const ROUNDS: u64 = 100_000;
    if !praas_shm::has_barriers() {
        println!("skipped: needs membarrier(2) with GLOBAL_EXPEDITED");
        return;
    }
    praas_shm::join_barriers().unwrap();
    let (a, b) = (Side::new(0), Side::new(1));
    let doorbell = b.own.doorbell(b.bell.try_clone().unwrap());
    let (mut to_b, mut to_a) = (a.link(&b), b.link(&a));
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for round in 0..ROUNDS {
                // Every distance between the two ends' steps, a nanosecond or so at a time.
                (0..round % 97).for_each(|step| _ = std::hint::black_box(step));
                to_b.producer.try_send(&Descriptor::bare(1, 0, round, 0)).unwrap();
                to_b.bell.ring_unfenced();
                while to_b.consumer.poll().unwrap().is_none() {
                    std::hint::spin_loop();
                }
            }
        });
        for round in 0..ROUNDS {
            (0..round % 769).for_each(|step| _ = std::hint::black_box(step));
            let received = loop {
                doorbell.arm_for_unfenced().unwrap();
                if let Some(received) = to_a.consumer.poll().unwrap() {
                    doorbell.disarm();
                    break received;
                }
                let before = std::time::Instant::now();
                doorbell.sleep(Some(Duration::from_secs(5))).unwrap();
                assert!(before.elapsed() < Duration::from_secs(5), "round {round}: rung by nobody");
            };
            assert_eq!(received.id(), round);
            to_a.producer.try_send(&received).unwrap();
        }
    });
}

/// The counter of an eventfd ends, and a write that does not fit wakes nobody. Sleepers leave it as it is, and anybody who may
/// ring may fill it.
#[test]
fn a_full_counter_keeps_no_ring_out() {
    let (a, b) = (Side::new(0), Side::new(1));
    let doorbell = b.own.doorbell(b.bell.try_clone().unwrap());
    let to_b = a.link(&b);
    rustix::io::write(&b.bell, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    doorbell.sleep(None).unwrap();
    doorbell.arm();
    assert!(to_b.bell.ring());
    let before = std::time::Instant::now();
    doorbell.sleep(Some(Duration::from_secs(20))).unwrap();
    assert!(before.elapsed() < Duration::from_secs(10), "the ring was lost");
}

/// A descriptor as it stands in the file, for someone who reads the segment without this crate.
#[test]
fn the_segment_has_the_documented_bytes() {
    use std::os::unix::fs::FileExt;
    let (a, b) = (Side::new(2), Side::new(5));
    let mut to_b = a.link(&b);
    let _to_a = b.link(&a);
    to_b.producer.try_send(&text(b"gold")).unwrap();
    to_b.mark_taken(0x11);
    to_b.mark_exchange_taken(0x12);
    to_b.mark_received(0x17);
    to_b.close(0x13, 0x14);
    to_b.cancel(0x15);
    assert!(to_b.retract(0x18), "it has received nothing");
    a.own.set_activity(0x16);
    let said =
        |call| LentConnection { lease: 1, received: 2, sent: 3, read_bytes: 4, written_bytes: 5, call, deadline_ns: 7 };
    a.own.say_connection(&said(8));
    a.own.say_connection(&said(6));
    assert_eq!(a.as_peer().connection(), Some(said(6)));
    let file = std::fs::File::from(a.file.fd().try_clone_to_owned().unwrap());
    let words = |offset: u64, count: usize| -> Vec<u64> {
        let mut bytes = vec![0; count * 8];
        file.read_exact_at(&mut bytes, offset).unwrap();
        bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
    };
    let arena_offset = 2 << 20;
    let mut header = vec![u64::from_le_bytes(*b"PRaaSseg"), 3, 2, 7];
    header.extend([u64::from_le_bytes(*b"a proces"), u64::from_le_bytes(*b"s's name")]);
    header.extend([64, 4 << 20, arena_offset, arena_offset + (4 << 20)]);
    assert_eq!(words(0, 10), header);
    assert_ne!(words(80, 1), [0], "nonce");
    assert_eq!(words(88, 5), [0; 5]);
    assert_eq!(words(128, 16)[..2], [0x16, 0]);
    assert_eq!(words(256, 2), [0, 0], "awake");
    assert_eq!(words(384, 16), [2, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 5, 8, 7, 0], "the last two sayings");
    let line = words(4096 + 5 * 128, 16);
    assert_ne!(line[0], 0, "linked");
    assert_eq!(line[1..], [0, 0x11, 0x12, 0x17, 0, 0, 0, 0x14, 0x13, 0x15, 0, 0x18, 0, 0, 0]);
    let slot = words(16384 + 5 * 64 * 64, 8);
    assert_eq!(slot, [1 | 1 << 32 | 4 << 40 | 2 << 48, 3, 4, u64::from(u32::from_le_bytes(*b"gold")), 0, 0, 0, 0]);
}
