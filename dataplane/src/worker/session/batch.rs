//! Calls that are run together: taken in until they are all here, and answered one by one.

use super::*;
use crate::wire::Trigger;
use crate::worker::messages::Message;

impl Session {
    /// What the functions run for that do not run for one call.
    pub(crate) fn set_triggers(&mut self, triggers: &[(u16, Trigger)]) {
        for (function, _) in triggers {
            let at = usize::from(*function);
            if self.batched.len() <= at {
                self.batched.resize(at + 1, false);
            }
            self.batched[at] = true;
        }
    }

    /// Whether calls of this function are collected by the controller, or refused, so that none may go to a leased worker.
    #[inline(always)]
    pub(super) fn is_batched(&self, function: u16) -> bool {
        self.batched.get(usize::from(function)).copied().unwrap_or(false)
    }

    /// Takes in the calls of a batch that the controller has announced, and marks all of them as begun. Their inputs, in the order of [`Session::batch`].
    pub(crate) fn gather(&mut self, head: &Descriptor) -> Result<Vec<Input>, Fatal> {
        let count = head.inline().and_then(|body| body.as_slice().try_into().ok()).map(u16::from_le_bytes);
        let count = count.ok_or(Fatal("a batch without a number".into()))?;
        self.gather_all(usize::from(count))
    }

    /// The same of the messages of a run, which are under these keys.
    pub(crate) fn gather_messages(&mut self, head: &Descriptor, keys: &[Vec<u8>]) -> Result<Vec<Message>, Fatal> {
        let senders = head.inline().ok_or(Fatal("a run for messages of nobody".into()))?;
        let (senders, _) = senders.as_slice().as_chunks::<2>();
        let inputs = self.gather_all(senders.len())?;
        if inputs.len() != keys.len() {
            return Err(Fatal("a run with another number of messages than keys".into()));
        }
        let message = |((Input { bytes, .. }, key), from): ((Input, &Vec<u8>), &[u8; 2])| {
            let from = self.process_name(u16::from_le_bytes(*from)).map_err(|error| Fatal(error.to_string()))?;
            Ok(Message { payload_bytes: bytes.as_ref().len(), bytes, from, key: key.clone() })
        };
        inputs.into_iter().zip(keys).zip(senders).map(message).collect()
    }

    fn gather_all(&mut self, count: usize) -> Result<Vec<Input>, Fatal> {
        let mut inputs = Vec::with_capacity(count);
        for left in (0..count).rev() {
            let incoming = self.next_of_batch()?;
            let request = &incoming.request;
            // Read at once: what comes behind it may be the news that the owner of its bytes has died.
            let (bytes, block) = match request.block().filter(|block| block.owner == self.me) {
                // A message to ourselves.
                Some(block) => match self.take_back(ParticipantId::CONTROLLER, &block) {
                    Some(loan) => (Place::Own(loan).into(), None),
                    None => return Err(Fatal("the controller handed us a block of ours that it does not hold".into())),
                },
                None => self.receive(request.body(), self.giver(ParticipantId::CONTROLLER), incoming.heap)?,
            };
            self.memory.serve_with(block);
            inputs.push(Input { bytes, is_args: request.kind() & record::ARGS != 0 });
            self.batch.push_back((request.id(), block));
            if let (0, Channel::Ring { link, .. }) = (left, &self.channel)
                && link.take(incoming.position) != Take::Mine
            {
                return Err(Fatal("a batch was withdrawn".into()));
            }
        }
        Ok(inputs)
    }

    fn next_of_batch(&mut self) -> Result<Incoming, Fatal> {
        loop {
            if let Some(incoming) = self.inbox.pop_front() {
                let is_request = incoming.request.kind() & record::KIND == record::REQUEST;
                return if is_request { Ok(incoming) } else { Err(Fatal("a batch in a batch".into())) };
            }
            if !self.poll_controller()? {
                let patience = self.welcome.patience;
                self.wait(patience, u64::MAX, |session| session.controller_ready() || !session.inbox.is_empty())?;
            }
        }
    }

    /// Answers the calls of the batch, each with its own; the rest, if there are fewer, with what `missing` says.
    pub(crate) fn answer_batch(
        &mut self,
        answers: impl IntoIterator<Item = Result<Output, Failure>>,
        missing: impl Fn() -> InvokeError,
    ) -> Result<(), Fatal> {
        let mut answers = answers.into_iter();
        while let Some((call, block)) = self.batch.pop_front() {
            self.memory.answer_of_batch(block);
            match answers.next() {
                Some(Ok(output)) => {
                    self.reply(Origin::Controller, call, block, Code::Ok, output.status, output.payload)?;
                }
                Some(Err(Failure { status, text })) => {
                    self.reply_error(Origin::Controller, call, block, &InvokeError::Failed { status, text })?;
                }
                None => self.reply_error(Origin::Controller, call, block, &missing())?,
            }
        }
        self.return_blocks()
    }
}
