//! Download of MNIST into a folder.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tempfile::NamedTempFile;
use ureq::Agent;

use super::files::{FILES, MnistFile};
use super::idx;
use crate::print::message;

/// Where MNIST is kept: Burn's mirror first, then PyTorch's.
pub(super) const MIRRORS: &[&str] = &[
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
];

/// Most bytes of one download; enough for a mirror that serves decompressed files.
const MAX_DOWNLOAD: u64 = 64 << 20;

/// Completes the four files in `dir`.
///
/// A file appears there only when it is whole and has its checksum; files that
/// are there already and pass are kept. A mirror that fails once is not asked
/// again, so without a network this ends after one attempt at each.
pub(super) fn fetch(mirrors: &[&str], dir: &Path) -> Result<(), String> {
    let agent = agent();
    let mut mirrors = mirrors.iter();
    let mut mirror = mirrors.next();
    let mut failures = Vec::new();
    for file in &FILES {
        let path = stored(dir, file);
        if idx::read(&path, file.kind).is_ok_and(|read| read.md5 == file.md5) {
            continue;
        }
        while let Some(base) = mirror {
            let url = format!("{base}{}.gz", file.name);
            match fetch_file(&agent, &url, file, dir, &path) {
                Ok(()) => break,
                Err(failure) => failures.push(format!("{url}: {}", message(&failure))),
            }
            mirror = mirrors.next();
        }
        if mirror.is_none() {
            return Err(failures.join("; "));
        }
    }
    Ok(())
}

/// Where [`fetch`] puts a file.
pub(super) fn stored(dir: &Path, file: &MnistFile) -> PathBuf {
    dir.join(format!("{}.gz", file.name))
}

fn agent() -> Agent {
    Agent::config_builder()
        .timeout_resolve(Some(Duration::from_secs(3)))
        .timeout_connect(Some(Duration::from_secs(3)))
        .timeout_recv_response(Some(Duration::from_secs(10)))
        .timeout_global(Some(Duration::from_secs(60)))
        .build()
        .into()
}

fn fetch_file(agent: &Agent, url: &str, file: &MnistFile, dir: &Path, path: &Path) -> Result<()> {
    let failed = || format!("cannot copy it to {}", dir.display());
    fs::create_dir_all(dir).with_context(failed)?;
    let mut partial = NamedTempFile::new_in(dir).with_context(failed)?;
    let response = agent.get(url).call()?;
    let body = response.into_body().into_with_config();
    let mut body = body.limit(MAX_DOWNLOAD).reader();
    io::copy(&mut body, &mut partial).with_context(failed)?;

    let read = idx::read(partial.path(), file.kind).map_err(|error| error.problem)?;
    ensure!(read.md5 == file.md5, "does not have the checksum of MNIST");
    partial.persist(path).with_context(failed)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tempfile::TempDir;

    use super::super::testing::{gzip, label_file, real_mnist, refusing_mirror, serve};
    use super::super::{generate, testing};
    use super::*;

    /// Fetches into a new folder, in which a failure must leave nothing.
    fn failed(mirrors: &[&str]) -> String {
        let dir = TempDir::new().unwrap();
        let failures = fetch(mirrors, dir.path()).unwrap_err();
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
        assert!(left.is_empty(), "left behind: {left:?}");
        failures
    }

    #[test]
    fn asks_each_mirror_once_when_none_answers() {
        let (first, second) = (refusing_mirror(), refusing_mirror());
        let failures = failed(&[&first, &second]);
        let urls = [first, second].map(|base| base + "train-images-idx3-ubyte.gz: ");
        assert!(
            urls.iter().all(|url| failures.matches(url).count() == 1),
            "{failures}"
        );
    }

    #[test]
    fn refuses_what_is_not_there() {
        let failures = failed(&[&serve(|_| None)]);
        assert!(failures.contains("404"), "{failures}");
    }

    #[test]
    fn refuses_a_page_in_place_of_a_file() {
        let failures = failed(&[&serve(|_| Some(b"<html>please log in</html>".to_vec()))]);
        assert!(failures.contains("starts with 0x"), "{failures}");
    }

    #[test]
    fn refuses_other_digits() {
        let digits = generate(20, 0);
        let bytes = gzip(&testing::image_file(digits.images()));
        let failures = failed(&[&serve(move |_| Some(bytes.clone()))]);
        assert!(failures.contains("the checksum of MNIST"), "{failures}");
    }

    #[test]
    fn refuses_a_body_beyond_the_limit() {
        let failures = failed(&[&serve(|_| Some(vec![0; MAX_DOWNLOAD as usize + 1]))]);
        assert!(failures.contains("cannot copy it to"), "{failures}");
    }

    #[test]
    fn reports_a_folder_that_cannot_be_made() {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let failures = fetch(&[&refusing_mirror()], &file.join("mnist")).unwrap_err();
        assert!(failures.contains("cannot copy it to"), "{failures}");
    }

    #[test]
    fn goes_on_at_the_next_mirror_and_keeps_what_it_has() {
        let Some(real) = real_mnist() else { return };
        let whole = move |name: &str| fs::read(real.join(name)).ok();
        // The first mirror has the images alone, the second answers everything.
        let images = whole.clone();
        let first = serve(move |name| images(name).filter(|_| name.contains("train-images")));
        let asked = Arc::new(AtomicUsize::new(0));
        let counter = asked.clone();
        let second = serve(move |name| {
            counter.fetch_add(1, Ordering::Relaxed);
            whole(name)
        });

        let dir = TempDir::new().unwrap();
        fetch(&[&first, &second], dir.path()).unwrap();
        assert_eq!(asked.load(Ordering::Relaxed), 3);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4);

        // Only a damaged file is fetched again.
        let damaged = stored(dir.path(), &FILES[1]);
        fs::write(&damaged, gzip(&label_file(&[1, 2, 3]))).unwrap();
        fetch(&[&second], dir.path()).unwrap();
        assert_eq!(asked.load(Ordering::Relaxed), 4);
        assert_eq!(
            idx::read(&damaged, FILES[1].kind).unwrap().md5,
            FILES[1].md5
        );
    }
}
