//! What is here already: no network, no locks, nothing opened that could block.

use std::path::{Path, PathBuf};

use rbee_wire::ModelRef;

use crate::error::Error;
use crate::layout::{self, Found, Links, Manifest, Repo, State};
use crate::names::Commit;
use crate::select::{self, INDEX, Selection, Wanted};

/// The revision that is meant when none is named.
pub(crate) const MAIN: &str = "main";

/// Longest index of shards that is read, in bytes.
pub(crate) const MAX_INDEX: u64 = 64 << 20;

/// A model whose files are all here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Local {
    /// The reference in its canonical form: the file that a quantization picked, no revision where it is `main`.
    pub model: ModelRef,
    /// The commit of its files; `None` for a path outside the store.
    pub commit: Option<Commit>,
    /// The folder of its files, or its (first) `.gguf` file.
    pub path: PathBuf,
    /// Bytes of its files.
    pub bytes: u64,
    /// Its files, by path.
    pub files: Vec<LocalFile>,
}

/// A file of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalFile {
    /// Its path within the model's folder.
    pub path: String,
    /// Its length.
    pub bytes: u64,
}

/// Looks a reference up.
///
/// # Errors
/// See [`crate::Store::local`].
pub(crate) fn find(hub: &Path, model: &ModelRef) -> Result<Option<Local>, Error> {
    match model {
        ModelRef::Tinybee | ModelRef::Alias(_) => Err(Error::NotStored { model: model.to_string() }),
        ModelRef::Path(path) => at_path(model, Path::new(path)).map(Some),
        ModelRef::Hub { repo, revision, file } => {
            let repo = Repo::of(hub, repo)?;
            let revision = revision.as_deref().unwrap_or(MAIN);
            let Some(commit) = repo.commit_of(revision)? else { return Ok(None) };
            in_snapshot(model, &repo, &commit, file.as_deref())
        }
    }
}

/// The reference that means these files and no others.
pub(crate) fn canonical(model: &ModelRef, selection: &Selection) -> ModelRef {
    let ModelRef::Hub { repo, revision, .. } = model else { return model.clone() };
    let file = match selection {
        Selection::Folder(_) => None,
        Selection::Gguf(files) => files.first().cloned(),
    };
    ModelRef::Hub { repo: repo.clone(), revision: revision.clone().filter(|name| name != MAIN), file }
}

/// What a reference asks for in a repository.
pub(crate) fn wanted(file: Option<&str>) -> Wanted<'_> {
    file.map_or(Wanted::Model, Wanted::File)
}

/// The model in a snapshot, if it is complete there.
///
/// # Errors
/// [`Error::Ambiguous`], [`Error::RefusedFile`], [`Error::File`].
pub(crate) fn in_snapshot(
    model: &ModelRef,
    repo: &Repo,
    commit: &Commit,
    file: Option<&str>,
) -> Result<Option<Local>, Error> {
    let folder = repo.snapshot(commit);
    let found = repo.files(commit)?;
    let all: Vec<&str> = found.iter().map(|found| found.path.as_str()).collect();
    let selection = match select::select(model, wanted(file), &all) {
        Ok(selection) => selection,
        // The hub may have what is not here yet.
        Err(Error::NoSuchFile { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    let manifest = repo.manifest(commit, &selection.key())?;
    let Some(files) = complete(&folder, &found, &selection)? else { return Ok(None) };
    match manifest {
        Some(manifest) if !agrees(&manifest, &found) => return Ok(None),
        Some(_) => {}
        // Another tool's: there is no list of what there has to be, so it must at least be able to read text.
        None if matches!(selection, Selection::Folder(_)) && !all.iter().any(|path| select::is_tokenizer(path)) => {
            return Ok(None);
        }
        None => {}
    }
    Ok(Some(local(model, Some(commit.clone()), &folder, &selection, files)))
}

/// Whether every verified file is here with the length that it had then.
fn agrees(manifest: &Manifest, found: &[Found]) -> bool {
    manifest.files.iter().all(|verified| {
        found.iter().any(|found| found.path == verified.path && found.state == State::File { bytes: verified.bytes })
    })
}

/// The files of a selection, the index's shards among them; `None` when some are not here.
fn complete(folder: &Path, found: &[Found], selection: &Selection) -> Result<Option<Vec<LocalFile>>, Error> {
    let mut paths = selection.files().to_vec();
    if selection.has_index() {
        if !matches!(state(found, INDEX), Some(State::File { .. })) {
            return Ok(None);
        }
        let path = folder.join(INDEX);
        let Some(index) = layout::read_small(&path, MAX_INDEX)? else { return Ok(None) };
        paths.extend(select::shards(&index).map_err(|problem| Error::NoModelHere { path, problem })?);
    }
    let mut files = Vec::new();
    for path in paths {
        match state(found, &path) {
            Some(State::File { bytes }) => files.push(LocalFile { path, bytes: *bytes }),
            Some(State::Refused(problem)) => return Err(Error::RefusedFile { path: folder.join(path), problem }),
            Some(State::Dangling) | None => return Ok(None),
        }
    }
    files.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok(Some(files))
}

fn state<'a>(found: &'a [Found], path: &str) -> Option<&'a State> {
    found.binary_search_by(|found| found.path.as_str().cmp(path)).ok().map(|at| &found[at].state)
}

fn local(
    model: &ModelRef,
    commit: Option<Commit>,
    folder: &Path,
    selection: &Selection,
    files: Vec<LocalFile>,
) -> Local {
    let path = match (selection, files.first()) {
        (Selection::Gguf(_), Some(first)) => folder.join(&first.path),
        _ => folder.to_owned(),
    };
    let bytes = files.iter().map(|file| file.bytes).sum();
    Local { model: canonical(model, selection), commit, path, bytes, files }
}

/// The model at a path outside the store.
fn at_path(model: &ModelRef, path: &Path) -> Result<Local, Error> {
    let none = |problem: &str| Error::NoModelHere { path: path.to_owned(), problem: problem.to_owned() };
    let facts = path.metadata().map_err(|error| none(&error.to_string()))?;
    let (folder, file) = if facts.is_dir() {
        (path, None)
    } else if facts.is_file() {
        let name =
            path.file_name().and_then(|name| name.to_str()).filter(|name| name.to_lowercase().ends_with(".gguf"));
        let name = name.ok_or_else(|| none("a model is a folder or a .gguf file"))?;
        (path.parent().unwrap_or(Path::new("/")), Some(name))
    } else {
        return Err(Error::RefusedFile { path: path.to_owned(), problem: "it is neither a folder nor a regular file" });
    };
    // A snapshot of some hub cache has its links, any other folder none that lead out of it.
    let blobs =
        folder.parent().filter(|up| up.ends_with("snapshots")).and_then(Path::parent).map(|up| up.join("blobs"));
    let links = blobs.as_deref().map_or(Links::Below(folder), Links::Blobs);
    let found = match file {
        None => layout::walk(folder, links)?,
        Some(_) => layout::beside(folder, links)?,
    };
    let all: Vec<&str> = found.iter().map(|found| found.path.as_str()).collect();
    let selection = select::select(model, wanted(file), &all)?;
    let files = complete(folder, &found, &selection)?.ok_or_else(|| none("some of its files are missing"))?;
    Ok(local(model, None, folder, &selection, files))
}
