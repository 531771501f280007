//! Sums over rows, for usage queries and for reconciliation with metrics.
//!
//! Owns the one query; formats belong to who asks.

use super::sql::{Sql, SqlStore, take};
use crate::error::StoreError;
use crate::value::Value;

/// Which rows to sum, and how finely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsageQuery {
    /// Arrival at or after this, microseconds since 1970.
    pub from: i64,
    /// Arrival before this.
    pub to: i64,
    /// Width of a bucket, microseconds; buckets begin at `from`.
    pub bucket: i64,
}

impl UsageQuery {
    /// Everything, in one bucket.
    pub const ALL: Self = Self { from: 0, to: i64::MAX, bucket: i64::MAX };
}

/// The sums of one bucket, application, key and model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UsageRow {
    /// The bucket's begin, microseconds since 1970.
    pub start: i64,
    /// Who.
    pub application: String,
    /// With which key.
    pub key_id: String,
    /// Which model.
    pub model: String,
    /// Requests.
    pub requests: u64,
    /// Those of them that still run.
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
}

impl<C: Sql> SqlStore<C> {
    pub(super) fn usage_of(&mut self, query: &UsageQuery) -> Result<Vec<UsageRow>, StoreError> {
        let sum = |column: &str| format!("CAST(SUM({column}) AS BIGINT)");
        let sums = [
            "prompt_tokens",
            "cached_tokens",
            "completion_tokens",
            "reasoning_tokens",
            "wasted_tokens",
            "gpu_micros",
            "energy_microjoules",
        ]
        .map(sum)
        .join(", ");
        let sql = format!(
            "SELECT (queued_at - $1) / $2 AS bucket, application, key_id, model, COUNT(*), \
             CAST(SUM(CASE WHEN state = 'open' THEN 1 ELSE 0 END) AS BIGINT), {sums} FROM mirai_request \
             WHERE queued_at >= $1 AND queued_at < $3 GROUP BY bucket, application, key_id, model \
             ORDER BY bucket, application, key_id, model"
        );
        let bucket = query.bucket.max(1);
        let params = [Value::Int(query.from), Value::Int(bucket), Value::Int(query.to)];
        let mut out = Vec::new();
        for row in self.sql.query(&sql, &params)? {
            let values = &mut row.into_iter();
            let start = query.from.saturating_add(take::<i64>(values, "bucket")?.saturating_mul(bucket));
            out.push(UsageRow {
                start,
                application: take(values, "application")?,
                key_id: take(values, "key_id")?,
                model: take(values, "model")?,
                requests: take(values, "requests")?,
                open: take(values, "open")?,
                prompt_tokens: take(values, "prompt_tokens")?,
                cached_tokens: take(values, "cached_tokens")?,
                completion_tokens: take(values, "completion_tokens")?,
                reasoning_tokens: take(values, "reasoning_tokens")?,
                wasted_tokens: take(values, "wasted_tokens")?,
                gpu_micros: take(values, "gpu_micros")?,
                energy_microjoules: take(values, "energy_microjoules")?,
            });
        }
        Ok(out)
    }
}
