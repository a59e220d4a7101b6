// SPDX-License-Identifier: GPL-2.0

//! Changes of the image, or back to it, each of which is one step: whatever state a power cut leaves, the device shows all
//! of what it showed before a step or all of what it shows after it, and names the image that fits.

use std::path::Path;

use crate::disk::{read_sparse, Disk, State, BLOCK};

/// What the device shows from a step on, until the next one.
pub struct Step {
    image: [u8; 32],
    shows: Vec<u8>,
    master: Vec<u8>,
}

/// The steps of a recording; the first is how it begins.
pub struct Steps {
    steps: Vec<Step>,
    /// This one is durable.
    reached: usize,
}

impl Step {
    /// Reads `IMAGE:SHOWS:MASTER`: an image's id, a file with what the device shows, and one with the image's content.
    fn parse(text: &str) -> Result<Self, String> {
        let parts: Vec<_> = text.split(':').collect();
        let [id, shows, master] = parts[..] else {
            return Err(format!("not IMAGE:SHOWS:MASTER: {text}"));
        };
        let mut image = [0; 32];
        for (n, byte) in image.iter_mut().enumerate() {
            let digits = id.get(n * 2..n * 2 + 2).unwrap_or("");
            *byte = u8::from_str_radix(digits, 16).map_err(|e| format!("image {id}: {e}"))?;
        }
        Ok(Self {
            image,
            shows: read_sparse(Path::new(shows))?,
            master: read_sparse(Path::new(master))?,
        })
    }

    /// Whether the device shows this step; why not, otherwise.
    fn fits(&self, disk: &Disk, image: &[u8; 32], state: &State) -> Result<(), String> {
        if *image != self.image {
            return Err("it names another image".to_owned());
        }
        for (block, here) in disk.blocks().enumerate() {
            let of = |bytes: &[u8]| -> [u8; BLOCK] {
                let mut whole = [0; BLOCK];
                let part = bytes.get(block * BLOCK..).unwrap_or(&[]);
                let len = part.len().min(BLOCK);
                whole[..len].copy_from_slice(&part[..len]);
                whole
            };
            let is = |plane: &[u64]| plane[block / 64] >> (block % 64) & 1 == 1;
            let (shows, master) = (of(&self.shows), of(&self.master));
            let shown = match is(&state.stale) {
                true => &master[..],
                false => here,
            };
            if shown != shows {
                return Err(format!("block {block} shows something else"));
            }
            if !is(&state.stale) && !is(&state.dirty) && here != master {
                return Err(format!("block {block} is clean, and not the image's"));
            }
        }
        Ok(())
    }
}

impl Steps {
    /// Reads all steps, in order; see [`Step`].
    pub fn read(texts: &[String]) -> Result<Self, String> {
        let steps = texts.iter().map(|text| Step::parse(text));
        Ok(Self {
            steps: steps.collect::<Result<_, _>>()?,
            reached: 0,
        })
    }

    /// Step `number` is durable.
    pub fn reach(&mut self, number: usize) -> Result<(), String> {
        if number >= self.steps.len() {
            return Err(format!("there is no step {number}"));
        }
        self.reached = self.reached.max(number);
        Ok(())
    }

    /// Whether the last one was reached.
    pub fn is_over(&self) -> bool {
        self.reached + 1 == self.steps.len()
    }

    /// Checks a state.
    pub fn verdict(&self, disk: &mut Disk) -> Result<(), String> {
        let state = disk.recover().map_err(|e| format!("recovery fails: {e}"))?;
        let superblock = disk.superblock().map_err(|e| e.to_string())?;
        let mut why = String::new();
        // One step is under way at most.
        for (n, step) in self.steps.iter().enumerate().skip(self.reached).take(2) {
            match step.fits(disk, &superblock.image_id, &state) {
                Ok(()) => return Ok(()),
                Err(e) => why.push_str(&format!("; step {n}: {e}")),
            }
        }
        Err(format!("neither before nor after the step{why}"))
    }
}
