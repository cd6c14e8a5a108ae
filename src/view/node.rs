//! Nodes of the tree, and their inode numbers.
//!
//! An inode number is the kind of the node in the top 6 bits and up to two numbers of digests or names below
//! (32 and 26 bits), so there is no table of inodes and nothing to forget. As digests and names keep their
//! numbers while the process lives, an inode number never changes its meaning.

use crate::catalog::intern::{DigestId, NameId};
use crate::digest::Algorithm;

/// A part of an inode number.
trait Part: Sized {
    fn pack(self) -> u32;
    fn unpack(number: u32) -> Option<Self>;
}

impl Part for DigestId {
    fn pack(self) -> u32 {
        self.0
    }
    fn unpack(number: u32) -> Option<DigestId> {
        Some(DigestId(number))
    }
}

impl Part for NameId {
    fn pack(self) -> u32 {
        self.0
    }
    fn unpack(number: u32) -> Option<NameId> {
        Some(NameId(number))
    }
}

impl Part for Algorithm {
    fn pack(self) -> u32 {
        self as u32
    }
    fn unpack(number: u32) -> Option<Algorithm> {
        Algorithm::ALL.into_iter().find(|a| *a as u32 == number)
    }
}

impl Part for u8 {
    fn pack(self) -> u32 {
        u32::from(self)
    }
    fn unpack(number: u32) -> Option<u8> {
        u8::try_from(number).ok()
    }
}

/// Inode number of the root, as FUSE has it.
pub const ROOT: u64 = 1;
const KIND_SHIFT: u32 = 58;
const SECOND_SHIFT: u32 = 32;
const SECOND_MASK: u64 = (1 << (KIND_SHIFT - SECOND_SHIFT)) - 1;

macro_rules! nodes {
    ($($(#[$doc:meta])* $number:literal $name:ident $(($first:ident: $first_type:ty $(, $second:ident: $second_type:ty)?))?,)*) => {
        /// A node of the tree; its doc says where it stands.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum Node {
            /// `/`
            Root,
            $($(#[$doc])* $name $(($first_type $(, $second_type)?))?,)*
        }

        impl Node {
            /// Its inode number.
            pub fn inode(self) -> u64 {
                match self {
                    Node::Root => ROOT,
                    $(Node::$name $(($first $(, $second)?))? => {
                        let number = $number << KIND_SHIFT;
                        $(
                            let number = number | u64::from($first.pack());
                            $(let number = number | (u64::from($second.pack()) & SECOND_MASK) << SECOND_SHIFT;)?
                        )?
                        number
                    })*
                }
            }

            /// The node of an inode number; `None` for one that is no node's.
            pub fn of_inode(inode: u64) -> Option<Node> {
                let (first, second) = (inode as u32, ((inode >> SECOND_SHIFT) & SECOND_MASK) as u32);
                match inode >> KIND_SHIFT {
                    0 if inode == ROOT => Some(Node::Root),
                    $($number => Some(Node::$name $((
                        <$first_type as Part>::unpack(first)? $(, <$second_type as Part>::unpack(second)?)?
                    ))?),)*
                    _ => None,
                }
            }
        }
    };
}

nodes! {
    /// `README`
    1 Readme,
    /// `images`
    2 Images,
    /// `images/<path>`: a repository, a namespace, or both
    3 Namespace(path: NameId),
    /// `images/<repository>/_tags`
    4 Tags(repository: NameId),
    /// `images/<repository>/_tags/<tag>`, a symlink
    5 Tag(tag: NameId, repository: NameId),
    /// `images/<repository>:<tag>`, a symlink, not listed
    6 TagReference(tag: NameId, repository: NameId),
    /// `images/<repository>@<digest>`, a symlink, not listed
    7 DigestReference(digest: DigestId, repository: NameId),
    /// `images/<repository>/_manifests`
    8 Revisions(repository: NameId),
    /// `images/<repository>/_manifests/sha256`
    9 RevisionsOf(algorithm: Algorithm, repository: NameId),
    /// `images/<repository>/_uploads`
    10 Uploads(repository: NameId),
    /// `images/<repository>/_uploads/<uuid>`
    11 Upload(upload: NameId, repository: NameId),
    /// `manifests`
    12 Manifests,
    /// `manifests/sha256`
    13 ManifestsOf(algorithm: Algorithm),
    /// `manifests/sha256/<hex>`
    14 Manifest(digest: DigestId),
    /// `manifests/sha256/<hex>/oci-layout`
    15 OciLayout,
    /// `manifests/sha256/<hex>/index.json`
    16 LayoutIndex(digest: DigestId),
    /// `manifests/sha256/<hex>/blobs`
    17 LayoutBlobs(digest: DigestId),
    /// `manifests/sha256/<hex>/blobs/sha256`
    18 LayoutBlobsOf(digest: DigestId, algorithm: Algorithm),
    /// `manifests/sha256/<hex>/layers`
    19 Layers(digest: DigestId),
    /// `manifests/sha256/<hex>/platforms`
    20 Platforms(digest: DigestId),
    /// `manifests/sha256/<hex>/referrers`
    21 Referrers(digest: DigestId),
    /// A symlink in `platforms` to a manifest that leads no further
    22 Sibling(digest: DigestId),
    /// `manifests/sha256/<hex>/subject`, a file in `referrers`, of an index in `platforms`: the digest of another manifest
    23 Pointer(digest: DigestId),
    /// `manifests/sha256/<hex>/references`
    24 References(digest: DigestId),
    /// `blobs`
    25 Blobs,
    /// `blobs/sha256`
    26 BlobsOf(algorithm: Algorithm),
    /// `blobs/sha256/<2 hex>`
    27 BlobShard(shard: u8, algorithm: Algorithm),
    /// A blob, under all of its names
    28 Blob(digest: DigestId),
    /// `reachability`
    29 Reachability,
    /// `reachability/summary`
    30 Summary,
    /// `reachability/usage.tsv`
    31 Usage,
    /// `reachability/reachable`
    32 Reachable,
    /// `reachability/reachable/sha256`
    33 ReachableOf(algorithm: Algorithm),
    /// `reachability/reachable/sha256/<2 hex>`
    34 ReachableShard(shard: u8, algorithm: Algorithm),
    /// `reachability/reachable/sha256/<2 hex>/<hex>`
    35 ReachableBlob(digest: DigestId),
    /// A symlink there to a manifest that names the blob
    36 Keeper(digest: DigestId),
    /// A symlink there to the repository that has the blob as a manifest
    37 KeeperRevision(digest: DigestId, repository: NameId),
    /// `reachability/unreachable`
    38 Unreachable,
    /// `reachability/unreachable/sha256`
    39 UnreachableOf(algorithm: Algorithm),
    /// `reachability/untagged`
    40 Untagged,
    /// `reachability/untagged/<namespace>`
    41 UntaggedIn(path: NameId),
    /// `reachability/untagged/<repository>@sha256:<hex>`, a symlink
    42 UntaggedManifest(digest: DigestId, repository: NameId),
    /// `reachability/missing`
    43 Missing,
    /// `reachability/missing/sha256`
    44 MissingOf(algorithm: Algorithm),
    /// `reachability/missing/sha256/<hex>`
    45 MissingBlob(digest: DigestId),
    /// `reachability/broken`
    46 Broken,
    /// `reachability/broken/<n>-<name>`
    47 BrokenFile(name: NameId),
    /// `trash`
    48 Trash,
    /// Anything below `trash`, by its path there
    49 Trashed(path: NameId),
    /// `control`
    50 Control,
    /// `control/gc`
    51 ControlGc,
    /// `control/trash`
    52 ControlTrash,
    /// `control/refresh`
    53 ControlRefresh,
    /// `control/status`
    54 ControlStatus,
    /// `control/log`
    55 ControlLog,
    /// `reachability/why`
    56 Why,
    /// `reachability/why/sha256`
    57 WhyOf(algorithm: Algorithm),
    /// `reachability/why/sha256/<hex>`, and `why` in the directory of a reachable blob
    58 WhyText(digest: DigestId),
    /// `reachability/unreachable/state`
    59 States,
    /// `control/stop`
    60 ControlStop,
    /// `reachability/unreachable/sha256/<hex>`: a blob with a time of its own
    61 Garbage(digest: DigestId),
}

/// What a node is to `stat(2)`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Type {
    /// A directory.
    Directory,
    /// A file.
    File,
    /// A symlink.
    Symlink,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inode_numbers_lead_back_to_their_nodes() {
        let (digest, name) = (DigestId(4_000_000_000), NameId(60_000_000));
        let nodes = [
            Node::Root,
            Node::Readme,
            Node::Namespace(name),
            Node::Tag(NameId(3), name),
            Node::RevisionsOf(Algorithm::Sha512, name),
            Node::BlobShard(0xff, Algorithm::Sha256),
            Node::Blob(digest),
            Node::KeeperRevision(digest, name),
            Node::ControlLog,
        ];
        let mut numbers: Vec<u64> = nodes.iter().map(|n| n.inode()).collect();
        for node in nodes {
            assert_eq!(Node::of_inode(node.inode()), Some(node));
        }
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), nodes.len());
        for inode in [0, 2, u64::MAX, 26 << KIND_SHIFT | 9] {
            assert_eq!(Node::of_inode(inode), None, "{inode:#x}");
        }
    }
}
