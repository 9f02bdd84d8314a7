//! Files of a model that `rbee-tokenizer` reads.

use std::sync::OnceLock;

use rbee_tokenizer::{
    Chat, ChatTemplate, Controls, Error, GenerationPrompt, Render, Specials, Start, Tokenizer, TokenizerConfig, message,
};
use serde_json::{Map, Value, json};

/// Texts that tokenizers stumble over.
const NASTY: &[&str] = &[
    "",
    " ",
    "a",
    "hello  World\r\n\t 12345",
    "<s></s><|im_end|>[/INST]",
    "é e\u{301} ﬁ İ ß 한국 \u{200d}👨‍👩‍👧 \u{0}\u{feff}\u{fffd}",
    "▁▁ Ġ Ċ <0x0A> ##a",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!",
];

/// Longest prompt that is made into ids, in bytes: they take over a hundred times its memory.
const MAX_ENCODED: usize = 64 << 10;

/// The bytes are a `tokenizer.json` or a `tokenizer_config.json`.
pub(crate) fn tokenizer(bytes: &[u8]) {
    if let Ok(tokenizer) = Tokenizer::from_json(bytes) {
        use_tokenizer(&tokenizer, bytes);
    }
    if let Ok(config) = TokenizerConfig::from_json(bytes)
        && let Ok(Some(template)) = ChatTemplate::load(&config, None)
    {
        use_template(&template);
    }
}

fn use_tokenizer(tokenizer: &Tokenizer, bytes: &[u8]) {
    let rows = tokenizer.vocab_size();
    assert!(tokenizer.check_fits(rows).is_ok() && tokenizer.check_fits(rows - 1).is_err());
    let controls = tokenizer.control_ids();
    assert!(controls.iter().all(|id| (*id as usize) < rows && tokenizer.is_control(*id)));
    let unknown = unknown(tokenizer, bytes);

    let names: Vec<String> = controls.iter().take(4).filter_map(|id| tokenizer.id_to_token(*id)).collect();
    let named = names.iter().map(|name| format!("a{name} {name}{name}"));
    for text in NASTY.iter().map(|text| (*text).to_owned()).chain(named) {
        if let Ok(ids) = tokenizer.encode(&text, Specials::AsText) {
            decodes(tokenizer, &ids);
            let control = ids.iter().find(|id| tokenizer.is_control(**id) && Some(**id) != unknown);
            assert_eq!(control, None, "a user wrote the control token in {text:?}");
        }
        if let Ok(ids) = tokenizer.encode_prompt(&text, Specials::AsControl) {
            decodes(tokenizer, &ids);
        }
    }
    let all: Vec<u32> = (0..rows.min(512) as u32).chain([rows as u32, u32::MAX]).collect();
    decodes(tokenizer, &all);
}

/// The id that stands for text without a token: control by its mark, but no one is steered by it.
fn unknown(tokenizer: &Tokenizer, bytes: &[u8]) -> Option<u32> {
    let file: Value = serde_json::from_slice(bytes).ok()?;
    let name = match file["model"]["unk_token"].as_str() {
        Some(name) => name.to_owned(),
        None => "<unk>".to_owned(),
    };
    tokenizer.token_to_id(&name)
}

/// Text comes out of ids one by one as out of their bytes together; hidden control tokens are as if they were not there.
fn decodes(tokenizer: &Tokenizer, ids: &[u32]) {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| tokenizer.token_bytes(*id)).copied().collect();
    let mut detokenizer = tokenizer.detokenizer(Controls::Show, Start::Continues);
    let mut text = String::new();
    for id in ids {
        detokenizer.push(*id, &mut text);
    }
    detokenizer.finish(&mut text);
    assert_eq!(text, String::from_utf8_lossy(&bytes));
    let plain: Vec<u32> = ids.iter().copied().filter(|id| !tokenizer.is_control(*id)).collect();
    assert_eq!(tokenizer.decode(ids, Controls::Hide), tokenizer.decode(&plain, Controls::Show));
}

/// The bytes are a `chat_template.jinja`.
pub(crate) fn template(bytes: &[u8]) {
    let config = TokenizerConfig {
        special_texts: vec![("bos_token".to_owned(), "<s>".to_owned()), ("eos_token".to_owned(), "</s>".to_owned())],
        chat_templates: Vec::new(),
    };
    if let Ok(Some(template)) = ChatTemplate::load(&config, Some(bytes)) {
        use_template(&template);
    }
}

fn use_template(template: &ChatTemplate) {
    let messages = [
        message("system", "You are terse."),
        message("user", "What is 1 < 2?</s> <|im_end|>"),
        json!({"role": "assistant", "content": "<think>\nhm\n</think>\nLet me ask.", "tool_calls": [
            {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2.5, null]}}}]}),
        json!({"role": "tool", "tool_call_id": "call00001", "name": "add", "content": "{\"sum\": 3}"}),
        message("user", ""),
    ];
    let tools =
        [json!({"type": "function", "function": {"name": "add", "description": "Adds \"numbers\".", "parameters": {
        "type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "array"}}, "required": ["a"]}}})];
    let settings =
        Map::from_iter([("enable_thinking".to_owned(), json!(true)), ("custom".to_owned(), json!(["x", 2]))]);
    let parts: Vec<Value> = messages.iter().map(in_parts).collect();
    for (messages, parts, tools, generation_prompt) in [
        (&messages[..], &parts[..], &tools[..], GenerationPrompt::Add),
        (&messages[1..2], &parts[1..2], &[], GenerationPrompt::Omit),
    ] {
        let mut longest = 0;
        for messages in [messages, parts] {
            let render = Render { messages, tools, settings: &settings, generation_prompt, now: 1_700_000_000 };
            longest = longest.max(template.render(&render).map_or(0, |prompt| prompt.len()));
        }
        assert!(longest <= 16 << 20, "a prompt of {longest} bytes");
        if longest > MAX_ENCODED {
            continue;
        }
        let chat = Chat { messages, tools, settings: &settings, generation_prompt, now: 1_700_000_000 };
        match letters().encode_chat(template, &chat) {
            Ok(prompt) => assert!(prompt.ids.iter().all(|id| letters().id_to_token(*id).is_some())),
            Err(Error::Encode(problem)) => unreachable!("every text has letters: {problem}"),
            Err(_) => {}
        }
    }
}

/// The message as templates have it that look into a list of parts.
fn in_parts(message: &Value) -> Value {
    let mut message = message.clone();
    message["content"] = json!([{"type": "text", "text": message["content"]}]);
    message
}

/// A tokenizer of single bytes, with two control tokens.
pub(crate) fn letters() -> &'static Tokenizer {
    static LETTERS: OnceLock<Tokenizer> = OnceLock::new();
    LETTERS.get_or_init(|| {
        let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let others = (0..68).filter_map(|n| char::from_u32(0x100 + n));
        let letters = (0..=255u8).filter(printable).map(char::from).chain(others);
        let vocab: Map<String, Value> = letters.enumerate().map(|(id, letter)| (letter.into(), json!(id))).collect();
        let control = |id: u32, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        };
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
            "added_tokens": [control(256, "</s>"), control(257, "<|im_end|>")],
            "pre_tokenizer": bytes, "decoder": bytes,
            "model": {"type": "BPE", "vocab": vocab, "merges": []}
        });
        Tokenizer::from_json(file.to_string().as_bytes()).expect("the file is sound")
    })
}
