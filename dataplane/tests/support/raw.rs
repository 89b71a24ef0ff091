//! A client that writes frames by hand, and whatever else it likes.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use praas_dataplane::wire::{VERSIONS, frame};
use praas_transport::frame::{Seal, Transit};
use praas_transport::hello::{Credential, HelloError, Initiator, InitiatorConfig, Purpose, Session};
use praas_transport::{Header, Limits};

/// A stream, the seals of what goes and of what comes, and what comes in pieces.
pub(crate) struct Raw(pub(crate) TcpStream, pub(crate) Seal, Seal, Vec<(u16, Header, Vec<u8>)>);

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
        Raw(stream, Seal::default(), Seal::default(), Vec::new())
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
        let header = self.seal(header);
        self.0.write_all(&header).expect("a header is taken");
        self.0.write_all(payload).expect("a payload is taken");
    }

    /// The bytes of a header, as the next one sent.
    pub(crate) fn seal(&mut self, header: &Header) -> [u8; 64] {
        header.seal(Transit::default(), &mut self.1)
    }

    /// The next frame that is whole, without its key.
    pub(crate) fn receive(&mut self) -> (Header, Vec<u8>) {
        let (header, _, payload) = self.receive_with_key();
        (header, payload)
    }

    /// The next frame that is whole: header, key, payload. One that came in pieces has lost its key.
    pub(crate) fn receive_with_key(&mut self) -> (Header, Vec<u8>, Vec<u8>) {
        loop {
            let mut header = [0; 64];
            self.0.read_exact(&mut header).expect("an answer");
            // Whose incarnation it is, and that payloads are in one piece, the client library looks at.
            let limits = Limits { payload_bytes_max: 1 << 30 };
            let (header, transit) = Header::open(&header, &mut self.2, &limits).expect("a frame");
            let mut key = vec![0; header.key_bytes as usize];
            self.0.read_exact(&mut key).expect("a key");
            if transit.stream != 0 && transit.stream & Transit::PIECE == 0 {
                self.3.push((transit.stream, header, Vec::new()));
                continue;
            }
            let mut payload = vec![0; usize::try_from(header.payload_bytes).expect("small")];
            self.0.read_exact(&mut payload).expect("a payload");
            if transit.stream == 0 {
                return (header, key, payload);
            }
            let number = transit.stream & !Transit::PIECE;
            let at = self.3.iter().position(|(of, ..)| *of == number).expect("it was opened");
            let (_, header, bytes) = &mut self.3[at];
            bytes.extend_from_slice(&payload);
            if bytes.len() as u64 == header.payload_bytes {
                let (_, header, bytes) = self.3.remove(at);
                return (header, Vec::new(), bytes);
            }
        }
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
