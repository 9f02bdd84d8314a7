//! Chat templates: messages to prompt text.
//!
//! A template comes with a model and is hostile until it ended: it runs without a loader, on fuel, with
//! a cap on its output and its own size. The functions are those that transformers gives to templates,
//! so that the same template writes the same prompt.

mod limits;
mod strftime;
mod tojson;

use std::io::{self, Write};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value};
use serde_json::{Map, Value as Json};

use crate::{Error, TokenizerConfig};

/// Cap of one template's source.
pub const MAX_TEMPLATE_BYTES: usize = 512 << 10;
/// Cap of a prompt's text.
const MAX_OUTPUT_BYTES: usize = 16 << 20;
/// Fuel for a template without messages: one unit is one instruction or 64 bytes. Ends a bomb in well
/// under 100 ms.
const FUEL: u64 = 100_000;
/// More fuel for each message and for each byte of what is rendered.
const FUEL_PER_MESSAGE: u64 = 400;
const BYTES_PER_FUEL: u64 = 2;
/// Nesting of macros and blocks; far below what a small thread stack takes.
const MAX_RECURSION: usize = 64;
/// Variables that the settings of a request may not replace.
const RESERVED: [&str; 7] = [
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "raise_exception",
    "strftime_now",
    "range",
];

/// Whether the prompt ends with the opening of the assistant's turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GenerationPrompt {
    /// It does: the model is to answer.
    Add,
    /// It does not.
    Omit,
}

/// What a template is rendered with.
#[derive(Clone, Copy)]
pub struct Render<'r> {
    /// Objects with `role`, `content` and what else the template knows.
    pub messages: &'r [Json],
    /// Tool definitions; none leaves `tools` undefined-like (`none`).
    pub tools: &'r [Json],
    /// More variables, such as `enable_thinking`.
    pub settings: &'r Map<String, Json>,
    /// Whether to open the assistant's turn.
    pub generation_prompt: GenerationPrompt,
    /// Local time for `strftime_now`, in seconds since 1970.
    pub now: i64,
}

/// The compiled templates of one model.
pub struct ChatTemplate {
    environment: Environment<'static>,
    names: Vec<String>,
    sources: Vec<String>,
    special_texts: Vec<(String, String)>,
    content: ContentShape,
    tools: ToolsPlace,
}

/// Where a template takes the tools from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ToolsPlace {
    /// It knows none.
    Nowhere,
    /// A variable, which most call `tools`.
    Variable(&'static str),
    /// `tools` in the system message, as a text of JSON: Phi-4-mini.
    SystemMessage,
}

/// Names of variables that hold tools; the first is what transformers passes.
const TOOL_VARIABLES: [&str; 2] = ["tools", "xml_tools"];

/// What a template does with a message's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ContentShape {
    /// It writes a string.
    Text,
    /// It only looks into a list of parts.
    Parts,
}

impl ContentShape {
    /// A text in this shape.
    pub(crate) fn of(self, text: String) -> Json {
        match self {
            ContentShape::Text => Json::String(text),
            ContentShape::Parts => serde_json::json!([{"type": "text", "text": text}]),
        }
    }
}

impl ChatTemplate {
    /// Compiles the templates of a model: those of its `chat_template.jinja` file, if it has one, else
    /// those of its configuration. `None` if there are none.
    ///
    /// # Errors
    /// [`Error::TooLarge`] and [`Error::Template`].
    pub fn load(config: &TokenizerConfig, jinja_file: Option<&[u8]>) -> Result<Option<ChatTemplate>, Error> {
        let named = match jinja_file {
            Some(bytes) => {
                let source = std::str::from_utf8(bytes).map_err(|_| Error::Template("it is not UTF-8".to_owned()))?;
                vec![("default".to_owned(), source.to_owned())]
            }
            None => config.chat_templates.clone(),
        };
        if named.is_empty() {
            return Ok(None);
        }
        let mut environment = environment()?;
        let mut names = Vec::new();
        let mut sources = Vec::new();
        for (name, source) in named {
            if source.len() > MAX_TEMPLATE_BYTES {
                return Err(Error::TooLarge { what: "chat template", size: source.len(), limit: MAX_TEMPLATE_BYTES });
            }
            let plain = plain_source(&source);
            let limited = limits::weigh_operands(&plain, environment.syntax().clone()).map_err(failure)?;
            environment.add_template_owned(name.clone(), limited).map_err(failure)?;
            names.push(name);
            sources.push(source);
        }
        let mut template = ChatTemplate {
            environment,
            names,
            sources,
            special_texts: config.special_texts.clone(),
            content: ContentShape::Text,
            tools: ToolsPlace::Variable(TOOL_VARIABLES[0]),
        };
        template.content = template.probe();
        template.tools = template.probe_tools();
        Ok(Some(template))
    }

    /// Renders as it is, without guarding the users' texts:
    /// [`Tokenizer::encode_chat`](crate::Tokenizer::encode_chat) is the way to ids.
    ///
    /// # Errors
    /// [`Error::Template`], [`Error::TemplateRefused`], [`Error::InvalidChat`].
    pub fn render(&self, input: &Render<'_>) -> Result<String, Error> {
        let mut context: Vec<(String, Value)> = Vec::new();
        for (name, text) in &self.special_texts {
            context.push((name.clone(), Value::from(text.as_str())));
        }
        context.push(("documents".to_owned(), Value::from(())));
        for (name, value) in input.settings {
            if RESERVED.contains(&name.as_str()) {
                return Err(Error::InvalidChat(format!("`{name}` is not a template setting")));
            }
            context.push((name.clone(), Value::from(Serde(value))));
        }
        let tools = match input.tools {
            [] => Value::from(()),
            tools => Value::from(Serde(tools)),
        };
        if let ToolsPlace::Variable(name) = self.tools
            && name != TOOL_VARIABLES[0]
            && !input.tools.is_empty()
        {
            context.push((name.to_owned(), tools.clone()));
        }
        let now = input.now;
        let add = input.generation_prompt == GenerationPrompt::Add;
        context.extend([
            ("messages".to_owned(), Value::from(Serde(input.messages))),
            ("tools".to_owned(), tools),
            ("add_generation_prompt".to_owned(), Value::from(add)),
            (
                "strftime_now".to_owned(),
                Value::from_function(move |format: String| {
                    strftime::strftime(&format, now).ok_or_else(|| {
                        minijinja::Error::new(ErrorKind::InvalidOperation, "strftime_now: unknown format")
                    })
                }),
            ),
        ]);

        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel(input)));
        let template = environment.get_template(self.pick(input)).map_err(failure)?;
        let mut output = Bounded(Vec::new());
        template.render_captured_to(Value::from_pairs(context), &mut output).map_err(failure)?;
        String::from_utf8(output.0).map_err(|_| Error::Template("it wrote broken text".to_owned()))
    }

    /// The source texts, for the choice of a sentinel.
    pub(crate) fn sources(&self) -> impl Iterator<Item = &str> {
        self.sources.iter().map(String::as_str)
    }

    /// Whether tools given to it reach the prompt.
    pub fn takes_tools(&self) -> bool {
        self.tools != ToolsPlace::Nowhere
    }

    /// Where it takes the tools from.
    pub(crate) fn tools(&self) -> ToolsPlace {
        self.tools
    }

    /// Whether it writes the calls of earlier messages.
    pub(crate) fn writes_calls(&self) -> bool {
        self.sources.iter().any(|source| source.contains("tool_calls"))
    }

    /// What the template does with a message's content.
    pub(crate) fn content(&self) -> ContentShape {
        self.content
    }

    /// A model with several templates has one for tools.
    fn pick(&self, input: &Render<'_>) -> &str {
        let wanted = match input.tools {
            [] => "default",
            _ => "tool_use",
        };
        let found = |name: &str| self.names.iter().find(|n| n.as_str() == name);
        found(wanted).or_else(|| found("default")).unwrap_or(&self.names[0])
    }

    /// Asks the template itself: does a string arrive in the prompt, or only a list of parts?
    fn probe(&self) -> ContentShape {
        const MARK: &str = "rbee-probe";
        let text = Json::String(MARK.to_owned());
        let parts = serde_json::json!([{"type": "text", "text": MARK}]);
        let arrives =
            |content: &Json| self.writes(MARK, &[serde_json::json!({"role": "user", "content": content})], &[]);
        match !arrives(&text) && arrives(&parts) {
            true => ContentShape::Parts,
            false => ContentShape::Text,
        }
    }

    /// Asks the template itself: from where do tools arrive in the prompt?
    fn probe_tools(&mut self) -> ToolsPlace {
        const MARK: &str = "rbee_probe";
        let parameters = serde_json::json!({"type": "object", "properties": {}});
        let function = serde_json::json!({"name": MARK, "description": "Probes.", "parameters": parameters});
        let tool = serde_json::json!({"type": "function", "function": function});
        let user = serde_json::json!({"role": "user", "content": self.content.of("a".to_owned())});
        let system = serde_json::json!({"role": "system", "content": self.content.of("b".to_owned()), "tools": MARK});
        for name in TOOL_VARIABLES {
            self.tools = ToolsPlace::Variable(name);
            if self.writes(MARK, std::slice::from_ref(&user), std::slice::from_ref(&tool)) {
                return self.tools;
            }
        }
        match self.writes(MARK, &[system, user], &[]) {
            true => ToolsPlace::SystemMessage,
            false => ToolsPlace::Nowhere,
        }
    }

    /// Whether a mark comes through.
    fn writes(&self, mark: &str, messages: &[Json], tools: &[Json]) -> bool {
        let generation_prompt = GenerationPrompt::Add;
        self.render(&Render { messages, tools, settings: &Map::new(), generation_prompt, now: 0 })
            .is_ok_and(|prompt| prompt.contains(mark))
    }
}

/// The environment that transformers gives to templates.
fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(failure)?;
    environment.set_syntax(syntax);
    // Debug output would put variables, that is prompts, into error messages.
    environment.set_debug(false);
    environment.set_recursion_limit(MAX_RECURSION);
    limits::install(&mut environment);
    // Python's None is no iterable; templates ask before they take its length.
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_filter("tojson", tojson::tojson);
    environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        let error = minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception");
        Err(error.with_source(Refused(message)))
    });
    Ok(environment)
}

fn fuel(input: &Render<'_>) -> u64 {
    let bytes: usize = input.messages.iter().chain(input.tools).map(json_bytes).sum();
    FUEL + input.messages.len() as u64 * FUEL_PER_MESSAGE + bytes as u64 / BYTES_PER_FUEL
}

/// About the bytes of a value as JSON.
fn json_bytes(value: &Json) -> usize {
    match value {
        Json::String(text) => text.len(),
        Json::Array(items) => items.iter().map(json_bytes).sum::<usize>() + 2 * items.len(),
        Json::Object(map) => map.iter().map(|(k, v)| k.len() + json_bytes(v) + 4).sum(),
        _ => 4,
    }
}

/// What `raise_exception` was called with.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refused(String);

fn failure(error: minijinja::Error) -> Error {
    let mut source = std::error::Error::source(&error);
    while let Some(inner) = source {
        if let Some(Refused(message)) = inner.downcast_ref() {
            return Error::TemplateRefused(message.clone());
        }
        source = inner.source();
    }
    Error::Template(error.to_string())
}

/// A buffer that refuses to grow beyond the cap.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(io::Error::other("the prompt is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Gives the source line ends as Jinja reads them, and writes `{% generation %}` blocks, which mark text
/// for training, as blocks that do nothing.
fn plain_source(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(open) = rest.find("{%") {
        let (before, tag) = rest.split_at(open);
        out.push_str(before);
        // Not the `%` that opens it.
        let Some(close) = tag[2..].find("%}") else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(2 + close + 2);
        let inner = tag[2..tag.len() - 2].trim_matches(['-', '+']);
        match inner.trim() {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}
