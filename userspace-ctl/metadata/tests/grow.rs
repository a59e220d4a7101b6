// SPDX-License-Identifier: GPL-2.0

//! Growing in place: nothing tracked is lost, what is new is dirty, and a power cut leaves the old size or the new.

#![allow(clippy::unwrap_used)]

mod common;

use common::{disks_of, open, stores, Content, Cut, Machine, Random};
use pristine_metadata::shared::layout::Placement;
use pristine_metadata::shared::PAGE_SIZE;
use pristine_metadata::{
    format_on, BlockState, Changes, Class, Error, FormatOptions, GrowOptions, Growth, Image,
    Initial, Metadata, Planes, Result, Run, Select, Storage, Superblock,
};

const BOTH: [Placement; 2] = [Placement::Separate, Placement::Tail];
const PAGE: u64 = PAGE_SIZE as u64;

/// A device in the middle of its life: blocks in all states, and the current checkpoint in `area`.
struct Old {
    disks: Vec<Content>,
    planes: Planes,
}

impl Old {
    fn new(placement: Placement, managed: u64, area: u8) -> Self {
        let pages = managed.div_ceil(PAGE);
        let disks = match placement {
            Placement::Tail => vec![Content::new(pages + 60, 0x5a)],
            Placement::Separate => {
                vec![Content::new(pages + 1, 0x5a), Content::new(90, 0x5a)]
            }
        };
        let options = FormatOptions {
            managed_bytes: Some(managed),
            log_pages: Some(16),
            image: Some(Image {
                id: [7; 32],
                generation: 3,
                bytes: managed / 2,
            }),
            initial: Initial::Clean,
            force: true,
            ..FormatOptions::default()
        };
        let mut metadata = format_on(stores(&Machine::new(disks), placement), &options).unwrap();
        let (mut planes, _) = metadata.load().unwrap();
        let mut random = Random::new(managed + u64::from(area));
        for _ in 0..20 {
            let start = random.below(planes.blocks());
            let end = start + 1 + random.below(planes.blocks() / 10);
            let to = [BlockState::Clean, BlockState::Dirty, BlockState::Stale];
            planes.set(Run { start, end }, to[random.below(3) as usize]);
        }
        let last = planes.blocks() - 1;
        planes.set(
            Run {
                start: last - 3,
                end: last + 1,
            },
            BlockState::Clean,
        );
        loop {
            metadata.commit(&planes, &Changes::default()).unwrap();
            if metadata.superblock().root.area == area {
                break;
            }
        }
        Self {
            disks: disks_of(&mut metadata),
            planes,
        }
    }

    /// The disks, of which the data device has `pages` more.
    fn enlarged(&self, pages: u64) -> Vec<Content> {
        let mut disks = self.disks.clone();
        disks[0] = disks[0].resized(disks[0].pages() + pages);
        disks
    }

    /// These disks with the data device as large as it was.
    fn shrunk(&self, disks: &[Content]) -> Vec<Content> {
        let mut disks = disks.to_vec();
        disks[0] = disks[0].resized(self.disks[0].pages());
        disks
    }

    /// Whether these are the old states, and what is new is dirty.
    fn is_continued_by(&self, planes: &Planes) -> bool {
        let old = self.planes.blocks();
        let whole = match planes.geometry() == self.planes.geometry() {
            true => old,
            false => self.planes.geometry().whole_blocks(),
        };
        // Many at a time, as there are many.
        let words = (whole / 64) as usize;
        planes.dirty[..words] == self.planes.dirty[..words]
            && planes.stale[..words] == self.planes.stale[..words]
            && (words as u64 * 64..planes.blocks()).all(|block| {
                let state = planes.state(block);
                match self.planes.state(block) {
                    was if block < whole => state == was,
                    // The last block, a part of which was not managed.
                    BlockState::Stale if block < old => state == BlockState::Stale,
                    _ => state == BlockState::Dirty,
                }
            })
    }
}

fn plan(
    machine: &Machine,
    placement: Placement,
    options: &GrowOptions,
) -> Result<Growth<common::Disk>> {
    Growth::plan(stores(machine, placement), options, &mut |_, _| ())
}

/// What the disks hold after growing as far as can be.
fn grow(disks: Vec<Content>, placement: Placement) -> Result<Vec<Content>> {
    let machine = Machine::new(disks);
    let grown = plan(&machine, placement, &GrowOptions::default())?.apply()?;
    drop(grown);
    Ok(machine.cut(machine.points() - 1, Cut::All, &mut Random::new(1)))
}

fn state(disks: Vec<Content>, placement: Placement) -> Result<(Superblock, Planes)> {
    let mut metadata = open(disks, placement)?;
    let (planes, _) = metadata.load()?;
    Ok((*metadata.superblock(), planes))
}

/// Two plane pages for each plane, that become three.
const LARGE: u64 = 40_000 * PAGE;
/// Less than a page, and the last block is not whole.
const SMALL: u64 = 300 * PAGE - 1536;

#[test]
fn growing_keeps_all_states_and_calls_what_is_new_dirty() {
    for placement in BOTH {
        for (managed, more) in [(LARGE, 40_000), (LARGE, 100), (SMALL, 60), (SMALL, 33_000)] {
            for area in [0, 1] {
                let old = Old::new(placement, managed, area);
                let before = state(old.disks.clone(), placement).unwrap().0;
                let refused = state(old.enlarged(more), placement).unwrap_err();
                let class = match placement {
                    Placement::Separate => Class::Identity,
                    Placement::Tail => Class::NotFormatted,
                };
                assert_eq!(refused.class(), class, "{refused}");

                let grown = grow(old.enlarged(more), placement).unwrap();
                let (sb, planes) = state(grown.clone(), placement).unwrap();
                let name = format!("{placement:?} {managed} +{more} area {area}");
                assert!(old.is_continued_by(&planes), "{name}");
                let blocks = planes.blocks() - old.planes.blocks();
                assert!(
                    blocks + 40 > more && blocks <= more + 40,
                    "{name}: {blocks} more"
                );
                assert_eq!(
                    (sb.image_id, sb.generation, sb.image_bytes, sb.meta_uuid),
                    (
                        before.image_id,
                        before.generation,
                        before.image_bytes,
                        before.meta_uuid
                    )
                );
                // Grown as far as can be, there is nothing more to do.
                let machine = Machine::new(grown.clone());
                let again = plan(&machine, placement, &GrowOptions::default()).unwrap();
                assert!(!again.is_needed(), "{name}");
                // A second time, from where the first one ended.
                let mut larger = grown;
                larger[0] = larger[0].resized(larger[0].pages() + more);
                let (_, planes) = state(grow(larger, placement).unwrap(), placement).unwrap();
                assert!(old.is_continued_by(&planes), "{name}, twice");
            }
        }
    }
}

#[test]
fn growing_takes_what_the_log_adds() {
    let placement = Placement::Separate;
    let old = Old::new(placement, SMALL, 1);
    let machine = Machine::new(old.disks.clone());
    let mut kernel = common::kernel::Kernel::activate(stores(&machine, placement));
    let clean = (0..299).find(|b| old.planes.state(*b) == BlockState::Clean);
    kernel.write(clean.unwrap(), 1);
    let mut disks = disks_of(&mut kernel.metadata);
    let dirty = state(disks.clone(), placement)
        .unwrap()
        .1
        .count(Select::Dirty);
    disks[0] = disks[0].resized(disks[0].pages() + 100);
    let (_, planes) = state(grow(disks, placement).unwrap(), placement).unwrap();
    assert_eq!(planes.state(clean.unwrap()), BlockState::Dirty);
    assert!(planes.count(Select::Dirty) >= dirty + 99);
}

#[test]
fn power_cut_while_growing_leaves_the_old_size_or_the_new() {
    let mut states = 0;
    for (placement, managed, more) in [
        (Placement::Separate, LARGE, 25_100),
        (Placement::Separate, SMALL, 80),
        (Placement::Tail, SMALL, 80),
        (Placement::Tail, SMALL, 2000),
    ] {
        for area in [0, 1] {
            let old = Old::new(placement, managed, area);
            let machine = Machine::new(old.enlarged(more));
            let growth = plan(&machine, placement, &GrowOptions::default()).unwrap();
            growth.apply().unwrap();
            let mut seen = [0; 3];
            states += machine.each_cut(
                if managed == LARGE { 1 } else { 4 },
                &[Cut::None, Cut::All, Cut::Some, Cut::Garbled],
                |disks, name| {
                    let at_old_size = state(old.shrunk(&disks), placement);
                    match state(disks.clone(), placement) {
                        Ok((_, planes)) => {
                            seen[2] += 1;
                            assert!(old.is_continued_by(&planes), "{name}");
                            // It may have been used at its new size.
                            let e = at_old_size.expect_err(name);
                            let fits = matches!(e.class(), Class::Identity | Class::NotFormatted)
                                || (e.class() == Class::Damaged && name.contains("Garbled"));
                            assert!(fits, "{name}: {e}");
                        }
                        Err(e) => {
                            let fits = matches!(e.class(), Class::Identity | Class::NotFormatted)
                                || (e.class() == Class::Damaged && name.contains("Garbled"));
                            assert!(fits, "{name}: {e}");
                            match at_old_size {
                                Ok((_, planes)) => {
                                    seen[0] += 1;
                                    assert_eq!(planes, old.planes, "{name}");
                                }
                                Err(e) => {
                                    seen[1] += 1;
                                    assert_eq!(e.class(), Class::Identity, "{name}: {e}");
                                }
                            }
                        }
                    }
                    let again = grow(disks, placement).unwrap_or_else(|e| panic!("{name}: {e}"));
                    let (_, planes) = state(again, placement).unwrap();
                    assert!(old.is_continued_by(&planes), "{name}, again");
                },
            );
            let begun = placement == Placement::Tail;
            assert!(
                seen[0] > 20 && seen[2] > 5 && (seen[1] > 20) == begun,
                "{seen:?}"
            );
        }
    }
    assert!(states > 1500, "{states} states");
}

#[test]
fn power_cut_after_power_cut_while_growing_converges() {
    let mut random = Random::new(5);
    for placement in BOTH {
        let old = Old::new(placement, SMALL, 0);
        for round in 0..40 {
            let mut disks = old.enlarged(60);
            for cut in 0.. {
                // It grows further meanwhile.
                let more = disks[0].pages() + random.below(3) * 50;
                disks[0] = disks[0].resized(more);
                let machine = Machine::new(disks);
                let growth = plan(&machine, placement, &GrowOptions::default())
                    .unwrap_or_else(|e| panic!("{placement:?} round {round}, cut {cut}: {e}"));
                growth.apply().unwrap();
                let points = machine.points();
                let at = if cut == 8 {
                    points - 1
                } else {
                    random.below(points as u64) as usize
                };
                let how = if cut == 8 { Cut::All } else { Cut::Garbled };
                disks = machine.cut(at, how, &mut random);
                if cut == 8 {
                    break;
                }
            }
            let (_, planes) = state(disks, placement).unwrap();
            assert!(old.is_continued_by(&planes), "{placement:?} round {round}");
        }
    }
}

/// A write that fails at any step leaves the old size or the new, and growing again goes on.
#[test]
fn growing_that_fails_is_done_again() {
    for placement in BOTH {
        let old = Old::new(placement, SMALL, 1);
        for step in 0.. {
            let machine = Machine::new(old.enlarged(100));
            let mut parts = stores(&machine, placement);
            parts.meta.fails_after = Some(step);
            let growth = Growth::plan(parts, &GrowOptions::default(), &mut |_, _| ()).unwrap();
            let failed = growth.apply();
            let disks = machine.cut(machine.points() - 1, Cut::All, &mut Random::new(1));
            let done = failed.is_ok();
            if let Err(e) = failed {
                assert_eq!(e.class(), Class::Io);
            }
            let (_, planes) = state(grow(disks, placement).unwrap(), placement).unwrap();
            assert!(old.is_continued_by(&planes), "{placement:?} step {step}");
            if done {
                break;
            }
        }
    }
}

#[test]
fn growing_to_a_size_that_was_asked_for() {
    for placement in BOTH {
        let old = Old::new(placement, SMALL, 0);
        for managed in [SMALL, SMALL + 512, SMALL + 20 * PAGE] {
            let machine = Machine::new(old.enlarged(100));
            let options = GrowOptions {
                managed_bytes: Some(managed),
                from_bytes: None,
            };
            let growth = plan(&machine, placement, &options).unwrap();
            assert!(growth.is_needed());
            growth.apply().unwrap();
            let disks = machine.cut(machine.points() - 1, Cut::All, &mut Random::new(1));
            let (sb, planes) = state(disks, placement).unwrap();
            assert_eq!(sb.geometry.sectors() * 512, managed);
            assert!(old.is_continued_by(&planes));
        }
    }
}

#[test]
fn growing_is_refused_where_it_cannot_be() {
    let error = |disks: Vec<Content>, placement, options: &GrowOptions| {
        let before = disks.clone();
        let machine = Machine::new(disks);
        let error = plan(&machine, placement, options).unwrap_err();
        assert_eq!(
            machine.points(),
            Machine::new(before).points(),
            "something was written"
        );
        error
    };
    let all = GrowOptions::default();
    let sized = |bytes| GrowOptions {
        managed_bytes: Some(bytes),
        from_bytes: None,
    };
    for placement in BOTH {
        let old = Old::new(placement, SMALL, 0);
        let e = error(old.enlarged(50), placement, &sized(SMALL - 512));
        assert!(matches!(e, Error::Shrinks { .. }), "{e}");
        assert!(e.hint().is_some());
        let e = error(old.enlarged(50), placement, &sized(SMALL + 1000 * PAGE));
        assert_eq!(e.class(), Class::TooSmall, "{e}");

        let mut metadata = open(old.disks.clone(), placement).unwrap();
        let changes = Changes {
            needs_check: Some(true),
            ..Changes::default()
        };
        metadata.commit(&old.planes, &changes).unwrap();
        let mut disks = disks_of(&mut metadata);
        disks[0] = disks[0].resized(disks[0].pages() + 50);
        assert_eq!(error(disks, placement, &all).class(), Class::NeedsCheck);
    }

    let old = Old::new(Placement::Separate, LARGE, 0);
    let mut smaller = old.disks.clone();
    smaller[0] = smaller[0].resized(smaller[0].pages() - 1);
    let e = error(smaller, Placement::Separate, &all);
    assert!(matches!(e, Error::Shrinks { .. }), "{e}");
    // No room for larger areas; with a larger metadata device there is.
    let mut tight = old.enlarged(60_000);
    tight[1] = tight[1].resized(16 + 16 + 2 * 5);
    let e = error(tight.clone(), Placement::Separate, &all);
    assert_eq!(e.class(), Class::TooSmall, "{e}");
    tight[1] = tight[1].resized(16 + 16 + 2 * 9);
    let (_, planes) = state(
        grow(tight, Placement::Separate).unwrap(),
        Placement::Separate,
    )
    .unwrap();
    assert!(old.is_continued_by(&planes));
    // Another data device.
    let mut disks = old.enlarged(50);
    disks[0] = Content::new(disks[0].pages(), 0);
    let e = error(disks, Placement::Separate, &all);
    assert!(matches!(e, Error::NoLabel { .. }), "{e}");

    // The new tail would reach the old one.
    let old = Old::new(Placement::Tail, SMALL, 0);
    let e = error(old.enlarged(10), Placement::Tail, &all);
    assert!(
        matches!(e, Error::NoRoomToMove { missing, .. } if missing > 0),
        "{e}"
    );
}

#[test]
fn a_tail_is_found_and_not_mistaken() {
    let old = Old::new(Placement::Tail, SMALL, 0);
    let pages = old.disks[0].pages();
    let from = |from_bytes| GrowOptions {
        managed_bytes: None,
        from_bytes: Some(from_bytes),
    };
    let machine = Machine::new(old.enlarged(200));
    let growth = plan(&machine, Placement::Tail, &from(pages * PAGE)).unwrap();
    assert_eq!(growth.before().data_sectors, pages * 8);
    let e = plan(&machine, Placement::Tail, &from(pages * PAGE - PAGE)).unwrap_err();
    assert!(matches!(e, Error::NoTail { .. }), "{e}");
    let e = plan(&machine, Placement::Tail, &from(pages * PAGE * 9)).unwrap_err();
    assert!(matches!(e, Error::Shrinks { .. }), "{e}");

    // One copy is enough to be found by.
    for lost in [pages - 1, pages - 16] {
        let mut disks = old.enlarged(200);
        disks[0].page_mut(lost).unwrap().fill(0);
        let (_, planes) = state(grow(disks, Placement::Tail).unwrap(), Placement::Tail).unwrap();
        assert!(old.is_continued_by(&planes));
    }

    // What an earlier, larger use of the disk left behind lies in the new part.
    let earlier = Old::new(Placement::Tail, SMALL + 50 * PAGE, 0);
    let mut disks = old.enlarged(200);
    for (at, page) in earlier.disks[0].written() {
        if at >= pages {
            *disks[0].page_mut(at).unwrap() = *page;
        }
    }
    let machine = Machine::new(disks);
    let e = plan(&machine, Placement::Tail, &GrowOptions::default()).unwrap_err();
    assert!(
        matches!(&e, Error::Ambiguous { sizes, .. } if sizes.len() == 2),
        "{e}"
    );
    let growth = plan(&machine, Placement::Tail, &from(pages * PAGE)).unwrap();
    growth.apply().unwrap();
    let disks = machine.cut(machine.points() - 1, Cut::All, &mut Random::new(1));
    let (_, planes) = state(disks, Placement::Tail).unwrap();
    assert!(old.is_continued_by(&planes));

    // A disk without any, and one whose metadata is elsewhere.
    let machine = Machine::new(vec![Content::new(500, 0)]);
    let e = plan(&machine, Placement::Tail, &GrowOptions::default()).unwrap_err();
    assert_eq!(e.class(), Class::NotFormatted, "{e}");
    let separate = Old::new(Placement::Separate, SMALL, 0);
    let machine = Machine::new(separate.disks[..1].to_vec());
    let e = plan(&machine, Placement::Tail, &GrowOptions::default()).unwrap_err();
    assert!(matches!(e, Error::NeedsMetadataDevice { .. }), "{e}");
}

/// What was grown is as good as what was formatted: it is written to, committed and opened.
#[test]
fn a_grown_device_goes_on() {
    for placement in BOTH {
        let old = Old::new(placement, LARGE, 1);
        let grown = grow(old.enlarged(50_000), placement).unwrap();
        let machine = Machine::new(grown);
        let mut metadata = Metadata::open_on(stores(&machine, placement)).unwrap();
        for round in 0..3 {
            let (mut planes, _) = metadata.load().unwrap();
            let start = 41_000 + round * 100;
            planes.set(
                Run {
                    start,
                    end: start + 50,
                },
                BlockState::Clean,
            );
            metadata.commit(&planes, &Changes::default()).unwrap();
            let (_, found) = state(disks_of(&mut metadata), placement).unwrap();
            assert_eq!(found, planes);
        }
        assert!(metadata.stores_mut().meta.sectors() > 0);
    }
}
