// SPDX-License-Identifier: GPL-2.0

//! What `pristine image …` promises to scripts: exit codes, where output goes, JSON.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{keys, Lab, DAMAGED, DENIED, IO, NOT_FOUND, UNSUPPORTED, USAGE};
use serde_json::Value;

/// A directory with a disk image of 8 MiB.
fn lab() -> Lab {
    Lab::with_disk(8 << 20)
}

fn build(lab: &Lab, output: &str) -> Value {
    lab.json(&["image", "build", "disk.img", "-o", output])
}

#[test]
fn build_publish_list_verify() {
    let lab = lab();
    let built = build(&lab, "disk.pri");
    assert_eq!(
        keys(&built),
        [
            "blocks_duplicate",
            "blocks_shared",
            "blocks_total",
            "blocks_unique",
            "blocks_zero",
            "channel",
            "dry_run",
            "elapsed_ms",
            "file_systems",
            "formats",
            "freed_bytes",
            "generation",
            "image",
            "image_bytes",
            "manifest_bytes",
            "name",
            "output",
            "pack_bytes",
            "packs",
            "packs_shared",
            "reference",
            "warnings"
        ]
    );
    assert_eq!(built["image_bytes"], 8 << 20);
    assert_eq!(built["blocks_total"], 2048);
    assert_eq!(built["blocks_unique"], 512);
    assert_eq!(built["blocks_duplicate"], 16);
    assert_eq!(built["blocks_zero"], 2048 - 528);
    assert_eq!(built["name"], "disk");

    let publish = [
        "image",
        "publish",
        "disk.pri",
        "store",
        "--channel",
        "stable",
    ];
    let planned = lab.json(&[&publish[..], &["--dry-run"]].concat());
    assert!(!lab.path("store").exists(), "a dry run makes nothing");
    let published = lab.json(&publish);
    assert_eq!(
        keys(&published),
        [
            "channel",
            "delta_bytes",
            "delta_left_out",
            "dry_run",
            "elapsed_ms",
            "generation",
            "image",
            "image_bytes",
            "present_bytes",
            "present_objects",
            "sent_bytes",
            "sent_objects",
            "signed_by",
            "trace_runs",
            "unchanged"
        ]
    );
    assert_eq!(planned["sent_bytes"], published["sent_bytes"]);
    let on_disk = built["pack_bytes"].as_u64().unwrap() + built["manifest_bytes"].as_u64().unwrap();
    assert_eq!(published["sent_bytes"], on_disk);
    assert_eq!(published["generation"], 1);
    let again = lab.json(&publish);
    assert_eq!(
        (&again["unchanged"], &again["sent_bytes"]),
        (&true.into(), &0.into())
    );

    let list = lab.json(&["image", "list", "store"]);
    assert_eq!(keys(&list), ["channels", "images", "store"]);
    assert_eq!(list["channels"][0]["channel"], "stable");
    assert_eq!(list["channels"][0]["image"], built["image"]);
    assert_eq!(list["images"][0]["name"], "disk");
    assert_eq!(list["images"][0]["channels"][0], "stable");
    assert_eq!(list["images"][0]["stored_bytes"], on_disk);

    for args in [
        &["image", "verify", "store"][..],
        &["image", "verify", "store", "stable"],
    ] {
        let verified = lab.json(args);
        assert_eq!(verified["ok"], true);
        assert_eq!(verified["images"][0]["blocks"], 512);
    }
    // For people: the id is in it, and no colour when it is piped.
    let output = lab.run(&["image", "list", "store"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains(&built["image"].as_str().unwrap()[..12]),
        "{text}"
    );
    assert!(!text.contains('\x1b'));
    let output = lab.run(&["image", "list", "store", "--color", "always"]);
    assert!(String::from_utf8(output.stdout).unwrap().contains('\x1b'));
}

#[test]
fn build_variants() {
    let lab = lab();
    let dry = lab.json(&["image", "build", "disk.img", "-o", "nothing", "--dry-run"]);
    assert!(!lab.path("nothing").exists());
    let args = [
        "image",
        "build",
        "disk.img",
        "-o",
        "store",
        "--channel",
        "canary",
        "--level",
        "1",
    ];
    let built = lab.json(&args);
    assert_eq!(
        dry["image"], built["image"],
        "the id is of the content alone"
    );
    assert_eq!(
        (&built["channel"], &built["generation"]),
        (&"canary".into(), &1.into())
    );
    // Another image in the same store; then it must be said which.
    fs::write(lab.path("other.raw"), [7; 8192]).unwrap();
    lab.json(&["image", "build", "other.raw", "-o", "store"]);
    let publish = ["image", "publish", "store", "store", "--channel", "stable"];
    lab.fails(&publish, USAGE, "2 images");
    let promoted = lab.json(&[&publish[..], &["--image", "canary"]].concat());
    assert_eq!(promoted["image"], built["image"]);
    assert_eq!(promoted["sent_bytes"], 0);
}

#[test]
fn the_next_generation_stores_only_what_is_new() {
    let lab = lab();
    let args = [
        "image",
        "build",
        "disk.img",
        "-o",
        "store",
        "--channel",
        "stable",
    ];
    let first = lab.json(&args);
    // One block is another, one is new, and the rest lies elsewhere.
    let mut image = fs::read(lab.path("disk.img")).unwrap();
    image.truncate(2 << 20);
    image[5000] ^= 1;
    image.rotate_left(40960);
    image.resize(8 << 20, 0);
    fs::write(lab.path("next.img"), &image).unwrap();
    let build = ["image", "build", "next.img", "-o", "store"];
    let planned = lab.json(&[&build[..], &["--dry-run"]].concat());
    let next = lab.json(&[&build[..], &["--channel", "stable"]].concat());
    assert_eq!(
        next["blocks_shared"],
        next["blocks_unique"].as_u64().unwrap() - 1
    );
    assert!(next["pack_bytes"].as_u64().unwrap() < 8192, "{next}");
    assert_eq!(planned["pack_bytes"], next["pack_bytes"]);
    assert_eq!(lab.json(&["image", "verify", "store"])["ok"], true);
    // Alone it needs all; published to where the first is, again only what is new.
    let alone = lab.json(&["image", "build", "next.img", "-o", "alone"]);
    assert_eq!(alone["image"], next["image"]);
    assert!(alone["pack_bytes"].as_u64().unwrap() > 2 << 20);
    let copy = [
        "image",
        "publish",
        "store",
        "copy",
        "--channel",
        "stable",
        "--image",
    ];
    lab.json(&[&copy[..], &[first["image"].as_str().unwrap()]].concat());
    let publish = ["image", "publish", "alone", "copy", "--channel", "stable"];
    let planned = lab.json(&[&publish[..], &["--dry-run"]].concat());
    let published = lab.json(&publish);
    assert_eq!(planned["sent_bytes"], published["sent_bytes"]);
    assert!(
        published["sent_bytes"].as_u64().unwrap() < 80_000,
        "{published}"
    );
    assert_eq!(lab.json(&["image", "verify", "copy"])["ok"], true);
    assert!(!lab.path("copy/.tmp").join("publish").exists());
    // Unless the image is to have packs of its own.
    let own = lab.json(&[&build[..], &["--no-share", "--dry-run"]].concat());
    assert_eq!(
        (&own["blocks_shared"], &own["pack_bytes"]),
        (&0.into(), &alone["pack_bytes"])
    );
    let parent = lab.json(&[&build[..], &["--parent", "stable", "--dry-run"]].concat());
    assert_eq!(parent["blocks_shared"], parent["blocks_unique"]);

    // What they are, and what differs.
    let shown = lab.json(&["image", "show", "store", "stable"]);
    assert_eq!(shown["image"], next["image"]);
    assert_eq!(shown["blocks"], next["blocks_total"]);
    for key in [
        "blocks_zero",
        "blocks_unique",
        "blocks_duplicate",
        "manifest_bytes",
    ] {
        assert_eq!(shown[key], next[key], "{key}");
    }
    assert_eq!(shown["generations"][0]["generation"], 2);
    assert_eq!(shown["generations"][0]["parent"], first["image"]);
    assert!(shown["frame_bytes"].as_u64() < shown["pack_bytes"].as_u64());
    let text = String::from_utf8(lab.run(&["image", "show", "store", "stable"]).stdout).unwrap();
    assert!(text.contains("stable generation 2, current"), "{text}");
    let (old, new) = (
        first["image"].as_str().unwrap(),
        next["image"].as_str().unwrap(),
    );
    let diff = lab.json(&["image", "diff", "store", old, new]);
    assert_eq!(
        (&diff["blocks_new"], &diff["files"]),
        (&1.into(), &Value::Null)
    );
    assert!(diff["files_unknown"].as_str().unwrap().contains("ext4"));
    let same = lab.json(&["image", "diff", "store", new, new, "--with", "alone"]);
    assert_eq!(
        (&same["blocks_changed"], &same["ranges"]),
        (&0.into(), &serde_json::json!([]))
    );
}

#[test]
fn diff_tells_files() {
    let lab = lab();
    fs::create_dir_all(lab.path("tree/etc")).unwrap();
    fs::write(lab.path("tree/etc/hostname"), "one\n").unwrap();
    fs::write(lab.path("tree/same"), vec![7; 100_000]).unwrap();
    let build = [
        "image",
        "build",
        "tree",
        "--size",
        "32M",
        "-o",
        "store",
        "--channel",
    ];
    lab.json(&[&build[..], &["old"]].concat());
    fs::write(lab.path("tree/etc/hostname"), "two\n").unwrap();
    lab.json(&[&build[..], &["new"]].concat());
    let diff = lab.json(&["image", "diff", "store", "old", "new"]);
    let files = diff["files"].as_array().unwrap();
    let file = files
        .iter()
        .find(|file| file["path"] == "/etc/hostname")
        .unwrap();
    assert_eq!(
        (&file["status"], &file["blocks_new"]),
        (&"changed".into(), &1.into())
    );
    assert!(!files.iter().any(|file| file["path"] == "/same"));
    let text =
        String::from_utf8(lab.run(&["image", "diff", "store", "old", "new"]).stdout).unwrap();
    assert!(
        text.contains("/etc/hostname") && text.contains("changed"),
        "{text}"
    );
    let shown = lab.json(&["image", "show", "store", "new"]);
    assert_eq!(shown["file_systems"]["disk"]["type"], "ext4");
}

#[test]
fn free_blocks_become_zero_unless_they_are_to_be_kept() {
    let lab = lab();
    let shell = |line: &str| {
        let mut command = Command::new("/bin/sh");
        command.args(["-ec", line]).current_dir(lab.directory());
        let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
        assert!(
            command.env("PATH", path).status().unwrap().success(),
            "{line}"
        );
    };
    fs::write(lab.path("secret"), "forget me".repeat(100_000)).unwrap();
    shell("truncate -s 16M fs.img; mke2fs -q -F -t ext4 -L mother fs.img");
    shell("debugfs -w -R 'write secret secret' fs.img; debugfs -w -R 'rm secret' fs.img");
    let built = lab.json(&["image", "build", "fs.img", "-o", "a"]);
    let kept = lab.json(&["image", "build", "fs.img", "-o", "b", "--keep-free"]);
    assert_ne!(built["image"], kept["image"]);
    assert_eq!(
        (&kept["freed_bytes"], &kept["file_systems"]),
        (&0.into(), &serde_json::json!([]))
    );
    assert!(built["blocks_zero"].as_u64() > kept["blocks_zero"].as_u64());
    assert_eq!(built["file_systems"][0]["label"], "mother");
    // One that needs its journal replayed is kept, and people are told.
    shell("debugfs -w -R 'feature needs_recovery' fs.img");
    let output = lab.run(&["image", "build", "fs.img", "-o", "c"]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success() && told.contains("journal must be replayed"),
        "{told}"
    );
}

#[test]
fn a_directory_tree_becomes_a_file_system() {
    if Command::new("/sbin/mke2fs").arg("-V").output().is_err() {
        eprintln!("skipped: no mke2fs");
        return;
    }
    let lab = lab();
    fs::create_dir_all(lab.path("tree/etc")).unwrap();
    fs::write(lab.path("tree/etc/hostname"), "pristine\n").unwrap();
    fs::write(lab.path("tree/large"), vec![1; 2 << 20]).unwrap();
    let args = ["image", "build", "tree", "--size", "32M", "-o"];
    let mut ids = Vec::new();
    for output in ["a", "b"] {
        let mut command = lab.command(&[&args[..], &[output, "--json"]].concat());
        let output = command
            .env("SOURCE_DATE_EPOCH", "1700000000")
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let built: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(built["image_bytes"], 32 << 20);
        assert_eq!(built["file_systems"][0]["type"], "ext4");
        assert!(built["freed_bytes"].as_u64().unwrap() > 20 << 20);
        assert_eq!(built["warnings"], serde_json::json!([]));
        ids.push(built["image"].clone());
    }
    assert_eq!(ids[0], ids[1]);
    assert_eq!(fs::read_dir(lab.path("a/.tmp")).unwrap().count(), 0);
    lab.fails(
        &["image", "build", "tree", "--size", "1M", "-o", "c"],
        1,
        "mke2fs",
    );
}

#[test]
fn bad_arguments() {
    let lab = lab();
    lab.fails(
        &["image", "build", "missing.img", "-o", "x"],
        NOT_FOUND,
        "missing.img",
    );
    lab.fails(
        &["image", "build", "/dev/null", "-o", "x"],
        USAGE,
        "neither",
    );
    fs::write(lab.path("odd.img"), [1; 5000]).unwrap();
    lab.fails(&["image", "build", "odd.img", "-o", "x"], USAGE, "--pad");
    lab.json(&["image", "build", "odd.img", "-o", "x", "--pad"]);
    lab.fails(&["image", "build", "disk.img"], USAGE, "--output");
    lab.fails(
        &["image", "build", "disk.img", "-o", "x", "--level", "99"],
        USAGE,
        "99",
    );
    lab.fails(
        &["image", "list", "nowhere"],
        NOT_FOUND,
        "not a Pristine store",
    );
    lab.fails(&["image", "list", "ftp://x"], USAGE, "ftp://x");
    build(&lab, "store");
    lab.fails(
        &["image", "verify", "store", "nochannel"],
        NOT_FOUND,
        "nochannel",
    );
    lab.fails(
        &["image", "verify", "store", &"ab".repeat(32)],
        NOT_FOUND,
        "abab",
    );
    lab.fails(&["image", "verify", "store", "bad/name"], USAGE, "channel");
    let publish = [
        "image",
        "publish",
        "store",
        "http://127.0.0.1:1/",
        "--channel",
        "x",
    ];
    lab.fails(&publish, DENIED, "read-only");
    let publish = [
        "image",
        "publish",
        "http://127.0.0.1:1/",
        "store",
        "--channel",
        "x",
    ];
    lab.fails(&publish, IO, "cannot reach");
    // Somebody's directory is not made a store.
    fs::create_dir(lab.path("home")).unwrap();
    fs::write(lab.path("home/letter"), "x").unwrap();
    lab.fails(
        &["image", "build", "disk.img", "-o", "home"],
        NOT_FOUND,
        "not a Pristine store",
    );
}

fn first_file(directory: &Path) -> PathBuf {
    let entry = fs::read_dir(directory).unwrap().next().unwrap().unwrap();
    match entry.path() {
        path if path.is_dir() => first_file(&path),
        path => path,
    }
}

#[test]
fn damage_has_a_code_of_its_own() {
    let lab = lab();
    lab.json(&[
        "image",
        "build",
        "disk.img",
        "-o",
        "store",
        "--channel",
        "stable",
    ]);
    let pack = first_file(&lab.path("store/packs"));
    let good = fs::read(&pack).unwrap();
    let mut bad = good.clone();
    bad[1000] ^= 1;
    fs::write(&pack, &bad).unwrap();
    let output = lab.run(&["image", "verify", "store", "--json"]);
    assert_eq!(output.status.code(), Some(DAMAGED));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["ok"], false);
    let problems = report["images"][0]["problems"].as_array().unwrap();
    assert!(pack.ends_with(problems[0]["object"].as_str().unwrap()));
    fs::write(&pack, &good).unwrap();

    let manifest = first_file(&lab.path("store/images"));
    let bytes = fs::read(&manifest).unwrap();
    let publish = ["image", "publish", "store", "copy", "--channel", "x"];
    fs::write(&manifest, &bytes[..bytes.len() - 10]).unwrap();
    lab.fails(&publish, DAMAGED, "truncated");
    let output = lab.run(&["image", "verify", "store"]);
    assert_eq!(output.status.code(), Some(DAMAGED));
    let mut newer = bytes.clone();
    newer[8] = 2;
    fs::write(&manifest, &newer).unwrap();
    lab.fails(&publish, UNSUPPORTED, "version 2");
    fs::write(lab.path("store/pristine-store"), "pristine-store 9\n").unwrap();
    lab.fails(&publish, UNSUPPORTED, "version 9");
}

#[test]
fn help_completions_and_manual() {
    let lab = lab();
    let help = String::from_utf8(lab.run(&["--help"]).stdout).unwrap();
    assert!(
        help.contains("Exit codes:") && help.contains("damaged data"),
        "{help}"
    );
    for command in ["build", "publish", "list", "show", "diff", "verify"] {
        let help = String::from_utf8(lab.run(&["image", command, "--help"]).stdout).unwrap();
        assert!(
            help.contains("Examples:") && help.contains("JSON fields:"),
            "{help}"
        );
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(lab.run(&["completions", shell]).stdout.len() > 1000);
    }
    assert!(lab.run(&["man", "man"]).status.success());
    let page = fs::read_to_string(lab.path("man/pristine-image-build.1")).unwrap();
    assert!(page.contains("Examples"), "{page}");
    assert!(fs::read_to_string(lab.path("man/pristine.1"))
        .unwrap()
        .contains("Exit codes"));
    assert_eq!(lab.run(&[]).status.code(), Some(USAGE));
    assert_eq!(lab.run(&["image", "frobnicate"]).status.code(), Some(USAGE));
}
