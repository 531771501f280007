//! The few kinds of values that every store understands.
//!
//! Owns the mapping between a row's typed fields and a store's columns; knows no SQL and no field by name.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A value in a column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Absent.
    Null,
    /// A count, a time or a version.
    Int(i64),
    /// UTF-8.
    Text(String),
    /// A hash or a salt.
    Bytes(Vec<u8>),
}

impl Value {
    /// Whether this is what a field holds that was never set. Such values are left out of digests, so that a
    /// field added later changes no digest made before.
    pub(crate) fn is_default(&self) -> bool {
        match self {
            Self::Null => true,
            Self::Int(n) => *n == 0,
            Self::Text(text) => text.is_empty(),
            Self::Bytes(bytes) => bytes.is_empty(),
        }
    }
}

/// A column holds what its field cannot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected}, found {found}")]
pub struct CellError {
    /// What the field can hold.
    pub expected: &'static str,
    /// The kind of value that was there; never the value, which may be personal.
    pub found: &'static str,
}

impl CellError {
    pub(crate) fn new(expected: &'static str, found: &Value) -> Self {
        let found = match found {
            Value::Null => "nothing",
            Value::Int(_) => "a number out of range",
            Value::Text(_) => "a text",
            Value::Bytes(_) => "bytes",
        };
        Self { expected, found }
    }
}

/// A type that a column can hold.
pub(crate) trait Cell: Sized {
    /// The column's type, as both dialects spell it.
    const SQL: &'static str;
    fn to_value(&self) -> Value;
    fn from_value(value: Value) -> Result<Self, CellError>;
}

impl Cell for i64 {
    const SQL: &'static str = "BIGINT NOT NULL DEFAULT 0";
    fn to_value(&self) -> Value {
        Value::Int(*self)
    }
    fn from_value(value: Value) -> Result<Self, CellError> {
        match value {
            Value::Int(n) => Ok(n),
            other => Err(CellError::new("a number", &other)),
        }
    }
}

macro_rules! unsigned {
    ($($ty:ty),*) => {$(
        impl Cell for $ty {
            const SQL: &'static str = "BIGINT NOT NULL DEFAULT 0";
            /// Stores hold signed numbers: a count above 2^63 - 1 is stored as that.
            fn to_value(&self) -> Value {
                Value::Int(i64::try_from(*self).unwrap_or(i64::MAX))
            }
            fn from_value(value: Value) -> Result<Self, CellError> {
                match value {
                    Value::Int(n) => {
                        Self::try_from(n).map_err(|_| CellError::new("a count", &Value::Int(n)))
                    }
                    other => Err(CellError::new("a count", &other)),
                }
            }
        }
    )*};
}
unsigned!(u16, u32, u64);

impl Cell for String {
    const SQL: &'static str = "TEXT NOT NULL DEFAULT ''";
    fn to_value(&self) -> Value {
        Value::Text(self.clone())
    }
    fn from_value(value: Value) -> Result<Self, CellError> {
        match value {
            Value::Text(text) => Ok(text),
            other => Err(CellError::new("a text", &other)),
        }
    }
}

impl Cell for Option<u64> {
    const SQL: &'static str = "BIGINT";
    fn to_value(&self) -> Value {
        self.as_ref().map_or(Value::Null, Cell::to_value)
    }
    fn from_value(value: Value) -> Result<Self, CellError> {
        if value == Value::Null { Ok(None) } else { u64::from_value(value).map(Some) }
    }
}

impl Cell for Option<String> {
    const SQL: &'static str = "TEXT";
    fn to_value(&self) -> Value {
        self.as_ref().map_or(Value::Null, Cell::to_value)
    }
    fn from_value(value: Value) -> Result<Self, CellError> {
        if value == Value::Null { Ok(None) } else { String::from_value(value).map(Some) }
    }
}

/// Bytes of a fixed number, written as hexadecimal digits in JSON.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hex<const N: usize>(pub [u8; N]);

/// A SHA-256 digest.
pub type Hash = Hex<32>;

impl<const N: usize> std::fmt::Display for Hex<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl<const N: usize> std::fmt::Debug for Hex<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl<const N: usize> std::str::FromStr for Hex<N> {
    type Err = CellError;
    fn from_str(text: &str) -> Result<Self, CellError> {
        let wrong = || CellError::new("hexadecimal digits of a fixed number", &Value::Text(String::new()));
        let mut bytes = [0; N];
        if text.len() != 2 * N || !text.is_ascii() {
            return Err(wrong());
        }
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| wrong())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| wrong())?;
        }
        Ok(Self(bytes))
    }
}

impl<const N: usize> Serialize for Hex<N> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, const N: usize> Deserialize<'de> for Hex<N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl<const N: usize> Cell for Hex<N> {
    const SQL: &'static str = "BYTEA NOT NULL";
    fn to_value(&self) -> Value {
        Value::Bytes(self.0.to_vec())
    }
    fn from_value(value: Value) -> Result<Self, CellError> {
        match value {
            Value::Bytes(bytes) => match bytes.try_into() {
                Ok(bytes) => Ok(Self(bytes)),
                Err(bytes) => Err(CellError::new("bytes of a fixed number", &Value::Bytes(bytes))),
            },
            other => Err(CellError::new("bytes", &other)),
        }
    }
}

impl<const N: usize> Cell for Option<Hex<N>> {
    const SQL: &'static str = "BYTEA";
    fn to_value(&self) -> Value {
        self.as_ref().map_or(Value::Null, Cell::to_value)
    }
    fn from_value(value: Value) -> Result<Self, CellError> {
        if value == Value::Null { Ok(None) } else { Hex::from_value(value).map(Some) }
    }
}

/// Defines an enumeration that is stored as a word. A word of a newer version is kept as it is.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name {
            $($(#[$vdoc])* $variant,)*
            /// A word that this version does not know.
            Other(String),
        }
        impl $name {
            /// Every word that this version writes.
            pub const ALL: &[Self] = &[$(Self::$variant),*];
            /// The word that stands for it.
            pub fn as_str(&self) -> &str {
                match self {
                    $(Self::$variant => $word,)*
                    Self::Other(word) => word,
                }
            }
        }
        impl From<&str> for $name {
            fn from(word: &str) -> Self {
                match word {
                    $($word => Self::$variant,)*
                    other => Self::Other(other.to_owned()),
                }
            }
        }
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Ok(String::deserialize(deserializer)?.as_str().into())
            }
        }
        impl crate::value::Cell for $name {
            const SQL: &'static str = "TEXT NOT NULL DEFAULT ''";
            fn to_value(&self) -> crate::value::Value {
                crate::value::Value::Text(self.as_str().to_owned())
            }
            fn from_value(value: crate::value::Value) -> Result<Self, crate::value::CellError> {
                String::from_value(value).map(|word| word.as_str().into())
            }
        }
    };
}
pub(crate) use words;
