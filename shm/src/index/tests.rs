use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64 as Count, Ordering as Order};

use proptest::prelude::*;

use super::*;
use crate::arena::Arena;
use crate::descriptor::BlockRef;
use crate::participant::ParticipantId;
use crate::pins::{Pins, fence_before_looking};
use crate::segment::{Identity, OwnSegment, PeerSegment, SegmentConfig, SegmentFile};
use std::sync::Arc;

const SEGMENT: SegmentConfig = SegmentConfig { ring_slots: 64, arena_bytes: 64 << 20 };

struct Participant {
    own: OwnSegment,
    peer: Arc<PeerSegment>,
}

fn participant(number: u8) -> Participant {
    let file = SegmentFile::create(&SEGMENT).unwrap();
    let identity = Identity { participant: ParticipantId::new(number).unwrap(), incarnation: 9, process: [7; 16] };
    let own = OwnSegment::map(&file, &identity, &SEGMENT).unwrap();
    file.seal_future_write().unwrap();
    let peer = PeerSegment::attach(&file, &identity, &SEGMENT).unwrap();
    Participant { own, peer }
}

struct Bench {
    writer: IndexWriter,
    reader: IndexReader,
    pins: Pins,
    arena: Arena,
    worker: Arc<PeerSegment>,
    versions: u64,
}

impl Bench {
    fn new(objects_max: u32) -> Self {
        let (controller, worker) = (participant(0), participant(1));
        let config = IndexConfig { objects_max };
        let (writer, file) = IndexWriter::create(controller.own.identity(), &config).unwrap();
        let reader = IndexReader::attach(&file, &config, controller.peer).unwrap();
        let (pins, arena) = (worker.own.pins().unwrap(), controller.own.arena().unwrap());
        Self { writer, reader, pins, arena, worker: worker.peer, versions: 0 }
    }

    fn key_block(&mut self, key: &[u8]) -> Option<BlockRef> {
        (key.len() > 24).then(|| {
            let mut block = self.arena.loan(key.len()).unwrap();
            block.copy_from_slice(key);
            self.arena.lend(block, key.len(), ParticipantId::CONTROLLER)
        })
    }

    fn put(&mut self, key: &[u8], at: u64) -> Result<u64, IndexFull> {
        let place = Place::new(ParticipantId::new(1).unwrap(), at % 1000, at * 64).unwrap();
        self.versions += 1;
        match self.writer.find(key, &self.arena) {
            Some(entry) => self.writer.replace(entry, self.versions, place, at, at * 2),
            None => {
                self.writer.reserve()?;
                let block = self.key_block(key);
                self.writer.insert(key, block.as_ref(), self.versions, place, at, at * 2);
            }
        }
        Ok(self.versions)
    }

    fn delete(&mut self, key: &[u8]) -> bool {
        let Some(entry) = self.writer.find(key, &self.arena) else { return false };
        let current = self.writer.current(entry).unwrap();
        self.versions += 1;
        self.writer.remove(entry, self.versions, &self.arena);
        if let Some(block) = current.key_block {
            self.arena.release(ParticipantId::CONTROLLER, block.index, block.generation).unwrap();
        }
        true
    }
}

/// Keys around the border between those that stand in an entry and those that do not, few enough to meet again.
fn key(number: u8) -> Vec<u8> {
    let mut key = vec![b'k'; [1, 2, 23, 24, 25, 26, 1024][usize::from(number) % 7]];
    key[0] = number;
    key
}

proptest! {
    /// S1, S6: against a map and a list, through growing and shrinking tables: `objects_max` above what fits the first one.
    #[test]
    fn s1_an_index_holds_what_a_map_holds(operations in prop::collection::vec((0_u8..4, any::<u8>(), 0_u64..1 << 20), 1..400)) {
        let mut bench = Bench::new(100);
        let mut model: BTreeMap<Vec<u8>, (u64, u64, u64)> = BTreeMap::new();
        for (what, number, at) in operations {
            let key = key(number);
            match what {
                0 | 1 => match bench.put(&key, at) {
                    Ok(version) => {
                        let first = model.get(&key).map_or(version, |(_, _, first)| *first);
                        model.insert(key, (version, at, first));
                    }
                    Err(error) => {
                        prop_assert!(model.len() == 100 && !model.contains_key(&key), "{error}");
                        prop_assert!(error.to_string().contains("100 objects"));
                    }
                },
                2 => prop_assert_eq!(bench.delete(&key), model.remove(&key).is_some()),
                _ => {
                    let found = bench.reader.get(&bench.pins, &key).unwrap();
                    let expected = model.get(&key);
                    prop_assert_eq!(found.as_ref().map(|found| found.version), expected.map(|(version, _, _)| *version));
                    if let (Some(found), Some((version, at, _))) = (found, expected) {
                        prop_assert_eq!((found.value_bytes, found.written_us, found.key_bytes), (*at, at * 2, key.len() as u64));
                        prop_assert_eq!((found.place.offset, u64::from(found.place.life)), (at * 64, at % 1000));
                        prop_assert!(bench.worker.pins(*version));
                        bench.pins.unpin(found.pin);
                        prop_assert!(!bench.worker.pins(*version));
                    }
                }
            }
        }
        let mut expected: Vec<_> = model.into_iter().map(|(key, (version, at, first))| (first, key, version, at)).collect();
        expected.sort_unstable();
        let listed = bench.reader.keys(&bench.pins).unwrap();
        let listed: Vec<_> = listed.into_iter().map(|l| (l.first, l.key, l.version, l.value_bytes)).collect();
        prop_assert_eq!(listed, expected);
        prop_assert_eq!(bench.pins.count(), 0);
    }

    #[test]
    fn a_place_reads_back(participant in 0_u8..64, life in 0_u64..1 << 28, unit in 0_u64..1 << 30) {
        let place = Place::new(ParticipantId::new(participant).unwrap(), life, unit * 64).unwrap();
        prop_assert_eq!(Place::from_word(place.word()), place);
    }
}

#[test]
fn r1_places_beyond_an_entry_are_refused() {
    let worker = ParticipantId::new(63).unwrap();
    for (life, offset) in [(1 << 28, 0), (u64::MAX, 0), (0, 64 << 30), (0, 32), (0, u64::MAX)] {
        assert_eq!(Place::new(worker, life, offset), None);
    }
}

#[test]
fn r11_an_index_of_another_life_or_size_is_refused() {
    let controller = participant(0);
    let config = IndexConfig { objects_max: 10 };
    let other = Identity { incarnation: 10, ..*controller.own.identity() };
    let (_writer, file) = IndexWriter::create(&other, &config).unwrap();
    let refused = IndexReader::attach(&file, &config, Arc::clone(&controller.peer)).unwrap_err().to_string();
    assert!(refused.contains("incarnation"), "{refused}");
    let (_writer, file) = IndexWriter::create(controller.own.identity(), &config).unwrap();
    let larger = IndexConfig { objects_max: 100_000 };
    let refused = IndexReader::attach(&file, &larger, Arc::clone(&controller.peer)).unwrap_err().to_string();
    assert!(refused.contains("bytes"), "{refused}");
    let size = config.index_bytes();
    let unsealed = rustix::fs::memfd_create("not-sealed", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&unsealed, size).unwrap();
    let refused = IndexReader::attach(&IndexFile::from_fd(unsealed), &config, controller.peer).unwrap_err().to_string();
    assert!(refused.contains("seals"), "{refused}");
}

/// R5: the file of an index can be written by nobody but the one who made it.
#[test]
fn r5_nobody_else_writes_an_index() {
    let controller = participant(0);
    let (_writer, file) = IndexWriter::create(controller.own.identity(), &IndexConfig::default()).unwrap();
    let nothing = rustix::io::Errno::PERM;
    assert_eq!(rustix::fs::ftruncate(file.fd(), 1).unwrap_err(), nothing);
    assert_eq!(rustix::io::pwrite(file.fd(), &[1], 0).unwrap_err(), nothing);
}

/// S2, S4: readers while a table grows and shrinks under them and one key is overwritten as fast as it goes. A key that always has an
/// object is never missing, and no words of two objects are ever mixed.
#[test]
fn s4_readers_never_see_a_mixture_or_miss_a_key_that_stays() {
    let mut bench = Bench::new(1 << 14);
    for number in 0..200_u64 {
        bench.put(&number.to_le_bytes(), number + 1).unwrap();
    }
    let (stop, reads) = (AtomicBool::new(false), Count::new(0));
    let Bench { mut writer, reader, pins, arena, worker, .. } = bench;
    std::thread::scope(|threads| {
        threads.spawn(|| {
            let pins = pins;
            let mut at = 0_u64;
            while !stop.load(Order::Relaxed) {
                at = (at + 1) % 200;
                let found = reader.get(&pins, &at.to_le_bytes()).unwrap().expect("this key always has an object");
                assert_eq!((found.written_us, found.place.offset), (found.value_bytes * 2, found.value_bytes * 64));
                pins.unpin(found.pin);
                assert!(reader.get(&pins, &(1 << 40_u64 | at).to_le_bytes()).unwrap().is_none());
                reads.fetch_add(1, Order::Relaxed);
            }
        });
        let place = |at: u64| Place::new(ParticipantId::new(1).unwrap(), 0, at * 64).unwrap();
        let mut version = 1000;
        for round in 0..60_u64 {
            for number in 0..8000_u64 {
                version += 1;
                let value = version % (1 << 20);
                let kept = (number % 200).to_le_bytes();
                let entry = writer.find(&kept, &arena).unwrap();
                writer.replace(entry, version, place(value), value, value * 2);
                let passing = (1_u64 << 32 | number).to_le_bytes();
                version += 1;
                match writer.find(&passing, &arena) {
                    Some(entry) => writer.remove(entry, version, &arena),
                    None => {
                        writer.reserve().unwrap();
                        writer.insert(&passing, None, version, place(1), 1, 2);
                    }
                }
                if number % 64 == 0 {
                    fence_before_looking();
                    let _ = worker.pins(version);
                }
            }
            assert_eq!(writer.objects(), if round % 2 == 0 { 8200 } else { 200 });
        }
        stop.store(true, Order::Relaxed);
    });
    assert!(reads.load(Order::Relaxed) > 100);
}

/// A million objects: what the index itself takes of memory.
#[test]
fn a_million_objects_take_less_than_a_hundred_bytes_each() {
    let mut bench = Bench::new(1 << 20);
    for number in 0..1_000_000_u64 {
        bench.put(&number.to_le_bytes(), 1).unwrap();
    }
    let file = rustix::fs::fstat(bench.writer.file()).unwrap();
    let bytes = u64::try_from(file.st_blocks).unwrap() * 512;
    assert!(bytes < 100 * 1_000_000, "{bytes} bytes");
    for number in (0..1_000_000_u64).step_by(997) {
        let found = bench.reader.get(&bench.pins, &number.to_le_bytes()).unwrap().unwrap();
        assert_eq!(found.version, number + 1);
        bench.pins.unpin(found.pin);
    }
}
