// SPDX-License-Identifier: GPL-2.0

//! Encrypted images as an administrator uses them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::process::Command;

use common::{bytes_of, words, Lab, EXISTS, NO_KEY, USAGE};
use pristine_testkit::noise;

#[test]
fn from_keys_to_export_and_rewrap() {
    let lab = Lab::new();
    let mut one = noise(1, 6 << 20);
    fs::write(lab.path("one.img"), &one).unwrap();
    one[..4096].copy_from_slice(&noise(2, 4096));
    fs::write(lab.path("two.img"), &one).unwrap();
    for name in ["one", "two"] {
        lab.json(&words(&format!("image build {name}.img -o {name}.pri")));
    }
    // Our identity, and one of age-keygen's.
    let made = lab.json(&words("key new --age mine"));
    let mine = made["recipient"].as_str().unwrap().to_owned();
    let keygen = Command::new("age-keygen")
        .arg("-o")
        .arg(lab.path("theirs"))
        .status()
        .unwrap();
    assert!(keygen.success());
    let theirs = Command::new("age-keygen")
        .arg("-y")
        .arg(lab.path("theirs"))
        .output()
        .unwrap();
    let theirs = String::from_utf8(theirs.stdout).unwrap().trim().to_owned();
    lab.fails(&words("key new --age mine"), EXISTS, "mine");
    // What a dry run says is what is sent.
    let to = format!("image publish one.pri store --channel lab --encrypt-to {mine}");
    let would = lab.json(&words(&format!("{to} --dry-run")));
    assert!(!lab.path("store").exists());
    let did = lab.json(&words(&to));
    assert_eq!(would["sent_bytes"], did["sent_bytes"]);
    let stored = bytes_of(&lab.path("store/packs")) + bytes_of(&lab.path("store/images"));
    assert_eq!(did["sent_bytes"], stored);
    let id = did["image"].as_str().unwrap();
    assert!(!lab.path(&format!("one.pri/images/{id}.manifest")).exists());
    // Reading it.
    lab.json(&words(
        "image export store out.img --image lab --identity mine",
    ));
    assert_eq!(
        fs::read(lab.path("out.img")).unwrap(),
        fs::read(lab.path("one.img")).unwrap()
    );
    for arguments in [
        "image export store no.img --image lab",
        "image show store lab --identity theirs",
    ] {
        lab.fails(&words(arguments), NO_KEY, &mine);
        lab.fails(&words(arguments), NO_KEY, "rewrap");
    }
    assert!(!lab.path("no.img").exists());
    assert!(lab.json(&words("image list store"))["images"][0]["encrypted"].is_string());
    assert_eq!(
        lab.json(&words("image list store --identity mine"))["images"][0]["name"],
        "one"
    );
    for (options, checked) in [("", false), ("--identity mine", true)] {
        let verified = lab.json(&words(&format!("image verify store {options}")));
        assert_eq!(verified["ok"], true);
        assert_eq!(verified["images"][0]["content_checked"], checked);
    }
    lab.json(&words("image pin store lab --name kept"));
    lab.json(&words("image gc store --grace 0"));
    // The channel stays encrypted, shares blocks, and has a delta.
    let plain = words("image publish two.pri store --channel lab");
    lab.fails(&plain, NO_KEY, "--unencrypted");
    let two = lab.json(&words(
        "image publish two.pri store --channel lab --identity mine --delta-level 3",
    ));
    assert!(two["sent_bytes"].as_u64().unwrap() < 1 << 20, "{two}");
    assert!(two["delta_bytes"].as_u64().unwrap() > 0);
    assert_eq!(two["encrypted"], did["encrypted"]);
    let diff = lab.json(&words(&format!(
        "image diff store {id} lab --identity mine"
    )));
    assert!(diff.to_string().contains("changed"), "{diff}");
    fs::copy(lab.path("one.img"), lab.path("disk.img")).unwrap();
    lab.json(&words(&format!(
        "image apply store disk.img --image lab --from {id} --identity mine"
    )));
    assert_eq!(
        fs::read(lab.path("disk.img")).unwrap(),
        fs::read(lab.path("two.img")).unwrap()
    );
    // What looks after a store takes no key, and the disk is known without --from.
    lab.json(&words("image promote store lab --channel stable"));
    fs::copy(lab.path("one.img"), lab.path("disk2.img")).unwrap();
    for method in ["delta", "none"] {
        let apply = "image apply store disk2.img --image lab --identity mine";
        assert_eq!(lab.json(&words(apply))["method"], method);
    }
    // Somebody else, without anything being encrypted again; and then not any more.
    let packs = bytes_of(&lab.path("store/packs"));
    let rewrap = format!("image rewrap store --encrypt-to {theirs}");
    lab.fails(&words(&rewrap), NO_KEY, "no identity");
    let added = lab.json(&words(&format!(
        "image rewrap store --encrypt-to {theirs} --identity mine"
    )));
    assert_eq!(added["keys"][0]["added"][0], theirs.as_str());
    assert_eq!(bytes_of(&lab.path("store/packs")), packs);
    lab.json(&words(
        "image export store out2.img --image stable --identity theirs",
    ));
    assert_eq!(
        fs::read(lab.path("out2.img")).unwrap(),
        fs::read(lab.path("two.img")).unwrap()
    );
    lab.json(&words(&format!(
        "image rewrap store lab --remove {mine} --identity mine"
    )));
    lab.fails(
        &words("image show store lab --identity mine"),
        NO_KEY,
        "it is not encrypted to",
    );
    let last = format!("image rewrap store --remove {theirs} --identity theirs");
    lab.fails(&words(&last), USAGE, "nobody could open");
    let wrong = format!("image publish two.pri s --channel x --encrypt-to {mine}x");
    lab.fails(&words(&wrong), USAGE, "--encrypt-to");
}
