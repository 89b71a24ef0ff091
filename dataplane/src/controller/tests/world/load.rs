//! Payloads without bytes, and the books that each process keeps of its own.

use std::cell::Cell;
use std::rc::Rc;

use super::*;

/// Payloads of one life of a process: how many it has, and how many it lost sight of.
#[derive(Debug, Default)]
pub(super) struct Books {
    has: Cell<u64>,
    lost: Cell<u64>,
    /// The process is no more, and whatever it had went with it.
    closed: Cell<bool>,
}

impl Books {
    pub(super) fn has(&self) -> u64 {
        self.has.get()
    }

    pub(super) fn lost(&self) -> u64 {
        self.lost.get()
    }

    pub(super) fn close(&self) {
        self.closed.set(true);
    }
}

/// A payload. Whoever is done with it says so ([`Load::spend`]): one that is dropped is a leak.
#[derive(Debug)]
pub(super) struct Load {
    /// Of a request the invocation, of a result the execution, of a message that message.
    pub(super) name: u64,
    pub(super) bytes: usize,
    /// In whose memory it lies, if not in the process's own.
    pub(super) owner: Option<(WorkerId, u64)>,
    books: Option<Rc<Books>>,
}

impl Load {
    pub(super) fn new(books: &Rc<Books>, name: u64, bytes: usize, owner: Option<(WorkerId, u64)>) -> Load {
        books.has.set(books.has.get() + 1);
        // Short ones travel in the record.
        let owner = owner.filter(|_| bytes > praas_shm::INLINE_BYTES_MAX);
        Load { name, bytes, owner, books: Some(Rc::clone(books)) }
    }

    pub(super) fn spend(mut self) -> u64 {
        if let Some(books) = self.books.take() {
            books.has.set(books.has.get() - 1);
        }
        self.name
    }
}

impl Keep for Load {
    fn len_bytes(&self) -> usize {
        self.bytes
    }

    /// A result that is kept: nobody's memory but the process's own, and nobody's loss.
    fn copy(&self) -> Load {
        Load { name: self.name, bytes: self.bytes, owner: None, books: None }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if let Some(books) = self.books.take().filter(|books| !books.closed.get()) {
            books.lost.set(books.lost.get() + 1);
        }
    }
}

/// What a parcel is, as `runtime/parcels.rs` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Message,
    Call { call: u64, function: u16, deadline_ns: u64 },
    Answer { call: u64, code: Code },
    Cancel { call: u64 },
}

impl Kind {
    /// Clocks differ: what travels is how long the call may take, from when it is written.
    pub(super) fn on_the_wire(self, now_ns: u64) -> Kind {
        match self {
            Kind::Call { call, function, deadline_ns } => {
                Kind::Call { call, function, deadline_ns: deadline_ns.saturating_sub(now_ns).max(1) }
            }
            kind => kind,
        }
    }

    pub(super) fn off_the_wire(self, now_ns: u64) -> Kind {
        match self {
            Kind::Call { call, function, deadline_ns: budget_ns } => {
                Kind::Call { call, function, deadline_ns: now_ns + budget_ns }
            }
            kind => kind,
        }
    }
}

/// Something for another process.
#[derive(Debug)]
pub(super) struct Parcel {
    pub(super) kind: Kind,
    pub(super) key: Arc<[u8]>,
    pub(super) load: Load,
}

impl Keep for Parcel {
    fn len_bytes(&self) -> usize {
        self.key.len() + self.load.bytes
    }

    fn copy(&self) -> Parcel {
        unreachable!("parcels are not kept for whoever asks again")
    }
}
