//! Calling: over the exchange line, over rings, or through the controller.

use super::*;

impl Session {
    /// Calls and waits: directly when a lease is at hand and its way is free, else as `submit` and `collect` would.
    #[inline(always)]
    pub(crate) fn invoke(
        &mut self,
        function: u16,
        deadline_ns: u64,
        payload: Payload<'_>,
    ) -> Result<Reply, InvokeError> {
        self.return_or_die();
        if self.is_batched(function) {
            let number = self.submit(function, deadline_ns, payload)?;
            return self.collect(number);
        }
        let Some(calling) = &self.calling else { return self.invoke_by_window(function, deadline_ns, payload) };
        let callee = calling.callee;
        let over_exchange = self.exchange_wanted && !calling.exchange.busy();
        if !over_exchange && (self.exchange_wanted || calling.in_flight > 0 || calling.overran) {
            return self.invoke_by_window(function, deadline_ns, payload);
        }
        let kind = record::REQUEST | if payload.is_args { record::ARGS } else { 0 };
        let id = if over_exchange {
            0
        } else {
            self.direct_calls += 1;
            DIRECT | self.direct_calls
        };
        let (request, carried) = match payload.bytes.short() {
            Some(inline) => (Descriptor::new(kind, function, id, deadline_ns, inline), Carried::Nothing),
            None if matches!(payload.bytes.place, Place::Held(_)) => {
                return self.invoke_by_window(function, deadline_ns, payload);
            }
            None => {
                let (body, carried, _) = self.load(payload.bytes, callee)?;
                (Descriptor::new(kind, function, id, deadline_ns, body), carried)
            }
        };
        if over_exchange {
            self.invoke_exchange(request, callee, carried)
        } else {
            self.invoke_ring(request, callee, carried)
        }
    }

    #[cold]
    #[inline(never)]
    pub(super) fn invoke_by_window(
        &mut self,
        function: u16,
        deadline_ns: u64,
        payload: Payload<'_>,
    ) -> Result<Reply, InvokeError> {
        if self.has_line() {
            return self.invoke_line(function, deadline_ns, payload);
        }
        let number = self.submit(function, deadline_ns, payload)?;
        self.collect(number)
    }

    /// Request and answer in one cache line, shared with the callee alone.
    #[inline(always)]
    pub(super) fn invoke_exchange(
        &mut self,
        request: Descriptor,
        callee: ParticipantId,
        carried: Carried,
    ) -> Result<Reply, InvokeError> {
        let calling = self.calling.as_ref().expect("checked by the caller");
        let spins = calling.patience.spin_ns > 0;
        if self.ring_ready(callee) {
            // Blocks that the callee kept longer than its answers took; nobody else reads them off its ring.
            self.take_callee();
        }
        let calling = self.calling.as_mut().expect("a lease ends only in `take_controller`");
        let (sequence, unfenced) = (calling.exchange.submit(&request), calling.unfenced);
        ring(&self.link(callee).bell, unfenced);
        let exchange = &self.calling.as_ref().expect("checked by the caller").exchange;
        let reply = exchange.watch();
        if spins && (exchange.ready() || self.watch(|| reply.changed())) {
            let calling = self.calling.as_mut().expect("checked by the caller");
            if let Ok(Some(ExchangeReply::Reply(reply))) = calling.exchange.poll() {
                return self.conclude(reply, callee, carried);
            }
        }
        self.await_exchange(sequence, request, callee, carried)
    }

    #[cold]
    #[inline(never)]
    pub(super) fn await_exchange(
        &mut self,
        sequence: u32,
        request: Descriptor,
        callee: ParticipantId,
        carried: Carried,
    ) -> Result<Reply, InvokeError> {
        self.parted = None;
        self.awaiting = true;
        let patience = self.calling.as_ref().map_or(self.welcome.patience, |calling| calling.patience);
        loop {
            let waited = self.wait(patience, request.aux(), |session| {
                session.calling.as_ref().is_none_or(|calling| calling.exchange.ready()) || session.controller_ready()
            });
            let ready = waited.unwrap_or_else(|Fatal(text)| die(&text));
            if let Some(calling) = &mut self.calling
                && let Ok(Some(ExchangeReply::Reply(reply))) = calling.exchange.poll()
            {
                self.awaiting = false;
                return self.conclude(reply, callee, carried);
            }
            self.take_controller();
            if let Some(mut parted) = self.parted.take() {
                let reply = match parted.exchange.poll() {
                    Ok(Some(ExchangeReply::Reply(reply))) => Some(reply),
                    _ => None,
                };
                let begun = parted.death.as_ref().is_some_and(|death| death.exchange_taken == sequence);
                return self.part(parted, reply, begun, request, carried);
            }
            if !ready {
                self.awaiting = false;
                // The callee may still be at it: the line, and what the call carried, stay its until the lease ends.
                if let Some(calling) = &mut self.calling {
                    calling.left = carried;
                }
                return Err(self.overran());
            }
        }
    }

    /// Request and answer each in the next slot of a ring.
    #[inline(always)]
    pub(super) fn invoke_ring(
        &mut self,
        request: Descriptor,
        callee: ParticipantId,
        carried: Carried,
    ) -> Result<Reply, InvokeError> {
        let calling = self.calling.as_ref().expect("checked by the caller");
        let (spins, unfenced) = (calling.patience.spin_ns > 0, calling.unfenced);
        let link = self.link(callee);
        let Ok(position) = link.producer.try_send(&request) else {
            // Full of what the callee has not read yet: then this call waits its turn with the controller.
            let carried = self.hand_on(carried, callee);
            let body = carried_body(request.body(), &carried);
            let number = self.resend(request.kind(), request.tag(), request.aux(), body, carried)?;
            return self.collect(number);
        };
        ring(&link.bell, unfenced);
        for _ in 0..if spins { ANSWERS_MAX } else { 0 } {
            let link = self.linked(callee).expect("a lease has a link");
            let answer = link.consumer.watch();
            if !link.consumer.ready() && !self.watch(|| answer.changed()) {
                break;
            }
            match self.link(callee).consumer.poll() {
                Ok(Some(reply)) if reply.id() == request.id() => {
                    self.link(callee).producer.prefetch_slot();
                    return self.conclude(reply, callee, carried);
                }
                Ok(Some(other)) => self.take_answer(callee, &other).unwrap_or_else(|Fatal(text)| die(&text)),
                _ => {}
            }
        }
        self.await_ring(position, request, callee, carried)
    }

    #[cold]
    #[inline(never)]
    pub(super) fn await_ring(
        &mut self,
        position: u64,
        request: Descriptor,
        callee: ParticipantId,
        carried: Carried,
    ) -> Result<Reply, InvokeError> {
        self.parted = None;
        self.direct_reply = None;
        self.awaiting = true;
        let patience = self.calling.as_ref().map_or(self.welcome.patience, |calling| calling.patience);
        loop {
            let waited = self.wait(patience, request.aux(), |session| {
                session.calling.as_ref().is_none_or(|calling| session.ring_ready(calling.callee))
                    || session.controller_ready()
            });
            let ready = waited.unwrap_or_else(|Fatal(text)| die(&text));
            self.take_callee();
            self.take_controller();
            let reply = self.direct_reply.take_if(|reply| reply.id() == request.id());
            if let Some(parted) = self.parted.take() {
                let begun = parted.death.as_ref().is_some_and(|death| position < death.taken);
                return self.part(parted, reply, begun, request, carried);
            }
            if let Some(reply) = reply {
                self.awaiting = false;
                return self.conclude(reply, callee, carried);
            }
            if !ready {
                self.awaiting = false;
                // Its answer, should it come, is nobody's; the block comes back with the end of the lease.
                self.direct_calls += 1;
                if let Some(calling) = &mut self.calling {
                    calling.left = carried;
                }
                return Err(self.overran());
            }
        }
    }

    /// Turns the answer to a direct call into a reply.
    #[inline(always)]
    pub(super) fn conclude(
        &mut self,
        reply: Descriptor,
        callee: ParticipantId,
        carried: Carried,
    ) -> Result<Reply, InvokeError> {
        match (reply.inline(), &carried) {
            (Some(inline), Carried::Nothing) if reply.tag() == Code::Ok as u16 => {
                Ok(Reply { status: status(reply.aux()), bytes: inline.into() })
            }
            _ => self.accept(reply, carried, self.giver(callee)),
        }
    }

    /// Takes everything the controller has sent.
    #[inline]
    pub(super) fn take_controller(&mut self) {
        while self.poll_controller().unwrap_or_else(|Fatal(text)| die(&text)) {}
    }

    /// Takes everything the worker that serves us has sent.
    #[inline]
    pub(super) fn take_callee(&mut self) {
        while self.poll_callee().unwrap_or_else(|Fatal(text)| die(&text)) {}
    }

    /// The lease ended under a direct call: it was answered just before, or is lost because its callee had begun on it
    /// before it died, or else starts over through the controller.
    #[cold]
    pub(super) fn part(
        &mut self,
        parted: Parted,
        reply: Option<Descriptor>,
        begun: bool,
        request: Descriptor,
        carried: Carried,
    ) -> Result<Reply, InvokeError> {
        self.awaiting = false;
        let Parted { callee, death, .. } = parted;
        let starts_over = reply.is_none() && !begun;
        let concluded = reply.map(|reply| self.conclude(reply, callee, carried));
        let carried = if starts_over { self.hand_on(carried, callee) } else { Carried::Nothing };
        if let (Some(_), Some(arena)) = (&death, &self.memory.arena) {
            // Whatever else it had of ours.
            arena.borrow_mut().reclaim(callee);
        }
        match (concluded, death) {
            (Some(result), _) => result,
            (None, Some(death)) if begun => Err(lost(&death.how)),
            (None, _) => {
                let body = carried_body(request.body(), &carried);
                let number = self.resend(request.kind(), request.tag(), request.aux(), body, carried)?;
                self.collect(number)
            }
        }
    }

    /// Turns what was lent to a callee into what is lent to the controller. The dead have given everything back.
    pub(super) fn hand_on(&mut self, carried: Carried, callee: ParticipantId) -> Carried {
        if let (Carried::Lent(block), Some(arena)) = (&carried, &self.memory.arena) {
            let _ = arena.borrow_mut().relend(callee, ParticipantId::CONTROLLER, block.index, block.generation);
        }
        carried
    }

    pub(super) fn resend(
        &mut self,
        kind: u8,
        function: u16,
        deadline_ns: u64,
        body: Body,
        carried: Carried,
    ) -> Result<u64, InvokeError> {
        let number = self.nested.open(Route::Controller, deadline_ns, carried);
        let request = Descriptor::new(kind, function, number, deadline_ns, body);
        self.send_controller(&request, None).unwrap_or_else(|Fatal(text)| die(&text));
        Ok(number)
    }

    /// Starts a call and returns its number. Under a lease it goes straight into the callee's ring.
    pub(crate) fn submit(&mut self, function: u16, deadline_ns: u64, payload: Payload<'_>) -> Result<u64, InvokeError> {
        self.return_or_die();
        self.check_nested()?;
        let kind = record::REQUEST | if payload.is_args { record::ARGS } else { 0 };
        let foreign = matches!(payload.bytes.place, Place::Held(_));
        let by_controller = foreign || self.is_batched(function);
        let leased =
            self.calling.as_ref().filter(|_| !by_controller).map(|calling| (calling.callee, calling.in_flight));
        let Some((callee, in_flight)) = leased else {
            let (body, carried, heap) = self.load(payload.bytes, ParticipantId::CONTROLLER)?;
            let number = self.nested.open(Route::Controller, deadline_ns, carried);
            let request = Descriptor::new(kind, function, number, deadline_ns, body);
            self.send_controller(&request, heap).unwrap_or_else(|Fatal(text)| die(&text));
            return Ok(number);
        };
        if in_flight >= LEASED_MAX {
            let text = format!("{LEASED_MAX} leased calls are in flight, the most a ring holds; wait for some");
            return Err(InvokeError::Busy { text });
        }
        let number = self.nested.next;
        let (request, carried) = match payload.bytes.short() {
            Some(inline) => (Descriptor::new(kind, function, number, deadline_ns, inline), Carried::Nothing),
            None => {
                let (body, carried, _) = self.load(payload.bytes, callee)?;
                (Descriptor::new(kind, function, number, deadline_ns, body), carried)
            }
        };
        let link = self.link(callee);
        match link.producer.try_send(&request) {
            Ok(position) => {
                let calling = self.calling.as_mut().expect("checked above");
                calling.in_flight += 1;
                let unfenced = calling.unfenced;
                ring(&self.link(callee).bell, unfenced);
                Ok(self.nested.open(Route::Ring { position }, deadline_ns, carried))
            }
            Err(_) => {
                self.unload(carried, callee);
                Err(InvokeError::Busy { text: "the ring to the leased worker is full; wait for some calls".into() })
            }
        }
    }

    /// Whether one more nested call may be opened.
    pub(super) fn check_nested(&self) -> Result<(), InvokeError> {
        if self.nested.len() < NESTED_MAX {
            return Ok(());
        }
        let text = format!("{NESTED_MAX} nested calls are open, the most one function may have; wait for some");
        Err(InvokeError::Busy { text })
    }

    /// Waits for the outcome of a call started with `submit`. Each number is collected once.
    pub(crate) fn collect(&mut self, number: u64) -> Result<Reply, InvokeError> {
        let known = self.nested.get(number).filter(|call| call.wanted);
        let Some(call) = known else {
            return Err(InvokeError::Protocol { text: format!("nested call {number} is not open") });
        };
        let deadline_ns = if call.route.is_leased() { call.deadline_ns } else { UNTIL_TOLD };
        loop {
            if let Some(outcome) = self.nested.get(number).and_then(|call| call.outcome.take()) {
                self.dismiss(number);
                return outcome;
            }
            self.take_callee();
            self.take_controller();
            if self.nested.has_outcome(number) {
                continue;
            }
            let patience = self.calling.as_ref().map_or(self.welcome.patience, |calling| calling.patience);
            let waited = self.wait(patience, deadline_ns, |session| {
                session.calling.as_ref().is_some_and(|calling| session.ring_ready(calling.callee))
                    || session.controller_ready()
                    || session.nested.has_outcome(number)
            });
            if !waited.unwrap_or_else(|Fatal(text)| die(&text)) {
                self.dismiss(number);
                return Err(self.overran());
            }
        }
    }

    /// Waits until one of these calls has its outcome, and says which: a place among them.
    pub(crate) fn collect_any(&mut self, numbers: &[u64]) -> (usize, Result<Reply, InvokeError>) {
        loop {
            self.take_callee();
            self.take_controller();
            for (at, number) in numbers.iter().enumerate() {
                let outcome = match self.nested.get(*number).filter(|call| call.wanted) {
                    Some(call) => call.outcome.take(),
                    None => Some(Err(InvokeError::Protocol { text: format!("nested call {number} is not open") })),
                };
                if let Some(outcome) = outcome {
                    self.dismiss(*number);
                    return (at, outcome);
                }
            }
            // The controller keeps the deadlines of what goes through it; under a lease they are ours to keep.
            let leased = numbers.iter().enumerate().filter_map(|(at, number)| {
                let call = self.nested.get(*number)?;
                call.route.is_leased().then_some((call.deadline_ns, at))
            });
            let first = leased.min();
            let patience = self.calling.as_ref().map_or(self.welcome.patience, |calling| calling.patience);
            let deadline_ns = first.map_or(UNTIL_TOLD, |(deadline_ns, _)| deadline_ns);
            let waited = self.wait(patience, deadline_ns, |session| {
                session.calling.as_ref().is_some_and(|calling| session.ring_ready(calling.callee))
                    || session.controller_ready()
                    || numbers.iter().any(|number| session.nested.has_outcome(*number))
            });
            if let (false, Some((_, at))) = (waited.unwrap_or_else(|Fatal(text)| die(&text)), first) {
                self.dismiss(numbers[at]);
                return (at, Err(self.overran()));
            }
        }
    }

    /// Nobody waits for this call any more: it is not begun if it was not yet, and else told so.
    pub(crate) fn call_off(&mut self, number: u64) {
        let Some(call) = self.nested.get(number).filter(|call| !call.settled) else { return self.dismiss(number) };
        match call.route {
            Route::Controller | Route::Away => {
                self.tell_controller(record::CANCEL, 0, number, 0).unwrap_or_else(|Fatal(text)| die(&text));
            }
            Route::Ring { .. } => {
                if let Some(callee) = self.calling.as_ref().map(|calling| calling.callee) {
                    self.link(callee).cancel(number);
                }
            }
        }
        self.dismiss(number);
    }

    /// The outcome if it is there.
    pub(crate) fn try_collect(&mut self, number: u64) -> Option<Result<Reply, InvokeError>> {
        self.take_callee();
        self.take_controller();
        let outcome = self.nested.get(number)?.outcome.take();
        if outcome.is_some() {
            self.dismiss(number);
        }
        outcome
    }

    /// Nobody asks for this call any more.
    pub(super) fn dismiss(&mut self, number: u64) {
        if let Some(call) = self.nested.get(number) {
            call.wanted = false;
            self.nested.trim();
        }
    }

    /// The function returned: its open calls are nobody's. What they carry comes back with their answers.
    #[inline(always)]
    pub(crate) fn dismiss_all(&mut self) {
        if self.nested.first != self.nested.next {
            self.dismiss_open();
        }
    }

    /// Those to other processes are called off: nobody else ends them there before their deadline.
    #[cold]
    fn dismiss_open(&mut self) {
        for number in self.nested.first..self.nested.next {
            if self.nested.get(number).is_some_and(|call| call.route == Route::Away && !call.settled && call.wanted) {
                self.tell_controller(record::CANCEL, 0, number, 0).unwrap_or_else(|Fatal(text)| die(&text));
            }
        }
        for call in self.nested.calls() {
            call.wanted = false;
            call.outcome = Outcome::None;
        }
        self.nested.trim();
    }

    #[cold]
    pub(super) fn overran(&mut self) -> InvokeError {
        if let Some(calling) = self.calling.as_mut().filter(|calling| !calling.overran) {
            calling.overran = true;
            let lease = calling.lease;
            self.tell_controller(record::OVERRUN, 0, lease, 0).unwrap_or_else(|Fatal(text)| die(&text));
        }
        InvokeError::Timeout { text: "the deadline passed during a leased call".into() }
    }

    /// Takes one answer from the ring of the worker that serves us.
    #[inline]
    pub(super) fn poll_callee(&mut self) -> Result<bool, Fatal> {
        let Some(callee) = self.calling.as_ref().map(|calling| calling.callee) else { return Ok(false) };
        match self.link(callee).consumer.poll() {
            Ok(None) => Ok(false),
            Ok(Some(descriptor)) => {
                self.take_answer(callee, &descriptor)?;
                Ok(true)
            }
            // It can only waste our time: what it owes us ends with the lease or at the deadline.
            Err(_) => Ok(false),
        }
    }

    #[inline]
    pub(super) fn take_answer(&mut self, callee: ParticipantId, descriptor: &Descriptor) -> Result<(), Fatal> {
        if descriptor.id() & DIRECT != 0 && descriptor.kind() & record::KIND == record::REPLY {
            if descriptor.id() == DIRECT | self.direct_calls {
                self.direct_reply = Some(*descriptor);
            } else {
                // To a call that ran past its deadline: its bytes go back unread.
                drop(self.accept(*descriptor, Carried::Nothing, self.giver(callee)));
            }
            Ok(())
        } else if descriptor.kind() & record::KIND == record::REPLY {
            if let Some(calling) = &mut self.calling {
                calling.in_flight = calling.in_flight.saturating_sub(1);
            }
            self.settle(descriptor, self.giver(callee), None)
        } else {
            self.released(Some(callee), descriptor.block());
            Ok(())
        }
    }

    /// An answer to a call of the window.
    pub(super) fn settle(&mut self, descriptor: &Descriptor, giver: Giver, heap: Option<Buffer>) -> Result<(), Fatal> {
        let from_controller = giver.participant == ParticipantId::CONTROLLER;
        let found =
            self.nested.get(descriptor.id()).filter(|call| !call.settled && call.route.is_leased() != from_controller);
        let Some(call) = found else {
            return if from_controller { Err(Fatal("an answer to a call that is not open".into())) } else { Ok(()) };
        };
        call.settled = true;
        let (carried, wanted) = (call.carried, call.wanted);
        call.carried = Carried::Nothing;
        if let (Some(inline), Carried::Nothing, true, None) = (descriptor.inline(), carried, wanted, &heap)
            && descriptor.tag() == Code::Ok as u16
        {
            call.outcome = Outcome::Short(status(descriptor.aux()), inline);
            return Ok(());
        }
        let outcome = match heap {
            Some(buffer) if !buffer.as_ref().is_empty() => self.accept_heap(descriptor, buffer),
            _ => self.accept(*descriptor, carried, giver),
        };
        if wanted {
            let call = self.nested.get(descriptor.id()).expect("found above");
            call.outcome = outcome.into();
        }
        self.nested.trim();
        Ok(())
    }

    pub(super) fn accept_heap(&self, descriptor: &Descriptor, buffer: Buffer) -> Result<Reply, InvokeError> {
        let status = status(descriptor.aux());
        match Code::from_wire(descriptor.tag()) {
            Some(Code::Ok) => {
                let loan = Loan::of_heap(buffer, &self.memory);
                Ok(Reply { status, bytes: Place::Own(loan).into() })
            }
            Some(code) => Err(InvokeError::from_wire(code, status, buffer.as_ref())),
            None => Err(InvokeError::Protocol { text: format!("answer with unknown code {}", descriptor.tag()) }),
        }
    }

    /// Turns an answer into a reply, and brings back what the call carried.
    #[inline]
    pub(super) fn accept(
        &mut self,
        descriptor: Descriptor,
        carried: Carried,
        giver: Giver,
    ) -> Result<Reply, InvokeError> {
        let status = status(descriptor.aux());
        let bytes = match (descriptor.body(), carried) {
            (Body::Inline(inline), Carried::Nothing) => inline.into(),
            (Body::Block(block), Carried::Lent(lent)) if same_block(&block, &lent) => {
                match self.take_back(giver.participant, &block) {
                    Some(loan) => Place::Own(loan).into(),
                    None => return Err(InvokeError::Protocol { text: "echoed more than it was lent".into() }),
                }
            }
            (body, carried) => {
                let code = Code::from_wire(descriptor.tag()).unwrap_or(Code::Protocol);
                let keeps = descriptor.kind() & record::KEEPS != 0;
                match carried {
                    // The worker that ran the call still reads it; a RELEASE follows when it has let go.
                    Carried::Lent(_) | Carried::Passed(_) if keeps || code.leaves_block_lent() => {}
                    // What was passed on came back by echo.
                    Carried::Passed(passed) if matches!(body, Body::Block(block) if BlockKey::from(&block) == passed) => {
                        if let Some(held) = self.take_passed(passed) {
                            return self.finish(descriptor, status, Place::Held(held).into());
                        }
                    }
                    carried => self.unload(carried, giver.participant),
                }
                match self.receive(body, giver, None) {
                    Ok((bytes, _)) => bytes,
                    Err(Fatal(text)) => return Err(InvokeError::Protocol { text }),
                }
            }
        };
        self.finish(descriptor, status, bytes)
    }

    #[inline]
    pub(super) fn finish(
        &self,
        descriptor: Descriptor,
        status: i32,
        bytes: Bytes<'static>,
    ) -> Result<Reply, InvokeError> {
        if descriptor.tag() == Code::Ok as u16 {
            return Ok(Reply { status, bytes });
        }
        let reply = Reply { status, bytes };
        match Code::from_wire(descriptor.tag()) {
            Some(code) => Err(InvokeError::from_wire(code, status, &reply)),
            None => Err(InvokeError::Protocol { text: format!("answer with unknown code {}", descriptor.tag()) }),
        }
    }
}
