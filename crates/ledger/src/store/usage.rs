//! Sums over rows, for usage queries and for reconciliation with metrics.
//!
//! Owns the one query; formats belong to who asks. A row counts where it arrived, however long it ran.

use super::sql::{Sql, SqlStore, take, text};
use crate::error::StoreError;
use crate::price::Work;
use crate::value::Value;

/// Most values of one filter.
pub const MAX_FILTER: usize = 100;

/// What sums are kept apart by, beside time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Grouping {
    /// Who pays.
    pub application: bool,
    /// With which key.
    pub key_id: bool,
    /// Which model.
    pub model: bool,
    /// By which price list.
    pub price_version: bool,
}

impl Grouping {
    /// By everything.
    pub const ALL: Self = Self { application: true, key_id: true, model: true, price_version: true };
}

/// The place of a sum in the order of sums, to go on after it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UsageKey {
    /// The bucket's number.
    bucket: i64,
    /// The application, key, model and price list; empty where not asked for.
    names: [String; 4],
}

/// Which rows to sum, and how finely.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageQuery {
    /// Arrival at or after this, microseconds since 1970, from 0.
    pub from: i64,
    /// Arrival before this.
    pub to: i64,
    /// Width of a bucket, microseconds; buckets begin at multiples of it, so those of a day at midnight UTC.
    pub bucket: i64,
    /// What is kept apart.
    pub group_by: Grouping,
    /// Only rows of these applications; all if empty. At most [`MAX_FILTER`], as each filter.
    pub applications: Vec<String>,
    /// Only rows of these keys.
    pub key_ids: Vec<String>,
    /// Only rows of these models.
    pub models: Vec<String>,
    /// Beginnings and names of price lists, the earliest first, at most [`MAX_FILTER`]: a row that names no list
    /// counts to the one that was in force when it arrived.
    pub price_lists: Vec<(i64, String)>,
    /// Whether what still runs is left out of all sums but [`UsageRow::open`]. What has ended is final.
    pub closed_only: bool,
    /// Only what follows this in the order of buckets, applications, keys, models and price lists.
    pub after: Option<UsageKey>,
    /// At most so many sums.
    pub limit: u32,
}

impl UsageQuery {
    /// Everything, in one bucket.
    pub const ALL: Self = Self {
        from: 0,
        to: i64::MAX,
        bucket: i64::MAX,
        group_by: Grouping { price_version: false, ..Grouping::ALL },
        applications: Vec::new(),
        key_ids: Vec::new(),
        models: Vec::new(),
        price_lists: Vec::new(),
        closed_only: false,
        after: None,
        limit: u32::MAX,
    };
}

/// The sums of one bucket and group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UsageRow {
    /// The bucket's begin, microseconds since 1970; that of the query if the query begins within the bucket.
    pub start: i64,
    /// Who; empty if not asked for.
    pub application: String,
    /// With which key.
    pub key_id: String,
    /// Which model.
    pub model: String,
    /// By which price list; empty also where a row has none.
    pub price_version: String,
    /// Requests that are summed.
    pub requests: u64,
    /// Requests that still run, whether they are summed or not.
    pub open: u64,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Those of them that were not computed again.
    pub cached_tokens: u64,
    /// Tokens of answers.
    pub completion_tokens: u64,
    /// Those of them that were reasoning.
    pub reasoning_tokens: u64,
    /// Computed and not delivered.
    pub wasted_tokens: u64,
    /// Device microseconds.
    pub gpu_micros: u64,
    /// Microjoules.
    pub energy_microjoules: u64,
    /// Those of them that a device's counter measured; the rest is estimated.
    pub measured_microjoules: u64,
}

impl UsageRow {
    /// Where it stands, to go on after it.
    pub fn key(&self, bucket: i64) -> UsageKey {
        UsageKey {
            bucket: self.start / bucket.max(1),
            names: [&self.application, &self.key_id, &self.model, &self.price_version].map(Clone::clone),
        }
    }

    /// What is paid for.
    pub const fn work(&self) -> Work {
        Work {
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens,
            completion_tokens: self.completion_tokens,
            gpu_micros: self.gpu_micros,
        }
    }

    /// Adds another's sums.
    pub fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.open += other.open;
        self.prompt_tokens += other.prompt_tokens;
        self.cached_tokens += other.cached_tokens;
        self.completion_tokens += other.completion_tokens;
        self.reasoning_tokens += other.reasoning_tokens;
        self.wasted_tokens += other.wasted_tokens;
        self.gpu_micros += other.gpu_micros;
        self.energy_microjoules += other.energy_microjoules;
        self.measured_microjoules += other.measured_microjoules;
    }
}

/// Columns that are summed.
const SUMS: [&str; 8] = [
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "reasoning_tokens",
    "wasted_tokens",
    "gpu_micros",
    "energy_microjoules",
    "CASE WHEN energy_method = 'nvml' THEN energy_microjoules ELSE 0 END",
];

/// The statement, with its parameters. Groups have names of their own (`a` and so on): a column of the same name
/// would be taken for them.
fn statement(query: &UsageQuery) -> (String, Vec<Value>) {
    let by = &query.group_by;
    let mut params = vec![Value::Int(query.bucket.max(1)), Value::Int(query.from), Value::Int(query.to)];
    let mut list = String::new();
    for (from, name) in query.price_lists.iter().rev().filter(|_| by.price_version) {
        params.extend([Value::Int(*from), text(name)]);
        list += &format!(" WHEN queued_at >= ${} THEN ${}", params.len() - 1, params.len());
    }
    let list = if list.is_empty() { "''".to_owned() } else { format!("CASE{list} ELSE '' END") };
    let list = format!("COALESCE(price_version, {list})");
    let dimensions = [
        (by.application, "application", "a"),
        (by.key_id, "key_id", "k"),
        (by.model, "model", "m"),
        (by.price_version, list.as_str(), "p"),
    ];
    let select = dimensions.map(|(is, name, alias)| format!("{} AS {alias}", if is { name } else { "''" }));
    let group: String = dimensions.iter().filter(|d| d.0).map(|d| format!(", {}", d.2)).collect();
    let counted = if query.closed_only { "state <> 'open'" } else { "1 = 1" };
    let sum = |what: &str| format!("CAST(SUM(CASE WHEN {counted} THEN {what} ELSE 0 END) AS BIGINT)");
    let sums: Vec<String> = SUMS.iter().map(|column| sum(column)).collect();
    let mut filters = String::new();
    let wanted = [("application", &query.applications), ("key_id", &query.key_ids), ("model", &query.models)];
    for (column, values) in wanted {
        if values.is_empty() {
            continue;
        }
        let marks: Vec<String> = (1..=values.len()).map(|i| format!("${}", params.len() + i)).collect();
        filters += &format!(" AND {column} IN ({})", marks.join(", "));
        params.extend(values.iter().map(|value| text(value)));
    }
    let mut after = String::new();
    if let Some(key) = &query.after {
        let marks: Vec<String> = (1..=5).map(|i| format!("${}", params.len() + i)).collect();
        after = format!(" WHERE (b, a, k, m, p) > ({})", marks.join(", "));
        params.push(Value::Int(key.bucket));
        params.extend(key.names.iter().map(|name| text(name)));
    }
    params.push(Value::Int(query.limit.into()));
    let sql = format!(
        "SELECT * FROM (SELECT queued_at / $1 AS b, {}, {} AS requests, \
         CAST(SUM(CASE WHEN state = 'open' THEN 1 ELSE 0 END) AS BIGINT) AS running, {} FROM mirai_request \
         WHERE queued_at >= $2 AND queued_at < $3{filters} GROUP BY b{group}) g{after} \
         ORDER BY b, a, k, m, p LIMIT ${}",
        select.join(", "),
        sum("1"),
        (0..).zip(sums).map(|(i, sum)| format!("{sum} AS s{i}")).collect::<Vec<_>>().join(", "),
        params.len()
    );
    (sql, params)
}

impl<C: Sql> SqlStore<C> {
    pub(super) fn usage_of(&mut self, query: &UsageQuery) -> Result<Vec<UsageRow>, StoreError> {
        let (sql, params) = statement(query);
        let rows = self.sql.query(&sql, &params)?;
        rows.into_iter().map(|row| usage_row(query, row)).collect()
    }
}

fn usage_row(query: &UsageQuery, row: Vec<Value>) -> Result<UsageRow, StoreError> {
    let values = &mut row.into_iter();
    let start = take::<i64>(values, "bucket")?.saturating_mul(query.bucket.max(1));
    Ok(UsageRow {
        start: start.max(query.from),
        application: take(values, "application")?,
        key_id: take(values, "key_id")?,
        model: take(values, "model")?,
        price_version: take(values, "price_version")?,
        requests: take(values, "requests")?,
        open: take(values, "open")?,
        prompt_tokens: take(values, "prompt_tokens")?,
        cached_tokens: take(values, "cached_tokens")?,
        completion_tokens: take(values, "completion_tokens")?,
        reasoning_tokens: take(values, "reasoning_tokens")?,
        wasted_tokens: take(values, "wasted_tokens")?,
        gpu_micros: take(values, "gpu_micros")?,
        energy_microjoules: take(values, "energy_microjoules")?,
        measured_microjoules: take(values, "measured_microjoules")?,
    })
}

/// Reads all sums of a query in pages of a bounded size, each a statement of its own.
///
/// # Errors
/// The store failed, or `each` did.
pub fn for_each_usage<E: From<StoreError>>(
    store: &mut dyn super::Store,
    query: &UsageQuery,
    page: u32,
    mut each: impl FnMut(UsageRow) -> Result<(), E>,
) -> Result<(), E> {
    let mut query = UsageQuery { limit: page.clamp(1, query.limit.max(1)), ..query.clone() };
    loop {
        let rows = store.usage(&query)?;
        let full = rows.len() as u64 >= query.limit.into();
        if let Some(last) = rows.last() {
            query.after = Some(last.key(query.bucket));
            // What is done need not be summed again.
            query.from = query.from.max(last.start);
        }
        rows.into_iter().try_for_each(&mut each)?;
        if !full {
            return Ok(());
        }
    }
}
