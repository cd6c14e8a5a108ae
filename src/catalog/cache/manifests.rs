//! What manifests say, kept between processes.
//!
//! A manifest never changes, so what was parsed once holds for ever. This spares reading, hashing and parsing.
//!
//! # What is verified when
//! A manifest comes into the cache only after its bytes were hashed and matched its digest. An entry counts only as long
//! as the blob is listed in the store. Whether its bytes are still the same on the disk is not looked at: that they once
//! were tells what the image holds.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{DigestList, Digests, NEWS, Numbers};
use crate::catalog::intern::{DigestId, NameId};
use crate::catalog::{Catalog, Descriptor, Manifest, Manifests, Parsed, Rare, Tables};
use crate::manifest::Kind;

pub(super) const MAGIC: &[u8] = b"regfs manifests 1\n";
pub(super) const FILE: &str = "manifests";
/// Manifests in a block: about 400 KiB.
const BLOCK: usize = 2048;

/// Some manifests and what they say. Numbers count within the block.
#[derive(Serialize, Deserialize)]
struct Block<'a> {
    /// Media types and the like.
    #[serde(borrow)]
    names: Vec<&'a str>,
    #[serde(borrow)]
    digests: DigestList<'a>,
    #[serde(borrow)]
    manifests: Vec<Entry<'a>>,
}

#[derive(Serialize, Deserialize)]
struct Entry<'a> {
    digest: u32,
    media_type: u32,
    size: u32,
    kind: u8,
    has_config: bool,
    layers: u32,
    /// Digest, media type, size.
    named: Vec<(u32, u32, u64)>,
    #[serde(borrow)]
    rare: Option<RareEntry<'a>>,
}

#[derive(Serialize, Deserialize)]
struct RareEntry<'a> {
    artifact_type: Option<u32>,
    subject: Option<u32>,
    platforms: Vec<Option<u32>>,
    others: Vec<u32>,
    #[serde(borrow)]
    odd: Option<&'a str>,
}

const KINDS: [Kind; 4] = [Kind::Image, Kind::Index, Kind::Schema1, Kind::Unknown];

/// Takes in a block.
pub(super) fn read(block: &[u8], manifests: &mut Manifests, tables: &Tables) -> Result<(), String> {
    let block: Block<'_> = postcard::from_bytes(block).map_err(|e| e.to_string())?;
    block.into_manifests(manifests, tables).ok_or_else(|| "a block holds numbers out of range".to_string())
}

impl Block<'_> {
    /// `None`: a number is out of range.
    fn into_manifests(self, manifests: &mut Manifests, tables: &Tables) -> Option<()> {
        let digests = self.digests.intern(tables)?;
        let names: Vec<NameId> =
            self.names.iter().map(|name| tables.names.intern(OsStr::new(name))).collect();
        let digest = |n: u32| digests.get(n as usize).copied();
        let name = |n: u32| names.get(n as usize).copied();
        for entry in self.manifests {
            if entry.has_config as usize + entry.layers as usize > entry.named.len() {
                return None;
            }
            // As long as it will be from the start: what is cut off later leaves holes between millions of these.
            let mut named = Vec::with_capacity(entry.named.len());
            for (of, media_type, size) in &entry.named {
                named.push(Descriptor { size: *size, digest: digest(*of)?, media_type: name(*media_type)? });
            }
            let rare = match entry.rare {
                None => None,
                Some(rare) => Some(Box::new(Rare {
                    artifact_type: optional(rare.artifact_type, name)?,
                    subject: optional(rare.subject, digest)?,
                    platforms: rare
                        .platforms
                        .into_iter()
                        .map(|p| optional(p, name))
                        .collect::<Option<_>>()?,
                    others: rare.others.into_iter().map(digest).collect::<Option<_>>()?,
                    odd: rare.odd.map(Into::into),
                })),
            };
            let parsed = Parsed {
                media_type: name(entry.media_type)?,
                size: entry.size,
                kind: *KINDS.get(entry.kind as usize)?,
                named: named.into(),
                layers: entry.layers,
                has_config: entry.has_config,
                is_simple: false,
                rare,
            };
            manifests.insert(digest(entry.digest)?, Arc::new(Manifest::Parsed(parsed.with_simplicity())));
        }
        Some(())
    }
}

/// A number that may be left out, but not be out of range.
fn optional<T>(number: Option<u32>, find: impl Fn(u32) -> Option<T>) -> Option<Option<T>> {
    match number {
        None => Some(None),
        Some(number) => find(number).map(Some),
    }
}

/// Whether much of what `catalog` knows is news, or much of what was known is of no use any more.
pub(super) fn is_news(catalog: &Catalog) -> bool {
    let known = &catalog.tables.known;
    let parsed = catalog.manifests.iter().filter(|(_, m)| m.parsed().is_some());
    let (old, new): (Vec<&DigestId>, Vec<&DigestId>) =
        parsed.map(|(id, _)| id).partition(|id| known.contains_key(*id));
    (new.len() + known.len() - old.len()) * NEWS > known.len()
}

/// Makes the blocks: what was known before first.
pub(super) fn blocks(catalog: &Catalog, each: &mut dyn FnMut(Vec<u8>) -> io::Result<()>) -> io::Result<()> {
    let parsed = catalog.manifests.iter().filter(|(_, m)| m.parsed().is_some()).map(|(id, _)| *id);
    let (old, new): (Vec<DigestId>, Vec<DigestId>) =
        parsed.partition(|id| catalog.tables.known.contains_key(id));
    let ids: Vec<DigestId> = old.into_iter().chain(new).collect();
    ids.chunks(BLOCK).try_for_each(|ids| each(block(catalog, ids).map_err(io::Error::other)?))
}

fn block(catalog: &Catalog, ids: &[DigestId]) -> postcard::Result<Vec<u8>> {
    let tables = &catalog.tables;
    let mut names: Numbers<NameId> = Numbers::new();
    let manifests: Vec<(DigestId, &Parsed)> =
        ids.iter().filter_map(|id| Some((*id, catalog.parsed(*id)?))).collect();
    let occurring = manifests
        .iter()
        .flat_map(|(id, parsed)| std::iter::once(*id).chain(parsed.references()).chain(parsed.subject()));
    let mut digests = Digests::of(occurring, tables);
    let mut entries = Vec::with_capacity(manifests.len());
    for (id, parsed) in manifests {
        let rare = parsed.rare.as_ref().map(|rare| RareEntry {
            artifact_type: rare.artifact_type.map(|t| names.number(t)),
            subject: rare.subject.map(|s| digests.numbers.number(s)),
            platforms: rare.platforms.iter().map(|p| p.map(|p| names.number(p))).collect(),
            others: rare.others.iter().map(|o| digests.numbers.number(*o)).collect(),
            odd: rare.odd.as_deref(),
        });
        let named = parsed.named.iter();
        entries.push(Entry {
            digest: digests.numbers.number(id),
            media_type: names.number(parsed.media_type),
            size: parsed.size,
            kind: KINDS.iter().position(|kind| *kind == parsed.kind).unwrap_or(KINDS.len()) as u8,
            has_config: parsed.has_config,
            layers: parsed.layers,
            named: named
                .map(|d| (digests.numbers.number(d.digest), names.number(d.media_type), d.size))
                .collect(),
            rare,
        });
    }
    let texts: Vec<Arc<OsStr>> = names.1.iter().map(|id| tables.names.get(*id)).collect();
    postcard::to_allocvec(&Block {
        // Media types come from JSON strings, so they are text.
        names: texts.iter().map(|text| text.to_str().unwrap_or_default()).collect(),
        digests: digests.list(),
        manifests: entries,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::catalog::cache::{News, Place, load, save};
    use crate::catalog::scan::scan;
    use crate::digest::{Algorithm, Digest};
    use crate::layout;
    use crate::store::Store;
    use crate::store::memory::Memory;

    const ALL: News = News { manifests: true, links: true };

    /// A store with one image under an odd number of digests, an index and an artifact.
    fn store() -> Memory {
        let store = Memory::default();
        let hex = |c: &str| c.repeat(64);
        let texts = [
            format!(
                r#"{{"schemaVersion":2,"config":{{"digest":"sha256:{}","size":1,"mediaType":"c"}},
                "layers":[{{"digest":"sha256:{}","size":5000000000}},{{"digest":"sha512:{}","size":3}}]}}"#,
                hex("a"),
                hex("b"),
                hex("c").repeat(2)
            ),
            format!(
                r#"{{"schemaVersion":2,"manifests":[{{"digest":"sha256:{}","size":1,"platform":{{"os":"linux","architecture":"arm"}}}},
                {{"digest":"sha256:{}","size":1}}],"subject":{{"digest":"sha256:{}","size":1}}}}"#,
                hex("d"),
                hex("d"),
                hex("e")
            ),
            format!(r#"{{"mediaType":"x/y","what":"see sha256:{}"}}"#, hex("f")),
        ];
        for text in texts {
            let digest = Digest::of(Algorithm::Sha256, text.as_bytes());
            store.write(&layout::blob_data(&digest), text.as_bytes()).unwrap();
            let link = layout::revision_link(Path::new("a"), &digest);
            store.write(&link, digest.to_string().as_bytes()).unwrap();
        }
        store
    }

    fn texts(catalog: &Catalog) -> Vec<String> {
        let digest = |id: &DigestId| catalog.digest(*id).to_string();
        let name = |id: &NameId| catalog.name(*id).to_string_lossy().into_owned();
        let mut texts: Vec<String> = catalog
            .manifests
            .iter()
            .filter_map(|(id, m)| Some((id, m.parsed()?)))
            .map(|(id, p)| {
                let named: Vec<_> =
                    p.named.iter().map(|d| (digest(&d.digest), name(&d.media_type), d.size)).collect();
                let platforms: Vec<_> =
                    p.platforms().map(|(_, name)| name.map(|n| catalog.name(n))).collect();
                let others: Vec<_> = p.others().iter().map(digest).collect();
                let subject = p.subject().map(|s| digest(&s));
                let (kind, simple, odd) = (p.kind, p.is_simple, p.odd());
                format!(
                    "{} {} {} {kind:?} {simple} {named:?} {:?} {} {platforms:?} {others:?} {subject:?} {odd:?} {:?}",
                    digest(id), name(&p.media_type), p.size, p.config().map(|d| digest(&d.digest)), p.layers().len(),
                    p.artifact_type().map(|t| name(&t)),
                )
            })
            .collect();
        texts.sort();
        texts
    }

    #[test]
    fn what_was_saved_is_loaded_by_another_process() {
        let store = store();
        let first = scan(&store, &Tables::default(), None);
        assert_eq!(first.manifests.len(), 4, "three and the child that is missing");
        let directory = tempfile::tempdir().unwrap();
        for place in [Place::Store, Place::Directory(directory.path().join("new"))] {
            save(&store, &place, &first, ALL).unwrap();
            let tables = Tables::default();
            let tables = load(&store, &place, &tables).0;
            assert_eq!(tables.known.len(), 3);
            let second = scan(&store, &tables, None);
            assert_eq!(texts(&second), texts(&first));
            assert!(
                second
                    .manifests
                    .iter()
                    .all(|(id, m)| m.parsed().is_none() || Arc::ptr_eq(m, &tables.known[id]))
            );
        }
    }

    #[test]
    fn a_damaged_cache_is_never_believed() {
        let store = store();
        let first = scan(&store, &Tables::default(), None);
        let directory = tempfile::tempdir().unwrap();
        let place = Place::Directory(directory.path().to_path_buf());
        save(&store, &place, &first, ALL).unwrap();
        let path = directory.path().join(FILE);
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            fs::write(&path, &damaged).unwrap();
            assert!(load(&store, &place, &Tables::default()).0.known.is_empty(), "byte {at}");
            fs::write(&path, &whole[..at]).unwrap();
            assert!(load(&store, &place, &Tables::default()).0.known.is_empty(), "cut at {at}");
        }
        // The next run writes it anew.
        save(&store, &place, &first, ALL).unwrap();
        assert_eq!(load(&store, &place, &Tables::default()).0.known.len(), 3);
    }

    #[test]
    fn a_manifest_whose_blob_is_gone_does_not_come_from_the_cache() {
        let store = store();
        let first = scan(&store, &Tables::default(), None);
        save(&store, &Place::Store, &first, ALL).unwrap();
        let gone = *first.manifests.iter().find(|(_, m)| m.parsed().is_some()).unwrap().0;
        let digest = first.digest(gone);
        assert!(store.remove(&[layout::blob_data(&digest)]).is_empty());
        let tables = Tables::default();
        let tables = load(&store, &Place::Store, &tables).0;
        let second = scan(&store, &tables, None);
        let id = tables.digests.find(&digest).unwrap();
        assert!(matches!(*second.manifests[&id], Manifest::Missing));
    }
}
