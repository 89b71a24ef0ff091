use std::os::fd::{AsFd, OwnedFd};

use super::on_heap::Lane;
use super::*;

fn numbered(id: u64) -> Descriptor {
    Descriptor::bare(1, 2, id, !id)
}

fn ids(messages: &[Inherited]) -> Vec<u64> {
    messages.iter().map(|message| message.as_ref().expect("whole").0.id()).collect()
}

fn message(polled: Result<Polled, BadDescriptor>) -> Option<(u64, Option<u64>)> {
    match polled.expect("whole") {
        Polled::Message { first, second, .. } => Some((first.id(), second.map(|second| second.id()))),
        Polled::Empty | Polled::Closed => None,
    }
}

#[test]
fn m3_messages_of_one_descriptor_and_of_two_come_in_order_over_many_laps() {
    let lane = Lane::new();
    let (mut sender, mut receiver, _) = lane.ends();
    for id in 0..10 * SLOTS {
        let second = numbered(id + 1_000_000);
        // A slot that had two has one in the next lap, and the other way round.
        let has_second = id % 3 == 0;
        assert_eq!(sender.try_send(&numbered(id), has_second.then_some(&second)), Ok(id));
        assert_eq!(receiver.peek().expect("whole").map(|(first, _)| first.id()), Some(id));
        assert_eq!(message(receiver.poll()), Some((id, has_second.then_some(id + 1_000_000))));
        assert_eq!(receiver.poll(), Ok(Polled::Empty));
        assert_eq!(sender.released(), None);
        receiver.release(id);
        assert_eq!((sender.released(), sender.released()), (Some(id), None));
    }
}

#[test]
fn g8_a_lane_is_full_while_messages_are_unreleased() {
    let lane = Lane::new();
    let (mut sender, mut receiver, _) = lane.ends();
    for id in 0..LANE_MESSAGES_MAX {
        sender.try_send(&numbered(id), None).expect("there is room");
    }
    assert_eq!(sender.try_send(&numbered(99), None), Err(Unsent::Full));
    (0..LANE_MESSAGES_MAX).for_each(|id| assert_eq!(message(receiver.poll()), Some((id, None))));
    assert_eq!(sender.try_send(&numbered(99), None), Err(Unsent::Full), "all are read, none is released");
    // Not in their order.
    for id in [5, 3] {
        receiver.release(id);
    }
    assert_eq!((sender.released(), sender.released(), sender.released()), (Some(5), Some(3), None));
    assert_eq!(sender.unreleased(), LANE_MESSAGES_MAX - 2);
    sender.try_send(&numbered(64), None).expect("there is room");
    sender.try_send(&numbered(65), None).expect("there is room");
    assert_eq!(sender.try_send(&numbered(66), None), Err(Unsent::Full));
    assert_eq!(message(receiver.poll()), Some((64, None)));
}

#[test]
fn g3_what_was_not_received_is_the_arbiters_and_then_there_is_no_lane() {
    let lane = Lane::new();
    let (mut sender, mut receiver, arbiter) = lane.ends();
    (0..70).for_each(|id| {
        sender.try_send(&numbered(id), None).expect("there is room");
        receiver.poll().expect("whole");
        receiver.release(id);
        sender.released();
    });
    (70..75).for_each(|id| assert_eq!(sender.try_send(&numbered(id), None), Ok(id)));
    assert_eq!(message(receiver.poll()), Some((70, None)));
    let mut inherited = Vec::new();
    arbiter.close(|from, messages| {
        assert_eq!((from, sender.closed()), (71, None), "said before it is over");
        inherited.append(messages);
    });
    assert_eq!(ids(&inherited), [71, 72, 73, 74]);
    assert_eq!(sender.closed(), Some(Closed { from: 71, to: 75 }));
    assert_eq!(sender.try_send(&numbered(75), None), Err(Unsent::Closed));
    assert_eq!((receiver.poll(), receiver.peek()), (Ok(Polled::Closed), Ok(None)));
}

/// W5: the arbiter is stopped between its two words; both ends know that they do not know.
#[test]
fn w5_an_arbiter_that_is_stopped_in_the_middle_leaves_both_ends_unsure_and_running() {
    let lane = Lane::new();
    let (mut sender, mut receiver, _) = lane.ends();
    sender.try_send(&numbered(0), None).expect("there is room");
    let (.., arbiter) = lane.ends();
    lane.stop_closing();
    assert_eq!(receiver.poll(), Ok(Polled::Empty), "it is claimed, and may be the arbiter's");
    assert_eq!(sender.try_send(&numbered(1), None), Err(Unsent::Closed));
    // It had not seen the claim, or had: here it has.
    arbiter.close(|from, messages| assert_eq!((from, messages.len()), (1, 0)));
    assert_eq!(message(receiver.poll()), Some((0, None)));
    assert_eq!(receiver.poll(), Ok(Polled::Closed));
}

/// R1: whatever a receiver says, the sender waits or goes on, and the arbiter takes what was sent or nothing.
#[test]
fn r1_a_receiver_that_lies_hurts_itself() {
    for lie in [1, 5, 62, 63, 64, 65, 1 << 20, u64::MAX >> 10, u64::MAX] {
        let lane = Lane::new();
        let (mut sender, _, arbiter) = lane.ends();
        lane.claim(lie, (0, lie));
        for id in 0..200 {
            let _ = sender.try_send(&numbered(id), None);
            let _ = sender.released();
        }
        assert!(sender.unreleased() <= LANE_MESSAGES_MAX);
        arbiter.close(|_, messages| {
            assert!(messages.len() as u64 <= LANE_MESSAGES_MAX);
            assert!(ids(messages).is_sorted());
        });
    }
}

#[test]
fn a_verdict_is_read_as_it_was_written() {
    for (from, count) in [(0, 0), (1, 63), ((1 << 54) - 1, 0), (1 << 40, 7)] {
        let closed = Closed { from, to: from + count };
        let lane = Lane::new();
        let (sender, ..) = lane.ends();
        sender.arbiter.verdict[0].store(Verdict::word(closed), Ordering::Release);
        assert_eq!(sender.closed(), Some(closed));
    }
}

/// R5, R11: what is no lane's file is refused, and a file is its maker's to write.
#[test]
fn r5_r11_a_lane_is_made_of_files_that_only_their_makers_write() {
    let make = || LaneFile::create().expect("a file");
    let [(a, own_a), (b, own_b), (c, own_c)] = [make(), make(), make()];
    let attach = |file: &LaneFile| PeerLane::attach(file).expect("it is a lane's");
    let mut sender = LaneSender::new(&own_a, &attach(&b), &attach(&c));
    let mut receiver = LaneReceiver::new(&own_b, &attach(&a), &attach(&c));
    let arbiter = LaneArbiter::new(&own_c, &attach(&a), &attach(&b));
    for id in 0..3 {
        sender.try_send(&numbered(id), None).expect("there is room");
    }
    assert_eq!(message(receiver.poll()), Some((0, None)));
    arbiter.close(|_, messages| assert_eq!(ids(messages), [1, 2]));
    assert_eq!((sender.closed(), receiver.poll()), (Some(Closed { from: 1, to: 3 }), Ok(Polled::Closed)));
    // Writing, cutting and growing.
    assert!(rustix::io::pwrite(a.fd(), b"x", 0).is_err());
    assert!(rustix::fs::ftruncate(a.fd(), 1).is_err() && rustix::fs::ftruncate(a.fd(), 1 << 20).is_err());
    let other = |bytes: u64, seals| -> OwnedFd {
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("other", flags).expect("a file");
        rustix::fs::ftruncate(&fd, bytes).expect("it can grow");
        rustix::fs::fcntl_add_seals(fd.as_fd(), seals).expect("it can be sealed");
        fd
    };
    let all = rustix::fs::SealFlags::SHRINK | rustix::fs::SealFlags::GROW | rustix::fs::SealFlags::FUTURE_WRITE;
    for (bytes, seals) in [(12_288, rustix::fs::SealFlags::empty()), (4096, all), (12_288, all)] {
        let refused = PeerLane::attach(&LaneFile::from_fd(other(bytes, seals))).expect_err("it is none");
        assert!(matches!(refused, LaneError::Attach(_)), "{refused}");
    }
}
