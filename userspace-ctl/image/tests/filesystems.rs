// SPDX-License-Identifier: GPL-2.0

//! What real file systems count as free, and nothing else, becomes zero. The programs of each file system are the
//! judges: they say what is free, that the built image is whole, and that its files are the same.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

use common::{noise, read_image, Packs};
use pristine_image::fs::{Kind, Ranges, Survey};
use pristine_image::{build, BuildOptions, Info, Manifest, Source};

const MIB: u64 = 1 << 20;
const SECRET: &[u8] = b"the secret that was deleted long ago";

struct Lab(tempfile::TempDir);

impl Lab {
    fn new() -> Self {
        Lab(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs a line of shell in the directory; it must succeed. Returns its output.
    fn run(&self, line: &str) -> String {
        let (status, text) = self.try_run(line);
        assert!(status, "{line}: {text}");
        text
    }

    fn try_run(&self, line: &str) -> (bool, String) {
        let output = Command::new("/bin/bash")
            .args(["-c", line])
            .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
            .env("LC_ALL", "C")
            .current_dir(self.0.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        (output.status.success(), text + &errors)
    }

    /// A tree with files of many sizes, a deep directory, links, and one secret.
    fn tree(&self) {
        let tree = self.path("tree");
        fs::create_dir_all(tree.join("a/b/c/d")).unwrap();
        for n in 0..60u64 {
            let size = 37 * n * n * n / 30 + n;
            fs::write(tree.join(format!("a/file{n}")), noise(n, size as usize)).unwrap();
        }
        fs::write(tree.join("a/b/c/d/large"), noise(99, 9 << 20)).unwrap();
        fs::write(tree.join("etc"), "words\n").unwrap();
        std::os::unix::fs::symlink("a/b", tree.join("link")).unwrap();
        let secret: Vec<u8> = SECRET.iter().copied().cycle().take(700_000).collect();
        fs::write(tree.join("secret"), secret).unwrap();
    }

    fn sparse(&self, name: &str, size: u64) {
        File::create(self.path(name))
            .unwrap()
            .set_len(size)
            .unwrap();
    }

    fn holds_secret(&self, name: &str) -> bool {
        let secret = String::from_utf8_lossy(SECRET);
        self.try_run(&format!("grep -qF '{secret}' {name}")).0
    }

    fn survey(&self, name: &str) -> Survey {
        let source = Source::open(&self.path(name)).unwrap();
        source.zero_free().unwrap().1
    }

    /// Builds an image of `from` with zeros where it is free, and writes it to `to`.
    fn rebuild(&self, from: &str, to: &str) -> Survey {
        let source = Source::open(&self.path(from)).unwrap();
        let (source, survey) = source.zero_free().unwrap();
        let mut packs = Packs::default();
        let cancel = AtomicBool::new(false);
        let options = BuildOptions {
            level: 1,
            ..BuildOptions::default()
        };
        let built = build(&source, &options, &mut packs, &|_| (), &cancel).unwrap();
        let manifest = Manifest::parse(&built.manifest, None).unwrap();
        let image = read_image(&manifest, &built.manifest, &packs);
        // Nothing but what is free has changed, and that is all zero.
        let before = fs::read(self.path(from)).unwrap();
        let len = before.len() as u64;
        for used in survey.free.complement(0..len).iter() {
            let range = used.start as usize..used.end as usize;
            assert!(
                image[range.clone()] == before[range],
                "{used:?} has changed"
            );
        }
        let zeros = vec![0; 1 << 16];
        for free in survey.free.iter() {
            let range = free.start as usize..free.end as usize;
            assert!(
                image[range]
                    .chunks(zeros.len())
                    .all(|c| *c == zeros[..c.len()]),
                "{free:?}"
            );
        }
        fs::write(self.path(to), image).unwrap();
        survey
    }

    /// Fills ranges with what no file system would survive.
    fn fill(&self, name: &str, ranges: &Ranges) {
        let file = File::options().write(true).open(self.path(name)).unwrap();
        for range in ranges.iter() {
            let garbage: Vec<u8> = SECRET.iter().copied().cycle().take(1 << 16).collect();
            let mut at = range.start;
            while at < range.end {
                let len = (range.end - at).min(garbage.len() as u64);
                file.write_all_at(&garbage[..len as usize], at).unwrap();
                at += len;
            }
        }
    }
}

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

/// Puts a file into the root directory of a fresh FAT: its clusters, from 3 on, and its entry.
fn put_in_fat(path: &Path, bits: u32, clusters: Range<u16>, deleted: bool) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut boot = vec![0; 512];
    file.read_exact_at(&mut boot, 0).unwrap();
    let le16 = |at: usize| u64::from(u16::from_le_bytes([boot[at], boot[at + 1]]));
    let le32 = |at: usize| u64::from(u32::from_le_bytes(boot[at..at + 4].try_into().unwrap()));
    let (sector, per_cluster, reserved) = (le16(11), u64::from(boot[13]), le16(14));
    let fat_sectors = if le16(22) == 0 { le32(36) } else { le16(22) };
    let root = reserved + 2 * fat_sectors;
    let data = root + le16(17) * 32 / sector;
    for cluster in clusters.clone() {
        let next = if cluster + 1 == clusters.end {
            0x0fff_ffff
        } else {
            u32::from(cluster) + 1
        };
        for copy in 0..2 {
            let fat = (reserved + copy * fat_sectors) * sector;
            let n = u64::from(cluster);
            if !deleted {
                match bits {
                    16 => file
                        .write_all_at(&(next as u16).to_le_bytes(), fat + 2 * n)
                        .unwrap(),
                    32 => file.write_all_at(&next.to_le_bytes(), fat + 4 * n).unwrap(),
                    _ => {
                        let at = fat + n + n / 2;
                        let mut pair = [0; 2];
                        file.read_exact_at(&mut pair, at).unwrap();
                        let (old, next) = (u16::from_le_bytes(pair), next as u16 & 0xfff);
                        let new = if n % 2 == 0 {
                            old & 0xf000 | next
                        } else {
                            old & 0xf | next << 4
                        };
                        file.write_all_at(&new.to_le_bytes(), at).unwrap();
                    }
                }
            }
        }
        let at = (data + (u64::from(cluster) - 2) * per_cluster) * sector;
        let content: Vec<u8> = SECRET
            .iter()
            .copied()
            .cycle()
            .take((per_cluster * sector) as usize)
            .collect();
        file.write_all_at(&content, at).unwrap();
    }
    let mut entry = [0u8; 32];
    entry[..11].copy_from_slice(if deleted {
        b"\xe5ELETED TXT"
    } else {
        b"FILE    TXT"
    });
    entry[26..28].copy_from_slice(&clusters.start.to_le_bytes());
    let bytes = u32::from(clusters.end - clusters.start) * (per_cluster * sector) as u32;
    entry[28..32].copy_from_slice(&bytes.to_le_bytes());
    // FAT32's root is cluster 2; the label has the first entry.
    let root = if bits == 32 { data } else { root };
    file.write_all_at(&entry, root * sector + if deleted { 64 } else { 32 })
        .unwrap();
}

#[test]
fn vfat() {
    for (bits, size, options) in [
        (12, 4, ""),
        (16, 40, ""),
        (32, 100, "-s 1"),
        (16, 64, "-S 4096 -s 1"),
    ] {
        let lab = Lab::new();
        lab.sparse("fs", size * MIB);
        lab.run(&format!(
            "mkfs.vfat -F {bits} {options} -n MOTHER -i 1234abcd fs"
        ));
        let empty = lab.survey("fs").free.total();
        put_in_fat(&lab.path("fs"), bits, 3..20, false);
        let after = lab.survey("fs").free.total();
        put_in_fat(&lab.path("fs"), bits, 30..41, true);
        lab.run("fsck.fat -n fs || true");
        let survey = lab.rebuild("fs", "built");
        let volume = &survey.volumes[0];
        assert_eq!((volume.kind, &volume.kept), (Kind::Vfat, &None));
        assert_eq!(
            (volume.uuid.as_deref(), volume.label.as_deref()),
            (Some("1234-ABCD"), Some("MOTHER"))
        );
        // One file, 17 clusters.
        assert_eq!((empty - after) % 17, 0);
        assert_eq!(survey.free.total(), after);
        let cluster = (empty - after) / 17;
        let text = lab.run("fsck.fat -nv built || true");
        let used = text.lines().last().unwrap().to_owned();
        assert!(used.contains(" files, "), "{text}");
        let counts = used.split(", ").nth(1).unwrap().split([' ', '/']);
        let counts: Vec<u64> = counts.filter_map(|word| word.parse().ok()).collect();
        assert_eq!(
            survey.free.total(),
            (counts[1] - counts[0]) * cluster,
            "{used}"
        );
        assert!(lab.holds_secret("built"), "the file is still there");
        // In use, or its tables differ.
        let kept = |change: &str, why: &str| {
            lab.run(&format!("cp fs bad && {change}"));
            let survey = lab.survey("bad");
            assert!(
                survey.free.is_empty() && survey.warnings()[0].contains(why),
                "{change}"
            );
        };
        let state = if bits == 32 { 65 } else { 37 };
        kept(
            &format!("printf '\\1' | dd of=bad bs=1 seek={state} conv=notrunc status=none"),
            "cleanly",
        );
        let fat = lab.run("fsck.fat -nv fs | grep -oP 'First FAT starts at byte \\K[0-9]+'");
        let at: u64 = fat.trim().parse().unwrap();
        kept(
            &format!(
                "printf '\\7' | dd of=bad bs=1 seek={} conv=notrunc status=none",
                at + 160
            ),
            "differ",
        );
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
