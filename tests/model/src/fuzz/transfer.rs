// SPDX-License-Identifier: GPL-2.0

//! What comes from other people's programs: the structure of .xz files, indexes of casync, archives of files.

use arbitrary::Arbitrary;
use pristine_transfer::casync::{CaibxIndex, ChunkDigest};
use pristine_transfer::input::Bytes;
use pristine_transfer::tree::Tree;
use pristine_transfer::xz::{decode_block, XzIndex};

use super::read;

/// Changes to a file that was good.
type Edits = Vec<(u16, u8)>;

fn edit(bytes: &mut Vec<u8>, edits: &Edits, cut: u16) {
    for &(at, mask) in edits {
        if let Some(byte) = bytes.get_mut(usize::from(at)) {
            *byte ^= mask;
        }
    }
    let len = bytes.len();
    bytes.truncate(len - usize::from(cut).min(len));
}

#[derive(Arbitrary, Debug)]
struct XzStream {
    flags: u8,
    /// Unpadded length and length of the content of each block.
    records: Vec<(u16, u32)>,
    padding: u8,
    /// Whether the lengths count bytes that are there.
    honest: bool,
}

#[derive(Arbitrary, Debug)]
struct XzInput {
    streams: Vec<XzStream>,
    edits: Edits,
    cut: u16,
    /// Makes the checksum of the last footer right after the edits, when no padding follows it.
    mend: bool,
    raw: Vec<u8>,
}

fn put_number(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_crc(out: &mut Vec<u8>, from: usize) {
    let crc = crc32fast::hash(&out[from..]);
    out.extend(crc.to_le_bytes());
}

fn xz_stream(out: &mut Vec<u8>, stream: &XzStream) {
    let flags = stream.flags & 0x0f;
    out.extend(b"\xfd7zXZ\0");
    let at = out.len();
    out.extend([0, flags]);
    put_crc(out, at);
    let mut index = vec![0];
    put_number(&mut index, stream.records.len() as u64);
    for &(unpadded, len) in stream.records.iter().take(64) {
        let unpadded = u64::from(unpadded % 512) + 5;
        put_number(&mut index, unpadded);
        put_number(&mut index, u64::from(len % (1 << 20)));
        let there = if stream.honest {
            unpadded
        } else {
            unpadded / 2
        };
        out.resize(out.len() + there.next_multiple_of(4) as usize, 0);
    }
    index.resize(index.len().next_multiple_of(4), 0);
    put_crc(&mut index, 0);
    let mut fields = ((index.len() / 4 - 1) as u32).to_le_bytes().to_vec();
    fields.extend([0, flags]);
    out.extend(index);
    out.extend(crc32fast::hash(&fields).to_le_bytes());
    out.extend(fields);
    out.extend(b"YZ");
    out.resize(out.len() + usize::from(stream.padding % 8) * 4, 0);
}

/// The index of an .xz file.
pub(super) fn run_xz(data: &[u8]) {
    let Some(input) = read::<XzInput>(data) else {
        return;
    };
    let mut bytes = input.raw;
    let from_scratch = bytes.is_empty();
    for stream in input.streams.iter().take(8) {
        xz_stream(&mut bytes, stream);
    }
    edit(&mut bytes, &input.edits, input.cut);
    let padded = input
        .streams
        .iter()
        .take(8)
        .last()
        .is_some_and(|s| s.padding % 8 != 0);
    if input.mend && !padded && bytes.len() >= 12 {
        let footer = bytes.len() - 12;
        let crc = crc32fast::hash(&bytes[footer + 4..footer + 10]).to_le_bytes();
        bytes[footer..footer + 4].copy_from_slice(&crc);
        bytes[footer + 10..].copy_from_slice(b"YZ");
    }
    let good = from_scratch
        && !input.streams.is_empty()
        && input.edits.is_empty()
        && input.cut == 0
        && input
            .streams
            .iter()
            .take(8)
            .all(|s| s.honest && s.records.len() <= 64);
    let file = Bytes(bytes);
    let index = match XzIndex::read(&file, "the input") {
        Ok(index) => index,
        Err(error) => {
            assert!(!good, "a good file is refused: {error}");
            return;
        }
    };
    let (mut at, mut start) = (0, 0);
    for (number, block) in index.blocks().iter().enumerate() {
        assert!(block.offset >= at, "blocks overlap");
        at = block.offset + block.stored_len();
        assert!(at <= file.0.len() as u64, "a block lies outside");
        assert!(block.start == start && block.len > 0);
        start += block.len;
        assert_eq!(index.block_of(block.start), Some(number));
        assert_eq!(index.block_of(start - 1), Some(number));
        if block.len < 1 << 16 {
            let stored = &file.0[block.offset as usize..at as usize];
            if let Ok(content) = decode_block(block, stored, "the input") {
                assert_eq!(content.len() as u64, block.len);
            }
        }
    }
    assert_eq!(start, index.len());
    assert_eq!(index.block_of(start), None);
}

#[derive(Arbitrary, Debug)]
struct CaibxInput {
    flags: u64,
    sizes: (u32, u32, u32),
    chunks: Vec<(u16, u8)>,
    edits: Edits,
    cut: u16,
    raw: Vec<u8>,
}

/// An index of casync.
pub(super) fn run_caibx(data: &[u8]) {
    let Some(input) = read::<CaibxInput>(data) else {
        return;
    };
    let mut bytes = input.raw;
    let mut put = |numbers: &[u64]| {
        for number in numbers {
            bytes.extend(number.to_le_bytes());
        }
    };
    let (small, more, most) = input.sizes;
    let small = u64::from(small % 1024) + 1;
    let average = small + u64::from(more % 4096);
    put(&[
        48,
        0x9682_4d9c_7b12_9ff9,
        input.flags,
        small,
        average,
        average + u64::from(most),
    ]);
    put(&[u64::MAX, 0xe75b_9e11_2f17_417d]);
    let mut end = 0;
    for &(len, id) in input.chunks.iter().take(1000) {
        end += u64::from(len);
        put(&[end, u64::from(id), 0, 0, 0]);
    }
    let table = 56 + 40 * input.chunks.len().min(1000) as u64;
    put(&[0, 0, 48, table, 0x4b4f_050e_5549_ecd1]);
    edit(&mut bytes, &input.edits, input.cut);
    let Ok(index) = CaibxIndex::parse(&bytes, "the input") else {
        return;
    };
    assert!(matches!(
        index.digest(),
        ChunkDigest::Sha256 | ChunkDigest::Sha512_256
    ));
    let mut start = 0;
    for (number, chunk) in index.chunks().iter().enumerate() {
        assert!(chunk.start == start && chunk.end > start);
        assert_eq!(index.chunk_of(start), Some(number));
        start = chunk.end;
        assert_eq!(index.chunk_of(start - 1), Some(number));
    }
    assert_eq!(index.len(), start);
    assert_eq!(index.chunk_of(start), None);
}

/// Names that mean something to who unpacks.
const NAMES: [&str; 16] = [
    "a",
    "b",
    "a/b",
    "a/b/a",
    "/a",
    "./b/",
    "..",
    "a/../..",
    ".wh.a",
    ".wh.b",
    "a/.wh..wh..opq",
    "a/.wh.b",
    "b/a",
    ".",
    "../a",
    ".wh..",
];

#[derive(Arbitrary, Debug)]
struct Member {
    name: u8,
    kind: u8,
    link: u8,
    len: u8,
}

#[derive(Arbitrary, Debug)]
struct OciInput {
    layers: Vec<Vec<Member>>,
    whiteouts: bool,
    edits: Edits,
    /// Makes the checksums of the headers right after the edits.
    mend: bool,
    raw: Vec<u8>,
}

/// A member of an archive, at least its header.
fn put_member(out: &mut Vec<u8>, member: &Member) {
    const KINDS: &[u8] = b"0125634L x7?";
    let name = NAMES[usize::from(member.name) % NAMES.len()].as_bytes();
    let link = NAMES[usize::from(member.link) % NAMES.len()].as_bytes();
    let kind = KINDS[usize::from(member.kind) % KINDS.len()];
    let mut header = [0; 512];
    header[..name.len()].copy_from_slice(name);
    header[100..107].copy_from_slice(b"0000644");
    header[108..115].copy_from_slice(b"0000000");
    header[116..123].copy_from_slice(b"0000000");
    let len = match kind {
        b'0' | b'L' | b'x' => u64::from(member.len),
        _ => 0,
    };
    header[124..135].copy_from_slice(format!("{len:011o}").as_bytes());
    header[136..147].copy_from_slice(b"00000000000");
    header[156] = kind;
    header[157..157 + link.len()].copy_from_slice(link);
    header[257..265].copy_from_slice(b"ustar\x0000");
    mend(&mut header);
    out.extend(header);
    out.resize(out.len() + len.next_multiple_of(512) as usize, b'a');
}

fn mend(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
}

/// Layers of files, one over the other.
pub(super) fn run_oci(data: &[u8]) {
    let Some(input) = read::<OciInput>(data) else {
        return;
    };
    let mut layers = vec![input.raw];
    for members in input.layers.iter().take(8) {
        let mut layer = Vec::new();
        for member in members.iter().take(64) {
            put_member(&mut layer, member);
        }
        edit(&mut layer, &input.edits, 0);
        if input.mend {
            layer
                .chunks_exact_mut(512)
                .filter(|block| block[257..262] == *b"ustar")
                .for_each(mend);
        }
        layers.push(layer);
    }
    layers.retain(|layer| !layer.is_empty());
    let Ok(tree) = Tree::from_layers(layers, input.whiteouts, 1 << 20) else {
        return;
    };
    let paths = tree.paths();
    let mut directories = std::collections::BTreeSet::new();
    directories.insert(std::path::PathBuf::new());
    for (path, kind) in &paths {
        let plain = |part| matches!(part, std::path::Component::Normal(_));
        assert!(path.components().all(plain), "{path:?} leads out");
        let parent = path.parent().map(std::path::Path::to_path_buf);
        assert!(
            parent.is_some_and(|p| directories.contains(&p)),
            "{path:?} lies in no directory"
        );
        if *kind == 'd' {
            directories.insert(path.clone());
        }
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        assert!(
            !input.whiteouts || !name.is_some_and(|name| name.starts_with(".wh.")),
            "{path:?}"
        );
    }
    assert!(tree.bytes() <= 1 << 20);
}
