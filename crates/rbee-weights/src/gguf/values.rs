//! Metadata values: where they lie, and their getters by key.
//!
//! A getter answers `None` for a key that is not there, and an error for one that is of another type.

use super::read::Cursor;
use super::{Gguf, MAX_ITEMS};
use crate::Error;

/// Type of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    U64,
    I64,
    F64,
}

/// The number of the type of arrays.
const ARRAY: u32 = 9;

/// Most layers that a value may be given for: as many as a config may have.
const MAX_LAYERS: usize = 1 << 10;

impl Kind {
    fn of(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            8 => Self::Text,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            _ => return None,
        })
    }

    /// Bytes of a value; of a text, those of its length.
    fn size(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::Text => 8,
        }
    }
}

/// Where a value lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    kind: Kind,
    /// How many there are, of an array.
    items: Option<usize>,
    /// Its first byte, after all that says what it is.
    start: usize,
    /// The byte after its last.
    end: usize,
}

impl Entry {
    /// Reads the type of a value and passes over the value, which is wholly there then.
    pub(super) fn read(at: &mut Cursor<'_, '_>, key: &str) -> Result<Self, Error> {
        let file = at.file();
        let kind = |number: u32| {
            let wrong = || Error::corrupt(file, format!("`{}` is of type {number}, which there is not", shown(key)));
            Kind::of(number).ok_or_else(wrong)
        };
        let number = at.u32()?;
        if number != ARRAY {
            let kind = kind(number)?;
            let start = at.position();
            Self::pass(at, kind, 1)?;
            return Ok(Self { kind, items: None, start, end: at.position() });
        }
        let number = at.u32()?;
        if number == ARRAY {
            return Err(Error::unsupported(file, format!("`{}` has arrays in an array", shown(key))));
        }
        let (kind, items) = (kind(number)?, at.u64()?);
        if items > MAX_ITEMS {
            let problem = format!("`{}` claims {items} values, more than {MAX_ITEMS}", shown(key));
            return Err(Error::corrupt(file, problem));
        }
        let start = at.position();
        Self::pass(at, kind, items)?;
        Ok(Self { kind, items: Some(items as usize), start, end: at.position() })
    }

    fn pass(at: &mut Cursor<'_, '_>, kind: Kind, items: u64) -> Result<(), Error> {
        let least = items * kind.size() as u64;
        if kind != Kind::Text || least > at.left() {
            return at.take(least).map(|_| ());
        }
        for _ in 0..items {
            at.text()?;
        }
        Ok(())
    }
}

fn shown(key: &str) -> impl std::fmt::Display {
    key.escape_debug()
}

/// The numbers of an array.
#[derive(Clone, Debug)]
pub struct Numbers<'a, T> {
    bytes: std::slice::ChunksExact<'a, u8>,
    one: fn(&[u8]) -> T,
}

impl<T> Iterator for Numbers<'_, T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        self.bytes.next().map(self.one)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.bytes.size_hint()
    }
}

impl<T> ExactSizeIterator for Numbers<'_, T> {}

/// The texts of an array.
#[derive(Clone, Debug)]
pub struct Strings<'a> {
    file: &'a str,
    key: &'a str,
    bytes: &'a [u8],
    left: usize,
}

impl<'a> Iterator for Strings<'a> {
    /// An error for a text that is not valid UTF-8.
    type Item = Result<&'a str, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let (len, rest) = self.bytes.split_first_chunk()?;
        let (text, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
        self.bytes = rest;
        Some(utf8(self.file, self.key, text))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Strings<'_> {}

fn utf8<'a>(file: &str, key: &str, text: &'a [u8]) -> Result<&'a str, Error> {
    std::str::from_utf8(text)
        .map_err(|_| Error::corrupt(file, format!("`{}` has a text that is not valid UTF-8", shown(key))))
}

/// The bytes of a number: as many as its kind has.
fn bytes<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("a value's bytes are as many as its kind has")
}

/// A whole number of any width; `None` below nought.
fn unsigned(kind: Kind, value: &[u8]) -> Option<u64> {
    match kind {
        Kind::U8 => Some(u64::from(value[0])),
        Kind::U16 => Some(u64::from(u16::from_le_bytes(bytes(value)))),
        Kind::U32 => Some(u64::from(u32::from_le_bytes(bytes(value)))),
        Kind::U64 => Some(u64::from_le_bytes(bytes(value))),
        Kind::I8 => u64::try_from(i8::from_le_bytes(bytes(value))).ok(),
        Kind::I16 => u64::try_from(i16::from_le_bytes(bytes(value))).ok(),
        Kind::I32 => u64::try_from(i32::from_le_bytes(bytes(value))).ok(),
        Kind::I64 => u64::try_from(i64::from_le_bytes(bytes(value))).ok(),
        Kind::F32 | Kind::F64 | Kind::Bool | Kind::Text => None,
    }
}

/// The getters. None copies an array.
impl<'a> Gguf<'a> {
    /// Its keys, in no order.
    pub fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.values.keys().copied()
    }

    /// Whether there is a value of this key.
    pub fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// How many values an array has.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is no array.
    pub fn count(&self, key: &str) -> Result<Option<usize>, Error> {
        let Some(entry) = self.values.get(key) else { return Ok(None) };
        entry.items.map(Some).ok_or_else(|| self.wrong(key, "an array"))
    }

    /// A whole number of any width, from nought.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is none.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, Error> {
        let Some((kind, value)) = self.scalar(key)? else { return Ok(None) };
        unsigned(kind, value).map(Some).ok_or_else(|| self.wrong(key, "a whole number from 0"))
    }

    /// A number of type u32 and no other.
    pub(super) fn u32(&self, key: &str) -> Result<Option<u32>, Error> {
        match self.scalar(key)? {
            None => Ok(None),
            Some((Kind::U32, value)) => Ok(Some(u32::from_le_bytes(bytes(value)))),
            Some(_) => Err(self.wrong(key, "a u32")),
        }
    }

    /// A number of type f32.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is none.
    pub fn f32(&self, key: &str) -> Result<Option<f32>, Error> {
        match self.scalar(key)? {
            None => Ok(None),
            Some((Kind::F32, value)) => Ok(Some(f32::from_le_bytes(bytes(value)))),
            Some(_) => Err(self.wrong(key, "an f32")),
        }
    }

    /// A number of type f32 or f64.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is none.
    pub fn f64(&self, key: &str) -> Result<Option<f64>, Error> {
        match self.scalar(key)? {
            None => Ok(None),
            Some((Kind::F32, value)) => Ok(Some(f64::from(f32::from_le_bytes(bytes(value))))),
            Some((Kind::F64, value)) => Ok(Some(f64::from_le_bytes(bytes(value)))),
            Some(_) => Err(self.wrong(key, "an f32 or f64")),
        }
    }

    /// A switch.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is none.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, Error> {
        match self.scalar(key)? {
            None => Ok(None),
            Some((Kind::Bool, [0])) => Ok(Some(false)),
            Some((Kind::Bool, [1])) => Ok(Some(true)),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    /// A text.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is none, or not valid UTF-8.
    pub fn str(&self, key: &str) -> Result<Option<&'a str>, Error> {
        match self.scalar(key)? {
            None => Ok(None),
            // The text comes after its length.
            Some((Kind::Text, value)) => utf8(&self.file, key, &value[Kind::Text.size()..]).map(Some),
            Some(_) => Err(self.wrong(key, "a text")),
        }
    }

    /// The texts of an array, each checked when it is taken.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is no array of texts.
    pub fn strings(&self, key: &str) -> Result<Option<Strings<'_>>, Error> {
        let Some((&key, entry)) = self.values.get_key_value(key) else { return Ok(None) };
        match (entry.kind, entry.items) {
            (Kind::Text, Some(left)) => {
                Ok(Some(Strings { file: &self.file, key, bytes: &self.bytes[entry.start..entry.end], left }))
            }
            _ => Err(self.wrong(key, "an array of texts")),
        }
    }

    /// The numbers of an array of type f32.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is none.
    pub fn f32s(&self, key: &str) -> Result<Option<Numbers<'a, f32>>, Error> {
        self.numbers(key, Kind::F32, "an array of f32", |value| f32::from_le_bytes(bytes(value)))
    }

    /// The numbers of an array of type i32.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is none.
    pub fn i32s(&self, key: &str) -> Result<Option<Numbers<'a, i32>>, Error> {
        self.numbers(key, Kind::I32, "an array of i32", |value| i32::from_le_bytes(bytes(value)))
    }

    fn numbers<T>(
        &self,
        key: &str,
        kind: Kind,
        what: &str,
        one: fn(&[u8]) -> T,
    ) -> Result<Option<Numbers<'a, T>>, Error> {
        match self.values.get(key) {
            None => Ok(None),
            Some(entry) if entry.kind == kind && entry.items.is_some() => {
                Ok(Some(Numbers { bytes: self.bytes[entry.start..entry.end].chunks_exact(kind.size()), one }))
            }
            Some(_) => Err(self.wrong(key, what)),
        }
    }

    /// A whole number, or an array of whole numbers, one for each layer; switches count as 0 and 1.
    pub(super) fn per_layer(&self, key: &str) -> Result<Option<PerLayer>, Error> {
        let Some(entry) = self.values.get(key) else { return Ok(None) };
        let wrong = || self.wrong(key, "a whole number from 0 or an array of them");
        if entry.kind == Kind::Text {
            return Err(wrong());
        }
        let one = |value: &[u8]| match (entry.kind, value) {
            (Kind::Bool, [switch @ (0 | 1)]) => Some(u64::from(*switch)),
            (kind, value) => unsigned(kind, value),
        };
        let mut values = self.bytes[entry.start..entry.end].chunks_exact(entry.kind.size()).map(one);
        if entry.items.is_none() {
            let value = values.next().flatten().ok_or_else(wrong)?;
            return Ok(Some(PerLayer::Same(value)));
        }
        if values.len() > MAX_LAYERS {
            return Err(self.wrong(key, &format!("an array of at most {MAX_LAYERS} layers")));
        }
        let values = values.collect::<Option<Vec<u64>>>().ok_or_else(wrong)?;
        Ok(Some(PerLayer::Each(values)))
    }

    fn scalar(&self, key: &str) -> Result<Option<(Kind, &'a [u8])>, Error> {
        match self.values.get(key) {
            None => Ok(None),
            Some(entry) if entry.items.is_none() => Ok(Some((entry.kind, &self.bytes[entry.start..entry.end]))),
            Some(_) => Err(self.wrong(key, "one value and no array")),
        }
    }

    pub(super) fn wrong(&self, key: &str, what: &str) -> Error {
        Error::corrupt(&self.file, format!("`{}` must be {what}", shown(key)))
    }
}

/// A whole number of every layer.
pub(super) enum PerLayer {
    /// One for all.
    Same(u64),
    /// In order.
    Each(Vec<u64>),
}
