// SPDX-License-Identifier: GPL-2.0

//! What real file systems count as free, and nothing else, becomes zero. The programs of each file system are the
//! judges: they say what is free, that the built image is whole, and that its files are the same.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
mod ext4;
mod fat;
mod lab;

use std::fs;
use std::ops::Range;

use common::noise;
use lab::Lab;
use pristine_image::fs::{Kind, Ranges};
use pristine_image::Info;

const MIB: u64 = 1 << 20;

#[test]
fn xfs() {
    let lab = Lab::new();
    lab.tree();
    let variants = [
        "",
        "-b size=1024",
        "-s size=4096 -i size=2048",
        "-m rmapbt=0,reflink=0,finobt=0 -d agcount=3",
    ];
    for options in variants {
        let what = format!("mkfs.xfs {options}");
        fs::remove_file(lab.path("fs")).unwrap_or_default();
        lab.sparse("fs", 320 * MIB);
        let proto = "x\n0 0\nd--755 0 0\nlarge ---644 0 0 tree/a/b/c/d/large\nf ---600 0 0 tree/a/file59\n$\n";
        fs::write(lab.path("proto"), proto).unwrap();
        lab.run(&format!("mkfs.xfs -q {options} -L mother -p proto fs"));
        // The judge: what xfs_db says is free is filled with secrets, and the file system does not mind.
        let text = lab.run("xfs_db -r -c 'sb 0' -c 'p blocksize agblocks uuid' -c 'freesp -d' fs");
        let value = |key: &str| {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(key))
                .unwrap();
            line.trim_start_matches(" = ").to_owned()
        };
        let (block, ag): (u64, u64) = (
            value("blocksize").parse().unwrap(),
            value("agblocks").parse().unwrap(),
        );
        let extents = text.lines().filter_map(|line| {
            let numbers: Option<Vec<u64>> = line
                .split_whitespace()
                .map(|word| word.parse().ok())
                .collect();
            numbers.filter(|numbers| numbers.len() == 3)
        });
        let extents = extents.map(|n| {
            let start = (n[0] * ag + n[1]) * block;
            start..start + n[2] * block
        });
        let free = Ranges::of(extents.collect());
        lab.fill("fs", &free);
        lab.run("xfs_repair -n fs 2>&1");
        let survey = lab.rebuild("fs", "built");
        let volume = &survey.volumes[0];
        assert_eq!((volume.kind, &volume.kept), (Kind::Xfs, &None), "{what}");
        assert_eq!(survey.free, free, "{what}");
        assert_eq!(volume.label.as_deref(), Some("mother"));
        assert_eq!(volume.uuid.as_deref(), Some(value("uuid").as_str()));
        assert!(!lab.holds_secret("built"), "{what}");
        lab.run("xfs_repair -n built 2>&1");
    }
    // A log whose last record is not an unmount; an older format; a damaged tree.
    let kept = |change: &str, why: &str| {
        lab.run(&format!("cp --sparse=always built bad && {change}"));
        let told = lab.survey("bad").warnings().join("\n");
        assert!(told.contains(why), "{change}: {told}");
    };
    let log = lab.run("xfs_db -r -c 'sb 0' -c 'p logstart' -c 'convert fsblock '$(xfs_db -r -c 'sb 0' -c 'p logstart' built | sed 's/.* //')' byte' built");
    let at = log
        .lines()
        .last()
        .unwrap()
        .split(['(', ')'])
        .nth(1)
        .unwrap()
        .to_owned();
    kept(
        &format!(
            "printf '\\0\\0\\0\\2' | dd of=bad bs=1 seek=$(({at} + 40)) conv=notrunc status=none"
        ),
        "log must be replayed",
    );
    kept(
        "xfs_db -x -c 'agf 1' -c 'write -d freeblks 1' bad",
        "allocation group 1",
    );
    kept(
        "printf '\\xff' | dd of=bad bs=1 seek=220 conv=notrunc status=none",
        "superblock",
    );
    fs::remove_file(lab.path("old")).unwrap_or_default();
    lab.sparse("old", 320 * MIB);
    lab.run("mkfs.xfs -q -m crc=0 old");
    assert!(lab.survey("old").warnings()[0].contains("version 5"));
}

#[test]
fn btrfs() {
    let lab = Lab::new();
    lab.tree();
    let variants = [
        "",
        "-m single",
        "-M",
        "-O ^free-space-tree,^no-holes",
        "-O block-group-tree -n 4096",
        "-m dup -d dup",
    ];
    for options in variants {
        let what = format!("mkfs.btrfs {options}");
        fs::remove_file(lab.path("fs")).unwrap_or_default();
        lab.sparse("fs", 200 * MIB);
        lab.run(&format!(
            "mkfs.btrfs -q {options} -L mother --rootdir tree fs"
        ));
        let free = lab.survey("fs").free;
        // The judge: with garbage in all that is free, every tree, checksum and file is still right.
        lab.fill("fs", &free);
        lab.run("btrfs check --readonly --check-data-csum fs 2>&1");
        let survey = lab.rebuild("fs", "built");
        let volume = &survey.volumes[0];
        assert_eq!((volume.kind, &volume.kept), (Kind::Btrfs, &None), "{what}");
        assert_eq!(volume.label.as_deref(), Some("mother"));
        let uuid =
            lab.run("btrfs inspect-internal dump-super built | sed -n 's/^fsid[[:space:]]*//p'");
        assert_eq!(volume.uuid.as_deref(), Some(uuid.trim()));
        // Two copies at most of 14 MiB, the trees, and the first MiB.
        assert!(
            survey.free.total() > 160 * MIB,
            "{what}: {}",
            survey.free.total()
        );
        lab.run("btrfs check --readonly --check-data-csum built 2>&1");
        lab.run("rm -rf out; mkdir out; btrfs restore -S built out 2>&1; diff -r --no-dereference out tree");
    }
    let kept = |change: &str, why: &str| {
        lab.run(&format!("cp --sparse=always built bad && {change}"));
        let survey = lab.survey("bad");
        let told = survey.warnings().join("\n");
        assert!(
            told.contains(why) && survey.free.is_empty(),
            "{change}: {told}"
        );
    };
    kept(
        "printf 'x' | dd of=bad bs=1 seek=65700 conv=notrunc status=none",
        "checksum",
    );
    kept("truncate -s 100M bad", "size");
    let root = lab.run(
        "btrfs inspect-internal dump-tree -t extent built | grep -m1 -oP '^(leaf|node) \\K[0-9]+'",
    );
    let place = lab.run(&format!(
        "btrfs-map-logical -l {} built | grep -oP 'mirror 1 .*physical \\K[0-9]+'",
        root.trim()
    ));
    let places: Vec<&str> = place.split_whitespace().collect();
    kept(
        &format!(
            "printf 'xyz' | dd of=bad bs=1 seek=$(({} + 90)) conv=notrunc status=none",
            places[0]
        ),
        "damaged",
    );
    fs::remove_file(lab.path("other")).unwrap_or_default();
    lab.sparse("other", 200 * MIB);
    lab.run("mkfs.btrfs -q --csum xxhash other");
    assert!(lab.survey("other").warnings()[0].contains("CRC-32C"));
}

/// Mounted, used, with snapshots and files deleted: trees of more than one level, freed and reused space.
#[test]
fn file_systems_that_were_used() {
    let known = fs::read_to_string("/proc/filesystems").unwrap();
    for (kind, make, check) in [
        ("ext4", "mkfs.ext4 -q -F", "e2fsck -fn"),
        ("xfs", "mkfs.xfs -q", "xfs_repair -n"),
        (
            "btrfs",
            "mkfs.btrfs -q",
            "btrfs check --readonly --check-data-csum",
        ),
    ] {
        let lab = Lab::new();
        lab.tree();
        if !known.lines().any(|line| line.trim() == kind) {
            eprintln!("this kernel has no {kind} built in or loaded: only its tools were tried");
            continue;
        }
        lab.sparse("fs", 400 * MIB);
        let (done, text) = lab.try_run(&format!(
            "{make} fs && mkdir mnt && unshare -m sh -ec 'mount -o loop fs mnt
            for n in $(seq 1 1500); do head -c $((n * 50)) tree/a/b/c/d/large >mnt/many$n; done; sync
            cp -a tree mnt/; cp tree/secret mnt/again; sync
            for n in $(seq 1 2 1500); do rm mnt/many$n; done; rm mnt/again mnt/tree/secret; sync; umount mnt'"
        ));
        if text.contains("failed to setup loop device") || text.contains("permission denied") {
            eprintln!("no loop devices here: only the tools were tried");
            return;
        }
        assert!(done, "{kind}: {text}");
        assert!(lab.holds_secret("fs"), "{kind}");
        let survey = lab.rebuild("fs", "built");
        let volume = &survey.volumes[0];
        assert_eq!(volume.kept, None, "{kind}");
        assert!(!lab.holds_secret("built"), "{kind}");
        lab.run(&format!("{check} built 2>&1"));
        lab.run("unshare -m sh -ec 'mount -o loop built mnt; diff -r --no-dereference mnt/tree tree --exclude=secret
            for n in $(seq 2 2 1500); do head -c $((n * 50)) tree/a/b/c/d/large | cmp - mnt/many$n; done; umount mnt'");
        // While it is mounted, it is not clean, and so it is kept.
        lab.run("unshare -m sh -ec 'mount -o loop fs mnt; echo x >mnt/new; sync; cp fs mounted; umount mnt'");
        if kind != "btrfs" {
            let survey = lab.survey("mounted");
            assert!(
                survey.free.is_empty(),
                "{kind}: {:?}",
                survey.volumes[0].kept
            );
        }
    }
}

#[test]
fn swap() {
    let lab = Lab::new();
    for page in [4096, 16384] {
        fs::write(lab.path("fs"), noise(1, 8 << 20)).unwrap();
        lab.run(&format!("mkswap -q -p {page} -L mother fs 2>&1"));
        let survey = lab.rebuild("fs", "built");
        assert_eq!(
            survey.free,
            Ranges::of(std::iter::once(page..8 * MIB).collect())
        );
        let volume = &survey.volumes[0];
        assert_eq!(
            (volume.kind, volume.label.as_deref()),
            (Kind::Swap, Some("mother"))
        );
        let uuid = lab.run("blkid -p -o value -s UUID built");
        assert_eq!(volume.uuid.as_deref(), Some(uuid.trim()));
        // A hibernated system.
        lab.run(&format!(
            "printf 'S1SUSPEND\\0' | dd of=fs bs=1 seek={} conv=notrunc status=none",
            page - 10
        ));
        let survey = lab.rebuild("fs", "built");
        assert!(survey.free.is_empty());
        assert!(
            survey.warnings()[0].contains("hibernated"),
            "{:?}",
            survey.warnings()
        );
    }
}

#[test]
fn disks_with_partitions() {
    let lab = Lab::new();
    lab.tree();
    let gpt = "label: gpt\nsize=8M, type=uefi\nsize=20M, type=swap\nsize=64M\nsize=4M\n";
    let dos = "label: dos\nsize=8M, type=c\nsize=20M, type=82\ntype=5\nsize=64M\nsize=4M\n";
    for (label, script, numbers) in [("gpt", gpt, [1, 2, 3, 4]), ("dos", dos, [1, 2, 5, 6])] {
        fs::remove_file(lab.path("disk")).unwrap_or_default();
        lab.sparse("disk", 110 * MIB);
        lab.run(&format!("printf '{script}' | sfdisk -q disk"));
        let text = lab.run("sfdisk -l -o Device,Start,End -q disk | grep ^disk");
        let ranges: Vec<Range<u64>> = text
            .lines()
            .map(|line| {
                let n: Vec<u64> = line
                    .split_whitespace()
                    .skip(1)
                    .map(|n| n.parse().unwrap())
                    .collect();
                n[0] * 512..(n[1] + 1) * 512
            })
            .filter(|range| range.end - range.start < 70 * MIB)
            .collect();
        // What lies between the partitions, and in the one that holds nothing known.
        let all = Ranges::of(ranges.clone());
        lab.fill(
            "disk",
            &all.complement(MIB..100 * MIB)
                .in_range(MIB + 4096..100 * MIB)
                .map(|r| r.start + 4096..r.end)
                .collect(),
        );
        lab.fill("disk", &Ranges::of(vec![ranges[3].clone()]));
        for (range, make) in
            ranges
                .iter()
                .zip(["mkfs.vfat", "mkswap -q", "mke2fs -q -F -d tree", "true"])
        {
            let size = range.end - range.start;
            fs::remove_file(lab.path("part")).unwrap_or_default();
            lab.sparse("part", size);
            if make == "true" {
                continue;
            }
            lab.run(&format!("{make} part; dd if=part of=disk bs=64k seek={} oflag=seek_bytes conv=notrunc status=none", range.start));
        }
        let survey = lab.rebuild("disk", "built");
        assert_eq!(survey.table, Some(label));
        let found: Vec<_> = survey
            .volumes
            .iter()
            .map(|v| (v.partition.unwrap(), v.range.clone(), v.kind))
            .collect();
        let kinds = [Kind::Vfat, Kind::Swap, Kind::Ext2, Kind::Unknown];
        let expected: Vec<_> = numbers
            .into_iter()
            .zip(ranges.clone())
            .zip(kinds)
            .map(|((n, r), k)| (n, r, k))
            .collect();
        assert_eq!(found, expected, "{label}");
        assert_eq!(survey.warnings().len(), 1);
        assert!(survey.free.total() > 60 * MIB);
        let gaps = all.complement(0..110 * MIB);
        assert_eq!(survey.free.without(&gaps), survey.free, "gaps are kept");
        let mut info = Info::new();
        survey.note(&mut info);
        assert_eq!(
            (info.get("fs.type"), info.get("fs.1.type")),
            (Some(label), Some("vfat"))
        );
        let last = numbers[2];
        assert!(
            info.get(&format!("fs.{last}.free"))
                .unwrap()
                .parse::<u64>()
                .unwrap()
                > 5000
        );

        // A file system's signature over the same disk, and a table that is cut off.
        lab.run(
            "cp --sparse=always disk bad; printf 'XFSB' | dd of=bad bs=1 conv=notrunc status=none",
        );
        assert!(lab.survey("bad").kept.unwrap().contains("xfs"));
        lab.run("cp --sparse=always disk bad; truncate -s 60M bad");
        assert!(lab.survey("bad").kept.is_some());
        if label == "gpt" {
            lab.run("cp --sparse=always disk bad; printf 'x' | dd of=bad bs=1 seek=1100 conv=notrunc status=none");
            assert!(lab.survey("bad").kept.unwrap().contains("checksum"));
            lab.run("cp --sparse=always disk bad; dd if=/dev/zero of=bad bs=512 seek=1 count=1 conv=notrunc status=none");
            assert!(lab.survey("bad").kept.unwrap().contains("GPT"));
        }
    }
}
