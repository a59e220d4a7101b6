// SPDX-License-Identifier: GPL-2.0

//! `pristine key …`, `pristine channel …`, and signed releases, as scripts use them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const USAGE: i32 = 2;
const NOT_FOUND: i32 = 3;
const DAMAGED: i32 = 4;
const DENIED: i32 = 9;
const EXISTS: i32 = 11;
const UNTRUSTED: i32 = 15;

struct Lab(tempfile::TempDir);

impl Lab {
    fn new() -> Self {
        Lab(tempfile::tempdir().unwrap())
    }

    /// With a built image and the keys a and b, which have no passwords.
    fn with_image() -> Self {
        let lab = Lab::new();
        let content: Vec<u8> = (0..1u32 << 20)
            .map(|n| (n.wrapping_mul(n) >> 9) as u8)
            .collect();
        fs::write(lab.path("disk.img"), content).unwrap();
        lab.json(&["image", "build", "disk.img", "-o", "disk.pri"]);
        for key in ["a", "b"] {
            lab.json(&["key", "new", key, "--no-password"]);
        }
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .args(args)
            .current_dir(self.0.path())
            .stdin(Stdio::null())
            .env_remove("PRISTINE_KEY_PASSWORD");
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        // In a session of its own: without a terminal that could be asked.
        let args = [&["--wait", env!("CARGO_BIN_EXE_pristine")], args].concat();
        self.command("setsid", &args).output().unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.run(&[args, &["--json"]].concat());
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {errors}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn text(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn fails(&self, args: &[&str], code: i32, text: &str) {
        let output = self.run(args);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {errors}");
        assert!(errors.contains(text), "{args:?}: {errors}");
        assert!(output.stdout.is_empty());
    }

    fn minisign(&self, args: &[&str]) -> bool {
        let output = self.command("minisign", args).output().unwrap();
        output.status.success()
    }

    /// Publishes the image, with these arguments as well.
    fn publish(&self, channel: &str, more: &[&str]) -> Value {
        let publish = ["image", "publish", "disk.pri", "store", "--channel"];
        self.json(&[&publish[..], &[channel], more].concat())
    }
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
    assert!(lab.minisign(&["-Vm", "file", "-p", "locked.pub"]));
    let output = lab
        .command(env!("CARGO_BIN_EXE_pristine"), &sign)
        .env("PRISTINE_KEY_PASSWORD", "right")
        .output();
    assert!(output.unwrap().status.success());
}

#[test]
fn files_are_signed_and_verified_as_minisign_does() {
    let lab = Lab::with_image();
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
    assert!(lab.minisign(&["-Vm", "file", "-p", "a.pub"]));
    assert!(!lab.minisign(&["-Vm", "file", "-p", "b.pub"]));
    let verified = lab.json(&["key", "verify", "file", "--public", "a.pub"]);
    assert_eq!(verified["comment"], "hello");
    let verify_b = ["key", "verify", "file", "--public", "b.pub"];
    lab.fails(&verify_b, UNTRUSTED, "is not trusted");
    assert!(lab.minisign(&["-GW", "-p", "m.pub", "-s", "m.key"]));
    assert!(lab.minisign(&["-Sm", "file", "-s", "m.key"]));
    lab.json(&["key", "verify", "file", "--public", "m.pub"]);
    fs::write(lab.path("file"), "other").unwrap();
    let verify = ["key", "verify", "file", "--public", "m.pub"];
    lab.fails(&verify, UNTRUSTED, "signature by key");
    fs::write(lab.path("file.minisig"), "rubbish").unwrap();
    lab.fails(&verify, DAMAGED, "not a signature");
}

#[test]
fn trusted_keys_are_managed() {
    let lab = Lab::with_image();
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
    let lab = Lab::with_image();
    lab.publish("plain", &[]);
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
    lab.publish("stable", &["--dry-run", "--key", "a.key"]);
    let published = lab.publish("stable", &["--key", "a.key", "--expires", "30d"]);
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
    let publish = [
        "image",
        "publish",
        "disk2.pri",
        "store",
        "--channel",
        "stable",
    ];
    lab.fails(&publish, USAGE, "sign it");

    // Rotation.
    let both = ["--key", "a.key", "--key", "b.key", "--oldest", "2"];
    assert_eq!(lab.publish("stable", &both)["generation"], 2);
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
    assert!(lab.minisign(&["-Vm", "release", "-p", "a.pub"]));
    let second = ["-Vm", "release", "-x", "release.2.minisig", "-p", "b.pub"];
    assert!(lab.minisign(&second));
    let first = [&export[..], &["--generation", "1"]].concat();
    assert_eq!(lab.json(&first)["generation"], 1);
    assert!(lab.minisign(&["-Vm", "release", "-p", "a.pub"]));
}
