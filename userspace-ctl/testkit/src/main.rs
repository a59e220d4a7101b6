// SPDX-License-Identifier: GPL-2.0

//! A store server that misbehaves as it is told, for tests in virtual machines.

use std::path::PathBuf;
use std::process::ExitCode;

use pristine_testkit::{FaultyServer, Options, Rules};

const USAGE: &str = "\
usage: pristine-faulty-server STORE [--listen ADDR:PORT] [--port-file FILE] [--control FILE] [--log] [RULE...]

Serves a store's directory, with faults. A RULE is [PATH][@FIRST[-LAST]]:FAULT, where PATH is the beginning of the
request's path and FIRST and LAST count the requests that match it. The first rule that hits counts. FAULT is one of
  none  status=CODE  close  cut=BYTES  wrong  slow=BYTES_PER_SECOND  delay=MS  hang  ignore-range  other-range
  short=BYTES  long=BYTES
--control names a file of rules, separated by white space, that is read again when it changes.
example: pristine-faulty-server /srv/store --listen 0.0.0.0:8080 packs/@1-3:status=500 packs/@10:wrong";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pristine-faulty-server: error: {error}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<(), String> {
    let mut root = None;
    let mut port_file = None;
    let mut options = Options::default();
    let mut rules = Rules::default();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--help" | "-h" => {
                println!("{USAGE}");
                return Ok(());
            }
            "--listen" => options.listen = value()?.parse().map_err(|_| "bad --listen")?,
            "--port-file" => port_file = Some(PathBuf::from(value()?)),
            "--control" => options.control = Some(PathBuf::from(value()?)),
            "--log" => options.log = true,
            _ if root.is_none() => root = Some(PathBuf::from(&argument)),
            rule => rules.push(rule.parse()?),
        }
    }
    let root = root.ok_or("give the store's directory")?;
    let listen = options.listen;
    let server = FaultyServer::start_with(&root, options, rules)
        .map_err(|error| format!("cannot listen on {listen}: {error}"))?;
    if let Some(path) = port_file {
        let write = std::fs::write(&path, format!("{}\n", server.address().port()));
        write.map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    }
    println!("serving {} at {}", root.display(), server.url());
    server.wait();
    Ok(())
}
