//! The parse cache: what manifests say, kept between processes.
//!
//! A manifest never changes, so what was parsed once holds for ever. The cache spares reading, hashing and parsing;
//! everything else is looked at anew. It may be removed at any time.
//!
//! # What is verified when
//! A manifest comes into the cache only after its bytes were hashed and matched its digest. Each block of the file
//! carries the SHA-256 of its own bytes; from a block that does not match on, nothing is believed, and the file is
//! written anew. An entry counts only as long as the blob is listed in the store. Whether its bytes are still
//! the same on the disk is not looked at: that they once were tells what the image holds. A file that somebody else
//! than this user or root may have written is not believed.
//!
//! # Layout
//! ```text
//! regfs manifests 1\n                                    what this is
//! <length: u32 LE><that many bytes: a Block><SHA-256>    again and again
//! ```
//! A file is replaced as a whole, when enough is new.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::intern::{DigestId, NameId};
use super::{Catalog, Descriptor, Manifest, Manifests, Parsed, Rare, Tables};
use crate::digest::{Algorithm, Digest};
use crate::error::{Error, Result};
use crate::layout;
use crate::manifest::Kind;
use crate::store::Store;

const MAGIC: &[u8] = b"regfs manifests 1\n";
const FILE: &str = "manifests";
/// Manifests in a block: about 400 KiB.
const BLOCK: usize = 2048;
/// Longest block that is read; a longer one is damage.
const BLOCK_LIMIT: usize = 256 << 20;
/// The file is written again when this part of it would be new, or is of no use any more.
const NEWS: usize = 32;

/// Where the cache is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In regfs's own directory inside the store.
    Store,
    /// A directory elsewhere.
    Directory(PathBuf),
}

/// Some manifests and what they say. Numbers count within the block.
#[derive(Serialize, Deserialize)]
struct Block<'a> {
    /// Media types and the like.
    #[serde(borrow)]
    names: Vec<&'a str>,
    /// SHA-256 digests, 32 bytes each.
    sha256: &'a [u8],
    /// Digests of other sorts; their numbers follow those of `sha256`.
    #[serde(borrow)]
    others: Vec<&'a str>,
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

/// What the cache knows; nothing where there is none. Never fails: a cache that can't be read is written anew.
pub fn load(store: &dyn Store, place: &Place, tables: &Tables) -> Manifests {
    let (path, file) = match place {
        Place::Store => {
            let path = Path::new(layout::CACHE).join(FILE);
            (store.full(&path), store.open(&path).map(|r| r.map(Source::Store)).map_err(|e| e.to_string()))
        }
        Place::Directory(directory) => {
            let path = directory.join(FILE);
            // A named pipe would keep us waiting for a writer.
            let file = match File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path) {
                Ok(file) => Ok(Some(Source::File(file))),
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(e.to_string()),
            };
            (path, file)
        }
    };
    let mut manifests = Manifests::new();
    let result = match file {
        Ok(Some(source)) => source.is_ours().and_then(|()| read_blocks(&source, &mut manifests, tables)),
        Ok(None) => Ok(()),
        Err(why) => Err(why),
    };
    if let Err(why) = result {
        log::warn!(
            "the cache {} can't be used from some place on: {why}; it is written anew",
            path.display()
        );
    }
    manifests
}

enum Source {
    Store(Box<dyn crate::store::Reader>),
    File(File),
}

impl Source {
    /// Whether nobody else can have written it. The checksums tell damage, not malice: who forges what a manifest
    /// names makes garbage of an image.
    fn is_ours(&self) -> std::result::Result<(), String> {
        let file = match self {
            Source::Store(reader) => reader.file(),
            Source::File(file) => Some(file),
        };
        let Some(file) = file else { return Ok(()) };
        let facts = file.metadata().map_err(|e| e.to_string())?;
        let is_own = facts.uid() == 0 || facts.uid() == rustix::process::geteuid().as_raw();
        match facts.is_file() && is_own && facts.mode() & 0o022 == 0 {
            true => Ok(()),
            false => Err("it is no file that only this user can write".to_string()),
        }
    }

    /// Fills `buffer` from `offset` on; less only at the end.
    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            let (rest, at) = (&mut buffer[filled..], offset + filled as u64);
            match match self {
                Source::Store(reader) => reader.read_at(rest, at),
                Source::File(file) => file.read_at(rest, at),
            } {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(filled)
    }
}

fn read_blocks(
    source: &Source,
    manifests: &mut Manifests,
    tables: &Tables,
) -> std::result::Result<(), String> {
    let mut start = [0; MAGIC.len()];
    source.read(&mut start, 0).map_err(|e| e.to_string())?;
    if start != MAGIC {
        return Err("it begins like no cache of this version".to_string());
    }
    let mut offset = MAGIC.len() as u64;
    let mut buffer = Vec::new();
    loop {
        let mut length = [0; 4];
        match source.read(&mut length, offset).map_err(|e| e.to_string())? {
            0 => return Ok(()),
            4 => {}
            _ => return Err("it is cut off".to_string()),
        }
        let length = u32::from_le_bytes(length) as usize;
        if length > BLOCK_LIMIT {
            return Err("a block is too long".to_string());
        }
        buffer.resize(length + 32, 0);
        if source.read(&mut buffer, offset + 4).map_err(|e| e.to_string())? != length + 32 {
            return Err("it is cut off".to_string());
        }
        let (payload, sum) = buffer.split_at(length);
        if Digest::of(Algorithm::Sha256, payload).as_bytes() != sum {
            return Err("a block does not match its checksum".to_string());
        }
        let block: Block<'_> = postcard::from_bytes(payload).map_err(|e| e.to_string())?;
        block.into_manifests(manifests, tables).ok_or("a block holds numbers out of range")?;
        offset += 4 + length as u64 + 32;
    }
}

impl Block<'_> {
    /// `None`: a number is out of range.
    fn into_manifests(self, manifests: &mut Manifests, tables: &Tables) -> Option<()> {
        let (sha256, rest) = self.sha256.as_chunks::<32>();
        if !rest.is_empty() {
            return None;
        }
        let mut digests: Vec<DigestId> = Vec::with_capacity(sha256.len() + self.others.len());
        for sha256 in sha256.chunks(512) {
            let sha256 = sha256.iter().map(|bytes| Digest::from_bytes(Algorithm::Sha256, bytes));
            digests.extend(tables.digests.intern_all(&sha256.collect::<Vec<Digest>>()));
        }
        for text in &self.others {
            digests.push(tables.digests.intern(&text.parse().ok()?));
        }
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

/// Keeps what `catalog` knows, if much of it is news or much of the cache is of no use any more.
pub fn save(store: &dyn Store, place: &Place, catalog: &Catalog) -> Result<()> {
    let known = &catalog.tables.known;
    let parsed = catalog.manifests.iter().filter(|(_, m)| m.parsed().is_some());
    let (old, new): (Vec<DigestId>, Vec<DigestId>) =
        parsed.map(|(id, _)| *id).partition(|id| known.contains_key(id));
    let useless = known.len() - old.len();
    if (new.len() + useless) * NEWS <= known.len() {
        return Ok(());
    }
    let ids: Vec<DigestId> = old.into_iter().chain(new).collect();
    let write = |to: &mut dyn Write| write_blocks(to, catalog, &ids);
    match place {
        Place::Store => store.write_with(&Path::new(layout::CACHE).join(FILE), &write),
        Place::Directory(directory) => {
            write_file(directory, &write).map_err(|e| Error::io("write the cache", &directory.join(FILE), e))
        }
    }
}

fn write_file(directory: &Path, write: &dyn Fn(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let temporary = directory.join(format!("{FILE}.{}.tmp", std::process::id()));
    let result = (|| {
        // Something that was planted, as a link to another file, is not written to.
        match fs::remove_file(&temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let file = File::options().write(true).create_new(true).mode(0o600).open(&temporary)?;
        let mut buffered = io::BufWriter::new(file);
        write(&mut buffered)?;
        buffered.flush()?;
        fs::rename(&temporary, directory.join(FILE))
    })();
    if result.is_err() {
        // Only tidying up after what is reported.
        let _ = fs::remove_file(&temporary);
    }
    result
}

fn write_blocks(to: &mut dyn Write, catalog: &Catalog, ids: &[DigestId]) -> io::Result<()> {
    to.write_all(MAGIC)?;
    for ids in ids.chunks(BLOCK) {
        let payload = block(catalog, ids).map_err(io::Error::other)?;
        to.write_all(&(payload.len() as u32).to_le_bytes())?;
        to.write_all(&payload)?;
        to.write_all(Digest::of(Algorithm::Sha256, &payload).as_bytes())?;
    }
    Ok(())
}

/// Numbers for what occurs in a block, in the order of first occurrence.
struct Numbers<T>(std::collections::HashMap<T, u32>, Vec<T>);

impl<T: Copy + Eq + std::hash::Hash> Numbers<T> {
    fn new() -> Numbers<T> {
        Numbers(std::collections::HashMap::new(), Vec::new())
    }

    fn number(&mut self, of: T) -> u32 {
        *self.0.entry(of).or_insert_with(|| {
            self.1.push(of);
            self.1.len() as u32 - 1
        })
    }
}

fn block(catalog: &Catalog, ids: &[DigestId]) -> postcard::Result<Vec<u8>> {
    let tables = &catalog.tables;
    let mut names: Numbers<NameId> = Numbers::new();
    let mut digests: Numbers<DigestId> = Numbers::new();
    // SHA-256 digests have the first numbers: those of the others are known when all are.
    let manifests: Vec<(DigestId, &Parsed)> =
        ids.iter().filter_map(|id| Some((*id, catalog.parsed(*id)?))).collect();
    let (mut usual, mut unusual) = (Vec::new(), Vec::new());
    for (id, parsed) in &manifests {
        let below = parsed.references().into_iter().chain(parsed.subject());
        for id in std::iter::once(*id).chain(below) {
            match tables.digests.get(id).algorithm() {
                Algorithm::Sha256 => usual.push(id),
                Algorithm::Sha384 | Algorithm::Sha512 => unusual.push(id),
            }
        }
    }
    for id in usual.into_iter().chain(unusual) {
        digests.number(id);
    }
    let mut entries = Vec::with_capacity(manifests.len());
    for (id, parsed) in manifests {
        let rare = parsed.rare.as_ref().map(|rare| RareEntry {
            artifact_type: rare.artifact_type.map(|t| names.number(t)),
            subject: rare.subject.map(|s| digests.number(s)),
            platforms: rare.platforms.iter().map(|p| p.map(|p| names.number(p))).collect(),
            others: rare.others.iter().map(|o| digests.number(*o)).collect(),
            odd: rare.odd.as_deref(),
        });
        let named = parsed.named.iter();
        entries.push(Entry {
            digest: digests.number(id),
            media_type: names.number(parsed.media_type),
            size: parsed.size,
            kind: KINDS.iter().position(|kind| *kind == parsed.kind).unwrap_or(KINDS.len()) as u8,
            has_config: parsed.has_config,
            layers: parsed.layers,
            named: named.map(|d| (digests.number(d.digest), names.number(d.media_type), d.size)).collect(),
            rare,
        });
    }
    let texts: Vec<Arc<OsStr>> = names.1.iter().map(|id| tables.names.get(*id)).collect();
    let all: Vec<Digest> = digests.1.iter().map(|id| tables.digests.get(*id)).collect();
    let (usual, unusual): (Vec<&Digest>, Vec<&Digest>) =
        all.iter().partition(|d| d.algorithm() == Algorithm::Sha256);
    let sha256: Vec<u8> = usual.iter().flat_map(|d| d.as_bytes().iter().copied()).collect();
    let unusual: Vec<String> = unusual.iter().map(ToString::to_string).collect();
    postcard::to_allocvec(&Block {
        // Media types come from JSON strings, so they are text.
        names: texts.iter().map(|text| text.to_str().unwrap_or_default()).collect(),
        sha256: &sha256,
        others: unusual.iter().map(String::as_str).collect(),
        manifests: entries,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::scan::scan;
    use crate::store::memory::Memory;

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
        let name = |id: &NameId| catalog.name(*id).display().to_string();
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
            save(&store, &place, &first).unwrap();
            let tables = Tables::default();
            let known = load(&store, &place, &tables);
            assert_eq!(known.len(), 3);
            let tables = Tables { known: Arc::new(known), ..tables };
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
        save(&store, &place, &first).unwrap();
        let path = directory.path().join(FILE);
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            fs::write(&path, &damaged).unwrap();
            assert!(load(&store, &place, &Tables::default()).is_empty(), "byte {at}");
            fs::write(&path, &whole[..at]).unwrap();
            assert!(load(&store, &place, &Tables::default()).is_empty(), "cut at {at}");
        }
        // The next run writes it anew.
        save(&store, &place, &first).unwrap();
        assert_eq!(load(&store, &place, &Tables::default()).len(), 3);
    }

    #[test]
    fn a_manifest_whose_blob_is_gone_does_not_come_from_the_cache() {
        let store = store();
        let first = scan(&store, &Tables::default(), None);
        save(&store, &Place::Store, &first).unwrap();
        let gone = *first.manifests.iter().find(|(_, m)| m.parsed().is_some()).unwrap().0;
        let digest = first.digest(gone);
        assert!(store.remove(&[layout::blob_data(&digest)]).is_empty());
        let tables = Tables::default();
        let tables = Tables { known: Arc::new(load(&store, &Place::Store, &tables)), ..tables };
        let second = scan(&store, &tables, None);
        let id = tables.digests.find(&digest).unwrap();
        assert!(matches!(*second.manifests[&id], Manifest::Missing));
    }
}
