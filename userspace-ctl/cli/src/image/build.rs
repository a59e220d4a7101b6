// SPDX-License-Identifier: GPL-2.0

//! `pristine image build`

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use clap::Args;
use pristine_image::fs::{Survey, Volume};
use pristine_image::{build, BuildOptions, Built, Info, Known, Manifest, PackId, PackSink, Source};
use pristine_store::{
    check_packs, known_blocks, publish, CancelToken, ChannelName, DirStore, Error, ImageSelector,
    ObjectName, PublishOptions, Store, StorePacks, TrustPolicy,
};
use pristine_transfer::reference::build_reference;
use pristine_transfer::{Shared, Watch};
use serde::Serialize;

use super::source::{build_failure, prepare, show, Prepared, SourceArgs};
use super::{name_of, open_image, parse_channel, parse_selector, parse_size, writer_lease};
use crate::exit::{Code, Failure, Outcome};
use crate::ui::{human_bytes, human_count, Style, Ui};

/// Arguments of `pristine image build`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  A raw disk image, into a directory of its own:
    pristine image build disk.img -o build/debian.pri
  A directory tree (an ext4 file system is made of it), and published at once:
    pristine image build rootfs/ --size 2G --name debian -o /srv/store --channel stable
  A cloud image, read by range from where it is published:
    pristine image build https://example.org/debian-13.raw.xz -o /srv/store --channel stable
  The same, but its blocks stay there, and are fetched from there when they are wanted:
    pristine image import --reference https://example.org/debian-13.raw.xz -o /srv/store
  A container image (an OCI layout or archive, or what docker save writes):
    pristine image build app.tar --platform linux/amd64 --size 4G -o build/app.pri
  What would it take?
    pristine image build /dev/sdb1 -o /srv/store --dry-run

The output directory is a store: it can be served as it is, published from, or hold more images. The same \
source gives the same image id, whatever the options, and with the same options the same packs. What must be \
unpacked before it can be read takes room beside the output (in TMPDIR with --dry-run), at most --max-size.

Blocks that the file systems on the source count as free (ext2/3/4, xfs, btrfs, vfat, swap, also in the partitions of \
a disk) become zeros in the image: nothing deleted is published, and zeros cost nothing. A file system that is not \
clean, or not known, is kept byte for byte, with a warning. The source itself is never written.

Blocks that packs of the output store hold already, in whatever image, are not stored again: the next generation of an \
image takes only what is new in it.

JSON fields: image, output, name, formats, reference, image_bytes, blocks_total, blocks_zero, blocks_unique, \
blocks_duplicate, blocks_shared (of the unique ones, those that the store had), packs_shared, packs, pack_bytes, \
manifest_bytes, elapsed_ms, dry_run, channel, generation, freed_bytes, file_systems (partition, type, uuid, \
label, start, bytes, free_bytes, kept), warnings.")]
pub struct BuildArgs {
    /// File, block device (not mounted), directory tree or URL: a raw or qcow2 disk, also in .xz, .zst or .gz; a tar
    /// archive or a container image of a root file system; a .caibx
    source: String,
    /// Store directory that takes the image; made if it is missing
    #[arg(short, long, visible_alias = "store", value_name = "DIR")]
    output: PathBuf,
    /// Name noted in the image [default: from the source's name]
    #[arg(long)]
    name: Option<String>,
    /// Also publish it to this channel of the output store
    #[arg(long, value_name = "NAME", value_parser = parse_channel)]
    channel: Option<ChannelName>,
    /// Only say what it would take; write nothing
    #[arg(long)]
    dry_run: bool,
    /// Refer to the packs of this image of the store alone, not of all; can be given several times
    #[arg(long, value_name = "ID|CHANNEL", value_parser = parse_selector, conflicts_with = "no_share")]
    parent: Vec<ImageSelector>,
    /// Store all blocks, also those that the store has: the image then needs no packs but its own
    #[arg(long)]
    no_share: bool,
    /// Append zeros to a source that does not end with a whole 4 KiB block
    #[arg(long)]
    pad: bool,
    /// Keep what the file systems on the source count as free, deleted files and all
    #[arg(long)]
    keep_free: bool,
    #[command(flatten)]
    from: SourceArgs,
    /// zstd level: 1 is fast, 19 is small
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(i32).range(1..=19))]
    #[arg(help_heading = "Tuning")]
    level: i32,
    /// Blocks compressed together, 1 to 256: more is smaller, but more must be fetched for one block
    #[arg(
        long,
        value_name = "BLOCKS",
        default_value_t = 32,
        help_heading = "Tuning"
    )]
    frame: usize,
    /// Size of packs, up to 64M
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "32M")]
    #[arg(help_heading = "Tuning")]
    pack: u64,
    /// Threads [default: one for each core]
    #[arg(long, help_heading = "Tuning")]
    threads: Option<usize>,
}

#[derive(Serialize)]
struct Report {
    image: String,
    output: String,
    name: String,
    /// What the source is, from the outside in.
    formats: Vec<String>,
    /// The blocks stay where the source is.
    reference: bool,
    image_bytes: u64,
    blocks_total: u64,
    blocks_zero: u64,
    blocks_unique: u64,
    blocks_duplicate: u64,
    blocks_shared: u64,
    packs_shared: u64,
    packs: u64,
    pack_bytes: u64,
    manifest_bytes: u64,
    elapsed_ms: u64,
    dry_run: bool,
    channel: Option<String>,
    generation: Option<u64>,
    /// Bytes of the source that were free, and are zero in the image.
    freed_bytes: u64,
    file_systems: Vec<FileSystem>,
    warnings: Vec<String>,
}

#[derive(Serialize)]
struct FileSystem {
    partition: Option<u32>,
    r#type: &'static str,
    uuid: Option<String>,
    label: Option<String>,
    start: u64,
    bytes: u64,
    free_bytes: u64,
    kept: Option<String>,
}

impl From<&Volume> for FileSystem {
    fn from(volume: &Volume) -> Self {
        FileSystem {
            partition: volume.partition,
            r#type: volume.kind.name(),
            uuid: volume.uuid.clone(),
            label: volume.label.clone(),
            start: volume.range.start,
            bytes: volume.range.end - volume.range.start,
            free_bytes: volume.free,
            kept: volume.kept.clone(),
        }
    }
}

/// Counts packs instead of storing them.
struct Nowhere;

impl PackSink for Nowhere {
    fn pack(&mut self, _: &PackId, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

pub(super) fn run(args: &BuildArgs, ui: &Ui) -> Outcome {
    let begin = Instant::now();
    let time = build_time()?;
    let name = args
        .name
        .clone()
        .unwrap_or_else(|| name_of(Path::new(&args.source)));
    let mut info = Info::new();
    info.set("name", &name);
    info.set("created", &time.to_string());
    let store = open_output(args)?;
    // Whoever removes from the store keeps away until this is done.
    let lease = match &store {
        Some(_) if !args.dry_run => {
            let store: Arc<dyn Store> = Arc::new(DirStore::open(&args.output)?);
            Some(writer_lease(&store, "build", ui)?)
        }
        _ => None,
    };
    let temporary = match args.dry_run {
        true => std::env::temp_dir(),
        false => args.output.join(".tmp"),
    };
    let prepared = prepare(&args.source, &args.from, &temporary, (&name, time), ui)?;
    let mut source = Source::new(&args.source, Box::new(Shared(Arc::clone(&prepared.disk))));
    let mut survey = Survey::default();
    if !args.keep_free {
        (source, survey) = source.zero_free().map_err(build_failure)?;
        survey.note(&mut info);
    }
    let warnings = survey.warnings();
    // With --json they are in the report.
    for warning in warnings.iter().filter(|_| !ui.json()) {
        ui.warn(format!("free blocks are not known: {warning}"));
    }
    let options = BuildOptions {
        level: args.level,
        frame_blocks: args.frame,
        pack_target: args.pack,
        pad: args.pad,
        info,
        threads: args.threads,
        known: match &store {
            Some(store) if !args.no_share && !args.from.reference => known(args, store, ui)?,
            _ => Arc::default(),
        },
    };
    let store = store.filter(|_| !args.dry_run);
    let built = match args.from.reference {
        true => reference(args, &prepared, &source, &options, store.as_ref(), ui)?,
        false => build_image(&source, &options, store.as_ref(), ui)?,
    };
    let formats = prepared.formats.clone();
    prepared.close();
    let mut report = Report {
        image: built.image.to_string(),
        output: args.output.display().to_string(),
        name,
        formats,
        reference: args.from.reference,
        image_bytes: built.blocks * pristine_image::BLOCK_SIZE as u64,
        blocks_total: built.blocks,
        blocks_zero: built.zero_blocks,
        blocks_unique: built.unique_blocks,
        blocks_duplicate: built.blocks - built.zero_blocks - built.unique_blocks,
        blocks_shared: built.shared_blocks,
        packs_shared: built.shared_packs,
        packs: built.packs,
        pack_bytes: built.pack_bytes,
        manifest_bytes: built.manifest.len() as u64,
        elapsed_ms: 0,
        dry_run: args.dry_run,
        channel: args.channel.as_ref().map(ToString::to_string),
        generation: None,
        freed_bytes: survey.free.total(),
        file_systems: survey.volumes.iter().map(FileSystem::from).collect(),
        warnings,
    };
    if let Some(store) = store {
        if let Some(lease) = &lease {
            lease.keep()?;
        }
        if built.shared_blocks > 0 {
            check_packs(store.as_ref(), &parse_manifest(&built)?)?;
        }
        store.put(&ObjectName::Manifest(built.image), &built.manifest)?;
        if let Some(channel) = &args.channel {
            report.generation = Some(publish_in_place(store, &built, channel, time)?);
        }
    }
    report.elapsed_ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
    ui.result(&report, |out| print(&report, ui, out))
}

/// The store to build into; for a dry run `None` if it is not there.
fn open_output(args: &BuildArgs) -> Outcome<Option<Arc<dyn Store>>> {
    if !args.dry_run {
        return Ok(Some(Arc::new(DirStore::open_or_create(&args.output)?)));
    }
    match DirStore::open(&args.output) {
        Ok(store) => Ok(Some(Arc::new(store))),
        Err(Error::NotAStore { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The blocks that the store's packs hold.
fn known(args: &BuildArgs, store: &Arc<dyn Store>, ui: &Ui) -> Outcome<Arc<Known>> {
    let mut parents = Vec::new();
    for selector in &args.parent {
        parents.push(open_image(store, Some(selector), &TrustPolicy::default())?.image());
    }
    let images = (!parents.is_empty()).then_some(parents.as_slice());
    let bar = ui.count_bar("reading manifests", 0);
    let found = known_blocks(store, images, &CancelToken::new(), &|done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let found = found?;
    for skipped in &found.skipped {
        ui.note(format!("an image's packs are not used: {skipped}"));
    }
    Ok(found.known)
}

fn parse_manifest(built: &Built) -> Outcome<Manifest> {
    let parsed = Manifest::parse(&built.manifest, Some(&built.image));
    parsed.map_err(|error| Failure::new(Code::Failure, error.to_string()))
}

/// The time noted in the image: now, or SOURCE_DATE_EPOCH for builds that must repeat.
fn build_time() -> Outcome<u64> {
    if let Some(text) = std::env::var_os("SOURCE_DATE_EPOCH") {
        let parsed = text.to_str().and_then(|text| text.parse().ok());
        return parsed.ok_or_else(|| {
            Failure::new(Code::Usage, "SOURCE_DATE_EPOCH is not a number of seconds")
        });
    }
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    Ok(since.map_or(0, |duration| duration.as_secs()))
}

fn build_image(
    source: &Source,
    options: &BuildOptions,
    store: Option<&Arc<dyn Store>>,
    ui: &Ui,
) -> Outcome<Built> {
    let bar = ui.bytes_bar("building", source.len());
    let progress = |done| bar.set_position(done);
    let cancel = CancelToken::new();
    let built = match store {
        Some(store) => {
            let mut packs = StorePacks(store.as_ref());
            build(source, options, &mut packs, &progress, cancel.flag())
        }
        None => build(source, options, &mut Nowhere, &progress, cancel.flag()),
    };
    bar.finish_and_clear();
    built.map_err(build_failure)
}

/// Makes an image whose packs stay where its source is.
fn reference(
    args: &BuildArgs,
    prepared: &Prepared,
    source: &Source,
    options: &BuildOptions,
    store: Option<&Arc<dyn Store>>,
    ui: &Ui,
) -> Outcome<Built> {
    let place = reference_place(&args.source)?;
    let bar = ui.bytes_bar("building", source.len());
    let watch = Watch {
        progress: &|what, done, total| show(&bar, what, done, total),
        cancel: CancelToken::new(),
    };
    let disk = prepared.disk.as_ref();
    let made = build_reference(
        disk,
        source.input(),
        &args.source,
        args.pad,
        &options.info,
        &watch,
    );
    bar.finish_and_clear();
    let made = made?;
    for (pack, reference) in made
        .references(&place, disk.len())
        .iter()
        .filter(|_| store.is_some())
    {
        if let Some(store) = store {
            store.put(&ObjectName::Reference(*pack), reference.encode().as_bytes())?;
        }
    }
    Ok(Built {
        image: made.image,
        manifest: made.manifest,
        blocks: made.blocks,
        zero_blocks: made.zero_blocks,
        unique_blocks: made.unique_blocks,
        shared_blocks: 0,
        shared_packs: 0,
        packs: made.packs.len() as u64,
        pack_bytes: 0,
    })
}

/// How a reference names a source: a URL as it is, a file by its absolute path.
fn reference_place(source: &str) -> Outcome<String> {
    if source.contains("://") {
        return Ok(source.to_owned());
    }
    let path = std::fs::canonicalize(source)
        .map_err(|error| Failure::io(format!("cannot open {source}"), &error))?;
    let text = path
        .to_str()
        .filter(|text| !text.contains(char::is_control));
    text.map(str::to_owned).ok_or_else(|| {
        let what = format!("{source} has a path that cannot be written down");
        Failure::new(Code::Usage, what).hint("rename it, or leave --reference out")
    })
}

fn publish_in_place(
    store: Arc<dyn Store>,
    built: &Built,
    channel: &ChannelName,
    time: u64,
) -> Outcome<u64> {
    let store = super::follow(store);
    let selector = ImageSelector::Id(built.image);
    let image = open_image(&store, Some(&selector), &TrustPolicy::default())?;
    let options = PublishOptions {
        time: Some(time),
        ..PublishOptions::default()
    };
    Ok(publish(&image, &store, channel, &options, &|_, _| ())?
        .release
        .release()
        .generation)
}

fn print(report: &Report, ui: &Ui, out: &mut dyn Write) -> io::Result<()> {
    let label = |text: &str| ui.paint(Style::Bold, &format!("{text:<9}"));
    let stored = report.pack_bytes + report.manifest_bytes;
    writeln!(out, "{} {}", label("image"), report.image)?;
    writeln!(out, "{} {}", label("source"), report.formats.join(", "))?;
    let (size, blocks) = (
        human_bytes(report.image_bytes),
        human_count(report.blocks_total),
    );
    writeln!(out, "{} {size} in {blocks} blocks of 4 KiB", label("size"))?;
    writeln!(
        out,
        "{} {} distinct blocks, {} duplicates, {} zero",
        label("content"),
        human_count(report.blocks_unique),
        human_count(report.blocks_duplicate),
        human_count(report.blocks_zero),
    )?;
    if report.freed_bytes > 0 {
        let freed = human_bytes(report.freed_bytes);
        let what = "are free in its file systems, and zero in the image";
        writeln!(out, "{} {freed} {what}", label("free"))?;
    }
    writeln!(
        out,
        "{} {} in {} packs, and a manifest of {}",
        label("stored"),
        human_bytes(report.pack_bytes),
        report.packs,
        human_bytes(report.manifest_bytes),
    )?;
    if report.blocks_shared > 0 {
        let (blocks, packs) = (human_count(report.blocks_shared), report.packs_shared);
        let what = "distinct blocks were in the store, in";
        writeln!(out, "{} {blocks} {what} {packs} packs", label("shared"))?;
    }
    let percent = stored as f64 / report.image_bytes as f64 * 100.0;
    let seconds = report.elapsed_ms as f64 / 1000.0;
    writeln!(
        out,
        "{} {percent:.1} % of the image, in {seconds:.1} s",
        label("cost")
    )?;
    if report.dry_run {
        return writeln!(out, "nothing was written (dry run)");
    }
    match (&report.channel, report.generation) {
        (Some(channel), Some(generation)) => {
            writeln!(
                out,
                "{} {channel}, generation {generation}",
                label("channel")
            )
        }
        _ => writeln!(
            out,
            "next: pristine image publish {} STORE --channel NAME",
            report.output
        ),
    }
}
