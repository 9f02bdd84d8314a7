//! Answers that have to be of a form: JSON of a schema, a regular expression's text, a grammar's, or calls of functions.
//!
//! [`Grammars`] knows the vocabulary, [`Grammars::compile`] makes a [`Grammar`] of a [`Form`], and [`Grammar::start`] a
//! [`Matcher`] for one answer: before each token it says which tokens may come, after it it takes the one that came.
//!
//! The form holds for the text that a user sees, so that control tokens cannot occur in it (but those that the model writes calls
//! with), and neither can bytes that are no text. All limits are numbers of steps, never times: a form compiles or fails alike on
//! every machine, and a matcher is a function of the tokens that it has taken. Parsing is llguidance's (an Earley parser over a
//! lexer of lazy regular-expression derivatives); what it would ignore or not end with is refused before it sees it.

mod calls;
mod formats;
mod lark;
mod schema;
mod vocabulary;

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt::Display;
use std::sync::Arc;

use llguidance::api::{GrammarInit, GrammarWithLexer, ParserLimits, TopLevelGrammar};
use llguidance::derivre::RegexBuilder;
use llguidance::earley::{BiasComputer, ParserRecognizer};
use llguidance::toktrie::{InferenceCapabilities, SimpleVob, TokTrie};
use llguidance::{Logger, ParserFactory, TokenParser};
use serde_json::Value;

use crate::tokenizer::caught;
use crate::{AnswerForm, Error, Most, Start, TokenId, Tokenizer};
use vocabulary::Vocabulary;

/// Longest regular expression and longest grammar, in bytes.
const MAX_TEXT: usize = 64 << 10;

/// Longest part of a problem that quotes what was sent.
const MAX_PROBLEM: usize = 300;

/// What an answer must be.
#[derive(Clone, Debug)]
pub enum Form {
    /// Any JSON object.
    JsonObject,
    /// JSON of a schema.
    JsonSchema(Value),
    /// Text that a regular expression matches whole.
    Regex(String),
    /// A context-free grammar in llguidance's dialect of Lark, with the rule `start`.
    Lark(String),
    /// Calls of functions, at least one, as the model writes them.
    Calls {
        /// How it writes them.
        form: AnswerForm,
        /// The functions that may be called: each one's name and the schema of its arguments.
        tools: Vec<(String, Value)>,
        /// Whether one call must be the only one.
        most: Most,
    },
}

/// What compiles forms: the vocabulary as grammars need it, made once per model.
#[derive(Clone)]
pub struct Grammars {
    shared: Arc<Shared>,
}

struct Shared {
    factory: ParserFactory,
    vocabulary: Vocabulary,
    eos: Vec<TokenId>,
    vocab: usize,
    /// Control tokens by their names.
    control: HashMap<String, TokenId>,
}

/// The limits of a grammar.
///
/// With those of [`schema`] they bound work and memory. Processor time of a compilation, the least of three, on a busy 2-core
/// Zen 5 with a vocabulary of 150,000: 2 ms for a typical schema, 35 to 131 ms for sixty tools of 84 kB in the five ways of writing
/// calls, 82 ms for 11,000 numbers, 56 ms for 8,000 words of an expression: the slowest of the hostile forms that the tests have.
/// A matcher starts as a copy and grows by up to 20,000 states of some 2 kB.
fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2000,
        initial_lexer_fuel: 500_000,
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        max_lexer_states: 20_000,
        max_grammar_size: 100_000,
        // It walks the whole vocabulary for every such lexeme.
        precompute_large_lexemes: false,
        verbose_errors: false,
    }
}

impl Grammars {
    /// Takes a tokenizer's vocabulary, for a model with `vocab` logits that ends with any of the ids `eos`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the model has fewer logits than the tokenizer ids, [`Error::UnknownId`] for an end id that is none,
    /// [`Error::Unsupported`] for a vocabulary that no trie can hold.
    pub fn new(tokenizer: &Tokenizer, vocab: usize, eos: &[TokenId]) -> Result<Grammars, Error> {
        tokenizer.check_fits(vocab)?;
        if let Some(&id) = eos.iter().find(|&&id| id as usize >= tokenizer.vocab_size()) {
            return Err(Error::UnknownId { id, vocab: tokenizer.vocab_size() });
        }
        let vocabulary = Vocabulary::new(tokenizer, eos)?;
        let factory =
            ParserFactory::new(&vocabulary.env, InferenceCapabilities::default(), &vocabulary.extra_lexemes());
        let mut factory = factory.map_err(|error| refused(&error.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = limits();
        let control = tokenizer.control_ids().into_iter();
        let control = control.filter_map(|id| Some((tokenizer.id_to_token(id)?, id))).collect();
        Ok(Grammars { shared: Arc::new(Shared { factory, vocabulary, eos: eos.to_vec(), vocab, control }) })
    }

    /// Makes a grammar of a form.
    ///
    /// # Errors
    /// [`Error::Grammar`], with what is wrong with the form and where.
    pub fn compile(&self, form: &Form) -> Result<Grammar, Error> {
        let (grammars, user) = match form {
            Form::JsonObject => (vec![json(schema::any_object())], Source::Ours),
            Form::JsonSchema(schema) => (vec![json(schema::prepare(schema)?)], Source::Ours),
            Form::Regex(pattern) => (vec![regex(pattern)?], Source::User),
            Form::Lark(text) => {
                check_length("the grammar", text)?;
                lark::check(text)?;
                (vec![GrammarWithLexer::from_lark(text.clone())], Source::User)
            }
            Form::Calls { form, tools, most } => {
                (calls::grammars(&self.shared.control, form, tools, *most)?, Source::Ours)
            }
        };
        self.build(TopLevelGrammar { grammars, max_tokens: None }, user)
    }

    fn build(&self, grammar: TopLevelGrammar, source: Source) -> Result<Grammar, Error> {
        let factory = &self.shared.factory;
        let limits = factory.limits();
        let parser = caught(|| {
            let (grammar, lexer) = GrammarInit::Serialized(grammar)
                .to_internal(Some(factory.tok_env().clone()), limits.clone())
                .map_err(|error| refused(&first_line(&format!("{error}"))))?;
            if source == Source::User {
                lark::check_lexer(&lexer)?;
            }
            let symbols = grammar.num_symbols();
            let init = GrammarInit::Internal(grammar, lexer);
            factory
                .create_parser_from_init_ext(init, Logger::new(0, 0), InferenceCapabilities::default(), limits.clone())
                .map(|parser| (parser, symbols))
                .map_err(|error| refused(&first_line(&format!("{error}"))))
        });
        let (mut parser, symbols) = parser.unwrap_or_else(|| Err(refused("its compiler panicked")))?;
        parser.start_without_prompt();
        let bytes = GRAMMAR_BYTES + parser.parser.lexer_stats().num_bytes + symbols * SYMBOL_BYTES;
        let grammar = Grammar { shared: Arc::clone(&self.shared), parser: Arc::new(parser), bytes };
        let mut words = vec![0; self.shared.vocab.div_ceil(32)];
        match grammar.start().mask(&mut words) {
            Ok(()) => Ok(grammar),
            Err(error) => Err(refused(&format!("no answer can begin ({})", problem(error)))),
        }
    }
}

/// Who wrote a grammar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// This crate did, and knows what it does.
    Ours,
    /// A user did.
    User,
}

/// What every grammar takes: its own copy of the parser's tables and of the lexemes that belong to the vocabulary.
const GRAMMAR_BYTES: usize = 64 << 10;
/// What a symbol of a compiled grammar takes, with its rules and names.
const SYMBOL_BYTES: usize = 400;

fn json(schema: Value) -> GrammarWithLexer {
    GrammarWithLexer::from_json_schema(schema)
}

fn regex(pattern: &str) -> Result<GrammarWithLexer, Error> {
    check_length("the regular expression", pattern)?;
    let mut builder = RegexBuilder::new();
    if let Err(error) = builder.mk_regex(pattern) {
        return Err(refused(&format!("the regular expression is not supported ({})", last_line(&error.to_string()))));
    }
    if pattern.is_empty() {
        return Ok(GrammarWithLexer::from_lark("start: \"\"".to_owned()));
    }
    Ok(GrammarWithLexer::from_regex(pattern))
}

fn check_length(what: &str, text: &str) -> Result<(), Error> {
    match text.len() > MAX_TEXT {
        true => Err(refused(&format!("{what} has {} bytes, more than the {MAX_TEXT} allowed", text.len()))),
        false => Ok(()),
    }
}

fn problem(error: Error) -> String {
    match error {
        Error::Grammar(problem) => problem,
        other => other.to_string(),
    }
}

fn refused(problem: &str) -> Error {
    Error::Grammar(problem.to_owned())
}

/// What went wrong, without the excerpts and traces that may follow.
fn first_line(problem: &str) -> String {
    if problem.contains("regex parse error") {
        return last_line(problem);
    }
    let line = problem.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("it does not compile");
    line.trim_end_matches("<non-verbose/>").trim_end().chars().take(MAX_PROBLEM).collect()
}

/// What an expression's parser says behind the expression.
fn last_line(problem: &str) -> String {
    let line = problem
        .lines()
        .map(str::trim)
        .rfind(|line| line.contains(char::is_alphanumeric))
        .unwrap_or("it does not parse");
    line.trim_start_matches("error: ").chars().take(MAX_PROBLEM).collect()
}

/// A compiled form. Cheap to clone.
#[derive(Clone)]
pub struct Grammar {
    shared: Arc<Shared>,
    parser: Arc<TokenParser>,
    bytes: usize,
}

impl Grammar {
    /// Begins an answer that is a text of its own.
    pub fn start(&self) -> Matcher {
        self.start_at(Start::Fresh)
    }

    /// Begins an answer.
    pub fn start_at(&self, start: Start) -> Matcher {
        let at = match start {
            Start::Fresh => At::First,
            // Spaces that a text of its own would lose belong to it.
            Start::Continues => At::Inside,
        };
        // A deep copy: states of the lexer that one answer makes do not change what another may do.
        Matcher { shared: Arc::clone(&self.shared), parser: self.parser.deep_clone(), at }
    }

    /// About how much memory it takes, for the bound of a cache.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Where an answer is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum At {
    /// Before its first token.
    First,
    /// Behind it.
    Inside,
    /// Nothing but an end can come.
    Complete,
    /// Behind its end.
    Ended,
    /// The parser failed, with this problem.
    Failed(String),
}

/// Where an answer stands: a function of the tokens that it has taken.
pub struct Matcher {
    shared: Arc<Shared>,
    parser: TokenParser,
    at: At,
}

impl Matcher {
    /// Sets bit `i % 32` of word `i / 32` for each token `i` that may come next, and clears all others. End ids are among them exactly
    /// when the answer may end here.
    ///
    /// # Errors
    /// [`Error::Grammar`] when no token may come, or to find out takes more than the limits allow.
    pub fn mask(&mut self, words: &mut [u32]) -> Result<(), Error> {
        if words.len() < self.shared.vocab.div_ceil(32) {
            return Err(refused("the mask is shorter than the vocabulary"));
        }
        words.fill(0);
        match &self.at {
            At::Failed(problem) => return Err(refused(problem)),
            At::Ended => return Err(refused("the answer has ended")),
            At::Complete => {
                self.shared.eos.iter().for_each(|&id| set(words, id));
                return Ok(());
            }
            At::First | At::Inside => {}
        }
        self.place();
        let mask = self.run(|parser| {
            let computer = Arc::clone(&parser.bias_computer);
            let mask = parser.parser.compute_bias(&*computer, b"");
            match parser.parser.get_error() {
                None => Ok((mask, parser.is_accepting())),
                Some(error) => Err(error.message()),
            }
        });
        let (mask, may_end) = mask?;
        let used = self.shared.vocabulary.env.tok_trie().vocab_size();
        for (word, bits) in words.iter_mut().zip(mask.as_slice()).take(used.div_ceil(32)) {
            *word = *bits;
        }
        if !used.is_multiple_of(32) {
            words[used / 32] &= (1 << (used % 32)) - 1;
        }
        if may_end {
            self.shared.eos.iter().for_each(|&id| set(words, id));
        }
        if self.at == At::First
            && let Some(first) = &self.shared.vocabulary.first
        {
            first.blank.iter().for_each(|&id| set(words, id));
        }
        match words.iter().all(|word| *word == 0) {
            true => Err(self.fail("no token of the vocabulary can come next")),
            false => Ok(()),
        }
    }

    /// Takes one more token; true when nothing but an end can follow.
    ///
    /// # Errors
    /// [`Error::Grammar`] for a token that may not come here.
    pub fn accept(&mut self, id: TokenId) -> Result<bool, Error> {
        let end = self.shared.eos.contains(&id);
        match &self.at {
            At::Failed(problem) => return Err(refused(problem)),
            At::Complete if end => {
                self.at = At::Ended;
                return Ok(true);
            }
            At::Complete | At::Ended => return Err(refused("the answer has ended")),
            At::First | At::Inside => {}
        }
        if end {
            if !self.run(|parser| Ok::<_, Infallible>(parser.is_accepting()))? {
                return Err(self.fail("the answer may not end here"));
            }
            self.at = At::Ended;
            return Ok(true);
        }
        self.place();
        if self.at == At::First {
            self.at = At::Inside;
            let blank = self.shared.vocabulary.first.as_ref().is_some_and(|first| first.blank.contains(&id));
            if blank {
                return Ok(false);
            }
        }
        let complete = self.run(|parser| {
            // Every token has its own fuel, so that how much there is does not depend on whether masks were made.
            parser.parser.compute_bias(&Refuel(parser.token_env.tok_trie()), b"\0");
            parser.consume_token(id)?;
            parser.check_stop()
        })?;
        if complete {
            self.at = At::Complete;
        }
        Ok(complete)
    }

    /// Gives the parser the vocabulary of this place in the answer.
    fn place(&mut self) {
        let vocabulary = &self.shared.vocabulary;
        let Some(first) = &vocabulary.first else { return };
        let (env, slices) = match self.at {
            At::First => (&first.env, &first.slices),
            _ => (&vocabulary.env, &vocabulary.slices),
        };
        if !Arc::ptr_eq(env, &self.parser.token_env) {
            self.parser.token_env = Arc::clone(env);
            self.parser.bias_computer = Arc::clone(slices) as Arc<dyn BiasComputer>;
            self.parser.invalidate_bias_cache();
        }
    }

    /// Does a step; one that fails is the last.
    fn run<T, E: Display>(&mut self, step: impl FnOnce(&mut TokenParser) -> Result<T, E>) -> Result<T, Error> {
        let parser = &mut self.parser;
        match caught(|| step(parser)) {
            Some(Ok(value)) => Ok(value),
            Some(Err(error)) => Err(self.fail(&first_line(&error.to_string()))),
            None => Err(self.fail("its parser panicked")),
        }
    }

    fn fail(&mut self, problem: &str) -> Error {
        self.at = At::Failed(problem.to_owned());
        refused(problem)
    }
}

fn set(words: &mut [u32], id: TokenId) {
    words[id as usize / 32] |= 1 << (id % 32);
}

/// Computes nothing; to be asked for it gives the lexer its fuel for a step.
struct Refuel<'t>(&'t TokTrie);

impl BiasComputer for Refuel<'_> {
    fn compute_bias(&self, _: &mut ParserRecognizer<'_>, _: &[u8]) -> SimpleVob {
        SimpleVob::new()
    }

    fn trie(&self) -> &TokTrie {
        self.0
    }
}
