//! Questions to the controller, about the state and about messages, and its answers. One at a time: a function waits for each.

use std::any::TypeId;

use super::*;

/// What was asked, and what was said.
#[derive(Debug, Default)]
pub(super) struct Questions {
    pub(super) asked: u64,
    pub(super) answer: Option<(Descriptor, Option<Buffer>)>,
    /// A message for the next question, if that asks for it.
    pub(super) offer: Option<Descriptor>,
    /// Which segment was asked for, and that it is not there any more.
    pub(super) mapped: Option<(u16, u64, u64)>,
    /// Objects by entry: which version was checked to be of which type. Not by fingerprint: that a type has the shape it says is its author's word.
    pub(super) checked: Vec<(u64, Option<TypeId>)>,
}

impl Session {
    /// Waits for something that the controller is about to say; `idle`: others may run meanwhile, and more workers be started for it.
    pub(super) fn await_controller(&mut self, idle: bool, there: impl Fn(&Session) -> bool) {
        let mut wait = || -> Result<(), Fatal> {
            loop {
                while !there(self) && self.poll_controller()? {}
                if there(self) {
                    return Ok(());
                }
                let (patience, until) = (self.welcome.patience, if idle { UNTIL_TOLD } else { u64::MAX });
                self.wait(patience, until, |session| session.controller_ready() || there(session))?;
            }
        };
        wait().unwrap_or_else(|Fatal(text)| die(&text));
    }

    /// Asks the controller something, and waits for its answer, however long that takes: it always answers. `operand`: 16 bits beside the
    /// number of the question. The body is readable where it lies.
    pub(super) fn ask(
        &mut self,
        question: &Descriptor,
        operand: u16,
        heap: Option<Buffer>,
        idle: bool,
    ) -> (Descriptor, Bytes<'static>) {
        self.questions.asked += 1;
        let asked = self.questions.asked;
        let id = asked | u64::from(operand) << 48;
        let question = Descriptor::new(question.kind(), question.tag(), id, question.aux(), question.body());
        self.send_controller(&question, heap).unwrap_or_else(|Fatal(text)| die(&text));
        let answered =
            |session: &Session| session.questions.answer.as_ref().is_some_and(|(answer, _)| answer.id() == asked);
        self.await_controller(idle, answered);
        let (answer, heap) = self.questions.answer.take().expect("waited for");
        let bytes = match answer.body() {
            // A message to ourselves, in memory of ours that we lent.
            Body::Block(block) if block.owner == self.me => match self.take_back(ParticipantId::CONTROLLER, &block) {
                Some(loan) => Place::Own(loan).into(),
                None => die("the controller handed us a block of ours that it does not hold"),
            },
            body => {
                let giver = self.giver(ParticipantId::CONTROLLER);
                self.receive(body, giver, heap).unwrap_or_else(|Fatal(text)| die(&text)).0
            }
        };
        (answer, bytes)
    }
}
