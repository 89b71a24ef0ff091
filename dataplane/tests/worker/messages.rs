//! Functions of the test worker that send and receive messages, and call other processes.
#![allow(clippy::cast_possible_truncation, reason = "numbers are cut to bytes on purpose")]

use std::time::Duration;

use praas_dataplane::{Context, Delivery, Failure, Input, Key, Message, Output, Payload, SELF, Source, Worker};

use crate::dice::Dice;
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
        .function("mix", mix)
        .function("call_at", |context, input| {
            let [process, function, payload] = arguments(&input)?;
            let reply = context.invoke_at(text(process), &text(function), payload)?;
            let status = reply.status();
            Ok(Output::from(reply).with_status(status))
        })
        .function("call_at_with", |context, input| {
            let [process, function, payload, delivery] = arguments(&input)?;
            let delivery = match delivery {
                b"retry" => Delivery::Retry,
                b"effectively once" => Delivery::EffectivelyOnce,
                _ => Delivery::AtMostOnce,
            };
            let pending = context.submit_at_with(text(process), &text(function), payload, delivery)?;
            Ok(context.wait(pending)?.into())
        })
        .function("wait_any_at", wait_any_at)
        .function("many_at", many_at)
        .function("leave_at", |context, input| {
            // `wait`, `cancel` or `leave`: what becomes of the call that is started.
            let [process, function, payload, then] = arguments(&input)?;
            let pending = context.submit_at(text(process), &text(function), payload)?;
            match then {
                b"wait" => return Ok(context.wait(pending)?.into()),
                b"cancel" => context.cancel(pending),
                b"die" => {
                    // So that it has been sent.
                    std::thread::sleep(Duration::from_millis(100));
                    std::process::abort()
                }
                _ => drop(pending),
            }
            Ok(Output::empty())
        })
        .function("active", |context, _| Ok(context.active_processes()?.join(" ").into()))
        .function("listed", |context, _| Ok(listed(context)?.into()))
        .function("watch_listed", |context, input| {
            // What changes during one invocation; each time it does we send ourselves what it is now.
            let [want, ms] = arguments(&input)?;
            let until = std::time::Instant::now() + Duration::from_millis(number(ms)?);
            let mut seen: Vec<String> = Vec::new();
            while std::time::Instant::now() < until {
                let now = listed(context)?;
                if seen.last() != Some(&now) {
                    context.send(SELF, "seen", now.as_bytes())?;
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

/// Those that are active, and those that are swapped out, by name, at one moment.
fn listed(context: &mut Context<'_>) -> Result<String, Failure> {
    loop {
        let (mut active, mut swapped) = (context.active_processes()?, context.swapped_processes()?);
        if context.active_processes()? == active {
            active.sort();
            swapped.sort();
            return Ok(format!("{}/{}", active.join(" "), swapped.join(" ")));
        }
    }
}

/// Starts calls here and at another process, each of which waits for a message, sends those messages last to first, and takes what ends first, first.
fn wait_any_at(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let [process] = arguments(&input)?;
    let places = [text(process), String::from(SELF), text(process)];
    let mut open = Vec::new();
    for (at, place) in places.iter().enumerate() {
        let key = format!("wait {at}");
        open.push(context.submit_at(place, "recv_payload", Payload::from_args(&[b"*", key.as_bytes()]))?);
    }
    let mut ended = Vec::new();
    for (at, place) in places.iter().enumerate().rev() {
        context.send(place, format!("wait {at}"), place.as_bytes())?;
        let outcome = context.wait_any(&mut open).ok_or_else(|| Failure::new(-1, "all have ended"))?;
        ended.push(format!("{}:{}", open.len(), text(&outcome?)));
    }
    Ok(ended.join(" ").into())
}

/// Starts so many calls of `echo` at another process, of several sizes, and waits for them from the last to the first. What was too many is told.
fn many_at(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let [process, count] = arguments(&input)?;
    let content = |at: u64| {
        vec![u8::try_from(at % 251).unwrap_or(0); [3, 40, 41, 5000, 300_000][usize::try_from(at % 5).unwrap_or(0)]]
    };
    let mut open = Vec::new();
    let mut refused = String::new();
    for at in 0..number(count)? {
        match context.submit_at(text(process), "echo", content(at)) {
            Ok(pending) => open.push((at, pending)),
            Err(error) => {
                refused = error.to_string();
                break;
            }
        }
    }
    let all = open.len();
    for (at, pending) in open.into_iter().rev() {
        if *context.wait(pending)? != *content(at) {
            return Err(Failure::new(-3, format!("call {at}: another answer")));
        }
    }
    Ok(format!("{all} {refused}").into())
}

/// Sends so many messages to a process and receives what comes from it, most often by turns, and now and then in every other way that there is. Each
/// message is its author's tag, its number among that one's, and so many bytes that follow from both. What was sent and received is written to a file at once:
/// `sent` or `got`, key, tag and number.
fn mix(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let [peer, tag, first, count, seed, odd_percent, path] = arguments(&input)?;
    let (peer, tag) = (text(peer), number(tag)?);
    let (mut dice, odd_percent) = (Dice(number(seed)?), number(odd_percent)?);
    let received = std::fs::OpenOptions::new().create(true).append(true).open(text(path));
    let mut received = received.map_err(|error| Failure::new(-5, error.to_string()))?;
    let mut note = |line: String| {
        std::io::Write::write_all(&mut received, line.as_bytes()).map_err(|error| Failure::new(-5, error.to_string()))
    };
    let (mut sent, mut back) = (number(first)?, None);
    while sent < number(first)? + number(count)? {
        let odd = if dice.below(100) < odd_percent { dice.below(6) } else { 6 };
        if !matches!(odd, 1..=3) {
            // Some that came go back as they are.
            if let Some((author, number, message)) = back.take() {
                context.send(&peer, "back", message)?;
                note(format!("sent back {author} {number}\n"))?;
            } else {
                let bytes = [8, 24, 64, 3000, 100_000][dice.below(5) as usize];
                context.send(&peer, "m", &made(tag, sent, bytes))?;
                note(format!("sent m {tag} {sent}\n"))?;
                sent += 1;
            }
        }
        let longest = Duration::from_micros([200, 3000][dice.below(2) as usize]);
        let got = match odd {
            0 => None,
            1 => context.try_recv(peer.as_str(), "m")?,
            2 => context.recv_for(Source::Any, Key::Any, longest)?,
            3 => context.recv_for(peer.as_str(), Key::Any, longest)?,
            4 => context.recv_for(peer.as_str(), "another", longest)?,
            5 => context.recv_for(peer.as_str(), "m", longest)?,
            _ => context.recv_for(peer.as_str(), Key::Any, Duration::from_millis(20))?,
        };
        if let Some(message) = got {
            let word = |at: usize| message[at..at + 8].try_into().map(u64::from_le_bytes).unwrap_or(u64::MAX);
            let (author, number) = (word(0), word(8));
            if *message != *made(author, number, message.len() - 16) {
                return Err(Failure::new(-3, format!("message {number} of {author} came changed")));
            }
            let key = text(message.key());
            note(format!("got {key} {author} {number}\n"))?;
            if key == "m" && dice.below(4) == 0 {
                back = Some((author, number, message));
            }
        }
    }
    Ok(sent.to_string().into())
}

fn made(tag: u64, number: u64, bytes: usize) -> Vec<u8> {
    let mut dice = Dice(tag << 32 | number);
    let mut made = [tag.to_le_bytes(), number.to_le_bytes()].concat();
    let first = dice.below(256) as u8;
    made.extend((0..bytes).map(|at| first.wrapping_add(at as u8)));
    made
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
