//! What was promised, held against all that happened. Knows every process and believes none; says which promise was broken.

use std::collections::{BTreeMap, BTreeSet};

use super::linear::{Deed, Done, is_linearizable};
use super::*;

/// Promise G1: a call ends so long after its deadline, at the latest.
const GRACE_NS: u64 = 100 * MS;

/// Somebody who waits for an answer of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Owed {
    /// A client, or a peer that calls like one.
    Client {
        connection: u64,
        call: u64,
    },
    Nested {
        worker: WorkerId,
        born: u64,
        call: u64,
    },
    /// About messages, the state, or another process.
    Question {
        worker: WorkerId,
        born: u64,
        question: u64,
    },
}

impl Owed {
    /// The worker that waits.
    fn worker(self) -> Option<u64> {
        match self {
            Owed::Client { .. } => None,
            Owed::Nested { born, .. } | Owed::Question { born, .. } => Some(born),
        }
    }
}

/// How often a call may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    AtMostOnce,
    Retry,
    EffectivelyOnce,
}

/// A call of a function, however often it is sent.
#[derive(Debug)]
struct Invocation {
    mode: Mode,
    depth: u8,
    begun: u32,
    /// Runs that ended as their worker died.
    died: u32,
    /// The run whose result was told.
    told: Option<u64>,
}

#[derive(Debug, Default)]
struct Message {
    from: NodeId,
    to: NodeId,
    key: u8,
    /// The life of the receiver that stored it.
    stored_in: Option<u64>,
    handed: bool,
    received: bool,
    /// Its sender was told that it never arrives.
    never: bool,
    /// Its sender was told that it is stored.
    acked: bool,
}

/// What happened how often.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counts {
    pub(super) events: u64,
    pub(super) answers: u64,
    pub(super) nested: u64,
    pub(super) direct: u64,
    pub(super) remote: u64,
    pub(super) again: u64,
    pub(super) busy: u64,
    pub(super) timeouts: u64,
    pub(super) received: u64,
    pub(super) put_back: u64,
    pub(super) refused: u64,
    pub(super) lost: u64,
    pub(super) conflicts: u64,
    pub(super) adopted: u64,
    pub(super) pinned: u64,
    pub(super) deaths: u64,
    pub(super) kills: u64,
    pub(super) cuts: u64,
    pub(super) lies: u64,
}

impl Counts {
    /// With what each is called.
    pub(super) fn named(&self) -> [(&'static str, u64); 19] {
        [
            ("events", self.events),
            ("answers to clients", self.answers),
            ("nested calls", self.nested),
            ("calls over leases", self.direct),
            ("calls to other processes", self.remote),
            ("sent again", self.again),
            ("busy", self.busy),
            ("timeouts", self.timeouts),
            ("messages received", self.received),
            ("messages put back", self.put_back),
            ("refusals of messages and objects", self.refused),
            ("lost with a process", self.lost),
            ("conflicts", self.conflicts),
            ("orphans adopted", self.adopted),
            ("pins let go", self.pinned),
            ("deaths of workers", self.deaths),
            ("deaths of processes", self.kills),
            ("cuts", self.cuts),
            ("lies", self.lies),
        ]
    }
}

#[derive(Debug, Default)]
pub(super) struct Checker {
    pub(super) counts: Counts,
    /// By when, and who; and the same by who. With the process and its life.
    due: BTreeSet<(u64, (NodeId, u64, Owed))>,
    owed: BTreeMap<(NodeId, u64, Owed), u64>,
    invocations: Vec<Invocation>,
    /// By run: the invocation.
    runs: Vec<u64>,
    messages: Vec<Message>,
    /// The last message that a process in one life was handed of a sender under a key.
    last: BTreeMap<(NodeId, u64, NodeId, u8), u64>,
    /// By process, life and key.
    deeds: BTreeMap<(NodeId, u64, u8), Vec<Done>>,
    /// Moments in the order in which they were: no two are the same.
    moments: u64,
}

impl Checker {
    // ---- G1: everything ends ----------------------------------------------------------------------------------

    /// From now on somebody waits.
    pub(super) fn owe(&mut self, node: NodeId, life: u64, owed: Owed, by_ns: u64) {
        assert!(self.owed.insert((node, life, owed), by_ns).is_none(), "{owed:?} waits already");
        self.due.insert((by_ns, (node, life, owed)));
    }

    /// An answer is there. False when nobody waits for it.
    pub(super) fn paid(&mut self, node: NodeId, life: u64, owed: Owed) -> bool {
        let Some(by_ns) = self.owed.remove(&(node, life, owed)) else { return false };
        self.due.remove(&(by_ns, (node, life, owed)));
        true
    }

    /// It was called off, and is to end now rather than at its deadline.
    pub(super) fn called_off(&mut self, node: NodeId, life: u64, owed: Owed, now_ns: u64) {
        if self.paid(node, life, owed) {
            self.owe(node, life, owed, now_ns);
        }
    }

    /// Those do not wait any more.
    fn forgive(&mut self, node: NodeId, life: u64, who: impl Fn(&Owed) -> bool) {
        let gone: Vec<Owed> = self
            .owed
            .keys()
            .filter(|(of, in_life, owed)| (*of, *in_life) == (node, life) && who(owed))
            .map(|(_, _, owed)| *owed)
            .collect();
        for owed in gone {
            self.paid(node, life, owed);
        }
    }

    pub(super) fn caller_gone(&mut self, node: NodeId, life: u64, of: u64) {
        self.forgive(node, life, |owed| matches!(owed, Owed::Client { connection, .. } if *connection == of));
    }

    pub(super) fn worker_gone(&mut self, node: NodeId, life: u64, of: u64) {
        self.forgive(node, life, |owed| owed.worker() == Some(of));
    }

    pub(super) fn process_gone(&mut self, node: NodeId, life: u64) {
        self.forgive(node, life, |_| true);
    }

    /// Time has come to `now_ns`.
    pub(super) fn look(&self, now_ns: u64) {
        if let Some((by_ns, (node, life, owed))) = self.due.first() {
            let late_ms = now_ns.saturating_sub(*by_ns) / MS;
            assert!(
                now_ns <= by_ns.saturating_add(GRACE_NS),
                "G1: {owed:?} of process {node}, life {life}, has no answer {late_ms} ms after it was to end"
            );
        }
    }

    pub(super) fn open(&self) -> usize {
        self.owed.len()
    }

    pub(super) fn first_open(&self) -> String {
        format!("{:?}", self.due.first())
    }

    // ---- G2: nothing runs twice -------------------------------------------------------------------------------

    pub(super) fn invocation(&mut self, mode: Mode, depth: u8) -> u64 {
        self.invocations.push(Invocation { mode, depth, begun: 0, died: 0, told: None });
        self.invocations.len() as u64 - 1
    }

    pub(super) fn depth(&self, invocation: u64) -> u8 {
        self.invocations[invocation as usize].depth
    }

    /// A function begins. Names the run.
    pub(super) fn begins(&mut self, invocation: u64) -> u64 {
        let Invocation { mode, begun, died, .. } = &mut self.invocations[invocation as usize];
        let may = match mode {
            Mode::AtMostOnce => *begun == 0,
            Mode::Retry => true,
            Mode::EffectivelyOnce => *begun == *died,
        };
        assert!(may, "G2: invocation {invocation} ({mode:?}) begins again after {begun} runs, of which {died} died");
        *begun += 1;
        self.runs.push(invocation);
        self.runs.len() as u64 - 1
    }

    /// A run ended as its worker died.
    pub(super) fn run_died(&mut self, run: u64) {
        self.invocations[self.runs[run as usize] as usize].died += 1;
    }

    /// A result comes to who called.
    pub(super) fn result(&mut self, invocation: u64, run: u64) {
        let of = self.runs[run as usize];
        assert_eq!(of, invocation, "G2: the caller of invocation {invocation} gets the result of {of}");
        let Invocation { mode, told, .. } = &mut self.invocations[invocation as usize];
        let first = *told.get_or_insert(run);
        if first != run {
            assert_eq!(
                *mode,
                Mode::Retry,
                "G2: invocation {invocation} was told the result of run {first}, and now of {run}"
            );
        }
    }

    // ---- G3: messages -----------------------------------------------------------------------------------------

    /// A message is sent: in the order of these, as its process takes them from its workers.
    pub(super) fn message(&mut self, from: NodeId, to: NodeId, key: u8) -> u64 {
        self.messages.push(Message { from, to, key, ..Message::default() });
        self.messages.len() as u64 - 1
    }

    /// It is in the mailbox of its receiver, or on its way from there to a function.
    pub(super) fn arrived(&mut self, message: u64, to: NodeId, life: u64) {
        let known = &mut self.messages[message as usize];
        assert_eq!(known.to, to, "G3: message {message} arrived at another process");
        assert_eq!(known.stored_in, None, "G3: message {message} arrived twice");
        assert!(!known.never, "G3: message {message} arrived, and its sender was told that it never would");
        known.stored_in = Some(life);
    }

    /// It is handed to a function.
    pub(super) fn handed(&mut self, message: u64, life: u64) {
        let known = &mut self.messages[message as usize];
        assert_eq!(known.stored_in, Some(life), "G3: message {message} was handed out, and is not here");
        assert!(!known.received, "G3: message {message} was handed out after it was received");
        if std::mem::replace(&mut known.handed, true) {
            return;
        }
        let last = self.last.insert((known.to, life, known.from, known.key), message);
        assert!(last < Some(message), "G3: message {message} was handed out after {last:?} of the same sender and key");
    }

    /// The function has it.
    pub(super) fn received(&mut self, message: u64) {
        let known = &mut self.messages[message as usize];
        assert!(!std::mem::replace(&mut known.received, true), "G3: message {message} was received twice");
        self.counts.received += 1;
    }

    /// Its sender was told that it is stored.
    pub(super) fn acked(&mut self, message: u64) {
        let known = &mut self.messages[message as usize];
        assert!(known.stored_in.is_some(), "G3: message {message} was said to be stored, and never arrived");
        known.acked = true;
    }

    /// Its sender was told that it is not, and never will be.
    pub(super) fn refused(&mut self, message: u64) {
        let known = &mut self.messages[message as usize];
        assert_eq!(known.stored_in, None, "G3: message {message} was said not to be stored, and is");
        known.never = true;
    }

    /// At the end: what was stored was received, is still `here`, or was lost with its receiver.
    pub(super) fn nothing_was_lost(&self, lives: &[u64], here: &BTreeSet<u64>) {
        for (number, message) in (0_u64..).zip(&self.messages) {
            let Some(life) = message.stored_in else {
                assert!(!message.acked && !here.contains(&number));
                continue;
            };
            let is_here = here.contains(&number);
            assert!(!(is_here && message.received), "G3: message {number} was received, and is still in the mailbox");
            let lost_with_it = life != lives[message.to];
            assert!(
                message.received || is_here || lost_with_it,
                "G3: message {number} is neither received nor in the mailbox; its sender was told so: {}",
                message.acked
            );
        }
    }

    // ---- state ------------------------------------------------------------------------------------------------

    /// Another moment.
    pub(super) fn moment(&mut self) -> u64 {
        self.moments += 1;
        self.moments
    }

    pub(super) fn did(&mut self, node: NodeId, life: u64, key: u8, asked: u64, is_heard: bool, deed: Deed) {
        let answered = if is_heard { self.moment() } else { u64::MAX };
        self.deeds.entry((node, life, key)).or_default().push(Done { asked, answered, deed });
    }

    /// At the end.
    pub(super) fn state_is_linearizable(&mut self) {
        for ((node, life, key), history) in &mut self.deeds {
            history.sort_unstable_by_key(|done| done.asked);
            assert!(
                is_linearizable(history),
                "state: no order explains what was said about key {key} of process {node}, life {life}: {history:#?}"
            );
        }
    }
}
