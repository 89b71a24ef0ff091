//! Serving: the next request, from the controller or under a lease, and its answer.

use super::*;

impl Session {
    /// Waits for the next request, from the controller or under a lease; false when the worker is to exit.
    // The request is an out parameter, so that it is written once, to where the function reads it.
    #[inline(always)]
    pub(crate) fn next_request(&mut self, incoming: &mut Incoming) -> Result<bool, Fatal> {
        let mut waited = Waited::default();
        loop {
            if self.serving.is_some() && self.poll_caller(incoming)? {
                return Ok(true);
            }
            if let Some(next) = self.next_from_controller()? {
                return Ok(next.map(|next| *incoming = next).is_some());
            }
            if self.lent.is_some() {
                if self.next_on_connection(incoming)? {
                    return Ok(true);
                }
                continue;
            }
            if self.serving_line.is_some() {
                if self.await_line(End::Serving, &mut waited, u64::MAX)? && self.next_from_line(incoming)? {
                    return Ok(true);
                }
                continue;
            }
            let patience = self.serving.as_ref().map_or(self.welcome.patience, |serving| serving.patience);
            if patience.spin_ns > 0 && self.watch_caller() {
                continue;
            }
            self.wait(patience, u64::MAX, |session| {
                session
                    .serving
                    .as_ref()
                    .is_some_and(|serving| serving.exchange.ready() || session.ring_ready(serving.caller))
                    || session.controller_ready()
                    || session.serving_line.is_some()
                    || session.revoked.is_some()
                    || !session.inbox.is_empty()
                    || session.shutdown
            })?;
        }
    }

    /// Whether the caller of our lease speaks, within a little while.
    #[inline(always)]
    fn watch_caller(&self) -> bool {
        let Some(serving) = &self.serving else { return false };
        let Some(link) = self.linked(serving.caller) else { return false };
        let (exchange, ring) = (serving.exchange.watch(), link.consumer.watch());
        if serving.exchange.ready() || link.consumer.ready() {
            return true;
        }
        self.watch(|| exchange.changed() || ring.changed())
    }

    /// What the controller has for us: a request, or (`Some(None)`) the end.
    #[inline]
    pub(super) fn next_from_controller(&mut self) -> Result<Option<Option<Incoming>>, Fatal> {
        while self.inbox.is_empty() && self.poll_controller()? {}
        if let Some(lease) = self.revoked.take() {
            self.close_lease(lease)?;
        }
        if let Some(incoming) = self.inbox.pop_front() {
            return Ok(Some(Some(incoming)));
        }
        if self.unrung_ns.is_some() {
            self.ring_controller();
        }
        Ok(self.shutdown.then_some(None))
    }

    /// A request under the lease we serve.
    #[inline(always)]
    pub(super) fn poll_caller(&mut self, incoming: &mut Incoming) -> Result<bool, Fatal> {
        let Some(serving) = &mut self.serving else { return Ok(false) };
        let caller = serving.caller;
        match serving.exchange.poll() {
            Ok(None) => {}
            Ok(Some((sequence, request))) => {
                self.link(caller).mark_exchange_taken(sequence);
                (incoming.origin, incoming.request) = (Origin::Exchange(caller), request);
                return Ok(true);
            }
            Err(_) => return self.distrust(caller).map(|()| false),
        }
        loop {
            let link = self.link(caller);
            match link.consumer.poll() {
                Ok(None) => return Ok(false),
                Ok(Some(request)) if request.kind() & record::KIND == record::REQUEST => {
                    let head = link.consumer.head();
                    link.mark_taken(head);
                    link.producer.prefetch_slot();
                    (incoming.origin, incoming.request) = (Origin::Ring(caller), request);
                    return Ok(true);
                }
                Ok(Some(descriptor)) => self.released(Some(caller), descriptor.block()),
                Err(_) => return self.distrust(caller).map(|()| false),
            }
        }
    }

    /// The input of a request, readable where it lies, and the name of its block. `None`: the request is not served.
    pub(crate) fn open(&mut self, incoming: &mut Incoming) -> Result<Option<(Input, Option<BlockKey>)>, Fatal> {
        let (request, heap) = (&incoming.request, incoming.heap.take());
        if incoming.origin == Origin::Connection {
            let bytes = self.connection_input(request.inline());
            return Ok(Some((Input { bytes, is_args: request.kind() & record::ARGS != 0 }, None)));
        }
        let is_args = request.kind() & record::ARGS != 0;
        let from = incoming.origin.participant();
        match (self.receive(request.body(), self.giver(from), heap), incoming.origin) {
            (Ok((bytes, block)), _) => {
                self.memory.serve(block);
                Ok(Some((Input { bytes, is_args }, block)))
            }
            (Err(fatal), Origin::Controller | Origin::Connection) => Err(fatal),
            (Err(_), Origin::Ring(caller) | Origin::Exchange(caller)) => self.distrust(caller).map(|()| None),
            (Err(_), Origin::Queue(_)) => {
                // A block, in a channel that has none: answered by nobody, and its caller finds out at its deadline.
                self.serving_line = None;
                Ok(None)
            }
        }
    }

    /// The caller of our lease sent something malformed. We stop listening to it; the lease is closed when revoked.
    #[cold]
    pub(super) fn distrust(&mut self, caller: ParticipantId) -> Result<(), Fatal> {
        eprintln!("praas-worker {}: malformed request from {caller}; no longer serving its lease", self.me.get());
        if let Some(mut serving) = self.serving.take() {
            serving.exchange.close();
            let link = self.link(caller);
            let head = link.consumer.head();
            link.close(serving.lease, head);
            link.bell.ring();
        }
        Ok(())
    }

    pub(super) fn close_lease(&mut self, lease: u64) -> Result<(), Fatal> {
        if self.return_connection(lease) {
            return Ok(());
        }
        if let Some(mut serving) = self.serving.take_if(|serving| serving.lease == lease) {
            // From here on nothing of this lease is taken: the caller finds it closed and asks the controller again.
            serving.exchange.close();
            let link = self.link(serving.caller);
            link.consumer.publish();
            let head = link.consumer.head();
            link.close(lease, head);
            link.bell.ring();
        }
        self.serving_line.take_if(|line| line.lease == lease);
        self.return_blocks()?;
        self.tell_controller(record::CLOSED, 0, lease, 0)
    }

    /// Marks the controller's request as begun: from here on it may have run. False when it was withdrawn: it must not run.
    #[inline(always)]
    pub(crate) fn begin(&mut self, incoming: &Incoming) -> Result<bool, Fatal> {
        let (Origin::Controller, Channel::Ring { link, .. }) = (incoming.origin, &self.channel) else {
            return Ok(true);
        };
        match link.take(incoming.position) {
            Take::Mine => Ok(true),
            Take::Void => Ok(false),
            Take::Crossed => {
                self.tell_controller(record::VOID, 0, incoming.request.id(), incoming.position)?;
                Ok(false)
            }
        }
    }

    /// Answers a request with bytes or with an error's text.
    #[inline]
    pub(crate) fn reply(
        &mut self,
        origin: Origin,
        call: u64,
        block: Option<BlockKey>,
        code: Code,
        status: i32,
        payload: Payload<'_>,
    ) -> Result<(), Fatal> {
        if origin == Origin::Connection {
            let bytes = payload.bytes.as_ref().len() as u64;
            if code == Code::Ok && bytes > self.memory.payload_bytes_max {
                let text = format!("{bytes} bytes, the process allows {}", self.memory.payload_bytes_max);
                return self.reply_error(origin, call, block, &InvokeError::TooLarge { text });
            }
            return self.reply_on_connection(call, code, status, payload);
        }
        let to = origin.participant();
        let bytes = match payload.bytes {
            // A third party's block: the far end of a lease may not know that third party, so it gets a copy.
            Bytes { place: Place::Held(held), .. } if to != ParticipantId::CONTROLLER && Some(key(&held)) != block => {
                match self.copy_of(held.as_slice()) {
                    Ok(loan) => Place::Own(loan).into(),
                    Err(error) => return self.reply_error(origin, call, block, &error),
                }
            }
            bytes => bytes,
        };
        let (body, carried, heap) = match self.load(bytes, to) {
            Ok(loaded) => loaded,
            Err(error) => return self.reply_error(origin, call, block, &error),
        };
        if let (Carried::Passed(passed), true) =
            (carried, matches!(carried, Carried::Passed(passed) if Some(passed) == block))
        {
            // An echo: the answer says that we have let go.
            if let Some(held) = self.take_passed(passed) {
                held.forget();
            }
        }
        let keeps = if self.memory.served() { record::KEEPS } else { 0 };
        let kind = record::REPLY | keeps | if payload.is_args { record::ARGS } else { 0 };
        let aux = u64::from(status.cast_unsigned());
        let reply = Descriptor::new(kind, code as u16, call, aux, body);
        match origin {
            Origin::Controller | Origin::Connection => self.answer_controller(&reply, heap),
            Origin::Queue(_) => self.reply_on_line(&reply, heap),
            Origin::Ring(_) | Origin::Exchange(_) => {
                self.reply_leased(origin, &reply);
                Ok(())
            }
        }
    }

    /// Answers under a lease. Without the lease nobody waits for the answer any more.
    #[inline(always)]
    pub(crate) fn reply_leased(&mut self, origin: Origin, reply: &Descriptor) {
        let Some(serving) = &mut self.serving else { return };
        let (caller, unfenced) = (serving.caller, serving.unfenced);
        if origin == Origin::Exchange(caller) {
            serving.exchange.reply(reply);
            ring(&self.link(caller).bell, unfenced);
        } else if origin == Origin::Ring(caller) {
            let link = self.link(caller);
            // Full cannot be: a caller has fewer calls in flight than the ring has slots. One that lies loses its answer.
            let _ = link.producer.try_send(reply);
            ring(&link.bell, unfenced);
        }
    }

    /// Whether the owner of the bytes still lives, so that others can read them where they are.
    pub(super) fn knows(&self, held: &Held) -> bool {
        let owner = self.peers[held.block().owner.index()].as_ref();
        owner.is_some_and(|owner| owner.incarnation == held.owner_incarnation())
    }

    pub(super) fn copy_of(&self, bytes: &[u8]) -> Result<Loan, InvokeError> {
        let mut loan = self.memory.loan(bytes.len())?;
        loan.copy_from_slice(bytes);
        Ok(loan)
    }

    #[cold]
    pub(crate) fn reply_error(
        &mut self,
        origin: Origin,
        call: u64,
        block: Option<BlockKey>,
        error: &InvokeError,
    ) -> Result<(), Fatal> {
        let code = match error {
            InvokeError::UnknownFunction { .. } => Code::UnknownFunction,
            InvokeError::Panicked { .. } => Code::Panicked,
            // An answer that there is no room for, too: `NoSpace` would say that the function has not run.
            _ => Code::Failed,
        };
        let text = match error {
            InvokeError::Failed { text, .. }
            | InvokeError::Panicked { text }
            | InvokeError::UnknownFunction { text } => text.clone(),
            other => answer_did_not_fit(other),
        };
        let text = &text.as_bytes()[..text.len().min(TEXT_BYTES_MAX)];
        let fits = self.memory.arena.is_none()
            || origin == Origin::Connection
            || text.len() <= 40
            || self.memory.loan(text.len()).is_ok();
        let text = if fits { text } else { &text[..40] };
        self.reply(origin, call, block, code, error.status(), text.into())
    }
}
