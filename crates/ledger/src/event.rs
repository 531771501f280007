//! One ended request as an event for other systems: CloudEvents 1.0.
//!
//! Owns the attributes and the record. Knows no transport. The record never holds the user, unless it is asked
//! for, and then the pseudonym.

use serde_json::{Map, Value};

use crate::date;
use crate::price::PriceBook;
use crate::row::{Class, FIELDS, Field, Row};
use crate::value::Hash;

/// The event's type. A change that a reader of this one would not understand has another number.
pub const TYPE: &str = "fr.gouv.interieur.mirai.inference.usage.v1";
/// The version of CloudEvents.
pub const SPEC_VERSION: &str = "1.0";

/// Fields that leave the store: none that is personal, and no commitment, which is of use to auditors alone.
pub fn exported(with_user: bool) -> impl Iterator<Item = (usize, &'static Field)> {
    FIELDS.iter().enumerate().filter(move |(_, field)| match field.class {
        Class::Technical | Class::Organisation => true,
        Class::Personal => with_user && field.name == "user",
        Class::Anonymised => field.name == "user_anon",
    })
}

/// A row as other systems may see it.
pub fn record(row: &Row, with_user: bool) -> Map<String, Value> {
    let Ok(Value::Object(mut all)) = serde_json::to_value(row) else { return Map::new() };
    exported(with_user).filter_map(|(_, field)| all.remove_entry(field.name)).collect()
}

/// An event. All attributes are ASCII.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Unlike any other event's of the same source: a receiver that knows it may drop this one.
    pub id: String,
    /// Who tells, the same for all replicas: any of them may tell an event again.
    pub source: String,
    /// Which request. Two events of one request differ in id; one whose `finish` is `crashed` is replaced by the
    /// other.
    pub subject: String,
    /// When the request ended, RFC 3339.
    pub time: String,
    /// The record, JSON.
    pub data: String,
}

/// What events say, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventOptions {
    /// The source of every event.
    pub source: String,
    /// Whether records hold the user's pseudonym.
    pub with_user: bool,
}

impl Default for EventOptions {
    fn default() -> Self {
        Self { source: "/mirai/ledger".to_owned(), with_user: false }
    }
}

impl Event {
    /// The event of an ended row. `digest` is its content's, so the same end has the same id.
    pub fn new(row: &Row, digest: Hash, prices: Option<&PriceBook>, options: &EventOptions) -> Self {
        let ended = row.queued_at.saturating_add(i64::try_from(row.duration).unwrap_or(i64::MAX));
        let digest = digest.to_string();
        let mut data = record(row, options.with_user);
        if let Some((cost, book)) = prices.and_then(|book| Some((book.cost(row)?, book))) {
            data.insert("cost".to_owned(), cost.to_string().into());
            data.insert("currency".to_owned(), book.currency().into());
        }
        Self {
            id: format!("{}-{}", row.id, &digest[..16]),
            source: options.source.clone(),
            subject: row.id.clone(),
            time: date::rfc3339(ended),
            data: Value::Object(data).to_string(),
        }
    }
}

/// The JSON Schema of the record, for the catalogue of data.
pub fn schema() -> Value {
    let property = |field: &Field| {
        let kind = match field.sql.split(' ').next() {
            Some("BIGINT") if field.sql == "BIGINT" => serde_json::json!(["integer", "null"]),
            Some("BIGINT") => "integer".into(),
            _ if field.sql == "TEXT" => serde_json::json!(["string", "null"]),
            _ => "string".into(),
        };
        serde_json::json!({"type": kind, "description": field.purpose})
    };
    let mut properties: Map<String, Value> =
        exported(true).map(|(_, field)| (field.name.to_owned(), property(field))).collect();
    let more = [
        ("cost", "Decimal in the currency's unit; absent without a price."),
        ("currency", "ISO 4217 code of the cost."),
    ];
    for (name, text) in more {
        properties.insert(name.to_owned(), serde_json::json!({"type": "string", "description": text}));
    }
    let required: Vec<&str> = exported(false).map(|(_, field)| field.name).collect();
    serde_json::json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": TYPE,
        "title": "Usage of one request",
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": true,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::chain::content_digest;
    use crate::row::{Finish, State};
    use crate::value::Hex;

    fn row() -> Row {
        Row {
            id: "R1".into(),
            state: State::Closed,
            finish: Finish::Stop,
            queued_at: 1_795_486_338_000_000,
            duration: 2_500_000,
            application: "mail".into(),
            model: "demo".into(),
            user: Some("canary-user".into()),
            user_salt: Some(Hex([0xab; 16])),
            user_commitment: Some(Hex([0xcd; 32])),
            prompt_tokens: 1000,
            completion_tokens: 10,
            ..Row::default()
        }
    }

    #[test]
    fn an_event_tells_the_row_and_not_the_user() {
        let options = EventOptions::default();
        let event = Event::new(&row(), content_digest(&row()), None, &options);
        assert_eq!((event.subject.as_str(), event.time.as_str()), ("R1", "2026-11-24T02:12:20.500000Z"));
        assert!(event.id.starts_with("R1-") && event.id.len() == 19);
        let data: Value = serde_json::from_str(&event.data).unwrap();
        assert_eq!((data["prompt_tokens"].as_u64(), data["finish"].as_str()), (Some(1000), Some("stop")));
        assert_eq!(data["user_anon"], "none");
        for word in ["canary-user", "abab", "cdcd", "\"user\"", "cost"] {
            assert!(!event.data.contains(word), "{word}");
        }
        let with =
            Event::new(&row(), Hex([0; 32]), None, &EventOptions { with_user: true, ..options.clone() });
        let data: Value = serde_json::from_str(&with.data).unwrap();
        assert_eq!(data["user"], "canary-user");
        assert!(!with.data.contains("abab") && !with.data.contains("cdcd"));
        assert_ne!(with.id, event.id, "another content is another event");
        let book = "currency = 'EUR'\n[[list]]\nversion = 'a'\nvalid_from = 2026-01-01\n[[list.model]]\n\
                    name = '*'\ninput = 1\noutput = 2\n";
        let book = PriceBook::parse(book).unwrap();
        let priced = Event::new(&row(), Hex([0; 32]), Some(&book), &options);
        let data: Value = serde_json::from_str(&priced.data).unwrap();
        assert_eq!((data["cost"].as_str(), data["currency"].as_str()), (Some("0.00102"), Some("EUR")));
    }

    /// `LEDGER_GOLDEN=1 cargo test -p mirai-ledger published_schema` writes it anew.
    #[test]
    fn the_published_schema_is_that_of_the_record() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/schemas/usage-event-v1.json");
        let ours = format!("{:#}\n", schema());
        if std::env::var_os("LEDGER_GOLDEN").is_some() {
            std::fs::write(path, &ours).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), ours);
        // Every field of a record is described, with its type.
        let schema = schema();
        for (name, value) in record(&row(), true) {
            let kind = &schema["properties"][&name]["type"];
            let is = if value.is_string() {
                "string"
            } else if value.is_null() {
                "null"
            } else {
                "integer"
            };
            let fits = kind == is || kind.as_array().is_some_and(|kinds| kinds.iter().any(|kind| kind == is));
            assert!(fits, "{name}: {value} is no {kind}");
        }
    }
}
