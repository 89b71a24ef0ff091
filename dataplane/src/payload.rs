//! What functions read and write: inputs, outputs, replies, and memory on loan for them.
//!
//! A payload of up to 40 bytes travels inside its record. A longer one stays where it was written and is handed over
//! by reference; dropping the handle gives the memory back to whoever lent it.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

use praas_shm::{Arena, Block, BlockRef, BlockView, Inline, LaneReceiver, NoSpace, ParticipantId};
use praas_transport::queue::Buffer;

use crate::error::InvokeError;
use crate::wire::args;

/// Names a block, whatever part of it is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct BlockKey {
    pub(crate) owner: ParticipantId,
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

impl From<&BlockRef> for BlockKey {
    #[inline]
    fn from(block: &BlockRef) -> BlockKey {
        BlockKey { owner: block.owner, index: block.index, generation: block.generation }
    }
}

/// Where a borrowed block came from: it is returned there, and only to that life of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Giver {
    pub(crate) participant: ParticipantId,
    pub(crate) incarnation: u64,
}

/// A worker's payload memory: its own arena (ring channel) or the heap (queue channel).
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) arena: Option<RefCell<Arena>>,
    /// Blocks we are done with, to be told to their givers at the next opportunity.
    pub(crate) returned: RefCell<Vec<(Giver, BlockRef)>>,
    pub(crate) payload_bytes_max: u64,
    /// The block of the request being served, while its input lives: the answer gives it back by itself.
    pub(crate) current: Cell<Option<BlockKey>>,
    /// The same of the requests that are run together, those whose input lives.
    pub(crate) batch: RefCell<Vec<BlockKey>>,
    /// Queue channel: buffers to use again.
    pub(crate) spare: RefCell<Vec<Buffer>>,
}

/// Buffers kept for later. An input, an output and their replies are in use at once.
const SPARE_MAX: usize = 4;

impl Memory {
    pub(crate) fn loan(self: &Rc<Self>, bytes: usize) -> Result<Loan, InvokeError> {
        if bytes as u64 > self.payload_bytes_max {
            let text = format!("{bytes} bytes, the process allows {}", self.payload_bytes_max);
            return Err(InvokeError::TooLarge { text });
        }
        self.object(bytes).map_err(no_space)
    }

    /// Memory for an object of the state, which has a limit of its own.
    pub(crate) fn object(self: &Rc<Self>, bytes: usize) -> Result<Loan, NoSpace> {
        let store = match &self.arena {
            Some(arena) => Store::Block(arena.borrow_mut().loan(bytes)?),
            None => Store::Heap(self.buffer(bytes)),
        };
        Ok(Loan { store: Some(store), memory: Rc::clone(self) })
    }

    fn buffer(&self, bytes: usize) -> Buffer {
        let mut spare = self.spare.borrow_mut();
        match spare.iter().position(|buffer| buffer.capacity() >= bytes) {
            Some(at) => {
                let mut buffer = spare.swap_remove(at);
                buffer.set_len(bytes);
                buffer
            }
            None => Buffer::with_len(bytes),
        }
    }

    pub(crate) fn recycle(&self, buffer: Buffer) {
        let mut spare = self.spare.borrow_mut();
        if spare.len() < SPARE_MAX && buffer.capacity() > 0 {
            spare.push(buffer);
        }
    }

    /// Begins with a request whose input lies in `block`.
    #[inline(always)]
    pub(crate) fn serve(&self, block: Option<BlockKey>) {
        self.current.set(block);
    }

    /// One more request that is run together with others.
    pub(crate) fn serve_with(&self, block: Option<BlockKey>) {
        self.batch.borrow_mut().extend(block);
    }

    /// The next of those that were run together is answered: it counts as the one that is served.
    pub(crate) fn answer_of_batch(&self, block: Option<BlockKey>) {
        self.serve(block.filter(|block| self.take_from_batch(block)));
    }

    fn take_from_batch(&self, block: &BlockKey) -> bool {
        let mut batch = self.batch.borrow_mut();
        let at = batch.iter().position(|other| other == block);
        at.map(|at| batch.swap_remove(at)).is_some()
    }

    /// Whether the input of the request still lives. Its block is then returned when it is dropped.
    #[inline(always)]
    pub(crate) fn served(&self) -> bool {
        self.current.take().is_some()
    }

    /// A block is not read any more. True when it is the request's, which goes back with the answer.
    fn let_go(&self, block: &BlockRef) -> bool {
        let is_current = self.current.get() == Some(BlockKey::from(block));
        if is_current {
            self.current.set(None);
            return true;
        }
        !self.batch.borrow().is_empty() && self.take_from_batch(&BlockKey::from(block))
    }

    pub(crate) fn adopt(self: &Rc<Self>, block: Block) -> Loan {
        Loan { store: Some(Store::Block(block)), memory: Rc::clone(self) }
    }
}

pub(crate) fn no_space(error: NoSpace) -> InvokeError {
    InvokeError::NoSpace { text: error.to_string() }
}

#[derive(Debug)]
pub(crate) enum Store {
    Block(Block),
    Heap(Buffer),
}

/// Writable payload memory of this worker. Sent as input or output it is handed over without a copy; dropped, it goes back.
#[derive(Debug)]
pub struct Loan {
    /// Taken when the loan is sent.
    store: Option<Store>,
    memory: Rc<Memory>,
}

impl Loan {
    pub(crate) fn of_heap(buffer: Buffer, memory: &Rc<Memory>) -> Loan {
        Loan { store: Some(Store::Heap(buffer)), memory: Rc::clone(memory) }
    }

    /// Cuts it to its first `bytes` bytes.
    pub(crate) fn truncate(&mut self, bytes: usize) {
        match &mut self.store {
            Some(Store::Block(block)) => block.set_len(bytes),
            Some(Store::Heap(buffer)) => buffer.set_len(bytes),
            None => {}
        }
    }

    /// Where it lies, for somebody who reads it while it is kept. `None`: on the heap.
    pub(crate) fn place(&self) -> Option<BlockRef> {
        match (&self.store, &self.memory.arena) {
            (Some(Store::Block(block)), Some(arena)) => Some(arena.borrow().place_of(block)),
            _ => None,
        }
    }

    pub(crate) fn into_store(mut self) -> Store {
        self.store.take().expect("a loan has its memory until it is sent")
    }
}

impl Deref for Loan {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.store {
            Some(Store::Block(block)) => block,
            Some(Store::Heap(buffer)) => buffer.as_ref(),
            None => &[],
        }
    }
}

impl DerefMut for Loan {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.store {
            Some(Store::Block(block)) => block,
            Some(Store::Heap(buffer)) => buffer.as_mut(),
            None => &mut [],
        }
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        match (self.store.take(), &self.memory.arena) {
            (Some(Store::Block(block)), Some(arena)) => arena.borrow_mut().free(block),
            (Some(Store::Heap(buffer)), _) => self.memory.recycle(buffer),
            _ => {}
        }
    }
}

/// Somebody else's block, readable until dropped.
pub(crate) struct Held {
    view: Option<BlockView>,
    giver: Giver,
    /// Which life of its owner the block belongs to.
    owner_incarnation: u64,
    memory: Rc<Memory>,
}

impl Held {
    pub(crate) fn new(view: BlockView, giver: Giver, owner_incarnation: u64, memory: &Rc<Memory>) -> Held {
        Held { view: Some(view), giver, owner_incarnation, memory: Rc::clone(memory) }
    }

    pub(crate) fn owner_incarnation(&self) -> u64 {
        self.owner_incarnation
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        self.view.as_deref().expect("present until dropped")
    }

    pub(crate) fn block(&self) -> BlockRef {
        *self.view.as_ref().expect("present until dropped").block()
    }

    /// Lets go without telling the giver, who knows already.
    pub(crate) fn forget(mut self) {
        if let Some(view) = self.view.take() {
            self.memory.let_go(view.block());
        }
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held").field("giver", &self.giver).finish_non_exhaustive()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(view) = self.view.take()
            && !self.memory.let_go(view.block())
        {
            self.memory.returned.borrow_mut().push((self.giver, *view.block()));
        }
    }
}

/// Bytes of a message that came over a lane, readable until dropped; its sender is told then.
pub(crate) struct Laned {
    bytes: LanedBytes,
    receiver: Rc<RefCell<LaneReceiver>>,
    position: u64,
}

/// Where they are.
pub(crate) enum LanedBytes {
    /// In the sender's memory.
    Theirs(BlockView),
    /// In ours: we sent them before.
    Ours(Rc<Loan>),
}

impl Laned {
    /// The message of this position, which was polled.
    pub(crate) fn new(bytes: LanedBytes, receiver: &Rc<RefCell<LaneReceiver>>, position: u64) -> Laned {
        Laned { bytes, receiver: Rc::clone(receiver), position }
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        match &self.bytes {
            LanedBytes::Theirs(view) => view,
            LanedBytes::Ours(loan) => loan,
        }
    }

    /// The block and the position, if it came by this lane out of its sender's memory.
    pub(crate) fn came_by(&self, receiver: &Rc<RefCell<LaneReceiver>>) -> Option<(BlockRef, u64)> {
        match &self.bytes {
            LanedBytes::Theirs(view) if Rc::ptr_eq(receiver, &self.receiver) => Some((*view.block(), self.position)),
            _ => None,
        }
    }
}

impl fmt::Debug for Laned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Laned").field("position", &self.position).finish_non_exhaustive()
    }
}

impl Drop for Laned {
    fn drop(&mut self) {
        self.receiver.borrow_mut().release(self.position);
    }
}

/// Bytes that came from somebody or go to somebody. Short ones are here; `place` says where the others are.
///
/// Not an enum, so that the short ones are moved in whole pairs (`praas_shm`, `pair.rs`).
#[derive(Debug)]
pub(crate) struct Bytes<'a> {
    pub(crate) inline: Inline,
    pub(crate) place: Place<'a>,
}

#[derive(Debug)]
pub(crate) enum Place<'a> {
    /// In `inline`.
    Here,
    Slice(&'a [u8]),
    Vec(Vec<u8>),
    Held(Held),
    Laned(Laned),
    Own(Loan),
    Heap(Buffer),
}

impl<'a> From<Place<'a>> for Bytes<'a> {
    fn from(place: Place<'a>) -> Bytes<'a> {
        Bytes { inline: Inline::empty(), place }
    }
}

impl From<Inline> for Bytes<'_> {
    #[inline(always)]
    fn from(inline: Inline) -> Self {
        Bytes { inline, place: Place::Here }
    }
}

impl<'a> From<&'a [u8]> for Bytes<'a> {
    #[inline(always)]
    fn from(slice: &'a [u8]) -> Bytes<'a> {
        match Inline::new(slice) {
            Some(inline) => inline.into(),
            None => Place::Slice(slice).into(),
        }
    }
}

impl From<Vec<u8>> for Bytes<'_> {
    fn from(vec: Vec<u8>) -> Self {
        match Inline::new(&vec) {
            Some(inline) => inline.into(),
            None => Place::Vec(vec).into(),
        }
    }
}

impl Bytes<'_> {
    #[inline(always)]
    fn as_slice(&self) -> &[u8] {
        match &self.place {
            Place::Here => self.inline.as_slice(),
            Place::Slice(slice) => slice,
            Place::Vec(vec) => vec,
            Place::Held(held) => held.as_slice(),
            Place::Laned(laned) => laned.as_slice(),
            Place::Own(loan) => loan,
            Place::Heap(buffer) => buffer.as_ref(),
        }
    }

    /// The bytes, if they travel inside the record.
    #[inline(always)]
    pub(crate) fn short(&self) -> Option<Inline> {
        matches!(self.place, Place::Here).then_some(self.inline)
    }
}

impl AsRef<[u8]> for Bytes<'_> {
    #[inline]
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

/// What a function was given. Reads as a byte slice.
#[derive(Debug)]
pub struct Input {
    pub(crate) bytes: Bytes<'static>,
    pub(crate) is_args: bool,
}

impl Input {
    /// The arguments of the call: several when the caller sent several, else the whole input as one.
    /// A payload whose argument table does not add up is given as one argument, too.
    pub fn args(&self) -> impl Iterator<Item = &[u8]> {
        let all: &[u8] = self;
        let several = if self.is_args { args::decode(all) } else { None };
        several.unwrap_or_else(|| vec![all]).into_iter()
    }
}

impl Deref for Input {
    type Target = [u8];
    #[inline(always)]
    fn deref(&self) -> &[u8] {
        self.bytes.as_slice()
    }
}

/// What a called function answered. Reads as a byte slice.
#[derive(Debug)]
pub struct Reply {
    pub(crate) status: i32,
    pub(crate) bytes: Bytes<'static>,
}

impl Reply {
    /// The status the function returned, zero or above.
    #[must_use]
    pub fn status(&self) -> i32 {
        self.status
    }

    /// The caller's own memory back, when the called function answered with its input (an echo).
    ///
    /// # Errors
    /// The reply itself, when its bytes are somebody else's, or when there are none (queue channel).
    #[expect(clippy::result_large_err, reason = "the reply comes back whole, and neither way allocates")]
    pub fn into_loan(self) -> Result<Loan, Reply> {
        match self.bytes {
            Bytes { place: Place::Own(loan), .. } => Ok(loan),
            bytes => Err(Reply { status: self.status, bytes }),
        }
    }
}

impl Deref for Reply {
    type Target = [u8];
    #[inline(always)]
    fn deref(&self) -> &[u8] {
        self.bytes.as_slice()
    }
}

/// Bytes to send. A [`Loan`], an [`Input`] and a [`Reply`] are handed over without a copy; other bytes are copied
/// once into payload memory, or into the record itself up to 40 bytes.
#[derive(Debug)]
pub struct Payload<'a> {
    pub(crate) bytes: Bytes<'a>,
    pub(crate) is_args: bool,
}

impl Payload<'_> {
    /// Several arguments as one payload; [`Input::args`] takes it apart again.
    #[must_use]
    pub fn from_args(arguments: &[&[u8]]) -> Payload<'static> {
        let mut encoded = vec![0; args::encoded_bytes(arguments)];
        args::encode(arguments, &mut encoded);
        Payload { bytes: encoded.into(), is_args: true }
    }
}

macro_rules! payload_from {
    ($($(<$life:lifetime>)? $type:ty => |$value:ident| $bytes:expr),+ $(,)?) => {$(
        impl<'a> From<$type> for Payload<'a> {
            #[inline(always)]
            fn from($value: $type) -> Payload<'a> {
                Payload { bytes: $bytes, is_args: false }
            }
        }
    )+};
}
payload_from! {
    &'a [u8] => |slice| slice.into(),
    &'a Vec<u8> => |vec| vec.as_slice().into(),
    Vec<u8> => |vec| vec.into(),
    Loan => |loan| Place::Own(loan).into(),
    Reply => |reply| reply.bytes,
}

impl<'a, const N: usize> From<&'a [u8; N]> for Payload<'a> {
    fn from(array: &'a [u8; N]) -> Payload<'a> {
        array.as_slice().into()
    }
}

impl From<Input> for Payload<'_> {
    #[inline(always)]
    fn from(input: Input) -> Self {
        Payload { bytes: input.bytes, is_args: input.is_args }
    }
}

/// What a function returns: bytes, and a status of zero or above.
#[derive(Debug)]
pub struct Output {
    pub(crate) payload: Payload<'static>,
    pub(crate) status: i32,
}

impl Output {
    /// No bytes, status 0.
    #[must_use]
    pub fn empty() -> Output {
        Output::from(Payload { bytes: Inline::empty().into(), is_args: false })
    }

    /// The same bytes with another status, which is made zero when it is below.
    #[must_use]
    pub fn with_status(mut self, status: i32) -> Output {
        self.status = status.max(0);
        self
    }
}

impl From<Payload<'static>> for Output {
    #[inline(always)]
    fn from(payload: Payload<'static>) -> Output {
        Output { payload, status: 0 }
    }
}

macro_rules! output_from {
    ($($type:ty),+) => {$(
        impl From<$type> for Output {
            #[inline(always)]
            fn from(value: $type) -> Output {
                Output { payload: value.into(), status: 0 }
            }
        }
    )+};
}
output_from!(Loan, Input, Reply, Vec<u8>);

impl From<&[u8]> for Output {
    fn from(slice: &[u8]) -> Output {
        match Inline::new(slice) {
            Some(inline) => Payload { bytes: inline.into(), is_args: false }.into(),
            None => slice.to_vec().into(),
        }
    }
}

impl<const N: usize> From<&[u8; N]> for Output {
    fn from(array: &[u8; N]) -> Output {
        array.as_slice().into()
    }
}

impl From<String> for Output {
    fn from(text: String) -> Output {
        text.into_bytes().into()
    }
}
