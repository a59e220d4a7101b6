// SPDX-License-Identifier: GPL-2.0

//! What keeps track of stale blocks: on the kernel's memory, as the module has it.

use kernel::prelude::*;

#[kunit_tests(pristine_stale)]
mod tests {
    use crate::dm::AtomicWords;
    use crate::shared::bits;
    use crate::shared::flights::{Flight, Flights, Phase, Refused, Way, MAX_FETCHES, SLOTS};
    use crate::shared::geometry::{Geometry, Run};
    use crate::shared::notes::Notes;
    use crate::shared::stale;
    use crate::shared::tracker::Memory;
    use kernel::alloc::{flags::GFP_KERNEL, KVec};
    use kernel::prelude::*;
    use kernel::sync::atomic::Atomic;

    /// The kernel's memory. A stale map needs no RCU.
    struct Kernel;

    impl Memory for Kernel {
        type Words = AtomicWords;
        type Count = Atomic<u64>;
        type Section<'a> = ();

        fn section(&self) {}
    }

    type StaleMap = stale::StaleMap<Kernel>;
    type Table = Flights<KVec<Option<Flight<u32>>>>;

    /// 64 MiB: 16384 blocks.
    fn map() -> Result<StaleMap> {
        let geometry = Geometry::new(64 << 11, 12, 20).map_err(|_| EINVAL)?;
        StaleMap::with(
            geometry,
            || Atomic::new(0),
            |words| AtomicWords::new(usize::try_from(words)?),
        )
    }

    fn table() -> Result<Table> {
        let mut slots = KVec::with_capacity(SLOTS, GFP_KERNEL)?;
        for _ in 0..SLOTS {
            slots.push_within_capacity(None).map_err(|_| ENOMEM)?;
        }
        Ok(Flights::new(slots))
    }

    fn run(start: u64, end: u64) -> Run {
        Run { start, end }
    }

    /// All blocks are stale.
    fn all(run: Run) -> Option<(bool, Run)> {
        bits::next_run(|_| u64::MAX, run.start, run.end)
    }

    #[test]
    fn write_behind_valid_blocks_are_unsettled_until_a_checkpoint() -> Result {
        let map = map()?;
        map.recover(run(0, 1000));
        assert_eq!(map.count(), 1000);
        assert_eq!(map.validate(run(10, 20)), 10);
        assert_eq!(map.validate(run(10, 20)), 0);
        assert!(!map.any_stale(10, 19) && map.any_stale(9, 10));
        assert!(map.is_plain(10, 19, false) && !map.is_plain(10, 19, true));
        map.begin();
        assert_eq!(map.validate(run(100, 101)), 1);
        map.settle();
        assert!(map.is_plain(10, 19, true));
        assert!(map.any_unsettled(100, 100));
        assert_eq!(map.count(), 989);
        Ok(())
    }

    #[test]
    fn write_behind_each_area_learns_of_changes() -> Result {
        let map = map()?;
        map.recover(run(0, 1000));
        assert_eq!(map.take_changed(0, 0), 0);
        map.validate(run(0, 1));
        assert_eq!(map.take_changed(0, 0), 1);
        assert_eq!(map.take_changed(0, 0), 0);
        assert_eq!(map.take_changed(1, 0), 1);
        let mut bytes = [0; 16];
        assert_eq!(map.copy_to(0, &mut bytes), 127);
        assert_eq!(bytes[0], 0xfe);
        Ok(())
    }

    #[test]
    fn each_block_is_fetched_once() -> Result {
        let mut table = table()?;
        assert!(table.read(run(0, 10), all, 256, true, 0) == Way::Wait(0));
        assert!(table.read(run(20, 30), all, 256, false, 0) == Way::Wait(1));
        assert!(table.read(run(20, 40), all, 256, false, 0) == Way::Wait(1));
        // What somebody waits for comes first, then what is older.
        for (id, blocks) in [(2, run(20, 30)), (3, run(30, 40)), (1, run(0, 10))] {
            let flight = table.take(7).ok_or(EINVAL)?;
            assert!(flight.id == id && flight.run == blocks);
            assert!(flight.phase == Phase::Taken(7));
        }
        assert!(table.take(7).is_none());
        assert!(table.answer(2, 8, 10) == Err(Refused::Unknown));
        assert!(table.answer(2, 7, 9) == Err(Refused::Length(10)));
        assert!(table.answer(2, 7, 10) == Ok(run(20, 30)));
        assert!(table.answer(2, 7, 10) == Err(Refused::Unknown));
        table.give_back(Some(7));
        assert!(table.take(8).is_some_and(|f| f.id == 3));
        assert!(table.end(2).is_some() && table.end(2).is_none());
        Ok(())
    }

    #[test]
    fn writes_go_on_without_a_helper() -> Result {
        let mut table = table()?;
        for n in 0..MAX_FETCHES as u64 {
            let way = table.read(run(2 * n, 2 * n + 1), all, 1, false, 0);
            assert!(matches!(way, Way::Wait(_)));
        }
        assert!(table.read(run(1000, 1001), all, 1, false, 0) == Way::Full);
        let whole = run(1000, 1010);
        assert!(matches!(table.write(whole, whole, all, 0), Way::Write(_)));
        // An edge of it needs a fetch, for which there is no room.
        assert!(table.write(run(1010, 1020), run(1011, 1020), all, 0) == Way::Full);
        assert!(table.write(run(1, 2), run(1, 2), all, 0) != Way::Full);
        Ok(())
    }

    #[test]
    fn offers_leave_alone_what_is_written() -> Result {
        let mut table = table()?;
        let written = run(4, 6);
        assert!(table.write(written, written, all, 0) == Way::Write(1));
        assert!(table.offer(run(0, 10), all, 0) == Ok(Some((2, run(0, 4)))));
        assert!(table.offer(run(4, 10), all, 0) == Ok(Some((3, run(6, 10)))));
        assert!(table.offer(run(0, 10), all, 0) == Ok(None));
        assert!(table.is_storing());
        Ok(())
    }

    #[test]
    fn flush_records_what_was_noted_before_it() -> Result {
        let mut notes = Notes::new(KVec::from_elem(run(0, 0), 4, GFP_KERNEL)?, 1);
        assert!(notes.add(run(0, 4)));
        let end = notes.seal();
        assert!(notes.add(run(4, 5)));
        assert!(notes.until(end) == [run(0, 4)]);
        assert!(notes.add(run(8, 9)));
        assert!(!notes.add(run(20, 21)));
        assert!(notes.add_promised(run(20, 21)));
        notes.drop_until(end);
        assert_eq!(notes.len(), 3);
        Ok(())
    }
}
