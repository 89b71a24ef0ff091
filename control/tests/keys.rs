//! `praas key` and `praas token` as programs.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output};

use praas_dataplane::{Credential, Role, Secret};

fn praas(folder: &Path, arguments: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_praas"));
    command.current_dir(folder).args(arguments.split_whitespace()).output().expect("praas runs")
}

#[test]
fn a5_keys_and_tokens_are_private_files_that_are_never_overwritten_or_printed() {
    let folder = std::env::temp_dir().join(format!("praas-keys-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let token = "token --key-file app.key --role client --subject alice --expires 30d --out alice.token";
    for (arguments, file) in [("key new app.key", "app.key"), (token, "alice.token")] {
        let output = praas(&folder, arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stdout.is_empty() && output.stderr.is_empty(), "nothing is printed");
        let path = folder.join(file);
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        let before = std::fs::read(&path).unwrap();
        let output = praas(&folder, arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(file) && said.lines().count() == 1, "{said}");
        assert_eq!(std::fs::read(&path).unwrap(), before, "not overwritten");
    }
    let read = Credential::from_file(&folder.join("alice.token")).unwrap();
    assert_eq!((read.role(), read.subject()), (Role::Client, "alice"));
    let month = 30 * 86_400;
    assert!(read.expires_unix_s().abs_diff(praas_dataplane::clock::unix_s() + month) < 60);
    Secret::from_file(&folder.join("app.key")).unwrap();

    std::fs::set_permissions(folder.join("app.key"), PermissionsExt::from_mode(0o644)).unwrap();
    let output = praas(&folder, &token.replace("alice.token", "bob.token"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("chmod 600 app.key"), "{said}");
    for wrong in ["--role root", "--expires soon"] {
        let (flag, _) = wrong.split_once(' ').unwrap();
        let value = token.split_once(flag).unwrap().1.split_whitespace().next().unwrap();
        let output = praas(&folder, &token.replace(&format!("{flag} {value}"), wrong));
        assert_eq!(output.status.code(), Some(2), "{wrong}");
    }
    std::fs::remove_dir_all(&folder).unwrap();
}
