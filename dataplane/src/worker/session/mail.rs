//! Messages as a worker has them: given to the controller, and asked of it.

use super::lane::NotLaned;
use super::*;
use crate::client::Delivery;
use crate::wire::{MailOp, lane};
use crate::worker::messages::{Key, Message, MessageError, SELF, Source};
use praas_shm::{INLINE_BYTES_MAX, KEY_BYTES_MAX};

/// What is known of processes. Their numbers stay as they are as long as this process lives.
#[derive(Debug, Default)]
pub(super) struct Names {
    known: Vec<(u16, Rc<str>)>,
}

/// Names remembered; those beyond are asked for each time.
const NAMES_MAX: usize = 4096;

impl Names {
    fn number(&self, name: &str) -> Option<u16> {
        self.known.iter().find(|(_, known)| &**known == name).map(|(number, _)| *number)
    }

    fn name(&self, number: u16) -> Option<Rc<str>> {
        self.known.iter().find(|(known, _)| *known == number).map(|(_, name)| Rc::clone(name))
    }

    fn learn(&mut self, number: u16, name: &str) -> Rc<str> {
        let name: Rc<str> = name.into();
        if self.known.len() < NAMES_MAX {
            self.known.push((number, Rc::clone(&name)));
        }
        name
    }
}

/// The number that stands for any process.
const ANYBODY: u16 = u16::MAX;

fn checked(key: &[u8]) -> Result<(), MessageError> {
    if (1..=KEY_BYTES_MAX).contains(&key.len()) { Ok(()) } else { Err(MessageError::KeyLength { bytes: key.len() }) }
}

impl Session {
    /// Number of a process; 0 is this one.
    fn process_number(&mut self, name: &str) -> Result<u16, MessageError> {
        if name == SELF || name == self.welcome.process {
            return Ok(0);
        }
        if let Some(number) = self.names.number(name) {
            return Ok(number);
        }
        if name.len() > KEY_BYTES_MAX {
            return Err(MessageError::UnknownProcess { name: name.to_owned() });
        }
        let (number, _) = self.ask_mail(MailOp::Resolve, 0, 0, name.as_bytes().into(), 0)?;
        let number = u16::try_from(number).map_err(|e| MessageError::Protocol { text: e.to_string() })?;
        self.names.learn(number, name);
        Ok(number)
    }

    pub(super) fn process_name(&mut self, number: u16) -> Result<Rc<str>, MessageError> {
        if let Some(name) = self.names.name(number) {
            return Ok(name);
        }
        if number == 0 {
            let name = self.welcome.process.clone();
            return Ok(self.names.learn(0, &name));
        }
        let (_, bytes) = self.ask_mail(MailOp::NameOf, number, 0, Inline::empty().into(), 0)?;
        Ok(self.names.learn(number, &String::from_utf8_lossy(bytes.as_ref())))
    }

    /// Names of the processes that are active, and of those that are swapped out.
    pub(crate) fn processes(&mut self) -> Result<(Vec<String>, Vec<String>), MessageError> {
        let (_, bytes) = self.ask_mail(MailOp::Processes, 0, 0, Inline::empty().into(), 0)?;
        serde_json::from_slice(bytes.as_ref()).map_err(|error| MessageError::Protocol { text: error.to_string() })
    }

    /// Asks for something about messages. `key_bytes`: of the key at the end of `bytes`, which are short then.
    fn ask_mail(
        &mut self,
        op: MailOp,
        number: u16,
        deadline_ns: u64,
        bytes: Bytes<'_>,
        key_bytes: usize,
    ) -> Result<(u64, Bytes<'static>), MessageError> {
        let no_space = |error: InvokeError| MessageError::NoSpace { text: error.to_string() };
        let (body, carried, heap) = self.load(bytes, ParticipantId::CONTROLLER).map_err(no_space)?;
        let tag = op as u16 | u16::try_from(key_bytes).expect("at most 40") << 4;
        // A message's memory comes back as a `RELEASE`, and not with the answer: one that may arrive yet is read until it has, or never will.
        let stays = op == MailOp::Send;
        let question = Descriptor::new(record::MAIL, tag, 0, deadline_ns, body);
        let (answer, bytes) =
            self.ask(&question, number, heap, matches!(op, MailOp::Send | MailOp::Receive | MailOp::ReceiveLooked));
        let code = Code::from_wire(answer.tag());
        if !stays {
            self.unload(carried, ParticipantId::CONTROLLER);
        }
        match code {
            Some(Code::Ok) => Ok((answer.aux(), bytes)),
            code => Err(MessageError::from_wire(code, bytes.as_ref())),
        }
    }

    /// Says which key, or name of a function, the next record is about, if that has no room for it.
    fn say_key(&mut self, key: &[u8]) -> Result<(), InvokeError> {
        // Its block, if it needs one, comes back when the controller has read it.
        let (body, _, heap) = self.load(key.into(), ParticipantId::CONTROLLER)?;
        let record = Descriptor::new(record::MAIL, MailOp::Key as u16, 0, 0, body);
        self.send_controller(&record, heap).unwrap_or_else(|Fatal(text)| die(&text));
        Ok(())
    }

    /// Sends a message, and waits until it is in the receiver's mailbox.
    pub(crate) fn send_message(
        &mut self,
        to: &str,
        key: &[u8],
        payload: Payload<'_>,
        deadline_ns: u64,
    ) -> Result<(), MessageError> {
        checked(key)?;
        let bytes = payload.bytes.as_ref().len();
        if bytes as u64 > self.memory.payload_bytes_max {
            let text = format!("{bytes} bytes, the process allows {}", self.memory.payload_bytes_max);
            return Err(MessageError::TooLarge { text });
        }
        self.return_or_die();
        let number = self.process_number(to)?;
        let payload = match self.send_by_lane(number, key, payload.bytes, deadline_ns) {
            Ok(()) => return Ok(()),
            Err(NotLaned::Failed(error)) => return Err(error),
            Err(NotLaned::Ordinary(bytes)) => Payload { bytes, ..payload },
        };
        if bytes + key.len() <= INLINE_BYTES_MAX {
            let mut both = [0; INLINE_BYTES_MAX];
            both[..bytes].copy_from_slice(payload.bytes.as_ref());
            both[bytes..bytes + key.len()].copy_from_slice(key);
            let both = Inline::new(&both[..bytes + key.len()]).expect("made to fit");
            return self.ask_mail(MailOp::Send, number, deadline_ns, both.into(), key.len()).map(drop);
        }
        self.say_key(key).map_err(|error| MessageError::NoSpace { text: error.to_string() })?;
        self.ask_mail(MailOp::Send, number, deadline_ns, payload.bytes, 0).map(drop)
    }

    /// Starts a call of a function of another process, and returns its number among the nested calls.
    pub(crate) fn submit_at(
        &mut self,
        process: &str,
        function: &str,
        payload: Payload<'_>,
        deadline_ns: u64,
        delivery: Delivery,
    ) -> Result<u64, InvokeError> {
        let failed = |error: MessageError| match error {
            MessageError::UnknownProcess { name } => InvokeError::UnknownProcess { text: name },
            MessageError::NoSpace { text } => InvokeError::NoSpace { text },
            error => InvokeError::Protocol { text: error.to_string() },
        };
        let bytes = payload.bytes.as_ref().len();
        if bytes as u64 > self.memory.payload_bytes_max {
            let text = format!("{bytes} bytes, the process allows {}", self.memory.payload_bytes_max);
            return Err(InvokeError::TooLarge { text });
        }
        self.return_or_die();
        self.check_nested()?;
        if checked(function.as_bytes()).is_err() {
            let text = format!("a name of {} bytes; functions have names of 1 to {KEY_BYTES_MAX}", function.len());
            return Err(InvokeError::UnknownFunction { text });
        }
        let number = self.process_number(process).map_err(failed)?;
        // Before the name: once that is said, the call has to follow.
        let (body, loaded, heap) = self.load(payload.bytes, ParticipantId::CONTROLLER)?;
        if let Err(error) = self.say_key(function.as_bytes()) {
            self.unload(loaded, ParticipantId::CONTROLLER);
            return Err(error);
        }
        // What it lends comes back as a `RELEASE`, and not with the answer: what may be sent yet is read until it has been.
        let call = self.nested.open(Route::Away, deadline_ns, Carried::Nothing);
        let kind = match delivery {
            Delivery::AtMostOnce => record::CALL_AT,
            Delivery::EffectivelyOnce => record::CALL_AT | record::AGAIN,
            Delivery::Retry => record::CALL_AT_ANY_LIFE | record::AGAIN,
        };
        let kind = kind | if payload.is_args { record::ARGS } else { 0 };
        let request = Descriptor::new(kind, number, call, deadline_ns, body);
        self.send_controller(&request, heap).unwrap_or_else(|Fatal(text)| die(&text));
        Ok(call)
    }

    /// Takes the oldest message that matches, and waits for one until `deadline_ns`; 0: does not wait. `None`: there was none.
    pub(crate) fn receive_message(
        &mut self,
        from: Source<'_>,
        key: Key<'_>,
        deadline_ns: u64,
    ) -> Result<Option<Message>, MessageError> {
        self.return_or_die();
        let number = match from {
            Source::Any => ANYBODY,
            Source::Own => 0,
            Source::Process(name) => self.process_number(name)?,
        };
        let wanted = match key {
            Key::Any => &[][..],
            Key::Is(key) => checked(key).map(|()| key)?,
        };
        if let Some(message) = self.take_offered(number, wanted)? {
            return Ok(Some(message));
        }
        self.said_key = None;
        let mut looked = false;
        let (about, bytes) = loop {
            if let Some(message) = self.receive_by_lane(number, wanted, deadline_ns)? {
                return Ok(Some(message));
            }
            looked |= self.has_lane_from(number);
            let op = if looked { MailOp::ReceiveLooked } else { MailOp::Receive };
            match self.ask_mail(op, number, deadline_ns, wanted.into(), 0) {
                Err(MessageError::Timeout { .. }) => return Ok(None),
                Ok((lane::LOOK, _)) => looked = true,
                received => break received?,
            }
        };
        // From here on it is the function's: who gets it if this worker dies is nobody.
        if let Channel::Ring { link, .. } = &self.channel {
            link.mark_received(self.questions.asked);
        }
        let [low, high, key_bytes, ..] = about.to_le_bytes();
        let key_bytes = usize::from(key_bytes).min(bytes.as_ref().len());
        let payload_bytes = bytes.as_ref().len() - key_bytes;
        let key = match (key, self.said_key.take()) {
            (Key::Is(key), _) => key.to_vec(),
            (Key::Any, Some(key)) => key,
            (Key::Any, None) => bytes.as_ref()[payload_bytes..].to_vec(),
        };
        let from = self.process_name(u16::from_le_bytes([low, high]))?;
        Ok(Some(Message { bytes, payload_bytes, from, key }))
    }

    /// What the controller offered, if it is what is wanted: without a question.
    fn take_offered(&mut self, from: u16, wanted: &[u8]) -> Result<Option<Message>, MessageError> {
        while self.poll_controller().unwrap_or_else(|Fatal(text)| die(&text)) {}
        let number = self.questions.asked + 1;
        let Some(offer) = self.questions.offer.take().filter(|offer| offer.id() == number) else { return Ok(None) };
        let Body::Inline(both) = offer.body() else { die("the controller offered what does not lie in its record") };
        let [low, high, key_bytes, ..] = offer.aux().to_le_bytes();
        let sender = u16::from_le_bytes([low, high]);
        let payload_bytes = both.as_slice().len().saturating_sub(usize::from(key_bytes));
        let key = both.as_slice()[payload_bytes..].to_vec();
        let is_wanted = (from == ANYBODY || from == sender) && (wanted.is_empty() || wanted == key);
        let Channel::Ring { link, .. } = &self.channel else { return Ok(None) };
        if !is_wanted || !link.accept(number) {
            return Ok(None);
        }
        self.questions.asked = number;
        let from = self.process_name(sender)?;
        Ok(Some(Message { bytes: both.into(), payload_bytes, from, key }))
    }

    /// The key of the message that comes next.
    pub(super) fn take_key(&mut self, descriptor: &Descriptor, heap: Option<Buffer>) -> Result<(), Fatal> {
        let (bytes, _) = self.receive(descriptor.body(), self.giver(ParticipantId::CONTROLLER), heap)?;
        self.said_key = Some(bytes.as_ref().to_vec());
        Ok(())
    }
}
