// SPDX-License-Identifier: GPL-2.0

//! The configuration file of `pristine serve`: options without their dashes, one a line, under those of the command line.

use std::ffi::OsString;
use std::path::Path;

use clap::{CommandFactory, Parser};

use super::ServeArgs;
use crate::exit::{Code, Failure, Outcome};

/// `pristine serve` by itself, to understand its options again.
#[derive(Parser, Debug)]
#[command(
    name = "pristine serve",
    args_override_self = true,
    disable_version_flag = true
)]
struct Whole {
    #[command(flatten)]
    args: ServeArgs,
    #[command(flatten)]
    _global: crate::Global,
}

/// The options with those of the configuration file, if one is named.
pub fn apply(args: &ServeArgs) -> Outcome<ServeArgs> {
    let Some(path) = &args.config else {
        return Ok(args.clone());
    };
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::io(format!("cannot read {}", path.display()), &error))?;
    // What comes after the verb; options that come before it are for all commands.
    let line = std::env::args_os()
        .skip_while(|word| word != "serve")
        .skip(1);
    parse(line.collect(), &text, path)
}

fn parse(line: Vec<OsString>, text: &str, path: &Path) -> Outcome<ServeArgs> {
    let mut words = vec![OsString::from("serve")];
    words.extend(options(text, path, &line)?);
    words.extend(line);
    let parsed = Whole::try_parse_from(words).map_err(|error| {
        let text = error.to_string();
        // Up to the usage, which is that of the command line.
        let lines = text.lines().take_while(|line| !line.is_empty());
        let what = lines.map(str::trim).collect::<Vec<_>>().join(" ");
        let what = what.trim_start_matches("error: ");
        Failure::new(Code::Usage, format!("{}: {what}", path.display()))
    })?;
    Ok(parsed.args)
}

/// The lines of the file as options.
fn options(text: &str, path: &Path, line: &[OsString]) -> Outcome<Vec<OsString>> {
    let known = Whole::command();
    let listens = line.iter().any(|word| {
        let word = word.to_string_lossy();
        word == "--listen" || word.starts_with("--listen=")
    });
    let mut options = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let wrong = |why: &str| {
            let place = format!("{}, line {}", path.display(), number + 1);
            Failure::new(Code::Usage, format!("{place}: {why}: {line}"))
                .hint("the options are those of pristine serve --help, without the dashes")
        };
        let Some((key, value)) = line.split_once('=') else {
            return Err(wrong("this is not `option = value`"));
        };
        let (key, value) = (key.trim(), value.trim());
        let mut arguments = known.get_arguments();
        let option = arguments.find(|option| option.get_long() == Some(key) && key != "config");
        let Some(option) = option else {
            return Err(wrong("there is no such option"));
        };
        if key == "listen" && listens {
            continue;
        }
        if option.get_action().takes_values() {
            options.push(format!("--{key}={value}").into());
        } else {
            match value {
                "yes" => options.push(format!("--{key}").into()),
                "no" => (),
                _ => return Err(wrong("yes or no is expected")),
            }
        }
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &[&str], text: &str) -> Result<ServeArgs, String> {
        let line = line.iter().map(OsString::from).collect();
        parse(line, text, Path::new("x.conf")).map_err(|failure| failure.to_string())
    }

    #[test]
    fn the_command_line_wins() {
        let text = "# a comment\nlisten = :1\nlisten = :2\nclient-rate = 20M\naccess-log = yes\n\
                    active = 7\n";
        let file = parsed(&["store"], text).unwrap();
        assert_eq!(file.listen.len(), 2);
        assert_eq!((file.client_rate, file.active.get()), (Some(20 << 20), 7));
        assert!(file.access_log);
        let both = ["--listen=:3", "--active", "9", "store", "--json"];
        let both = parsed(&both, text).unwrap();
        assert_eq!(both.listen[0].port(), 3);
        assert_eq!((both.listen.len(), both.active.get()), (1, 9));
    }

    #[test]
    fn what_is_wrong_is_told() {
        for (text, says) in [
            ("listen", "x.conf, line 1: this is not"),
            ("\ncolour = red", "x.conf, line 2: there is no such option"),
            ("config = y", "no such option"),
            ("access-log = perhaps", "yes or no"),
            ("active = 0", "active"),
            ("client-rate = fast", "fast"),
            ("tls-cert = x", "--tls-key"),
        ] {
            let error = parsed(&["store"], text).unwrap_err();
            assert!(error.contains(says), "{text:?}: {error}");
        }
    }
}
