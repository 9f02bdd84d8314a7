//! Closes the gaps that fuel leaves.
//!
//! minijinja charges for data once it exists. An operation that builds much from little by sharing (a
//! list added to itself, a long text joined a million times, a huge field width) would exhaust memory
//! before it is charged, and comparing lists of shared lists takes for ever. So values are *weighed*,
//! that is charged for all they contain, before such an operation: filters and methods by taking their
//! place, operators, subscripts and literals by a call written into the source around their operands,
//! output by the formatter. Start with [`install`] and [`weigh_operands`].

use minijinja::machinery::ast::{BinOpKind, CallArg, Expr, Stmt};
use minijinja::machinery::parse;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, StringInput, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value, filters, functions};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Functions that are written around operands and give back their argument: charged for all that it
/// contains, charged for its items only (the left side of `+`, which grows in loops), refused if it is
/// a list (`*`), or charged for the reading of it, plain strings too (comparisons, subscripts).
const WEIGHED: &str = "__weighed";
const SIZED: &str = "__sized";
const SCALAR: &str = "__scalar";
const READ: &str = "__read";
/// Items of a list that one unit of fuel pays for.
const ITEMS_PER_FUEL: usize = 2;
/// Nesting of a value that is turned into text.
const MAX_DEPTH: usize = 64;
/// Most digits of a field width in a format.
const MAX_WIDTH_DIGITS: usize = 3;
const MAX_WIDTH: usize = 1000;

/// Puts the weighing into an environment.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.add_function(WEIGHED, |state: &State, value: Value| {
        weigh(state, &value, 0)?;
        Ok::<_, Error>(value)
    });
    environment.add_function(SIZED, |state: &State, value: Value| {
        if matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
            // A list without a length is counted by walking it.
            let items = match value.len() {
                Some(items) => items,
                None => {
                    for _ in value.try_iter()? {
                        state.consume_fuel(1)?;
                    }
                    0
                }
            };
            state.consume_fuel((items / ITEMS_PER_FUEL) as u64)?;
        }
        Ok::<_, Error>(value)
    });
    environment.add_function(READ, |state: &State, value: Value| {
        weigh_inside(state, &value, 0)?;
        Ok::<_, Error>(value)
    });
    environment.add_function(SCALAR, |value: Value| match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            Err(Error::new(ErrorKind::InvalidOperation, "a list cannot be repeated"))
        }
        _ => Ok(value),
    });
    environment.set_formatter(|out: &mut Output, state: &mut State, value: &Value| {
        weigh(state, value, 0)?;
        minijinja::escape_formatter(out, state, value)
    });
    environment.add_filter(
        "join",
        |state: &mut State,
         value: &Value,
         joiner: Option<StringInput<'_>>,
         attribute: Option<&str>,
         options: Kwargs| {
            weigh(state, value, 0)?;
            filters::join(state, value, joiner, attribute, options)
        },
    );
    environment.add_filter("string", |state: &State, value: Value| {
        weigh(state, &value, 0)?;
        Ok::<_, Error>(match value.kind() {
            ValueKind::String => value,
            _ => Value::from(value.to_string()),
        })
    });
    environment.add_function("dict", |state: &State, value: Option<Value>, options: Kwargs| {
        for name in options.args() {
            weigh(state, &options.peek::<Value>(name)?, 0)?;
        }
        functions::dict(value, options)
    });
    environment.set_unknown_method_callback(method);
    // These share or format values without a charge, and no chat template is known to use them.
    for name in ["sum", "format", "pprint", "chain", "zip", "batch", "slice"] {
        environment.remove_filter(name);
    }
    for name in ["lower", "upper", "startingwith", "endingwith"] {
        environment.remove_test(name);
    }
}

/// Python's methods, with the two that build much from little charged first.
fn method(state: &mut State, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    // The engine charges for the result of a method; looking through a text has its price too.
    state.consume_fuel(units(value.as_str().map_or(0, str::len)))?;
    match (name, value.as_str()) {
        ("join", Some(_)) => {
            for argument in arguments {
                weigh(state, argument, 0)?;
            }
        }
        ("format", Some(format)) => check_format(state, format, arguments)?,
        _ => {}
    }
    unknown_method_callback(state, value, name, arguments)
}

/// Field widths must be small and written out.
fn check_format(state: &State, format: &str, arguments: &[Value]) -> Result<(), Error> {
    let mut digits = 0;
    let mut open = 0usize;
    let mut fields = 0usize;
    for byte in format.bytes() {
        digits = if byte.is_ascii_digit() { digits + 1 } else { 0 };
        match byte {
            b'{' => {
                open += 1;
                fields += 1;
            }
            b'}' => open = 0,
            b':' if open > 0 => open = 2,
            _ => {}
        }
        if digits > MAX_WIDTH_DIGITS || open > 2 {
            return Err(Error::new(ErrorKind::InvalidOperation, "format: a field is too wide"));
        }
    }
    // Every field may write every argument.
    for _ in 0..fields {
        for argument in arguments {
            weigh_inside(state, argument, 0)?;
        }
    }
    state.consume_fuel(units(fields.saturating_mul(MAX_WIDTH)))
}

/// Charges for every text and item in a value. Scalars and plain strings are free: what they are used
/// for is charged by the engine.
fn weigh(state: &State, value: &Value, depth: usize) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable | ValueKind::Map if depth > MAX_DEPTH => {
            Err(Error::new(ErrorKind::InvalidOperation, "value is nested too deeply"))
        }
        ValueKind::Seq | ValueKind::Iterable => {
            for item in value.try_iter()? {
                state.consume_fuel(1)?;
                weigh_inside(state, &item, depth)?;
            }
            Ok(())
        }
        ValueKind::Map => {
            for key in value.try_iter()? {
                state.consume_fuel(1)?;
                weigh_inside(state, &key, depth)?;
                weigh_inside(state, &value.get_item(&key)?, depth)?;
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// As [`weigh`], with plain strings charged too.
fn weigh_inside(state: &State, value: &Value, depth: usize) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => state.consume_fuel(1 + units(text.len())),
        None => weigh(state, value, depth + 1),
    }
}

/// One unit of fuel is 64 bytes.
fn units(bytes: usize) -> u64 {
    bytes as u64 / 64
}

/// The source with operands of `+` and `~` weighed wherever they may be containers.
pub(super) fn weigh_operands(source: &str, syntax: SyntaxConfig) -> Result<String, Error> {
    let tree = parse(source, "default", syntax)?;
    let mut wraps = Wraps { source, inserts: Vec::new() };
    wraps.statement(&tree)?;
    // At one place closing comes before opening; the order of equal inserts does not matter.
    wraps.inserts.sort_by_key(|&(at, kind)| (at, kind != Insert::Close));
    let mut out = String::with_capacity(source.len() + wraps.inserts.len() * WEIGHED.len());
    let mut from = 0;
    for (at, kind) in wraps.inserts {
        out.push_str(&source[from..at]);
        match kind {
            Insert::Open(function) => {
                // A word such as `in` may stand before it.
                out.push(' ');
                out.push_str(function);
                out.push('(');
            }
            Insert::Close => out.push(')'),
        }
        from = at;
    }
    out.push_str(&source[from..]);
    Ok(out)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Insert {
    Open(&'static str),
    Close,
}

/// Walks a template and collects where calls go.
struct Wraps<'s> {
    source: &'s str,
    inserts: Vec<(usize, Insert)>,
}

impl Wraps<'_> {
    fn statements(&mut self, statements: &[Stmt<'_>]) -> Result<(), Error> {
        statements.iter().try_for_each(|s| self.statement(s))
    }

    fn statement(&mut self, statement: &Stmt<'_>) -> Result<(), Error> {
        match statement {
            Stmt::Template(template) => self.statements(&template.children),
            Stmt::EmitExpr(emit) => self.expression(&emit.expr),
            Stmt::EmitRaw(_) | Stmt::Continue(_) | Stmt::Break(_) => Ok(()),
            Stmt::ForLoop(each) => {
                self.expression(&each.iter)?;
                self.maybe(&each.filter_expr)?;
                self.statements(&each.body)?;
                self.statements(&each.else_body)
            }
            Stmt::IfCond(branch) => {
                self.expression(&branch.expr)?;
                self.statements(&branch.true_body)?;
                self.statements(&branch.false_body)
            }
            Stmt::WithBlock(with) => {
                for (_, value) in &with.assignments {
                    self.expression(value)?;
                }
                self.statements(&with.body)
            }
            Stmt::Set(set) => {
                self.expression(&set.target)?;
                self.expression(&set.expr)
            }
            Stmt::SetBlock(set) => {
                self.maybe(&set.filter)?;
                self.statements(&set.body)
            }
            Stmt::AutoEscape(escape) => {
                self.expression(&escape.enabled)?;
                self.statements(&escape.body)
            }
            Stmt::FilterBlock(filter) => {
                self.expression(&filter.filter)?;
                self.statements(&filter.body)
            }
            Stmt::Block(block) => self.statements(&block.body),
            Stmt::Macro(definition) => {
                self.expressions(&definition.defaults)?;
                self.statements(&definition.body)
            }
            Stmt::CallBlock(block) => {
                self.expression(&block.call.expr)?;
                self.arguments(&block.call.args)?;
                self.expressions(&block.macro_decl.defaults)?;
                self.statements(&block.macro_decl.body)
            }
            Stmt::Do(call) => {
                self.expression(&call.call.expr)?;
                self.arguments(&call.call.args)
            }
            Stmt::Import(_) | Stmt::FromImport(_) | Stmt::Extends(_) | Stmt::Include(_) => {
                Err(odd("it refers to other templates"))
            }
        }
    }

    fn expressions(&mut self, expressions: &[Expr<'_>]) -> Result<(), Error> {
        expressions.iter().try_for_each(|e| self.expression(e))
    }

    fn maybe(&mut self, expression: &Option<Expr<'_>>) -> Result<(), Error> {
        expression.iter().try_for_each(|e| self.expression(e))
    }

    fn arguments(&mut self, arguments: &[CallArg<'_>]) -> Result<(), Error> {
        arguments.iter().try_for_each(|argument| match argument {
            CallArg::Pos(e) | CallArg::Kwarg(_, e) | CallArg::PosSplat(e) | CallArg::KwargSplat(e) => {
                self.expression(e)
            }
        })
    }

    fn expression(&mut self, expression: &Expr<'_>) -> Result<(), Error> {
        match expression {
            Expr::Var(_) | Expr::Const(_) => Ok(()),
            Expr::Slice(slice) => {
                self.read(&slice.expr)?;
                self.expression(&slice.expr)?;
                self.maybe(&slice.start)?;
                self.maybe(&slice.stop)?;
                self.maybe(&slice.step)
            }
            Expr::UnaryOp(unary) => self.expression(&unary.expr),
            Expr::BinOp(operation) => {
                let span = operation.span();
                let (start, end) = (span.start_offset as usize, span.end_offset as usize);
                let (left, right) = (&operation.left, &operation.right);
                match operation.op {
                    BinOpKind::Add if !is_text(left) && !is_text(right) => {
                        self.operands(start, left, '+', end, [Some(SIZED), Some(WEIGHED)])?;
                    }
                    BinOpKind::Mul => {
                        let calls = [left, right].map(|side| (!is_text(side)).then_some(SCALAR));
                        self.operands(start, left, '*', end, calls)?;
                    }
                    BinOpKind::Concat => {
                        let calls = [left, right].map(|side| (!is_text(side)).then_some(WEIGHED));
                        self.operands(start, left, '~', end, calls)?;
                    }
                    BinOpKind::Eq | BinOpKind::Ne if is_text(left) => {}
                    BinOpKind::Eq
                    | BinOpKind::Ne
                    | BinOpKind::Lt
                    | BinOpKind::Lte
                    | BinOpKind::Gt
                    | BinOpKind::Gte
                    | BinOpKind::In
                        if !is_text(right) =>
                    {
                        self.compared(left, end)?;
                    }
                    _ => {}
                }
                self.expression(left)?;
                self.expression(right)
            }
            Expr::Compare(_) => Err(odd("a chain of comparisons")),
            Expr::IfExpr(branch) => {
                self.expression(&branch.test_expr)?;
                self.expression(&branch.true_expr)?;
                self.maybe(&branch.false_expr)
            }
            Expr::Filter(filter) => {
                self.maybe(&filter.expr)?;
                self.arguments(&filter.args)
            }
            Expr::Test(test) => {
                self.expression(&test.expr)?;
                self.arguments(&test.args)
            }
            Expr::GetAttr(get) => self.expression(&get.expr),
            Expr::GetItem(get) => {
                if !matches!(get.subscript_expr.as_const(), Some(key) if key.kind() == ValueKind::String) {
                    self.read(&get.expr)?;
                    self.subscript(&get.expr, expression.span().end_offset as usize)?;
                }
                self.expression(&get.expr)?;
                self.expression(&get.subscript_expr)
            }
            Expr::Call(call) => {
                self.expression(&call.expr)?;
                self.arguments(&call.args)
            }
            Expr::List(list) => {
                self.literal(expression, &list.items)?;
                self.expressions(&list.items)
            }
            Expr::Tuple(tuple) => {
                self.literal(expression, &tuple.items)?;
                self.expressions(&tuple.items)
            }
            Expr::Map(map) => {
                self.literal(expression, &map.values)?;
                self.literal(expression, &map.keys)?;
                self.expressions(&map.keys)?;
                self.expressions(&map.values)
            }
        }
    }

    /// The place of the operator or bracket behind an expression, which may stand in parentheses.
    fn behind(&self, expression: &Expr<'_>, end: usize) -> Result<usize, Error> {
        let from = expression.span().end_offset as usize;
        self.source
            .get(from..end)
            .and_then(|rest| rest.find(|c: char| !c.is_whitespace() && c != ')'))
            .map(|skipped| from + skipped)
            .ok_or_else(|| odd("an operator in an odd place"))
    }

    fn wrap(&mut self, call: &'static str, from: usize, to: usize) {
        self.inserts.push((from, Insert::Open(call)));
        self.inserts.push((to, Insert::Close));
    }

    /// Wraps the right side of a comparison: its length bounds the work.
    fn compared(&mut self, left: &Expr<'_>, end: usize) -> Result<(), Error> {
        let at = self.behind(left, end)?;
        let rest = &self.source[at..end];
        let operator = match rest.strip_prefix("not") {
            Some(behind) => rest.len() - behind.trim_start().len() + "in".len(),
            None => ["==", "!=", "<=", ">=", "<", ">", "in"]
                .into_iter()
                .find(|operator| rest.starts_with(operator))
                .map(str::len)
                .ok_or_else(|| odd("a comparison in an odd place"))?,
        };
        self.wrap(READ, at + operator, end);
        Ok(())
    }

    /// Wraps a value that is looked into by position.
    fn read(&mut self, value: &Expr<'_>) -> Result<(), Error> {
        let end = value.span().end_offset as usize;
        let mut start = innermost(value).span().start_offset as usize;
        // The innermost value may stand in parentheses that its span leaves out.
        while open_parentheses(&self.source[start..end]) < 0 {
            let before = self.source[..start].trim_end();
            if !before.ends_with('(') {
                return Err(odd("a subscript in an odd place"));
            }
            start = before.len() - 1;
        }
        self.wrap(READ, start, end);
        Ok(())
    }

    /// Wraps what stands between brackets.
    fn subscript(&mut self, value: &Expr<'_>, end: usize) -> Result<(), Error> {
        let at = self.behind(value, end)?;
        match self.source[at..end].starts_with('[') && self.source[at..end].ends_with(']') {
            true => {
                self.wrap(READ, at + 1, end - 1);
                Ok(())
            }
            false => Err(odd("a subscript in an odd place")),
        }
    }

    /// Wraps a literal that holds other values: nesting shared ones doubles their size each time.
    fn literal(&mut self, literal: &Expr<'_>, items: &[Expr<'_>]) -> Result<(), Error> {
        if items.iter().any(|item| !is_text(item)) {
            let (start, end) = (literal.span().start_offset as usize, literal.span().end_offset as usize);
            if !self.source[start..end].starts_with(['(', '[', '{']) {
                return Err(odd("a tuple without parentheses"));
            }
            self.wrap(WEIGHED, start, end);
        }
        Ok(())
    }

    /// Wraps the two sides of an operator that stands behind `left`.
    fn operands(
        &mut self,
        start: usize,
        left: &Expr<'_>,
        operator: char,
        end: usize,
        calls: [Option<&'static str>; 2],
    ) -> Result<(), Error> {
        let at = self.behind(left, end)?;
        if !self.source[at..].starts_with(operator) {
            return Err(odd("an operator in an odd place"));
        }
        for (call, from, to) in [(calls[0], start, at), (calls[1], at + 1, end)] {
            if let Some(call) = call {
                self.wrap(call, from, to);
            }
        }
        Ok(())
    }
}

/// What a chain of attributes, subscripts, calls and filters begins with. The spans of such a chain
/// begin at its last link.
fn innermost<'e, 'a>(expression: &'e Expr<'a>) -> &'e Expr<'a> {
    match expression {
        Expr::GetAttr(get) => innermost(&get.expr),
        Expr::GetItem(get) => innermost(&get.expr),
        Expr::Slice(slice) => innermost(&slice.expr),
        Expr::Call(call) => innermost(&call.expr),
        Expr::Filter(filter) => filter.expr.as_ref().map_or(expression, innermost),
        Expr::Test(test) => innermost(&test.expr),
        _ => expression,
    }
}

/// Opening less closing parentheses outside of string literals.
fn open_parentheses(text: &str) -> i32 {
    let mut open = 0;
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '(' => open += 1,
            ')' => open -= 1,
            quote @ ('\'' | '"') => {
                while let Some(letter) = letters.next() {
                    match letter {
                        '\\' => drop(letters.next()),
                        _ if letter == quote => break,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    open
}

fn odd(what: &'static str) -> Error {
    Error::new(ErrorKind::SyntaxError, what)
}

/// Whether an expression can only be a string or a number, or fails.
fn is_text(expression: &Expr<'_>) -> bool {
    match expression {
        Expr::Const(constant) => constant.value.kind() != ValueKind::Seq,
        Expr::BinOp(operation) => match operation.op {
            BinOpKind::Concat => true,
            BinOpKind::Add => is_text(&operation.left) || is_text(&operation.right),
            _ => false,
        },
        _ => false,
    }
}
