//! The plainest server there is: a thread for each connection, `read` until a message is whole, `write` it back.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use rustix::event::PollFlags;

use super::linger;
use super::stage::Stage;
use crate::end::until_ready_within;
use crate::placement::Wait;

pub(super) fn serve(wait: Wait, listener: &TcpListener) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().context("accept")?;
        stream.set_nonblocking(wait != Wait::Efficient)?;
        std::thread::spawn(move || {
            // A client that goes away is how a connection ends; the client notices anything else by itself.
            let _ = serve_one(wait, &stream);
        });
    }
}

fn serve_one(wait: Wait, mut stream: &TcpStream) -> std::io::Result<()> {
    let mut stage = Stage::new();
    let budget = Some(linger(wait));
    loop {
        let room = stage.room();
        let got = until_ready_within(budget, stream.as_fd(), PollFlags::IN, || stream.read(room))?;
        if got == 0 {
            return Ok(());
        }
        stage.received(got)?;
        let whole_bytes = stage.whole_bytes();
        let mut rest = stage.whole();
        while !rest.is_empty() {
            let sent = until_ready_within(budget, stream.as_fd(), PollFlags::OUT, || stream.write(rest))?;
            rest = &rest[sent..];
        }
        stage.returned(whole_bytes);
    }
}
