//! Configs that somebody has tampered with: an error or a model of sane size, never a panic.

#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "a test reads fixtures and fails by panicking")]

use std::path::Path;

use proptest::prelude::*;
use rbee_weights::config::encoder::EncoderConfig;
use rbee_weights::config::sentence::{self, Modules};
use rbee_weights::config::{GenerationDefaults, ModelConfig};
use rbee_weights::needs::{Positions, encoder_needs, needs};
use serde_json::{Value, json};

fn fixtures() -> Vec<Value> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models");
    let folders = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path().join("config.json"));
    folders.map(|path| serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()).collect()
}

fn odd() -> impl Strategy<Value = Value> {
    let numbers = prop_oneof![
        Just(json!(0)),
        Just(json!(-1)),
        Just(json!(1)),
        Just(json!(u64::MAX)),
        Just(json!(i64::MIN)),
        Just(json!(1e300)),
        Just(json!(-0.5)),
        Just(json!(1e-300)),
        (0u64..1 << 24).prop_map(|number| json!(number)),
        (-10.0f64..1e7).prop_map(|number| json!(number)),
    ];
    let leaf = prop_oneof![
        4 => numbers,
        1 => Just(Value::Null),
        2 => prop::collection::vec(0.5f64..4.0, 0..12).prop_map(|list| json!(list)),
        1 => any::<bool>().prop_map(|flag| json!(flag)),
        1 => prop::sample::select(vec!["", "yarn", "longrope", "llama3", "su", "gelu", "full_attention", "mixtral", "\u{0}"])
            .prop_map(|text| json!(text)),
    ];
    leaf.prop_recursive(3, 24, 8, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..8).prop_map(|items| json!(items)),
            prop::collection::btree_map(
                prop::sample::select(vec![
                    "factor",
                    "rope_type",
                    "type",
                    "short_factor",
                    "long_factor",
                    "beta_fast",
                    "full_attention"
                ])
                .prop_map(str::to_owned),
                inner,
                0..5,
            )
            .prop_map(|map| json!(map)),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn a_tampered_config_is_an_error_or_a_model(
        which in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), odd()), 1..3),
        more in prop::collection::vec((
            prop::sample::select(vec!["rope_scaling", "rope_parameters", "layer_types", "no_rope_layers", "head_dim",
                "num_experts", "num_local_experts", "sliding_window", "max_window_layers", "partial_rotary_factor"]),
            odd(),
        ), 0..3),
    ) {
        let all = fixtures();
        let mut config = all[which.index(all.len())].clone();
        let mut keys: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
        // Ropes have the most to get wrong.
        keys.extend(["rope_scaling", "rope_parameters"].repeat(6).into_iter().filter(|key| config[*key].is_object()).map(str::to_owned));
        for (key, value) in changes {
            let place = &mut config[&keys[key.index(keys.len())]];
            let inner = place.as_object().map_or(1, |inner| inner.len().max(1));
            // In an object, one of its own keys.
            match place.as_object_mut().and_then(|all| all.values_mut().nth(key.index(inner))) {
                Some(inner) => *inner = value,
                None => *place = value,
            }
        }
        for (key, value) in more {
            config[key] = value;
        }
        let text = config.to_string();
        if let Ok(config) = ModelConfig::parse(text.as_bytes()) {
            prop_assert!(config.head_dim > 0 && config.heads.is_multiple_of(config.kv_heads));
            prop_assert!(config.layers.iter().all(|layer| layer.rope.is_none_or(|rope| rope < config.ropes.len())));
            prop_assert!(config.layers.iter().all(|layer| layer.window != Some(0)));
            for rope in &config.ropes {
                prop_assert!(rope.dims <= config.head_dim);
                prop_assert_eq!(rope.inverse_frequencies(true).len(), rope.dims / 2);
            }
            let most = config.max_positions as u64;
            let positions = Positions { one: most, all: most };
            let needs = needs(&config, 1 << 40, 1 << 20, most, positions, 512);
            prop_assert!(needs.least >= 1 << 40 && needs.total >= needs.least);
        }
        let _ = GenerationDefaults::parse(text.as_bytes());
    }

    #[test]
    fn a_tampered_encoder_is_an_error_or_a_model(
        roberta in any::<bool>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), odd()), 1..3),
    ) {
        let name = if roberta { "xlm-roberta" } else { "bert" };
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/encoders").join(name);
        let tampered = |file: &str| {
            let mut all: Value = serde_json::from_slice(&std::fs::read(folder.join(file)).unwrap()).unwrap();
            for (key, value) in &changes {
                let mut places: Vec<&mut Value> = match &mut all {
                    Value::Object(map) => map.values_mut().collect(),
                    Value::Array(list) => list.iter_mut().flat_map(|module| module.as_object_mut().unwrap().values_mut()).collect(),
                    _ => Vec::new(),
                };
                let count = places.len();
                *places[key.index(count)] = value.clone();
            }
            all.to_string().into_bytes()
        };
        if let Ok(config) = EncoderConfig::parse(&tampered("config.json")) {
            prop_assert_eq!(config.head_dim() * config.heads, config.hidden);
            prop_assert!(config.longest() > 0 && config.first_position < config.positions);
            let needs = encoder_needs(&config, 1 << 40, config.longest() as u64, 512);
            prop_assert!(needs.kv == 0 && needs.total == needs.least && needs.total > 1 << 40);
        }
        if let Ok(modules) = Modules::parse(&tampered("modules.json")) {
            prop_assert!(!modules.pooling.contains(".."), "{}", modules.pooling);
        }
        if let Ok(poolings) = sentence::poolings("p", &tampered("1_Pooling/config.json"), 32) {
            prop_assert!((1..=6).contains(&poolings.len()));
        }
        let longest = sentence::longest(&tampered("sentence_bert_config.json"));
        prop_assert!(longest.is_err() || longest != Ok(Some(0)));
        let longest = sentence::tokenizer_longest(&tampered("tokenizer_config.json"));
        prop_assert!(longest.is_err() || longest != Ok(Some(0)));
        let _ = sentence::check_prompts(&tampered("config_sentence_transformers.json"));
    }

    #[test]
    fn bytes_of_any_kind_are_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(ModelConfig::parse(&bytes).is_err());
        prop_assert!(EncoderConfig::parse(&bytes).is_err() && Modules::parse(&bytes).is_err());
        prop_assert!(rbee_weights::safetensors::Shards::parse(&bytes).is_err());
        let len = rbee_weights::safetensors::header_len("f", &bytes, bytes.len() as u64);
        if let Ok(len) = len {
            let _ = rbee_weights::safetensors::Index::parse("f", &bytes[8..8 + len as usize], bytes.len() as u64);
        }
    }
}
