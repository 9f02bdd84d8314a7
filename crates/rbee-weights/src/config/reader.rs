//! Values of a JSON object, each checked for its type and range.

use std::cell::RefCell;
use std::collections::HashSet;

use serde_json::{Map, Value};

use crate::Error;

pub(super) fn object(file: &str, bytes: &[u8]) -> Result<Map<String, Value>, Error> {
    if bytes.len() > 4 << 20 {
        return Err(Error::corrupt(file, "it is larger than any config"));
    }
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::corrupt(file, "it is not a JSON object")),
        Err(error) => Err(Error::corrupt(file, format!("it is not valid JSON: {error}"))),
    }
}

/// A JSON object that is read key by key, and remembers which keys were looked at.
pub(super) struct Reader<'a> {
    pub(super) map: &'a Map<String, Value>,
    pub(super) file: &'static str,
    seen: RefCell<HashSet<&'static str>>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(map: &'a Map<String, Value>, file: &'static str) -> Self {
        Self { map, file, seen: RefCell::default() }
    }

    /// Keys that nobody asked for.
    pub(super) fn unread(&self) -> impl Iterator<Item = &'a String> {
        let seen = self.seen.borrow().clone();
        self.map.keys().filter(move |key| !seen.contains(key.as_str()))
    }

    /// Whether the key is there, if only as `null`.
    pub(super) fn has(&self, key: &'static str) -> bool {
        self.map.contains_key(key)
    }

    pub(super) fn wrong(&self, key: &str, what: &str) -> Error {
        Error::corrupt(self.file, format!("`{key}` must be {what}"))
    }

    /// A value that is there and not `null`.
    pub(super) fn get(&self, key: &'static str) -> Option<&'a Value> {
        self.seen.borrow_mut().insert(key);
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn size(&self, key: &'static str, max: usize) -> Result<Option<usize>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|size| (1..=max).contains(size));
        size.map(Some).ok_or_else(|| self.wrong(key, &format!("a whole number from 1 to {max}")))
    }

    pub(super) fn need(&self, key: &'static str, max: usize) -> Result<usize, Error> {
        self.size(key, max)?.ok_or_else(|| Error::corrupt(self.file, format!("`{key}` is missing")))
    }

    pub(super) fn number(&self, key: &'static str, min: f64, max: f64) -> Result<Option<f64>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().filter(|number| (min..=max).contains(number));
        number.map(Some).ok_or_else(|| self.wrong(key, &format!("a number from {min} to {max}")))
    }

    pub(super) fn need_number(&self, key: &'static str, min: f64, max: f64) -> Result<f64, Error> {
        self.number(key, min, max)?.ok_or_else(|| Error::corrupt(self.file, format!("`{key}` is missing")))
    }

    /// A list of at most `max` numbers within a range.
    pub(super) fn numbers(
        &self,
        key: &'static str,
        min: f64,
        max: f64,
        most: usize,
    ) -> Result<Option<Vec<f64>>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let one = |value: &Value| value.as_f64().filter(|number| (min..=max).contains(number));
        let items = value.as_array().filter(|items| items.len() <= most);
        let items = items.and_then(|items| items.iter().map(one).collect());
        items.map(Some).ok_or_else(|| self.wrong(key, &format!("a list of at most {most} numbers from {min} to {max}")))
    }

    pub(super) fn flag(&self, key: &'static str, default: bool) -> Result<bool, Error> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.wrong(key, "true or false")),
        }
    }

    /// An object below this one.
    pub(super) fn inner(&self, key: &'static str) -> Result<Option<Reader<'a>>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Reader::new(map, self.file))),
            Some(_) => Err(self.wrong(key, "an object")),
        }
    }

    /// A flag that may only be off.
    pub(super) fn off(&self, key: &'static str) -> Result<(), Error> {
        if self.flag(key, false)? { Err(Error::unsupported(self.file, format!("`{key}`"))) } else { Ok(()) }
    }

    pub(super) fn text(&self, key: &'static str) -> Result<Option<&'a str>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, "a text"))
    }

    pub(super) fn ids(&self, key: &'static str) -> Result<Vec<u32>, Error> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match self.get(key) {
            None => Some(Vec::new()),
            Some(Value::Array(items)) if items.len() <= 64 => items.iter().map(id).collect(),
            Some(value) => id(value).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.wrong(key, "a token id or at most 64 of them"))
    }
}
