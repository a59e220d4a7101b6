// SPDX-License-Identifier: GPL-2.0

//! `pristine image import` and `export`, as a user and other programs see them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;

use common::Lab;

/// A directory with a disk image of 4 MiB.
fn lab() -> Lab {
    Lab::with_disk(4 << 20)
}

#[test]
fn every_format_gives_the_same_image() {
    let lab = lab();
    lab.sh(
        "xz -k -0 --block-size=256KiB disk.img; gzip -k disk.img; zstd -q -k disk.img; \
         qemu-img convert -c -O qcow2 disk.img disk.qcow2; casync make disk.caibx disk.img",
    );
    let raw = lab.json(&["image", "build", "disk.img", "-o", "store"]);
    for (source, format) in [
        ("disk.img.xz", "xz, 16 blocks"),
        ("disk.img.gz", "gzip"),
        ("disk.img.zst", "zstd"),
        ("disk.qcow2", "qcow2"),
        ("disk.caibx", "casync, "),
    ] {
        let built = lab.json(&["image", "import", source, "-o", "store"]);
        assert_eq!(built["image"], raw["image"], "{source}");
        assert_eq!(built["name"], "disk", "{source}");
        assert!(
            built["formats"][0].as_str().unwrap().starts_with(format),
            "{built}"
        );
    }
    assert_eq!(
        fs::read_dir(lab.path("store/.tmp")).map_or(0, Iterator::count),
        0
    );
    lab.fails(
        &[
            "image",
            "build",
            "disk.img.gz",
            "-o",
            "store",
            "--max-size",
            "1M",
        ],
        9,
        "1048576",
    );
    fs::write(
        lab.path("cut.xz"),
        &fs::read(lab.path("disk.img.xz")).unwrap()[..100_000],
    )
    .unwrap();
    lab.fails(
        &["image", "build", "cut.xz", "-o", "store"],
        4,
        "cut.xz is damaged",
    );
    lab.fails(
        &["image", "build", "missing.xz", "-o", "store"],
        3,
        "missing.xz",
    );
}

#[test]
fn exports_are_the_image() {
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
    let report = lab.json(&["image", "export", "store", "out.img", "--image", "stable"]);
    assert_eq!(report["bytes"], 4 << 20);
    lab.json(&["image", "export", "store", "out.qcow2"]);
    lab.json(&["image", "export", "store", "out.img.zst"]);
    lab.sh(
        "cmp disk.img out.img; qemu-img compare disk.img out.qcow2; qemu-img compare disk.img out.img; \
         zstd -q -dc out.img.zst | cmp disk.img -",
    );
    let stream = lab.run(&["image", "export", "store", "-"]);
    assert!(stream.status.success());
    assert!(stream.stdout == fs::read(lab.path("disk.img")).unwrap());
    lab.fails(
        &["image", "export", "store", "out.img"],
        11,
        "out.img exists",
    );
    lab.json(&["image", "export", "store", "out.img", "--force"]);
    lab.fails(
        &["image", "export", "store", "-", "--format", "qcow2"],
        2,
        "stream",
    );
    lab.fails(
        &["image", "export", "store", "x.img", "--image", "other"],
        3,
        "other",
    );
    let dry = lab.json(&["image", "export", "store", "dry.img", "--dry-run"]);
    assert_eq!(dry["dry_run"], true);
    assert!(!lab.path("dry.img").exists());
    // A damaged store gives no file.
    lab.sh("for pack in store/packs/*/*.zst; do chmod u+w $pack; printf x | dd of=$pack bs=1 seek=70000 conv=notrunc status=none; done");
    lab.fails(&["image", "export", "store", "bad.img"], 4, "wrong content");
    assert!(!lab.path("bad.img").exists());
}

#[test]
fn packs_are_plain_zstd() {
    let lab = lab();
    lab.json(&["image", "build", "disk.img", "-o", "store"]);
    // What plain zstd makes of the only pack are the distinct blocks of the disk, in their order.
    lab.sh("zstd -q -dc store/packs/*/*.zst | cmp -n 1048576 - disk.img");
}

#[test]
fn an_image_that_stays_where_it_is_published() {
    let lab = lab();
    lab.sh(
        "mkdir www && xz -c -0 --block-size=128KiB disk.img > www/disk.img.xz && \
            xz -c -0 -T1 disk.img > single.xz",
    );
    let raw = lab.json(&["image", "build", "disk.img", "-o", "full"]);
    let made = lab.json(&[
        "image",
        "import",
        "--reference",
        "www/disk.img.xz",
        "-o",
        "store",
        "--channel",
        "stable",
    ]);
    assert_eq!(made["image"], raw["image"]);
    assert_eq!(made["pack_bytes"], 0);
    assert!(!lab.path("store/packs").join("x").exists());
    lab.json(&["image", "verify", "store", "stable"]);
    lab.json(&["image", "export", "store", "out.img", "--image", "stable"]);
    lab.sh("cmp disk.img out.img");
    // Who reads it from a server need not know.
    let server = lab.serve("store", &[]);
    lab.json(&[
        "image",
        "export",
        &server.url,
        "served.img",
        "--image",
        "stable",
    ]);
    lab.sh("cmp disk.img served.img");
    // Nor who publishes it to another store.
    lab.json(&[
        "image",
        "publish",
        "store",
        "copy",
        "--image",
        "stable",
        "--channel",
        "stable",
    ]);
    fs::remove_file(lab.path("www/disk.img.xz")).unwrap();
    lab.json(&["image", "export", "copy", "copied.img"]);
    lab.sh("cmp disk.img copied.img");
    lab.fails(
        &["image", "export", "store", "lost.img", "--image", "stable"],
        3,
        "disk.img.xz",
    );
    lab.fails(
        &["image", "import", "--reference", "single.xz", "-o", "store"],
        8,
        "by range",
    );
}

#[test]
fn an_archive_becomes_a_file_system() {
    let lab = lab();
    lab.sh("mkdir -p root/etc && echo pristine > root/etc/hostname && chown 12:34 root/etc/hostname && \
            mknod root/null c 1 3 && tar -C root -czf root.tar.gz .");
    let built = lab.json(&[
        "image",
        "build",
        "root.tar.gz",
        "-o",
        "store",
        "--size",
        "32M",
    ]);
    assert_eq!(built["formats"], serde_json::json!(["gzip", "tar"]));
    lab.json(&["image", "export", "store", "root.img"]);
    lab.sh(
        "e2fsck -fn root.img >&2 && debugfs -R 'cat /etc/hostname' root.img 2>/dev/null | grep -qx pristine && \
         debugfs -R 'stat /etc/hostname' root.img 2>/dev/null | grep -q 'User:  *12  *Group:  *34' && \
         debugfs -R 'stat /null' root.img 2>/dev/null | grep -q 'character special'",
    );
    assert_eq!(
        fs::read_dir(lab.path("store/.tmp")).map_or(0, Iterator::count),
        0
    );
}
