//! What an earlier process found out, kept in files: what manifests say (`manifests`), and where links point
//! (`links`).
//!
//! Either may be removed at any time. Each block of a file carries the SHA-256 of its own bytes; from a block that does
//! not match on, nothing is believed, and the file is written anew. A file that somebody else than this user or root
//! may have written is not believed.
//!
//! # Layout
//! ```text
//! regfs manifests 1\n                                    what this is
//! <length: u32 LE><that many bytes: a block><SHA-256>    again and again
//! ```
//! A file is replaced as a whole, when enough is new.

mod links;
mod manifests;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::intern::DigestId;
use super::{Catalog, Manifests, Tables};
use crate::digest::{Algorithm, Digest};
use crate::error::{Error, Result};
use crate::layout;
use crate::printable::Printable;
use crate::store::Store;

/// Longest block that is read; a longer one is damage.
const BLOCK_LIMIT: usize = 256 << 20;
/// A file is written again when this part of it would be new, or is of no use any more.
const NEWS: usize = 32;

/// Where the cache is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In regfs's own directory inside the store.
    Store,
    /// A directory elsewhere.
    Directory(PathBuf),
}

/// Which files are to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct News {
    manifests: bool,
    links: bool,
}

impl News {
    /// Compares what a scan found with what [`load`] gave it.
    pub fn of(found: &Catalog, links: &Catalog) -> News {
        News { manifests: manifests::is_news(found), links: links::is_news(found, links) }
    }
}

/// What the cache knows; nothing where there is none: the tables with what manifests say, and tags and revisions as they
/// were, with nothing else in that catalog. Never fails: a cache that can't be read is written anew.
pub fn load(store: &dyn Store, place: &Place, tables: &Tables) -> (Tables, Catalog) {
    let mut known = Manifests::new();
    each_block(store, place, manifests::FILE, manifests::MAGIC, &mut |block| {
        manifests::read(block, &mut known, tables)
    });
    let mut links = Catalog { tables: tables.clone(), ..Catalog::empty() };
    each_block(store, place, links::FILE, links::MAGIC, &mut |block| links::read(block, &mut links));
    (Tables { known: Arc::new(known), ..tables.clone() }, links)
}

/// Keeps what `catalog` knows, as far as it is news.
pub fn save(store: &dyn Store, place: &Place, catalog: &Catalog, news: News) -> Result<()> {
    let files: [(bool, &str, &[u8], Blocks<'_>); 2] = [
        (news.manifests, manifests::FILE, manifests::MAGIC, &|each| manifests::blocks(catalog, each)),
        (news.links, links::FILE, links::MAGIC, &|each| links::blocks(catalog, each)),
    ];
    for (_, name, magic, blocks) in files.into_iter().filter(|(is_news, ..)| *is_news) {
        let write = |to: &mut dyn Write| write_blocks(to, magic, blocks);
        match place {
            Place::Store => store.write_with(&Path::new(layout::CACHE).join(name), &write)?,
            Place::Directory(directory) => write_file(directory, name, &write)
                .map_err(|e| Error::io("write the cache", &directory.join(name), e))?,
        }
    }
    Ok(())
}

/// Makes the blocks of a file one after the other, and passes each on.
type Blocks<'a> = &'a dyn Fn(&mut dyn FnMut(Vec<u8>) -> io::Result<()>) -> io::Result<()>;

fn write_blocks(to: &mut dyn Write, magic: &[u8], blocks: Blocks<'_>) -> io::Result<()> {
    to.write_all(magic)?;
    blocks(&mut |block| {
        to.write_all(&(block.len() as u32).to_le_bytes())?;
        to.write_all(&block)?;
        to.write_all(Digest::of(Algorithm::Sha256, &block).as_bytes())
    })
}

/// Passes on each block of a file, up to the first one that can't be used.
fn each_block(
    store: &dyn Store,
    place: &Place,
    name: &str,
    magic: &[u8],
    each: &mut dyn FnMut(&[u8]) -> std::result::Result<(), String>,
) {
    let result = match Source::open(store, place, name) {
        Ok(Some(source)) => source.is_ours().and_then(|()| source.blocks(magic, each)),
        Ok(None) => Ok(()),
        Err(why) => Err(why),
    };
    if let Err(why) = result {
        let path = match place {
            Place::Store => store.full(&Path::new(layout::CACHE).join(name)),
            Place::Directory(directory) => directory.join(name),
        };
        log::warn!(
            "the cache {} can't be used from some place on: {why}; it is written anew",
            path.printable()
        );
    }
}

enum Source {
    Store(Box<dyn crate::store::Reader>),
    File(File),
}

impl Source {
    /// The file `name`, if there is one.
    fn open(store: &dyn Store, place: &Place, name: &str) -> std::result::Result<Option<Source>, String> {
        match place {
            Place::Store => {
                let file = store.open(&Path::new(layout::CACHE).join(name));
                file.map(|reader| reader.map(Source::Store)).map_err(|e| e.to_string())
            }
            // A named pipe would keep us waiting for a writer.
            Place::Directory(directory) => {
                match File::options().read(true).custom_flags(libc::O_NONBLOCK).open(directory.join(name)) {
                    Ok(file) => Ok(Some(Source::File(file))),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                    Err(e) => Err(e.to_string()),
                }
            }
        }
    }

    /// Facts about it, if it is a file.
    fn facts(&self) -> std::result::Result<Option<fs::Metadata>, String> {
        let file = match self {
            Source::Store(reader) => reader.file(),
            Source::File(file) => Some(file),
        };
        file.map(File::metadata).transpose().map_err(|e| e.to_string())
    }

    /// Whether nobody else can have written it. The checksums tell damage, not malice: who forges what a manifest
    /// names makes garbage of an image.
    fn is_ours(&self) -> std::result::Result<(), String> {
        let Some(facts) = self.facts()? else { return Ok(()) };
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

    fn blocks(
        &self,
        magic: &[u8],
        each: &mut dyn FnMut(&[u8]) -> std::result::Result<(), String>,
    ) -> std::result::Result<(), String> {
        let mut buffer = vec![0; magic.len()];
        self.read(&mut buffer, 0).map_err(|e| e.to_string())?;
        if buffer != magic {
            return Err("it begins like no cache of this version".to_string());
        }
        let mut offset = magic.len() as u64;
        let size = self.facts()?.map_or(u64::MAX, |facts| facts.len());
        loop {
            let mut length = [0; 4];
            match self.read(&mut length, offset).map_err(|e| e.to_string())? {
                0 => return Ok(()),
                4 => {}
                _ => return Err("it is cut off".to_string()),
            }
            let length = u32::from_le_bytes(length) as usize;
            if length > BLOCK_LIMIT || length as u64 > size.saturating_sub(offset) {
                return Err("a block is too long".to_string());
            }
            buffer.resize(length + 32, 0);
            if self.read(&mut buffer, offset + 4).map_err(|e| e.to_string())? != length + 32 {
                return Err("it is cut off".to_string());
            }
            let (block, sum) = buffer.split_at(length);
            if Digest::of(Algorithm::Sha256, block).as_bytes() != sum {
                return Err("a block does not match its checksum".to_string());
            }
            each(block)?;
            offset += 4 + length as u64 + 32;
        }
    }
}

fn write_file(
    directory: &Path,
    name: &str,
    write: &dyn Fn(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let temporary = directory.join(format!("{name}.{}.tmp", std::process::id()));
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
        fs::rename(&temporary, directory.join(name))
    })();
    if result.is_err() {
        // Only tidying up after what is reported.
        let _ = fs::remove_file(&temporary);
    }
    result
}

/// Numbers for what occurs in a block, in the order of first occurrence.
struct Numbers<T>(HashMap<T, u32>, Vec<T>);

impl<T: Copy + Eq + std::hash::Hash> Numbers<T> {
    fn new() -> Numbers<T> {
        Numbers(HashMap::new(), Vec::new())
    }

    fn number(&mut self, of: T) -> u32 {
        *self.0.entry(of).or_insert_with(|| {
            self.1.push(of);
            self.1.len() as u32 - 1
        })
    }
}

/// The digests that occur in a block: SHA-256 digests have the first numbers.
struct Digests {
    numbers: Numbers<DigestId>,
    /// 32 bytes each.
    sha256: Vec<u8>,
    /// Those of other sorts, as text.
    others: Vec<String>,
}

impl Digests {
    fn of(ids: impl Iterator<Item = DigestId>, tables: &Tables) -> Digests {
        let is_usual = |id: &DigestId| tables.digests.get(*id).algorithm() == Algorithm::Sha256;
        let (usual, unusual): (Vec<DigestId>, Vec<DigestId>) = ids.partition(is_usual);
        let mut numbers = Numbers::new();
        for id in usual.into_iter().chain(unusual) {
            numbers.number(id);
        }
        let all: Vec<Digest> = numbers.1.iter().map(|id| tables.digests.get(*id)).collect();
        let (usual, unusual): (Vec<&Digest>, Vec<&Digest>) =
            all.iter().partition(|d| d.algorithm() == Algorithm::Sha256);
        let sha256 = usual.iter().flat_map(|d| d.as_bytes().iter().copied()).collect();
        let others = unusual.iter().map(ToString::to_string).collect();
        Digests { numbers, sha256, others }
    }

    fn list(&self) -> DigestList<'_> {
        DigestList { sha256: &self.sha256, others: self.others.iter().map(String::as_str).collect() }
    }
}

/// The same in a file; the place in it is the number.
#[derive(Serialize, Deserialize)]
struct DigestList<'a> {
    sha256: &'a [u8],
    #[serde(borrow)]
    others: Vec<&'a str>,
}

impl DigestList<'_> {
    /// `None`: one is none.
    fn intern(&self, tables: &Tables) -> Option<Vec<DigestId>> {
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
        Some(digests)
    }
}
