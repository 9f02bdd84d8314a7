//! An answer taken apart while it comes: the model's reasoning, the text, and the tool calls.
//!
//! How a family writes them stands in its chat template and its vocabulary ([`AnswerForm`]). What may still become a tag is held back;
//! what looked like a call and was none is text. Nothing of an answer is lost but the tags themselves and white space beside them.

mod call;
mod xml;

use std::sync::Arc;

use serde_json::Value;

use crate::{ChatTemplate, TokenId, Tokenizer};
use call::{CallObject, Keys, Progress, Shown};
use xml::CallTags;

/// Tags around a model's reasoning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReasoningTags {
    /// Before it.
    pub open: &'static str,
    /// Behind it.
    pub close: &'static str,
}

const REASONING: [ReasoningTags; 2] =
    [ReasoningTags { open: "<think>", close: "</think>" }, ReasoningTags { open: "[THINK]", close: "[/THINK]" }];

/// How calls are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Calls {
    /// What stands before a call, or before a list of calls.
    open: &'static str,
    /// What stands behind, if anything does.
    close: Option<&'static str>,
    /// Whether an answer that is an object with the keys of a call is one, without anything before it.
    bare: bool,
    /// Control tokens inside of calls.
    inner: &'static [&'static str],
}

const CALLS: [Calls; 4] = [
    // Hermes, Qwen, SmolLM3, Granite 4; with tags for arguments, Qwen3-Coder.
    Calls { open: "<tool_call>", close: Some("</tool_call>"), bare: false, inner: &[] },
    // Mistral: a list of objects, or a name and its arguments.
    Calls { open: "[TOOL_CALLS]", close: None, bare: false, inner: &["[ARGS]", "[CALL_ID]"] },
    // Phi-4-mini, Granite 3: a list of objects.
    Calls { open: "<|tool_call|>", close: Some("<|/tool_call|>"), bare: false, inner: &[] },
    // Llama 3: an object, most often without anything before it.
    Calls { open: "<|python_tag|>", close: None, bare: true, inner: &[] },
];

/// Longest name of a function, with what may stand between it and its arguments.
const MAX_NAME: usize = 512;

/// How a call is written, where a reader takes more than one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// An object with its name and, under this key, its arguments.
    Object { arguments: &'static str },
    /// A list of such objects.
    List,
    /// Its name, this tag, and its arguments.
    Named { arguments: &'static str },
    /// Tags around its name and each of its arguments.
    Tags,
}

/// What a model writes around calls, and how it writes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) open: Option<&'static str>,
    pub(crate) close: Option<&'static str>,
    pub(crate) style: Style,
}

impl Written {
    /// How calls are written by a model in which these tags are.
    fn of(calls: Calls, has: impl Fn(&str) -> bool) -> Written {
        let style = match calls {
            Calls { bare: true, .. } => Style::Object { arguments: "parameters" },
            Calls { inner: [arguments, ..], .. } if has(arguments) => Style::Named { arguments },
            Calls { open: "<tool_call>", .. } if has("<function=") => Style::Tags,
            Calls { open: "<tool_call>", .. } => Style::Object { arguments: "arguments" },
            _ => Style::List,
        };
        let open = Some(calls.open).filter(|_| !calls.bare);
        // Behind a list, the end of the answer may do.
        let close = calls.close.filter(|close| style != Style::List || has(close));
        Written { open, close, style }
    }
}

/// How a model writes reasoning and tool calls.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AnswerForm {
    reasoning: Option<ReasoningTags>,
    calls: Option<Calls>,
    written: Option<Written>,
    /// Tags that are control tokens, and are needed as text.
    shown: Vec<TokenId>,
}

impl AnswerForm {
    /// The form of a model's answers: what its template names, or else what its vocabulary has a token for.
    pub fn of(template: &ChatTemplate, tokenizer: &Tokenizer) -> AnswerForm {
        let in_template = |tag: &str| template.sources().any(|source| source.contains(tag));
        let in_vocabulary = |tag: &str| tokenizer.token_to_id(tag).is_some();
        let reasoning = reasoning(template);
        let calls = CALLS.into_iter().find(|calls| in_template(calls.open));
        let calls = calls.or_else(|| CALLS.into_iter().find(|calls| in_vocabulary(calls.open)));
        let tags = reasoning.iter().flat_map(|tags| [tags.open, tags.close]);
        let inner = calls
            .iter()
            .flat_map(|calls| [calls.open].into_iter().chain(calls.close).chain(calls.inner.iter().copied()));
        let shown = tags.chain(inner).filter_map(|tag| tokenizer.token_to_id(tag));
        let written = calls.map(|calls| Written::of(calls, |tag| in_template(tag) || in_vocabulary(tag)));
        AnswerForm { reasoning, calls, written, shown: shown.filter(|&id| tokenizer.is_control(id)).collect() }
    }

    /// Whether tool calls of this model can be read.
    pub fn has_calls(&self) -> bool {
        self.calls.is_some()
    }

    /// Whether the model's reasoning is told from its answer.
    pub fn has_reasoning(&self) -> bool {
        self.reasoning.is_some()
    }

    /// How the model writes calls.
    pub(crate) fn written(&self) -> Option<Written> {
        self.written
    }

    /// What stands around the model's reasoning, where it is told from its answer.
    pub fn reasoning_tags(&self) -> Option<ReasoningTags> {
        self.reasoning
    }

    /// Control tokens that a reader of this form needs as text.
    pub fn shown(&self) -> &[TokenId] {
        &self.shown
    }
}

fn reasoning(template: &ChatTemplate) -> Option<ReasoningTags> {
    REASONING.into_iter().find(|tags| template.sources().any(|source| source.contains(tags.close)))
}

/// Where an answer begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begins {
    /// With whatever the model writes first.
    Fresh,
    /// In its reasoning: the prompt ends with the opening tag.
    Reasoning,
}

impl Begins {
    /// Where the answer to a rendered prompt begins.
    pub(crate) fn behind(template: &ChatTemplate, prompt: &str) -> Begins {
        match reasoning(template) {
            Some(tags) if prompt.trim_end().ends_with(tags.open) => Begins::Reasoning,
            _ => Begins::Fresh,
        }
    }
}

/// How many calls an answer may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Most {
    /// One: the answer ends with it.
    One,
    /// Any number.
    Any,
}

/// A part of a tool call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CallPart {
    /// The call's number in its answer, from 0.
    pub index: u32,
    /// The function's name; in the call's first part, and only there.
    pub name: Option<String>,
    /// More of its arguments, which are JSON when they are whole.
    pub arguments: String,
}

/// What some text of an answer turned out to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Text for the reader.
    pub text: String,
    /// The model's reasoning.
    pub reasoning: String,
    /// Parts of tool calls.
    pub calls: Vec<CallPart>,
}

impl Piece {
    /// A piece of nothing but text.
    pub fn text(text: String) -> Piece {
        Piece { text, ..Piece::default() }
    }

    /// Puts what came next behind it.
    pub fn append(&mut self, next: Piece) {
        self.text.push_str(&next.text);
        self.reasoning.push_str(&next.reasoning);
        next.calls.into_iter().for_each(|part| self.call(part));
    }

    fn call(&mut self, part: CallPart) {
        match self.calls.last_mut() {
            Some(last) if last.index == part.index && part.name.is_none() => last.arguments.push_str(&part.arguments),
            _ => self.calls.push(part),
        }
    }
}

#[derive(Clone, Debug)]
enum State {
    /// Nothing but white space yet: reasoning or a bare call may begin.
    Before,
    /// In the reasoning; whether any of it was given out.
    Reasoning {
        begun: bool,
    },
    /// Between the reasoning and the answer.
    Behind,
    Text,
    /// In what an opening tag or a bare object began.
    Calls(Box<Item>),
}

/// A call, or a list of them.
#[derive(Clone, Debug)]
struct Item {
    /// What was read since the last thing given out: text, should it be no call.
    raw: String,
    form: Calls,
    /// Whether a `[` is open.
    list: bool,
    part: Part,
}

#[derive(Clone, Debug)]
enum Part {
    /// Before a call.
    Open,
    /// In a name that stands before its arguments.
    Name(String),
    Object(CallObject),
    Tags(CallTags),
    /// Behind a call.
    Behind,
}

/// Reads one answer. Cloning it, or pushing the same text again, rebuilds the same state.
#[derive(Clone, Debug)]
pub struct AnswerReader {
    reasoning: Option<ReasoningTags>,
    calls: Option<Calls>,
    tools: Arc<[Value]>,
    most: Most,
    state: State,
    held: String,
    /// Calls whose name was given out.
    named: u32,
    /// Whether the one call that may be there is whole.
    over: bool,
}

impl AnswerReader {
    /// A reader of answers in this form. Calls are read only where there are tools.
    pub fn new(form: &AnswerForm, begins: Begins, tools: Arc<[Value]>, most: Most) -> AnswerReader {
        let state = match begins {
            Begins::Fresh => State::Before,
            Begins::Reasoning => State::Reasoning { begun: false },
        };
        AnswerReader {
            reasoning: form.reasoning,
            calls: form.calls.filter(|_| !tools.is_empty()),
            tools,
            most,
            state,
            held: String::new(),
            named: 0,
            over: false,
        }
    }

    /// Takes more text of the answer and gives what it made certain.
    pub fn push(&mut self, text: &str) -> Piece {
        let mut piece = Piece::default();
        if !self.over {
            self.held.push_str(text);
            while !self.over && self.step(&mut piece) {}
        }
        piece
    }

    /// Ends the answer and gives what was held back.
    pub fn finish(&mut self) -> Piece {
        let mut piece = Piece::default();
        let held = std::mem::take(&mut self.held);
        if self.over {
            return piece;
        }
        match &mut self.state {
            State::Reasoning { .. } => piece.reasoning = held,
            State::Text if self.named > 0 && held.trim().is_empty() => {}
            State::Before | State::Behind | State::Text => piece.text = held,
            // A call that is not whole is given as far as it came; what did not become one is text.
            State::Calls(item) => piece.text = std::mem::take(&mut item.raw),
        }
        piece
    }

    /// Whether the one call that the answer may have is whole: nothing after it is read.
    pub fn over(&self) -> bool {
        self.over
    }

    /// Whether the answer has a call.
    pub fn called(&self) -> bool {
        self.named > 0
    }

    /// Does what can be done with the held text; false when more is needed.
    fn step(&mut self, piece: &mut Piece) -> bool {
        match &mut self.state {
            State::Before => {
                let text = self.held.trim_start();
                match self.reasoning {
                    _ if text.is_empty() => return false,
                    Some(tags) if text.starts_with(tags.open) => {
                        let taken = self.held.len() - text.len() + tags.open.len();
                        self.held.drain(..taken);
                        self.state = State::Reasoning { begun: false };
                    }
                    Some(tags) if tags.open.starts_with(text) => return false,
                    _ => self.state = self.answer(),
                }
                true
            }
            State::Behind => {
                let blank = self.held.len() - self.held.trim_start().len();
                self.held.drain(..blank);
                if self.held.is_empty() {
                    return false;
                }
                self.state = self.answer();
                true
            }
            State::Reasoning { begun } => {
                let Some(tags) = self.reasoning else {
                    self.state = State::Text;
                    return true;
                };
                if !*begun {
                    let blank = self.held.len() - self.held.trim_start().len();
                    self.held.drain(..blank);
                    *begun = !self.held.is_empty() && !tags.close.starts_with(self.held.as_str());
                }
                match self.held.find(tags.close) {
                    Some(at) => {
                        piece.reasoning.push_str(self.held[..at].trim_end());
                        self.held.drain(..at + tags.close.len());
                        self.state = State::Behind;
                        true
                    }
                    None => {
                        let certain = certain(&self.held, tags.close);
                        piece.reasoning.extend(self.held.drain(..certain));
                        false
                    }
                }
            }
            State::Text => {
                let Some(form) = self.calls else {
                    piece.text.push_str(&std::mem::take(&mut self.held));
                    return false;
                };
                match self.held.find(form.open) {
                    Some(at) => {
                        let end = self.held[..at].trim_end().len();
                        piece.text.extend(self.held.drain(..end));
                        let raw = self.held.drain(..at - end + form.open.len()).collect();
                        let item = Item { raw, form, list: false, part: Part::Open };
                        self.state = State::Calls(Box::new(item));
                        true
                    }
                    None => {
                        let certain = certain(&self.held, form.open);
                        piece.text.extend(self.held.drain(..certain));
                        false
                    }
                }
            }
            State::Calls(_) => self.calls(piece),
        }
    }

    /// What the answer begins as, its first character being known.
    fn answer(&self) -> State {
        match self.calls {
            Some(form) if form.bare && self.held.trim_start().starts_with('{') => {
                State::Calls(Box::new(Item { raw: String::new(), form, list: false, part: Part::Open }))
            }
            _ => State::Text,
        }
    }

    /// Goes through the held text inside of calls.
    fn calls(&mut self, piece: &mut Piece) -> bool {
        let State::Calls(item) = &mut self.state else { return true };
        let held = std::mem::take(&mut self.held);
        let mut rest = held.as_str();
        while let Some(c) = rest.chars().next() {
            let after = &rest[c.len_utf8()..];
            let mut shown = Shown::default();
            let progress = match &mut item.part {
                Part::Open | Part::Behind if c.is_ascii_whitespace() => {
                    item.raw.push(c);
                    Progress::More
                }
                Part::Open => {
                    item.raw.push(c);
                    // Something was before it that answers in JSON have not.
                    let keys = if item.form.bare { Keys::Known } else { Keys::Any };
                    match c {
                        '[' if !item.list => item.list = true,
                        '{' => item.part = Part::Object(CallObject::opened(keys)),
                        '<' if item.form.close.is_some() => {
                            let mut tags = CallTags::default();
                            tags.push(c, &self.tools, &mut shown);
                            item.part = Part::Tags(tags);
                        }
                        c if !item.form.inner.is_empty() && (c.is_ascii_alphanumeric() || c == '_') => {
                            item.part = Part::Name(c.to_string());
                        }
                        _ => return self.no_call(after, piece),
                    }
                    Progress::More
                }
                Part::Name(name) if c == '{' => {
                    let end = name.find('[').unwrap_or(name.len());
                    shown.name = Some(name[..end].trim().to_owned());
                    let mut object = CallObject::arguments();
                    let progress = object.push(c, &mut shown);
                    item.part = Part::Object(object);
                    progress
                }
                Part::Name(name) => {
                    item.raw.push(c);
                    name.push(c);
                    if name.len() > MAX_NAME { Progress::Bad } else { Progress::More }
                }
                Part::Object(object) => {
                    item.raw.push(c);
                    object.push(c, &mut shown)
                }
                Part::Tags(tags) => {
                    item.raw.push(c);
                    tags.push(c, &self.tools, &mut shown)
                }
                Part::Behind => match (c, item.form.close) {
                    (',' | ';', _) => {
                        item.raw.push(c);
                        item.part = Part::Open;
                        Progress::More
                    }
                    (']', _) if item.list => {
                        item.list = false;
                        Progress::More
                    }
                    (_, Some(close)) if rest.starts_with(close) => {
                        self.held = rest[close.len()..].into();
                        self.state = State::Text;
                        return true;
                    }
                    (_, Some(close)) if close.starts_with(rest) => {
                        self.held = rest.into();
                        return false;
                    }
                    _ => {
                        // With the white space between.
                        self.held = std::mem::take(&mut item.raw) + rest;
                        self.state = State::Text;
                        return true;
                    }
                },
            };
            rest = after;
            if let Some(name) = &shown.name {
                // Without a tag before it, an object is a call only where it calls what there is.
                if item.form.bare && !self.tools.iter().any(|tool| tool["function"]["name"] == name.as_str()) {
                    return self.no_call(rest, piece);
                }
                self.named += 1;
                item.raw.clear();
            }
            if shown.name.is_some() || !shown.arguments.is_empty() {
                item.raw.clear();
                piece.call(CallPart { index: self.named - 1, name: shown.name, arguments: shown.arguments });
            }
            match progress {
                Progress::More => {}
                Progress::Whole => {
                    item.part = Part::Behind;
                    item.raw.clear();
                    if self.most == Most::One {
                        self.over = true;
                        return false;
                    }
                }
                Progress::Bad => return self.no_call(rest, piece),
            }
        }
        false
    }

    /// What was read is text after all, and so is what follows, up to the next tag.
    fn no_call(&mut self, rest: &str, piece: &mut Piece) -> bool {
        if let State::Calls(item) = &self.state {
            piece.text.push_str(&item.raw);
        }
        self.held = rest.into();
        self.state = State::Text;
        true
    }
}

/// The bytes of `text` that are certain to stand before any `tag`: not white space at the end, which would go with the tag, and not
/// what may become the tag.
fn certain(text: &str, tag: &str) -> usize {
    let mut end = text.len();
    for length in (1..tag.len().min(text.len() + 1)).rev() {
        if tag.is_char_boundary(length) && text.ends_with(&tag[..length]) {
            end = text.len() - length;
            break;
        }
    }
    text[..end].trim_end().len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(open: &str) -> AnswerForm {
        let calls = CALLS.into_iter().find(|calls| calls.open == open);
        AnswerForm { reasoning: Some(REASONING[0]), calls, written: None, shown: Vec::new() }
    }

    fn tools() -> Arc<[Value]> {
        let tool = |name: &str| {
            serde_json::json!({"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {
                "city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["c", "f"]}}}}})
        };
        [tool("weather"), tool("time")].into()
    }

    /// An answer in one line: `R(…)` reasoning, `T(…)` text, `name(arguments)` a call.
    fn read_in(form: &AnswerForm, begins: Begins, most: Most, pieces: &[&str]) -> String {
        let mut reader = AnswerReader::new(form, begins, tools(), most);
        let mut all = Piece::default();
        let mut given: Vec<Piece> = pieces.iter().map(|piece| reader.push(piece)).collect();
        given.push(reader.finish());
        for piece in given {
            all.text.push_str(&piece.text);
            all.reasoning.push_str(&piece.reasoning);
            for part in piece.calls {
                match part.name {
                    Some(_) => {
                        assert_eq!(part.index as usize, all.calls.len(), "calls are numbered in order");
                        all.calls.push(part);
                    }
                    None => all.calls[part.index as usize].arguments.push_str(&part.arguments),
                }
            }
        }
        assert_eq!(reader.called(), !all.calls.is_empty());
        let mut out = Vec::new();
        if !all.reasoning.is_empty() {
            out.push(format!("R({})", all.reasoning));
        }
        if !all.text.is_empty() {
            out.push(format!("T({})", all.text));
        }
        out.extend(all.calls.iter().map(|call| format!("{}({})", call.name.as_deref().unwrap_or("?"), call.arguments)));
        out.join(" ")
    }

    /// Reads it whole, by characters, and in every two pieces: the same each time.
    fn check(open: &str, begins: Begins, most: Most, answer: &str, want: &str) {
        let form = form(open);
        let cuts = answer.char_indices().map(|(at, _)| at).chain([answer.len()]);
        for at in cuts {
            let (a, b) = answer.split_at(at);
            assert_eq!(read_in(&form, begins, most, &[a, b]), want, "{a:?} + {b:?}");
        }
        let letters: Vec<&str> = answer.split("").collect();
        assert_eq!(read_in(&form, begins, most, &letters), want);
    }

    #[test]
    fn reasoning_is_told_from_the_answer() {
        let fresh = |answer, want| check("<tool_call>", Begins::Fresh, Most::Any, answer, want);
        fresh("<think>\nAh.\n</think>\n\nYes.", "R(Ah.) T(Yes.)");
        fresh("  <think></think> Yes", "T(Yes)");
        fresh("<think>cut </thin", "R(cut </thin)");
        fresh("a <think> b </think> c", "T(a <think> b </think> c)");
        fresh("<thought>x", "T(<thought>x)");
        fresh("", "");
        fresh(" \n", "T( \n)");
        let opened = |answer, want| check("<tool_call>", Begins::Reasoning, Most::Any, answer, want);
        opened("Ah.</think>Yes</think>", "R(Ah.) T(Yes</think>)");
        opened("\n </think>\nYes", "T(Yes)");
    }

    #[test]
    fn tagged_calls_are_read_in_any_order_of_keys_and_beside_text() {
        let tagged = |answer, want| check("<tool_call>", Begins::Fresh, Most::Any, answer, want);
        tagged(
            "<think>x</think>\nLook:\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"a}\\\"é\"}}\n</tool_call>\n\
             <tool_call>{\"arguments\": {}, \"name\": \"time\"}</tool_call>\n",
            "R(x) T(Look:) weather({\"city\": \"a}\\\"é\"}) time({})",
        );
        tagged("<tool_call>{\"name\": \"time\"}</tool_call>", "time({})");
        tagged("<tool_call>{\"name\": \"time\", \"arguments\": null}</tool_call>", "time({})");
        tagged("<tool_call>{\"name\": \"time\", \"arguments\": \"{\\\"a\\\": 1}\"}</tool_call>", "time({\"a\": 1})");
        tagged(
            "<tool_call>{\"type\": \"function\", \"function\": {\"name\": \"time\", \"arguments\": {\"a\": [1, {}]}}}</tool_call>",
            "time({\"a\": [1, {}]})",
        );
        tagged("<tool_call>{\"name\": \"time\", \"parameters\": {\"t\": \"a\nb\"}}", "time({\"t\": \"a\\nb\"})");
        tagged("<tool_call>{\"name\": \"nobody\", \"arguments\": {}}</tool_call> done", "T( done) nobody({})");
    }

    #[test]
    fn what_is_no_call_stays_text_to_the_letter() {
        for answer in [
            "<tool_call>",
            "<tool_call> hm {\"name\": 1}",
            "a <tool_call>{\"x\": 1}</tool_call> b",
            "<tool_call>{\"name\": \"\"}",
            "<tool_call>{\"name\": \"cut",
            "< tool_call >",
            "1 < 2 and <tool",
        ] {
            check("<tool_call>", Begins::Fresh, Most::Any, answer, &format!("T({answer})"));
        }
        for answer in ["{\"a\": 1}", "{\"name\": \"Bee\", \"type\": \"insect\"}", "{", "{}", "{\"name\": 7}", "[1]"] {
            check("<|python_tag|>", Begins::Fresh, Most::Any, answer, &format!("T({answer})"));
        }
    }

    #[test]
    fn a_call_that_was_cut_off_is_given_as_far_as_it_came() {
        check(
            "<tool_call>",
            Begins::Fresh,
            Most::Any,
            "<tool_call>{\"name\": \"time\", \"arguments\": {\"a\": \"b",
            "time({\"a\": \"b)",
        );
    }

    #[test]
    fn lists_names_and_bare_objects_are_calls_of_other_families() {
        let list =
            "[{\"name\": \"weather\", \"arguments\": {\"city\": \"a\"}}, {\"name\": \"time\", \"arguments\": {}}]";
        let two = "weather({\"city\": \"a\"}) time({})";
        check("[TOOL_CALLS]", Begins::Fresh, Most::Any, &format!("[TOOL_CALLS] {list}"), two);
        check("<|tool_call|>", Begins::Fresh, Most::Any, &format!("<|tool_call|>{list}<|/tool_call|>"), two);
        check(
            "<|tool_call|>",
            Begins::Fresh,
            Most::Any,
            &format!("Hm. <|tool_call|>{list} ok"),
            &format!("T(Hm. ok) {two}"),
        );
        check(
            "[TOOL_CALLS]",
            Begins::Fresh,
            Most::Any,
            "[TOOL_CALLS]weather[CALL_ID]x1[ARGS]{\"city\": \"a\"}[TOOL_CALLS]time{}",
            two,
        );
        check(
            "<|python_tag|>",
            Begins::Fresh,
            Most::Any,
            "{\"name\": \"weather\", \"parameters\": {\"city\": \"a\"}}; {\"name\": \"time\", \"parameters\": {}}",
            two,
        );
        check(
            "<|python_tag|>",
            Begins::Fresh,
            Most::Any,
            "<|python_tag|>{\"type\": \"function\", \"function\": \"time\"}",
            "time({})",
        );
    }

    #[test]
    fn arguments_in_tags_get_the_types_of_the_schema() {
        check(
            "<tool_call>",
            Begins::Fresh,
            Most::Any,
            "<tool_call>\n<function=weather>\n<parameter=city>\n12\n</parameter>\n<parameter=days>\n3\n</parameter>\n\
             <parameter=unit>1</parameter>\n<parameter=other>\n{\"a\": [true]}\n</parameter>\n</function>\n</tool_call>",
            "weather({\"city\": \"12\", \"days\": 3, \"unit\": \"1\", \"other\": {\"a\":[true]}})",
        );
        check("<tool_call>", Begins::Fresh, Most::Any, "<tool_call><function=time></function></tool_call>", "time({})");
        check(
            "<tool_call>",
            Begins::Fresh,
            Most::Any,
            "<tool_call><fun></tool_call>",
            "T(<tool_call><fun></tool_call>)",
        );
    }

    #[test]
    fn where_one_call_is_the_most_the_answer_ends_with_it() {
        let two = "<tool_call>{\"name\": \"time\"}</tool_call><tool_call>{\"name\": \"weather\"}</tool_call>";
        check("<tool_call>", Begins::Fresh, Most::One, two, "time({})");
    }

    #[test]
    fn calls_are_text_where_there_are_no_tools() {
        let mut reader = AnswerReader::new(&form("<tool_call>"), Begins::Fresh, Arc::new([]), Most::Any);
        let answer = "<tool_call>{\"name\": \"time\"}</tool_call>";
        assert_eq!(reader.push(answer), Piece::text(answer.to_owned()));
    }

    #[test]
    fn arguments_come_while_they_are_written() {
        let mut reader = AnswerReader::new(&form("<tool_call>"), Begins::Fresh, tools(), Most::Any);
        reader.push("<tool_call>{\"name\": \"weather\", \"arguments\": ");
        let piece = reader.push("{\"city\": \"San");
        assert_eq!(piece.calls, [CallPart { index: 0, name: None, arguments: "{\"city\": \"San".into() }]);
    }
}
