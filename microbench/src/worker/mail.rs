//! Functions that exchange messages: one asks and takes the time, the other answers. They may be in two processes, or on two workers of one.

use std::time::{Duration, Instant};

use praas_dataplane::{Context, Failure, Input, Key, Message, Output, Source};
use serde::{Deserialize, Serialize};

use super::{INLINE_BYTES_MAX, refuse, samples_out};
use crate::end::{is_stamped, nanoseconds, stamp};

/// Sends messages as an [`Exchange`] order says, receives their answers, and answers with the times.
pub(crate) const PING: &str = "message_ping";
/// The other side of the same order: receives each message and sends it back, as it is.
pub(crate) const PONG: &str = "message_pong";

/// Longest wait for one message: somebody is gone, and the run is over.
const PATIENCE: Duration = Duration::from_secs(10);

/// A block of messages and answers, as JSON; both sides get the same, but for the name.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Exchange {
    /// Name of the other process; empty: the same process.
    pub(crate) peer: String,
    pub(crate) bytes: usize,
    /// Messages exchanged first and not recorded.
    pub(crate) warm_up: usize,
    pub(crate) samples: usize,
    /// Number of the first message: every message and every answer has a key of its own.
    pub(crate) first: u64,
}

impl Exchange {
    fn source(&self) -> Source<'_> {
        Source::from(self.peer.as_str())
    }

    fn sequences(&self) -> std::ops::Range<u64> {
        self.first..self.first + (self.warm_up + self.samples) as u64
    }
}

/// `q` or `a`, and the number of the message.
fn key(kind: u8, sequence: u64) -> [u8; 9] {
    let mut key = [kind; 9];
    key[1..].copy_from_slice(&sequence.to_le_bytes());
    key
}

fn receive(context: &mut Context<'_>, order: &Exchange, key: &[u8]) -> Result<Message, Failure> {
    let received = context.recv_for(order.source(), Key::Is(key), PATIENCE)?;
    received.ok_or_else(|| refuse(format!("no message of {} B came within {PATIENCE:?}", order.bytes)))
}

/// The asking side. The message is written where it is sent from (a loan), its sequence number and last byte anew each time, the rest once a
/// block; short ones travel inside a record. One read of the clock a round trip.
pub(super) fn ping(context: &mut Context<'_>, input: &Input) -> Result<Output, Failure> {
    let order: Exchange = serde_json::from_slice(input).map_err(refuse)?;
    let mut samples_ns = Vec::with_capacity(order.samples);
    let mut short = [0xA5; INLINE_BYTES_MAX];
    let short_bytes = INLINE_BYTES_MAX - key(0, 0).len();
    let mut before = Instant::now();
    for (round, sequence) in order.sequences().enumerate() {
        let question = key(b'q', sequence);
        if order.bytes <= short_bytes {
            stamp(&mut short[..order.bytes], sequence);
            context.send(&order.peer, question, &short[..order.bytes])?;
        } else {
            let mut loan = context.loan(order.bytes).map_err(refuse)?;
            if round == 0 {
                loan.fill(0xA5);
            }
            stamp(&mut loan, sequence);
            context.send(&order.peer, question, loan)?;
        }
        let answer = receive(context, &order, &key(b'a', sequence))?;
        if answer.len() != order.bytes || !is_stamped(&answer, sequence) {
            let (sent, came) = (order.bytes, answer.len());
            return Err(refuse(format!(
                "wrong answer: message {sequence} of {sent} B came back as {came} B or with another stamp"
            )));
        }
        let after = Instant::now();
        if round >= order.warm_up {
            samples_ns.push(nanoseconds(before, after));
        }
        before = after;
        if round == 0 {
            let last = order.bytes.saturating_sub(1).max(8);
            if answer[8..last].iter().any(|&byte| byte != 0xA5) {
                return Err(refuse(format!("wrong answer: the first {} B message came back changed", order.bytes)));
            }
            before = Instant::now();
        }
    }
    Ok(samples_out(&samples_ns))
}

/// The answering side: hands each message back as it came.
pub(super) fn pong(context: &mut Context<'_>, input: &Input) -> Result<Output, Failure> {
    let order: Exchange = serde_json::from_slice(input).map_err(refuse)?;
    for sequence in order.sequences() {
        let message = receive(context, &order, &key(b'q', sequence))?;
        context.send(&order.peer, key(b'a', sequence), message)?;
    }
    Ok(Output::empty())
}
