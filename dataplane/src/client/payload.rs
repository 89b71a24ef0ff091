//! Inputs on their way out, answers on their way in, and the buffers that serve both.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};

use praas_transport::tcp::Bodies;

use crate::wire::args;

/// An input on its way out.
#[derive(Debug)]
pub struct Outgoing {
    pub(super) bytes: OutgoingBytes,
    pub(super) is_args: bool,
}

#[derive(Debug)]
pub(super) enum OutgoingBytes {
    Owned(Vec<u8>),
    /// Owned once, and kept for another time.
    Kept(Arc<Vec<u8>>),
    Shared(Arc<[u8]>),
}

impl OutgoingBytes {
    pub(super) const EMPTY: OutgoingBytes = OutgoingBytes::Owned(Vec::new());

    /// The same bytes twice, without a copy of them.
    pub(super) fn split(self) -> (OutgoingBytes, OutgoingBytes) {
        let kept = match self {
            OutgoingBytes::Owned(vec) => Arc::new(vec),
            OutgoingBytes::Kept(kept) => kept,
            OutgoingBytes::Shared(shared) => {
                return (OutgoingBytes::Shared(Arc::clone(&shared)), OutgoingBytes::Shared(shared));
            }
        };
        (OutgoingBytes::Kept(Arc::clone(&kept)), OutgoingBytes::Kept(kept))
    }
}

impl AsRef<[u8]> for OutgoingBytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            OutgoingBytes::Owned(vec) => vec,
            OutgoingBytes::Kept(kept) => kept,
            OutgoingBytes::Shared(shared) => shared,
        }
    }
}

impl Outgoing {
    /// Several arguments as one input.
    #[must_use]
    pub fn from_args(arguments: &[&[u8]]) -> Outgoing {
        let mut encoded = vec![0; args::encoded_bytes(arguments)];
        args::encode(arguments, &mut encoded);
        Outgoing { bytes: OutgoingBytes::Owned(encoded), is_args: true }
    }
}

impl From<Vec<u8>> for Outgoing {
    fn from(vec: Vec<u8>) -> Self {
        Outgoing { bytes: OutgoingBytes::Owned(vec), is_args: false }
    }
}

impl From<Arc<[u8]>> for Outgoing {
    fn from(shared: Arc<[u8]>) -> Self {
        Outgoing { bytes: OutgoingBytes::Shared(shared), is_args: false }
    }
}

/// Copies. Hand over a `Vec` or an `Arc<[u8]>` where that matters.
impl From<&[u8]> for Outgoing {
    fn from(slice: &[u8]) -> Self {
        slice.to_vec().into()
    }
}

impl<const N: usize> From<&[u8; N]> for Outgoing {
    fn from(array: &[u8; N]) -> Self {
        array.to_vec().into()
    }
}

impl From<&Vec<u8>> for Outgoing {
    fn from(vec: &Vec<u8>) -> Self {
        vec.clone().into()
    }
}

impl From<&str> for Outgoing {
    fn from(text: &str) -> Self {
        text.as_bytes().to_vec().into()
    }
}

/// Buffers waiting for the next answer, so that a client in steady state allocates nothing.
#[derive(Debug, Clone, Default)]
pub(super) struct Pool(Arc<Mutex<Vec<Vec<u8>>>>);

/// Buffers kept, and the largest worth keeping.
const POOLED_MAX: usize = 16;
const POOLED_BYTES_MAX: usize = 64 << 20;

impl Pool {
    fn put(&self, buffer: Vec<u8>) {
        let mut buffers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if buffers.len() < POOLED_MAX && (1..=POOLED_BYTES_MAX).contains(&buffer.capacity()) {
            buffers.push(buffer);
        }
    }

    /// Takes what was sent.
    pub(super) fn take_back(&self, sent: OutgoingBytes) {
        match sent {
            OutgoingBytes::Owned(buffer) => self.put(buffer),
            OutgoingBytes::Kept(kept) => {
                if let Some(buffer) = Arc::into_inner(kept) {
                    self.put(buffer);
                }
            }
            OutgoingBytes::Shared(_) => {}
        }
    }

    /// An answer in a buffer of ours.
    pub(super) fn reply(&self, status: i32, bytes: Vec<u8>) -> ClientReply {
        ClientReply { status, bytes, pool: self.clone() }
    }
}

impl Bodies for Pool {
    type Body = Vec<u8>;

    fn loan(&mut self, bytes: usize) -> Option<Vec<u8>> {
        let mut buffers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The tightest fit, so that a small answer does not sit in the buffer of a large one.
        let fits = buffers.iter().enumerate().filter(|(_, buffer)| buffer.capacity() >= bytes);
        let mut buffer = match fits.min_by_key(|(_, buffer)| buffer.capacity()).map(|(at, _)| at) {
            Some(at) => buffers.swap_remove(at),
            None => Vec::with_capacity(bytes),
        };
        drop(buffers);
        // Only bytes that were never written are zeroed.
        buffer.resize(bytes, 0);
        Some(buffer)
    }

    fn give_back(&mut self, body: Vec<u8>) {
        self.put(body);
    }

    fn truncate(&mut self, mut body: Vec<u8>, bytes: usize) -> Vec<u8> {
        body.truncate(bytes);
        body
    }
}

/// What a function answered. Reads as a byte slice.
pub struct ClientReply {
    status: i32,
    bytes: Vec<u8>,
    pool: Pool,
}

impl ClientReply {
    /// The status the function returned, zero or above.
    #[must_use]
    pub fn status(&self) -> i32 {
        self.status
    }

    /// The bytes, to keep or to send again.
    #[must_use]
    pub fn into_vec(mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }
}

impl Deref for ClientReply {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for ClientReply {
    fn drop(&mut self) {
        self.pool.put(std::mem::take(&mut self.bytes));
    }
}

impl fmt::Debug for ClientReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientReply").field("status", &self.status).field("bytes", &self.bytes.len()).finish()
    }
}
