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

/// Runs `praas` in a folder from a shell that takes `umask` first.
fn praas_under(umask: &str, folder: &Path, arguments: &str) -> Output {
    let command = format!("umask {umask} && exec \"$0\" {arguments}");
    let mut shell = Command::new("sh");
    shell.current_dir(folder).args(["-c", &command, env!("CARGO_BIN_EXE_praas")]).output().expect("sh runs")
}

const TOKEN: &str = "token --key-file app.key --role client --subject alice --expires 30d --out";

#[test]
fn a6_keys_and_tokens_have_mode_0600_whatever_the_umask() {
    let folder = std::env::temp_dir().join(format!("praas-umask-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    praas(&folder, "key new app.key");
    for umask in ["000", "077", "777"] {
        for (arguments, file) in [("key new", "new.key"), (TOKEN, "new.token")] {
            let output = praas_under(umask, &folder, &format!("{arguments} {file}"));
            assert!(output.status.success(), "{umask}: {}", String::from_utf8_lossy(&output.stderr));
            let path = folder.join(file);
            let mode = std::fs::metadata(&path).unwrap().mode() & 0o7777;
            assert_eq!(mode, 0o600, "{file} under umask {umask}: {mode:04o}");
            std::fs::remove_file(path).unwrap();
        }
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

/// Links of every sort under the name that is to be written, of ours and, where we may act for them, of somebody else.
#[test]
fn a7_what_was_planted_under_the_name_of_a_key_or_token_is_neither_followed_nor_overwritten() {
    use std::os::unix::fs::{lchown, symlink};
    let folder = std::env::temp_dir().join(format!("praas-planted-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    praas(&folder, "key new app.key");
    let (target, name, missing) = (folder.join("target"), folder.join("planted"), folder.join("missing"));
    std::fs::write(&target, b"untouched").unwrap();
    std::fs::set_permissions(&target, PermissionsExt::from_mode(0o644)).unwrap();
    let plants: [&dyn Fn() -> std::io::Result<()>; 4] =
        [&|| symlink(&target, &name), &|| symlink(&missing, &name), &|| std::fs::hard_link(&target, &name), &|| {
            std::fs::write(&name, b"of before")
        }];
    for (plant, arguments) in plants.iter().flat_map(|plant| ["key new", TOKEN].map(|arguments| (plant, arguments))) {
        for owner in [None, Some(65_534)] {
            plant().unwrap();
            if owner.is_some() && lchown(&name, owner, None).is_err() {
                println!("skipped: planting as somebody else: needs root");
                std::fs::remove_file(&name).unwrap();
                continue;
            }
            let before = std::fs::read(&name).ok();
            let output = praas(&folder, &format!("{arguments} planted"));
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(1), "{said}");
            assert!(said.contains("cannot make planted") && said.lines().count() == 1, "{said}");
            assert_eq!(std::fs::read(&name).ok(), before);
            assert!(!missing.exists(), "a link was followed");
            std::fs::remove_file(&name).unwrap();
        }
    }
    assert_eq!(std::fs::read(&target).unwrap(), b"untouched");
    assert_eq!(std::fs::metadata(&target).unwrap().mode() & 0o7777, 0o644);
    // The key that is read for a token: nobody's link, nobody else's file.
    symlink(folder.join("app.key"), folder.join("link.key")).unwrap();
    let output = praas(&folder, &format!("{TOKEN} link.token").replace("app.key", "link.key"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("link.key is not a regular file"), "{said}");
    assert!(!folder.join("link.token").exists());
    std::fs::remove_dir_all(&folder).unwrap();
}
