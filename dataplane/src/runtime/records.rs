//! Records from workers, and blocks on their way from hand to hand.

use super::*;

impl Process {
    /// Takes what workers have published. True when there was something.
    pub(super) fn poll_workers(&mut self, now: u64) -> bool {
        let mut worked = false;
        for at in 0..self.seated.len() {
            let Some(worker) = self.seated.get(at).copied() else { break };
            worked |= self.poll_worker(now, worker, RECORDS_PER_TURN);
        }
        worked
    }

    pub(super) fn poll_worker(&mut self, now: u64, worker: WorkerId, records_max: usize) -> bool {
        for taken in 0..records_max {
            let Some(seat) = &mut self.seats[usize::from(worker)] else { return taken > 0 };
            let found = match &mut seat.channel {
                Channel::Mapping { .. } => return false,
                Channel::Ring { link, .. } => match link.consumer.poll() {
                    Ok(None) => return taken > 0,
                    Ok(Some(descriptor)) => Ok((descriptor, None)),
                    Err(_) => Err(Violation("a malformed record")),
                },
                Channel::Queue { .. } if !seat.readable => return taken > 0,
                Channel::Queue { receiver, .. } => match receiver.receive() {
                    Ok(None) => {
                        seat.readable = false;
                        return taken > 0;
                    }
                    Ok(Some(message)) => match Descriptor::from_bytes(&message.head) {
                        Ok(descriptor) => Ok((descriptor, Some(message.body))),
                        Err(_) => Err(Violation("a malformed record")),
                    },
                    Err(_) => Err(Violation("a malformed message")),
                },
            };
            let taken = found.and_then(|(descriptor, heap)| self.on_record(now, worker, descriptor, heap));
            if let Err(violation) = taken {
                self.condemn(worker, Cause::Violation(violation.0));
                return true;
            }
        }
        true
    }

    /// Kills a worker. Whatever it still publishes is dropped with it.
    pub(super) fn condemn(&mut self, worker: WorkerId, cause: Cause) {
        if let Some(seat) = &mut self.seats[usize::from(worker)]
            && seat.verdict.is_none()
        {
            tracing::warn!(worker, "worker {cause}");
            seat.verdict = Some(cause);
            let _ = seat.child.signal_group(9);
        }
    }

    pub(super) fn on_record(
        &mut self,
        now: u64,
        worker: WorkerId,
        descriptor: Descriptor,
        heap: Option<Buffer>,
    ) -> Result<(), Violation> {
        if self.seats[usize::from(worker)].as_ref().is_none_or(|seat| seat.verdict.is_some()) {
            return Ok(());
        }
        let (kind, tag, id) = (descriptor.kind(), descriptor.tag(), descriptor.id());
        let (aux, body) = (descriptor.aux(), descriptor.body());
        let is_args = kind & record::ARGS != 0;
        if matches!(
            kind & record::KIND,
            record::REQUEST | record::REPLY | record::STATE | record::MAIL | record::CALL_AT | record::CALL_AT_ANY_LIFE
        ) && let Some(seat) = &mut self.seats[usize::from(worker)]
        {
            if matches!(kind & record::KIND, record::STATE | record::MAIL) && (seat.waits || seat.owes_answer()) {
                // Each may have to be copied for it, or kept: with a flood of them we would run out of memory.
                return Err(Violation("asked something before it had read the last answer"));
            }
            // It has gone on since.
            if let Some(offered) = seat.handed.take().filter(|handed| handed.is_offered && !seat.has_received(handed)) {
                self.offer_again(now, offered);
            }
        }
        match kind & record::KIND {
            record::REPLY => self.on_reply(now, worker, &descriptor, heap),
            record::REQUEST => {
                if self.controller.nested_of(worker) > crate::worker::NESTED_MAX {
                    // Its library keeps to the bound, and one direct call that starts over; a flood would take the queue from everybody else.
                    return Err(Violation("more nested calls open than one function may have"));
                }
                let from = Caller::Worker { worker, call: id };
                let Some(bytes) = self.bytes_of(worker, body, heap)? else {
                    self.answer_worker(worker, id, Outcome::Failed(owner_died()));
                    return Ok(());
                };
                if self.is_too_much(&bytes) {
                    self.answer_worker(
                        worker,
                        id,
                        Outcome::Failed(CallError::new(Code::NoSpace, no_space(&bytes, &self.store.heap))),
                    );
                    self.release(bytes);
                    return Ok(());
                }
                let bytes = match self.apart_from_workers(bytes) {
                    Ok(bytes) => bytes,
                    Err(text) => {
                        self.answer_worker(worker, id, Outcome::Failed(CallError::new(Code::NoSpace, text)));
                        return Ok(());
                    }
                };
                let payload = Payload { bytes, is_args, keeps: false };
                let terms = Terms::default();
                let request = Request { from, function: tag, deadline_ns: aux, terms, payload };
                self.controller.request(now, request);
                Ok(())
            }
            record::RELEASE => self.on_release(worker, tag, body),
            record::TAKEN => self.controller.lease_taken(worker, id, aux),
            record::CLOSED => self.controller.lease_closed(now, worker, id),
            record::DROPPED => {
                self.controller.lease_dropped(worker, id);
                Ok(())
            }
            record::FORGOTTEN => {
                let gone = WorkerId::try_from(tag).ok().filter(|gone| usize::from(*gone) < self.seats.len());
                self.controller.forgotten(now, worker, gone.ok_or(Violation("forgot a participant out of range"))?);
                Ok(())
            }
            record::VOID => {
                let seat = self.seats[usize::from(worker)].as_mut().expect("checked above");
                if let Some(given) = seat.take_void(id, aux) {
                    let calls = self.take_requests_back(worker, [given]);
                    self.controller.withdrawn(now, worker, calls);
                }
                Ok(())
            }
            record::CANCEL => {
                self.controller.cancel_nested(worker, id);
                self.cancel_away(now, worker, id);
                Ok(())
            }
            record::STATE => {
                self.on_state(now, worker, &descriptor, heap)?;
                // It asks again before long, or ends: a sleep in between would cost more than the question.
                self.hands_over(now, worker);
                Ok(())
            }
            record::MAP => self.on_map(worker, tag, id),
            record::CALL_AT | record::CALL_AT_ANY_LIFE => self.on_call_at(now, worker, &descriptor, heap),
            record::MAIL => self.on_mail(now, worker, &descriptor, heap),
            record::FORWARDED => self.on_forwarded(now, worker, &descriptor),
            record::FORWARDED_BODY => self.on_forwarded_body(now, worker, body),
            record::RETURNED => self.on_returned(now, worker, &descriptor),
            record::OVERRUN => {
                self.controller.lease_overrun(now, worker, id);
                Ok(())
            }
            _ => Err(Violation("a record of unknown kind")),
        }
    }

    /// Bytes that a worker gives us: its own block, or somebody else's that it passes on. `None` when their owner has
    /// just died, which the worker cannot know yet.
    pub(super) fn bytes_of(
        &self,
        worker: WorkerId,
        body: Body,
        heap: Option<Buffer>,
    ) -> Result<Option<Bytes>, Violation> {
        match (body, heap) {
            (_, Some(buffer)) if !buffer.as_ref().is_empty() => Ok(Some(Bytes::Heap(self.store.heap.count(buffer)))),
            (Body::Inline(inline), _) => Ok(Some(Bytes::Inline(inline))),
            (Body::Block(block), _) => {
                if block.len > self.config.payload_bytes_max {
                    return Err(Violation("a payload above the process's limit"));
                }
                if block.owner == ParticipantId::CONTROLLER && !self.holds_of_ours(worker, &block) {
                    return Err(Violation("a block of ours that was not lent to it"));
                }
                let Some(segment) = self.segment_of(block.owner) else { return Ok(None) };
                let view = segment.view(&block).map_err(|_| Violation("a block out of bounds"))?;
                let incarnation = self.seats[usize::from(worker)].as_ref().map_or(0, |seat| seat.incarnation);
                Ok(Some(Bytes::Foreign(Foreign { giver: worker, incarnation, view })))
            }
        }
    }

    /// Whether the heap has no room for what a worker just sent. Nobody could tell before it was here: while it came
    /// it was one payload a worker beyond the quota.
    pub(super) fn is_too_much(&self, bytes: &Bytes) -> bool {
        matches!(bytes, Bytes::Heap(_)) && self.store.heap.is_over()
    }

    /// Whether a block of our arena is lent to this worker, or was passed on to it.
    pub(super) fn holds_of_ours(&self, worker: WorkerId, block: &BlockRef) -> bool {
        let key = BlockKey::from(block);
        let given = self.seats[usize::from(worker)].as_ref().map(|seat| &seat.given);
        let passed = |request: &seat::Request| matches!(request, seat::Request::Foreign(foreign) if BlockKey::from(foreign.view.block()) == key);
        let lent = |arena: &praas_shm::Arena| arena.is_lent(ParticipantId::new(worker).expect("a worker"), block);
        self.store.arena.as_ref().is_some_and(lent)
            || given.is_some_and(|given| given.iter().any(|given| passed(&given.request)))
            || self.lent_on.get(&key).is_some_and(|(_, holder)| *holder == worker)
    }

    pub(super) fn segment_of(&self, owner: ParticipantId) -> Option<&Arc<PeerSegment>> {
        if owner == ParticipantId::CONTROLLER {
            // A worker passes on what we lent it.
            return self.shared.as_ref().map(|shared| &shared.segment);
        }
        match self.seats[owner.index()].as_ref().map(|seat| &seat.channel) {
            Some(Channel::Ring { segment, .. }) => Some(segment),
            _ => None,
        }
    }

    pub(super) fn on_reply(
        &mut self,
        now: u64,
        worker: WorkerId,
        reply: &Descriptor,
        heap: Option<Buffer>,
    ) -> Result<(), Violation> {
        let code = Code::from_wire(reply.tag()).ok_or(Violation("an answer with an unknown code"))?;
        let seat = self.seats[usize::from(worker)].as_mut().expect("checked by on_record");
        let is_next = seat.given.front().is_some_and(|given| given.call == reply.id());
        let given = if is_next { seat.given.pop_front() } else { None };
        let Some(Given { request, .. }) = given else { return Err(Violation("an answer to a call it was not given")) };
        let me = ParticipantId::new(worker).expect("workers have participant numbers");
        let keeps = reply.kind() & record::KEEPS != 0;
        // The request comes back with the answer: as its body (an echo), or implicitly.
        let (bytes, returned) = match (request, reply.body()) {
            (seat::Request::Lent(lent), Body::Block(block)) if same_block(&lent, &block) => {
                let arena = self.store.arena.as_mut().expect("lent from the arena");
                let back = arena.take_back(me, &block);
                (Some(Bytes::Own(back.map_err(|_| Violation("echoed more than it was lent"))?)), None)
            }
            (seat::Request::Foreign(foreign), Body::Block(block)) if same_block(foreign.view.block(), &block) => {
                let echoed = self.bytes_of(foreign.giver, reply.body(), None)?;
                (echoed, None)
            }
            (request, body) => {
                let returned = match request {
                    // What the function still reads stays lent until the worker releases it.
                    seat::Request::Lent(_) if keeps => None,
                    seat::Request::Foreign(foreign) if keeps => {
                        self.lent_on.insert(BlockKey::from(foreign.view.block()), (foreign, worker));
                        None
                    }
                    seat::Request::Lent(lent) => {
                        let arena = self.store.arena.as_mut().expect("lent from the arena");
                        let _ = arena.release(me, lent.index, lent.generation);
                        None
                    }
                    seat::Request::Foreign(foreign) => Some(foreign),
                    seat::Request::Heap(Some(buffer)) => {
                        self.recycle(buffer);
                        None
                    }
                    // Its own again since it was handed over.
                    seat::Request::Back(_) => None,
                    seat::Request::Inline(_) | seat::Request::Heap(None) => None,
                };
                (self.bytes_of(worker, body, heap)?, returned)
            }
        };
        #[expect(clippy::cast_possible_truncation, reason = "a status is the low half")]
        let status = (reply.aux() as u32).cast_signed();
        let outcome = match bytes {
            None => Outcome::Failed(CallError { keeps, ..owner_died() }),
            Some(bytes) if code == Code::Ok && self.is_too_much(&bytes) => {
                // `NoSpace` would say that it has not run, and may be sent again.
                let text = answer_did_not_fit(no_space(&bytes, &self.store.heap));
                self.release(bytes);
                Outcome::Failed(CallError { code: Code::Failed, status: -1, text, keeps })
            }
            Some(bytes) if code == Code::Ok => {
                Outcome::Done { status, payload: Payload { bytes, is_args: reply.kind() & record::ARGS != 0, keeps } }
            }
            Some(bytes) => {
                let text = String::from_utf8_lossy(bytes.as_ref()).into_owned();
                self.release(bytes);
                Outcome::Failed(CallError { code, status, text, keeps })
            }
        };
        match self.controller.reply(now, worker, reply.id(), outcome) {
            // An answer says by itself that its request's block is free again; without one we say so.
            Ok(answered) => {
                if let Some(foreign) = returned.filter(|_| !answered) {
                    self.release(Bytes::Foreign(foreign));
                }
                Ok(())
            }
            Err((violation, outcome)) => {
                if let Outcome::Done { payload, .. } = outcome {
                    self.release(payload.bytes);
                }
                Err(violation)
            }
        }
    }

    /// A worker is done with a block: one that we lent on to it, or one that another worker gave it under a lease.
    pub(super) fn on_release(&mut self, worker: WorkerId, giver: u16, body: Body) -> Result<(), Violation> {
        let Body::Block(block) = body else { return Err(Violation("a release without a block")) };
        if giver == 0 {
            let key = BlockKey::from(&block);
            if self.lent_on.get(&key).is_some_and(|(_, holder)| *holder == worker) {
                let (foreign, _) = self.lent_on.remove(&key).expect("looked up above");
                self.release(Bytes::Foreign(foreign));
            } else if let (ParticipantId::CONTROLLER, Some(arena)) = (block.owner, &mut self.store.arena) {
                // One of ours; that it is lent to this worker is the arena's to check.
                let me = ParticipantId::new(worker).expect("workers have participant numbers");
                let _ = arena.release(me, block.index, block.generation);
            }
            return Ok(());
        }
        let giver = WorkerId::try_from(giver).ok().filter(|giver| usize::from(*giver) < self.seats.len());
        let giver = giver.ok_or(Violation("a release to a participant out of range"))?;
        if self.seats[usize::from(giver)].as_ref().is_some_and(|seat| seat.backlog() >= FORWARDED_MAX) {
            return Err(Violation("it releases more blocks than it can have been lent"));
        }
        self.send(giver, Descriptor::new(record::RELEASE, u16::from(worker), 0, 0, body), None);
        Ok(())
    }

    /// With `--isolate`: bytes that a worker can still write, copied into our arena and given back. As they are otherwise.
    ///
    /// # Errors
    /// There is no room; they were given back.
    pub(super) fn apart_from_workers(&mut self, bytes: Bytes) -> Result<Bytes, String> {
        if self.config.isolate && matches!(bytes, Bytes::Foreign(_)) { self.copied(bytes) } else { Ok(bytes) }
    }

    /// Bytes copied into our arena, and given back; over queues, which have none, as they are.
    ///
    /// # Errors
    /// There is no room; they were given back.
    pub(super) fn copied(&mut self, bytes: Bytes) -> Result<Bytes, String> {
        let Some(arena) = &mut self.store.arena else { return Ok(bytes) };
        let loan = arena.loan(bytes.as_ref().len()).map_err(|full| full.to_string());
        let copied = loan.map(|mut block| {
            block.copy_from_slice(bytes.as_ref());
            Bytes::Own(block)
        });
        self.release(bytes);
        copied
    }

    /// Gives bytes back to whoever they belong to.
    pub(super) fn release(&mut self, bytes: Bytes) {
        match bytes {
            Bytes::Own(block) => {
                if let Some(arena) = &mut self.store.arena {
                    arena.free(block);
                }
            }
            Bytes::Foreign(Foreign { giver, incarnation, view }) => {
                let alive = self.seats[usize::from(giver)].as_ref().is_some_and(|seat| seat.incarnation == incarnation);
                if alive {
                    let body = Body::Block(*view.block());
                    self.send(giver, Descriptor::new(record::RELEASE, 0, 0, 0, body), None);
                }
            }
            Bytes::Heap(heap) => self.recycle(heap.into_buffer()),
            Bytes::Inline(_) | Bytes::Text(_) | Bytes::Kept(_) => {}
            Bytes::Shared(shared) => {
                if let Some(bytes) = std::sync::Arc::into_inner(shared) {
                    self.release(bytes);
                }
            }
        }
    }

    pub(super) fn recycle(&mut self, buffer: Buffer) {
        for worker in &self.seated {
            if let Some(Seat { channel: Channel::Queue { receiver, .. }, .. }) = &mut self.seats[usize::from(*worker)] {
                receiver.recycle(buffer);
                return;
            }
        }
    }

    pub(super) fn send(&mut self, worker: WorkerId, descriptor: Descriptor, heap: Option<Heap>) {
        let Some(seat) = &mut self.seats[usize::from(worker)] else { return };
        if let Err(Deaf) = seat.send(descriptor, heap) {
            self.condemn(worker, Cause::Violation("it does not read its records"));
        }
    }

    pub(super) fn tell(&mut self, worker: WorkerId, kind: u8, tag: u16, id: u64, aux: u64) {
        self.send(worker, Descriptor::new(kind, tag, id, aux, Body::Inline(Inline::empty())), None);
    }

    /// Sends a message on the control socket, and a record that says so.
    pub(super) fn notify(&mut self, worker: WorkerId, message: &ToWorker, fds: &[std::os::fd::BorrowedFd<'_>]) {
        let Some(seat) = &self.seats[usize::from(worker)] else { return };
        let bytes = serde_json::to_vec(message).expect("our own messages are serialisable");
        match handover::send(seat.control.as_fd(), &bytes, fds) {
            Ok(()) => self.tell(worker, record::NOTICE, 0, 0, 0),
            Err(error) => {
                tracing::warn!(worker, %error, "control socket");
                self.condemn(worker, Cause::Violation("it does not read its control socket"));
            }
        }
    }
}
