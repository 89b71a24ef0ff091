//! The state as a worker has it: read where it lies, written by way of the controller.

use std::any::TypeId;

use super::*;
use crate::object::{HEADER_BYTES, Header};
use crate::wire::{StateOp, state};
use crate::worker::state::{Kept, KeyInfo, StateError};
use praas_shm::{Found, IndexReader, KEY_BYTES_MAX, PinId, Pins, PinsInUse, Place};

/// Objects of which we remember that they were checked, and as what. A power of two.
const CHECKED_MAX: usize = 1024;

/// What a worker needs to read the state without asking. Ring channel.
#[derive(Debug)]
pub(crate) struct SharedState {
    index: IndexReader,
    pins: Rc<Pins>,
    /// The controller's incarnation: lives are counted from it.
    base: u64,
    /// Our own segment, once we have read an object of our own.
    own: Option<Arc<PeerSegment>>,
    /// Segments of workers that died and left objects.
    estates: Vec<(u32, Arc<PeerSegment>)>,
}

impl SharedState {
    pub(crate) fn new(index: IndexReader, pins: Pins, base: u64) -> SharedState {
        SharedState { index, pins: Rc::new(pins), base, own: None, estates: Vec::new() }
    }
}

/// An object of somebody's, which stays as it is while this lives.
#[derive(Debug)]
pub(crate) struct Pinned {
    view: praas_shm::BlockView,
    pin: Option<PinId>,
    pins: Rc<Pins>,
}

impl Pinned {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.view
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Some(pin) = self.pin.take() {
            self.pins.unpin(pin);
        }
    }
}

impl Session {
    /// What the controller says about the state.
    pub(super) fn take_state_record(&mut self, descriptor: &Descriptor, heap: Option<Buffer>) {
        match descriptor.kind() & record::KIND {
            record::ANSWER => self.questions.answer = Some((*descriptor, heap)),
            record::MAPPED => {
                self.questions.mapped = Some((descriptor.tag(), descriptor.id(), descriptor.aux()));
            }
            record::SETTLED => {
                if let Some(shared) = &mut self.state {
                    shared.estates.retain(|(life, _)| u64::from(*life) != descriptor.id());
                }
            }
            _ => {}
        }
    }

    /// A segment that a dead worker left, to be read from.
    pub(super) fn take_estate(&mut self, number: u8, incarnation: u64, fd: OwnedFd) -> Result<(), Fatal> {
        let segment = crate::worker::attach(&self.welcome, number, incarnation, fd)?;
        let Some(shared) = &mut self.state else { return Err(Fatal("a segment, in a channel that has none".into())) };
        let life =
            u32::try_from(incarnation.saturating_sub(shared.base)).map_err(|e| fatal("a life out of range", e))?;
        shared.estates.push((life, segment));
        Ok(())
    }

    /// The current object of a key.
    pub(crate) fn state_get(&mut self, key: &[u8]) -> Result<Option<Kept>, StateError> {
        if self.state.is_none() {
            return self.state_fetch(key);
        }
        let mut missing = None;
        loop {
            let shared = self.state.as_ref().expect("checked above");
            let found = shared.index.get(&shared.pins, key).map_err(|PinsInUse| StateError::TooManyHeld)?;
            let Some(Found { version, place, value_bytes, key_bytes, written_us, entry, pin }) = found else {
                return Ok(None);
            };
            let pinned = |segment: &Arc<PeerSegment>| segment.view(&place.block(HEADER_BYTES as u64 + value_bytes));
            match self.segment_at(place).map(pinned) {
                Some(Ok(view)) => {
                    let object = Pinned { view, pin: Some(pin), pins: Rc::clone(&shared.pins) };
                    return Ok(Some(Kept::shared(object, version, written_us, key_bytes, entry)));
                }
                // Of the controller's words one is not believed less than of others'.
                Some(Err(bad)) => {
                    shared.pins.unpin(pin);
                    return Err(StateError::Protocol { text: bad.to_string() });
                }
                None => {
                    // Moved, when the segment is not there any more: then the index says so by now. If it names the same one again,
                    // the controller could not hand it over.
                    let whose = Some((place.participant, place.life));
                    let no_descriptors =
                        || StateError::NoSpace { text: "no descriptors to map the memory it lies in".into() };
                    let mapped = if missing == whose { Err(no_descriptors()) } else { self.map_segment(place) };
                    missing = whose;
                    if let Some(shared) = &self.state {
                        shared.pins.unpin(pin);
                    }
                    mapped?;
                }
            }
        }
    }

    #[inline]
    fn segment_at(&self, place: Place) -> Option<&Arc<PeerSegment>> {
        let shared = self.state.as_ref()?;
        let incarnation = shared.base + u64::from(place.life);
        if place.participant == self.me && incarnation == self.welcome.incarnation {
            return shared.own.as_ref();
        }
        match &self.peers[place.participant.index()] {
            Some(peer) if peer.incarnation == incarnation => Some(&peer.segment),
            _ => shared.estates.iter().find(|(life, _)| *life == place.life).map(|(_, segment)| segment),
        }
    }

    /// Makes a segment readable that was not so far: our own, or, by the controller's leave, somebody else's.
    #[cold]
    fn map_segment(&mut self, place: Place) -> Result<(), StateError> {
        let protocol = |text: String| StateError::Protocol { text };
        let incarnation = self.state.as_ref().map_or(0, |shared| shared.base) + u64::from(place.life);
        if place.participant == self.me && incarnation == self.welcome.incarnation {
            let Channel::Ring { own, .. } = &self.channel else { return Ok(()) };
            let own = own.as_peer().map_err(|error| protocol(error.to_string()))?;
            if let Some(shared) = &mut self.state {
                shared.own = Some(own);
            }
            return Ok(());
        }
        let (participant, life) = (u16::from(place.participant.get()), u64::from(place.life));
        self.questions.mapped = None;
        self.tell_controller(record::MAP, participant, life, 0).unwrap_or_else(|Fatal(text)| die(&text));
        self.await_controller(false, |session| session.questions.mapped.is_some());
        Ok(())
    }

    /// Asks about the state: the version, and bytes.
    fn ask_of_state(
        &mut self,
        op: StateOp,
        expected: u64,
        body: Body,
        heap: Option<Buffer>,
    ) -> Result<(u64, Bytes<'static>), StateError> {
        let question = Descriptor::new(record::STATE, op as u16, 0, expected, body);
        let (answer, bytes) = self.ask(&question, 0, heap, false);
        match Code::from_wire(answer.tag()) {
            Some(Code::Ok) => Ok((answer.aux(), bytes)),
            code => Err(StateError::from_wire(code, answer.aux(), bytes.as_ref())),
        }
    }

    /// Memory for an object, with its header and its key in place, and a value of `value_bytes` to be written.
    pub(crate) fn state_draft(&mut self, key: &[u8], value_bytes: usize) -> Result<Loan, StateError> {
        if !(1..=KEY_BYTES_MAX).contains(&key.len()) {
            return Err(StateError::KeyLength { bytes: key.len() });
        }
        let max = self.welcome.state.object_bytes_max;
        if value_bytes as u64 > max {
            return Err(StateError::TooLarge { bytes: value_bytes as u64, max });
        }
        let bytes = crate::object::object_bytes(value_bytes, key.len());
        if let Some(shared) = &self.state {
            // A hint, so that nobody writes a gigabyte in vain; who decides is the controller. What this replaces is not known here: it may be as long.
            let (used, max) = (shared.index.used_bytes(), self.welcome.state.bytes_max);
            if bytes as u64 > max {
                let text = format!("{bytes} bytes, all state may take {max} ({used} are taken); see --state-bytes-max");
                return Err(StateError::NoSpace { text });
            }
        }
        let mut loan = loop {
            match self.memory.object(bytes) {
                Ok(loan) => break loan,
                Err(full) if !self.take_returns() => return Err(StateError::NoSpace { text: full.to_string() }),
                Err(_) => {}
            }
        };
        loan[..HEADER_BYTES].copy_from_slice(&Header::raw(key.len(), value_bytes).to_bytes());
        loan[HEADER_BYTES + value_bytes..].copy_from_slice(key);
        Ok(loan)
    }

    /// Takes the blocks back that the controller has returned to us, or would if there were room: objects of ours that others have deleted while
    /// we were busy. Whether anything came.
    #[cold]
    fn take_returns(&mut self) -> bool {
        let (Some(shared), Some(arena)) = (&self.state, &self.memory.arena) else { return false };
        let (base, before) = (shared.base, arena.borrow().stats().used_bytes);
        // Asked once our ring has room: what waits for that comes before the answer.
        let mut ask = || -> Result<(), Fatal> {
            while self.poll_controller()? {}
            self.questions.mapped = None;
            self.tell_controller(record::MAP, self.me.get().into(), self.welcome.incarnation - base, 0)
        };
        ask().unwrap_or_else(|Fatal(text)| die(&text));
        self.await_controller(false, |session| session.questions.mapped.is_some());
        while self.poll_controller().unwrap_or_else(|Fatal(text)| die(&text)) {}
        self.memory.arena.as_ref().is_some_and(|arena| arena.borrow().stats().used_bytes < before)
    }

    /// Makes an object current, and says which version it is.
    pub(crate) fn state_publish(&mut self, object: Loan, expected: u64) -> Result<u64, StateError> {
        self.return_or_die();
        if self.memory.arena.is_none() {
            let Store::Heap(buffer) = object.into_store() else { unreachable!("a queue's memory is the heap") };
            return self
                .ask_of_state(StateOp::Put, expected, Body::Inline(Inline::empty()), Some(buffer))
                .map(|(version, _)| version);
        }
        let block = self.lend(object, ParticipantId::CONTROLLER);
        let published = self.ask_of_state(StateOp::Put, expected, Body::Block(block), None);
        if published.is_err() {
            self.released(Some(ParticipantId::CONTROLLER), Some(block));
        }
        published.map(|(version, _)| version)
    }

    /// Sends a key, and gives its memory back with the answer.
    fn ask_of_key(&mut self, op: StateOp, expected: u64, key: &[u8]) -> Result<(u64, Bytes<'static>), StateError> {
        if !(1..=KEY_BYTES_MAX).contains(&key.len()) {
            return Err(StateError::KeyLength { bytes: key.len() });
        }
        let no_space = |error: InvokeError| StateError::NoSpace { text: error.to_string() };
        let (body, carried, heap) = self.load(key.into(), ParticipantId::CONTROLLER).map_err(no_space)?;
        let answer = self.ask_of_state(op, expected, body, heap);
        self.unload(carried, ParticipantId::CONTROLLER);
        answer
    }

    pub(crate) fn state_delete(&mut self, key: &[u8], expected: u64) -> Result<bool, StateError> {
        self.ask_of_key(StateOp::Delete, expected, key).map(|(existed, _)| existed != 0)
    }

    /// Queue channel: a copy of the object.
    fn state_fetch(&mut self, key: &[u8]) -> Result<Option<Kept>, StateError> {
        let (version, bytes) = self.ask_of_key(StateOp::Get, 0, key)?;
        if version == 0 {
            return Ok(None);
        }
        state::Fetched::decode(bytes.as_ref())
            .map(|fetched| Some(Kept::copied(version, fetched, key.len())))
            .ok_or_else(|| StateError::Protocol { text: "an object that is none".into() })
    }

    pub(crate) fn state_keys(&mut self) -> Result<Vec<KeyInfo>, StateError> {
        if let Some(shared) = &self.state {
            let listed = shared.index.keys(&shared.pins).map_err(|PinsInUse| StateError::TooManyHeld)?;
            return Ok(listed.into_iter().map(KeyInfo::from).collect());
        }
        let (_, bytes) = self.ask_of_state(StateOp::Keys, 0, Body::Inline(Inline::empty()), None)?;
        let listed = state::decode_keys(bytes.as_ref());
        let listed = listed.ok_or_else(|| StateError::Protocol { text: "a list of keys that is none".into() })?;
        Ok(listed.into_iter().map(KeyInfo::from).collect())
    }

    /// Whether this version was checked to be of this type before.
    #[inline]
    pub(crate) fn was_checked(&self, entry: u32, version: u64, as_type: TypeId) -> bool {
        self.questions.checked.get(entry as usize % CHECKED_MAX) == Some(&(version, Some(as_type)))
    }

    pub(crate) fn now_checked(&mut self, entry: u32, version: u64, as_type: TypeId) {
        let checked = &mut self.questions.checked;
        if checked.is_empty() {
            checked.resize(CHECKED_MAX, (0, None));
        }
        checked[entry as usize % CHECKED_MAX] = (version, Some(as_type));
    }
}
