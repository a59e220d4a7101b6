// SPDX-License-Identifier: GPL-2.0

//! Tests of the table of flights.

use super::*;
extern crate std;
use std::vec::Vec;

use crate::bits;

type Table = Flights<Vec<Option<Flight<Vec<u32>>>>>;

fn table() -> Table {
    Flights::new((0..SLOTS).map(|_| None).collect())
}

fn run(start: u64, end: u64) -> Run {
    Run { start, end }
}

/// The stale blocks of `plane`, as [`Flights::read`] wants to know them.
fn plane(words: &[u64]) -> impl Fn(Run) -> Option<(bool, Run)> + '_ {
    |run| bits::next_run(|i| words.get(i).copied().unwrap_or(0), run.start, run.end)
}

const ALL: &[u64] = &[u64::MAX; 32];
const MOST: u64 = 256;

/// The runs of all flights, in the order of their slots, and how far they are.
fn flights(table: &Table) -> Vec<(Run, Phase)> {
    table.all().map(|(_, f)| (f.run, f.phase)).collect()
}

fn read(table: &mut Table, run: Run) -> Way {
    table.read(run, plane(ALL), MOST, false, 0)
}

#[test]
fn overlapping_reads_share_a_fetch() {
    let mut table = table();
    assert_eq!(read(&mut table, run(10, 20)), Way::Wait(0));
    assert_eq!(read(&mut table, run(10, 20)), Way::Wait(0));
    assert_eq!(read(&mut table, run(19, 20)), Way::Wait(0));
    // What the first does not bring is another fetch, on either side.
    assert_eq!(read(&mut table, run(5, 30)), Way::Wait(1));
    let queued = |start, end| (run(start, end), Phase::Queued);
    assert_eq!(
        flights(&table),
        [queued(10, 20), queued(5, 10), queued(20, 30)]
    );
    table.waiters(0).unwrap().push(7);
    let ended = table.end(1).unwrap();
    assert_eq!((ended.run, ended.waiters), (run(10, 20), [7].to_vec()));
    assert!(table.end(1).is_none());
    assert!(table.waiters(0).is_none());
}

#[test]
fn a_read_is_split_where_blocks_are_valid_and_where_it_is_long() {
    let mut table = table();
    let words = [0xff0f, 0, 1];
    assert_eq!(
        table.read(run(4, 8), plane(&words), MOST, false, 0),
        Way::Free
    );
    assert_eq!(
        table.read(run(2, 2), plane(&words), MOST, false, 0),
        Way::Free
    );
    assert_eq!(
        table.read(run(2, 200), plane(&words), 5, false, 0),
        Way::Wait(0)
    );
    let runs: Vec<_> = flights(&table).iter().map(|(run, _)| *run).collect();
    assert_eq!(runs, [run(2, 4), run(8, 13), run(13, 16), run(128, 129)]);
}

#[test]
fn fetches_leave_slots_to_writes() {
    let mut table = table();
    for n in 0..MAX_FETCHES as u64 {
        assert!(matches!(
            read(&mut table, run(2 * n, 2 * n + 1)),
            Way::Wait(_)
        ));
    }
    assert_eq!(read(&mut table, run(1000, 1001)), Way::Full);
    // One that has a part of it under way waits for that.
    assert_eq!(read(&mut table, run(0, 2)), Way::Wait(0));
    assert_eq!(flights(&table).len(), MAX_FETCHES);
    for n in 0..MAX_FETCHES as u64 {
        let run = run(1000 + n, 1001 + n);
        assert!(matches!(
            table.write(run, run, plane(ALL), 0),
            Way::Write(_)
        ));
    }
    let one = run(2000, 2001);
    assert_eq!(table.write(one, one, plane(ALL), 0), Way::Full);
    assert!(table.offer(one, plane(ALL), 0).is_err());
    // A slot that gets free is used again, under another number.
    assert!(table.end(1).is_some());
    assert_eq!(
        table.write(one, one, plane(ALL), 0),
        Way::Write(SLOTS as u64 + 1)
    );
}

#[test]
fn a_write_waits_for_what_is_under_way() {
    let mut table = table();
    assert_eq!(read(&mut table, run(10, 20)), Way::Wait(0));
    assert_eq!(
        table.write(run(0, 11), run(0, 11), plane(ALL), 0),
        Way::Wait(0)
    );
    assert_eq!(
        table.write(run(0, 10), run(0, 10), plane(ALL), 0),
        Way::Write(2)
    );
    // Reads and writes wait for it in turn, and nothing is fetched for them.
    assert_eq!(read(&mut table, run(3, 10)), Way::Wait(1));
    assert_eq!(
        table.write(run(9, 10), run(9, 10), plane(ALL), 0),
        Way::Wait(1)
    );
    assert_eq!(flights(&table).len(), 2);
}

#[test]
fn a_write_to_valid_blocks_waits_for_nobody() {
    let mut table = table();
    let words = [0xf0];
    assert_eq!(
        table.write(run(4, 8), run(4, 8), plane(&words), 0),
        Way::Write(1)
    );
    assert_eq!(
        table.write(run(0, 4), run(0, 4), plane(&words), 0),
        Way::Free
    );
    assert_eq!(
        table.write(run(8, 9), run(9, 9), plane(&words), 0),
        Way::Free
    );
    // The flight of one that covers both kinds is for all of its blocks.
    assert!(table.end(1).is_some());
    assert_eq!(
        table.write(run(0, 64), run(0, 64), plane(&words), 0),
        Way::Write(2)
    );
    assert_eq!(table.find_run(2), Some(run(0, 64)));
}

#[test]
fn the_edges_of_a_write_are_fetched_one_by_one() {
    let mut table = table();
    let queued = |start, end| (run(start, end), Phase::Queued);
    assert_eq!(
        table.write(run(3, 9), run(4, 8), plane(ALL), 0),
        Way::Wait(0)
    );
    assert_eq!(flights(&table), [queued(3, 4), queued(8, 9)]);
    // They came: now the write itself is under way, edges and all.
    table.end(1);
    table.end(2);
    assert_eq!(
        table.write(run(3, 9), run(4, 8), plane(&[0xf0]), 0),
        Way::Write(3)
    );
    assert_eq!(flights(&table), [(run(3, 9), Phase::Write)]);
    table.end(3);
    // One edge alone, and a write within two blocks, which covers none.
    let whole = run(3, 8);
    assert_eq!(table.write(run(3, 9), whole, plane(ALL), 0), Way::Wait(0));
    assert_eq!(
        table.write(run(20, 22), run(21, 21), plane(ALL), 0),
        Way::Wait(1)
    );
    assert_eq!(
        flights(&table),
        [queued(8, 9), queued(20, 21), queued(21, 22)]
    );
}

#[test]
fn offers_skip_what_is_under_way_or_valid() {
    let mut table = table();
    let words = [0xfff0];
    read(&mut table, run(6, 8));
    table.write(run(9, 10), run(9, 10), plane(ALL), 0);
    let offer = |table: &mut Table, start| table.offer(run(start, 20), plane(&words), 0);
    assert_eq!(offer(&mut table, 0), Ok(Some((3, run(4, 6)))));
    assert_eq!(offer(&mut table, 6), Ok(Some((4, run(8, 9)))));
    assert_eq!(offer(&mut table, 9), Ok(Some((5, run(10, 16)))));
    assert_eq!(offer(&mut table, 0), Ok(None));
    assert!(table.is_storing());
    // Who needs an offered block waits for it.
    assert_eq!(
        table.read(run(4, 5), plane(&words), MOST, false, 0),
        Way::Wait(2)
    );
}

#[test]
fn offers_are_limited() {
    let mut table = table();
    for n in 0..MAX_OFFERS as u64 {
        let offer = table.offer(run(2 * n, 2 * n + 1), plane(ALL), 0);
        assert!(matches!(offer, Ok(Some(_))));
    }
    assert_eq!(table.offer(run(1000, 1001), plane(ALL), 0), Err(Full));
    // An offer of nothing that is stale is no error.
    assert_eq!(table.offer(run(1000, 1001), plane(&[]), 0), Ok(None));
}

#[test]
fn what_somebody_waits_for_is_taken_first_then_what_is_older() {
    let mut table = table();
    let mut ahead = |start, ahead| table.read(run(start, start + 2), plane(ALL), 2, ahead, 0);
    ahead(0, true);
    ahead(10, true);
    ahead(20, false);
    ahead(30, false);
    // Somebody waits for the second now.
    ahead(11, false);
    // That nobody waits for another part of it changes nothing.
    ahead(10, true);
    let order: Vec<_> = core::iter::from_fn(|| table.take(5).map(|f| f.run.start)).collect();
    assert_eq!(order, [10, 20, 30, 12, 0]);
    assert!(flights(&table).iter().all(|(_, p)| *p == Phase::Taken(5)));
}

#[test]
fn what_a_helper_leaves_is_for_the_next_one() {
    let mut table = table();
    read(&mut table, run(0, 1));
    read(&mut table, run(2, 3));
    read(&mut table, run(4, 5));
    assert_eq!(table.take(1).map(|f| f.id), Some(1));
    assert_eq!(table.take(2).map(|f| f.id), Some(2));
    table.give_back(Some(1));
    assert!(!table.is_taken(1, 1) && table.is_taken(2, 2));
    assert_eq!(table.answer(1, 1, 1), Err(Refused::Unknown));
    assert_eq!(table.take(3).map(|f| f.id), Some(1));
    // What is being stored is not given back.
    assert_eq!(table.answer(1, 3, 1), Ok(run(0, 1)));
    table.give_back(None);
    let phases: Vec<_> = flights(&table).iter().map(|(_, p)| *p).collect();
    assert_eq!(phases, [Phase::Storing, Phase::Queued, Phase::Queued]);
}

#[test]
fn answers_that_do_not_fit_are_refused() {
    let mut table = table();
    read(&mut table, run(0, 4));
    let written = run(10, 11);
    table.write(written, written, plane(ALL), 0);
    // Nobody took it; it is another's; it is too short; there is none; it is no fetch.
    assert_eq!(table.answer(1, 1, 4), Err(Refused::Unknown));
    table.take(1);
    assert_eq!(table.answer(1, 2, 4), Err(Refused::Unknown));
    for blocks in [0, 3, 5, u64::MAX] {
        assert_eq!(table.answer(1, 1, blocks), Err(Refused::Length(4)));
    }
    assert_eq!(table.answer(9, 1, 4), Err(Refused::Unknown));
    assert_eq!(table.answer(2, 1, 1), Err(Refused::Unknown));
    assert_eq!(table.answer(1, 1, 4), Ok(run(0, 4)));
    // A second one.
    assert_eq!(table.answer(1, 1, 4), Err(Refused::Unknown));
    // The data could not be read: it may be answered again.
    table.unanswer(1, 1);
    table.unanswer(2, 1);
    assert_eq!(table.answer(1, 1, 4), Ok(run(0, 4)));
    assert_eq!(table.end(1).map(|f| f.run), Some(run(0, 4)));
    assert_eq!(table.answer(1, 1, 4), Err(Refused::Unknown));
}

#[test]
fn only_fetches_that_wait_expire() {
    let mut table = table();
    table.read(run(0, 1), plane(ALL), 1, false, 10);
    table.read(run(1, 2), plane(ALL), 1, false, 20);
    table.read(run(2, 3), plane(ALL), 1, false, 5);
    table.write(run(3, 4), run(3, 4), plane(ALL), 1);
    assert!(matches!(table.offer(run(4, 5), plane(ALL), 1), Ok(Some(_))));
    assert_eq!(table.waiting(), (3, Some(5)));
    // The first is being stored, the second with the helper.
    table.take(1);
    table.take(1);
    assert!(table.answer(1, 1, 1).is_ok());
    assert_eq!(table.waiting(), (2, Some(5)));
    assert!(table.expire(5).is_none());
    assert_eq!(table.expire(20).map(|f| f.id), Some(3));
    assert!(table.expire(20).is_none());
    assert_eq!(table.expire(21).map(|f| f.id), Some(2));
    assert!(table.expire(u64::MAX).is_none());
    assert_eq!(table.waiting(), (0, None));
    // What expired is refused when it comes after all, and may be asked for again.
    assert_eq!(table.answer(2, 1, 1), Err(Refused::Unknown));
    assert!(matches!(read(&mut table, run(1, 2)), Way::Wait(_)));
    assert_eq!(table.since(1), Some(10));
    assert!(table.is_storing());
}
