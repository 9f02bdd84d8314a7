//! Forms over the built-in model's own vocabulary, with tokens drawn from what the masks leave.

use rbee_tokenizer::{ChatTemplate, TokenizerConfig};

use super::*;

static TOKENIZER: &[u8] = include_bytes!("../../../../tinybee/model/tokenizer.json");
const VOCAB: usize = 1 << 14;

struct Model {
    tokenizer: Tokenizer,
    written: AnswerForm,
    forms: Forms,
    eos: TokenId,
}

/// A model whose template writes calls and reasoning in these tags.
fn model() -> Model {
    let tokenizer = Tokenizer::from_json(TOKENIZER).unwrap();
    let template = "{{ tools }}<tool_call></tool_call><think></think>";
    let config = json!({ "chat_template": template }).to_string();
    let config = TokenizerConfig::from_json(config.as_bytes()).unwrap();
    let template = ChatTemplate::load(&config, None).unwrap().unwrap();
    let written = AnswerForm::of(&template, &tokenizer);
    assert!(written.has_calls() && written.has_reasoning());
    let eos = tokenizer.control_ids()[0];
    Model { forms: Forms::new(VOCAB, vec![eos]), tokenizer, written, eos }
}

impl Model {
    fn form(&self, generation: Value, opening: Opening) -> Result<Option<AnswerIn>, ErrorBody> {
        let generation: Generation = serde_json::from_value(generation).unwrap();
        self.forms.of(&generation, &self.tokenizer, &self.written, opening)
    }

    fn constraint(&self, generation: Value) -> Box<dyn Constraint> {
        self.form(generation, Opening::Fresh(Begins::Fresh)).unwrap().unwrap().constraint()
    }

    /// Tokens drawn from what may come, as long as it can go on; then whether it was complete.
    fn draw(&self, constraint: &mut dyn Constraint, seed: u64, most: usize) -> (Vec<TokenId>, bool) {
        let mut state = seed;
        let mut tokens = Vec::new();
        while tokens.len() < most {
            constraint.prepare();
            let mask = constraint.mask().unwrap().unwrap();
            let allowed: Vec<TokenId> =
                (0..VOCAB as TokenId).filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1).collect();
            assert!(!allowed.is_empty());
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let id = allowed[(state >> 33) as usize % allowed.len()];
            if id == self.eos {
                return (tokens, true);
            }
            tokens.push(id);
            if constraint.accept(id).unwrap() {
                return (tokens, true);
            }
        }
        (tokens, false)
    }

    fn text(&self, tokens: &[TokenId]) -> String {
        self.tokenizer.decode(tokens, Controls::Hide)
    }
}

fn bee() -> Value {
    json!({ "type": "json_schema", "json_schema": { "schema": {
        "type": "object",
        "properties": { "name": { "type": "string", "maxLength": 8 }, "age": { "type": "integer", "minimum": 0, "maximum": 99 },
            "kind": { "enum": ["worker", "queen"] } },
        "required": ["name", "age", "kind"],
        "additionalProperties": false,
    } } })
}

fn is_bee(value: &Value) -> bool {
    value.as_object().is_some_and(|fields| fields.len() == 3)
        && value["name"].as_str().is_some_and(|name| name.chars().count() <= 8)
        && value["age"].as_u64().is_some_and(|age| age <= 99)
        && (value["kind"] == "worker" || value["kind"] == "queen")
}

fn tool(name: &str, parameters: Value) -> Value {
    json!({ "type": "function", "function": { "name": name, "parameters": parameters } })
}

#[test]
fn what_the_masks_leave_is_of_the_schema_whatever_is_drawn() {
    let model = model();
    for seed in 0..20 {
        let mut constraint = model.constraint(json!({ "response_format": bee() }));
        let (tokens, complete) = model.draw(constraint.as_mut(), seed, 400);
        let text = model.text(&tokens);
        assert!(complete, "{text}");
        assert!(is_bee(&serde_json::from_str(&text).unwrap()), "{text}");
        // Told the same tokens without being asked for masks, as a resumed answer is, it stands at the same place.
        let mut again = model.constraint(json!({ "response_format": bee() }));
        for id in &tokens[..tokens.len() / 2] {
            again.accept(*id).unwrap();
        }
        let mut first = model.constraint(json!({ "response_format": bee() }));
        for id in &tokens[..tokens.len() / 2] {
            first.prepare();
            first.mask().unwrap();
            first.accept(*id).unwrap();
        }
        assert_eq!(again.mask(), first.mask());
    }
}

#[test]
fn what_goes_on_from_a_prompt_is_held_to_its_form_from_its_first_token() {
    let model = model();
    let regex = json!({ "response_format": { "type": "regex", "regex": "[a-f]{3}-[0-9]{2}" } });
    for seed in 0..10 {
        let mut constraint = model.form(regex.clone(), Opening::Continues).unwrap().unwrap().constraint();
        let (tokens, complete) = model.draw(constraint.as_mut(), seed, 20);
        let mut text = String::new();
        let mut stream = model.tokenizer.detokenizer(Controls::Hide, Start::Continues);
        tokens.iter().for_each(|id| stream.push(*id, &mut text));
        assert!(complete && text.len() == 6 && text.as_bytes()[3] == b'-', "{text:?}");
    }
}

/// Of models whose words bring their spaces along, the first word of a text of its own comes without.
#[test]
fn where_a_text_goes_on_the_space_of_its_first_word_counts() {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    tokens.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(["\u{2581}", "a", "\u{2581}a"].map(str::to_owned));
    let id = |token: &str| tokens.iter().position(|one| one == token).unwrap();
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().zip(0..).map(|(token, id)| (token.clone(), json!(id))).collect();
    let added = (0..3).map(|id| {
        json!({ "id": id, "content": tokens[id], "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true })
    });
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "\u{2581}" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" }] },
        "pre_tokenizer": null, "post_processor": null,
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "\u{2581}" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 }] },
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
            "merges": ["\u{2581} a"] },
    });
    let tokenizer = Tokenizer::from_json(file.to_string().as_bytes()).unwrap();
    let model = Model { tokenizer, written: AnswerForm::default(), forms: Forms::new(VOCAB, vec![2]), eos: 2 };
    let asked = |regex: &str| json!({ "response_format": { "type": "regex", "regex": regex } });
    for (opening, regex, spaced, plain) in [
        (Opening::Fresh(Begins::Fresh), "a", true, true),
        (Opening::Continues, "a", false, true),
        (Opening::Continues, " a", true, false),
    ] {
        let mut constraint = model.form(asked(regex), opening).unwrap().unwrap().constraint();
        let mask = constraint.mask().unwrap().unwrap();
        let may = |token: &str| mask[id(token) / 32] >> (id(token) % 32) & 1 == 1;
        assert_eq!((may("\u{2581}a"), may("a")), (spaced, plain), "{opening:?} {regex:?}");
    }
}

/// Whatever is thought, and however the closing tag is cut into tokens: behind it stands the form and nothing else.
#[test]
fn reasoning_is_free_and_the_form_begins_behind_it() {
    let model = model();
    let form = || json!({ "response_format": bee() });
    let open = |begins| model.form(form(), Opening::Fresh(begins)).unwrap().unwrap().constraint();
    let encode = |text: &str| model.tokenizer.encode(text, rbee_tokenizer::Specials::AsText).unwrap();
    for seed in 0..10 {
        let mut constraint = open(Begins::Reasoning);
        let mut tokens = Vec::new();
        // A random thought, its end in pieces, and what comes then.
        let (thought, complete) = model.draw(constraint.as_mut(), seed, 10);
        assert!(!complete, "the end does not come in the middle of a thought");
        tokens.extend(thought);
        for id in encode(" so </think") {
            assert_eq!(constraint.accept(id), Ok(false));
            tokens.push(id);
        }
        // From here on the tag may be closed at once, but no token may close it and go on.
        for id in encode(">") {
            let mask = constraint.mask().unwrap().unwrap();
            assert_eq!(mask[id as usize / 32] >> (id % 32) & 1, 1);
            assert_eq!(constraint.accept(id), Ok(false));
            tokens.push(id);
        }
        let (answer, complete) = model.draw(constraint.as_mut(), seed, 400);
        let text = model.text(&answer);
        assert!(complete && is_bee(&serde_json::from_str(&text).unwrap()), "{text}");
    }
    // Where reasoning is not begun the form holds from the first token on.
    let (answer, complete) = model.draw(open(Begins::Fresh).as_mut(), 3, 400);
    assert!(complete && is_bee(&serde_json::from_str(&model.text(&answer)).unwrap()));
}

#[test]
fn a_token_that_ends_the_reasoning_and_begins_the_answer_does_not_come() {
    let model = model();
    let bytes = |id: TokenId| model.tokenizer.token_bytes(id).to_vec();
    let all = 0..model.tokenizer.vocab_size() as TokenId;
    let is_letters = |id: &TokenId| bytes(*id).len() > 1 && bytes(*id).iter().all(u8::is_ascii_lowercase);
    let tail = all.clone().find(is_letters).unwrap();
    let tail_text = String::from_utf8(bytes(tail)).unwrap();
    // A closing tag whose last letter is the token's first.
    let close: &'static str = Box::leak(format!("<end{}", &tail_text[..1]).into_boxed_str());
    let tags = rbee_tokenizer::ReasoningTags { open: "<think>", close };
    let marks = Arc::new(Marks::new(tags, &model.tokenizer, VOCAB, &[model.eos]));
    let detokenizer = model.tokenizer.detokenizer(Controls::Hide, Start::Continues);
    let mut reasoning = Reasoning::new(marks, Begins::Reasoning, detokenizer);
    let may = |reasoning: &mut Reasoning, id: TokenId| reasoning.mask(None)[id as usize / 32] >> (id % 32) & 1 == 1;
    assert!(may(&mut reasoning, tail), "it may as long as it closes nothing");
    assert!(!may(&mut reasoning, model.eos));
    for id in model.tokenizer.encode("x <end", rbee_tokenizer::Specials::AsText).unwrap() {
        assert_eq!(reasoning.take(id), Ok(Whose::Reasoning));
    }
    assert!(!may(&mut reasoning, tail));
    assert!(reasoning.take(tail).is_err());
}

#[test]
fn calls_that_must_come_are_of_the_tools() {
    let model = model();
    let days = json!({ "type": "object", "properties": { "days": { "type": "integer", "minimum": 1, "maximum": 7 } },
        "required": ["days"], "additionalProperties": false });
    let tools = json!([tool("weather", days), tool("time", json!({}))]);
    let one = json!({ "tools": tools, "tool_choice": "required", "parallel_tool_calls": false });
    let any = json!({ "tools": tools, "tool_choice": "required" });
    let named = json!({ "tools": tools, "tool_choice": { "type": "function", "function": { "name": "weather" } } });
    let given: Arc<[Value]> = tools.as_array().unwrap().as_slice().into();
    let mut several = 0;
    for (asked, only) in [(&any, None), (&one, None), (&named, Some("weather"))] {
        for seed in 0..10 {
            let (tokens, complete) = model.draw(model.constraint(asked.clone()).as_mut(), seed, 2000);
            let text = model.text(&tokens);
            assert!(complete, "{text}");
            let most = Most::Any;
            let mut reader = rbee_tokenizer::AnswerReader::new(&model.written, Begins::Fresh, Arc::clone(&given), most);
            let mut piece = reader.push(&text);
            piece.append(reader.finish());
            assert!(reader.called() && piece.text.trim().is_empty(), "{text}");
            let names: Vec<&str> = piece.calls.iter().filter_map(|part| part.name.as_deref()).collect();
            assert!(names.iter().all(|name| only.is_none_or(|only| only == *name)), "{names:?}");
            // Of the same tools.
            assert!(asked.get("parallel_tool_calls").is_none() || names.len() == 1, "{names:?}");
            several += usize::from(names.len() > 1);
        }
    }
    assert!(several > 0);
}

/// As the model likes: an answer of the form, or calls.
#[test]
fn beside_tools_a_form_leaves_the_choice() {
    let model = model();
    let time = tool("time", json!({ "type": "object", "properties": {}, "additionalProperties": false }));
    let asked = json!({ "tools": [time], "response_format": bee() });
    let written: Vec<String> = (0..30)
        .map(|seed| {
            let (tokens, complete) = model.draw(model.constraint(asked.clone()).as_mut(), seed, 2000);
            assert!(complete);
            model.text(&tokens)
        })
        .collect();
    let (calls, texts): (Vec<_>, Vec<_>) = written.iter().partition(|text| text.starts_with("<tool_call>"));
    assert!(!calls.is_empty() && !texts.is_empty(), "{written:#?}");
    assert!(texts.iter().all(|text| is_bee(&serde_json::from_str(text).unwrap())), "{texts:#?}");
    assert!(calls.iter().all(|text| text.contains("</tool_call>") && text.contains("time")), "{calls:#?}");
}

fn violation(error: &ErrorBody) -> (String, String) {
    let found = error.details.clone().unwrap()["violations"].clone();
    let found: Vec<Violation> = serde_json::from_value(found).unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    (found[0].field.clone(), found[0].problem.clone())
}

#[test]
fn what_cannot_be_adhered_to_is_one_violation() {
    let model = model();
    let schema = |schema: Value| json!({ "type": "json_schema", "json_schema": { "schema": schema } });
    for format in [
        schema(json!({ "type": "thing" })),
        schema(json!({ "$ref": "#/none" })),
        json!({ "type": "regex", "regex": "(" }),
        json!({ "type": "grammar", "grammar": "start: nothing_of_this_name" }),
    ] {
        let asked = json!({ "response_format": format });
        let refused = model.form(asked, Opening::Fresh(Begins::Fresh)).map(|_| ()).unwrap_err();
        let (field, problem) = violation(&refused);
        assert_eq!(field, "response_format");
        assert!(problem.starts_with("cannot be adhered to: "), "{problem}");
    }
    let tools = json!([
        tool("good", json!({})),
        tool("bad", json!({ "type": "object", "properties": { "a": { "type": "thing" } } }))
    ]);
    let asked = json!({ "tools": tools, "tool_choice": "required" });
    let (field, problem) = violation(&model.form(asked, Opening::Fresh(Begins::Fresh)).map(|_| ()).unwrap_err());
    assert!(field == "tools" && problem.contains("`bad`"), "{field} {problem}");
    let asked = json!({ "tools": tools, "tool_choice": "auto" });
    assert!(model.form(asked, Opening::Fresh(Begins::Fresh)).unwrap().is_none(), "nothing is asked of it");
}

/// W8: many tools with large schemas work, or the one that does not is named.
#[test]
fn sixty_tools_of_a_hundred_kilobytes_work_or_one_is_named() {
    let model = model();
    let large = |i: usize| {
        let property = |p: usize| {
            (format!("field_{p}"), json!({ "type": "string", "maxLength": 524_288, "description": "x".repeat(100) }))
        };
        let properties: serde_json::Map<String, Value> = (0..10).map(property).collect();
        tool(
            &format!("tool_{i}"),
            if i.is_multiple_of(10) {
                json!({ "type": "object", "properties": {} })
            } else {
                json!({ "type": "object", "properties": properties, "required": ["field_0"] })
            },
        )
    };
    let tools: Vec<Value> = (0..60).map(large).collect();
    assert!(json!(tools).to_string().len() > 80_000);
    let began = std::time::Instant::now();
    let form = model.form(json!({ "tools": tools, "tool_choice": "required" }), Opening::Fresh(Begins::Fresh));
    match form {
        Ok(form) => {
            let (tokens, _) = model.draw(form.unwrap().constraint().as_mut(), 1, 200);
            assert!(model.text(&tokens).starts_with("<tool_call>"));
        }
        Err(error) => {
            let (field, problem) = violation(&error);
            assert!(field == "tools" && problem.contains("`tool_"), "{field} {problem}");
        }
    }
    assert!(began.elapsed() < std::time::Duration::from_secs(60), "{:?}", began.elapsed());
    // One of them, without any properties, is possible in any case.
    let named = json!({ "type": "function", "function": { "name": "tool_10" } });
    let asked = json!({ "tools": tools, "tool_choice": named });
    let (tokens, _) = model.draw(model.constraint(asked).as_mut(), 1, 200);
    let text = model.text(&tokens);
    assert!(text.starts_with("<tool_call>") && text.contains("tool_10"), "{text}");
}

#[test]
fn a_grammar_that_was_compiled_is_kept_with_its_size() {
    let model = model();
    let form = text_form(&serde_json::from_value(bee()).unwrap()).unwrap();
    let kept = || model.forms.cache.lock().unwrap().get(&key(&form)).map(|grammar| grammar.bytes());
    assert_eq!(kept(), None);
    model.constraint(json!({ "response_format": bee() }));
    assert!(kept().is_some_and(|bytes| bytes > 1000 && bytes < CACHE_BYTES), "{:?}", kept());
}
