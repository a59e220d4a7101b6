// SPDX-License-Identifier: GPL-2.0

//! `pristine image verify`

use std::io::{self, Write};

use clap::Args;
use pristine_store::verify::Problem;
use pristine_store::{
    CancelToken, Found, ImageId, ImageSelector, RetryPolicy, Trusted, Verified, Verifier,
};
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
of each block; a pack that several images share is read once. Exits with 4 if anything is wrong. An image that is named by a channel must be signed by a trusted key, if there \
are any (exit code 15); its id needs nobody to vouch for it. Of an encrypted image that no identity opens it is checked that all is there and as \
it was stored, and not what is in it.

JSON fields: store, ok, images (image, signed_by, content_checked, ok, packs, bytes, blocks, bad_blocks, problem_count, problems (object, what)).")]
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
    /// False for an encrypted image without its key: then only damage to what is stored is found.
    content_checked: bool,
    ok: bool,
    packs: u64,
    bytes: u64,
    blocks: u64,
    bad_blocks: u64,
    problem_count: u64,
    problems: Vec<ProblemReport>,
}

impl Image {
    fn new(image: ImageId, trusted: &Trusted, verified: Verified, content_checked: bool) -> Self {
        let signers = trusted.signed_by.iter();
        Image {
            image: image.to_string(),
            signed_by: signers.map(ToString::to_string).collect(),
            content_checked,
            ok: verified.is_ok(),
            packs: verified.packs,
            bytes: verified.bytes,
            blocks: verified.blocks,
            bad_blocks: verified.bad_blocks,
            problem_count: verified.problem_count,
            problems: verified.problems.into_iter().map(Into::into).collect(),
        }
    }
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
    // Each pack is read once, but what is found in it is remembered for that.
    let verifier = match selectors.len() {
        0 | 1 => Verifier::default(),
        _ => Verifier::of_several(),
    };
    let mut images = Vec::new();
    for selector in &selectors {
        let bar = ui.bytes_bar("verifying", 0);
        let progress = |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        };
        let image = match open_image(&store, Some(selector), &policy) {
            Ok(reader) => {
                let verified = verifier.verify(&reader, &CancelToken::new(), &progress);
                bar.finish_and_clear();
                Image::new(reader.image(), reader.trusted(), verified?, true)
            }
            // What takes no key can be checked all the same.
            Err(failure) if failure.code() == Code::NoKey => {
                let (retry, cancel) = (RetryPolicy::default(), CancelToken::new());
                let found = Found::look_up(store.as_ref(), selector, &policy, retry, &cancel)?;
                let verified = verifier.verify_stored(&store, found.image, &cancel, &progress);
                bar.finish_and_clear();
                Image::new(found.image, &found.trusted, verified?, false)
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
                    content_checked: false,
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
        if image.ok && !image.content_checked {
            writeln!(
                out,
                "  encrypted, and there is no identity that opens it: nothing is missing or damaged; what is in it was not checked"
            )?;
        }
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
