//! Images made here, byte for byte the same each time: OCI and Docker schema 2, indexes, referrers.
//!
//! Layers are real tar files in real gzip, so that skopeo and umoci take them. The gzip stores without
//! compressing: that needs no library and never changes.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::check::{hex, sha256};

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub(crate) const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(crate) const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub(crate) const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
pub(crate) const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
pub(crate) const DOCKER_SCHEMA_1: &str = "application/vnd.docker.distribution.manifest.v1+prettyjws";

/// A layer: the gzipped tar and the digest of the tar.
#[derive(Clone)]
pub(crate) struct Layer {
    pub(crate) blob: Vec<u8>,
    diff_id: String,
}

/// A layer with one file `path` that holds `content`.
pub(crate) fn layer(path: &str, content: &str) -> Layer {
    let tar = tar(path, content.as_bytes());
    Layer { diff_id: sha256(&tar), blob: gzip(&tar) }
}

/// A manifest with everything it names.
#[derive(Clone)]
pub(crate) struct Image {
    pub(crate) media_type: &'static str,
    /// The exact bytes.
    pub(crate) manifest: Vec<u8>,
    /// Config first, then the layers.
    pub(crate) blobs: Vec<Vec<u8>>,
    /// Of an index.
    pub(crate) children: Vec<Image>,
}

impl Image {
    /// An OCI image; `name` goes into its config, so that two images with the same layers differ.
    pub(crate) fn oci(name: &str, layers: &[Layer]) -> Image {
        Image::with(name, "amd64", layers, [OCI_MANIFEST, OCI_CONFIG, OCI_LAYER])
    }

    /// An OCI image for one architecture.
    pub(crate) fn oci_for(architecture: &str, name: &str, layers: &[Layer]) -> Image {
        Image::with(name, architecture, layers, [OCI_MANIFEST, OCI_CONFIG, OCI_LAYER])
    }

    /// A Docker schema 2 image.
    pub(crate) fn docker(name: &str, layers: &[Layer]) -> Image {
        Image::with(name, "amd64", layers, [DOCKER_MANIFEST, DOCKER_CONFIG, DOCKER_LAYER])
    }

    fn with(name: &str, architecture: &str, layers: &[Layer], types: [&'static str; 3]) -> Image {
        let [media_type, config_type, layer_type] = types;
        let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        let history: Vec<Value> = layers.iter().map(|_| json!({"created": "1970-01-01T00:00:00Z"})).collect();
        let config = bytes(&json!({
            "created": "1970-01-01T00:00:00Z", "architecture": architecture, "os": "linux",
            "config": {"Labels": {"name": name}, "Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids}, "history": history,
        }));
        let manifest = bytes(&json!({
            "schemaVersion": 2, "mediaType": media_type,
            "config": descriptor(config_type, &config),
            "layers": layers.iter().map(|layer| descriptor(layer_type, &layer.blob)).collect::<Vec<_>>(),
        }));
        let blobs = std::iter::once(config).chain(layers.iter().map(|layer| layer.blob.clone())).collect();
        Image { media_type, manifest, blobs, children: Vec::new() }
    }

    /// A multi-arch OCI index.
    pub(crate) fn index(children: &[(&str, &Image)]) -> Image {
        Image::list(children, OCI_INDEX)
    }

    /// A multi-arch Docker manifest list.
    pub(crate) fn docker_list(children: &[(&str, &Image)]) -> Image {
        Image::list(children, DOCKER_LIST)
    }

    fn list(children: &[(&str, &Image)], media_type: &'static str) -> Image {
        let manifests: Vec<Value> = children
            .iter()
            .map(|(architecture, child)| {
                let mut entry = child.descriptor();
                entry["platform"] = json!({"architecture": architecture, "os": "linux"});
                entry
            })
            .collect();
        let manifest = bytes(&json!({"schemaVersion": 2, "mediaType": media_type, "manifests": manifests}));
        let children = children.iter().map(|(_, child)| (*child).clone()).collect();
        Image { media_type, manifest, blobs: Vec::new(), children }
    }

    /// A signature, SBOM or the like about this image, with `payload` as its one layer.
    pub(crate) fn referrer(&self, artifact_type: &str, payload: &str) -> Image {
        let config = b"{}".to_vec();
        let payload = payload.as_bytes().to_vec();
        let manifest = bytes(&json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": artifact_type,
            "config": descriptor("application/vnd.oci.empty.v1+json", &config),
            "layers": [descriptor(artifact_type, &payload)],
            "subject": self.descriptor(),
        }));
        Image { media_type: OCI_MANIFEST, manifest, blobs: vec![config, payload], children: Vec::new() }
    }

    /// Any bytes as a manifest, with the blobs that shall go with it.
    pub(crate) fn odd(media_type: &'static str, manifest: impl Into<Vec<u8>>, blobs: &[&[u8]]) -> Image {
        let blobs = blobs.iter().map(|blob| blob.to_vec()).collect();
        Image { media_type, manifest: manifest.into(), blobs, children: Vec::new() }
    }

    /// `sha256:<hex>` of the manifest.
    pub(crate) fn digest(&self) -> String {
        sha256(&self.manifest)
    }

    /// The hex of [`Image::digest`].
    pub(crate) fn hex(&self) -> String {
        hex(&self.digest()).to_string()
    }

    /// The descriptor that an index or a referrer names this manifest by.
    pub(crate) fn descriptor(&self) -> Value {
        descriptor(self.media_type, &self.manifest)
    }

    /// Digests of the manifest and of all below it.
    pub(crate) fn digests(&self) -> BTreeSet<String> {
        let own = self.blobs.iter().map(|blob| sha256(blob)).chain([self.digest()]);
        own.chain(self.children.iter().flat_map(Image::digests)).collect()
    }

    /// Writes a directory that `skopeo copy dir:` reads.
    pub(crate) fn write_dir(&self, dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("version"), "Directory Transport Version: 1.1\n").unwrap();
        fs::write(dir.join("manifest.json"), &self.manifest).unwrap();
        for blob in &self.blobs {
            fs::write(dir.join(hex(&sha256(blob))), blob).unwrap();
        }
        for child in &self.children {
            fs::write(dir.join(format!("{}.manifest.json", child.hex())), &child.manifest).unwrap();
            for blob in &child.blobs {
                fs::write(dir.join(hex(&sha256(blob))), blob).unwrap();
            }
        }
    }
}

/// A descriptor of `content`.
pub(crate) fn descriptor(media_type: &str, content: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": sha256(content), "size": content.len()})
}

/// JSON bytes, always the same for the same value.
pub(crate) fn bytes(value: &Value) -> Vec<u8> {
    serde_json::to_vec(value).unwrap()
}

/// A tar file (ustar) with one file in it.
fn tar(path: &str, content: &[u8]) -> Vec<u8> {
    let mut header = [0_u8; 512];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, path);
    put(100, "0000644\0");
    put(108, "0000000\0");
    put(116, "0000000\0");
    put(124, &format!("{:011o}\0", content.len()));
    put(136, "00000000000\0");
    put(148, "        "); // the checksum counts itself as spaces
    put(156, "0");
    put(257, "ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut tar = header.to_vec();
    tar.extend_from_slice(content);
    tar.resize(tar.len().next_multiple_of(512) + 1024, 0);
    tar
}

/// A gzip file of stored (uncompressed) blocks.
fn gzip(content: &[u8]) -> Vec<u8> {
    let mut out = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff];
    let mut blocks = content.chunks(0xffff).peekable();
    while let Some(block) = blocks.next() {
        let length = u16::try_from(block.len()).unwrap();
        out.push(u8::from(blocks.peek().is_none()));
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(&(!length).to_le_bytes());
        out.extend_from_slice(block);
    }
    out.extend_from_slice(&crc32(content).to_le_bytes());
    out.extend_from_slice(&u32::try_from(content.len()).unwrap().to_le_bytes());
    out
}

fn crc32(content: &[u8]) -> u32 {
    !content.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(
            crc ^ u32::from(*byte),
            |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 },
        )
    })
}
