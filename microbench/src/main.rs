#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod channel;
mod copy;
mod end;
mod floors;
mod line;
mod machine;
mod owed;
mod page;
mod peer;
mod placement;
mod plan;
mod plot;
mod published;
mod queue;
mod raw;
mod recorder;
mod report;
mod row;
mod size;
mod stream;
mod table;
mod turn;

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
  praas-bench floors                       what this machine charges for a round trip
  praas-bench floors --sizes 64,1MiB --wait efficient --json floors.jsonl

Exit codes:
  0  done
  1  a run failed: a wrong answer, a process that died, a limit in the way
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
    /// A report with plots from rows written by the other commands.
    Report(report::ReportArgs),
    /// The second process of a floor; started by praas-bench itself.
    #[command(name = peer::SUBCOMMAND, hide = true)]
    FloorPeer,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Floors(args) => floors::run(&args),
        Command::Report(args) => report::run(&args),
        Command::FloorPeer => peer::run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(EXIT_FAILED)
        }
    }
}
