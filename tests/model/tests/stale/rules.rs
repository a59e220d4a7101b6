// SPDX-License-Identifier: GPL-2.0

//! Takes one of the rules away each: the model must notice.

use super::*;

/// Plays lives, always the same ones, until the model panics.
fn notices(without: Without) {
    let mut runner = TestRunner::deterministic();
    for _ in 0..200 {
        play(without, &life().new_tree(&mut runner).unwrap().current());
    }
}

#[test]
#[should_panic(expected = "valid, with content")]
fn fails_without_a_flush_of_the_data_before_the_superblock() {
    notices(Without::DataFlush);
}

#[test]
#[should_panic(expected = "valid, with content")]
fn fails_if_what_becomes_valid_before_the_copy_is_not_flushed() {
    notices(Without::SecondLook);
}

#[test]
#[should_panic(expected = "valid, with content")]
fn fails_if_a_note_grows_after_the_flush_began() {
    notices(Without::Seal);
}

#[test]
#[should_panic(expected = "stale, which was promised")]
fn fails_if_a_flush_is_answered_before_the_record() {
    notices(Without::Answer);
}

#[test]
#[should_panic(expected = "valid, with content")]
fn fails_if_the_record_comes_before_the_content() {
    notices(Without::Record);
}

#[test]
#[should_panic(expected = "is valid and does not hold its content")]
fn fails_if_blocks_are_valid_before_they_are_stored() {
    notices(Without::Store);
}

#[test]
#[should_panic(expected = "stale, which was promised")]
fn fails_if_blocks_are_settled_before_the_superblock() {
    notices(Without::Settle);
}

/// Stale blocks are overwritten one after another, none beside the one before, and flushed; no checkpoint comes between.
fn overwrite_apart(without: Without) {
    let mut steps = Vec::new();
    for block in [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11] {
        let write = Step::Write(block * 2, 2, false);
        steps.extend([write, Step::Commit, Step::Io(0), Step::Job]);
    }
    steps.extend([Step::Flush, Step::Io(0)]);
    steps.extend([Step::Job, Step::Job, Step::Job, Step::Job, Step::Job]);
    play(without, &(0xfff, 0, steps));
}

#[test]
fn writes_that_find_no_room_for_their_note_wait() {
    overwrite_apart(Without::Nothing);
}

#[test]
#[should_panic(expected = "stale, which was promised")]
fn fails_if_there_is_no_room_for_the_note_of_a_write() {
    overwrite_apart(Without::Room);
}

#[test]
#[should_panic(expected = "stale, which was promised")]
fn fails_if_writes_to_fetched_blocks_are_not_noted() {
    notices(Without::Note);
}

#[test]
#[should_panic(expected = "does not hold its content")]
fn fails_if_the_edges_of_a_write_are_not_fetched() {
    notices(Without::Edges);
}

#[test]
#[should_panic(expected = "valid, with content")]
fn fails_if_a_fua_write_flushes_only_itself() {
    notices(Without::FuaFlush);
}

/// A write of a whole block waits for the fetch of more, which fails.
fn write_beside_a_failed_fetch(without: Without) {
    let (read, write) = (Step::Read(0, 6), Step::Write(2, 2, false));
    let steps = vec![read, write, Step::Take, Step::AnswerError(0)];
    play(without, &(0xfff, 0, steps));
}

#[test]
fn a_write_goes_on_if_it_covers_its_part_of_a_failed_fetch() {
    write_beside_a_failed_fetch(Without::Nothing);
}

#[test]
#[should_panic(expected = "a write that needs no fetch fails with one")]
fn fails_if_a_write_must_cover_the_whole_of_a_failed_fetch() {
    write_beside_a_failed_fetch(Without::Cover);
}

/// A helper that was stopped with a request in hand answers when the device has another generation, and its new helper the
/// same request.
fn answer_for_an_old_generation(without: Without) {
    let (read, take) = (Step::Read(0, 2), Step::Take);
    let mut steps = vec![read.clone(), take.clone(), Step::Generation(1)];
    steps.extend([read, take, Step::AnswerLate(0), Step::Io(0)]);
    play(without, &(0xfff, 0, steps));
}

#[test]
fn an_answer_for_an_old_generation_is_refused() {
    answer_for_an_old_generation(Without::Nothing);
}

#[test]
#[should_panic(expected = "does not hold its content")]
fn fails_if_an_answer_for_an_old_generation_is_taken() {
    answer_for_an_old_generation(Without::Session);
}
