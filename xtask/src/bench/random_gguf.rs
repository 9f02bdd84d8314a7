//! A llama of 1.1 billion random weights as a GGUF file: TinyLlama's shape, in the mixtures that people download. Times and
//! bytes do not hang on the weights' values; these have the spread of trained ones, so that nothing overflows.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use rbee_testkit::gguf::{File as Gguf, Tensor, Value};

const HIDDEN: u64 = 2048;
const LAYERS: u64 = 22;
const HEADS: u64 = 32;
const KV_HEADS: u64 = 4;
const MLP: u64 = 5632;
const VOCAB: u64 = 32000;

/// Which kinds a file's matrices have.
#[derive(Clone, Copy, PartialEq, Eq)]
#[expect(non_camel_case_types, reason = "the names that files have")]
pub(super) enum Mixture {
    /// All of them Q8_0.
    Q8_0,
    /// Q4_K; the head, and of half the layers values and the MLP's last, Q6_K: as llama.cpp's `quantize` mixes them.
    Q4_K_M,
}

impl Mixture {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Q8_0 => "Q8_0",
            Self::Q4_K_M => "Q4_K_M",
        }
    }

    fn matrix(self, better: bool) -> Kind {
        match (self, better) {
            (Self::Q8_0, _) => Kind::Q8_0,
            (Self::Q4_K_M, true) => Kind::Q6K,
            (Self::Q4_K_M, false) => Kind::Q4K,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    F32,
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
            Self::Q8_0 => 8,
            Self::Q4K => 12,
            Self::Q6K => 14,
        }
    }

    /// Weights and bytes of a block.
    fn block(self) -> (u64, u64) {
        match self {
            Self::F32 => (1, 4),
            Self::Q8_0 => (32, 34),
            Self::Q4K => (256, 144),
            Self::Q6K => (256, 210),
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

/// Whether llama.cpp takes the larger kind for this layer's values and its MLP's last matrix.
fn is_better(layer: u64) -> bool {
    !(LAYERS / 8..7 * LAYERS / 8).contains(&layer) || (layer - LAYERS / 8) % 3 == 2
}

/// Writes the file.
pub(super) fn write(path: &Path, mixture: Mixture) -> Result<()> {
    let number = |value: u64| Value::U32(value as u32);
    let mut tensors = vec![("token_embd.weight".to_owned(), vec![HIDDEN, VOCAB], mixture.matrix(false))];
    for layer in 0..LAYERS {
        let mut add = |part: &str, dims: &[u64], kind| {
            tensors.push((format!("blk.{layer}.{part}.weight"), dims.to_vec(), kind));
        };
        let (plain, better) = (mixture.matrix(false), mixture.matrix(is_better(layer)));
        let kv = HIDDEN / HEADS * KV_HEADS;
        add("attn_norm", &[HIDDEN], Kind::F32);
        add("attn_q", &[HIDDEN, HIDDEN], plain);
        add("attn_k", &[HIDDEN, kv], plain);
        add("attn_v", &[HIDDEN, kv], better);
        add("attn_output", &[HIDDEN, HIDDEN], plain);
        add("ffn_norm", &[HIDDEN], Kind::F32);
        add("ffn_gate", &[HIDDEN, MLP], plain);
        add("ffn_up", &[HIDDEN, MLP], plain);
        add("ffn_down", &[MLP, HIDDEN], better);
    }
    tensors.push(("output_norm.weight".to_owned(), vec![HIDDEN], Kind::F32));
    tensors.push(("output.weight".to_owned(), vec![HIDDEN, VOCAB], mixture.matrix(true)));

    let mut file = Gguf::new()
        .key("general.architecture", "llama")
        .key("llama.block_count", number(LAYERS))
        .key("llama.context_length", number(2048))
        .key("llama.embedding_length", number(HIDDEN))
        .key("llama.feed_forward_length", number(MLP))
        .key("llama.attention.head_count", number(HEADS))
        .key("llama.attention.head_count_kv", number(KV_HEADS))
        .key("llama.rope.dimension_count", number(HIDDEN / HEADS))
        .key("llama.rope.freq_base", 10000f32)
        .key("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
        .key("tokenizer.ggml.model", "gpt2")
        .key("tokenizer.ggml.pre", "gpt-2")
        .key("tokenizer.ggml.tokens", Value::Texts(tokens()))
        .key("tokenizer.ggml.token_type", Value::I32s((0..VOCAB).map(|id| if id == 0 { 3 } else { 1 }).collect()))
        .key("tokenizer.ggml.merges", Value::Texts(vec!["t h".into()]))
        .key("tokenizer.ggml.eos_token_id", number(0));
    let mut end = 0u64;
    let sized = |dims: &[u64], kind: Kind| {
        let (weights, bytes) = kind.block();
        dims.iter().product::<u64>() / weights * bytes
    };
    for (name, dims, kind) in &tensors {
        let offset = end.next_multiple_of(file.alignment);
        file.tensors.push(Tensor { name: name.clone().into(), dims: dims.clone(), kind: kind.number(), offset });
        end = offset + sized(dims, *kind);
    }

    let mut out = BufWriter::new(File::create(path).with_context(|| path.display().to_string())?);
    let header = file.bytes();
    let mut at = header.len() as u64;
    out.write_all(&header)?;
    let start = at.next_multiple_of(file.alignment);
    for ((_, dims, kind), tensor) in tensors.iter().zip(&file.tensors) {
        out.write_all(&vec![0; (start + tensor.offset - at) as usize])?;
        let (blocks, mut left) = (kind.blocks(), sized(dims, *kind));
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
fn tokens() -> Vec<String> {
    let printable = |byte: &u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let letters = (0..256).filter(printable).chain(256..324).filter_map(char::from_u32);
    let mut tokens: Vec<String> =
        std::iter::once("<|endoftext|>".to_owned()).chain(letters.map(String::from)).collect();
    tokens.push("th".to_owned());
    tokens.extend((tokens.len() as u64..VOCAB).map(|id| format!("<|spare {id}|>")));
    tokens
}
