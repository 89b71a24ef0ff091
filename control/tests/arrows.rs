//! The architecture's arrows point down, and no other arrow exists between our crates.
//!
//! Asks `cargo metadata` for what every member of the workspace depends on, development and build dependencies
//! included: a test that reaches upwards ties the layers together as firmly as code does.

use serde_json::Value;
use std::process::Command;

/// What each crate may depend on, of ours.
const ARROWS: &[(&str, &[&str])] = &[
    ("praas-shm", &[]),
    ("praas-transport", &["praas-shm"]),
    ("praas-dataplane", &["praas-transport", "praas-shm"]),
    ("praas-control", &["praas-dataplane"]),
    ("praas-microbench", &["praas-control", "praas-dataplane"]),
    ("praas-examples", &["praas-dataplane"]),
];

/// One dependency between two crates of the workspace.
type Arrow = (String, String);

/// Complains about each arrow that is not allowed, and about crates nobody has given a place yet.
fn complaints(members: &[String], arrows: &[Arrow]) -> Vec<String> {
    let allowed = |from: &str| ARROWS.iter().find(|(name, _)| *name == from).map(|(_, to)| *to);
    let homeless = members
        .iter()
        .filter(|member| allowed(member).is_none())
        .map(|member| format!("{member} is in the workspace and not in ARROWS: say what it may depend on"));
    let upward = arrows.iter().filter_map(|(from, to)| {
        let below = allowed(from)?;
        (!below.contains(&to.as_str())).then(|| format!("{from} must not depend on {to}; of ours it may use {below:?}"))
    });
    homeless.chain(upward).collect()
}

/// Members of the workspace, and the arrows between them, read from the output of `cargo metadata`.
fn read(metadata: &Value) -> (Vec<String>, Vec<Arrow>) {
    let packages = metadata["packages"].as_array().expect("packages");
    let text = |value: &Value| value.as_str().expect("a string").to_owned();
    let members: Vec<String> = packages.iter().map(|package| text(&package["name"])).collect();
    let arrows = packages
        .iter()
        .flat_map(|package| {
            let dependencies = package["dependencies"].as_array().expect("dependencies");
            dependencies.iter().map(|dependency| (text(&package["name"]), text(&dependency["name"])))
        })
        .filter(|(_, to)| members.contains(to))
        .collect();
    (members, arrows)
}

#[test]
fn arrows_point_down() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    let (members, arrows) = read(&metadata);
    assert!(arrows.len() >= 5, "cargo metadata shows the arrows we know of: {arrows:?}");
    let complaints = complaints(&members, &arrows);
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

/// The check above is worth nothing if it cannot fail.
#[test]
fn an_upward_arrow_a_skipped_layer_and_an_unknown_crate_are_found() {
    let package = |name: &str, dependencies: &[&str]| {
        let dependencies: Vec<Value> = dependencies.iter().map(|name| serde_json::json!({ "name": name })).collect();
        serde_json::json!({ "name": name, "dependencies": dependencies })
    };
    let metadata = serde_json::json!({ "packages": [
        package("praas-shm", &["libc", "praas-dataplane"]),
        package("praas-dataplane", &["praas-shm", "mio"]),
        package("praas-examples", &["praas-dataplane", "praas-shm"]),
        package("praas-newcomer", &[]),
    ]});
    let (members, arrows) = read(&metadata);
    let complaints = complaints(&members, &arrows);
    assert_eq!(complaints.len(), 3, "{complaints:#?}");
    assert!(complaints.iter().any(|line| line.starts_with("praas-newcomer is in the workspace")));
    assert!(complaints.iter().any(|line| line.starts_with("praas-shm must not depend on praas-dataplane")));
    assert!(complaints.iter().any(|line| line.starts_with("praas-examples must not depend on praas-shm")));
}
