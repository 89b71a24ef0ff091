//! Any bytes to both ends of a hello, in every state, from enemies who know the layout and keys of their own.

#![forbid(unsafe_code)]

use std::io::{self, Read, Write};
use std::sync::Arc;

use super::{Cuts, Input, u32_at, u64_at};
use crate::hello::{
    Credential, Hello, HelloError, Initiator, InitiatorConfig, Purpose, Responder, ResponderConfig, Role, Secret,
    Session, Side, Versions,
};

const NOW: u64 = 1_800_000_000;
const APP_KEY: [u8; 32] = [1; 32];
/// Somebody else's.
const OTHER_KEY: [u8; 32] = [2; 32];
const OURS: Versions = Versions { min: 2, max: 3 };
const PROCESS: &str = "server";
const SESSION_ID: [u8; 16] = *b"of the initiator";
const INCARNATION: u64 = 7;

const HELLO_BYTES: usize = 160;
const CHALLENGE_BYTES: usize = 160;
/// Of a challenge, what stands before its proof.
const CHALLENGE_SAID_BYTES: usize = 128;
const PROOF_BYTES: usize = 40;
const REFUSED_BYTES: usize = 16;

/// Lets an input be one end of a hello, or stand between two.
///
/// # Panics
/// When a session comes out for one who does not know the key, or under another name than its key's; when none comes out for one who does;
/// when an end reads beyond its messages or says more than they hold.
pub fn hello(input: &[u8]) {
    let mut input = Input(input);
    match input.byte() % 3 {
        0 => against_the_responder(&mut input),
        1 => against_the_initiator(&mut input),
        _ => between_them(&mut input),
    }
}

/// One end's socket.
struct Socket<'a> {
    coming: &'a [u8],
    cuts: Cuts,
    blocks: bool,
    said: Vec<u8>,
}

impl Read for Socket<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.blocks = !self.blocks;
        if self.blocks || self.coming.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let most = room.len().min(self.cuts.next());
        Read::read(&mut self.coming, &mut room[..most])
    }
}

impl Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.blocks = !self.blocks;
        if self.blocks {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let count = bytes.len().min(self.cuts.next());
        self.said.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One end, driven until it is content, refuses, or has had all there is.
struct Driven<S> {
    end: Hello<S>,
    cuts: Cuts,
    said: Vec<u8>,
    read_bytes: usize,
    session: Option<Session>,
    error: Option<HelloError>,
}

impl<S: Side> Driven<S> {
    fn new(end: Hello<S>, cuts: Cuts) -> Driven<S> {
        Driven { end, cuts, said: Vec::new(), read_bytes: 0, session: None, error: None }
    }

    fn is_over(&self) -> bool {
        self.session.is_some() || self.error.is_some()
    }

    /// Gives it bytes; what it does not read is not its own.
    fn hear(&mut self, bytes: &[u8]) {
        let mut socket = Socket { coming: bytes, cuts: self.cuts.clone(), blocks: false, said: Vec::new() };
        // Each byte takes two calls at most, read or written, and so does the look that finds nothing.
        for _ in 0..2 * (bytes.len() + HELLO_BYTES + CHALLENGE_BYTES) + 4 {
            if self.is_over() {
                break;
            }
            match self.end.advance(&mut socket, NOW) {
                Ok(session) => self.session = session,
                Err(error) => self.error = Some(error),
            }
        }
        self.read_bytes += bytes.len() - socket.coming.len();
        self.said.extend(socket.said);
        self.count();
    }

    /// The same for one that does not send: what it would say stays with it.
    fn hear_only(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.is_over() && !self.end.space().is_empty() {
            let most = self.cuts.next();
            let space = self.end.space();
            let count = space.len().min(bytes.len()).min(most);
            space[..count].copy_from_slice(&bytes[..count]);
            bytes = &bytes[count..];
            self.read_bytes += count;
            self.error = self.end.received(count, NOW).err();
        }
        self.session = self.session.take().or_else(|| self.end.session());
        self.count();
    }

    fn count(&mut self) {
        assert!(self.read_bytes <= HELLO_BYTES + PROOF_BYTES, "{} bytes read", self.read_bytes);
        assert!(self.said.len() <= HELLO_BYTES + PROOF_BYTES, "{} bytes said", self.said.len());
        assert!(self.session.is_none() || self.error.is_none(), "a session and an error");
        if self.is_over() {
            assert!(self.end.space().is_empty(), "it is over, and bytes are asked for");
            assert!(self.end.session().is_none(), "there is one session at most");
        }
    }
}

/// What somebody holds: a credential, and whether its key is one of ours.
struct Holder {
    credential: Option<Credential>,
    role: Role,
    subject: &'static str,
    expires_unix_s: u64,
    possession: [u8; 32],
}

fn holder(choice: u8) -> Holder {
    let app_key = [APP_KEY, OTHER_KEY][usize::from(choice >> 1 & 1)];
    let role = [Role::Client, Role::Process, Role::Control, Role::Client][usize::from(choice >> 2 & 3)];
    let expires_unix_s = [NOW + 60, NOW][usize::from(choice >> 4 & 1)];
    let subject =
        ["bob", "a.longer-name_of-64-bytes-01234567890123456789012345678901234567"][usize::from(choice >> 5 & 1)];
    if choice & 1 == 1 {
        return Holder { credential: None, role: Role::Client, subject: "", expires_unix_s: 0, possession: [0; 32] };
    }
    let credential = Credential::mint(&Secret::new(app_key), role, subject, expires_unix_s).expect("a good name");
    let possession = possession(app_key, role, subject, expires_unix_s);
    Holder { credential: Some(credential), role, subject, expires_unix_s, possession }
}

/// The key of a credential, by the words of decision 0015.
fn possession(app_key: [u8; 32], role: Role, subject: &str, expires_unix_s: u64) -> [u8; 32] {
    let mut said = b"praas credential, version 1\0".to_vec();
    said.push(role as u8);
    said.push(u8::try_from(subject.len()).expect("a short name"));
    said.extend(name_in_place(subject));
    said.extend(expires_unix_s.to_le_bytes());
    *blake3::keyed_hash(&app_key, &said).as_bytes()
}

fn name_in_place(name: &str) -> [u8; 64] {
    let mut bytes = [0; 64];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    bytes
}

fn tag(possession: [u8; 32], label: &[u8; 32], parts: &[&[u8]]) -> [u8; 32] {
    let said: Vec<u8> = label.iter().chain(parts.iter().copied().flatten()).copied().collect();
    *blake3::keyed_hash(&possession, &said).as_bytes()
}

const RESPONDERS_PROOF: &[u8; 32] = b"praas hello 1: responder's proof";
const INITIATORS_PROOF: &[u8; 32] = b"praas hello 1: initiator's proof";
const BY_INITIATOR: &[u8; 32] = b"praas hello 1: key, by initiator";
const BY_RESPONDER: &[u8; 32] = b"praas hello 1: key, by responder";

/// A name and what stands around it, at `at`: its length, seven zeros, its bytes, zeros.
fn name_at(message: &[u8], at: usize) -> Option<&str> {
    let place = &message[at..at + 72];
    let (name, rest) = place[8..].split_at_checked(usize::from(place[0]))?;
    let good = !name.is_empty() && name.iter().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(byte));
    let clean = rest.iter().chain(&place[1..8]).all(|byte| *byte == 0);
    (good && clean).then(|| str::from_utf8(name).expect("ASCII"))
}

/// Changes a message as the input says, or puts the input's own bytes in its place.
fn spoil(message: &mut Vec<u8>, input: &mut Input<'_>) {
    let how = input.byte();
    for _ in 0..how & 7 {
        let (at, bits) = (usize::from(input.byte()), input.byte());
        if let Some(byte) = message.get_mut(at) {
            *byte ^= bits;
        }
    }
    match how >> 3 & 7 {
        0 => message.truncate(usize::from(input.byte())),
        1 => {
            let count = usize::from(input.byte());
            *message = input.take(count).to_vec();
        }
        2 => {
            let count = usize::from(input.byte());
            message.extend_from_slice(input.take(count));
        }
        _ => {}
    }
}

fn versions(input: &mut Input<'_>) -> Versions {
    let byte = input.byte();
    let (min, more) = (u32::from(byte & 3), u32::from(byte >> 2 & 3));
    Versions { min, max: min + more }
}

fn initiator(holder: &Holder, input: &mut Input<'_>) -> (Initiator, InitiatorConfig) {
    let flags = input.byte();
    let config = InitiatorConfig {
        versions: versions(input),
        purpose: [Purpose::Invoke, Purpose::Peer][usize::from(flags & 1)],
        session_id: SESSION_ID,
        incarnation: INCARNATION,
        payload_checksums: flags & 2 == 2,
        expect_process: [None, Some(PROCESS.to_owned()), Some("another".to_owned())][usize::from(flags >> 2) % 3]
            .clone(),
    };
    (Initiator::with_nonce(config.clone(), holder.credential.as_ref(), [0xa1; 32]), config)
}

struct Process {
    keyed: bool,
    plaintext: bool,
    on_loopback: bool,
    checks_on_loopback: bool,
}

fn responder(input: &mut Input<'_>) -> (Responder, Process) {
    let flags = input.byte();
    let process = Process {
        keyed: flags & 1 == 1,
        plaintext: flags & 2 == 2,
        on_loopback: flags & 4 == 4,
        checks_on_loopback: flags & 8 == 8,
    };
    let config = ResponderConfig {
        key: process.keyed.then(|| Secret::new(APP_KEY)),
        plaintext: process.plaintext,
        process: PROCESS.to_owned(),
        incarnation: INCARNATION + 1,
        versions: OURS,
        checks_on_loopback: process.checks_on_loopback,
    };
    (Responder::with_nonce(Arc::new(config), process.on_loopback, [0xb2; 32]), process)
}

/// All that the end says first.
fn first_word(initiator: &mut Driven<crate::hello::Initiating>) -> Vec<u8> {
    initiator.hear(&[]);
    assert_eq!(initiator.said.len(), HELLO_BYTES);
    initiator.said.clone()
}

/// The session that a responder owes to a hello and its proof, if it does.
fn owed(process: &Process, hello: &[u8], challenge: &[u8], proof: &[u8]) -> Option<Session> {
    let head = |kind, suite| [b'P', b'R', b'A', b'H', 1, kind, suite, 0];
    let suite = hello[6];
    let (min, max) = (u32_at(hello, 8).max(OURS.min), u32_at(hello, 12).min(OURS.max));
    let role = [Role::Client, Role::Process, Role::Control].into_iter().find(|role| *role as u8 == hello[20])?;
    let purpose = [Purpose::Invoke, Purpose::Peer].into_iter().find(|purpose| *purpose as u8 == hello[21])?;
    let expires_unix_s = u64_at(hello, 80);
    let (possession, subject) = match suite {
        0 => {
            let nobody = role == Role::Client && expires_unix_s == 0 && hello[88..160].iter().all(|byte| *byte == 0);
            ([0; 32], (process.plaintext && process.on_loopback && nobody).then_some("")?)
        }
        1 => {
            let subject = name_at(hello, 88).filter(|_| process.keyed && NOW < expires_unix_s)?;
            (possession(APP_KEY, role, subject, expires_unix_s), subject)
        }
        _ => return None,
    };
    let reserved = hello[22..24] == [0; 2] && u32_at(hello, 8) <= u32_at(hello, 12);
    let sound = hello[..8] == head(1, suite) && reserved && min <= max;
    let may = purpose == Purpose::Invoke || role == Role::Process;
    let proved = proof == [&head(3, suite)[..], &tag(possession, INITIATORS_PROOF, &[hello, challenge])].concat();
    let key = |label| (suite == 1).then(|| tag(possession, label, &[hello, challenge]));
    (sound && may && proved).then(|| Session {
        version: max,
        peer: crate::hello::Peer {
            role,
            subject: subject.to_owned(),
            session_id: hello[56..72].try_into().expect("16 bytes"),
            incarnation: u64_at(hello, 72),
        },
        purpose,
        send_key: key(BY_RESPONDER),
        receive_key: key(BY_INITIATOR),
        payload_checksums: !process.on_loopback || process.checks_on_loopback || hello[16] & 1 == 1,
    })
}

fn assert_same(found: Option<&Session>, owed: Option<&Session>) {
    assert_eq!(found.is_some(), owed.is_some(), "a session that is not owed, or none that is: {found:?}, {owed:?}");
    let Some((found, owed)) = found.zip(owed) else { return };
    let Session { version, peer, purpose, send_key, receive_key, payload_checksums } = found;
    assert_eq!((version, peer, purpose), (&owed.version, &owed.peer, &owed.purpose));
    assert!((send_key, receive_key) == (&owed.send_key, &owed.receive_key), "other keys than agreed on");
    assert_eq!(*payload_checksums, owed.payload_checksums);
}

/// The input connects: with a credential or without, with changed claims, and with proofs by the keys that it has.
fn against_the_responder(input: &mut Input<'_>) {
    let (holder, cuts) = (holder(input.byte()), input.cuts());
    let (initiator, _) = initiator(&holder, input);
    let (responder, process) = responder(input);
    let mut hello = first_word(&mut Driven::new(initiator, cuts.clone()));
    let forger = input.byte();
    spoil(&mut hello, input);
    let mut responder = Driven::new(responder, cuts);
    // An eager enemy has said everything before it is answered.
    let eager = forger & 8 == 8;
    if eager {
        responder.hear_only(&hello)
    } else {
        responder.hear(&hello)
    }
    let (said, early) = hello.split_at(hello.len().min(HELLO_BYTES));
    let challenge = if eager { responder.end.output().to_vec() } else { responder.said.clone() };
    if responder.is_over() || challenge.is_empty() || early.len() >= PROOF_BYTES {
        assert!(responder.session.is_none(), "a session before its proof could be known");
        assert!(challenge.len() == CHALLENGE_BYTES + REFUSED_BYTES || challenge.len() <= CHALLENGE_BYTES);
        return;
    }
    assert_eq!((challenge.len(), said.len()), (CHALLENGE_BYTES, HELLO_BYTES), "challenged without a whole hello");

    let key = [holder.possession, [0; 32], OTHER_KEY, APP_KEY][usize::from(forger & 3)];
    let proof = if forger & 4 == 4 {
        &challenge[CHALLENGE_SAID_BYTES..]
    } else {
        &tag(key, INITIATORS_PROOF, &[said, &challenge])[..]
    };
    let mut proof = [&[b'P', b'R', b'A', b'H', 1, 3, said[6], 0], proof].concat();
    spoil(&mut proof, input);
    if eager && forger & 16 == 16 {
        // Proved before the challenge was out, which goes out only then.
        responder.hear_only(&proof);
        responder.hear(&[]);
    } else {
        responder.hear(&proof);
    }
    let whole = [early, &proof].concat();
    let in_time = !(eager && forger & 16 == 16);
    let owed = whole.get(..PROOF_BYTES).filter(|_| in_time).and_then(|proof| owed(&process, said, &challenge, proof));
    assert_same(responder.session.as_ref(), owed.as_ref());
    if let Some(session) = &responder.session {
        // Whoever holds a credential is what it says, and nobody else is anybody.
        let Holder { role, subject, expires_unix_s, .. } = holder;
        let is_itself =
            session.peer.role == role && session.peer.subject == subject && u64_at(said, 80) == expires_unix_s;
        let is_nobody = session.send_key.is_none() && session.peer.subject.is_empty() && process.plaintext;
        assert!(is_itself || is_nobody, "{session:?} for the holder of {role} {subject}");
    }
}

/// The input answers: as a process, with the keys that it has.
fn against_the_initiator(input: &mut Input<'_>) {
    let (holder, cuts) = (holder(input.byte()), input.cuts());
    let (initiator, config) = initiator(&holder, input);
    let mut initiator = Driven::new(initiator, cuts);
    let hello = first_word(&mut initiator);
    let forger = input.byte();
    let suite = u8::from(holder.credential.is_some());
    let mut answer = match forger & 3 {
        0 => [&b"PRAH\x01\x04\0\0"[..], &[0; 8]].concat(),
        1 => [&b"PRAH\x01\x05\0\0"[..], &input.take(8).iter().copied().chain([0; 8]).take(8).collect::<Vec<_>>()]
            .concat(),
        _ => {
            let mut name = [0; 72];
            name[0] = 6;
            name[8..].copy_from_slice(&name_in_place(PROCESS));
            let version = [3, input.byte(), 0, 0];
            let version = u32::from(version[usize::from(forger >> 5 & 1)]);
            let (version, features) = (version.to_le_bytes(), u32::from(input.byte()).to_le_bytes());
            let said =
                [&[b'P', b'R', b'A', b'H', 1, 2, suite, 0], &version[..], &features, &[0xb2; 32], &[8; 8], &name];
            said.concat()
        }
    };
    spoil(&mut answer, input);
    if forger & 3 >= 2 && answer.len() >= CHALLENGE_SAID_BYTES {
        // The proof is about what is said, whatever that is by now.
        let key = [holder.possession, [0; 32], OTHER_KEY, APP_KEY][usize::from(forger >> 2 & 3)];
        let rest = answer.split_off(CHALLENGE_SAID_BYTES);
        answer.extend(tag(key, RESPONDERS_PROOF, &[&hello, &answer]));
        answer.extend(rest);
        if forger & 16 == 16 {
            spoil(&mut answer, input);
        }
    }
    initiator.hear(&answer);
    let owed = answer.get(..CHALLENGE_BYTES).and_then(|challenge| {
        let (said, proof) = challenge.split_at(CHALLENGE_SAID_BYTES);
        let (version, features) = (u32_at(said, 8), u32_at(said, 12));
        let found = name_at(said, 56)?;
        let sound = said[..8] == [b'P', b'R', b'A', b'H', 1, 2, suite, 0]
            && (config.versions.min..=config.versions.max).contains(&version)
            && features <= 1
            && features >= u32::from(config.payload_checksums)
            && config.expect_process.as_ref().is_none_or(|expected| expected == found)
            && proof == tag(holder.possession, RESPONDERS_PROOF, &[&hello, said]);
        let key = |label| (suite == 1).then(|| tag(holder.possession, label, &[&hello, challenge]));
        sound.then(|| Session {
            version,
            peer: crate::hello::Peer {
                role: Role::Process,
                subject: found.to_owned(),
                session_id: SESSION_ID,
                incarnation: u64_at(said, 48),
            },
            purpose: config.purpose,
            send_key: key(BY_INITIATOR),
            receive_key: key(BY_RESPONDER),
            payload_checksums: features == 1,
        })
    });
    assert_same(initiator.session.as_ref(), owed.as_ref());
    assert!(initiator.read_bytes <= CHALLENGE_BYTES);
    let proof = &initiator.said[HELLO_BYTES..];
    match initiator.session {
        None => assert!(proof.is_empty(), "a proof for whom there is no session"),
        Some(_) => {
            let tag = tag(holder.possession, INITIATORS_PROOF, &[&hello, &answer[..CHALLENGE_BYTES]]);
            assert!(proof[8..] == tag, "another proof than agreed on");
        }
    }
}

/// The input knows no key, and stands between two who do.
fn between_them(input: &mut Input<'_>) {
    let (holder, cuts) = (holder(input.byte()), input.cuts());
    let (initiator, config) = initiator(&holder, input);
    let (responder, process) = responder(input);
    let (mut initiator, mut responder) = (Driven::new(initiator, cuts.clone()), Driven::new(responder, cuts));
    let hello = first_word(&mut initiator);
    let mut heard = hello.clone();
    spoil(&mut heard, input);
    responder.hear(&heard);
    let answer = responder.said.clone();
    let mut spoilt = answer.clone();
    spoil(&mut spoilt, input);
    initiator.hear(&spoilt);
    let proof = initiator.said[HELLO_BYTES..].to_vec();
    let mut last = proof.clone();
    spoil(&mut last, input);
    if heard.len() <= HELLO_BYTES {
        responder.hear(&last);
    }
    let starts = |heard: &[u8], said: &[u8]| said.len() <= heard.len() && heard.starts_with(said);
    let challenged = answer.len() >= CHALLENGE_BYTES;
    if initiator.session.is_some() {
        let unchanged = starts(&heard, &hello) && challenged && starts(&spoilt, &answer[..CHALLENGE_BYTES]);
        assert!(unchanged, "an initiator is content with what was changed");
    }
    if let Some(session) = &responder.session {
        assert!(starts(&heard, &hello) && !proof.is_empty() && starts(&last, &proof), "a responder is content");
        let theirs = initiator.session.as_ref().expect("it proved itself");
        assert!(session.send_key == theirs.receive_key && session.receive_key == theirs.send_key);
        assert_eq!((session.version, session.payload_checksums), (theirs.version, theirs.payload_checksums));
    }
    let untouched = heard == hello && spoilt == answer && last == proof;
    if untouched {
        let owed =
            (challenged && !proof.is_empty()).then(|| owed(&process, &hello, &answer[..CHALLENGE_BYTES], &proof));
        assert_same(responder.session.as_ref(), owed.flatten().as_ref());
        assert!(config.payload_checksums <= responder.session.as_ref().is_none_or(|session| session.payload_checksums));
    }
}
