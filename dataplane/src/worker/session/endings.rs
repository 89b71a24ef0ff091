//! How leases and peers end, and what becomes of the calls they carried.

use super::*;

impl Session {
    /// The controller says that our lease is over. What the callee did not take goes through the controller again.
    pub(super) fn lease_ended(&mut self, lease: u64) -> Result<(), Fatal> {
        if let Some(mut calling) = self.calling.take_if(|calling| calling.lease == lease) {
            if calling.overran {
                // Nobody waits for this answer any more; what it brings and what the call carried go back.
                let left = calling.left;
                match calling.exchange.poll() {
                    Ok(Some(ExchangeReply::Reply(late))) => drop(self.accept(late, left, self.giver(calling.callee))),
                    // Over a ring its answer is below, and the callee is idle: it has let go.
                    _ => self.unload(left, calling.callee),
                }
            }
            while {
                let answer = self.link(calling.callee).consumer.poll();
                match answer {
                    Ok(Some(descriptor)) => {
                        self.take_answer(calling.callee, &descriptor)?;
                        true
                    }
                    Ok(None) | Err(_) => false,
                }
            } {}
            let link = self.link(calling.callee);
            let (closed_lease, position) = link.peer_closed();
            let position = if closed_lease == lease { position.max(calling.start) } else { calling.start };
            let unread: Vec<Descriptor> =
                (position..link.producer.tail()).filter_map(|position| link.producer.sent(position)).collect();
            for descriptor in unread {
                self.bounced(calling.callee, descriptor)?;
            }
            self.parted = Some(Parted { exchange: calling.exchange, callee: calling.callee, death: None });
        }
        if let Some(line) = self.calling_line.take_if(|line| line.lease == lease) {
            // Else its queues go at once: the user's quota of them is small.
            self.line_ended = self.awaiting.then_some((line, None));
        }
        self.tell_controller(record::DROPPED, 0, lease, 0)
    }

    /// A record that the callee never took.
    pub(super) fn bounced(&mut self, callee: ParticipantId, descriptor: Descriptor) -> Result<(), Fatal> {
        if descriptor.kind() & record::KIND == record::RELEASE {
            return self.send_controller(&descriptor.with_tag(u16::from(callee.get())), None);
        }
        let Some(call) = self.nested.get(descriptor.id()).filter(|call| !call.settled) else { return Ok(()) };
        call.route = Route::Controller;
        if let (Carried::Lent(block), Some(arena)) = (&call.carried, &self.memory.arena) {
            let _ = arena.borrow_mut().relend(callee, ParticipantId::CONTROLLER, block.index, block.generation);
        }
        self.send_controller(&descriptor, None)
    }

    /// A worker died. Its answers are taken first; then whatever it had begun is lost and the rest starts over.
    pub(super) fn peer_gone(&mut self, gone: ParticipantId, how: &str) -> Result<(), Fatal> {
        if let Some(calling) = self.calling.take_if(|calling| calling.callee == gone) {
            while let Ok(Some(descriptor)) = self.link(gone).consumer.poll() {
                self.take_answer(gone, &descriptor)?;
            }
            let link = self.link(gone);
            let (taken, exchange_taken) = (link.peer_taken(), link.peer_exchange_taken());
            let tail = link.producer.tail();
            let sent: Vec<(u64, Descriptor)> =
                (calling.start..tail).filter_map(|position| Some((position, link.producer.sent(position)?))).collect();
            for (position, descriptor) in sent {
                if position >= taken && descriptor.kind() & record::KIND == record::REQUEST {
                    self.bounced(gone, descriptor)?;
                }
            }
            for call in self.nested.calls() {
                if matches!(call.route, Route::Ring { .. }) && !call.settled {
                    call.settled = true;
                    call.carried = Carried::Nothing;
                    if call.wanted {
                        call.outcome = Outcome::Failed(Box::new(lost(how)));
                    }
                }
            }
            self.nested.trim();
            let death = Some(Death { taken, exchange_taken, how: how.to_owned() });
            // With a direct call open its block is dealt with first, and the rest then (`part_from`).
            if let (Some(arena), false) = (&self.memory.arena, self.awaiting) {
                arena.borrow_mut().reclaim(gone);
            }
            self.parted = Some(Parted { exchange: calling.exchange, callee: gone, death });
        } else if let Some(arena) = &self.memory.arena {
            arena.borrow_mut().reclaim(gone);
        }
        if let Some(line) = self.calling_line.take_if(|line| line.peer == gone) {
            self.line_ended = self.awaiting.then(|| (line, Some(how.to_owned())));
        }
        self.serving.take_if(|serving| serving.caller == gone);
        self.serving_line.take_if(|line| line.peer == gone);
        if let (Some(peer), Channel::Ring { .. }) = (self.peers[gone.index()].take(), &self.channel) {
            drop(peer);
        }
        self.tell_controller(record::FORGOTTEN, u16::from(gone.get()), 0, 0)
    }

    /// Whether the caller of `incoming` no longer waits.
    pub(crate) fn is_cancelled(&mut self, origin: Origin, call: u64) -> bool {
        match origin {
            Origin::Controller => {
                let poll = match &mut self.channel {
                    Channel::Ring { .. } => self.poll_controller().map(drop),
                    Channel::Queue { receiver, .. } => {
                        match receiver.receive_until(Duration::ZERO, Some(std::time::Instant::now())) {
                            Ok(Some(message)) => self.take_message(message),
                            Ok(None) => Ok(()),
                            Err(error) => Err(fatal("queue", error)),
                        }
                    }
                };
                poll.unwrap_or_else(|Fatal(text)| die(&text));
                self.cancelled == call
            }
            Origin::Ring(caller) if self.linked(caller).is_some_and(|link| link.peer_cancelled() == call) => true,
            Origin::Ring(caller) | Origin::Exchange(caller) => {
                self.serving.as_ref().is_none_or(|serving| serving.caller != caller)
            }
            Origin::Connection => self.is_cancelled_on_connection(call),
            Origin::Queue(caller) => {
                self.look_at_queue().unwrap_or_else(|Fatal(text)| die(&text));
                self.serving_line.as_ref().is_none_or(|line| line.peer != caller)
            }
        }
    }
}
