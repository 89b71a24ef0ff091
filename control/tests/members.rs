//! `praas members` as a program, against real processes (conformance R4).

use std::path::Path;
use std::process::{Command, Output};

use praas_dataplane::{LaunchConfig, LaunchKey, LocalProcess};

fn praas(folder: &Path, arguments: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_praas"));
    command.current_dir(folder).args(arguments.split_whitespace()).output().expect("praas runs")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn r4_each_process_is_told_and_each_that_is_not_is_named() {
    let folder = std::env::temp_dir().join(format!("praas-members-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    for arguments in [
        "key new app.key",
        "token --key-file app.key --role control --subject me --expires 1h --out control.token",
        "token --key-file app.key --role client --subject me --expires 1h --out client.token",
    ] {
        assert!(praas(&folder, arguments).status.success());
    }
    let start = |name: &str| {
        let config = LaunchConfig {
            worker: vec![program("praas-worker")],
            workers: 1,
            key: Some(LaunchKey::File(folder.join("app.key"))),
            args: vec![format!("--process={name}"), "--log=error".into()],
            quiet: true,
            ..LaunchConfig::default()
        };
        LocalProcess::start(&config).expect("it starts")
    };
    let (a, b) = (start("a"), start("b"));
    let table = |generation: u64, rest: &str| {
        let text = format!("praas-members 1\ngeneration {generation}\na active {}\n{rest}", a.addr());
        std::fs::write(folder.join("members"), text).expect("written");
    };
    table(1, &format!("b active {}\n", b.addr()));
    let both = format!("members --credential control.token members {} {}", a.addr(), b.addr());
    let output = praas(&folder, &both);
    assert!(output.status.success() && output.stderr.is_empty(), "{}", said(&output));
    // Again: both have it.
    let output = praas(&folder, &both);
    assert_eq!((output.status.code(), said(&output).matches("generation 1 is not newer than 1").count()), (Some(1), 2));
    // One of the two contradicts it, and is named; the other has it.
    table(2, "b stopped\n");
    let output = praas(&folder, &both);
    let one = said(&output);
    assert_eq!((output.status.code(), one.lines().count()), (Some(1), 1), "{one}");
    assert!(one.contains(&format!("{}: the process refuses the table: line 4: `b`", b.addr())), "{one}");
    let output = praas(&folder, &both.replace("control.token", "client.token"));
    assert_eq!((output.status.code(), said(&output).matches("--role control").count()), (Some(1), 2));
    for (arguments, code, words) in [
        ("members --credential control.token nothing 127.0.0.1:1", 1, "cannot read nothing"),
        ("members --credential app.key members 127.0.0.1:1", 1, "app.key is not a credential"),
        ("members --credential control.token members 127.0.0.1:1", 1, "cannot connect to 127.0.0.1:1"),
        ("members --credential control.token members", 2, "HOST:PORT"),
    ] {
        let output = praas(&folder, arguments);
        assert!(output.status.code() == Some(code) && said(&output).contains(words), "{arguments}: {}", said(&output));
    }
    table(3, "b asleep\n");
    let output = praas(&folder, &both);
    assert!(
        output.status.code() == Some(1) && said(&output).contains("members: line 4: `asleep`"),
        "{}",
        said(&output)
    );
    std::fs::remove_dir_all(&folder).expect("cleaned up");
}

/// A program of another crate, beside the one that runs.
fn program(name: &str) -> String {
    let found = praas_dataplane::launch::program_beside_us(name);
    found.expect("`cargo build --workspace --bins` has been run").display().to_string()
}
