//! Counts the values of a JSON document before a parser builds them, and looks at what would make it reserve more.

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

/// The key of a SentencePiece normalizer's map of characters: base64 of the length of a trie in bytes (u32, little
/// endian), the trie, and its texts. The parser reserves what that length says before it reads on.
const CHARSMAP: &str = "precompiled_charsmap";

/// Letters of base64 that hold a length, and bits of what follows.
const LENGTH_LETTERS: usize = 6;

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Refuses a document that does not parse, has more than `limit` values and keys, or a map of characters that says it is
/// longer than it is.
pub(crate) fn check_values(bytes: &[u8], limit: usize) -> Result<(), String> {
    let mut left = limit;
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let document = Count { left: &mut left, charsmap: false };
    document.deserialize(&mut deserializer).and_then(|()| deserializer.end()).map_err(|e| e.to_string())
}

/// Whether a map of characters has the trie that it announces. One that cannot be decoded is left to the parser, which
/// does not come as far as to reserve anything.
fn has_its_trie(charsmap: &str) -> bool {
    // Room for what that many letters could be at most.
    let mut bytes = [0; LENGTH_LETTERS];
    match charsmap.as_bytes().get(..LENGTH_LETTERS).map(|letters| BASE64.decode_slice(letters, &mut bytes)) {
        Some(Ok(4..)) => {}
        _ => return true,
    }
    let length = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    length as usize <= charsmap.len()
}

struct Count<'l> {
    left: &'l mut usize,
    /// Whether the value is a map of characters.
    charsmap: bool,
}

impl Count<'_> {
    fn one<E: serde::de::Error>(&mut self) -> Result<(), E> {
        *self.left = self.left.checked_sub(1).ok_or_else(|| E::custom("too many values"))?;
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Count<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(mut self, deserializer: D) -> Result<(), D::Error> {
        self.one()?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Count<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON value")
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

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<(), E> {
        match self.charsmap && !has_its_trie(text) {
            true => Err(E::custom(format!("{CHARSMAP} says that it is longer than it is"))),
            false => Ok(()),
        }
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(Count { left: &mut *self.left, charsmap: false })?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some(charsmap) = map.next_key_seed(Key)? {
            self.one()?;
            map.next_value_seed(Count { left: &mut *self.left, charsmap })?;
        }
        Ok(())
    }
}

/// Tells whether a key is that of a map of characters.
struct Key;

impl<'de> DeserializeSeed<'de> for Key {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Key {
    type Value = bool;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E>(self, key: &str) -> Result<bool, E> {
        Ok(key == CHARSMAP)
    }
}
