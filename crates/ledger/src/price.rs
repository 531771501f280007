//! What work costs, by price lists that an operator writes.
//!
//! Owns the lists and which of them prices a row.

use std::collections::HashMap;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::date;
use crate::money::{Money, Price};
use crate::row::Row;
use crate::store::MAX_FILTER;

/// Most bytes of a file of prices.
pub const MAX_FILE: usize = 1 << 20;
/// Most models of a list.
const MAX_ENTRIES: usize = 4096;
/// The model that stands for all that are not named.
const ANY: &str = "*";

/// What is paid for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Meter {
    /// Tokens of prompts that were computed.
    Input,
    /// Tokens of prompts that were not computed again.
    CachedInput,
    /// Tokens of answers.
    Output,
    /// Time of devices.
    GpuTime,
}

impl Meter {
    /// Every one.
    pub const ALL: [Self; 4] = [Self::Input, Self::CachedInput, Self::Output, Self::GpuTime];

    /// Its name in exports.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Input => "input",
            Self::CachedInput => "cached_input",
            Self::Output => "output",
            Self::GpuTime => "gpu_time",
        }
    }
}

/// Work to be paid for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Tokens of prompts, cached ones too.
    pub prompt_tokens: u64,
    /// Those of them that were not computed again.
    pub cached_tokens: u64,
    /// Tokens of answers.
    pub completion_tokens: u64,
    /// Device microseconds.
    pub gpu_micros: u64,
}

impl From<&Row> for Work {
    fn from(row: &Row) -> Self {
        Self {
            prompt_tokens: row.prompt_tokens,
            cached_tokens: row.cached_tokens,
            completion_tokens: row.completion_tokens,
            gpu_micros: row.gpu_micros,
        }
    }
}

impl Work {
    /// How much of what one meter counts: tokens, or device microseconds.
    pub const fn of(&self, meter: Meter) -> u64 {
        match meter {
            Meter::Input => self.prompt_tokens.saturating_sub(self.cached_tokens),
            Meter::CachedInput => self.cached_tokens,
            Meter::Output => self.completion_tokens,
            Meter::GpuTime => self.gpu_micros,
        }
    }
}

/// The prices of one model: of a million tokens, and of an hour of a device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelPrice {
    /// Its served name, or `*` for all others.
    name: String,
    input: Price,
    /// Default: as `input`.
    cached_input: Option<Price>,
    output: Price,
    /// Default: device time costs nothing beside the tokens.
    gpu_hour: Option<Price>,
}

/// The prices in force from one moment to the next list's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PriceList {
    version: String,
    valid_from: i64,
    models: HashMap<String, ModelPrice>,
}

impl PriceList {
    /// Its name, which rows carry.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// From when it is in force, microseconds since 1970.
    pub const fn valid_from(&self) -> i64 {
        self.valid_from
    }

    fn model(&self, model: &str) -> Option<&ModelPrice> {
        self.models.get(model).or_else(|| self.models.get(ANY))
    }

    /// The price of what a meter counts; `None` if the model, or this of it, has no price.
    pub fn price(&self, model: &str, meter: Meter) -> Option<Price> {
        let model = self.model(model)?;
        match meter {
            Meter::Input => Some(model.input),
            Meter::CachedInput => Some(model.cached_input.unwrap_or(model.input)),
            Meter::Output => Some(model.output),
            Meter::GpuTime => model.gpu_hour,
        }
    }

    /// The cost of what one meter counted.
    pub fn metered(&self, model: &str, meter: Meter, work: &Work) -> Option<Money> {
        let price = self.price(model, meter)?;
        let count = work.of(meter);
        Some(if meter == Meter::GpuTime { price.of_hour(count) } else { price.of_million(count) })
    }

    /// The cost of some work; `None` if the model has no price.
    pub fn of(&self, model: &str, work: &Work) -> Option<Money> {
        self.model(model)?;
        Some(Meter::ALL.iter().filter_map(|meter| self.metered(model, *meter, work)).sum())
    }

    /// The cost of tokens alone, for an answer's `usage`; `prompt` counts cached tokens too. `None` if the model
    /// has no price.
    pub fn cost(&self, model: &str, prompt: u64, cached: u64, completion: u64) -> Option<Money> {
        let work = Work {
            prompt_tokens: prompt,
            cached_tokens: cached,
            completion_tokens: completion,
            gpu_micros: 0,
        };
        self.of(model, &work)
    }
}

/// All price lists, the earliest first, in one currency.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PriceBook {
    currency: String,
    lists: Vec<PriceList>,
}

/// Why a file of prices cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PriceError {
    /// More than any file of prices.
    #[error("{0} bytes of prices, at most {MAX_FILE}")]
    TooLong(usize),
    /// It is not TOML of the right shape.
    #[error("line {line}: {message}")]
    Shape {
        /// The line, from 1; 0 if it is not known.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// A currency is three capital letters.
    #[error("the currency must be three capital letters, as EUR")]
    Currency,
    /// A version is what rows carry.
    #[error("list {0}: the version must be 1 to 64 letters, digits, dots, dashes or underscores")]
    Version(usize),
    /// Two lists of one name, or of one beginning.
    #[error("list {0}: another list has its version or its beginning")]
    Twice(usize),
    /// A model's name is missing, too long or there twice.
    #[error("list {list}: the name of model {model} is empty, too long or there twice")]
    Model {
        /// The list, from 1.
        list: usize,
        /// The model, from 1.
        model: usize,
    },
    /// More than anybody reads.
    #[error("{0} entries: at most {MAX_FILTER} lists, and {MAX_ENTRIES} models in each")]
    TooMany(usize),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    currency: String,
    #[serde(default)]
    list: Vec<FileList>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileList {
    version: String,
    #[serde(deserialize_with = "moment")]
    valid_from: i64,
    #[serde(default)]
    model: Vec<ModelPrice>,
}

/// A date or time, bare or in quotes.
fn moment<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Text(String),
        Bare(toml::value::Datetime),
    }
    let text = match Either::deserialize(deserializer)? {
        Either::Text(text) => text,
        Either::Bare(bare) => bare.to_string(),
    };
    date::parse(&text).map_err(D::Error::custom)
}

fn is_version(text: &str) -> bool {
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    (1..=64).contains(&text.len()) && text.bytes().all(good)
}

impl PriceBook {
    /// Reads a file: `currency`, and `[[list]]`s with `version`, `valid_from` and `[[list.model]]`s with `name`,
    /// `input`, `cached_input`, `output` (of a million tokens) and `gpu_hour`.
    ///
    /// # Errors
    /// What is wrong, and where.
    pub fn parse(text: &str) -> Result<Self, PriceError> {
        if text.len() > MAX_FILE {
            return Err(PriceError::TooLong(text.len()));
        }
        let file: File = toml::from_str(text).map_err(|error| {
            let before = error.span().map(|span| text.get(..span.start).unwrap_or_default());
            let line = before.map_or(0, |before| before.matches('\n').count() + 1);
            PriceError::Shape { line, message: error.message().trim().to_owned() }
        })?;
        if file.currency.len() != 3 || !file.currency.bytes().all(|b| b.is_ascii_uppercase()) {
            return Err(PriceError::Currency);
        }
        if file.list.len() > MAX_FILTER {
            return Err(PriceError::TooMany(file.list.len()));
        }
        let mut lists: Vec<PriceList> = Vec::new();
        for (number, list) in (1..).zip(file.list) {
            let list = checked(number, list)?;
            if lists.iter().any(|l| l.version == list.version || l.valid_from == list.valid_from) {
                return Err(PriceError::Twice(number));
            }
            lists.push(list);
        }
        lists.sort_by_key(|list| list.valid_from);
        Ok(Self { currency: file.currency, lists })
    }

    /// Its code, as `EUR`.
    pub fn currency(&self) -> &str {
        &self.currency
    }

    /// Every list, the earliest first.
    pub fn lists(&self) -> &[PriceList] {
        &self.lists
    }

    /// The list in force at a moment, microseconds since 1970.
    pub fn at(&self, micros: i64) -> Option<&PriceList> {
        self.lists.iter().rev().find(|list| list.valid_from <= micros)
    }

    /// The list of a version.
    pub fn version(&self, version: &str) -> Option<&PriceList> {
        self.lists.iter().find(|list| list.version == version)
    }

    /// The cost of a row by the list it names, or by the one in force if it names none; `None` if its list or
    /// model has no price. A list that is not in the book has none: another's would be a guess.
    pub fn cost(&self, row: &Row) -> Option<Money> {
        let list = match &row.price_version {
            Some(version) => self.version(version)?,
            None => self.at(row.queued_at)?,
        };
        list.of(&row.model, &row.into())
    }
}

fn checked(number: usize, list: FileList) -> Result<PriceList, PriceError> {
    if !is_version(&list.version) {
        return Err(PriceError::Version(number));
    }
    if list.model.len() > MAX_ENTRIES {
        return Err(PriceError::TooMany(list.model.len()));
    }
    let mut models = HashMap::new();
    for (at, model) in (1..).zip(list.model) {
        let good = (1..=crate::row::MAX_TEXT).contains(&model.name.len());
        if !good || models.insert(model.name.clone(), model).is_some() {
            return Err(PriceError::Model { list: number, model: at });
        }
    }
    Ok(PriceList { version: list.version, valid_from: list.valid_from, models })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOOK: &str = r#"
        currency = "EUR"
        [[list]]
        version = "2026-11"
        valid_from = 2026-11-01
        [[list.model]]
        name = "gpt-oss-120b"
        input = 0.15
        cached_input = "0.075"
        output = 0.6
        [[list.model]]
        name = "*"
        input = 1
        output = 0.000001
        gpu_hour = 2.5
        [[list]]
        version = "2026-10"
        valid_from = "2026-10-01T00:00:00+02:00"
        [[list.model]]
        name = "gpt-oss-120b"
        input = 0.2
        output = 0.8
    "#;

    /// The calculation that the documentation shows, by hand: 1200 prompt tokens of which 1000 cached, 300
    /// answered: 200 x 0.15 + 1000 x 0.075 + 300 x 0.6, each a millionth.
    #[test]
    fn a_golden_calculation() {
        let book = PriceBook::parse(BOOK).unwrap();
        let list = book.version("2026-11").unwrap();
        let cost = list.cost("gpt-oss-120b", 1200, 1000, 300).unwrap();
        assert_eq!((cost.to_string().as_str(), cost.micros()), ("0.000285", 285));
        assert!((cost.to_f64() - 0.000_285).abs() < f64::EPSILON);
        // An hour and a half of a device at 2.5, and a million tokens of an answer at a millionth.
        let work = Work { completion_tokens: 1_000_000, gpu_micros: 5_400_000_000, ..Work::default() };
        assert_eq!(list.of("other", &work).unwrap().to_string(), "3.750001");
        // One token at a millionth a million: the smallest price there is, and still no zero.
        assert_eq!(list.cost("other", 0, 0, 1).unwrap().to_string(), "0.000000000001");
        assert_eq!(list.price("gpt-oss-120b", Meter::GpuTime), None);
        assert_eq!(list.price("x", Meter::CachedInput).unwrap().to_string(), "1");
        assert_eq!(Money::ZERO.to_string(), "0");
        assert_eq!(book.currency(), "EUR");
    }

    #[test]
    fn a_row_is_priced_by_the_list_it_names() {
        let book = PriceBook::parse(BOOK).unwrap();
        let row = |version: Option<&str>, at: &str, model: &str| Row {
            price_version: version.map(Into::into),
            queued_at: date::parse(at).unwrap(),
            model: model.into(),
            prompt_tokens: 1_000_000,
            ..Row::default()
        };
        let cost = |row| book.cost(&row).map(|cost| cost.to_string());
        assert_eq!(cost(row(Some("2026-10"), "2026-11-05", "gpt-oss-120b")).as_deref(), Some("0.2"));
        assert_eq!(cost(row(None, "2026-11-05", "gpt-oss-120b")).as_deref(), Some("0.15"));
        assert_eq!(cost(row(None, "2026-09-30T22:00:00Z", "gpt-oss-120b")).as_deref(), Some("0.2"));
        assert_eq!(cost(row(None, "2026-09-30T21:59:59Z", "gpt-oss-120b")), None);
        assert_eq!(cost(row(Some("2025"), "2026-11-05", "gpt-oss-120b")), None);
        assert_eq!(cost(row(Some("2026-10"), "2026-11-05", "other")), None, "no `*` in that list");
        assert_eq!(book.lists()[0].valid_from(), date::parse("2026-09-30T22:00:00Z").unwrap());
        assert_eq!(book.lists()[1].version(), "2026-11");
    }

    #[test]
    fn a_wrong_file_is_said_to_be_wrong_and_where() {
        let model = |price: &str| {
            format!(
                "currency = 'EUR'\n[[list]]\nversion = 'a'\nvalid_from = 2026-01-01\n[[list.model]]\nname = 'm'\n\
                 input = {price}\noutput = 1\n"
            )
        };
        let list =
            |version: &str, from: &str| format!("[[list]]\nversion = '{version}'\nvalid_from = {from}\n");
        let cases = [
            ("currency = 'eur'".to_owned(), "three capital letters"),
            ("currency = 'EUR'\nx = 1".to_owned(), "line 2: unknown field"),
            (model("-1"), "line 7: a price is"),
            (model("0.0000001"), "line 7: a price is"),
            (model("'1e3'"), "line 7: a price is"),
            (model("1000001"), "line 7: a price is"),
            (model("''"), "line 7: a price is"),
            (model("true"), "line 7: "),
            (model("nan"), "line 7: a price is"),
            (model("1").replace("'m'", "''"), "list 1: the name of model 1"),
            (model("1") + "[[list.model]]\nname = 'm'\ninput = 1\noutput = 1", "name of model 2"),
            (format!("currency = 'EUR'\n{}", list("a b", "2026-01-01")), "list 1: the version"),
            (format!("currency = 'EUR'\n{}", list("a", "'soon'")), "expected a date"),
            (
                format!("currency = 'EUR'\n{}{}", list("a", "2026-01-01"), list("a", "2026-01-02")),
                "list 2: another",
            ),
            (
                format!("currency = 'EUR'\n{}{}", list("a", "2026-01-01"), list("b", "2026-01-01")),
                "list 2: another",
            ),
            ("#".repeat(MAX_FILE + 1), "at most 1048576"),
        ];
        for (text, words) in cases {
            let error = PriceBook::parse(&text).unwrap_err().to_string();
            assert!(error.contains(words), "{error} has no {words:?}");
        }
        assert!(PriceBook::parse("currency = 'EUR'").unwrap().at(0).is_none());
    }

    proptest! {
        /// However work is cut into rows, its cost is the same, to the last part.
        #[test]
        fn the_cost_of_a_sum_is_the_sum_of_costs(
            parts in prop::collection::vec((0..1u64 << 40, 0..1u64 << 40, 0..1u64 << 40, 0..1u64 << 50), 1..20),
        ) {
            let book = PriceBook::parse(BOOK).unwrap();
            let list = book.version("2026-11").unwrap();
            let mut sum = Work::default();
            let mut costs = Money::ZERO;
            for (fresh, cached, out, gpu) in parts {
                let one = Work {
                    prompt_tokens: fresh + cached,
                    cached_tokens: cached,
                    completion_tokens: out,
                    gpu_micros: gpu,
                };
                costs += list.of("any", &one).unwrap();
                sum.prompt_tokens += one.prompt_tokens;
                sum.cached_tokens += one.cached_tokens;
                sum.completion_tokens += one.completion_tokens;
                sum.gpu_micros += one.gpu_micros;
            }
            prop_assert_eq!(list.of("any", &sum).unwrap(), costs);
        }
    }
}
