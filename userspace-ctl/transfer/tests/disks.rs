// SPDX-License-Identifier: GPL-2.0

//! Disk images of all formats, made by the programs that people make them with, yield the bytes that went in.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;

use common::{assert_damage_is_told, noise_disk, open, Lab};
use pristine_transfer::{Error, Format};

#[test]
fn raw_compressed_and_qcow2() {
    let lab = Lab::new();
    let disk = noise_disk(3 << 20);
    lab.write("disk.img", &disk);
    lab.sh("xz -k -0 -T1 disk.img; gzip -k -1 disk.img; zstd -q -k disk.img");
    for (name, options) in [
        ("plain", ""),
        ("deflate", "-c"),
        ("zstd", "-c -o compression_type=zstd"),
        ("old", "-o compat=0.10,cluster_size=512"),
        ("large", "-o cluster_size=2M"),
    ] {
        lab.sh(&format!(
            "qemu-img convert -O qcow2 {options} disk.img {name}.qcow2"
        ));
    }
    lab.sh("xz -k -0 -T1 plain.qcow2");
    for (name, format) in [
        ("disk.img", "raw"),
        ("disk.img.xz", "xz, 1 blocks, raw"),
        ("disk.img.gz", "gzip, raw"),
        ("disk.img.zst", "zstd, raw"),
        ("plain.qcow2", "qcow2"),
        ("deflate.qcow2", "qcow2"),
        ("zstd.qcow2", "qcow2"),
        ("old.qcow2", "qcow2"),
        ("large.qcow2", "qcow2"),
        ("plain.qcow2.xz", "xz, 1 blocks, qcow2"),
    ] {
        let opened = lab
            .open(name)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(opened.formats.join(", "), format, "{name}");
        assert!(lab.content(opened) == disk, "{name}");
    }
}

#[test]
fn xz_of_many_blocks_is_read_by_range() {
    let lab = Lab::new();
    let disk = noise_disk(5 << 20);
    lab.write("disk.img", &disk);
    let xz = |args: &str, to: &str| {
        lab.sh(&format!("xz -c -0 {args} disk.img > {to}"));
    };
    xz("--block-size=1MiB", "blocks.xz");
    xz("-T2 --block-size=300000", "odd.xz");
    xz("--block-size=1MiB --check=sha256", "sha256.xz");
    xz("--block-size=1MiB --check=none", "none.xz");
    xz(
        "--block-size=1MiB --check=crc32 --x86 --lzma2=preset=0",
        "filter.xz",
    );
    // Several streams, of different checks, with padding between and after them.
    lab.sh("head -c 2000000 disk.img | xz -0 --block-size=500000 > streams.xz; \
         head -c 16 /dev/zero >> streams.xz; printf '' | xz >> streams.xz; \
         tail -c +2000001 disk.img | xz -0 -T1 --check=crc32 >> streams.xz; head -c 4096 /dev/zero >> streams.xz");
    for (name, blocks) in [
        ("blocks.xz", 5),
        ("odd.xz", 18),
        ("sha256.xz", 5),
        ("none.xz", 5),
        ("filter.xz", 5),
        ("streams.xz", 5),
    ] {
        let opened = lab.open(name).unwrap();
        assert_eq!(
            opened.formats,
            [format!("xz, {blocks} blocks"), "raw".to_owned()],
            "{name}"
        );
        assert!(opened.notes.is_empty(), "{name}: {:?}", opened.notes);
        assert!(lab.content(opened) == disk, "{name}");
    }
    // A single block is unpacked, and that is said.
    xz("-T1", "single.xz");
    let opened = lab.open("single.xz").unwrap();
    assert!(
        opened.notes[0].contains("single block"),
        "{:?}",
        opened.notes
    );
    assert!(opened.notes[0].contains("--block-size"));
}

#[test]
fn limits_hold() {
    let lab = Lab::new();
    // 64 MiB of zeros, in a few kilobytes.
    lab.sh("truncate -s 64M bomb.img && xz -k -0 bomb.img && gzip -k -1 bomb.img && \
         zstd -q -k bomb.img && xz -c -0 --block-size=1MiB bomb.img > blocks.xz && xz -c -0 bomb.img.xz > twice.xz.xz");
    for name in [
        "bomb.img.xz",
        "bomb.img.gz",
        "bomb.img.zst",
        "blocks.xz",
        "twice.xz.xz",
    ] {
        let limited = open(&lab, name, |options| options.max_size = Some(8 << 20));
        assert!(
            matches!(limited, Err(Error::TooLarge { limit, .. }) if limit == 8 << 20),
            "{name}: {limited:?}"
        );
        let allowed = open(&lab, name, |options| options.max_size = Some(64 << 20));
        assert!(allowed.is_ok(), "{name}: {allowed:?}");
    }
}

#[test]
fn qcow2_does_not_read_other_files_unasked() {
    let lab = Lab::new();
    let disk = noise_disk(2 << 20);
    lab.write("base.img", &disk);
    lab.sh("qemu-img create -q -f qcow2 -b base.img -F raw top.qcow2 3M");
    lab.sh("qemu-io -c 'write -P 7 1M 64k' top.qcow2");
    lab.sh("qemu-img create -q -f qcow2 -b top.qcow2 -F qcow2 top2.qcow2");
    lab.sh("qemu-img create -q -f qcow2 --object secret,id=s,data=x -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 luks.qcow2 1M");
    lab.sh("qemu-img create -q -f qcow2 -o data_file=data.raw data.qcow2 1M");
    lab.sh("qemu-img create -q -f qcow2 -o extended_l2=on sub.qcow2 1M");
    let refused = lab.open("top.qcow2").unwrap_err();
    assert!(matches!(refused, Error::Unsafe { .. }), "{refused}");
    assert!(
        refused.to_string().contains("--follow-backing"),
        "{refused}"
    );
    let mut expected = disk;
    expected[1 << 20..(1 << 20) + (64 << 10)].fill(7);
    expected.resize(3 << 20, 0);
    for name in ["top.qcow2", "top2.qcow2"] {
        let followed = open(&lab, name, |options| options.follow_backing = true).unwrap();
        assert!(lab.content(followed) == expected, "{name}");
    }
    assert!(matches!(lab.open("data.qcow2"), Err(Error::Unsafe { .. })));
    let encrypted = lab.open("luks.qcow2").unwrap_err();
    assert!(
        matches!(encrypted, Error::Unsupported { .. })
            && encrypted.to_string().contains("encrypted")
    );
    assert!(matches!(
        lab.open("sub.qcow2"),
        Err(Error::Unsupported { .. })
    ));
    // An image that is its own backing file ends, too.
    lab.sh("qemu-img rebase -u -b loop.qcow2 -F qcow2 top.qcow2");
    fs::rename(lab.path("top.qcow2"), lab.path("loop.qcow2")).unwrap();
    let circle = open(&lab, "loop.qcow2", |options| options.follow_backing = true);
    assert!(matches!(circle, Err(Error::Unsafe { .. })), "{circle:?}");
}

#[test]
fn other_formats_are_told_what_to_do() {
    let lab = Lab::new();
    lab.write("disk.img", &noise_disk(1 << 20));
    for format in ["vmdk", "vhdx", "vdi", "vpc"] {
        let file = format!("disk.{format}");
        lab.sh(&format!("qemu-img convert -O {format} disk.img {file}"));
        let refused = lab.open(&file).unwrap_err();
        assert!(
            refused.to_string().contains("qemu-img convert"),
            "{refused}"
        );
        // Whoever means the very bytes can say so.
        assert!(open(&lab, &file, |options| options.format = Some(Format::Raw)).is_ok());
    }
}

#[test]
fn damage_is_told() {
    let lab = Lab::new();
    lab.write("disk.img", &noise_disk(1 << 20));
    lab.sh(
        "xz -k -c -0 --block-size=256KiB disk.img > a.xz; gzip -k -c -1 disk.img > a.gz; \
         zstd -q -c --check disk.img > a.zst; qemu-img convert -c -O qcow2 disk.img a.qcow2",
    );
    for (name, always) in [
        ("a.xz", true),
        ("a.gz", true),
        ("a.zst", true),
        ("a.qcow2", false),
    ] {
        assert_damage_is_told(&lab, name, always);
    }
}
