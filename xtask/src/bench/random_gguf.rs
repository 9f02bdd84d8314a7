//! Llamas of real shapes and random weights as GGUF files, in the mixtures that people download. Times and bytes do not hang on
//! the weights' values; these have the spread of trained ones, so that nothing overflows.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use rbee_testkit::gguf::{File as Gguf, Tensor, Value};

/// Positions that files say they are made for: what benches ask of any shape.
const CONTEXT: u64 = 16384;

/// A model's sizes.
#[derive(Debug)]
pub(super) struct Shape {
    pub(super) name: &'static str,
    hidden: u64,
    layers: u64,
    heads: u64,
    kv_heads: u64,
    mlp: u64,
    vocab: u64,
    /// Whether the head is the embedding.
    tied: bool,
}

/// TinyLlama's.
pub(super) const SHAPE_1B: Shape =
    Shape { name: "1.1b", hidden: 2048, layers: 22, heads: 32, kv_heads: 4, mlp: 5632, vocab: 32000, tied: false };

/// SmolLM2-135M's, TinyLlama's and Llama 3.2 3B's.
pub(super) const SHAPES: [&Shape; 3] = [
    &Shape { name: "135m", hidden: 576, layers: 30, heads: 9, kv_heads: 3, mlp: 1536, vocab: 49152, tied: true },
    &SHAPE_1B,
    &Shape { name: "3b", hidden: 3072, layers: 28, heads: 24, kv_heads: 8, mlp: 8192, vocab: 128_256, tied: true },
];

/// What a step does with a file's weights.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Work {
    /// Bytes of weights that each step reads, as the file has them.
    pub(super) bytes: u64,
    /// The same as rbee keeps them.
    pub(super) kept: u64,
    /// Weights that each token of a step meets.
    pub(super) layers: u64,
    /// Weights that each token meets whose logits are wanted.
    pub(super) head: u64,
    /// Bytes of keys and values of a position, two a value.
    pub(super) kv: u64,
}

/// Which kinds a file's matrices have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(non_camel_case_types, reason = "the names that files have")]
pub(super) enum Mixture {
    /// All of them Q8_0.
    Q8_0,
    /// Q4_K; the head, and of half the layers values and the shape.mlp's last, Q6_K: as llama.cpp's `quantize` mixes them.
    Q4_K_M,
    /// All of them bf16.
    BF16,
    /// Q4_0, the head Q6_K.
    Q4_0,
}

impl Mixture {
    pub(super) const ALL: [Self; 4] = [Self::Q8_0, Self::Q4_K_M, Self::BF16, Self::Q4_0];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Q8_0 => "Q8_0",
            Self::Q4_K_M => "Q4_K_M",
            Self::BF16 => "BF16",
            Self::Q4_0 => "Q4_0",
        }
    }

    /// The kind of a matrix with rows of this width. What the blocks of its kind do not fit is Q8_0.
    fn matrix(self, place: Place, width: u64) -> Kind {
        let kind = match (self, place) {
            (Self::Q8_0, _) => Kind::Q8_0,
            (Self::BF16, _) => Kind::Bf16,
            (Self::Q4_K_M, Place::Plain) => Kind::Q4K,
            (Self::Q4_0, Place::Plain | Place::Better) => Kind::Q4_0,
            (Self::Q4_K_M, Place::Better | Place::Head) | (Self::Q4_0, Place::Head) => Kind::Q6K,
        };
        if width.is_multiple_of(kind.block().0) { kind } else { Kind::Q8_0 }
    }
}

/// How much a matrix's exactness matters.
#[derive(Clone, Copy)]
enum Place {
    Plain,
    Better,
    Head,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    F32,
    Bf16,
    Q4_0,
    Q8_0,
    Q4K,
    Q6K,
}

/// The f16 of a power of two, times 1 and so many 1,024ths.
fn half(exponent: i32, more: u16) -> [u8; 2] {
    (((exponent + 15) as u16) << 10 | more).to_le_bytes()
}

impl Kind {
    fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::Bf16 => 30,
            Self::Q4_0 => 2,
            Self::Q8_0 => 8,
            Self::Q4K => 12,
            Self::Q6K => 14,
        }
    }

    /// Weights and bytes of a block.
    fn block(self) -> (u64, u64) {
        match self {
            Self::F32 => (1, 4),
            Self::Bf16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q8_0 => (32, 34),
            Self::Q4K => (256, 144),
            Self::Q6K => (256, 210),
        }
    }

    /// Bytes of a tensor.
    fn sized(self, dims: &[u64]) -> u64 {
        let (weights, bytes) = self.block();
        dims.iter().product::<u64>() / weights * bytes
    }

    /// Bytes of a matrix in rbee's memory: bf16 takes twelve bits there, and a byte for every 32 weights.
    fn kept(self, dims: &[u64]) -> u64 {
        match self {
            Self::Bf16 => dims.iter().product::<u64>() / 32 * 49,
            _ => self.sized(dims),
        }
    }

    /// About a mebibyte of blocks, of weights around 0.02.
    fn blocks(self) -> Vec<u8> {
        let mut state = 1u64;
        let mut noise = |bytes: &mut Vec<u8>, count: usize| {
            for _ in 0..count {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                bytes.push((state >> 56) as u8);
            }
        };
        let mut out = Vec::new();
        for _ in 0..(1u64 << 20) / self.block().1 {
            match self {
                Self::F32 => out.extend(1f32.to_le_bytes()),
                // From 2^-7 on to 2^-5, of either sign.
                Self::Bf16 => {
                    noise(&mut out, 2);
                    let high = out.len() - 1;
                    out[high] = out[high] & 0x80 | 0x3c;
                }
                Self::Q4_0 => {
                    out.extend(half(-8, 256));
                    noise(&mut out, 16);
                }
                Self::Q8_0 => {
                    out.extend(half(-12, 512));
                    noise(&mut out, 32);
                }
                // Every scale and minimum is 32; a weight of 7.5 stands for 0.
                Self::Q4K => {
                    out.extend(half(-13, 512));
                    out.extend(half(-10, 416));
                    out.extend([0xa0; 8]);
                    out.extend([0; 4]);
                    noise(&mut out, 128);
                }
                Self::Q6K => {
                    noise(&mut out, 192);
                    out.extend([16; 16]);
                    out.extend(half(-14, 512));
                }
            }
        }
        out
    }
}

impl Shape {
    /// Whether llama.cpp takes the larger kind for this layer's values and its shape.mlp's last matrix.
    fn is_better(&self, layer: u64) -> bool {
        let eighth = self.layers / 8;
        !(eighth..7 * self.layers / 8).contains(&layer) || (layer - eighth) % 3 == 2
    }

    fn tensors(&self, mixture: Mixture) -> Vec<(String, Vec<u64>, Kind)> {
        let hidden = self.hidden;
        let matrix = |place, [width, rows]: [u64; 2]| (vec![width, rows], mixture.matrix(place, width));
        let norm = || (vec![hidden], Kind::F32);
        let embedding = if self.tied { Place::Head } else { Place::Plain };
        let mut tensors = vec![("token_embd".to_owned(), matrix(embedding, [hidden, self.vocab]))];
        for layer in 0..self.layers {
            let mut add = |part: &str, tensor| tensors.push((format!("blk.{layer}.{part}"), tensor));
            let better = if self.is_better(layer) { Place::Better } else { Place::Plain };
            let kv = hidden / self.heads * self.kv_heads;
            add("attn_norm", norm());
            add("attn_q", matrix(Place::Plain, [hidden, hidden]));
            add("attn_k", matrix(Place::Plain, [hidden, kv]));
            add("attn_v", matrix(better, [hidden, kv]));
            add("attn_output", matrix(Place::Plain, [hidden, hidden]));
            add("ffn_norm", norm());
            add("ffn_gate", matrix(Place::Plain, [hidden, self.mlp]));
            add("ffn_up", matrix(Place::Plain, [hidden, self.mlp]));
            add("ffn_down", matrix(better, [self.mlp, hidden]));
        }
        tensors.push(("output_norm".to_owned(), norm()));
        if !self.tied {
            tensors.push(("output".to_owned(), matrix(Place::Head, [hidden, self.vocab])));
        }
        tensors.into_iter().map(|(name, (dims, kind))| (format!("{name}.weight"), dims, kind)).collect()
    }

    /// What a step does with the weights of such a file.
    pub(super) fn work(&self, mixture: Mixture) -> Work {
        let head = self.hidden * self.vocab;
        let mut work = Work { head, kv: 4 * self.layers * self.hidden / self.heads * self.kv_heads, ..Work::default() };
        for (name, dims, kind) in self.tensors(mixture) {
            // Of an embedding that is not the head as well, a step reads a row for each token.
            if name != "token_embd.weight" || self.tied {
                work.bytes += kind.sized(&dims);
                work.kept += kind.kept(&dims);
            }
            if name.starts_with("blk.") && dims.len() > 1 {
                work.layers += dims.iter().product::<u64>();
            }
        }
        work
    }
}

/// Writes the file.
pub(super) fn write(path: &Path, shape: &Shape, mixture: Mixture) -> Result<()> {
    let number = |value: u64| Value::U32(value as u32);
    let tensors = shape.tensors(mixture);
    let mut file = Gguf::new()
        .key("general.architecture", "llama")
        .key("llama.block_count", number(shape.layers))
        .key("llama.context_length", number(CONTEXT))
        .key("llama.embedding_length", number(shape.hidden))
        .key("llama.feed_forward_length", number(shape.mlp))
        .key("llama.attention.head_count", number(shape.heads))
        .key("llama.attention.head_count_kv", number(shape.kv_heads))
        .key("llama.rope.dimension_count", number(shape.hidden / shape.heads))
        .key("llama.rope.freq_base", 10000f32)
        .key("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
        .key("tokenizer.ggml.model", "gpt2")
        .key("tokenizer.ggml.pre", "gpt-2")
        .key("tokenizer.ggml.tokens", Value::Texts(tokens(shape.vocab)))
        .key("tokenizer.ggml.token_type", Value::I32s((0..shape.vocab).map(|id| if id == 0 { 3 } else { 1 }).collect()))
        .key("tokenizer.ggml.merges", Value::Texts(vec!["t h".into()]))
        .key("tokenizer.ggml.eos_token_id", number(0));
    let mut end = 0u64;
    for (name, dims, kind) in &tensors {
        let offset = end.next_multiple_of(file.alignment);
        file.tensors.push(Tensor { name: name.clone().into(), dims: dims.clone(), kind: kind.number(), offset });
        end = offset + kind.sized(dims);
    }

    let mut out = BufWriter::new(File::create(path).with_context(|| path.display().to_string())?);
    let header = file.bytes();
    let mut at = header.len() as u64;
    out.write_all(&header)?;
    let start = at.next_multiple_of(file.alignment);
    for ((_, dims, kind), tensor) in tensors.iter().zip(&file.tensors) {
        out.write_all(&vec![0; (start + tensor.offset - at) as usize])?;
        let (blocks, mut left) = (kind.blocks(), kind.sized(dims));
        at = start + tensor.offset + left;
        while left > 0 {
            let part = &blocks[..blocks.len().min(left as usize)];
            out.write_all(part)?;
            left -= part.len() as u64;
        }
    }
    out.flush()?;
    Ok(())
}

/// An end of text, the 256 bytes as byte-level BPE writes them, one merge, and names for the rest.
fn tokens(vocab: u64) -> Vec<String> {
    let printable = |byte: &u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let letters = (0..256).filter(printable).chain(256..324).filter_map(char::from_u32);
    let mut tokens: Vec<String> =
        std::iter::once("<|endoftext|>".to_owned()).chain(letters.map(String::from)).collect();
    tokens.push("th".to_owned());
    tokens.extend((tokens.len() as u64..vocab).map(|id| format!("<|spare {id}|>")));
    tokens
}
