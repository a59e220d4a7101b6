// SPDX-License-Identifier: GPL-2.0

//! The command line, and the configuration file, which says the same.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches, Parser};
use ipnet::IpNet;
use pristine_image::ImageId;
use pristine_store::{HttpOptions, Keyring, Token};

use crate::exit::{self, Code, Failure};
use crate::helper::{Settings, AHEAD};
use crate::pace::Hydrate;
use crate::peers::serve::Limits;
use crate::peers::PORT;

const EXAMPLES: &str = "\
Examples:
  pristined --device root --store http://10.0.2.2:8080
  pristined --device 253:0 --store http://near/store --store http://far/store --survive
  pristined --device /dev/mapper/root --store /srv/store --take-over --hydrate full --rate 20M

The configuration file (--config) has a line for each option, without the dashes: `store = http://10.0.2.2:8080`, \
`stay = yes`. What is on the command line wins; stores there replace those of the file.

Signals: SIGTERM and SIGINT let what is in hand be finished and end it with 0; what is left waits in the kernel \
for the next helper. SIGUSR1 ends the recording of the boot trace. SIGHUP does nothing.";

/// Fetches the stale blocks of a managed device from the image's stores while it is used.
#[derive(Parser, Clone, Debug)]
#[command(name = "pristined", version)]
pub struct Options {
    /// The managed device: its name, MAJOR:MINOR or a path such as /dev/mapper/root
    #[arg(long, value_name = "DEVICE")]
    pub device: String,
    /// A store that has the image: a URL or a directory. Several in order of preference
    #[arg(long = "store", value_name = "STORE", required = true)]
    pub stores: Vec<String>,
    /// Refuse a device that means another image than this
    #[arg(long, value_name = "HEX")]
    pub image: Option<ImageId>,
    /// Take the device from the helper that it has, once the image can be read
    #[arg(long)]
    pub take_over: bool,
    /// Stay when nothing is stale any more
    #[arg(long)]
    pub stay: bool,
    /// Take a name with which systemd does not kill it at the switch from the initramfs and at shutdown
    #[arg(long)]
    pub survive: bool,
    /// Log to the kernel's log instead of standard error; the default with --survive
    #[arg(long)]
    pub kmsg: bool,

    /// Threads that answer requests
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=256))]
    #[arg(help_heading = "Speed")]
    pub workers: u16,
    /// What to fetch that nobody asked for
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = Hydrate::Idle)]
    #[arg(help_heading = "Speed")]
    pub hydrate: Hydrate,
    /// Threads that fetch it
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    #[arg(help_heading = "Speed")]
    pub streams: u16,
    /// Content fetched that way, in bytes per second at most; 20M, 500K
    #[arg(long, value_name = "BYTES", value_parser = parse_size, help_heading = "Speed")]
    pub rate: Option<u64>,
    /// Fetch only what is asked for, also before who reads one block after the other
    #[arg(long, help_heading = "Speed")]
    pub no_read_ahead: bool,
    /// Memory for unpacked content, for the next read nearby
    #[arg(long, value_name = "BYTES", value_parser = parse_size, default_value = "16M")]
    #[arg(help_heading = "Speed")]
    pub cache: u64,

    /// Seconds after which a request ends with EIO; without it, it waits for ever
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, help_heading = "Failures")]
    pub give_up: Option<Duration>,
    /// Seconds to wait for a connection
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, default_value = "5")]
    #[arg(help_heading = "Failures")]
    pub connect: Duration,
    /// Seconds without a byte after which a store is given up for the next; a whole answer may take this and its
    /// length at 64 KiB/s
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, default_value = "5")]
    #[arg(help_heading = "Failures")]
    pub stall: Duration,
    /// Seconds that what is in hand may take after SIGTERM
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, default_value = "5")]
    #[arg(help_heading = "Failures")]
    pub grace: Duration,

    /// Give blocks of the image to neighbours and take them from neighbours, which `pristine serve --peers` introduces;
    /// it stays when nothing is stale any more. Blocks that were changed here are never given
    #[arg(long, help_heading = "Neighbours")]
    pub peers: bool,
    /// Serve neighbours there, on all addresses
    #[arg(long, value_name = "PORT", default_value_t = PORT, help_heading = "Neighbours")]
    pub peers_port: u16,
    /// A network that is served; may be repeated [default: the private ones, as 10.0.0.0/8, 192.168.0.0/16, fe80::/10]
    #[arg(long, value_name = "NETWORK", help_heading = "Neighbours")]
    pub peers_from: Vec<IpNet>,
    /// Given to neighbours, in bytes per second at most; 0 for no limit
    #[arg(long, value_name = "BYTES", value_parser = parse_size, default_value = "32M")]
    #[arg(help_heading = "Neighbours")]
    pub peers_rate: u64,

    /// Directory of boot traces (IMAGE.trace): one that is there is followed, before the store's, and one is recorded. It
    /// must not lie on the device
    #[arg(long, value_name = "DIR", help_heading = "Files")]
    pub trace_dir: Option<PathBuf>,
    /// Seconds that are recorded
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, default_value = "120")]
    #[arg(help_heading = "Files")]
    pub trace_time: Duration,
    /// A file with the token that the stores ask for; else $PRISTINE_TOKEN is taken
    #[arg(long, value_name = "FILE", help_heading = "Files")]
    pub token_file: Option<PathBuf>,
    /// A file with age identities that open encrypted images; it may be given several times. Without it,
    /// $PRISTINE_IDENTITY is taken, else /etc/pristine/identity if it is there
    #[arg(long, value_name = "FILE", help_heading = "Files")]
    pub identity: Vec<PathBuf>,
    /// What it is doing, as JSON; by default /run/pristine/helper-NAME.json, `none` for none
    #[arg(long, value_name = "FILE", help_heading = "Files")]
    pub state: Option<PathBuf>,
    /// A file with these options
    #[arg(long, value_name = "FILE", help_heading = "Files")]
    pub config: Option<PathBuf>,
}

/// The command line's definition, with the exit codes at the end of the help.
pub fn definition() -> clap::Command {
    Options::command()
        .args_override_self(true)
        .after_help(exit::table())
        .after_long_help(format!("{EXAMPLES}\n\n{}", exit::table()))
}

impl Options {
    /// From the command line and the configuration file that it names. Ends the process for `--help` and for what
    /// clap finds wrong.
    ///
    /// # Errors
    ///
    /// The configuration file cannot be read or understood.
    pub fn read(arguments: Vec<OsString>) -> Result<Self, Failure> {
        let arguments = match config_path(&arguments) {
            Some(path) => {
                let text = std::fs::read_to_string(&path).map_err(|e| {
                    Failure::new(Code::Usage, format!("cannot read {}: {e}", path.display()))
                })?;
                with_config(arguments, &text, &path)?
            }
            None => arguments,
        };
        let matches = definition().get_matches_from(arguments);
        Ok(Options::from_arg_matches(&matches).unwrap_or_else(|error| error.exit()))
    }

    /// How the helper is to work.
    pub fn settings(&self) -> Settings {
        Settings {
            workers: usize::from(self.workers),
            hydrators: usize::from(self.streams),
            hydrate: self.hydrate,
            read_ahead: !self.no_read_ahead,
            rate: self.rate,
            cache: self.cache,
            give_up: self.give_up,
            // Who left would have nothing more to give.
            stay: self.stay || self.peers,
            grace: self.grace,
            ..Settings::default()
        }
    }

    /// What opens encrypted images; `None` if there is no identity.
    ///
    /// # Errors
    ///
    /// An identity that cannot be used.
    pub fn keyring(&self) -> Result<Option<Arc<Keyring>>, Failure> {
        let keyring = Keyring::configured(&self.identity);
        let keyring = keyring.map_err(|e| Failure::new(Code::Usage, e.to_string()))?;
        Ok(keyring.map(Arc::new))
    }

    /// How neighbours are served.
    pub fn peer_limits(&self) -> Limits {
        let defaults = Limits::default();
        Limits {
            allowed: match self.peers_from.as_slice() {
                [] => defaults.allowed,
                some => some.to_vec(),
            },
            rate: Some(self.peers_rate).filter(|rate| *rate > 0),
            ..defaults
        }
    }

    /// How servers are talked to. Credentials come from the environment or a file, where not all users see them.
    ///
    /// # Errors
    ///
    /// Credentials that cannot be used.
    pub fn http(&self) -> Result<HttpOptions, Failure> {
        let usage = |e: pristine_store::Error| Failure::new(Code::Usage, e.to_string());
        let mut options = HttpOptions::from_environment().map_err(usage)?;
        if let Some(path) = &self.token_file {
            options.token = Some(Token::read(path).map_err(usage)?);
        }
        Ok(HttpOptions {
            connect_timeout: self.connect,
            read_timeout: self.stall,
            connections: usize::from(self.workers) + usize::from(self.streams) + AHEAD,
            ..options
        })
    }
}

/// The value of `--config`, before anything else is understood.
fn config_path(arguments: &[OsString]) -> Option<PathBuf> {
    let mut path = None;
    let mut rest = arguments.iter().skip(1);
    while let Some(argument) = rest.next() {
        let text = argument.to_string_lossy();
        if text == "--config" {
            path = rest.next().map(PathBuf::from);
        } else if let Some(value) = text.strip_prefix("--config=") {
            path = Some(PathBuf::from(value));
        }
    }
    path
}

/// Puts what a configuration file says before the arguments, which win that way.
fn with_config(
    mut arguments: Vec<OsString>,
    text: &str,
    path: &Path,
) -> Result<Vec<OsString>, Failure> {
    let has_stores = arguments.iter().any(|a| {
        let a = a.to_string_lossy();
        a == "--store" || a.starts_with("--store=")
    });
    let mut all: Vec<OsString> = Vec::new();
    all.extend((!arguments.is_empty()).then(|| arguments.remove(0)));
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let wrong = |why: &str| {
            let place = format!("{}:{}", path.display(), number + 1);
            Failure::new(Code::Usage, format!("{place}: {why}: {line}"))
        };
        let (key, value) = line
            .split_once('=')
            .ok_or_else(|| wrong("this is not `option = value`"))?;
        let (key, value) = (key.trim(), value.trim());
        let known = Options::command();
        let Some(option) = known
            .get_arguments()
            .find(|a| a.get_long() == Some(key) && key != "config")
        else {
            return Err(wrong("there is no such option"));
        };
        if key == "store" && has_stores {
            continue;
        }
        if option.get_action().takes_values() {
            all.push(format!("--{key}={value}").into());
        } else {
            match value {
                "yes" | "true" | "on" | "1" => all.push(format!("--{key}").into()),
                "no" | "false" | "off" | "0" => {}
                _ => return Err(wrong("yes or no is expected")),
            }
        }
    }
    all.extend(arguments);
    Ok(all)
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .trim_end_matches('s')
        .parse()
        .map_err(|_| format!("{text} is not a number of seconds"))?;
    if !(0.0..=1e9).contains(&seconds) {
        return Err(format!("{text} is not between 0 and a billion seconds"));
    }
    Ok(Duration::from_secs_f64(seconds))
}

fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = text.get(digits.len()..).unwrap_or("").to_ascii_uppercase();
    let shift = match unit.trim_end_matches("IB").trim_end_matches('B') {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return Err(format!("{unit} is no unit; K, M and G are")),
    };
    let number: Option<u64> = digits.parse().ok();
    number
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or_else(|| format!("{text} is not a size such as 4096, 500K or 20M"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str], config: &str) -> Result<Options, String> {
        let arguments = arguments.iter().map(OsString::from).collect();
        let all = with_config(arguments, config, Path::new("x.conf")).map_err(|f| f.to_string())?;
        let matches = definition().try_get_matches_from(all);
        let matches = matches.map_err(|e| e.to_string())?;
        Options::from_arg_matches(&matches).map_err(|e| e.to_string())
    }

    #[test]
    fn the_command_line_is_consistent() {
        definition().debug_assert();
    }

    #[test]
    fn the_command_line_wins() {
        let config = "# a comment\ndevice = root\nstore = http://a\nstore=http://b\nstay = yes\n\
                      rate = 20M\nworkers = 3\ntake-over = no\n";
        let file = parse(&["pristined"], config).unwrap();
        assert_eq!(file.stores, ["http://a", "http://b"]);
        assert_eq!((file.rate, file.workers), (Some(20 << 20), 3));
        assert!(file.stay && !file.take_over);
        let both = [
            "pristined",
            "--workers=5",
            "--store",
            "/c",
            "--give-up",
            "2.5",
        ];
        let both = parse(&both, config).unwrap();
        assert_eq!((both.stores, both.workers), (vec!["/c".to_owned()], 5));
        assert_eq!(both.give_up, Some(Duration::from_millis(2500)));
    }

    #[test]
    fn what_is_wrong_is_told() {
        for (config, says) in [
            ("device", "x.conf:1"),
            ("\ncolour = red", "x.conf:2: there is no such option"),
            ("stay = perhaps", "yes or no"),
            ("config = y", "no such option"),
            ("device = x", "--store"),
            ("device = x\nstore = y\nrate = fast", "FAST is no unit"),
            ("device = x\nstore = y\nimage = abc", "image"),
            ("device = x\nstore = y\nworkers = 0", "workers"),
        ] {
            let error = parse(&["pristined"], config).unwrap_err();
            assert!(error.contains(says), "{config:?}: {error}");
        }
    }
}
