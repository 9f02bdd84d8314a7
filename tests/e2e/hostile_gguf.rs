//! GGUF files that were made or damaged to hurt whoever reads them, in the process that does: it ends with a code, soon, and
//! never takes much memory.

use std::fs::File as Disk;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rbee_testkit::gguf::{File, Tensor, Value, array};
use rbee_testkit::http::Http;
use rbee_testkit::{Cluster, Setup, Signal, patience, process};
use rbee_wire::ErrorCode;

use crate::gguf::{Stored, put, tinybee};

const MIB: u64 = 1 << 20;

/// How a worker of its own fared with a file.
struct Fared {
    /// 0 when it served and was stopped.
    code: i32,
    stderr: String,
    took: Duration,
    /// Most bytes that it had in memory.
    peak: u64,
}

/// Lets a worker load a file as a hive's does, and ends it when it serves.
fn load(cluster: &Cluster, path: &str) -> Fared {
    let args = ["--backend", "cpu", "--slots", "1", "--ctx", "64", "--model", path];
    let mut worker = cluster.program("llm-worker-rbee", &args).start();
    let said = worker.hear("bearer", |text| text.lines().count() == 2);
    let value = |label: &str| said.lines().find_map(|line| line.strip_prefix(label)).unwrap().trim().to_owned();
    let http = Http { address: value("listening on http://").parse().unwrap(), bearer: Some(value("bearer ")) };
    let mut most = 0;
    let mut asked = Instant::now();
    while let Some(peak) = process::peak(worker.pid()) {
        most = most.max(peak);
        if asked.elapsed() > Duration::from_millis(50) {
            asked = Instant::now();
            let ready = http.try_send(rbee_testkit::http::Request::new("GET", "/v1/ready"));
            if ready.is_ok_and(|answer| answer.json::<serde_json::Value>()["ready"] == true) {
                most = most.max(process::peak(worker.pid()).unwrap_or(0));
                worker.signal(Signal::TERM);
                break;
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let out = worker.finish(Duration::from_secs(60));
    Fared { code: out.code, stderr: out.stderr, took: out.took, peak: most }
}

fn exit(code: ErrorCode) -> i32 {
    i32::from(code.exit_code())
}

/// A file that begins with these bytes and goes on with zeros, which take no room on the disk.
fn put_sparse(cluster: &Cluster, name: &str, begins: &[u8], len: u64) -> String {
    let path = cluster.folder().join(name);
    let file = Disk::create(&path).unwrap();
    file.write_all_at(begins, 0).unwrap();
    file.set_len(len).unwrap();
    path.display().to_string()
}

/// A file with one array whose values, as many as it says, are all there and zero.
fn put_array(cluster: &Cluster, name: &str, key: &str, (kind, size): (u32, u64), items: u64) -> String {
    let mut head = Vec::new();
    array(&mut head, kind, items);
    let begins = File::new().key("general.architecture", "llama").key(key, Value::Raw(9, head)).bytes();
    put_sparse(cluster, name, &begins, begins.len() as u64 + items * size)
}

/// M4: refused within a second and 512 MiB.
#[test]
fn headers_that_claim_too_much_are_refused_at_once_and_in_little_memory() {
    const TEXT: (u32, u64) = (8, 8);
    const BYTE: (u32, u64) = (0, 1);
    let cluster = Setup::real().home();
    let mut tensors = File { data: vec![0; 32], ..File::new() }.key("general.architecture", "llama");
    let tensor = |at: u32| Tensor { name: format!("blk.{at}.weight").into(), dims: vec![8], kind: 0, offset: 0 };
    tensors.tensors = (0..1_500_000).map(tensor).collect();
    let mut keys = File::new();
    keys.keys = (0..1_500_000u32).map(|at| (format!("key.{at}").into(), Value::U8(0))).collect();
    let cases = [
        ("64 Mi values", put_array(&cluster, "values.gguf", "some.values", BYTE, 64 << 20), "more than 16777216"),
        (
            "64 Mi texts",
            put_array(&cluster, "texts.gguf", "tokenizer.ggml.tokens", TEXT, 64 << 20),
            "more than 16777216",
        ),
        ("1.5 M tensors", put(&cluster, "tensors.gguf", &tensors.bytes()), "1500000 tensors, more than"),
        ("1.5 M keys", put(&cluster, "keys.gguf", &keys.bytes()), "1500000 metadata keys, more than"),
    ];
    drop((tensors, keys));
    for (what, path, says) in &cases {
        let inspected = cluster.program("llm-worker-rbee", &["inspect", path]).run();
        let loaded = load(&cluster, path);
        println!(
            "{what}, a file of {} MiB: inspected in {:?}; the load took {:?} and {} MiB",
            Path::new(path).metadata().unwrap().len() / MIB,
            inspected.took,
            loaded.took,
            loaded.peak / MIB
        );
        for (code, stderr, took) in
            [(inspected.code, &inspected.stderr, inspected.took), (loaded.code, &loaded.stderr, loaded.took)]
        {
            assert_eq!(code, exit(ErrorCode::ModelCorrupt), "{what}: {stderr}");
            assert!(stderr.contains(says), "{what}: {stderr}");
            assert!(took < patience(Duration::from_secs(1)), "{what}: {took:?}");
        }
        assert!((MIB..512 * MIB).contains(&loaded.peak), "{what}: {} MiB", loaded.peak / MIB);
    }
}

/// Numbers that look random and are the same every time.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }
}

/// M1: an error with a code or a model that serves; never more memory than four times the file and 256 MiB.
#[test]
fn damaged_files_load_or_are_refused_with_a_code_and_take_little_memory() {
    let cluster = Setup::real().home();
    let sound = tinybee(Stored::Q8_0);
    let bytes = sound.bytes();
    let header = bytes.len() - sound.data.len();
    // The metadata before the vocabulary, the infos of tensors, and all of the header, the vocabulary above all.
    let infos: usize = sound.tensors.iter().map(|tensor| 8 + tensor.name.len() + 4 + 8 * tensor.dims.len() + 12).sum();
    let places = [0..800, header - infos..header, 0..header, header..bytes.len()];
    let (mut served, mut refused, mut most) = (0, 0, 0);
    for seed in 0..28u64 {
        let mut random = Random(seed);
        let mut damaged = bytes.clone();
        let place = places[seed as usize % places.len()].clone();
        for _ in 0..1 + random.below(3) {
            let at = place.start + random.below(place.len() - 8);
            match random.below(3) {
                0 => damaged[at] ^= 1 << random.below(8),
                1 => damaged[at..at + 4].copy_from_slice(&(random.below(300) as u32).to_le_bytes()),
                _ => damaged[at..at + 8].copy_from_slice(&(random.below(usize::MAX) as u64).to_le_bytes()),
            }
        }
        if seed % 7 == 6 {
            damaged.truncate(random.below(bytes.len()));
        }
        let fared = load(&cluster, &put(&cluster, "damaged.gguf", &damaged));
        let Fared { code, stderr, took, peak } = &fared;
        println!("{seed}: {code} in {took:?}, {} MiB", peak / MIB);
        if *code == 0 {
            served += 1;
        } else {
            refused += 1;
            let foreseen = [ErrorCode::ModelCorrupt, ErrorCode::ModelLoadFailed].map(exit);
            assert!(foreseen.contains(code) && stderr.contains("damaged.gguf"), "{seed}: {code} {stderr}");
        }
        assert!(!stderr.contains("panicked"), "{seed}: {stderr}");
        assert!(*took < patience(Duration::from_secs(2)), "{seed}: {took:?}");
        let bound = 4 * damaged.len() as u64 + 256 * MIB;
        assert!((MIB..bound).contains(peak), "{seed}: {} MiB", peak / MIB);
        most = most.max(*peak);
    }
    println!(
        "{served} served, {refused} were refused; at most {} MiB of a file of {}",
        most / MIB,
        bytes.len() as u64 / MIB
    );
    assert!(served >= 3 && refused >= 10, "{served} and {refused}");
}

/// Text side and one layer of a model with so many tokens, of which each but the first is made of an earlier one and a digit.
fn vocabulary(model: &str, count: u32) -> File {
    const WIDTH: u64 = 32;
    let mut file = File::new().key("general.architecture", "llama");
    for key in ["block_count", "attention.head_count", "attention.head_count_kv"] {
        file = file.key(&format!("llama.{key}"), 1);
    }
    for key in ["embedding_length", "feed_forward_length", "rope.dimension_count"] {
        file = file.key(&format!("llama.{key}"), WIDTH as u32);
    }
    file = file.key("llama.context_length", 64).key("llama.attention.layer_norm_rms_epsilon", 1e-5);
    let text = |at: u32| match (model, at) {
        ("llama", ..256) => format!("<0x{at:02X}>"),
        _ => format!("{at:x}"),
    };
    let scores = (0..count).map(|at| -(at as f32)).collect();
    let kinds = (0..count).map(|at| if model == "llama" && at < 256 { 6 } else { 1 }).collect();
    file = file
        .key("tokenizer.ggml.model", model)
        .key("tokenizer.ggml.add_bos_token", Value::Bool(false))
        .key("tokenizer.ggml.tokens", Value::Texts((0..count).map(text).collect()))
        .key("tokenizer.ggml.scores", Value::F32s(scores))
        .key("tokenizer.ggml.token_type", Value::I32s(kinds));
    if model == "gpt2" {
        let merges = (16..count).map(|at| format!("{:x} {:x}", at / 16, at % 16)).collect();
        file = file.key("tokenizer.ggml.pre", "gpt-2").key("tokenizer.ggml.merges", Value::Texts(merges));
    }
    let row = vec![0; 34 * count as usize];
    file = file.tensor("token_embd.weight", &[WIDTH, u64::from(count)], 8, &row);
    for name in ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"] {
        file = file.f32(&format!("{name}.weight"), &[WIDTH], &[1.0; WIDTH as usize]);
    }
    for name in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"] {
        file = file.tensor(&format!("blk.0.{name}.weight"), &[WIDTH, WIDTH], 8, &[0; 34 * WIDTH as usize]);
    }
    file
}

/// M1: what is within every other bound is within that of memory.
#[test]
fn the_largest_vocabularies_that_may_be_take_little_memory() {
    let cluster = Setup::real().home();
    const MOST: u32 = 1 << 20;
    type Made = fn(&str, u32) -> File;
    // Whoever wants to hurt spares the tensors.
    let spared: Made = |model, count| File { tensors: Vec::new(), data: Vec::new(), ..vocabulary(model, count) };
    let cases: [(&str, u32, Made, Option<&str>); 5] = [
        ("llama", MOST, vocabulary, None),
        ("gpt2", MOST, vocabulary, Some("too many values")),
        ("gpt2", MOST, spared, Some("is missing")),
        ("llama", MOST + 1, spared, Some("1048577 entries, more than the 1048576")),
        ("gpt2", MOST + 1, spared, Some("1048577 entries, more than the 1048576")),
    ];
    for (model, count, made, says) in cases {
        let file = made(model, count);
        let path = put(&cluster, "large.gguf", &file.bytes());
        drop(file);
        let len = Path::new(&path).metadata().unwrap().len();
        let Fared { code, stderr, took, peak } = load(&cluster, &path);
        println!("{model}, {count} tokens, {} MiB: {code} in {took:?}, {} MiB", len / MIB, peak / MIB);
        assert!((MIB..4 * len + 256 * MIB).contains(&peak), "{model}, {count}: {} MiB", peak / MIB);
        match says {
            None => assert_eq!(code, 0, "{stderr}"),
            Some(says) => {
                assert_eq!(code, exit(ErrorCode::ModelCorrupt), "{stderr}");
                assert!(stderr.contains("MODEL_CORRUPT") && stderr.contains(says), "{model}, {count}: {stderr}");
            }
        }
    }
}
