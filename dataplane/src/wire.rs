//! The words of the protocol: kinds of frames between client and process, kinds of records between controller and
//! workers, and the codes a call can end with. Numbers here are on the wire; adding is fine, changing is a new version.

use praas_shm::{Descriptor, Inline};
use praas_transport::hello::Versions;
use praas_transport::{Seal, Terms};
use serde::{Deserialize, Serialize};

use crate::config::Ipc;
use crate::placement::Patience;

/// Version of everything in this file, and of the frames it travels in. The two ends of a hello agree on one.
pub const PROTOCOL_VERSION: u32 = 1;
/// Those that this build speaks.
pub const VERSIONS: Versions = Versions { min: PROTOCOL_VERSION, max: PROTOCOL_VERSION };

/// Longest time that a request may give its function: a day.
pub(crate) const BUDGET_MAX_NS: u64 = 86_400_000_000_000;

/// When a request that arrives now is to have ended; one that names no budget gets the process's.
pub(crate) fn deadline_ns(now_ns: u64, budget_ns: u64, default_ns: u64) -> u64 {
    let budget_ns = if budget_ns == 0 { default_ns } else { budget_ns.min(BUDGET_MAX_NS) };
    now_ns.saturating_add(budget_ns)
}

/// Frames between a client and a process ([`praas_transport::frame::Header::kind`]).
pub mod frame {
    // 1 was a hello, which is no frame any more.
    /// Process → client, the first frame after the hello: `aux` is the protocol version, the body a [`super::Welcome`] in JSON. To
    /// another process without a body.
    pub const WELCOME: u8 = 2;
    /// Client → process: `call`, `function`, `budget_ns`, flags, body. With [`FLAG_ONCE`], `aux` is the lowest such call that has
    /// no answer yet.
    pub const REQUEST: u8 = 3;
    /// Process → client: `call`, `flags` = [`super::Code`], `status`, body (result, or the error's text).
    pub const REPLY: u8 = 4;
    /// Client → process: nobody waits for `call` any more.
    pub const CANCEL: u8 = 5;
    /// Client → process, process ↔ process: are you there?
    pub const PING: u8 = 6;
    /// Process → client, process ↔ process: yes.
    pub const PONG: u8 = 7;
    /// Process → process, of two that were told of each other by the one whose name is the smaller: this is the connection between us.
    pub const CONFIRM: u8 = 8;
    /// Process → process, the last frame: `flags` say why it closes the connection.
    pub const GOODBYE: u8 = 9;

    /// Process → process: a message under the frame's key. `call` is the parcel's number, `function` how many before it have no verdict yet.
    pub const MESSAGE: u8 = 10;
    /// Process → process: a call of the function that is the frame's key, numbered as a message; `aux` names the call, `budget_ns`, flags.
    pub const CALL: u8 = 11;
    /// Process → process: the answer to the call `aux`, numbered as a message; `flags` = [`super::Code`], with [`FLAG_ARGS`] at bit 15; `status`, body.
    pub const ANSWER: u8 = 12;
    /// Process → process, numbered as a message: nobody waits for the call `aux` any more.
    pub const CALL_OFF: u8 = 13;
    /// Process → process: the parcel `call` was stored, or refused with the [`super::Code`] in `flags`.
    pub const VERDICT: u8 = 14;

    /// Control plane → process: the body is a table of members ([`crate::members::Table`]), `call` the sender's number for it.
    pub const MEMBERS: u8 = 15;
    /// Process → control plane: the table `call` is in force, and `aux` is its generation; or, with 1 in `flags`, it was refused, and the body is a
    /// [`crate::members::MembersError`] in JSON.
    pub const MEMBERS_TAKEN: u8 = 16;
    /// Leader → follower: let us share memory. The key is a token (see `runtime/near.rs`), `aux` the longest payload that the leader takes, bytes.
    pub const NEAR_OFFER: u8 = 20;
    /// Process → process: no memory is shared over this link. The key is why.
    pub const NEAR_REFUSED: u8 = 21;
    /// Process → process: parcels and verdicts after this one stand in the shared memory.
    pub const NEAR_GO: u8 = 22;

    /// Flag of a request: the body is several arguments (see [`super::args`]).
    pub const FLAG_ARGS: u16 = 1;
    /// Flag of a request: running it twice does no harm, so it is sent again when a worker is lost.
    pub const FLAG_IDEMPOTENT: u16 = 2;
    /// Flag of a request: it may come again, on another connection of the session, and must not run again then.
    pub const FLAG_ONCE: u16 = 4;
    /// Flag of a request with [`FLAG_ONCE`]: it may have come before.
    pub const FLAG_AGAIN: u16 = 8;
    /// Flag of a request: nobody waits for an answer, and none is sent.
    pub const FLAG_FIRE: u16 = 16;
}

/// Records on a channel between two participants of a process (descriptor kind).
pub(crate) mod record {
    /// tag = function, id = call, aux = deadline (CLOCK_MONOTONIC ns), body = input.
    pub(crate) const REQUEST: u8 = 1;
    /// tag = code, id = call, aux = status, body = output or text. Ends the loan of the request's block,
    /// except for `Timeout` and `Cancelled`, where a `RELEASE` follows when the worker has let go.
    pub(crate) const REPLY: u8 = 2;
    /// body = a block the receiver gave us: we are done with it.
    pub(crate) const RELEASE: u8 = 3;
    /// A message waits on the control socket, to be read before whatever follows here.
    pub(crate) const NOTICE: u8 = 4;
    /// tag = participant, aux = cause: it died. Answered with `FORGOTTEN`.
    pub(crate) const PEER_GONE: u8 = 5;
    /// id = lease: the callee is to close it as soon as it is idle. Answered with `CLOSED`.
    pub(crate) const REVOKE: u8 = 6;
    /// id = lease: to its caller, who falls back to the controller. Answered with `DROPPED`.
    pub(crate) const ENDED: u8 = 7;
    /// id = lease, aux = first position the caller will use in its ring to the callee.
    pub(crate) const TAKEN: u8 = 8;
    /// id = lease: callee → controller.
    pub(crate) const CLOSED: u8 = 9;
    /// id = lease: caller → controller.
    pub(crate) const DROPPED: u8 = 10;
    /// tag = participant: whatever bound us to its dead incarnation is gone.
    pub(crate) const FORGOTTEN: u8 = 11;
    /// id = lease: a leased call ran past its deadline; the callee may hang.
    pub(crate) const OVERRUN: u8 = 12;
    /// Finish and exit.
    pub(crate) const SHUTDOWN: u8 = 13;
    /// id = call: nobody waits for it any more. To a worker: the function may ask. To the controller: a nested call of the worker's.
    pub(crate) const CANCEL: u8 = 14;
    /// id = call, aux = position of its request in the controller's ring: it was withdrawn as we took it, and does not run.
    pub(crate) const VOID: u8 = 15;

    /// A frame of the connection that was lent to us and is not ours to serve: see [`super::Forwarded`].
    pub(crate) const FORWARDED: u8 = 16;
    /// id = call, body = the payload of the `FORWARDED` before.
    pub(crate) const FORWARDED_BODY: u8 = 17;
    /// id = lease, tag = [`super::Return`], aux = frames received, body = frames sent (`u64`): the connection is the controller's again.
    pub(crate) const RETURNED: u8 = 18;

    /// tag = [`super::StateOp`], id = question, aux = expected version, body = object or key. Answered with `ANSWER`.
    pub(crate) const STATE: u8 = 19;
    /// To `STATE` or `MAIL`: tag = code, id = question, aux = version, number or (of a message) sender and bytes of the key at the end, body = what
    /// was asked for, or an error's text.
    pub(crate) const ANSWER: u8 = 20;
    /// tag = participant, id = life: a worker wants to read that segment. Answered with `MAPPED`. Its own: it wants to have back what others
    /// deleted of it, which comes before the answer.
    pub(crate) const MAP: u8 = 21;
    /// tag = participant, id = life, aux = 1: that segment is not there any more, and nothing current lies in it.
    pub(crate) const MAPPED: u8 = 22;
    /// id = life: nothing current lies in the segment that it left behind; let go of it.
    pub(crate) const SETTLED: u8 = 23;

    /// tag = [`super::MailOp`] and, from bit 4 on, bytes of the key at the end of the body; id = question and, from bit 48 on, number of a process;
    /// aux = deadline; body = payload, key or name. Answered with `ANSWER`, but `Key`.
    pub(crate) const MAIL: u8 = 24;
    /// body = key of the message in the `ANSWER` that follows.
    pub(crate) const KEY_IS: u8 = 25;
    /// id = the number that the next question will have, aux and body as in the `ANSWER` to a receive, the key with it: a message, should the
    /// next question be a receive that it answers. The worker accepts it, and does not ask, or asks as if it were not there.
    pub(crate) const OFFER: u8 = 26;

    /// Worker → controller: tag = number of another process, id = call, aux = deadline, body = input: a nested call of the function there whose
    /// name was said as a key ([`super::MailOp::Key`]) just before. Ends in a `REPLY`; a `CANCEL` calls it off; its block comes back as a `RELEASE`.
    pub(crate) const CALL_AT: u8 = 40;
    /// The same, and it may be sent to a later life of that process.
    pub(crate) const CALL_AT_ANY_LIFE: u8 = 43;

    /// tag = function, id = the first call, aux = deadline, body = their number (`u16`): so many `REQUEST`s that follow are one batch, and run
    /// together. Each has its `REPLY`, in their order.
    pub(crate) const BATCH: u8 = 41;
    /// As `BATCH`, but the body holds the number of a process (`u16`) for each of the `REQUEST`s that follow: their bodies are messages of those,
    /// for a function that runs for messages.
    pub(crate) const JOIN: u8 = 42;

    /// tag = [`super::lane`] bits, id = lane: what the worker may do with it from here on, or that it is over.
    pub(crate) const LANE: u8 = 50;

    /// Bit of the kind: the body holds several arguments.
    pub(crate) const ARGS: u8 = 0x80;
    /// Bit of a `CALL_AT`: it may run again when the worker that runs it is lost.
    pub(crate) const AGAIN: u8 = 0x40;
    /// Bit of a `REPLY`: the function still reads its input; the request's block stays lent until a `RELEASE`.
    pub(crate) const KEEPS: u8 = 0x40;
    /// The kind without its bits.
    pub(crate) const KIND: u8 = 0x3f;
}

/// How a call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Code {
    /// The function returned; the body is its output.
    Ok = 0,
    /// The function returned a negative status; the body is its text.
    Failed = 1,
    /// The function panicked; the body is the panic's message. Its worker is replaced.
    Panicked = 2,
    /// No such function.
    UnknownFunction = 3,
    /// A bound is reached; try again later.
    Busy = 4,
    /// Input or output above the process's limit.
    TooLarge = 5,
    /// The payload memory of a participant is full.
    NoSpace = 6,
    /// The deadline passed.
    Timeout = 7,
    /// The caller cancelled.
    Cancelled = 8,
    /// The worker died; the function may have run.
    WorkerLost = 9,
    /// The function killed its workers too often and is refused for a while.
    FunctionBroken = 10,
    /// The process is stopping.
    Draining = 11,
    /// A message broke the protocol.
    Protocol = 12,
    /// The call was sent again, and how it ended the first time is not known any more; it may have run.
    Expired = 13,
    /// Another version of an object is current than the one that was expected.
    Conflict = 14,
    /// No process of this name is a member of the application.
    UnknownProcess = 15,
    /// The life of the process that was to have it is over; it may have had it, where the text says so.
    PeerLost = 16,
    /// The process is swapped out, and who was to send does not wait for it. Nothing was sent.
    Swapped = 17,
}

impl Code {
    /// The code of a number from the wire.
    #[must_use]
    pub fn from_wire(number: u16) -> Option<Code> {
        use Code::*;
        const ALL: [Code; 18] = [
            Ok,
            Failed,
            Panicked,
            UnknownFunction,
            Busy,
            TooLarge,
            NoSpace,
            Timeout,
            Cancelled,
            WorkerLost,
            FunctionBroken,
            Draining,
            Protocol,
            Expired,
            Conflict,
            UnknownProcess,
            PeerLost,
            Swapped,
        ];
        ALL.get(usize::from(number)).copied()
    }

    /// Whether the request's block stays lent after this answer, until a `RELEASE`.
    pub(crate) fn leaves_block_lent(self) -> bool {
        matches!(self, Code::Timeout | Code::Cancelled)
    }
}

/// What a process tells a client at the start of a connection.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Welcome {
    /// Name of the process.
    pub process: String,
    /// Which life of that process this is.
    pub incarnation: u64,
    /// Largest input or output, bytes.
    pub payload_bytes_max: u64,
    /// Calls this connection may have in flight.
    pub calls_max: u32,
    /// Names of the functions; the index is the function's id.
    pub functions: Vec<String>,
}

/// Controller → worker, on the control socket, with file descriptors.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ToWorker {
    /// First message. Ring: own segment, own eventfd, controller's eventfd. Queue: queue in, queue out.
    Welcome(Box<WorkerWelcome>),
    /// Ring only, after `Mapped`: the controller is linked; its segment and the state index come along.
    Attached { incarnation: u64 },
    /// Another worker's segment and eventfd: blocks of its arena may follow.
    Peer { participant: u8, incarnation: u64 },
    /// The segment that a worker left which died: objects of the state lie there.
    Estate { participant: u8, incarnation: u64 },
    /// You may call `callee` directly; comes with the exchange page.
    Lease { lease: u64, callee: u8, patience: Patience },
    /// `caller` may call you directly, from `position` of its ring to you on; comes with the exchange page.
    Serve { lease: u64, caller: u8, position: u64, patience: Patience },
    /// A client's connection is yours until you return it; comes with its socket.
    Connection(Box<LentConnection>),
    /// Make a file for a lane. Answered with `FromWorker::Lane`.
    MakeLane { lane: u64 },
    /// Who you exchange messages with over the lane; comes with its file, its controller's, ours, and its segment.
    JoinLane(Box<JoinLane>),
}

/// The other end of a lane.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct JoinLane {
    pub(crate) lane: u64,
    /// The number of its process.
    pub(crate) process: u16,
    pub(crate) segment: LaneSegment,
    pub(crate) patience: Patience,
}

/// What a segment has to be that blocks of a lane lie in.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct LaneSegment {
    pub(crate) participant: u8,
    pub(crate) incarnation: u64,
    pub(crate) process_id: [u8; 16],
    pub(crate) ring_slots: u32,
    pub(crate) arena_bytes: u64,
}

/// What a worker is told about a lane ([`record::LANE`]).
pub(crate) mod lane {
    /// What it sends to that process may go over it.
    pub(crate) const SENDS: u16 = 1;
    /// What comes from that process comes over it, and from nowhere else.
    pub(crate) const RECEIVES: u16 = 2;
    /// It is closed, or will not be opened.
    pub(crate) const OVER: u16 = 4;
    /// Nobody reads what was sent over it any more. With `OVER`, or after it.
    pub(crate) const UNREAD: u16 = 8;
    /// Nobody knows what becomes of what was sent over it and not received. With `OVER`.
    pub(crate) const LOST: u16 = 16;

    /// `aux` of the answer to a `Receive`: look at the lane.
    pub(crate) const LOOK: u64 = u64::MAX;
}

/// What a worker needs to go on with a client's connection.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LentConnection {
    pub(crate) lease: u64,
    /// Its calls of this one are the worker's to serve.
    pub(crate) function: u16,
    pub(crate) patience: Patience,
    /// For a call that names none, ns.
    pub(crate) deadline_ns: u64,
    send: LentSeal,
    receive: LentSeal,
    payload_checksums: bool,
    incarnation: u64,
    peer_incarnation: u64,
}

/// A [`Seal`] on its way. Holds a session's key: crosses by the control socket only, and is never shown.
#[derive(Serialize, Deserialize)]
struct LentSeal {
    key: Option<[u8; 32]>,
    sequence: u64,
}

impl std::fmt::Debug for LentSeal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LentSeal").field("keyed", &self.key.is_some()).field("sequence", &self.sequence).finish()
    }
}

impl From<&Seal> for LentSeal {
    fn from(seal: &Seal) -> LentSeal {
        LentSeal { key: seal.key().copied(), sequence: seal.sequence() }
    }
}

impl From<LentSeal> for Seal {
    fn from(LentSeal { key, sequence }: LentSeal) -> Seal {
        key.map_or_else(Seal::default, Seal::keyed).at(sequence)
    }
}

impl LentConnection {
    pub(crate) fn new(lease: u64, function: u16, patience: Patience, deadline_ns: u64, terms: &Terms) -> Self {
        LentConnection {
            lease,
            function,
            patience,
            deadline_ns,
            send: (&terms.send).into(),
            receive: (&terms.receive).into(),
            payload_checksums: terms.payload_checksums,
            incarnation: terms.incarnation,
            peer_incarnation: terms.peer_incarnation,
        }
    }

    pub(crate) fn into_terms(self) -> Terms {
        Terms {
            send: self.send.into(),
            receive: self.receive.into(),
            payload_checksums: self.payload_checksums,
            incarnation: self.incarnation,
            peer_incarnation: self.peer_incarnation,
        }
    }
}

/// How a worker gives a connection back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Return {
    /// Nothing is under way on it.
    AtRest = 0,
    /// The client closed it.
    Closed = 1,
    /// The socket failed, or was closed in the middle of a frame.
    Lost = 2,
    /// What came was no frame, or not the one whose turn it was.
    NotFrames = 3,
    /// The client stalls in the middle of a frame.
    Stalled = 4,
    /// The client does not read its answer.
    Deaf = 5,
    /// At rest, and the worker is about to exit.
    Panicked = 6,
}

impl Return {
    pub(crate) fn from_wire(number: u16) -> Option<Return> {
        use Return::{AtRest, Closed, Deaf, Lost, NotFrames, Panicked, Stalled};
        [AtRest, Closed, Lost, NotFrames, Stalled, Deaf, Panicked].get(usize::from(number)).copied()
    }
}

/// The header of a frame that a worker read from a lent connection and does not serve. Its payload follows in a record of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Forwarded {
    pub(crate) kind: u8,
    pub(crate) flags: u16,
    pub(crate) function: u16,
    pub(crate) call: u64,
    pub(crate) budget_ns: u64,
    pub(crate) aux: u64,
    /// The payload was thrown away: why, and its bytes.
    pub(crate) refused: Option<(Code, u64)>,
    pub(crate) has_body: bool,
}

impl Forwarded {
    /// `kind`, refusal, flags, whether a body follows, padding, aux, refused bytes: 24 bytes, little-endian.
    pub(crate) fn to_record(&self) -> Descriptor {
        let mut body = [0; 24];
        let (code, refused_bytes) = self.refused.map_or((0, 0), |(code, bytes)| (code as u8, bytes));
        (body[0], body[1], body[4]) = (self.kind, code, u8::from(self.has_body));
        body[2..4].copy_from_slice(&self.flags.to_le_bytes());
        body[8..16].copy_from_slice(&self.aux.to_le_bytes());
        body[16..].copy_from_slice(&refused_bytes.to_le_bytes());
        let body = Inline::new(&body).expect("24 bytes fit");
        Descriptor::new(record::FORWARDED, self.function, self.call, self.budget_ns, body)
    }

    /// `None`: no such record.
    pub(crate) fn from_record(record: &Descriptor) -> Option<Forwarded> {
        let body = record.inline()?;
        let body: &[u8; 24] = body.as_slice().try_into().ok()?;
        let word = |at: usize| body[at..at + 8].try_into().map(u64::from_le_bytes).ok();
        let refused = match Code::from_wire(body[1].into())? {
            Code::Ok => None,
            code @ (Code::TooLarge | Code::NoSpace) => Some((code, word(16)?)),
            _ => return None,
        };
        Some(Forwarded {
            kind: body[0],
            flags: u16::from_le_bytes([body[2], body[3]]),
            function: record.tag(),
            call: record.id(),
            budget_ns: record.aux(),
            aux: word(8)?,
            refused,
            has_body: body[4] != 0,
        })
    }
}

/// The first message to a worker.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct WorkerWelcome {
    pub(crate) version: u32,
    pub(crate) participant: u8,
    pub(crate) incarnation: u64,
    pub(crate) process_id: [u8; 16],
    pub(crate) process: String,
    pub(crate) ipc: Ipc,
    /// Nobody else is to look into this worker's memory.
    pub(crate) isolate: bool,
    pub(crate) patience: Patience,
    /// Ring only: the machine has barriers, and under a lease whose ends spin the bell needs no fence.
    pub(crate) barriers: bool,
    pub(crate) ring_slots: u32,
    pub(crate) arena_bytes: u64,
    pub(crate) payload_bytes_max: u64,
    pub(crate) state: StateLimits,
}

/// What a worker has to know about the bounds of the state.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct StateLimits {
    pub(crate) objects_max: u32,
    pub(crate) object_bytes_max: u64,
    pub(crate) bytes_max: u64,
}

/// What a worker asks of the state ([`record::STATE`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum StateOp {
    /// Make this object current. Ring: its block is lent for good.
    Put = 1,
    /// Take this key's object away. The answer's version is 1 if there was one.
    Delete = 2,
    /// Queue channel: a copy of this key's object ([`state::Fetched`]); version 0: there is none.
    Get = 3,
    /// Queue channel: all keys ([`state::encode_keys`]).
    Keys = 4,
}

impl StateOp {
    pub(crate) fn from_wire(number: u16) -> Option<StateOp> {
        [StateOp::Put, StateOp::Delete, StateOp::Get, StateOp::Keys].into_iter().find(|op| *op as u16 == number)
    }
}

/// What a worker asks about messages ([`record::MAIL`]). A process has a number: 0 is this one, `u16::MAX` any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum MailOp {
    /// What follows is about this key, or about the function of this name. No question: a block comes back as a `RELEASE`.
    Key = 0,
    /// A message to a process, under the key at its end or the one said before.
    Send = 1,
    /// The oldest message of a process under the key that is the body, empty: any; by the deadline, 0: at once.
    Receive = 2,
    /// The number of the process that has this name.
    Resolve = 3,
    /// The name of the process that has this number.
    NameOf = 4,
    /// Names of processes: two lists, those that are active and those that are swapped out (JSON).
    Processes = 5,
    // 6 was a call of another process, which is a record of its own now.
    /// As `Receive`, by a worker that has looked at its lane from that process, and waits for more than comes over it.
    ReceiveLooked = 7,
}

impl MailOp {
    /// From the low four bits of a tag.
    pub(crate) fn from_wire(tag: u16) -> Option<MailOp> {
        use MailOp::{Key, NameOf, Processes, Receive, ReceiveLooked, Resolve, Send};
        [Key, Send, Receive, Resolve, NameOf, Processes, ReceiveLooked].into_iter().find(|op| *op as u16 == tag & 15)
    }
}

/// State, where it travels in messages.
pub(crate) mod state {
    use praas_shm::Listed;

    /// The expected version of who expects none.
    pub(crate) const WHATEVER: u64 = u64::MAX;

    /// An object as it is fetched: time of its writing (8 bytes), then header, value and key.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Fetched<'a> {
        pub(crate) written_us: u64,
        pub(crate) object: &'a [u8],
    }

    /// Bytes in front of a fetched object.
    pub(crate) const FETCHED_HEAD_BYTES: usize = 8;

    impl<'a> Fetched<'a> {
        pub(crate) fn decode(bytes: &'a [u8]) -> Option<Fetched<'a>> {
            let (written_us, object) = bytes.split_first_chunk()?;
            let whole = object.len() > crate::object::HEADER_BYTES;
            whole.then_some(Fetched { written_us: u64::from_le_bytes(*written_us), object })
        }
    }

    /// Four words (version, bytes of the value, time of writing, bytes of the key), then the key; for each.
    pub(crate) fn encode_keys(listed: &[Listed]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(listed.iter().map(|listed| 32 + listed.key.len()).sum());
        for Listed { key, version, value_bytes, written_us, .. } in listed {
            for word in [*version, *value_bytes, *written_us, key.len() as u64] {
                bytes.extend_from_slice(&word.to_le_bytes());
            }
            bytes.extend_from_slice(key);
        }
        bytes
    }

    pub(crate) fn decode_keys(mut bytes: &[u8]) -> Option<Vec<Listed>> {
        let mut listed = Vec::new();
        while let Some((words, rest)) = bytes.split_first_chunk::<32>() {
            let (words, _) = words.as_chunks::<8>();
            let [version, value_bytes, written_us, key_bytes] = std::array::from_fn(|at| u64::from_le_bytes(words[at]));
            let (key, rest) = rest.split_at_checked(usize::try_from(key_bytes).ok()?)?;
            listed.push(Listed { key: key.to_vec(), version, value_bytes, written_us, first: listed.len() as u64 });
            bytes = rest;
        }
        bytes.is_empty().then_some(listed)
    }
}

/// Worker → controller, on the control socket.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum FromWorker {
    /// Ring only: the worker mapped its segment, which can be sealed now.
    Mapped,
    /// The worker serves these functions.
    Ready {
        version: u32,
        functions: Vec<String>,
        /// Of those that are not called one by one.
        #[serde(default)]
        triggers: Vec<(u16, Trigger)>,
    },
    /// Its file for a lane, which comes along; without one there is none.
    Lane { lane: u64 },
}

/// What a function runs for, if not for one call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Trigger {
    /// For several calls: as many, or those that came so long after the first.
    Batch { calls: u16, wait_ns: u64 },
    /// For one message under each of these keys.
    Join { keys: Vec<Vec<u8>>, one_sender: bool, idempotent: bool },
}

/// Several arguments in one payload: `u32` count, `u32` length of each, then the bytes, little-endian.
pub mod args {
    /// Most arguments of one call.
    pub const ARGS_MAX: usize = 255;

    /// Bytes that `encode` will write.
    #[must_use]
    pub fn encoded_bytes(args: &[&[u8]]) -> usize {
        4 + args.iter().map(|arg| 4 + arg.len()).sum::<usize>()
    }

    /// Writes `args` into `out`, which is [`encoded_bytes`] long.
    ///
    /// # Panics
    /// When `out` is shorter, or there are more than [`ARGS_MAX`] arguments, or one is over 4 GiB.
    pub fn encode(args: &[&[u8]], out: &mut [u8]) {
        assert!(args.len() <= ARGS_MAX, "{} arguments, at most {ARGS_MAX}", args.len());
        let word = |length: usize| u32::try_from(length).expect("an argument is below 4 GiB").to_le_bytes();
        out[..4].copy_from_slice(&word(args.len()));
        let mut at = 4 + 4 * args.len();
        for (index, arg) in args.iter().enumerate() {
            out[4 + 4 * index..8 + 4 * index].copy_from_slice(&word(arg.len()));
            out[at..at + arg.len()].copy_from_slice(arg);
            at += arg.len();
        }
    }

    /// The arguments in `payload`, or `None` when the lengths do not add up.
    #[must_use]
    pub fn decode(payload: &[u8]) -> Option<Vec<&[u8]>> {
        let word = |at: usize| Some(u32::from_le_bytes(payload.get(at..at + 4)?.try_into().ok()?) as usize);
        let count = word(0)?;
        if count > ARGS_MAX {
            return None;
        }
        let mut at = 4 + 4 * count;
        let mut args = Vec::with_capacity(count);
        for index in 0..count {
            let bytes = word(4 + 4 * index)?;
            args.push(payload.get(at..at.checked_add(bytes)?)?);
            at += bytes;
        }
        (at == payload.len()).then_some(args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p6_arguments_read_back_and_every_truncation_is_refused() {
        let args: [&[u8]; 4] = [b"one", b"", b"three", &[7; 100]];
        let mut payload = vec![0; args::encoded_bytes(&args)];
        args::encode(&args, &mut payload);
        assert_eq!(args::decode(&payload).unwrap(), args);
        for bytes in 0..payload.len() {
            assert_eq!(args::decode(&payload[..bytes]), None, "{bytes} bytes");
        }
        payload.push(0);
        assert_eq!(args::decode(&payload), None);
    }

    #[test]
    fn a_forwarded_header_reads_back_and_a_secret_is_not_shown() {
        let plain = Forwarded {
            kind: frame::REQUEST,
            flags: frame::FLAG_ONCE | frame::FLAG_AGAIN,
            function: 7,
            call: u64::MAX - 1,
            budget_ns: 3,
            aux: 1 << 40,
            refused: None,
            has_body: true,
        };
        for head in [Forwarded { refused: Some((Code::TooLarge, 1 << 33)), has_body: false, ..plain.clone() }, plain] {
            assert_eq!(Forwarded::from_record(&head.to_record()), Some(head));
        }
        assert_eq!(Forwarded::from_record(&Descriptor::bare(record::FORWARDED, 0, 0, 0)), None);
        let terms = Terms { send: Seal::keyed([0x5a; 32]).at(9), ..Terms::default() };
        let lent = LentConnection::new(1, 2, Patience::NONE, 3, &terms);
        let shown = format!("{lent:?}");
        assert!(!shown.contains("90, 90") && shown.contains("keyed: true"), "{shown}");
        let crossed: LentConnection = serde_json::from_slice(&serde_json::to_vec(&lent).unwrap()).unwrap();
        let arrived = crossed.into_terms();
        assert_eq!((arrived.send.key(), arrived.send.sequence()), (Some(&[0x5a; 32]), 9));
        assert_eq!((arrived.receive.key(), arrived.receive.sequence()), (None, 0));
        for number in 0..8 {
            assert_eq!(Return::from_wire(number).map(|how| how as u16), (number < 7).then_some(number));
        }
    }

    #[test]
    fn codes_keep_their_numbers() {
        for number in 0..18 {
            assert_eq!(Code::from_wire(number).unwrap() as u16, number);
        }
        assert_eq!(Code::from_wire(18), None);
    }
}
