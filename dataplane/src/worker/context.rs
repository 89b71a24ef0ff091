//! What a function sees of its invocation.

use std::time::Duration;

use super::session::{Origin, Session};
use crate::client::Delivery;
use crate::clock::now_ns;
use crate::error::InvokeError;
use crate::payload::{Loan, Payload, Reply};
use crate::worker::messages::{Broadcast, Key, Message, MessageError, SELF, Source};
use crate::worker::state::State;

/// A function by its number, looked up once with [`Context::function_id`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FunctionId(pub(crate) u16);

/// How the next nested call travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lease {
    /// Through the controller.
    None,
    /// Straight into the leased worker's ring.
    Ring,
    /// Over the exchange line shared with the leased worker.
    Exchange,
    /// Over the queues shared with the leased worker (queue channel).
    Queue,
}

/// A nested call that was started. Wait for it with [`Context::wait`]; dropped, its answer is thrown away.
#[derive(Debug)]
#[must_use = "a call nobody waits for still runs"]
pub struct Pending(u64);

/// Names a function of the same process.
pub trait Callee {
    /// Its number among `functions`, if it is there.
    fn resolve(&self, functions: &[String]) -> Option<FunctionId>;
    /// What the caller wrote, for errors.
    fn name(&self) -> String;
}

impl Callee for FunctionId {
    #[inline]
    fn resolve(&self, functions: &[String]) -> Option<FunctionId> {
        (usize::from(self.0) < functions.len()).then_some(*self)
    }
    fn name(&self) -> String {
        format!("#{}", self.0)
    }
}

impl Callee for &str {
    fn resolve(&self, functions: &[String]) -> Option<FunctionId> {
        let index = functions.iter().position(|name| name == self)?;
        u16::try_from(index).ok().map(FunctionId)
    }
    fn name(&self) -> String {
        (*self).to_owned()
    }
}

/// The invocation a function runs in: who called, how long there is, and the way to memory and to other functions.
#[derive(Debug)]
pub struct Context<'a> {
    session: &'a mut Session,
    origin: Origin,
    call: u64,
    function: u16,
    deadline_ns: u64,
    scratch: Vec<Loan>,
}

impl<'a> Context<'a> {
    #[inline]
    pub(super) fn new(session: &'a mut Session, origin: Origin, call: u64, function: u16, deadline_ns: u64) -> Self {
        Context { session, origin, call, function, deadline_ns, scratch: Vec::new() }
    }

    /// Ends the invocation: scratch goes back, calls nobody waited for are let go.
    #[inline]
    pub(super) fn finish(self) {
        self.session.dismiss_all();
    }

    /// Number of this invocation, unique on its channel.
    #[must_use]
    pub fn invocation_id(&self) -> u64 {
        self.call
    }

    /// Name of the cloud process.
    #[must_use]
    pub fn process_id(&self) -> &str {
        &self.session.welcome.process
    }

    /// Name of the function that runs.
    #[must_use]
    pub fn function(&self) -> &str {
        &self.session.functions[usize::from(self.function)]
    }

    /// Number of the worker it runs on, from 1.
    #[must_use]
    pub fn worker(&self) -> u8 {
        self.session.me.get()
    }

    /// Whether the caller is a client that talks to this worker without the controller in between (`lease_connections`).
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.origin == Origin::Connection
    }

    /// Time left until the caller stops waiting; zero when it has.
    #[must_use]
    pub fn deadline_left(&self) -> Duration {
        Duration::from_nanos(self.deadline_ns.saturating_sub(now_ns()))
    }

    /// Whether nobody waits for this invocation any more: its deadline passed, or its caller cancelled or went away.
    /// Long functions ask now and then and return early; one that goes on past its deadline is killed after a grace.
    pub fn is_cancelled(&mut self) -> bool {
        now_ns() >= self.deadline_ns || self.session.is_cancelled(self.origin, self.call)
    }

    /// Names of the processes of this application that are active, this one first, as it was told last: whether they can be reached just now shows when
    /// something is sent. Asked anew each time: it changes during an invocation.
    ///
    /// # Errors
    /// `Protocol`.
    pub fn active_processes(&mut self) -> Result<Vec<String>, MessageError> {
        self.session.processes().map(|(active, _)| active)
    }

    /// Names of those that are swapped out.
    ///
    /// # Errors
    /// `Protocol`.
    pub fn swapped_processes(&mut self) -> Result<Vec<String>, MessageError> {
        self.session.processes().map(|(_, swapped)| swapped)
    }

    /// Memory for an output or for the input of a nested call: handed over without a copy. Its content is arbitrary.
    ///
    /// # Errors
    /// `TooLarge` above the process's limit, `NoSpace` when this worker's payload memory is full.
    pub fn loan(&self, bytes: usize) -> Result<Loan, InvokeError> {
        self.session.memory.loan(bytes)
    }

    /// Memory for this invocation only; it goes back when the function returns. Its content is arbitrary.
    ///
    /// # Errors
    /// As [`Context::loan`].
    pub fn scratch(&mut self, bytes: usize) -> Result<&mut [u8], InvokeError> {
        let loan = self.session.memory.loan(bytes)?;
        self.scratch.push(loan);
        Ok(self.scratch.last_mut().expect("pushed above"))
    }

    /// The number of a function, for calls that should not look up a name each time.
    #[must_use]
    pub fn function_id(&self, name: &str) -> Option<FunctionId> {
        name.resolve(&self.session.functions)
    }

    /// The state of the process.
    pub fn state(&mut self) -> State<'_> {
        State::new(self.session)
    }

    /// Calls a function of another process of this application and waits for its reply, as [`Context::invoke`] does here: [`Context::submit_at`] and
    /// [`Context::wait`]. It runs once at most.
    ///
    /// # Errors
    /// Every way a call can fail, `UnknownProcess`, `PeerLost` when that process was started anew or stopped meanwhile, and `Swapped`.
    pub fn invoke_at<'p>(
        &mut self,
        process: impl AsRef<str>,
        function: &str,
        payload: impl Into<Payload<'p>>,
    ) -> Result<Reply, InvokeError> {
        if self.is_here(process.as_ref()) {
            return self.invoke(function, payload);
        }
        let pending = self.submit_at(process, function, payload)?;
        self.wait(pending)
    }

    /// Starts a call of a function of another process and returns at once, but for the first call to a process, whose number is asked for. The handle is
    /// one as of [`Context::submit`]: waited for alone or among others, calls here and there mixed, or called off, which that process is told. A call that
    /// has not ended when this invocation ends, or its deadline passes, is called off, too. It runs once at most.
    ///
    /// # Errors
    /// `Busy` with 1024 nested calls open, `UnknownProcess`, `UnknownFunction` for a name that no function can have, `TooLarge`, `NoSpace`; nothing was
    /// sent then.
    pub fn submit_at<'p>(
        &mut self,
        process: impl AsRef<str>,
        function: &str,
        payload: impl Into<Payload<'p>>,
    ) -> Result<Pending, InvokeError> {
        self.submit_at_with(process, function, payload, Delivery::AtMostOnce)
    }

    /// The same, with what may happen to the call when the worker that runs it there, or that process, is lost. As for clients, but that the two processes
    /// themselves see to it that a broken connection neither loses a call nor doubles it:
    ///
    /// | | a worker there dies with it | that process is started anew |
    /// |---|---|---|
    /// | [`Delivery::AtMostOnce`] | `WorkerLost` | `PeerLost` |
    /// | [`Delivery::EffectivelyOnce`] | it runs again, up to three times | `PeerLost`: what that process knew of it is lost |
    /// | [`Delivery::Retry`] | it runs again, up to three times | it is sent to the new life, up to three times |
    ///
    /// All of it until the deadline of this invocation. A call of this process itself runs once at most.
    ///
    /// # Errors
    /// As [`Context::submit_at`].
    pub fn submit_at_with<'p>(
        &mut self,
        process: impl AsRef<str>,
        function: &str,
        payload: impl Into<Payload<'p>>,
        delivery: Delivery,
    ) -> Result<Pending, InvokeError> {
        if self.is_here(process.as_ref()) {
            return self.submit(function, payload);
        }
        let pending = self.session.submit_at(process.as_ref(), function, payload.into(), self.deadline_ns, delivery);
        pending.map(Pending)
    }

    fn is_here(&self, process: &str) -> bool {
        process == SELF || process == self.session.welcome.process
    }

    /// Sends a message to a process of this application, or to this one ([`SELF`](crate::SELF)), and waits until it is in that one's
    /// mailbox (or handed to a function that waited for it): it is received there once, after those sent before under the same key. Bytes as in
    /// [`Context::invoke`]: those of a loan, an input, a reply or a message are not copied.
    ///
    /// # Errors
    /// `Busy` at a full mailbox, `UnknownProcess`, `ProcessLost`, `Swapped`, `Timeout` when this invocation's time is over, `TooLarge`, `NoSpace`, `KeyLength`.
    pub fn send<'p>(
        &mut self,
        to: impl AsRef<str>,
        key: impl AsRef<[u8]>,
        payload: impl Into<Payload<'p>>,
    ) -> Result<(), MessageError> {
        self.session.send_message(to.as_ref(), key.as_ref(), payload.into(), self.deadline_ns)
    }

    /// Sends a message to every other process that is active, one after the other, each in its share of the time that this invocation has left. The
    /// names of those that have it, and why the others have not.
    ///
    /// # Errors
    /// `TooLarge`, `KeyLength`: nobody has it.
    pub fn broadcast(&mut self, key: impl AsRef<[u8]>, payload: impl AsRef<[u8]>) -> Result<Broadcast, MessageError> {
        let (key, payload) = (key.as_ref(), payload.as_ref());
        let mut told = Broadcast::default();
        let others: Vec<String> = self.active_processes()?.into_iter().skip(1).collect();
        for (at, name) in others.iter().enumerate() {
            let name = name.clone();
            // One that is not there does not take the time of the others, nor all of ours.
            let (now, shares) = (now_ns(), (others.len() - at + 1) as u64);
            let deadline_ns = now + self.deadline_ns.saturating_sub(now) / shares;
            match self.session.send_message(&name, key, payload.into(), deadline_ns) {
                Ok(()) => told.reached.push(name),
                Err(error @ (MessageError::TooLarge { .. } | MessageError::KeyLength { .. }))
                    if told.reached.is_empty() =>
                {
                    return Err(error);
                }
                Err(error) => told.missed.push((name, error)),
            }
        }
        Ok(told)
    }

    /// Receives the oldest message that matches, and waits for one as long as this invocation may take. It is this function's alone.
    ///
    /// # Errors
    /// `Timeout`, `UnknownProcess`, `KeyLength`.
    pub fn recv<'k>(&mut self, from: impl Into<Source<'k>>, key: impl Into<Key<'k>>) -> Result<Message, MessageError> {
        let received = self.session.receive_message(from.into(), key.into(), self.deadline_ns)?;
        received
            .ok_or_else(|| MessageError::Timeout { text: "no such message came while this invocation had time".into() })
    }

    /// The same, waiting no longer than `longest`. `None`: none came.
    ///
    /// # Errors
    /// `UnknownProcess`, `KeyLength`.
    pub fn recv_for<'k>(
        &mut self,
        from: impl Into<Source<'k>>,
        key: impl Into<Key<'k>>,
        longest: Duration,
    ) -> Result<Option<Message>, MessageError> {
        let longest_ns = u64::try_from(longest.as_nanos()).unwrap_or(u64::MAX);
        let deadline_ns = now_ns().saturating_add(longest_ns).min(self.deadline_ns);
        self.session.receive_message(from.into(), key.into(), deadline_ns)
    }

    /// The same, without waiting.
    ///
    /// # Errors
    /// As [`Context::recv_for`].
    pub fn try_recv<'k>(
        &mut self,
        from: impl Into<Source<'k>>,
        key: impl Into<Key<'k>>,
    ) -> Result<Option<Message>, MessageError> {
        self.session.receive_message(from.into(), key.into(), 0)
    }

    fn find(&self, callee: &impl Callee) -> Result<u16, InvokeError> {
        match callee.resolve(&self.session.functions) {
            Some(FunctionId(function)) => Ok(function),
            None => {
                let text = format!("`{}`; this process has {}", callee.name(), self.session.functions.join(", "));
                Err(InvokeError::UnknownFunction { text })
            }
        }
    }

    /// Calls a function of this process on another worker and waits for its reply. The deadline is this invocation's.
    ///
    /// The first call goes through the controller, which then leases the worker: the next calls go to it directly.
    ///
    /// # Errors
    /// Every way a call can fail; this invocation goes on. `Busy` when every worker waits for a nested call and no
    /// more may be started.
    #[inline]
    pub fn invoke<'p>(&mut self, callee: impl Callee, payload: impl Into<Payload<'p>>) -> Result<Reply, InvokeError> {
        let function = self.find(&callee)?;
        self.session.invoke(function, self.deadline_ns, payload.into())
    }

    /// Starts a call and returns at once. Calls to a leased worker run in the order submitted.
    ///
    /// # Errors
    /// `Busy` at the bounds (96 leased, 1024 in all); nothing was sent then.
    #[inline]
    pub fn submit<'p>(&mut self, callee: impl Callee, payload: impl Into<Payload<'p>>) -> Result<Pending, InvokeError> {
        let function = self.find(&callee)?;
        self.session.submit(function, self.deadline_ns, payload.into()).map(Pending)
    }

    /// Waits for a call.
    ///
    /// # Errors
    /// Every way a call can fail.
    #[inline]
    pub fn wait(&mut self, pending: Pending) -> Result<Reply, InvokeError> {
        self.session.collect(pending.0)
    }

    /// Starts several calls of one function at once, in this order. All or none: at a bound those that were started are called off.
    ///
    /// # Errors
    /// As [`Context::submit`].
    pub fn submit_all<'p, P: Into<Payload<'p>>>(
        &mut self,
        callee: impl Callee,
        payloads: impl IntoIterator<Item = P>,
    ) -> Result<Vec<Pending>, InvokeError> {
        let function = self.find(&callee)?;
        let mut started = Vec::new();
        for payload in payloads {
            match self.session.submit(function, self.deadline_ns, payload.into()) {
                Ok(number) => started.push(Pending(number)),
                Err(error) => {
                    started.into_iter().for_each(|pending| self.cancel(pending));
                    return Err(error);
                }
            }
        }
        Ok(started)
    }

    /// Waits for whichever of these calls ends first, takes it out of the list, and says how it ended. `None`: the list is empty.
    pub fn wait_any(&mut self, pending: &mut Vec<Pending>) -> Option<Result<Reply, InvokeError>> {
        if pending.is_empty() {
            return None;
        }
        let numbers: Vec<u64> = pending.iter().map(|pending| pending.0).collect();
        let (at, outcome) = self.session.collect_any(&numbers);
        let _ = pending.remove(at);
        Some(outcome)
    }

    /// Calls a call off: it does not run if it has not begun; if it has, its function may ask ([`Context::is_cancelled`]), and its answer is
    /// thrown away.
    pub fn cancel(&mut self, pending: Pending) {
        self.session.call_off(pending.0);
    }

    /// The outcome of a call if it is there, else the handle back. Does not block.
    ///
    /// # Errors
    /// The handle, when the call is not done.
    pub fn try_wait(&mut self, pending: Pending) -> Result<Result<Reply, InvokeError>, Pending> {
        self.session.try_collect(pending.0).ok_or(pending)
    }

    /// How the next call would travel.
    #[must_use]
    pub fn lease_state(&self) -> Lease {
        self.session.leased().map_or(Lease::None, |(_, way)| way)
    }

    /// The worker leased to this one, if any.
    #[must_use]
    pub fn leased_worker(&self) -> Option<u8> {
        self.session.leased().map(|(worker, _)| worker.get())
    }

    /// Whether synchronous calls use the exchange line of a lease (default) or its rings.
    pub fn prefer_exchange(&mut self, wanted: bool) {
        self.session.prefer_exchange(wanted);
    }
}
