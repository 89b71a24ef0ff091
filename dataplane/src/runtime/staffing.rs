//! Workers as children: started, greeted, attached, buried; and what they leave behind.

use super::printed::Pipes;
use super::*;

impl Process {
    pub(super) fn program(&self) -> String {
        self.config.worker[0].clone()
    }

    pub(super) fn spawn(&mut self, now: u64, worker: WorkerId) {
        self.incarnations += 1;
        match self.start(worker) {
            Ok(seat) => {
                for (fd, base, interest) in seat.watched() {
                    if let Err(error) = self.reactor.watch(fd, base + usize::from(worker), interest) {
                        tracing::error!(worker, %error, "cannot poll a worker");
                    }
                }
                self.seats[usize::from(worker)] = Some(seat);
                self.seated.push(worker);
                self.seated.sort_unstable();
            }
            Err(error) => {
                if self.announced {
                    tracing::error!(worker, %error, "cannot start a worker");
                } else {
                    self.start_error.get_or_insert(error);
                }
                self.controller.died(now, worker, Cause::Exited(127), false, Vec::new(), 0);
            }
        }
    }

    pub(super) fn start(&mut self, worker: WorkerId) -> Result<Seat, ProcessError> {
        let (ours, theirs) = handover::socketpair().map_err(system("no socket for a worker"))?;
        // A worker that does not read must not stop us.
        rustix::io::ioctl_fionbio(&ours, true).map_err(|error| system("no socket for a worker")(error.into()))?;
        let participants = usize::from(self.config.workers) + 1;
        let cpu = self.placement.worker(worker);
        let incarnation = self.incarnations;
        let welcome = WorkerWelcome {
            version: PROTOCOL_VERSION,
            participant: worker,
            incarnation,
            process_id: self.process_id,
            process: self.config.process.clone(),
            ipc: self.config.ipc,
            isolate: self.config.isolate,
            patience: self.placement.patience(cpu, self.placement.controller(), false, participants),
            barriers: praas_shm::has_barriers(),
            ring_slots: RING_SLOTS,
            arena_bytes: self.config.arena_bytes,
            payload_bytes_max: self.config.payload_bytes_max,
            state: super::state::limits(&self.config),
        };
        let greeting =
            serde_json::to_vec(&ToWorker::Welcome(Box::new(welcome))).expect("our own messages are serialisable");
        let channel = match &self.shared {
            Some(shared) => {
                let file = SegmentFile::create(&segment_config(&self.config))?;
                let eventfd = praas_shm::eventfd().map_err(system("no eventfd for a worker"))?;
                handover::send(ours.as_fd(), &greeting, &[file.fd(), eventfd.as_fd(), shared.eventfd.as_fd()])
                    .map_err(system("cannot greet a worker"))?;
                Channel::Mapping { file, eventfd }
            }
            None => {
                let config = QueueConfig::default();
                let (to, to_end) = praas_transport::queue::create(&config)?;
                let (from, from_end) = praas_transport::queue::create(&config)?;
                handover::send(ours.as_fd(), &greeting, &[to_end.as_fd(), from_end.as_fd()])
                    .map_err(system("cannot greet a worker"))?;
                let receiver = Receiver::new(from, self.config.payload_bytes_max);
                Channel::Queue { sender: Box::new(Sender::new(to)), receiver: Box::new(receiver) }
            }
        };
        let bonds = self.confinement.bonds(worker, incarnation).map_err(system("no control group for a worker"))?;
        let entrances: Vec<_> = bonds.entrances.iter().map(OwnedFd::as_fd).collect();
        let pipes = Pipes::new().map_err(system("no pipes for what a worker prints"))?;
        let args: Vec<OsString> = self.config.worker[1..].iter().map(OsString::from).collect();
        let cpus = cpu.map(|core| [core]);
        let program = &self.config.worker[0];
        let child = Spawn {
            program: Path::new(program),
            args: &args,
            control: theirs.as_fd(),
            cpus: cpus.as_ref().map(|cores| &cores[..]),
            user: self.config.worker_uids.map(|first| first + u32::from(worker)),
            output: Some([pipes.theirs[0].as_fd(), pipes.theirs[1].as_fd()]),
            bounds: child::Bounds {
                groups: &entrances,
                data_bytes_max: bonds.data_bytes_max,
                user_processes_max: bonds.user_processes_max,
                oom_score_adj: Some(bonds.oom_score_adj),
            },
        }
        // Not waiting for the exec, which comes tens of milliseconds later where it enters a control group.
        .begin()
        .map_err(|source| ProcessError::WorkerMissing { program: program.clone(), source })?;
        self.printed.begin(worker, child.pid(), pipes);
        let mut seat = Seat::new(incarnation, child, ours, channel, cpu);
        seat.group = bonds.group;
        Ok(seat)
    }

    pub(super) fn on_control(&mut self, now: u64, worker: WorkerId) -> Result<(), ProcessError> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let Some(seat) = &self.seats[usize::from(worker)] else { return Ok(()) };
            // Nothing more for now, or closed: then its pidfd says the rest.
            let Ok((bytes @ 1.., fds)) = handover::receive(seat.control.as_fd(), &mut buffer) else { return Ok(()) };
            match serde_json::from_slice(&buffer[..bytes]) {
                Ok(FromWorker::Mapped) => self.attach(worker),
                Ok(FromWorker::Ready { version, functions, triggers }) => {
                    self.register(now, worker, version, &functions, &triggers);
                }
                Ok(FromWorker::Lane { lane }) => self.on_lane_file(now, worker, lane, fds),
                Err(_) => self.condemn(worker, Cause::Violation("a malformed control message")),
            }
            if !self.announced
                && self.controller.functions().is_empty()
                && self.start_error.is_none()
                && self.controller.ready_count() > 0
            {
                return Err(ProcessError::NoFunctions { program: self.program() });
            }
        }
    }

    /// The worker has mapped its segment: seal it, map it, link, and send ours.
    pub(super) fn attach(&mut self, worker: WorkerId) {
        let attached = self.try_attach(worker);
        if let Err(error) = attached {
            tracing::warn!(worker, error, "cannot attach a worker's segment");
            self.condemn(worker, Cause::Violation("its segment is not what we gave it"));
        }
    }

    pub(super) fn try_attach(&mut self, worker: WorkerId) -> Result<(), String> {
        let shared = self.shared.as_ref().ok_or("no segments in queue mode")?;
        let seat = self.seats[usize::from(worker)].as_mut().ok_or("nobody there")?;
        let Channel::Mapping { file, eventfd } = &seat.channel else { return Err("mapped twice".into()) };
        let text = |error: &dyn std::error::Error| error.to_string();
        file.seal_future_write().map_err(|e| text(&e))?;
        let participant = ParticipantId::new(worker).ok_or("participant out of range")?;
        let identity = praas_shm::Identity { participant, incarnation: seat.incarnation, process: self.process_id };
        let segment = PeerSegment::attach(file, &identity, &segment_config(&self.config)).map_err(|e| text(&e))?;
        let bell = eventfd.try_clone().map_err(|e| text(&e))?;
        let link = Link::establish(&shared.own, Arc::clone(&segment), bell).map_err(|e| text(&e))?;
        let message = serde_json::to_vec(&ToWorker::Attached { incarnation: self.incarnation }).expect("serialisable");
        handover::send(seat.control.as_fd(), &message, &[shared.file.fd(), self.objects.file().fd()])
            .map_err(|e| text(&e))?;
        let (file, eventfd) = (file.try_clone().map_err(|e| text(&e))?, eventfd.try_clone().map_err(|e| text(&e))?);
        self.peers.show(worker, seat.incarnation, &file);
        seat.channel = Channel::Ring { file, eventfd, segment, link: Box::new(link) };
        Ok(())
    }

    pub(super) fn register(
        &mut self,
        now: u64,
        worker: WorkerId,
        version: u32,
        functions: &[String],
        triggers: &[(u16, wire::Trigger)],
    ) {
        let channel_ready = !matches!(
            self.seats[usize::from(worker)].as_ref().map(|seat| &seat.channel),
            None | Some(Channel::Mapping { .. })
        );
        let result = if version != PROTOCOL_VERSION {
            Err(Violation("it speaks another version of the protocol: rebuild it"))
        } else if !channel_ready {
            Err(Violation("it registered before it mapped its segment"))
        } else {
            let is_first = self.controller.functions().is_empty();
            let ready = self.controller.ready(now, worker, functions, triggers);
            if is_first && ready.is_ok() {
                self.set_joins(triggers);
            }
            ready
        };
        if let Err(Violation(what)) = result {
            self.condemn(worker, Cause::Violation(what));
        }
    }

    /// A worker's pidfd is readable: take what it published, judge its call, tell those who knew it.
    pub(super) fn on_death(&mut self, now: u64, worker: WorkerId) {
        let Some(seat) = &mut self.seats[usize::from(worker)] else { return };
        let exit = match seat.child.try_reap() {
            Ok(Some(exit)) => exit,
            Ok(None) => return,
            Err(error) => {
                tracing::error!(worker, %error, "cannot reap a worker");
                Exit::Code(0)
            }
        };
        let limit = self.confinement.limit_of(seat.group.as_ref(), exit);
        let cause = seat.verdict.or(limit.map(Cause::Exceeded)).unwrap_or(match exit {
            Exit::Code(code) => Cause::Exited(code),
            Exit::Signal(signal) => Cause::Killed(signal),
        });
        let exec_error = seat.child.exec_error();
        // Its children, if it had any, go with it: those of its group now, those that left it when they come to us.
        let _ = seat.child.signal_group(9);
        // Answers it had published before it died count.
        if let Some(seat) = &mut self.seats[usize::from(worker)] {
            seat.readable = true;
        }
        while self.poll_worker(now, worker, RECORDS_PER_TURN) {}
        // What that led to is carried out while its segment can still be handed on; the news of its death comes after.
        self.act(now);
        let Some(mut seat) = self.seats[usize::from(worker)].take() else { return };
        for (fd, base, _) in seat.watched() {
            self.reactor.unwatch(fd, base + usize::from(worker));
        }
        self.seated.retain(|seated| *seated != worker);
        self.outlive(now, worker, cause, seat.connection());
        let begun = seat.had_begun();
        let me = ParticipantId::new(worker).expect("workers have participant numbers");
        self.outlive_mail(now, worker, &mut seat);
        self.outlive_parcels(now, worker, seat.incarnation);
        seat.take_unsent();
        self.peers.hide(worker);
        let requests = self.take_requests_back(worker, std::mem::take(&mut seat.given));
        if let Some(arena) = &mut self.store.arena {
            arena.reclaim(me);
        }
        let word = match (cause, exit) {
            (Cause::Exceeded(limit), _) => limit.word(),
            (_, Exit::Signal(signal)) => u64::from(signal.unsigned_abs()),
            (_, Exit::Code(code)) => 1 << 32 | u64::from(code.cast_unsigned()),
        };
        let mut mourners = 0;
        for other in self.seated.clone() {
            let knew = self.seats[usize::from(other)].as_mut().is_some_and(|seat| {
                let knew = seat.knows & (1 << worker) != 0;
                seat.knows &= !(1 << worker);
                knew
            });
            if knew {
                mourners |= 1 << other;
                self.tell(other, record::PEER_GONE, u16::from(worker), 0, word);
            }
        }
        let held: Vec<_> =
            self.lent_on.iter().filter(|(_, (_, holder))| *holder == worker).map(|(key, _)| *key).collect();
        for key in held {
            let (foreign, _) = self.lent_on.remove(&key).expect("listed above");
            self.release(Bytes::Foreign(foreign));
        }
        self.printed.end(now, worker, &mut self.reactor);
        self.confinement.bury(seat.group.take());
        match exec_error {
            Some(source) if !self.announced => {
                let program = self.program();
                self.start_error.get_or_insert(ProcessError::WorkerMissing { program, source });
            }
            Some(error) => tracing::error!(worker, %error, "cannot start a worker"),
            None if self.announced || exit != Exit::Code(0) => tracing::info!(worker, "worker {cause}"),
            None => {}
        }
        if !self.announced {
            let how = match exit {
                _ if seat.verdict == Some(Cause::Overran) => format!("did not answer for {} ms", self.config.start_ms),
                _ => cause.to_string(),
            };
            self.start_error.get_or_insert(ProcessError::WorkerSilent { program: self.program(), how });
        }
        self.controller.died(now, worker, cause, begun, requests, mourners);
        self.keep_estate(now, worker, seat);
        self.strays_due_ns = now;
    }

    /// What a worker was given and has not begun on, or died with, in our hands again.
    pub(super) fn take_requests_back(
        &mut self,
        worker: WorkerId,
        given: impl IntoIterator<Item = Given>,
    ) -> Vec<(CallKey, Payload)> {
        let me = ParticipantId::new(worker).expect("workers have participant numbers");
        let Process { store, seats, .. } = self;
        let lives =
            |of: &Foreign| seats[usize::from(of.giver)].as_ref().is_some_and(|seat| seat.incarnation == of.incarnation);
        let mut back = |request| {
            Some(match request {
                seat::Request::Inline(inline) => Bytes::Inline(inline),
                seat::Request::Lent(block) => Bytes::Own(store.arena.as_mut()?.take_back(me, &block).ok()?),
                // A message, whose sender or receiver is dead.
                seat::Request::Back(foreign) => super::mail::outlived(store, &foreign.view),
                seat::Request::Foreign(foreign) if !lives(&foreign) => super::mail::outlived(store, &foreign.view),
                seat::Request::Foreign(foreign) => Bytes::Foreign(foreign),
                seat::Request::Heap(buffer) => Bytes::Heap(store.heap.count(buffer?)),
            })
        };
        let requests = given.into_iter().filter_map(|Given { call, request, is_args, .. }| {
            back(request).map(|bytes| (call, Payload { bytes, is_args, keeps: false }))
        });
        requests.collect()
    }

    /// Ends children of dead workers that left their process group and came to us (W8), and reaps them (W9). True
    /// while there are some.
    pub(super) fn end_strays(&self) -> bool {
        let known: Vec<i32> = self.seats.iter().flatten().map(|seat| seat.child.pid()).collect();
        let strays = child::stray_children(&known);
        for pid in &strays {
            if let Some(stray) = rustix::process::Pid::from_raw(*pid) {
                let _ = rustix::process::kill_process(stray, rustix::process::Signal::KILL);
                let _ = child::reap_pid(*pid);
            }
        }
        !strays.is_empty()
    }

    pub(super) fn end_workers(&mut self) {
        for seat in self.seats.iter_mut().flatten() {
            let _ = seat.child.signal_group(9);
        }
        for seat in self.seats.iter_mut().flatten() {
            let _ = seat.child.reap_blocking();
        }
        let now = now_ns();
        for worker in self.seated.clone() {
            self.printed.end(now, worker, &mut self.reactor);
            let group = self.seats[usize::from(worker)].as_mut().and_then(|seat| seat.group.take());
            self.confinement.bury(group);
        }
        let until_ns = now + 10 * STRAYS_NS;
        while self.end_strays() | self.confinement.end_leaving() && now_ns() < until_ns {
            std::thread::sleep(Duration::from_nanos(STRAYS_NS / 10));
        }
    }
}
