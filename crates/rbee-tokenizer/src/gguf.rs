//! A tokenizer from the metadata of a GGUF file.
//!
//! A GGUF file holds tokens, scores or merges, and names for what a `tokenizer.json` says in full. [`tokenizer_json`]
//! says it in full, so that [`Tokenizer::from_json`](crate::Tokenizer::from_json) checks and loads every model the
//! same way; [`tokenizer_config_json`] does it for the chat template and the tokens that it names. Ids are those of
//! llama.cpp, which gave the metadata its meaning (`src/llama-vocab.cpp`).
//!
//! Where this differs on purpose: control tokens are never made by merging letters; scores must be there, since
//! without them llama.cpp merges whatever stands leftmost; and a name that is not known is refused, not guessed.
//!
//! Start with [`Vocabulary`]; `split.rs` has the rules for words.

mod split;

use std::collections::HashMap;

use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use crate::{Error, TokenId};
use split::{Bos, WholeWords};

/// Cap of tokens; the largest vocabularies in use have a quarter million. A `tokenizer.json` of many more is refused in any case,
/// and making it takes memory.
const MAX_TOKENS: usize = 1 << 20;
/// Cap of merges; the largest vocabularies in use have half a million.
const MAX_MERGES: usize = 1 << 20;
/// Cap of all texts together, in bytes; the file that is made of them may have little more.
const MAX_TEXT: usize = crate::MAX_TOKENIZER_BYTES;
/// Cap of a token that is cut at every place, in bytes: bounds that work. SentencePiece's own are below 100.
const MAX_PIECE: usize = 256;
/// Spaces of a merge at which it may be cut; byte-level BPE writes a space as another letter, so that one is the rule.
const MAX_SPACES: usize = 16;
/// Stands for a space in the pieces of SentencePiece.
const MARK: &str = "\u{2581}";

const MODEL: &str = "tokenizer.ggml.model";
const TOKENS: &str = "tokenizer.ggml.tokens";
const SCORES: &str = "tokenizer.ggml.scores";
const KINDS: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";
const UNKNOWN: &str = "tokenizer.ggml.unknown_token_id";

/// Tokens that end a turn. Converters have marked them as ordinary ones; a user must not be able to write them.
const ENDS_OF_TURN: [&str; 16] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
];

/// Tokens of Phi 3 that leave the space behind them alone.
const KEEP_SPACE_IN_PHI3: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];

/// The `tokenizer.ggml.*` metadata of a GGUF file, as it stands there.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Vocabulary<'a> {
    /// `model`: `gpt2` is byte-level BPE, `llama` is SentencePiece.
    pub model: &'a str,
    /// `pre`: the name of the rule that cuts a text into words.
    pub pre: Option<&'a str>,
    /// `tokens`, by id.
    pub tokens: Vec<&'a str>,
    /// `scores`, by id: the higher, the sooner a piece is made.
    pub scores: Option<Vec<f32>>,
    /// `token_type`, by id: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub kinds: Option<Vec<i32>>,
    /// `merges`: two tokens and a space between them, the soonest first.
    pub merges: Option<Vec<&'a str>>,
    /// `bos_token_id`
    pub bos: Option<TokenId>,
    /// `eos_token_id`
    pub eos: Option<TokenId>,
    /// `unknown_token_id`
    pub unknown: Option<TokenId>,
    /// `add_bos_token`
    pub add_bos: Option<bool>,
    /// `add_eos_token`
    pub add_eos: Option<bool>,
    /// `add_space_prefix`: whether a text begins with a space that is not in it.
    pub add_space_prefix: Option<bool>,
    /// `general.name`: that of a Phi 3 says what no other key does, that its control tokens take the space behind them.
    pub name: Option<&'a str>,
}

/// The `tokenizer.json` that says the same.
///
/// # Errors
/// [`Error::Unsupported`] for a model or a rule for words that is not known, with its name;
/// [`Error::TooLarge`] and [`Error::Corrupt`] for metadata that is beyond all bounds or contradicts itself.
pub fn tokenizer_json(vocabulary: &Vocabulary) -> Result<Vec<u8>, Error> {
    let checked = Checked::new(vocabulary)?;
    let file = match checked.family {
        Family::ByteLevel => byte_level(&checked)?,
        Family::SentencePiece => sentencepiece(&checked)?,
    };
    serde_json::to_vec(&file).map_err(|e| corrupt(TOKENS, e.to_string()))
}

/// The `tokenizer_config.json` that says the same: the texts of the tokens that a template names, and the template.
///
/// # Errors
/// As [`tokenizer_json`].
pub fn tokenizer_config_json(vocabulary: &Vocabulary, chat_template: Option<&str>) -> Result<Vec<u8>, Error> {
    let checked = Checked::new(vocabulary)?;
    let mut config = Map::new();
    for (key, id) in [("bos_token", checked.bos), ("eos_token", checked.eos), ("unk_token", checked.unknown)] {
        if let Some(id) = id {
            config.insert(key.to_owned(), json!(checked.text(id)));
        }
    }
    if let Some(template) = chat_template {
        config.insert("chat_template".to_owned(), json!(template));
    }
    serde_json::to_vec(&config).map_err(|e| corrupt(TOKENS, e.to_string()))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    ByteLevel,
    SentencePiece,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Byte,
    /// Without a text of its own: an id that nothing leads to.
    Nameless,
}

/// A vocabulary whose parts fit together.
struct Checked<'v> {
    source: &'v Vocabulary<'v>,
    family: Family,
    kinds: Vec<Kind>,
    /// Of every text that is a token.
    ids: HashMap<&'v str, TokenId>,
    bos: Option<TokenId>,
    eos: Option<TokenId>,
    unknown: Option<TokenId>,
}

impl<'v> Checked<'v> {
    fn new(source: &'v Vocabulary<'v>) -> Result<Checked<'v>, Error> {
        let family = match source.model {
            "gpt2" => Family::ByteLevel,
            "llama" => Family::SentencePiece,
            other => {
                return Err(Error::Unsupported {
                    what: MODEL,
                    reason: format!("no tokenizer is known by the name {other:?}"),
                });
            }
        };
        check_sizes(source)?;
        let mut kinds = kinds(source)?;
        let named = |what, id: Option<TokenId>, default: Option<TokenId>| match id {
            Some(id) if id as usize >= source.tokens.len() => {
                Err(corrupt(what, format!("it is {id}, and there are {} tokens", source.tokens.len())))
            }
            Some(id) => Ok(Some(id)),
            // Files from before these keys were written; the ids are those of Llama.
            None if family == Family::SentencePiece => {
                let steers = |id: &TokenId| matches!(kinds.get(*id as usize), Some(Kind::Control | Kind::Unknown));
                Ok(default.filter(steers))
            }
            None => Ok(None),
        };
        let (bos, eos) = (named(BOS, source.bos, Some(1))?, named(EOS, source.eos, Some(2))?);
        let unknown = named(UNKNOWN, source.unknown, Some(0))?;
        for id in [bos, eos].into_iter().flatten() {
            kinds[id as usize] = Kind::Control;
        }
        let ids = ids(&source.tokens, &mut kinds)?;
        for end in ENDS_OF_TURN {
            if let Some(&id) = ids.get(end) {
                kinds[id as usize] = Kind::Control;
            }
        }
        for (key, id) in [(BOS, bos), (EOS, eos), (UNKNOWN, unknown)] {
            if let Some(id) = id
                && kinds[id as usize] == Kind::Nameless
            {
                return Err(corrupt(key, format!("token {id} has no text")));
            }
        }
        Ok(Checked { source, family, kinds, ids, bos, eos, unknown })
    }

    fn text(&self, id: TokenId) -> &'v str {
        self.source.tokens[id as usize]
    }

    /// Ids and texts of the tokens that have one.
    fn tokens(&self) -> impl Iterator<Item = (TokenId, &'v str, Kind)> {
        let all = self.source.tokens.iter().zip(&self.kinds).enumerate();
        all.map(|(id, (&text, &kind))| (id as TokenId, text, kind)).filter(|&(_, _, kind)| kind != Kind::Nameless)
    }

    /// The tokens that are looked for in a text before anything else.
    fn added(&self) -> Vec<Added<'v>> {
        let name = self.source.name.unwrap_or_default().to_ascii_lowercase();
        let phi3 = name.contains("phi-3") || name.contains("phi3");
        let added = |id, content, special| Added {
            id,
            content,
            single_word: false,
            lstrip: false,
            rstrip: phi3 && !KEEP_SPACE_IN_PHI3.contains(&content),
            normalized: false,
            special,
        };
        self.tokens()
            .filter_map(|(id, text, kind)| match kind {
                Kind::Control | Kind::Unknown => Some(added(id, text, true)),
                Kind::UserDefined => Some(added(id, text, false)),
                Kind::Normal | Kind::Byte | Kind::Nameless => None,
            })
            .collect()
    }

    /// What is put around a text.
    fn post_processor(&self, bos: bool, eos: bool) -> Result<Value, Error> {
        let mut single = vec![json!({"Sequence": {"id": "A", "type_id": 0}})];
        let mut specials = Map::new();
        let mut special = |key, id: Option<TokenId>| {
            let id = id.ok_or_else(|| corrupt(key, "a text begins or ends with it, and it is not there".to_owned()))?;
            let text = self.text(id);
            specials.insert(text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]}));
            Ok::<Value, Error>(json!({"SpecialToken": {"id": text, "type_id": 0}}))
        };
        if bos {
            single.insert(0, special(BOS, self.bos)?);
        }
        if eos {
            single.push(special(EOS, self.eos)?);
        }
        if specials.is_empty() {
            return Ok(Value::Null);
        }
        let pair = json!([{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]);
        Ok(json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": specials}))
    }
}

fn check_sizes(source: &Vocabulary) -> Result<(), Error> {
    let merges = source.merges.as_deref().unwrap_or_default();
    for (what, size, limit) in [(TOKENS, source.tokens.len(), MAX_TOKENS), (MERGES, merges.len(), MAX_MERGES)] {
        if size > limit {
            return Err(corrupt(what, format!("it has {size} entries, more than the {limit} allowed")));
        }
    }
    if source.tokens.is_empty() {
        return Err(corrupt(TOKENS, "it is empty".to_owned()));
    }
    for (what, texts) in [(TOKENS, source.tokens.as_slice()), (MERGES, merges)] {
        let size = texts.iter().map(|text| text.len()).sum();
        if size > MAX_TEXT {
            return Err(Error::TooLarge { what, size, limit: MAX_TEXT });
        }
    }
    let lengths = [(SCORES, source.scores.as_ref().map(Vec::len)), (KINDS, source.kinds.as_ref().map(Vec::len))];
    for (what, length) in lengths {
        if let Some(length) = length
            && length != source.tokens.len()
        {
            return Err(corrupt(what, format!("it has {length} entries for {} tokens", source.tokens.len())));
        }
    }
    Ok(())
}

fn kinds(source: &Vocabulary) -> Result<Vec<Kind>, Error> {
    let declared = source.kinds.as_deref();
    let kind = |(id, text): (usize, &&str)| {
        if text.is_empty() {
            return Ok(Kind::Nameless);
        }
        match declared.map_or(1, |kinds| kinds[id]) {
            // An unused token is a token: a file may call it so and still have merges for it.
            0 | 1 | 5 => Ok(Kind::Normal),
            2 => Ok(Kind::Unknown),
            3 => Ok(Kind::Control),
            4 => Ok(Kind::UserDefined),
            6 => Ok(Kind::Byte),
            other => Err(corrupt(KINDS, format!("token {id} is of kind {other}"))),
        }
    };
    source.tokens.iter().enumerate().map(kind).collect()
}

/// The id of each text. Of two tokens with one text, an ordinary one yields to the other and loses its text: nothing in
/// a text can then lead to it. Which of two that steer is meant cannot be known.
fn ids<'v>(tokens: &[&'v str], kinds: &mut [Kind]) -> Result<HashMap<&'v str, TokenId>, Error> {
    let mut ids: HashMap<&'v str, TokenId> = HashMap::with_capacity(tokens.len());
    for (id, &text) in tokens.iter().enumerate() {
        if kinds[id] == Kind::Nameless {
            continue;
        }
        let Some(&earlier) = ids.get(text) else {
            ids.insert(text, id as TokenId);
            continue;
        };
        if kinds[id] == Kind::Normal {
            kinds[id] = Kind::Nameless;
        } else if kinds[earlier as usize] == Kind::Normal {
            kinds[earlier as usize] = Kind::Nameless;
            ids.insert(text, id as TokenId);
        } else {
            return Err(corrupt(TOKENS, format!("tokens {earlier} and {id} are both {text:?}")));
        }
    }
    Ok(ids)
}

fn byte_level<'v>(checked: &Checked<'v>) -> Result<File<'v>, Error> {
    let rule = split::rule(checked.source.pre)?;
    let merges = checked.source.merges.as_deref();
    let merges = merges.ok_or_else(|| corrupt(MERGES, "byte-level BPE needs it, and it is not there".to_owned()))?;
    let mut pre_tokenizers: Vec<Value> = rule
        .patterns
        .iter()
        .map(|regex| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false}))
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    pre_tokenizers.push(byte_level.clone());
    let bos = checked.source.add_bos.unwrap_or(rule.bos == Bos::Added);
    Ok(File {
        version: "1.0",
        truncation: None,
        padding: None,
        added_tokens: checked.added(),
        normalizer: Value::Null,
        pre_tokenizer: json!({"type": "Sequence", "pretokenizers": pre_tokenizers}),
        post_processor: checked.post_processor(bos, checked.source.add_eos.unwrap_or(false))?,
        decoder: byte_level,
        model: Model {
            kind: "BPE",
            dropout: None,
            unk_token: None,
            continuing_subword_prefix: None,
            end_of_word_suffix: None,
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: rule.whole_words == WholeWords::Taken,
            vocab: Vocab(checked.tokens().map(|(id, text, _)| (text, id)).collect()),
            merges: listed_merges(&checked.ids, merges)?,
        },
    })
}

/// The two halves of every merge.
fn listed_merges<'v>(ids: &HashMap<&str, TokenId>, merges: &[&'v str]) -> Result<Vec<(&'v str, &'v str)>, Error> {
    let mut joined = String::new();
    let mut halves = |merge: &'v str| {
        // A token may have a space in it: the one that counts has tokens on both sides.
        for (at, _) in merge.match_indices(' ').take(MAX_SPACES) {
            let (left, right) = (&merge[..at], &merge[at + 1..]);
            if ids.contains_key(left) && ids.contains_key(right) {
                joined.clear();
                joined.extend([left, right]);
                if ids.contains_key(joined.as_str()) {
                    return Some((left, right));
                }
            }
        }
        None
    };
    let halved = merges.iter().enumerate().map(|(rank, merge)| {
        halves(merge)
            .ok_or_else(|| corrupt(MERGES, format!("entry {rank}, {merge:?}, does not join two tokens to one")))
    });
    halved.collect()
}

fn sentencepiece<'v>(checked: &Checked<'v>) -> Result<File<'v>, Error> {
    let scores = checked.source.scores.as_deref();
    let scores = scores.ok_or_else(|| corrupt(SCORES, "SentencePiece needs it, and it is not there".to_owned()))?;
    let byte_fallback = has_bytes(checked)?;
    let space_prefix = checked.source.add_space_prefix.unwrap_or(true);
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": MARK})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": MARK}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if space_prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": MARK}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let (bos, eos) = (checked.source.add_bos.unwrap_or(true), checked.source.add_eos.unwrap_or(false));
    Ok(File {
        version: "1.0",
        truncation: None,
        padding: None,
        added_tokens: checked.added(),
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        post_processor: checked.post_processor(bos, eos)?,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: Model {
            kind: "BPE",
            dropout: None,
            unk_token: checked.unknown.map(|id| checked.text(id)),
            continuing_subword_prefix: None,
            end_of_word_suffix: None,
            fuse_unk: true,
            byte_fallback,
            ignore_merges: false,
            vocab: Vocab(checked.tokens().map(|(id, text, _)| (text, id)).collect()),
            merges: scored_merges(checked, scores)?,
        },
    })
}

/// Whether every byte has a token. Without them a letter that is no token must be the unknown one, or it would vanish.
fn has_bytes(checked: &Checked) -> Result<bool, Error> {
    let present = (0..=255u8).filter(|byte| checked.ids.contains_key(format!("<0x{byte:02X}>").as_str())).count();
    match (present, checked.unknown) {
        (256, _) => Ok(true),
        (0, Some(_)) => Ok(false),
        (0, None) => Err(corrupt(TOKENS, "it has neither bytes nor an unknown token".to_owned())),
        _ => Err(corrupt(TOKENS, format!("it has {present} of the 256 bytes"))),
    }
}

/// The merges that make every piece of two others, the highest score first.
///
/// SentencePiece's BPE joins the two neighbours whose piece has the highest score, and of equal ones the leftmost. As a
/// list of merges it is the same but for pieces of one score that overlap in a text; of the ways to make one piece the
/// longest left part is first, as in transformers (`generate_merges`).
fn scored_merges<'v>(checked: &Checked<'v>, scores: &[f32]) -> Result<Vec<(&'v str, &'v str)>, Error> {
    if let Some(id) = scores.iter().position(|score| !score.is_finite()) {
        return Err(corrupt(SCORES, format!("that of token {id} is not a number")));
    }
    let is_piece = |kind| matches!(kind, Kind::Normal | Kind::UserDefined);
    let joins = |text: &str| checked.ids.get(text).is_some_and(|&id| is_piece(checked.kinds[id as usize]));
    let mut merges: Vec<(f32, &'v str, &'v str)> = Vec::new();
    for (id, text, kind) in checked.tokens() {
        if !is_piece(kind) {
            continue;
        }
        if text.len() > MAX_PIECE {
            // A user's own token is found in the text before its letters are joined.
            match kind {
                Kind::UserDefined => continue,
                _ => return Err(corrupt(TOKENS, format!("token {id} has {} bytes", text.len()))),
            }
        }
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if joins(left) && joins(right) {
                if merges.len() == MAX_MERGES {
                    return Err(corrupt(TOKENS, "its pieces can be made in too many ways".to_owned()));
                }
                merges.push((scores[id as usize], left, right));
            }
        }
    }
    // Stable: pieces of one score and merges of one length stay in the order of their ids.
    merges.sort_by(|(a, left, _), (b, other, _)| b.total_cmp(a).then_with(|| other.len().cmp(&left.len())));
    Ok(merges.into_iter().map(|(_, left, right)| (left, right)).collect())
}

/// `tokenizer.json`, as far as these tokenizers need it.
#[derive(Serialize)]
struct File<'v> {
    version: &'static str,
    truncation: Option<()>,
    padding: Option<()>,
    added_tokens: Vec<Added<'v>>,
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: Model<'v>,
}

#[derive(Serialize)]
struct Added<'v> {
    id: TokenId,
    content: &'v str,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

#[derive(Serialize)]
struct Model<'v> {
    #[serde(rename = "type")]
    kind: &'static str,
    dropout: Option<f32>,
    unk_token: Option<&'v str>,
    continuing_subword_prefix: Option<&'v str>,
    end_of_word_suffix: Option<&'v str>,
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    vocab: Vocab<'v>,
    merges: Vec<(&'v str, &'v str)>,
}

/// Texts and their ids, written as an object in the order of the ids.
struct Vocab<'v>(Vec<(&'v str, TokenId)>);

impl Serialize for Vocab<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().copied())
    }
}

fn corrupt(what: &'static str, reason: String) -> Error {
    Error::Corrupt { what, reason }
}
