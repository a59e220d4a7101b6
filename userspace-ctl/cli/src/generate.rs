// SPDX-License-Identifier: GPL-2.0

//! `pristine completions` and `pristine man`: what packagers install.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Command};
use clap_complete::Shell;

use crate::exit::{Failure, Outcome};

/// Arguments of `pristine completions`.
#[derive(Args, Debug)]
pub struct CompletionsArgs {
    /// The shell to write completions for
    shell: Shell,
}

/// Arguments of `pristine man`.
#[derive(Args, Debug)]
pub struct ManArgs {
    /// Directory to write a page for each command to; without it the main page goes to stdout
    directory: Option<PathBuf>,
}

/// Writes a completion script to stdout.
pub fn completions(args: &CompletionsArgs, mut command: Command) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "pristine", &mut script);
    to_stdout(&script)
}

/// Writes manual pages.
pub fn man(args: &ManArgs, mut command: Command) -> Outcome {
    command.build();
    match &args.directory {
        None => to_stdout(&render(&command)?),
        Some(directory) => {
            let what = || format!("cannot create the directory {}", directory.display());
            fs::create_dir_all(directory).map_err(|error| Failure::io(what(), &error))?;
            write_pages(&command, "pristine", directory)
        }
    }
}

fn write_pages(command: &Command, name: &str, directory: &Path) -> Outcome {
    let path = directory.join(format!("{name}.1"));
    let page = render(&command.clone().name(name.to_owned()))?;
    fs::write(&path, page)
        .map_err(|error| Failure::io(format!("cannot write {}", path.display()), &error))?;
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        if sub.get_name() != "help" {
            write_pages(sub, &format!("{name}-{}", sub.get_name()), directory)?;
        }
    }
    Ok(())
}

fn render(command: &Command) -> Outcome<Vec<u8>> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone())
        .render(&mut page)
        .map_err(|error| Failure::io("cannot make the manual page", &error))?;
    Ok(page)
}

fn to_stdout(bytes: &[u8]) -> Outcome {
    match io::stdout().lock().write_all(bytes) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::io("cannot write to standard output", &error))
        }
        _ => Ok(()),
    }
}
