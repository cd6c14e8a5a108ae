//! Digests: `<algorithm>:<lower-case hex>`, the names of all content in a registry.
//!
//! Parsing happens here and nowhere else; whoever holds a [`Digest`] never checks hex again.
//! The algorithms are the three that go-digest registers, so the three a registry accepts.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256, Sha384, Sha512};

/// A hash function that registries know.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Algorithm {
    /// SHA-256, under which a registry stores every blob.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512; layers pushed under it are stored under SHA-256 and found through layer links.
    Sha512,
}

impl Algorithm {
    /// All of them, the usual one first.
    pub const ALL: [Algorithm; 3] = [Algorithm::Sha256, Algorithm::Sha384, Algorithm::Sha512];

    /// The name as it stands before the colon and in paths.
    pub fn name(self) -> &'static str {
        match self {
            Algorithm::Sha256 => "sha256",
            Algorithm::Sha384 => "sha384",
            Algorithm::Sha512 => "sha512",
        }
    }

    /// Length of a hash in bytes.
    pub fn size(self) -> usize {
        match self {
            Algorithm::Sha256 => 32,
            Algorithm::Sha384 => 48,
            Algorithm::Sha512 => 64,
        }
    }

    /// Finds an algorithm by its name, `None` for one that is not known.
    pub fn from_name(name: &str) -> Option<Algorithm> {
        Algorithm::ALL.into_iter().find(|a| a.name() == name)
    }
}

/// A digest, valid by construction.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest {
    algorithm: Algorithm,
    bytes: [u8; 64],
}

impl Digest {
    /// The digest of `content` under `algorithm`.
    pub fn of(algorithm: Algorithm, content: &[u8]) -> Digest {
        match algorithm {
            Algorithm::Sha256 => Digest::from_bytes(algorithm, &Sha256::digest(content)),
            Algorithm::Sha384 => Digest::from_bytes(algorithm, &Sha384::digest(content)),
            Algorithm::Sha512 => Digest::from_bytes(algorithm, &Sha512::digest(content)),
        }
    }

    /// Builds a digest from hash bytes; `hash` has the algorithm's size.
    pub fn from_bytes(algorithm: Algorithm, hash: &[u8]) -> Digest {
        let mut bytes = [0; 64];
        bytes[..algorithm.size()].copy_from_slice(&hash[..algorithm.size()]);
        Digest { algorithm, bytes }
    }

    /// Builds a digest from the two parts that paths keep apart.
    pub fn from_parts(algorithm: &str, hex: &str) -> Option<Digest> {
        let algorithm = Algorithm::from_name(algorithm)?;
        if hex.len() != algorithm.size() * 2 {
            return None;
        }
        let mut bytes = [0; 64];
        let mut wrong = 0;
        for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            let (high, low) = (HEX_VALUES[pair[0] as usize], HEX_VALUES[pair[1] as usize]);
            wrong |= high | low;
            *byte = high << 4 | low & 15;
        }
        (wrong & NO_DIGIT == 0).then_some(Digest { algorithm, bytes })
    }

    /// The hash function.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The hash, as long as the algorithm makes it.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.algorithm.size()]
    }

    /// The hash as lower-case hex.
    pub fn hex(&self) -> String {
        let mut text = String::with_capacity(self.algorithm.size() * 2);
        self.push_hex(&mut text);
        text
    }

    /// Adds the hash as lower-case hex to `text`.
    pub fn push_hex(&self, text: &mut String) {
        let digits = self.as_bytes().iter().flat_map(|byte| [byte >> 4, byte & 15]);
        text.extend(digits.map(|digit| HEX[digit as usize] as char));
    }

    /// The first twelve hex digits, for names that people read.
    pub fn short(&self) -> String {
        let mut hex = self.hex();
        hex.truncate(12);
        hex
    }
}

const HEX: &[u8; 16] = b"0123456789abcdef";

/// Set in the value of what is no lower-case hex digit.
const NO_DIGIT: u8 = 0x80;

/// Values of hex digits; a table, since a scan reads millions of them.
const HEX_VALUES: [u8; 256] = {
    let mut values = [NO_DIGIT; 256];
    let mut digit = 0;
    while digit < HEX.len() {
        values[HEX[digit] as usize] = digit as u8;
        digit += 1;
    }
    values
};

/// Not a digest; the text stands in the message of whoever tried to parse it.
#[derive(Debug, PartialEq, Eq)]
pub struct ParseDigestError;

impl fmt::Display for ParseDigestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a digest (expected sha256:<64 hex digits>)")
    }
}

impl std::error::Error for ParseDigestError {}

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Digest, ParseDigestError> {
        let (algorithm, hex) = text.split_once(':').ok_or(ParseDigestError)?;
        Digest::from_parts(algorithm, hex).ok_or(ParseDigestError)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(|_| serde::de::Error::custom(format!("{text:?} is no digest")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_canonical_digests_parse() {
        let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let good = format!("sha256:{hex}");
        assert_eq!(good.parse::<Digest>().unwrap().to_string(), good);
        assert_eq!(good.parse::<Digest>().unwrap(), Digest::of(Algorithm::Sha256, b""));
        let bad = [
            String::new(),
            hex.to_string(),
            format!("sha256:{}", &hex[1..]),
            format!("sha256:{hex}0"),
            format!("sha256:{hex}\n"),
            format!("sha256:{}", hex.to_uppercase()),
            format!("sha512:{hex}"),
            format!("md5:{hex}"),
            format!("sha256:{}ä", &hex[2..]),
        ];
        for text in bad {
            assert_eq!(text.parse::<Digest>(), Err(ParseDigestError), "{text:?}");
        }
    }

    #[test]
    fn long_algorithms_keep_all_their_bytes() {
        for algorithm in Algorithm::ALL {
            let digest = Digest::of(algorithm, b"x");
            assert_eq!(digest.hex().len(), algorithm.size() * 2);
            assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        }
    }
}
