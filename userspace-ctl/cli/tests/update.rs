// SPDX-License-Identifier: GPL-2.0

//! What `pristine image delta|apply` and `publish --deltas` promise to scripts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::ops::Deref;

use common::Lab;

/// A store whose channel `stable` had two images, of 10 MiB each.
struct World {
    lab: Lab,
    ids: Vec<String>,
}

impl Deref for World {
    type Target = Lab;

    fn deref(&self) -> &Lab {
        &self.lab
    }
}

fn images() -> [Vec<u8>; 2] {
    let mut old = pristine_testkit::noise(1, 3 << 20);
    old.resize(10 << 20, 0);
    let mut new = old.clone();
    for at in (0..1 << 20).step_by(1500) {
        new[at] ^= 1;
    }
    new.copy_within(2 << 20..3 << 20, 6 << 20);
    [old, new]
}

impl World {
    fn new(publish: &[&str]) -> Self {
        let lab = Lab::new();
        let mut ids = Vec::new();
        for (name, image) in ["old.img", "new.img"].into_iter().zip(images()) {
            fs::write(lab.path(name), image).unwrap();
            let built = lab.json(&["image", "build", name, "-o", "build.pri"]);
            let id = built["image"].as_str().unwrap().to_owned();
            let command = [
                "image",
                "publish",
                "build.pri",
                "store",
                "--channel",
                "stable",
                "--image",
                &id,
            ];
            lab.json(&[&command, publish].concat());
            ids.push(id);
        }
        fs::copy(lab.path("old.img"), lab.path("disk.img")).unwrap();
        World { lab, ids }
    }

    fn is(&self, file: &str, image: &str) -> bool {
        fs::read(self.path(file)).unwrap() == fs::read(self.path(image)).unwrap()
    }
}

#[test]
fn a_published_image_comes_with_its_delta() {
    let lab = World::new(&[]);
    let delta = lab
        .path("store/deltas")
        .join(&lab.ids[1])
        .join(format!("{}.delta", lab.ids[0]));
    let len = fs::metadata(delta).unwrap().len();
    let apply = ["image", "apply", "store", "disk.img", "--image", "stable"];
    let plan = lab.json(&[&apply[..], &["--dry-run"]].concat());
    assert!(lab.is("disk.img", "old.img"));
    let done = lab.json(&apply);
    assert!(lab.is("disk.img", "new.img"));
    assert_eq!(
        (&done["method"], &done["from"]),
        (&"delta".into(), &lab.ids[0].clone().into())
    );
    // What the dry run said, to the byte: the channel's pointer and the delta.
    assert_eq!(plan["to_fetch_bytes"], done["fetched_bytes"]);
    assert!(done["fetched_bytes"].as_u64().unwrap() < len + 2048);
    assert_eq!(lab.json(&apply)["method"], "none");
}

#[test]
fn without_a_delta_less_than_the_image_is_fetched() {
    let lab = World::new(&["--deltas", "0"]);
    assert!(!lab.path("store/deltas").exists());
    let apply = ["image", "apply", "store", "disk.img", "--image", "stable"];
    let plan = lab.json(&[&apply[..], &["--dry-run"]].concat());
    let done = lab.json(&apply);
    assert!(lab.is("disk.img", "new.img"));
    assert_eq!(done["method"], "blocks");
    assert_eq!(plan["to_fetch_bytes"], done["fetched_bytes"]);
    assert!(done["blocks_moved"].as_u64().unwrap() >= 256);
    // A delta that is made later is used then.
    let made = lab.json(&[
        "image",
        "delta",
        "store",
        &lab.ids[0],
        "stable",
        "--level",
        "3",
    ]);
    assert_eq!(made["present"], false);
    let again = lab.json(&["image", "delta", "store", &lab.ids[0], "stable"]);
    assert_eq!(
        (&again["present"], &again["bytes"]),
        (&true.into(), &made["bytes"])
    );
    let seeded = [
        "image",
        "apply",
        "store",
        "other.img",
        "--image",
        "stable",
        "--seed",
        "old.img",
    ];
    assert_eq!(lab.json(&seeded)["method"], "delta");
    assert!(lab.is("other.img", "new.img"));
}

#[test]
fn a_disk_that_is_neither_becomes_the_image() {
    let lab = World::new(&[]);
    let mut disk = images()[0].clone();
    disk.truncate((9 << 20) + 100);
    disk[5000..900_000].fill(9);
    fs::write(lab.path("disk.img"), &disk).unwrap();
    let from = [
        "image",
        "apply",
        "store",
        "disk.img",
        "--image",
        "stable",
        "--from",
        &lab.ids[0],
    ];
    let done = lab.json(&from);
    assert!(lab.is("disk.img", "new.img"));
    assert!(done["blocks_fetched"].as_u64().unwrap() > 0);
    fs::write(lab.path("disk.img"), disk).unwrap();
    lab.json(&["image", "apply", "store", "disk.img", "--image", "stable"]);
    assert!(lab.is("disk.img", "new.img"));
    // And from nothing at all.
    fs::write(lab.path("disk.img"), "").unwrap();
    lab.json(&["image", "apply", "store", "disk.img", "--image", "stable"]);
    assert!(lab.is("disk.img", "new.img"));
}

#[test]
fn mistakes_are_told() {
    let lab = World::new(&["--deltas", "0"]);
    let apply = |target| ["image", "apply", "store", target, "--image", "stable"];
    lab.fails(&apply("missing.img"), 3, "missing.img");
    lab.fails(&apply("store"), 2, "neither a file nor a block device");
    let seeded = [&apply("disk.img")[..], &["--seed", "old.img"]].concat();
    lab.fails(&seeded, 11, "disk.img");
    let unknown = "7".repeat(64);
    let from = [&apply("disk.img")[..], &["--from", &unknown]].concat();
    lab.fails(&from, 3, "leave --from away");
    lab.fails(
        &["image", "delta", "store", "stable", "stable"],
        2,
        "the same image",
    );
    lab.fails(
        &["image", "delta", "store", &unknown, "stable"],
        3,
        &unknown,
    );
    assert!(lab.is("disk.img", "old.img"));
}
