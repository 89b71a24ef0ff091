//! A lease over queues: two queues of the pair's own, so that a call makes two hops instead of four.
//!
//! Synchronous calls use it, one at a time; what is submitted goes through the controller. The line says nothing about how
//! far its other end is, so two facts decide what became of a call when the lease ends under it. A callee that gives a
//! lease back is idle: whatever it took it has answered, and the answer is in the queue. And of a callee that died the
//! kernel still knows how many records it left unread.

use praas_transport::Flush;
use praas_transport::queue::{Queue, QueueError};
use rustix::event::{PollFd, PollFlags, Timespec};

use super::*;

/// Turns of a spin between two looks at the controller's queue: each costs a system call.
const TURNS_PER_LOOK: u32 = 8;
/// An answer that makes no progress for so long, on a lease that is to be given back, is dropped: its caller stopped reading.
const STALLED: Duration = Duration::from_millis(100);

/// One end of a lease over queues.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) lease: u64,
    pub(super) peer: ParticipantId,
    patience: Patience,
    sender: Sender,
    receiver: Receiver,
    /// A call of this lease overran, or its callee broke the format: the line is not used again.
    pub(super) spent: bool,
    /// Turns of all its spins: a busy line, too, looks at the controller's queue now and then.
    turns: u32,
}

impl Line {
    /// From the lease's two queues: what we send to, and what we receive from.
    pub(super) fn new(
        lease: u64,
        peer: ParticipantId,
        patience: Patience,
        to: OwnedFd,
        from: OwnedFd,
        payload_bytes_max: u64,
    ) -> Result<Line, Fatal> {
        let queue = |fd| Queue::from_fd(fd).map_err(|e| fatal("cannot use a queue of a lease", e));
        let (sender, receiver) = (Sender::new(queue(to)?), Receiver::new(queue(from)?, payload_bytes_max));
        Ok(Line { lease, peer, patience, sender, receiver, spent: false, turns: 0 })
    }

    fn send(&mut self, head: &Descriptor, body: Option<Buffer>) {
        let message = Message { head: head.to_bytes(), body: body.unwrap_or_else(|| Buffer::with_len(0)) };
        self.sender.queue(message).expect("a line carries one message at a time, and the last one is sent");
    }

    /// The next message of ours from the far end. `Err`: it breaks the format.
    fn receive(&mut self, memory: &Memory) -> Result<Option<(Descriptor, Buffer)>, String> {
        if let Some(spare) = memory.spare.borrow_mut().pop() {
            self.receiver.recycle(spare);
        }
        let message = self.receiver.try_receive().map_err(|error: QueueError| error.to_string())?;
        let Some(message) = message else { return Ok(None) };
        let descriptor = Descriptor::from_bytes(&message.head).map_err(|error| error.to_string())?;
        Ok(Some((descriptor, message.body)))
    }

    /// Whether the far end has read all that was sent, as far as the kernel knows.
    fn is_drained(&self) -> bool {
        !self.sender.wants_write() && self.sender.kernel_queue().queued().is_ok_and(|records| records == 0)
    }

    fn recycle_sent(&mut self, memory: &Memory) {
        while let Some(sent) = self.sender.take_sent() {
            memory.recycle(sent.body);
        }
    }
}

/// How long an end of a line has been waiting.
#[derive(Debug, Default)]
pub(super) struct Waited {
    since_ns: Option<u64>,
}

/// Which of a session's two lines.
#[derive(Debug, Clone, Copy)]
pub(super) enum End {
    Calling,
    Serving,
}

impl Session {
    fn line(&mut self, end: End) -> Option<&mut Line> {
        match end {
            End::Calling => self.calling_line.as_mut(),
            End::Serving => self.serving_line.as_mut(),
        }
    }

    /// Waits for a line as its patience has it: a moment when it spins, else until there is something or the deadline.
    /// What the controller sends meanwhile is taken. Whether the line is worth a look.
    pub(super) fn await_line(&mut self, end: End, waited: &mut Waited, deadline_ns: u64) -> Result<bool, Fatal> {
        let Some(line) = self.line(end) else { return Ok(false) };
        let patience = line.patience;
        if patience.spin_ns > 0 {
            let now = now_ns();
            let waited_ns = now - *waited.since_ns.get_or_insert(now);
            if waited_ns < patience.linger_ns {
                line.turns = line.turns.wrapping_add(1);
                if line.turns.is_multiple_of(TURNS_PER_LOOK) {
                    self.look_at_queue()?;
                }
                if waited_ns >= patience.spin_ns {
                    rustix::thread::sched_yield();
                }
                return Ok(true);
            }
        }
        waited.since_ns = None;
        self.sleep_on_line(end, deadline_ns)
    }

    fn sleep_on_line(&mut self, end: End, deadline_ns: u64) -> Result<bool, Fatal> {
        let left = (deadline_ns != u64::MAX).then(|| Duration::from_nanos(deadline_ns.saturating_sub(now_ns())));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        let line = match end {
            End::Calling => self.calling_line.as_ref(),
            End::Serving => self.serving_line.as_ref(),
        };
        let (Some(line), Channel::Queue { receiver, .. }) = (line, &self.channel) else { return Ok(false) };
        let from_controller = receiver.kernel_queue().fd();
        let (to, from) = (line.sender.kernel_queue().fd(), line.receiver.kernel_queue().fd());
        let outward = if line.sender.wants_write() { PollFlags::OUT } else { PollFlags::empty() };
        let mut fds = [
            PollFd::from_borrowed_fd(from, PollFlags::IN),
            PollFd::from_borrowed_fd(from_controller, PollFlags::IN),
            PollFd::from_borrowed_fd(to, outward),
        ];
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(fatal("cannot wait for a queue", error)),
        }
        let [line, controller, writable] = fds.map(|fd| !fd.revents().is_empty());
        if controller {
            self.look_at_queue()?;
        }
        Ok(line || writable)
    }

    /// Takes one message of the controller, if there is one.
    pub(super) fn look_at_queue(&mut self) -> Result<(), Fatal> {
        let Channel::Queue { receiver, .. } = &mut self.channel else { return Ok(()) };
        match receiver.try_receive().map_err(|e| fatal("queue", e))? {
            Some(message) => self.take_message(message),
            None => Ok(()),
        }
    }

    // ---- calling ----------------------------------------------------------------------------------------------

    /// Whether the next synchronous call can go to a leased worker directly.
    pub(super) fn has_line(&self) -> bool {
        self.calling_line.as_ref().is_some_and(|line| !line.spent)
    }

    /// Calls the leased worker and waits for its answer.
    pub(super) fn invoke_line(
        &mut self,
        function: u16,
        deadline_ns: u64,
        payload: Payload<'_>,
    ) -> Result<Reply, InvokeError> {
        let callee = self.calling_line.as_ref().expect("checked by the caller").peer;
        let kind = record::REQUEST | if payload.is_args { record::ARGS } else { 0 };
        self.direct_calls += 1;
        let id = DIRECT | self.direct_calls;
        let (body, _, heap) = self.load(payload.bytes, callee)?;
        let request = Descriptor::new(kind, function, id, deadline_ns, body);
        self.calling_line.as_mut().expect("checked by the caller").send(&request, heap);
        self.awaiting = true;
        let answer = self.await_answer(id, deadline_ns).unwrap_or_else(|Fatal(text)| die(&text));
        self.awaiting = false;
        if let Some(line) = &mut self.calling_line {
            line.recycle_sent(&self.memory);
        }
        match answer {
            Answer::Reply(reply, body) => self.accept_from_line(&reply, body),
            Answer::Ended => {
                let (line, how) = self.line_ended.take().expect("a line that is gone has ended");
                self.part_from_line(line, how.as_deref(), &request)
            }
            Answer::Broken(text) => {
                self.spend_line();
                Err(InvokeError::WorkerLost { text: format!("the leased worker's answer is malformed: {text}") })
            }
            Answer::Late => {
                self.spend_line();
                Err(InvokeError::Timeout { text: "the deadline passed during a leased call".into() })
            }
        }
    }

    fn await_answer(&mut self, id: u64, deadline_ns: u64) -> Result<Answer, Fatal> {
        let mut waited = Waited::default();
        loop {
            let Some(line) = &mut self.calling_line else { return Ok(Answer::Ended) };
            if line.sender.wants_write() {
                // Whether it is done shows below.
                let _: Flush = line.sender.try_flush().map_err(|e| fatal("queue of a lease", e))?;
            }
            if self.await_line(End::Calling, &mut waited, deadline_ns)?
                && let Some(line) = &mut self.calling_line
            {
                match line.receive(&self.memory) {
                    Ok(Some((reply, body))) if reply.kind() & record::KIND == record::REPLY && reply.id() == id => {
                        if line.sender.wants_write() {
                            return Ok(Answer::Broken("it came before the request was whole".into()));
                        }
                        return Ok(Answer::Reply(reply, body));
                    }
                    Ok(Some((_, body))) => self.memory.recycle(body),
                    Ok(None) => {}
                    Err(text) => return Ok(Answer::Broken(text)),
                }
            }
            if self.calling_line.is_some() && now_ns() >= deadline_ns {
                return Ok(Answer::Late);
            }
        }
    }

    fn accept_from_line(&mut self, reply: &Descriptor, body: Buffer) -> Result<Reply, InvokeError> {
        if body.as_ref().is_empty() {
            return self.accept(*reply, Carried::Nothing, self.giver(ParticipantId::CONTROLLER));
        }
        self.accept_heap(reply, body)
    }

    /// The line is not used again, and the controller is told that its callee may be lost in a call.
    fn spend_line(&mut self) {
        let Some(line) = self.calling_line.as_mut() else { return };
        line.spent = true;
        let lease = line.lease;
        while let Some(unsent) = line.sender.take_unsent() {
            self.memory.recycle(unsent.body);
        }
        self.tell_controller(record::OVERRUN, 0, lease, 0).unwrap_or_else(|Fatal(text)| die(&text));
    }

    /// The lease ended under a call: it was answered just before, or is lost because its callee had begun on it, or
    /// else starts over through the controller.
    fn part_from_line(
        &mut self,
        mut line: Line,
        how: Option<&str>,
        request: &Descriptor,
    ) -> Result<Reply, InvokeError> {
        while let Ok(Some((reply, body))) = line.receive(&self.memory) {
            if reply.kind() & record::KIND == record::REPLY && reply.id() == request.id() {
                return self.accept_from_line(&reply, body);
            }
        }
        let begun = line.is_drained();
        match line.sender.take_unsent().or_else(|| line.sender.take_sent()) {
            Some(message) if !begun => {
                let number = self.nested.open(Route::Controller, request.aux(), Carried::Nothing);
                let request = Descriptor::new(request.kind(), request.tag(), number, request.aux(), request.body());
                self.send_controller(&request, Some(message.body)).unwrap_or_else(|Fatal(text)| die(&text));
                self.collect(number)
            }
            _ => Err(lost(how.unwrap_or("gave its lease back before its answer was read"))),
        }
    }

    // ---- serving ----------------------------------------------------------------------------------------------

    /// The next request from the line that we serve, if it is there.
    pub(super) fn next_from_line(&mut self, incoming: &mut Incoming) -> Result<bool, Fatal> {
        let Some(line) = &mut self.serving_line else { return Ok(false) };
        match line.receive(&self.memory) {
            Ok(None) => Ok(false),
            Ok(Some((request, body))) if request.kind() & record::KIND == record::REQUEST => {
                let heap = (!body.as_ref().is_empty()).then_some(body);
                *incoming = Incoming { origin: Origin::Queue(line.peer), request, position: 0, heap };
                Ok(true)
            }
            Ok(Some(_)) | Err(_) => {
                let (me, caller) = (self.me.get(), line.peer);
                eprintln!("praas-worker {me}: malformed request from {caller}; no longer serving its lease");
                self.serving_line = None;
                Ok(false)
            }
        }
    }

    /// Answers on the line that we serve. Without it nobody waits for the answer any more.
    pub(super) fn reply_on_line(&mut self, reply: &Descriptor, heap: Option<Buffer>) -> Result<(), Fatal> {
        if let Some(line) = &mut self.serving_line {
            line.send(reply, heap);
        }
        let mut since_ns = now_ns();
        let mut records = 0;
        loop {
            let Some(line) = &mut self.serving_line else { return Ok(()) };
            if line.sender.try_flush().map_err(|e| fatal("queue of a lease", e))? == Flush::Done {
                line.recycle_sent(&self.memory);
                return Ok(());
            }
            let (now, spin_ns) = (now_ns(), line.patience.spin_ns);
            if records != line.sender.stats().records {
                (records, since_ns) = (line.sender.stats().records, now);
            }
            let stalled_ns = now - since_ns;
            if self.revoked.is_some() && u128::from(stalled_ns) > STALLED.as_nanos() {
                self.serving_line = None;
            } else if stalled_ns >= spin_ns {
                self.sleep_until_writable()?;
            }
        }
    }

    fn sleep_until_writable(&mut self) -> Result<(), Fatal> {
        let (Some(line), Channel::Queue { receiver, .. }) = (&self.serving_line, &self.channel) else { return Ok(()) };
        let mut fds = [
            PollFd::from_borrowed_fd(line.sender.kernel_queue().fd(), PollFlags::OUT),
            PollFd::from_borrowed_fd(receiver.kernel_queue().fd(), PollFlags::IN),
        ];
        let timeout = Timespec::try_from(STALLED).expect("a tenth of a second");
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(fatal("cannot wait for a queue", error)),
        }
        if fds[1].revents().is_empty() { Ok(()) } else { self.look_at_queue() }
    }
}

/// What became of a call on a line.
#[derive(Debug)]
enum Answer {
    Reply(Descriptor, Buffer),
    /// With the lease; `line_ended` has what is left of it.
    Ended,
    Broken(String),
    Late,
}
