//! A client that writes frames by hand, and whatever else it likes.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use praas_dataplane::wire::{VERSIONS, frame};
use praas_transport::hello::{Credential, HelloError, Initiator, InitiatorConfig, Purpose, Session};
use praas_transport::{Header, Limits};

pub(crate) struct Raw(pub(crate) TcpStream);

/// What a client says hello with.
pub(crate) fn initiator_config() -> InitiatorConfig {
    InitiatorConfig {
        versions: VERSIONS,
        purpose: Purpose::Invoke,
        session_id: [1; 16],
        incarnation: 0,
        payload_checksums: false,
        expect_process: None,
    }
}

pub(crate) fn initiator(credential: Option<&Credential>) -> Initiator {
    Initiator::new(initiator_config(), credential).expect("there are random numbers")
}

impl Raw {
    pub(crate) fn connect(address: SocketAddr) -> Raw {
        let stream = TcpStream::connect(address).expect("it listens");
        stream.set_nodelay(true).expect("a socket");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a socket");
        Raw(stream)
    }

    /// Connects, says hello and is welcomed.
    pub(crate) fn greet(address: SocketAddr) -> Raw {
        let mut raw = Raw::connect(address);
        raw.say_hello(initiator(None)).expect("it takes plain text");
        let (header, _) = raw.receive();
        assert_eq!(header.kind, frame::WELCOME);
        raw
    }

    pub(crate) fn say_hello(&mut self, mut initiator: Initiator) -> Result<Session, HelloError> {
        let session = initiator.advance(&mut self.0, 0)?;
        Ok(session.expect("reads block, until they time out"))
    }

    pub(crate) fn send(&mut self, header: &Header, payload: &[u8]) {
        self.0.write_all(&header.encode()).expect("a header is taken");
        self.0.write_all(payload).expect("a payload is taken");
    }

    pub(crate) fn receive(&mut self) -> (Header, Vec<u8>) {
        let mut header = [0; 64];
        self.0.read_exact(&mut header).expect("an answer");
        let header = Header::decode(&header, &Limits { payload_bytes_max: 1 << 30 }).expect("a frame");
        let mut payload = vec![0; usize::try_from(header.payload_bytes).expect("small")];
        self.0.read_exact(&mut payload).expect("a payload");
        (header, payload)
    }

    /// Whether the other side has closed, once everything it sent is read.
    pub(crate) fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.0.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}
