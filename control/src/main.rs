//! The `praas` command.
#![forbid(unsafe_code)]

use clap::{Parser, Subcommand};
use praas_control::doctor::{judge, probe, report};
use praas_control::keys::{self, Lifetime};
use praas_control::members;
use praas_dataplane::Role;
use std::fmt::Display;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::PathBuf;
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
    /// Make the key of an application.
    ///
    /// One key for each application: whoever holds it can be any process and any client of it. Processes get it with
    /// `praas-process --key-file FILE`; clients get a credential made from it (`praas token`), never the key.
    #[command(subcommand, arg_required_else_help = true)]
    Key(KeyCommand),
    /// Make a credential: what a client shows to be let in, instead of the key.
    ///
    /// It says who its holder is and until when it is good, and holds a key of its own that follows from the
    /// application's. It works with every process that has the application's key, at once; there is no way to take it back before it
    /// expires but a new application key. Keep the file as you keep a password: mode 0600 is what it is made with, and the only one
    /// that is read.
    #[command(after_long_help = "\
Examples:
  praas key new app.key
  praas token --key-file app.key --role client --subject alice --expires 30d --out alice.token
  praas-process --worker ./my-worker --listen 0.0.0.0:4000 --key-file app.key

and in a client: ClientConfig { credential: Some(Credential::from_file(path)?), ..ClientConfig::default() }

Exit codes: 0 the credential is written; 1 it is not, and the line says why; 2 the command line is wrong.")]
    Token {
        /// The application key
        #[arg(long, value_name = "FILE")]
        key_file: PathBuf,
        /// What its holder may do: client and control call functions; process connects to other processes as well
        #[arg(long, value_name = "client|process|control")]
        role: Role,
        /// Who its holder is, 1 to 64 bytes of A-Z a-z 0-9 . _ -
        #[arg(long, value_name = "NAME")]
        subject: String,
        /// How long it is good: a number and s, m, h or d
        #[arg(long, value_name = "TIME")]
        expires: Lifetime,
        /// The file to write, which must not exist
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Tell processes who there is: send them a table of members, which replaces the one they had.
    ///
    /// The table is complete: who is not in it is not a member. It is the same for all, and has a generation, higher than the one before. A process
    /// that refuses it goes by the one that it had.
    #[command(after_long_help = "\
A table:
  praas-members 1
  generation 7
  a active 10.0.0.1:4000
  b active 10.0.0.2:4000 incarnation=1764603955000000000
  c swapped
  d stopped
  e deleted

Examples:
  praas token --key-file app.key --role control --subject me --expires 1h --out control.token
  praas members --credential control.token members.txt 10.0.0.1:4000 10.0.0.2:4000

Exit codes: 0 it is in force at each of them; 1 it is not everywhere, with a line for each where it is not; 2 the command line is wrong.")]
    Members {
        /// A credential of role control
        #[arg(long, value_name = "FILE")]
        credential: PathBuf,
        /// The table
        #[arg(value_name = "TABLE")]
        table: PathBuf,
        /// The processes to tell
        #[arg(value_name = "HOST:PORT", required = true)]
        addresses: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Write a new random key to FILE, with mode 0600. A file that exists stays as it is.
    ///
    /// Exit codes: 0 the key is written; 1 it is not, and the line says why; 2 the command line is wrong.
    New {
        /// The file to write, which must not exist
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
}

const CANNOT_RUN: u8 = 1;
const CANNOT_WRITE: u8 = 3;

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Doctor { json } => doctor(json),
        Command::Key(KeyCommand::New { file }) => told(keys::new_key(&file)),
        Command::Token { key_file, role, subject, expires, out } => {
            told(keys::new_token(&key_file, role, &subject, expires, &out))
        }
        Command::Members { credential, table, addresses } => match members::read(&table, &credential) {
            Err(error) => told(Err(error)),
            Ok((table, credential)) => {
                // One that is not there keeps none of the others from hearing.
                let all = addresses.iter().map(|address| told(members::tell(address, &table, &credential)));
                all.fold(ExitCode::SUCCESS, |worst, one| if one == ExitCode::SUCCESS { worst } else { one })
            }
        },
    }
}

fn told(done: Result<(), impl Display>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("praas: {error}");
            ExitCode::FAILURE
        }
    }
}

fn doctor(json: bool) -> ExitCode {
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
