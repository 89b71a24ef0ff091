use proptest::prelude::*;

use super::*;
use crate::segment::{Identity, OwnSegment, SegmentConfig, SegmentFile};

const ARENA_BYTES: u64 = 2 << 20;
const BORROWERS: u8 = 3;

fn arena() -> Arena {
    let config = SegmentConfig { ring_slots: 64, arena_bytes: ARENA_BYTES };
    let file = SegmentFile::create(&config).unwrap();
    let identity = Identity { participant: ParticipantId::CONTROLLER, incarnation: 1, process: [7; 16] };
    OwnSegment::map(&file, &identity, &config).unwrap().arena().unwrap()
}

fn borrower(number: u8) -> ParticipantId {
    ParticipantId::new(1 + number % BORROWERS).unwrap()
}

#[derive(Clone, Debug)]
enum Operation {
    Loan(usize),
    Free(usize),
    Lend(usize, u8),
    Release(usize),
    TakeBack(usize),
    Relend(usize, u8),
    Reclaim(u8),
    /// A peer's claim about a block, made of parts of true ones.
    Claim {
        who: u8,
        block: usize,
        index: u32,
        generation: u32,
        offset: u64,
        len: u64,
    },
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let size = prop_oneof![6 => 0_usize..5000, 2 => 5000_usize..300_000, 1 => 300_000_usize..3_000_000];
    let operation = prop_oneof![
        8 => size.prop_map(Operation::Loan),
        3 => any::<usize>().prop_map(Operation::Free),
        6 => (any::<usize>(), any::<u8>()).prop_map(|(block, to)| Operation::Lend(block, to)),
        4 => any::<usize>().prop_map(Operation::Release),
        2 => any::<usize>().prop_map(Operation::TakeBack),
        1 => (any::<usize>(), any::<u8>()).prop_map(|(block, to)| Operation::Relend(block, to)),
        1 => any::<u8>().prop_map(Operation::Reclaim),
        3 => (any::<u8>(), any::<usize>(), 0_u32..40, 0_u32..6, 0_u64..1000, 0_u64..6000).prop_map(
            |(who, block, index, generation, offset, len)| Operation::Claim { who, block, index, generation, offset, len }
        ),
    ];
    prop::collection::vec(operation, 1..120)
}

/// The oracle: what was handed out and not given back, and what was written into it.
#[derive(Default)]
struct Model {
    loaned: Vec<(Block, u8)>,
    lent: Vec<(BlockRef, ParticipantId, u8)>,
    written: u8,
}

impl Model {
    fn write(&mut self, mut block: Block) {
        self.written = self.written.wrapping_add(1);
        block.fill(self.written);
        self.loaned.push((block, self.written));
    }

    /// If two blocks overlapped, one of them would hold the other's bytes.
    fn check(&self, arena: &Arena) {
        for (block, value) in &self.loaned {
            assert!(block.iter().all(|byte| byte == value), "somebody wrote into a loaned block");
            assert!(block.start.as_ptr().addr().is_multiple_of(64) && block.capacity() >= block.len());
        }
        for (block, _, value) in &self.lent {
            let bytes = arena.lent_view(block).unwrap();
            assert!(bytes.iter().all(|byte| byte == value), "somebody wrote into a lent block");
        }
        arena.ledger.audit();
        let stats = arena.stats();
        assert_eq!(stats.blocks, (self.loaned.len() + self.lent.len()) as u64);
        assert!(stats.lent_bytes <= stats.used_bytes && stats.used_bytes <= stats.high_water_bytes);
        assert!(stats.high_water_bytes <= stats.quota_bytes);
    }
}

fn pick<T>(list: &mut Vec<T>, at: usize) -> Option<T> {
    if list.is_empty() { None } else { Some(list.swap_remove(at % list.len())) }
}

proptest! {
    #[test]
    fn blocks_never_overlap_and_only_holders_end_lendings(operations in operations()) {
        let mut arena = arena();
        let mut model = Model::default();
        for operation in operations {
            match operation {
                Operation::Loan(len) => match arena.loan(len) {
                    Ok(block) => {
                        prop_assert_eq!(block.len(), len);
                        model.write(block);
                    }
                    Err(refused) => {
                        prop_assert_eq!(refused.needed_bytes, len as u64);
                        prop_assert_eq!(refused.free_bytes, ARENA_BYTES - arena.stats().used_bytes);
                        let nothing_in_use = model.loaned.is_empty() && model.lent.is_empty();
                        prop_assert!(!nothing_in_use || len as u64 > ARENA_BYTES, "an empty arena takes what its quota says");
                    }
                },
                Operation::Free(at) => if let Some((block, _)) = pick(&mut model.loaned, at) {
                    arena.free(block);
                },
                Operation::Lend(at, to) => if let Some((block, value)) = pick(&mut model.loaned, at) {
                    let len = block.len() - block.len() / 3;
                    let lent = arena.lend(block, len, borrower(to));
                    prop_assert_eq!(lent.len, len as u64);
                    model.lent.push((lent, borrower(to), value));
                },
                Operation::Release(at) => if let Some((lent, holder, _)) = pick(&mut model.lent, at) {
                    prop_assert_eq!(arena.release(holder, lent.index, lent.generation), Ok(()));
                    prop_assert!(arena.release(holder, lent.index, lent.generation).is_err(), "released twice");
                },
                Operation::TakeBack(at) => if let Some((lent, holder, value)) = pick(&mut model.lent, at) {
                    let shorter = BlockRef { len: lent.len / 2, ..lent };
                    let block = arena.take_back(holder, &shorter).unwrap();
                    prop_assert!(block.iter().all(|byte| *byte == value));
                    prop_assert!(arena.take_back(holder, &shorter).is_err(), "taken back twice");
                    model.loaned.push((block, value));
                },
                Operation::Relend(at, to) => if !model.lent.is_empty() {
                    let at = at % model.lent.len();
                    let (lent, holder, _) = &mut model.lent[at];
                    prop_assert_eq!(arena.relend(*holder, borrower(to), lent.index, lent.generation), Ok(()));
                    *holder = borrower(to);
                },
                Operation::Reclaim(dead) => {
                    let dead = borrower(dead);
                    let used = arena.stats().used_bytes;
                    let bytes = arena.reclaim(dead);
                    prop_assert_eq!(used - bytes as u64, arena.stats().used_bytes);
                    model.lent.retain(|(_, holder, _)| *holder != dead);
                }
                Operation::Claim { who, block, index, generation, offset, len } => {
                    let who = borrower(who);
                    let mut claim = BlockRef { owner: ParticipantId::CONTROLLER, index, generation, offset: offset * 64, len };
                    if !model.lent.is_empty() {
                        let (truth, _, _) = &model.lent[block % model.lent.len()];
                        // One part of a true reference is changed, or none.
                        claim = match block % 5 {
                            0 => BlockRef { index, ..*truth },
                            1 => BlockRef { generation, ..*truth },
                            2 => BlockRef { offset: offset * 64, ..*truth },
                            3 => BlockRef { len, ..*truth },
                            _ => *truth,
                        };
                    }
                    let held = model.lent.iter().position(|(truth, holder, _)| {
                        *holder == who && BlockRef { len: claim.len, ..*truth } == claim && claim.len <= truth.len
                    });
                    let answer = arena.take_back(who, &claim);
                    prop_assert_eq!(answer.is_ok(), held.is_some());
                    if let (Ok(block), Some(held)) = (answer, held) {
                        let (_, _, value) = model.lent.swap_remove(held);
                        model.loaned.push((block, value));
                    }
                }
            }
            arena.ledger.audit();
        }
        model.check(&arena);
    }
}

#[test]
fn an_arena_takes_its_quota_and_not_a_byte_more() {
    let mut arena = arena();
    let whole = arena.loan(host(ARENA_BYTES)).unwrap();
    let refused = NoSpace { needed_bytes: 1, free_bytes: 0, quota_bytes: ARENA_BYTES };
    assert_eq!(arena.loan(1).unwrap_err(), refused);
    arena.free(whole);
    assert!(arena.loan(host(ARENA_BYTES) + 1).is_err());
    assert!(arena.loan(usize::MAX).is_err());
    arena.loan(host(ARENA_BYTES)).unwrap();
}

#[test]
fn pieces_join_again_when_a_large_block_needs_them() {
    let mut arena = arena();
    let mut blocks = Vec::new();
    while let Ok(block) = arena.loan(64) {
        blocks.push(block);
    }
    assert_eq!(blocks.len() as u64, ARENA_BYTES / 64);
    assert!(arena.loan(128).is_err());
    for block in blocks {
        arena.free(block);
    }
    let large = arena.loan(host(ARENA_BYTES) / 2 + 1).unwrap();
    arena.loan(host(ARENA_BYTES) / 4).unwrap();
    arena.free(large);
}

#[test]
fn the_block_freed_last_goes_out_first() {
    let mut arena = arena();
    let (first, second) = (arena.loan(1000).unwrap(), arena.loan(1000).unwrap());
    let (a, b) = (first.start, second.start);
    arena.free(first);
    arena.free(second);
    assert_eq!(arena.loan(900).unwrap().start, b);
    assert_eq!(arena.loan(1000).unwrap().start, a);
}

#[test]
fn a_block_outlives_its_arena() {
    let mut arena = arena();
    let mut block = arena.loan(100).unwrap();
    drop(arena);
    block.fill(1);
    assert_eq!(block[99], 1);
}

#[test]
#[should_panic(expected = "another arena's")]
fn a_foreign_block_is_our_own_mistake() {
    let (mut one, mut other) = (arena(), arena());
    let block = one.loan(1).unwrap();
    let _same_index = other.loan(1).unwrap();
    other.free(block);
}

#[test]
fn prepared_memory_is_committed_once() {
    let mut arena = arena();
    arena.prepare(1 << 20).unwrap();
    assert_eq!(arena.stats().committed_bytes, ARENA_BYTES, "whole steps");
    assert!(arena.prepare(ARENA_BYTES + 1).is_err());
    assert!(arena.prepare(u64::MAX).is_err());
}
