// SPDX-License-Identifier: GPL-2.0

//! The preboot agent of Pristine, see the library's documentation.

use std::process::ExitCode;

use pristine_agent::config::{OnError, Then, KEYS};
use pristine_agent::failure::{Failure, Kind};
use pristine_agent::{console, handover, helper, net, supervisor, worker};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|a| a.to_string_lossy().into_owned())
        .collect();
    if let Some(event) = net::is_script(&arguments) {
        return ExitCode::from(net::script(&event));
    }
    if std::process::id() == 1 {
        supervisor::run(&arguments);
    }
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [supervisor::WORKER] => one_attempt(),
        [helper::WATCH, ref rest @ ..] => helper::watch(rest),
        ["run"] => standalone(),
        ["check"] => check(),
        ["--version"] => {
            println!("pristine-agent {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        ["--help" | "help"] => {
            print!("{}", help());
            ExitCode::SUCCESS
        }
        _ => {
            eprint!("{}", help());
            ExitCode::from(Kind::Config.code())
        }
    }
}

fn help() -> String {
    let mut text = String::from(
        "pristine-agent: makes a machine's disk its master image before the system starts.

  As process 1 of an initramfs it does everything and becomes the system's init. Otherwise:

  pristine-agent run       makes the disk right and activates it; mounting the root is the caller's
  pristine-agent check     checks the settings, changes nothing
  pristine-agent --version

Settings come from /etc/pristine/agent.conf (key = value) and, winning, from the kernel command line, there with
the prefix pristine.; data, store and image must be set:

",
    );
    for (key, meaning) in KEYS {
        text.push_str(&format!("  {key:<16} {meaning}\n"));
    }
    text.push_str("\nExit codes:\n   0  the disk is right, and active\n");
    for kind in Kind::ALL {
        text.push_str(&format!("  {:>2}  {}\n", kind.code(), kind.meaning()));
    }
    text.push_str(&format!(
        "  {}  the disk is right, and pristine.then=poweroff\n  {}  the disk is right, and pristine.then=reboot\n",
        supervisor::POWEROFF,
        supervisor::REBOOT
    ));
    text.push_str("\nWhat was done is in /run/pristine/agent.json afterwards.\n");
    text
}

fn failed(failure: &Failure) -> ExitCode {
    console::error(failure);
    ExitCode::from(failure.kind.code())
}

fn attempt(number: u64) -> Result<(worker::Outcome, pristine_agent::config::Config), Failure> {
    let settings = worker::settings()?;
    for warning in settings.warnings() {
        console::warn(warning);
    }
    let config = settings.config()?;
    let outcome = worker::work(&config, number)?;
    Ok((outcome, config))
}

fn code(then: Then) -> ExitCode {
    ExitCode::from(match then {
        Then::Boot => supervisor::BOOT,
        Then::Poweroff => supervisor::POWEROFF,
        Then::Reboot => supervisor::REBOOT,
    })
}

/// As the child of process 1: everything once, up to the mounted root.
fn one_attempt() -> ExitCode {
    let number = std::env::var(supervisor::ATTEMPT)
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(1);
    handover::leave_root();
    let result = attempt(number).and_then(|(outcome, config)| {
        if let Some(device) = &outcome.device {
            handover::mount_root(
                device,
                config.rootfs.as_deref(),
                &config.rootflags,
                &config.init,
            )?;
        }
        Ok(outcome.then)
    });
    match result {
        Ok(then) => code(then),
        Err(failure) => failed(&failure),
    }
}

/// Called by another initramfs: tries again as configured, and leaves the rest to the caller.
fn standalone() -> ExitCode {
    let mut number = 0;
    loop {
        number += 1;
        let failure = match attempt(u64::from(number)) {
            Ok((outcome, _)) => return code(outcome.then),
            Err(failure) => failure,
        };
        let action = worker::settings()
            .map(|s| s.on_error())
            .unwrap_or(OnError::Shell);
        if action != OnError::Retry || !failure.kind.may_pass() {
            return failed(&failure);
        }
        console::error(&failure);
        let wait = worker::backoff(number);
        console::say(format_args!(
            "trying again in {} s (pristine.onerror=retry)",
            wait.as_secs()
        ));
        std::thread::sleep(wait);
    }
}

fn check() -> ExitCode {
    let checked = worker::settings().and_then(|s| Ok((s.config()?, s)));
    match checked {
        Ok((config, settings)) => {
            for warning in settings.warnings() {
                console::warn(warning);
            }
            println!("{config:#?}");
            ExitCode::SUCCESS
        }
        Err(failure) => failed(&failure),
    }
}
