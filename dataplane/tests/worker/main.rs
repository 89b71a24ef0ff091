//! The worker of the integration tests: functions that behave, and functions that do what the fault catalogue lists.
#![allow(clippy::cast_possible_truncation, reason = "dice and patterns are cut to size on purpose")]

use std::cell::{Cell, RefCell};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

mod batch;
#[path = "../support/dice.rs"]
mod dice;
mod join;
mod messages;
mod pry;
mod state;
mod system;

use praas_dataplane::client::CallOptions;
use praas_dataplane::{
    Client, ClientConfig, Context, Credential, Failure, Input, InvokeError, Output, Payload, Worker,
};

fn main() -> ExitCode {
    let mut calls = 0_u64;
    if std::env::args().nth(1).as_deref() == Some("nothing") {
        return Worker::new().serve();
    }
    // Some tests know functions by their numbers: these come first.
    let worker = Worker::new()
        .function("echo", |_, input| Ok(input.into()))
        .function("tally", tally)
        .function("direct", direct)
        .function("witness", |context, input| {
            let call = input.first_chunk().map_or(u64::MAX, |call| u64::from_le_bytes(*call));
            if input.get(8..) != Some(&dice::content(call, input.len().saturating_sub(8))) {
                // The number that no call has: the process must never have let it through to here.
                tally_of(&u64::MAX.to_le_bytes())?;
            }
            tally(context, input)
        })
        .function("empty", |_, _| Ok(Output::empty()))
        .function("keep", |_, input| {
            KEPT.set(Some(input));
            Err(Failure::new(-7, "failed, and keeps its input"))
        })
        .function("kept", |_, _| {
            let input = KEPT.take().ok_or_else(|| Failure::new(-2, "nothing was kept on this worker"))?;
            check(&input, &[7; 100_000])?;
            Ok(Output::empty())
        })
        .function("lend", lend)
        .function("status", |_, input| Ok(Output::from(b"status").with_status(number(&input))))
        .function("fail", |_, input| Err(Failure::new(number(&input), "failed as asked")))
        .function("panic", |_, _| panic!("panicked as asked"))
        .function("abort", |_, _| std::process::abort())
        .function("exit", |_, input| std::process::exit(number(&input)))
        .function("hang", |_, _| {
            loop {
                std::thread::sleep(Duration::from_millis(10));
            }
        })
        .function("spin", |_, _| {
            loop {
                std::hint::spin_loop();
            }
        })
        .function("raise", |_, input| {
            // Twice: Rust's own handler takes the first SIGSEGV off and lets the program go on.
            raise(number(&input));
            raise(number(&input));
            Ok(Output::from(b"survived"))
        })
        .function("thread", |_, _| {
            std::thread::spawn(std::thread::park);
            Ok(Output::empty())
        })
        .function("exec", |_, _| Err(Command::new("sleep").arg("0.01").exec().into()))
        .function("cancels", |_, _| Ok(CANCELS.get().to_string().into()))
        .function("crowd", |_, input| Ok(crowd(usize::try_from(number(&input)).unwrap_or(0)).to_string().into()))
        .function("relay", relay)
        .function("forward", forward)
        .function("leased", |context, input| {
            // Two calls get a lease, where there are leases; the third goes straight to the leased worker.
            context.invoke("echo", b"")?;
            context.invoke("echo", b"")?;
            let function = String::from_utf8_lossy(&input).into_owned();
            Ok(context.invoke(function.as_str(), b"")?.into())
        })
        .function("once", once)
        .function("note", note)
        .function("survivor", survivor)
        .function("chain", chain)
        .function("scratch", scratch)
        .function("fill", fill)
        .function("touch", touch)
        .function("unknown", |context, _| {
            let error = context.invoke("no such function", b"x").expect_err("there is none");
            Ok(error.to_string().into())
        })
        .function("deadline", |context, _| Ok(context.deadline_left().as_millis().to_string().into()))
        .function("sleep", sleep)
        .function("count", move |_, _| {
            calls += 1;
            Ok(calls.to_string().into())
        })
        .function("pid", |context, _| Ok(format!("{} {}", context.worker(), std::process::id()).into()))
        .function("power", power)
        .function("nested", nested)
        .function("args", |_, input| {
            Ok(input.args().map(|arg| arg.len().to_string()).collect::<Vec<_>>().join(" ").into())
        })
        .function("any", any)
        .function("call_off", call_off)
        .function("context", context)
        .function("large", |context, input| {
            let bytes = usize::try_from(number(&input)).map_err(|_| Failure::new(-22, "below zero"))?;
            let mut loan = context.loan(bytes)?;
            loan.fill(7);
            Ok(loan.into())
        })
        .function("fork", |_, input| {
            // A grandchild that holds on to everything it inherited (W8); with `setsid` in a session of its own.
            let mut command = if input.is_empty() { Command::new("sleep") } else { Command::new("setsid") };
            let child = if input.is_empty() { command.arg("1000") } else { command.args(["sleep", "1000"]) }.spawn()?;
            Ok(child.id().to_string().into())
        });
    let worker = join::register(batch::register(messages::register(state::register(worker))));
    system::register(pry::register(worker)).serve()
}

thread_local! {
    /// Calls of `sleep` that were told in time that nobody waits.
    static CANCELS: Cell<u64> = const { Cell::new(0) };
    /// The input of the last call of `keep`.
    static KEPT: RefCell<Option<Input>> = const { RefCell::new(None) };
}

/// Leaves the first eight bytes of its input, the number of its call, in the file named after `tally=` on the command
/// line, whole and at the end however many workers do so; echoes.
fn tally(_: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    tally_of(input.get(..8).ok_or_else(|| Failure::new(-22, "a call's number, please"))?)?;
    Ok(input.into())
}

fn tally_of(call: &[u8]) -> Result<(), Failure> {
    use std::io::Write;
    let path = std::env::args().find_map(|arg| arg.strip_prefix("tally=").map(str::to_owned));
    let path = path.ok_or_else(|| Failure::new(-2, "started without tally=FILE"))?;
    std::fs::OpenOptions::new().create(true).append(true).open(path)?.write_all(call)?;
    Ok(())
}

/// Answers with its input, counted if there is a tally, and with status 1 when the call came without a hop. What follows the call's number
/// may be something to do first.
fn direct(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let is_direct = i32::from(context.is_direct());
    let told = String::from_utf8_lossy(input.get(8..40.min(input.len())).unwrap_or_default()).into_owned();
    if std::env::args().any(|arg| arg.starts_with("tally=")) {
        return Ok(tally(context, input)?.with_status(is_direct));
    }
    match told.split_once('=').unwrap_or((&told, "")) {
        ("wait", ms) => std::thread::sleep(Duration::from_millis(u64::try_from(number(ms.as_bytes())).unwrap_or(0))),
        ("asks", ms) => {
            let until = Instant::now() + Duration::from_millis(u64::try_from(number(ms.as_bytes())).unwrap_or(0));
            while Instant::now() < until && !context.is_cancelled() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        ("nest", _) => return Ok(Output::from(context.invoke("echo", b"nested")?).with_status(is_direct)),
        ("panic", _) => panic!("panicked as asked"),
        ("abort", _) => std::process::abort(),
        _ => {}
    }
    Ok(Output::from(input).with_status(is_direct))
}

fn number(input: &[u8]) -> i32 {
    String::from_utf8_lossy(input).trim().parse().unwrap_or(0)
}

fn sleep(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let until = Instant::now() + Duration::from_millis(u64::try_from(number(&input)).unwrap_or(0));
    while Instant::now() < until {
        if context.is_cancelled() {
            CANCELS.set(CANCELS.get() + 1);
            // So that its answer comes after the timeout for sure.
            std::thread::sleep(Duration::from_millis(5));
            return Ok(Output::from(b"cancelled"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(Output::from(b"slept"))
}

fn raise(signal: i32) {
    kill(std::process::id(), signal);
}

fn kill(pid: u32, signal: i32) {
    let _ = Command::new("kill").arg(format!("-{signal}")).arg(pid.to_string()).status();
}

/// `FUNCTION INPUT`: calls it and passes on what it answered, block and all.
/// Maps pages one by one until the kernel gives no more (`vm.max_map_count`), but for so many; returns how many there are.
fn crowd(left: usize) -> usize {
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
    thread_local! { static PAGES: RefCell<Vec<*mut std::ffi::c_void>> = const { RefCell::new(Vec::new()) } }
    PAGES.with_borrow_mut(|pages| {
        // Room for all of them first: it is memory, too.
        pages.reserve(1 << 20);
        // Neighbours that differ in what they allow are no one mapping.
        let kinds = [ProtFlags::READ, ProtFlags::READ | ProtFlags::WRITE];
        for turn in 0.. {
            // SAFETY:
            // - in bounds: the kernel chooses the address; the page overlaps nothing of ours.
            // - unshared, unique: private, and nobody touches it.
            let page = unsafe { mmap_anonymous(std::ptr::null_mut(), 4096, kinds[turn % 2], MapFlags::PRIVATE) };
            let Ok(page) = page else { break };
            pages.push(page);
        }
        for page in pages.split_off(pages.len().saturating_sub(left)) {
            // SAFETY: in bounds: a page mapped above. Unshared, unique: nobody ever looked at it, and it is forgotten now.
            let _ = unsafe { munmap(page, 4096) };
        }
        pages.len()
    })
}

/// Takes its input to `echo` of the process named after `forward=` on the command line, with the credential in the file after
/// `credential=` if there is one: in a chain of processes the one in the middle.
fn forward(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    thread_local! { static NEXT: RefCell<Option<Client>> = const { RefCell::new(None) } }
    let argument = |key: &str| std::env::args().find_map(|arg| arg.strip_prefix(key).map(str::to_owned));
    NEXT.with_borrow_mut(|next| {
        let client = match next {
            Some(client) => client,
            None => {
                let address =
                    argument("forward=").ok_or_else(|| Failure::new(-2, "started without forward=ADDRESS"))?;
                let credential = argument("credential=").map(|path| Credential::from_file(path.as_ref()));
                let credential = credential.transpose().map_err(|error| Failure::new(-13, error.to_string()))?;
                let config =
                    ClientConfig { credential, connect_within: context.deadline_left(), ..ClientConfig::default() };
                let client = Client::connect(address, &config);
                next.insert(client.map_err(|error| Failure::new(-111, error.to_string()))?)
            }
        };
        let options = CallOptions { deadline: Some(context.deadline_left()), ..CallOptions::default() };
        let call = client.submit_with("echo", &*input, options)?;
        Ok(Output::from(&*client.wait(call)?))
    })
}

fn relay(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let text = String::from_utf8_lossy(&input).into_owned();
    let (function, input) = text.split_once(' ').unwrap_or((&text, ""));
    Ok(context.invoke(function, input.as_bytes())?.into())
}

/// `ROUNDS`: lends a block to a function that fails and keeps it, writes to as much memory as it then gets, and asks what
/// the keeper reads.
fn lend(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    for _ in 0..number(&input) {
        let mut loan = context.loan(100_000)?;
        loan.fill(7);
        let Err(InvokeError::Failed { status: -7, .. }) = context.invoke("keep", loan) else {
            return Err(Failure::new(-1, "it did not fail as it should"));
        };
        context.loan(100_000)?.fill(9);
        context.invoke("kept", b"")?;
    }
    Ok(Output::empty())
}

/// `return` or `pass`: keeps the answer of a worker, kills that worker, sees it replaced and its memory reused, and then
/// returns the answer, or passes it to `echo`.
fn survivor(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let pid = |context: &mut Context<'_>| -> Result<u32, Failure> {
        let reply = context.invoke("pid", b"")?;
        let text = String::from_utf8_lossy(&reply).into_owned();
        Ok(text.split(' ').nth(1).and_then(|pid| pid.parse().ok()).unwrap_or(0))
    };
    let victim = pid(context)?;
    let kept = context.invoke("fill", b"7 100000")?;
    kill(victim, 9);
    let replaced = Instant::now();
    while pid(context).is_ok_and(|pid| pid == victim) || pid(context).is_err() {
        if replaced.elapsed() > Duration::from_secs(5) {
            return Err(Failure::new(-9, "nobody replaced the dead"));
        }
    }
    let _reused = context.invoke("fill", b"9 100000")?;
    check(&kept, &[7; 100_000])?;
    if &*input == b"pass" {
        return Ok(context.invoke("echo", kept)?.into());
    }
    Ok(kept.into())
}

/// `PATH`: leaves a line there, gets answers that it does not read, and is killed.
fn once(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    use std::io::Write;
    let path = String::from_utf8_lossy(&input).into_owned();
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path)?;
    writeln!(file, "{}", std::process::id())?;
    let open: Vec<_> = (0..3).map(|_| context.submit("echo", b"answered")).collect::<Result<_, _>>()?;
    std::thread::sleep(Duration::from_millis(200));
    raise(9);
    drop(open);
    Ok(Output::empty())
}

/// `PATH ID MS ...`: leaves a line with the id there, takes that long, and returns its input.
fn note(_: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    use std::io::Write;
    let text = String::from_utf8_lossy(&input).into_owned();
    let mut words = text.split(' ');
    let (path, id, ms) = (words.next().unwrap_or(""), words.next().unwrap_or(""), words.next().unwrap_or("0"));
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path)?;
    // In one write, which is not torn apart by others.
    file.write_all(format!("{id}\n").as_bytes())?;
    std::thread::sleep(Duration::from_millis(ms.parse().unwrap_or(0)));
    Ok(input.into())
}

/// `DEPTH BYTES`: a call of itself inside a call of itself, the innermost of which makes the bytes.
fn chain(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let text = String::from_utf8_lossy(&input).into_owned();
    let (depth, bytes) = text.split_once(' ').unwrap_or(("0", "0"));
    match number(depth.as_bytes()) {
        0 => Ok(vec![5; bytes.parse().unwrap_or(0)].into()),
        depth => Ok(context.invoke("chain", format!("{} {bytes}", depth - 1).into_bytes())?.into()),
    }
}

/// `BYTES`: takes that much scratch, writes it, and returns nothing of it.
fn scratch(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let bytes = usize::try_from(number(&input)).unwrap_or(0);
    context.scratch(bytes)?.fill(1);
    context.scratch(bytes / 2)?.fill(2);
    Ok(Output::empty())
}

/// `BYTE BYTES`: that many of that byte.
fn fill(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let text = String::from_utf8_lossy(&input).into_owned();
    let (byte, bytes) = text.split_once(' ').unwrap_or(("0", "0"));
    let mut loan = context.loan(bytes.parse().unwrap_or(0))?;
    loan.fill(byte.parse().unwrap_or(0));
    Ok(loan.into())
}

/// `BYTES`: loans them, writes half of them and then waits to be killed in the middle of it (W3).
fn touch(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let mut loan = context.loan(usize::try_from(number(&input)).unwrap_or(0))?;
    let half = loan.len() / 2;
    loan[..half].fill(3);
    raise(9);
    Ok(loan.into())
}

fn power(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let text = String::from_utf8_lossy(&input).into_owned();
    let (base, exponent) = text.split_once(' ').ok_or_else(|| Failure::new(-22, "two numbers"))?;
    let exponent: u32 = exponent.parse().map_err(|_| Failure::new(-22, "two numbers"))?;
    if exponent == 0 {
        return Ok(Output::from(b"1"));
    }
    let rest = context.invoke("power", format!("{base} {}", exponent - 1).into_bytes())?;
    let product = i64::from(number(base.as_bytes())) * i64::from(number(&rest));
    Ok(product.to_string().into())
}

/// `FUNCTION COUNT MODE BYTES`: calls FUNCTION so often, with inputs of that size, and checks each answer.
/// MODE is `exchange`, `ring` (prefer rings), `async` (submit all, then wait) or `loan` (one block, handed to and fro).
fn nested(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let text = String::from_utf8_lossy(&input).into_owned();
    let mut words = text.split(' ');
    let function = words.next().unwrap_or_default().to_owned();
    let mut number = || words.next().unwrap_or_default().to_owned();
    let (count, mode, bytes) = (number(), number(), number());
    let (count, bytes): (u32, usize) = (count.parse().unwrap_or(1), bytes.parse().unwrap_or(8));
    context.prefer_exchange(mode != "ring" && mode != "async");
    let expected =
        |at: u32| -> Vec<u8> { (0..bytes).map(|i| (i as u32).wrapping_mul(31).wrapping_add(at) as u8).collect() };
    match mode.as_str() {
        "async" => {
            let mut open = std::collections::VecDeque::new();
            for at in 0..count {
                if open.len() >= 64 {
                    let (at, call) = open.pop_front().expect("not empty");
                    check(&context.wait(call)?, &expected(at))?;
                }
                open.push_back((at, context.submit(function.as_str(), expected(at))?));
            }
            for (at, call) in open {
                check(&context.wait(call)?, &expected(at))?;
            }
        }
        "loan" => {
            let mut loan = context.loan(bytes)?;
            for at in 0..count {
                loan.copy_from_slice(&expected(at));
                let reply = context.invoke(function.as_str(), loan)?;
                check(&reply, &expected(at))?;
                loan = reply.into_loan().map_err(|_| Failure::new(-1, "not our own block"))?;
            }
        }
        _ => {
            for at in 0..count {
                let reply = context.invoke(function.as_str(), Payload::from(expected(at)))?;
                if function == "echo" {
                    check(&reply, &expected(at))?;
                }
            }
        }
    }
    Ok(format!("{:?} {:?}", context.lease_state(), context.leased_worker()).into())
}

/// Sleeps on other workers, so many ms each, and takes what ends first, first.
fn any(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let times: Vec<String> = String::from_utf8_lossy(&input).split(' ').map(str::to_owned).collect();
    let mut open = context.submit_all("sleep", times.iter().map(|ms| ms.as_bytes()))?;
    let mut ended = Vec::new();
    while let Some(outcome) = context.wait_any(&mut open) {
        ended.push(match outcome {
            Ok(reply) => String::from_utf8_lossy(&reply).into_owned(),
            Err(error) => error.to_string(),
        });
    }
    Ok(ended.join(" ").into())
}

/// Starts calls of `count`, which are few enough to wait behind one that sleeps, and calls all but one off.
fn call_off(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let calls = usize::try_from(number(&input)).unwrap_or(0);
    let slow = context.submit("sleep", b"100")?;
    let mut open = context.submit_all("count", (0..calls).map(|_| b""))?;
    for pending in open.drain(1..) {
        context.cancel(pending);
    }
    context.wait(slow)?;
    let Some(outcome) = context.wait_any(&mut open) else { return Err(Failure::new(-1, "one is left")) };
    Ok(outcome?.into())
}

fn check(got: &[u8], expected: &[u8]) -> Result<(), Failure> {
    if got == expected { Ok(()) } else { Err(Failure::new(-5, "a wrong answer")) }
}

fn context(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let scratch = context.scratch(1 << 20)?;
    scratch.fill(1);
    let cancelled = context.is_cancelled();
    let (active, swapped) = (context.active_processes()?, context.swapped_processes()?);
    Ok(format!(
        "{} {} {} {} {} {:?} {:?} {}",
        context.invocation_id(),
        context.process_id(),
        context.function(),
        context.deadline_left().as_millis(),
        cancelled,
        active,
        swapped,
        input.len(),
    )
    .into())
}
