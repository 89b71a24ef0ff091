use proptest::prelude::*;

use super::*;
use crate::descriptor::tests::any_descriptor;

fn pair() -> (ExchangeCaller, ExchangeCallee) {
    let line = Window::on_heap(ExchangeLine::blank());
    (ExchangeCaller::on(line.clone()), ExchangeCallee::on(line))
}

/// Both ends as they stand after the call with this sequence.
fn after(sequence: u32) -> (ExchangeCaller, ExchangeCallee) {
    let (mut caller, mut callee) = pair();
    caller.sequence = sequence;
    (callee.taken, callee.answered, callee.head) = (sequence, sequence, u64::from(sequence));
    callee.line.words[0].store(sequence.into(), Ordering::Relaxed);
    callee.line.words[1].store(sequence.into(), Ordering::Relaxed);
    (caller, callee)
}

fn numbered(aux: u64) -> Descriptor {
    Descriptor::bare(9, 8, 0, aux)
}

/// As the far end sees it: an exchange carries the sequence instead of the id.
fn with_id(descriptor: Descriptor, sequence: u32) -> Descriptor {
    Descriptor::new(descriptor.kind(), descriptor.tag(), sequence.into(), descriptor.aux(), descriptor.body())
}

proptest! {
    #[test]
    fn requests_and_replies_alternate(
        calls in prop::collection::vec((any_descriptor(), any_descriptor()), 1..20),
        start in prop_oneof![Just(0), (SEQUENCE - 10)..SEQUENCE],
    ) {
        let (mut caller, mut callee) = after(start);
        let mut expected = start;
        for (request, reply) in calls {
            expected = next(expected);
            prop_assert!(!callee.ready() && callee.poll() == Ok(None));
            let sequence = caller.submit(&request);
            prop_assert_eq!(sequence, expected);
            prop_assert!(caller.busy() && caller.poll() == Ok(None));
            prop_assert!(callee.ready());
            prop_assert_eq!(callee.poll(), Ok(Some((sequence, with_id(request, sequence)))));
            prop_assert_eq!(callee.poll(), Ok(None));
            callee.reply(&reply);
            prop_assert_eq!(caller.poll(), Ok(Some(ExchangeReply::Reply(with_id(reply, sequence)))));
            prop_assert!(!caller.busy() && caller.poll() == Ok(None));
        }
    }

    /// R1, R2: any words in the page are refused or understood; the callee takes no sequence but the next.
    #[test]
    fn r2_hostile_words_make_no_more_than_one_request(words in prop::collection::vec((0_usize..8, any::<u64>()), 1..50)) {
        let (mut caller, mut callee) = pair();
        caller.submit(&numbered(1));
        let mut taken = 0;
        for (at, value) in words {
            let value = if value % 3 == 0 { value & !0xFFFF_FFFF | 1 } else { value };
            callee.line.words[at].store(value, Ordering::Relaxed);
            taken += u32::from(matches!(callee.poll(), Ok(Some(_))));
            let _ = caller.poll();
        }
        prop_assert!(taken <= 1);
    }
}

#[test]
fn closing_while_idle_tells_the_caller_that_nothing_ran() {
    let (mut caller, mut callee) = pair();
    callee.close();
    caller.submit(&numbered(1));
    assert!(!callee.ready());
    assert_eq!(callee.poll(), Ok(None));
    assert_eq!(caller.poll(), Ok(Some(ExchangeReply::Closed)));
    assert!(!caller.busy());
}

#[test]
fn closing_over_an_unread_reply_loses_it_not() {
    let (mut caller, mut callee) = pair();
    caller.submit(&numbered(1));
    callee.poll().unwrap().unwrap();
    callee.reply(&numbered(2));
    callee.close();
    assert!(matches!(caller.poll(), Ok(Some(ExchangeReply::Reply(reply))) if reply.aux() == 2));
    caller.submit(&numbered(3));
    assert_eq!(caller.poll(), Ok(Some(ExchangeReply::Closed)));
}

#[test]
fn closing_over_an_unseen_request_leaves_it_not_taken() {
    let (mut caller, mut callee) = pair();
    caller.submit(&numbered(1));
    callee.close();
    assert_eq!(callee.poll(), Ok(None));
    assert_eq!(caller.poll(), Ok(Some(ExchangeReply::Closed)));
}

#[test]
fn closing_in_the_middle_of_a_call_shows_with_its_reply() {
    let (mut caller, mut callee) = pair();
    caller.submit(&numbered(1));
    callee.poll().unwrap().unwrap();
    callee.close();
    assert_eq!(caller.poll(), Ok(None), "it was taken: Closed would be a lie");
    callee.reply(&numbered(2));
    assert!(matches!(caller.poll(), Ok(Some(ExchangeReply::Reply(_)))));
    caller.submit(&numbered(3));
    assert_eq!(caller.poll(), Ok(Some(ExchangeReply::Closed)));
}

#[test]
#[should_panic(expected = "not answered yet")]
fn a_second_request_in_flight_is_our_own_mistake() {
    let (mut caller, _callee) = pair();
    caller.submit(&numbered(1));
    caller.submit(&numbered(2));
}

#[test]
fn two_threads_call_and_answer() {
    let (mut caller, mut callee) = pair();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for call in 0..20_000_u64 {
                let (_, request) = loop {
                    match callee.poll().unwrap() {
                        Some(request) => break request,
                        None => std::thread::yield_now(),
                    }
                };
                assert_eq!(request.aux(), call);
                callee.reply(&numbered(!call));
            }
        });
        for call in 0..20_000_u64 {
            caller.submit(&numbered(call));
            let reply = loop {
                match caller.poll().unwrap() {
                    Some(reply) => break reply,
                    None => std::thread::yield_now(),
                }
            };
            assert!(matches!(reply, ExchangeReply::Reply(reply) if reply.aux() == !call));
        }
    });
}

#[test]
fn golden_words_of_an_exchange() {
    let (mut caller, mut callee) = pair();
    caller.submit(&Descriptor::new(1, 2, 99, 4, crate::Body::Inline(crate::Inline::new(b"ask").unwrap())));
    let words = |line: &ExchangeLine| line.words.each_ref().map(|word| word.load(Ordering::Relaxed));
    let ask = u64::from(u32::from_le_bytes(*b"ask\0"));
    assert_eq!(words(&callee.line), [1 | 1 << 32 | 3 << 40 | 2 << 48, 0, 4, ask, 0, 0, 0, 0]);
    callee.poll().unwrap().unwrap();
    callee.reply(&Descriptor::bare(5, 6, 99, 7));
    callee.close();
    assert_eq!(words(&callee.line)[1..3], [1 | 1 << 31 | 5 << 32 | 6 << 48, 7]);
}
