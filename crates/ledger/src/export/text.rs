//! The formats that are text: a table, CSV, JSON.
//!
//! Owns how each cell is spelled. Decimals are written out in full: no exponent, no rounding by a binary float.

use std::io::Write;

use super::{Cell, Column, ExportError, Line, MAX_TABLE, Request, Sink};
use crate::date;
use crate::money::decimal;

/// A cell as text; JSON and CSV agree on numbers.
pub(super) fn plain(cell: &Cell) -> String {
    match cell {
        Cell::Null => String::new(),
        Cell::Text(text) => text.clone(),
        Cell::Time(micros) => date::rfc3339(*micros),
        Cell::Count(n) => n.to_string(),
        Cell::Picos(picos) => decimal(*picos),
        Cell::Float(x) => x.to_string(),
    }
}

/// Quoted where RFC 4180 wants it.
pub(super) fn csv_field(text: &str) -> String {
    if text.contains(['"', ',', '\n', '\r']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.into()
    }
}

pub(super) fn csv_line<T: AsRef<str>>(
    out: &mut dyn Write,
    fields: impl IntoIterator<Item = T>,
) -> std::io::Result<()> {
    let fields: Vec<String> = fields.into_iter().map(|field| csv_field(field.as_ref())).collect();
    writeln!(out, "{}", fields.join(","))
}

fn cells(columns: &[Column], line: &Line) -> Vec<Cell> {
    columns.iter().map(|column| (column.read)(line)).collect()
}

pub(super) struct Csv<'a> {
    columns: Vec<Column>,
    out: &'a mut (dyn Write + Send),
}

impl<'a> Csv<'a> {
    pub(super) fn new(columns: Vec<Column>, out: &'a mut (dyn Write + Send)) -> Result<Self, ExportError> {
        csv_line(out, columns.iter().map(|column| column.name))?;
        Ok(Self { columns, out })
    }
}

impl Sink for Csv<'_> {
    fn line(&mut self, line: &Line) -> Result<(), ExportError> {
        Ok(csv_line(self.out, cells(&self.columns, line).iter().map(plain))?)
    }

    fn end(&mut self) -> Result<(), ExportError> {
        Ok(self.out.flush()?)
    }
}

pub(super) struct Json<'a> {
    columns: Vec<Column>,
    out: &'a mut (dyn Write + Send),
    lines: u64,
}

impl<'a> Json<'a> {
    pub(super) fn new(
        columns: Vec<Column>,
        request: &Request<'_>,
        out: &'a mut (dyn Write + Send),
    ) -> Result<Self, ExportError> {
        let (from, to) = (date::rfc3339(request.query.from), date::rfc3339(request.query.to));
        write!(out, "{{\"object\":\"usage\",\"from\":\"{from}\",\"to\":\"{to}\",\"data\":[")?;
        Ok(Self { columns, out, lines: 0 })
    }
}

/// A cell as JSON. Every decimal is a JSON number as it stands.
fn json(cell: &Cell) -> String {
    match cell {
        Cell::Null => "null".to_owned(),
        Cell::Text(_) | Cell::Time(_) => serde_json::Value::from(plain(cell)).to_string(),
        _ => plain(cell),
    }
}

impl Sink for Json<'_> {
    fn line(&mut self, line: &Line) -> Result<(), ExportError> {
        let cells = cells(&self.columns, line);
        let fields: Vec<String> = self
            .columns
            .iter()
            .zip(&cells)
            .map(|(column, cell)| format!("\"{}\":{}", column.name, json(cell)))
            .collect();
        let comma = if self.lines > 0 { "," } else { "" };
        self.lines += 1;
        Ok(write!(self.out, "{comma}\n{{{}}}", fields.join(","))?)
    }

    fn end(&mut self) -> Result<(), ExportError> {
        writeln!(self.out, "\n]}}")?;
        Ok(self.out.flush()?)
    }
}

pub(super) struct Table<'a> {
    columns: Vec<Column>,
    out: &'a mut (dyn Write + Send),
    lines: Vec<Vec<String>>,
}

impl<'a> Table<'a> {
    pub(super) fn new(columns: Vec<Column>, out: &'a mut (dyn Write + Send)) -> Self {
        Self { columns, out, lines: Vec::new() }
    }
}

/// A moment without what every moment of a table has: `T`, seconds that are none, `Z`.
fn short(cell: &Cell) -> String {
    let text = plain(cell);
    match cell {
        Cell::Time(_) => {
            let text = text.trim_end_matches('Z');
            text.strip_suffix(":00").unwrap_or(text).replace('T', " ")
        }
        _ => text,
    }
}

impl Sink for Table<'_> {
    fn line(&mut self, line: &Line) -> Result<(), ExportError> {
        if self.lines.len() >= MAX_TABLE {
            return Err(ExportError::TooLong);
        }
        self.lines.push(cells(&self.columns, line).iter().map(short).collect());
        Ok(())
    }

    fn end(&mut self) -> Result<(), ExportError> {
        let names: Vec<String> = self.columns.iter().map(|column| column.name.to_owned()).collect();
        let width = |i: usize| {
            let all = std::iter::once(&names).chain(&self.lines);
            all.map(|line| line[i].chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..names.len()).map(width).collect();
        for line in std::iter::once(&names).chain(&self.lines) {
            let mut text = String::new();
            for ((field, width), column) in line.iter().zip(&widths).zip(&self.columns) {
                let pad = " ".repeat(width - field.chars().count());
                let left = matches!(column.kind, super::Kind::Text | super::Kind::Time);
                text += &if left { format!("{field}{pad}  ") } else { format!("{pad}{field}  ") };
            }
            writeln!(self.out, "{}", text.trim_end())?;
        }
        Ok(self.out.flush()?)
    }
}
