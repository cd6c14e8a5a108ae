//! Sweeps beside a real registry: short waits, an image that is garbage, a push as clients do it.

use std::path::Path;
use std::time::Duration;

use super::check::sha256;
use super::gc::{Report, gc_beside};
use super::image::{Image, layer};
use super::registry::Registry;

/// Waits that a test can wait for; longer than any request of a test takes, were it not for a machine that stands still,
/// which these tests survive: nothing in them is under way across a step but where they say so.
pub(crate) const TIMES: [&str; 6] = ["--grace", "50ms", "--drain", "50ms", "--keep", "100ms"];
/// Longer than each of them.
pub(crate) const A_STEP: Duration = Duration::from_millis(120);

/// An image like no other.
pub(crate) fn image(name: &str) -> Image {
    Image::oci(name, &[layer("file", &format!("content of {name}"))])
}

/// Pushes an image that stays and one that is deleted, which is returned.
pub(crate) fn garbage_in(registry: &Registry) -> Image {
    registry.push("app", Some("stays"), &image("stays"));
    let gone = image("gone");
    registry.push("app", Some("gone"), &gone);
    registry.api("DELETE", &format!("app/manifests/{}", gone.digest()), &[], &[]).is(202);
    gone
}

/// Takes the step that is due.
pub(crate) fn step_with(store: &Path, words: &[&str]) -> Report {
    std::thread::sleep(A_STEP);
    gc_beside(store, &[&TIMES[..], words].concat())
}

/// The same, with nothing more to say.
pub(crate) fn step(store: &Path) -> Report {
    step_with(store, &[])
}

/// How many blobs are in a state.
pub(crate) fn in_state(report: &Report, state: &str) -> usize {
    report.states.iter().filter(|s| s.state == state).map(|s| s.blobs).sum()
}

/// Pushes as docker does: asks, uploads what is not there, sends the manifest; begins anew when that is refused.
pub(crate) fn push(registry: &Registry, repository: &str, tag: &str, image: &Image) {
    for _ in 0..3 {
        for blob in &image.blobs {
            let path = format!("{repository}/blobs/{}", sha256(blob));
            if registry.api("HEAD", &path, &[], &[]).status != 200 {
                registry.push_blob(repository, blob);
            }
        }
        let headers = [("Content-Type", image.media_type)];
        let target = format!("{repository}/manifests/{tag}");
        if registry.api("PUT", &target, &headers, &image.manifest).status == 201 {
            return;
        }
    }
    panic!("the push was refused three times");
}
