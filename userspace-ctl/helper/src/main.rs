// SPDX-License-Identifier: GPL-2.0

//! `pristined`, see the library's documentation.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::Builder;
use std::time::Duration;

use pristine_device::block;
use pristine_device::channel::{Attached, Channel as DeviceChannel, Refused};
use pristine_device::control::{Control, Id};
use pristine_device::dm::Dm;
use pristine_helper::exit::{Code, Failure};
use pristine_helper::helper::{describe, Helper, Places};
use pristine_helper::library::{Library, Limits};
use pristine_helper::options::Options;
use pristine_helper::pace::Load;
use pristine_helper::peers::together::Peers;
use pristine_helper::source::Source;
use pristine_helper::state::AtomicFile;
use pristine_helper::stop::{End, Stop};
use pristine_helper::trace::{self, Recorder};
use pristine_helper::{log, process};
use pristine_image::ImageId;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

/// While the device is suspended it cannot be attached to; it is tried again after this time.
const SUSPENDED: Duration = Duration::from_millis(100);

fn main() -> ExitCode {
    let result = Options::read(std::env::args_os().collect()).and_then(|options| run(&options));
    match result {
        Ok(code) => code,
        Err(failure) => {
            log::error(&failure);
            ExitCode::from(failure.code.number())
        }
    }
}

fn run(options: &Options) -> Result<ExitCode, Failure> {
    if options.survive && !process::survives() {
        let error = process::become_survivor();
        log::warn(format_args!(
            "cannot take the name {}: {error}; systemd may kill this process",
            process::SURVIVOR
        ));
    }
    if options.kmsg || options.survive {
        log::to_kernel_log();
    }
    let stop = Arc::new(Stop::default());
    // Of an upgrade under load there is no boot to record.
    let recording = match options.take_over {
        true => Duration::ZERO,
        false => options.trace_time,
    };
    let recorder = Arc::new(Recorder::new(recording));
    signals(options, &stop, &recorder)?;
    let (id, name) = device(&options.device)?;
    let mut sources = sources(options, &stop)?;
    process::protect();
    let peers = options
        .peers
        .then(|| Peers::start(id, &name, options))
        .flatten();

    if options.take_over {
        wait_for_image(options, &name, &stop)?;
    }
    let mut channel = loop {
        if let Some(channel) = attach(id, &name, options, options.take_over, &stop)? {
            break channel;
        }
        // Neighbours may still want something of it.
        match &peers {
            Some(peers) if peers.only(&name, &sources, &stop)? => (),
            _ => return Ok(ExitCode::SUCCESS),
        }
    };
    let load = Load::open(id.major, id.minor);
    let state = state_file(options, &name);
    let mut recorder = recorder;
    let mut before: Option<Attached> = None;
    let mut places = Places {
        state,
        trace: None,
        load,
        given: peers.as_ref().map(Peers::given),
        device: name.clone(),
    };
    loop {
        let attached = *channel.attached();
        let image = ImageId::from_bytes(attached.image);
        if before != Some(attached) {
            log::info(format_args!(
                "serving {name} ({} blocks of {} bytes) with image {image}, generation {}",
                attached.blocks,
                1u64 << attached.block_shift.min(63),
                attached.generation
            ));
            places.trace = trace_file(options, &image);
            if before.is_some_and(|before| before.image != attached.image) {
                // What was asked for of another image teaches nothing of this one, whose boot this is not.
                recorder = Arc::new(Recorder::new(Duration::ZERO));
            }
        }
        before = Some(attached);
        let helper = Helper::new(
            &channel,
            sources,
            options.settings(),
            places,
            Arc::clone(&stop),
            Arc::clone(&recorder),
        );
        let helper = helper.ok_or_else(|| {
            let shift = attached.block_shift;
            let what = format!("blocks of 2^{shift} bytes are too small");
            Failure::new(Code::Unsupported, what)
        })?;
        let helper = match &peers {
            Some(peers) => helper.with_neighbours(peers.neighbours(image)),
            None => helper,
        };
        let end = helper.run();
        if end != End::TakenOver {
            return ended(&end);
        }
        (sources, places) = helper.into_parts();
        channel = match again(id, &name, options, &attached, channel, &stop)? {
            Some(channel) => channel,
            None => return Ok(ExitCode::SUCCESS),
        };
    }
}

/// Attaches again after the device was lost to somebody: a table that was loaded again has no helper, and is to have
/// this one, with whatever image and size it has now.
fn again(
    id: Id,
    name: &str,
    options: &Options,
    before: &Attached,
    old: DeviceChannel,
    stop: &Stop,
) -> Result<Option<DeviceChannel>, Failure> {
    // A file serves one device.
    drop(old);
    stop.reset();
    let channel = match attach(id, name, options, false, stop) {
        Err(failure) if failure.code == Code::Busy => return ended(&End::TakenOver).map(|_| None),
        result => result?,
    };
    if let Some(now) = channel.as_ref().map(DeviceChannel::attached) {
        let what = match now == before {
            true => "serving it still",
            false => "with another image or size",
        };
        log::info(format_args!("{name} was loaded again; {what}"));
    }
    Ok(channel)
}

fn ended(end: &End) -> Result<ExitCode, Failure> {
    let code = match end {
        End::Complete | End::Asked => {
            log::info(format_args!("ending: {}", describe(end)));
            return Ok(ExitCode::SUCCESS);
        }
        End::TakenOver => Code::TakenOver,
        End::Gone => Code::Gone,
        End::Changed(_) => Code::Identity,
        End::Failed(_) => Code::Io,
    };
    Err(Failure::new(code, describe(end)))
}

/// The device's number, and its name for people.
fn device(text: &str) -> Result<(Id, String), Failure> {
    let number = text
        .split_once(':')
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    let (major, minor) = match number {
        Some(number) => number,
        None if text.starts_with('/') => block::number(Path::new(text))?,
        None => {
            let device = Dm::open()?.managed(text)?.device;
            (device.major, device.minor)
        }
    };
    let name = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/dm/name"));
    let name = name.map_or_else(|_| format!("{major}:{minor}"), |n| n.trim().to_owned());
    Ok((Id { major, minor }, name))
}

fn sources(options: &Options, stop: &Stop) -> Result<Vec<Source>, Failure> {
    let mut http = options.http()?;
    http.cancel = stop.token().clone();
    let keyring = options.keyring()?;
    options
        .stores
        .iter()
        .map(|location| {
            Source::new(location, http.clone(), keyring.clone())
                .map_err(|e| Failure::new(Code::Usage, format!("--store {location}: {e}")))
        })
        .collect()
}

/// Waits until the image that the device means can be read: until then the helper that it has does better.
fn wait_for_image(options: &Options, name: &str, stop: &Arc<Stop>) -> Result<(), Failure> {
    let image = ImageId::from_bytes(Dm::open()?.managed(name)?.status.image);
    let settings = options.settings();
    let limits = Limits {
        cache: 0,
        backoff: settings.backoff,
    };
    let library = Library::new(image, sources(options, stop)?, limits, Arc::clone(stop));
    // It only fails when it is told to stop, which is seen in a moment.
    drop(library.open(None));
    Ok(())
}

/// Becomes the device's helper; `None` if there is nothing to do.
fn attach(
    id: Id,
    name: &str,
    options: &Options,
    take_over: bool,
    stop: &Stop,
) -> Result<Option<DeviceChannel>, Failure> {
    let channel = loop {
        if stop.is_stopping() {
            return Ok(None);
        }
        match DeviceChannel::attach(Control::open()?, id, take_over) {
            Ok(channel) => break channel,
            Err(Refused::Suspended | Refused::Later) => {
                stop.sleep(SUSPENDED);
            }
            Err(Refused::NothingStale) => {
                log::info(format_args!("nothing on {name} is stale"));
                return Ok(None);
            }
            Err(Refused::Busy) => {
                return Err(
                    Failure::new(Code::Busy, format!("{name} has a helper already"))
                        .hint("--take-over replaces it"),
                )
            }
            // While it is suspended no device has the number.
            Err(Refused::Gone) if is_suspended(id) => {
                stop.sleep(SUSPENDED);
            }
            Err(Refused::Gone) => {
                let what = format!("there is no managed device {name}");
                return Err(Failure::new(Code::NotFound, what)
                    .hint("pristine device list shows the active ones"));
            }
            Err(Refused::Other(error)) => return Err(error.into()),
            Err(error) => return Err(Failure::new(Code::Io, format!("{name}: {error}"))),
        }
    };
    let found = ImageId::from_bytes(channel.attached().image);
    match options.image {
        Some(wanted) if wanted != found => Err(Failure::new(
            Code::Identity,
            format!("{name} means image {found}, not {wanted}"),
        )),
        _ => Ok(Some(channel)),
    }
}

fn is_suspended(id: Id) -> bool {
    let path = format!("/sys/dev/block/{}:{}/dm/suspended", id.major, id.minor);
    std::fs::read_to_string(path).is_ok_and(|text| text.trim() == "1")
}

fn trace_file(options: &Options, image: &ImageId) -> Option<AtomicFile> {
    let directory = options.trace_dir.as_ref()?;
    AtomicFile::new(directory, &trace::file_name(image))
        .map_err(|e| {
            log::warn(format_args!(
                "no boot traces in {}: {e}",
                directory.display()
            ))
        })
        .ok()
}

fn state_file(options: &Options, name: &str) -> Option<AtomicFile> {
    let path = match &options.state {
        Some(path) if path.as_os_str() == "none" => return None,
        Some(path) => path.clone(),
        None => PathBuf::from(format!("/run/pristine/helper-{name}.json")),
    };
    let file_name = path.file_name()?.to_str()?.to_owned();
    let directory = path.parent().unwrap_or(Path::new("."));
    AtomicFile::new(directory, &file_name)
        .map_err(|e| log::warn(format_args!("no state file {}: {e}", path.display())))
        .ok()
}

fn signals(options: &Options, stop: &Arc<Stop>, recorder: &Arc<Recorder>) -> Result<(), Failure> {
    let failed = |e: io::Error| Failure::new(Code::Failure, format!("cannot handle signals: {e}"));
    // SIGPIPE is ignored by Rust's runtime already.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGUSR1, SIGHUP]).map_err(failed)?;
    let (stop, recorder) = (Arc::clone(stop), Arc::clone(recorder));
    let grace = options.grace;
    let handle = move || {
        for signal in signals.forever() {
            match signal {
                SIGUSR1 => recorder.end(),
                SIGTERM | SIGINT => {
                    stop.end(End::Asked);
                    last_resort(grace);
                }
                _ => {}
            }
        }
    };
    let thread = Builder::new().name("signals".into()).stack_size(256 << 10);
    thread.spawn(handle).map(drop).map_err(failed)
}

/// Ends the process if something in hand (a connection, the disk) does not end by itself. Nothing is lost by it.
fn last_resort(grace: Duration) {
    let thread = Builder::new().name("end".into()).stack_size(64 << 10);
    let wait = move || {
        std::thread::sleep(grace + Duration::from_secs(2));
        std::process::exit(0);
    };
    // Without it the end comes with the timeouts.
    drop(thread.spawn(wait));
}
