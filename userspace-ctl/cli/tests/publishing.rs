// SPDX-License-Identifier: GPL-2.0

//! Publishing as an administrator does it: channels, promotion, pins, garbage collection, object stores, full disks.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use pristine_testkit::{noise, S3Kind, S3Service};
use serde_json::Value;

const PRISTINE: &str = env!("CARGO_BIN_EXE_pristine");

fn pristine(arguments: &[&str]) -> Output {
    let mut command = Command::new(PRISTINE);
    command.env("AWS_ACCESS_KEY_ID", "test");
    command.env("AWS_SECRET_ACCESS_KEY", "test");
    command.args(arguments).output().unwrap()
}

/// The JSON of a command that succeeds.
fn json(arguments: &[&str]) -> Value {
    let output = pristine(&[&["--json"], arguments].concat());
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The exit code and the error's text of a command that fails.
fn fails(arguments: &[&str]) -> (i32, String) {
    let output = pristine(arguments);
    assert!(!output.status.success(), "{arguments:?}");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code().unwrap(), text)
}

/// A directory with two built images.
struct Lab {
    directory: tempfile::TempDir,
}

impl Lab {
    fn new() -> Lab {
        let directory = tempfile::tempdir().unwrap();
        let lab = Lab { directory };
        for (name, seed) in [("one", 1), ("two", 50)] {
            let raw = lab.path(&format!("{name}.img"));
            fs::write(&raw, noise(seed, 4 << 20)).unwrap();
            let output = lab.path(name);
            json(&[
                "image",
                "build",
                raw.to_str().unwrap(),
                "-o",
                output.to_str().unwrap(),
            ]);
        }
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }
}

fn size_of(path: &Path) -> u64 {
    let entries = fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let size = |path: PathBuf| match path.is_dir() {
        true => size_of(&path),
        false => path.metadata().unwrap().len(),
    };
    entries.map(size).sum()
}

/// From the first publish to the last image that goes; the same in a directory and in S3.
fn life_of_a_store(lab: &Lab, store: &str) {
    let (one, two) = (lab.text("one"), lab.text("two"));
    let first = json(&["image", "publish", &one, store, "--channel", "canary"]);
    let promoted = json(&["image", "promote", store, "canary", "--channel", "stable"]);
    assert_eq!(promoted["image"], first["image"]);
    assert_eq!(promoted["generation"], 1);
    json(&["image", "publish", &two, store, "--channel", "canary"]);
    let planned = json(&[
        "image",
        "promote",
        store,
        "canary",
        "--channel",
        "stable",
        "--dry-run",
    ]);
    assert_eq!(planned["generation"], 2);
    let shown = json(&["image", "show", store, "stable"]);
    assert_eq!(shown["image"], first["image"], "a dry run changes nothing");
    assert_eq!(shown["generations"].as_array().unwrap().len(), 2);
    json(&["image", "promote", store, "canary", "--channel", "stable"]);
    let id = first["image"].as_str().unwrap();
    json(&["image", "pin", store, id, "--name", "first", "--for", "2d"]);
    let shown = json(&["image", "show", store, id]);
    assert_eq!(shown["pins"][0]["name"], "first");
    let gc = ["image", "gc", store, "--keep", "1", "--grace", "0h"];
    assert_eq!(json(&gc)["removed"]["objects"], 0);
    json(&["image", "unpin", store, "first"]);
    assert_eq!(fails(&["image", "unpin", store, "first"]).0, 3);
    let planned = json(&[&gc[..], &["--dry-run"]].concat());
    assert_eq!(planned["removed_images"][0], first["image"]);
    let collected = json(&gc);
    assert_eq!(collected["removed"], planned["removed"]);
    assert_eq!(json(&gc)["removed"]["objects"], 0);
    assert_eq!(fails(&["image", "show", store, id]).0, 3);
    assert_eq!(json(&["image", "verify", store])["ok"], true);
    let listed = json(&["image", "list", store]);
    assert_eq!(listed["images"].as_array().unwrap().len(), 1);
}

#[test]
fn in_a_directory() {
    let lab = Lab::new();
    let store = lab.text("store");
    life_of_a_store(&lab, &store);
    // What a dry run says of a publish, to the byte.
    let (two, other) = (lab.text("two"), lab.text("other"));
    let planned = json(&[
        "image",
        "publish",
        &two,
        &other,
        "--channel",
        "x",
        "--dry-run",
    ]);
    assert!(!lab.path("other").exists());
    json(&["image", "publish", &two, &other, "--channel", "x"]);
    let sent = size_of(&lab.path("other/images")) + size_of(&lab.path("other/packs"));
    assert_eq!(planned["sent_bytes"], sent);
    // A place that is no store does not become one by cleaning it up.
    let nothing = lab.text("nothing");
    assert_eq!(fails(&["image", "gc", &nothing]).0, 3);
    assert!(!lab.path("nothing").exists());
}

#[test]
fn in_s3() {
    let lab = Lab::new();
    let service = S3Service::start(S3Kind::Conditional).unwrap();
    life_of_a_store(&lab, &service.location("lab"));
    let gone = service.location("lab");
    drop(service);
    let (code, text) = fails(&[
        "image",
        "publish",
        &lab.text("one"),
        &gone,
        "--channel",
        "x",
    ]);
    assert!(
        code == 6 && text.contains("cannot reach s3://images/lab"),
        "{text}"
    );
    let (code, text) = fails(&["image", "list", "s3://images/x?secret=1"]);
    assert!(code == 2 && text.contains("no option"), "{text}");
}

/// A publish that meets a full or a read-only disk in the middle says so, leaves the channel as it was, and goes on
/// when there is room again.
#[test]
fn a_disk_that_is_full_or_read_only_in_the_middle() {
    let lab = Lab::new();
    let (one, two, disk) = (lab.text("one"), lab.text("two"), lab.text("disk"));
    fs::create_dir(&disk).unwrap();
    // In a mount namespace of its own, which goes with it. Both images have 4 MiB.
    let script = r#"
        set -e
        mount -t tmpfs -o size=6m tmpfs "$4"
        "$1" image publish "$2" "$4/store" --channel stable
        status=0
        "$1" image publish "$3" "$4/store" --channel stable || status=$?
        echo "full: $status"
        "$1" image show "$4/store" stable | head -n 1
        "$1" image gc "$4/store" --dry-run >/dev/null
        mount -o remount,size=20m "$4"
        mount -o remount,ro "$4"
        status=0
        "$1" image publish "$3" "$4/store" --channel stable || status=$?
        echo "read-only: $status"
        mount -o remount,rw "$4"
        "$1" image publish "$3" "$4/store" --channel stable
        "$1" image verify "$4/store"
        "$1" image show "$4/store" stable | head -n 1
        "#;
    let mut command = Command::new("unshare");
    let command = command.args([
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        script,
        "sh",
    ]);
    let output = command
        .args([PRISTINE, &one, &two, &disk])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}\n{errors}");
    assert!(text.contains("full: 6"), "{text}\n{errors}");
    assert!(text.contains("read-only: 9"), "{text}\n{errors}");
    assert!(
        errors.contains("No space left") && errors.contains("ead-only"),
        "{errors}"
    );
    let images: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("image ") && line.len() > 60)
        .collect();
    let (before, after) = (images[0], images[images.len() - 1]);
    assert_ne!(before, after, "{text}");
}

#[test]
fn boot_traces_are_shared_shown_and_removed() {
    let lab = Lab::new();
    let store = lab.text("store");
    let (one, two) = (lab.text("one"), lab.text("two"));
    let published = json(&["image", "publish", &one, &store, "--channel", "lab"]);
    let image = published["image"].as_str().unwrap().to_owned();
    let text = format!("pristine-trace 1\nimage {image}\n900 10\n0 4\n");
    let checksum = format!("crc32c {:08x}\n", crc32c::crc32c(text.as_bytes()));
    let file = lab.text("boot.trace");
    fs::write(&file, text.clone() + &checksum).unwrap();
    let trace = |arguments: &[&str]| json(&[&["image", "trace"], arguments].concat());

    let (code, error) = fails(&["image", "trace", "show", &store, "lab"]);
    assert_eq!(code, 3, "{error}");
    let dry = trace(&["publish", &store, "lab", &file, "--dry-run"]);
    assert_eq!((&dry["runs"], &dry["blocks"]), (&2.into(), &14.into()));
    assert_eq!(fails(&["image", "trace", "show", &store, "lab"]).0, 3);
    trace(&["publish", &store, "lab", &file]);
    let shown = trace(&["show", &store, "lab", "--runs"]);
    assert_eq!(shown["order"][0]["first"], 900);
    assert_eq!(trace(&["publish", &store, "lab", &file])["unchanged"], true);

    // Another one needs --replace; garbage and what names blocks that the image lacks are refused.
    for (line, code, says) in [
        ("7 1\n", 11, "--replace"),
        ("1000 100\n", 4, "block 1099"),
        ("x\n", 4, "no run of blocks"),
    ] {
        let text = text.clone() + line;
        let checksum = format!("crc32c {:08x}\n", crc32c::crc32c(text.as_bytes()));
        fs::write(&file, text + &checksum).unwrap();
        let (found, error) = fails(&["image", "trace", "publish", &store, "lab", &file]);
        assert!(found == code && error.contains(says), "{found}: {error}");
    }

    // The next generation has it, too.
    let published = json(&["image", "publish", &two, &store, "--channel", "lab"]);
    assert_eq!(published["trace_runs"], 2);
    let output = pristine(&["image", "trace", "show", &store, "lab"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("in 2 runs"), "{text}");
    trace(&["remove", &store, "lab", "--dry-run"]);
    trace(&["remove", &store, "lab"]);
    assert_eq!(fails(&["image", "trace", "remove", &store, "lab"]).0, 3);
}
