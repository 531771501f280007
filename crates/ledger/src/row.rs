//! The row of one accepted request, and the registry of all its fields.
//!
//! Owns the one list of what is persisted and exported, with each field's class, purpose, retention and
//! anonymisation. There is no field for a prompt or an answer, and there never is one.

use serde::{Deserialize, Serialize};

use crate::value::{Cell, CellError, Hex, Value, words};

/// The version of the rows that this build writes. Fields are only ever added.
pub const SCHEMA_VERSION: u32 = 1;
/// Longest text in a field, bytes.
pub const MAX_TEXT: usize = 256;

words! {
    /// Which kind of work was asked for.
    Endpoint {
        /// Chat completions.
        Chat = "chat",
        /// Text completions.
        Completion = "completion",
        /// Embeddings.
        Embeddings = "embeddings",
        /// Rerank.
        Rerank = "rerank",
        /// Scores of pairs.
        Score = "score",
        /// Classification.
        Classify = "classify",
    }
}

words! {
    /// Whether the request still runs.
    State {
        /// It does, or its writer died and nobody has closed it yet.
        Open = "open",
        /// It has ended.
        Closed = "closed",
    }
}

words! {
    /// How the request ended.
    Finish {
        /// It has not.
        None = "",
        /// The model's own end, or a stop string.
        Stop = "stop",
        /// As long as was allowed.
        Length = "length",
        /// The client left.
        Abort = "abort",
        /// A fault of the server.
        Error = "error",
        /// The request's time was over.
        Timeout = "timeout",
        /// Its writer died. Counts are those of the last durable checkpoint. Written by recovery only.
        Crashed = "crashed",
    }
}

words! {
    /// How energy was measured.
    EnergyMethod {
        /// Not at all.
        None = "none",
        /// The device's counter, shared out by work.
        Nvml = "nvml",
        /// A published formula.
        Estimated = "estimated",
    }
}

words! {
    /// What remains of the user when the pseudonym is erased.
    UserKind {
        /// The request named no user.
        None = "none",
        /// It did.
        Present = "present",
    }
}

/// What a field says about people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Nothing: counts, times, versions.
    Technical,
    /// Names an application or a key of an organisation, no person.
    Organisation,
    /// A pseudonym of a person, or what helps to find one.
    Personal,
    /// Derived from personal data, and of no use without what anonymisation erases.
    Anonymised,
}

/// How long a field is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Retention {
    /// Until the row is purged.
    Row,
    /// Until the row is anonymised, which comes first.
    UntilAnonymised,
}

/// What anonymisation does to a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Anonymise {
    /// Nothing.
    Keep,
    /// Erases it.
    Erase,
}

/// When a field is settled, and so which digest covers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Settled {
    /// When the row opens.
    Open,
    /// When the row closes.
    Close,
    /// No digest covers it: it may be erased. A commitment stands for it.
    Erasable,
}

/// One persisted and exported field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Field {
    /// Its number in digests. Never changed, never used again.
    pub tag: u16,
    /// Its name in the store and in exports.
    pub name: &'static str,
    /// What it says about people.
    pub class: Class,
    /// Why it is kept.
    pub purpose: &'static str,
    /// How long.
    pub retention: Retention,
    /// What anonymisation does to it.
    pub anonymise: Anonymise,
    /// When it is settled.
    pub settled: Settled,
    /// Its column's type.
    #[serde(skip)]
    pub(crate) sql: &'static str,
}

const fn retention(settled: Settled) -> Retention {
    if matches!(settled, Settled::Erasable) { Retention::UntilAnonymised } else { Retention::Row }
}

const fn anonymise(settled: Settled) -> Anonymise {
    if matches!(settled, Settled::Erasable) { Anonymise::Erase } else { Anonymise::Keep }
}

macro_rules! row {
    ($($tag:literal $name:ident: $ty:ty = $default:expr, $class:ident, $settled:ident, $purpose:literal;)*) => {
        /// One accepted request.
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct Row {
            $(#[doc = $purpose] pub $name: $ty,)*
        }

        impl Default for Row {
            fn default() -> Self {
                Self { $($name: $default,)* }
            }
        }

        /// Every field that is persisted or exported.
        pub const FIELDS: &[Field] = &[$(Field {
            tag: $tag,
            name: stringify!($name),
            class: Class::$class,
            purpose: $purpose,
            retention: retention(Settled::$settled),
            anonymise: anonymise(Settled::$settled),
            settled: Settled::$settled,
            sql: <$ty as Cell>::SQL,
        }),*];

        impl Row {
            /// The fields' values, in the order of [`FIELDS`].
            pub fn values(&self) -> Vec<Value> {
                vec![$(self.$name.to_value()),*]
            }

            /// A row from values in the order of [`FIELDS`].
            ///
            /// # Errors
            /// The first field that cannot hold its value.
            pub fn from_values(values: impl IntoIterator<Item = Value>) -> Result<Self, RowError> {
                let mut values = values.into_iter();
                Ok(Self { $($name: cell(stringify!($name), values.next())?,)* })
            }
        }
    };
}

fn cell<T: Cell>(field: &'static str, value: Option<Value>) -> Result<T, RowError> {
    T::from_value(value.unwrap_or(Value::Null)).map_err(|error| RowError::Cell { field, error })
}

row! {
    1 schema_version: u32 = SCHEMA_VERSION, Technical, Open, "Version of the row's fields.";
    2 id: String = String::new(), Technical, Open, "Our own identifier of the request, unique for ever.";
    3 attempt: u32 = 1, Technical, Open, "Which attempt of the caller this is, from 1.";
    4 endpoint: Endpoint = Endpoint::Chat, Technical, Open, "Kind of work, for prices.";
    5 writer: String = String::new(), Technical, Close, "The process that answers for the row.";
    6 epoch: u64 = 0, Technical, Close, "That process's number among those of its name.";
    7 state: State = State::Open, Technical, Close, "Whether the request still runs.";
    8 queued_at: i64 = 0, Technical, Open, "Arrival, microseconds since 1970 UTC.";
    9 first_token_after: Option<u64> = None, Technical, Close, "Arrival to first token, microseconds.";
    10 duration: u64 = 0, Technical, Close, "Arrival to end or last checkpoint, microseconds.";
    11 application: String = String::new(), Organisation, Open, "Who pays.";
    12 key_id: String = String::new(), Organisation, Open, "Which of the application's keys was used.";
    13 key_version: u32 = 0, Organisation, Open, "Version of the secret under which the key's hash was made.";
    14 user: Option<String> = None, Personal, Erasable, "Pseudonym of the user: a keyed hash, for abuse and support.";
    15 user_salt: Option<Hex<16>> = None, Personal, Erasable, "Salt of the commitment to the pseudonym.";
    16 user_commitment: Option<Hex<32>> = None, Anonymised, Open, "Proves the pseudonym unaltered while its salt exists.";
    17 user_key_version: u32 = 0, Technical, Open, "Version of the secret under which the pseudonym was made.";
    18 user_anon: UserKind = UserKind::None, Anonymised, Open, "Duplicate of the user without the person.";
    19 model: String = String::new(), Technical, Open, "Served model, for prices.";
    20 model_revision: String = String::new(), Technical, Open, "Exact weights, for audits.";
    21 replica: String = String::new(), Technical, Open, "Where it ran.";
    22 server_version: String = String::new(), Technical, Open, "What ran.";
    23 prompt_tokens: u64 = 0, Technical, Open, "Tokens of all prompts.";
    24 cached_tokens: u64 = 0, Technical, Close, "Those of them that were not computed again.";
    25 completion_tokens: u64 = 0, Technical, Close, "Tokens of all answers.";
    26 reasoning_tokens: u64 = 0, Technical, Close, "Those of them that were reasoning.";
    27 wasted_tokens: u64 = 0, Technical, Close, "Computed and not delivered: preempted, aborted, after a stop, rejected drafts.";
    28 finish: Finish = Finish::None, Technical, Close, "How it ended.";
    29 status: u16 = 0, Technical, Close, "HTTP status.";
    30 gpu_micros: u64 = 0, Technical, Close, "Share of each step times devices, device microseconds.";
    31 energy_microjoules: u64 = 0, Technical, Close, "Energy attributed to the request, microjoules.";
    32 energy_method: EnergyMethod = EnergyMethod::None, Technical, Close, "How the energy was measured.";
    33 price_version: Option<String> = None, Technical, Open, "Price list in force.";
}

/// A row that may not be stored, or cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RowError {
    /// A field cannot hold what was read.
    #[error("field {field}: {error}")]
    Cell {
        /// The field.
        field: &'static str,
        /// What is wrong.
        error: CellError,
    },
    /// A text is too long, or holds a control character.
    #[error("field {field}: {bytes} bytes of text, at most {MAX_TEXT} and no control character")]
    Text {
        /// The field.
        field: &'static str,
        /// How long it is.
        bytes: usize,
    },
    /// The id is empty.
    #[error("a row needs an id")]
    NoId,
}

impl Row {
    /// Checks what a store cannot: the bound of each row's size rests on it.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn check(&self) -> Result<(), RowError> {
        if self.id.is_empty() {
            return Err(RowError::NoId);
        }
        for (field, value) in FIELDS.iter().zip(self.values()) {
            if let Value::Text(text) = value
                && (text.len() > MAX_TEXT || text.contains(char::is_control))
            {
                return Err(RowError::Text { field: field.name, bytes: text.len() });
            }
        }
        Ok(())
    }

    /// Whether it was closed by recovery, not by its owner.
    pub fn is_crashed(&self) -> bool {
        self.state == State::Closed && self.finish == Finish::Crashed
    }
}

/// The registry of fields as JSON, for the record of processing activities.
pub fn registry_json() -> String {
    serde_json::to_string_pretty(FIELDS).expect("a table of constants is always JSON")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    pub(crate) fn full() -> Row {
        Row {
            schema_version: 1,
            id: "01JD0000000000000000000001".into(),
            attempt: 2,
            endpoint: Endpoint::Completion,
            writer: "replica-0".into(),
            epoch: 3,
            state: State::Closed,
            queued_at: 1_764_000_000_000_000,
            first_token_after: Some(81_234),
            duration: 2_000_001,
            application: "notes".into(),
            key_id: "notes-1".into(),
            key_version: 4,
            user: Some("u:3f".into()),
            user_salt: Some(Hex([7; 16])),
            user_commitment: Some(Hex([9; 32])),
            user_key_version: 5,
            user_anon: UserKind::Present,
            model: "demo".into(),
            model_revision: "abc".into(),
            replica: "pod-0".into(),
            server_version: "0.1.0".into(),
            prompt_tokens: 10,
            cached_tokens: 4,
            completion_tokens: 11,
            reasoning_tokens: 3,
            wasted_tokens: 2,
            finish: Finish::Length,
            status: 200,
            gpu_micros: 12,
            energy_microjoules: 13,
            energy_method: EnergyMethod::Nvml,
            price_version: Some("2026-11".into()),
        }
    }

    #[test]
    fn every_serialised_field_is_registered_and_every_registered_one_is_serialised() {
        let json = serde_json::to_value(full()).unwrap();
        let names: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
        let registered: Vec<_> = FIELDS.iter().map(|field| field.name).collect();
        assert_eq!(names, registered);
        let tags: HashSet<_> = FIELDS.iter().map(|field| field.tag).collect();
        assert_eq!(tags.len(), FIELDS.len(), "a tag is used once");
        for field in FIELDS {
            assert!(field.purpose.len() > 5, "{}", field.name);
            let personal = field.class == Class::Personal;
            assert_eq!(personal, field.anonymise == Anonymise::Erase, "{}", field.name);
            assert_eq!(personal, field.retention == Retention::UntilAnonymised, "{}", field.name);
            assert!(!field.name.contains("prompt_text") && !field.name.contains("content"));
        }
        let dump: serde_json::Value = serde_json::from_str(&registry_json()).unwrap();
        assert_eq!(dump[13]["name"], "user");
        assert_eq!(dump[13]["class"], "personal");
        assert_eq!(dump[13]["anonymise"], "erase");
        assert_eq!(dump[13]["retention"], "until_anonymised");
    }

    #[test]
    fn values_and_json_lead_back_to_the_row() {
        for row in [full(), Row::default()] {
            assert_eq!(Row::from_values(row.values()).unwrap(), row);
            let json = serde_json::to_string(&row).unwrap();
            assert_eq!(serde_json::from_str::<Row>(&json).unwrap(), row);
        }
        for (mine, default) in full().values().iter().zip(Row::default().values()) {
            if *mine == default {
                assert!(matches!(default, Value::Int(1)), "only the version is as by default");
            }
        }
    }

    #[test]
    fn a_wrong_column_is_named_without_its_value() {
        let wrong = [
            (6, Value::Int(-1), "field state: expected a text"),
            (1, Value::Int(3), "field id"),
            (7, Value::Text("secret".into()), "field queued_at: expected a number, found a text"),
            (9, Value::Int(-1), "field duration: expected a count, found a number out of range"),
            (9, Value::Null, "field duration: expected a count, found nothing"),
            (14, Value::Bytes(vec![1]), "field user_salt: expected bytes of a fixed number, found bytes"),
            (14, Value::Text("secret".into()), "field user_salt: expected bytes, found a text"),
            (28, Value::Int(70_000), "field status"),
        ];
        for (index, value, words) in wrong {
            let mut values = full().values();
            values[index] = value;
            let error = Row::from_values(values).unwrap_err().to_string();
            assert!(error.contains(words) && !error.contains("secret"), "{error}");
        }
        assert!(Row::from_values(full().values().into_iter().take(10)).is_err());
        for json in [r#"{"user_salt":"00"}"#, r#"{"user_salt":"zz000000000000000000000000000000"}"#] {
            assert!(serde_json::from_str::<Row>(json).is_err());
        }
    }

    #[test]
    fn texts_are_bounded() {
        assert_eq!(full().check(), Ok(()));
        assert_eq!(Row::default().check(), Err(RowError::NoId));
        let long = Row { application: "x".repeat(257), ..full() };
        assert_eq!(long.check(), Err(RowError::Text { field: "application", bytes: 257 }));
        let zero = Row { user: Some("a\0".into()), ..full() };
        assert_eq!(zero.check(), Err(RowError::Text { field: "user", bytes: 2 }));
    }

    #[test]
    fn words_of_a_newer_version_are_kept() {
        let row: Row = serde_json::from_str(r#"{"finish":"tool_calls","endpoint":"speech"}"#).unwrap();
        assert_eq!(row.finish, Finish::Other("tool_calls".into()));
        assert_eq!(serde_json::to_value(&row).unwrap()["endpoint"], "speech");
        for finish in Finish::ALL {
            assert_eq!(Finish::from(finish.as_str()), *finish);
        }
        assert_eq!(Endpoint::ALL.len(), 6);
        assert_eq!(State::from("open"), State::Open);
        assert_eq!(EnergyMethod::from("nvml"), EnergyMethod::Nvml);
        assert_eq!(UserKind::from("present"), UserKind::Present);
    }

    #[test]
    fn a_count_too_large_for_a_store_is_the_largest() {
        assert_eq!(u64::MAX.to_value(), Value::Int(i64::MAX));
        assert_eq!(format!("{:?}", Hex([1, 0xab])), "01ab");
    }
}
