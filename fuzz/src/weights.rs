//! Files of a model that `rbee-weights` reads.

use rbee_weights::config::{GenerationDefaults, Mlp, ModelConfig};
use rbee_weights::gguf::config::model_config;
use rbee_weights::gguf::{Gguf, check_split};
use rbee_weights::needs::{Positions, needs};
use rbee_weights::safetensors::{Dtype, Index, Shards, TensorInfo, header_len};

const FILE: &str = "f.safetensors";

/// The bytes are a file, or the number of its tensors' bytes and its header, or an index of shards.
pub(crate) fn safetensors(bytes: &[u8]) {
    let file_len = bytes.len() as u64;
    if let Ok(len) = header_len(FILE, bytes, file_len) {
        assert!(8 + len <= file_len);
        index(&bytes[8..8 + len as usize], file_len);
    }
    // A header is seldom as long as a mutated length says.
    if let Some((first, header)) = bytes.split_first_chunk() {
        // File lengths are signed where they come from.
        index(header, (u64::from_le_bytes(*first) >> 1).max(8 + header.len() as u64));
        index(header, (8 + header.len() as u64).saturating_add(u64::from(first[0])));
        shards(header);
    }
    shards(bytes);
}

fn index(header: &[u8], file_len: u64) {
    let Ok(index) = Index::parse(FILE, header, file_len) else { return };
    let mut tensors: Vec<&TensorInfo> = index.tensors.values().collect();
    tensors.sort_unstable_by_key(|tensor| (tensor.start, tensor.len));
    let mut at = 8 + header.len() as u64;
    for tensor in tensors {
        assert_eq!(tensor.start, at, "a hole or an overlap");
        at += tensor.len;
        if let Some(dtype) = tensor.dtype {
            let values = tensor.shape.iter().map(|size| *size as u64).product::<u64>();
            assert_eq!(values * Dtype::size(dtype), tensor.len, "of {:?}", tensor.shape);
        }
    }
    assert_eq!(at, file_len, "bytes after the last tensor");
}

fn shards(bytes: &[u8]) {
    let Ok(shards) = Shards::parse(bytes) else { return };
    assert!(shards.files.is_sorted_by(|one, next| one < next));
    for file in &shards.files {
        assert!(!file.contains(['/', '\\', '\0']) && !file.starts_with('.'), "{file:?} is not beside its index");
    }
    let mut indexes = vec![Index::default(); shards.files.len()];
    for (tensor, &file) in &shards.tensors {
        let info = TensorInfo { dtype: Some(Dtype::F32), shape: vec![0], start: 8, len: 0 };
        indexes[file].tensors.insert(tensor.clone(), info);
    }
    assert!(shards.check(&indexes.iter().collect::<Vec<_>>()).is_ok());
    let first = shards.tensors.keys().next().expect("an index without tensors names no file, and is refused");
    indexes[shards.tensors[first]].tensors.remove(first);
    assert!(shards.check(&indexes.iter().collect::<Vec<_>>()).is_err());
    assert!(shards.check(&[]).is_err());
}

/// The bytes are a file, or the beginning of one that is longer.
pub(crate) fn gguf(bytes: &[u8]) {
    for file_len in [bytes.len() as u64, 1 << 50] {
        let Ok(gguf) = Gguf::parse("f.gguf", bytes, file_len) else { continue };
        let mut spans = Vec::new();
        for tensor in gguf.tensors.values() {
            let values = tensor.shape.iter().map(|size| *size as u64).product::<u64>();
            assert_eq!(values % tensor.kind.block(), 0, "of {:?}", tensor.shape);
            assert_eq!(values / tensor.kind.block() * tensor.kind.block_bytes(), tensor.len, "of {:?}", tensor.shape);
            assert!(tensor.len > 0 && tensor.start.is_multiple_of(8));
            let there = gguf.data(tensor);
            assert_eq!(there.is_some(), tensor.start + tensor.len <= bytes.len() as u64);
            assert!(there.is_none_or(|data| data.len() as u64 == tensor.len));
            spans.push((tensor.start, tensor.start + tensor.len));
        }
        spans.sort_unstable();
        assert!(spans.is_sorted_by(|one, next| one.1 <= next.0), "an overlap");
        assert!(spans.last().is_none_or(|last| last.1 <= file_len), "a tensor outside the file");
        values(&gguf);
        let files = [gguf];
        if let Ok(config) = model_config(&files) {
            assert!(check_split(&files).is_ok());
            model(&config);
        }
    }
}

/// A value has one type at most.
fn values(gguf: &Gguf<'_>) {
    for key in gguf.keys() {
        let scalars = [gguf.u64(key).is_ok(), gguf.f64(key).is_ok(), gguf.bool(key).is_ok(), gguf.str(key).is_ok()];
        let items = gguf.count(key).ok().flatten();
        assert!(scalars.into_iter().filter(|one| *one).count() + usize::from(items.is_some()) <= 1);
        let counts = [
            gguf.strings(key).ok().flatten().map(Iterator::count),
            gguf.f32s(key).ok().flatten().map(Iterator::count),
            gguf.i32s(key).ok().flatten().map(Iterator::count),
        ];
        assert!(counts.into_iter().flatten().all(|count| Some(count) == items), "an array ends early");
    }
}

/// The bytes are a `config.json` or a `generation_config.json`.
pub(crate) fn config(bytes: &[u8]) {
    if let Ok(config) = ModelConfig::parse(bytes) {
        model(&config);
    }
    if let Ok(defaults) = GenerationDefaults::parse(bytes) {
        let numbers = [defaults.temperature, defaults.top_p, defaults.repetition_penalty];
        assert!(numbers.into_iter().flatten().all(|number| number.is_finite() && number >= 0.0));
        assert_ne!(defaults.top_k, Some(0));
    }
}

fn model(config: &ModelConfig) {
    assert!(config.head_dim > 0 && config.heads > 0 && config.heads.is_multiple_of(config.kv_heads));
    assert!(config.eos.iter().all(|id| (*id as usize) < config.vocab));
    assert!(!config.layers.is_empty() && !config.ropes.is_empty());
    for layer in &config.layers {
        assert!(layer.rope.is_none_or(|rope| rope < config.ropes.len()));
        assert_ne!(layer.window, Some(0));
        match layer.mlp {
            Mlp::Gated(width) => assert!(width > 0),
            Mlp::Experts { count, picked, width, .. } => assert!(width > 0 && picked > 0 && picked <= count),
        }
    }
    for rope in &config.ropes {
        assert!(rope.dims <= config.head_dim);
        for beyond in [false, true] {
            let frequencies = rope.inverse_frequencies(beyond);
            assert_eq!(frequencies.len(), rope.dims / 2);
            assert!(frequencies.iter().all(|frequency| frequency.is_finite()), "{rope:?} has {frequencies:?}");
        }
        assert!(rope.attention().is_finite(), "{rope:?} multiplies by {}", rope.attention());
    }
    let scales = [config.scales.attention, config.scales.embedding, config.scales.residual, config.scales.logits];
    assert!(scales.into_iter().chain([config.norms.eps]).all(f32::is_finite));
    assert!(config.regime_length() != Some(0) && config.widest_mlp() > 0);
    let most = config.max_positions as u64;
    assert!(needs(config, 1 << 40, 1 << 20, most, Positions { one: most, all: most }, 512).total >= 1 << 40);
}
