//! `docs/models.md`: what is verified, from the models that the tests compare with the reference.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use rbee_weights::config::encoder::{EncoderActivation, EncoderConfig};
use rbee_weights::config::sentence::{self, Modules};
use rbee_weights::config::{Mlp, ModelConfig, NormPlace, QkNorm, RopeScaling};
use serde_json::Value;

const ABOUT: &str = "# Models

`--model` takes a repository of the hub (`org/name`, `org/name@revision`) or a folder as one has it: `config.json`, `tokenizer.json` (with `tokenizer_config.json` or
`chat_template.jinja` for chats), and `model.safetensors` or shards with `model.safetensors.index.json`; or a GGUF file, see below. On a CPU weights in f32 and
f16 are kept in their type and meet activations in f32; weights in bf16 are kept as whole numbers of 12 bits with an exponent for every 32, and meet activations of
15 bits and a sign (`RBEE_EXACT=1`: as those in f16, at half of the speed). Sums are in f32. With `--quantize q8_0` matrices are kept with 8.5 bits a weight, with `--quantize q4_k`
with 4.5, and embedding and head with 8.5; matrices whose rows are not whole blocks (of 32, of 256) have the next larger form, and
routers keep their type. The KV cache has the weights' type, f16 beside quantized weights, or `--kv-type f32|f16|bf16|q8_0`.

Each line below is a small random model whose logits and greedy tokens `cargo xtask test` compares with transformers in f32: the
largest error of a logit is below 1e-4 with `RBEE_EXACT=1` and below 2e-3 without, and 64 greedy tokens are the same up to the first place where the reference's two best
are closer than 1e-3. Prompts of 7 and 45 tokens, or longer, go beyond every window. `tests/fixtures/` has the models and the
script that makes them.

| `model_type` | model | weights | what it shows |
|---|---|---|---|
";

const REST: &str = "
## GGUF

A file's path, `org/name:FILE.gguf` or `org/name:Q4_K_M`; of one that was split, any part or the first. Nothing else is needed: what
`config.json` and the tokenizer's files say is read from the metadata. Architectures: llama (Mistral and Mixtral with it), qwen2, qwen3,
qwen3moe, phi3, gemma2, gemma3, granite, olmo2, smollm3. Tensors: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K; others,
such as IQ and MXFP4, are refused by name. In memory each has the very values of the file: Q8_0 and Q5_0 take 8.5 bits a weight,
Q4_0 and Q4_K 4.5, Q5_K 5.5, Q6_K and Q3_K 6.6; Q4_1, Q5_1 and Q2_K take 16, rounded to f16. Beside weights of fewer than 16 bits
activations are rounded to 8 bits, 32 of them to a scale, as llama.cpp does with coarser scales. Vocabularies: byte-level BPE with the
rules for words that llama.cpp knows by name, and SentencePiece with scores; an unknown rule is refused by its name.

## Bounds

Refused by name, as their results would be others: quantized checkpoints (`quantization_config`), `dynamic` rope, whose
results depend on how a text was cut, activations other than SiLU and tanh-GELU, bidirectional attention, and any tensor that the
architecture has no use for. Keys of `config.json` that nothing knows are named in the worker's log.

Long-rope: a text has the frequencies of long texts when its prompt is longer than the original length, to its end.

## Chat templates

They come from `chat_template.jinja` or `tokenizer_config.json`. Templates in the manner of each family, with tools, calls,
results, thoughts, documents and refusals, are compared with transformers byte for byte (`tests/fixtures/chat/`). What a message says
never becomes a control token.
";

const ENCODERS: &str = "
## Embedding models

`/v1/embeddings` and jobs with `embed` take any model; encoders of BERT's kind (MiniLM, BGE, E5, GTE, multilingual E5 and their like) do nothing else.
`--model` takes their folder or repository as sentence-transformers saves it: the files above, `modules.json`, `1_Pooling/config.json` and
`sentence_bert_config.json`. What the folder declares is done: pooling `cls`, `mean`, `max`, `mean_sqrt_len_tokens`, `weightedmean` or `lasttoken`, or several
one behind the other, and normalisation where it has one. A folder without `modules.json` gets the mean over all tokens, of length 1. Texts are never cut: one
longer than the folder's `max_seq_length` is refused with its length, and `--ctx` raises that up to the model's own positions. Special tokens
written in a text are letters. Encoders compute on the CPU and have no KV.

Each line below is a small random model whose token ids and vectors `cargo xtask test` compares with sentence-transformers in f32, in every pooling, with and
without normalisation: the largest error of a value is below 1e-5. A text's vector is the same bits alone and beside others.

| `model_type` | model | weights | what it shows |
|---|---|---|---|
";

const REFUSED_ENCODERS: &str = "
Refused by name: other modules (`Dense`: take a model without one), relative positions, activations other than GELU and ReLU, `do_lower_case` beside the
tokenizer's own, a `default_prompt_name` (write the prompt into the texts), rerankers and classifiers (their heads have no use here), and other encoders
(MPNet, DistilBERT, ModernBERT): take one of the kinds above.
";

/// The lines of the encoders.
fn encoders(root: &Path) -> Result<String> {
    let mut rows = Vec::new();
    for entry in fs::read_dir(root.join("tests/fixtures/encoders"))? {
        let folder = entry?.path();
        let name = folder.file_name().context("a folder has a name")?.to_string_lossy().into_owned();
        let config = EncoderConfig::parse(&fs::read(folder.join("config.json"))?).with_context(|| name.clone())?;
        let modules = Modules::parse(&fs::read(folder.join(sentence::MODULES))?).with_context(|| name.clone())?;
        let declared = sentence::poolings(&modules.pooling, &fs::read(folder.join(&modules.pooling))?, config.hidden)?;
        let names: Vec<&str> = declared.into_iter().map(sentence::Pooling::name).collect();
        let tokenizer: Value = serde_json::from_slice(&fs::read(folder.join("tokenizer.json"))?)?;
        let words = tokenizer["model"]["type"].as_str().context("a tokenizer has a type")?;
        let length = if modules.length == sentence::Length::One { ", normalised" } else { "" };
        let (kind, _) = stored(&folder)?;
        let act = match config.activation {
            EncoderActivation::GeluErf => "GELU",
            EncoderActivation::GeluTanh => "GELU by tanh",
            EncoderActivation::Relu => "ReLU",
        };
        let first = config.first_position;
        rows.push(format!(
            "| `{}` | {name} | {kind} | {words} tokens, {act}, positions from {first}, declares `{}`{length} |\n",
            config.family.model_type(),
            names.join("`, `"),
        ));
    }
    rows.sort();
    Ok(rows.concat())
}

/// The page.
pub(crate) fn page(root: &Path) -> Result<String> {
    let folder = root.join("tests/fixtures/models");
    let mut names: Vec<String> = fs::read_dir(&folder)
        .with_context(|| folder.display().to_string())?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    let mut rows = Vec::new();
    for name in names {
        let bytes = fs::read(folder.join(&name).join("config.json")).with_context(|| name.clone())?;
        let config = ModelConfig::parse(&bytes).with_context(|| name.clone())?;
        let raw: Value = serde_json::from_slice(&bytes)?;
        let (stored, files) = stored(&folder.join(&name))?;
        let files = if files > 1 { format!(", in {files} files") } else { String::new() };
        let shows = shows(&config, &raw) + &files;
        rows.push((config.family.model_type(), name, stored, shows));
    }
    rows.sort();
    let mut text = ABOUT.to_owned();
    for (family, name, stored, shows) in rows {
        let _ = writeln!(text, "| `{family}` | {name} | {stored} | {shows} |");
    }
    text.push_str(REST);
    text.push_str(ENCODERS);
    text.push_str(&encoders(root)?);
    text.push_str(REFUSED_ENCODERS);
    Ok(text)
}

/// The type of a fixture's first tensor, and in how many files its tensors are.
fn stored(folder: &Path) -> Result<(String, usize)> {
    let mut kinds = Vec::new();
    for file in fs::read_dir(folder)? {
        let path = file?.path();
        if path.extension().is_some_and(|kind| kind == "safetensors") {
            let bytes = fs::read(&path)?;
            let len = bytes.first_chunk().map_or(0, |len| u64::from_le_bytes(*len)) as usize;
            let header: Value = serde_json::from_slice(bytes.get(8..8 + len).context("a header")?)?;
            let tensors = header.as_object().context("a header is an object")?;
            let kind = tensors.values().find_map(|tensor| tensor.get("dtype")?.as_str());
            kinds.push(kind.context("a file without tensors")?.to_lowercase());
        }
    }
    let first = kinds.first().context("a fixture without weights")?.clone();
    Ok((first, kinds.len()))
}

fn shows(config: &ModelConfig, raw: &Value) -> String {
    let mut parts: Vec<String> = Vec::new();
    parts.push(if config.heads == config.kv_heads { "a KV head per head" } else { "grouped queries" }.into());
    if config.head_dim * config.heads != config.hidden {
        parts.push("head_dim of its own".into());
    }
    parts.push(if config.tied { "tied head" } else { "own head" }.into());
    if config.biases.qkv || config.biases.output || config.biases.mlp {
        parts.push("biases".into());
    }
    for rope in &config.ropes {
        let kind = match rope.scaling {
            RopeScaling::None => "rope",
            RopeScaling::Linear(_) => "linear rope",
            RopeScaling::Llama3 { .. } => "llama3 rope",
            RopeScaling::Yarn { .. } => "yarn",
            RopeScaling::LongRope { .. } => "long-rope",
        };
        let part = if rope.dims < config.head_dim { ", partly rotated" } else { "" };
        parts.push(format!("{kind} of base {}{part}", rope.theta));
    }
    let spelling = if raw.get("rope_parameters").is_some() { "`rope_parameters`" } else { "`rope_theta`" };
    parts.push(format!("spelled {spelling}"));
    let count = |kind: fn(&rbee_weights::config::LayerConfig) -> bool| config.layers.iter().filter(|l| kind(l)).count();
    let all = config.layers.len();
    match count(|layer| layer.window.is_some()) {
        0 => {}
        windows => parts.push(format!("window in {windows} of {all} layers")),
    }
    match count(|layer| layer.rope.is_none()) {
        0 => {}
        without => parts.push(format!("no rope in {without} of {all} layers")),
    }
    match count(|layer| matches!(layer.mlp, Mlp::Experts { .. })) {
        0 => {}
        experts => parts.push(format!("experts in {experts} of {all} layers")),
    }
    match config.norms.place {
        NormPlace::Before => {}
        NormPlace::After => parts.push("norms after attention and MLP".into()),
        NormPlace::Around => parts.push("norms around attention and MLP".into()),
    }
    if config.norms.qk != QkNorm::None {
        parts.push("norms of queries and keys".into());
    }
    if config.attention_cap.is_some() || config.logit_cap.is_some() {
        parts.push("soft caps".into());
    }
    if config.scales.residual != 1.0 {
        parts.push("multipliers".into());
    }
    parts.join(", ")
}
