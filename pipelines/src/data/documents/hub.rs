//! Datasets of the Hugging Face hub: their files, downloaded once, and checked.

use std::path::{Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::super::download::DownloadError;
use super::{DocumentError, SourceFile, described, hash_of, kind};

/// A dataset and the files of it that are wanted.
#[derive(Debug, PartialEq, Eq)]
struct Dataset<'a> {
    /// `owner/name`
    name: &'a str,
    /// `main` by default.
    revision: &'a str,
    /// The folder in the repository; empty for all of it.
    folder: &'a str,
}

/// `hf://datasets/owner/name`, with `@revision` and `/folder` if they are given.
fn parse(source: &str) -> Result<Dataset<'_>, DocumentError> {
    let wrong = || {
        let form = "hf://datasets/owner/name, hf://datasets/owner/name@revision or hf://datasets/owner/name/folder";
        DocumentError::Address(format!("{source} names no dataset; write {form}"))
    };
    let path = source.strip_prefix("hf://datasets/").ok_or_else(wrong)?.trim_end_matches('/');
    let (owner, rest) = path.split_once('/').ok_or_else(wrong)?;
    let (last, folder) = rest.split_once('/').unwrap_or((rest, ""));
    let (last, revision) = last.split_once('@').unwrap_or((last, "main"));
    if owner.is_empty() || last.is_empty() || revision.is_empty() {
        return Err(wrong());
    }
    let name = &path[..owner.len() + 1 + last.len()];
    Ok(Dataset { name, revision, folder })
}

/// The files of a dataset, in the order of their names: the Parquet files, or all of known kinds if there are none.
/// They are kept in `cache`, where a broken download goes on the next time.
pub(super) fn files(source: &str, cache: &Path) -> Result<Vec<SourceFile>, DocumentError> {
    // HF_ENDPOINT names another server, HF_TOKEN or a login opens private datasets
    let api = ApiBuilder::from_env().with_cache_dir(cache.join("hub")).with_retries(3).with_progress(true).build();
    let api = api.map_err(|error| unreachable(source, &error))?;
    files_of(source, &api, &cache.join("hub"))
}

fn unreachable(source: &str, error: &dyn std::fmt::Display) -> DocumentError {
    let reason = format!("{error}; without a network give local files: --set 'documents.from=[\"corpus.jsonl.gz\"]'");
    DownloadError::Unreachable { url: source.into(), reason }.into()
}

fn files_of(source: &str, api: &Api, cache: &Path) -> Result<Vec<SourceFile>, DocumentError> {
    let dataset = parse(source)?;
    let repo = Repo::with_revision(dataset.name.into(), RepoType::Dataset, dataset.revision.into());
    let blobs = &Cache::new(cache.into()).repo(repo.clone());
    let repo = api.repo(repo);
    let info = repo.info().map_err(|error| unreachable(source, &error))?;
    let prefix = if dataset.folder.is_empty() { String::new() } else { format!("{}/", dataset.folder) };
    let mut names: Vec<String> = info.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
    names.retain(|name| name.starts_with(&prefix) && !hidden(name));
    let others = names.len();
    if names.iter().any(|name| name.ends_with(".parquet")) {
        names.retain(|name| name.ends_with(".parquet"));
    } else {
        names.retain(|name| kind(name).is_some());
    }
    if names.is_empty() {
        return Err(DocumentError::NoFiles { path: PathBuf::from(source), others });
    }
    names.sort();
    let source = source.trim_end_matches('/');
    let dataset = source.strip_suffix(dataset.folder).unwrap_or(source).trim_end_matches('/');
    names.iter().map(|name| fetch(dataset, api, &repo, name, blobs)).collect()
}

fn hidden(name: &str) -> bool {
    name.split('/').any(|part| part.starts_with('.'))
}

/// A file of the repository, from the cache or the server. What the server stores as a large file it knows the SHA-256
/// of, and that is checked once.
fn fetch(dataset: &str, api: &Api, repo: &ApiRepo, name: &str, blobs: &CacheRepo) -> Result<SourceFile, DocumentError> {
    let url = repo.url(name);
    let path = match repo.get(name) {
        Err(_) if discard_whole_part(api, &url, blobs) => repo.get(name),
        other => other,
    };
    let path = path.map_err(|error| unreachable(&url, &error))?;
    let mut file = described(&path, &format!("{dataset}/{name}"))?;
    // the cache names a file after what the server says it is, and the path is a link to it
    let stored = std::fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
    let expected = match stored.file_name().map(|name| name.to_string_lossy().into_owned()) {
        Some(name) if is_sha256(&name) => name,
        // a system without links: ask
        _ => api.metadata(&url).map(|metadata| metadata.etag().to_string()).unwrap_or_default(),
    };
    if !is_sha256(&expected) {
        return Ok(file);
    }
    let checked = stored.with_extension("checked");
    if !checked.exists() {
        let found = hash_of(&file)?;
        if found != expected {
            // the next try downloads it again
            let _ = std::fs::remove_file(&stored);
            let _ = std::fs::remove_file(&path);
            return Err(DownloadError::HashMismatch { url, expected, found, bytes: file.bytes }.into());
        }
        crate::files::write_atomically(&checked, |_| Ok(())).map_err(DownloadError::File)?;
    }
    file.sha256 = Some(expected);
    Ok(file)
}

/// Removes what an earlier run downloaded to the end and had no time to rename, for which servers have no rest to send.
fn discard_whole_part(api: &Api, url: &str, blobs: &CacheRepo) -> bool {
    let Ok(metadata) = api.metadata(url) else { return false };
    let part = blobs.blob_path(metadata.etag()).with_extension("part");
    let whole = std::fs::metadata(&part).is_ok_and(|part| part.len() >= metadata.size() as u64);
    whole && std::fs::remove_file(part).is_ok()
}

fn is_sha256(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}
