//! Digests and names as small numbers.
//!
//! Numbers are handed out in order and never taken back while the process lives, so they can stand in inode
//! numbers and in flat arrays. One table of each is shared by all catalogs of a store.
//!
//! # Cost
//! A SHA-256 digest takes 32 bytes and about 5 more in the hash table.

use std::ffi::{OsStr, OsString};
use std::hash::BuildHasher;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, PoisonError, RwLock};

use hashbrown::{DefaultHashBuilder, HashTable};

use crate::digest::{Algorithm, Digest};

/// Number of a digest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DigestId(pub u32);

/// Number of a name: of a repository, a tag, an upload, a path in the trash.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct NameId(pub u32);

impl DigestId {
    /// As an index into an array with an element per digest.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// All digests met so far.
#[derive(Default)]
pub struct Digests(RwLock<DigestTable>);

#[derive(Default)]
struct DigestTable {
    /// Where each digest lies: SHA-256 ones (nearly all) packed, the others as they are.
    places: Vec<Place>,
    packed: Vec<[u8; 32]>,
    others: Vec<Digest>,
    numbers: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

#[derive(Clone, Copy)]
struct Place(u32);

/// Set in a [`Place`] that points into `others`.
const OTHER: u32 = 1 << 31;

impl DigestTable {
    fn get(&self, number: u32) -> Digest {
        match self.places[number as usize].0 {
            place if place & OTHER != 0 => self.others[(place & !OTHER) as usize],
            place => Digest::from_bytes(Algorithm::Sha256, &self.packed[place as usize]),
        }
    }

    fn find(&self, digest: &Digest) -> Option<u32> {
        let hash = self.hasher.hash_one(digest.as_bytes());
        self.numbers.find(hash, |&n| self.get(n) == *digest).copied()
    }

    fn add(&mut self, digest: &Digest) -> u32 {
        let number = self.places.len() as u32;
        let place = match digest.algorithm() {
            Algorithm::Sha256 => {
                let mut bytes = [0; 32];
                bytes.copy_from_slice(digest.as_bytes());
                self.packed.push(bytes);
                self.packed.len() as u32 - 1
            }
            Algorithm::Sha384 | Algorithm::Sha512 => {
                self.others.push(*digest);
                (self.others.len() as u32 - 1) | OTHER
            }
        };
        self.places.push(Place(place));
        let mut numbers = std::mem::take(&mut self.numbers);
        let hash = |digest: &Digest| self.hasher.hash_one(digest.as_bytes());
        numbers.insert_unique(hash(digest), number, |&n| hash(&self.get(n)));
        self.numbers = numbers;
        number
    }
}

impl Digests {
    /// The number of `digest`, a new one if it has none.
    pub fn intern(&self, digest: &Digest) -> DigestId {
        if let Some(id) = self.find(digest) {
            return id;
        }
        // Every change below leaves the table whole, so one that panicked elsewhere did no harm to it.
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let found = table.find(digest);
        DigestId(found.unwrap_or_else(|| table.add(digest)))
    }

    /// The number of `digest` if it has one.
    pub fn find(&self, digest: &Digest) -> Option<DigestId> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).find(digest).map(DigestId)
    }

    /// The digest that `id` stands for; `None` for a number never handed out (an inode number from outside).
    pub fn checked(&self, id: DigestId) -> Option<Digest> {
        let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
        (id.index() < table.places.len()).then(|| table.get(id.0))
    }

    /// The digest that `id` stands for; `id` was handed out by this table.
    pub fn get(&self, id: DigestId) -> Digest {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(id.0)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.read().unwrap_or_else(PoisonError::into_inner).places.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A set of digests, a bit for each number.
#[derive(Clone, Debug, Default)]
pub struct IdSet(Vec<u64>);

impl IdSet {
    /// Whether `id` is in it.
    pub fn contains(&self, id: DigestId) -> bool {
        self.0.get(id.index() / 64).is_some_and(|word| word >> (id.index() % 64) & 1 == 1)
    }

    /// Adds `id`; `false` when it was in it already.
    pub fn insert(&mut self, id: DigestId) -> bool {
        let (at, bit) = (id.index() / 64, 1 << (id.index() % 64));
        if at >= self.0.len() {
            self.0.resize(at + 1, 0);
        }
        let was = self.0[at] & bit != 0;
        self.0[at] |= bit;
        !was
    }
}

impl<'a> Extend<&'a DigestId> for IdSet {
    fn extend<I: IntoIterator<Item = &'a DigestId>>(&mut self, ids: I) {
        for id in ids {
            self.insert(*id);
        }
    }
}

impl FromIterator<DigestId> for IdSet {
    fn from_iter<I: IntoIterator<Item = DigestId>>(ids: I) -> IdSet {
        let mut set = IdSet::default();
        for id in ids {
            set.insert(id);
        }
        set
    }
}

/// All names met so far; any bytes.
#[derive(Default)]
pub struct Names(RwLock<NameTable>);

#[derive(Default)]
struct NameTable {
    names: Vec<Arc<OsStr>>,
    numbers: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

impl NameTable {
    fn find(&self, name: &OsStr) -> Option<u32> {
        let hash = self.hasher.hash_one(name.as_bytes());
        self.numbers.find(hash, |&n| &*self.names[n as usize] == name).copied()
    }
}

impl Names {
    /// The number of `name`, a new one if it has none.
    pub fn intern(&self, name: &OsStr) -> NameId {
        if let Some(id) = self.find(name) {
            return id;
        }
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(number) = table.find(name) {
            return NameId(number);
        }
        let number = table.names.len() as u32;
        table.names.push(OsString::from(name).into());
        let NameTable { names, numbers, hasher } = &mut *table;
        let hash = |name: &OsStr| hasher.hash_one(name.as_bytes());
        numbers.insert_unique(hash(name), number, |&n| hash(&names[n as usize]));
        NameId(number)
    }

    /// The number of `name` if it has one.
    pub fn find(&self, name: &OsStr) -> Option<NameId> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).find(name).map(NameId)
    }

    /// The name that `id` stands for; `None` for a number never handed out.
    pub fn checked(&self, id: NameId) -> Option<Arc<OsStr>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).names.get(id.0 as usize).cloned()
    }

    /// The name that `id` stands for; `id` was handed out by this table.
    pub fn get(&self, id: NameId) -> Arc<OsStr> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).names[id.0 as usize].clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_dense_stable_and_lead_back() {
        let (digests, names) = (Digests::default(), Names::default());
        for round in 0..2 {
            for n in 0..5000u32 {
                let algorithm = if n % 7 == 0 { Algorithm::Sha512 } else { Algorithm::Sha256 };
                let digest = Digest::of(algorithm, &n.to_le_bytes());
                assert_eq!(digests.intern(&digest), DigestId(n), "round {round}");
                assert_eq!(digests.get(DigestId(n)), digest);
                let name = OsString::from(format!("name {n}"));
                assert_eq!(names.intern(&name), NameId(n));
                assert_eq!(&*names.get(NameId(n)), name);
            }
        }
        assert_eq!(digests.len(), 5000);
        assert_eq!(digests.checked(DigestId(5000)), None);
        assert_eq!(names.find(OsStr::new("x")), None);
    }
}
