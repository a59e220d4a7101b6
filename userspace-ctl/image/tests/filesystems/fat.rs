// SPDX-License-Identifier: GPL-2.0

//! FAT.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use pristine_image::fs::Kind;

use crate::lab::{Lab, SECRET};
use crate::MIB;

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
