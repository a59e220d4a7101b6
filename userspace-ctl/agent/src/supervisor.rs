// SPDX-License-Identifier: GPL-2.0

//! Process 1 of the initramfs.
//!
//! Process 1 must not end, whatever happens: the kernel panics if it does. So it does little itself. The work is
//! done by a child, the same program; if that fails, crashes or is killed, this process says so and does what
//! `pristine.onerror` asks for. It comes to an end only by becoming the system's init.

use std::fs::OpenOptions;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use rustix::process::{wait, WaitOptions};
use rustix::system::{reboot, RebootCommand};

use crate::config::{OnError, Settings, Then};
use crate::console::{self, say, warn};
use crate::failure::{Failure, Kind};
use crate::{handover, worker};

/// The child's exit codes for success; failures have those of [`Kind::code`].
pub const BOOT: u8 = 0;
/// The disk is right, and the machine is to go off.
pub const POWEROFF: u8 = 40;
/// The disk is right, and the machine is to start again.
pub const REBOOT: u8 = 41;
/// The argument that makes the program the worker.
pub const WORKER: &str = "--worker";
/// Where the number of the attempt goes to the worker.
pub const ATTEMPT: &str = "PRISTINE_ATTEMPT";

/// What the child ended with.
enum Ended {
    Done(Then),
    Failed(Kind),
    Crashed(String),
}

/// Runs as process 1 and never returns. `arguments` go to the system's init.
pub fn run(arguments: &[String]) -> ! {
    // A bug here would take the machine down with a kernel panic; better to stay and say so.
    std::panic::set_hook(Box::new(|info| {
        warn(format_args!("this is a bug in the agent: {info}"));
        let failure = Failure::new(
            Kind::Internal,
            "process 1 cannot go on; the machine starts again in a minute",
        );
        console::error(&failure);
        std::thread::sleep(Duration::from_secs(60));
        restart(RebootCommand::Restart);
    }));
    std::env::set_var("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let basics = handover::mount_basics();
    open_console();
    say(format_args!("version {}", env!("CARGO_PKG_VERSION")));
    if let Err(failure) = basics {
        console::error(&failure);
    }
    let mut failures = 0;
    loop {
        let settings = worker::settings().unwrap_or_else(|failure| {
            console::error(&failure);
            Settings::default()
        });
        let kind = match child(u64::from(failures) + 1) {
            Ended::Done(Then::Boot) => {
                say(format_args!("starting {}", settings.init()));
                let failure = handover::switch(&settings.init(), arguments);
                console::error(&failure);
                failure.kind
            }
            Ended::Done(Then::Poweroff) => {
                say("the disk is right; going off (pristine.then=poweroff)");
                restart(RebootCommand::PowerOff)
            }
            Ended::Done(Then::Reboot) => {
                say("the disk is right; starting again (pristine.then=reboot)");
                restart(RebootCommand::Restart)
            }
            Ended::Failed(kind) => kind,
            Ended::Crashed(how) => {
                let what = format!(
                    "the agent's worker {how}; this is a bug, or the machine has too little memory"
                );
                console::error(&Failure::new(Kind::Internal, what));
                Kind::Internal
            }
        };
        failures += 1;
        after_failure(settings.on_error(), kind, failures);
    }
}

/// Makes standard input, output and error the console, if the kernel could not because there was no `/dev/console`.
fn open_console() {
    if let Ok(console) = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/console")
    {
        let _ = rustix::stdio::dup2_stdin(&console);
        let _ = rustix::stdio::dup2_stdout(&console);
        let _ = rustix::stdio::dup2_stderr(&console);
    }
}

/// Runs the worker and waits for it; other children that end meanwhile are taken care of.
fn child(attempt: u64) -> Ended {
    let started = Command::new("/proc/self/exe")
        .arg0(console::NAME)
        .arg(WORKER)
        .env(ATTEMPT, attempt.to_string())
        .spawn();
    let worker = match started {
        Ok(worker) => worker,
        Err(e) => return Ended::Crashed(format!("cannot be started: {e}")),
    };
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status)))
                if i64::from(pid.as_raw_nonzero().get()) == i64::from(worker.id()) =>
            {
                return ended(ExitStatus::from_raw(status.as_raw()));
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Ended::Crashed(format!("cannot be waited for: {e}")),
        }
    }
}

fn ended(status: ExitStatus) -> Ended {
    let code = |c: u8| Some(i32::from(c));
    match status.code() {
        c if c == code(BOOT) => Ended::Done(Then::Boot),
        c if c == code(POWEROFF) => Ended::Done(Then::Poweroff),
        c if c == code(REBOOT) => Ended::Done(Then::Reboot),
        Some(c) => match Kind::from_code(c) {
            Some(kind) => Ended::Failed(kind),
            None => Ended::Crashed(format!("ended with status {c}")),
        },
        None => Ended::Crashed(format!(
            "was killed by signal {}",
            status.signal().unwrap_or(0)
        )),
    }
}

/// Does what is configured for failures, and returns when everything is to be tried again.
fn after_failure(action: OnError, kind: Kind, failures: u32) {
    match action {
        OnError::Retry => {
            // What somebody must put right does not come right in a second.
            let wait = match kind.may_pass() {
                true => worker::backoff(failures),
                false => worker::LONGEST_WAIT,
            };
            say(format_args!(
                "{}; trying again in {} s (pristine.onerror=retry)",
                kind.meaning(),
                wait.as_secs()
            ));
            std::thread::sleep(wait);
        }
        OnError::Shell => shell(),
        OnError::Reboot => {
            say("starting again in 10 s (pristine.onerror=reboot)");
            std::thread::sleep(Duration::from_secs(10));
            restart(RebootCommand::Restart)
        }
        OnError::Poweroff => {
            say("going off (pristine.onerror=poweroff)");
            restart(RebootCommand::PowerOff)
        }
    }
}

/// The terminal behind `/dev/console`; a shell needs the real one, to have job control and Ctrl-C.
fn terminal() -> String {
    std::fs::read_to_string("/sys/class/tty/console/active")
        .ok()
        .and_then(|t| t.split_whitespace().last().map(|n| format!("/dev/{n}")))
        .filter(|p| Path::new(p).exists())
        .unwrap_or_else(|| "/dev/console".into())
}

fn shell() {
    let terminal = terminal();
    say(format_args!(
        "a shell on {terminal} (pristine.onerror=shell); everything is tried again when it ends"
    ));
    let open = || OpenOptions::new().read(true).write(true).open(&terminal);
    let started = (|| {
        let (input, output, error) = (open()?, open()?, open()?);
        Command::new("/bin/busybox")
            .args(["setsid", "-c", "/bin/busybox", "sh"])
            .env("PS1", "pristine-agent# ")
            .stdin(input)
            .stdout(output)
            .stderr(error)
            .status()
    })();
    if let Err(e) = started {
        warn(format_args!(
            "there is no shell: {e}; trying again in a minute"
        ));
        std::thread::sleep(worker::LONGEST_WAIT);
    }
}

fn restart(how: RebootCommand) -> ! {
    rustix::fs::sync();
    let error = reboot(how);
    warn(format_args!(
        "the kernel refuses: {error:?}; switch the machine off by hand"
    ));
    loop {
        std::thread::sleep(worker::LONGEST_WAIT);
    }
}
