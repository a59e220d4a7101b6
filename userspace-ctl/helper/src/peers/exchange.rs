// SPDX-License-Identifier: GPL-2.0

//! The helper's side of asking neighbours: what they give, as the rest of the helper wants it.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use pristine_store::peers::{Neighbours, Patience, Wanted};
use pristine_store::Store;

use crate::cache::{Cache, Unpacked};
use crate::library::Urgency;
use crate::loaded::Loaded;
use crate::plan::Plan;
use crate::source::Source;
use crate::stop::Stop;

/// The source of what came from a neighbour: none of the stores, and verified already.
pub const NO_STORE: usize = usize::MAX;
/// Between two looks at what is due.
const TICK: Duration = Duration::from_millis(500);

/// Loads what neighbours have of a plan, except for what is in the cache anyway.
pub fn load(neighbours: &Neighbours, plan: &Plan, cache: &Cache, urgency: Urgency) -> Loaded {
    let mut loaded = Loaded::default();
    let frames: HashSet<usize> = plan
        .frames
        .iter()
        .enumerate()
        .filter(|(_, frame)| cache.get(&frame.key).is_none())
        .map(|(number, _)| number)
        .collect();
    let wanted: Vec<Wanted> = plan
        .places
        .iter()
        .filter(|place| frames.contains(&place.frame))
        .map(|place| Wanted {
            block: place.block,
            digest: place.digest,
        })
        .collect();
    if wanted.is_empty() {
        return loaded;
    }
    let patience = match urgency {
        Urgency::Demand => Patience::DEMAND,
        Urgency::Background => Patience::BACKGROUND,
    };
    for batch in neighbours.fetch(&wanted, &patience) {
        let digests = batch.blocks.iter().map(|block| block.digest).collect();
        let unpacked = Arc::new(Unpacked::verified(batch.data, digests, NO_STORE));
        for (index, block) in (0..).zip(&batch.blocks) {
            let found = (Arc::clone(&unpacked), index, block.digest);
            loaded.blocks.insert(block.block, found);
        }
    }
    loaded
}

/// Looks after neighbours until the end: who they are, what they have.
pub fn look_after(neighbours: &Neighbours, sources: &[Source], stop: &Stop) {
    loop {
        let stores: Vec<Arc<dyn Store>> = sources.iter().filter_map(|s| s.store().ok()).collect();
        neighbours.look_after(&stores);
        if !stop.sleep(TICK) {
            return;
        }
    }
}
