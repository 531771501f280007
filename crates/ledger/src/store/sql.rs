//! The store over SQL that both dialects understand.
//!
//! Owns transactions and the wording of rows as columns; a driver owns the connection. Parameters are `$1`,
//! `$2` and so on.

use std::time::Duration;

use crate::chain::ChainKey;
use crate::error::StoreError;
use crate::row::{FIELDS, Row, RowError};
use crate::value::{Cell, CellError, Value};

/// A connection to a database.
pub trait Sql: Send {
    /// What locks the rows that a query finds; nothing where one writer at a time is the rule anyway.
    const FOR_UPDATE: &'static str;

    /// Begins a transaction: one that writes, or one that reads one consistent state.
    ///
    /// # Errors
    /// The database failed.
    fn begin(&mut self, write: bool) -> Result<(), StoreError>;
    /// Makes the transaction durable.
    ///
    /// # Errors
    /// The database failed; whether the transaction is durable is not known.
    fn commit(&mut self) -> Result<(), StoreError>;
    /// Undoes the transaction, if there is one.
    fn rollback(&mut self);
    /// Runs a statement. Returns how many rows it changed.
    ///
    /// # Errors
    /// The database failed.
    fn execute(&mut self, sql: &str, params: &[Value]) -> Result<u64, StoreError>;
    /// Runs a query.
    ///
    /// # Errors
    /// The database failed.
    fn query(&mut self, sql: &str, params: &[Value]) -> Result<Vec<Vec<Value>>, StoreError>;
    /// The database's clock, microseconds since 1970: leases are compared on one clock.
    ///
    /// # Errors
    /// The database failed.
    fn now(&mut self) -> Result<i64, StoreError>;
    /// Lets the database check its own structures: an index that misses a row hides it from queries.
    ///
    /// # Errors
    /// They are damaged.
    fn check(&mut self) -> Result<(), StoreError> {
        Ok(())
    }
    /// Within a transaction: lets no other process change the schema until it ends.
    ///
    /// # Errors
    /// The database failed.
    fn lock_schema(&mut self) -> Result<(), StoreError> {
        Ok(())
    }
    /// As [`Store::interrupter`].
    fn interrupter(&self) -> Option<super::Interrupter> {
        None
    }
    /// Called after rows were erased: old copies must not stay behind in logs.
    ///
    /// # Errors
    /// The database failed.
    fn erased(&mut self) -> Result<(), StoreError> {
        Ok(())
    }
}

/// A store on a database.
#[derive(Debug)]
pub struct SqlStore<C> {
    pub(super) sql: C,
    pub(super) key: Option<ChainKey>,
    pub(super) words: Words,
}

/// Statements that are made from the registry of fields.
#[derive(Debug)]
pub(super) struct Words {
    /// `id, attempt, ...`
    pub(super) columns: String,
    /// `r.id, r.attempt, ...`
    pub(super) r_columns: String,
    pub(super) insert: String,
    /// Sets what is not settled at the opening, by id, owner and state.
    pub(super) update: String,
    /// Sets everything, by id.
    pub(super) replace: String,
}

/// A name as both dialects accept it: `user` is a reserved word.
fn quoted(name: &str) -> String {
    format!("\"{name}\"")
}

impl Words {
    pub(super) fn new() -> Self {
        let names: Vec<String> = FIELDS.iter().map(|field| quoted(field.name)).collect();
        let columns = names.join(", ");
        let r_columns = names.iter().map(|name| format!("r.{name}")).collect::<Vec<_>>().join(", ");
        let marks = (1..=names.len() + 1).map(|i| format!("${i}")).collect::<Vec<_>>().join(", ");
        let insert = format!(
            "INSERT INTO mirai_request ({columns}, digest) VALUES ({marks}) ON CONFLICT (id) DO NOTHING"
        );
        let all = (1..).zip(&names).map(|(i, name)| format!("{name} = ${i}"));
        let all = all.collect::<Vec<_>>().join(", ");
        let digest = names.len() + 1;
        let replace =
            format!("UPDATE mirai_request SET {all}, digest = ${digest} WHERE id = ${}", digest + 1);
        let mut update = Vec::new();
        for name in mutable() {
            update.push(format!("{} = ${}", quoted(name), update.len() + 1));
        }
        let n = update.len();
        let update = format!(
            "UPDATE mirai_request SET {}, digest = ${} WHERE id = ${} AND writer = ${} AND epoch = ${} \
             AND state = 'open' AND completion_tokens <= ${}",
            update.join(", "),
            n + 1,
            n + 2,
            n + 3,
            n + 4,
            n + 5
        );
        Self { columns, r_columns, insert, update, replace }
    }
}

/// Names of the fields that may change while a row is open.
fn mutable() -> impl Iterator<Item = &'static str> {
    use crate::row::Settled;
    FIELDS.iter().filter(|f| f.settled == Settled::Close).map(|f| f.name)
}

/// Their values, in the same order.
pub(super) fn mutable_values(row: &Row) -> Vec<Value> {
    use crate::row::Settled;
    let values = FIELDS.iter().zip(row.values());
    values.filter(|(field, _)| field.settled == Settled::Close).map(|(_, value)| value).collect()
}

/// Takes the next value of a result's row.
pub(crate) fn take<T: Cell>(
    values: &mut impl Iterator<Item = Value>,
    field: &'static str,
) -> Result<T, StoreError> {
    let value = values.next().ok_or_else(|| {
        StoreError::Row(RowError::Cell { field, error: CellError::new("a column", &Value::Null) })
    })?;
    T::from_value(value).map_err(|error| StoreError::Row(RowError::Cell { field, error }))
}

pub(crate) fn text(text: &str) -> Value {
    Value::Text(text.to_owned())
}

pub(crate) fn int(n: u64) -> Value {
    n.to_value()
}

pub(crate) fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

impl<C: Sql> SqlStore<C> {
    /// The connection.
    pub fn driver(&mut self) -> &mut C {
        &mut self.sql
    }

    /// The same store on another driver.
    #[cfg(test)]
    pub(crate) fn map<D>(self, driver: impl FnOnce(C) -> D) -> SqlStore<D> {
        SqlStore { sql: driver(self.sql), key: self.key, words: self.words }
    }

    /// Runs `body` in one transaction that writes.
    pub(crate) fn transaction<T>(
        &mut self,
        body: impl FnOnce(&mut Self) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        // A beginning that failed may have begun all the same.
        let done = match self.sql.begin(true) {
            Ok(()) => body(self).and_then(|value| self.sql.commit().map(|()| value)),
            Err(error) => Err(error),
        };
        if done.is_err() {
            self.sql.rollback();
        }
        done
    }

    /// Rows that a condition finds.
    pub(super) fn select(&mut self, condition: &str, params: &[Value]) -> Result<Vec<Row>, StoreError> {
        let query = format!("SELECT {} FROM mirai_request {condition}", self.words.columns);
        let rows = self.sql.query(&query, params)?;
        rows.into_iter().map(|values| Row::from_values(values).map_err(StoreError::Row)).collect()
    }
}
