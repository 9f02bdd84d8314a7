//! The header of a safetensors file (format: huggingface/safetensors, README "Format"): 8 bytes of length, a JSON
//! object of tensors, then their bytes without holes.

use std::collections::HashMap;
use std::fmt;

use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, de};

use crate::Error;

/// Longest header, in bytes. The largest published models have some 10 MB.
pub const MAX_HEADER: u64 = 32 << 20;

/// Most tensors of one file. The largest published mixtures of experts have some 100,000.
pub const MAX_TENSORS: usize = 250_000;

/// Most files of a sharded model.
const MAX_SHARDS: usize = 4096;

const MAX_RANK: usize = 8;
const MAX_NAME: usize = 512;

/// Type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 4 bytes.
    F32,
    /// 2 bytes, IEEE half.
    F16,
    /// 2 bytes, upper half of an f32.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its elements' type; `None` for one that no supported architecture uses.
    pub dtype: Option<Dtype>,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Offset of its first byte from the start of the file.
    pub start: u64,
    /// Its bytes.
    pub len: u64,
}

/// The tensors of a file, checked: within the file, without overlap or hole, each as long as its shape says.
#[derive(Clone, Debug, Default)]
pub struct Index {
    /// By name.
    pub tensors: HashMap<String, TensorInfo>,
}

/// Length of the header's JSON, from the file's first 8 bytes.
///
/// # Errors
/// [`Error::Corrupt`] when the file is too short for it, or it is longer than [`MAX_HEADER`].
pub fn header_len(file: &str, first: &[u8], file_len: u64) -> Result<u64, Error> {
    let bytes: [u8; 8] = first
        .get(..8)
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| Error::corrupt(file, "it is shorter than its header's length"))?;
    let len = u64::from_le_bytes(bytes);
    if len > MAX_HEADER {
        return Err(Error::corrupt(file, format!("its header claims {len} bytes, more than {MAX_HEADER}")));
    }
    if len + 8 > file_len {
        return Err(Error::corrupt(file, format!("its header claims {len} bytes, the file has {file_len}")));
    }
    Ok(len)
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

struct Entries(Vec<(String, RawTensor)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(de: D) -> Result<Self, D::Error> {
        struct Each;
        impl<'de> Visitor<'de> for Each {
            type Value = Entries;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        // Nothing in it changes a result.
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    if entries.len() >= MAX_TENSORS {
                        return Err(de::Error::custom(format!("more than {MAX_TENSORS} tensors")));
                    }
                    if name.len() > MAX_NAME {
                        return Err(de::Error::custom("a tensor's name is too long"));
                    }
                    entries.push((name, map.next_value()?));
                }
                Ok(Entries(entries))
            }
        }
        de.deserialize_map(Each)
    }
}

impl Index {
    /// Reads and checks a header. `header` is its JSON, without the 8 bytes of length.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming what is wrong.
    pub fn parse(file: &str, header: &[u8], file_len: u64) -> Result<Self, Error> {
        let corrupt = |problem: String| Error::corrupt(file, problem);
        let Entries(entries) =
            serde_json::from_slice(header).map_err(|error| corrupt(format!("its header is not valid: {error}")))?;
        let data = header.len() as u64 + 8;
        let data_len = file_len.checked_sub(data).ok_or_else(|| corrupt("it ends in its header".into()))?;
        let mut spans: Vec<(u64, u64)> = Vec::with_capacity(entries.len());
        let mut tensors = HashMap::with_capacity(entries.len());
        for (name, raw) in entries {
            let shown = name.escape_debug();
            let (begin, end) = raw.data_offsets;
            if begin > end || end > data_len {
                return Err(corrupt(format!(
                    "tensor `{shown}` is at bytes {begin} to {end} of {data_len}: the file is cut short or damaged"
                )));
            }
            if raw.shape.len() > MAX_RANK {
                return Err(corrupt(format!("tensor `{shown}` has {} dimensions", raw.shape.len())));
            }
            let (dtype, bits) =
                dtype(&raw.dtype).ok_or_else(|| corrupt(format!("tensor `{shown}` has an unknown type")))?;
            let bytes = raw
                .shape
                .iter()
                .try_fold(1u64, |count, &size| count.checked_mul(size))
                .and_then(|count| count.checked_mul(bits))
                .filter(|bits| bits % 8 == 0)
                .map(|bits| bits / 8);
            if bytes != Some(end - begin) {
                return Err(corrupt(format!("tensor `{shown}` of shape {:?} has {} bytes", raw.shape, end - begin)));
            }
            let shape = raw
                .shape
                .iter()
                .map(|&size| usize::try_from(size).ok())
                .collect::<Option<Vec<usize>>>()
                .ok_or_else(|| corrupt(format!("tensor `{shown}` is too large")))?;
            spans.push((begin, end));
            let info = TensorInfo { dtype, shape, start: data + begin, len: end - begin };
            if tensors.insert(name.clone(), info).is_some() {
                return Err(corrupt(format!("tensor `{shown}` stands twice")));
            }
        }
        spans.sort_unstable();
        let mut at = 0;
        for (begin, end) in spans {
            if begin != at {
                return Err(corrupt("its tensors overlap or leave holes".into()));
            }
            at = end;
        }
        if at != data_len {
            return Err(corrupt(format!("it has {} bytes after its last tensor", data_len - at)));
        }
        Ok(Self { tensors })
    }
}

/// The type of this name, if we compute with it, and its bits.
fn dtype(name: &str) -> Option<(Option<Dtype>, u64)> {
    Some(match name {
        "F32" => (Some(Dtype::F32), 32),
        "F16" => (Some(Dtype::F16), 16),
        "BF16" => (Some(Dtype::Bf16), 16),
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" => (None, 8),
        "I16" | "U16" => (None, 16),
        "I32" | "U32" => (None, 32),
        "F64" | "I64" | "U64" | "C64" => (None, 64),
        "F4" => (None, 4),
        "F6_E2M3" | "F6_E3M2" => (None, 6),
        _ => return None,
    })
}

/// Which file each tensor of a sharded model is in.
#[derive(Clone, Debug, Default)]
pub struct Shards {
    /// The files, in order of their names.
    pub files: Vec<String>,
    /// The file of each tensor, as an index into `files`.
    pub tensors: HashMap<String, usize>,
}

impl Shards {
    /// The file with the index.
    pub const FILE: &str = "model.safetensors.index.json";

    /// Reads and checks `model.safetensors.index.json`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is not an index, or names a file outside its folder.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        #[derive(Deserialize)]
        struct Raw {
            weight_map: HashMap<String, String>,
        }
        let corrupt = |problem: String| Error::corrupt(Self::FILE, problem);
        let raw: Raw = serde_json::from_slice(bytes).map_err(|error| corrupt(error.to_string()))?;
        if raw.weight_map.len() > MAX_TENSORS {
            return Err(corrupt(format!("it names more than {MAX_TENSORS} tensors")));
        }
        let mut files: Vec<String> = raw.weight_map.values().cloned().collect();
        files.sort_unstable();
        files.dedup();
        if files.is_empty() || files.len() > MAX_SHARDS {
            return Err(corrupt(format!("it names {} files", files.len())));
        }
        for file in &files {
            let plain = file.ends_with(".safetensors")
                && !file.starts_with('.')
                && file.len() <= 255
                && file.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
            if !plain {
                return Err(corrupt(format!("`{}` is not the name of a file beside it", file.escape_debug())));
            }
        }
        let tensors = raw.weight_map.into_iter().map(|(tensor, file)| {
            let at = files.binary_search(&file).expect("the files were collected from this map");
            (tensor, at)
        });
        Ok(Self { tensors: tensors.collect(), files })
    }

    /// Checks the index against the shards' own headers, given in the order of `files`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when a tensor is not where the index says, or stands in two files.
    pub fn check(&self, indexes: &[&Index]) -> Result<(), Error> {
        let mut found = 0;
        for (tensor, &file) in &self.tensors {
            if !indexes.get(file).is_some_and(|index| index.tensors.contains_key(tensor)) {
                let problem = format!("tensor `{}` is not in {}", tensor.escape_debug(), self.files[file]);
                return Err(Error::corrupt(Self::FILE, problem));
            }
            found += 1;
        }
        let there: usize = indexes.iter().map(|index| index.tensors.len()).sum();
        if there != found {
            let problem = format!("it names {found} tensors, its files have {there}");
            return Err(Error::corrupt(Self::FILE, problem));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(header: &str, data: u64) -> Result<Index, Error> {
        Index::parse("f", header.as_bytes(), header.len() as u64 + 8 + data)
    }

    #[test]
    fn a_sound_header_is_read() {
        let index = parse(
            r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#,
            16,
        )
        .unwrap();
        assert_eq!(index.tensors["b"].shape, [2, 3]);
        assert_eq!(index.tensors["b"].len, 12);
    }

    #[test]
    fn hostile_headers_are_refused() {
        for (header, data, want) in [
            ("", 0, "not valid"),
            ("[]", 0, "not valid"),
            (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 4, "has 4 bytes"),
            (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 4, "cut short"),
            (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[8,4]}}"#, 8, "cut short"),
            (r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#, 0, "has 0 bytes"),
            (r#"{"a":{"dtype":"X","shape":[],"data_offsets":[0,4]}}"#, 4, "unknown type"),
            (
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
                8,
                "stands twice",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
                4,
                "overlap",
            ),
            (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, 8, "holes"),
            (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 8, "after its last"),
            (r#"{"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}}"#, 4, "dimensions"),
        ] {
            let error = parse(header, data).unwrap_err().to_string();
            assert!(error.contains(want), "{header}: {error}");
        }
        assert!(header_len("f", &u64::MAX.to_le_bytes(), 100).is_err());
        assert!(header_len("f", &200u64.to_le_bytes(), 100).is_err());
        assert!(header_len("f", &[0; 4], 4).is_err());
    }

    #[test]
    fn a_flood_of_tensors_is_refused() {
        let mut header = String::from("{");
        for i in 0..=MAX_TENSORS {
            header.push_str(&format!(r#""{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}},"#));
        }
        header.push_str(r#""x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#);
        assert!(parse(&header, 0).unwrap_err().to_string().contains("more than"));
    }

    #[test]
    fn a_header_of_a_million_tensors_is_refused_unread() {
        // 1.5 million tensors take 60 bytes each at least.
        let len = 1_500_000u64 * 60;
        let error = header_len("f", &len.to_le_bytes(), len + 8).unwrap_err().to_string();
        assert!(error.contains("more than"), "{error}");
    }

    #[test]
    fn shards_stay_beside_their_index() {
        let index = |file: &str| Shards::parse(format!(r#"{{"weight_map":{{"a":"{file}"}}}}"#).as_bytes());
        assert_eq!(index("model-1.safetensors").unwrap().files, ["model-1.safetensors"]);
        for file in
            ["../x.safetensors", "/x.safetensors", "a/x.safetensors", ".x.safetensors", "x.bin", "..safetensors", ""]
        {
            assert!(index(file).is_err(), "{file}");
        }
        for wrong in ["", "[]", "{}", r#"{"weight_map":{}}"#, r#"{"weight_map":{"a":1}}"#] {
            assert!(Shards::parse(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_index_and_its_shards_agree() {
        let shards = Shards::parse(br#"{"weight_map":{"a":"2.safetensors","b":"1.safetensors"}}"#).unwrap();
        let index = |names: &[&str]| {
            let tensor = |name: &&str| format!(r#""{name}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#);
            parse(&format!("{{{}}}", names.iter().map(tensor).collect::<Vec<_>>().join(",")), 0).unwrap()
        };
        shards.check(&[&index(&["b"]), &index(&["a"])]).unwrap();
        for (one, two, want) in [
            (&["a"][..], &["b"][..], "is not in"),
            (&["b"], &[], "is not in"),
            (&["b", "a"], &["a"], "its files have 3"),
            (&["b", "c"], &["a"], "its files have 3"),
        ] {
            let error = shards.check(&[&index(one), &index(two)]).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }
}
