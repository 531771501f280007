//! Building blocks of bodies that serde alone would parse too generously.
//!
//! Owns bounded lists, strict maps and "is it there at all"; every type here costs memory in proportion to
//! what it keeps, never to what was sent.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::bounds;

/// A list that ends parsing when it grows beyond `MAX` entries.
#[derive(Clone, Debug, PartialEq)]
pub struct Bounded<T, const MAX: usize>(pub Vec<T>);

impl<T, const MAX: usize> Default for Bounded<T, MAX> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for Bounded<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List<T, const MAX: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for List<T, MAX> {
            type Value = Bounded<T, MAX>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {MAX} entries")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
                collect(seq, Vec::new(), MAX).map(Bounded)
            }
        }
        deserializer.deserialize_seq(List(PhantomData))
    }
}

fn collect<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(
    mut seq: A,
    mut list: Vec<T>,
    max: usize,
) -> Result<Vec<T>, A::Error> {
    while list.len() < max {
        match seq.next_element()? {
            Some(value) => list.push(value),
            None => return Ok(list),
        }
    }
    if seq.next_element::<IgnoredAny>()?.is_some() {
        return Err(de::Error::custom(format_args!("more than {max} entries")));
    }
    Ok(list)
}

/// Whether a field that we do not serve says anything. Its value is skipped without being kept.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Presence {
    /// Not there, `null`, `false`, or an empty list, object or string: asks for nothing.
    #[default]
    Absent,
    /// A short text, for the few fields where one value is fine (`tool_choice: "none"`).
    Text(String),
    /// A number.
    Number(f64),
    /// Anything else.
    Present,
}

impl Presence {
    /// Whether it asks for something.
    pub fn is_present(&self) -> bool {
        *self != Self::Absent
    }

    /// Whether it is exactly this text.
    pub fn is_text(&self, text: &str) -> bool {
        matches!(self, Self::Text(t) if t == text)
    }
}

impl<'de> Deserialize<'de> for Presence {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Presence;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }
            fn visit_unit<E>(self) -> Result<Presence, E> {
                Ok(Presence::Absent)
            }
            fn visit_bool<E>(self, value: bool) -> Result<Presence, E> {
                Ok(if value { Presence::Present } else { Presence::Absent })
            }
            fn visit_i64<E>(self, value: i64) -> Result<Presence, E> {
                Ok(Presence::Number(value as f64))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Presence, E> {
                Ok(Presence::Number(value as f64))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Presence, E> {
                Ok(Presence::Number(value))
            }
            fn visit_str<E>(self, value: &str) -> Result<Presence, E> {
                Ok(match value.len() {
                    0 => Presence::Absent,
                    1..=64 => Presence::Text(value.to_owned()),
                    _ => Presence::Present,
                })
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Presence, A::Error> {
                let mut found = Presence::Absent;
                while seq.next_element::<IgnoredAny>()?.is_some() {
                    found = Presence::Present;
                }
                Ok(found)
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Presence, A::Error> {
                let mut found = Presence::Absent;
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
                    found = Presence::Present;
                }
                Ok(found)
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// A short text, or nothing: whatever else is there is skipped, because clients put all kinds of things there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Name(pub Option<String>);

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Name;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }
            fn visit_unit<E>(self) -> Result<Name, E> {
                Ok(Name(None))
            }
            fn visit_bool<E>(self, _: bool) -> Result<Name, E> {
                Ok(Name(None))
            }
            fn visit_i64<E>(self, _: i64) -> Result<Name, E> {
                Ok(Name(None))
            }
            fn visit_u64<E>(self, _: u64) -> Result<Name, E> {
                Ok(Name(None))
            }
            fn visit_f64<E>(self, _: f64) -> Result<Name, E> {
                Ok(Name(None))
            }
            fn visit_str<E>(self, value: &str) -> Result<Name, E> {
                Ok(Name((1..=bounds::NAME).contains(&value.len()).then(|| value.to_owned())))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Name, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Name(None))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Name, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Name(None))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// Short texts by name; whatever else is there is skipped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metadata(pub Vec<(String, String)>);

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Map;
        impl<'de> Visitor<'de> for Map {
            type Value = Metadata;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of texts")
            }
            fn visit_unit<E>(self) -> Result<Metadata, E> {
                Ok(Metadata::default())
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
                let mut out = Vec::new();
                while let Some((Name(name), Name(value))) = map.next_entry()? {
                    if let (Some(name), Some(value), true) = (name, value, out.len() < bounds::METADATA) {
                        out.push((name, value));
                    }
                }
                Ok(Metadata(out))
            }
        }
        deserializer.deserialize_any(Map)
    }
}

/// One string or several, of which parsing ends beyond `MAX`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OneOrMany<const MAX: usize = { bounds::STOP }>(pub Vec<String>);

impl<'de, const MAX: usize> Deserialize<'de> for OneOrMany<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Strings<const MAX: usize>;
        impl<'de, const MAX: usize> Visitor<'de> for Strings<MAX> {
            type Value = OneOrMany<MAX>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }
            fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
                Ok(OneOrMany(vec![value.to_owned()]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
                collect(seq, Vec::new(), MAX).map(OneOrMany)
            }
        }
        deserializer.deserialize_any(Strings::<MAX>)
    }
}

/// `{"<token id>": bias}`, in the order sent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogitBias(pub Vec<(u32, f64)>);

impl<'de> Deserialize<'de> for LogitBias {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Map;
        impl<'de> Visitor<'de> for Map {
            type Value = LogitBias;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from token ids to numbers")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<LogitBias, A::Error> {
                let mut list: Vec<(u32, f64)> = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    if list.len() == bounds::LOGIT_BIAS {
                        let max = bounds::LOGIT_BIAS;
                        return Err(de::Error::custom(format_args!("more than {max} entries")));
                    }
                    let id = key.parse().map_err(|_| de::Error::custom("a key is not a token id"))?;
                    list.push((id, map.next_value()?));
                }
                Ok(LogitBias(list))
            }
        }
        deserializer.deserialize_map(Map)
    }
}

/// A value of `chat_template_kwargs`: nothing nested reaches a template.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Kwargs(pub Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Kwargs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Map;
        impl<'de> Visitor<'de> for Map {
            type Value = Kwargs;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of booleans, numbers and strings")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Kwargs, A::Error> {
                let mut list: Vec<(String, Value)> = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    if list.len() == bounds::KWARGS {
                        let max = bounds::KWARGS;
                        return Err(de::Error::custom(format_args!("more than {max} entries")));
                    }
                    if list.iter().any(|(k, _)| *k == key) {
                        return Err(de::Error::custom("a key occurs twice"));
                    }
                    list.push((key, map.next_value::<Scalar>()?.0));
                }
                Ok(Kwargs(list))
            }
        }
        deserializer.deserialize_map(Map)
    }
}

struct Scalar(Value);

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl Visitor<'_> for Any {
            type Value = Scalar;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a boolean, a number or a string")
            }
            fn visit_unit<E>(self) -> Result<Scalar, E> {
                Ok(Scalar(Value::Null))
            }
            fn visit_bool<E>(self, value: bool) -> Result<Scalar, E> {
                Ok(Scalar(value.into()))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Scalar, E> {
                Ok(Scalar(value.into()))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Scalar, E> {
                Ok(Scalar(value.into()))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Scalar, E> {
                Ok(Scalar(value.into()))
            }
            fn visit_str<E>(self, value: &str) -> Result<Scalar, E> {
                Ok(Scalar(value.into()))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// Text or token ids, one prompt or several, of which parsing ends beyond `MAX`.
#[derive(Clone, Debug, PartialEq)]
pub enum PromptInput<const MAX: usize = { bounds::PROMPTS }> {
    /// Texts to tokenize.
    Texts(Vec<String>),
    /// Prompts that are token ids already.
    Ids(Vec<Vec<u32>>),
}

impl<const MAX: usize> PromptInput<MAX> {
    /// Number of prompts.
    pub fn len(&self) -> usize {
        match self {
            Self::Texts(list) => list.len(),
            Self::Ids(list) => list.len(),
        }
    }

    /// Whether there is no prompt at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// First entry of a list of prompts, which decides what the others must be.
enum Entry {
    Text(String),
    Id(u32),
    Ids(Vec<u32>),
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct One;
        impl<'de> Visitor<'de> for One {
            type Value = Entry;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id or a list of token ids")
            }
            fn visit_str<E>(self, value: &str) -> Result<Entry, E> {
                Ok(Entry::Text(value.to_owned()))
            }
            fn visit_string<E>(self, value: String) -> Result<Entry, E> {
                Ok(Entry::Text(value))
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Entry, E> {
                u32::try_from(value)
                    .map(Entry::Id)
                    .map_err(|_| E::invalid_value(de::Unexpected::Unsigned(value), &"a token id"))
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Entry, E> {
                Err(E::invalid_value(de::Unexpected::Signed(value), &"a token id"))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Entry, A::Error> {
                collect(seq, Vec::new(), bounds::PROMPT_TOKENS).map(Entry::Ids)
            }
        }
        deserializer.deserialize_any(One)
    }
}

impl<'de, const MAX: usize> Deserialize<'de> for PromptInput<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any<const MAX: usize>;
        impl<'de, const MAX: usize> Visitor<'de> for Any<MAX> {
            type Value = PromptInput<MAX>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a list of strings, a list of token ids or a list of such lists")
            }
            fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
                Ok(PromptInput::Texts(vec![value.to_owned()]))
            }
            fn visit_string<E>(self, value: String) -> Result<Self::Value, E> {
                Ok(PromptInput::Texts(vec![value]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                match seq.next_element()? {
                    None => Ok(PromptInput::Texts(Vec::new())),
                    Some(Entry::Text(first)) => collect(seq, vec![first], MAX).map(PromptInput::Texts),
                    Some(Entry::Id(first)) => collect(seq, vec![first], bounds::PROMPT_TOKENS)
                        .map(|ids| PromptInput::Ids(vec![ids])),
                    Some(Entry::Ids(first)) => collect(seq, vec![Bounded(first)], MAX).map(
                        |l: Vec<Bounded<u32, { bounds::PROMPT_TOKENS }>>| {
                            PromptInput::Ids(l.into_iter().map(|ids| ids.0).collect())
                        },
                    ),
                }
            }
        }
        deserializer.deserialize_any(Any::<MAX>)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn parse<T: for<'a> Deserialize<'a>>(text: &str) -> Result<T, String> {
        serde_json::from_str(text).map_err(|e| e.to_string())
    }

    #[test]
    fn lists_end_at_their_bound() {
        assert_eq!(parse::<Bounded<u8, 3>>("[1,2,3]").unwrap().0, [1, 2, 3]);
        assert!(parse::<Bounded<u8, 3>>("[1,2,3,4]").unwrap_err().contains("more than 3 entries"));
        assert!(parse::<Bounded<u8, 3>>("7").unwrap_err().contains("at most 3 entries"));
    }

    #[test]
    fn presence_knows_nothing_from_something() {
        for nothing in ["null", "false", "[]", "{}", "\"\""] {
            assert!(!parse::<Presence>(nothing).unwrap().is_present(), "{nothing}");
        }
        for something in ["true", "0", "-1", "1.5", "[0]", "{\"a\":1}", "\"x\""] {
            assert!(parse::<Presence>(something).unwrap().is_present(), "{something}");
        }
        assert!(parse::<Presence>("\"none\"").unwrap().is_text("none"));
        assert_eq!(parse::<Presence>(&format!("{:?}", "x".repeat(65))).unwrap(), Presence::Present);
    }

    #[test]
    fn names_are_short_texts_and_anything_else_is_nobody() {
        let name = |text: &str| parse::<Name>(text).unwrap().0;
        assert_eq!(name("\"zo\u{e9}\"").as_deref(), Some("zo\u{e9}"));
        let long = format!("\"{}\"", "x".repeat(513));
        for other in ["null", "true", "-1", "1", "1.5", "\"\"", "[[1], {}]", "{\"a\": [1]}", &long] {
            assert_eq!(name(other), None, "{other}");
        }
        let all = parse::<Metadata>(r#"{"a": "b", "c": 1, "d": {"e": "f"}, "g": "h"}"#).unwrap();
        assert_eq!(all.0, [("a".into(), "b".into()), ("g".into(), "h".into())]);
        assert_eq!(parse::<Metadata>("null").unwrap(), Metadata::default());
        let many: Vec<String> = (0..40).map(|i| format!("\"{i}\": \"x\"")).collect();
        assert_eq!(parse::<Metadata>(&format!("{{{}}}", many.join(","))).unwrap().0.len(), 16);
        assert!(parse::<Metadata>("[]").is_err());
    }

    #[test]
    fn prompts_of_every_kind() {
        let texts = |t: &[&str]| PromptInput::Texts(t.iter().map(|s| (*s).to_owned()).collect());
        assert_eq!(parse::<PromptInput>("\"a\"").unwrap(), texts(&["a"]));
        assert_eq!(parse::<PromptInput>("[\"a\",\"b\"]").unwrap(), texts(&["a", "b"]));
        assert_eq!(parse::<PromptInput>("[1,2]").unwrap(), PromptInput::Ids(vec![vec![1, 2]]));
        assert_eq!(parse::<PromptInput>("[[1],[2,3]]").unwrap(), PromptInput::Ids(vec![vec![1], vec![2, 3]]));
        assert!(parse::<PromptInput>("[]").unwrap().is_empty());
        for bad in [
            "null",
            "1",
            "[-1]",
            "[4294967296]",
            "[\"a\",1]",
            "[1,\"a\"]",
            "[[1],2]",
            "[1.5]",
            "{}",
            "[[1],[\"a\"]]",
        ] {
            assert!(parse::<PromptInput>(bad).is_err(), "{bad}");
        }
        let many = format!("[{}]", vec!["\"x\""; bounds::PROMPTS + 1].join(","));
        assert!(parse::<PromptInput>(&many).unwrap_err().contains("more than"));
    }

    #[test]
    fn maps_are_strict() {
        assert_eq!(parse::<LogitBias>("{\"5\": -1.5}").unwrap().0, [(5, -1.5)]);
        for bad in ["{\"x\":1}", "{\"-1\":1}", "{\"1\":\"x\"}", "{\"1\":null}", "[]", "3"] {
            assert!(parse::<LogitBias>(bad).is_err(), "{bad}");
        }
        let many = (0..=bounds::LOGIT_BIAS).map(|i| format!("\"{i}\":1")).collect::<Vec<_>>().join(",");
        assert!(parse::<LogitBias>(&format!("{{{many}}}")).unwrap_err().contains("more than"));
        assert_eq!(
            parse::<Kwargs>("{\"a\":true,\"b\":null,\"c\":-1,\"d\":\"x\",\"e\":1.5}").unwrap().0.len(),
            5
        );
        for bad in ["{\"a\":[]}", "{\"a\":{}}", "{\"a\":1,\"a\":2}", "[]"] {
            assert!(parse::<Kwargs>(bad).is_err(), "{bad}");
        }
        assert!(parse::<OneOrMany>("3").is_err());
        assert_eq!(parse::<OneOrMany>("\"x\"").unwrap().0, ["x"]);
    }
}
