//! The hello: how two ends of a new connection agree on a version and prove who they are, before the first frame.
//!
//! ```text
//! initiator                                                       responder
//!     HELLO      who I say I am, what for, versions, my nonce        ──>
//!     <──        CHALLENGE  who I am, the version, my nonce, proof that I know the key of who you say you are
//!     PROOF      that I know it, too                                 ──>
//! ```
//!
//! After it both hold a [`Session`]. Instead of its next message the responder may send one that refuses and says nothing more,
//! or, when there is no version that both speak, says which it does.
//!
//! Nothing here has a socket or a clock, allocates before the other end has proved itself, or reads a byte beyond a message: what
//! follows on the connection is a frame's. Each proof is a BLAKE3 keyed hash over every byte said so far, both nonces
//! among them, so that nothing can be changed, replayed, sent back to its sender or used with another process. Keyed hashing for
//! authentication and derivation of keys: the BLAKE3 paper, §2.3 and §6.1.

#![forbid(unsafe_code)]

mod message;
mod secret;

use std::fmt;
use std::io::{self, Read, Write};
use std::sync::Arc;

use subtle::{Choice, ConstantTimeEq};
use zerocopy::{FromBytes, IntoBytes};
use zeroize::Zeroize;

pub use message::HELLO_VERSION;
use message::{
    CHALLENGE_BYTES, CHALLENGE_SAID_BYTES, ChallengeMessage, HELLO_BYTES, Head, HelloMessage, MAGIC, Name,
    PAYLOAD_CHECKSUMS, PROOF_BYTES, ProofMessage, REFUSED_BYTES, RefusedMessage, kind, suite,
};
pub use secret::{Credential, NAME_BYTES_MAX, Purpose, Role, Secret, SecretError, is_name};

/// The versions of the frame protocol that one end speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    /// The oldest.
    pub min: u32,
    /// The newest, `min` or above.
    pub max: u32,
}

impl Versions {
    /// The highest that both speak.
    #[must_use]
    pub fn common(self, other: Versions) -> Option<u32> {
        let (min, max) = (self.min.max(other.min), self.max.min(other.max));
        (min <= max).then_some(max)
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.min == self.max {
            true => write!(f, "{}", self.max),
            false => write!(f, "{} to {}", self.min, self.max),
        }
    }
}

/// What both ends of a connection hold after the hello.
#[derive(Clone)]
pub struct Session {
    /// Version of the frame protocol, the highest that both speak.
    pub version: u32,
    /// The other end, proved by its credential or its key; merely said where there are no keys.
    pub peer: Peer,
    /// What the connection is for.
    pub purpose: Purpose,
    /// Key of what we send; `None` on a connection in plain text.
    pub send_key: Option<[u8; 32]>,
    /// Key of what we receive.
    pub receive_key: Option<[u8; 32]>,
    /// Whether payloads carry a checksum and headers, where there is a key, a keyed tag.
    pub payload_checksums: bool,
}

/// The other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Of its credential. A responder is a process.
    pub role: Role,
    /// The name in its credential, or the responder's process name. Empty on a connection in plain text to the responder.
    pub subject: String,
    /// Chosen by the initiator at random, the same for each connection of one client.
    pub session_id: [u8; 16],
    /// Which life of it this is.
    pub incarnation: u64,
}

impl Peer {
    /// Names the initiator's session among those of all peers: somebody else's with the same `session_id`, which travels in the
    /// clear, is another.
    #[must_use]
    pub fn session(&self) -> [u8; 16] {
        let mut hash = blake3::Hasher::new_derive_key("praas session of a peer 1");
        hash.update(self.role.to_string().as_bytes()).update(&[0]).update(self.subject.as_bytes()).update(&[0]);
        let hash = hash.update(&self.session_id).finalize();
        *hash.as_bytes().first_chunk().expect("a hash has 32 bytes")
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Session { version, peer, purpose, send_key, receive_key: _, payload_checksums } = self;
        f.debug_struct("Session")
            .field("version", version)
            .field("peer", peer)
            .field("purpose", purpose)
            .field("keyed", &send_key.is_some())
            .field("payload_checksums", payload_checksums)
            .finish()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.send_key.zeroize();
        self.receive_key.zeroize();
    }
}

/// Why there is no session. The connection is of no more use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HelloError {
    /// The other end closed the connection.
    #[error("the other end closed the connection {} the hello", if *begun { "in the middle of" } else { "before it answered" })]
    Closed {
        /// It had said something.
        begun: bool,
    },
    /// What came is no message of a hello.
    #[error("what answers does not speak our hello")]
    Stranger,
    /// There is no version that both speak.
    #[error("the other end speaks protocol {theirs} (hello {theirs_hello}), we {ours} (hello {HELLO_VERSION})")]
    Version {
        /// Theirs.
        theirs: Versions,
        /// Version of their hello.
        theirs_hello: u8,
        /// Ours.
        ours: Versions,
    },
    /// The responder refuses, and does not say why: key, expiry, role, purpose and form are one to it.
    #[error("refused")]
    Refused,
    /// The responder does not know the key of our credential: another key, or somebody else's process.
    #[error("the responder does not prove that it knows the key of our credential")]
    Unproven,
    /// The responder is another process than the one asked for.
    #[error("the responder is process `{found}`, expected was `{expected}`")]
    OtherProcess {
        /// Whom we asked for.
        expected: String,
        /// Who it is.
        found: String,
    },
    /// The system gives no random numbers.
    #[error("no random numbers: {0}")]
    NoRandom(getrandom::Error),
    /// The socket broke.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
}

/// What an initiator wants.
#[derive(Debug, Clone)]
pub struct InitiatorConfig {
    /// Versions it speaks.
    pub versions: Versions,
    /// What the connection is for.
    pub purpose: Purpose,
    /// Its id, random, the same on each of its connections.
    pub session_id: [u8; 16],
    /// Which life of it this is; 0 where that means nothing.
    pub incarnation: u64,
    /// Whether it asks for checksums on payloads, and keyed tags of headers. Then it takes no session without.
    pub payload_checksums: bool,
    /// The process that it must be. A process that merely knows the key is not enough then.
    pub expect_process: Option<String>,
}

/// What a responder is. One for all its connections.
#[derive(Debug)]
pub struct ResponderConfig {
    /// The application key, from which the key of every credential follows.
    pub key: Option<Secret>,
    /// Whether connections over loopback may do without a key.
    pub plaintext: bool,
    /// Its name, as [`is_name`] has it.
    pub process: String,
    /// Which life of it this is.
    pub incarnation: u64,
    /// Versions it speaks.
    pub versions: Versions,
    /// Whether frames have checks on loopback, too: keyed tags and payload checksums. Elsewhere they always do.
    pub checks_on_loopback: bool,
}

/// One end of a hello. Give it what is received and send what it has to say ([`Hello::advance`] does both for a stream)
/// until there is a [`Session`]. Holds under 1 KiB.
#[derive(Debug)]
pub struct Hello<S> {
    /// The message being received, and how many bytes of it there are and shall be.
    input: [u8; CHALLENGE_BYTES],
    filled: usize,
    wanted: usize,
    /// The message being sent.
    output: [u8; CHALLENGE_BYTES],
    queued: usize,
    sent: usize,
    session: Option<Session>,
    side: S,
}

/// The end that connected.
pub type Initiator = Hello<Initiating>;
/// The end that was connected to.
pub type Responder = Hello<Responding>;

/// What only the initiator knows.
#[derive(Debug)]
pub struct Initiating {
    config: InitiatorConfig,
    suite: u8,
    possession: Secret,
    hello: [u8; HELLO_BYTES],
}

/// What only the responder knows.
#[derive(Debug)]
pub struct Responding {
    config: Arc<ResponderConfig>,
    on_loopback: bool,
    nonce: [u8; 32],
    claim: Option<Claim>,
}

/// What a hello claims, until it is proved.
#[derive(Debug)]
struct Claim {
    hello: [u8; HELLO_BYTES],
    possession: Secret,
    role: Role,
    purpose: Purpose,
    version: u32,
}

const _: () = assert!(size_of::<Responder>() + size_of::<Session>() < 1024);
const _: () = assert!(HELLO_BYTES <= CHALLENGE_BYTES && PROOF_BYTES <= CHALLENGE_BYTES);

/// How one side goes on with a whole message.
#[doc(hidden)]
pub trait Side: Sized {
    #[doc(hidden)]
    fn judge(hello: &mut Hello<Self>, now_unix_s: u64) -> Result<(), HelloError>;
}

impl<S: Side> Hello<S> {
    fn start(side: S, wanted: usize) -> Hello<S> {
        let (input, output) = ([0; CHALLENGE_BYTES], [0; CHALLENGE_BYTES]);
        Hello { input, filled: 0, wanted, output, queued: 0, sent: 0, session: None, side }
    }

    /// Bytes to be sent. After an error, too: the other end is told.
    #[must_use]
    pub fn output(&self) -> &[u8] {
        &self.output[self.sent..self.queued]
    }

    /// So many bytes of [`Hello::output`] are with the kernel.
    ///
    /// # Panics
    /// When there were not so many.
    pub fn sent(&mut self, bytes: usize) {
        assert!(bytes <= self.queued - self.sent, "{bytes} bytes sent of {}", self.queued - self.sent);
        self.sent += bytes;
    }

    /// Where the next bytes are to be received, and no more than these: what follows is a frame's. Empty when none are due.
    #[must_use]
    pub fn space(&mut self) -> &mut [u8] {
        &mut self.input[self.filled..self.wanted]
    }

    /// So many bytes of [`Hello::space`] were filled.
    ///
    /// # Errors
    /// [`HelloError`]: send what [`Hello::output`] has and close the connection.
    ///
    /// # Panics
    /// When there was no space for so many.
    pub fn received(&mut self, bytes: usize, now_unix_s: u64) -> Result<(), HelloError> {
        assert!(bytes <= self.wanted - self.filled, "{bytes} bytes received into {}", self.wanted - self.filled);
        self.filled += bytes;
        let said = self.filled.min(MAGIC.len());
        // At the first wrong byte: a stranger may say less than a hello and then wait for us.
        if self.input[..said] != MAGIC[..said] {
            self.wanted = self.filled;
            return Err(HelloError::Stranger);
        }
        if self.filled < self.wanted {
            return Ok(());
        }
        let judged = S::judge(self, now_unix_s);
        if judged.is_err() {
            self.wanted = self.filled;
        }
        judged
    }

    /// The session, once, when all is received and sent.
    #[must_use]
    pub fn session(&mut self) -> Option<Session> {
        if self.sent < self.queued { None } else { self.session.take() }
    }

    /// Writes and reads as far as the stream goes. `None`: it takes or has no more for now.
    ///
    /// # Errors
    /// [`HelloError`]: close the connection. The other end was told if the stream took it.
    pub fn advance(
        &mut self,
        stream: &mut (impl Read + Write),
        now_unix_s: u64,
    ) -> Result<Option<Session>, HelloError> {
        loop {
            while !self.output().is_empty() {
                match stream.write(self.output()) {
                    Ok(0) => return Err(HelloError::Closed { begun: self.filled > 0 }),
                    Ok(bytes) => self.sent(bytes),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error.into()),
                }
            }
            if let Some(session) = self.session() {
                return Ok(Some(session));
            }
            match stream.read(self.space()) {
                Ok(0) => return Err(HelloError::Closed { begun: self.filled > 0 }),
                Ok(bytes) => {
                    if let Err(error) = self.received(bytes, now_unix_s) {
                        // A refusal fits any socket's buffer. If it does not go out, the close says it.
                        let _ = stream.write(self.output());
                        return Err(error);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn say(&mut self, message: &(impl IntoBytes + zerocopy::Immutable)) {
        let bytes = message.as_bytes();
        self.output[..bytes.len()].copy_from_slice(bytes);
        (self.queued, self.sent) = (bytes.len(), 0);
    }

    /// Waits for a message of so many bytes, of which the first `kept` are there.
    fn expect(&mut self, bytes: usize, kept: usize) {
        (self.filled, self.wanted) = (kept, bytes);
    }

    fn message<M: FromBytes + zerocopy::KnownLayout + zerocopy::Immutable + Copy>(&self) -> M {
        M::read_from_bytes(&self.input[..size_of::<M>()]).expect("a buffer holds the longest message")
    }
}

impl Initiator {
    /// Begins a hello, with what the credential proves or in plain text.
    ///
    /// # Errors
    /// `NoRandom`.
    pub fn new(config: InitiatorConfig, credential: Option<&Credential>) -> Result<Initiator, HelloError> {
        Ok(Initiator::with_nonce(config, credential, nonce()?))
    }

    pub(crate) fn with_nonce(config: InitiatorConfig, credential: Option<&Credential>, nonce: [u8; 32]) -> Initiator {
        let (suite, possession) = match credential {
            Some(credential) => (suite::BLAKE3, credential.possession().clone()),
            None => (suite::PLAIN, Secret::new([0; 32])),
        };
        let message = HelloMessage {
            head: Head::new(kind::HELLO, suite),
            version_min: config.versions.min.into(),
            version_max: config.versions.max.into(),
            features: if config.payload_checksums { PAYLOAD_CHECKSUMS } else { 0 }.into(),
            role: credential.map_or(Role::Client, Credential::role) as u8,
            purpose: config.purpose as u8,
            _reserved: [0; 2],
            nonce,
            session_id: config.session_id,
            incarnation: config.incarnation.into(),
            expires_unix_s: credential.map_or(0, Credential::expires_unix_s).into(),
            subject: credential.map_or(Name::NONE, |credential| Name::new(credential.subject())),
        };
        let mut hello = [0; HELLO_BYTES];
        hello.copy_from_slice(message.as_bytes());
        // A refusal is the shortest answer there is.
        let mut initiator = Hello::start(Initiating { config, suite, possession, hello }, REFUSED_BYTES);
        initiator.say(&message);
        initiator
    }
}

impl Side for Initiating {
    fn judge(hello: &mut Initiator, _: u64) -> Result<(), HelloError> {
        let refused: RefusedMessage = hello.message();
        let side = &hello.side;
        if hello.wanted == REFUSED_BYTES {
            let theirs = Versions { min: refused.version_min.get(), max: refused.version_max.get() };
            let head = refused.head;
            let mut of_their_hello = Head::new(kind::REFUSED_VERSION, 0);
            of_their_hello.hello_version = head.hello_version;
            if head == of_their_hello {
                return Err(HelloError::Version {
                    theirs,
                    theirs_hello: head.hello_version,
                    ours: side.config.versions,
                });
            }
            if refused.as_bytes() == refusal(kind::REFUSED, Versions { min: 0, max: 0 }).as_bytes() {
                return Err(HelloError::Refused);
            }
            if head != Head::new(kind::CHALLENGE, side.suite) {
                return Err(HelloError::Stranger);
            }
            hello.expect(CHALLENGE_BYTES, REFUSED_BYTES);
            return Ok(());
        }
        let challenge: ChallengeMessage = hello.message();
        let said = &hello.input[..CHALLENGE_SAID_BYTES];
        let proof = tag(&side.possession, label::RESPONDER, &[&side.hello, said]);
        if !bool::from(proof.ct_eq(&challenge.proof)) {
            return Err(HelloError::Unproven);
        }
        // From here on it is the word of somebody who knows the key; a process that errs is not ours to serve either.
        let (features, version) = (challenge.features.get(), challenge.version.get());
        let Some(found) = challenge.process.get() else { return Err(HelloError::Stranger) };
        let Versions { min, max } = side.config.versions;
        let asked = if side.config.payload_checksums { PAYLOAD_CHECKSUMS } else { 0 };
        if !(min..=max).contains(&version) || features & !PAYLOAD_CHECKSUMS != 0 || features & asked != asked {
            return Err(HelloError::Stranger);
        }
        if let Some(expected) = side.config.expect_process.as_ref().filter(|expected| *expected != found) {
            return Err(HelloError::OtherProcess { expected: expected.clone(), found: found.to_owned() });
        }
        let keys = Keys::new(side.suite, &side.possession, &side.hello, challenge.as_bytes());
        let session = Session {
            version,
            peer: Peer {
                role: Role::Process,
                subject: found.to_owned(),
                session_id: side.config.session_id,
                incarnation: challenge.incarnation.get(),
            },
            purpose: side.config.purpose,
            send_key: keys.initiators,
            receive_key: keys.responders,
            payload_checksums: features & PAYLOAD_CHECKSUMS != 0,
        };
        let proof = tag(&side.possession, label::INITIATOR, &[&side.hello, challenge.as_bytes()]);
        let head = Head::new(kind::PROOF, side.suite);
        hello.session = Some(session);
        hello.say(&ProofMessage { head, proof });
        Ok(())
    }
}

impl Responder {
    /// Waits for a hello. `on_loopback`: both addresses of the connection are loopback, so it may be in plain text if that was
    /// asked for, and payloads need no checksum of ours.
    ///
    /// # Errors
    /// `NoRandom`.
    pub fn new(config: Arc<ResponderConfig>, on_loopback: bool) -> Result<Responder, HelloError> {
        Ok(Responder::with_nonce(config, on_loopback, nonce()?))
    }

    pub(crate) fn with_nonce(config: Arc<ResponderConfig>, on_loopback: bool, nonce: [u8; 32]) -> Responder {
        assert!(is_name(config.process.as_bytes()), "a process has a name");
        Hello::start(Responding { config, on_loopback, nonce, claim: None }, HELLO_BYTES)
    }

    /// The one answer to everything that is wrong.
    fn refuse(&mut self) -> HelloError {
        self.say(&refusal(kind::REFUSED, Versions { min: 0, max: 0 }));
        HelloError::Refused
    }

    fn on_hello(&mut self) -> Result<(), HelloError> {
        let message: HelloMessage = self.message();
        let config = Arc::clone(&self.side.config);
        let theirs = Versions { min: message.version_min.get(), max: message.version_max.get() };
        let theirs_hello = message.head.hello_version;
        // Of another hello we know no more than its head.
        let version = (theirs_hello == HELLO_VERSION).then(|| theirs.common(config.versions)).flatten();
        let Some(version) = version else {
            self.say(&refusal(kind::REFUSED_VERSION, config.versions));
            return Err(HelloError::Version { theirs, theirs_hello, ours: config.versions });
        };
        let expires_unix_s = message.expires_unix_s.get();
        let (role, purpose) = (Role::from_wire(message.role), Purpose::from_wire(message.purpose));
        let (Some(role), Some(purpose), [0, 0]) = (role, purpose, message._reserved) else { return Err(self.refuse()) };
        let head = message.head;
        let possession = match (head.suite, &config.key) {
            _ if head != Head::new(kind::HELLO, head.suite) || theirs.min > theirs.max => None,
            (suite::PLAIN, _) => {
                let allowed = config.plaintext && self.side.on_loopback;
                let claims_nothing = role == Role::Client && expires_unix_s == 0 && message.subject.is_none();
                (allowed && claims_nothing).then_some(Secret::new([0; 32]))
            }
            (suite::BLAKE3, Some(key)) => {
                let subject = message.subject.get();
                subject.map(|subject| secret::possession_key(key, role, subject.as_bytes(), expires_unix_s))
            }
            _ => None,
        };
        let Some(possession) = possession else { return Err(self.refuse()) };
        let wanted = if self.side.on_loopback && !config.checks_on_loopback { 0 } else { PAYLOAD_CHECKSUMS };
        let mut challenge = ChallengeMessage {
            head: Head::new(kind::CHALLENGE, head.suite),
            version: version.into(),
            features: (wanted | message.features.get() & PAYLOAD_CHECKSUMS).into(),
            nonce: self.side.nonce,
            incarnation: config.incarnation.into(),
            process: Name::new(&config.process),
            proof: [0; 32],
        };
        let said = &challenge.as_bytes()[..CHALLENGE_SAID_BYTES];
        challenge.proof = tag(&possession, label::RESPONDER, &[message.as_bytes(), said]);
        let mut hello = [0; HELLO_BYTES];
        hello.copy_from_slice(message.as_bytes());
        // Whether the credential is good for anything is decided with the proof, not here: whoever does not know its key
        // learns nothing about it.
        self.side.claim = Some(Claim { hello, possession, role, purpose, version });
        self.say(&challenge);
        self.expect(PROOF_BYTES, 0);
        Ok(())
    }

    fn on_proof(&mut self, claim: &Claim, now_unix_s: u64) -> Result<(), HelloError> {
        let message: ProofMessage = self.message();
        let hello = HelloMessage::read_from_bytes(&claim.hello).expect("a hello was kept");
        // Sent long ago, and nothing since.
        let challenge = ChallengeMessage::read_from_bytes(&self.output).expect("a challenge was the last we said");
        let keyed = hello.head.suite != suite::PLAIN;
        let proof = tag(&claim.possession, label::INITIATOR, &[&claim.hello, challenge.as_bytes()]);
        let expired = keyed && now_unix_s >= hello.expires_unix_s.get();
        let good = proof.ct_eq(&message.proof)
            & Choice::from(u8::from(!expired))
            & Choice::from(u8::from(claim.role.may(claim.purpose)))
            & Choice::from(u8::from(message.head == Head::new(kind::PROOF, hello.head.suite)));
        if !bool::from(good) {
            return Err(self.refuse());
        }
        let keys = Keys::new(hello.head.suite, &claim.possession, &claim.hello, challenge.as_bytes());
        self.session = Some(Session {
            version: claim.version,
            peer: Peer {
                role: claim.role,
                subject: hello.subject.get().unwrap_or_default().to_owned(),
                session_id: hello.session_id,
                incarnation: hello.incarnation.get(),
            },
            purpose: claim.purpose,
            send_key: keys.responders,
            receive_key: keys.initiators,
            payload_checksums: challenge.features.get() & PAYLOAD_CHECKSUMS != 0,
        });
        Ok(())
    }
}

impl Side for Responding {
    fn judge(hello: &mut Responder, now_unix_s: u64) -> Result<(), HelloError> {
        match hello.side.claim.take() {
            None => hello.on_hello(),
            // Sent before its challenge was out: then it proves nothing.
            Some(_) if hello.sent < hello.queued => Err(hello.refuse()),
            Some(claim) => hello.on_proof(&claim, now_unix_s),
        }
    }
}

/// What a hash is for, so that none is good for anything else. Of one length, so that no label continues another.
mod label {
    pub(super) const RESPONDER: &[u8; 32] = b"praas hello 1: responder's proof";
    pub(super) const INITIATOR: &[u8; 32] = b"praas hello 1: initiator's proof";
    pub(super) const INITIATOR_SENDS: &[u8; 32] = b"praas hello 1: key, by initiator";
    pub(super) const RESPONDER_SENDS: &[u8; 32] = b"praas hello 1: key, by responder";
}

/// The keys of the two directions.
struct Keys {
    initiators: Option<[u8; 32]>,
    responders: Option<[u8; 32]>,
}

impl Keys {
    fn new(suite: u8, possession: &Secret, hello: &[u8], challenge: &[u8]) -> Keys {
        let key = |label| (suite == suite::BLAKE3).then(|| tag(possession, label, &[hello, challenge]));
        Keys { initiators: key(label::INITIATOR_SENDS), responders: key(label::RESPONDER_SENDS) }
    }
}

/// All parts have lengths of their own, fixed for each label: no two transcripts are the same bytes.
fn tag(possession: &Secret, label: &[u8; 32], parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_keyed(possession.expose());
    hasher.update(label);
    for part in parts {
        hasher.update(part);
    }
    let tag = *hasher.finalize().as_bytes();
    hasher.zeroize();
    tag
}

fn refusal(kind: u8, versions: Versions) -> RefusedMessage {
    let head = Head::new(kind, 0);
    RefusedMessage { head, version_min: versions.min.into(), version_max: versions.max.into() }
}

fn nonce() -> Result<[u8; 32], HelloError> {
    let mut nonce = [0; 32];
    getrandom::fill(&mut nonce).map_err(HelloError::NoRandom)?;
    Ok(nonce)
}

#[cfg(test)]
mod tests;
