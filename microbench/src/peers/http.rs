//! What a gateway costs: `POST /echo` of axum, HTTP/1.1 with keep-alive, and a hyper client that calls it.
//!
//! The client hands its payload over without copying it and reads the answer piece by piece without gathering it, so that
//! what is measured is HTTP and not our way of using it.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::routing::post;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::HOST;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::runtime::Runtime;

use super::awake::{Pulse, runtime};
use crate::end::{Block, is_stamped, nanoseconds, stamp};

/// `linger`: how long to be kept awake after the last request; `None` is axum as it comes.
pub(super) fn serve(linger: Option<Duration>, listener: TcpListener) -> Result<()> {
    listener.set_nonblocking(true)?;
    runtime(linger.is_some())?.block_on(async {
        let pulse = Pulse::default();
        if let Some(linger) = linger {
            tokio::spawn(pulse.clone().keep_awake(linger));
        }
        let echo = |State(pulse): State<Pulse>, body: Bytes| async move {
            pulse.beat();
            body
        };
        // Payloads here are as long as ours; the default stops at 2 MB.
        let router = Router::new().route("/echo", post(echo)).layer(DefaultBodyLimit::disable()).with_state(pulse);
        let listener = tokio::net::TcpListener::from_std(listener)?;
        axum::serve(listener, router).await.context("axum")
    })
}

/// One connection, one request at a time.
pub(super) struct HttpCaller {
    runtime: Runtime,
    sender: SendRequest<Full<Bytes>>,
    pulse: Pulse,
    host: String,
    message: Arc<[u8]>,
}

impl HttpCaller {
    /// `linger` as for the server: a client that is kept awake spins for its answers.
    pub(super) fn connect(stream: TcpStream, linger: Option<Duration>) -> Result<Self> {
        stream.set_nonblocking(true)?;
        let host = stream.peer_addr()?.to_string();
        let (runtime, pulse) = (runtime(linger.is_some())?, Pulse::default());
        let sender = runtime.block_on(async {
            if let Some(linger) = linger {
                tokio::spawn(pulse.clone().keep_awake(linger));
            }
            let stream = TokioIo::new(tokio::net::TcpStream::from_std(stream)?);
            let (sender, connection) = handshake(stream).await.context("HTTP over a fresh connection")?;
            tokio::spawn(connection);
            anyhow::Ok(sender)
        })?;
        Ok(Self { runtime, sender, pulse, host, message: Arc::new([]) })
    }

    /// As [`crate::end::ping`], one POST and its answer each.
    pub(super) fn ping(&mut self, block: Block, sequence: &mut u64, samples_ns: &mut Vec<u64>) -> Result<()> {
        let Self { runtime, sender, pulse, host, message } = self;
        if message.len() != block.bytes {
            *message = vec![0xA5; block.bytes].into();
        }
        runtime.block_on(async {
            let mut before = Instant::now();
            for sample in 0..block.samples {
                *sequence += 1;
                // Ours alone again once it was sent.
                stamp(Arc::make_mut(message), *sequence);
                pulse.beat();
                let body = Full::new(Bytes::from_owner(Arc::clone(message)));
                let request = Request::post("/echo").header(HOST, &*host).body(body)?;
                sender.ready().await.context("keep-alive")?;
                let answer = sender.send_request(request).await.context("POST /echo")?;
                ensure!(answer.status() == StatusCode::OK, "POST /echo: {}", answer.status());
                let whole = (sample == 0).then_some(&**message);
                check(answer.into_body(), block.bytes, *sequence, whole).await?;
                let after = Instant::now();
                samples_ns.push(nanoseconds(before, after));
                before = after;
            }
            Ok(())
        })
    }
}

/// Reads an answer to its end: length, sequence number and last byte; all of it where `whole` is given.
async fn check(mut body: Incoming, bytes: usize, sequence: u64, whole: Option<&[u8]>) -> Result<()> {
    // Front and back of the answer, as a message so short that a stamp is all there is.
    let mut ends = [0; 9];
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        let Ok(piece) = frame.context("the answer breaks off")?.into_data() else { continue };
        if length < 8 {
            let front = (8 - length).min(piece.len());
            ends[length..length + front].copy_from_slice(&piece[..front]);
        }
        if let Some(whole) = whole {
            ensure!(whole.get(length..length + piece.len()) == Some(&piece[..]), "wrong answer: the payload changed");
        }
        ends[8] = piece.last().copied().unwrap_or(ends[8]);
        length += piece.len();
    }
    let stamped = if bytes > 8 { is_stamped(&ends, sequence) } else { is_stamped(&ends[..8], sequence) };
    ensure!(
        length == bytes && stamped,
        "wrong answer: request {sequence} of {bytes} B came back as {length} B or changed"
    );
    Ok(())
}
