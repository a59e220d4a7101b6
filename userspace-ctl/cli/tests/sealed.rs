// SPDX-License-Identifier: GPL-2.0

//! Encrypted images as an administrator uses them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use pristine_testkit::noise;
use serde_json::Value;

const PRISTINE: &str = env!("CARGO_BIN_EXE_pristine");

fn pristine(lab: &Path, arguments: &str) -> Output {
    let mut command = Command::new(PRISTINE);
    command.env_remove("PRISTINE_IDENTITY").current_dir(lab);
    command.args(arguments.split_whitespace()).output().unwrap()
}

fn json(lab: &Path, arguments: &str) -> Value {
    let output = pristine(lab, &format!("--json {arguments}"));
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments}: {errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn fails(lab: &Path, arguments: &str) -> (i32, String) {
    let output = pristine(lab, arguments);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{arguments}: {text}");
    (output.status.code().unwrap(), text)
}

fn bytes_of(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).unwrap();
    let sizes = entries.map(|entry| {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => bytes_of(&path),
            false => path.metadata().unwrap().len(),
        }
    });
    sizes.sum()
}

#[test]
fn from_keys_to_export_and_rewrap() {
    let directory = tempfile::tempdir().unwrap();
    let lab = directory.path();
    let mut one = noise(1, 6 << 20);
    fs::write(lab.join("one.img"), &one).unwrap();
    one[..4096].copy_from_slice(&noise(2, 4096));
    fs::write(lab.join("two.img"), &one).unwrap();
    for name in ["one", "two"] {
        json(lab, &format!("image build {name}.img -o {name}.pri"));
    }
    // Our identity, and one of age-keygen's.
    let made = json(lab, "key new --age mine");
    let mine = made["recipient"].as_str().unwrap().to_owned();
    let keygen = Command::new("age-keygen")
        .arg("-o")
        .arg(lab.join("theirs"))
        .status()
        .unwrap();
    assert!(keygen.success());
    let theirs = Command::new("age-keygen")
        .arg("-y")
        .arg(lab.join("theirs"))
        .output()
        .unwrap();
    let theirs = String::from_utf8(theirs.stdout).unwrap().trim().to_owned();
    assert_eq!(fails(lab, "key new --age mine").0, 11);
    // What a dry run says is what is sent.
    let to = format!("image publish one.pri store --channel lab --encrypt-to {mine}");
    let would = json(lab, &format!("{to} --dry-run"));
    assert!(!lab.join("store").exists());
    let did = json(lab, &to);
    assert_eq!(would["sent_bytes"], did["sent_bytes"]);
    let stored = bytes_of(&lab.join("store/packs")) + bytes_of(&lab.join("store/images"));
    assert_eq!(did["sent_bytes"], stored);
    let id = did["image"].as_str().unwrap();
    assert!(!lab.join(format!("one.pri/images/{id}.manifest")).exists());
    // Reading it.
    json(
        lab,
        "image export store out.img --image lab --identity mine",
    );
    assert_eq!(
        fs::read(lab.join("out.img")).unwrap(),
        fs::read(lab.join("one.img")).unwrap()
    );
    for arguments in [
        "image export store no.img --image lab",
        "image show store lab --identity theirs",
    ] {
        let (code, text) = fails(lab, arguments);
        assert_eq!(code, 16, "{text}");
        assert!(text.contains(&mine) && text.contains("rewrap"), "{text}");
    }
    assert!(!lab.join("no.img").exists());
    assert!(json(lab, "image list store")["images"][0]["encrypted"].is_string());
    assert_eq!(
        json(lab, "image list store --identity mine")["images"][0]["name"],
        "one"
    );
    for (options, checked) in [("", false), ("--identity mine", true)] {
        let verified = json(lab, &format!("image verify store {options}"));
        assert_eq!(verified["ok"], true);
        assert_eq!(verified["images"][0]["content_checked"], checked);
    }
    json(lab, "image pin store lab --name kept");
    json(lab, "image gc store --grace 0");
    // The channel stays encrypted, shares blocks, and has a delta.
    let (code, text) = fails(lab, "image publish two.pri store --channel lab");
    assert_eq!(code, 16, "{text}");
    let two = json(
        lab,
        "image publish two.pri store --channel lab --identity mine --delta-level 3",
    );
    assert!(two["sent_bytes"].as_u64().unwrap() < 1 << 20, "{two}");
    assert!(two["delta_bytes"].as_u64().unwrap() > 0);
    assert_eq!(two["encrypted"], did["encrypted"]);
    let diff = json(lab, &format!("image diff store {id} lab --identity mine"));
    assert!(diff.to_string().contains("changed"), "{diff}");
    fs::copy(lab.join("one.img"), lab.join("disk.img")).unwrap();
    json(
        lab,
        &format!("image apply store disk.img --image lab --from {id} --identity mine"),
    );
    assert_eq!(
        fs::read(lab.join("disk.img")).unwrap(),
        fs::read(lab.join("two.img")).unwrap()
    );
    json(
        lab,
        "image promote store lab --channel stable --identity mine",
    );
    // Somebody else, without anything being encrypted again; and then not any more.
    let packs = bytes_of(&lab.join("store/packs"));
    assert_eq!(
        fails(lab, &format!("image rewrap store --encrypt-to {theirs}")).0,
        16
    );
    let added = json(
        lab,
        &format!("image rewrap store --encrypt-to {theirs} --identity mine"),
    );
    assert_eq!(added["keys"][0]["added"][0], theirs.as_str());
    assert_eq!(bytes_of(&lab.join("store/packs")), packs);
    json(
        lab,
        "image export store out2.img --image stable --identity theirs",
    );
    assert_eq!(
        fs::read(lab.join("out2.img")).unwrap(),
        fs::read(lab.join("two.img")).unwrap()
    );
    json(
        lab,
        &format!("image rewrap store lab --remove {mine} --identity mine"),
    );
    assert_eq!(fails(lab, "image show store lab --identity mine").0, 16);
    let (code, text) = fails(
        lab,
        &format!("image rewrap store --remove {theirs} --identity theirs"),
    );
    assert_eq!(code, 2, "{text}");
    assert_eq!(
        fails(
            lab,
            &format!("image publish two.pri s --channel x --encrypt-to {mine}x")
        )
        .0,
        2
    );
}
