//! A worker: an OS process that runs functions.
//!
//! ```no_run
//! use praas_dataplane::{Output, Worker};
//!
//! fn main() -> std::process::ExitCode {
//!     Worker::new().function("echo", |_context, input| Ok(Output::from(input))).serve()
//! }
//! ```

mod batch;
mod context;
mod join;
pub mod messages;
mod session;
pub mod state;
#[allow(unsafe_code, reason = "reads as a type what was checked to be one")]
mod typed;

use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;

use praas_shm::{
    Descriptor, Identity, IndexConfig, IndexFile, IndexReader, Link, OwnSegment, ParticipantId, PeerSegment,
    SegmentConfig, SegmentFile, child, handover, join_barriers,
};
use praas_transport::queue::{Queue, Receiver, Sender};

use crate::config::Ipc;
use crate::error::{Failure, InvokeError};
use crate::payload::{BlockKey, Bytes, Input, Output, Payload, Place};
use crate::wire::{Code, FromWorker, PROTOCOL_VERSION, ToWorker, Trigger, WorkerWelcome, record};
pub use batch::Batch;
pub use context::{Context, FunctionId, Lease, Pending};
pub use join::Join;
pub use messages::{Broadcast, Key, Message, MessageError, SELF, Source};
pub(crate) use session::{ACTIVITY_WAITING, NESTED_MAX};
use session::{Channel, Fatal, Incoming, Origin, Session, SharedState, fatal};
pub use state::{Draft, KeyInfo, Object, State, StateError};
pub use typed::Typed;

/// Runs a function for a request and answers it. One is compiled for each function, around it: what a small function
/// reads and answers then stays in registers from record to record.
type Handler = Box<dyn FnMut(&mut Session, &mut Incoming) -> Result<(), Fatal>>;

/// The functions of a worker program, to be registered and then served.
#[derive(Default)]
pub struct Worker {
    functions: Vec<(String, Handler)>,
    triggers: Vec<(u16, Trigger)>,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.functions.iter().map(|(name, _)| name)).finish()
    }
}

impl Worker {
    /// No functions yet.
    #[must_use]
    pub fn new() -> Worker {
        Worker::default()
    }

    /// Registers a function under a name of 1..=255 bytes. What it captures lives as long as the worker (warm state).
    ///
    /// # Panics
    /// When the name is empty, too long or taken, or with more than 65 535 functions.
    #[must_use]
    pub fn function<F>(mut self, name: &str, mut function: F) -> Worker
    where
        F: FnMut(&mut Context<'_>, Input) -> Result<Output, Failure> + 'static,
    {
        self.check(name);
        let handler = move |session: &mut Session, incoming: &mut Incoming| invoke(session, incoming, &mut function);
        self.functions.push((name.to_owned(), Box::new(handler)));
        self
    }

    /// Registers a function that runs once for several calls (trigger *batch*): it gets their inputs in the order they came, and gives an output or a
    /// failure for each, in that order. Each caller gets its own, as from any function; a failure of the whole goes to all of them. A call that
    /// is cancelled or late, or whose caller is gone, is taken out before the run, and its answer is dropped afterwards. When the worker dies during the
    /// run, each call ends or runs again as its own delivery says.
    ///
    /// The deadline of the invocation is the latest of its calls; it is [cancelled](Context::is_cancelled) when nobody waits for any of them.
    ///
    /// # Panics
    /// As [`Worker::function`], and when `batch` is out of range.
    #[must_use]
    pub fn batch<F>(mut self, name: &str, batch: Batch, mut function: F) -> Worker
    where
        F: FnMut(&mut Context<'_>, Vec<Input>) -> Result<Vec<Result<Output, Failure>>, Failure> + 'static,
    {
        let number = self.check(name);
        let handler =
            move |session: &mut Session, incoming: &mut Incoming| batch::serve(session, incoming, &mut function);
        self.functions.push((name.to_owned(), Box::new(handler)));
        self.triggers.push((number, batch.trigger()));
        self
    }

    /// Registers a function that runs when a message is in the mailbox under each of the keys of `join` (trigger *join*). It takes one of each, the
    /// oldest, all at once, and gets them in the order of the keys. Messages of other processes count as those of this one. Nobody calls it, and
    /// nobody gets a result: what it has to say it sends. A failure goes to the log of the process.
    ///
    /// A receive that waits for one of these messages comes before it; while not all are there, they can be received as any. As many runs go on at
    /// once as there may be workers; the rest waits in the mailbox, whose bounds are those of all messages. When a worker dies before it has begun, the
    /// messages go back to their places; when it dies in the middle of the run, they do so only if the function is
    /// [idempotent](Join::idempotent), and are lost else, which the log says. A run has the process's `deadline_ms`.
    ///
    /// # Panics
    /// As [`Worker::function`], and when `join` is out of range.
    #[must_use]
    pub fn join<F>(mut self, name: &str, join: Join, mut function: F) -> Worker
    where
        F: FnMut(&mut Context<'_>, Vec<Message>) -> Result<(), Failure> + 'static,
    {
        let number = self.check(name);
        self.triggers.push((number, join.trigger()));
        let handler = move |session: &mut Session, incoming: &mut Incoming| {
            join::serve(session, incoming, &join.keys, &mut function)
        };
        self.functions.push((name.to_owned(), Box::new(handler)));
        self
    }

    /// The number that a function of this name gets.
    fn check(&self, name: &str) -> u16 {
        assert!((1..=255).contains(&name.len()), "a function's name has 1 to 255 bytes, `{name}` has {}", name.len());
        assert!(self.functions.iter().all(|(known, _)| known != name), "function `{name}` is registered twice");
        let number = u16::try_from(self.functions.len()).ok().filter(|number| *number < u16::MAX);
        number.expect("65 535 functions are the most")
    }

    /// Serves until the process ends. To be called from the program's first thread, which is the one that runs the functions.
    ///
    /// Started by anything but `praas-process` it says so on stderr and returns exit code 2.
    #[must_use]
    pub fn serve(self) -> ExitCode {
        let Ok(control) = child::inherited_control() else {
            let program = std::env::args().next().unwrap_or_else(|| "this program".into());
            eprintln!(
                "{program} is a PraaS worker: it is started by a process, not by hand. Try: praas-process --worker {program}"
            );
            return exit_code(crate::exit::USAGE);
        };
        match self.run(control) {
            Ok(()) => ExitCode::SUCCESS,
            Err(Fatal(text)) => {
                eprintln!("praas-worker: {text}");
                exit_code(crate::exit::WORKER_PROTOCOL)
            }
        }
    }

    fn run(self, control: OwnedFd) -> Result<(), Fatal> {
        let (names, mut handlers): (Vec<String>, Vec<Handler>) = self.functions.into_iter().unzip();
        let mut session = register(control, names, self.triggers)?;
        let mut incoming = Incoming::none();
        while session.next_request(&mut incoming)? {
            if !session.begin(&incoming)? {
                continue;
            }
            let Some(handler) = handlers.get_mut(usize::from(incoming.request.tag())) else {
                unknown_function(&mut session, &mut incoming)?;
                continue;
            };
            // Whatever the panic left half-done is never looked at again: the worker exits.
            match catch_unwind(AssertUnwindSafe(|| handler(&mut session, &mut incoming))) {
                Ok(answered) => answered?,
                Err(panic) => panicked(&mut session, &incoming, &*panic)?,
            }
        }
        Ok(())
    }
}

fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

#[inline(always)]
fn invoke<F>(session: &mut Session, incoming: &mut Incoming, function: &mut F) -> Result<(), Fatal>
where
    F: FnMut(&mut Context<'_>, Input) -> Result<Output, Failure>,
{
    let request = &incoming.request;
    let (origin, call) = (incoming.origin, request.id());
    // Under a lease and short both ways, which is when nanoseconds count, nothing but registers lies in between.
    let (Some(inline), Origin::Ring(_) | Origin::Exchange(_)) = (request.inline(), origin) else {
        return invoke_at_length(session, incoming, function);
    };
    let input = Input { bytes: inline.into(), is_args: request.kind() & record::ARGS != 0 };
    let mut context = Context::new(session, origin, call, request.tag(), request.aux());
    let result = function(&mut context, input);
    context.finish();
    match result {
        Ok(Output { payload: Payload { bytes: Bytes { inline, place: Place::Here }, is_args }, status }) => {
            let kind = record::REPLY | if is_args { record::ARGS } else { 0 };
            let aux = u64::from(status.cast_unsigned());
            session.reply_leased(origin, &Descriptor::new(kind, Code::Ok as u16, call, aux, inline));
            session.return_blocks()
        }
        result => conclude(session, origin, call, None, result),
    }
}

#[inline(never)]
fn invoke_at_length<F>(session: &mut Session, incoming: &mut Incoming, function: &mut F) -> Result<(), Fatal>
where
    F: FnMut(&mut Context<'_>, Input) -> Result<Output, Failure>,
{
    let Some((input, block)) = session.open(incoming)? else { return Ok(()) };
    let (origin, request) = (incoming.origin, &incoming.request);
    let mut context = Context::new(session, origin, request.id(), request.tag(), request.aux());
    let result = function(&mut context, input);
    context.finish();
    conclude(session, origin, request.id(), block, result)
}

#[inline(never)]
fn conclude(
    session: &mut Session,
    origin: Origin,
    call: u64,
    block: Option<BlockKey>,
    result: Result<Output, Failure>,
) -> Result<(), Fatal> {
    match result {
        Ok(output) => session.reply(origin, call, block, Code::Ok, output.status, output.payload)?,
        Err(Failure { status, text }) => {
            session.reply_error(origin, call, block, &InvokeError::Failed { status, text })?;
        }
    }
    session.return_blocks()
}

#[cold]
fn unknown_function(session: &mut Session, incoming: &mut Incoming) -> Result<(), Fatal> {
    let Incoming { origin, request, .. } = *incoming;
    let Some((input, block)) = session.open(incoming)? else { return Ok(()) };
    drop(input);
    let text = format!("no function has id {}; this worker has {}", request.tag(), session.functions.len());
    session.reply_error(origin, request.id(), block, &InvokeError::UnknownFunction { text })
}

/// Says how the function ended, and ends the worker with it.
#[cold]
fn panicked(session: &mut Session, incoming: &Incoming, panic: &(dyn std::any::Any + Send)) -> Result<(), Fatal> {
    let block = incoming.request.block().map(|block| BlockKey::from(&block));
    session.dismiss_all();
    let error = InvokeError::Panicked { text: panic_text(panic) };
    if session.batch.is_empty() {
        session.reply_error(incoming.origin, incoming.request.id(), block, &error)?;
    } else {
        session.answer_batch([], || error.clone())?;
    }
    session.give_back_before_exit()?;
    std::process::exit(crate::exit::WORKER_PANICKED);
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without a text".into())
}

fn segment_config(welcome: &WorkerWelcome) -> SegmentConfig {
    SegmentConfig { ring_slots: welcome.ring_slots, arena_bytes: welcome.arena_bytes }
}

/// Maps another participant's segment, after checking that it is the one the controller meant.
fn attach(welcome: &WorkerWelcome, number: u8, incarnation: u64, fd: OwnedFd) -> Result<Arc<PeerSegment>, Fatal> {
    let participant = ParticipantId::new(number).ok_or_else(|| fatal("participant out of range", number))?;
    let identity = Identity { participant, incarnation, process: welcome.process_id };
    PeerSegment::attach(&SegmentFile::from_fd(fd), &identity, &segment_config(welcome))
        .map_err(|e| fatal("cannot attach a segment", e))
}

/// Longest message on the control socket.
const CONTROL_BYTES_MAX: usize = 64 << 10;

/// Introduces this worker to its controller: maps, links, names its functions.
fn register(control: OwnedFd, functions: Vec<String>, triggers: Vec<(u16, Trigger)>) -> Result<Session, Fatal> {
    let mut buffer = vec![0; CONTROL_BYTES_MAX];
    let mut next = |control: &OwnedFd| -> Result<(ToWorker, std::vec::IntoIter<OwnedFd>), Fatal> {
        let (bytes, fds) =
            handover::receive(control.as_fd(), &mut buffer).map_err(|e| fatal("cannot read the control socket", e))?;
        let message =
            serde_json::from_slice(&buffer[..bytes]).map_err(|e| fatal("bad message from the controller", e))?;
        Ok((message, fds.into_iter()))
    };
    let say = |control: &OwnedFd, message: &FromWorker| -> Result<(), Fatal> {
        let bytes = serde_json::to_vec(message).expect("our own messages are serialisable");
        if bytes.len() > CONTROL_BYTES_MAX {
            let text = format!(
                "the names of the functions and the keys they run for take {} bytes, and {CONTROL_BYTES_MAX} may",
                bytes.len()
            );
            return Err(Fatal(text));
        }
        handover::send(control.as_fd(), &bytes, &[]).map_err(|e| fatal("cannot write the control socket", e))
    };
    let (ToWorker::Welcome(welcome), mut fds) = next(&control)? else {
        return Err(Fatal("the controller did not greet".into()));
    };
    let welcome = *welcome;
    if welcome.version != PROTOCOL_VERSION {
        let text = format!(
            "the process speaks version {}, this worker {PROTOCOL_VERSION}: rebuild the worker",
            welcome.version
        );
        return Err(Fatal(text));
    }
    if welcome.isolate {
        praas_shm::child::hide_memory().map_err(|e| fatal("cannot keep others from our memory", e))?;
    }
    let mut fd = || fds.next().ok_or(Fatal("a greeting without its file descriptors".into()));
    let me = ParticipantId::new(welcome.participant)
        .ok_or_else(|| fatal("participant out of range", welcome.participant))?;
    let (channel, controller) = match welcome.ipc {
        Ipc::Ring => {
            let (file, own_eventfd, controller_eventfd) = (SegmentFile::from_fd(fd()?), fd()?, fd()?);
            let identity = Identity { participant: me, incarnation: welcome.incarnation, process: welcome.process_id };
            let own = OwnSegment::map(&file, &identity, &segment_config(&welcome))
                .map_err(|e| fatal("cannot map our segment", e))?;
            let doorbell = own.doorbell(own_eventfd);
            if welcome.barriers {
                join_barriers().map_err(|e| fatal("cannot take part in memory barriers", e))?;
            }
            say(&control, &FromWorker::Mapped)?;
            let (ToWorker::Attached { incarnation }, mut fds) = next(&control)? else {
                return Err(Fatal("the controller did not attach".into()));
            };
            let mut fd = || fds.next().ok_or(Fatal("the controller's segment or index is missing".into()));
            let segment = attach(&welcome, 0, incarnation, fd()?)?;
            let config = IndexConfig { objects_max: welcome.state.objects_max };
            let index = IndexReader::attach(&IndexFile::from_fd(fd()?), &config, Arc::clone(&segment))
                .map_err(|e| fatal("cannot attach the state index", e))?;
            let pins = own.pins().map_err(|e| fatal("cannot use our pins", e))?;
            let state = SharedState::new(index, pins, incarnation);
            let link = Link::establish(&own, Arc::clone(&segment), controller_eventfd)
                .map_err(|e| fatal("cannot link to the controller", e))?;
            (Channel::Ring { link, own, doorbell }, Some((segment, incarnation, state)))
        }
        Ipc::Queue => {
            let queue = |fd| Queue::from_fd(fd).map_err(|e| fatal("cannot use a queue", e));
            let (receiver, sender) = (queue(fd()?)?, queue(fd()?)?);
            let receiver = Receiver::new(receiver, welcome.payload_bytes_max);
            (Channel::Queue { sender: Sender::new(sender), receiver }, None)
        }
    };
    let ready =
        FromWorker::Ready { version: PROTOCOL_VERSION, functions: functions.clone(), triggers: triggers.clone() };
    say(&control, &ready)?;
    let mut session = Session::new(welcome, me, functions, control, channel, controller)?;
    session.set_triggers(&triggers);
    Ok(session)
}
