//! The `praas` command.
#![forbid(unsafe_code)]

use clap::{Parser, Subcommand};
use praas_control::doctor::{judge, probe, report};
use praas_control::keys::{self, Lifetime};
use praas_dataplane::{Role, SecretError};
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
    }
}

fn told(done: Result<(), SecretError>) -> ExitCode {
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
