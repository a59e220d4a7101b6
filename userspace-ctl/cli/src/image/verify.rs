// SPDX-License-Identifier: GPL-2.0

//! `pristine image verify`

use std::io::{self, Write};

use clap::Args;
use pristine_store::verify::Problem;
use pristine_store::{verify, CancelToken, ImageSelector};
use serde::Serialize;

use super::{open, open_image, parse_selector, short};
use crate::exit::{Code, Failure, Outcome};
use crate::key::TrustArgs;
use crate::ui::{human_bytes, human_count, Style, Ui};

/// Arguments of `pristine image verify`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  pristine image verify build/debian.pri
  pristine image verify /srv/store stable
  pristine image verify http://server:8080 stable

Reads each byte of the manifest and of all packs of an image again: the name of each object, each frame, and the digest \
of each block. Exits with 4 if anything is wrong. An image that is named by a channel must be signed by a trusted key, if there \
are any (exit code 15); its id needs nobody to vouch for it.

JSON fields: store, ok, images (image, signed_by, ok, packs, bytes, blocks, bad_blocks, problem_count, problems (object, what)).")]
pub struct VerifyArgs {
    /// The store, a directory or a URL
    store: String,
    /// Which image, by id or channel [default: all images]
    #[arg(value_name = "ID|CHANNEL", value_parser = parse_selector)]
    image: Option<ImageSelector>,
    #[command(flatten)]
    trust: TrustArgs,
}

#[derive(Serialize)]
struct Report {
    store: String,
    ok: bool,
    images: Vec<Image>,
}

#[derive(Serialize)]
struct Image {
    image: String,
    /// The trusted keys that signed the release.
    signed_by: Vec<String>,
    ok: bool,
    packs: u64,
    bytes: u64,
    blocks: u64,
    bad_blocks: u64,
    problem_count: u64,
    problems: Vec<ProblemReport>,
}

#[derive(Serialize)]
struct ProblemReport {
    object: String,
    what: String,
}

impl From<Problem> for ProblemReport {
    fn from(problem: Problem) -> Self {
        ProblemReport {
            object: problem.object,
            what: problem.what,
        }
    }
}

pub(super) fn run(args: &VerifyArgs, ui: &Ui) -> Outcome {
    let store = open(&args.store)?;
    let selectors = match &args.image {
        Some(selector) => vec![selector.clone()],
        None => store.images()?.into_iter().map(ImageSelector::Id).collect(),
    };
    let policy = args.trust.policy()?;
    let mut images = Vec::new();
    for selector in &selectors {
        let image = match open_image(&store, Some(selector), &policy) {
            Ok(reader) => {
                let bar = ui.bytes_bar("verifying", 0);
                let verified = verify(&reader, &CancelToken::new(), &|done, total| {
                    bar.set_length(total);
                    bar.set_position(done);
                });
                bar.finish_and_clear();
                let verified = verified?;
                let signers = reader.trusted().signed_by.iter();
                Image {
                    image: reader.image().to_string(),
                    signed_by: signers.map(ToString::to_string).collect(),
                    ok: verified.is_ok(),
                    packs: verified.packs,
                    bytes: verified.bytes,
                    blocks: verified.blocks,
                    bad_blocks: verified.bad_blocks,
                    problem_count: verified.problem_count,
                    problems: verified.problems.into_iter().map(Into::into).collect(),
                }
            }
            // One that cannot even be opened is a finding, and the others are still worth checking.
            Err(failure) if failure.code() == Code::Damaged => {
                let name = match selector {
                    ImageSelector::Id(id) => id.to_string(),
                    ImageSelector::Channel(channel) => channel.to_string(),
                };
                Image {
                    image: name.clone(),
                    signed_by: Vec::new(),
                    ok: false,
                    packs: 0,
                    bytes: 0,
                    blocks: 0,
                    bad_blocks: 0,
                    problem_count: 1,
                    problems: vec![ProblemReport {
                        object: name,
                        what: failure.to_string(),
                    }],
                }
            }
            Err(failure) => return Err(failure),
        };
        images.push(image);
    }
    let bad = images.iter().filter(|image| !image.ok).count();
    let report = Report {
        store: store.location().to_owned(),
        ok: bad == 0,
        images,
    };
    ui.result(&report, |out| print(&report, ui, out))?;
    if bad > 0 {
        let what = format!(
            "{bad} of {} images in {} are damaged",
            report.images.len(),
            args.store
        );
        let hint = "copy what is damaged from another store, or build and publish the image again";
        return Err(Failure::new(Code::Damaged, what).hint(hint));
    }
    Ok(())
}

fn print(report: &Report, ui: &Ui, out: &mut dyn Write) -> io::Result<()> {
    if report.images.is_empty() {
        writeln!(out, "no images in {}", report.store)?;
    }
    for image in &report.images {
        let verdict = match image.ok {
            true => ui.paint(Style::Good, "good"),
            false => ui.paint(Style::Bad, "damaged"),
        };
        writeln!(
            out,
            "image {}: {verdict} ({} blocks in {} packs, {} read)",
            short(&image.image),
            human_count(image.blocks),
            image.packs,
            human_bytes(image.bytes)
        )?;
        if !image.signed_by.is_empty() {
            writeln!(out, "  signed by {}", image.signed_by.join(", "))?;
        }
        for problem in &image.problems {
            writeln!(out, "  {}: {}", problem.object, problem.what)?;
        }
        let unlisted = image.problem_count - image.problems.len() as u64;
        if unlisted > 0 {
            writeln!(out, "  and {} more problems", human_count(unlisted))?;
        }
        if image.bad_blocks > 0 {
            writeln!(
                out,
                "  {} blocks are missing or wrong",
                human_count(image.bad_blocks)
            )?;
        }
    }
    Ok(())
}
