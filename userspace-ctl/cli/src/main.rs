// SPDX-License-Identifier: GPL-2.0

//! The `pristine` command: nouns and verbs over the libraries of this workspace.
//!
//! To add a noun: a module with a clap `Subcommand` enum and `pub fn run(command, &Ui) -> Outcome`, a variant in
//! [`Command`] and an arm in [`run`]. Failures are [`exit::Failure`]s, output goes through [`ui::Ui`].

mod channel;
mod device;
mod exit;
mod generate;
mod image;
mod key;
mod serve;
mod token;
mod ui;

use std::process::ExitCode;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use exit::Outcome;
use ui::{ColorChoice, Ui};

const ABOUT: &str = "Keep a machine's disk equal to a master image";

const LONG_ABOUT: &str = "\
Pristine keeps every managed machine's disk equal to a master image, and makes going back to it cost next to \
nothing. Images are built once, published to a store (a directory or any web server), and fetched block by block, \
each block verified against the image's root digest.";

#[derive(Parser, Debug)]
#[command(name = "pristine", version, about = ABOUT, long_about = LONG_ABOUT)]
#[command(
    propagate_version = true,
    subcommand_required = true,
    arg_required_else_help = true
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options that every command takes.
#[derive(Args, Debug)]
pub(crate) struct Global {
    /// Print the result as one JSON value on stdout, and errors as one JSON line on stderr
    #[arg(long, global = true, help_heading = "Global options")]
    json: bool,
    /// Print nothing but results and errors
    #[arg(short, long, global = true, help_heading = "Global options")]
    quiet: bool,
    /// A file with the token that the store's server asks for; without it $PRISTINE_TOKEN counts
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        help_heading = "Global options"
    )]
    token_file: Option<std::path::PathBuf>,
    /// A file with age identities that open encrypted images, repeatable; without it $PRISTINE_IDENTITY counts, else
    /// /etc/pristine/identity
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        help_heading = "Global options"
    )]
    identity: Vec<std::path::PathBuf>,
    /// When to use colour; auto respects NO_COLOR
    #[arg(long, global = true, value_name = "WHEN", value_enum, default_value_t = ColorChoice::Auto)]
    #[arg(hide_possible_values = false, help_heading = "Global options")]
    color: ColorChoice,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Managed devices: format, activate, look at, check
    #[command(subcommand)]
    Device(device::Command),
    /// Build, publish, list and verify master images
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// What a channel is at, and was at before
    #[command(subcommand)]
    Channel(channel::ChannelCommand),
    /// Keys that sign releases, and whom to trust
    #[command(subcommand)]
    Key(key::KeyCommand),
    /// Serve a store over HTTP
    Serve(Box<serve::ServeArgs>),
    /// Tokens that open the channels of a server
    #[command(subcommand)]
    Token(token::TokenCommand),
    /// Write a shell completion script to stdout
    Completions(generate::CompletionsArgs),
    /// Write the manual pages
    Man(generate::ManArgs),
}

fn run(command: Command, ui: &Ui) -> Outcome {
    match command {
        Command::Device(command) => device::run(command, ui),
        Command::Image(command) => image::run(&command, ui),
        Command::Channel(command) => channel::run(&command, ui),
        Command::Key(command) => key::run(&command, ui),
        Command::Serve(args) => serve::run(&args, ui),
        Command::Token(command) => token::run(&command, ui),
        Command::Completions(args) => generate::completions(&args, definition()),
        Command::Man(args) => generate::man(&args, definition()),
    }
}

/// The command line's definition, with the exit codes at the end of the help.
fn definition() -> clap::Command {
    Cli::command().after_help(exit::table())
}

fn main() -> ExitCode {
    let matches = definition().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    if let Some(path) = &cli.global.token_file {
        // Where all that opens stores looks; there is one thread yet.
        std::env::remove_var(pristine_store::TOKEN_VARIABLE);
        std::env::set_var("PRISTINE_TOKEN_FILE", path);
    }
    if !cli.global.identity.is_empty() {
        // Likewise. A path with a colon in it cannot be one of several.
        match std::env::join_paths(&cli.global.identity) {
            Ok(paths) => std::env::set_var(pristine_store::sealed::IDENTITY_VARIABLE, paths),
            Err(_) => {
                eprintln!("pristine: error: --identity: the name of a file has a colon in it");
                return ExitCode::from(exit::Code::Usage.number());
            }
        }
    }
    let ui = Ui::new(cli.global.json, cli.global.quiet, cli.global.color);
    match run(cli.command, &ui) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            ui.failure(&failure);
            ExitCode::from(failure.code().number())
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_command_line_is_consistent() {
        super::definition().debug_assert();
    }
}
