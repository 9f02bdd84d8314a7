//! What a folder of sentence-transformers (6.2) declares beside an encoder: how the states of a text's tokens become its embedding.

use serde_json::{Map, Value};

use super::reader::{Reader, object};
use super::shown;
use crate::Error;

/// A list of the parts that a text goes through.
pub const MODULES: &str = "modules.json";

/// How long texts may be, among others.
pub const SENTENCE: &str = "sentence_bert_config.json";

/// Prompts, among others.
pub const PROMPTS: &str = "config_sentence_transformers.json";

const TOKENIZER: &str = "tokenizer_config.json";

/// How the states of a text's tokens become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// That of the first token.
    Cls,
    /// The largest value of each column.
    Max,
    /// The mean.
    Mean,
    /// The sum over the square root of how many there are.
    MeanSqrtLen,
    /// The mean with weights 1, 2, 3, …
    WeightedMean,
    /// That of the last token.
    LastToken,
}

impl Pooling {
    /// By its name, with the key that older releases wrote for it; several are put one behind the other in this order.
    const NAMES: [(&str, &str, Self); 6] = [
        ("cls", "pooling_mode_cls_token", Self::Cls),
        ("max", "pooling_mode_max_tokens", Self::Max),
        ("mean", "pooling_mode_mean_tokens", Self::Mean),
        ("mean_sqrt_len_tokens", "pooling_mode_mean_sqrt_len_tokens", Self::MeanSqrtLen),
        ("weightedmean", "pooling_mode_weightedmean_tokens", Self::WeightedMean),
        ("lasttoken", "pooling_mode_lasttoken", Self::LastToken),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::NAMES.into_iter().find(|(_, _, pooling)| *pooling == self).map_or("", |(name, _, _)| name)
    }
}

/// Whether an embedding is brought to length 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// As it comes out of pooling.
    Own,
    /// 1.
    One,
}

/// How token states become an embedding. More than one pooling are put one behind the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Embedding {
    /// At least one.
    pub poolings: Vec<Pooling>,
    /// Of the whole.
    pub length: Length,
}

impl Default for Embedding {
    /// What a folder means that declares nothing: the mean, of length 1.
    fn default() -> Self {
        Self { poolings: vec![Pooling::Mean], length: Length::One }
    }
}

/// The parts that [`MODULES`] names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Modules {
    /// The file with the pooling's settings.
    pub pooling: String,
    /// Whether the vector is normalised behind it.
    pub length: Length,
}

impl Modules {
    /// Reads and checks the list: an encoder at the folder's top, one pooling, and nothing else than a normalisation behind it.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for what is no such list, [`Error::Unsupported`] for other parts, by their name.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let wrong = || Error::corrupt(MODULES, "it is not a list of modules with `type` and `path`");
        if bytes.len() > 1 << 20 {
            return Err(Error::corrupt(MODULES, "it is larger than any such list"));
        }
        let list: Vec<Map<String, Value>> = serde_json::from_slice(bytes).map_err(|_| wrong())?;
        let text = |module: &Map<String, Value>, key| module.get(key).and_then(Value::as_str).map(str::to_owned);
        let mut kinds = Vec::new();
        for module in list.iter().take(16) {
            let kind = text(module, "type").ok_or_else(wrong)?;
            let kind = kind.rsplit('.').next().unwrap_or_default().to_owned();
            kinds.push((kind, text(module, "path").ok_or_else(wrong)?));
        }
        let named: Vec<(&str, &str)> = kinds.iter().map(|(kind, path)| (kind.as_str(), path.as_str())).collect();
        let other = named.iter().find(|(kind, _)| !["Transformer", "Pooling", "Normalize"].contains(kind));
        if let Some((kind, _)) = other {
            let problem = format!("module `{}`: an encoder, its pooling and a normalisation are computed", shown(kind));
            return Err(Error::unsupported(MODULES, problem));
        }
        let (path, pooling, length) = match named[..] {
            [("Transformer", path), ("Pooling", pooling)] => (path, pooling, Length::Own),
            [("Transformer", path), ("Pooling", pooling), ("Normalize", _)] => (path, pooling, Length::One),
            _ => {
                let order: Vec<&str> = named.iter().map(|(kind, _)| *kind).collect();
                let problem = format!("modules in the order {}", order.join(", "));
                return Err(Error::unsupported(MODULES, problem));
            }
        };
        if !path.is_empty() {
            let problem =
                format!("an encoder in `{}`: move its files to the folder's top and empty its `path`", shown(path));
            return Err(Error::unsupported(MODULES, problem));
        }
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        if pooling.is_empty() || pooling.len() > 64 || !pooling.bytes().all(plain) {
            return Err(Error::corrupt(MODULES, format!("`{}` is not the name of a folder beside it", shown(pooling))));
        }
        Ok(Self { pooling: format!("{pooling}/config.json"), length })
    }
}

/// Reads and checks the settings of a pooling of states of `hidden` values; `file` is where they stand.
///
/// # Errors
/// [`Error::Corrupt`] for what contradicts itself or asks for nothing, [`Error::Unsupported`] for other poolings, by their name.
pub fn poolings(file: &str, bytes: &[u8], hidden: usize) -> Result<Vec<Pooling>, Error> {
    let map = object(file, bytes)?;
    let by_name = |name: &str| {
        let found = Pooling::NAMES.into_iter().find(|(known, _, _)| *known == name).map(|(_, _, pooling)| pooling);
        found.ok_or_else(|| Error::unsupported(file, format!("pooling `{}`", shown(name))))
    };
    for key in ["word_embedding_dimension", "embedding_dimension"] {
        if let Some(width) = map.get(key).filter(|width| width.as_u64() != Some(hidden as u64)) {
            let width: String = width.to_string().chars().take(32).collect();
            return Err(Error::corrupt(file, format!("`{key}` is {width}, the encoder's states have {hidden} values")));
        }
    }
    let found = match map.get("pooling_mode") {
        Some(Value::String(name)) => vec![by_name(name)?],
        Some(Value::Array(names)) if (1..=Pooling::NAMES.len()).contains(&names.len()) => {
            let name = |value: &Value| value.as_str().map(by_name);
            let names = names.iter().map(|value| name(value).unwrap_or_else(|| by_name("")));
            names.collect::<Result<_, _>>()?
        }
        Some(_) => return Err(Error::corrupt(file, "`pooling_mode` must be a name or a list of at most 6")),
        None => {
            let on = |key: &str| map.get(key).and_then(Value::as_bool) == Some(true);
            let known = |key: &str| Pooling::NAMES.iter().any(|(_, known, _)| *known == key);
            if let Some(key) = map.keys().find(|key| key.starts_with("pooling_mode_") && !known(key) && on(key)) {
                return Err(Error::unsupported(file, format!("`{}`", shown(key))));
            }
            Pooling::NAMES.into_iter().filter(|(_, key, _)| on(key)).map(|(_, _, pooling)| pooling).collect()
        }
    };
    if found.is_empty() {
        return Err(Error::corrupt(file, "it switches no pooling on"));
    }
    Ok(found)
}

/// Most tokens of a text by [`SENTENCE`].
///
/// # Errors
/// [`Error::Corrupt`], and [`Error::Unsupported`] for lower-casing beside the tokenizer's own, and for other outputs of the encoder than
/// its last states.
pub fn longest(bytes: &[u8]) -> Result<Option<usize>, Error> {
    let map = object(SENTENCE, bytes)?;
    let read = Reader::new(&map, SENTENCE);
    read.off("do_lower_case")?;
    let text = match read.inner("modality_config")? {
        Some(modalities) => modalities.inner("text")?,
        None => None,
    };
    let output = text.map_or(Ok(None), |text| text.text("method_output_name"))?;
    if let Some(output) = output.filter(|output| *output != "last_hidden_state") {
        return Err(Error::unsupported(SENTENCE, format!("`method_output_name` `{}`", shown(output))));
    }
    read.size("max_seq_length", 1 << 24)
}

/// Most tokens of a text by `tokenizer_config.json`, which has a number beyond all texts where it knows none.
///
/// # Errors
/// [`Error::Corrupt`].
pub fn tokenizer_longest(bytes: &[u8]) -> Result<Option<usize>, Error> {
    let map = object(TOKENIZER, bytes)?;
    let longest = Reader::new(&map, TOKENIZER).number("model_max_length", 1.0, f64::MAX)?;
    Ok(longest.filter(|longest| *longest < (1 << 24) as f64).map(|longest| longest as usize))
}

/// Refuses a text that would be put before every text without being asked for.
///
/// # Errors
/// [`Error::Corrupt`], [`Error::Unsupported`].
pub fn check_prompts(bytes: &[u8]) -> Result<(), Error> {
    let map = object(PROMPTS, bytes)?;
    match Reader::new(&map, PROMPTS).text("default_prompt_name")? {
        None => Ok(()),
        Some(name) => {
            let problem = format!(
                "`default_prompt_name` `{}`: no prompt is put before texts here; set it to null and write the prompt into the texts",
                shown(name)
            );
            Err(Error::unsupported(PROMPTS, problem))
        }
    }
}
