//! Functions of the test worker that send and receive messages, and call other processes.

use std::time::Duration;

use praas_dataplane::{Context, Failure, Input, Key, Message, Output, SELF, Source, Worker};

use crate::state::{arguments, number};

pub(crate) fn register(worker: Worker) -> Worker {
    worker
        .function("send", |context, input| {
            let [to, key, payload] = arguments(&input)?;
            context.send(text(to), key, payload)?;
            Ok(Output::empty())
        })
        .function("send_loan", |context, input| {
            let [to, key, bytes, byte] = arguments(&input)?;
            let mut loan = context.loan(usize::try_from(number(bytes)?).unwrap_or(0))?;
            loan.fill(u8::try_from(number(byte)?).unwrap_or(0));
            context.send(text(to), key, loan)?;
            Ok(Output::empty())
        })
        .function("send_input", |context, input| {
            // What we were given, as it is: nobody copies it here.
            context.send(SELF, "input", input)?;
            Ok(Output::empty())
        })
        .function("send_many", |context, input| {
            let [to, key, first, count] = arguments(&input)?;
            for at in number(first)?..number(first)? + number(count)? {
                context.send(text(to), key, &at.to_le_bytes())?;
            }
            Ok(Output::empty())
        })
        .function("broadcast", |context, input| {
            let [key, payload] = arguments(&input)?;
            let told = context.broadcast(key, payload)?;
            let missed: Vec<_> = told.missed.iter().map(|(name, error)| format!("{name} {error}")).collect();
            Ok(format!("{}, missed {}", told.reached.join(" "), missed.join(" ")).into())
        })
        .function("recv", |context, input| receive(context, &input, None))
        .function("recv_for", |context, input| {
            let [_, _, ms] = arguments(&input)?;
            receive(context, &input, Some(Duration::from_millis(number(ms)?)))
        })
        .function("recv_payload", |context, input| {
            let [from, key] = arguments(&input)?;
            Ok(context.recv(source(from), wanted(key))?.into())
        })
        .function("recv_and_die", |context, input| {
            let [from, key] = arguments(&input)?;
            let _ = context.recv(source(from), wanted(key))?;
            std::process::abort()
        })
        .function("pong", |context, input| {
            // Answers so many messages of another process under a key, each with its own bytes.
            let [from, key, count] = arguments(&input)?;
            for _ in 0..number(count)? {
                let message = context.recv(source(from), wanted(key))?;
                context.send(text(from), "pong", message)?;
            }
            Ok(Output::empty())
        })
        .function("ping", |context, input| {
            let [to, count, bytes] = arguments(&input)?;
            for round in 0..number(count)? {
                let payload =
                    vec![u8::try_from(round % 251).unwrap_or(0); usize::try_from(number(bytes)?).unwrap_or(0)];
                context.send(text(to), "ping", &payload)?;
                let answer = context.recv(source(to), "pong")?;
                if *answer != *payload {
                    return Err(Failure::new(-3, format!("round {round}: another answer")));
                }
            }
            Ok(Output::empty())
        })
        .function("ping_and_leave", |context, input| {
            // As `ping`, with a last message whose answer is left where it is, and asked for after a while.
            let [to, count, ms] = arguments(&input)?;
            for _ in 0..number(count)? {
                context.send(text(to), "ping", b"more")?;
                context.recv(source(to), "pong")?;
            }
            context.send(text(to), "ping", b"last")?;
            std::thread::sleep(Duration::from_millis(number(ms)?));
            let left = context.try_recv(source(to), "pong")?;
            Ok(left.map_or(Output::empty(), |message| told(&message)))
        })
        .function("call_at", |context, input| {
            let [process, function, payload] = arguments(&input)?;
            let reply = context.invoke_at(text(process), &text(function), payload)?;
            let status = reply.status();
            Ok(Output::from(reply).with_status(status))
        })
        .function("active", |context, _| Ok(context.active_processes()?.join(" ").into()))
        .function("watch_active", |context, input| {
            // What changes during one invocation.
            let [want, ms] = arguments(&input)?;
            let until = std::time::Instant::now() + Duration::from_millis(number(ms)?);
            let mut seen: Vec<String> = Vec::new();
            while std::time::Instant::now() < until {
                let now = context.active_processes()?.join(" ");
                if seen.last() != Some(&now) {
                    seen.push(now);
                }
                if seen.last().map(String::as_bytes) == Some(want) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(seen.join("|").into())
        })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `*`: anybody's.
fn source(from: &[u8]) -> Source<'_> {
    match from {
        b"*" => Source::Any,
        b"" => Source::Own,
        name => Source::Process(std::str::from_utf8(name).unwrap_or("?")),
    }
}

/// Nothing: any.
fn wanted(key: &[u8]) -> Key<'_> {
    if key.is_empty() { Key::Any } else { Key::Is(key) }
}

/// Sender, key and payload, with spaces in between; status 1: there was none.
fn receive(context: &mut Context<'_>, input: &Input, longest: Option<Duration>) -> Result<Output, Failure> {
    let all: Vec<&[u8]> = input.args().collect();
    let [from, key, ..] = all[..] else { return Err(Failure::new(-22, "a sender and a key, please")) };
    let received = match longest {
        None => Some(context.recv(source(from), wanted(key))?),
        Some(Duration::ZERO) => context.try_recv(source(from), wanted(key))?,
        Some(longest) => context.recv_for(source(from), wanted(key), longest)?,
    };
    Ok(received.map_or(Output::empty().with_status(1), |message| told(&message)))
}

fn told(message: &Message) -> Output {
    [message.from().as_bytes(), b" ", message.key(), b" ", message].concat().into()
}
