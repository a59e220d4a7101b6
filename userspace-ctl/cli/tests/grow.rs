// SPDX-License-Identifier: GPL-2.0

//! What `pristine device grow` promises to scripts, on image files, without root.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::OpenOptions;
use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

const OK: i32 = 0;
const USAGE: i32 = 2;
const NOT_FOUND: i32 = 3;
const IDENTITY: i32 = 5;
const TOO_SMALL: i32 = 10;

struct Disks {
    dir: tempfile::TempDir,
}

impl Disks {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn size(&self, name: &str, bytes: u64) {
        OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.path(name))
            .unwrap()
            .set_len(bytes)
            .unwrap();
    }

    fn run(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_pristine"))
            .args(["--color", "never", "device"])
            .args(args)
            .current_dir(self.dir.path())
            .output()
            .unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.run(&[args, &["--json"]].concat());
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(OK), "{args:?}: {text}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn fails(&self, args: &[&str], code: i32, says: &str) {
        let output = self.run(args);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
        assert!(text.contains(says), "{args:?}: {text}");
        assert!(
            text.contains("hint: ") || code == NOT_FOUND,
            "{args:?}: {text}"
        );
    }

    /// Runs of dirty blocks.
    fn dirty(&self, place: &[&str]) -> Vec<(u64, u64)> {
        let map = self.json(&[&["map"], place].concat());
        let runs = map["runs"].as_array().unwrap().iter();
        runs.filter(|run| run["state"] == "dirty")
            .map(|run| {
                (
                    run["start"].as_u64().unwrap(),
                    run["blocks"].as_u64().unwrap(),
                )
            })
            .collect()
    }
}

fn disks() -> Disks {
    let disks = Disks {
        dir: tempfile::tempdir().unwrap(),
    };
    disks.size("data", 64 << 20);
    disks.size("meta", 1 << 20);
    disks
}

const PAIR: [&str; 3] = ["data", "--metadata", "meta"];

#[test]
fn a_device_with_its_own_metadata_device_grows() {
    let disks = disks();
    disks.json(&[&["format"], &PAIR[..]].concat());
    let grow = [&["grow"], &PAIR[..]].concat();
    assert_eq!(disks.json(&grow)["changed"], false);

    disks.size("data", 96 << 20);
    disks.fails(
        &[&["map"], &PAIR[..]].concat(),
        IDENTITY,
        "pristine device grow",
    );
    let planned = disks.json(&[&grow[..], &["--dry-run"]].concat());
    assert_eq!(
        (&planned["changed"], &planned["dry_run"]),
        (&true.into(), &true.into())
    );
    disks.fails(
        &[&["map"], &PAIR[..]].concat(),
        IDENTITY,
        "pristine device grow",
    );

    let grown = disks.json(&grow);
    assert_eq!(grown["managed_bytes"], (96 << 20) - 4096);
    assert_eq!(grown["managed_bytes_before"], (64 << 20) - 4096);
    assert_eq!(grown["data_bytes"], 96 << 20);
    assert_eq!(
        (&grown["new_blocks"], &grown["active"]),
        (&8192.into(), &false.into())
    );
    assert_eq!(disks.dirty(&PAIR), [((16 << 10) - 1, 8192)]);
    let text = disks.run(&grow).stdout;
    assert!(String::from_utf8_lossy(&text).contains("already"));

    disks.fails(
        &[&grow[..], &["--size", "64M"]].concat(),
        IDENTITY,
        "cannot shrink",
    );
    disks.fails(
        &[&grow[..], &["--size", "1G"]].concat(),
        TOO_SMALL,
        "too small",
    );
    disks.size("data", 64 << 20);
    disks.fails(&grow, IDENTITY, "cannot shrink");
    disks.fails(&["grow", "nowhere"], NOT_FOUND, "nowhere");
    disks.fails(&["grow", "data"], USAGE, "separate device");
}

#[test]
fn metadata_in_the_tail_moves() {
    let disks = disks();
    disks.json(&["format", "data"]);
    disks.size("data", (64 << 20) + (64 << 10));
    disks.fails(&["grow", "data"], TOO_SMALL, "bytes are missing");
    disks.size("data", 96 << 20);
    disks.fails(&["map", "data"], NOT_FOUND, "");
    disks.fails(
        &["grow", "data", "--from", "32M"],
        NOT_FOUND,
        "no metadata at its end",
    );
    let grown = disks.json(&["grow", "data"]);
    let before = grown["managed_bytes_before"].as_u64().unwrap() / 4096;
    let after = grown["managed_bytes"].as_u64().unwrap() / 4096;
    assert_eq!(disks.dirty(&["data"]), [(before, after - before)]);
    disks.size("data", 128 << 20);
    assert_eq!(
        disks.json(&["grow", "data", "--from", "96M"])["changed"],
        true
    );
    // Where it was before, nothing is left that could be taken for it.
    disks.size("data", 96 << 20);
    disks.fails(&["map", "data"], NOT_FOUND, "");
}
