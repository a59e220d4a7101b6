// SPDX-License-Identifier: GPL-2.0

//! `pristine token …`: the tokens in a server's access rules.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use pristine_server::{AccessRules, Channels, TokenRule};
use pristine_store::ChannelName;
use serde::Serialize;

use crate::exit::{Code, Failure, Outcome};
use crate::ui::{Table, Ui};

/// `pristine token …`
#[derive(Subcommand, Debug)]
pub enum TokenCommand {
    /// Make a token, and write its hash into the access rules
    #[command(after_long_help = "\
Examples:
  pristine token new lab-machines --access /etc/pristine/access --channel lab --channel stable
  pristine token new backup --access /etc/pristine/access --all-channels

Prints the token, which is stored nowhere: the rules have only its hash. A running server takes it up on SIGHUP. A machine \
gets it by `pristine.token=` in agent.conf, the command line by --token-file or $PRISTINE_TOKEN.

JSON fields: name, token, channels.")]
    New(NewArgs),
    /// Show whose tokens there are, and what they are good for
    #[command(after_long_help = "\
Example:
  pristine token list --access /etc/pristine/access

JSON: a list of objects with name, channels and hash.")]
    List(RulesArgs),
    /// Take all tokens of somebody out of the access rules
    #[command(after_long_help = "\
Example:
  pristine token remove lab-machines --access /etc/pristine/access

A running server forgets it on SIGHUP. JSON fields: name, removed.")]
    Remove(RemoveArgs),
}

/// The file with the rules.
#[derive(Args, Debug)]
pub struct RulesArgs {
    /// The server's access rules
    #[arg(long, value_name = "FILE")]
    access: PathBuf,
}

/// Arguments of `pristine token new`.
#[derive(Args, Debug)]
pub struct NewArgs {
    /// Who will have it: one word
    #[arg(value_parser = parse_name)]
    name: String,
    #[command(flatten)]
    rules: RulesArgs,
    /// A channel that it is good for; may be repeated
    #[arg(long = "channel", value_name = "NAME", value_parser = parse_channel)]
    #[arg(required_unless_present = "all_channels")]
    channels: Vec<ChannelName>,
    /// It is good for everything in the store
    #[arg(long, conflicts_with = "channels")]
    all_channels: bool,
    /// Do not write anything
    #[arg(long)]
    dry_run: bool,
}

/// Arguments of `pristine token remove`.
#[derive(Args, Debug)]
pub struct RemoveArgs {
    /// Whose
    #[arg(value_parser = parse_name)]
    name: String,
    #[command(flatten)]
    rules: RulesArgs,
    /// Do not write anything
    #[arg(long)]
    dry_run: bool,
}

fn parse_name(text: &str) -> Result<String, String> {
    let word = |c: char| c.is_ascii_graphic() && c != '#';
    match !text.is_empty() && text.len() <= 64 && text.chars().all(word) {
        true => Ok(text.to_owned()),
        false => Err("a name is one word of at most 64 visible ASCII characters without #".into()),
    }
}

fn parse_channel(text: &str) -> Result<ChannelName, String> {
    text.parse()
        .map_err(|error: pristine_store::ParseChannelError| error.to_string())
}

#[derive(Serialize)]
struct Made {
    name: String,
    token: String,
    channels: String,
}

#[derive(Serialize)]
struct Listed {
    name: String,
    channels: String,
    hash: String,
}

#[derive(Serialize)]
struct Removed {
    name: String,
    removed: usize,
}

/// Carries out a command.
pub fn run(command: &TokenCommand, ui: &Ui) -> Outcome {
    match command {
        TokenCommand::New(args) => new(args, ui),
        TokenCommand::List(args) => list(args, ui),
        TokenCommand::Remove(args) => remove(args, ui),
    }
}

fn new(args: &NewArgs, ui: &Ui) -> Outcome {
    let path = &args.rules.access;
    let mut text = read(path, true)?;
    let channels = match args.all_channels {
        true => Channels::All,
        false => Channels::Some(args.channels.iter().cloned().collect()),
    };
    let token = random_token()?;
    let rule = TokenRule::new(&args.name, &token, channels);
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text.push_str(&format!("{rule}\n"));
    if args.dry_run {
        ui.note(format!("{} would get: {rule}", path.display()));
        return Ok(());
    }
    write(path, &text)?;
    let made = Made {
        name: args.name.clone(),
        token,
        channels: rule.channels.to_string(),
    };
    ui.result(&made, |out| writeln!(out, "{}", made.token))
}

fn list(args: &RulesArgs, ui: &Ui) -> Outcome {
    let text = read(&args.access, false)?;
    let listed: Vec<Listed> = rules(&text)
        .map(|rule| Listed {
            name: rule.name,
            channels: rule.channels.to_string(),
            hash: rule.hash.to_string(),
        })
        .collect();
    ui.result(&listed, |out| {
        let mut table = Table::new(&["NAME", "CHANNELS", "HASH"], &[]);
        for rule in &listed {
            let hash = rule.hash.get(..12).unwrap_or_default().to_owned();
            table.row(vec![rule.name.clone(), rule.channels.clone(), hash]);
        }
        table.write(ui, out)
    })
}

fn remove(args: &RemoveArgs, ui: &Ui) -> Outcome {
    let path = &args.rules.access;
    let text = read(path, false)?;
    let is_theirs = |line: &&str| rule_of(line).is_some_and(|rule| rule.name == args.name);
    let removed = text.lines().filter(is_theirs).count();
    if removed == 0 {
        let what = format!("{} has no token of {}", path.display(), args.name);
        let hint = format!(
            "see whose it has: pristine token list --access {}",
            path.display()
        );
        return Err(Failure::new(Code::NotFound, what).hint(hint));
    }
    let kept = text.lines().filter(|line| !is_theirs(line));
    let text: String = kept.flat_map(|line| [line, "\n"]).collect();
    if !args.dry_run {
        write(path, &text)?;
    }
    let removed = Removed {
        name: args.name.clone(),
        removed,
    };
    ui.result(&removed, |out| {
        let verb = if args.dry_run {
            "would be removed"
        } else {
            "removed"
        };
        writeln!(out, "{} {verb}", removed.removed)
    })
}

fn rule_of(line: &str) -> Option<TokenRule> {
    let line = line.split('#').next().unwrap_or_default();
    TokenRule::parse(line)?.ok()
}

fn rules(text: &str) -> impl Iterator<Item = TokenRule> + '_ {
    text.lines().filter_map(rule_of)
}

/// The rules, which must make sense; with `may_be_missing` a file that is not there is an empty one.
fn read(path: &Path, may_be_missing: bool) -> Outcome<String> {
    let file = path.display().to_string();
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if may_be_missing && error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(String::new());
        }
        Err(error) => return Err(Failure::io(format!("cannot read {file}"), &error)),
    };
    AccessRules::parse(&text, &file)
        .map_err(|error| Failure::new(Code::Usage, error.to_string()).hint("mend it first"))?;
    Ok(text)
}

/// Replaces the rules at once, so that a server that reads them sees the old or the new ones.
fn write(path: &Path, text: &str) -> Outcome {
    let fail =
        |error: std::io::Error| Failure::io(format!("cannot write {}", path.display()), &error);
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    // Hashes of tokens are no secret, but who may do what is nobody's business.
    let mode = fs::metadata(path).map_or(0o600, |metadata| metadata.permissions().mode() & 0o777);
    let mut options = OpenOptions::new();
    let options = options.write(true).create(true).truncate(true).mode(mode);
    let written = options.open(&temporary).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    });
    written.map_err(fail)
}

/// 256 random bits in hexadecimal digits.
fn random_token() -> Outcome<String> {
    let mut bytes = [0; 32];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|error| Failure::io("cannot read /dev/urandom", &error))?;
    Ok(bytes
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .fold(String::new(), |all, two| all + &two))
}
