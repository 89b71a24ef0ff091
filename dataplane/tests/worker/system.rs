//! What a function does with its process: prints, hoards memory, starts others.

use std::io::Write;
use std::process::Command;
use std::time::Duration;

use praas_dataplane::{Context, Failure, Input, Output, Worker};

pub(super) fn register(worker: Worker) -> Worker {
    worker
        .function("say", say)
        .function("flood", flood)
        .function("hog", hog)
        .function("bomb", bomb)
        .function("threads", threads)
        .function("posthumous", posthumous)
}

/// `STREAM BYTES`, STREAM being `out`, `err` or `abort`: prints the bytes as they are; with `abort` to stderr, as its last words.
fn say(_: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let space = input.iter().position(|byte| *byte == b' ').ok_or_else(|| Failure::new(-22, "STREAM BYTES, please"))?;
    let (stream, bytes) = (&input[..space], &input[space + 1..]);
    match stream {
        b"out" => std::io::stdout().write_all(bytes).and_then(|()| std::io::stdout().flush())?,
        _ => std::io::stderr().write_all(bytes)?,
    }
    if stream == b"abort" {
        std::process::abort();
    }
    Ok(Output::empty())
}

/// Prints as fast as it can until nobody waits any more. Returns how many lines that were.
fn flood(context: &mut Context<'_>, _: Input) -> Result<Output, Failure> {
    let mut out = std::io::stdout().lock();
    let mut lines = 0_u64;
    while !context.is_cancelled() && context.deadline_left() > Duration::from_millis(200) {
        for _ in 0..64 {
            writeln!(out, "flood {lines}, and some more so that it is a line as others are")?;
            lines += 1;
        }
    }
    Ok(lines.to_string().into())
}

/// `MIB`: takes so much memory, one after the other, and writes to all of it.
fn hog(_: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let mut hoard = Vec::new();
    for _ in 0..super::number(&input) {
        hoard.push(vec![1_u8; 1 << 20]);
    }
    Ok(hoard.len().to_string().into())
}

/// `DEPTH`: a process that starts two that start two and so on, out of our process group, each of which stays for a while. Bounded, should nothing else
/// bound it: two to the power of DEPTH.
fn bomb(_: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let script = "f() { if [ $1 -gt 0 ]; then (f $(($1 - 1))) & (f $(($1 - 1))) & fi; sleep 20; }; f $1";
    let depth = super::number(&input).min(11).to_string();
    Command::new("setsid").args(["sh", "-c", script, "praas-bomb", &depth]).spawn()?;
    Ok(Output::empty())
}

/// `N`: starts so many threads, and exits with code 1 when it does not get one.
fn threads(_: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    for _ in 0..super::number(&input) {
        let thread = std::thread::Builder::new().stack_size(64 << 10).spawn(std::thread::park);
        if let Err(error) = thread {
            eprintln!("no thread: {error}");
            std::process::exit(1);
        }
    }
    Ok(Output::empty())
}

/// `HOW BYTES PATH`: leaves a line there, waits until the controller is stopped, and then dies: with HOW = `answered` after it has answered with so many
/// bytes, with `begun` before. When somebody has left a line there before, it answers at once.
fn posthumous(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let text = String::from_utf8_lossy(&input).into_owned();
    let words: Vec<&str> = text.splitn(3, ' ').collect();
    let &[how, bytes, path] = &words[..] else { return Err(Failure::new(-22, "HOW BYTES PATH, please")) };
    let mut answer = context.loan(usize::try_from(super::number(bytes.as_bytes())).unwrap_or(0))?;
    answer.fill(7);
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path)?;
    writeln!(file, "{}", std::process::id())?;
    if std::fs::read_to_string(path)?.lines().count() > 1 {
        return Ok(answer.into());
    }
    let controller = format!("/proc/{}/stat", std::os::unix::process::parent_id());
    while !std::fs::read_to_string(&controller)?.contains(") T ") {
        std::thread::sleep(Duration::from_millis(1));
    }
    if how == "answered" {
        std::thread::spawn(|| {
            // Long enough for the answer to be on its way; nobody takes it before we are dead.
            std::thread::sleep(Duration::from_millis(200));
            super::raise(9);
        });
        return Ok(answer.into());
    }
    super::raise(9);
    Err(Failure::new(-1, "nobody survives that"))
}
