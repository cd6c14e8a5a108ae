//! Makes a large registry to measure on: `cargo bench --bench make_store -- DIRECTORY REPOSITORIES TAGS_EACH`.
//!
//! Deterministic. Each tag is an image of its own with a config and two layers of its own, and one base layer that
//! its repository shares; every twentieth tag is an index over the two images before it; one blob in ten is garbage.
//! Layers are a few bytes long: collectors never read them.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use regfs::digest::{Algorithm, Digest};
use regfs::layout;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

struct Store {
    root: PathBuf,
    blobs: usize,
}

impl Store {
    fn put(&self, path: &Path, content: &[u8]) -> Result<()> {
        let path = self.root.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        Ok(fs::write(path, content)?)
    }

    fn blob(&mut self, content: &[u8]) -> Result<Digest> {
        let digest = Digest::of(Algorithm::Sha256, content);
        self.put(&layout::blob_data(&digest), content)?;
        self.blobs += 1;
        Ok(digest)
    }

    fn layer(&mut self, repository: &Path, content: &[u8]) -> Result<Digest> {
        let digest = self.blob(content)?;
        self.put(&layout::layer_link(repository, &digest), digest.to_string().as_bytes())?;
        Ok(digest)
    }

    fn manifest(&mut self, repository: &Path, tag: &str, text: &str) -> Result<Digest> {
        let digest = self.blob(text.as_bytes())?;
        let link = digest.to_string();
        self.put(&layout::revision_link(repository, &digest), link.as_bytes())?;
        self.put(&layout::tag_link(repository, tag.as_ref()), link.as_bytes())?;
        Ok(digest)
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [directory, repositories, tags] = arguments.as_slice() else {
        return Err("usage: make_store DIRECTORY REPOSITORIES TAGS_EACH".into());
    };
    let (repositories, tags): (usize, usize) = (repositories.parse()?, tags.parse()?);
    let root = Path::new(directory).join(layout::REGISTRY_DIR);
    if root.exists() {
        return Err(format!("{} exists already", root.display()).into());
    }
    let mut store = Store { root, blobs: 0 };
    for r in 0..repositories {
        let name = PathBuf::from(format!("team{}/app{r}", r % 40));
        let base = store.layer(&name, format!("base {r}").as_bytes())?;
        let mut images: Vec<Digest> = Vec::new();
        for t in 0..tags {
            let tag = format!("v{t}");
            if t % 20 == 19 {
                let child = |d: &Digest, arch: &str| {
                    format!(
                        r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{d}","size":600,"platform":{{"architecture":"{arch}","os":"linux"}}}}"#
                    )
                };
                let (a, b) = (&images[images.len() - 1], &images[images.len() - 2]);
                let text = format!(
                    r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{},{}]}}"#,
                    child(a, "amd64"),
                    child(b, "arm64")
                );
                store.manifest(&name, &tag, &text)?;
                continue;
            }
            let one = store.layer(&name, format!("layer {r} {t} one").as_bytes())?;
            let two = store.layer(&name, format!("layer {r} {t} two").as_bytes())?;
            let config = store.layer(
                &name,
                format!(r#"{{"architecture":"amd64","os":"linux","n":"{r}.{t}"}}"#).as_bytes(),
            )?;
            let layer = |d: &Digest| {
                format!(
                    r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{d}","size":16}}"#
                )
            };
            let text = format!(
                r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config}","size":45}},"layers":[{},{},{}]}}"#,
                layer(&base),
                layer(&one),
                layer(&two)
            );
            images.push(store.manifest(&name, &tag, &text)?);
        }
    }
    for n in 0..store.blobs / 9 {
        store.blob(format!("garbage {n}").as_bytes())?;
    }
    println!("{repositories} repositories, {} tags, {} blobs", repositories * tags, store.blobs);
    Ok(())
}
