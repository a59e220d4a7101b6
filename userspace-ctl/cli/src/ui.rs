// SPDX-License-Identifier: GPL-2.0

//! What the user sees: results on stdout (for people or as JSON), everything else on stderr.
//!
//! - stdout carries results alone, so that it can be piped; with `--json` it is exactly one JSON value.
//! - stderr carries notes, warnings, progress bars and errors. Bars appear only on a terminal.
//! - Colour only on a terminal, never with `NO_COLOR`, unless `--color` says otherwise.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::exit::{Failure, Outcome};

/// When to use colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ColorChoice {
    /// On a terminal, unless NO_COLOR is set.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// The colours in use, by what they mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Headings.
    Bold,
    /// Less important.
    Dim,
    /// All is well.
    Good,
    /// Look at this.
    Warn,
    /// Wrong.
    Bad,
}

impl Style {
    fn sequence(self) -> &'static str {
        match self {
            Style::Bold => "\x1b[1m",
            Style::Dim => "\x1b[2m",
            Style::Good => "\x1b[32m",
            Style::Warn => "\x1b[33m",
            Style::Bad => "\x1b[1;31m",
        }
    }
}

/// How to talk to the user; made once from the global options.
#[derive(Clone, Copy, Debug)]
pub struct Ui {
    json: bool,
    quiet: bool,
    color_out: bool,
    color_err: bool,
    bars: bool,
}

impl Ui {
    /// From the global options and what stdout and stderr are connected to.
    pub fn new(json: bool, quiet: bool, color: ColorChoice) -> Self {
        let wanted = |is_terminal: bool| match color {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            ColorChoice::Auto => {
                let no_color = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
                is_terminal && !no_color && std::env::var_os("TERM").is_none_or(|t| t != "dumb")
            }
        };
        let stderr_terminal = io::stderr().is_terminal();
        Ui {
            json,
            quiet,
            color_out: wanted(io::stdout().is_terminal()),
            color_err: wanted(stderr_terminal),
            bars: stderr_terminal && !quiet && !json,
        }
    }

    /// Whether results go out as JSON.
    pub fn json(&self) -> bool {
        self.json
    }

    /// Whether stdout takes colour.
    pub fn color(&self) -> bool {
        self.color_out
    }

    /// `text` in a style, if stdout takes colour.
    pub fn paint(&self, style: Style, text: &str) -> String {
        paint(self.color_out, style, text)
    }

    /// Prints a result on stdout: `value` as JSON with `--json`, else what `human` writes.
    ///
    /// A reader that went away (`| head`) is no failure.
    pub fn result<T: Serialize>(
        &self,
        value: &T,
        human: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Outcome {
        let mut out = io::stdout().lock();
        let written = if self.json {
            serde_json::to_writer_pretty(&mut out, value)
                .map_err(io::Error::from)
                .and_then(|()| writeln!(out))
        } else {
            human(&mut out)
        };
        match written.and_then(|()| out.flush()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(Failure::io("cannot write to standard output", &error))
            }
            _ => Ok(()),
        }
    }

    /// A remark on stderr; nothing with `--quiet` or `--json`.
    pub fn note(&self, text: impl AsRef<str>) {
        if !self.quiet && !self.json {
            self.stderr_line(text.as_ref());
        }
    }

    /// A warning on stderr, also with `--quiet`.
    pub fn warn(&self, text: impl AsRef<str>) {
        let label = paint(self.color_err, Style::Warn, "warning:");
        self.stderr_line(&format!("pristine: {label} {}", text.as_ref()));
    }

    /// A failure on stderr: two lines for people, one line of JSON with `--json`.
    pub fn failure(&self, failure: &Failure) {
        if self.json {
            let object = serde_json::json!({ "error": failure });
            self.stderr_line(&object.to_string());
            return;
        }
        let label = paint(self.color_err, Style::Bad, "error:");
        self.stderr_line(&format!("pristine: {label} {failure}"));
        if let Some(hint) = failure.hint_text() {
            let label = paint(self.color_err, Style::Bold, "hint:");
            self.stderr_line(&format!("{label} {hint}"));
        }
    }

    fn stderr_line(&self, line: &str) {
        // Nothing can be done, and nobody told, if stderr is gone.
        let _ = writeln!(io::stderr().lock(), "{line}");
    }

    /// A progress bar over `total` bytes, on stderr when that is a terminal; otherwise it shows nothing.
    /// Give it to [`ProgressBar::set_position`] or `inc`, and end it with `finish_and_clear`.
    pub fn bytes_bar(&self, what: &str, total: u64) -> ProgressBar {
        self.bar(
            what,
            total,
            "{prefix} {wide_bar} {binary_bytes:>10} of {binary_total_bytes}  {binary_bytes_per_sec:>12}  {eta:>4} left",
        )
    }

    /// A progress bar over `total` things (blocks, objects).
    pub fn count_bar(&self, what: &str, total: u64) -> ProgressBar {
        self.bar(
            what,
            total,
            "{prefix} {wide_bar} {human_pos} of {human_len}  {eta:>4} left",
        )
    }

    fn bar(&self, what: &str, total: u64, template: &str) -> ProgressBar {
        if !self.bars {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("█▉▊▋▌▍▎▏ "));
        }
        bar.set_prefix(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        bar
    }
}

fn paint(color: bool, style: Style, text: &str) -> String {
    if color {
        format!("{}{text}\x1b[0m", style.sequence())
    } else {
        text.to_owned()
    }
}

/// A size for people: `1.4 GiB`, `512 B`.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // 1023.95 would print as 1024.0.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let name = UNITS.get(unit).copied().unwrap_or("EiB");
    format!("{value:.1} {name}")
}

/// A number with thousands separated: `161,126`.
pub fn human_count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A text table with aligned columns.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
    right: Vec<usize>,
}

impl Table {
    /// A table with a heading; columns whose index is in `right` are aligned to the right.
    pub fn new(heading: &[&str], right: &[usize]) -> Self {
        Table {
            rows: vec![heading.iter().map(|&text| text.to_owned()).collect()],
            right: right.to_vec(),
        }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// Writes it, the heading in bold if `ui` takes colour.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(&self, ui: &Ui, out: &mut dyn Write) -> io::Result<()> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for (index, row) in self.rows.iter().enumerate() {
            let mut line = String::new();
            for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
                if column > 0 {
                    line.push_str("  ");
                }
                if self.right.contains(&column) {
                    line.push_str(&format!("{cell:>width$}"));
                } else {
                    line.push_str(&format!("{cell:<width$}"));
                }
            }
            let line = line.trim_end();
            if index == 0 {
                writeln!(out, "{}", ui.paint(Style::Bold, line))?;
            } else {
                writeln!(out, "{line}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(human_bytes(0), "0 B");
        assert_eq!(human_bytes(1023), "1023 B");
        assert_eq!(human_bytes(4096), "4.0 KiB");
        assert_eq!(human_bytes(1024 * 1024 - 1), "1.0 MiB");
        assert_eq!(human_bytes(2 << 30), "2.0 GiB");
        assert_eq!(human_bytes(u64::MAX), "16.0 EiB");
    }

    #[test]
    fn counts_read_well() {
        assert_eq!(human_count(0), "0");
        assert_eq!(human_count(999), "999");
        assert_eq!(human_count(1000), "1,000");
        assert_eq!(human_count(1_234_567), "1,234,567");
    }

    #[test]
    fn tables_align() {
        let ui = Ui::new(false, true, ColorChoice::Never);
        let mut table = Table::new(&["NAME", "SIZE"], &[1]);
        table.row(vec!["a".into(), "10 B".into()]);
        table.row(vec!["longer".into(), "1 B".into()]);
        let mut out = Vec::new();
        table.write(&ui, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text, "NAME    SIZE\na       10 B\nlonger   1 B\n");
    }
}
