//! A model from the hub into the store: which commit, which files, room for them, one file after the other, and only
//! then the names under which others find it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rbee_wire::ModelRef;

use crate::disk;
use crate::download::{self, Job, blocking};
use crate::error::Error;
use crate::http::Fetcher;
use crate::hub::{self, Remote};
use crate::layout::{self, Manifest, Repo, Verified};
use crate::local::{self, Local, MAIN, MAX_INDEX};
use crate::manage;
use crate::names::Commit;
use crate::part;
use crate::progress::{Meter, Stage};
use crate::select::{self, INDEX};

/// Age of parts that nobody goes on with.
const STALE: Duration = Duration::from_secs(7 * 24 * 3600);

/// Fetches a model that is not complete in the store.
///
/// # Errors
/// See [`crate::Store::fetch`].
pub(crate) async fn fetch(fetcher: &Fetcher, model: &ModelRef, meter: Arc<Meter>) -> Result<Local, Error> {
    let ModelRef::Hub { repo: name, revision, file } = model else {
        return Err(Error::NotStored { model: model.to_string() });
    };
    let repo = Repo::of(&fetcher.options.hub, name)?;
    let revision = revision.as_deref().unwrap_or(MAIN);
    meter.stage(Stage::Listing);
    let commit = hub::commit(fetcher, name, revision).await?;
    let listing = hub::listing(fetcher, name, &commit).await?;
    let all: Vec<&str> = listing.keys().map(String::as_str).collect();
    let selection = select::select(model, local::wanted(file.as_deref()), &all)?;
    let mut files = named(selection.files(), &listing)?;

    let one = |file: Remote| {
        let job =
            Job { fetcher: fetcher.clone(), repo: repo.clone(), commit: commit.clone(), file, meter: meter.clone() };
        place(Arc::new(job))
    };
    if selection.has_index() {
        // What else is needed stands in it.
        let index = named(&[INDEX.to_owned()], &listing)?.swap_remove(0);
        if index.size > MAX_INDEX {
            return Err(fetcher.bad("the index of shards", &format!("it is larger than {MAX_INDEX} bytes")));
        }
        let blob = repo.blob(index.digest.hex());
        one(index).await?;
        let bytes = blocking(move || layout::read_small(&blob, MAX_INDEX)).await?.unwrap_or_default();
        let shards = select::shards(&bytes).map_err(|problem| fetcher.bad("the index of shards", &problem))?;
        files.retain(|file| file.path != INDEX);
        let more = named(&shards, &listing)
            .map_err(|_| fetcher.bad("the index of shards", "it names a file that is not in the repository"))?;
        files.extend(more);
    }
    meter.total(total(&files).ok_or_else(|| fetcher.bad("the list of files", "its sizes are absurd"))?);
    room(fetcher, &repo, &files).await?;
    // Small files first: what is wrong with them shows before the weights have come.
    files.sort_by(|a, b| (a.size, &a.path).cmp(&(b.size, &b.path)));
    for file in &files {
        one(file.clone()).await?;
    }
    let (revision, model) = (revision.to_owned(), model.clone());
    let (file, key) = (file.clone(), selection.key());
    if selection.has_index() {
        files.extend(named(&[INDEX.to_owned()], &listing)?);
    }
    blocking(move || {
        publish(&repo, &commit, &revision, &key, files).and_then(|()| {
            let found = local::in_snapshot(&model, &repo, &commit, file.as_deref())?;
            found.ok_or_else(|| Error::NoModelHere {
                path: repo.snapshot(&commit),
                problem: "its files changed while the last of them came".to_owned(),
            })
        })
    })
    .await
}

/// A file's blob, and its name in the snapshot.
async fn place(job: Arc<Job>) -> Result<(), Error> {
    download::fetch(Arc::clone(&job)).await?;
    job.meter.finished(job.file.size);
    blocking(move || job.repo.link(&job.commit, &job.file.path, job.file.digest.hex())).await
}

/// What the listing says of these files.
fn named(paths: &[String], listing: &BTreeMap<String, Remote>) -> Result<Vec<Remote>, Error> {
    let find = |path: &String| listing.get(path).cloned().ok_or_else(|| Error::BadName { name: path.clone() });
    paths.iter().map(find).collect()
}

fn total(files: &[Remote]) -> Option<u64> {
    files.iter().try_fold(0u64, |sum, file| sum.checked_add(file.size))
}

/// Checks that what is missing fits the disk and the store's budget.
async fn room(fetcher: &Fetcher, repo: &Repo, files: &[Remote]) -> Result<(), Error> {
    let (options, repo, files) = (Arc::clone(&fetcher.options), repo.clone(), files.to_vec());
    blocking(move || {
        let blobs = repo.blobs();
        disk::make_folder(&blobs)?;
        disk::sweep(&repo.scratch(), STALE);
        part::sweep(&blobs, STALE, &|hex| files.iter().any(|file| file.digest.hex() == hex));
        let mut missing: Vec<(&str, u64)> = files.iter().map(|file| (file.digest.hex(), file.size)).collect();
        missing.sort_unstable();
        missing.dedup();
        // A part has its whole room already.
        let there = |hex: &str| {
            let part = blobs.join(format!("{hex}{}", part::PART));
            let facts = repo.blob(hex).symlink_metadata().or_else(|_| part.symlink_metadata());
            facts.map_or(0, |facts| disk::on_disk(&facts).max(if facts.len() == 0 { 0 } else { 1 }))
        };
        let needed: u64 = missing.iter().map(|(hex, size)| size.saturating_sub(there(hex))).sum();
        let free = disk::free(&blobs).map_err(Error::file("look at", &blobs))?.saturating_sub(options.reserve);
        let budget = match options.disk_budget {
            Some(budget) => budget.saturating_sub(manage::used_bytes(&options.hub)?),
            None => u64::MAX,
        };
        let free = free.min(budget);
        if needed > free { Err(Error::DiskFull { needed, free, path: blobs }) } else { Ok(()) }
    })
    .await
}

/// Makes the fetched files a model that others find: what was verified, then the revision's name.
fn publish(repo: &Repo, commit: &Commit, revision: &str, key: &str, files: Vec<Remote>) -> Result<(), Error> {
    let verified = |file: Remote| Verified { bytes: file.size, digest: file.digest.hex().to_owned(), path: file.path };
    let mut files: Vec<Verified> = files.into_iter().map(verified).collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    repo.write_manifest(commit, key, &Manifest { files })?;
    disk::sync_folder(&repo.snapshots())?;
    // A commit, or its beginning, is a name by itself.
    if repo.commit_of(revision)?.as_ref() == Some(commit) { Ok(()) } else { repo.write_ref(revision, commit) }
}
