//! A push that comes in the middle of a collection: right before its n-th call about anything of the image.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, SystemTime};

use regfs::catalog::Tables;
use regfs::error::{Error, Result};
use regfs::gc::guard::gate::Said;
use regfs::gc::{self, Options, Unwatched};
use regfs::registries::Known;
use regfs::registries::http::Access;
use regfs::registry_config;
use regfs::store::disk::Disk;
use regfs::store::{Entry, Reader, Space, Stat, Store};
use regfs::trash::Author;

use crate::common::check::{hex, sha256};
use crate::common::image::Image;
use crate::common::registry::Registry;

/// Longer than a push of these tests takes: one that comes in the middle of a step is over before the next.
const DRAIN: Duration = Duration::from_millis(40);
const KEEP: Duration = Duration::from_millis(60);

/// Calls something before one of its calls.
struct Interposed<'a> {
    inner: Disk,
    /// Calls about these count, and calls about the trash.
    names: Vec<String>,
    left: AtomicUsize,
    act: Box<dyn Fn() + Send + Sync + 'a>,
}

impl Interposed<'_> {
    fn before(&self, path: &Path) -> &Disk {
        let path = path.to_string_lossy();
        if path.contains("trash") || self.names.iter().any(|name| path.contains(name)) {
            let one_less = |left: usize| left.checked_sub(1);
            if self.left.fetch_update(SeqCst, SeqCst, one_less) == Ok(1) {
                (self.act)();
            }
        }
        &self.inner
    }
}

impl Store for Interposed<'_> {
    fn list(&self, prefix: &Path) -> Result<Option<Vec<Entry>>> {
        self.before(prefix).list(prefix)
    }
    fn stat(&self, path: &Path) -> Result<Option<Stat>> {
        self.before(path).stat(path)
    }
    fn read(&self, path: &Path, limit: usize) -> Result<Option<(Vec<u8>, Stat)>> {
        self.before(path).read(path, limit)
    }
    fn open(&self, path: &Path) -> Result<Option<Box<dyn Reader>>> {
        self.before(path).open(path)
    }
    fn write(&self, path: &Path, content: &[u8]) -> Result<()> {
        self.before(path).write(path, content)
    }
    fn rename(&self, from: &Path, to: &Path) -> Result<bool> {
        self.before(from).rename(from, to)
    }
    fn remove(&self, paths: &[PathBuf]) -> Vec<Error> {
        paths.iter().flat_map(|path| self.before(path).remove(std::slice::from_ref(path))).collect()
    }
    fn prune(&self, prefix: &Path) -> Result<()> {
        self.before(prefix).prune(prefix)
    }
    fn directory_changed(&self, path: &Path) -> Result<Option<SystemTime>> {
        self.before(path).directory_changed(path)
    }
    fn remove_directory(&self, path: &Path) -> Result<bool> {
        self.before(path).remove_directory(path)
    }
    fn make_directory(&self, path: &Path) -> Result<()> {
        self.before(path).make_directory(path)
    }
    fn create(&self, path: &Path, content: &[u8]) -> Result<()> {
        self.before(path).create(path, content)
    }
    fn replace(&self, path: &Path, content: &[u8], saved: &Path) -> Result<()> {
        self.before(path).replace(path, content, saved)
    }
    fn sync(&self) -> Result<()> {
        self.inner.sync()
    }
    fn lock(&self, who: &str, wait: Duration) -> Result<Box<dyn Send>> {
        self.inner.lock(who, wait)
    }
    fn is_writable(&self) -> bool {
        self.inner.is_writable()
    }
    fn space(&self) -> Result<Space> {
        self.inner.space()
    }
    fn full(&self, path: &Path) -> PathBuf {
        self.inner.full(path)
    }
}

/// Whether there was such a moment.
pub(crate) enum Moments {
    Pushed,
    Over,
}

/// Makes `image` garbage, collects it all the way, and pushes it as `app:image-<moment>` before the call of that number.
pub(crate) fn pushed_at(registry: &Registry, image: &Image, moment: usize) -> Moments {
    let tag = format!("image-{moment}");
    registry.push("app", Some("old"), image);
    registry.api("DELETE", &format!("app/manifests/{}", image.digest()), &[], &[]).is(202);
    let config = registry_config::resolve(&registry.config(), &Default::default()).unwrap();
    let known = Known::new(&config, &[], Access::default());
    let names = image.digests().iter().map(|digest| hex(digest).to_string()).collect();
    let disk = Disk::open(&config.storage_root).unwrap();
    let act = Box::new(|| push_as_docker_does(registry, &tag, image, moment));
    let store = Interposed { inner: disk, names, left: AtomicUsize::new(moment + 1), act };
    let author = Author::current("test");
    for _ in 0..5 {
        std::thread::sleep(KEEP + Duration::from_millis(5));
        let gate = known.gate(Said::Nothing).unwrap();
        let options = Options { gate, grace: DRAIN, drain: DRAIN, keep: KEEP, ..Options::default() };
        let report = gc::run(&store, &Tables::default(), &options, &author, &Unwatched).unwrap();
        assert_eq!(report.failures, Vec::<String>::new(), "moment {moment}");
    }
    match store.left.load(SeqCst) {
        0 => {
            registry.pulls(&format!("app:{tag}")).unwrap_or_else(|why| panic!("moment {moment}: {why}"));
            Moments::Pushed
        }
        _ => Moments::Over,
    }
}

/// HEAD, upload what is not there, PUT; again when that says that something is unknown. Every other one believes that
/// it has asked before.
fn push_as_docker_does(registry: &Registry, tag: &str, image: &Image, moment: usize) {
    for attempt in 0..3 {
        for blob in image.blobs.iter().filter(|_| attempt > 0 || moment.is_multiple_of(2)) {
            let path = format!("app/blobs/{}", sha256(blob));
            if registry.api("HEAD", &path, &[], &[]).status != 200 {
                registry.push_blob("app", blob);
            }
        }
        let headers = [("Content-Type", image.media_type)];
        let answer = registry.api("PUT", &format!("app/manifests/{tag}"), &headers, &image.manifest);
        if answer.status == 201 {
            return;
        }
        assert_eq!(answer.status, 400, "{}", String::from_utf8_lossy(&answer.body));
    }
    panic!("a push was refused three times");
}
