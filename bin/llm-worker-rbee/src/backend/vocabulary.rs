//! The files that say how a model's text is taken apart: those of its folder, or what a GGUF's metadata say in their place.

use std::borrow::Cow;

use rbee_models::{Error, FileError, Gguf, ModelFiles, gguf};
use rbee_tokenizer::gguf::{Vocabulary, tokenizer_config_json, tokenizer_json};
use rbee_wire::{ErrorBody, ModelRef};

use super::model::{files_error, text_error};

/// `tokenizer.json`, and what may lie beside it.
pub(super) struct TextFiles {
    pub(super) tokenizer: Cow<'static, [u8]>,
    /// `tokenizer_config.json`.
    pub(super) config: Option<Cow<'static, [u8]>>,
    /// `chat_template.jinja`.
    pub(super) template: Option<Cow<'static, [u8]>>,
}

impl TextFiles {
    /// Reads or makes them.
    ///
    /// # Errors
    /// When the files cannot be used.
    pub(super) fn of(model: &ModelRef, files: &ModelFiles) -> Result<Self, ErrorBody> {
        let failed = |error: Error| files_error(model, &error);
        if let Some(made) = gguf::metadata(files, |gguf| Self::made(model, gguf)).map_err(failed)? {
            return made;
        }
        Ok(Self {
            tokenizer: files.required("tokenizer.json").map_err(failed)?,
            config: files.small("tokenizer_config.json").map_err(failed)?,
            template: files.small("chat_template.jinja").map_err(failed)?,
        })
    }

    fn made(model: &ModelRef, gguf: &Gguf<'_>) -> Result<Self, ErrorBody> {
        let failed = |error: FileError| files_error(model, &Error::Files(error));
        let (vocabulary, template) = read(gguf).map_err(failed)?;
        let text = |error| text_error(model, &error);
        Ok(Self {
            tokenizer: Cow::Owned(tokenizer_json(&vocabulary).map_err(text)?),
            config: Some(Cow::Owned(tokenizer_config_json(&vocabulary, template).map_err(text)?)),
            template: None,
        })
    }
}

/// The vocabulary and the chat template of a file.
fn read<'a>(gguf: &'a Gguf<'_>) -> Result<(Vocabulary<'a>, Option<&'a str>), FileError> {
    const TOKENS: &str = "tokenizer.ggml.tokens";
    const MODEL: &str = "tokenizer.ggml.model";
    let missing = |key: &str| FileError::corrupt(gguf.file(), format!("`{key}` is missing"));
    let id = |key: &str| -> Result<Option<u32>, FileError> {
        // Writers that have no such token put the largest number there.
        Ok(gguf.u64(key)?.and_then(|id| u32::try_from(id).ok()).filter(|id| *id != u32::MAX))
    };
    let vocabulary = Vocabulary {
        model: gguf.str(MODEL)?.ok_or_else(|| missing(MODEL))?,
        pre: gguf.str("tokenizer.ggml.pre")?,
        tokens: gguf.strings(TOKENS)?.ok_or_else(|| missing(TOKENS))?.collect::<Result<_, _>>()?,
        scores: gguf.f32s("tokenizer.ggml.scores")?.map(Iterator::collect),
        kinds: gguf.i32s("tokenizer.ggml.token_type")?.map(Iterator::collect),
        merges: gguf.strings("tokenizer.ggml.merges")?.map(Iterator::collect).transpose()?,
        bos: id("tokenizer.ggml.bos_token_id")?,
        eos: id("tokenizer.ggml.eos_token_id")?,
        unknown: id("tokenizer.ggml.unknown_token_id")?,
        add_bos: gguf.bool("tokenizer.ggml.add_bos_token")?,
        add_eos: gguf.bool("tokenizer.ggml.add_eos_token")?,
        add_space_prefix: gguf.bool("tokenizer.ggml.add_space_prefix")?,
        name: gguf.str("general.name")?,
    };
    Ok((vocabulary, gguf.str("tokenizer.chat_template")?))
}
