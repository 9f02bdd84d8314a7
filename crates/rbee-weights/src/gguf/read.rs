//! Numbers and texts of a header, one after the other.

use super::MAX_NAME;
use crate::Error;

/// A place in a header; nothing is taken that is not there.
pub(super) struct Cursor<'f, 'a> {
    file: &'f str,
    bytes: &'a [u8],
    at: usize,
}

impl<'f, 'a> Cursor<'f, 'a> {
    pub(super) fn new(file: &'f str, bytes: &'a [u8]) -> Self {
        Self { file, bytes, at: 0 }
    }

    /// The file's name.
    pub(super) fn file(&self) -> &'f str {
        self.file
    }

    /// Bytes that were read.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    /// Bytes that are left.
    pub(super) fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    /// The next bytes.
    pub(super) fn take(&mut self, len: u64) -> Result<&'a [u8], Error> {
        if len > self.left() {
            let problem = format!("its header ends at byte {}, where {len} more were due", self.bytes.len());
            return Err(Error::corrupt(self.file, problem));
        }
        let end = self.at + len as usize;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let taken = self.take(N as u64)?;
        Ok(taken.try_into().expect("as many bytes were taken"))
    }

    pub(super) fn u32(&mut self) -> Result<u32, Error> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Error> {
        self.array().map(u64::from_le_bytes)
    }

    /// The bytes of a text.
    pub(super) fn text(&mut self) -> Result<&'a [u8], Error> {
        let len = self.u64()?;
        self.take(len)
    }

    /// A key or a tensor's name.
    pub(super) fn name(&mut self, what: &str) -> Result<&'a str, Error> {
        let name = self.text()?;
        if name.len() > MAX_NAME {
            return Err(Error::corrupt(self.file, format!("{what} of {} bytes is longer than {MAX_NAME}", name.len())));
        }
        std::str::from_utf8(name).map_err(|_| Error::corrupt(self.file, format!("{what} is not valid UTF-8")))
    }
}
