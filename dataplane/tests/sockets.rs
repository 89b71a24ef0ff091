//! What the sockets of a process, its peers and its clients have: the congestion control that was chosen, and frames with checks where
//! they were asked for.

mod support;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use praas_dataplane::client::ConnectError;
use praas_dataplane::clock::unix_s;
use praas_dataplane::{
    Checks, Client, ClientConfig, Congestion, Credential, Ipc, LaunchKey, LocalProcess, Role, Secret,
};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use support::started::Started;
use support::{
    PATIENCE, connect_with, content, on_both_reactors, process_program, run_process, test_worker, wait_until,
};

/// A copy of each descriptor of an OS process that is a socket.
fn sockets_of(pid: u32) -> Vec<OwnedFd> {
    let process = Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("not zero");
    let process = pidfd_open(process, PidfdFlags::empty()).expect("it lives");
    let mut sockets = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it is ours").flatten() {
        let is_socket =
            std::fs::read_link(entry.path()).is_ok_and(|link| link.to_string_lossy().starts_with("socket:"));
        let number = entry.file_name().to_string_lossy().parse().expect("a number");
        if is_socket {
            sockets.extend(pidfd_getfd(&process, number, PidfdGetfdFlags::empty()).ok());
        }
    }
    sockets
}

/// Of each TCP connection of an OS process, what the kernel says it is paced by: under the address of its other end.
fn congestion_of(pid: u32) -> BTreeMap<SocketAddr, String> {
    let sockets = sockets_of(pid);
    let peer = |socket: &OwnedFd| SocketAddr::try_from(rustix::net::getpeername(socket).ok()??).ok();
    sockets.iter().filter_map(|socket| Some((peer(socket)?, Congestion::of(socket).ok()?))).collect()
}

/// Those that the kernel has and lets us use.
fn usable() -> Vec<Congestion> {
    let names = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control").expect("Linux");
    let all = names.split_whitespace().map(|name| name.parse::<Congestion>().expect("a name"));
    all.filter(|congestion| congestion.check().is_ok()).collect()
}

fn words(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

/// Ours, which is with `address`.
fn ours(address: SocketAddr) -> String {
    congestion_of(std::process::id()).remove(&address).expect("a connection of ours")
}

#[test]
fn r7_the_congestion_control_that_was_named_is_on_both_ends_of_a_connection_and_printed() {
    on_both_reactors(|reactor| {
        for congestion in usable() {
            let arg = format!("--congestion={congestion}");
            let args = reactor.config(Ipc::Ring, 1, &[&arg]).args;
            let process = Started::with(&words(&args[1..]));
            assert_eq!(process.value("congestion"), congestion.to_string(), "{}", process.ready);
            let config = ClientConfig { congestion, ..ClientConfig::default() };
            let mut client = Client::connect(process.address(), &config).expect("it listens");
            assert_eq!(&*client.invoke("echo", b"hello").expect("an answer"), b"hello");
            let theirs = congestion_of(process.child.id());
            assert_eq!(theirs.values().map(String::as_str).collect::<Vec<_>>(), [congestion.to_string()]);
            assert_eq!(ours(process.address()), congestion.to_string());
        }
    });
}

#[test]
fn r7_auto_is_reno_on_loopback_and_system_what_the_system_has() {
    let system = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").expect("Linux");
    for (choice, expected) in [("auto", "reno"), ("system", system.trim())] {
        let process = Started::with(&[&format!("--congestion={choice}")]);
        assert_eq!(process.value("congestion"), expected);
        let congestion = choice.parse().expect("a choice");
        let config = ClientConfig { congestion, ..ClientConfig::default() };
        let mut client = Client::connect(process.address(), &config).expect("it listens");
        assert_eq!(&*client.invoke("echo", b"").expect("an answer"), b"");
        assert!(congestion_of(process.child.id()).values().eq([expected]));
        assert_eq!(ours(process.address()), expected);
    }
    // Whatever listens for other hosts, too, has the system's; what connects from this one has reno.
    let key = folder("auto").join("key");
    Secret::new([1; 32]).write_new(&key).expect("a key");
    let process = Started::with(&["--listen=0.0.0.0:0", &format!("--key-file={}", key.display())]);
    assert_eq!(process.value("congestion"), system.trim());
    let client = Client::connect(format!("127.0.0.1:{}", process.address().port()), &alice()).expect("it listens");
    let theirs = congestion_of(process.child.id());
    if theirs.is_empty() {
        println!("skipped: a look into a process with a key: needs CAP_SYS_PTRACE");
    } else {
        assert!(theirs.values().eq(["reno"]), "{theirs:?}");
    }
    drop(client);
    let _ = std::fs::remove_dir_all(key.parent().expect("a folder"));
}

#[test]
fn r7_a_congestion_control_that_is_not_there_is_refused_at_the_start_with_those_that_are() {
    let available = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control").expect("Linux");
    for (name, words) in
        [("no-such", [available.trim(), "--congestion", "`auto`"]), ("", ["`auto`", "`system`", "name"])]
    {
        let output = run_process(&["--worker", &test_worker(), "--congestion", name]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(words.iter().all(|word| said.contains(word)) && !said.contains("panicked"), "{said}");
    }
    let config = ClientConfig { congestion: "no-such".parse().expect("a name"), ..ClientConfig::default() };
    let error = Client::connect("127.0.0.1:9", &config).unwrap_err();
    assert!(matches!(error, ConnectError::Congestion(_)) && error.to_string().contains(available.trim()), "{error}");
}

/// Without the right to more, those that the system does not give to everybody are refused as well.
#[test]
fn r7_a_congestion_control_that_takes_a_privilege_is_refused_without_it() {
    let names = |file: &str| std::fs::read_to_string(format!("/proc/sys/net/ipv4/{file}")).expect("Linux");
    let (available, allowed) = (names("tcp_available_congestion_control"), names("tcp_allowed_congestion_control"));
    let is_allowed = |name: &&str| allowed.split_whitespace().any(|other| other == *name);
    let Some(name) = available.split_whitespace().find(|name| !is_allowed(name)) else {
        return println!("skipped: needs a congestion control that is not allowed to everybody");
    };
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-net_admin", "--inh-caps=-net_admin", &process_program()]);
    let output = command.args(["--worker", &test_worker(), "--congestion", name]).output();
    let said = output.as_ref().map(|output| String::from_utf8_lossy(&output.stderr).into_owned()).unwrap_or_default();
    let Some(2) = output.ok().and_then(|output| output.status.code()) else {
        return println!("skipped: needs setpriv and the right to give up a capability ({said})");
    };
    assert!(said.contains(name) && said.contains(allowed.trim()), "{said}");
}

#[test]
fn r7_peers_use_the_congestion_control_that_was_named_too() {
    let folder = folder("peers");
    let key = folder.join("key");
    Secret::new([1; 32]).write_new(&key).expect("a key");
    let Some(congestion) = usable().into_iter().find(|congestion| congestion.to_string() != "reno") else {
        return println!("skipped: needs another congestion control than reno");
    };
    // No port of 127.78.0.0/16 is given to a client by chance.
    let [.., high, low] = std::process::id().to_be_bytes();
    let addresses = [4001, 4002].map(|port| SocketAddr::from(([127, 78, high, low], port)));
    let start = |who: usize| {
        let peer = format!("--peer={}={}", ["b", "a"][who], addresses[1 - who]);
        let args = [
            format!("--congestion={congestion}"),
            format!("--listen={}", addresses[who]),
            format!("--process={}", ["a", "b"][who]),
            format!("--key-file={}", key.display()),
            "--checks=always".into(),
            "--dial=start".into(),
            peer,
        ];
        Started::with(&words(&args))
    };
    let processes = [start(0), start(1)];
    if sockets_of(processes[0].child.id()).is_empty() {
        return println!("skipped: needs CAP_SYS_PTRACE, to look into a process with a key");
    }
    for process in &processes {
        let is_so = || congestion_of(process.child.id()).values().eq([&congestion.to_string()]);
        wait_until("one connection, paced as was asked for", PATIENCE, is_so);
    }
    std::fs::remove_dir_all(&folder).expect("cleaned up");
}

fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("praas-sockets-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    folder
}

fn alice() -> ClientConfig {
    let credential = Credential::mint(&Secret::new([1; 32]), Role::Client, "alice", unix_s() + 3600).expect("a name");
    ClientConfig { credential: Some(credential), ..ClientConfig::default() }
}

/// `always`, of either end, is for both; `auto` of both is nothing on loopback, and frames of all lengths come through.
#[test]
fn checks_hold_on_loopback_when_either_end_wants_them() {
    on_both_reactors(|reactor| {
        for (process_wants, client_wants) in
            [("auto", Checks::Auto), ("always", Checks::Auto), ("auto", Checks::Always)]
        {
            for keyed in [true, false] {
                let mut config = reactor.config(Ipc::Ring, 1, &["--checks", process_wants]);
                config.key = keyed.then(|| LaunchKey::Pipe(Arc::new(Secret::new([1; 32]))));
                let process = LocalProcess::start(&config).expect("it starts");
                let of_client = if keyed { alice() } else { ClientConfig::default() };
                let mut client = connect_with(&process, &ClientConfig { checks: client_wants, ..of_client });
                let session = client.session();
                let expected = process_wants == "always" || client_wants == Checks::Always;
                assert_eq!((session.payload_checksums, session.send_key.is_some()), (expected, keyed));
                for bytes in [0, 1, 64, 5000, 262_144, 262_145, 3_000_000] {
                    let input = content(1, bytes);
                    assert!(*client.invoke("echo", input.clone()).expect("an answer") == *input, "{bytes} B");
                }
            }
        }
    });
    let refused = run_process(&["--worker", &test_worker(), "--checks", "never"]);
    assert_eq!(refused.status.code(), Some(2));
}
