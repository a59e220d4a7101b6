// SPDX-License-Identifier: GPL-2.0

//! As much of HTTP/1.1 as a server of files needs that may break it at will.

use std::io::{self, BufRead};

/// A request for a file.
pub(crate) struct Request {
    pub(crate) head: bool,
    /// Without the leading slash.
    pub(crate) path: String,
    /// First and last byte asked for.
    pub(crate) range: Option<(u64, Option<u64>)>,
    /// The range counts only if the object has this tag.
    pub(crate) if_range: Option<String>,
    pub(crate) keep_alive: bool,
}

/// Reads a request; `None` at the end of the connection.
pub(crate) fn read_request(reader: &mut impl BufRead) -> io::Result<Option<Request>> {
    let Some(line) = read_line(reader)? else {
        return Ok(None);
    };
    let bad = || io::Error::from(io::ErrorKind::InvalidData);
    let mut words = line.split(' ');
    let method = words.next().ok_or_else(bad)?;
    let path = words.next().and_then(|path| path.strip_prefix('/'));
    let mut request = Request {
        head: method == "HEAD",
        path: path.ok_or_else(bad)?.to_owned(),
        range: None,
        if_range: None,
        keep_alive: true,
    };
    loop {
        let line = read_line(reader)?.ok_or_else(bad)?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').ok_or_else(bad)?;
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "if-range" => request.if_range = Some(value.to_owned()),
            "range" => request.range = parse_range(value),
            "connection" if value.eq_ignore_ascii_case("close") => request.keep_alive = false,
            _ => (),
        }
    }
    Ok(Some(request))
}

fn read_line(reader: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    line.truncate(line.trim_end().len());
    Ok(Some(line))
}

fn parse_range(value: &str) -> Option<(u64, Option<u64>)> {
    let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
    let last = match last {
        "" => None,
        last => Some(last.parse().ok()?),
    };
    Some((first.parse().ok()?, last))
}
