//! The functions that run inside the process under test, and the orders they take.
//!
//! `praas-bench` is its own worker binary: `praas-process` starts it with the hidden subcommand `worker`. The loop that
//! is timed for local invocations runs here, in a function, because that is who makes local calls.

pub(crate) mod mail;
pub(crate) mod state;

use std::collections::VecDeque;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use praas_dataplane::{Context, Failure, FunctionId, Input, InvokeError, Lease, Loan, Output, Reply, Worker};
use serde::{Deserialize, Serialize};

use crate::end::{is_stamped, nanoseconds, stamp};
use crate::redis::Reducer;

/// Name of the hidden subcommand that serves these functions.
pub(crate) const SUBCOMMAND: &str = "worker";

/// Answers with its input.
pub(crate) const ECHO: &str = "echo";
/// Calls `echo` as a [`Drive`] order says and answers with the times.
pub(crate) const DRIVE: &str = "drive";
/// Tells its pid to a UDP port and then stays until it is killed; with an empty input it returns at once.
pub(crate) const VICTIM: &str = "victim";
/// Adds a vector to an accumulator in Redis (`redis/reduce.rs`); answers with its first and last element.
pub(crate) const REDUCE_REDIS: &str = "reduce_redis";

/// Longest body that travels inside a descriptor.
const INLINE_BYTES_MAX: usize = 40;

/// How long `victim` waits for its death.
const VICTIM_PATIENCE: Duration = Duration::from_secs(20);

/// How a local call should reach its callee.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Via {
    /// As the product chooses.
    Auto,
    /// Over the exchange line of the lease.
    Exchange,
    /// Over the rings of the lease.
    Ring,
    /// Over the queues of the lease (`--ipc mq`).
    Queue,
    /// Through the controller, every time: a process without leases.
    Controller,
}

impl Via {
    /// As rows name it; `None` leaves it to the product.
    pub(crate) fn name(self) -> Option<&'static str> {
        match self {
            Via::Auto => None,
            Via::Exchange => Some("exchange"),
            Via::Ring => Some("ring"),
            Via::Queue => Some("queue"),
            Via::Controller => Some("controller"),
        }
    }
}

/// One block of calls, as JSON.
#[derive(Copy, Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Drive {
    pub(crate) bytes: usize,
    /// Calls made first and not recorded.
    pub(crate) warm_up: usize,
    pub(crate) calls: usize,
    pub(crate) via: Via,
    /// Whether each call writes and checks its payload.
    pub(crate) touched: bool,
    /// 1: synchronous calls, each timed. More: that many in flight, and one time for all.
    pub(crate) in_flight: usize,
}

/// What a [`Drive`] order gave.
#[derive(Debug)]
pub(crate) struct Driven {
    pub(crate) via: String,
    /// One per call, or one for all when several were in flight.
    pub(crate) samples_ns: Vec<u64>,
}

impl Driven {
    /// Reads the answer of [`DRIVE`]: a byte for the way, then samples.
    pub(crate) fn decode(answer: &[u8]) -> Option<Self> {
        let (&way, samples) = answer.split_first()?;
        let (samples, []) = samples.as_chunks::<8>() else { return None };
        let via = match way {
            b'e' => "exchange",
            b'r' => "ring",
            b'q' => "queue",
            _ => "controller",
        };
        Some(Self { via: via.to_owned(), samples_ns: samples.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect() })
    }
}

/// The hidden subcommand.
pub(crate) fn serve() -> ExitCode {
    let mut reducer = Reducer::default();
    Worker::new()
        .function(ECHO, |_context, input| Ok(Output::from(input)))
        .function(DRIVE, |context, input| drive(context, &input))
        .function(VICTIM, |_context, input| victim(&input))
        .function(REDUCE_REDIS, move |_context, input| Ok(Output::from(reducer.add(&input).map_err(refuse)?.to_vec())))
        .function(mail::PING, |context, input| mail::ping(context, &input))
        .function(mail::PONG, |context, input| mail::pong(context, &input))
        .function(state::DRIVE, |context, input| state::drive(context, &input))
        .function(state::WRITE, |context, input| state::write(context, &input))
        .function(state::CHECK, |context, input| state::check(context, &input))
        .function(state::OVERWRITE, |context, input| state::overwrite(context, &input))
        .function(state::REDUCE, |context, input| state::reduce(context, &input))
        .function(state::TAKE, |context, input| state::take(context, &input))
        .serve()
}

/// Samples as an answer: each as eight bytes.
fn samples_out(samples_ns: &[u64]) -> Output {
    Output::from(samples_ns.iter().flat_map(|sample| sample.to_le_bytes()).collect::<Vec<u8>>())
}

/// Samples out of such an answer; `None` when it is none.
pub(crate) fn samples_in(answer: &[u8]) -> Option<impl Iterator<Item = u64>> {
    let (samples, []) = answer.as_chunks::<8>() else { return None };
    Some(samples.iter().map(|bytes| u64::from_le_bytes(*bytes)))
}

fn refuse(text: impl std::fmt::Display) -> Failure {
    Failure::new(-1, text.to_string())
}

fn drive(context: &mut Context<'_>, input: &Input) -> Result<Output, Failure> {
    let order: Drive = serde_json::from_slice(input).map_err(refuse)?;
    let echo = context.function_id(ECHO).ok_or_else(|| refuse("echo is not registered"))?;
    context.prefer_exchange(order.via != Via::Ring);
    let samples_ns = if order.in_flight > 1 {
        pipelined(context, echo, order)?
    } else if order.bytes <= INLINE_BYTES_MAX {
        inline_calls(context, echo, order)?
    } else {
        loaned_calls(context, echo, order)?
    };
    let way = match context.lease_state() {
        Lease::Exchange if order.in_flight == 1 => b'e',
        Lease::Exchange | Lease::Ring => b'r',
        Lease::Queue => b'q',
        Lease::None => b'c',
    };
    let mut answer = Vec::with_capacity(1 + samples_ns.len() * 8);
    answer.push(way);
    answer.extend(samples_ns.iter().flat_map(|sample| sample.to_le_bytes()));
    Ok(Output::from(answer))
}

fn failed(error: InvokeError) -> Failure {
    refuse(format!("a measured call failed: {error}"))
}

fn check(reply: &Reply, order: Drive, sequence: u64) -> Result<(), Failure> {
    if reply.len() == order.bytes && (!order.touched || is_stamped(reply, sequence)) {
        return Ok(());
    }
    Err(refuse(format!(
        "wrong answer: call {sequence} of {} B came back as {} B or with another stamp",
        order.bytes,
        reply.len()
    )))
}

/// Calls whose payload travels in the descriptor.
fn inline_calls(context: &mut Context<'_>, echo: FunctionId, order: Drive) -> Result<Vec<u64>, Failure> {
    let mut samples_ns = Vec::with_capacity(order.calls);
    let mut storage = [0xA5; INLINE_BYTES_MAX];
    let message = &mut storage[..order.bytes];
    let mut before = Instant::now();
    for call in 0..order.warm_up + order.calls {
        let sequence = call as u64 + 1;
        if order.touched {
            stamp(message, sequence);
        }
        let reply = context.invoke(echo, &*message).map_err(failed)?;
        check(&reply, order, sequence)?;
        let after = Instant::now();
        if call >= order.warm_up {
            samples_ns.push(nanoseconds(before, after));
        }
        before = after;
    }
    Ok(samples_ns)
}

/// Calls whose payload is a block, handed over and handed back.
fn loaned_calls(context: &mut Context<'_>, echo: FunctionId, order: Drive) -> Result<Vec<u64>, Failure> {
    let mut samples_ns = Vec::with_capacity(order.calls);
    let mut loan = context.loan(order.bytes).map_err(failed)?;
    loan.fill(0xA5);
    stamp(&mut loan, u64::MAX);
    let mut before = Instant::now();
    for call in 0..order.warm_up + order.calls {
        let sequence = call as u64 + 1;
        if order.touched {
            stamp(&mut loan, sequence);
        }
        let reply = context.invoke(echo, loan).map_err(failed)?;
        check(&reply, order, sequence)?;
        loan = writable(context, reply, order.bytes)?;
        let after = Instant::now();
        if call >= order.warm_up {
            samples_ns.push(nanoseconds(before, after));
        }
        before = after;
    }
    let last = if order.touched { (order.warm_up + order.calls) as u64 } else { u64::MAX };
    if is_stamped(&loan, last) && loan[8..order.bytes - 1].iter().all(|&byte| byte == 0xA5) {
        Ok(samples_ns)
    } else {
        Err(refuse("wrong answer: the payload changed on its way"))
    }
}

/// The echoed payload as memory to write the next one in: the same block where the channel hands it back.
fn writable(context: &mut Context<'_>, reply: Reply, bytes: usize) -> Result<Loan, Failure> {
    reply.into_loan().or_else(|reply| {
        let mut loan = context.loan(bytes).map_err(failed)?;
        loan.copy_from_slice(&reply);
        Ok(loan)
    })
}

/// Many calls in flight; every answer is checked, in order.
fn pipelined(context: &mut Context<'_>, echo: FunctionId, order: Drive) -> Result<Vec<u64>, Failure> {
    let mut storage = [0xA5; INLINE_BYTES_MAX];
    let Some(message) = storage.get_mut(..order.bytes) else {
        return Err(refuse(format!("calls in flight carry up to {INLINE_BYTES_MAX} B")));
    };
    // The first call goes through the controller and brings the lease; without it there is nothing to pipeline into.
    for _ in 0..order.warm_up.max(1) {
        context.invoke(echo, &*message).map_err(failed)?;
    }
    let mut flying = VecDeque::with_capacity(order.in_flight);
    let mut answered = 0;
    let before = Instant::now();
    for call in 0..order.calls {
        if flying.len() == order.in_flight {
            answered += 1;
            let reply = context.wait(flying.pop_front().expect("in_flight > 1")).map_err(failed)?;
            check(&reply, order, answered)?;
        }
        stamp(message, call as u64 + 1);
        flying.push_back(context.submit(echo, &*message).map_err(failed)?);
    }
    for pending in flying {
        answered += 1;
        let reply = context.wait(pending).map_err(failed)?;
        check(&reply, order, answered)?;
    }
    Ok(vec![nanoseconds(before, Instant::now())])
}

/// Input: empty, or the UDP port on loopback that wants to know the pid.
fn victim(input: &Input) -> Result<Output, Failure> {
    if input.is_empty() {
        return Ok(Output::empty());
    }
    let port: u16 = std::str::from_utf8(input).map_err(refuse)?.parse().map_err(refuse)?;
    let socket = std::net::UdpSocket::bind(("127.0.0.1", 0)).map_err(refuse)?;
    socket.send_to(&std::process::id().to_le_bytes(), ("127.0.0.1", port)).map_err(refuse)?;
    std::thread::sleep(VICTIM_PATIENCE);
    Err(refuse("nobody killed this worker"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_a_way_and_whole_samples() {
        let mut answer = vec![b'e'];
        answer.extend(300u64.to_le_bytes());
        let driven = Driven::decode(&answer).unwrap();
        assert_eq!((driven.via.as_str(), driven.samples_ns), ("exchange", vec![300]));
        assert!(Driven::decode(&answer[..8]).is_none());
        assert!(Driven::decode(&[]).is_none());
    }
}
