//! What the controller wants, carried out: calls handed over, answers sent, leases granted and opened.

use super::*;

impl Process {
    pub(super) fn unstick(&mut self, now: u64) {
        let waiting = self.shared.as_ref().map(|_| {
            self.seated.iter().fold(0, |mask, worker| {
                let activity = self.seats[usize::from(*worker)].as_ref().map_or(0, Seat::activity);
                if activity == crate::worker::ACTIVITY_WAITING { mask | 1 << worker } else { mask }
            })
        });
        self.controller.unstick(now, waiting);
    }

    pub(super) fn act(&mut self, now: u64) {
        let (mut starts, mut loans) = (Vec::new(), Vec::new());
        while let Some(action) = self.controller.next_action() {
            match action {
                Action::Dispatch { worker, call, function, deadline_ns, payload } => {
                    self.dispatch(now, worker, call, function, deadline_ns, payload);
                }
                Action::Batch { worker, call, function, calls, deadline_ns } => {
                    let count = Inline::new(&calls.to_le_bytes()).expect("two bytes fit");
                    let announced = Descriptor::new(record::BATCH, function, call, deadline_ns, count);
                    self.announce(worker, calls, announced);
                }
                Action::Join { worker, call, function, calls, deadline_ns, run } => {
                    let announced = Descriptor::new(record::JOIN, function, call, deadline_ns, self.senders_of(run));
                    self.announce(worker, calls, announced);
                }
                Action::Joined { run, failure } => self.on_joined(now, run, failure),
                Action::Unjoin { run, payload } => self.on_unjoin(now, run, payload),
                Action::Answer { to: Caller::Client { connection, call }, outcome }
                    if connection & crate::controller::PEER != 0 =>
                {
                    self.answer_peer(now, connection, call, outcome);
                }
                Action::Answer { to: Caller::Client { connection, call }, outcome } => {
                    let (code, status, payload) = spread(outcome);
                    if let Some(unsent) = self.clients.answer(connection, call, code, status, payload) {
                        self.release(unsent);
                    }
                }
                Action::Answer { to: Caller::Worker { worker, call }, outcome } => {
                    self.answer_worker(worker, call, outcome)
                }
                Action::Discard(payload) => self.release(payload.bytes),
                Action::Withdraw { worker } => self.withdraw(now, worker),
                Action::TellCancelled { worker, call } => {
                    self.tell(worker, record::CANCEL, 0, call, 0);
                    self.end_receive(worker, call);
                }
                // A start takes a millisecond or more: answers go out first.
                Action::Spawn { worker } => starts.push(worker),
                Action::Signal { worker, signal } => {
                    if let Some(seat) = &mut self.seats[usize::from(worker)] {
                        seat.verdict.get_or_insert(Cause::Overran);
                        let number = if signal == Signal::Kill { 9 } else { 15 };
                        let _ = seat.child.signal_group(number);
                    }
                }
                // When the answer before it is written.
                Action::Lend { lease, connection, worker, function } => {
                    loans.push((lease, connection, worker, function))
                }
                Action::Retire { worker } => self.tell(worker, record::SHUTDOWN, 0, 0, 0),
                Action::Grant { lease, caller, callee } => self.grant(lease, caller, callee),
                Action::Open { lease, caller, callee, position } => self.open(lease, caller, callee, position),
                Action::Revoke { lease, callee } => self.tell(callee, record::REVOKE, 0, lease, 0),
                Action::End { lease, caller } => {
                    self.lease_ends.remove(&lease);
                    self.tell(caller, record::ENDED, 0, lease, 0);
                }
            }
        }
        let mut sent = std::mem::take(&mut self.sent);
        let gone = self.clients.flush(&mut self.reactor, &mut self.store, &mut sent);
        for bytes in sent.drain(..) {
            self.release(bytes);
        }
        self.sent = sent;
        for connection in gone {
            self.forget(clients::index(connection));
            self.controller.disconnected(connection);
        }
        for (lease, connection, worker, function) in loans {
            self.lend(now, lease, connection, worker, function);
        }
        for at in 0..self.seated.len() {
            let worker = self.seated[at];
            let Some(seat) = &mut self.seats[usize::from(worker)] else { continue };
            let deaf = seat.wants_flush() && seat.flush().is_err();
            seat.ring();
            if deaf {
                self.condemn(worker, Cause::Violation("it does not read its records"));
            }
        }
        self.peers.ring();
        // Everybody has been told by now: this reads /proc.
        self.part_workers();
        for worker in starts {
            self.spawn(now, worker);
        }
    }

    /// Tells a worker that the next so many requests run together.
    fn announce(&mut self, worker: WorkerId, calls: u16, record: Descriptor) {
        if let Some(seat) = &mut self.seats[usize::from(worker)] {
            seat.batch_left = calls;
        }
        self.send(worker, record, None);
    }

    fn dispatch(&mut self, now: u64, worker: WorkerId, call: u64, function: u16, deadline_ns: u64, payload: Payload) {
        let me = ParticipantId::new(worker).expect("workers have participant numbers");
        let Payload { bytes, is_args, .. } = payload;
        let mut heap = None;
        let request = match bytes {
            Bytes::Inline(inline) => seat::Request::Inline(inline),
            Bytes::Own(block) => {
                let len = block.len();
                let arena = self.store.arena.as_mut().expect("a block of ours comes from the arena");
                seat::Request::Lent(arena.lend(block, len, me))
            }
            // A message that it sent itself.
            Bytes::Foreign(foreign) if foreign.giver == worker => seat::Request::Back(foreign),
            Bytes::Foreign(foreign) => {
                self.introduce(worker, foreign.view.block().owner);
                seat::Request::Foreign(foreign)
            }
            Bytes::Heap(buffer) => {
                heap = Some(buffer);
                seat::Request::Heap(None)
            }
            Bytes::Text(_) | Bytes::Kept(_) | Bytes::Shared(_) => {
                unreachable!("texts and what is kept or shared are no requests")
            }
        };
        let kind = record::REQUEST | if is_args { record::ARGS } else { 0 };
        let body = Seat::body_of(&request);
        if let Some(seat) = &mut self.seats[usize::from(worker)] {
            let in_batch = seat.batch_left > 0;
            seat.batch_left -= u16::from(in_batch);
            seat.given.push_back(Given { call, position: None, request, is_args, in_batch });
        }
        self.send(worker, Descriptor::new(kind, function, call, deadline_ns, body), heap);
        self.apart.dispatched(worker);
        self.hands_over(now, worker);
    }

    /// A worker has something to do from here on: who shares a core with it yields that rather than sleep.
    pub(super) fn hands_over(&mut self, now: u64, worker: WorkerId) {
        self.handed_over = Some((worker, now));
        self.yields.count_wait();
    }

    fn withdraw(&mut self, now: u64, worker: WorkerId) {
        let unbegun = self.seats[usize::from(worker)].as_mut().map(Seat::withdraw).unwrap_or_default();
        let calls = self.take_requests_back(worker, unbegun);
        self.controller.withdrawn(now, worker, calls);
    }

    pub(super) fn answer_worker(&mut self, worker: WorkerId, call: u64, outcome: Outcome<Payload>) {
        let outcome = match outcome {
            Outcome::Done { status, payload: Payload { bytes, is_args, keeps } } => {
                match self.apart_from_workers(bytes) {
                    Ok(bytes) => Outcome::Done { status, payload: Payload { bytes, is_args, keeps } },
                    Err(why) => {
                        let text = answer_did_not_fit(why);
                        Outcome::Failed(CallError { code: Code::Failed, status: -1, text, keeps })
                    }
                }
            }
            failed => failed,
        };
        let (code, status, payload) = spread(outcome);
        let Some(incarnation) = self.seats[usize::from(worker)].as_ref().map(|seat| seat.incarnation) else {
            return self.release(payload.bytes);
        };
        let me = ParticipantId::new(worker).expect("workers have participant numbers");
        let mut heap = None;
        let body = match payload.bytes {
            Bytes::Inline(inline) => Body::Inline(inline),
            // The caller's own block comes back by echo.
            Bytes::Foreign(foreign) if foreign.giver == worker && foreign.incarnation == incarnation => {
                Body::Block(*foreign.view.block())
            }
            Bytes::Foreign(foreign) => {
                let block = *foreign.view.block();
                self.introduce(worker, block.owner);
                self.lent_on.insert(BlockKey::from(&block), (foreign, worker));
                Body::Block(block)
            }
            // Copied for it, or echoed to it.
            Bytes::Own(block) => {
                let (bytes, arena) =
                    (block.len(), self.store.arena.as_mut().expect("a block of ours comes from the arena"));
                Body::Block(arena.lend(block, bytes, me))
            }
            Bytes::Kept(_) | Bytes::Shared(_) => {
                unreachable!("what is kept goes to clients, what is shared to processes")
            }
            Bytes::Heap(buffer) => {
                heap = Some(buffer);
                Body::Inline(Inline::empty())
            }
            Bytes::Text(text) => match (Inline::new(text.as_bytes()), self.store.arena.is_some()) {
                (Some(inline), _) => Body::Inline(inline),
                (None, false) => {
                    heap = Some(self.store.heap.count(Buffer::from(text.as_bytes())));
                    Body::Inline(Inline::empty())
                }
                (None, true) => self.lend_bytes(text.as_bytes(), me),
            },
        };
        let keeps = if payload.keeps { record::KEEPS } else { 0 };
        let kind = record::REPLY | keeps | if payload.is_args { record::ARGS } else { 0 };
        let aux = u64::from(status.cast_unsigned());
        self.send(worker, Descriptor::new(kind, code as u16, call, aux, body), heap);
    }

    /// Bytes of ours for a worker, in our arena while it reads them; cut to what a record holds when there is no room. Not for longer than it
    /// can take to read them: who never gives one back would fill the arena.
    pub(super) fn lend_bytes(&mut self, bytes: &[u8], to: ParticipantId) -> Body {
        let arena = self.store.arena.as_mut().expect("checked by the caller");
        match arena.loan(bytes.len()) {
            Ok(mut block) => {
                block.copy_from_slice(bytes);
                let lent = arena.lend(block, bytes.len(), to);
                let read = self.seats[to.index()].as_mut().and_then(|seat| seat.lent_text(lent));
                if let Some(read) = read {
                    // It may have been released.
                    let _ = arena.release(to, read.index, read.generation);
                }
                Body::Block(lent)
            }
            Err(_) => Body::Inline(Inline::new(&bytes[..praas_shm::INLINE_BYTES_MAX]).expect("cut to fit")),
        }
    }

    /// Makes sure that `worker` can read blocks of `owner`.
    pub(super) fn introduce(&mut self, worker: WorkerId, owner: ParticipantId) {
        let number = owner.get();
        let known = self.seats[usize::from(worker)].as_ref().is_none_or(|seat| seat.knows & (1 << number) != 0);
        if known || owner == ParticipantId::CONTROLLER || number == worker {
            return;
        }
        let Some(Seat { channel: Channel::Ring { file, eventfd, .. }, incarnation, .. }) = &self.seats[owner.index()]
        else {
            // Over queues there is nothing to show; but it will be told of the other's death.
            if let Some(seat) = &mut self.seats[usize::from(worker)] {
                seat.knows |= 1 << number;
            }
            return;
        };
        let eventfd = eventfd.try_clone().map_err(|error| error.to_string());
        let copies = eventfd.and_then(|eventfd| Ok((file.try_clone().map_err(|error| error.to_string())?, eventfd)));
        let message = ToWorker::Peer { participant: number, incarnation: *incarnation };
        match copies {
            Ok((file, eventfd)) => {
                self.notify(worker, &message, &[file.fd(), eventfd.as_fd()]);
                if let Some(seat) = &mut self.seats[usize::from(worker)] {
                    seat.knows |= 1 << number;
                }
            }
            Err(error) => tracing::warn!(worker, %error, "no descriptors to introduce worker {number}"),
        }
    }

    pub(super) fn lease_patience(&self, mine: WorkerId, theirs: WorkerId) -> Patience {
        self.placement.patience(self.core_of(mine), self.core_of(theirs), true, self.seated.len() + 1)
    }

    pub(super) fn grant(&mut self, lease: u64, caller: WorkerId, callee: WorkerId) {
        let fds = match self.lease_fds() {
            Ok(fds) => fds,
            Err(error) => {
                // The caller never takes this one up; it is taken back when somebody else needs the callee.
                tracing::warn!(error, "a worker cannot be leased; from now on every call goes through the controller");
                self.controller.forbid_leases();
                return;
            }
        };
        self.introduce(caller, ParticipantId::new(callee).expect("workers have participant numbers"));
        // Each is told how to wait for the other by where they are, so that is settled first.
        self.send_guest_home();
        let patience = self.lease_patience(caller, callee);
        let borrowed: Vec<_> = fds.iter().map(OwnedFd::as_fd).collect();
        self.notify(caller, &ToWorker::Lease { lease, callee, patience }, &borrowed);
        self.lease_ends.insert(lease, fds);
    }

    /// What both ends of a lease get: an exchange page, or a queue each way.
    fn lease_fds(&self) -> Result<Vec<OwnedFd>, String> {
        if self.shared.is_some() {
            return praas_shm::exchange::create().map(|page| vec![page]).map_err(|error| error.to_string());
        }
        let queue = || {
            let (queue, _) =
                praas_transport::queue::create(&QueueConfig::default()).map_err(|error| error.to_string())?;
            queue.fd().try_clone_to_owned().map_err(|error| error.to_string())
        };
        Ok(vec![queue()?, queue()?])
    }

    pub(super) fn open(&mut self, lease: u64, caller: WorkerId, callee: WorkerId, position: u64) {
        let Some(fds) = self.lease_ends.remove(&lease) else { return };
        self.introduce(callee, ParticipantId::new(caller).expect("workers have participant numbers"));
        let patience = self.lease_patience(callee, caller);
        let borrowed: Vec<_> = fds.iter().map(OwnedFd::as_fd).collect();
        self.notify(callee, &ToWorker::Serve { lease, caller, position, patience }, &borrowed);
    }
}
