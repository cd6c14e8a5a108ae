//! Manifest bytes → media type, descriptors, subject. Pure.
//!
//! # Rules kept here
//! 1. A manifest of a known type holds what its descriptors name.
//! 2. Whatever is odd makes *every* digest found anywhere in the text count: an unknown type, a field written
//!    twice or in another case (Go's decoder, which the registry uses, takes `Layers` for `layers`), a descriptor
//!    that can't be read. Too much kept is a matter of bytes, too little is a lost image.
//! 3. What is no JSON object at all is an error; the caller then keeps everything linked in its repositories.
//!
//! Sources: OCI image-spec 1.1 `manifest.md`, `image-index.md`, `descriptor.md`; distribution
//! `manifest/schema1`, `schema2`, `manifestlist`.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::digest::{Algorithm, Digest};

/// Largest manifest in bytes; the registry accepts no larger one (distribution `maxManifestBodySize`).
pub const MAX_SIZE: usize = 4 << 20;

/// What sort of manifest this is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// OCI or Docker schema 2 image, or an artifact: a config and layers.
    Image,
    /// OCI image index or Docker manifest list.
    Index,
    /// Docker schema 1, which lists layers only.
    Schema1,
    /// Anything else; every digest in its text counts.
    Unknown,
}

/// What one manifest says about one thing that it names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Descriptor<'a> {
    /// Name of the content.
    pub digest: Digest,
    /// Bytes, as claimed.
    pub size: u64,
    /// Media type, empty when not given.
    pub media_type: Cow<'a, str>,
    /// `linux-arm64-v8`, for children of an index.
    pub platform: Option<String>,
}

/// A manifest, read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Manifest<'a> {
    /// What sort it is.
    pub kind: Kind,
    /// Its media type: as it says, else the one its fields imply.
    pub media_type: Cow<'a, str>,
    /// `artifactType`, else the config's media type where that says more than "an image".
    pub artifact_type: Option<Cow<'a, str>>,
    /// The config.
    pub config: Option<Descriptor<'a>>,
    /// The layers in order (`layers`, `blobs` of an artifact, `fsLayers` of schema 1 from the base up).
    pub layers: Vec<Descriptor<'a>>,
    /// The children of an index.
    pub children: Vec<Descriptor<'a>>,
    /// The manifest that this one is about.
    pub subject: Option<Digest>,
    /// Further digests that count because the text is odd.
    pub others: Vec<Digest>,
    /// Why `others` was needed.
    pub odd: Option<String>,
}

/// Why bytes are no manifest.
#[derive(Debug, PartialEq, Eq)]
pub struct NotAManifest(pub String);

/// Media type of an OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Media type of a Docker schema 1 manifest.
pub const DOCKER_SCHEMA1: &str = "application/vnd.docker.distribution.manifest.v1+json";
const DOCKER_SCHEMA1_SIGNED: &str = "application/vnd.docker.distribution.manifest.v1+prettyjws";
const OCI_ARTIFACT: &str = "application/vnd.oci.artifact.manifest.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const PLAIN_CONFIGS: [&str; 3] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
    "application/vnd.oci.empty.v1+json",
];

impl Kind {
    fn of_media_type(media_type: &str) -> Option<Kind> {
        match media_type {
            OCI_MANIFEST | DOCKER_MANIFEST | OCI_ARTIFACT => Some(Kind::Image),
            OCI_INDEX | DOCKER_LIST => Some(Kind::Index),
            DOCKER_SCHEMA1 | DOCKER_SCHEMA1_SIGNED => Some(Kind::Schema1),
            _ => None,
        }
    }
}

/// Whether `media_type` is one of the manifests known here.
pub fn is_manifest_type(media_type: &str) -> bool {
    Kind::of_media_type(media_type).is_some()
}

/// Whether `media_type` is that of a layer which a registry need not have: clients fetch it elsewhere.
///
/// Source: distribution `manifest/schema2`, `MediaTypeForeignLayer`; OCI image-spec 1.0, `layer.md`.
pub fn is_foreign_layer(media_type: &str) -> bool {
    media_type == "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
        || media_type.starts_with("application/vnd.oci.image.layer.nondistributable.v1.tar")
}

/// Reads a manifest.
///
/// # Errors
/// [`NotAManifest`] when the bytes are no JSON object or nest deeper than 128 levels.
pub fn parse(bytes: &[u8]) -> Result<Manifest<'_>, NotAManifest> {
    let text = std::str::from_utf8(bytes).map_err(|e| NotAManifest(e.to_string()))?;
    let mut json = serde_json::Deserializer::from_str(text);
    let fields = match json.deserialize_map(FieldsVisitor).and_then(|fields| json.end().map(|()| fields)) {
        Ok(fields) => fields,
        Err(e) if e.is_data() => Fields { odd: Some(e.to_string()), ..Fields::default() },
        Err(e) => return Err(NotAManifest(e.to_string())),
    };
    let mut manifest = fields.into_manifest();
    if manifest.odd.is_some() {
        manifest.others = digests_in(text)?;
    }
    Ok(manifest)
}

/// Every digest in any key or string of a JSON object.
fn digests_in(text: &str) -> Result<Vec<Digest>, NotAManifest> {
    if !text.trim_start().starts_with('{') {
        return Err(NotAManifest("expected a JSON object".to_string()));
    }
    let mut digests = Vec::new();
    let mut json = serde_json::Deserializer::from_str(text);
    Collect(&mut digests)
        .deserialize(&mut json)
        .and_then(|()| json.end())
        .map_err(|e| NotAManifest(e.to_string()))?;
    digests.sort_unstable();
    digests.dedup();
    Ok(digests)
}

/// A string of the text, copied only where it has escapes.
#[derive(serde::Deserialize)]
#[serde(transparent)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// The fields of a manifest that matter, and whether anything about them is odd.
#[derive(Default)]
struct Fields<'a> {
    schema_version: u64,
    media_type: Option<Text<'a>>,
    artifact_type: Option<Text<'a>>,
    config: Option<Descriptor<'a>>,
    layers: Option<Vec<Descriptor<'a>>>,
    children: Option<Vec<Descriptor<'a>>>,
    blob_sums: Option<Vec<Descriptor<'a>>>,
    subject: Option<Descriptor<'a>>,
    odd: Option<String>,
}

impl<'a> Fields<'a> {
    fn into_manifest(self) -> Manifest<'a> {
        let (kind, media_type) = match self.media_type {
            Some(Text(media_type)) => (Kind::of_media_type(&media_type), media_type),
            None if self.children.is_some() => (Some(Kind::Index), OCI_INDEX.into()),
            None if self.layers.is_some() => (Some(Kind::Image), OCI_MANIFEST.into()),
            None if self.blob_sums.is_some() && self.schema_version == 1 => {
                (Some(Kind::Schema1), DOCKER_SCHEMA1.into())
            }
            None => (None, "".into()),
        };
        let unknown_type = || match &*media_type {
            "" => "it has no mediaType and no field that tells what it is".to_string(),
            other => format!("unknown mediaType {other:?}"),
        };
        let odd = self.odd.or_else(|| kind.is_none().then(unknown_type));
        let special_config = self.config.as_ref().map(|c| c.media_type.clone());
        let artifact_type = self
            .artifact_type
            .map(|text| text.0)
            .or(special_config.filter(|t| !t.is_empty() && !PLAIN_CONFIGS.contains(&&**t)));
        let mut layers = self.layers.unwrap_or_default();
        layers.extend(self.blob_sums.unwrap_or_default().into_iter().rev());
        Manifest {
            kind: if odd.is_some() { Kind::Unknown } else { kind.unwrap_or(Kind::Unknown) },
            media_type,
            artifact_type,
            config: self.config,
            layers,
            children: self.children.unwrap_or_default(),
            subject: self.subject.map(|s| s.digest),
            others: Vec::new(),
            odd,
        }
    }
}

const MANIFEST_KEYS: [&str; 10] = [
    "schemaVersion",
    "mediaType",
    "artifactType",
    "config",
    "layers",
    "blobs",
    "manifests",
    "fsLayers",
    "subject",
    "annotations",
];
const DESCRIPTOR_KEYS: [&str; 5] = ["digest", "size", "mediaType", "platform", "blobSum"];

/// Whether Go's decoder might take `key` for one of `known` although it is written differently.
fn is_other_spelling(key: &str, known: &[&str]) -> bool {
    !known.contains(&key) && (!key.is_ascii() || known.iter().any(|k| k.eq_ignore_ascii_case(key)))
}

/// Stores a field's value; a second one is an error, so that nobody guesses which of the two counts.
fn once<'de, A: MapAccess<'de>, T>(slot: &mut Option<T>, key: &str, value: T) -> Result<(), A::Error> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(A::Error::custom(format!("{key} stands there twice"))),
    }
}

struct FieldsVisitor;

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a manifest, which is a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
        let mut fields = Fields::default();
        let mut schema_version = None;
        while let Some(Text(key)) = map.next_key()? {
            match &*key {
                "schemaVersion" => once::<A, u64>(&mut schema_version, &key, map.next_value()?)?,
                "mediaType" => once::<A, Text>(&mut fields.media_type, &key, map.next_value()?)?,
                "artifactType" => once::<A, Text>(&mut fields.artifact_type, &key, map.next_value()?)?,
                "config" => once::<A, _>(&mut fields.config, &key, map.next_value_seed(DescriptorSeed)?)?,
                "subject" => {
                    if let Some(subject) = map.next_value_seed(Nullable(DescriptorSeed))? {
                        once::<A, _>(&mut fields.subject, &key, subject)?;
                    }
                }
                "layers" | "blobs" => {
                    let list = map.next_value_seed(Nullable(List))?.unwrap_or_default();
                    once::<A, _>(&mut fields.layers, &key, list)?;
                }
                "manifests" => {
                    let list = map.next_value_seed(Nullable(List))?.unwrap_or_default();
                    once::<A, _>(&mut fields.children, &key, list)?;
                }
                "fsLayers" => {
                    let list = map.next_value_seed(Nullable(List))?.unwrap_or_default();
                    once::<A, _>(&mut fields.blob_sums, &key, list)?;
                }
                other => {
                    if is_other_spelling(other, &MANIFEST_KEYS) {
                        fields.odd.get_or_insert_with(|| format!("it has a field {other:?}"));
                    }
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        fields.schema_version = schema_version.unwrap_or(0);
        Ok(fields)
    }
}

/// A value that may be `null`.
struct Nullable<S>(S);

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Nullable<S> {
    type Value = Option<S::Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'de, S: DeserializeSeed<'de>> Visitor<'de> for Nullable<S> {
    type Value = Option<S::Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value or null")
    }

    fn visit_none<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        self.0.deserialize(deserializer).map(Some)
    }
}

struct List;

impl<'de> DeserializeSeed<'de> for List {
    type Value = Vec<Descriptor<'de>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for List {
    type Value = Vec<Descriptor<'de>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of descriptors")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut list = Vec::new();
        while let Some(descriptor) = seq.next_element_seed(DescriptorSeed)? {
            list.push(descriptor);
        }
        Ok(list)
    }
}

struct DescriptorSeed;

impl<'de> DeserializeSeed<'de> for DescriptorSeed {
    type Value = Descriptor<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Descriptor<'de>, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for DescriptorSeed {
    type Value = Descriptor<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a descriptor")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Descriptor<'de>, A::Error> {
        let (mut digest, mut size, mut media_type, mut platform) = (None, None, None, None);
        while let Some(Text(key)) = map.next_key()? {
            match &*key {
                "digest" | "blobSum" => once::<A, Text>(&mut digest, &key, map.next_value()?)?,
                "size" => once::<A, i64>(&mut size, &key, map.next_value()?)?,
                "mediaType" => once::<A, Text>(&mut media_type, &key, map.next_value()?)?,
                "platform" => once::<A, Option<Platform>>(&mut platform, &key, map.next_value()?)?,
                other if is_other_spelling(other, &DESCRIPTOR_KEYS) => {
                    return Err(A::Error::custom(format!("a descriptor has a field {other:?}")));
                }
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        let Text(digest) = digest.ok_or_else(|| A::Error::missing_field("digest"))?;
        let digest = digest.parse().map_err(|e| A::Error::custom(format!("{digest:?} is {e}")))?;
        Ok(Descriptor {
            digest,
            size: size.unwrap_or(0).max(0).unsigned_abs(),
            media_type: media_type.map(|text: Text| text.0).unwrap_or_default(),
            platform: platform.flatten().and_then(Platform::into_name),
        })
    }
}

#[derive(serde::Deserialize)]
struct Platform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: String,
}

impl Platform {
    /// `linux-arm64-v8`.
    fn into_name(self) -> Option<String> {
        let parts = [self.os, self.architecture, self.variant];
        let name = parts.into_iter().filter(|p| !p.is_empty()).collect::<Vec<_>>().join("-");
        (!name.is_empty()).then_some(name)
    }
}

/// Collects every digest that stands in any string of a JSON value, alone or within a longer text.
struct Collect<'a>(&'a mut Vec<Digest>);

impl Collect<'_> {
    fn text(&mut self, text: &str) {
        for algorithm in Algorithm::ALL {
            for (at, _) in text.match_indices(algorithm.name()) {
                let rest = &text[at + algorithm.name().len()..];
                let hex = rest.strip_prefix([':', '-']).and_then(|r| r.get(..algorithm.size() * 2));
                self.0.extend(hex.and_then(|hex| Digest::from_parts(algorithm.name(), hex)));
            }
        }
    }
}

impl<'de> DeserializeSeed<'de> for Collect<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Collect<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_str<E>(mut self, text: &str) -> Result<(), E> {
        self.text(text);
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(Collect(self.0))?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while map.next_key_seed(Collect(self.0))?.is_some() {
            map.next_value_seed(Collect(self.0))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(n: u8) -> Digest {
        Digest::of(Algorithm::Sha256, &[n])
    }

    fn descriptor(n: u8) -> String {
        format!(r#"{{"mediaType":"m","digest":"{}","size":{n}}}"#, digest(n))
    }

    /// What a manifest holds, in the order config, layers, children, others.
    fn held(text: &str) -> Vec<Digest> {
        let m = parse(text.as_bytes()).unwrap();
        let named = m.config.iter().chain(&m.layers).chain(&m.children).map(|d| d.digest);
        named.chain(m.others.iter().copied()).collect()
    }

    #[test]
    fn known_types_are_decided_by_media_type_or_by_their_fields() {
        let (a, b) = (descriptor(1), descriptor(2));
        let cases = [
            (format!(r#"{{"mediaType":"{OCI_MANIFEST}","config":{a},"layers":[{b}]}}"#), Kind::Image),
            (format!(r#"{{"config":{a},"layers":[{b}]}}"#), Kind::Image),
            (format!(r#"{{"mediaType":"{OCI_INDEX}","manifests":[{a},{b}]}}"#), Kind::Index),
            (format!(r#"{{"manifests":[{a},{b}],"annotations":null}}"#), Kind::Index),
            (format!(r#"{{"mediaType":"{OCI_ARTIFACT}","blobs":[{a},{b}]}}"#), Kind::Image),
            (
                format!(
                    r#"{{"schemaVersion":1,"fsLayers":[{{"blobSum":"{}"}},{{"blobSum":"{}"}}],"history":[]}}"#,
                    digest(2),
                    digest(1)
                ),
                Kind::Schema1,
            ),
        ];
        for (text, kind) in cases {
            let manifest = parse(text.as_bytes()).unwrap();
            assert_eq!((manifest.kind, manifest.odd), (kind, None), "{text}");
            assert_eq!(held(&text), [digest(1), digest(2)], "{text}");
        }
    }

    #[test]
    fn odd_manifests_hold_every_digest_in_their_text() {
        let (a, b) = (descriptor(1), descriptor(2));
        let texts = [
            format!(r#"{{"mediaType":"application/x","deep":[[{{"x":{a}}}]],"{}":0}}"#, digest(2)),
            format!(r#"{{"layers":[{a}],"Layers":[{b}]}}"#),
            format!(r#"{{"layers":[{a}],"layers":[{b}]}}"#),
            format!(r#"{{"layers":[{a},{{"Digest":"{}"}}]}}"#, digest(2)),
            format!(r#"{{"layers":[{a},{{"digest":"md5:1","x":"repo@{}"}}]}}"#, digest(2)),
            format!(r#"{{"layers":{{"a":{a},"b":{b}}}}}"#),
            format!(r#"{{"mediaType":7,"layers":[{a},{b}]}}"#),
            format!(r#"{{"x":["sha256-{}","{}"]}}"#, digest(1).hex(), digest(2)),
        ];
        let mut both = [digest(1), digest(2)];
        both.sort_unstable();
        for text in texts {
            let manifest = parse(text.as_bytes()).unwrap();
            assert!(manifest.odd.is_some(), "{text}");
            assert!(both.iter().all(|d| manifest.others.contains(d)), "{text}: {:?}", manifest.others);
        }
    }

    #[test]
    fn what_is_no_json_object_is_an_error() {
        let deep = format!("{}{}", "{\"a\":".repeat(10_000), "1");
        let deep_list = format!("{{\"layers\":{}{}}}", "[".repeat(10_000), "]".repeat(10_000));
        for text in ["", "{", "[]", "null", "1", "\"x\"", "{} {}", "{\"a\":tru}", &deep, &deep_list] {
            assert!(parse(text.as_bytes()).is_err(), "{}", &text[..text.len().min(40)]);
        }
        assert!(parse(b"{\"a\":\"\xff\"}").is_err());
    }

    #[test]
    fn platforms_subjects_and_artifact_types_are_read() {
        let text = format!(
            r#"{{"manifests":[{{"digest":"{}","size":3,"platform":{{"os":"linux","architecture":"arm64","variant":"v8"}}}}]}}"#,
            digest(1)
        );
        assert_eq!(parse(text.as_bytes()).unwrap().children[0].platform.as_deref(), Some("linux-arm64-v8"));
        let text = format!(
            r#"{{"config":{{"mediaType":"application/spdx+json","digest":"{}","size":2}},"layers":[],"subject":{}}}"#,
            digest(1),
            descriptor(9)
        );
        let manifest = parse(text.as_bytes()).unwrap();
        assert_eq!(manifest.subject, Some(digest(9)));
        assert_eq!(manifest.artifact_type.as_deref(), Some("application/spdx+json"));
        assert_eq!(held(&text), [digest(1)], "a referrer does not hold its subject");
    }
}
