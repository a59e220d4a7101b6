// SPDX-License-Identifier: GPL-2.0

//! ext2, ext3 and ext4.

use std::fs;

use pristine_image::fs::{Kind, Ranges};

use crate::lab::Lab;
use crate::MIB;

/// The free blocks of an ext4 file system as dumpe2fs lists them.
fn dumpe2fs(lab: &Lab, name: &str) -> Ranges {
    let text = lab.run(&format!("dumpe2fs {name} 2>/dev/null"));
    let value = |key: &str| {
        let line = text.lines().find(|line| line.starts_with(key)).unwrap();
        line[key.len()..].trim().parse::<u64>().unwrap()
    };
    let size = value("Block size:");
    let lists = text
        .lines()
        .filter_map(|line| line.strip_prefix("  Free blocks: "));
    let ranges = lists
        .flat_map(|list| list.split(", "))
        .filter(|r| !r.trim().is_empty());
    let ranges = ranges.map(|range| {
        let (first, last) = range
            .trim()
            .split_once('-')
            .unwrap_or((range.trim(), range.trim()));
        let number = |text: &str| text.parse::<u64>().unwrap();
        number(first) * size..(number(last) + 1) * size
    });
    Ranges::of(ranges.collect())
}

#[test]
fn ext4_and_its_kin() {
    // mkfs of Debian 13, of Debian 12, and what else there is.
    let old = "^orphan_file,^metadata_csum_seed";
    let variants = [
        ("ext4", "-b 4096", Kind::Ext4),
        ("ext4", "-b 4096 -g 2048", Kind::Ext4),
        ("ext4", &format!("-b 4096 -g 2048 -O {old}"), Kind::Ext4),
        ("ext4", "-O ^64bit", Kind::Ext4),
        (
            "ext4",
            &format!("-O ^metadata_csum,uninit_bg,{old}"),
            Kind::Ext4,
        ),
        ("ext4", &format!("-O ^metadata_csum,{old}"), Kind::Ext4),
        ("ext4", "-b 4096 -O bigalloc -C 16384", Kind::Ext4),
        ("ext4", "-b 1024 -O bigalloc -C 8192", Kind::Ext4),
        (
            "ext4",
            "-b 4096 -g 1024 -O meta_bg,^resize_inode",
            Kind::Ext4,
        ),
        ("ext4", "-O meta_bg,^resize_inode -b 1024", Kind::Ext4),
        ("ext4", "-O sparse_super2 -E num_backup_sb=1", Kind::Ext4),
        ("ext4", "-O ^flex_bg -b 1024", Kind::Ext4),
        (
            "ext4",
            "-O ^sparse_super,^flex_bg,^resize_inode -b 2048 -g 2048",
            Kind::Ext4,
        ),
        ("ext4", "-O project,casefold", Kind::Ext4),
        ("ext4", "-O ^has_journal,^extent,^64bit", Kind::Ext4),
        ("ext3", "", Kind::Ext3),
        ("ext2", "-b 1024", Kind::Ext2),
    ];
    let lab = Lab::new();
    lab.tree();
    for (kind, options, expected) in variants {
        let what = format!("mkfs.{kind} {options}");
        fs::remove_file(lab.path("fs")).unwrap_or_default();
        lab.sparse("fs", 72 * MIB);
        lab.run(&format!("mke2fs -q -F -t {kind} {options} -L mother -d tree fs && debugfs -w -R 'rm /secret' fs"));
        assert!(lab.holds_secret("fs"), "{what}");
        // What deleting leaves in the bitmaps, their checksums and counts is for e2fsck to say.
        lab.run("e2fsck -fn fs");
        let survey = lab.rebuild("fs", "built");
        let volume = &survey.volumes[0];
        assert_eq!((volume.kind, &volume.kept), (expected, &None), "{what}");
        assert_eq!(volume.label.as_deref(), Some("mother"));
        let free = dumpe2fs(&lab, "fs");
        assert_eq!(volume.free, free.total(), "{what}");
        assert!(free.without(&survey.free).is_empty(), "{what}");
        // And the journal, but for its first block.
        let more = survey.free.without(&free);
        let size = lab.run("dumpe2fs -h fs 2>/dev/null | sed -n 's/^Block size: *//p'");
        let size: u64 = size.trim().parse().unwrap();
        let journal = lab.run("debugfs -R 'blocks <8>' fs 2>/dev/null");
        let blocks: Vec<u64> = journal
            .split_whitespace()
            .map(|n| n.parse().unwrap())
            .collect();
        let blocks = blocks.iter().skip(1).map(|n| n * size..(n + 1) * size);
        let journal = Ranges::of(blocks.collect());
        assert!(more.without(&journal).is_empty(), "{what}");
        assert_eq!(volume.dead, more.total());
        assert!(
            expected == Kind::Ext2
                || options.contains("^has_journal")
                || volume.dead >= 4 * MIB - size * 16
        );
        assert!(!lab.holds_secret("built"), "{what}");
        lab.run("e2fsck -fn built");
        lab.run("rm -rf out; mkdir out; debugfs -R 'rdump / out' built 2>/dev/null; rm -rf out/lost+found");
        lab.run(
            "diff -r --no-dereference out tree --exclude=secret && ! ls out/secret 2>/dev/null",
        );
        let uuid = lab.run("dumpe2fs -h built 2>/dev/null | sed -n 's/^Filesystem UUID: *//p'");
        assert_eq!(volume.uuid.as_deref(), Some(uuid.trim()));
    }
}

#[test]
fn ext4_that_is_not_clean_is_kept() {
    let lab = Lab::new();
    lab.tree();
    lab.sparse("good", 64 * MIB);
    lab.run("mke2fs -q -F -t ext4 -d tree good && debugfs -w -R 'rm /secret' good");
    assert!(lab.survey("good").free.total() > 20 * MIB);
    let kept = |change: &str, why: &str| {
        lab.run(&format!("cp --sparse=always good bad && {change}"));
        let survey = lab.rebuild("bad", "built");
        assert!(survey.free.is_empty(), "{change}");
        let told = survey.warnings().join("\n");
        assert!(told.contains(why), "{change}: {told}");
        assert!(lab.holds_secret("built"), "{change}");
    };
    kept("debugfs -w -R 'feature needs_recovery' bad", "journal");
    kept("debugfs -w -R 'ssv state 2' bad", "errors");
    kept("debugfs -w -R 'ssv state 0' bad", "cleanly");
    // A bitmap with a wrong checksum; a descriptor that counts otherwise, its checksum made right.
    kept(
        "debugfs -w -R 'set_bg 0 block_bitmap_csum 1' bad",
        "checksum",
    );
    kept(
        "debugfs -w -f <(echo 'set_bg 0 free_blocks_count 7'; echo 'set_bg 0 checksum calc') bad",
        "free clusters",
    );
    // One bit of the superblock.
    kept(
        "printf '\\xff' | dd of=bad bs=1 seek=1100 conv=notrunc status=none",
        "superblock",
    );
    kept("truncate -s 40M bad", "larger");
    // Another signature on the same disk.
    kept(
        "printf 'LABELONE' | dd of=bad bs=1 seek=512 conv=notrunc status=none",
        "LVM2_member",
    );
}
