//! Digests and names as small numbers.
//!
//! Numbers are never taken back while the process lives, so they can stand in inode
//! numbers and in flat arrays. One table of each is shared by all catalogs of a store.
//!
//! # Cost
//! A SHA-256 digest takes 32 bytes and 5 to 10 more in the hash table.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::hash::BuildHasher;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

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
///
/// Shards with a lock each, so that several threads can look at a store at once. A number is its place in the shard
/// and the shard. Which shard it is, the first byte of the digest decides: hashes are evenly spread, so all shards
/// are about equally long and numbers nearly dense; and whoever lists the blobs of one directory stays in one shard,
/// which the processor's cache holds.
pub struct Digests {
    shards: [RwLock<Shard>; SHARDS],
    hasher: DefaultHashBuilder,
}

/// A power of two.
const SHARDS: usize = 64;
const SHARD_BITS: u32 = SHARDS.trailing_zeros();

/// Digests of one shard and where they are found: a table with open addressing, since a scan looks up millions, and
/// each look should touch little memory. A slot holds the place of a digest plus one and eight bits of its hash.
#[derive(Default)]
struct Shard {
    /// SHA-256 digests as they are, of others the first 32 bytes.
    packed: Vec<[u8; 32]>,
    /// Digests that are not SHA-256, by their place.
    others: HashMap<u32, Digest>,
    /// A power of two of them, at most four in five taken; 0 is free.
    slots: Vec<u32>,
}

/// Bits of a slot that hold a place; the others are the tag.
const PLACE_BITS: u32 = 24;
const PLACE: u32 = (1 << PLACE_BITS) - 1;

impl Default for Digests {
    fn default() -> Digests {
        Digests { shards: std::array::from_fn(|_| RwLock::default()), hasher: DefaultHashBuilder::default() }
    }
}

impl Shard {
    fn get(&self, place: u32) -> Digest {
        let other = if self.others.is_empty() { None } else { self.others.get(&place) };
        other.copied().unwrap_or_else(|| Digest::from_bytes(Algorithm::Sha256, &self.packed[place as usize]))
    }

    /// The tag of a hash, in the bits of a slot where it stands.
    fn tag(hash: u64) -> u32 {
        (hash as u32) & !PLACE
    }

    /// The slots to look at, in order, until a free one.
    fn probe(&self, hash: u64) -> impl Iterator<Item = usize> + use<> {
        let (mask, start) = (self.slots.len().wrapping_sub(1), (hash >> 32) as usize);
        (0..self.slots.len()).map(move |step| start.wrapping_add(step) & mask)
    }

    /// The slot where a look for `hash` begins; 0 is none.
    fn first_slot(&self, hash: u64) -> u32 {
        self.probe(hash).next().map_or(0, |at| self.slots[at])
    }

    /// A byte of the digest that `slot` leads to.
    fn first_byte(&self, slot: u32) -> u8 {
        match slot & PLACE {
            0 => 0,
            place => self.packed[place as usize - 1][0],
        }
    }

    fn find(&self, hash: u64, digest: &Digest) -> Option<u32> {
        for at in self.probe(hash) {
            let slot = self.slots[at];
            if slot == 0 {
                return None;
            }
            let place = (slot & PLACE) - 1;
            if slot & !PLACE == Shard::tag(hash)
                && self.packed[place as usize][..] == digest.as_bytes()[..32]
                && (digest.algorithm() == Algorithm::Sha256 && self.others.is_empty()
                    || self.get(place) == *digest)
            {
                return Some(place);
            }
        }
        None
    }

    fn add(&mut self, hash: u64, digest: &Digest, hash_of: impl Fn(&Digest) -> u64) -> u32 {
        let place = self.packed.len() as u32;
        // A thousand million digests need more memory than any machine that runs this has.
        assert!(place < PLACE, "too many digests");
        if self.packed.len() == self.packed.capacity() {
            // Little by little: there are millions, and half of the room unused would be much.
            self.packed.reserve_exact(64.max(self.packed.len() / 8));
        }
        let mut first = [0; 32];
        first.copy_from_slice(&digest.as_bytes()[..32]);
        self.packed.push(first);
        if digest.algorithm() != Algorithm::Sha256 {
            self.others.insert(place, *digest);
        }
        if self.packed.len() * 5 > self.slots.len() * 4 {
            self.slots = vec![0; (self.slots.len() * 2).max(64)];
            for place in 0..=place {
                self.settle(hash_of(&self.get(place)), place);
            }
        } else {
            self.settle(hash, place);
        }
        place
    }

    /// Notes in the first free slot where a digest is.
    fn settle(&mut self, hash: u64, place: u32) {
        if let Some(at) = self.probe(hash).find(|at| self.slots[*at] == 0) {
            self.slots[at] = (place + 1) | Shard::tag(hash);
        }
    }
}

impl Digests {
    fn hash(&self, digest: &Digest) -> u64 {
        self.hasher.hash_one(digest.as_bytes())
    }

    fn shard_of(digest: &Digest) -> usize {
        digest.as_bytes().first().map_or(0, |byte| *byte as usize % SHARDS)
    }

    fn read(&self, shard: usize) -> RwLockReadGuard<'_, Shard> {
        // Every change leaves a shard whole, so one that panicked elsewhere did no harm to it.
        self.shards[shard].read().unwrap_or_else(PoisonError::into_inner)
    }

    fn id(shard: usize, place: u32) -> DigestId {
        DigestId(place << SHARD_BITS | shard as u32)
    }

    /// The number of `digest`, a new one if it has none.
    pub fn intern(&self, digest: &Digest) -> DigestId {
        let hash = self.hash(digest);
        let shard = Digests::shard_of(digest);
        if let Some(place) = self.read(shard).find(hash, digest) {
            return Digests::id(shard, place);
        }
        let mut table = self.shards[shard].write().unwrap_or_else(PoisonError::into_inner);
        let found = table.find(hash, digest);
        Digests::id(shard, found.unwrap_or_else(|| table.add(hash, digest, |d| self.hash(d))))
    }

    /// The numbers of many digests, most of which are known.
    ///
    /// Quicker than one after the other: the memory that each look needs is asked for before any of it is waited for.
    pub fn intern_all(&self, digests: &[Digest]) -> Vec<DigestId> {
        let found: Vec<Option<DigestId>> = {
            let shards: [RwLockReadGuard<'_, Shard>; SHARDS] = std::array::from_fn(|shard| self.read(shard));
            let looks = digests.iter().map(|d| (self.hash(d), Digests::shard_of(d)));
            let looks: Vec<(u64, usize, u32)> =
                looks.map(|(hash, shard)| (hash, shard, shards[shard].first_slot(hash))).collect();
            let touched: u8 =
                looks.iter().fold(0, |sum, (_, shard, slot)| sum ^ shards[*shard].first_byte(*slot));
            std::hint::black_box(touched);
            let find = |(digest, (hash, shard, _)): (&Digest, &(u64, usize, u32))| {
                shards[*shard].find(*hash, digest).map(|place| Digests::id(*shard, place))
            };
            digests.iter().zip(&looks).map(find).collect()
        };
        digests.iter().zip(found).map(|(digest, id)| id.unwrap_or_else(|| self.intern(digest))).collect()
    }

    /// The number of `digest` if it has one.
    pub fn find(&self, digest: &Digest) -> Option<DigestId> {
        let hash = self.hash(digest);
        let shard = Digests::shard_of(digest);
        self.read(shard).find(hash, digest).map(|place| Digests::id(shard, place))
    }

    /// The digest that `id` stands for; `None` for a number never handed out (an inode number from outside).
    pub fn checked(&self, id: DigestId) -> Option<Digest> {
        let (shard, place) = (id.0 as usize % SHARDS, id.0 >> SHARD_BITS);
        let table = self.read(shard);
        ((place as usize) < table.packed.len()).then(|| table.get(place))
    }

    /// The digest that `id` stands for; `id` was handed out by this table.
    pub fn get(&self, id: DigestId) -> Digest {
        self.read(id.0 as usize % SHARDS).get(id.0 >> SHARD_BITS)
    }

    /// All numbers are below this; for arrays with an element per number.
    pub fn bound(&self) -> usize {
        let longest = (0..SHARDS).map(|shard| self.read(shard).packed.len()).max().unwrap_or(0);
        longest << SHARD_BITS
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

    /// Takes `id` out.
    pub fn remove(&mut self, id: DigestId) {
        if let Some(word) = self.0.get_mut(id.index() / 64) {
            *word &= !(1 << (id.index() % 64));
        }
    }

    /// Those that are in one of the two and not in both.
    pub fn difference<'a>(&'a self, other: &'a IdSet) -> impl Iterator<Item = DigestId> + 'a {
        let word = |set: &IdSet, at: usize| set.0.get(at).copied().unwrap_or(0);
        (0..self.0.len().max(other.0.len())).flat_map(move |at| {
            let mut bits = word(self, at) ^ word(other, at);
            std::iter::from_fn(move || {
                let bit = (bits != 0).then(|| bits.trailing_zeros())?;
                bits &= bits - 1;
                Some(DigestId((at * 64) as u32 + bit))
            })
        })
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
    fn numbers_are_nearly_dense_stable_and_lead_back() {
        let (digests, names) = (Digests::default(), Names::default());
        let mut ids = Vec::new();
        for round in 0..2 {
            for n in 0..20_000u32 {
                let algorithm = if n % 7 == 0 { Algorithm::Sha512 } else { Algorithm::Sha256 };
                let digest = Digest::of(algorithm, &n.to_le_bytes());
                let id = digests.intern(&digest);
                match round {
                    0 => ids.push(id),
                    _ => assert_eq!(id, ids[n as usize]),
                }
                assert_eq!(digests.get(id), digest);
                assert_eq!(digests.checked(id), Some(digest));
                let other = Digest::of(algorithm, b"another");
                assert_eq!(digests.intern_all(&[digest, other, digest])[0], id);
                let name = OsString::from(format!("name {n}"));
                assert_eq!(names.intern(&name), NameId(n));
                assert_eq!(&*names.get(NameId(n)), name);
            }
        }
        assert_eq!(ids.iter().collect::<std::collections::HashSet<_>>().len(), ids.len());
        // 20,000 in 64 shards are 313 on average with a deviation of 18; ten of those never happen.
        assert!(digests.bound() < 64 * (313 + 180), "{}", digests.bound());
        assert!(ids.iter().all(|id| id.index() < digests.bound()));
        assert_eq!(digests.checked(DigestId(u32::MAX)), None);
        assert_eq!(names.find(OsStr::new("x")), None);
    }

    #[test]
    fn digests_that_begin_alike_are_told_apart() {
        let digests = Digests::default();
        let short = Digest::from_bytes(Algorithm::Sha256, &[7; 32]);
        let long = Digest::from_bytes(Algorithm::Sha512, &[7; 64]);
        let other = Digest::from_parts("sha512", &format!("{}{}", "07".repeat(32), "08".repeat(32))).unwrap();
        let ids = [short, long, other].map(|d| digests.intern(&d));
        assert_eq!(ids.map(|id| digests.get(id)), [short, long, other]);
        assert!(ids[0] != ids[1] && ids[1] != ids[2]);
    }
}
