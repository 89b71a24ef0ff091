//! Attacks with messages, and what honest workers do with messages beside them.

use praas_dataplane::SELF;

use super::*;

const MAIL: u8 = 24;
const ANSWER: u8 = 20;
const CALL_AT: u8 = 40;
// Questions.
const KEY: u16 = 0;
const SEND: u16 = 1;
const RECEIVE: u16 = 2;
const RESOLVE: u16 = 3;
const NAME_OF: u16 = 4;
const ANYBODY: u64 = 0xffff;
// Codes of answers.
const OK: u16 = 0;
const PROTOCOL: u16 = 12;
const TIMEOUT: u16 = 7;
const UNKNOWN_PROCESS: u16 = 15;

/// The functions that honest workers have besides.
pub(crate) fn honest(worker: Worker) -> Worker {
    worker.function("mail", |context, input| {
        // Sent under a key, and received again.
        let mut arguments = input.args();
        let (key, value) = (arguments.next().unwrap_or_default(), arguments.next().unwrap_or_default());
        context.send(SELF, key, value)?;
        Ok(context.recv(SELF, key)?.into())
    })
}

impl Evil {
    /// Asks about a process, without waiting for the answer before.
    fn post(&mut self, tag: u16, process: u64, deadline_ns: u64, bytes: &[u8]) {
        let (body, buffer) = match (Inline::new(bytes), self.block(bytes)) {
            (Some(inline), _) => (Body::Inline(inline), Buffer::with_len(0)),
            (None, Some(block)) => (Body::Block(block), Buffer::with_len(0)),
            (None, None) => (Body::Inline(Inline::empty()), Buffer::from(bytes)),
        };
        self.send_with(Descriptor::new(MAIL, tag, 5 | process << 48, deadline_ns, body), buffer);
    }

    fn posted(&mut self, code: u16, tag: u16, process: u64, deadline_ns: u64, bytes: &[u8]) {
        self.post(tag, process, deadline_ns, bytes);
        let answer = self.answer(ANSWER);
        self.expect(code, &format!("question {tag} about {process}"), answer.tag());
    }

    pub(crate) fn attack_mail(&mut self, name: &str) {
        let keyed = SEND | 4 << 4;
        let block = BlockRef { owner: self.me, index: 0, generation: 0, offset: 0, len: 100 };
        match name {
            "mail: an unknown question" => self.post(9, 0, 0, b"evil"),
            "mail: a key of no bytes" => self.post(KEY, 0, 0, b""),
            "mail: a key of 1025 bytes" => self.post(KEY, 0, 0, &[1; 1025]),
            "mail: a key of a megabyte" => self.post(KEY, 0, 0, &vec![1; 1 << 20]),
            "mail: a receive under a megabyte" => self.post(RECEIVE, 0, 0, &vec![1; 1 << 20]),
            "mail: a name of a megabyte" => self.post(RESOLVE, 0, 0, &vec![b'a'; 1 << 20]),
            "mail: no key" => self.post(SEND, 0, u64::MAX, b"evil"),
            "mail: a key that was used" => {
                self.post(KEY, 0, 0, b"evil");
                self.posted(OK, SEND, 0, u64::MAX, b"evil");
                self.post(SEND, 0, u64::MAX, b"evil");
            }
            "mail: a key longer than its message" => self.post(SEND | 5 << 4, 0, u64::MAX, b"evil"),
            "mail: the longest key there is" => self.post(SEND | 4095 << 4, 0, u64::MAX, &[1; 40]),
            "mail: a key at the end of a long message" => self.post(keyed, 0, u64::MAX, &[1; 5000]),
            "mail: to nobody" => self.post(keyed, 7, u64::MAX, b"evil"),
            "mail: to anybody" => self.post(keyed, ANYBODY, u64::MAX, b"evil"),
            "mail: a call of itself" | "mail: a call of nobody" => {
                self.post(KEY, 0, 0, b"echo");
                self.tell(CALL_AT, if name.ends_with("itself") { 0 } else { 7 }, 1, u64::MAX);
            }
            "mail: a call of no name" => self.tell(CALL_AT, 1, 1, u64::MAX),
            "mail: two receives at once" => {
                self.post(RECEIVE, 0, u64::MAX, b"evil");
                self.post(RECEIVE, 0, u64::MAX, b"evil too");
            }
            "mail: a message while it receives" => {
                self.post(RECEIVE, 0, u64::MAX, b"evil");
                self.post(keyed, 0, u64::MAX, b"evil");
            }
            "mail: a flood" => (0..20_000).for_each(|_| self.post(keyed, 0, u64::MAX, b"evil")),
            "mail: a flood of long ones" => {
                for _ in 0..20_000 {
                    self.post(KEY, 0, 0, b"evil");
                    self.post(SEND, 0, u64::MAX, &[7; 5000]);
                }
            }
            "mail: a block far away" | "mail: a block of the controller" | "mail: a block too long" => {
                let lie = match name {
                    "mail: a block far away" => BlockRef { offset: 1 << 50, ..block },
                    "mail: a block too long" => BlockRef { len: 1 << 40, ..block },
                    _ => BlockRef { owner: ParticipantId::CONTROLLER, ..block },
                };
                self.post(KEY, 0, 0, b"evil");
                self.send(Descriptor::new(MAIL, SEND, 1, u64::MAX, Body::Block(lie)));
            }
            "mail: odd questions" => {
                // With the same number each time.
                for deadline_ns in [0, 1] {
                    for process in [0, 7, 1000, ANYBODY - 1] {
                        self.posted(TIMEOUT, RECEIVE, process, deadline_ns, b"evil");
                    }
                }
                self.posted(UNKNOWN_PROCESS, NAME_OF, 7, 0, b"");
                self.posted(UNKNOWN_PROCESS, NAME_OF, ANYBODY, 0, b"");
                self.posted(UNKNOWN_PROCESS, RESOLVE, 0, 0, b"");
                self.posted(UNKNOWN_PROCESS, RESOLVE, 0, 0, b"\xff\0evil");
                self.posted(UNKNOWN_PROCESS, RESOLVE, 0, 0, &[b'a'; 1024]);
                // Whatever is its time: it is there at once.
                for deadline_ns in [0, 1, u64::MAX] {
                    self.posted(OK, keyed, 0, deadline_ns, b"evil");
                    self.posted(OK, RECEIVE, ANYBODY, deadline_ns, b"evil");
                    self.posted(OK, keyed, 0, deadline_ns, b"evil");
                    self.posted(OK, RECEIVE, 0, deadline_ns, b"evil");
                }
                // A key that is said twice, and one that is said for nothing.
                self.post(KEY, 0, 0, b"one");
                self.post(KEY, 0, 0, b"two");
                self.posted(OK, SEND, 0, 0, b"evil");
                self.posted(TIMEOUT, RECEIVE, 0, 0, b"one");
                self.posted(OK, RECEIVE, 0, 0, b"two");
                self.post(KEY, 0, 0, b"three");
            }
            "mail: blocks that are nobody's" => {
                self.post(KEY, 0, 0, b"evil");
                let owner = ParticipantId::new(60).expect("below 64");
                self.send(Descriptor::new(MAIL, SEND, 1, u64::MAX, Body::Block(BlockRef { owner, ..block })));
                let answer = self.answer(ANSWER);
                self.expect(PROTOCOL, "nobody's block", answer.tag());
            }
            // It answers while it receives, and is given the next call.
            "mail: a receive that it forgets" => self.post(RECEIVE, 0, u64::MAX, b"evil"),
            "mail: one block for many" => {
                let Some(block) = self.block(&[1; 5000]) else { return };
                for round in 0..50_u8 {
                    self.post(KEY, 0, 0, b"evil");
                    self.send(Descriptor::new(MAIL, SEND, 1, u64::MAX, Body::Block(block)));
                    let answer = self.answer(ANSWER);
                    self.expect(OK, "the same block again", answer.tag());
                    self.overwrite(&block, &[round; 5000]);
                }
                for _ in 0..50 {
                    self.posted(OK, RECEIVE, 0, 0, b"evil");
                }
            }
            "mail: texts never given back" => {
                // Keys of a kilobyte, said with each message.
                let key = [1; 1000];
                let lent = self.block(&key);
                let body = lent.map_or(Body::Inline(Inline::empty()), Body::Block);
                for _ in 0..6000 {
                    self.send_with(Descriptor::new(MAIL, KEY, 0, 0, body), Buffer::from(&key[..]));
                    self.posted(OK, SEND, 0, 0, b"evil");
                    self.posted(OK, RECEIVE, ANYBODY, 0, b"");
                }
            }
            _ => panic!("no attack `{name}`"),
        }
    }
}
