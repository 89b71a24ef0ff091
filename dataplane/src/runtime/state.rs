//! The state's memory: objects read from workers' blocks, blocks given back, and what dead workers left behind moved to our arena.

use std::collections::BTreeMap;

use praas_shm::pins::fence_before_looking;
use praas_shm::{Arena, Block, IndexConfig, IndexFile, IndexWriter, KEY_BYTES_MAX};

use super::*;
use crate::controller::state::{Bounds, Orphan, Put, Refused, Source, State};
use crate::object::{HEADER_BYTES, Header};
use crate::wire::StateOp;
use crate::wire::state::{FETCHED_HEAD_BYTES, encode_keys};

/// Of an orphan, copied before somebody else has a turn: about 30 us.
const ADOPT_BYTES: usize = 256 << 10;
/// Over rings objects that lie in our arena leave this part of it, a fourth, to payloads.
const PAYLOADS_SHARE: u64 = 4;
/// Pause before the next look when there is no memory to move an orphan to.
const NO_ROOM_NS: u64 = 100_000_000;
/// Pauses between two looks whether an old object is read still.
const LOOK_NS: u64 = 1_000_000;
const LOOK_MAX_NS: u64 = 1_000_000_000;

/// The state and what goes with it.
#[derive(Debug)]
pub(super) struct Objects {
    state: State,
    file: IndexFile,
    /// Queue channel: where objects are kept. Over rings: the process's arena.
    arena: Option<Arena>,
    /// Segments of dead workers that have objects, by life.
    estates: BTreeMap<u32, Estate>,
    adoption: Option<Adoption>,
    /// When to go on moving orphans, and to look for who still reads what is old.
    adopt_due_ns: u64,
    look_due_ns: u64,
    look_pause_ns: u64,
    /// Empty between turns: versions that are read.
    pinned: Vec<u64>,
    isolate: bool,
}

#[derive(Debug)]
struct Estate {
    participant: WorkerId,
    incarnation: u64,
    file: SegmentFile,
    segment: Arc<PeerSegment>,
    /// Bit `n`: worker `n` has it.
    known: u64,
}

/// An orphan on its way.
#[derive(Debug)]
struct Adoption {
    orphan: Orphan,
    view: praas_shm::BlockView,
    block: Block,
    copied: usize,
}

impl Objects {
    pub(super) fn new(config: &ProcessConfig, identity: &praas_shm::Identity) -> Result<Objects, ProcessError> {
        let (index, file) = IndexWriter::create(identity, &IndexConfig { objects_max: config.state_objects_max })?;
        let arena = match config.ipc {
            Ipc::Ring => None,
            Ipc::Queue => Some(private_arena(config, identity)?),
        };
        let limits = limits(config);
        let own_bytes_max = match config.ipc {
            Ipc::Ring => config.arena_bytes - config.arena_bytes / PAYLOADS_SHARE,
            Ipc::Queue => config.arena_bytes,
        };
        let (bytes_max, object_bytes_max) = (limits.bytes_max, limits.object_bytes_max);
        let bounds = Bounds { bytes_max, object_bytes_max, own_bytes_max };
        Ok(Objects {
            state: State::new(index, bounds),
            file,
            arena,
            estates: BTreeMap::new(),
            adoption: None,
            adopt_due_ns: u64::MAX,
            look_due_ns: u64::MAX,
            look_pause_ns: LOOK_NS,
            pinned: Vec::new(),
            isolate: config.isolate,
        })
    }

    /// To be handed to workers.
    pub(super) fn file(&self) -> &IndexFile {
        &self.file
    }

    /// When [`Process::tend_state`] has to be called next.
    pub(super) fn due_ns(&self) -> u64 {
        self.adopt_due_ns.min(self.look_due_ns)
    }
}

/// Memory that workers cannot see, for objects that travel in messages.
fn private_arena(config: &ProcessConfig, identity: &praas_shm::Identity) -> Result<Arena, ProcessError> {
    let segment = segment_config(config);
    let file = SegmentFile::create(&segment)?;
    let own = OwnSegment::map(&file, identity, &segment)?;
    file.seal_future_write()?;
    Ok(own.arena()?)
}

/// The bounds of the state. What travels in messages is no longer than a payload.
pub(super) fn limits(config: &ProcessConfig) -> wire::StateLimits {
    let in_message =
        config.payload_bytes_max.saturating_sub((HEADER_BYTES + KEY_BYTES_MAX + FETCHED_HEAD_BYTES) as u64);
    wire::StateLimits {
        objects_max: config.state_objects_max,
        object_bytes_max: match config.ipc {
            Ipc::Ring => config.state_object_bytes_max,
            Ipc::Queue => config.state_object_bytes_max.min(in_message),
        },
        bytes_max: config.state_bytes_max,
    }
}

impl Process {
    /// Which life of its worker a seat is, counted from ours. `None`: nobody has it now.
    fn life_of(&self, worker: WorkerId) -> Option<u32> {
        let seat = self.seats[usize::from(worker)].as_ref()?;
        Some(u32::try_from(seat.incarnation - self.incarnation).unwrap_or(u32::MAX))
    }

    pub(super) fn on_state(
        &mut self,
        now: u64,
        worker: WorkerId,
        descriptor: &Descriptor,
        heap: Option<Buffer>,
    ) -> Result<(), Violation> {
        let op =
            StateOp::from_wire(descriptor.tag()).ok_or(Violation("a question about the state that there is not"))?;
        let (question, expected) = (descriptor.id(), descriptor.aux());
        if self.shared.is_some() && matches!(op, StateOp::Get | StateOp::Keys) {
            return Err(Violation("a question that it can answer itself"));
        }
        let bytes = match (descriptor.body(), heap) {
            (Body::Block(block), _) => {
                let own = ParticipantId::new(worker).expect("workers have participant numbers");
                if block.owner != own {
                    return Err(Violation("state in somebody else's memory"));
                }
                let Some(segment) = self.segment_of(own) else {
                    return Err(Violation("a block, in a channel that has none"));
                };
                let view = segment.view(&block).map_err(|_| Violation("a block out of bounds"))?;
                Asked::Block(view)
            }
            (_, Some(buffer)) if !buffer.as_ref().is_empty() => Asked::Heap(buffer),
            (Body::Inline(inline), _) => Asked::Inline(inline),
        };
        match op {
            StateOp::Put => {
                let put = self.put_object(worker, expected, &bytes);
                if let (Ok(_), Asked::Block(view), true) = (&put, &bytes, self.objects.isolate) {
                    // Copied: its owner has it back.
                    self.send(worker, Descriptor::new(record::RELEASE, 0, 0, 0, Body::Block(*view.block())), None);
                }
                self.sweep_after_writing(now);
                self.answer_state(worker, question, put.map(|version| (version, Vec::new())));
            }
            StateOp::Delete => {
                let mut key = [0; KEY_BYTES_MAX];
                let key =
                    copy_key(bytes.as_ref(), &mut key).ok_or(Violation("a key of no length that a key may have"))?;
                let arena = arena_of(&mut self.objects.arena, &mut self.store.arena);
                let deleted = self.objects.state.delete(key, expected, arena);
                self.sweep_after_writing(now);
                self.answer_state(worker, question, deleted.map(|existed| (u64::from(existed), Vec::new())));
            }
            StateOp::Get => {
                let mut key = [0; KEY_BYTES_MAX];
                let key =
                    copy_key(bytes.as_ref(), &mut key).ok_or(Violation("a key of no length that a key may have"))?;
                let arena = arena_of(&mut self.objects.arena, &mut self.store.arena);
                let looked = self.objects.state.look(key, arena);
                let fetched = looked.map_or((0, Vec::new()), |looked| {
                    let mut fetched = Vec::with_capacity(FETCHED_HEAD_BYTES + looked.bytes.len());
                    fetched.extend_from_slice(&looked.written_us.to_le_bytes());
                    fetched.extend_from_slice(looked.bytes);
                    (looked.version, fetched)
                });
                self.answer_state(worker, question, Ok(fetched));
            }
            StateOp::Keys => {
                let arena = arena_of(&mut self.objects.arena, &mut self.store.arena);
                let keys = encode_keys(&self.objects.state.keys(arena));
                let answer = if keys.len() as u64 > self.config.payload_bytes_max {
                    Err(Refused::TooLarge(format!(
                        "the keys take {} bytes, a message may have {}",
                        keys.len(),
                        self.config.payload_bytes_max
                    )))
                } else {
                    Ok((0, keys))
                };
                self.answer_state(worker, question, answer);
            }
        }
        if let Asked::Heap(buffer) = bytes {
            self.recycle(buffer);
        }
        Ok(())
    }

    fn put_object(&mut self, worker: WorkerId, expected: u64, bytes: &Asked) -> Result<u64, Refused> {
        let malformed = Refused::Malformed("bytes that are no object");
        let object = bytes.as_ref();
        // A copy, since its writer may still write: checked once, and then used.
        let head: [u8; HEADER_BYTES] = object.first_chunk().copied().ok_or(malformed.clone())?;
        let header = Header::parse(&head, object.len() as u64).map_err(|_| malformed)?;
        let mut key = [0; KEY_BYTES_MAX];
        let key = &mut key[..usize::from(header.key_bytes())];
        key.copy_from_slice(&object[object.len() - key.len()..]);
        let source = match bytes {
            Asked::Block(view) if !self.objects.isolate => {
                let life = self.life_of(worker).expect("a worker that speaks has a seat");
                Source::Lent { life, block: *view.block() }
            }
            _ => Source::Copied(object),
        };
        let put = Put { key, expected, value_bytes: header.value_bytes(), now_us: unix_ns() / 1000, source };
        self.objects.state.put(&put, arena_of(&mut self.objects.arena, &mut self.store.arena))
    }

    fn answer_state(&mut self, worker: WorkerId, question: u64, answer: Result<(u64, Vec<u8>), Refused>) {
        let (code, version, bytes) = match answer {
            Ok((version, bytes)) => (Code::Ok, version, bytes),
            Err(Refused::Conflict { current }) => (Code::Conflict, current, Vec::new()),
            Err(Refused::TooLarge(text)) => (Code::TooLarge, 0, text.into_bytes()),
            Err(Refused::NoSpace(text)) => (Code::NoSpace, 0, text.into_bytes()),
            Err(Refused::Malformed(text)) => (Code::Protocol, 0, text.into()),
        };
        let me = ParticipantId::new(worker).expect("workers have participant numbers");
        let (body, heap) = self.body_of_bytes(&bytes, me);
        self.answer_question(worker, question, code, version, body, heap);
    }

    /// A worker wants to read a segment that it does not know.
    pub(super) fn on_map(&mut self, worker: WorkerId, tag: u16, life: u64) -> Result<(), Violation> {
        let owner =
            u8::try_from(tag).ok().and_then(ParticipantId::new).filter(|owner| *owner != ParticipantId::CONTROLLER);
        let owner = owner.ok_or(Violation("asked for a segment that there is not"))?;
        if self.objects.isolate && owner.get() != worker {
            return Err(Violation("asked for a segment, when nobody reads another's"));
        }
        let incarnation = self.incarnation.saturating_add(life);
        let lives = self.seats[owner.index()].as_ref().is_some_and(|seat| seat.incarnation == incarnation);
        let estate = u32::try_from(life).ok().and_then(|life| self.objects.estates.get_mut(&life));
        let mut gone = 0;
        if let (true, Some(seat)) = (owner.get() == worker, &mut self.seats[usize::from(worker)]) {
            // It is out of memory: blocks of its own that wait for room go before the answer. Who is deaf is found out by that.
            let _ = seat.flush();
        } else if lives {
            self.introduce(worker, owner);
        } else if let Some(estate) = estate.filter(|estate| estate.participant == owner.get()) {
            if estate.known & (1 << worker) == 0 {
                let message = ToWorker::Estate { participant: estate.participant, incarnation: estate.incarnation };
                match estate.file.try_clone() {
                    Ok(file) => {
                        estate.known |= 1 << worker;
                        self.notify(worker, &message, &[file.fd()]);
                    }
                    Err(error) => {
                        tracing::warn!(worker, %error, "no descriptors to show a segment");
                        gone = 1;
                    }
                }
            }
        } else {
            gone = 1;
        }
        self.tell(worker, record::MAPPED, tag, life, gone);
        Ok(())
    }

    /// A worker is dead: what it left in its segment stays readable until it is moved. No descriptor is needed for that: there may be none.
    pub(super) fn keep_estate(&mut self, now: u64, worker: WorkerId, seat: Seat) {
        for estate in self.objects.estates.values_mut() {
            estate.known &= !(1 << worker);
        }
        let life = u32::try_from(seat.incarnation - self.incarnation).unwrap_or(u32::MAX);
        if !self.objects.state.ended(life) {
            return;
        }
        let Channel::Ring { file, segment, .. } = seat.channel else { return };
        let estate = Estate { participant: worker, incarnation: seat.incarnation, file, segment, known: 0 };
        self.objects.estates.insert(life, estate);
        self.objects.adopt_due_ns = now;
    }

    /// Gives back what nobody reads any more, and moves what dead workers left. A little at a time.
    pub(super) fn tend_state(&mut self, now: u64) {
        if now >= self.objects.look_due_ns {
            self.sweep_state();
            let still = self.objects.state.has_retired();
            let objects = &mut self.objects;
            objects.look_pause_ns = if still { (objects.look_pause_ns * 2).min(LOOK_MAX_NS) } else { LOOK_NS };
            objects.look_due_ns = if still { now + objects.look_pause_ns } else { u64::MAX };
        }
        if now >= self.objects.adopt_due_ns {
            self.adopt(now);
        }
    }

    /// Before the answer, so that who overwrites a large object has the old one's memory when it writes the next.
    fn sweep_after_writing(&mut self, now: u64) {
        self.sweep_state();
        if self.objects.state.has_retired() {
            self.objects.look_pause_ns = LOOK_NS;
            self.objects.look_due_ns = self.objects.look_due_ns.min(now + LOOK_NS);
        }
    }

    /// Gives back what nobody reads any more.
    fn sweep_state(&mut self) {
        if !self.objects.state.has_retired() {
            return;
        }
        // Whoever pinned an object before we replaced it is seen to have done so after this.
        fence_before_looking();
        let mut pinned = std::mem::take(&mut self.objects.pinned);
        for worker in &self.seated {
            if let Some(Seat { channel: Channel::Ring { segment, .. }, .. }) = &self.seats[usize::from(*worker)] {
                segment.read_pins(&mut pinned);
            }
        }
        pinned.sort_unstable();
        let mut released = std::mem::take(&mut self.released);
        let arena = arena_of(&mut self.objects.arena, &mut self.store.arena);
        let is_read = |version| pinned.binary_search(&version).is_ok();
        self.objects.state.sweep(arena, is_read, |life, block| released.push((life, block)));
        pinned.clear();
        self.objects.pinned = pinned;
        for (life, block) in released.drain(..) {
            let worker = block.owner.get();
            if self.life_of(worker) == Some(life)
                && let Some(seat) = &mut self.seats[usize::from(worker)]
                && let Err(Deaf) = seat.give_back(block)
            {
                self.condemn(worker, Cause::Violation("it does not read its records"));
            }
        }
        self.released = released;
    }

    /// One step of moving what dead workers left into our arena.
    fn adopt(&mut self, now: u64) {
        let Objects { state, estates, adoption, .. } = &mut self.objects;
        let Some(arena) = &mut self.store.arena else { return };
        let mut due_ns = now;
        match adoption.take() {
            Some(mut moving) if state.is_current(&moving.orphan) => {
                let end = (moving.copied + ADOPT_BYTES).min(moving.view.len());
                moving.block[moving.copied..end].copy_from_slice(&moving.view[moving.copied..end]);
                moving.copied = end;
                if end < moving.view.len() {
                    *adoption = Some(moving);
                } else {
                    state.adopt(&moving.orphan, moving.block, arena);
                }
            }
            Some(moving) => state.give_up(moving.block, arena),
            None => {
                if let Some(orphan) = state.next_orphan() {
                    let view = estates.get(&orphan.life).and_then(|estate| estate.segment.view(&orphan.block).ok());
                    match view.and_then(|view| Some((state.loan_for(&orphan, arena)?, view))) {
                        Some((block, view)) => *adoption = Some(Adoption { orphan, view, block, copied: 0 }),
                        None => due_ns = now + NO_ROOM_NS,
                    }
                }
            }
        }
        let settled: Vec<u32> = estates.keys().copied().filter(|life| state.is_settled(*life)).collect();
        self.objects.adopt_due_ns = if state.has_orphans() || adoption.is_some() { due_ns } else { u64::MAX };
        for life in settled {
            let Some(estate) = self.objects.estates.remove(&life) else { continue };
            for worker in self.seated.clone() {
                if estate.known & (1 << worker) != 0 {
                    self.tell(worker, record::SETTLED, 0, life.into(), 0);
                }
            }
        }
    }
}

/// What came with a question.
enum Asked {
    Block(praas_shm::BlockView),
    Inline(Inline),
    Heap(Buffer),
}

impl AsRef<[u8]> for Asked {
    fn as_ref(&self) -> &[u8] {
        match self {
            Asked::Block(view) => view,
            Asked::Inline(inline) => inline.as_slice(),
            Asked::Heap(buffer) => buffer.as_ref(),
        }
    }
}

fn arena_of<'a>(own: &'a mut Option<Arena>, shared: &'a mut Option<Arena>) -> &'a mut Arena {
    own.as_mut().or(shared.as_mut()).expect("objects lie in one arena or the other")
}

/// A copy of a key, since its writer may still write it.
fn copy_key<'a>(bytes: &[u8], into: &'a mut [u8; KEY_BYTES_MAX]) -> Option<&'a [u8]> {
    let into = into.get_mut(..bytes.len()).filter(|key| !key.is_empty())?;
    into.copy_from_slice(bytes);
    Some(into)
}
