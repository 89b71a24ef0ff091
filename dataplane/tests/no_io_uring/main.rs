//! Runs a program where io_uring is refused (X7): `praas-no-io-uring EPERM|ENOSYS PROGRAM [ARG ...]`. Whatever it starts is
//! refused, too, so a whole test suite can run there:
//!
//!     target/debug/examples/praas-no-io-uring EPERM cargo nextest run -p praas-dataplane

#[path = "../support/refusal.rs"]
mod refusal;

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let errno = match arguments.first().map(String::as_str) {
        Some("EPERM") => libc::EPERM,
        Some("ENOSYS") => libc::ENOSYS,
        _ => 0,
    };
    let (Some(program), true) = (arguments.get(1), errno != 0) else {
        eprintln!("usage: praas-no-io-uring EPERM|ENOSYS PROGRAM [ARG ...]");
        return ExitCode::from(2);
    };
    refusal::refuse_io_uring(errno);
    eprintln!("praas-no-io-uring: cannot start {program}: {}", Command::new(program).args(&arguments[2..]).exec());
    ExitCode::from(1)
}
