// SPDX-License-Identifier: GPL-2.0

//! The helper's side of asking neighbours: what they give, as the rest of the helper wants it.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use pristine_store::peers::{Neighbours, Patience, Wanted};

use crate::cache::{Cache, Unpacked};
use crate::library::Urgency;
use crate::loaded::Loaded;
use crate::log;
use crate::peers::serve::Given;
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
            loaded.push(block.block, &unpacked, index, block.digest);
        }
    }
    loaded
}

/// Looks after neighbours until the end: who they are, what they have. Begins once the image is known not to be encrypted:
/// content of an encrypted one does not go over the network in clear, so then there are no neighbours.
pub fn look_after(neighbours: &Neighbours, sources: &[Source], given: Option<&Given>, stop: &Stop) {
    let mut plain = None;
    loop {
        if plain.is_none() {
            plain = is_plain(neighbours, sources, stop);
            match (plain, given) {
                (Some(true), Some(given)) => given.plain.store(true, Ordering::Release),
                (Some(false), _) => {
                    log::info("the image is encrypted: it is not shared with neighbours");
                }
                _ => (),
            }
        }
        if plain == Some(true) {
            let stores = sources.iter().filter_map(|s| s.store().ok());
            neighbours.look_after(&stores.collect::<Vec<_>>());
        }
        if !stop.sleep(TICK) {
            return;
        }
    }
}

/// Whether the image is known not to be encrypted; `None` if no manifest can be read now.
fn is_plain(neighbours: &Neighbours, sources: &[Source], stop: &Stop) -> Option<bool> {
    let image = *neighbours.image();
    let layout = sources
        .iter()
        .find_map(|s| s.layout(image).or_else(|| s.open_layout(image, stop).ok()))?;
    Some(!layout.is_encrypted())
}
