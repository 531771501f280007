//! Sums for people and for other systems: which columns there are, what is in them, and in which format.
//!
//! Owns the one table of columns and the reading of sums page by page, so an export of any size needs bounded
//! memory. No format ever holds a user.

mod focus;
#[cfg(feature = "parquet")]
mod parquet;
mod text;

use std::io::{self, Write};

use crate::error::StoreError;
use crate::money::Money;
use crate::price::PriceBook;
use crate::store::{Grouping, Store, UsageQuery, UsageRow, for_each_usage};

/// Sums read at a time.
const PAGE: u32 = 4096;
/// Most lines of a table for people.
pub const MAX_TABLE: usize = 10_000;

/// How an export is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Columns for people, right under one another.
    Table,
    /// RFC 4180 with a header.
    Csv,
    /// One object with the lines in `data`.
    Json,
    /// Columnar, for analysis.
    #[cfg(feature = "parquet")]
    Parquet,
    /// CSV with FOCUS 1.3 columns: a line for each bucket, application, model and kind of token.
    Focus,
}

/// From energy at the device to what a request weighs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Footprint {
    /// Power usage effectiveness: energy of the whole site for each joule of the machine, at least 1.
    pub pue: f64,
    /// Of the grid: kg of CO2 equivalent for each kWh.
    pub kg_per_kwh: f64,
}

impl Footprint {
    /// kWh of the site and kg of CO2 equivalent for so much energy of devices, in the units of OpenGateLLM.
    pub fn impacts(&self, microjoules: u64) -> (f64, f64) {
        let kwh = microjoules as f64 / 3.6e12 * self.pue;
        (kwh, kwh * self.kg_per_kwh)
    }
}

/// What to export.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// Which rows, by which buckets and groups. Its page and limit are of no matter.
    pub query: UsageQuery,
    /// Prices; without them there are no costs.
    pub prices: Option<&'a PriceBook>,
    /// For impacts; without it there are none.
    pub footprint: Option<Footprint>,
    /// Who is billed, for FOCUS.
    pub account: String,
}

/// An export did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What was written could not be.
    #[error("cannot write: {0}")]
    Write(#[from] io::Error),
    /// Nobody reads such a table.
    #[error("more than {MAX_TABLE} lines: choose a shorter time, a wider bucket or another format")]
    TooLong,
}

/// One line: sums of a bucket and group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Line {
    sums: UsageRow,
    /// The bucket's end.
    end: i64,
    cost: Option<Money>,
    /// Requests whose model or list has no price.
    unpriced: u64,
}

/// A value of a line.
#[derive(Clone, Debug, PartialEq)]
enum Cell {
    Null,
    Text(String),
    /// Microseconds since 1970.
    Time(i64),
    Count(u64),
    /// In units of 1e-12.
    Picos(i128),
    Float(f64),
}

/// Which of the kinds of cells a column has.
#[cfg_attr(not(feature = "parquet"), allow(dead_code))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    Time,
    Count,
    Picos,
    Float,
}

type Read = Box<dyn Fn(&Line) -> Cell>;

struct Column {
    name: &'static str,
    #[cfg_attr(not(feature = "parquet"), allow(dead_code))]
    kind: Kind,
    read: Read,
}

/// What was exported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exported {
    /// Lines.
    pub lines: u64,
    /// Requests in them.
    pub requests: u64,
    /// Requests that still run, and are in no sum.
    pub open: u64,
    /// Requests without a price, where there are prices.
    pub unpriced: u64,
}

/// A format's writer.
trait Sink {
    fn line(&mut self, line: &Line) -> Result<(), ExportError>;
    fn end(&mut self) -> Result<(), ExportError>;
}

fn micros(name: &'static str, read: fn(&UsageRow) -> u64) -> Column {
    Column {
        name,
        kind: Kind::Picos,
        read: Box::new(move |line| Cell::Picos(i128::from(read(&line.sums)) * 1_000_000)),
    }
}

fn count(name: &'static str, read: fn(&UsageRow) -> u64) -> Column {
    Column { name, kind: Kind::Count, read: Box::new(move |line| Cell::Count(read(&line.sums))) }
}

fn name(name: &'static str, read: fn(&UsageRow) -> &String) -> Column {
    Column { name, kind: Kind::Text, read: Box::new(move |line| Cell::Text(read(&line.sums).clone())) }
}

/// The columns of every format but FOCUS.
fn columns(request: &Request<'_>) -> Vec<Column> {
    let by = request.query.group_by;
    let mut all = vec![
        Column { name: "start", kind: Kind::Time, read: Box::new(|line| Cell::Time(line.sums.start)) },
        Column { name: "end", kind: Kind::Time, read: Box::new(|line| Cell::Time(line.end)) },
    ];
    all.extend(by.application.then(|| name("application", |sums| &sums.application)));
    all.extend(by.key_id.then(|| name("key_id", |sums| &sums.key_id)));
    all.extend(by.model.then(|| name("model", |sums| &sums.model)));
    all.extend(by.price_version.then(|| name("price_version", |sums| &sums.price_version)));
    all.extend([
        count("requests", |sums| sums.requests),
        count("open_requests", |sums| sums.open),
        count("prompt_tokens", |sums| sums.prompt_tokens),
        count("cached_tokens", |sums| sums.cached_tokens),
        count("completion_tokens", |sums| sums.completion_tokens),
        count("reasoning_tokens", |sums| sums.reasoning_tokens),
        count("wasted_tokens", |sums| sums.wasted_tokens),
        micros("gpu_seconds", |sums| sums.gpu_micros),
        micros("energy_joules", |sums| sums.energy_microjoules),
        micros("measured_joules", |sums| sums.measured_microjoules),
    ]);
    if let Some(footprint) = request.footprint {
        let impact = move |name, pick: fn((f64, f64)) -> f64| Column {
            name,
            kind: Kind::Float,
            read: Box::new(move |line: &Line| {
                Cell::Float(pick(footprint.impacts(line.sums.energy_microjoules)))
            }),
        };
        all.extend([impact("kWh", |both| both.0), impact("kgCO2eq", |both| both.1)]);
    }
    if let Some(book) = request.prices {
        let currency = book.currency().to_owned();
        all.extend([
            Column {
                name: "cost",
                kind: Kind::Picos,
                read: Box::new(|line| line.cost.map_or(Cell::Null, |cost| Cell::Picos(cost.picos()))),
            },
            Column {
                name: "currency",
                kind: Kind::Text,
                read: Box::new(move |_| Cell::Text(currency.clone())),
            },
            Column {
                name: "unpriced_requests",
                kind: Kind::Count,
                read: Box::new(|line| Cell::Count(line.unpriced)),
            },
        ]);
    }
    all
}

/// Whether two sums go into one line.
fn same_line(request: &Request<'_>, one: &UsageRow, other: &UsageRow) -> bool {
    let by = request.query.group_by;
    one.start == other.start
        && one.application == other.application
        && one.key_id == other.key_id
        && (!by.model || one.model == other.model)
        && (!by.price_version || one.price_version == other.price_version)
}

/// The line of one sum.
fn line(request: &Request<'_>, sums: UsageRow) -> Line {
    let query = &request.query;
    let width = query.bucket.max(1);
    let end = (sums.start / width).saturating_add(1).saturating_mul(width).min(query.to);
    let cost =
        request.prices.and_then(|book| book.version(&sums.price_version)?.of(&sums.model, &sums.work()));
    let unpriced = if cost.is_none() { sums.requests } else { 0 };
    Line { sums, end, cost, unpriced }
}

/// Reads the lines in order. Costs need sums for each model and list; those of one line follow one another.
fn for_each_line(
    store: &mut dyn Store,
    request: &Request<'_>,
    mut each: impl FnMut(&Line) -> Result<(), ExportError>,
) -> Result<(), ExportError> {
    let mut query = UsageQuery { closed_only: true, after: None, ..request.query.clone() };
    if let Some(book) = request.prices {
        query.price_lists =
            book.lists().iter().map(|list| (list.valid_from(), list.version().to_owned())).collect();
        (query.group_by.model, query.group_by.price_version) = (true, true);
    }
    let mut held: Option<Line> = None;
    for_each_usage(store, &query, PAGE, |sums| {
        let next = line(request, sums);
        match &mut held {
            Some(line) if same_line(request, &line.sums, &next.sums) => {
                line.sums.add(&next.sums);
                line.unpriced += next.unpriced;
                line.cost = match (line.cost, next.cost) {
                    (Some(one), Some(other)) => Some(one + other),
                    (one, other) => one.or(other),
                };
                Ok(())
            }
            _ => held.replace(next).as_ref().map_or(Ok(()), &mut each),
        }
    })?;
    held.as_ref().map_or(Ok(()), each)
}

/// Exports sums of closed rows.
///
/// # Errors
/// The store failed, the output could not be written, or a table is too long.
pub fn export(
    store: &mut dyn Store,
    request: &Request<'_>,
    format: Format,
    out: &mut (dyn Write + Send),
) -> Result<Exported, ExportError> {
    let mut request = request.clone();
    if format == Format::Focus {
        // Its lines are by these, and by no other.
        request.query.group_by =
            Grouping { application: true, key_id: false, model: true, price_version: true };
    }
    let request = &request;
    let mut sink: Box<dyn Sink + '_> = match format {
        Format::Table => Box::new(text::Table::new(columns(request), out)),
        Format::Csv => Box::new(text::Csv::new(columns(request), out)?),
        Format::Json => Box::new(text::Json::new(columns(request), request, out)?),
        #[cfg(feature = "parquet")]
        Format::Parquet => Box::new(parquet::Parquet::new(columns(request), out)?),
        Format::Focus => Box::new(focus::Focus::new(request, out)?),
    };
    let mut done = Exported::default();
    for_each_line(store, request, |line| {
        done.lines += 1;
        done.requests += line.sums.requests;
        done.open += line.sums.open;
        done.unpriced += if request.prices.is_some() { line.unpriced } else { 0 };
        sink.line(line)
    })?;
    sink.end()?;
    Ok(done)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
