//! Several processes that are told of each other.
#![allow(clippy::cast_possible_truncation, reason = "numbers are cut to what an address holds on purpose")]

use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use praas_dataplane::{Client, ClientConfig, Ipc, Secret};

use super::{PATIENCE, Reactor, process_program, test_worker, wait_until};

pub(crate) const NAMES: [&str; 12] = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"];
/// Keys in files, and addresses that nobody else has: no port of 127.77.0.0/16 is given to a client by chance.
pub(crate) struct Place {
    pub(crate) folder: PathBuf,
    hosts: u16,
}

impl Place {
    pub(crate) fn new() -> Place {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("praas-peers-{}-{count}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&folder).expect("a folder");
        for key in 1..=2 {
            Secret::new([key; 32]).write_new(&folder.join(key.to_string())).expect("a key");
        }
        Place { folder, hosts: (std::process::id() * 16 + count % 16) as u16 & 0xfff }
    }

    pub(crate) fn address(&self, who: usize) -> SocketAddr {
        let [high, low] = (self.hosts * 16 + who as u16).to_be_bytes();
        SocketAddr::from((Ipv4Addr::new(127, 77, high, low), 4000))
    }

    pub(crate) fn key(&self, number: u8) -> String {
        self.folder.join(number.to_string()).display().to_string()
    }

    /// Starts one process that is told of these, by name and address, dials them at once, and does not wait for it.
    pub(crate) fn start(&self, reactor: Reactor, who: usize, told: &[(&str, SocketAddr)]) -> Node {
        self.start_with(reactor, who, told, &["--workers=1", "--dial=start"])
    }

    /// The same with further arguments.
    pub(crate) fn start_with(&self, reactor: Reactor, who: usize, told: &[(&str, SocketAddr)], args: &[&str]) -> Node {
        Node::start_with(reactor, NAMES[who], self.address(who), &self.key(1), told, args)
    }

    /// Starts two with these arguments, that are told of each other, and waits until they are joined.
    pub(crate) fn start_pair(&self, reactor: Reactor, args: &[&str]) -> [Node; 2] {
        let nodes = [0, 1].map(|who: usize| {
            let told = [(NAMES[1 - who], self.address(1 - who))];
            let node = self.start_with(reactor, who, &told, &[args, &["--dial=start"]].concat());
            node.wait_ready();
            node
        });
        nodes[0].wait_up("b");
        nodes[1].wait_up("a");
        nodes
    }

    /// Connects to one that was started with `--plaintext`, once it is ready.
    pub(crate) fn client(&self, who: usize) -> Client {
        Client::connect(self.address(who), &ClientConfig::default()).expect("it answers")
    }

    /// Starts one of `count`, that are told of each other.
    pub(crate) fn start_of(&self, reactor: Reactor, who: usize, count: usize) -> Node {
        let others = (0..count).filter(|other| *other != who);
        let told: Vec<_> = others.map(|other| (NAMES[other], self.address(other))).collect();
        self.start(reactor, who, &told)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// A process, and what it has said.
pub(crate) struct Node {
    pub(crate) child: Child,
    pub(crate) log: Arc<Mutex<Vec<String>>>,
}

impl Node {
    pub(crate) fn start(
        reactor: Reactor,
        name: &str,
        listen: SocketAddr,
        key: &str,
        told: &[(&str, SocketAddr)],
    ) -> Node {
        Node::start_with(reactor, name, listen, key, told, &["--workers=1", "--dial=start"])
    }

    pub(crate) fn start_with(
        reactor: Reactor,
        name: &str,
        listen: SocketAddr,
        key: &str,
        told: &[(&str, SocketAddr)],
        args: &[&str],
    ) -> Node {
        // The kernel lets go of a killed process's listener a little after it is gone.
        wait_until("the address is free", PATIENCE, || TcpListener::bind(listen).is_ok());
        let mut command = Command::new(process_program());
        command.args(reactor.config(Ipc::Ring, 1, &[]).args.iter().filter(|arg| !arg.starts_with("--log")));
        command.args(["--log=info", "--worker", &test_worker(), "--process", name, "--key-file", key]);
        command.arg(format!("--listen={listen}")).args(args);
        command.args(told.iter().map(|(name, address)| format!("--peer={name}={address}")));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("it starts");
        let log: Arc<Mutex<Vec<String>>> = Arc::default();
        let outputs: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().expect("piped")), Box::new(child.stderr.take().expect("piped"))];
        for output in outputs {
            let log = Arc::clone(&log);
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    log.lock().unwrap().push(line);
                }
            });
        }
        Node { child, log }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How often it said something with these words.
    pub(crate) fn said(&self, words: &str) -> usize {
        self.log.lock().unwrap().iter().filter(|line| line.contains(words)).count()
    }

    /// Whether the last it said of a peer is that it is up.
    pub(crate) fn is_up(&self, peer: &str) -> bool {
        let of_it = format!("peer={peer} state=");
        let log = self.log.lock().unwrap();
        let last = log.iter().rev().find_map(|line| line.split_once(&of_it));
        last.is_some_and(|(_, state)| state.starts_with("up"))
    }

    pub(crate) fn wait_up(&self, peer: &str) {
        wait_until(&format!("{peer} is up: {:#?}", self.log.lock().unwrap()), PATIENCE, || self.is_up(peer));
    }

    pub(crate) fn wait_ready(&self) {
        wait_until("it is ready", PATIENCE, || self.said("ready process=") == 1);
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("---- log of {}:\n{}", self.pid(), self.log.lock().unwrap().join("\n"));
        }
    }
}
