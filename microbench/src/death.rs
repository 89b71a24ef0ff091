//! `praas-bench death`: how soon a caller learns that its worker was killed.
//!
//! Question  How long does a client wait for its error after SIGKILL hits the worker that runs its call?
//! Measures  from just before `kill(2)` until the client's wait returns the error.
//! Load      one call in flight; after each kill a call that succeeds, so that no crash loop builds up.
//! Excludes  replacing the worker (the next call waits for it, outside the time).
//! Samples   one per kill.
//! Checks    the error must be the one that says the worker was lost; anything else fails the run.

use std::net::UdpSocket;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use praas_dataplane::InvokeError;
use rustix::process::{Pid, Signal, kill_process};

use crate::end::nanoseconds;
use crate::floors::progress;
use crate::owed::judge;
use crate::placement::Wait;
use crate::recorder::Recorder;
use crate::row::{Row, RowSink};
use crate::subject::{Channel, Setup};
use crate::table;
use crate::worker::VICTIM;

/// How long a victim may take to tell its pid: it may have to wait for the replacement of the last one.
const PID_PATIENCE: Duration = Duration::from_secs(10);

/// How long the victim is left alone, so that it is surely in its function.
const SETTLED: Duration = Duration::from_micros(300);

#[derive(Args, Debug)]
pub(crate) struct DeathArgs {
    /// How many workers to kill.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    kills: u32,
    /// Channel between the process and its workers.
    #[arg(long, default_value = "ring")]
    ipc: Channel,
    /// Wait mode.
    #[arg(long, default_value = "balanced")]
    wait: Wait,
    /// Workers of the process; the others take over while one is replaced.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=63))]
    workers: u8,
    /// Also write one JSON object per row to FILE; `-` writes them to standard output instead of the table.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub(crate) fn run(args: &DeathArgs) -> Result<()> {
    let mut sink = RowSink::open(args.json.as_deref())?;
    let subject = Setup { quiet: true, ..Setup::new(args.ipc, args.wait, args.workers) }.start()?;
    let mut client = subject.client()?;
    let ear = UdpSocket::bind(("127.0.0.1", 0)).context("listen for the victim's pid")?;
    ear.set_read_timeout(Some(PID_PATIENCE))?;
    let port = ear.local_addr()?.port().to_string();
    let bar = progress(args.kills.into());
    bar.set_message("kills");
    let mut samples_ns = Vec::new();
    for number in 0..args.kills {
        client.invoke(VICTIM, b"").context("a call between two kills")?;
        let call = client.submit(VICTIM, port.as_bytes()).context("call the victim")?;
        let mut pid = [0; 4];
        ear.recv(&mut pid).with_context(|| format!("victim {number} did not tell its pid"))?;
        let pid = Pid::from_raw(i32::from_le_bytes(pid)).context("the victim told pid 0")?;
        std::thread::sleep(SETTLED);
        let before = Instant::now();
        kill_process(pid, Signal::KILL).context("kill the victim")?;
        let outcome = client.wait(call);
        samples_ns.push(nanoseconds(before, Instant::now()));
        match outcome {
            Err(InvokeError::WorkerLost { .. }) => {}
            Err(other) => bail!("kill {number}: the caller was told `{other}` where its worker was lost"),
            Ok(_) => bail!("kill {number}: a killed worker answered"),
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    ensure!(client.invoke(VICTIM, b"").is_ok(), "the process does not answer after the last kill");
    let mut recorder = Recorder::new();
    recorder.add_run(&samples_ns);
    let row = judge(Row {
        experiment: "death".into(),
        path: "remote".into(),
        ipc: args.ipc.name().into(),
        wait: args.wait.to_string(),
        times: recorder.summary(),
        placement: "SIGKILL to error at the client".into(),
        workers: Some(args.workers.into()),
        distribution: recorder.distribution(),
        ..Row::default()
    });
    sink.write(&row)?;
    if args.json.as_deref().is_none_or(|path| path.as_os_str() != "-") {
        println!("{}", table::render(&[row]));
    }
    Ok(())
}
