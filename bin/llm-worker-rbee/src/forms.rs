//! Answers that must have a form: what a request asks for becomes a grammar, and the grammar the constraint of each of its choices.
//!
//! Grammars that were used lately are kept, up to [`CACHE_BYTES`]. Masks are made while the model computes ([`ahead`]). Where a model
//! reasons, the form holds for what comes behind ([`reasoning`]).

mod ahead;
mod cache;
mod reasoning;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rbee_engine::{Constraint, TokenId};
use rbee_tokenizer::{
    AnswerForm, Begins, Controls, Detokenizer, Error as TextError, Form, Grammar, Grammars, Matcher, Most, Start,
    Tokenizer,
};
use rbee_wire::ErrorBody;
use rbee_wire::fields::Violation;
use rbee_wire::form::{Calling, ResponseFormat};
use rbee_wire::job::{Generation, invalid};
use serde_json::{Value, json};

use ahead::{Ahead, MaskThreads, Match};
use cache::Cache;
use reasoning::{Marks, Reasoning, Whose};

/// Bytes of compiled grammars that are kept.
const CACHE_BYTES: usize = 64 << 20;

/// Makes the forms of one model's answers.
pub(crate) struct Forms {
    vocab: usize,
    eos: Vec<TokenId>,
    /// Made for the first answer that needs it, as most never do.
    tools: OnceLock<Result<Tools, String>>,
    marks: OnceLock<Option<Arc<Marks>>>,
    cache: Mutex<Cache<Grammar>>,
}

/// What the first form of a model needs.
struct Tools {
    grammars: Grammars,
    threads: MaskThreads,
}

/// The form of the answers to one request.
pub(crate) struct AnswerIn {
    /// Any of these.
    grammars: Vec<Grammar>,
    threads: MaskThreads,
    words: usize,
    start: Start,
    reasoning: Option<(Arc<Marks>, Begins, Detokenizer)>,
}

/// Where an answer begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opening {
    /// In the middle of the prompt's own text.
    Continues,
    /// As a text of its own, which may begin with reasoning.
    Fresh(Begins),
}

impl Forms {
    /// For a model of so many logits that ends with any of these ids.
    pub(crate) fn new(vocab: usize, eos: Vec<TokenId>) -> Self {
        let cache = Mutex::new(Cache::new(CACHE_BYTES));
        Self { vocab, eos, tools: OnceLock::new(), marks: OnceLock::new(), cache }
    }

    /// The form that a request asks for, if any. Blocks for as long as compiling takes.
    ///
    /// # Errors
    /// `INVALID_REQUEST` with what is wrong with the schema, expression, grammar or tool.
    pub(crate) fn of(
        &self,
        generation: &Generation,
        tokenizer: &Tokenizer,
        written: &AnswerForm,
        opening: Opening,
    ) -> Result<Option<AnswerIn>, ErrorBody> {
        let text = generation.response_format.as_ref().and_then(text_form);
        let calling = generation.calling();
        let mut forms = Vec::new();
        match (calling, text) {
            (Calling::Never, None) | (Calling::May, None) => return Ok(None),
            (Calling::Never, Some(text)) => forms.push(("response_format", text)),
            // As the model likes: one or the other.
            (Calling::May, Some(text)) => {
                forms.push(("response_format", text));
                forms.push(("tools", calls(generation, written)));
            }
            // An answer of calls has no text that a form could be asked of.
            (Calling::Must | Calling::MustCall(_), _) => forms.push(("tools", calls(generation, written))),
        }
        let tools = self.tools(tokenizer).map_err(|problem| refused(forms[0].0, problem))?;
        let mut grammars = Vec::with_capacity(forms.len());
        for (field, form) in forms {
            let grammar = self.compiled(tools, &form);
            grammars.push(grammar.map_err(|error| refused(field, problem(&error, &form)))?);
        }
        let reasoning = match opening {
            Opening::Continues => None,
            Opening::Fresh(begins) => self.marks(tokenizer, written).map(|marks| {
                let detokenizer = tokenizer.detokenizer(Controls::Hide, Start::Fresh).showing(written.shown());
                (marks, begins, detokenizer)
            }),
        };
        let start = if opening == Opening::Continues { Start::Continues } else { Start::Fresh };
        let words = self.vocab.div_ceil(32);
        Ok(Some(AnswerIn { grammars, threads: tools.threads.clone(), words, start, reasoning }))
    }

    fn tools(&self, tokenizer: &Tokenizer) -> Result<&Tools, String> {
        let made = self.tools.get_or_init(|| {
            let grammars = Grammars::new(tokenizer, self.vocab, &self.eos).map_err(|error| error.to_string())?;
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            let threads = MaskThreads::start(if cores < 4 { 1 } else { 2 });
            let threads = threads.map_err(|error| format!("cannot be checked: no thread: {error}"))?;
            Ok(Tools { grammars, threads })
        });
        made.as_ref().map_err(Clone::clone)
    }

    fn marks(&self, tokenizer: &Tokenizer, written: &AnswerForm) -> Option<Arc<Marks>> {
        let marks = self.marks.get_or_init(|| {
            let tags = written.reasoning_tags()?;
            Some(Arc::new(Marks::new(tags, tokenizer, self.vocab, &self.eos)))
        });
        marks.clone()
    }

    fn compiled(&self, tools: &Tools, form: &Form) -> Result<Grammar, TextError> {
        let cache = || self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let key = key(form);
        if let Some(grammar) = cache().get(&key) {
            return Ok(grammar);
        }
        let grammar = tools.grammars.compile(form)?;
        cache().put(key, grammar.clone(), grammar.bytes());
        Ok(grammar)
    }
}

fn text_form(format: &ResponseFormat) -> Option<Form> {
    match format {
        ResponseFormat::Text {} => None,
        ResponseFormat::JsonObject {} => Some(Form::JsonObject),
        ResponseFormat::JsonSchema { json_schema } => Some(Form::JsonSchema(Value::Object(json_schema.schema.clone()))),
        ResponseFormat::Regex { regex } => Some(Form::Regex(regex.clone())),
        ResponseFormat::Grammar { grammar } => Some(Form::Lark(grammar.clone())),
    }
}

fn calls(generation: &Generation, written: &AnswerForm) -> Form {
    let only = match generation.calling() {
        Calling::MustCall(name) => Some(name),
        _ => None,
    };
    let tools = generation.tools.iter().flatten().map(|tool| &tool["function"]);
    let named = tools.filter_map(|function| Some((function["name"].as_str()?, function)));
    let tools = named.filter(|(name, _)| only.is_none_or(|only| only == *name));
    let tools = tools.map(|(name, function)| {
        let parameters = function.get("parameters").filter(|value| !value.is_null());
        (name.to_owned(), parameters.cloned().unwrap_or_else(|| json!({})))
    });
    let most = if generation.parallel_tool_calls == Some(false) { Most::One } else { Most::Any };
    Form::Calls { form: written.clone(), tools: tools.collect(), most }
}

/// Two forms of one model with the same key are the same.
fn key(form: &Form) -> String {
    match form {
        Form::JsonObject => "json".into(),
        Form::JsonSchema(schema) => format!("schema {schema}"),
        Form::Regex(regex) => format!("regex {regex}"),
        Form::Lark(grammar) => format!("lark {grammar}"),
        Form::Calls { tools, most, .. } => format!("calls {most:?} {}", json!(tools)),
    }
}

/// What is wrong with a form; a tool is called by its name.
fn problem(error: &TextError, form: &Form) -> String {
    let text = error.to_string();
    let Form::Calls { tools, .. } = form else { return format!("cannot be adhered to: {text}") };
    let number = text.split_once("/tools/").map(|(_, rest)| rest.split('/').next().unwrap_or_default());
    match number.and_then(|number| number.parse::<usize>().ok()).and_then(|number| tools.get(number)) {
        Some((name, _)) => format!("cannot be adhered to: `{name}`: {text}"),
        None => format!("cannot be adhered to: {text}"),
    }
}

fn refused(field: &str, problem: String) -> ErrorBody {
    invalid(vec![Violation { field: field.into(), problem }])
}

/// The refusal of a form, by a backend that has none.
pub(crate) fn none_here() -> ErrorBody {
    refused("response_format", "cannot be adhered to by a simulated model".into())
}

impl AnswerIn {
    /// The constraint of one choice.
    pub(crate) fn constraint(&self) -> Box<dyn Constraint> {
        let start = |grammar: &Grammar| {
            let matcher = Box::new(grammar.start_at(self.start));
            Ahead::new(matcher, self.words, self.threads.clone())
        };
        let reasoning = self.reasoning.clone();
        let reasoning = reasoning.map(|(marks, begins, detokenizer)| Reasoning::new(marks, begins, detokenizer));
        let forms = self.grammars.iter().map(start).collect();
        Box::new(Formed { forms, both: Vec::new(), reasoning })
    }
}

impl Match for Matcher {
    fn mask(&mut self, words: &mut [u32]) -> Result<(), String> {
        Self::mask(self, words).map_err(|error| error.to_string())
    }

    fn accept(&mut self, id: TokenId) -> Result<bool, String> {
        Self::accept(self, id).map_err(|error| error.to_string())
    }
}

/// The constraint of one answer.
struct Formed {
    /// The forms that it can still have, at least one.
    forms: Vec<Ahead>,
    /// What any of several allows.
    both: Vec<u32>,
    reasoning: Option<Reasoning>,
}

impl Formed {
    fn wants_form(&self) -> bool {
        self.reasoning.as_ref().is_none_or(Reasoning::wants_form)
    }
}

impl Constraint for Formed {
    fn mask(&mut self) -> Result<Option<&[u32]>, String> {
        let wanted = self.wants_form();
        let Self { forms, both, reasoning } = self;
        let form = match forms.as_mut_slice() {
            _ if !wanted => None,
            [form] => Some(form.mask()?),
            several => {
                both.clear();
                for form in several {
                    let mask = form.mask()?;
                    both.resize(mask.len(), 0);
                    both.iter_mut().zip(mask).for_each(|(all, one)| *all |= one);
                }
                Some(both.as_slice())
            }
        };
        Ok(match reasoning {
            Some(reasoning) => Some(reasoning.mask(form)),
            None => form,
        })
    }

    fn accept(&mut self, id: TokenId) -> Result<bool, String> {
        if let Some(reasoning) = &mut self.reasoning
            && reasoning.take(id)? == Whose::Reasoning
        {
            return Ok(false);
        }
        if let [form] = self.forms.as_mut_slice() {
            return form.accept(id);
        }
        let mut complete = true;
        let mut problem = String::from("there is no form");
        self.forms.retain_mut(|form| match form.accept(id) {
            Ok(whole) => {
                complete &= whole;
                true
            }
            Err(other) => {
                problem = other;
                false
            }
        });
        if self.forms.is_empty() { Err(problem) } else { Ok(complete) }
    }

    fn prepare(&mut self) {
        if self.wants_form() {
            self.forms.iter_mut().for_each(Ahead::prepare);
        }
    }
}

#[cfg(test)]
mod tests;
