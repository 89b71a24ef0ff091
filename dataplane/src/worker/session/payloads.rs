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
    ) -> Result<(Bytes<'static>, Option<BlockKey>), Fatal> {
        match (body, heap) {
            (_, Some(buffer)) if !buffer.as_ref().is_empty() => Ok((Place::Heap(buffer).into(), None)),
            (Body::Inline(inline), _) => Ok((inline.into(), None)),
            (Body::Block(block), _) => {
                let peer = self.peers[block.owner.index()].as_ref();
                let peer = peer.ok_or_else(|| fatal("a block of a stranger", block.owner))?;
                let view = peer.segment.view(&block).map_err(|e| fatal("a block out of bounds", e))?;
                let held = Held::new(view, giver, peer.incarnation, &self.memory);
                Ok((Place::Held(held).into(), Some(BlockKey::from(&block))))
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
    pub(super) fn load(
        &mut self,
        bytes: Bytes<'_>,
        to: ParticipantId,
    ) -> Result<(Body, Carried, Option<Buffer>), InvokeError> {
        let empty = Body::Inline(Inline::empty());
        let own = match bytes.place {
            Place::Here => return Ok((bytes.inline.into(), Carried::Nothing, None)),
            Place::Heap(buffer) => return Ok((empty, Carried::Nothing, Some(buffer))),
            Place::Held(held) if self.knows(&held) => {
                let block = held.block();
                self.passed.push(held);
                return Ok((block.into(), Carried::Passed(BlockKey::from(&block)), None));
            }
            Place::Held(held) => self.copy_of(held.as_slice())?,
            Place::Laned(laned) => self.copy_of(laned.as_slice())?,
            Place::Slice(slice) => self.copy_of(slice)?,
            Place::Vec(vec) => self.copy_of(&vec)?,
            Place::Own(loan) => loan,
        };
        if self.memory.arena.is_some() {
            let block = self.lend(own, to);
            return Ok((block.into(), Carried::Lent(block), None));
        }
        match own.into_store() {
            Store::Heap(buffer) => Ok((empty, Carried::Nothing, Some(buffer))),
            Store::Block(_) => unreachable!("a queue's memory is the heap"),
        }
    }

    pub(super) fn take_back(&self, from: ParticipantId, block: &BlockRef) -> Option<Loan> {
        let arena = self.memory.arena.as_ref()?;
        let block = arena.borrow_mut().take_back(from, block).ok()?;
        Some(self.memory.adopt(block))
    }

    /// `from` is done with something of ours, or something that we had passed on.
    pub(super) fn released(&mut self, from: Option<ParticipantId>, block: Option<BlockRef>) {
        let (Some(from), Some(block)) = (from, block) else { return };
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
            Carried::Lent(block) => self.released(Some(from), Some(block)),
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
        if self.has_lanes_ending() {
            self.settle_lanes();
        }
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
            let release = Descriptor::new(record::RELEASE, 0, 0, 0, block);
            let direct = self.calling.as_ref().is_some_and(|calling| calling.callee == giver.participant)
                || self.serving.as_ref().is_some_and(|serving| serving.caller == giver.participant);
            if direct && self.release_directly(giver.participant, &release) {
                continue;
            }
            self.send_controller(&release.with_tag(u16::from(giver.participant.get())), None)?;
        }
    }

    /// Through the ring, as long as that leaves room for every answer that may be due on it.
    pub(super) fn release_directly(&mut self, to: ParticipantId, release: &Descriptor) -> bool {
        let link = self.link(to);
        link.producer.free_slots() > ANSWERS_MAX && link.producer.try_send(release).is_ok()
    }
}
