//! Bytes in and out: made readable where they are, lent, passed on, and given back.

use super::*;

impl Session {
    /// Makes received bytes readable where they are.
    #[inline(always)]
    pub(super) fn receive(
        &self,
        body: Body,
        giver: Giver,
        heap: Option<Buffer>,
    ) -> Result<(Bytes, Option<BlockKey>), Fatal> {
        match (body, heap) {
            (_, Some(buffer)) if !buffer.as_ref().is_empty() => Ok((Bytes::Heap(buffer), None)),
            (Body::Inline(inline), _) => Ok((Bytes::Inline(inline), None)),
            (Body::Block(block), _) => {
                let peer = self.peers[block.owner.index()].as_ref();
                let peer = peer.ok_or_else(|| fatal("a block of a stranger", block.owner))?;
                let view = peer.segment.view(&block).map_err(|e| fatal("a block out of bounds", e))?;
                let held = Held::new(view, giver, peer.incarnation, &self.memory);
                Ok((Bytes::Held(held), Some(BlockKey::from(&block))))
            }
        }
    }

    pub(super) fn lend(&self, loan: Loan, to: ParticipantId) -> BlockRef {
        let Store::Block(block) = loan.into_store() else { unreachable!("a ring's memory is its arena") };
        let arena = self.memory.arena.as_ref().expect("a ring has an arena");
        let bytes = block.len();
        arena.borrow_mut().lend(block, bytes, to)
    }

    /// Readies bytes for `to`: inside the record, as a block of ours, as somebody else's block, or as a heap buffer.
    #[inline(always)]
    pub(super) fn load(
        &mut self,
        source: Source<'_>,
        to: ParticipantId,
    ) -> Result<(Body, Carried, Option<Buffer>), InvokeError> {
        let slice: &[u8] = match &source {
            Source::Slice(slice) => slice,
            Source::Vec(vec) => vec,
            Source::Bytes(Bytes::Inline(inline)) => return Ok((Body::Inline(*inline), Carried::Nothing, None)),
            Source::Bytes(_) => return self.load_bytes(source, to),
        };
        if let Some(inline) = Inline::new(slice) {
            return Ok((Body::Inline(inline), Carried::Nothing, None));
        }
        let mut loan = self.memory.loan(slice.len())?;
        loan.copy_from_slice(slice);
        self.load_bytes(Source::Bytes(Bytes::Own(loan)), to)
    }

    pub(super) fn load_bytes(
        &mut self,
        source: Source<'_>,
        to: ParticipantId,
    ) -> Result<(Body, Carried, Option<Buffer>), InvokeError> {
        let Source::Bytes(bytes) = source else { unreachable!("slices are loaded by `load`") };
        let empty = Body::Inline(NO_HOLD);
        Ok(match bytes {
            Bytes::Inline(inline) => (Body::Inline(inline), Carried::Nothing, None),
            Bytes::Heap(buffer) => (empty, Carried::Nothing, Some(buffer)),
            Bytes::Own(loan) if self.memory.arena.is_some() => {
                let block = self.lend(loan, to);
                (Body::Block(block), Carried::Lent(block), None)
            }
            Bytes::Own(loan) => match loan.into_store() {
                Store::Heap(buffer) => (empty, Carried::Nothing, Some(buffer)),
                Store::Block(_) => unreachable!("a queue's memory is the heap"),
            },
            Bytes::Held(held) if !self.knows(&held) => {
                let copy = self.copy_of(&held)?;
                return self.load_bytes(Source::Bytes(Bytes::Own(copy)), to);
            }
            Bytes::Held(held) => {
                let block = held.block();
                self.passed.push(held);
                (Body::Block(block), Carried::Passed(BlockKey::from(&block)), None)
            }
        })
    }

    pub(super) fn take_back(&self, from: ParticipantId, block: &BlockRef) -> Option<Loan> {
        let arena = self.memory.arena.as_ref()?;
        let block = arena.borrow_mut().take_back(from, block).ok()?;
        Some(self.memory.adopt(block))
    }

    /// `from` is done with something of ours, or something that we had passed on.
    pub(super) fn released(&mut self, from: Option<ParticipantId>, body: Body) {
        let (Some(from), Body::Block(block)) = (from, body) else { return };
        if block.owner == self.me {
            // A peer that releases what it does not hold is refused by the arena and harms nobody.
            let _ = self.memory.arena.as_ref().map(|a| a.borrow_mut().release(from, block.index, block.generation));
        } else {
            drop(self.take_passed(BlockKey::from(&block)));
        }
    }

    /// Ends what a call carried, now that the far end has let go of it.
    pub(super) fn unload(&mut self, carried: Carried, from: ParticipantId) {
        match carried {
            Carried::Nothing => {}
            Carried::Lent(block) => self.released(Some(from), Body::Block(block)),
            Carried::Passed(block) => drop(self.take_passed(block)),
        }
    }

    pub(super) fn take_passed(&mut self, block: BlockKey) -> Option<Held> {
        let at = self.passed.iter().position(|held| key(held) == block)?;
        Some(self.passed.swap_remove(at))
    }

    /// As `return_blocks`, where there is no way to say that the controller is gone.
    #[inline(always)]
    pub(super) fn return_or_die(&mut self) {
        self.return_blocks().unwrap_or_else(|Fatal(text)| die(&text));
    }

    /// Tells givers what we are done with.
    #[inline(always)]
    pub(crate) fn return_blocks(&mut self) -> Result<(), Fatal> {
        if self.memory.returned.borrow().is_empty() {
            return Ok(());
        }
        self.return_all()
    }

    #[cold]
    pub(super) fn return_all(&mut self) -> Result<(), Fatal> {
        loop {
            let Some((giver, block)) = self.memory.returned.borrow_mut().pop() else { return Ok(()) };
            let known = self.peers[giver.participant.index()].as_ref();
            if known.is_none_or(|peer| peer.incarnation != giver.incarnation) {
                continue; // It died, and its memory with it.
            }
            let mut release = Descriptor { kind: record::RELEASE, tag: 0, id: 0, aux: 0, body: Body::Block(block) };
            let direct = self.calling.as_ref().is_some_and(|calling| calling.callee == giver.participant)
                || self.serving.as_ref().is_some_and(|serving| serving.caller == giver.participant);
            if direct && self.release_directly(giver.participant, &release) {
                continue;
            }
            release.tag = u16::from(giver.participant.get());
            self.send_controller(&release, None)?;
        }
    }

    /// Through the ring, as long as that leaves room for every answer that may be due on it.
    pub(super) fn release_directly(&mut self, to: ParticipantId, release: &Descriptor) -> bool {
        let link = self.link(to);
        link.producer.free_slots() > ANSWERS_MAX && link.producer.try_send(release).is_ok()
    }
}
