// SPDX-License-Identifier: GPL-2.0

//! What `pristine device update` promises to scripts, on image files, without root. On active devices: tests/lab/generations.sh.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

use common::{keys, Lab, BUSY, EXISTS, NOT_FOUND, OK, UNTRUSTED};
use pristine_metadata::{Access, BlockState, Changes, Devices, Metadata, Run, Select, Superblock};
use serde_json::Value;

const IDENTITY: i32 = 5;
const TOO_SMALL: i32 = 10;
const NEEDS_CHECK: i32 = 14;
const MIB: u64 = 1 << 20;
const UPDATE: [&str; 9] = [
    "device",
    "update",
    "data",
    "--metadata",
    "meta",
    "--store",
    "store",
    "--channel",
    "lab",
];

/// A disk that holds generation 1 of the channel `lab`, which is at generation 2 now: blocks 10..20 and 300 differ.
fn with_two_generations() -> (Lab, [String; 2]) {
    let lab = Lab::with_disk(4 * MIB as usize);
    let first = publish(&lab, &[]);
    for (name, size) in [("data", 8 * MIB), ("meta", MIB)] {
        let file = fs::File::create_new(lab.path(name));
        file.unwrap().set_len(size).unwrap();
    }
    let image = lab.json(&["image", "list", "store"])["images"][0]["image"].clone();
    assert_eq!(image, first["image"]);
    format(&lab, image.as_str().unwrap(), "1", "4M", &[]);
    let disk = disk(&lab);
    disk.write_all_at(&[7; 10 * 4096], 10 * 4096).unwrap();
    disk.write_all_at(&[7; 100], 300 * 4096).unwrap();
    let second = publish(&lab, &[]);
    let id = |report: &Value| report["image"].as_str().unwrap().to_owned();
    let ids = [id(&first), id(&second)];
    (lab, ids)
}

fn disk(lab: &Lab) -> fs::File {
    let disk = OpenOptions::new().write(true).open(lab.path("disk.img"));
    disk.unwrap()
}

/// The disk's content is what it never was before.
fn change(lab: &Lab) {
    let now = lab.path("store/releases/lab").read_dir().unwrap().count();
    disk(lab)
        .write_all_at(&[now as u8; 77], 500 * 4096)
        .unwrap();
}

fn publish(lab: &Lab, more: &[&str]) -> Value {
    let _ = fs::remove_dir_all(lab.path("disk.pri"));
    lab.json(&["image", "build", "disk.img", "-o", "disk.pri"]);
    let publish = ["image", "publish", "disk.pri", "store", "--channel", "lab"];
    lab.json(&[&publish[..], more].concat())
}

fn format(lab: &Lab, image: &str, generation: &str, size: &str, more: &[&str]) {
    let format = "device format data --metadata meta --force --initial clean";
    let of = [
        "--image",
        image,
        "--generation",
        generation,
        "--image-size",
        size,
        "--size",
        size,
    ];
    let words: Vec<&str> = format.split(' ').chain(of).collect();
    lab.text(&[&words[..], more].concat());
}

fn metadata(lab: &Lab, access: Access) -> Metadata {
    Metadata::open(
        &Devices::new(lab.path("data"), Some(lab.path("meta"))),
        access,
    )
    .unwrap()
}

fn dirty(lab: &Lab, start: u64, end: u64) {
    let mut metadata = metadata(lab, Access::Write);
    let (mut planes, _) = metadata.load().unwrap();
    planes.set(Run { start, end }, BlockState::Dirty);
    metadata.commit(&planes, &Changes::default()).unwrap();
}

fn state(lab: &Lab) -> (Superblock, Vec<(u64, u64)>, u64) {
    let mut metadata = metadata(lab, Access::Read);
    let (planes, _) = metadata.load().unwrap();
    let stale = planes.runs(Select::Stale).map(|r| (r.start, r.end));
    let stale = stale.collect();
    (*metadata.superblock(), stale, planes.count(Select::Dirty))
}

#[test]
fn what_a_generation_changed_becomes_stale_in_one_step() {
    let (lab, ids) = with_two_generations();
    let before = fs::read(lab.path("meta")).unwrap();
    let planned = lab.json(&[&UPDATE[..], &["--dry-run"]].concat());
    assert_eq!(
        keys(&planned),
        [
            "active",
            "block_bytes",
            "blocks",
            "changed",
            "device",
            "dry_run",
            "from_generation",
            "from_image",
            "generation",
            "image",
            "modified",
            "old_image_known",
            "reverted",
            "stale"
        ]
    );
    assert_eq!(
        (&planned["modified"], &planned["stale"]),
        (&11.into(), &Value::Null)
    );
    assert!(
        fs::read(lab.path("meta")).unwrap() == before,
        "a dry run writes"
    );
    let data = fs::read(lab.path("data")).unwrap();
    let text = lab.text(&UPDATE);
    assert!(
        text.contains("(generation 1) to") && text.contains("11 of 1,024 blocks"),
        "{text}"
    );
    assert!(fs::read(lab.path("data")).unwrap() == data);
    let (sb, stale, _) = state(&lab);
    assert_eq!(
        pristine_image::ImageId::from_bytes(sb.image_id).to_string(),
        ids[1]
    );
    assert_eq!((sb.generation, stale), (2, vec![(10, 20), (300, 301)]));
    // Again, there is nothing to do.
    let again = lab.json(&UPDATE);
    assert_eq!(
        (&again["changed"], &again["generation"]),
        (&false.into(), &2.into())
    );
    assert!(lab.text(&UPDATE).contains("already"));
    lab.text(&["device", "check", "data", "--metadata", "meta"]);
}

#[test]
fn changes_are_taken_back_or_it_is_refused() {
    let (lab, _) = with_two_generations();
    dirty(&lab, 15, 40);
    let before = fs::read(lab.path("meta")).unwrap();
    lab.fails(&UPDATE, EXISTS, "25 blocks of meta were changed");
    assert!(fs::read(lab.path("meta")).unwrap() == before);
    let done = lab.json(&[&UPDATE[..], &["--revert"]].concat());
    // Five of them are in the list anyway.
    assert_eq!(
        (&done["modified"], &done["reverted"]),
        (&11.into(), &20.into())
    );
    let (_, stale, dirty) = state(&lab);
    assert_eq!((stale, dirty), (vec![(10, 40), (300, 301)], 0));
}

#[test]
fn blocks_of_a_device_may_be_larger_than_the_images() {
    let (lab, ids) = with_two_generations();
    format(&lab, &ids[0], "1", "4M", &["--block-size", "16K"]);
    let done = lab.json(&UPDATE);
    assert_eq!(done["modified"], 4);
    assert_eq!(state(&lab).1, [(2, 5), (75, 76)]);
}

#[test]
fn an_image_that_the_store_lost_says_nothing_of_what_is_the_same() {
    let (lab, _) = with_two_generations();
    format(&lab, &"5c1f".repeat(16), "1", "4M", &[]);
    let done = lab.json(&UPDATE);
    assert_eq!(
        (&done["old_image_known"], &done["stale"]),
        (&false.into(), &done["blocks"])
    );
}

#[test]
fn an_older_generation_is_refused_unless_it_is_wanted_and_allowed() {
    let (lab, ids) = with_two_generations();
    format(&lab, &ids[0], "9", "4M", &[]);
    lab.fails(
        &UPDATE,
        UNTRUSTED,
        "generation 2, which is older than meta's, 9",
    );
    assert_eq!(state(&lab).0.generation, 9);
    lab.text(&[&UPDATE[..], &["--allow-older"]].concat());
    assert_eq!(state(&lab).0.generation, 2);
    // The device's own release says how far back anybody may go.
    for key in ["a", "b"] {
        lab.json(&["key", "new", key, "--no-password"]);
    }
    lab.json(&["key", "trust", "a.pub", "--trusted-keys", "keys"]);
    lab.fails(
        &[&UPDATE[..], &["--trusted-keys", "keys"]].concat(),
        UNTRUSTED,
        "signed",
    );
    change(&lab);
    publish(&lab, &["--key", "a.key"]);
    change(&lab);
    let third = publish(&lab, &["--key", "a.key", "--oldest", "4"]);
    let third = third["image"].as_str().unwrap();
    format(&lab, third, "4", "4M", &[]);
    let pointer = fs::read(lab.path("store/releases/lab/3")).unwrap();
    fs::write(lab.path("store/channels/lab"), pointer).unwrap();
    let back = [&UPDATE[..], &["--trusted-keys", "keys", "--allow-older"]].concat();
    lab.fails(&back, UNTRUSTED, "the oldest allowed one is 4");
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let (lab, ids) = with_two_generations();
    let before = fs::read(lab.path("meta")).unwrap();
    let with = |image: &'static str| [&UPDATE[..8], &[image]].concat();
    lab.fails(&with("other"), NOT_FOUND, "other");
    let held = metadata(&lab, Access::Write);
    lab.fails(&UPDATE, BUSY, "in use");
    drop(held);
    assert!(fs::read(lab.path("meta")).unwrap() == before);
    // A manifest that is not what the release names.
    let manifest = lab.path(&format!("store/images/{}.manifest", ids[1]));
    let whole = fs::read(&manifest).unwrap();
    fs::write(&manifest, &whole[..whole.len() / 2]).unwrap();
    assert_ne!(lab.run(&UPDATE).status.code(), Some(OK));
    fs::write(&manifest, whole).unwrap();
    assert!(fs::read(lab.path("meta")).unwrap() == before);
    let mut open = metadata(&lab, Access::Write);
    let (planes, _) = open.load().unwrap();
    let needs_check = Changes {
        needs_check: Some(true),
        ..Changes::default()
    };
    open.commit(&planes, &needs_check).unwrap();
    drop(open);
    lab.fails(&UPDATE, NEEDS_CHECK, "check");
    lab.text(&["device", "format", "data", "--metadata", "meta", "--force"]);
    lab.fails(&UPDATE, IDENTITY, "names no image");
    format(&lab, &ids[0], "1", "2M", &[]);
    lab.fails(&UPDATE, TOO_SMALL, "the image has 4.0 MiB");
}
