//! Values of keywords: what can be kept exactly, and how much of it.

use std::collections::HashSet;

use llguidance::derivre::RegexBuilder;
use llguidance::regex_to_lark;
use serde_json::{Map, Value};

use super::{NUMERIC, Place};
use crate::Error;
use crate::grammar::last_line;

/// Most schemas and constants in them.
const MAX_SCHEMAS: usize = 12_000;
/// Most bytes of names, texts and expressions.
const MAX_BYTES: usize = 256 << 10;
/// Most expressions, and the most that making them may cost together, in nodes.
const MAX_PATTERNS: usize = 256;
const MAX_PATTERN_COST: u64 = 100_000;
/// Most properties of an object, and the most that the squares of them come to: so long is llguidance's work.
const MAX_MEMBERS: usize = 256;
const MAX_MEMBER_SQUARES: usize = 2 * MAX_MEMBERS * MAX_MEMBERS;
/// Most work on ranges of numbers, which grows with the square of their digits.
const MAX_DIGIT_SQUARES: usize = 25_000;
/// Most pairs of alternatives that have to exclude each other.
const MAX_PAIRS: usize = 10_000;
/// Longest text, list or object that a schema may count.
const MAX_COUNT: u64 = 1 << 24;
/// Integers below are exact as floats, and none above is rounded to one of them.
const EXACT: f64 = 9_007_199_254_740_992.0;
/// Most digits behind the point.
const MAX_FRACTION: usize = 12;

/// What has been used up.
#[derive(Default)]
pub(super) struct Budget {
    schemas: usize,
    bytes: usize,
    patterns: usize,
    cost: u64,
    pairs: usize,
    squares: usize,
    digits: usize,
    ranges: HashSet<String>,
    known: HashSet<String>,
}

impl Budget {
    pub(super) fn spend(&mut self, schemas: usize, place: &Place) -> Result<(), Error> {
        self.schemas += schemas;
        match self.schemas > MAX_SCHEMAS {
            true => Err(place.refuse(&format!("there are more than {MAX_SCHEMAS} schemas and values"))),
            false => Ok(()),
        }
    }

    fn text(&mut self, text: &str, place: &Place) -> Result<(), Error> {
        self.bytes += text.len();
        match self.bytes > MAX_BYTES {
            true => Err(place.refuse(&format!("names and texts have more than {MAX_BYTES} bytes together"))),
            false => Ok(()),
        }
    }

    pub(super) fn members(&mut self, members: usize, place: &Place) -> Result<(), Error> {
        self.squares += members.saturating_mul(members);
        match members > MAX_MEMBERS || self.squares > MAX_MEMBER_SQUARES {
            true => {
                Err(place.refuse(&format!("an object has more than {MAX_MEMBERS} properties, or too many have many")))
            }
            false => Ok(()),
        }
    }

    /// Counts a range of numbers, if it is a new one.
    pub(super) fn numbers(&mut self, schema: &Map<String, Value>, place: &Place) -> Result<(), Error> {
        let said: Vec<&Value> = NUMERIC.iter().filter_map(|keyword| schema.get(*keyword)).collect();
        if !self.ranges.insert(format!("{:?} {said:?}", schema.get("type"))) {
            return Ok(());
        }
        let digits = said.iter().filter_map(|value| value.as_f64()).map(|number| number.to_string().len());
        self.digits += digits.map(|digits| digits * digits).sum::<usize>();
        match self.digits > MAX_DIGIT_SQUARES {
            true => Err(place.refuse("there are too many different ranges of numbers")),
            false => Ok(()),
        }
    }

    pub(super) fn pairs(&mut self, options: usize, place: &Place) -> Result<(), Error> {
        self.pairs = self.pairs.saturating_add(options.saturating_mul(options));
        match self.pairs > MAX_PAIRS {
            true => Err(place.refuse("`oneOf` has too many options: use `anyOf`")),
            false => Ok(()),
        }
    }
}

/// A constant is written in one way, and must be exact in it.
pub(super) fn check_constant(value: &Value, place: &Place, budget: &mut Budget) -> Result<(), Error> {
    budget.spend(1, place)?;
    match value {
        Value::Null | Value::Bool(_) => Ok(()),
        Value::Number(_) => exact(value, place).map(|_| ()),
        Value::String(text) => check_text(text, place, budget),
        Value::Array(values) => {
            let below = deeper(place)?;
            values.iter().try_for_each(|value| check_constant(value, &below, budget))
        }
        Value::Object(members) => {
            let below = deeper(place)?;
            members.iter().try_for_each(|(name, value)| {
                check_text(name, &below, budget)?;
                check_constant(value, &below, budget)
            })
        }
    }
}

fn deeper(place: &Place) -> Result<Place, Error> {
    let below = Place { depth: place.depth + 1, ..place.clone() };
    match below.depth > super::MAX_DEPTH {
        true => Err(place.refuse("a value nests too deep")),
        false => Ok(below),
    }
}

pub(super) fn check_name(name: &str, place: &Place, budget: &mut Budget) -> Result<(), Error> {
    check_text(name, place, budget)
}

/// Control characters other than the common ones have no way of being written here.
fn check_text(text: &str, place: &Place, budget: &mut Budget) -> Result<(), Error> {
    budget.text(text, place)?;
    let odd = |c: char| c == '\u{7f}' || c < ' ' && !matches!(c, '\n' | '\r' | '\t' | '\u{8}' | '\u{c}');
    match text.chars().find(|&c| odd(c)) {
        Some(c) => Err(place.refuse(&format!("the character {c:?} in a name or text is not supported"))),
        None => Ok(()),
    }
}

/// A number that is the same as a decimal, in the schema and as a float.
fn exact(value: &Value, place: &Place) -> Result<f64, Error> {
    let number = value.as_f64().filter(|number| number.is_finite());
    let number = number.ok_or_else(|| place.refuse("it must be a number"))?;
    let decimal = number.to_string();
    let fraction = decimal.split_once('.').map_or(0, |(_, fraction)| fraction.len());
    match number.abs() >= EXACT || fraction > MAX_FRACTION {
        true => Err(place.refuse(&format!("the number {value} has too many digits to be kept exactly"))),
        false => Ok(number),
    }
}

pub(super) fn check_number(keyword: &str, value: &Value, place: &Place) -> Result<(), Error> {
    if keyword.starts_with("exclusive") && value.is_boolean() {
        return Ok(());
    }
    let number = exact(value, place)?;
    if keyword == "multipleOf" {
        // llguidance multiplies by ten until nothing is left behind the point.
        let digits = number.to_string().split_once('.').map_or(0, |(_, fraction)| fraction.len());
        let (mut whole, mut steps) = (number, 0);
        while whole.fract() != 0.0 && steps <= MAX_FRACTION {
            whole *= 10.0;
            steps += 1;
        }
        if number <= 0.0 {
            return Err(place.refuse("`multipleOf` must be above zero"));
        }
        if steps != digits || whole > f64::from(u32::MAX) {
            return Err(place.refuse(&format!("`multipleOf` {value} has too many digits")));
        }
    }
    Ok(())
}

/// A count, which may be written as a float.
pub(super) fn count(value: &Value, place: &Place) -> Result<Value, Error> {
    let whole = |number: f64| (number.fract() == 0.0 && number >= 0.0).then_some(number as u64);
    let count = value.as_u64().or_else(|| value.as_f64().and_then(whole));
    match count {
        Some(count) if count <= MAX_COUNT => Ok(count.into()),
        Some(_) => Err(place.refuse(&format!("the count {value} is above {MAX_COUNT}"))),
        None => Err(place.refuse("it must be a count")),
    }
}

/// An expression that llguidance can parse, and whose cost is within the budget.
pub(super) fn check_pattern(pattern: Option<&str>, place: &Place, budget: &mut Budget) -> Result<(), Error> {
    let pattern = pattern.ok_or_else(|| place.refuse("`pattern` must be a string"))?;
    if !budget.known.insert(pattern.to_owned()) {
        return Ok(());
    }
    budget.text(pattern, place)?;
    budget.patterns += 1;
    let mut builder = RegexBuilder::new();
    if let Err(error) = builder.mk_regex_for_serach(&regex_to_lark(pattern, "dw")) {
        let problem = last_line(&error.to_string());
        return Err(place.refuse(&format!("the pattern {pattern:?} is not supported ({problem})")));
    }
    budget.cost += builder.exprset().cost();
    match budget.patterns > MAX_PATTERNS || budget.cost > MAX_PATTERN_COST {
        true => Err(place.refuse("the patterns are too many or too complex")),
        false => Ok(()),
    }
}
