// SPDX-License-Identifier: GPL-2.0

//! The pair of superblocks, and the label.

use arbitrary::Arbitrary;
use pristine_shared::layout::Placement;
use pristine_shared::recovery;
use pristine_shared::superblock::{choose, Label, Superblock, MAX_SEQUENCE};
use pristine_shared::{Page, PAGE_SIZE};

use crate::disk::{fix_crc, Damage, Kind};
use crate::image::{self, META_UUID};

#[derive(Arbitrary, Debug)]
struct Copy {
    start: Start,
    damage: Vec<Damage>,
    good_crc: bool,
}

#[derive(Arbitrary, Debug)]
enum Start {
    Blank,
    Good { behind: u8, flags: u8 },
    Label,
}

#[derive(Arbitrary, Debug)]
struct Input {
    tail: bool,
    look_for_tail: bool,
    device_pages: Option<u64>,
    copies: [Copy; 2],
}

impl Copy {
    fn page(&self, sb: &Superblock) -> Page {
        let mut page = [0; PAGE_SIZE];
        match self.start {
            Start::Blank => {}
            Start::Good { behind, flags } => Superblock {
                sequence: sb.sequence + 255 - u64::from(behind),
                clean: flags & 1 != 0,
                needs_check: flags & 2 != 0,
                provisioning: flags & 4 != 0,
                ..*sb
            }
            .encode(&mut page),
            Start::Label => Label {
                data_uuid: sb.data_uuid,
                meta_uuid: sb.meta_uuid,
                data_sectors: sb.data_sectors,
            }
            .encode(&mut page),
        }
        for damage in &self.damage {
            damage.apply(&mut page);
        }
        if self.good_crc {
            fix_crc(&mut page, Kind::Root, &META_UUID);
        }
        page
    }
}

/// What holds of every superblock that is accepted.
fn check(sb: &Superblock, device_pages: u64) {
    let mut page = [0; PAGE_SIZE];
    sb.encode(&mut page);
    assert_eq!(Superblock::decode(&page, 0, device_pages), Ok(*sb));
    let (g, l) = (&sb.geometry, &sb.layout);
    assert!(l.area_start[1] + l.area_pages <= device_pages);
    assert!(l.log_start + l.log_pages <= l.area_start[0]);
    assert!(l.area_start[0] + l.area_pages <= l.area_start[1]);
    for copy in [0, 1] {
        let anchor = l.placement.anchor(copy, device_pages).unwrap();
        assert!(!(l.log_start..l.area_start[1] + l.area_pages).contains(&anchor));
    }
    assert!(g.blocks() > 0 && g.extents() > 0 && sb.root.area < 2);
    assert!(sb.root.log_seq + l.log_pages < u64::MAX && sb.sequence <= MAX_SEQUENCE);
    // The managed blocks are beside the metadata and the label.
    match l.placement {
        Placement::Tail => assert!(g.sectors() <= l.log_start * 8),
        Placement::Separate => assert!(g.sectors() <= (sb.data_sectors / 8).saturating_sub(1) * 8),
    }
}

pub(super) fn run(data: &[u8]) {
    let Some(input) = super::read::<Input>(data) else {
        return;
    };
    let placement = |tail| {
        if tail {
            Placement::Tail
        } else {
            Placement::Separate
        }
    };
    let base = image::base(placement(input.tail));
    let pages = input.device_pages.unwrap_or(base.meta.len());
    let copies = input.copies.each_ref().map(|copy| copy.page(&base.sb));
    let [first, second] = [0, 1].map(|n| Superblock::decode(&copies[n], n as u8, pages));
    for sb in [first, second].iter().flatten() {
        check(sb, pages);
    }
    let chosen = choose(first, second);
    match (chosen, first, second) {
        (Ok(c), Ok(a), Ok(b)) => {
            assert_eq!(c.sequence, a.sequence.max(b.sequence));
            assert_eq!(a.meta_uuid, b.meta_uuid);
        }
        (Ok(c), Ok(one), Err(_)) | (Ok(c), Err(_), Ok(one)) => assert_eq!(c, one),
        (Ok(c), Err(_), Err(_)) => panic!("two bad copies gave {c:?}"),
        (Err(_), Ok(a), Ok(b)) => assert_ne!(a.meta_uuid, b.meta_uuid),
        (Err(_), ..) => {}
    }
    for page in &copies {
        if let Ok(label) = Label::decode(page) {
            let mut again = [0; PAGE_SIZE];
            label.encode(&mut again);
            assert_eq!(Label::decode(&again), Ok(label));
        }
    }

    // And as recovery finds them, possibly where the other placement has them.
    let wanted = placement(input.look_for_tail);
    let mut meta = base.meta.clone();
    for (n, page) in (0..).zip(&copies) {
        *meta.page_mut(wanted.anchor(n, meta.len()).unwrap()) = *page;
    }
    let mut buffer = [0; PAGE_SIZE];
    let pages = meta.len();
    if let Ok(sb) = recovery::load_superblock(&mut meta, wanted, pages, &mut buffer) {
        assert_eq!(sb.layout.placement, wanted);
        check(&sb, pages);
    }
}
