//! The header of a GGUF file (format: ggml, docs/gguf.md): magic, version, metadata, tensor infos, then the tensors'
//! bytes, each at a multiple of the file's alignment.
//!
//! [`Gguf::parse`] checks the header whole and keeps where its values lie: none of them is copied, so a vocabulary
//! costs what it is asked for. What a file holds is [`Gguf::tensors`] and the getters by key; [`config::model_config`]
//! says it as our config, and [`Architecture`] where the tensors of a plan lie. A model in several files is one slice
//! of [`Gguf`], in order; [`check_split`] says whether it is whole.

pub mod config;
pub mod names;
mod read;
mod values;

use std::collections::{HashMap, HashSet};

pub use self::names::{Architecture, Source};
use self::read::Cursor;
use self::values::Entry;
pub use self::values::{Numbers, Strings};
use crate::Error;

/// Longest header, in bytes. The largest published vocabularies with their merges have some 20 MB.
pub const MAX_HEADER: usize = 256 << 20;

/// Most metadata keys of one file. Published models have some 50.
pub const MAX_KEYS: u64 = 1 << 16;

/// Most tensors of one file. Experts are stacked, so that the largest published models have some 2,000.
pub const MAX_TENSORS: u64 = 1 << 16;

/// Most values of an array: four times the largest vocabulary that a config may have.
pub const MAX_ITEMS: u64 = 1 << 24;

/// Largest alignment, in bytes.
const MAX_ALIGNMENT: u64 = 1 << 20;

/// Alignment of a file that names none.
const ALIGNMENT: u64 = 32;

const MAX_RANK: u32 = 4;
const MAX_NAME: usize = 512;

/// How a tensor's elements are stored: plain, or in blocks along a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(non_camel_case_types, reason = "the names that the format has")]
pub enum GgmlType {
    /// 4 bytes.
    F32,
    /// 2 bytes, IEEE half.
    F16,
    /// 2 bytes, upper half of an f32.
    BF16,
    /// 4 bits and a scale.
    Q4_0,
    /// 4 bits, a scale and a minimum.
    Q4_1,
    /// 5 bits and a scale.
    Q5_0,
    /// 5 bits, a scale and a minimum.
    Q5_1,
    /// 8 bits and a scale.
    Q8_0,
    /// 2 bits, with scales and minima that are themselves of 4 bits.
    Q2_K,
    /// 3 bits, with scales of 6 bits.
    Q3_K,
    /// 4 bits, with scales and minima of 6 bits.
    Q4_K,
    /// 5 bits, with scales and minima of 6 bits.
    Q5_K,
    /// 6 bits, with scales of 8 bits.
    Q6_K,
}

impl GgmlType {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
    ];

    /// Its number in a file.
    pub fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q2_K => 10,
            Self::Q3_K => 11,
            Self::Q4_K => 12,
            Self::Q5_K => 13,
            Self::Q6_K => 14,
            Self::BF16 => 30,
        }
    }

    /// Elements of one block.
    pub fn block(self) -> u64 {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => 256,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }
}

/// Name of a kind that ggml has or had and that nothing here reads.
fn other_kind(number: u32) -> Option<&'static str> {
    Some(match number {
        4 => "Q4_2",
        5 => "Q4_3",
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        31 => "Q4_0_4_4",
        32 => "Q4_0_4_8",
        33 => "Q4_0_8_8",
        34 => "TQ1_0",
        35 => "TQ2_0",
        36 => "IQ4_NL_4_4",
        37 => "IQ4_NL_4_8",
        38 => "IQ4_NL_8_8",
        39 => "MXFP4",
        40 => "NVFP4",
        41 => "Q1_0",
        _ => return None,
    })
}

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// How its elements are stored.
    pub kind: GgmlType,
    /// Its shape, outermost first: the reverse of the file's order. Blocks lie along the last one.
    pub shape: Vec<usize>,
    /// Offset of its first byte from the start of the file.
    pub start: u64,
    /// Its bytes.
    pub len: u64,
}

/// A file's place among those of a model that was split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// Its number, from 0.
    pub no: u64,
    /// How many files there are.
    pub count: u64,
    /// Tensors of all files.
    pub tensors: u64,
}

/// A file's header, checked: every tensor is within the file, aligned, as long as its shape says and apart from all
/// others.
#[derive(Clone, Debug)]
pub struct Gguf<'a> {
    /// By name.
    pub tensors: HashMap<String, TensorInfo>,
    file: String,
    bytes: &'a [u8],
    values: HashMap<&'a str, Entry>,
}

impl<'a> Gguf<'a> {
    /// Reads and checks a header. `bytes` are the file's, from its beginning and at least through its header;
    /// `file_len` is its whole length.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming what is wrong; [`Error::Unsupported`] for a version, byte order or tensor kind that is
    /// not read here.
    pub fn parse(file: &str, bytes: &'a [u8], file_len: u64) -> Result<Self, Error> {
        let bytes = &bytes[..bytes.len().min(usize::try_from(file_len).unwrap_or(usize::MAX))];
        let mut at = Cursor::new(file, &bytes[..bytes.len().min(MAX_HEADER)]);
        version(file, &mut at)?;
        let (tensors, keys) = (at.u64()?, at.u64()?);
        for (what, count, most) in [("tensors", tensors, MAX_TENSORS), ("metadata keys", keys, MAX_KEYS)] {
            if count > most {
                return Err(Error::corrupt(file, format!("it claims {count} {what}, more than {most}")));
            }
        }
        let mut values = HashMap::new();
        for _ in 0..keys {
            let key = at.name("a metadata key")?;
            let entry = Entry::read(&mut at, key)?;
            if values.insert(key, entry).is_some() {
                return Err(Error::corrupt(file, format!("`{}` stands twice", key.escape_debug())));
            }
        }
        let mut gguf = Self { tensors: HashMap::new(), file: file.to_owned(), bytes, values };
        let alignment = gguf.alignment()?;
        let mut found = Vec::new();
        for _ in 0..tensors {
            found.push(Unplaced::read(&mut at, alignment)?);
        }
        let data = (at.position() as u64).next_multiple_of(alignment);
        gguf.place(found, data, file_len)?;
        Ok(gguf)
    }

    /// Its name.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// Where it stands among the files of its model; `None` when it is the only one.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when only some of the keys are there, or they contradict each other.
    pub fn split(&self) -> Result<Option<Split>, Error> {
        let (no, count, tensors) = (self.u64("split.no")?, self.u64("split.count")?, self.u64("split.tensors.count")?);
        match (no, count, tensors) {
            // Some writers leave a count of nought or one in a file that is whole.
            (None, None, None) | (_, Some(0 | 1), _) => Ok(None),
            (Some(no), Some(count), Some(tensors)) if no < count => Ok(Some(Split { no, count, tensors })),
            _ => Err(Error::corrupt(&self.file, "its `split` keys contradict each other")),
        }
    }

    /// The bytes of a tensor, if the file's bytes reach so far.
    pub fn data(&self, tensor: &TensorInfo) -> Option<&'a [u8]> {
        let start = usize::try_from(tensor.start).ok()?;
        self.bytes.get(start..start.checked_add(usize::try_from(tensor.len).ok()?)?)
    }

    fn alignment(&self) -> Result<u64, Error> {
        const KEY: &str = "general.alignment";
        let Some(alignment) = self.u32(KEY)? else { return Ok(ALIGNMENT) };
        let alignment = u64::from(alignment);
        if !alignment.is_power_of_two() || !(8..=MAX_ALIGNMENT).contains(&alignment) {
            let problem = format!("`{KEY}` is {alignment}, no power of two from 8 to {MAX_ALIGNMENT}");
            return Err(Error::corrupt(&self.file, problem));
        }
        Ok(alignment)
    }

    /// Takes up tensors whose bytes are counted from `data`.
    fn place(&mut self, found: Vec<Unplaced<'_>>, data: u64, file_len: u64) -> Result<(), Error> {
        let mut spans: Vec<(u64, u64, &str)> = Vec::with_capacity(found.len());
        self.tensors.reserve(found.len());
        for Unplaced { name, kind, shape, offset, len } in found {
            let shown = name.escape_debug();
            let span = data.checked_add(offset).and_then(|start| Some((start, start.checked_add(len)?)));
            let Some((start, end)) = span.filter(|(_, end)| *end <= file_len) else {
                return Err(Error::corrupt(
                    &self.file,
                    format!(
                        "tensor `{shown}` is at {len} bytes from {offset} after its header of {data}, and the file has \
                         {file_len}: it is cut short or damaged"
                    ),
                ));
            };
            spans.push((start, end, name));
            let info = TensorInfo { kind, shape, start, len };
            if self.tensors.insert(name.to_owned(), info).is_some() {
                return Err(Error::corrupt(&self.file, format!("tensor `{shown}` stands twice")));
            }
        }
        spans.sort_unstable();
        for pair in spans.windows(2) {
            let ((_, end, one), (start, _, other)) = (pair[0], pair[1]);
            if start < end {
                let problem = format!("tensors `{}` and `{}` overlap", one.escape_debug(), other.escape_debug());
                return Err(Error::corrupt(&self.file, problem));
            }
        }
        Ok(())
    }
}

/// Reads magic and version.
fn version(file: &str, at: &mut Cursor<'_, '_>) -> Result<(), Error> {
    if at.take(4)? != b"GGUF" {
        return Err(Error::corrupt(file, "it does not begin with GGUF"));
    }
    match at.u32()? {
        2 | 3 => Ok(()),
        0 => Err(Error::corrupt(file, "it is of version 0, which there is not")),
        // Versions are small, so that the wrong byte order shows.
        number if number.swap_bytes() < 1 << 16 => {
            Err(Error::unsupported(file, "it is big-endian: take the little-endian file of this model"))
        }
        number => Err(Error::unsupported(file, format!("it is of version {number}, and versions 2 and 3 are read"))),
    }
}

/// A tensor's info as it stands in the header.
struct Unplaced<'a> {
    name: &'a str,
    kind: GgmlType,
    shape: Vec<usize>,
    /// From the end of the header.
    offset: u64,
    len: u64,
}

impl<'a> Unplaced<'a> {
    fn read(at: &mut Cursor<'_, 'a>, alignment: u64) -> Result<Self, Error> {
        let name = at.name("a tensor's name")?;
        let file = at.file();
        let shown = name.escape_debug();
        let rank = at.u32()?;
        if rank > MAX_RANK {
            return Err(Error::corrupt(file, format!("tensor `{shown}` has {rank} dimensions")));
        }
        let mut shape = Vec::with_capacity(rank as usize);
        for _ in 0..rank {
            shape.push(at.u64()?);
        }
        let (number, offset) = (at.u32()?, at.u64()?);
        let Some(kind) = GgmlType::ALL.into_iter().find(|kind| kind.number() == number) else {
            return Err(match other_kind(number) {
                Some(kind) => Error::unsupported(
                    file,
                    format!("tensor `{shown}` is of kind {kind}: take a Q4_K_M or Q8_0 file of this model"),
                ),
                None => Error::corrupt(file, format!("tensor `{shown}` is of kind {number}, which there is not")),
            });
        };
        // The first dimension of the file is a row, and rows are whole blocks.
        let row = shape.first().copied().unwrap_or(1);
        if !row.is_multiple_of(kind.block()) {
            let problem =
                format!("tensor `{shown}` of kind {kind:?} has rows of {row}, no multiple of {}", kind.block());
            return Err(Error::corrupt(file, problem));
        }
        let len = shape.iter().try_fold(1u64, |count, &size| count.checked_mul(size).filter(|count| *count > 0));
        let len = len.and_then(|count| (count / kind.block()).checked_mul(kind.block_bytes()));
        let sizes = shape.iter().rev().map(|&size| usize::try_from(size).ok()).collect::<Option<Vec<usize>>>();
        let (Some(len), Some(sizes)) = (len, sizes) else {
            return Err(Error::corrupt(file, format!("tensor `{shown}` has an impossible shape of {shape:?}")));
        };
        if !offset.is_multiple_of(alignment) {
            let problem = format!("tensor `{shown}` is at {offset}, no multiple of {alignment}");
            return Err(Error::corrupt(file, problem));
        }
        Ok(Self { name, kind, shape: sizes, offset, len })
    }
}

/// Checks that the files are all those of one model, in order, and that no tensor stands in two of them.
///
/// # Errors
/// [`Error::Missing`] when there are fewer than were split, [`Error::Corrupt`] for any other disagreement.
pub fn check_split(files: &[Gguf<'_>]) -> Result<(), Error> {
    let Some(first) = files.first() else { return Err(Error::Missing("a GGUF file".into())) };
    let whole = first.split()?;
    let (count, tensors) = match whole {
        Some(split) => (split.count, Some(split.tensors)),
        None => (1, None),
    };
    let mut names = HashSet::new();
    for (i, gguf) in files.iter().enumerate() {
        let corrupt = |problem: String| Error::corrupt(&gguf.file, problem);
        let split = gguf.split()?;
        if split.map(|split| (split.count, split.tensors)) != whole.map(|split| (split.count, split.tensors)) {
            return Err(corrupt(format!("it is not of the model that `{}` is of", first.file)));
        }
        let no = split.map_or(0, |split| split.no);
        if no != i as u64 {
            return Err(corrupt(format!("it is part {} of {count}, and part {} was due", no + 1, i + 1)));
        }
        for name in gguf.tensors.keys() {
            if !names.insert(name.as_str()) {
                return Err(corrupt(format!("tensor `{}` stands in another file too", name.escape_debug())));
            }
        }
    }
    if (files.len() as u64) < count {
        return Err(Error::Missing(format!("part {} of the {count} that `{}` has", files.len() + 1, first.file)));
    }
    match tensors {
        Some(tensors) if tensors != names.len() as u64 => {
            let problem = format!("its model claims {tensors} tensors, its {count} files have {}", names.len());
            Err(Error::corrupt(&first.file, problem))
        }
        _ => Ok(()),
    }
}
