//! One thread of tokio, a task for each connection.

use std::net::TcpListener;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::awake::{Pulse, runtime};
use super::stage::Stage;

/// `linger`: how long to be kept awake after the last message; `None` is tokio as it comes.
pub(super) fn serve(linger: Option<Duration>, listener: TcpListener) -> Result<()> {
    listener.set_nonblocking(true)?;
    runtime(linger.is_some())?.block_on(async {
        let pulse = Pulse::default();
        if let Some(linger) = linger {
            tokio::spawn(pulse.clone().keep_awake(linger));
        }
        let listener = tokio::net::TcpListener::from_std(listener)?;
        loop {
            let (stream, _) = listener.accept().await.context("accept")?;
            let pulse = pulse.clone();
            // A client that goes away is how a connection ends.
            tokio::spawn(async move { serve_one(stream, &pulse).await });
        }
    })
}

async fn serve_one(mut stream: TcpStream, pulse: &Pulse) -> std::io::Result<()> {
    let mut stage = Stage::new();
    loop {
        let got = stream.read(stage.room()).await?;
        if got == 0 {
            return Ok(());
        }
        pulse.beat();
        stage.received(got)?;
        let whole_bytes = stage.whole_bytes();
        stream.write_all(stage.whole()).await?;
        stage.returned(whole_bytes);
    }
}
