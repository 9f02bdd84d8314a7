//! The hub's API: which commit a revision is, and which files it has.
//!
//! Sizes and digests come from here and nowhere else, so that headers of a download decide nothing.

use std::collections::BTreeMap;

use reqwest::Url;
use reqwest::header::{HeaderMap, LINK};
use serde::Deserialize;

use crate::digest::Digest;
use crate::error::Error;
use crate::guard;
use crate::http::{Fetcher, Trouble};
use crate::names::{self, Commit, shown};

/// Most files of a repository.
const MAX_FILES: usize = 50_000;

/// Most pages of a listing.
const MAX_PAGES: usize = 200;

/// Largest page, in bytes.
const MAX_PAGE: usize = 16 << 20;

/// Largest answer about a revision, in bytes: it lists all files as well.
const MAX_INFO: usize = 16 << 20;

/// A file of a repository, as its listing promises it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Remote {
    /// Checked: it stays within the repository.
    pub(crate) path: String,
    /// In bytes.
    pub(crate) size: u64,
    pub(crate) digest: Digest,
}

/// The commit of a revision.
///
/// # Errors
/// [`Error::Gated`], [`Error::NoRepository`], [`Error::NoRevision`], [`Error::BadToken`], [`Error::BadAnswer`],
/// and those of requests.
pub(crate) async fn commit(fetcher: &Fetcher, repo: &str, revision: &str) -> Result<Commit, Error> {
    #[derive(Deserialize)]
    struct Info {
        sha: String,
    }
    const WHAT: &str = "the revision";
    let url = address(fetcher, &["api", "models"], repo, &["revision", revision])?;
    let asked = fetcher.json::<Info>(&url, WHAT, MAX_INFO).await;
    let refused = |trouble| match refusal(fetcher, repo, Some(revision), WHAT, trouble) {
        // Nothing was ever reached: there is no download that could go on later.
        Error::Request { endpoint, source, .. } if source.is_connect() => Error::Unreachable { endpoint, source },
        other => other,
    };
    let (info, _) = asked.map_err(refused)?;
    Commit::parse(&info.sha).ok_or_else(|| fetcher.bad(WHAT, &format!("`{}` is no commit", shown(&info.sha))))
}

/// The files of a commit, by path.
///
/// # Errors
/// As [`commit`].
pub(crate) async fn listing(fetcher: &Fetcher, repo: &str, commit: &Commit) -> Result<BTreeMap<String, Remote>, Error> {
    #[derive(Deserialize)]
    struct Entry {
        #[serde(rename = "type")]
        kind: String,
        path: String,
        #[serde(default)]
        size: u64,
        #[serde(default)]
        oid: String,
        lfs: Option<Lfs>,
    }
    #[derive(Deserialize)]
    struct Lfs {
        oid: String,
        size: u64,
    }
    const WHAT: &str = "the list of files";
    let bad = |problem: String| fetcher.bad(WHAT, &problem);
    let mut url = address(fetcher, &["api", "models"], repo, &["tree", commit.as_str()])?;
    url.set_query(Some("recursive=true&expand=false"));
    let mut files = BTreeMap::new();
    for _ in 0..MAX_PAGES {
        let asked = fetcher.json::<Vec<Entry>>(&url, WHAT, MAX_PAGE).await;
        let (entries, headers) =
            asked.map_err(|trouble| refusal(fetcher, repo, Some(commit.as_str()), WHAT, trouble))?;
        for entry in entries {
            if names::is_hostile(&entry.path) {
                return Err(bad(format!("`{}` is no path of a repository", shown(&entry.path))));
            }
            if entry.kind != "file" || !names::path_fits(&entry.path) {
                continue;
            }
            let (digest, size) = match &entry.lfs {
                Some(lfs) => (Digest::parse(&lfs.oid).filter(|d| matches!(d, Digest::Sha256(_))), lfs.size),
                None => (Digest::parse(&entry.oid).filter(|d| matches!(d, Digest::GitBlob(_))), entry.size),
            };
            let Some(digest) = digest else {
                return Err(bad(format!("`{}` has no digest", shown(&entry.path))));
            };
            let file = Remote { path: entry.path.clone(), size, digest };
            if files.insert(entry.path, file).is_some() || files.len() > MAX_FILES {
                return Err(bad(format!("a file twice, or more than {MAX_FILES}")));
            }
        }
        match next_page(&headers, &url) {
            Ok(None) => return Ok(files),
            Ok(Some(next)) if guard::is_endpoint(&fetcher.options, &next) => url = next,
            _ => return Err(bad("its next page is elsewhere".to_owned())),
        }
    }
    Err(bad(format!("it has more than {MAX_PAGES} pages")))
}

/// Where a file's bytes are.
///
/// # Errors
/// [`Error::Endpoint`].
pub(crate) fn file_address(fetcher: &Fetcher, repo: &str, commit: &Commit, path: &str) -> Result<Url, Error> {
    let mut after = vec!["resolve", commit.as_str()];
    after.extend(path.split('/'));
    address(fetcher, &[], repo, &after)
}

/// The endpoint's address of a repository, each part encoded.
fn address(fetcher: &Fetcher, before: &[&str], repo: &str, after: &[&str]) -> Result<Url, Error> {
    let mut url = fetcher.options.endpoint.clone();
    let parts = before.iter().copied().chain(repo.split('/')).chain(after.iter().copied());
    match url.path_segments_mut() {
        Ok(mut path) => path.pop_if_empty().extend(parts),
        Err(()) => return Err(fetcher.bad("the address", "it has no path")),
    };
    Ok(url)
}

/// The address of `Link: <…>; rel="next"`, if there is one.
fn next_page(headers: &HeaderMap, page: &Url) -> Result<Option<Url>, ()> {
    for link in headers.get_all(LINK).iter().filter_map(|link| link.to_str().ok()).flat_map(|all| all.split(',')) {
        let mut parts = link.split(';').map(str::trim);
        let address = parts.next().and_then(|text| text.strip_prefix('<')?.strip_suffix('>'));
        if parts.any(|part| part.eq_ignore_ascii_case("rel=\"next\"")) {
            return page.join(address.ok_or(())?).map(Some).map_err(drop);
        }
    }
    Ok(None)
}

/// What a refusal means, as the hub says it in `X-Error-Code` or else by status.
pub(crate) fn refusal(fetcher: &Fetcher, repo: &str, revision: Option<&str>, what: &str, trouble: Trouble) -> Error {
    let Trouble::Status { status, code, .. } = &trouble else { return fetcher.error(what, trouble, 1, (0, 0)) };
    let with_token = fetcher.options.token.is_some();
    let endpoint = guard::origin(&fetcher.options.endpoint);
    let page = address(fetcher, &[], repo, &[]).map(String::from).unwrap_or_default();
    let repo = repo.to_owned();
    match (status, code.as_deref()) {
        (401 | 403, Some("GatedRepo")) | (403, None) => Error::Gated { repo, page, with_token },
        (404, Some("RevisionNotFound")) => {
            Error::NoRevision { repo, revision: revision.unwrap_or_default().to_owned() }
        }
        (404, Some("EntryNotFound")) => fetcher.bad("the list of files", "it names a file that is not there"),
        (401, code) if with_token && code != Some("RepoNotFound") => Error::BadToken { endpoint },
        (401 | 403 | 404, _) => Error::NoRepository { repo, endpoint, with_token },
        _ => fetcher.error(what, trouble, 1, (0, 0)),
    }
}
