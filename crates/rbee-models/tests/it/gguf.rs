//! GGUF files against llama.cpp and against the same weights in safetensors (`tests/fixtures/gguf_models.py`).
//!
//! The fixture says how each file is made. The files made here are those that the `gguf` package wrote and llama.cpp ran,
//! byte for byte: their digests say so.

use std::path::Path;

use half::f16;
use rbee_kernels::packed::widen;
use rbee_kernels::{Blocks, WeightType};
use rbee_models::{CpuRunner, Error, FileError, ModelFiles, RunnerOptions, load};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::families::changed;
use crate::gguf_file::{Case, File, Fixture, Model, Number, Tensor, fixture, kind, random};
use crate::reference::fixtures;
use crate::rounded::{Activations, Llama, Weights, softmax};
use crate::support::{argmax, exact, followed, runner};

fn options() -> RunnerOptions {
    RunnerOptions { threads: 2, slots: 1, context: Some(256), ..exact() }
}

fn opened(path: &Path) -> Result<CpuRunner, Error> {
    load(&ModelFiles::gguf(path)?, &options(), &Default::default(), &|_, _| ())
}

/// The logits after each step of llama.cpp's greedy text.
fn steps(runner: &mut CpuRunner, cases: &[Case]) -> Vec<Vec<f32>> {
    let tokens = |case: &Case| case.top.iter().map(|top| top[0].0).collect::<Vec<_>>();
    cases.iter().flat_map(|case| followed(runner, &case.prompt, &tokens(case))).collect()
}

fn named<'a>(fixture: &'a Fixture, name: &str) -> &'a Model {
    fixture.models.iter().find(|model| model.name == name).unwrap()
}

fn probabilities(row: &[f32]) -> Vec<f64> {
    softmax(&row.iter().map(|logit| f64::from(*logit)).collect::<Vec<_>>())
}

/// How far probabilities are from what is wanted of them, as parts of that, at most. llama.cpp's are rounded to seven
/// digits.
fn off(got: &[f64], want: &[(u32, f64)]) -> f64 {
    let part = |(id, want): &(u32, f64)| ((got[*id as usize] - want).abs() - 5e-8).max(0.0) / want;
    want.iter().map(part).fold(0.0, f64::max)
}

/// What is left over from other orders of summation, as a part of a probability.
const SUMS: f64 = 2e-5;

/// llama.cpp looks Gemma's GELU up in a table of halves.
const TABLE: f64 = 1.5e-3;

#[test]
fn every_family_agrees_with_llama_cpp() {
    let fixture = fixture();
    for model in fixture.models.iter().filter(|model| model.folder.is_some()) {
        let bound = if model.name.starts_with("gemma") { TABLE } else { SUMS };
        let (_folder, path) = model.file(&fixture.kinds).written();
        let rows = steps(&mut opened(&path).unwrap(), &model.cases);
        let mut worst = 0f64;
        for (row, top) in rows.iter().zip(model.cases.iter().flat_map(|case| &case.top)) {
            worst = worst.max(off(&probabilities(row), top));
            // A lead of less is a tie.
            let clear = top[0].1 - top[1].1 > 2.0 * bound * top[0].1;
            assert!(!clear || argmax(row) == top[0].0, "{}", model.name);
        }
        println!("{}: {worst:.1e}", model.name);
        assert!(worst <= bound, "{}: off by {worst}", model.name);
    }
}

/// How far probabilities may be from a computation in f64, ours and llama.cpp's, each with activations rounded in its own way.
/// Kinds that are kept as halves lose some bits here. Beside halves llama.cpp's own sums are not exact, and what they
/// change is rounded another way in steps that are hardly larger.
fn bounds(kind: &str) -> (f64, f64) {
    match kind {
        "F16" => (1e-4, 4e-3),
        "BF16" => (1e-4, 3e-2),
        "Q4_1" | "Q5_1" | "Q2_K" => (2e-2, SUMS),
        // What its halves lose moves activations to other steps beside its other matrices.
        "Q3_K_L" => (5e-2, SUMS),
        _ => (1e-4, SUMS),
    }
}

/// llama.cpp rounds activations to eight bits beside weights of few bits, and to halves beside halves; we round the former, in other
/// stretches. So both are compared to a computation in f64, rounded in their own ways: if each agrees with its own,
/// rounding explains all that lies between them, which is up to a quarter of a probability.
#[test]
fn every_kind_of_blocks_agrees_with_llama_cpp() {
    let fixture = fixture();
    for model in fixture.models.iter().filter(|model| model.folder.is_none()) {
        let file = model.file(&fixture.kinds);
        let (_folder, path) = file.written();
        let rows = steps(&mut opened(&path).unwrap(), &model.cases);
        let [exact, rounded] = [Activations::Ours, Activations::Theirs].map(|activations| {
            let llama = llama(&file, activations);
            let of = |case: &Case| {
                let tokens = case.prompt.iter().copied().chain(case.top.iter().map(|top| top[0].0)).collect::<Vec<_>>();
                let logits = llama.logits(&tokens[..tokens.len() - 1]).split_off(case.prompt.len() - 1);
                logits.iter().map(|logits| softmax(logits)).collect::<Vec<_>>()
            };
            model.cases.iter().flat_map(of).collect::<Vec<_>>()
        });
        let (mut ours, mut theirs, mut between, mut same) = (Vec::new(), 0f64, 0f64, 0);
        for (i, top) in model.cases.iter().flat_map(|case| &case.top).enumerate() {
            let got = probabilities(&rows[i]);
            let of_exact: Vec<_> = top.iter().map(|(id, _)| (*id, exact[i][*id as usize])).collect();
            ours.push(off(&got, &of_exact));
            theirs = theirs.max(off(&rounded[i], top));
            between = between.max(off(&got, top));
            // Where rounding does not change the best, the token is the same.
            let best = |row: &[f64]| (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap() as u32;
            if best(&exact[i]) == best(&rounded[i]) {
                assert_eq!(argmax(&rows[i]), top[0].0, "{}: step {i}", model.name);
                same += 1;
            }
        }
        let (most, most_of_theirs) = bounds(&model.name);
        // An activation half way between two steps may go to the other one in f32, and take more with it behind it.
        ours.sort_by(f64::total_cmp);
        let (few, ours) = (ours[ours.len() - 1], ours[ours.len() * 7 / 8]);
        assert!(ours <= most && few <= 0.1, "{}: off by {ours}, a few by {few}", model.name);
        assert!(theirs <= most_of_theirs, "{}: llama.cpp's are off by {theirs}", model.name);
        // Many tokens are compared: in a random llama the best is often hardly better than the next.
        assert!(same * 5 >= rows.len() * 2, "{}: {same} tokens", model.name);
        println!(
            "{}: ours {ours:.1e}, at most {few:.1e}, llama.cpp's {theirs:.1e}, between them {between:.1e}, {same} of {} tokens",
            model.name,
            rows.len()
        );
    }
}

/// A file's random llama.
fn llama(file: &File, activations: Activations) -> Llama {
    let of = |tensor: &Tensor| {
        let kind = tensor.kind();
        let values = widen(kind, &tensor.bytes).unwrap().into_iter().map(f64::from).collect();
        let minima = match kind {
            // Blocks begin with the scale.
            WeightType::Blocks(blocks @ (Blocks::Q4_1 | Blocks::Q5_1)) => {
                let minimum = |block: &[u8]| f16::from_le_bytes([block[2], block[3]]).to_f64();
                tensor.bytes.chunks_exact(blocks.bytes()).map(minimum).collect()
            }
            _ => Vec::new(),
        };
        (tensor.name.clone(), Weights { kind, inputs: *tensor.shape.last().unwrap(), values, minima })
    };
    let weights = file.tensors.iter().map(of).collect();
    Llama { weights, heads: 4, kv_heads: 2, eps: 1e-5, theta: 10_000.0, activations }
}

/// What `gguf.quants.dequantize` says of random blocks.
#[test]
fn blocks_stand_for_what_the_gguf_package_says() {
    for of in fixture().kinds {
        let Some(want) = &of.3 else { continue };
        let (_, kind) = kind(&of.0);
        let values = widen(kind, &random(0, &of, 250 * kind.row(256) / of.1)).unwrap();
        let mut hash = Sha256::new();
        values.iter().for_each(|value| hash.update(value.to_le_bytes()));
        let got: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(&got, want, "{}", of.0);
    }
}

#[test]
fn a_folder_and_its_gguf_give_the_same_bits() {
    let fixture = fixture();
    for model in &fixture.models {
        let Some(folder) = &model.folder else { continue };
        let folder = changed(&fixtures().join(folder), &model.config, None);
        let want = steps(&mut runner(folder.path(), &options()), &model.cases);
        let (_folder, path) = model.file(&fixture.kinds).written();
        let got = steps(&mut opened(&path).unwrap(), &model.cases);
        let pairs = got.iter().flatten().zip(want.iter().flatten());
        let off = pairs.map(|(got, want)| (got - want).abs()).fold(0.0, f32::max);
        // The file has divisors in f32 of a scaling that it cannot name.
        let inexact = matches!(&*model.name, "llama-freqs" | "granite-bias");
        assert!(if inexact { off < 1e-4 } else { got == want }, "{}: off by {off}", model.name);
    }
}

/// llama.cpp leaves these windows out, transformers does not. They are those of the models that the files are made of.
#[test]
fn windows_of_mistral_mixtral_and_phi3_are_kept() {
    let fixture = fixture();
    for (name, key) in [("mistral", "llama"), ("mixtral", "llama"), ("phi3", "phi3")] {
        let model = named(&fixture, name);
        let folder = changed(&fixtures().join(model.folder.as_ref().unwrap()), &json!({ "sliding_window": 16 }), None);
        let want = steps(&mut runner(folder.path(), &options()), &model.cases);
        let mut file = model.file(&fixture.kinds);
        let (_whole, path) = file.written();
        assert!(steps(&mut opened(&path).unwrap(), &model.cases) != want, "{name}");
        file.set(&format!("{key}.attention.sliding_window"), "u32", &json!(16));
        let (_window, path) = file.written();
        assert!(steps(&mut opened(&path).unwrap(), &model.cases) == want, "{name}");
    }
}

/// The name that transformers has for a tensor of a llama.
fn plain_name(name: &str) -> String {
    let name = name.replace("blk.", "model.layers.");
    [
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
        ("attn_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ]
    .iter()
    .fold(name, |name, (from, to)| name.replace(from, to))
}

/// Rows of neighbouring pairs within each head, as its two halves.
fn in_halves(values: &[f32], rows: usize, heads: usize) -> Vec<f32> {
    let (row, dim) = (values.len() / rows, rows / heads);
    let order = (0..rows).map(|to| (to / dim * dim) + to % dim % (dim / 2) * 2 + to % dim / (dim / 2));
    order.flat_map(|from| values[from * row..][..row].iter().copied()).collect()
}

/// Writes a folder of the values that a file's blocks stand for: in f32, or rounded to halves.
fn plain_folder(file: &File, halves: bool) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for tensor in &file.tensors {
        let mut values = widen(tensor.kind(), &tensor.bytes).unwrap();
        if let Some(heads) = [("attn_q", 4), ("attn_k", 2)].iter().find(|(part, _)| tensor.name.contains(part)) {
            values = in_halves(&values, tensor.shape[0], heads.1);
        }
        let start = data.len();
        let halves = halves && tensor.shape.len() == 2;
        for value in values {
            if halves { data.extend(f16::from_f32(value).to_le_bytes()) } else { data.extend(value.to_le_bytes()) }
        }
        let info = json!({
            "dtype": if halves { "F16" } else { "F32" }, "shape": tensor.shape, "data_offsets": [start, data.len()]
        });
        header.insert(plain_name(&tensor.name), info);
    }
    let header = Value::Object(header).to_string();
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    let config = json!({
        "model_type": "llama", "vocab_size": 250, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": true,
    });
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

#[test]
fn blocks_that_are_kept_as_halves_compute_what_their_values_compute() {
    let fixture = fixture();
    for model in fixture.models.iter().filter(|model| fixture.kinds.iter().any(|kind| kind.0 == model.name)) {
        let file = model.file(&fixture.kinds);
        let halves = match &*model.name {
            "F32" | "F16" | "BF16" => false,
            "Q4_0" | "Q5_0" | "Q8_0" | "Q3_K" | "Q4_K" | "Q5_K" | "Q6_K" => continue,
            _ => true,
        };
        let folder = plain_folder(&file, halves);
        let want = steps(&mut runner(folder.path(), &options()), &model.cases);
        let (_folder, path) = file.written();
        assert!(steps(&mut opened(&path).unwrap(), &model.cases) == want, "{}", model.name);
    }
}

#[test]
fn a_model_in_three_files_is_the_same_model() {
    let fixture = fixture();
    let model = named(&fixture, "mixtral");
    let file = model.file(&fixture.kinds);
    let (_whole, path) = file.written();
    let want = steps(&mut opened(&path).unwrap(), &model.cases);
    let folder = tempfile::tempdir().unwrap();
    let name = |no: usize| folder.path().join(format!("mix-{no:05}-of-00003.gguf"));
    let count = file.tensors.len();
    for no in 0..3 {
        let tensors = file.tensors[count * no / 3..count * (no + 1) / 3].to_vec();
        let mut part = File { keys: if no == 0 { file.keys.clone() } else { Vec::new() }, tensors };
        let number = |key: &str, kind: u32, bytes: &[u8]| (key.to_owned(), kind, bytes.to_vec());
        part.keys.push(number("split.no", 2, &(no as u16).to_le_bytes()));
        part.keys.push(number("split.count", 2, &3u16.to_le_bytes()));
        part.keys.push(number("split.tensors.count", 5, &(count as i32).to_le_bytes()));
        std::fs::write(name(no + 1), part.bytes()).unwrap();
    }
    // Whichever of them is named.
    for no in [1, 3] {
        assert!(steps(&mut opened(&name(no)).unwrap(), &model.cases) == want);
    }
    for no in [3, 2] {
        std::fs::remove_file(name(no)).unwrap();
        let error = opened(&name(1)).err().unwrap();
        assert!(matches!(error, Error::Files(FileError::Missing(_))), "{error:?}");
        assert!(error.to_string().contains(&format!("mix-{no:05}-of-00003.gguf")), "{error}");
    }
}

/// Files of Mixtral from before experts were stacked.
#[test]
fn experts_may_lie_in_tensors_of_their_own() {
    let fixture = fixture();
    let model = named(&fixture, "mixtral");
    let mut file = model.file(&fixture.kinds);
    let (_whole, path) = file.written();
    let want = steps(&mut opened(&path).unwrap(), &model.cases);
    let stacked: Vec<Tensor> = file.tensors.extract_if(.., |tensor| tensor.name.contains("_exps")).collect();
    assert_eq!(stacked.len(), 6);
    for tensor in stacked {
        let parts = tensor.bytes.chunks(tensor.bytes.len() / tensor.shape[0]);
        for (expert, bytes) in parts.enumerate() {
            let name = tensor.name.replace("_exps", &format!(".{expert}"));
            file.tensors.push(Tensor { name, shape: tensor.shape[1..].to_vec(), kind: 0, bytes: bytes.to_vec() });
        }
    }
    let (_parts, path) = file.written();
    assert!(steps(&mut opened(&path).unwrap(), &model.cases) == want);
}

/// The error of a load, which is one of files.
fn refused(file: &File) -> String {
    let (_folder, path) = file.written();
    let error = opened(&path).err().expect("a damaged file is loaded");
    assert!(matches!(error, Error::Files(_)), "{error:?}");
    error.to_string()
}

#[test]
fn numbers_that_are_none_are_refused_in_every_kind() {
    let fixture = fixture();
    for of in &fixture.kinds {
        // Norms are of every file.
        let (name, part) =
            if of.0 == "norm" { ("Q8_0", "blk.0.ffn_norm.weight") } else { (&*of.0, "blk.0.ffn_down.weight") };
        let file = named(&fixture, name).file(&fixture.kinds);
        let tensors = if of.0 == "norm" { &[part][..] } else { &[part, "token_embd.weight", "blk.0.attn_k.weight"] };
        for (Number(at, width, ..), part) in
            of.2.iter().flat_map(|number| tensors.iter().map(move |part| (*number, part)))
        {
            let bad = match (&*of.0, width) {
                ("BF16", _) => [0x7fc0, 0xff80],
                (_, 4) => [f32::NAN.to_bits(), f32::NEG_INFINITY.to_bits()],
                _ => [f16::NAN, f16::NEG_INFINITY].map(|half| u32::from(half.to_bits())),
            };
            for bits in bad {
                let mut file = file.clone();
                let bytes = &mut file.tensor(part).bytes;
                // Somewhere in the middle.
                let block = bytes.len() / of.1 / 2 * of.1;
                bytes[block + at..][..width].copy_from_slice(&bits.to_le_bytes()[..width]);
                let error = refused(&file);
                assert!(error.contains("not numbers"), "{} {part} {bits:x}: {error}", of.0);
            }
        }
    }
}

#[test]
fn files_that_are_no_model_are_refused_by_name() {
    let fixture = fixture();
    type Damage = fn(&mut File);
    let damages: [(&str, Damage, &str); 17] = [
        (
            "Q4_K",
            |file| file.tensors.retain(|one| one.name != "blk.0.ffn_up.weight"),
            "`blk.0.ffn_up.weight` is missing",
        ),
        ("Q4_K", |file| file.tensors.retain(|one| one.name != "token_embd.weight"), "`token_embd.weight` is missing"),
        (
            "Q4_K",
            |file| file.tensor("blk.0.attn_k.weight").name = "blk.0.attn_z.weight".into(),
            "`blk.0.attn_k.weight` is missing",
        ),
        ("Q4_K", |file| file.tensor("blk.0.ffn_up.weight").shape = vec![128, 512], "has shape [128, 512]"),
        ("Q4_K", |file| file.tensor("blk.0.ffn_up.weight").shape = vec![256, 16, 16], "blk.0.ffn_up.weight"),
        ("Q4_K", |file| file.tensor("output_norm.weight").shape = vec![1, 256], "has shape [1, 256]"),
        ("Q4_K", |file| file.tensor("blk.0.ffn_up.weight").kind = 13, "blk.0.ffn_up.weight"),
        ("Q4_K", |file| file.set("tokenizer.ggml.tokens", "tokens", &json!(249)), "249 tokens and embeddings of 250"),
        ("Q4_K", |file| file.set("tokenizer.ggml.eos_token_id", "u32", &json!(250)), "outside a vocabulary"),
        ("Q4_K", |file| file.set("llama.feed_forward_length", "u32", &json!(512)), "ask for [512, 256]"),
        ("Q4_K", |file| file.set("llama.attention.head_count_kv", "u32", &json!(4)), "ask for [256, 256]"),
        ("Q4_K", |file| file.set("llama.block_count", "u32", &json!(2)), "`blk.1.attn_norm.weight` is missing"),
        ("Q4_K", |file| file.set("llama.embedding_length", "u32", &json!(0)), "hidden_size"),
        ("Q4_K", |file| file.set("general.architecture", "text", &json!("qwen2")), "qwen2."),
        ("mixtral", |file| file.set("llama.expert_count", "u32", &json!(3)), "ask for [3, 40]"),
        ("mixtral", |file| file.set("llama.expert_count", "u32", &json!(5)), "ask for [5, 40]"),
        ("qwen2", |file| file.tensors.retain(|one| one.name != "blk.1.attn_k.bias"), "`blk.1.attn_k.bias` is missing"),
    ];
    for (name, damage, want) in damages {
        let mut file = named(&fixture, name).file(&fixture.kinds);
        damage(&mut file);
        let error = refused(&file);
        assert!(error.starts_with("model.gguf") && error.contains(want), "{want}: {error}");
    }
}
