// SPDX-License-Identifier: GPL-2.0

//! `pristine key …`, `pristine channel …`, and signed releases, as scripts use them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;

use common::{Lab, DAMAGED, DENIED, EXISTS, NOT_FOUND, UNTRUSTED, USAGE};
use serde_json::Value;

/// A directory with a built image and the keys a and b, which have no passwords.
fn with_image() -> Lab {
    let lab = Lab::with_disk(1 << 20);
    lab.json(&["image", "build", "disk.img", "-o", "disk.pri"]);
    for key in ["a", "b"] {
        lab.json(&["key", "new", key, "--no-password"]);
    }
    lab
}

fn minisign(lab: &Lab, args: &[&str]) -> bool {
    let output = lab.program("minisign", args).output().unwrap();
    output.status.success()
}

/// Publishes the image, with these arguments as well.
fn publish(lab: &Lab, channel: &str, more: &[&str]) -> Value {
    let publish = ["image", "publish", "disk.pri", "store", "--channel"];
    lab.json(&[&publish[..], &[channel], more].concat())
}

#[test]
fn keys_are_made_and_kept() {
    let lab = Lab::new();
    let made = lab.json(&["key", "new", "plain", "--no-password"]);
    let mode = |name: &str| lab.path(name).metadata().unwrap().permissions().mode();
    assert_eq!(mode("plain.key") & 0o777, 0o600);
    assert!(made["public"].as_str().unwrap().starts_with("RW"));
    lab.fails(
        &["key", "new", "plain", "--no-password"],
        EXISTS,
        "not overwritten",
    );
    lab.fails(&["key", "new", "other"], USAGE, "no terminal");
    assert!(!lab.path("other.key").exists());
    fs::write(lab.path("password"), "right\n").unwrap();
    lab.json(&["key", "new", "locked", "--password-file", "password"]);
    fs::write(lab.path("file"), "text").unwrap();
    let sign = ["key", "sign", "file", "--key", "locked.key"];
    lab.fails(&sign, USAGE, "--password-file");
    fs::write(lab.path("wrong"), "wrong\n").unwrap();
    let with = |file| [&sign[..], &["--password-file", file]].concat();
    lab.fails(&with("wrong"), DENIED, "wrong password");
    lab.json(&with("password"));
    assert!(minisign(&lab, &["-Vm", "file", "-p", "locked.pub"]));
    let output = lab
        .command(&sign)
        .env("PRISTINE_KEY_PASSWORD", "right")
        .output();
    assert!(output.unwrap().status.success());
}

#[test]
fn files_are_signed_and_verified_as_minisign_does() {
    let lab = with_image();
    fs::write(lab.path("file"), "text").unwrap();
    lab.json(&[
        "key",
        "sign",
        "file",
        "--key",
        "a.key",
        "--comment",
        "hello",
    ]);
    assert!(minisign(&lab, &["-Vm", "file", "-p", "a.pub"]));
    assert!(!minisign(&lab, &["-Vm", "file", "-p", "b.pub"]));
    let verified = lab.json(&["key", "verify", "file", "--public", "a.pub"]);
    assert_eq!(verified["comment"], "hello");
    let verify_b = ["key", "verify", "file", "--public", "b.pub"];
    lab.fails(&verify_b, UNTRUSTED, "is not trusted");
    assert!(minisign(&lab, &["-GW", "-p", "m.pub", "-s", "m.key"]));
    assert!(minisign(&lab, &["-Sm", "file", "-s", "m.key"]));
    lab.json(&["key", "verify", "file", "--public", "m.pub"]);
    fs::write(lab.path("file"), "other").unwrap();
    let verify = ["key", "verify", "file", "--public", "m.pub"];
    lab.fails(&verify, UNTRUSTED, "signature by key");
    fs::write(lab.path("file.minisig"), "rubbish").unwrap();
    lab.fails(&verify, DAMAGED, "not a signature");
}

#[test]
fn trusted_keys_are_managed() {
    let lab = with_image();
    let keys = ["--trusted-keys", "keys"];
    let run = |args: &[&str]| lab.json(&[&["key"], args, &keys[..]].concat());
    lab.fails(
        &["key", "list", "--trusted-keys", "keys"],
        NOT_FOUND,
        "no keys",
    );
    let a = run(&["trust", "a.pub"]);
    assert_eq!((&a["label"], &a["unchanged"]), (&"a".into(), &false.into()));
    assert_eq!(run(&["trust", "a.pub"])["unchanged"], true);
    let public = fs::read_to_string(lab.path("b.pub")).unwrap();
    let word = public.lines().nth(1).unwrap();
    run(&["trust", word, "--label", "mill"]);
    let list = run(&["list"]);
    let labels: Vec<&Value> = list["keys"].as_array().unwrap().iter().collect();
    assert_eq!(
        (&labels[0]["label"], &labels[1]["label"]),
        (&"a".into(), &"mill".into())
    );
    run(&["trust", "mill", "--remove"]);
    run(&["trust", a["key"].as_str().unwrap(), "--remove"]);
    assert_eq!(fs::read_dir(lab.path("keys")).unwrap().count(), 0);
    let with_keys = |args: &[&'static str]| [args, &keys[..]].concat();
    let remove = with_keys(&["key", "trust", "mill", "--remove"]);
    lab.fails(&remove, NOT_FOUND, "no trusted key");
    lab.fails(&with_keys(&["key", "trust", "a.key"]), USAGE, "secret key");
    let path = with_keys(&["key", "trust", "a.pub", "--label", "../x"]);
    lab.fails(&path, USAGE, "cannot be the label");
}

#[test]
fn releases_are_signed_and_checked() {
    let lab = with_image();
    publish(&lab, "plain", &[]);
    // A dry run looks for the keys, too.
    let dry = [
        "image",
        "publish",
        "disk.pri",
        "store",
        "--channel",
        "stable",
    ];
    let key = |name| [&dry[..], &["--dry-run", "--key", name]].concat();
    lab.fails(&key("none.key"), NOT_FOUND, "none.key");
    lab.fails(&key("a.pub"), USAGE, "a.pub");
    publish(&lab, "stable", &["--dry-run", "--key", "a.key"]);
    let published = publish(&lab, "stable", &["--key", "a.key", "--expires", "30d"]);
    assert_eq!(published["generation"], 1);
    assert_eq!(published["signed_by"].as_array().unwrap().len(), 1);
    for key in ["a", "b"] {
        let file = format!("{key}.pub");
        lab.json(&["key", "trust", &file, "--trusted-keys", key]);
    }
    let verify = ["image", "verify", "store", "stable", "--trusted-keys"];
    let with = |keys| [&verify[..], &[keys]].concat();
    let verified = lab.json(&with("a"));
    assert_eq!(
        verified["images"][0]["signed_by"].as_array().unwrap().len(),
        1
    );
    lab.fails(&with("b"), UNTRUSTED, "trusted keys: ");
    lab.fails(
        &["image", "verify", "store", "plain", "--trusted-keys", "a"],
        UNTRUSTED,
        "it is not signed",
    );
    let image = published["image"].as_str().unwrap();
    lab.json(&["image", "verify", "store", image, "--trusted-keys", "a"]);
    // What is promoted must be trusted, and what was signed stays so.
    let promote = ["image", "publish", "store", "store", "--image", "plain"];
    let promote = [&promote[..], &["--channel", "stable"]].concat();
    let again = [&promote[..], &["--trusted-keys", "a", "--key", "a.key"]].concat();
    lab.fails(&again, UNTRUSTED, "it is not signed");
    fs::write(lab.path("disk2.img"), vec![7; 1 << 20]).unwrap();
    lab.json(&["image", "build", "disk2.img", "-o", "disk2.pri"]);
    let other = ["image", "publish", "disk2.pri", "store", "--channel"];
    lab.fails(&[&other[..], &["stable"]].concat(), USAGE, "sign it");

    // Rotation.
    let both = ["--key", "a.key", "--key", "b.key", "--oldest", "2"];
    assert_eq!(publish(&lab, "stable", &both)["generation"], 2);
    for keys in ["a", "b"] {
        lab.json(&with(keys));
    }
    lab.fails(
        &[
            "image",
            "publish",
            "disk.pri",
            "store",
            "--channel",
            "x",
            "--key",
            "a.key",
            "--key",
            "a.key",
        ],
        USAGE,
        "given twice",
    );
    let history = lab.json(&["channel", "list", "store", "stable", "--trusted-keys", "b"]);
    let releases = history["releases"].as_array().unwrap();
    assert_eq!(releases.len(), 2);
    assert_eq!(
        (&releases[0]["generation"], &releases[0]["oldest"]),
        (&2.into(), &2.into())
    );
    let trusted: Vec<&Value> = releases[0]["signed_by"]
        .as_array()
        .unwrap()
        .iter()
        .collect();
    assert_eq!(
        (&trusted[0]["trusted"], &trusted[1]["trusted"]),
        (&false.into(), &true.into())
    );
    assert_eq!(trusted[1]["label"], "b");
    assert!(releases[1]["untrusted"]
        .as_str()
        .unwrap()
        .contains("not trusted"));
    let list = lab.text(&["image", "list", "store", "--trusted-keys", "b"]);
    assert!(
        list.contains("not trusted: plain: it is not signed"),
        "{list}"
    );
    lab.fails(
        &["channel", "list", "store", "none"],
        NOT_FOUND,
        "channel none",
    );

    // As files, for minisign.
    let export = [
        "channel",
        "export-release",
        "store",
        "stable",
        "-o",
        "release",
    ];
    let files = lab.json(&export);
    assert_eq!(files["signature_files"].as_array().unwrap().len(), 2);
    assert!(minisign(&lab, &["-Vm", "release", "-p", "a.pub"]));
    let second = ["-Vm", "release", "-x", "release.2.minisig", "-p", "b.pub"];
    assert!(minisign(&lab, &second));
    let first = [&export[..], &["--generation", "1"]].concat();
    assert_eq!(lab.json(&first)["generation"], 1);
    assert!(minisign(&lab, &["-Vm", "release", "-p", "a.pub"]));
}
