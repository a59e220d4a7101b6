// SPDX-License-Identifier: GPL-2.0

//! Archives of root file systems: what is kept, and what they cannot do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use common::{open, watch, Lab};
use pristine_transfer::oci::Platform;
use pristine_transfer::{Content, Error, Opened, Result, Tree};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

fn tree(opened: Result<Opened>) -> Result<Tree> {
    match opened?.content {
        Content::Tree(tree) => Ok(tree),
        other => panic!("not a tree: {other:?}"),
    }
}

/// Unpacks a tree beside a file that it must not reach.
fn stage(lab: &Lab, tree: &Tree) -> PathBuf {
    let root = lab.path("staged");
    let _ = fs::remove_dir_all(&root);
    fs::create_dir(&root).unwrap();
    tree.stage(&root, &watch()).unwrap();
    root
}

fn names(tree: &Tree) -> Vec<String> {
    tree.paths()
        .into_iter()
        .map(|(path, kind)| format!("{kind} {}", path.display()))
        .collect()
}

#[test]
fn everything_that_tar_holds_is_kept() {
    let lab = Lab::new();
    let script = "mkdir -p t/etc t/dev t/bin t/var && cd t && echo hosts > etc/hosts && ln etc/hosts etc/again && \
        ln -s ../etc/hosts bin/link && mknod dev/null c 1 3 && mknod dev/sda b 8 0 && mkfifo dev/pipe && \
        truncate -s 40M var/sparse && printf data | dd of=var/sparse bs=1 seek=20000001 conv=notrunc status=none && \
        cp /bin/true bin/true && setcap cap_net_raw+ep bin/true && chown 12:34 etc/hosts && chmod 4755 bin/true && \
        chown -h 5:6 bin/link && chmod 1777 var && touch -d '2001-02-03 04:05:06.25' etc/hosts && \
        python3 -c \"import os; os.setxattr('etc/hosts', 'user.note', b'a\\nb\\0c')\" && \
        mkdir $(printf 'long%.0s' $(seq 60)) && touch $(printf 'long%.0s' $(seq 60))/file";
    // Without setcap the capability is written by hand.
    let script = script.replace(
        "setcap cap_net_raw+ep bin/true",
        "python3 -c \"import os; os.setxattr('bin/true', 'security.capability', \
         bytes.fromhex('0100000200200000000000000000000000000000'))\"",
    );
    lab.sh(&script);
    for (name, args) in [
        ("gnu.tar", "--format=gnu --sparse"),
        (
            "pax.tar",
            "--format=pax --sparse --xattrs --xattrs-include=*",
        ),
        ("pax.tar.gz", "--format=pax -z --xattrs --xattrs-include=*"),
        ("pax.tar.xz", "--format=pax -J --xattrs --xattrs-include=*"),
        (
            "pax.tar.zst",
            "--format=pax --zstd --xattrs --xattrs-include=*",
        ),
    ] {
        lab.sh(&format!("tar -C t {args} -cf {name} ."));
        let tree = tree(lab.open(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let root = stage(&lab, &tree);
        let meta = |path: &str| root.join(path).symlink_metadata().unwrap();
        let hosts = meta("etc/hosts");
        assert_eq!(fs::read(root.join("etc/hosts")).unwrap(), b"hosts\n");
        assert_eq!(
            (hosts.uid(), hosts.gid(), hosts.nlink()),
            (12, 34, 2),
            "{name}"
        );
        assert_eq!(hosts.ino(), meta("etc/again").ino());
        assert_eq!((meta("bin/link").uid(), meta("bin/link").gid()), (5, 6));
        assert_eq!(
            fs::read_link(root.join("bin/link")).unwrap(),
            Path::new("../etc/hosts")
        );
        assert!(meta("dev/null").file_type().is_char_device() && meta("dev/null").rdev() == 0x103);
        assert!(meta("dev/sda").file_type().is_block_device() && meta("dev/sda").rdev() == 0x800);
        assert!(meta("dev/pipe").file_type().is_fifo());
        assert_eq!(meta("bin/true").mode() & 0o7777, 0o4755);
        assert_eq!(meta("var").mode() & 0o7777, 0o1777);
        assert_eq!(
            hosts.mtime(),
            fs::metadata(lab.path("t/etc/hosts")).unwrap().mtime()
        );
        let sparse = fs::read(root.join("var/sparse")).unwrap();
        assert_eq!(
            sparse,
            fs::read(lab.path("t/var/sparse")).unwrap(),
            "{name}"
        );
        assert!(meta("var/sparse").blocks() < 1000);
        assert!(root.join("long".repeat(60)).join("file").is_file());
        if name.starts_with("pax") {
            assert_eq!(hosts.mtime_nsec(), 250_000_000);
            let mut value = [0; 64];
            let len =
                rustix::fs::getxattr(root.join("etc/hosts"), "user.note", &mut value).unwrap();
            assert_eq!(&value[..len], b"a\nb\0c");
            let len =
                rustix::fs::getxattr(root.join("bin/true"), "security.capability", &mut value)
                    .unwrap();
            assert_eq!(len, 20);
        }
    }
}

/// An archive of hand-made members: name, kind, link or content.
fn archive(members: &[(&str, EntryType, &str)]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (name, kind, text) in members {
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        // As bytes: what the library itself would refuse to write is what is tested.
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        let content = match kind {
            EntryType::Symlink | EntryType::Link => {
                header.as_mut_bytes()[157..157 + text.len()].copy_from_slice(text.as_bytes());
                &b""[..]
            }
            _ => text.as_bytes(),
        };
        header.set_size(content.len() as u64);
        header.set_cksum();
        builder.append(&header, content).unwrap();
    }
    builder.into_inner().unwrap()
}

const FILE: EntryType = EntryType::Regular;
const LINK: EntryType = EntryType::Link;
const SYMLINK: EntryType = EntryType::Symlink;
const DIR: EntryType = EntryType::Directory;

fn open_members(lab: &Lab, members: &[(&str, EntryType, &str)]) -> Result<Tree> {
    lab.write("members.tar", &archive(members));
    tree(lab.open("members.tar"))
}

#[test]
fn names_do_not_lead_out() {
    let lab = Lab::new();
    lab.write("outside", b"untouched");
    for members in [
        &[("../outside", FILE, "x")][..],
        &[("a/../../outside", FILE, "x")],
        &[("..", DIR, "")],
        &[("a", FILE, "x"), ("b", LINK, "../outside")],
        &[("b", LINK, "outside")],
        &[("b", LINK, "/etc/passwd")],
        &[("d", DIR, ""), ("b", LINK, "d")],
        &[("a", FILE, "x"), ("a/b", FILE, "x")],
        &[("l", SYMLINK, "l"), ("l/x", FILE, "x")],
        &[("l", SYMLINK, "m"), ("m", SYMLINK, "l"), ("l/x", FILE, "x")],
        &[("", SYMLINK, "/")],
        &[("x", EntryType::new(b'?'), "")],
    ] {
        let refused = open_members(&lab, members);
        assert!(
            refused.is_err(),
            "{members:?}: {:?}",
            refused.map(|tree| names(&tree))
        );
    }
    // What leads somewhere within the root leads there, and only there.
    let tree = open_members(
        &lab,
        &[
            ("/etc/hosts", FILE, "hosts"),
            ("out", SYMLINK, "../../.."),
            ("out/written", FILE, "through a link"),
            ("abs", SYMLINK, "/etc"),
            ("abs/new", FILE, "new"),
            ("hosts", LINK, "abs/hosts"),
            ("again", LINK, "out"),
            ("dir", SYMLINK, "../outside"),
            ("dir/x", FILE, "x"),
        ],
    )
    .unwrap();
    let root = stage(&lab, &tree);
    assert_eq!(fs::read(root.join("written")).unwrap(), b"through a link");
    assert_eq!(fs::read(root.join("etc/new")).unwrap(), b"new");
    assert_eq!(fs::read(root.join("hosts")).unwrap(), b"hosts");
    assert_eq!(fs::read(root.join("outside/x")).unwrap(), b"x");
    assert_eq!(fs::read(lab.path("outside")).unwrap(), b"untouched");
    assert!(!lab.path("written").exists());
}

#[test]
fn archives_are_limited_and_damage_is_told() {
    let lab = Lab::new();
    let content = "x".repeat(100_000);
    let good = archive(&[("a", FILE, &content), ("b", FILE, "y")]);
    lab.write("a.tar", &good);
    let limited = open(&lab, "a.tar", |options| options.max_size = Some(50_000));
    assert!(matches!(limited, Err(Error::TooLarge { .. })));
    for cut in [512, 1000, 50_000, 100_863, 100_864 + 600] {
        lab.write("cut.tar", &good[..cut]);
        let result = tree(lab.open("cut.tar"));
        assert!(result.is_err(), "cut at {cut}");
    }
    for at in (0..512).chain(100_864..101_376) {
        let mut bad = good.clone();
        bad[at] ^= 4;
        lab.write("bad.tar", &bad);
        // The checksum of a header tells; where its magic is hit, it is no archive any more.
        if let Ok(opened) = lab.open("bad.tar") {
            assert!(
                matches!(opened.content, Content::Disk(_)),
                "flipped at {at}"
            );
        }
    }
    // Sizes that cannot be.
    let mut huge = good.clone();
    huge[124..135].copy_from_slice(b"77777777777");
    let mut header = Header::from_byte_slice(&huge[..512]).clone();
    header.set_cksum();
    huge[..512].copy_from_slice(header.as_bytes());
    lab.write("huge.tar", &huge);
    assert!(matches!(lab.open("huge.tar"), Err(Error::Damaged { .. })));
}

/// An OCI layout in a directory.
struct Layout<'a> {
    lab: &'a Lab,
    layers: Vec<serde_json::Value>,
    diff_ids: Vec<String>,
}

fn sha256(bytes: &[u8]) -> String {
    let hex: Vec<String> = Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    hex.concat()
}

impl<'a> Layout<'a> {
    fn new(lab: &'a Lab) -> Self {
        fs::create_dir_all(lab.path("oci/blobs/sha256")).unwrap();
        lab.write("oci/oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
        Layout {
            lab,
            layers: Vec::new(),
            diff_ids: Vec::new(),
        }
    }

    fn blob(&self, kind: &str, bytes: &[u8]) -> serde_json::Value {
        let digest = sha256(bytes);
        self.lab.write(&format!("oci/blobs/sha256/{digest}"), bytes);
        serde_json::json!({"mediaType": kind, "digest": format!("sha256:{digest}"), "size": bytes.len()})
    }

    fn layer(&mut self, members: &[(&str, EntryType, &str)], compress: &str) {
        let plain = archive(members);
        self.diff_ids.push(format!("sha256:{}", sha256(&plain)));
        let stored = match compress {
            "zstd" => zstd::bulk::compress(&plain, 1).unwrap(),
            "gzip" => {
                let mut encoder =
                    flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                std::io::Write::write_all(&mut encoder, &plain).unwrap();
                encoder.finish().unwrap()
            }
            _ => plain,
        };
        let kind = format!("application/vnd.oci.image.layer.v1.tar+{compress}");
        let layer = self.blob(&kind, &stored);
        self.layers.push(layer);
    }

    /// The manifest's descriptor.
    fn manifest(&mut self, architecture: &str) -> serde_json::Value {
        let config = serde_json::json!({"architecture": architecture, "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": self.diff_ids}});
        let config = self.blob(
            "application/vnd.oci.image.config.v1+json",
            config.to_string().as_bytes(),
        );
        let manifest =
            serde_json::json!({"schemaVersion": 2, "config": config, "layers": self.layers});
        let mut descriptor = self.blob(
            "application/vnd.oci.image.manifest.v1+json",
            manifest.to_string().as_bytes(),
        );
        descriptor["platform"] = serde_json::json!({"os": "linux", "architecture": architecture});
        self.layers.clear();
        self.diff_ids.clear();
        descriptor
    }

    fn index(&self, manifests: &[serde_json::Value]) {
        let index = serde_json::json!({"schemaVersion": 2, "manifests": manifests});
        self.lab
            .write("oci/index.json", index.to_string().as_bytes());
    }
}

fn platform(text: &str) -> Option<Platform> {
    Some(text.parse().unwrap())
}

#[test]
fn layers_are_put_together() {
    let lab = Lab::new();
    let mut layout = Layout::new(&lab);
    layout.layer(
        &[
            ("etc/", DIR, ""),
            ("etc/keep", FILE, "1"),
            ("etc/gone", FILE, "1"),
            ("etc/changed", FILE, "1"),
            ("opaque/", DIR, ""),
            ("opaque/old", FILE, "1"),
            ("opaque/sub/old", FILE, "1"),
            ("tree/deep/file", FILE, "1"),
            ("usr/lib/x", FILE, "1"),
            ("lib", SYMLINK, "usr/lib"),
        ],
        "gzip",
    );
    layout.layer(
        &[
            ("etc/.wh.gone", FILE, ""),
            ("etc/.wh.never-there", FILE, ""),
            ("etc/changed", FILE, "2"),
            // Before and after the mark: what the layer itself brings stays.
            ("opaque/new-before", FILE, "2"),
            ("opaque/.wh..wh..opq", FILE, ""),
            ("opaque/sub/new", FILE, "2"),
            ("tree/.wh.deep", FILE, ""),
            ("lib/y", FILE, "2"),
            (".wh..wh.plnk", FILE, ""),
        ],
        "zstd",
    );
    layout.layer(
        &[("etc/gone", FILE, "3"), ("late", LINK, "etc/keep")],
        "none",
    );
    let manifest = layout.manifest("amd64");
    layout.index(&[manifest]);
    let expected = [
        "d etc",
        "f etc/changed",
        "f etc/gone",
        "f etc/keep",
        "f late",
        "l lib",
        "d opaque",
        "f opaque/new-before",
        "d opaque/sub",
        "f opaque/sub/new",
        "d tree",
        "d usr",
        "d usr/lib",
        "f usr/lib/x",
        "f usr/lib/y",
    ];
    let of = |name: &str| {
        let opened = open(&lab, name, |options| {
            options.platform = platform("linux/amd64")
        });
        tree(opened).unwrap_or_else(|error| panic!("{name}: {error}"))
    };
    let from_directory = of("oci");
    assert_eq!(names(&from_directory), expected);
    let root = stage(&lab, &from_directory);
    assert_eq!(fs::read(root.join("etc/changed")).unwrap(), b"2");
    assert_eq!(fs::read(root.join("etc/gone")).unwrap(), b"3");
    // The same as an archive, also compressed.
    lab.sh("tar -C oci -cf oci.tar . && gzip -k -1 oci.tar");
    for name in ["oci.tar", "oci.tar.gz"] {
        assert_eq!(names(&of(name)), expected, "{name}");
    }
}

#[test]
fn the_platform_is_chosen_and_digests_are_compared() {
    let lab = Lab::new();
    let mut layout = Layout::new(&lab);
    layout.layer(&[("amd64", FILE, "x")], "gzip");
    let amd64 = layout.manifest("amd64");
    layout.layer(&[("arm64", FILE, "x")], "gzip");
    let arm64 = layout.manifest("arm64");
    let nested = serde_json::json!({"schemaVersion": 2, "manifests": [amd64, arm64]});
    let nested = layout.blob(
        "application/vnd.oci.image.index.v1+json",
        nested.to_string().as_bytes(),
    );
    layout.index(&[nested]);
    let of = |wanted: &str| {
        tree(open(&lab, "oci", |options| {
            options.platform = platform(wanted)
        }))
    };
    assert_eq!(names(&of("linux/amd64").unwrap()), ["f amd64"]);
    assert_eq!(names(&of("linux/arm64").unwrap()), ["f arm64"]);
    let other = of("linux/s390x").unwrap_err().to_string();
    assert!(
        other.contains("linux/amd64") && other.contains("--platform"),
        "{other}"
    );
    // Each blob is compared with its name.
    let blobs: Vec<_> = fs::read_dir(lab.path("oci/blobs/sha256"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    let mut refused = 0;
    for blob in &blobs {
        let good = fs::read(blob).unwrap();
        let mut bad = good.clone();
        let middle = bad.len() / 2;
        bad[middle] ^= 1;
        fs::write(blob, &bad).unwrap();
        let results = [of("linux/amd64"), of("linux/arm64")];
        assert!(
            results.iter().any(|result| result.is_err()),
            "{}",
            blob.display()
        );
        refused += results
            .iter()
            .filter(|result| matches!(result, Err(Error::Damaged { .. })))
            .count();
        fs::write(blob, &good).unwrap();
    }
    assert!(refused >= blobs.len());
    // A link in place of a blob is not followed.
    let blob = &blobs[0];
    fs::rename(blob, lab.path("moved")).unwrap();
    std::os::unix::fs::symlink(lab.path("moved"), blob).unwrap();
    assert!([of("linux/amd64"), of("linux/arm64")]
        .iter()
        .any(|r| matches!(r, Err(Error::Unsafe { .. }))));
}

#[test]
fn what_docker_saves_is_read() {
    let lab = Lab::new();
    let layer = archive(&[("file", FILE, "content")]);
    let config =
        serde_json::json!({"rootfs": {"diff_ids": [format!("sha256:{}", sha256(&layer))]}})
            .to_string();
    let name = format!("{}.json", sha256(config.as_bytes()));
    let id = sha256(b"a layer");
    let save = |manifest: &str, config: &str| {
        let members = [
            (format!("{id}/VERSION"), b"1.0".to_vec()),
            (format!("{id}/layer.tar"), layer.clone()),
            (name.clone(), config.as_bytes().to_vec()),
            ("manifest.json".to_owned(), manifest.as_bytes().to_vec()),
            ("repositories".to_owned(), b"{}".to_vec()),
        ];
        let mut builder = Builder::new(Vec::new());
        for (name, content) in &members {
            let mut header = Header::new_ustar();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            builder
                .append_data(&mut header, name, content.as_slice())
                .unwrap();
        }
        lab.write("saved.tar", &builder.into_inner().unwrap());
        tree(lab.open("saved.tar"))
    };
    let manifest = |layer: &str| {
        serde_json::json!([{"Config": name, "RepoTags": ["app:1"], "Layers": [layer]}]).to_string()
    };
    let good = manifest(&format!("{id}/layer.tar"));
    assert_eq!(names(&save(&good, &config).unwrap()), ["f file"]);
    assert!(matches!(
        save(&good, &config.replace("sha256:", "sha256:0")),
        Err(Error::Damaged { .. })
    ));
    for path in ["../layer.tar", "/etc/passwd", "missing.tar", "a/../b"] {
        assert!(save(&manifest(path), &config).is_err(), "{path}");
    }
}

#[test]
fn whiteouts_do_no_harm() {
    let lab = Lab::new();
    for name in [".wh.", ".wh...", "d/.wh..", "../.wh.x", "d/../.wh.x"] {
        let _ = fs::remove_dir_all(lab.path("oci"));
        let mut layout = Layout::new(&lab);
        layout.layer(&[("d/x", FILE, "1")], "none");
        layout.layer(&[(name, FILE, "")], "none");
        let manifest = layout.manifest("amd64");
        layout.index(&[manifest]);
        let refused = open(&lab, "oci", |options| {
            options.platform = platform("linux/amd64")
        });
        assert!(
            matches!(refused, Err(Error::Unsafe { .. })),
            "{name}: {refused:?}"
        );
    }
    // In a plain archive such a name is a name.
    let tree = open_members(&lab, &[(".wh.x", FILE, "")]).unwrap();
    assert_eq!(names(&tree), ["f .wh.x"]);
}
