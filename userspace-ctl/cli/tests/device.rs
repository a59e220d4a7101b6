// SPDX-License-Identifier: GPL-2.0

//! What `pristine device …` promises to scripts: exit codes, where output goes, JSON. On image files, without root.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

const OK: i32 = 0;
const FAILURE: i32 = 1;
const USAGE: i32 = 2;
const NOT_FOUND: i32 = 3;
const DAMAGED: i32 = 4;
const IDENTITY: i32 = 5;
const BUSY: i32 = 7;
const UNSUPPORTED: i32 = 8;
const TOO_SMALL: i32 = 10;
const EXISTS: i32 = 11;

/// Two image files: 64 MiB of data, 1 MiB for metadata.
struct Disks {
    dir: tempfile::TempDir,
}

impl Disks {
    fn new() -> Self {
        let disks = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        disks.make("data", 64 << 20);
        disks.make("meta", 1 << 20);
        disks
    }

    fn make(&self, name: &str, size: u64) {
        File::create(self.path(name))
            .unwrap()
            .set_len(size)
            .unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn flip(&self, name: &str, offset: u64) {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.path(name))
            .unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    }

    /// Runs `pristine device ARGS` in the directory of the disks.
    fn run(&self, args: &str) -> Output {
        run_in(self.dir.path(), args)
    }

    /// Runs it; its exit code and a word of its error must be these.
    fn expect(&self, args: &str, code: i32, says: &str) -> String {
        let output = self.run(args);
        let stdout = String::from_utf8(output.stdout).unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            output.status.code(),
            Some(code),
            "{args}:\n{stdout}{stderr}"
        );
        if code == OK {
            assert!(stdout.contains(says), "{args}: {says:?} not in\n{stdout}");
        } else {
            assert!(stderr.contains(says), "{args}: {says:?} not in\n{stderr}");
            // The command line's parser says "error:" alone.
            let begins = stderr.starts_with("pristine: ") || code == USAGE;
            assert!(begins, "{args}: {stderr}");
        }
        stdout
    }

    fn json(&self, args: &str) -> Value {
        let output = self.run(&format!("{args} --json"));
        let stdout = String::from_utf8(output.stdout).unwrap();
        serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("{args}: {e}\n{stdout}"))
    }
}

fn run_in(dir: &Path, args: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pristine"))
        .arg("device")
        .args(args.split_whitespace())
        .current_dir(dir)
        .env("LANG", "C.UTF-8")
        .env_remove("LC_ALL")
        .env_remove("LC_CTYPE")
        .env_remove("COLUMNS")
        .output()
        .unwrap()
}

#[test]
fn every_command_has_help_with_examples() {
    for command in [
        "format",
        "activate",
        "deactivate",
        "status",
        "watch",
        "map",
        "checkpoint",
        "check",
        "dump",
        "grow",
        "revert",
        "update",
    ] {
        let output = run_in(Path::new("/"), &format!("{command} --help"));
        assert!(output.status.success(), "{command}");
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("Examples:"), "{command}:\n{text}");
    }
}

#[test]
fn a_format_is_described_and_not_repeated() {
    let disks = Disks::new();
    let text = disks.expect("format data -m meta", OK, "data is formatted");
    assert!(text.contains("16,383 blocks of 4.0 KiB"), "{text}");
    disks.expect(
        "format data -m meta",
        EXISTS,
        "holds pristine metadata already",
    );
    let again = disks.json("format data -m meta --force");
    assert_eq!(again["blocks"], 16383);
    assert_eq!(again["state"], "clean");
    // A tenth of a per cent is for large devices; a small one has a log of 16 records at least.
    assert!(again["metadata_bytes"].as_u64().unwrap() < 200 << 10);
}

#[test]
fn the_tail_of_the_data_device_serves_as_well() {
    let disks = Disks::new();
    let formatted = disks.json("format data --initial dirty");
    let managed = formatted["managed_bytes"].as_u64().unwrap();
    let metadata = formatted["metadata_bytes"].as_u64().unwrap();
    assert!(managed + metadata <= 64 << 20);
    assert!(managed + metadata > (64 << 20) - 8192, "space is wasted");
    let checked = disks.json("check data");
    assert_eq!(checked["usable"], true);
    assert_eq!(checked["blocks"]["dirty"], checked["blocks"]["total"]);
}

#[test]
fn what_is_too_small_is_refused_with_both_sizes() {
    let disks = Disks::new();
    disks.make("tiny", 65536);
    let says = "tiny is too small: it has 65536 bytes, its metadata needs";
    disks.expect("format data -m tiny", TOO_SMALL, says);
    let image = "a5".repeat(32);
    let args = format!("format data -m meta --image {image} --image-size 65M --initial stale");
    disks.expect(&args, TOO_SMALL, "it has 67108864 bytes, the image");
    disks.expect(&args.replace("65M", "64M"), TOO_SMALL, "needs 67112960");
    disks.expect(&args.replace("65M", "60M"), OK, "15,360 blocks");
    disks.expect("format tiny", TOO_SMALL, "tiny is too small");
    disks.expect(
        "format data -m meta --size 65M --force",
        TOO_SMALL,
        "the managed size asked for",
    );
}

#[test]
fn what_else_is_there_is_not_overwritten() {
    let disks = Disks::new();
    let file = OpenOptions::new()
        .write(true)
        .open(disks.path("meta"))
        .unwrap();
    file.write_all_at(b"\x53\xef", 1080).unwrap();
    disks.expect("format data -m meta", EXISTS, "ext4 file system");
    disks.expect("format data -m meta --force", OK, "is formatted");
    disks.expect("format data", EXISTS, "label");
    disks.expect("format data -m data", USAGE, "are the same device");
}

/// The content of a data device is to be managed, so it may be anything, but must not reach into the tail.
#[test]
fn a_file_system_that_reaches_into_the_tail_is_not_cut() {
    let disks = Disks::new();
    let file = OpenOptions::new()
        .write(true)
        .open(disks.path("data"))
        .unwrap();
    file.write_all_at(b"\x53\xef", 1080).unwrap();
    // 16384 blocks of 4 KiB: all of the device.
    file.write_all_at(&16384u32.to_le_bytes(), 1028).unwrap();
    file.write_all_at(&2u32.to_le_bytes(), 1048).unwrap();
    disks.expect(
        "format data",
        EXISTS,
        "an ext file system that ends at byte 67108864",
    );
    file.write_all_at(&16000u32.to_le_bytes(), 1028).unwrap();
    disks.expect("format data", OK, "is formatted");
}

#[test]
fn nonsense_is_refused() {
    let disks = Disks::new();
    disks.expect("format data --block-size 3K", USAGE, "");
    disks.expect("format data --block-size 2K", USAGE, "block size");
    disks.expect(
        "format data --image xyz --image-size 1M --initial stale",
        USAGE,
        "not an image id",
    );
    disks.expect("format none -m meta", NOT_FOUND, "none");
    disks.expect(
        "format data -m /dev/null",
        USAGE,
        "neither a block device nor a regular file",
    );
    disks.expect("check data", NOT_FOUND, "no pristine metadata found");
    disks.expect("dump data", NOT_FOUND, "no pristine metadata found");
    disks.expect("map nothing", NOT_FOUND, "nothing");
    disks.expect("activate a/b data", USAGE, "is no name for a device");
    disks.expect("activate x data", USAGE, "not a block device");
}

#[test]
fn metadata_of_another_device_is_refused() {
    let disks = Disks::new();
    disks.make("other", 64 << 20);
    disks.make("meta2", 1 << 20);
    disks.expect("format data -m meta", OK, "");
    disks.expect("format other -m meta2", OK, "");
    disks.expect("check other -m meta", IDENTITY, "another data device");
    disks.expect(
        "map other -m meta",
        IDENTITY,
        "belongs to another data device",
    );
    disks.make("larger", 65 << 20);
    disks.expect("map larger -m meta", IDENTITY, "was made for 131072");
    disks.make("blank", 64 << 20);
    disks.expect("map blank -m meta", IDENTITY, "no label");
    disks.expect("map data", USAGE, "separate device");
    let error = disks.run("map other -m meta --json");
    let error: Value = serde_json::from_slice(&error.stderr).unwrap();
    assert_eq!(error["error"]["code"], "identity");
}

#[test]
fn damage_is_found_said_and_repaired() {
    let disks = Disks::new();
    disks.expect("format data -m meta", OK, "");
    disks.expect("check data -m meta", OK, "good: ");
    disks.flip("meta", 100);
    let text = disks.expect("check data -m meta", DAMAGED, "everything is still known");
    assert!(
        text.contains("superblock copy 0 is damaged (bad checksum) (page 0)"),
        "{text}"
    );
    disks.expect("map data -m meta", OK, "clean");
    disks.expect(
        "dump data -m meta",
        OK,
        "copy 0: superblock copy 0 is damaged",
    );
    let before = fs::read(disks.path("meta")).unwrap();
    disks.expect("repair data -m meta --dry-run", DAMAGED, "can be repaired");
    assert_eq!(fs::read(disks.path("meta")).unwrap(), before);
    disks.expect("repair data -m meta", OK, "the exact state is known");
    disks.expect("check data -m meta", OK, "good: ");
    disks.expect("repair data -m meta", OK, "nothing to repair");
    // Behind the superblocks and the log of 16 records: the checkpoint's index.
    for page in [16 + 16, 16 + 16 + 1 + 2] {
        disks.flip("meta", page * 4096 + 50);
    }
    let checked = disks.json("check data -m meta");
    assert_eq!(checked["usable"], false);
    assert_eq!(checked["findings"][0]["severity"], "fatal");
    disks.expect("check data -m meta", DAMAGED, "cannot be used");
    disks.expect("map data -m meta", DAMAGED, "index page 0");
    // The superblock knows that no block is dirty.
    let repaired = disks.json("repair data -m meta");
    assert_eq!(repaired["repaired"], true);
    assert_eq!(repaired["exact"], true);
    assert_eq!(repaired["blocks"]["dirty"], 0);
    disks.expect("map data -m meta", OK, "clean");
}

#[test]
fn a_repair_that_loses_the_exact_state_is_confirmed() {
    let disks = Disks::new();
    disks.expect("format data -m meta", OK, "");
    // A superblock as of a device in use, and garbage where its next record would be.
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(disks.path("meta"))
        .unwrap();
    for at in [0, 15 * 4096] {
        let mut page = [0; 4096];
        file.read_exact_at(&mut page, at).unwrap();
        page[116] = 0;
        let sum = pristine_metadata::shared::crc::crc32c(0, &page[12..]);
        page[8..12].copy_from_slice(&sum.to_le_bytes());
        file.write_all_at(&page, at).unwrap();
    }
    file.write_all_at(&[0xee; 4096], 17 * 4096).unwrap();
    let before = fs::read(disks.path("meta")).unwrap();
    disks.expect("repair data -m meta", FAILURE, "--yes confirms it");
    assert_eq!(fs::read(disks.path("meta")).unwrap(), before);
    let planned = disks.json("repair data -m meta --dry-run");
    assert_eq!(
        (&planned["repaired"], &planned["exact"]),
        (&false.into(), &false.into())
    );
    disks.expect("repair data -m meta --yes", OK, "may be clean");
    disks.expect("check data -m meta", OK, "16,383 dirty");
}

#[test]
fn what_cannot_be_repaired_is_refused() {
    let disks = Disks::new();
    disks.make("other", 64 << 20);
    disks.make("meta2", 1 << 20);
    disks.expect("format data -m meta", OK, "");
    disks.expect("format other -m meta2", OK, "");
    disks.expect(
        "repair other -m meta --yes",
        IDENTITY,
        "another data device",
    );
    disks.flip("meta", 100);
    disks.flip("meta", 15 * 4096 + 100);
    let before = fs::read(disks.path("meta")).unwrap();
    disks.expect("repair data -m meta --yes", DAMAGED, "cannot be repaired");
    assert_eq!(fs::read(disks.path("meta")).unwrap(), before);
    disks.expect("repair meta --yes", NOT_FOUND, "no pristine metadata");
}

#[test]
fn a_newer_format_is_refused_by_name() {
    let disks = Disks::new();
    disks.expect("format data -m meta", OK, "");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(disks.path("meta"))
        .unwrap();
    let mut page = [0; 4096];
    file.read_exact_at(&mut page, 0).unwrap();
    page[12] = 7;
    let sum = pristine_metadata::shared::crc::crc32c(0, &page[12..]);
    page[8..12].copy_from_slice(&sum.to_le_bytes());
    file.write_all_at(&page, 0).unwrap();
    for command in ["check", "map"] {
        disks.expect(
            &format!("{command} data -m meta"),
            UNSUPPORTED,
            "metadata format version 7 is newer than the 1 known here",
        );
    }
}

#[test]
fn what_is_in_use_is_left_alone() {
    let disks = Disks::new();
    disks.expect("format data -m meta", OK, "");
    let devices = pristine_metadata::Devices::new(disks.path("data"), Some(disks.path("meta")));
    let held =
        pristine_metadata::Metadata::open(&devices, pristine_metadata::Access::Write).unwrap();
    disks.expect("format data -m meta --force", BUSY, "is in use");
    disks.expect("check data -m meta", BUSY, "is in use");
    disks.expect("map data -m meta", OK, "clean");
    disks.expect("dump data -m meta", OK, "checkpoint area 0");
    drop(held);
    disks.expect("check data -m meta", OK, "good");
}

#[test]
fn a_revert_takes_all_back_in_one_step() {
    let disks = Disks::new();
    disks.expect("format data -m meta", OK, "");
    disks.expect("revert data -m meta", IDENTITY, "names no image");
    let image = "5c1f".repeat(16);
    let format = format!(
        "format data -m meta --force --initial dirty --image {image} --image-size 60M --generation 3"
    );
    disks.expect(&format, OK, "");
    let before = fs::read(disks.path("meta")).unwrap();
    let planned = disks.json("revert data -m meta --dry-run");
    assert_eq!(planned["reverted"], 15360);
    assert_eq!(fs::read(disks.path("meta")).unwrap(), before);
    let data = fs::read(disks.path("data")).unwrap();
    let text = disks.expect(
        "revert data -m meta",
        OK,
        "reverted: 15,360 of 15,360 blocks",
    );
    assert!(
        text.contains("image 5c1f5c1f5c1f5c1f (generation 3)"),
        "{text}"
    );
    assert!(fs::read(disks.path("data")).unwrap() == data);
    let counts = disks.json("map data -m meta");
    assert_eq!(
        (&counts["dirty"], &counts["stale"]),
        (&0.into(), &15360.into())
    );
    disks.expect("revert data -m meta", OK, "nothing is dirty");
    disks.expect("check data -m meta", OK, "good: ");
    let devices = pristine_metadata::Devices::new(disks.path("data"), Some(disks.path("meta")));
    let _held =
        pristine_metadata::Metadata::open(&devices, pristine_metadata::Access::Write).unwrap();
    disks.expect("revert data -m meta", BUSY, "is in use");
}

#[test]
fn a_map_shows_what_is_dirty() {
    use pristine_metadata::{Access, BlockState, Changes, Devices, Metadata, Run};
    let disks = Disks::new();
    disks.expect("format data -m meta", OK, "");
    let devices = Devices::new(disks.path("data"), Some(disks.path("meta")));
    let mut metadata = Metadata::open(&devices, Access::Write).unwrap();
    let (mut planes, _) = metadata.load().unwrap();
    planes.set(Run { start: 0, end: 1 }, BlockState::Dirty);
    planes.set(
        Run {
            start: 8000,
            end: 9000,
        },
        BlockState::Dirty,
    );
    planes.set(
        Run {
            start: 16000,
            end: 16383,
        },
        BlockState::Stale,
    );
    metadata.commit(&planes, &Changes::default()).unwrap();
    drop(metadata);

    let map = disks.json("map data -m meta");
    assert_eq!((&map["dirty"], &map["stale"]), (&1001.into(), &383.into()));
    let runs = map["runs"].as_array().unwrap();
    let total: u64 = runs.iter().map(|r| r["blocks"].as_u64().unwrap()).sum();
    assert_eq!(total, map["blocks"].as_u64().unwrap());
    assert_eq!(runs[0]["state"], "dirty");
    assert_eq!(runs.last().unwrap()["state"], "stale");

    let text = disks.expect("map data -m meta --width 80", OK, "○");
    assert!(text.contains('░') && text.contains('█'), "{text}");
    assert!(
        !text.contains('\x1b'),
        "no colour where there is no terminal"
    );
    let ascii = disks.expect("map data -m meta --ascii --width 80", OK, "O");
    assert!(ascii.is_ascii(), "{ascii}");
    assert!(
        ascii.lines().nth(2).unwrap().starts_with("     0 MiB -"),
        "{ascii}"
    );
    let coloured = disks.expect("map data -m meta --color always", OK, "\x1b[31m");
    assert!(coloured.contains("\x1b[0m"));
    // Two stale blocks: they are said when the device is to be used.
    let dump = disks.json("dump data -m meta");
    assert_eq!(dump["areas"][1]["current"], true);
    assert_eq!(dump["areas"][1]["stale"]["blocks"], 383);
}

#[test]
fn status_without_the_module_is_an_empty_list() {
    if Path::new("/sys/module/dm_pristine").exists() {
        return;
    }
    let disks = Disks::new();
    assert_eq!(disks.json("status"), Value::Array(Vec::new()));
    disks.expect("list", OK, "no managed devices");
    assert!(fs::metadata("/dev/pristine").is_err());
}
