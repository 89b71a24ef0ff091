//! Attacks on the state, and the functions of honest workers that read and write it beside them.

use std::os::unix::fs::FileExt;

use praas_dataplane::object::{self, Header, rkyv};
use praas_dataplane::state_type;

use super::*;

const STATE: u8 = 19;
const STATE_REPLY: u8 = 20;
const MAP: u8 = 21;
const MAPPED: u8 = 22;
const PUT: u16 = 1;
const DELETE: u16 = 2;
const GET: u16 = 3;
const KEYS: u16 = 4;
const WHATEVER: u64 = u64::MAX;
/// Where the page of pins lies in a segment: an extent, and 255 versions.
const PINS_OFFSET: u64 = 12288;

state_type! {
    #[derive(Debug, PartialEq)]
    struct Model {
        name: String,
        rows: Vec<Row>,
    }

    #[derive(Debug, PartialEq)]
    struct Row {
        numbers: Vec<u64>,
        text: String,
    }
}

fn model() -> Model {
    let row = |at: u64| Row { numbers: (0..at).collect(), text: format!("row {at}") };
    Model { name: "honest".into(), rows: (0..40).map(row).collect() }
}

/// The functions that honest workers have besides.
pub(crate) fn honest(worker: Worker) -> Worker {
    worker
        .function("put", |context, input| {
            let mut arguments = input.args();
            let (key, value) = (arguments.next().unwrap_or_default(), arguments.next().unwrap_or_default());
            Ok(context.state().put(key, value)?.to_string().into())
        })
        .function("get", |context, input| {
            Ok(match context.state().get(&*input)? {
                Some(object) => object.to_vec().into(),
                None => Output::empty().with_status(1),
            })
        })
        .function("overwrite", |context, input| {
            // So many times 100 kB: all bytes of one are the same, and what was written is what is read.
            let count: u32 = String::from_utf8_lossy(&input).parse().unwrap_or(0);
            for round in 0..count {
                let value = vec![round.to_le_bytes()[0]; 100_000];
                context.state().put("hot", &value)?;
                if round % 16 == 0 && context.state().get("hot")?.is_none_or(|read| *read != *value) {
                    return Err(Failure::new(-3, "another object than was written"));
                }
            }
            Ok(count.to_string().into())
        })
        .function("keys", |context, _| Ok(context.state().keys()?.len().to_string().into()))
        .function("model", |context, input| {
            // All of it, again and again: what was right once stays right.
            let until = Instant::now() + Duration::from_millis(20);
            let mut reads = 0_u64;
            while Instant::now() < until {
                let Some(found) = context.state().get_typed::<Model>(&*input)? else {
                    return Ok(Output::empty().with_status(1));
                };
                let copy = rkyv::deserialize::<Model, rkyv::rancor::Error>(&*found);
                if copy.map_err(|error| Failure::new(-5, error.to_string()))? != model() {
                    return Err(Failure::new(-6, "another model"));
                }
                reads += 1;
            }
            Ok(reads.to_string().into())
        })
        .function("copy", |_, input| Ok(input.into()))
}

/// Header, value and key, as they lie in a block. The lengths are what the header says.
fn object(key: &[u8], value: &[u8], key_bytes: u16, value_bytes: u64) -> Vec<u8> {
    let mut bytes = b"PSO1".to_vec();
    bytes.extend_from_slice(&key_bytes.to_le_bytes());
    bytes.extend_from_slice(&[0; 2]);
    bytes.extend_from_slice(&value_bytes.to_le_bytes());
    bytes.extend_from_slice(&[0; 16]);
    bytes.extend_from_slice(value);
    bytes.extend_from_slice(key);
    bytes
}

fn true_object(key: &[u8], value: &[u8]) -> Vec<u8> {
    object(key, value, key.len() as u16, value.len() as u64)
}

impl Evil {
    /// A block of ours with these bytes; over queues there are none.
    pub(crate) fn block(&mut self, bytes: &[u8]) -> Option<BlockRef> {
        let Wire::Ring { arena, .. } = &mut self.wire else { return None };
        let mut block = arena.loan(bytes.len()).ok()?;
        block.copy_from_slice(bytes);
        Some(arena.lend(block, bytes.len(), ParticipantId::CONTROLLER))
    }

    fn free(&mut self, block: BlockRef) {
        if let Wire::Ring { arena, .. } = &mut self.wire {
            let _ = arena.release(ParticipantId::CONTROLLER, block.index, block.generation);
        }
    }

    /// Asks, without waiting for the answer before.
    fn ask(&mut self, op: u16, bytes: &[u8]) -> Option<BlockRef> {
        let block = self.block(bytes);
        let body = block.map_or(Body::Inline(Inline::empty()), Body::Block);
        self.send_with(Descriptor::new(STATE, op, 1, WHATEVER, body), Buffer::from(bytes));
        block
    }

    pub(crate) fn answer(&mut self, kind: u8) -> Descriptor {
        loop {
            let record = self.poll();
            if record.kind() & 0x7f == kind {
                return record;
            }
        }
    }

    /// Asks and waits. The answer's code.
    fn asked(&mut self, op: u16, bytes: &[u8]) -> u16 {
        let block = self.ask(op, bytes);
        let answer = self.answer(STATE_REPLY);
        if let (Some(block), true) = (block, answer.tag() != 0) {
            self.free(block);
        }
        answer.tag()
    }

    fn put_block(&mut self, block: BlockRef) {
        self.send(Descriptor::new(STATE, PUT, 1, WHATEVER, Body::Block(block)));
        self.answer(STATE_REPLY);
    }

    /// Says to itself and to whoever reads the log what came of it, and hangs if an answer is not the one that should be.
    pub(crate) fn expect(&mut self, code: u16, what: &str, found: u16) {
        if code != found {
            eprintln!("evil: {what}: code {found} instead of {code}");
            std::process::exit(99);
        }
    }

    pub(crate) fn attack_state(&mut self, name: &str) {
        let good = true_object(b"evil", b"a value of some length, so that it is no inline one");
        let block = BlockRef { owner: self.me, index: 0, generation: 0, offset: 0, len: 100 };
        match name {
            "state: an unknown question" => drop(self.ask(77, &good)),
            "state: a block far away" => self.put_block(BlockRef { offset: 1 << 40, ..block }),
            "state: a block too long" => self.put_block(BlockRef { len: 1 << 40, ..block }),
            "state: a block unaligned" => self.put_block(BlockRef { offset: 32, ..block }),
            "state: a neighbour's block" => {
                self.put_block(BlockRef { owner: ParticipantId::new(2).expect("below 64"), ..block });
            }
            "state: the controller's block" => self.put_block(BlockRef { owner: ParticipantId::CONTROLLER, ..block }),
            "state: nobody's block" => {
                self.put_block(BlockRef { owner: ParticipantId::new(60).expect("below 64"), ..block })
            }
            "state: delete a key of 1025 bytes" => drop(self.ask(DELETE, &[1; 1025])),
            "state: delete no key" => drop(self.ask(DELETE, b"")),
            "state: delete a key of a megabyte" => drop(self.ask(DELETE, &vec![1; 1 << 20])),
            "state: get over rings" => drop(self.ask(GET, b"evil")),
            "state: keys over rings" => drop(self.ask(KEYS, b"")),
            "state: map the controller" => self.tell(MAP, 0, 0, 0),
            "state: map nobody" => self.tell(MAP, 77, 1, 0),
            "state: map a number too large" => self.tell(MAP, 700, 1, 0),
            "state: a flood of puts" => {
                for _ in 0..20_000 {
                    if let Some(block) = self.ask(PUT, &good) {
                        self.free(block);
                    }
                }
            }
            "state: a flood of gets" => {
                self.asked(PUT, &true_object(b"large", &vec![1; 8 << 20]));
                for _ in 0..4000 {
                    self.ask(GET, b"large");
                }
            }
            "state: objects that are none" => {
                let value = [7; 100];
                let wrong = [
                    object(b"key", &value, 3, 101),
                    object(b"key", &value, 4, 100),
                    object(b"key", &value, 2, u64::MAX),
                    object(b"key", &value, u16::MAX, 100),
                    object(b"", &value, 0, 100),
                    object(&[1; 1025], &value, 1025, 100),
                    [b"PSO2", &good[4..]].concat(),
                    good[..31].to_vec(),
                    vec![0; 200],
                ];
                for bytes in wrong {
                    let code = self.asked(PUT, &bytes);
                    self.expect(12, "no object", code);
                }
                let code = self.asked(PUT, &good);
                self.expect(0, "an object", code);
            }
            "state: one block under many keys" => {
                let Some(block) = self.block(&good) else { return };
                for round in 0..50_u8 {
                    // Its key is rewritten under everybody's eyes.
                    self.overwrite(
                        &block,
                        &true_object(
                            &[b'e', round, b'i', b'l'],
                            b"a value of some length, so that it is no inline one",
                        ),
                    );
                    self.put_block(block);
                }
                for round in 0..50_u8 {
                    self.asked(DELETE, &[b'e', round, b'i', b'l']);
                }
            }
            "state: a header that flips" => {
                let Some(block) = self.block(&good) else { return };
                let lies = [
                    good.clone(),
                    object(b"evil", &good[32..83], 1000, 51),
                    object(b"evil", &good[32..83], 4, u64::MAX),
                    true_object(b"l", &good[32..86]),
                ];
                let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
                let (until, place) = (Instant::now() + Duration::from_millis(700), self.place(&block));
                let scribbler = std::thread::spawn({
                    let stop = Arc::clone(&stop);
                    move || {
                        let memory = own_memory();
                        while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                            for lie in &lies {
                                let _ = memory.write_all_at(&lie[..good.len()], place);
                            }
                        }
                    }
                });
                while Instant::now() < until {
                    self.put_block(BlockRef { len: 87, ..block });
                }
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
                scribbler.join().expect("it scribbles");
            }
            "state: a flood of maps" => {
                for id in 0..20_000 {
                    self.tell(MAP, 1 + (id % 63) as u16, id % 5, 0);
                }
            }
            "state: maps that lead nowhere" => {
                let me = u16::from(self.me.get());
                let lives = [(me, self.life), (me, 0), (me, u64::MAX), (2, 0), (2, 1 << 40), (63, 1), (2, self.life)];
                for (participant, life) in lives {
                    self.tell(MAP, participant, life, 0);
                    self.answer(MAPPED);
                }
            }
            "state: texts never given back" => {
                // Each refusal comes with a text in the controller's arena.
                for _ in 0..14_000 {
                    let code = self.asked(PUT, &true_object(b"evil", &[0; 2000]));
                    self.expect(6, "no space", code);
                }
            }
            "texts of calls never given back" => {
                for id in 0..30_000 {
                    self.tell(REQUEST, 999, id, u64::MAX);
                    let answer = self.answer(REPLY);
                    assert!(matches!(answer.body(), Body::Block(_)), "a text longer than a record");
                }
            }
            "state: fill it" => {
                let value = vec![0; 200_000];
                for key in 0_u32.. {
                    if self.asked(PUT, &true_object(&key.to_le_bytes(), &value)) != 0 {
                        break;
                    }
                }
            }
            "state: pins that lie" => {
                // The versions that come next, so that each is seen as read from the first moment on; for a while the same, and then others
                // faster than anybody can look.
                let (base, memory) = (own_segment(), own_memory());
                let until = Instant::now() + Duration::from_secs(2);
                let mut round = 0;
                while Instant::now() < until {
                    round += 1;
                    self.ask(PUT, &good);
                    let version = self.answer(STATE_REPLY).aux();
                    let words = std::iter::once(u64::MAX).chain(version + 1..version + 256);
                    let page: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
                    let _ = memory.write_all_at(&page, base + PINS_OFFSET);
                    if round % 100 == 0 {
                        std::thread::sleep(Duration::from_millis(150));
                    }
                }
            }
            "state: scribble over an object" => {
                let mut aligned = rkyv::util::AlignedVec::<64>::new();
                aligned.resize(100_000, 0);
                let bytes = object::encode(&model(), &mut aligned).expect("it fits");
                let header = Header::typed::<Model>(5, &aligned[..bytes]);
                let whole = [&header.to_bytes()[..], &aligned[..bytes], b"typed"].concat();
                let block = self.ask(PUT, &whole);
                self.answer(STATE_REPLY);
                let Some(block) = block else { return };
                // Given back by now, if it was copied; ours to write either way.
                let (place, memory) = (self.place(&block), own_memory());
                let until = Instant::now() + Duration::from_millis(1500);
                let mut noise = whole.clone();
                let mut seed = 1_u64;
                while Instant::now() < until {
                    for byte in &mut noise {
                        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        *byte = (seed >> 56) as u8;
                    }
                    let _ = memory.write_all_at(&noise, place);
                }
            }
            _ => assert!(!name.starts_with("state:"), "no attack `{name}`"),
        }
    }

    /// Where a block of ours lies in our memory.
    fn place(&self, block: &BlockRef) -> u64 {
        let arena_bytes = match &self.wire {
            Wire::Ring { _own: own, .. } => own.config().arena_bytes,
            Wire::Queue { .. } => 0,
        };
        let (from, to) = own_mapping();
        from + (to - from - arena_bytes) + block.offset
    }

    pub(crate) fn overwrite(&self, block: &BlockRef, bytes: &[u8]) {
        own_memory().write_all_at(bytes, self.place(block)).expect("our own memory");
    }
}

fn own_memory() -> File {
    std::fs::OpenOptions::new().write(true).open("/proc/self/mem").expect("our memory")
}

fn own_segment() -> u64 {
    own_mapping().0
}

/// From where to where our segment lies: the one memory file that we may write.
fn own_mapping() -> (u64, u64) {
    let maps = BufReader::new(File::open("/proc/self/maps").expect("our maps")).lines().map_while(Result::ok);
    maps.filter(|line| line.contains("memfd:praas") && line.contains(" rw"))
        .find_map(|line| {
            let (from, to) = line.split_whitespace().next()?.split_once('-')?;
            Some((u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?))
        })
        .expect("a segment of our own")
}
