use std::sync::Arc;

use praas_shm::{Identity, IndexConfig, OwnSegment, PeerSegment, SegmentConfig, SegmentFile};
use proptest::prelude::*;

use super::*;
use crate::object::Header;

const SEGMENT: SegmentConfig = SegmentConfig { ring_slots: 64, arena_bytes: 2 << 20 };
const WORKERS: usize = 2;
const OBJECTS_MAX: u32 = 9;
const BOUNDS: Bounds = Bounds { bytes_max: 30_000, object_bytes_max: 9000, own_bytes_max: 12_000 };

/// A life of a participant: its arena, and what others see of it.
struct Life {
    number: u32,
    arena: Arena,
    segment: Arc<PeerSegment>,
}

fn life(participant: u8, number: u32) -> Life {
    let file = SegmentFile::create(&SEGMENT).unwrap();
    let participant = ParticipantId::new(participant).unwrap();
    let identity = Identity { participant, incarnation: 1 + u64::from(number), process: [7; 16] };
    let own = OwnSegment::map(&file, &identity, &SEGMENT).unwrap();
    file.seal_future_write().unwrap();
    let segment = PeerSegment::attach(&file, &identity, &SEGMENT).unwrap();
    Life { number, arena: own.arena().unwrap(), segment }
}

/// What a key's object should be.
#[derive(Clone, Debug)]
struct Known {
    version: u64,
    /// Where it was written: zero, if it was copied into our arena or has been moved there.
    life: u32,
    object: Vec<u8>,
    /// Version of its key's first one.
    first: u64,
}

/// Somebody reads an object, and the key's block if it has one.
struct Pin {
    known: Known,
    object: Held,
    segment: Option<Arc<PeerSegment>>,
    key: Option<BlockRef>,
}

struct Bench {
    state: State,
    arena: Arena,
    workers: [Life; WORKERS],
    lives: u32,
    /// Segments of lives that ended and left objects.
    estates: BTreeMap<u32, Arc<PeerSegment>>,
    model: BTreeMap<Vec<u8>, Known>,
    pins: Vec<Pin>,
    /// Orphans on their way, copied and not yet adopted.
    moving: Vec<(Orphan, Block)>,
    now_us: u64,
}

fn object(key: &[u8], value_bytes: usize, byte: u8) -> Vec<u8> {
    let mut object = Header::raw(key.len(), value_bytes).to_bytes().to_vec();
    object.resize(HEADER_BYTES + value_bytes, byte);
    object.extend_from_slice(key);
    object
}

/// Few enough to meet again, more than there may be, around the border between short and long ones.
fn key(number: u8) -> Vec<u8> {
    let mut key = vec![b'k'; [1, 24, 25, 1024][usize::from(number) % 4]];
    key[0] = number % 12;
    key
}

impl Bench {
    fn new() -> Bench {
        let identity = Identity { participant: ParticipantId::CONTROLLER, incarnation: 1, process: [7; 16] };
        let (index, _) = IndexWriter::create(&identity, &IndexConfig { objects_max: OBJECTS_MAX }).unwrap();
        Bench {
            state: State::new(index, BOUNDS),
            arena: life(0, 0).arena,
            workers: [life(1, 1), life(2, 2)],
            lives: 2,
            estates: BTreeMap::new(),
            model: BTreeMap::new(),
            pins: Vec::new(),
            moving: Vec::new(),
            now_us: 0,
        }
    }

    fn used_bytes(&self) -> u64 {
        self.model.values().map(|known| known.object.len() as u64).sum()
    }

    fn put(&mut self, key: &[u8], expected: u64, value_bytes: usize, byte: u8, writer: Option<usize>) {
        let object = object(key, value_bytes, byte);
        let lent = writer.map(|worker| {
            let Life { number, arena, .. } = &mut self.workers[worker];
            let mut block = arena.loan(object.len()).unwrap();
            block.copy_from_slice(&object);
            (worker, *number, arena.lend(block, object.len(), ParticipantId::CONTROLLER))
        });
        let source = match &lent {
            Some((_, life, block)) => Source::Lent { life: *life, block: *block },
            None => Source::Copied(&object),
        };
        self.now_us += 1;
        let put = Put { key, expected, value_bytes: value_bytes as u64, now_us: self.now_us, source };
        let (own_bytes, used_bytes) = (self.state.own_bytes, self.used_bytes());
        let answer = self.state.put(&put, &mut self.arena);
        let current = self.model.get(key).cloned();
        let version = current.as_ref().map_or(0, |known| known.version);
        let replaced_bytes = current.as_ref().map_or(0, |known| known.object.len() as u64);
        let too_much = used_bytes - replaced_bytes + object.len() as u64 > BOUNDS.bytes_max;
        let too_many = current.is_none() && self.model.len() == OBJECTS_MAX as usize;
        let mut own = if lent.is_none() { object.len() as u64 } else { 0 };
        if current.is_none() && key.len() > 24 {
            own += key.len() as u64;
        }
        // Blocks are a little longer than what they were asked for.
        let full = own > 0 && own_bytes + own * 5 / 4 + 128 > BOUNDS.own_bytes_max;
        match answer {
            Ok(written) => {
                assert!(value_bytes as u64 <= BOUNDS.object_bytes_max && !too_much && !too_many);
                assert!(own == 0 || own_bytes + own <= BOUNDS.own_bytes_max);
                assert!(matches!(expected, WHATEVER) || expected == version);
                let first = current.map_or(written, |known| known.first);
                let life = lent.map_or(0, |(_, life, _)| life);
                self.model.insert(key.to_vec(), Known { version: written, life, object, first });
            }
            Err(refused) => {
                match &refused {
                    Refused::TooLarge(_) => assert!(value_bytes as u64 > BOUNDS.object_bytes_max),
                    Refused::Conflict { current } => assert!(*current == version && expected != version),
                    Refused::NoSpace(text) => assert!(too_much || too_many || full, "{text}"),
                    Refused::Malformed(what) => panic!("{what}"),
                }
                // Its owner has it back by the answer.
                if let Some((worker, _, block)) = lent {
                    let arena = &mut self.workers[worker].arena;
                    arena.release(ParticipantId::CONTROLLER, block.index, block.generation).unwrap();
                }
            }
        }
    }

    fn delete(&mut self, key: &[u8], expected: u64) {
        let version = self.model.get(key).map_or(0, |known| known.version);
        match self.state.delete(key, expected, &mut self.arena) {
            Ok(existed) => {
                assert!(expected == WHATEVER || expected == version);
                assert_eq!(existed, self.model.remove(key).is_some());
            }
            Err(refused) => {
                assert!(expected != WHATEVER && expected != version);
                assert_eq!(refused, Refused::Conflict { current: version });
            }
        }
    }

    /// As a reader does: what is current, and from then on that very object.
    fn pin(&mut self, key: &[u8]) {
        let Some(entry) = self.state.index.find(key, &self.arena) else { return };
        let current = self.state.index.current(entry).unwrap();
        let object = self.state.held(entry, &current);
        let segment = self.segment(object.life);
        self.pins.push(Pin { known: self.model[key].clone(), object, segment, key: current.key_block });
    }

    fn segment(&self, life: u32) -> Option<Arc<PeerSegment>> {
        let alive = self.workers.iter().find(|worker| worker.number == life).map(|worker| &worker.segment);
        alive.or_else(|| self.estates.get(&life)).map(Arc::clone)
    }

    /// A block goes back to a worker that lives, once; what belongs to the dead goes nowhere.
    fn sweep(&mut self) {
        let Bench { state, arena, workers, pins, .. } = self;
        let is_read = |version| pins.iter().any(|pin| pin.known.version == version);
        state.sweep(arena, is_read, |life, block| {
            if let Some(worker) = workers.iter_mut().find(|worker| worker.number == life) {
                worker.arena.release(ParticipantId::CONTROLLER, block.index, block.generation).expect("released once");
            }
        });
    }

    fn die(&mut self, worker: usize) {
        self.lives += 1;
        let next = life(u8::try_from(worker).unwrap() + 1, self.lives);
        let dead = std::mem::replace(&mut self.workers[worker], next);
        let left = self.model.values().any(|known| known.life == dead.number);
        assert_eq!(self.state.ended(dead.number), left);
        if left {
            self.estates.insert(dead.number, dead.segment);
        }
    }

    fn find_orphan(&mut self) {
        let Some(orphan) = self.state.next_orphan() else {
            assert!(!self.state.has_orphans(), "so few entries are all looked at in a turn");
            return;
        };
        let bytes = self.estates[&orphan.life].bytes(&orphan.block).unwrap();
        if let Some(mut copy) = self.state.loan_for(&orphan, &mut self.arena) {
            copy.copy_from_slice(bytes);
            self.moving.push((orphan, copy));
        }
    }

    fn adopt(&mut self, at: usize) {
        let (orphan, copy) = self.moving.swap_remove(at % self.moving.len());
        if !self.state.is_current(&orphan) {
            return self.state.give_up(copy, &mut self.arena);
        }
        // Copied twice, if it was found twice: then it is current and no orphan any more.
        let known = self.model.values_mut().find(|known| known.version == orphan.version).unwrap();
        if known.life == 0 {
            return self.state.give_up(copy, &mut self.arena);
        }
        known.life = 0;
        self.state.adopt(&orphan, copy, &mut self.arena);
    }

    fn check(&mut self) {
        assert_eq!(self.state.used_bytes(), self.used_bytes());
        for (key, known) in &self.model {
            let entry = self.state.index.find(key, &self.arena).expect("it is there");
            let current = self.state.index.current(entry).unwrap();
            let held = self.state.held(entry, &current);
            assert_eq!((current.version, held.life, current.first), (known.version, known.life, known.first));
            let segment = self.segment(held.life);
            let bytes = match &segment {
                Some(segment) => segment.bytes(&held.block).unwrap(),
                None => self.arena.lent_view(&held.block).unwrap(),
            };
            assert!(bytes == known.object, "an object is another's or torn");
            let looked = self.state.look(key, &self.arena);
            assert_eq!(looked.map(|looked| looked.version), (held.life == 0).then_some(known.version));
        }
        let mut listed: Vec<_> = self.model.iter().map(|(key, known)| (known.first, key.clone())).collect();
        listed.sort_unstable();
        let keys = self.state.keys(&self.arena).into_iter().map(|listed| (listed.first, listed.key));
        assert!(keys.eq(listed));
        // What is read stays as it is, and so does its key.
        for pin in &self.pins {
            let bytes = match &pin.segment {
                Some(segment) => segment.bytes(&pin.object.block).unwrap(),
                None => self.arena.lent_view(&pin.object.block).expect("pinned, and not free"),
            };
            assert!(bytes == pin.known.object, "an object changed under its reader");
            if let Some(key) = &pin.key {
                assert!(pin.known.object.ends_with(self.arena.lent_view(key).expect("a key under a pin is not free")));
            }
        }
        let lives = |life: &u32| self.model.values().any(|known| known.life == *life);
        self.estates.retain(|life, _| {
            assert_eq!(self.state.is_settled(*life), !lives(life));
            lives(life)
        });
        assert_eq!(self.state.has_orphans(), !self.estates.is_empty());
    }

    /// Everybody lets go, everything is deleted: then nothing is in use.
    fn end(mut self) {
        self.pins.clear();
        while !self.moving.is_empty() {
            self.adopt(0);
        }
        for key in self.model.keys().cloned().collect::<Vec<_>>() {
            self.delete(&key, WHATEVER);
        }
        self.sweep();
        self.check();
        assert!(!self.state.has_retired() && !self.state.has_orphans() && self.state.objects.is_empty());
        assert_eq!((self.state.used_bytes(), self.state.own_bytes), (0, 0));
        assert_eq!(self.arena.stats().used_bytes, 0);
        assert!(self.workers.iter().all(|worker| worker.arena.stats().used_bytes == 0));
    }
}

#[derive(Clone, Debug)]
enum Operation {
    Put { key: u8, value_bytes: usize, byte: u8, writer: Option<usize> },
    PutIf { key: u8, right: bool, writer: Option<usize> },
    Delete { key: u8 },
    DeleteIf { key: u8, right: bool },
    Pin { key: u8 },
    Unpin(usize),
    Sweep,
    Die(usize),
    FindOrphan,
    Adopt(usize),
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let writer = || prop::option::weighted(0.7, 0..WORKERS);
    let size = prop_oneof![4 => 0_usize..100, 3 => 1000_usize..6000, 1 => 8990_usize..9010];
    let operation = prop_oneof![
        8 => (any::<u8>(), size, any::<u8>(), writer())
            .prop_map(|(key, value_bytes, byte, writer)| Operation::Put { key, value_bytes, byte, writer }),
        2 => (any::<u8>(), any::<bool>(), writer())
            .prop_map(|(key, right, writer)| Operation::PutIf { key, right, writer }),
        3 => any::<u8>().prop_map(|key| Operation::Delete { key }),
        1 => (any::<u8>(), any::<bool>()).prop_map(|(key, right)| Operation::DeleteIf { key, right }),
        4 => any::<u8>().prop_map(|key| Operation::Pin { key }),
        3 => any::<usize>().prop_map(Operation::Unpin),
        3 => Just(Operation::Sweep),
        1 => (0..WORKERS).prop_map(Operation::Die),
        3 => Just(Operation::FindOrphan),
        3 => any::<usize>().prop_map(Operation::Adopt),
    ];
    prop::collection::vec(operation, 1..150)
}

proptest! {
    /// S1, S3, S4, S7, G8: against a map, with readers that hold, workers that die, orphans on their way and all bounds within reach. No object is lost,
    /// torn or freed under its reader; no block is released twice or never.
    #[test]
    fn s1_s3_s4_s7_g8_the_state_is_a_map_whose_memory_comes_back(operations in operations()) {
        let mut bench = Bench::new();
        for operation in operations {
            let version = |bench: &Bench, key: &[u8], right| {
                let version = bench.model.get(key).map_or(0, |known| known.version);
                if right { version } else { version + 1 }
            };
            match operation {
                Operation::Put { key: number, value_bytes, byte, writer } => {
                    bench.put(&key(number), WHATEVER, value_bytes, byte, writer);
                }
                Operation::PutIf { key: number, right, writer } => {
                    let expected = version(&bench, &key(number), right);
                    bench.put(&key(number), expected, 10, number, writer);
                }
                Operation::Delete { key: number } => bench.delete(&key(number), WHATEVER),
                Operation::DeleteIf { key: number, right } => {
                    let expected = version(&bench, &key(number), right);
                    bench.delete(&key(number), expected);
                }
                Operation::Pin { key: number } => bench.pin(&key(number)),
                Operation::Unpin(at) if !bench.pins.is_empty() => {
                    let at = at % bench.pins.len();
                    bench.pins.swap_remove(at);
                }
                Operation::Sweep => bench.sweep(),
                Operation::Die(worker) => bench.die(worker),
                Operation::FindOrphan if bench.moving.is_empty() => bench.find_orphan(),
                Operation::Adopt(at) if !bench.moving.is_empty() => bench.adopt(at),
                _ => {}
            }
            bench.check();
        }
        bench.end();
    }
}

/// S4: a long key was freed with the last object, while who had an older one pinned was still comparing it.
#[test]
fn s4_a_long_key_stays_while_any_object_of_it_is_read() {
    let mut bench = Bench::new();
    let long = key(3);
    bench.put(&long, WHATEVER, 10, 1, Some(0));
    bench.pin(&long);
    bench.put(&long, WHATEVER, 10, 2, Some(1));
    bench.delete(&long, WHATEVER);
    for _ in 0..2 {
        bench.sweep();
        bench.check();
    }
    bench.end();
}

/// G8: what lies in our arena leaves room there for payloads, whoever writes it, also while it is only read still.
#[test]
fn g8_state_leaves_a_part_of_our_arena_to_payloads() {
    let mut bench = Bench::new();
    for round in 0..20 {
        bench.put(&key(0), WHATEVER, 4000, round, None);
        bench.pin(&key(0));
        bench.sweep();
        assert!(bench.arena.stats().used_bytes <= BOUNDS.own_bytes_max * 5 / 4 + 128);
    }
    assert!(matches!(
        bench.state.loan(6000, &mut bench.arena),
        Err(Refused::NoSpace(text)) if text.contains("of the 12000 that state may take")
    ));
    bench.end();
}

/// G8: a worker's segment stays as long as an object in it is current, so that as many are kept as may be, and then objects lent are refused.
#[test]
fn g8_so_many_dead_workers_leave_objects_and_no_more() {
    let identity = Identity { participant: ParticipantId::CONTROLLER, incarnation: 1, process: [7; 16] };
    let (index, _) = IndexWriter::create(&identity, &IndexConfig { objects_max: 1000 }).unwrap();
    let mut state = State::new(index, BOUNDS);
    let mut arena = life(0, 0).arena;
    let mut put = |state: &mut State, life: u32| {
        let (owner, key) = (ParticipantId::new(1).unwrap(), life.to_le_bytes());
        let block = BlockRef { owner, index: 0, generation: 0, offset: 0, len: 36 };
        let source = Source::Lent { life, block };
        state.put(&Put { key: &key, expected: WHATEVER, value_bytes: 0, now_us: 0, source }, &mut arena)
    };
    for life in 1..=64 {
        put(&mut state, life).unwrap();
        assert!(state.ended(life));
    }
    assert!(matches!(put(&mut state, 65), Err(Refused::NoSpace(text)) if text.contains("64 workers that died")));
    assert!(!state.ended(65));
    let mut arena = life(0, 0).arena;
    assert_eq!(state.delete(&7_u32.to_le_bytes(), WHATEVER, &mut arena), Ok(true));
    assert!(state.is_settled(7) && !state.is_settled(8));
    // Nowhere to move them to: then fewer.
    let orphan = state.next_orphan().unwrap();
    let mut full = life(0, 0).arena;
    while full.loan(1 << 19).is_ok() {}
    assert!(state.loan_for(&orphan, &mut full).is_none());
    assert!(matches!(put(&mut state, 65), Err(Refused::NoSpace(text)) if text.contains("8 workers that died")));
    let copy = state.loan_for(&orphan, &mut arena).unwrap();
    state.adopt(&orphan, copy, &mut arena);
    put(&mut state, 65).unwrap();
}
