//! One thread of tokio-uring, a task for each connection. It takes buffers and gives them back, so they go by value.

use std::net::TcpListener;

use anyhow::{Context, Result};
use tokio_uring::buf::BoundedBuf;
use tokio_uring::net::TcpStream;

use super::stage::{LENGTH_BYTES, sizes};

pub(super) fn serve(listener: TcpListener) -> Result<()> {
    tokio_uring::start(async {
        let listener = tokio_uring::net::TcpListener::from_std(listener);
        loop {
            let (stream, _) = listener.accept().await.context("accept")?;
            // A client that goes away is how a connection ends.
            tokio_uring::spawn(async move { serve_one(stream).await });
        }
    })
}

async fn serve_one(stream: TcpStream) -> std::io::Result<()> {
    let (mut room, mut filled) = (vec![0; LENGTH_BYTES], 0);
    while filled < LENGTH_BYTES {
        (filled, room) = receive(&stream, room, filled).await?;
    }
    let length = *room.first_chunk().expect("filled");
    let (message_bytes, room_bytes) = sizes(length)?;
    (room, filled) = (vec![0; room_bytes], 0);
    loop {
        (filled, room) = receive(&stream, room, filled).await?;
        let whole_bytes = filled / message_bytes * message_bytes;
        if whole_bytes > 0 {
            let (sent, whole) = stream.write_all(room.slice(..whole_bytes)).await;
            sent?;
            room = whole.into_inner();
            room.copy_within(whole_bytes..filled, 0);
            filled -= whole_bytes;
        }
    }
}

/// How much of the room is filled then, and the room.
async fn receive(stream: &TcpStream, room: Vec<u8>, filled: usize) -> std::io::Result<(usize, Vec<u8>)> {
    let (got, room) = stream.read(room.slice(filled..)).await;
    match got? {
        0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
        got => Ok((filled + got, room.into_inner())),
    }
}
