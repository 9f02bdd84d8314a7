//! Encoders against sentence-transformers on small random models (`tests/fixtures/make_encoders.py`), in every pooling; and folders that
//! somebody has damaged.

use std::fs;
use std::path::{Path, PathBuf};

use rbee_engine::runner::{Chunk, Logits, ModelRunner, Regime, StepBatch, Wanted};
use rbee_engine::{Reading, StepCounter};
use rbee_models::{
    EncoderRunner, Error, FileError, Kind, KvType, ModelFiles, Quantize, RunnerOptions, inspect, load_encoder,
};
use rbee_tokenizer::Tokenizer;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::reference::fixtures;
use crate::support::options;

/// All in f32, as the references are.
fn exact() -> RunnerOptions {
    RunnerOptions { exact: true, ..options() }
}

const TOLERANCE: f32 = 1e-5;

/// The same where weights of bf16 are multiplied with rounded activations.
const ROUNDED: f32 = 2e-4;

#[derive(Deserialize)]
struct Golden {
    longest: usize,
    pooling: String,
    normalised: bool,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    /// By pooling, as it comes out.
    own: serde_json::Map<String, Value>,
    /// By pooling, of length 1.
    one: serde_json::Map<String, Value>,
}

impl Case {
    fn vector(&self, pooling: &str, normalised: bool) -> Vec<f32> {
        let all = if normalised { &self.one } else { &self.own };
        serde_json::from_value(all[pooling].clone()).unwrap()
    }
}

fn folders() -> [PathBuf; 2] {
    ["bert", "xlm-roberta"].map(|name| fixtures().join("encoders").join(name))
}

fn golden(folder: &Path) -> Golden {
    serde_json::from_slice(&fs::read(folder.join("golden.json")).unwrap()).unwrap()
}

fn encoder(folder: &Path, options: &RunnerOptions) -> Result<EncoderRunner, Error> {
    load_encoder(&ModelFiles::folder(folder).unwrap(), options, &StepCounter::default(), &|_, _| ())
}

fn embed(runner: &mut EncoderRunner, texts: &[&[u32]]) -> Vec<Vec<f32>> {
    let chunk = |tokens| Chunk { tokens, start: 0, blocks: &[], regime: Regime::Usual, wanted: Wanted::Embedding };
    let mut out = Logits::default();
    runner.step(&StepBatch { chunks: texts.iter().copied().map(chunk).collect() }, &mut out).unwrap();
    out.hidden().map(<[f32]>::to_vec).collect()
}

/// A copy of a fixture.
fn copy(fixture: &Path) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture).unwrap().map(|entry| entry.unwrap()) {
        let to = folder.path().join(entry.file_name());
        if entry.path().is_dir() {
            fs::create_dir(&to).unwrap();
            for inner in fs::read_dir(entry.path()).unwrap().map(|entry| entry.unwrap()) {
                fs::copy(inner.path(), to.join(inner.file_name())).unwrap();
            }
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
    folder
}

fn edit(file: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    change(&mut value);
    fs::write(file, value.to_string()).unwrap();
}

fn far(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0.0, f32::max)
}

/// The folder as it was saved: ids, what it declares, and the vectors.
#[test]
fn a_folder_makes_the_embeddings_that_it_declares() {
    for folder in folders() {
        let golden = golden(&folder);
        let tokenizer = Tokenizer::from_json(&fs::read(folder.join("tokenizer.json")).unwrap()).unwrap();
        assert_eq!(golden.cases.len(), 5);
        for (options, tolerance) in [(exact(), TOLERANCE), (options(), ROUNDED)] {
            let mut runner = encoder(&folder, &options).unwrap();
            assert_eq!((runner.limits().context, runner.limits().reading), (golden.longest, Reading::Whole));
            for case in &golden.cases {
                assert_eq!(tokenizer.encode_whole(&case.text).unwrap(), case.ids, "{:?}", case.text);
                let error = far(&embed(&mut runner, &[&case.ids])[0], &case.vector(&golden.pooling, golden.normalised));
                assert!(error <= tolerance, "{}: {error}", folder.display());
            }
        }
    }
}

/// Each pooling alone, in both spellings, and two of them together; with and without a normalisation.
#[test]
fn every_pooling_agrees_with_the_reference() {
    const SPELLINGS: [(&str, &str); 6] = [
        ("cls", "pooling_mode_cls_token"),
        ("max", "pooling_mode_max_tokens"),
        ("mean", "pooling_mode_mean_tokens"),
        ("mean_sqrt_len_tokens", "pooling_mode_mean_sqrt_len_tokens"),
        ("weightedmean", "pooling_mode_weightedmean_tokens"),
        ("lasttoken", "pooling_mode_lasttoken"),
    ];
    for fixture in folders() {
        let golden = golden(&fixture);
        let folder = copy(&fixture);
        let settings = folder.path().join("1_Pooling/config.json");
        for normalised in [false, true] {
            let module = |i: usize, kind: &str, path: &str| json!({ "idx": i, "name": i.to_string(), "path": path, "type": format!("sentence_transformers.models.{kind}") });
            let mut list = vec![module(0, "Transformer", ""), module(1, "Pooling", "1_Pooling")];
            if normalised {
                list.push(module(2, "Normalize", "2_Normalize"));
            }
            fs::write(folder.path().join("modules.json"), json!(list).to_string()).unwrap();
            for (name, old) in SPELLINGS {
                let mut spelled = json!({ "word_embedding_dimension": 32, "pooling_mode_mean_tokens": false });
                spelled[old] = json!(true);
                for config in [json!({ "embedding_dimension": 32, "pooling_mode": name }), spelled] {
                    fs::write(&settings, config.to_string()).unwrap();
                    let mut runner = encoder(folder.path(), &exact()).unwrap();
                    for case in &golden.cases {
                        let error = far(&embed(&mut runner, &[&case.ids])[0], &case.vector(name, normalised));
                        assert!(error <= TOLERANCE, "{} {name} {normalised}: {error}", fixture.display());
                    }
                }
            }
        }
        fs::write(&settings, json!({ "pooling_mode": ["mean", "cls"] }).to_string()).unwrap();
        edit(&folder.path().join("modules.json"), |list| drop(list.as_array_mut().unwrap().pop()));
        let got = &embed(&mut encoder(folder.path(), &exact()).unwrap(), &[&golden.cases[0].ids])[0];
        let want = [golden.cases[0].vector("mean", false), golden.cases[0].vector("cls", false)].concat();
        assert!(far(got, &want) <= TOLERANCE);
        // Without modules: the mean, of length 1.
        fs::remove_file(folder.path().join("modules.json")).unwrap();
        let got = &embed(&mut encoder(folder.path(), &exact()).unwrap(), &[&golden.cases[0].ids])[0];
        assert!(far(got, &golden.cases[0].vector("mean", true)) <= TOLERANCE);
    }
}

/// Alone, beside others, on other threads, on another instruction set, with fewer bits: the same bits.
#[test]
fn an_embedding_depends_on_its_own_text_alone() {
    for folder in folders() {
        let golden = golden(&folder);
        let texts: Vec<&[u32]> = golden.cases.iter().map(|case| &case.ids[..]).collect();
        for quantize in [None, Some(Quantize::Q8_0)] {
            let with = |threads, isa: Option<&str>| {
                let options = RunnerOptions { threads, isa: isa.map(str::to_owned), quantize, ..options() };
                encoder(&folder, &options).unwrap()
            };
            let mut one = with(1, None);
            let want: Vec<_> = texts.iter().map(|text| embed(&mut one, &[text]).remove(0)).collect();
            // Many texts, so that threads take part.
            let many: Vec<&[u32]> = texts.iter().copied().cycle().take(40).collect();
            for mut other in [with(1, None), with(3, None), with(2, Some("scalar"))] {
                for (i, got) in embed(&mut other, &many).iter().enumerate() {
                    assert_eq!(got, &want[i % want.len()], "{} text {i}", folder.display());
                }
            }
        }
    }
}

#[test]
fn memory_is_what_the_headers_say() {
    for folder in folders() {
        for quantize in [None, Some(Quantize::Q8_0)] {
            let options = RunnerOptions { quantize, ..options() };
            let runner = encoder(&folder, &options).unwrap();
            let needs = inspect(&ModelFiles::folder(&folder).unwrap(), &options).unwrap();
            assert_eq!((needs.weights, needs.kv, needs.kv_per_token), (runner.held(), 0, 0));
            assert_eq!((needs.total, needs.least), (needs.weights + needs.scratch, needs.total));
            assert_eq!(runner.about().needs, needs);
        }
    }
}

/// Checkpoints with a head, and those that came from TensorFlow, have other names for the same tensors.
#[test]
fn other_names_are_the_same_tensors() {
    let [fixture, _] = folders();
    let golden = golden(&fixture);
    let folder = copy(&fixture);
    let file = folder.path().join("model.safetensors");
    rename(&file, |name| {
        let name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta");
        // The pooler is unread in any case: here it stands for a head.
        if name.starts_with("pooler") { name.replace("pooler", "cls.predictions") } else { format!("bert.{name}") }
    });
    let got = &embed(&mut encoder(folder.path(), &exact()).unwrap(), &[&golden.cases[0].ids])[0];
    assert!(far(got, &golden.cases[0].vector("mean", true)) <= TOLERANCE);
}

/// Gives a file's tensors other names.
fn rename(file: &Path, new: impl Fn(&str) -> String) {
    let bytes = fs::read(file).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let renamed: serde_json::Map<String, Value> = header
        .into_iter()
        .map(|(name, info)| if name == "__metadata__" { (name, info) } else { (new(&name), info) })
        .collect();
    let header = serde_json::to_vec(&renamed).unwrap();
    let all = [&(header.len() as u64).to_le_bytes()[..], &header, &bytes[8 + len..]].concat();
    fs::write(file, all).unwrap();
}

#[test]
fn what_is_damaged_or_not_computed_is_refused_by_name() {
    let [fixture, _] = folders();
    let refused = |what: &str, change: &dyn Fn(&Path)| {
        let folder = copy(&fixture);
        change(folder.path());
        let files = ModelFiles::folder(folder.path()).unwrap();
        let error = encoder(folder.path(), &options()).err().unwrap_or_else(|| panic!("{what} was loaded"));
        let text = error.to_string();
        assert!(text.contains(what), "{what}: {text}");
        // Weights alone are not looked at before.
        if !text.contains("numbers") {
            assert_eq!(inspect(&files, &options()).unwrap_err().to_string(), text);
        }
        error
    };
    let unsupported = |what: &str, file: &'static str, change: &dyn Fn(&mut Value)| {
        let error = refused(what, &|folder| edit(&folder.join(file), change));
        assert!(matches!(error, Error::Files(FileError::Unsupported { .. })), "{error:?}");
    };
    let corrupt = |what: &str, file: &'static str, change: &dyn Fn(&mut Value)| {
        let error = refused(what, &|folder| edit(&folder.join(file), change));
        assert!(matches!(error, Error::Files(FileError::Corrupt { .. })), "{error:?}");
    };
    let module =
        |kind: &str, path: &str| json!({ "idx": 0, "name": "0", "path": path, "type": format!("x.models.{kind}") });
    let (first, pooling) = (module("Transformer", ""), module("Pooling", "1_Pooling"));
    const MODULES: &str = "modules.json";
    unsupported("module `Dense`", MODULES, &|list| {
        *list = json!([first, pooling, module("Dense", "2_Dense")]);
    });
    unsupported("in the order Transformer", MODULES, &|list| *list = json!([first]));
    unsupported("order Pooling, Transformer", MODULES, &|list| *list = json!([pooling, first]));
    unsupported("an encoder in `0_Transformer`", MODULES, &|list| {
        *list = json!([module("Transformer", "0_Transformer"), pooling]);
    });
    for path in ["../1_Pooling", "/etc", "", "a/b"] {
        corrupt("is not the name of a folder", MODULES, &|list| *list = json!([first, module("Pooling", path)]));
    }
    corrupt("not a list of modules", MODULES, &|list| *list = json!({ "a": [] }));
    corrupt("not a list of modules", MODULES, &|list| *list = json!([1]));
    let error = refused("1_Nothing/config.json is missing", &|folder| {
        edit(&folder.join(MODULES), |list| *list = json!([first, module("Pooling", "1_Nothing")]));
    });
    assert!(matches!(error, Error::Files(FileError::Missing(_))));
    const POOLING: &str = "1_Pooling/config.json";
    corrupt("`embedding_dimension` is 31", POOLING, &|config| config["embedding_dimension"] = json!(31));
    corrupt("switches no pooling on", POOLING, &|config| *config = json!({ "pooling_mode_mean_tokens": false }));
    corrupt("`pooling_mode` must be", POOLING, &|config| config["pooling_mode"] = json!(7));
    corrupt("`pooling_mode` must be", POOLING, &|config| config["pooling_mode"] = json!([]));
    unsupported("pooling `attention`", POOLING, &|config| config["pooling_mode"] = json!("attention"));
    unsupported("`pooling_mode_attention`", POOLING, &|config| *config = json!({ "pooling_mode_attention": true }));
    const CONFIG: &str = "config.json";
    unsupported("`position_embedding_type` `relative_key`", CONFIG, &|config| {
        config["position_embedding_type"] = json!("relative_key");
    });
    unsupported("`hidden_act` `mish`", CONFIG, &|config| config["hidden_act"] = json!("mish"));
    unsupported("`is_decoder`", CONFIG, &|config| config["is_decoder"] = json!(true));
    unsupported("`quantization_config`", CONFIG, &|config| config["quantization_config"] = json!({ "bits": 4 }));
    corrupt("no multiple", CONFIG, &|config| config["num_attention_heads"] = json!(5));
    corrupt("`hidden_size` must be", CONFIG, &|config| config["hidden_size"] = json!(-3));
    corrupt("has shape [56, 32], the config asks for [57, 32]", CONFIG, &|config| {
        config["intermediate_size"] = json!(57)
    });
    corrupt("encoder.layer.2.attention", CONFIG, &|config| config["num_hidden_layers"] = json!(3));
    unsupported("encoder.layer.1", CONFIG, &|config| config["num_hidden_layers"] = json!(1));
    unsupported("do_lower_case", "sentence_bert_config.json", &|config| config["do_lower_case"] = json!(true));
    corrupt("`max_seq_length` must be", "sentence_bert_config.json", &|config| config["max_seq_length"] = json!(0));
    unsupported("`default_prompt_name` `query`", "config_sentence_transformers.json", &|config| {
        config["default_prompt_name"] = json!("query");
    });
    unsupported("`method_output_name` `pooler_output`", "sentence_bert_config.json", &|config| {
        config["modality_config"]["text"]["method_output_name"] = json!("pooler_output");
    });
    let tensors = |what: &str, change: &dyn Fn(&str) -> String| {
        refused(what, &|folder| rename(&folder.join("model.safetensors"), change))
    };
    // The head of a reranker or classifier.
    let error = tensors("tensor `classifier.weight` has no use", &|name| {
        name.replace("pooler.dense.weight", "classifier.weight")
    });
    assert!(matches!(error, Error::Files(FileError::Unsupported { .. })), "{error:?}");
    let error = tensors("`encoder.layer.0.output.LayerNorm.bias` is missing", &|name| {
        name.replace("encoder.layer.0.output.LayerNorm.bias", "pooler.dense.more")
    });
    assert!(matches!(error, Error::Files(FileError::Corrupt { .. })), "{error:?}");
    for tensor in
        ["embeddings.word_embeddings.weight", "embeddings.LayerNorm.bias", "encoder.layer.1.output.dense.weight"]
    {
        let error =
            refused("values that are not numbers", &|folder| not_a_number(&folder.join("model.safetensors"), tensor));
        assert!(
            matches!(&error, Error::Files(FileError::Corrupt { problem, .. }) if problem.contains(tensor)),
            "{error:?}"
        );
    }
}

/// Makes the second value of an f32 tensor none.
fn not_a_number(file: &Path, tensor: &str) {
    let mut bytes = fs::read(file).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let start = 8 + len + header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[start + 4..start + 8].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(file, bytes).unwrap();
}

#[test]
fn options_that_mean_nothing_here_are_refused() {
    let [folder, _] = folders();
    let refused = |options: RunnerOptions| encoder(&folder, &options).err().unwrap().to_string();
    assert!(refused(RunnerOptions { kv_type: Some(KvType::F16), ..options() }).contains("no KV cache"));
    assert!(refused(RunnerOptions { context: Some(65), ..options() }).contains("longer than the model's own 64"));
    // Up to its positions a text may be longer than the folder declares.
    let runner = encoder(&folder, &RunnerOptions { context: Some(64), ..options() }).unwrap();
    assert_eq!(runner.limits().context, 64);
    let files = |folder: &Path| Kind::of(&ModelFiles::folder(folder).unwrap()).unwrap();
    assert_eq!((files(&folder), files(&crate::support::tinybee())), (Kind::Encoder, Kind::Decoder));
}

#[test]
fn a_batch_that_is_no_whole_texts_is_refused() {
    let [folder, _] = folders();
    let mut runner = encoder(&folder, &options()).unwrap();
    let good = Chunk { tokens: &[1, 2], start: 0, blocks: &[], regime: Regime::Usual, wanted: Wanted::Embedding };
    let long = vec![1; 49];
    for chunk in [
        Chunk { tokens: &[100_000], ..good },
        Chunk { tokens: &[], ..good },
        Chunk { tokens: &long, ..good },
        Chunk { start: 1, ..good },
        Chunk { wanted: Wanted::Logits, ..good },
    ] {
        assert!(runner.step(&StepBatch { chunks: vec![good, chunk] }, &mut Logits::default()).is_err(), "{chunk:?}");
    }
}
