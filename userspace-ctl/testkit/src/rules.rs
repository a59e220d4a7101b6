// SPDX-License-Identifier: GPL-2.0

//! Which request fails how.

use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What goes wrong with an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing (`none`): to exempt what a later rule would hit.
    None,
    /// An error status (`status=500`).
    Status(u16),
    /// The connection is closed without an answer (`close`).
    Close,
    /// The connection is closed after so many bytes of the body, though more are announced (`cut=1000`).
    Cut(u64),
    /// Each 4096th byte of the body is another (`wrong`).
    Wrong,
    /// The body comes at so many bytes each second (`slow=1024`).
    Slow(u64),
    /// The answer comes after this many milliseconds (`delay=500`).
    Delay(Duration),
    /// No answer, and the connection stays open for a minute (`hang`).
    Hang,
    /// The whole object is sent whatever range was asked for (`ignore-range`).
    IgnoreRange,
    /// Another range than the one asked for is sent, honestly labelled (`other-range`).
    OtherRange,
    /// The object ends so many bytes earlier, and the server says so (`short=100`).
    Short(u64),
    /// So many bytes of zeros follow the object, as part of it (`long=100`).
    Long(u64),
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (text, None),
        };
        let number = || {
            let value = value.and_then(|value| value.parse::<u64>().ok());
            value.ok_or_else(|| format!("the fault {name:?} needs a number: {name}=N"))
        };
        Ok(match name {
            "none" => Fault::None,
            "status" => Fault::Status(number()?.try_into().map_err(|_| "no such status")?),
            "close" => Fault::Close,
            "cut" => Fault::Cut(number()?),
            "wrong" => Fault::Wrong,
            "slow" => Fault::Slow(number()?.max(1)),
            "delay" => Fault::Delay(Duration::from_millis(number()?)),
            "hang" => Fault::Hang,
            "ignore-range" => Fault::IgnoreRange,
            "other-range" => Fault::OtherRange,
            "short" => Fault::Short(number()?),
            "long" => Fault::Long(number()?),
            other => return Err(format!("no fault is called {other:?}")),
        })
    }
}

/// A fault, and the requests that it hits: `[PATH][@FIRST[-LAST]]:FAULT`.
///
/// `PATH` is the beginning of the request's path (without the leading slash; empty for all); `FIRST` and `LAST` count
/// the requests whose path begins so, from 1, `LAST` may be left out after the dash. `packs/@2-:cut=100` cuts all
/// requests for packs from the second on.
#[derive(Debug)]
pub struct Rule {
    path: String,
    first: u64,
    last: u64,
    fault: Fault,
    seen: AtomicU64,
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (selector, fault) = text
            .rsplit_once(':')
            .ok_or_else(|| format!("{text:?} is not [PATH][@FIRST[-LAST]]:FAULT"))?;
        let (path, count) = match selector.split_once('@') {
            Some((path, count)) => (path, Some(count)),
            None => (selector, None),
        };
        let parse = |text: &str| {
            let number = text.parse::<u64>();
            number.map_err(|_| format!("{text:?} is not the number of a request"))
        };
        let (first, last) = match count.map(|count| count.split_once('-').ok_or(count)) {
            None => (1, u64::MAX),
            Some(Ok((first, ""))) => (parse(first)?, u64::MAX),
            Some(Ok((first, last))) => (parse(first)?, parse(last)?),
            Some(Err(only)) => (parse(only)?, parse(only)?),
        };
        Ok(Rule {
            path: path.to_owned(),
            first,
            last,
            fault: fault.parse()?,
            seen: AtomicU64::new(0),
        })
    }
}

/// Rules, of which the first that hits a request counts. As text: separated by white space.
#[derive(Debug, Default)]
pub struct Rules(Vec<Rule>);

impl Rules {
    /// Adds a rule at the end.
    pub fn push(&mut self, rule: Rule) {
        self.0.push(rule);
    }

    /// The fault for a request.
    pub(crate) fn fault(&self, path: &str) -> Fault {
        let mut fault = Fault::None;
        let mut hit = false;
        for rule in self.0.iter().filter(|rule| path.starts_with(&rule.path)) {
            // Each rule counts what its path matches, also when another rule hits.
            let number = rule.seen.fetch_add(1, Ordering::Relaxed) + 1;
            if !hit && (rule.first..=rule.last).contains(&number) {
                fault = rule.fault;
                hit = true;
            }
        }
        fault
    }
}

impl FromStr for Rules {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rules: Result<Vec<Rule>, String> = text.split_whitespace().map(str::parse).collect();
        rules.map(Rules)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_hit_what_they_say() {
        let rules: Rules = "packs/@2-3:status=500 images/:wrong packs/@5-:close"
            .parse()
            .unwrap();
        assert_eq!(rules.fault("images/x"), Fault::Wrong);
        assert_eq!(rules.fault("packs/x"), Fault::None);
        assert_eq!(rules.fault("packs/x"), Fault::Status(500));
        assert_eq!(rules.fault("packs/y"), Fault::Status(500));
        assert_eq!(rules.fault("packs/y"), Fault::None);
        assert_eq!(rules.fault("packs/y"), Fault::Close);
        assert_eq!(rules.fault("channels/y"), Fault::None);
    }

    #[test]
    fn bad_rules_are_refused() {
        for bad in ["x", ":nothing", "packs/@x:close", ":cut", ":status=99999"] {
            assert!(bad.parse::<Rules>().is_err(), "{bad}");
        }
        assert!("".parse::<Rules>().is_ok());
    }
}
