//! One tool call written as a JSON object, read a character at a time.
//!
//! Models write `{"name": …, "arguments": {…}}` in this or the other order, `parameters` for `arguments`, the whole of it below
//! `function`, or the arguments as a text of JSON. The arguments are given out while they are written; only what has to be decoded
//! first is kept.

/// What a call has shown with the last characters.
#[derive(Debug, Default)]
pub(super) struct Shown {
    /// Its name, once.
    pub(super) name: Option<String>,
    /// More of its arguments, always after the name.
    pub(super) arguments: String,
}

/// How far a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// It goes on.
    More,
    /// It is whole.
    Whole,
    /// It is none.
    Bad,
}

/// Whether an object may have keys that calls do not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keys {
    /// It may: something else has shown already that it is a call.
    Any,
    /// It may not, so that an answer in JSON is not taken for a call.
    Known,
}

/// Longest name and longest key.
const MAX_NAME: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    Name,
    Arguments,
    Function,
    Other,
}

#[derive(Clone, Debug)]
enum At {
    /// Before a key or the end of an object.
    Key,
    /// In a key, its quote included.
    KeyText(Literal),
    Colon(Key),
    /// Before a value.
    Value(Key),
    /// In a value.
    In(Key, RawValue),
    /// Behind a value.
    After,
}

/// A call on its way.
#[derive(Clone, Debug)]
pub(super) struct CallObject {
    at: At,
    keys: Keys,
    /// Objects that this one lies in, itself not counted.
    outer: usize,
    named: bool,
    has_arguments: bool,
    /// Arguments that came before the name.
    early: String,
    /// Nothing follows the arguments: there is no object around them.
    arguments_only: bool,
}

impl CallObject {
    /// A call whose opening brace was just read.
    pub(super) fn opened(keys: Keys) -> Self {
        Self {
            at: At::Key,
            keys,
            outer: 0,
            named: false,
            has_arguments: false,
            early: String::new(),
            arguments_only: false,
        }
    }

    /// The arguments of a call whose name stood before them; their opening brace comes next.
    pub(super) fn arguments() -> Self {
        Self { at: At::Value(Key::Arguments), named: true, arguments_only: true, ..Self::opened(Keys::Any) }
    }

    /// Takes one more character.
    pub(super) fn push(&mut self, c: char, shown: &mut Shown) -> Progress {
        let blank = c.is_ascii_whitespace();
        match &mut self.at {
            At::Key if blank => Progress::More,
            At::Key if c == '"' => {
                self.at = At::KeyText(Literal::opened());
                Progress::More
            }
            At::Key if c == '}' => self.close(shown),
            At::Key => Progress::Bad,
            At::KeyText(text) => match text.push(c) {
                false if text.raw.len() > MAX_NAME => Progress::Bad,
                false => Progress::More,
                true => {
                    let key = match text.decoded().as_deref() {
                        Some("name") => Key::Name,
                        Some("arguments" | "parameters") => Key::Arguments,
                        Some("function") => Key::Function,
                        Some("type" | "id") => Key::Other,
                        _ if self.keys == Keys::Known => return Progress::Bad,
                        _ => Key::Other,
                    };
                    self.at = At::Colon(key);
                    Progress::More
                }
            },
            At::Colon(_) | At::Value(_) | At::After if blank => Progress::More,
            At::Colon(key) if c == ':' => {
                self.at = At::Value(*key);
                Progress::More
            }
            At::Colon(_) => Progress::Bad,
            At::Value(Key::Function) if c == '{' => {
                self.outer += 1;
                self.at = At::Key;
                Progress::More
            }
            At::Value(key) => {
                let key = *key;
                let Some(value) = RawValue::begun(c) else { return Progress::Bad };
                let streams = key == Key::Arguments && matches!(value.kind, Kind::Brackets);
                self.at = At::In(key, value);
                if streams {
                    self.give(&c.to_string(), shown);
                }
                Progress::More
            }
            At::In(key, value) => {
                let key = *key;
                let streams = key == Key::Arguments && matches!(value.kind, Kind::Brackets);
                let (more, over) = value.push(c);
                let raw = match over {
                    Over::No => None,
                    _ => Some(std::mem::take(&mut value.raw)),
                };
                if key == Key::Name && raw.is_none() && value.raw.len() > MAX_NAME {
                    return Progress::Bad;
                }
                if streams {
                    self.give(&more, shown);
                }
                let Some(raw) = raw else { return Progress::More };
                self.at = At::After;
                if !self.value(key, &raw, streams, shown) {
                    return Progress::Bad;
                }
                match over {
                    Over::Before => self.push(c, shown),
                    _ if self.arguments_only => Progress::Whole,
                    _ => Progress::More,
                }
            }
            At::After if c == ',' => {
                self.at = At::Key;
                Progress::More
            }
            At::After if c == '}' => self.close(shown),
            At::After => Progress::Bad,
        }
    }

    /// Takes a whole value; false when it cannot be what its key says.
    fn value(&mut self, key: Key, raw: &str, streamed: bool, shown: &mut Shown) -> bool {
        match key {
            Key::Name | Key::Function => {
                let Ok(name) = serde_json::from_str::<String>(raw) else { return key == Key::Function };
                if name.is_empty() {
                    return false;
                }
                if !self.named {
                    self.named = true;
                    shown.name = Some(name);
                    shown.arguments.push_str(&std::mem::take(&mut self.early));
                }
            }
            Key::Arguments if streamed => self.has_arguments = true,
            Key::Arguments if !self.has_arguments => {
                self.has_arguments = true;
                match serde_json::from_str::<serde_json::Value>(raw) {
                    Ok(serde_json::Value::String(text)) => self.give(&text, shown),
                    Ok(serde_json::Value::Null) => self.give("{}", shown),
                    Ok(_) => self.give(raw, shown),
                    Err(_) => return false,
                }
            }
            Key::Arguments | Key::Other => {}
        }
        true
    }

    fn give(&mut self, text: &str, shown: &mut Shown) {
        let to = if self.named { &mut shown.arguments } else { &mut self.early };
        to.push_str(text);
    }

    fn close(&mut self, shown: &mut Shown) -> Progress {
        if self.outer > 0 {
            self.outer -= 1;
            self.at = At::After;
            return Progress::More;
        }
        if !self.named {
            return Progress::Bad;
        }
        if !self.has_arguments {
            shown.arguments.push_str("{}");
        }
        Progress::Whole
    }
}

/// A JSON text literal on its way.
#[derive(Clone, Debug)]
struct Literal {
    raw: String,
    escaped: bool,
}

impl Literal {
    fn opened() -> Self {
        Self { raw: "\"".into(), escaped: false }
    }

    /// Takes one more character; true when it closed the literal.
    fn push(&mut self, c: char) -> bool {
        self.raw.push(c);
        let closes = c == '"' && !self.escaped;
        self.escaped = c == '\\' && !self.escaped;
        closes
    }

    fn decoded(&self) -> Option<String> {
        serde_json::from_str(&self.raw).ok()
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Text,
    Brackets,
    Scalar,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Over {
    No,
    /// With this character.
    With,
    /// Before this character.
    Before,
}

/// A JSON value on its way, not checked further than its end has to be found.
#[derive(Clone, Debug)]
struct RawValue {
    kind: Kind,
    /// Its text; of brackets nothing is kept.
    raw: String,
    depth: usize,
    in_text: bool,
    escaped: bool,
}

impl RawValue {
    fn begun(c: char) -> Option<Self> {
        let kind = match c {
            '"' => Kind::Text,
            '{' | '[' => Kind::Brackets,
            '-' | '0'..='9' | 'a'..='z' => Kind::Scalar,
            _ => return None,
        };
        let brackets = matches!(kind, Kind::Brackets);
        let raw = if brackets { String::new() } else { c.to_string() };
        Some(Self { kind, raw, depth: usize::from(brackets), in_text: c == '"', escaped: false })
    }

    /// Takes one more character; what of brackets it wrote, and whether the value is over.
    fn push(&mut self, c: char) -> (String, Over) {
        if matches!(self.kind, Kind::Scalar) {
            if matches!(c, ',' | '}' | ']') || c.is_ascii_whitespace() {
                return (String::new(), Over::Before);
            }
            self.raw.push(c);
            return (String::new(), Over::No);
        }
        // A line end in a text is no JSON, and what is meant by it is beyond doubt.
        let written = match c {
            '\n' if self.in_text => "\\n".to_owned(),
            '\r' if self.in_text => "\\r".to_owned(),
            '\t' if self.in_text => "\\t".to_owned(),
            c => c.to_string(),
        };
        if self.in_text {
            if c == '"' && !self.escaped {
                self.in_text = false;
            }
            self.escaped = c == '\\' && !self.escaped;
        } else {
            match c {
                '"' => self.in_text = true,
                '{' | '[' => self.depth += 1,
                '}' | ']' => self.depth -= 1,
                _ => {}
            }
        }
        let over = if self.depth == 0 && !self.in_text { Over::With } else { Over::No };
        match self.kind {
            Kind::Brackets => (written, over),
            _ => {
                self.raw.push_str(&written);
                (String::new(), over)
            }
        }
    }
}
