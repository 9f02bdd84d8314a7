//! Python's `json.dumps` as a filter: templates were trained on exactly its spacing.

use std::fmt::Write;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

/// Nesting beyond any tool schema.
const MAX_DEPTH: usize = 64;
/// Indent beyond any template.
const MAX_INDENT: usize = 16;

/// How to write; the defaults are those of the `tojson` that templates are written for.
struct Style {
    indent: Option<usize>,
    comma: String,
    colon: String,
    sort_keys: bool,
    ascii: bool,
}

/// `value|tojson(indent=…, separators=…, sort_keys=…, ensure_ascii=…)`.
pub(super) fn tojson(state: &State, value: &Value, indent: Option<Value>, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<Value> = match indent {
        Some(indent) => Some(indent),
        None => options.get("indent")?,
    };
    let indent = match indent.filter(|v| !v.is_none() && !v.is_undefined()) {
        None => None,
        Some(indent) => Some(usize::try_from(indent).map_err(|_| invalid("indent is not a number"))?),
    };
    if indent.is_some_and(|n| n > MAX_INDENT) {
        return Err(invalid("indent is too large"));
    }
    let separators: Option<Vec<String>> = options.get("separators")?;
    let (comma, colon) = match separators.as_deref() {
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
        Some([comma, colon]) if comma.len() + colon.len() <= MAX_INDENT => (comma.clone(), colon.clone()),
        Some(_) => return Err(invalid("separators are not a short pair")),
    };
    let style = Style {
        indent,
        comma,
        colon,
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    let mut writer = Writer { state, style, out: String::new(), charged: 0 };
    writer.value(value, 0)?;
    Ok(Value::from_safe_string(writer.out))
}

struct Writer<'s, 'a, 'b> {
    state: &'s State<'a, 'b>,
    style: Style,
    out: String,
    /// Bytes of `out` that fuel was paid for.
    charged: usize,
}

impl Writer<'_, '_, '_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid("value is nested too deeply"));
        }
        self.charge()?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value)?,
            ValueKind::String => {
                let text = value.as_str().unwrap_or_default();
                self.state.consume_fuel((text.len() / 16) as u64)?;
                self.string(text);
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let mut items = Vec::new();
                for item in value.try_iter()? {
                    self.state.consume_fuel(1)?;
                    items.push(item);
                }
                self.list('[', ']', items.len(), depth, |writer, at| writer.value(&items[at], depth + 1))?;
            }
            ValueKind::Map => self.map(value, depth)?,
            kind => return Err(invalid(&format!("{kind} is not JSON"))),
        }
        Ok(())
    }

    fn map(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut pairs = Vec::new();
        for key in value.try_iter()? {
            self.state.consume_fuel(1)?;
            let item = value.get_item(&key)?;
            let key = match key.as_str() {
                Some(text) => text.to_owned(),
                None => key.to_string(),
            };
            pairs.push((key, item));
        }
        if self.style.sort_keys {
            pairs.sort_by(|a, b| a.0.cmp(&b.0));
        }
        self.list('{', '}', pairs.len(), depth, |writer, at| {
            writer.string(&pairs[at].0);
            writer.out.push_str(&writer.style.colon.clone());
            writer.value(&pairs[at].1, depth + 1)
        })
    }

    fn list(
        &mut self,
        open: char,
        close: char,
        count: usize,
        depth: usize,
        mut item: impl FnMut(&mut Self, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for at in 0..count {
            if at > 0 {
                self.out.push_str(&self.style.comma.clone());
            }
            self.line(depth + 1);
            item(self, at)?;
        }
        if count > 0 {
            self.line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    /// With an indent every item stands on a line of its own.
    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.style.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.style.ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }

    fn number(&mut self, value: &Value) -> Result<(), Error> {
        if value.is_integer() {
            self.out.push_str(&value.to_string());
            return Ok(());
        }
        let float = f64::try_from(value.clone())?;
        self.out.push_str(&python_float(float));
        Ok(())
    }

    /// Pays for what was written since the last call: 16 bytes a unit.
    fn charge(&mut self) -> Result<(), Error> {
        let units = (self.out.len() - self.charged) / 16;
        self.charged += units * 16;
        self.state.consume_fuel(units as u64)
    }
}

/// Python's `repr` of a float: shortest digits, an exponent below 1e-4 and from 1e16.
fn python_float(float: f64) -> String {
    if float.is_nan() {
        return "NaN".to_owned();
    }
    if float.is_infinite() {
        return if float > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let size = float.abs();
    if float == 0.0 || (1e-4..1e16).contains(&size) {
        return format!("{float:?}");
    }
    let text = format!("{float:e}");
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, exponent) = match exponent.strip_prefix('-') {
                Some(exponent) => ('-', exponent),
                None => ('+', exponent),
            };
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => text,
    }
}

fn invalid(reason: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("tojson: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::python_float;

    #[test]
    fn floats_are_written_as_python_does() {
        for (float, text) in [
            (1.0, "1.0"),
            (-0.5, "-0.5"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (123456789012345.6, "123456789012345.6"),
            (1e16, "1e+16"),
            (2.5e300, "2.5e+300"),
        ] {
            assert_eq!(python_float(float), text);
        }
    }
}
