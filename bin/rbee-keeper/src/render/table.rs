//! Columns, fields and units.

use serde_json::Value;

use crate::printer::printable;

/// A table: a heading and rows, columns two spaces apart, nothing cut off. Only last columns have cells with
/// spaces in them, so that `awk` finds the others by number.
#[derive(Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column names.
    pub fn new(heading: &[&str]) -> Self {
        Self { rows: vec![heading.iter().map(ToString::to_string).collect()] }
    }

    /// Adds a row; an empty cell shows as `-`, so that columns can be counted.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells = cells.into_iter().map(|cell| if cell.is_empty() { "-".into() } else { one_line(&cell) });
        self.rows.push(cells.collect());
    }

    /// The text, each line with its newline and without trailing spaces.
    pub fn text(&self) -> String {
        align(&self.rows)
    }
}

/// Names and values below each other.
pub fn fields(rows: &[(&str, String)]) -> String {
    let shown = rows.iter().filter(|(_, value)| !value.is_empty());
    align(&shown.map(|(name, value)| vec![(*name).to_owned(), one_line(value)]).collect::<Vec<_>>())
}

fn one_line(text: &str) -> String {
    printable(text).replace(['\n', '\t'], " ")
}

fn align(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let line: Vec<String> = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// A JSON value in a cell.
pub fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Bytes in the largest unit that leaves a number of one or more.
pub fn bytes(count: u64) -> String {
    let mut number = count as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if number < 1024.0 {
            return if unit == "B" { format!("{count}B") } else { format!("{number:.1}{unit}") };
        }
        number /= 1024.0;
    }
    format!("{number:.1}TiB")
}

/// A span that a person reads at a glance.
pub fn age(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms}ms"),
        1_000..60_000 => format!("{}s", ms / 1_000),
        60_000..3_600_000 => format!("{}m{:02}s", ms / 60_000, ms / 1_000 % 60),
        3_600_000..86_400_000 => format!("{}h{:02}m", ms / 3_600_000, ms / 60_000 % 60),
        _ => format!("{}d{:02}h", ms / 86_400_000, ms / 3_600_000 % 24),
    }
}

/// Seconds since 1970 as a date and a time of day, UTC.
pub fn date(seconds: u64) -> String {
    // Years that begin in March, so that the day which is not always there comes last
    // (http://howardhinnant.github.io/date_algorithms.html, civil_from_days).
    let days = seconds / 86_400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let (hour, minute) = (seconds / 3600 % 24, seconds / 60 % 60);
    format!("{:04}-{month:02}-{day:02}T{hour:02}:{minute:02}Z", year + era * 400 + next)
}

/// Milliseconds as they were measured.
pub fn milliseconds(ms: f64) -> String {
    format!("{ms:.1} ms")
}
