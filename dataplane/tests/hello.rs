//! Who gets in: keys, credentials, strangers before the end of their hello, and where a key must never be seen.
//! (behaviour R5; faults A1-A5, N2, N13)

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use praas_dataplane::client::ConnectError;
use praas_dataplane::clock::unix_s;
use praas_dataplane::{
    Client, ClientConfig, Credential, Ipc, LaunchConfig, LaunchError, LaunchKey, LocalProcess, Role, Secret,
};
use praas_transport::hello::{HelloError, Initiator, InitiatorConfig, Purpose};
use support::raw::{Raw, initiator, initiator_config};
use support::{PATIENCE, children, fds, launch_config, process_program, run_process, test_worker, wait_until};

/// Bytes of the three messages.
const HELLO: usize = 160;
const CHALLENGE: usize = 160;
const PROOF: usize = 40;

fn key(byte: u8) -> Secret {
    Secret::new([byte; 32])
}

fn credential(key_byte: u8, role: Role) -> Credential {
    Credential::mint(&key(key_byte), role, "alice", unix_s() + 3600).unwrap()
}

fn client_config(credential: Credential) -> ClientConfig {
    ClientConfig { credential: Some(credential), connect_within: Duration::from_secs(2), ..ClientConfig::default() }
}

fn alice() -> ClientConfig {
    client_config(credential(1, Role::Client))
}

/// A process with key 1, and alice's connection to it.
fn start_keyed(args: &[&str]) -> (LocalProcess, Client) {
    let mut config = LaunchConfig { key: Some(LaunchKey::Pipe(Arc::new(key(1)))), ..launch_config(Ipc::Ring) };
    config.args.extend(["--process=server"].iter().chain(args).map(|arg| (*arg).to_owned()));
    let process = LocalProcess::start(&config).expect("the process starts");
    let client = Client::connect(process.addr(), &alice()).expect("alice is let in");
    (process, client)
}

fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("praas-hello-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

fn still_served(client: &mut Client) {
    assert_eq!(&*client.invoke("echo", b"in").unwrap(), b"in", "who is in stays in");
}

#[test]
fn r5_without_the_right_credential_nobody_gets_in_and_nothing_changes() {
    let (process, mut client) = start_keyed(&[]);
    let (open, workers) = (fds(process.pid()), children(process.pid()));
    let refused = |config: &ClientConfig| Client::connect(process.addr(), config).unwrap_err();
    for _ in 0..3 {
        let error = refused(&ClientConfig::default());
        assert!(matches!(error, ConnectError::KeyWanted { .. }), "{error}");
        let error = refused(&client_config(credential(2, Role::Client)));
        assert!(matches!(error, ConnectError::Unproven { .. }), "{error}");
        for expires in [0, unix_s() - 1] {
            let expired = Credential::mint(&key(1), Role::Client, "alice", expires).unwrap();
            let error = refused(&client_config(expired));
            assert!(matches!(error, ConnectError::CredentialRefused { .. }), "{error}");
        }
        let error = refused(&ClientConfig { expect_process: Some("another".into()), ..alice() });
        assert!(matches!(&error, ConnectError::OtherProcess { found, .. } if found == "server"), "{error}");
        still_served(&mut client);
    }
    for role in [Role::Client, Role::Process, Role::Control] {
        let config = ClientConfig { expect_process: Some("server".into()), ..client_config(credential(1, role)) };
        let mut other = Client::connect(process.addr(), &config).unwrap();
        assert_eq!(other.session().peer.subject, "server");
        assert!(other.session().send_key.is_some());
        still_served(&mut other);
    }
    wait_until("no descriptor stays", PATIENCE, || fds(process.pid()) == open);
    assert_eq!(children(process.pid()), workers);
}

#[test]
fn r5_plain_text_is_for_those_who_ask_for_it_and_is_no_way_around_a_key() {
    let (process, _client) = start_keyed(&["--plaintext"]);
    let mut plain = Client::connect(process.addr(), &ClientConfig::default()).unwrap();
    still_served(&mut plain);
    assert!(plain.session().send_key.is_none());
    assert!(Client::connect(process.addr(), &client_config(credential(2, Role::Client))).is_err());
    // A process without a key cannot prove anything to who wants proof.
    let process = LocalProcess::start(&launch_config(Ipc::Ring)).unwrap();
    let error = Client::connect(process.addr(), &alice()).unwrap_err();
    assert!(matches!(error, ConnectError::CredentialRefused { .. }), "{error}");
    // Nothing is said to other machines without a credential: 192.0.2.0/24 is nobody's.
    let begun = Instant::now();
    let error = Client::connect("192.0.2.1:4000", &ClientConfig::default()).unwrap_err();
    assert!(matches!(error, ConnectError::KeyWanted { .. }) && begun.elapsed() < Duration::from_secs(1), "{error}");
}

#[test]
fn a1_n13_strangers_are_closed_and_nothing_changes() {
    let (process, mut client) = start_keyed(&[]);
    let open = fds(process.pid());
    let hello = initiator(Some(&credential(1, Role::Client))).output().to_vec();
    let noise = support::content(7, 100_000);
    let cases: [(&str, Vec<u8>); 5] = [
        ("http", b"GET / HTTP/1.1\r\n".to_vec()),
        ("noise", noise),
        ("zeros", vec![0; HELLO]),
        ("a hello and noise for a proof", [&hello[..], &[7; PROOF]].concat()),
        ("two hellos", [&hello[..], &hello[..]].concat()),
    ];
    for (what, bytes) in &cases {
        let begun = Instant::now();
        let mut raw = Raw::connect(process.addr());
        // It may be closed before it has everything.
        let _ = raw.0.write_all(bytes);
        assert!(raw.is_closed(), "{what}");
        assert!(begun.elapsed() < Duration::from_secs(1), "{what} was closed after {:?}", begun.elapsed());
        still_served(&mut client);
    }
    for cut in [0, 1, 8, HELLO - 1] {
        let mut raw = Raw::connect(process.addr());
        raw.0.write_all(&hello[..cut]).unwrap();
        raw.0.shutdown(Shutdown::Write).unwrap();
        assert!(raw.is_closed(), "{cut} bytes");
    }
    // Silent ones are closed when their time is up.
    let mut silent = Raw::connect(process.addr());
    let begun = Instant::now();
    assert!(silent.is_closed());
    assert!(begun.elapsed() > Duration::from_secs(1) && begun.elapsed() < Duration::from_secs(5));
    wait_until("no descriptor stays", PATIENCE, || fds(process.pid()) == open);
    still_served(&mut client);
}

#[test]
fn a1_n2_more_strangers_than_there_are_places_do_not_keep_others_out() {
    let (process, mut client) = start_keyed(&["--unauthenticated-max", "8"]);
    let open = fds(process.pid());
    let hello = initiator(Some(&credential(1, Role::Client))).output().to_vec();
    // Silent, a byte now and then, and a hello without a proof: five times as many as there are places.
    let mut crowd: Vec<Raw> = (0..40).map(|_| Raw::connect(process.addr())).collect();
    for round in 0..20 {
        for (at, raw) in crowd.iter_mut().enumerate() {
            let _ = match at % 3 {
                0 => Ok(()),
                1 => raw.0.write_all(&hello[round..=round]),
                _ if round == 0 => raw.0.write_all(&hello),
                _ => Ok(()),
            };
        }
        let begun = Instant::now();
        let mut late = Client::connect(process.addr(), &alice()).expect("somebody with manners is let in");
        still_served(&mut late);
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
        still_served(&mut client);
        // Two are the connections of `late` and of one it took the place of.
        assert!(fds(process.pid()) <= open + 8 + 2, "{} descriptors", fds(process.pid()));
        let again = round % crowd.len();
        crowd[again] = Raw::connect(process.addr());
    }
    drop(crowd);
    wait_until("no descriptor stays", PATIENCE, || fds(process.pid()) == open);
}

/// Passes one connection on and writes down what each side said.
struct Relay {
    address: SocketAddr,
    heard: [Arc<Mutex<Vec<u8>>>; 2],
}

fn relay(to: SocketAddr) -> Relay {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let heard = [Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new()))];
    let notes = heard.clone();
    std::thread::spawn(move || {
        let (client, _) = listener.accept().unwrap();
        let process = TcpStream::connect(to).unwrap();
        let ways = [(client.try_clone().unwrap(), process.try_clone().unwrap()), (process, client)];
        for ((mut from, mut to), heard) in ways.into_iter().zip(notes) {
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(bytes @ 1..) = from.read(&mut buffer) {
                    heard.lock().unwrap().extend_from_slice(&buffer[..bytes]);
                    if to.write_all(&buffer[..bytes]).is_err() {
                        break;
                    }
                }
                let _ = to.shutdown(Shutdown::Write);
            });
        }
    });
    Relay { address, heard }
}

#[test]
fn a2_a_recorded_conversation_is_worth_nothing() {
    let (process, mut client) = start_keyed(&[]);
    let relay = relay(process.addr());
    let mut recorded = Client::connect(relay.address, &alice()).unwrap();
    still_served(&mut recorded);
    drop(recorded);
    wait_until("all is heard", PATIENCE, || {
        relay.heard.iter().all(|heard| heard.lock().unwrap().len() > HELLO + PROOF)
    });
    let [said, answered] = relay.heard.map(|heard| heard.lock().unwrap().clone());
    // To the process: at once, and in step with its challenge.
    for in_step in [false, true] {
        let mut raw = Raw::connect(process.addr());
        let _ = raw.0.write_all(if in_step { &said[..HELLO] } else { &said });
        let mut answer = vec![0; CHALLENGE];
        if in_step {
            raw.0.read_exact(&mut answer).unwrap();
            assert_ne!(answer, answered[..CHALLENGE]);
            let _ = raw.0.write_all(&said[HELLO..]);
        }
        assert!(raw.is_closed());
        still_served(&mut client);
    }
    // To a client, by somebody who waits where the process was.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.write_all(&answered);
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    let error = Client::connect(address, &alice()).unwrap_err();
    assert!(matches!(error, ConnectError::Unproven { .. }), "{error}");
}

/// The role counts that is in the credential, not the one that is asked for or written into it.
#[test]
fn a3_a_client_is_no_process_whatever_it_says() {
    let (process, mut client) = start_keyed(&[]);
    let as_peer = |credential: &Credential| {
        let config = InitiatorConfig { purpose: Purpose::Peer, ..initiator_config() };
        let mut raw = Raw::connect(process.addr());
        let said = raw.say_hello(Initiator::new(config, Some(credential)).unwrap());
        // The initiator is content when its proof is sent; the process has the last word.
        (said, raw)
    };
    for role in [Role::Client, Role::Control] {
        let (said, mut raw) = as_peer(&credential(1, role));
        assert!(said.is_ok(), "it knows its key");
        let mut answer = Vec::new();
        let _ = raw.0.read_to_end(&mut answer);
        assert_eq!(answer.len(), 16, "refused, and not welcomed");
    }
    let folder = folder("a3");
    let path = folder.join("token");
    credential(1, Role::Client).write_new(&path).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    for (from, to) in [("role client", "role process"), ("subject alice", "subject server"), ("expires ", "expires 9")]
    {
        std::fs::write(&path, text.replace(from, to)).unwrap();
        let forged = Credential::from_file(&path).unwrap();
        let (said, _) = as_peer(&forged);
        assert!(matches!(said, Err(HelloError::Unproven)), "{to}: {said:?}");
        assert!(Client::connect(process.addr(), &client_config(forged)).is_err(), "{to}");
    }
    // A process is told why it is not let in: this one was not told of it.
    let (said, mut raw) = as_peer(&credential(1, Role::Process));
    assert!(said.is_ok());
    assert_eq!(raw.receive().0.kind, praas_dataplane::wire::frame::GOODBYE);
    still_served(&mut client);
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a4_every_cause_gets_the_same_answer() {
    let (process, _client) = start_keyed(&[]);
    let expired = Credential::mint(&key(1), Role::Client, "alice", 1).unwrap();
    let peer = InitiatorConfig { purpose: Purpose::Peer, ..initiator_config() };
    let initiators = [
        ("no credential", initiator(None)),
        ("wrong key", initiator(Some(&credential(2, Role::Client)))),
        ("expired", initiator(Some(&expired))),
        ("wrong role", Initiator::new(peer, Some(&credential(1, Role::Client))).unwrap()),
        ("wrong proof", initiator(Some(&credential(1, Role::Client)))),
    ];
    let mut answers = Vec::new();
    for (what, hello) in initiators {
        let mut raw = Raw::connect(process.addr());
        raw.0.write_all(hello.output()).unwrap();
        if what != "no credential" {
            // They get as far as anybody: what is wrong with them is not looked at before their proof.
            raw.0.read_exact(&mut [0; CHALLENGE]).unwrap();
            let proof = [b"PRAH\x01\x03\x01\x00".as_slice(), &[7; 32]].concat();
            raw.0.write_all(&proof).unwrap();
        }
        let mut answer = Vec::new();
        raw.0.read_to_end(&mut answer).unwrap();
        answers.push((what, answer));
    }
    for (what, answer) in &answers {
        assert_eq!(answer, &answers[0].1, "{what}");
        assert_eq!(answer.len(), 16, "{what}");
    }
}

/// What can be read of an OS process by whoever may look: arguments, environment, open files by name and by content.
fn seen_of(pid: u32, with_files: bool) -> Vec<u8> {
    let mut seen = Vec::new();
    for file in ["cmdline", "environ"] {
        seen.extend(std::fs::read(format!("/proc/{pid}/{file}")).unwrap());
    }
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        seen.extend(target.as_os_str().as_encoded_bytes());
        // Files, memory files included, as whoever has the descriptor can read them.
        if with_files && std::fs::metadata(entry.path()).is_ok_and(|metadata| metadata.is_file()) {
            let mut start = Vec::new();
            let opened = std::fs::File::open(entry.path());
            let _ = opened.and_then(|file| file.take(1 << 20).read_to_end(&mut start));
            seen.extend(start);
        }
    }
    seen
}

#[test]
fn a5_a_key_is_in_no_log_no_argument_no_environment_and_no_file_of_a_worker() {
    let folder = folder("a5");
    let canary = Secret::new(*b"canary-canary-canary-canary-1234");
    let path = folder.join("app.key");
    canary.write_new(&path).unwrap();
    let alice = Credential::mint(&canary, Role::Client, "alice", unix_s() + 3600).unwrap();
    alice.write_new(&folder.join("alice.token")).unwrap();
    let token = std::fs::read_to_string(folder.join("alice.token")).unwrap();
    let possession = token.trim_end().rsplit(' ').next().unwrap().to_owned();
    let canaries: Vec<Vec<u8>> =
        vec![b"canary-canary-canary".to_vec(), canary.to_hex().as_bytes().to_vec(), possession.into_bytes()];
    let clean = |what: &str, seen: &[u8]| {
        for canary in &canaries {
            assert!(!seen.windows(canary.len()).any(|window| window == canary), "{what}");
        }
    };
    // By name, on standard input, and on a descriptor from a shell.
    let shell = |redirection: &str, flag: &str| {
        let mut command = Command::new("sh");
        let script = format!("exec \"$0\" --worker \"$1\" --log debug {flag} {redirection}");
        command.args(["-c", &script, &process_program(), &test_worker()]).current_dir(&folder);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("sh runs")
    };
    for (redirection, flag) in [("", "--key-file app.key"), ("<app.key", "--key-fd 0"), ("7<app.key", "--key-fd 7")] {
        let mut process = shell(redirection, flag);
        let mut stdout = BufReader::new(process.stdout.take().unwrap());
        let mut ready = String::new();
        stdout.read_line(&mut ready).unwrap();
        let address: SocketAddr = ready.split("listen=").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
        let mut client = Client::connect(address, &client_config(alice.clone())).unwrap();
        still_served(&mut client);
        assert!(Client::connect(address, &ClientConfig::default()).is_err());
        assert!(Client::connect(address, &client_config(credential(9, Role::Client))).is_err());
        clean("a client's Debug", format!("{client:?} {alice:?} {canary:?}").as_bytes());
        let workers = children(process.id());
        assert_eq!(workers.len(), 2);
        for worker in workers {
            let seen = seen_of(worker, true);
            clean("a worker", &seen);
            let name = b"app.key";
            // The name of the key's file is an argument of the process, and nothing of the worker's.
            assert!(!seen.windows(name.len()).any(|window| window == name), "{flag}: a worker holds the key's file");
        }
        clean("the process", &seen_of(process.id(), false));
        drop(client);
        support::signal(process.id(), 15);
        let mut said = ready.into_bytes();
        stdout.read_to_end(&mut said).unwrap();
        process.stderr.take().unwrap().read_to_end(&mut said).unwrap();
        assert!(process.wait().unwrap().success());
        assert!(said.len() > 200, "there was a log to look at");
        clean("what it said", &said);
    }
    // Neither do errors tell.
    let bad = folder.join("bad.key");
    std::fs::write(&bad, format!("{}0\n", *canary.to_hex())).unwrap();
    std::fs::set_permissions(&bad, PermissionsExt::from_mode(0o600)).unwrap();
    let output = run_process(&["--worker", &test_worker(), "--key-file", &bad.display().to_string()]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("64 hexadecimal digits"));
    clean("an error", &output.stderr);
    std::fs::remove_dir_all(&folder).unwrap();
}

/// To whom the memory of a process belongs that runs as nobody. `None` when none can be started so.
fn memory_owner(key: Option<Secret>) -> Option<u32> {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", &process_program(), "--log=error"]);
    command.args(["--worker", &test_worker()]).stdin(reader).stdout(Stdio::piped());
    if let Some(key) = key {
        writer.write_all(key.to_hex().as_bytes()).unwrap();
        command.arg("--key-fd=0");
    }
    drop(writer);
    let mut process = command.spawn().ok()?;
    let mut ready = String::new();
    let mut stdout = BufReader::new(process.stdout.take()?);
    stdout.read_line(&mut ready).unwrap();
    let memory = std::fs::metadata(format!("/proc/{}/mem", process.id()));
    support::signal(process.id(), 15);
    process.wait().unwrap();
    ready.starts_with("ready").then(|| memory.unwrap().uid())
}

/// Workers run as the process's user, who may read the memory of its other processes: not of this one.
#[test]
fn a5_a_process_with_a_key_cannot_be_dumped_or_traced() {
    let (Some(without), Some(with)) = (memory_owner(None), memory_owner(Some(key(1)))) else {
        println!("skipped: needs root, setpriv, and programs that everybody may run");
        return;
    };
    assert_eq!((without, with), (65534, 0), "the memory of who cannot be dumped belongs to root");
}

fn refused(args: &[&str], words: &[&str]) {
    let worker = test_worker();
    let output = run_process(&[&["--worker", &worker][..], args].concat());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
    for word in words {
        assert!(said.contains(word), "{args:?}: `{word}` is not in `{said}`");
    }
}

#[test]
fn a5_keys_that_others_can_read_are_refused_and_so_is_the_world_without_a_key() {
    let folder = folder("modes");
    let path = |name: &str| folder.join(name).display().to_string();
    key(1).write_new(Path::new(&path("key"))).unwrap();
    std::fs::write(path("open"), std::fs::read(path("key")).unwrap()).unwrap();
    for mode in [0o644, 0o640, 0o620] {
        std::fs::set_permissions(path("open"), PermissionsExt::from_mode(mode)).unwrap();
        refused(&["--key-file", &path("open")], &["chmod 600", &path("open"), &format!("{mode:04o}")]);
    }
    std::os::unix::fs::symlink(path("key"), path("link")).unwrap();
    refused(&["--key-file", &path("link")], &["link"]);
    refused(&["--key-file", &path("nothing")], &["nothing"]);
    refused(&["--key-file", "/dev/null"], &["not a regular file"]);
    refused(&["--key-fd", "77"], &["77"]);
    refused(&["--key-fd", "0"], &["descriptor 0"]);
    for outside in ["0.0.0.0:0", "[::]:0"] {
        refused(&["--listen", outside], &[outside, "--key-file"]);
        refused(&["--listen", outside, "--plaintext"], &[outside]);
        refused(&["--listen", outside, "--plaintext", "--key-file", &path("key")], &["--plaintext"]);
    }
    let config = folder.join("two.toml");
    std::fs::write(&config, format!("key_file = '{}'\nkey_fd = 0\n", path("key"))).unwrap();
    refused(&["--config", &config.display().to_string()], &["--key-fd"]);
    // With one it is served.
    let launch = LaunchConfig {
        key: Some(LaunchKey::File(path("key").into())),
        args: vec!["--listen=0.0.0.0:0".into(), "--log=error".into()],
        ..launch_config(Ipc::Ring)
    };
    let process = LocalProcess::start(&launch).unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], process.addr().port()));
    still_served(&mut Client::connect(address, &alice()).unwrap());
    assert!(Client::connect(address, &ClientConfig::default()).is_err());
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn names_and_ipv6_are_addresses_too() {
    let started = |listen: &str| {
        let config =
            LaunchConfig { args: vec![format!("--listen={listen}"), "--log=error".into()], ..launch_config(Ipc::Ring) };
        LocalProcess::start(&config)
    };
    let process = started("localhost:0").unwrap();
    still_served(&mut Client::connect(process.addr(), &ClientConfig::default()).unwrap());
    // Wherever of its addresses it listens.
    let name = format!("localhost:{}", process.addr().port());
    still_served(&mut Client::connect(&name, &ClientConfig::default()).unwrap());
    match started("[::1]:0") {
        Ok(process) => {
            assert!(process.addr().is_ipv6());
            still_served(&mut Client::connect(process.addr(), &ClientConfig::default()).unwrap());
        }
        Err(LaunchError::Ended { status, text }) if status.code() == Some(5) => {
            println!("skipped: needs IPv6 on loopback ({text})");
        }
        Err(error) => panic!("{error}"),
    }
    let Err(LaunchError::Ended { status, text }) = started("no-such-name.invalid:1") else {
        panic!("it has an address")
    };
    assert!(status.code() == Some(2) && text.contains("no-such-name.invalid:1"), "{text}");

    // Nobody there: each address and what it said.
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let error = Client::connect(format!("localhost:{free}"), &ClientConfig::default()).unwrap_err();
    let ConnectError::Refused { attempts, .. } = &error else { panic!("{error}") };
    for (address, _) in &attempts.0 {
        assert!(error.to_string().contains(&address.to_string()), "{error}");
    }
    assert!(!attempts.0.is_empty());
}
