//! How each `tokenizer.ggml.pre` cuts a text into words before byte-level BPE.
//!
//! The names and what they stand for are llama.cpp's (`src/llama-vocab.cpp`); where it approximates a model's own
//! pattern because its regex engine lacks something, the model's own is used. A pattern cuts the pieces that the one
//! before it left; what no pattern matches stays a piece.

use crate::Error;

/// Ends of words that English joins with an apostrophe, in any case.
macro_rules! contractions {
    () => {
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    };
}

/// What most tokenizers since GPT-4 share, with what they make of letters and of digits left open.
macro_rules! modern {
    ($letters:literal, $digits:literal) => {
        concat!(
            contractions!(),
            r"|[^\r\n\p{L}\p{N}]?",
            $letters,
            "|",
            $digits,
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
}

/// Words by capitals: `HelloWorld` is two. `$end` is what may follow a word.
macro_rules! by_capitals {
    ($end:expr, $digits:literal) => {
        concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            $end,
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
            $end,
            "|",
            $digits,
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = modern!(r"\p{L}+", r"\p{N}{1,3}");
const QWEN2: &str = modern!(r"\p{L}+", r"\p{N}");
const QWEN35: &str = concat!(
    contractions!(),
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const TEKKEN: &str = by_capitals!("", r"\p{N}");
const GPT4O: &str = by_capitals!("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\p{N}{1,3}");
const BLOOM: &str = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{964}\x{6D4}\x{60C})]+";
const DIGIT: &str = r"\p{N}";
const THREE_DIGITS: &str = "[0-9][0-9][0-9]";
const DEEPSEEK3: [&str; 3] = [
    r"\p{N}{1,3}",
    r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
    concat!(
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##,
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
];
const DEEPSEEK_CODER: [&str; 5] =
    [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+", DIGIT];

/// Whether a word that is a token as it stands is taken whole, though no merges lead to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WholeWords {
    Taken,
    Merged,
}

/// Whether a text begins with BOS when the file does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bos {
    Added,
    Absent,
}

/// What a `tokenizer.ggml.pre` stands for.
pub(super) struct Rule {
    pub(super) patterns: &'static [&'static str],
    pub(super) whole_words: WholeWords,
    pub(super) bos: Bos,
}

/// The rule of a name. A file without one is of the time before there were names, when one rule cut them all.
pub(super) fn rule(pre: Option<&str>) -> Result<Rule, Error> {
    let plain = |patterns| Rule { patterns, whole_words: WholeWords::Merged, bos: Bos::Absent };
    let whole = |patterns| Rule { patterns, whole_words: WholeWords::Taken, bos: Bos::Absent };
    let whole_with_bos = |patterns| Rule { patterns, whole_words: WholeWords::Taken, bos: Bos::Added };
    Ok(match pre.unwrap_or("default") {
        "" | "default" => plain(&[r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", THREE_DIGITS]),
        "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0" | "lfm2" => {
            whole_with_bos(&[LLAMA3])
        }
        "dbrx" | "smaug-bpe" | "chatglm-bpe" => plain(&[LLAMA3]),
        "glm4" | "glm5" => whole(&[LLAMA3]),
        "qwen2" | "deepseek-r1-qwen" | "stablelm2" | "hunyuan" | "megrez" | "grok-2" | "solar-open" | "kormo" => {
            plain(&[QWEN2])
        }
        "qwen35" => plain(&[QWEN35]),
        "gpt-2" | "phi-2" | "mpt" | "olmo" | "jais" | "exaone4" | "trillion" | "granite-docling" | "gigachat"
        | "a.x-4.0" | "mellum" => plain(&[GPT2]),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" | "mellum2" => {
            plain(&[DIGIT, GPT2])
        }
        "falcon" => plain(&[r"[\p{P}$+<=>^~|`]+", GPT2, THREE_DIGITS]),
        "tekken" => whole_with_bos(&[TEKKEN]),
        "gpt-4o" | "llama4" | "kanana2" | "minimax-m2" => plain(&[GPT4O]),
        "deepseek-v3" | "hunyuan-dense" | "joyai-llm" => plain(&DEEPSEEK3),
        "deepseek-coder" => plain(&DEEPSEEK_CODER),
        "bloom" | "gpt3-finnish" | "poro-chat" => plain(&[BLOOM]),
        "viking" => plain(&[BLOOM, DIGIT]),
        "seed-coder" => plain(&[concat!(
            contractions!(),
            r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
        )]),
        "bailingmoe" | "bailingmoe2" | "llada-moe" => plain(&[concat!(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*",
            r"|\s*[\r\n]|\s+(?!\S)|\s+"
        )]),
        other => {
            return Err(Error::Unsupported {
                what: "tokenizer.ggml.pre",
                reason: format!("no rule for words is known by the name {other:?}"),
            });
        }
    })
}
