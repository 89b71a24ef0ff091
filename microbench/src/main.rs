#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod channel;
mod checks;
mod copy;
mod death;
mod end;
mod floors;
mod idle;
mod idle_connections;
mod invoke;
mod ipc;
mod keeper;
mod line;
mod load;
mod machine;
mod owed;
mod page;
mod paired;
mod peer;
mod peers;
mod place;
mod placement;
mod plan;
mod plot;
mod published;
mod queue;
mod raw;
mod recorder;
mod redis;
mod remote;
mod report;
mod row;
mod size;
mod state;
mod stream;
mod subject;
mod table;
mod turn;
mod twins;
mod usage;
mod worker;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Exit code of a run that failed; clap's own for wrong usage is 2.
pub(crate) const EXIT_FAILED: u8 = 1;

/// Measures invocations of a cloud process, and the floors of this machine they stand on.
///
/// Numbers of different machines, or of one machine on different days, do not compare: look at the ratio to the
/// floor, which is measured in the same run.
#[derive(Parser, Debug)]
#[command(
    name = "praas-bench",
    version,
    after_help = "\
Start here:
  praas-bench floors                                   what this machine charges for a round trip
  praas-bench invoke                                   our invocations beside their floors
  praas-bench invoke --path local --via exchange,ring --sizes 8,64,5MiB
  praas-bench invoke --path local --sizes 8 --in-flight 64      calls per second
  praas-bench invoke --path remote --checks off,on --sizes 64,1MiB,5MiB      what keys and checksums cost
  praas-bench peers                                    a remote call beside raw TCP, tokio, tokio-uring and axum
  praas-bench load --in-flight 1,16,64 --rates 10%,50%,90%     calls per second over TCP, and latency over load
  praas-bench load --connections 100 --in-flight 4 --rate 20000 --place netns
  praas-bench idle-connections --connections 10000     memory of silent clients, and whether a busy one notices
  praas-bench ipc --via tcp,shm,self,redis-block       a message and its answer: two processes, one process, Redis
  praas-bench state --op get,put --beside redis        state, read and written inside a function; and in Redis
  praas-bench state --contended                        a get while another worker overwrites the object
  praas-bench state --objects 1000000                  memory of each object, and a get of any of them
  praas-bench death --kills 1000                       from SIGKILL of a worker to the caller's error
  praas-bench idle                                     processor time and memory of an idle process
  praas-bench floors --json floors.jsonl && praas-bench report --rows floors.jsonl --out results/mine

Exit codes:
  0  done
  1  a run failed: a wrong answer, a process that died, a limit in the way (an owed figure that is missed is
     a result, not a failure)
  2  wrong usage"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Round trips of two plain processes over every raw channel.
    Floors(floors::FloorsArgs),
    /// Invocations of a real process, each beside its floor.
    Invoke(invoke::InvokeArgs),
    /// A remote call beside other people's echo servers: raw TCP three ways, a bare third party, tokio, tokio-uring, axum.
    ///
    /// The fastest raw server of a size and wait mode is the floor (`best_raw_tcp`); a ratio below one means that our call
    /// is the quicker of the two.
    Peers(peers::PeersArgs),
    /// Many remote calls at once: calls per second (closed loop), and latency at a given rate (open loop).
    ///
    /// Without --rate or --rates the loop is closed: each answer makes room for the next call. With them calls are due at
    /// times of their own, and each is timed from when it was due, so that a server that stalls is not let off by a
    /// generator that waits for it.
    Load(load::LoadArgs),
    /// Memory of thousands of silent connections, and whether a busy one notices them.
    IdleConnections(idle_connections::IdleConnectionsArgs),
    /// Messages between two processes: a message and its answer, each way beside raw TCP.
    ///
    /// The published figures are half of such a round trip; ours are whole.
    Ipc(ipc::IpcArgs),
    /// State: values put and got, and the paper's reduction.
    State(state::StateArgs),
    /// Kills workers and times how soon their callers know.
    Death(death::DeathArgs),
    /// Processor time and memory of a process that nobody calls.
    Idle(idle::IdleArgs),
    /// A report with plots from rows written by the other commands.
    Report(report::ReportArgs),
    /// A process with silent connections; started by praas-bench itself.
    #[command(name = idle_connections::HOLDER, hide = true)]
    Holder(idle_connections::HolderArgs),
    /// The second process of a floor; started by praas-bench itself.
    #[command(name = peer::SUBCOMMAND, hide = true)]
    FloorPeer,
    /// Ends the process under test when praas-bench no longer can; started by praas-bench itself.
    #[command(name = keeper::SUBCOMMAND, hide = true)]
    Keeper { pid: u32 },
    /// The functions of the process under test; started by praas-process.
    #[command(name = worker::SUBCOMMAND, hide = true)]
    Worker,
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    // Asked before anything is pinned, so that the answer is what the user allowed.
    if let Err(error) = placement::startup_cores() {
        eprintln!("error: {error:#}");
        return ExitCode::from(EXIT_FAILED);
    }
    let done = match command {
        Command::Floors(args) => floors::run(&args),
        Command::Invoke(args) => invoke::run(&args),
        Command::Peers(args) => peers::run(&args),
        Command::Load(args) => load::run(&args),
        Command::IdleConnections(args) => idle_connections::run(&args),
        Command::Ipc(args) => ipc::run(&args),
        Command::State(args) => state::run(&args),
        Command::Death(args) => death::run(&args),
        Command::Idle(args) => idle::run(&args),
        Command::Worker => return worker::serve(),
        Command::Report(args) => report::run(&args),
        Command::Holder(args) => idle_connections::hold(&args),
        Command::FloorPeer => peer::run(),
        Command::Keeper { pid } => keeper::run(pid),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(EXIT_FAILED)
        }
    }
}
