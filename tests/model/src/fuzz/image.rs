// SPDX-License-Identifier: GPL-2.0

//! A whole image of the metadata, made by the formatter and then changed, through everything that reads one.

use arbitrary::Arbitrary;
use pristine_metadata::dump::dump;
use pristine_metadata::{check, Changes, Metadata};
use pristine_shared::layout::Placement;
use pristine_shared::recovery;
use pristine_shared::superblock::Superblock;
use pristine_shared::PAGE_SIZE;

use crate::disk::{fix_crc, Damage};
use crate::image::{self, Image, META_UUID};
use crate::naive;

#[derive(Arbitrary, Debug)]
enum Edit {
    /// Damage to a page: the anchors are pages 0 and 1, then come the log and the areas.
    Page {
        page: u8,
        damage: Damage,
        good_crc: bool,
    },
    /// A page is what another page was.
    Copy { from: u8, to: u8 },
    /// One more record, or some sectors of one.
    Record {
        ahead: i8,
        sectors: u8,
        runs: Vec<(u16, u8)>,
    },
    /// The data device's label.
    Label { damage: Damage, good_crc: bool },
    /// A good root that says something else.
    Root {
        area: bool,
        seq: i8,
        log_seq: i8,
        copies: u8,
    },
}

#[derive(Arbitrary, Debug)]
struct Input {
    tail: bool,
    true_counts: bool,
    edits: Vec<Edit>,
}

fn load(image: &Image) -> pristine_shared::Result<Superblock> {
    let pages = image.meta.len();
    let placement = image.sb.layout.placement;
    recovery::load_superblock(
        &mut image.meta.clone(),
        placement,
        pages,
        &mut [0; PAGE_SIZE],
    )
}

fn write_root(image: &mut Image, sb: &Superblock, copies: u8) {
    let anchors = image.pages();
    for copy in (0..2).filter(|n| copies & (1 << n) != 0) {
        sb.encode(image.meta.page_mut(anchors[copy]));
    }
}

fn make(data: &[u8]) -> Option<Image> {
    let input = super::read::<Input>(data)?;
    let mut image = image::base(if input.tail {
        Placement::Tail
    } else {
        Placement::Separate
    })
    .clone();
    let pages = image.pages();
    let page_of = |n: u8| pages[usize::from(n) % pages.len()];
    for edit in &input.edits {
        match edit {
            Edit::Page {
                page,
                damage,
                good_crc,
            } => {
                let n = page_of(*page);
                let kind = image.kind(n)?;
                let page = image.meta.page_mut(n);
                damage.apply(page);
                if *good_crc {
                    fix_crc(page, kind, &META_UUID);
                }
            }
            Edit::Copy { from, to } => {
                let page = *image.meta.page(page_of(*from))?;
                *image.meta.page_mut(page_of(*to)) = page;
            }
            Edit::Record {
                ahead,
                sectors,
                runs,
            } => {
                let entries: Vec<_> = runs
                    .iter()
                    .map(|(start, len)| super::entry(*start, *len))
                    .collect();
                let seq = image.sb.root.log_seq + 3;
                image.write_entries(
                    seq.saturating_add_signed((*ahead).into()),
                    &entries,
                    *sectors,
                );
            }
            Edit::Label { damage, good_crc } => {
                let Some(data) = &mut image.data else {
                    continue;
                };
                let page = data.page_mut(data.len() - 1);
                damage.apply(page);
                if *good_crc {
                    fix_crc(page, crate::disk::Kind::Root, &META_UUID);
                }
            }
            Edit::Root {
                area,
                seq,
                log_seq,
                copies,
            } => {
                let mut sb = image.sb;
                sb.sequence += 1;
                sb.root.area = (*area).into();
                sb.root.seq = sb.root.seq.saturating_add_signed((*seq).into());
                sb.root.log_seq = sb.root.log_seq.saturating_add_signed((*log_seq).into());
                write_root(&mut image, &sb, *copies);
            }
        }
    }
    if input.true_counts {
        if let Ok(mut sb) = load(&image) {
            if let Ok(planes) = naive::uncounted_planes(&image.meta, &sb) {
                [sb.root.dirty_blocks, sb.root.stale_blocks] = naive::counts(&planes);
                write_root(&mut image, &sb, 3);
            }
        }
    }
    Some(image)
}

/// Recovery as the kernel does it, against the naive one.
pub(super) fn run(data: &[u8]) {
    let Some(image) = make(data) else { return };
    if let Ok(sb) = load(&image) {
        super::agree(&image.meta, &sb);
    }
}

/// What the userspace makes of it: it loads what recovery accepts, never panics on the rest, and a commit over
/// anything that loads gives metadata without a fault.
pub(super) fn run_check(data: &[u8]) {
    let Some(image) = make(data) else { return };
    dump(&mut image.stores());
    let opened = Metadata::open_on(image.stores());
    let usable = match check(image.stores(), &mut |_, _| {}) {
        Ok((report, _)) => {
            assert!(!(report.usable && report.identity_mismatch));
            assert_eq!(report.usable, report.usable && report.blocks.is_some());
            report.usable
        }
        Err(_) => {
            assert!(opened.is_err(), "check refuses what can be opened");
            false
        }
    };
    let Ok(mut metadata) = opened else {
        assert!(!usable, "check calls usable what cannot be opened");
        return;
    };
    let sb = *metadata.superblock();
    let loaded = metadata.load();
    assert_eq!(loaded.is_ok(), super::agree(&image.meta, &sb).is_some());
    let Ok((planes, end)) = loaded else {
        assert!(!usable, "check calls usable what cannot be loaded");
        return;
    };
    metadata.commit(&planes, &Changes::default()).unwrap();
    let stores = metadata.stores_mut();
    let again = Image {
        meta: stores.meta.clone(),
        data: stores.data.clone(),
        sb,
    };
    let mut metadata = Metadata::open_on(again.stores()).unwrap();
    assert!(metadata.superblock().clean);
    let (planes_again, end_again) = metadata.load().unwrap();
    assert!(planes == planes_again, "a commit changed the planes");
    assert_eq!(end_again.records, 0);
    assert!(
        end_again.next_seq > end.next_seq,
        "a number may be used again"
    );
}
