//! The hello without a socket: what it agrees on, and that nothing but its own bytes in their order gets through.

use super::*;
use proptest::prelude::*;

const NOW: u64 = 1_800_000_000;
const LATER: u64 = NOW + 60;
const OURS: Versions = Versions { min: 1, max: 3 };

/// Where the features stand.
const FEATURES_OF_HELLO: usize = 16;
const FEATURES_OF_CHALLENGE: usize = 12;

fn key(byte: u8) -> Secret {
    Secret::new([byte; 32])
}

fn credential(key_byte: u8, role: Role, expires: u64) -> Credential {
    Credential::mint(&key(key_byte), role, "alice", expires).unwrap()
}

fn client() -> InitiatorConfig {
    InitiatorConfig {
        versions: OURS,
        purpose: Purpose::Invoke,
        session_id: *b"session of alice",
        incarnation: 7,
        payload_checksums: false,
        expect_process: None,
    }
}

fn process(key: Option<Secret>) -> ResponderConfig {
    let plaintext = key.is_none();
    let process = "server".into();
    ResponderConfig { key, plaintext, process, incarnation: 9, versions: OURS, checks_on_loopback: false }
}

/// What went over the wire: hello, challenge, proof.
type Wire = [Vec<u8>; 3];

/// Hands one end's whole message to the other, as far as that reads.
fn pass(message: &[u8], to: &mut Hello<impl Side>, now: u64) -> Result<(), HelloError> {
    let mut rest = message;
    while !rest.is_empty() && !to.space().is_empty() {
        let space = to.space();
        let bytes = space.len().min(rest.len());
        space[..bytes].copy_from_slice(&rest[..bytes]);
        to.received(bytes, now)?;
        rest = &rest[bytes..];
    }
    Ok(())
}

fn take(from: &mut Hello<impl Side>) -> Vec<u8> {
    let message = from.output().to_vec();
    from.sent(message.len());
    message
}

struct Ends {
    initiator: Initiator,
    responder: Responder,
}

/// Two ends with fixed nonces.
fn ends(config: InitiatorConfig, credential: Option<&Credential>, process: ResponderConfig) -> Ends {
    ends_on(config, credential, process, true)
}

fn ends_on(
    config: InitiatorConfig,
    credential: Option<&Credential>,
    process: ResponderConfig,
    on_loopback: bool,
) -> Ends {
    Ends {
        initiator: Initiator::with_nonce(config, credential, [0xa1; 32]),
        responder: Responder::with_nonce(Arc::new(process), on_loopback, [0xb2; 32]),
    }
}

impl Ends {
    /// Runs the hello, with each message changed on its way.
    fn run(
        mut self,
        mut change: impl FnMut(usize, &mut Vec<u8>),
    ) -> (Result<Session, HelloError>, Result<Session, HelloError>, Wire) {
        let mut wire = Wire::default();
        let (mut ours, mut theirs) = (Ok(()), Ok(()));
        for (step, said) in wire.iter_mut().enumerate() {
            let mut message = if step == 1 { take(&mut self.responder) } else { take(&mut self.initiator) };
            change(step, &mut message);
            said.clone_from(&message);
            if step == 1 {
                ours = pass(&message, &mut self.initiator, NOW);
            } else {
                theirs = pass(&message, &mut self.responder, NOW);
            }
            if ours.is_err() {
                break;
            }
            if theirs.is_err() {
                // The initiator hears of it, unless it is content already.
                let refusal = take(&mut self.responder);
                ours = pass(&refusal, &mut self.initiator, NOW);
                break;
            }
        }
        let session = |end: Result<(), HelloError>, session: Option<Session>| {
            end.and_then(|()| session.ok_or(HelloError::Closed { begun: true }))
        };
        (session(ours, self.initiator.session()), session(theirs, self.responder.session()), wire)
    }

    fn agree(self) -> (Session, Session, Wire) {
        let (ours, theirs, wire) = self.run(|_, _| {});
        (ours.unwrap(), theirs.unwrap(), wire)
    }
}

fn good() -> Ends {
    ends(client(), Some(&credential(1, Role::Client, LATER)), process(Some(key(1))))
}

#[test]
fn both_ends_agree_on_everything_and_know_each_other() {
    let (ours, theirs, _) = good().agree();
    assert_eq!((ours.version, theirs.version), (3, 3));
    let alice = Peer { role: Role::Client, subject: "alice".into(), session_id: *b"session of alice", incarnation: 7 };
    assert_eq!(theirs.peer, alice);
    assert_eq!((ours.peer.role, &*ours.peer.subject, ours.peer.incarnation), (Role::Process, "server", 9));
    assert!(ours.send_key.is_some() && ours.send_key == theirs.receive_key);
    assert!(ours.receive_key.is_some() && ours.receive_key == theirs.send_key);
    assert_ne!(ours.send_key, ours.receive_key, "a key for each direction");
    let shown = format!("{ours:?}");
    assert!(shown.contains("keyed: true") && !shown.contains("_key"), "{shown}");
}

#[test]
fn keys_are_new_for_every_session() {
    let credential = credential(1, Role::Client, LATER);
    let mut seen = Vec::new();
    for _ in 0..3 {
        let initiator = Initiator::new(client(), Some(&credential)).unwrap();
        let responder = Responder::new(Arc::new(process(Some(key(1)))), true).unwrap();
        let (ours, _, _) = Ends { initiator, responder }.agree();
        seen.extend([ours.send_key.unwrap(), ours.receive_key.unwrap()]);
    }
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), 6);
}

#[test]
fn the_highest_common_version_is_chosen_and_without_one_both_learn_the_others_range() {
    let with = |min, max, theirs| {
        let config = InitiatorConfig { versions: Versions { min, max }, ..client() };
        let process = ResponderConfig { versions: theirs, ..process(Some(key(1))) };
        ends(config, Some(&credential(1, Role::Client, LATER)), process)
    };
    for ((min, max), theirs, chosen) in
        [((1, 3), (2, 9), 3), ((2, 9), (1, 3), 3), ((1, 1), (1, 1), 1), ((4, 9), (1, 4), 4)]
    {
        let (ours, _, _) = with(min, max, Versions { min: theirs.0, max: theirs.1 }).agree();
        assert_eq!(ours.version, chosen);
    }
    for (min, max) in [(1, 4), (8, 9)] {
        let (ours, theirs, _) = with(min, max, Versions { min: 5, max: 7 }).run(|_, _| {});
        let Err(HelloError::Version { theirs: range, .. }) = ours else { panic!("{ours:?}") };
        assert_eq!(range, Versions { min: 5, max: 7 });
        let Err(HelloError::Version { theirs: range, .. }) = theirs else { panic!("{theirs:?}") };
        assert_eq!(range, Versions { min, max });
    }
    // Another hello altogether.
    let (ours, _, _) = good().run(|step, message| {
        if step == 0 {
            message[4] = 2;
        }
    });
    assert!(matches!(ours, Err(HelloError::Version { theirs_hello: 1, .. })), "{ours:?}");
}

#[test]
fn checksums_hold_when_either_end_asks() {
    for (asked, on_loopback, held) in
        [(false, true, false), (true, true, true), (false, false, true), (true, false, true)]
    {
        let config = InitiatorConfig { payload_checksums: asked, ..client() };
        let (ours, theirs, _) =
            ends_on(config, Some(&credential(1, Role::Client, LATER)), process(Some(key(1))), on_loopback).agree();
        assert_eq!((ours.payload_checksums, theirs.payload_checksums), (held, held));
    }
}

/// A2. What a responder wants on loopback holds, and nobody between the two can switch it off, in what either says.
#[test]
fn a2_checks_on_loopback_hold_and_cannot_be_switched_off_on_the_way() {
    for (key, credential) in [(Some(key(1)), Some(credential(1, Role::Client, LATER))), (None, None)] {
        let process = || ResponderConfig { checks_on_loopback: true, ..process(key.clone()) };
        let (ours, theirs, wire) = ends(client(), credential.as_ref(), process()).agree();
        assert!(ours.payload_checksums && theirs.payload_checksums);
        assert_eq!((wire[0][FEATURES_OF_HELLO], wire[1][FEATURES_OF_CHALLENGE]), (0, 1));
        let (ours, _, _) = ends(client(), credential.as_ref(), process()).run(|step, message| {
            if step == 1 {
                message[FEATURES_OF_CHALLENGE] = 0;
            }
        });
        assert!(matches!(ours, Err(HelloError::Unproven)), "{ours:?}");
    }
    let asking = InitiatorConfig { payload_checksums: true, ..client() };
    let (ours, theirs, _) =
        ends(asking, Some(&credential(1, Role::Client, LATER)), process(Some(key(1)))).run(|step, message| {
            if step == 0 {
                message[FEATURES_OF_HELLO] = 0;
            }
        });
    // The challenge answers a hello that was never said.
    assert!(matches!((&ours, &theirs), (Err(HelloError::Unproven), _)) && theirs.is_err(), "{ours:?} {theirs:?}");
}

#[test]
fn r5_without_keys_only_who_was_asked_to_and_only_over_loopback() {
    let (ours, theirs, _) = ends(client(), None, process(None)).agree();
    assert_eq!((ours.send_key, ours.receive_key, theirs.send_key, theirs.receive_key), (None, None, None, None));
    assert_eq!((theirs.peer.role, &*theirs.peer.subject), (Role::Client, ""));
    // A key and plain text as well.
    let both = || ResponderConfig { plaintext: true, ..process(Some(key(1))) };
    ends(client(), None, both()).agree();
    ends(client(), Some(&credential(1, Role::Client, LATER)), both()).agree();

    let peer = InitiatorConfig { purpose: Purpose::Peer, ..client() };
    let refused = [
        ends(client(), None, process(Some(key(1)))),
        ends(client(), None, ResponderConfig { plaintext: false, ..process(None) }),
        ends_on(client(), None, process(None), false),
        ends(client(), Some(&credential(1, Role::Client, LATER)), process(None)),
    ];
    for ends in refused {
        let (ours, theirs, _) = ends.run(|_, _| {});
        assert!(
            matches!((&ours, &theirs), (Err(HelloError::Refused), Err(HelloError::Refused))),
            "{ours:?} {theirs:?}"
        );
    }
    let (_, theirs, _) = ends(peer, None, process(None)).run(|_, _| {});
    assert!(matches!(theirs, Err(HelloError::Refused)), "nobody without a credential is a peer");
}

#[test]
fn r5_a3_a4_every_bad_credential_is_refused_with_the_same_bytes() {
    let as_peer = InitiatorConfig { purpose: Purpose::Peer, ..client() };
    // Claims to be a process with a client's key; claims to expire later than it does.
    let forged = |role, expires, from: &Credential| {
        let text = format!(
            "praas-credential 1\nrole {role}\nsubject alice\nexpires {expires}\nkey {}\n",
            *from.possession().to_hex()
        );
        let path = std::env::temp_dir().join(format!("praas-forged-{}-{role}-{expires}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        Secret::new([0; 32]).write_new(&path).unwrap();
        std::fs::write(&path, text).unwrap();
        let credential = Credential::from_file(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        credential
    };
    let honest = credential(1, Role::Client, LATER);
    let cases = [
        ("wrong key", client(), credential(2, Role::Client, LATER)),
        ("expired", client(), credential(1, Role::Client, NOW)),
        ("expired long ago", client(), credential(1, Role::Client, 0)),
        ("wrong role", as_peer, honest.clone()),
        ("role claimed", client(), forged(Role::Process, LATER, &honest)),
        ("expiry claimed", client(), forged(Role::Client, LATER + 1, &honest)),
    ];
    let mut answers = Vec::new();
    for (what, config, credential) in &cases {
        let Ends { mut initiator, mut responder } = ends(config.clone(), Some(credential), process(Some(key(1))));
        pass(&take(&mut initiator), &mut responder, NOW).unwrap();
        // An initiator that goes on whatever it is answered.
        let challenge = take(&mut responder);
        let hello = &initiator.side.hello;
        let proof = tag(&initiator.side.possession, label::INITIATOR, &[hello, &challenge]);
        let proof = ProofMessage { head: Head::new(kind::PROOF, suite::BLAKE3), proof };
        let error = pass(proof.as_bytes(), &mut responder, NOW).unwrap_err();
        assert!(matches!(error, HelloError::Refused), "{what}: {error}");
        assert!(responder.session().is_none(), "{what}");
        answers.push(take(&mut responder));
        // One with manners notices by itself when the key is another.
        let (ours, theirs, _) = ends(config.clone(), Some(credential), process(Some(key(1)))).run(|_, _| {});
        assert!(theirs.is_err(), "{what}");
        let same_key = ["expired", "expired long ago", "wrong role"].contains(what);
        assert_eq!(matches!(ours, Err(HelloError::Unproven)), !same_key, "{what}: {ours:?}");
    }
    // And those refused before a challenge.
    for (config, credential, process) in
        [(client(), None, process(Some(key(1)))), (client(), Some(&honest), process(None))]
    {
        let Ends { mut initiator, mut responder } = ends(config, credential, process);
        pass(&take(&mut initiator), &mut responder, NOW).unwrap_err();
        answers.push(take(&mut responder));
    }
    assert_eq!(answers[0].len(), REFUSED_BYTES);
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
}

#[test]
fn r5_the_process_asked_for_must_answer() {
    let asks = |name: &str| {
        let config = InitiatorConfig { expect_process: Some(name.into()), ..client() };
        ends(config, Some(&credential(1, Role::Client, LATER)), process(Some(key(1)))).run(|_, _| {})
    };
    assert!(asks("server").0.is_ok());
    let (ours, theirs, _) = asks("another");
    assert!(matches!(&ours, Err(HelloError::OtherProcess { found, .. }) if found == "server"), "{ours:?}");
    assert!(theirs.is_err(), "it gets no proof");
}

#[test]
fn every_flipped_bit_of_every_message_ends_the_hello() {
    let plain = || ends(client(), None, process(None));
    for (keyed, make) in [(true, good as fn() -> Ends), (false, plain)] {
        let (_, _, wire) = make().agree();
        for (step, message) in wire.iter().enumerate() {
            for bit in 0..message.len() * 8 {
                let (ours, theirs, _) = make().run(|at, message| {
                    if at == step {
                        message[bit / 8] ^= 1 << (bit % 8);
                    }
                });
                assert!(theirs.is_err(), "keyed {keyed}: message {step}, bit {bit}: the responder is content");
                // The initiator says its last word before the responder judges it.
                assert!(
                    ours.is_err() || step == 2,
                    "keyed {keyed}: message {step}, bit {bit}: the initiator is content"
                );
            }
        }
    }
}

#[test]
fn every_truncation_leaves_the_hello_unfinished_and_every_cut_is_the_same_hello() {
    let (_, _, wire) = good().agree();
    for (step, message) in wire.iter().enumerate() {
        for bytes in 0..message.len() {
            let (_, theirs, _) = good().run(|at, message| {
                if at == step {
                    message.truncate(bytes);
                }
            });
            assert!(theirs.is_err(), "message {step}, {bytes} bytes");
        }
    }
    // A byte at a time, and nothing read that is not the hello's.
    let Ends { mut initiator, mut responder } = good();
    let feed = |bytes: &[u8], to: &mut dyn FnMut(u8)| bytes.iter().for_each(|byte| to(*byte));
    let hello = take(&mut initiator);
    feed(&hello, &mut |byte| {
        responder.space()[0] = byte;
        responder.received(1, NOW).unwrap();
    });
    let challenge = take(&mut responder);
    feed(&challenge, &mut |byte| {
        initiator.space()[0] = byte;
        initiator.received(1, NOW).unwrap();
    });
    assert!(initiator.session().is_none(), "its proof is not sent yet");
    let proof = take(&mut initiator);
    feed(&proof, &mut |byte| {
        responder.space()[0] = byte;
        responder.received(1, NOW).unwrap();
    });
    assert!(initiator.space().is_empty() && responder.space().is_empty());
    assert_eq!(initiator.session().unwrap().send_key, responder.session().unwrap().receive_key);
    assert_eq!([hello, challenge, proof], wire);
}

#[test]
fn a2_no_part_of_a_recorded_hello_is_good_again() {
    let (_, _, wire) = good().agree();
    // To a responder, and to the same process in its next life with the same luck.
    let fresh = || Responder::new(Arc::new(process(Some(key(1)))), true).unwrap();
    let reborn = ResponderConfig { incarnation: 10, ..process(Some(key(1))) };
    let renamed = ResponderConfig { process: "server2".into(), ..process(Some(key(1))) };
    let twin = |config| Responder::with_nonce(Arc::new(config), true, [0xb2; 32]);
    for mut responder in [fresh(), twin(reborn), twin(renamed)] {
        pass(&wire[0], &mut responder, NOW).unwrap();
        take(&mut responder);
        assert!(matches!(pass(&wire[2], &mut responder, NOW), Err(HelloError::Refused)));
        assert!(responder.session().is_none());
    }
    // To an initiator.
    let mut initiator = Initiator::new(client(), Some(&credential(1, Role::Client, LATER))).unwrap();
    take(&mut initiator);
    assert!(matches!(pass(&wire[1], &mut initiator, NOW), Err(HelloError::Unproven)));
    assert!(initiator.session().is_none() && initiator.output().is_empty());
}

#[test]
fn a2_messages_sent_back_or_out_of_turn_or_in_the_others_role_are_refused() {
    let (_, _, wire) = good().agree();
    for message in &wire {
        let Ends { mut initiator, mut responder } = good();
        take(&mut initiator);
        if *message != wire[1] {
            assert!(pass(message, &mut initiator, NOW).is_err(), "to the initiator");
        }
        if *message != wire[0] {
            let answered = pass(message, &mut responder, NOW);
            assert!(answered.is_err() || !responder.space().is_empty(), "to the responder");
        }
        // In place of the proof.
        let mut responder = good().responder;
        pass(&wire[0], &mut responder, NOW).unwrap();
        take(&mut responder);
        if *message != wire[2] {
            assert!(pass(message, &mut responder, NOW).is_err());
        }
    }
    // The responder's own proof in place of the initiator's.
    let mut responder = good().responder;
    pass(&wire[0], &mut responder, NOW).unwrap();
    take(&mut responder);
    let mut reflected = ProofMessage::read_from_bytes(&wire[2]).unwrap();
    reflected.proof.copy_from_slice(&wire[1][CHALLENGE_SAID_BYTES..]);
    assert!(matches!(pass(reflected.as_bytes(), &mut responder, NOW), Err(HelloError::Refused)));
    // A proof that came before its challenge was sent.
    let mut responder = good().responder;
    pass(&wire[0], &mut responder, NOW).unwrap();
    assert!(matches!(pass(&wire[2], &mut responder, NOW), Err(HelloError::Refused)));
    // Two initiators, two responders.
    let (mut one, mut other) = (good().initiator, good().initiator);
    assert!(pass(&take(&mut one), &mut other, NOW).is_err());
    assert!(good().responder.output().is_empty());
}

#[test]
fn n13_a_stranger_is_known_by_its_first_wrong_byte() {
    for stranger in ["GET / HTTP/1.1", "SSH-2.0", "\u{16}\u{3}\u{1}", "PR\u{1}\u{3}", "PRAX"] {
        let mut responder = good().responder;
        let error = pass(stranger.as_bytes(), &mut responder, NOW).unwrap_err();
        assert!(matches!(error, HelloError::Stranger), "{stranger:?}");
        assert!(responder.output().is_empty() && responder.space().is_empty(), "{stranger:?}");
        assert!(matches!(pass(stranger.as_bytes(), &mut good().initiator, NOW), Err(HelloError::Stranger)));
    }
}

#[test]
fn n2_an_unfinished_hello_holds_little() {
    assert!(size_of::<Responder>() < 1024, "{}", size_of::<Responder>());
    assert!(size_of::<Initiator>() < 1024, "{}", size_of::<Initiator>());
}

#[test]
fn golden_bytes() {
    // The hashes were found with another implementation of BLAKE3, written from its paper.
    let (ours, _, wire) = good().agree();
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!(wire.each_ref().map(Vec::len), [160, 160, 40]);
    let digests = wire.each_ref().map(|message| hex(&message[message.len() - 32..]));
    let zeros = "00".repeat(7);
    assert_eq!(hex(&wire[0][..24]), "50524148010101000100000003000000000000000101".to_owned() + "0000");
    assert_eq!(hex(&wire[0][24..56]), "a1".repeat(32));
    assert_eq!(hex(&wire[0][56..72]), hex(b"session of alice"));
    assert_eq!(hex(&wire[0][72..88]), "0700000000000000".to_owned() + "3cd2496b00000000");
    assert_eq!(hex(&wire[0][88..101]), "05".to_owned() + &zeros + &hex(b"alice"));
    assert!(wire[0][101..].iter().all(|byte| *byte == 0));
    assert_eq!(hex(&wire[1][..16]), "50524148010201000300000000000000");
    assert_eq!(hex(&wire[1][16..48]), "b2".repeat(32));
    assert_eq!(hex(&wire[1][48..70]), "0900000000000000".to_owned() + "06" + &zeros + &hex(b"server"));
    assert!(wire[1][70..128].iter().all(|byte| *byte == 0));
    assert_eq!(hex(&wire[2][..8]), "5052414801030100");
    assert_eq!(
        [&digests[1], &digests[2], &hex(&ours.send_key.unwrap()), &hex(&ours.receive_key.unwrap())],
        [
            "feb6f44cdc4a460d8379022406b6a9f6e250647ca6a7aae0e1715b08fcc54a2c",
            "b0da7e8937cfa248a5c25bc7431c6654c450989f45631e970a20c4d8d18f644b",
            "3bb2e38d3acd4283c5cccd8a3354838e30ed1c268abe1fcbe01ef85a80c18d34",
            "03397173fd3c47d279a35d7768a800639a7362f1aa7fc65997a00027e988955e",
        ]
    );
    let refused = refusal(kind::REFUSED, Versions { min: 0, max: 0 });
    assert_eq!(hex(refused.as_bytes()), "50524148010400000000000000000000");
    let version = refusal(kind::REFUSED_VERSION, Versions { min: 5, max: 7 });
    assert_eq!(hex(version.as_bytes()), "50524148010500000500000007000000");
}

/// A stream that gives so many bytes at a time, and takes as many.
struct Choppy<'a> {
    input: &'a [u8],
    output: Vec<u8>,
    chunk: usize,
    turn: bool,
}

impl Read for Choppy<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.turn = !self.turn;
        let bytes = self.chunk.min(into.len()).min(self.input.len());
        if self.turn || bytes == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        into[..bytes].copy_from_slice(&self.input[..bytes]);
        self.input = &self.input[bytes..];
        Ok(bytes)
    }
}

impl Write for Choppy<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.turn = !self.turn;
        if self.turn {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let bytes = self.chunk.min(from.len());
        self.output.extend_from_slice(&from[..bytes]);
        Ok(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn n3_a_stream_cut_anywhere_is_read_to_the_end_of_the_hello_and_no_further() {
    let (_, _, wire) = good().agree();
    let input = [&wire[0][..], &wire[2][..], b"the first frame"].concat();
    for chunk in 1..input.len() {
        let mut stream = Choppy { input: &input, output: Vec::new(), chunk, turn: false };
        let mut responder = good().responder;
        let session = (0..10_000).find_map(|_| responder.advance(&mut stream, NOW).unwrap());
        assert_eq!(session.unwrap().peer.subject, "alice");
        assert_eq!((stream.input, &stream.output), (&b"the first frame"[..], &wire[1]), "chunks of {chunk}");
    }
    let mut ended = Choppy { input: &[], output: Vec::new(), chunk: 1, turn: true };
    assert!(good().responder.advance(&mut ended, NOW).unwrap().is_none());
    assert!(matches!(
        good().responder.advance(&mut io::Cursor::new(Vec::new()), NOW),
        Err(HelloError::Closed { begun: false })
    ));
}

proptest! {
    #[test]
    fn random_bytes_are_never_a_hello(
        bytes in proptest::collection::vec(any::<u8>(), 0..600),
        start in 0_usize..4,
        keep in 0_usize..160,
        keyed: bool,
    ) {
        let process = || process(keyed.then(|| key(1)));
        let make = || ends(client(), keyed.then(|| credential(1, Role::Client, LATER)).as_ref(), process());
        let (_, _, wire) = make().agree();
        // From nothing, or after so much of a good message.
        let noise = match start {
            0 => bytes.clone(),
            step => [&wire[step - 1][..keep.min(wire[step - 1].len())], &bytes[..]].concat(),
        };
        let mut fresh = Responder::new(Arc::new(process()), true).unwrap();
        // What it answers is as good as not sent: nobody who knows a key has seen it.
        if pass(&noise, &mut fresh, NOW).is_ok() {
            take(&mut fresh);
            let _ = pass(&bytes, &mut fresh, NOW);
        }
        prop_assert!(fresh.session().is_none());
        let mut initiator = make().initiator;
        take(&mut initiator);
        let mut changed = noise.clone();
        if changed.starts_with(&wire[1]) {
            changed[130] ^= 1;
        }
        let _ = pass(&changed, &mut initiator, NOW);
        prop_assert!(initiator.session().is_none());
    }
}
