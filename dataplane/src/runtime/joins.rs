//! Functions that run for messages: their runs begun, and what comes back of them.

use super::mail::number_of;
use super::*;
use crate::controller::join::{Begun, Ended, Join, Joins, RunId};
use crate::controller::mailbox::{Message, Sender as From};
use crate::wire::Trigger;

/// How long a run waits that found no memory for its messages.
const SHORT_NS: u64 = 20_000_000;

impl Process {
    /// What functions run for messages, as the first worker says.
    pub(super) fn set_joins(&mut self, triggers: &[(u16, Trigger)]) {
        let joins = triggers.iter().filter_map(|(function, trigger)| match trigger {
            Trigger::Join { keys, one_sender, idempotent } => Some(Join {
                function: *function,
                keys: keys.iter().map(|key| Arc::from(&key[..])).collect(),
                one_sender: *one_sender,
                idempotent: *idempotent,
            }),
            Trigger::Batch { .. } => None,
        });
        self.joins = Joins::new(joins.collect(), usize::from(self.config.workers_max));
    }

    /// A message was stored. If it was the last that a function waited for, that runs.
    pub(super) fn join_stored(&mut self, now: u64, from: From, key: &[u8]) {
        let Process { joins, mailbox, controller, .. } = self;
        let may = |function| controller.refuses_joins_until(now, function).is_none();
        if let Some(begun) = joins.stored(mailbox, from, key, may) {
            self.begin_run(now, begun);
        }
    }

    /// Begins the runs that can begin.
    pub(super) fn run_joins(&mut self, now: u64) {
        self.joins_due_ns = u64::MAX;
        loop {
            let Process { joins, mailbox, controller, .. } = self;
            let may = |function| controller.refuses_joins_until(now, function).is_none();
            let Some(begun) = joins.next(mailbox, may) else { break };
            if !self.begin_run(now, begun) {
                return;
            }
        }
        let refused = self.joins.functions().filter_map(|function| self.controller.refuses_joins_until(now, function));
        self.joins_due_ns = refused.min().unwrap_or(u64::MAX);
    }

    /// False when there is no memory for its messages where workers can read them: they are in the mailbox again.
    fn begin_run(&mut self, now: u64, begun: Begun<Payload>) -> bool {
        let Begun { run, function, idempotent, messages } = begun;
        let mut payloads: Vec<Payload> = messages.into_iter().map(|message| message.payload).collect();
        let ready = payloads.iter_mut().try_for_each(|payload| self.move_to_workers(&mut payload.bytes));
        if ready.is_err() {
            for payload in payloads {
                self.on_unjoin(now, run, payload);
            }
            self.joins_due_ns = now + SHORT_NS;
            return false;
        }
        self.controller.join(now, run, function, idempotent, payloads);
        true
    }

    /// One message of a run is back.
    pub(super) fn on_unjoin(&mut self, now: u64, run: RunId, payload: Payload) {
        for Message { from, key, payload, number } in self.joins.back(run, payload) {
            self.put_back(now, from, key, payload, number);
        }
    }

    /// One message of a run is answered for.
    pub(super) fn on_joined(&mut self, now: u64, run: RunId, failure: Option<CallError>) {
        let Some(Ended { function, keys, failure }) = self.joins.answered(run, failure) else { return };
        self.joins_due_ns = now;
        if let Some(CallError { code, status, text, .. }) = failure {
            let name = self.controller.functions().get(usize::from(function)).map_or("?", String::as_str);
            let keys = keys.iter().map(|key| String::from_utf8_lossy(key)).collect::<Vec<_>>().join(", ");
            tracing::error!(
                run,
                function = name,
                ?code,
                status,
                "the messages under {keys} are gone with a run that failed: {text}"
            );
        }
    }

    /// Whom the messages of a run are from, for the worker.
    pub(super) fn senders_of(&self, run: RunId) -> Inline {
        let numbers: Vec<u8> = self.joins.senders(run).flat_map(|from| number_of(from).to_le_bytes()).collect();
        Inline::new(&numbers).expect("no more than fit")
    }
}
