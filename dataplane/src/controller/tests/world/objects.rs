//! The state of a process, as `runtime/state.rs` has it. Objects lie in blocks of workers that are plain vectors here; those that the
//! process copies or adopts lie in an arena as real as its index.

use std::collections::BTreeMap;

use praas_shm::{
    Arena, Block, BlockRef, Identity, IndexConfig, IndexWriter, OwnSegment, ParticipantId, SegmentConfig, SegmentFile,
};

use super::process::Told;
use super::worker::Ask;
use super::*;
use crate::controller::state::{Orphan, Put, Refused, Source, State};
use crate::object::HEADER_BYTES;

/// An object in a worker's memory: its generation and its bytes.
pub(super) type Blocks = BTreeMap<u32, (u32, Vec<u8>)>;

/// Pauses, as there.
const NO_ROOM_NS: u64 = 100 * MS;
const LOOK_NS: u64 = MS;
const LOOK_MAX_NS: u64 = S;

#[derive(Debug)]
pub(super) struct Objects {
    pub(super) state: State,
    pub(super) arena: Arena,
    /// Of workers that died, by their lives.
    estates: BTreeMap<u64, Blocks>,
    adoption: Option<(Orphan, Block)>,
    pub(super) due_ns: u64,
    look_pause_ns: u64,
    copies: bool,
}

/// A key: short ones stand in the index, long ones in the arena.
pub(super) fn key_bytes(key: u8) -> Vec<u8> {
    vec![key + 1; if key.is_multiple_of(2) { 3 } else { 40 }]
}

/// The bytes of an object, header and all, that say what its value is.
pub(super) fn object_bytes(key: u8, value: u64, words: usize) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES];
    (0..words).for_each(|_| bytes.extend(value.to_le_bytes()));
    bytes.extend(key_bytes(key));
    bytes
}

/// The value of such bytes, if all of them say the same.
fn value_in(bytes: &[u8], key: u8) -> Option<u64> {
    let key = key_bytes(key);
    let words = bytes.strip_suffix(&key[..])?.get(HEADER_BYTES..)?;
    let value = u64::from_le_bytes(*words.first_chunk()?);
    words.chunks(8).all(|word| word == value.to_le_bytes()).then_some(value)
}

impl Objects {
    pub(super) fn new(plan: &Plan) -> Objects {
        let identity = Identity { participant: ParticipantId::CONTROLLER, incarnation: 1, process: [7; 16] };
        let segment = SegmentConfig { ring_slots: 64, arena_bytes: 2 << 20 };
        let (index, _) =
            IndexWriter::create(&identity, &IndexConfig { objects_max: plan.objects_max }).expect("an index");
        let file = SegmentFile::create(&segment).expect("a segment");
        let own = OwnSegment::map(&file, &identity, &segment).expect("a segment");
        Objects {
            state: State::new(index, plan.state),
            arena: own.arena().expect("an arena"),
            estates: BTreeMap::new(),
            adoption: None,
            due_ns: u64::MAX,
            look_pause_ns: LOOK_NS,
            copies: plan.copies,
        }
    }

    /// A worker is dead: what it left stays until it is moved.
    pub(super) fn outlive(&mut self, now_ns: u64, born: u64, blocks: Blocks) {
        if self.state.ended(life(born)) {
            self.estates.insert(born, blocks);
            self.due_ns = now_ns;
        }
    }

    /// What has no room to be moved to stays where it is.
    pub(super) fn is_at_rest(&self) -> bool {
        self.adoption.is_none() && !self.state.has_retired()
    }
}

fn life(born: u64) -> u32 {
    u32::try_from(born).expect("few workers")
}

/// Something read, that is to stay as it is until it is let go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pin {
    pub(super) version: u64,
    key: u8,
    value: u64,
    life: u32,
    block: BlockRef,
}

impl World {
    pub(super) fn on_state(&mut self, node: NodeId, worker: WorkerId, question: u64, ask: &Ask) {
        let now_us = self.agenda.now_ns / 1000;
        let born = self.born(node, worker);
        let process = self.process(node);
        let Objects { state, arena, copies, .. } = &mut process.objects;
        let answer = match *ask {
            Ask::Put { key, expected, block } => {
                let blocks = &mut process.seats.get_mut(&worker).expect("who asks is there").worker.blocks;
                let (generation, bytes) = &blocks[&block];
                let name = key_bytes(key);
                let lent = BlockRef {
                    owner: ParticipantId::new(worker).expect("a worker"),
                    index: block,
                    generation: *generation,
                    offset: u64::from(block) * 64,
                    len: bytes.len() as u64,
                };
                let source =
                    if *copies { Source::Copied(bytes) } else { Source::Lent { life: life(born), block: lent } };
                let value_bytes = (bytes.len() - HEADER_BYTES - name.len()) as u64;
                let put = state.put(&Put { key: &name, expected, value_bytes, now_us, source }, arena);
                if put.is_err() || *copies {
                    // Its owner has it back.
                    blocks.remove(&block);
                }
                put
            }
            Ask::Delete { key, expected } => state.delete(&key_bytes(key), expected, arena).map(u64::from),
            _ => unreachable!("other questions go elsewhere"),
        };
        self.sweep(node);
        let objects = &mut self.process(node).objects;
        if objects.state.has_retired() {
            objects.look_pause_ns = LOOK_NS;
            objects.due_ns = objects.due_ns.min(now_us * 1000 + LOOK_NS);
        }
        let (code, about) = match answer {
            Ok(number) => (Code::Ok, number),
            Err(Refused::Conflict { current }) => (Code::Conflict, current),
            Err(Refused::TooLarge(_)) => (Code::TooLarge, 0),
            Err(Refused::NoSpace(_)) => (Code::NoSpace, 0),
            Err(Refused::Malformed(what)) => panic!("{what}"),
        };
        if matches!(code, Code::TooLarge | Code::NoSpace) {
            self.checker.counts.refused += 1;
        }
        self.answer(node, worker, question, code, Told::Number(about));
    }

    /// What stands under a key, read from the index as a worker does, and pinned.
    pub(super) fn pin_object(&mut self, node: NodeId, key: u8) -> Option<Pin> {
        let objects = &self.process(node).objects;
        let (version, life, block) = objects.state.current(&key_bytes(key), &objects.arena)?;
        let mut pin = Pin { version, key, value: 0, life, block };
        pin.value = self.look_at(node, &pin).unwrap_or_else(|| panic!("state: version {version} has no bytes"));
        Some(pin)
    }

    /// The bytes behind a pin; `None` when they are gone or are something else.
    fn look_at(&mut self, node: NodeId, pin: &Pin) -> Option<u64> {
        let process = self.process(node);
        let place = |blocks: &Blocks| {
            let (generation, bytes) = blocks.get(&pin.block.index)?;
            (*generation == pin.block.generation).then(|| value_in(bytes, pin.key))?
        };
        if pin.life == 0 {
            return value_in(process.objects.arena.lent_view(&pin.block).ok()?, pin.key);
        }
        let born = u64::from(pin.life);
        match process.seats.get(&pin.block.owner.get()).filter(|seat| seat.born == born) {
            Some(seat) => place(&seat.worker.blocks),
            // Who reads it has its own mapping of that memory, which outlives ours.
            None => process.objects.estates.get(&born).map_or(Some(pin.value), place),
        }
    }

    /// Whether it stayed as it was (S4).
    pub(super) fn let_go(&mut self, node: NodeId, pin: &Pin) {
        let found = self.look_at(node, pin);
        assert_eq!(found, Some(pin.value), "state: version {} changed while it was read", pin.version);
        self.checker.counts.pinned += 1;
        let objects = &mut self.process(node).objects;
        if objects.state.has_retired() {
            let due_ns = objects.due_ns;
            self.wake(node, due_ns.saturating_sub(self.agenda.now_ns).min(LOOK_MAX_NS));
        }
    }

    pub(super) fn value_of(pin: Option<&Pin>) -> (u64, u64) {
        pin.map_or((0, 0), |pin| (pin.version, pin.value))
    }

    /// Gives back what nobody reads any more.
    fn sweep(&mut self, node: NodeId) {
        let Process { objects, seats, .. } = &mut *self.process(node);
        let pinned: Vec<u64> = seats.values().flat_map(|seat| seat.worker.pins.iter().map(|pin| pin.version)).collect();
        let mut released = Vec::new();
        objects.state.sweep(
            &mut objects.arena,
            |version| pinned.contains(&version),
            |life, block| released.push((life, block)),
        );
        for (life, block) in released {
            let seat = seats.get_mut(&block.owner.get()).filter(|seat| seat.born == u64::from(life));
            if let Some(seat) = seat {
                let back = seat.worker.blocks.remove(&block.index);
                assert_eq!(
                    back.map(|(generation, _)| generation),
                    Some(block.generation),
                    "state: a block is given back twice"
                );
            }
        }
    }

    pub(super) fn tend_objects(&mut self, node: NodeId) {
        let now_ns = self.agenda.now_ns;
        if now_ns < self.process(node).objects.due_ns {
            return;
        }
        self.sweep(node);
        let waits = self.is_wild && self.dice.one_in(3);
        let Objects { state, arena, estates, adoption, due_ns, look_pause_ns, .. } = &mut self.process(node).objects;
        let (mut adopted, mut pause_ns) = (0, MS / 2);
        match adoption.take() {
            // A large one takes several turns.
            Some(moving) if waits => *adoption = Some(moving),
            Some((orphan, mut block)) if state.is_current(&orphan) => {
                let (_, bytes) = &estates[&u64::from(orphan.life)][&orphan.block.index];
                block.copy_from_slice(bytes);
                state.adopt(&orphan, block, arena);
                adopted = 1;
            }
            Some((_, block)) => state.give_up(block, arena),
            None => {
                if let Some(orphan) = state.next_orphan() {
                    *adoption = state.loan_for(&orphan, arena).map(|block| (orphan, block));
                    if adoption.is_none() {
                        pause_ns = NO_ROOM_NS;
                    }
                }
            }
        }
        estates.retain(|born, _| !state.is_settled(life(*born)));
        *look_pause_ns = if state.has_retired() { (*look_pause_ns * 2).min(LOOK_MAX_NS) } else { LOOK_NS };
        *due_ns = match (state.has_orphans() || adoption.is_some(), state.has_retired()) {
            (true, _) => now_ns + pause_ns,
            (false, true) => now_ns + *look_pause_ns,
            (false, false) => u64::MAX,
        };
        self.checker.counts.adopted += adopted;
    }

    /// At the end: with all objects deleted and nobody reading, no memory is left.
    pub(super) fn nothing_is_left_of_objects(&mut self, node: NodeId, keys: u8) {
        let Process { objects, seats, .. } = &mut *self.process(node);
        seats.values_mut().for_each(|seat| seat.worker.pins.clear());
        for key in 0..keys {
            objects.state.delete(&key_bytes(key), WHATEVER, &mut objects.arena).expect("whatever it is");
        }
        self.sweep(node);
        let Process { objects, seats, .. } = &mut *self.process(node);
        assert_eq!(objects.state.used_bytes(), 0, "state: objects that nobody can name");
        assert_eq!(objects.arena.stats().used_bytes, 0, "state: memory of the process that is never given back");
        objects.estates.retain(|born, _| !objects.state.is_settled(life(*born)));
        let has_left = objects.is_at_rest() && !objects.state.has_orphans() && objects.estates.is_empty();
        assert!(has_left, "state: what dead workers left is never let go: {:?}", objects.estates);
        for (worker, seat) in seats {
            assert!(seat.worker.blocks.is_empty(), "state: worker {worker} never gets back {:?}", seat.worker.blocks);
        }
    }
}
