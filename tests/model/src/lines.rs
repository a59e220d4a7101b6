// SPDX-License-Identifier: GPL-2.0

//! Lines of the kernel as arbitrary values make them, for the property tests and the fuzz targets alike.

use pristine_shared::state::Mode;
use pristine_shared::status::{Status, UndoStatus};
use pristine_shared::undo::State;

/// A status line's numbers in their order, its digest and UUID; `undo` is its state, and its pages used, pages and
/// missing blocks.
pub fn status(
    mode: u8,
    n: [u64; 11],
    image: [u8; 32],
    meta_uuid: [u8; 16],
    undo: Option<(u8, [u64; 3])>,
) -> Status {
    let [block_size, extent_size, dirty, blocks, stale, hot, hot_limit, log_used, log_pages, checkpoint, generation] =
        n;
    Status {
        mode: Mode::from_code((mode % 3).into()),
        block_size,
        extent_size,
        dirty,
        blocks,
        stale,
        hot,
        hot_limit,
        log_used,
        log_pages,
        checkpoint,
        generation,
        image,
        meta_uuid,
        undo: undo.map(|(state, [used, pages, missing])| UndoStatus {
            state: [State::Open, State::Full, State::Failed][usize::from(state % 3)],
            used,
            pages,
            missing,
        }),
    }
}
