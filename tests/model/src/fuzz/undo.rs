// SPDX-License-Identifier: GPL-2.0

//! Walks through an undo area of any pages: chunks in order, damage to them, and headers of nonsense with a right checksum.

use arbitrary::Arbitrary;
use pristine_shared::crc::crc32c;
use pristine_shared::error::Error;
use pristine_shared::layout::Placement;
use pristine_shared::recovery::Source;
use pristine_shared::superblock::Superblock;
use pristine_shared::undo::{self, Chunk, Place, Undo, Writer, MAX_ENTRIES};
use pristine_shared::{Page, PAGE_SIZE};

use crate::image;

const PAGES: u64 = 48;

#[derive(Arbitrary, Debug)]
enum Step {
    /// The next chunk, of pages with this content.
    Chunk(Vec<(u16, u8)>),
    /// Damage to a byte.
    Flip { page: u8, at: u16, with: u8 },
    /// A header that says anything, with a right checksum.
    Header {
        page: u8,
        entries: u32,
        data: u32,
        words: Vec<u64>,
    },
}

#[derive(Arbitrary, Debug)]
struct Input {
    used: u8,
    from: u8,
    steps: Vec<Step>,
}

struct Area(Vec<Page>);

impl Source for Area {
    fn read(&mut self, page: u64, into: &mut Page) -> pristine_shared::Result {
        let found = usize::try_from(page).ok().and_then(|n| self.0.get(n));
        *into = *found.ok_or(Error::Io(page))?;
        Ok(())
    }
}

pub(super) fn run(data: &[u8]) {
    let Some(input) = super::read::<Input>(data) else {
        return;
    };
    let mut sb = image::base(Placement::Separate).sb;
    // Only these say where the area is; the rest of the layout does not matter.
    sb.layout.undo_start = 0;
    sb.layout.undo_pages = PAGES;
    sb.undo = Undo {
        epoch: 3,
        used: u64::from(input.used) % (PAGES + 1),
        kept: 0,
    };
    let mut area = Area(vec![[0; PAGE_SIZE]; 48]);
    let mut end = 0;
    let mut untouched = true;
    let mut written: Vec<Chunk> = Vec::new();
    for step in &input.steps {
        match step {
            Step::Chunk(pages) => {
                if let Some(chunk) = append(&mut area, &sb, end, pages) {
                    end = chunk.end();
                    written.push(chunk);
                }
            }
            Step::Flip { page, at, with } => {
                untouched &= *with == 0;
                area.0[usize::from(*page) % 48][usize::from(*at) % PAGE_SIZE] ^= with;
            }
            Step::Header {
                page,
                entries,
                data,
                words,
            } => {
                untouched = false;
                let at = u64::from(*page) % PAGES;
                area.0[usize::from(*page) % 48] = header(&sb, at, *entries, *data, words);
            }
        }
    }
    let from = u64::from(input.from) % (PAGES + 2);
    for from in [0, from] {
        let mut next = from;
        let mut found = Vec::new();
        let walked = undo::walk(&mut area, &sb, from, &mut [0; PAGE_SIZE], |chunk, page| {
            assert!(chunk.at >= next && chunk.end() <= PAGES);
            next = chunk.end();
            let mut entries = 0;
            for entry in undo::entries_of(page, chunk) {
                entries += 1;
                if let Some(at) = entry.at {
                    assert!(at > chunk.at && at < chunk.end());
                }
            }
            assert!((1..=MAX_ENTRIES).contains(&entries));
            found.push(*chunk);
        });
        assert!(walked.end >= next);
        assert!(walked.damaged <= sb.undo.used.max(1));
        if untouched && from == 0 {
            assert_eq!(found, written);
        }
    }
}

fn append(area: &mut Area, sb: &Superblock, at: u64, pages: &[(u16, u8)]) -> Option<Chunk> {
    let mut header = [0; PAGE_SIZE];
    let mut writer = Writer::new(&mut header);
    let start = usize::try_from(at).ok()?;
    let mut next = start + 1;
    for (page, fill) in pages {
        if next >= 48 {
            break;
        }
        let content = [*fill; PAGE_SIZE];
        if writer.push(&mut header, u64::from(*page), &content) {
            area.0[next] = content;
            next += 1;
        }
    }
    if writer.entries() == 0 || start >= 48 {
        return None;
    }
    let chunk = Chunk {
        at,
        entries: writer.entries(),
        data: writer.data() as u64,
    };
    writer.finish(&mut header, &Place::new(sb, at));
    area.0[start] = header;
    Some(chunk)
}

fn header(sb: &Superblock, at: u64, entries: u32, data: u32, words: &[u64]) -> Page {
    let mut page = [0; PAGE_SIZE];
    page[4..8].copy_from_slice(b"PUND");
    page[8..16].copy_from_slice(&sb.undo.epoch.to_le_bytes());
    page[16..24].copy_from_slice(&at.to_le_bytes());
    page[24..28].copy_from_slice(&entries.to_le_bytes());
    page[28..32].copy_from_slice(&data.to_le_bytes());
    for (to, word) in page[32..].chunks_exact_mut(12).zip(words) {
        to[..8].copy_from_slice(&word.to_le_bytes());
    }
    let seed = crc32c(crc32c(0, &sb.meta_uuid), &sb.image_id);
    let crc = crc32c(seed, &page[4..]);
    page[..4].copy_from_slice(&crc.to_le_bytes());
    page
}
