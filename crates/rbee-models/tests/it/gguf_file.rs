//! The GGUF files of `tests/fixtures/gguf_models.json`, made again, and others of our own.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use rbee_kernels::packed::widen;
use rbee_kernels::{Blocks, WeightType};
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::reference::fixtures;

#[derive(Deserialize)]
pub struct Fixture {
    pub kinds: Vec<Kind>,
    pub models: Vec<Model>,
}

/// A kind of tensor: its name, the bytes of a block, the numbers in it, and the digest of what random blocks stand for.
#[derive(Deserialize)]
pub struct Kind(pub String, pub usize, pub Vec<Number>, pub Option<String>);

/// A number within a block: where, how many bytes, the bits that stay, and those that are set.
#[derive(Clone, Copy, Deserialize)]
pub struct Number(pub usize, pub usize, pub u32, pub u32);

#[derive(Deserialize)]
pub struct Model {
    pub name: String,
    /// Where the weights are from; random blocks where nowhere.
    pub folder: Option<String>,
    /// What the folder's config has otherwise.
    #[serde(default)]
    pub config: Value,
    layers: usize,
    keys: Vec<(String, String, Value)>,
    tensors: Vec<Recipe>,
    sha256: String,
    pub cases: Vec<Case>,
}

/// How a tensor is made. `*` stands for each layer, `#` for each expert.
#[derive(Clone, Deserialize)]
struct Recipe {
    to: String,
    from: Option<String>,
    experts: Option<usize>,
    /// Rows are put in neighbouring pairs within each head.
    heads: Option<usize>,
    /// One is added.
    #[serde(default)]
    one: bool,
    values: Option<Vec<f32>>,
    kind: Option<String>,
    shape: Option<Vec<usize>>,
}

#[derive(Deserialize)]
pub struct Case {
    pub prompt: Vec<u32>,
    /// After each step the five likeliest tokens and their probabilities. The first is the next step's.
    pub top: Vec<Vec<(u32, f64)>>,
}

pub fn fixture() -> Fixture {
    serde_json::from_slice(&std::fs::read(fixtures().join("gguf_models.json")).unwrap()).unwrap()
}

/// A file as it is to be written.
#[derive(Clone)]
pub struct File {
    /// Name, type and bytes.
    pub keys: Vec<(String, u32, Vec<u8>)>,
    pub tensors: Vec<Tensor>,
}

#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub kind: u32,
    pub bytes: Vec<u8>,
}

impl Tensor {
    pub fn kind(&self) -> WeightType {
        KINDS.iter().map(|name| kind(name)).find(|(number, _)| *number == self.kind).unwrap().1
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.bytes());
}

fn key(name: &str, kind: &str, value: &Value) -> (String, u32, Vec<u8>) {
    let mut out = Vec::new();
    let mut texts = |start: &str| {
        let count = value.as_u64().unwrap();
        out.extend(8u32.to_le_bytes());
        out.extend(count.to_le_bytes());
        (0..count).for_each(|i| text(&mut out, &format!("{start}{i}")));
        9
    };
    let number = match kind {
        "tokens" => texts("t"),
        "merges" => texts("t "),
        "text" => {
            text(&mut out, value.as_str().unwrap());
            8
        }
        "u32" => {
            out.extend((value.as_u64().unwrap() as u32).to_le_bytes());
            4
        }
        "f32" => {
            out.extend((value.as_f64().unwrap() as f32).to_le_bytes());
            6
        }
        _ => unreachable!("{kind} is no type of a key"),
    };
    (name.to_owned(), number, out)
}

impl File {
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (name, kind, value) in &self.keys {
            text(&mut out, name);
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            text(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|dim| out.extend((*dim as u64).to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset += tensor.bytes.len().next_multiple_of(32);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        for tensor in &self.tensors {
            out.extend(&tensor.bytes);
            out.resize(out.len().next_multiple_of(32), 0);
        }
        out
    }

    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    pub fn set(&mut self, name: &str, kind: &str, value: &Value) {
        self.keys.retain(|(key, ..)| key != name);
        self.keys.push(key(name, kind, value));
    }

    /// The file in a folder of its own.
    pub fn written(&self) -> (TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, self.bytes()).unwrap();
        (folder, path)
    }
}

/// All tensors of a folder, as f32.
fn weights(folder: &Path) -> HashMap<String, (Vec<usize>, Vec<f32>)> {
    let mut all = HashMap::new();
    for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if path.extension().is_none_or(|kind| kind != "safetensors") {
            continue;
        }
        let bytes = std::fs::read(path).unwrap();
        let (len, rest) = bytes.split_first_chunk().unwrap();
        let (header, data) = rest.split_at(u64::from_le_bytes(*len) as usize);
        let header: HashMap<String, Value> = serde_json::from_slice(header).unwrap();
        for (name, info) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
            let at = |i: usize| info["data_offsets"][i].as_u64().unwrap() as usize;
            let kind = match info["dtype"].as_str().unwrap() {
                "F32" => WeightType::F32,
                "F16" => WeightType::F16,
                "BF16" => WeightType::Bf16,
                other => unreachable!("{name} is {other}"),
            };
            let shape = serde_json::from_value(info["shape"].clone()).unwrap();
            all.insert(name, (shape, widen(kind, &data[at(0)..at(1)]).unwrap()));
        }
    }
    all
}

/// SplitMix64 of a counter.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let words = (1..=len.div_ceil(8) as u64).map(|i| {
        let mut z = ((seed << 32) + i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    });
    words.flat_map(u64::to_le_bytes).take(len).collect()
}

/// Random blocks: each byte by chance, but for the exponents of numbers.
pub fn random(seed: u64, kind: &Kind, blocks: usize) -> Vec<u8> {
    let mut out = noise(seed, blocks * kind.1);
    for block in out.chunks_exact_mut(kind.1) {
        for Number(at, width, keep, put) in kind.2.iter().copied() {
            let mut bytes = [0; 4];
            bytes[..width].copy_from_slice(&block[at..at + width]);
            let bits = u32::from_le_bytes(bytes) & keep | put;
            block[at..at + width].copy_from_slice(&bits.to_le_bytes()[..width]);
        }
    }
    out
}

const KINDS: [&str; 13] =
    ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"];

/// The format's number of a kind, and what it is to the kernels.
pub fn kind(name: &str) -> (u32, WeightType) {
    let blocks = |number, blocks| (number, WeightType::Blocks(blocks));
    match name {
        "F32" | "norm" => (0, WeightType::F32),
        "F16" => (1, WeightType::F16),
        "BF16" => (30, WeightType::Bf16),
        "Q4_0" => blocks(2, Blocks::Q4_0),
        "Q4_1" => blocks(3, Blocks::Q4_1),
        "Q5_0" => blocks(6, Blocks::Q5_0),
        "Q5_1" => blocks(7, Blocks::Q5_1),
        "Q8_0" => blocks(8, Blocks::Q8_0),
        "Q2_K" => blocks(10, Blocks::Q2K),
        "Q3_K" => blocks(11, Blocks::Q3K),
        "Q4_K" => blocks(12, Blocks::Q4K),
        "Q5_K" => blocks(13, Blocks::Q5K),
        "Q6_K" => blocks(14, Blocks::Q6K),
        _ => unreachable!("{name} is no kind of tensor"),
    }
}

/// Rows of each head's two halves, by turns.
fn paired(values: &[f32], rows: usize, heads: usize) -> Vec<f32> {
    let (row, half) = (values.len() / rows, rows / heads / 2);
    let order = (0..heads).flat_map(|head| (0..2 * half).map(move |i| head * 2 * half + i % 2 * half + i / 2));
    order.flat_map(|from| values[from * row..][..row].iter().copied()).collect()
}

impl Model {
    /// The recipe's tensors with each layer's.
    fn recipes(&self) -> Vec<Recipe> {
        let mut all = Vec::new();
        for recipe in &self.tensors {
            let layers = if recipe.to.contains('*') { self.layers } else { 1 };
            all.extend((0..layers).map(|layer| {
                let number = |text: &String| text.replace('*', &layer.to_string());
                Recipe { to: number(&recipe.to), from: recipe.from.as_ref().map(number), ..recipe.clone() }
            }));
        }
        all
    }

    /// The file that llama.cpp ran.
    pub fn file(&self, kinds: &[Kind]) -> File {
        let from = self.folder.as_ref().map(|folder| weights(&fixtures().join(folder))).unwrap_or_default();
        let plain = |name, shape: Vec<usize>, values: &[f32]| {
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            Tensor { name, shape, kind: 0, bytes }
        };
        let one = |(seed, recipe): (usize, Recipe)| {
            if let (Some(kind_name), Some(shape)) = (recipe.kind, recipe.shape) {
                let of = kinds.iter().find(|kind| kind.0 == kind_name).unwrap();
                let (number, kind) = kind(&kind_name);
                let blocks = shape.iter().product::<usize>() / 256 * kind.row(256) / of.1;
                return Tensor { name: recipe.to, shape, kind: number, bytes: random(seed as u64, of, blocks) };
            }
            if let Some(values) = recipe.values {
                return plain(recipe.to, vec![values.len()], &values);
            }
            let source = recipe.from.unwrap();
            if let Some(experts) = recipe.experts {
                let all: Vec<_> = (0..experts).map(|i| &from[&source.replace('#', &i.to_string())]).collect();
                let values: Vec<f32> = all.iter().flat_map(|(_, values)| values).copied().collect();
                return plain(recipe.to, [&[experts], &all[0].0[..]].concat(), &values);
            }
            let (shape, values) = &from[&source];
            let mut values = values.clone();
            if let Some(heads) = recipe.heads {
                values = paired(&values, shape[0], heads);
            }
            if recipe.one {
                values.iter_mut().for_each(|value| *value += 1.0);
            }
            plain(recipe.to, shape.clone(), &values)
        };
        let keys = self.keys.iter().map(|(name, kind, value)| key(name, kind, value)).collect();
        let file = File { keys, tensors: self.recipes().into_iter().enumerate().map(one).collect() };
        let digest: String = Sha256::digest(file.bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(digest, self.sha256, "{} is not the file that llama.cpp ran", self.name);
        file
    }
}
