// SPDX-License-Identifier: GPL-2.0

//! A disk as a picture of characters: cells in reading order, each for some blocks.

use std::fmt::Write as _;

use pristine_metadata::{Planes, Run, Select};

use super::percent;
use crate::ui::{human_bytes, human_count};

/// How to draw.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    /// Columns of the terminal.
    pub width: usize,
    /// Most rows of cells.
    pub rows: usize,
    /// No character beyond ASCII.
    pub ascii: bool,
    /// With terminal colours.
    pub color: bool,
}

/// What a cell shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cell {
    Clean,
    /// Up to a quarter, a half, three quarters, more: 0 to 3.
    Dirty(usize),
    /// Some of it, all of it.
    Stale(bool),
}

struct Glyphs {
    clean: &'static str,
    dirty: [&'static str; 4],
    stale: [&'static str; 2],
}

const UNICODE: Glyphs = Glyphs {
    clean: "·",
    dirty: ["░", "▒", "▓", "█"],
    stale: ["◦", "○"],
};

const ASCII: Glyphs = Glyphs {
    clean: ".",
    dirty: ["-", "+", "*", "#"],
    stale: ["o", "O"],
};

impl Cell {
    fn of(planes: &Planes, run: Run) -> Self {
        let (dirty, stale) = planes.count_in(run);
        if stale > 0 && stale >= dirty {
            return Cell::Stale(stale == run.len());
        }
        if dirty == 0 {
            return Cell::Clean;
        }
        let quarter = (dirty * 4).div_ceil(run.len().max(1));
        Cell::Dirty(usize::try_from(quarter).unwrap_or(4).clamp(1, 4) - 1)
    }

    fn glyph(self, glyphs: &Glyphs) -> &'static str {
        match self {
            Cell::Clean => glyphs.clean,
            Cell::Dirty(n) => glyphs.dirty[n.min(3)],
            Cell::Stale(all) => glyphs.stale[usize::from(all)],
        }
    }

    fn color(self) -> &'static str {
        match self {
            Cell::Clean => "\x1b[2;32m",
            Cell::Dirty(0 | 1) => "\x1b[33m",
            Cell::Dirty(_) => "\x1b[31m",
            Cell::Stale(_) => "\x1b[36m",
        }
    }
}

/// Columns for the address at the start of a row.
const MARGIN: usize = 11;

/// Blocks of one cell, and cells in a row: as fine as fits, and both as round as can be.
fn scale(blocks: u64, look: &Look) -> (u64, u64) {
    let room = look.width.saturating_sub(MARGIN + 1).max(8);
    let columns = if room >= 32 {
        room / 16 * 16
    } else {
        room / 8 * 8
    } as u64;
    let rows = look.rows.max(1) as u64;
    let mut per_cell = 1u64;
    while blocks.div_ceil(per_cell) > columns.saturating_mul(rows) && per_cell < 1 << 62 {
        per_cell *= 2;
    }
    (per_cell, columns)
}

/// Where a row begins, exactly: in the largest unit of which rows take whole numbers.
fn address(bytes: u64, step: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let power = (step.trailing_zeros() / 10).min(5);
    let unit = usize::try_from(power).ok().and_then(|i| units.get(i));
    format!("{} {}", bytes >> (power * 10), unit.unwrap_or(&"B"))
}

/// The picture, its legend and the totals.
pub fn draw(title: &str, planes: &Planes, look: &Look) -> String {
    let glyphs = if look.ascii { &ASCII } else { &UNICODE };
    let dot = if look.ascii { "," } else { " ·" };
    let block_size = planes.geometry().block_size();
    let blocks = planes.blocks();
    let (per_cell, columns) = scale(blocks, look);
    let paint = |cell: Cell, text: &str| {
        if look.color {
            format!("{}{text}\x1b[0m", cell.color())
        } else {
            text.to_owned()
        }
    };
    let step = columns.saturating_mul(per_cell).saturating_mul(block_size);
    // Writing to a String cannot fail.
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{title}{dot} {} in {} blocks of {}{dot} one cell is {}\n",
        human_bytes(blocks.saturating_mul(block_size)),
        human_count(blocks),
        human_bytes(block_size),
        human_bytes(per_cell.saturating_mul(block_size)),
    );
    let mut row = 0;
    while row < blocks {
        let address = address(row.saturating_mul(block_size), step);
        let _ = write!(out, "{address:>width$} ", width = MARGIN - 1);
        // Cells that look the same go out under one colour.
        let mut pending: Option<(Cell, String)> = None;
        for column in 0..columns {
            let start = row.saturating_add(column.saturating_mul(per_cell));
            if start >= blocks {
                break;
            }
            let run = Run {
                start,
                end: start.saturating_add(per_cell).min(blocks),
            };
            let cell = Cell::of(planes, run);
            match &mut pending {
                Some((last, text)) if last.color() == cell.color() => {
                    text.push_str(cell.glyph(glyphs));
                }
                _ => {
                    if let Some((last, text)) = pending.take() {
                        out.push_str(&paint(last, &text));
                    }
                    pending = Some((cell, cell.glyph(glyphs).to_owned()));
                }
            }
        }
        if let Some((last, text)) = pending {
            out.push_str(&paint(last, &text));
        }
        out.push('\n');
        row = row.saturating_add(columns.saturating_mul(per_cell));
    }
    out.push('\n');
    let (dirty, stale) = (planes.count(Select::Dirty), planes.count(Select::Stale));
    let clean = blocks - dirty - stale;
    let line = |cell: Cell, sample: &str, name: &str, n: u64, means: &str| {
        let painted = paint(cell, sample);
        let pad = " ".repeat(5usize.saturating_sub(sample.chars().count()));
        let amount = format!(
            "{:>10} {:>13} blocks {:>9}",
            human_bytes(n.saturating_mul(block_size)),
            human_count(n),
            percent(n, blocks)
        );
        format!("{painted}{pad}{name} {amount}  {means}")
            .trim_end()
            .to_owned()
            + "\n"
    };
    out.push_str(&line(Cell::Clean, glyphs.clean, "clean", clean, ""));
    let two = paint(Cell::Dirty(0), &glyphs.dirty[..2].concat());
    let sample = two + &paint(Cell::Dirty(3), &glyphs.dirty[2..].concat());
    let plain = glyphs.dirty.concat();
    let share = if look.ascii {
        "up to 1/4, 1/2, 3/4, all"
    } else {
        "up to ¼, ½, ¾, all"
    };
    out.push_str(
        &line(Cell::Dirty(0), &plain, "dirty", dirty, share).replacen(
            &paint(Cell::Dirty(0), &plain),
            &sample,
            1,
        ),
    );
    if stale > 0 {
        out.push_str(&line(
            Cell::Stale(true),
            &glyphs.stale.concat(),
            "stale",
            stale,
            "some, all",
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use pristine_metadata::{BlockState, Geometry, Initial};

    fn look(width: usize) -> Look {
        Look {
            width,
            rows: 16,
            ascii: true,
            color: false,
        }
    }

    #[test]
    fn one_dirty_block_is_seen_on_a_huge_disk() {
        let geometry = Geometry::new(1 << 31, 12, 20).unwrap();
        let mut planes = Planes::new(geometry, Initial::Clean);
        planes.set(
            Run {
                start: 123_456_789,
                end: 123_456_790,
            },
            BlockState::Dirty,
        );
        let text = draw("x", &planes, &look(80));
        let cells: String = text.lines().skip(2).take(16).collect();
        assert_eq!(cells.matches('-').count(), 1, "{text}");
        assert!(text.lines().all(|l| l.chars().count() < 80), "{text}");
    }

    #[test]
    fn rows_fit_the_terminal_and_cover_the_disk() {
        for sectors in [8, 800, 12_345_678, 1 << 33] {
            for width in [20, 80, 133, 400] {
                let geometry = Geometry::new(sectors, 12, 20).unwrap();
                let (per_cell, columns) = scale(geometry.blocks(), &look(width));
                assert!(columns as usize + MARGIN < width, "{sectors} {width}");
                assert!(columns * 16 * per_cell >= geometry.blocks());
            }
        }
    }

    #[test]
    fn addresses_are_exact() {
        assert_eq!(address(0, 128 << 20), "0 MiB");
        assert_eq!(address(9 * (128 << 20), 128 << 20), "1152 MiB");
        assert_eq!(address(3 << 30, 1 << 30), "3 GiB");
        assert_eq!(address(96 << 12, 96 << 12), "384 KiB");
    }

    #[test]
    fn shares_have_their_shades() {
        let geometry = Geometry::new(8 * 64, 12, 20).unwrap();
        let mut planes = Planes::new(geometry, Initial::Clean);
        let run = Run { start: 0, end: 16 };
        for (dirty, cell) in [
            (0, Cell::Clean),
            (1, Cell::Dirty(0)),
            (4, Cell::Dirty(0)),
            (5, Cell::Dirty(1)),
            (12, Cell::Dirty(2)),
            (13, Cell::Dirty(3)),
            (16, Cell::Dirty(3)),
        ] {
            planes.set(run, BlockState::Clean);
            planes.set(
                Run {
                    start: 0,
                    end: dirty,
                },
                BlockState::Dirty,
            );
            assert_eq!(Cell::of(&planes, run), cell, "{dirty}");
        }
        planes.set(run, BlockState::Stale);
        assert_eq!(Cell::of(&planes, run), Cell::Stale(true));
    }
}
