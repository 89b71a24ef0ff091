//! The `praas` command.
#![forbid(unsafe_code)]

use clap::{Parser, Subcommand};
use praas_control::doctor::{judge, probe, report};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::process::ExitCode;

/// Cloud processes on this machine.
#[derive(Debug, Parser)]
#[command(version, about, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say what this machine allows, what will be used because of it, and what to change.
    ///
    /// Changes nothing and needs no privilege. io_uring and sealed memory are really tried.
    ///
    /// Exit codes: 0 the data plane can run here; 1 it cannot; 2 the command line is wrong; 3 the report could not
    /// be written.
    Doctor {
        /// Print one JSON object instead of a table: findings, and the facts behind them.
        #[arg(long)]
        json: bool,
    },
}

const CANNOT_RUN: u8 = 1;
const CANNOT_WRITE: u8 = 3;

fn main() -> ExitCode {
    let Command::Doctor { json } = Arguments::parse().command;
    let facts = probe();
    let found = judge(&facts);
    let mut out = BufWriter::new(io::stdout().lock());
    let printed =
        if json { report::print_json(&found, &facts, &mut out) } else { report::print_table(&found, &mut out) };
    match printed.and_then(|()| out.flush()) {
        // A reader that has seen enough (`praas doctor | head`) is not a failure.
        Err(cause) if cause.kind() != ErrorKind::BrokenPipe => {
            eprintln!("praas: cannot write the report: {cause}");
            ExitCode::from(CANNOT_WRITE)
        }
        _ if found.can_run() => ExitCode::SUCCESS,
        _ => ExitCode::from(CANNOT_RUN),
    }
}
