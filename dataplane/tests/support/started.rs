//! A process started by hand, to see all it says.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

use praas_dataplane::{Client, ClientConfig};

use super::{content, process_program, signal, test_worker};

pub(crate) struct Started {
    pub(crate) child: Child,
    /// Its first line on stdout.
    pub(crate) ready: String,
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Started {
    pub(crate) fn with(args: &[&str]) -> Started {
        Started::of(&mut Command::new(process_program()), args)
    }

    /// By a command that starts `praas-process` with what is added to it.
    pub(crate) fn of(command: &mut Command, args: &[&str]) -> Started {
        command.args(["--worker", &test_worker(), "--workers", "1", "--log", "info"]).args(args);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        let mut ready = String::new();
        let _ = BufReader::new(child.stdout.take().expect("piped")).read_line(&mut ready);
        Started { child, ready }
    }

    pub(crate) fn value(&self, key: &str) -> &str {
        let mut values = self.ready.split_whitespace().filter_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        values.next().unwrap_or_default()
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.value("listen").parse().expect("a ready line")
    }

    pub(crate) fn serves(&self) {
        let mut client = Client::connect(self.value("listen"), &ClientConfig::default()).expect("it listens");
        for bytes in [0, 100, 1 << 20] {
            let input = content(1, bytes);
            assert!(*client.invoke("echo", input.clone()).expect("an answer") == *input);
        }
    }

    /// Ends it; returns its exit code and what it said on stderr.
    pub(crate) fn end(mut self) -> (Option<i32>, String) {
        signal(self.child.id(), 15);
        let mut said = String::new();
        let _ = self.child.stderr.take().expect("piped").read_to_string(&mut said);
        (self.child.wait().expect("it ends").code(), said)
    }
}
