//! What a caller may do.
//!
//! Owns the three words and sets of them. Which route needs which of them belongs to the server.

use serde::de::{Error, SeqAccess, Visitor};
use serde::ser::SerializeSeq;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// One thing that a caller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Use the models.
    Infer,
    /// Read the usage of its own application; with `admin`, of all.
    ReadUsage,
    /// Use the admin listener.
    Admin,
}

impl Scope {
    /// Every scope with its word in files and tokens.
    pub const ALL: [(Self, &'static str); 3] =
        [(Self::Infer, "infer"), (Self::ReadUsage, "read-usage"), (Self::Admin, "admin")];
}

/// A set of scopes, in files a list of their words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scopes {
    /// May use the models.
    pub infer: bool,
    /// May read usage.
    pub read_usage: bool,
    /// May use the admin listener.
    pub admin: bool,
}

impl Scopes {
    /// What an application has whose stanza does not say.
    pub const INFER: Self = Self { infer: true, read_usage: false, admin: false };

    /// Whether a scope is in the set.
    pub fn has(self, scope: Scope) -> bool {
        match scope {
            Scope::Infer => self.infer,
            Scope::ReadUsage => self.read_usage,
            Scope::Admin => self.admin,
        }
    }

    /// The same with one more.
    #[must_use]
    pub fn with(mut self, scope: Scope) -> Self {
        match scope {
            Scope::Infer => self.infer = true,
            Scope::ReadUsage => self.read_usage = true,
            Scope::Admin => self.admin = true,
        }
        self
    }

    /// What both sets have.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            infer: self.infer && other.infer,
            read_usage: self.read_usage && other.read_usage,
            admin: self.admin && other.admin,
        }
    }

    /// The words of the set, in a fixed order.
    pub fn words(self) -> impl Iterator<Item = &'static str> {
        Scope::ALL.into_iter().filter(move |(scope, _)| self.has(*scope)).map(|(_, word)| word)
    }
}

impl Serialize for Scopes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(None)?;
        for word in self.words() {
            list.serialize_element(word)?;
        }
        list.end()
    }
}

impl<'de> Deserialize<'de> for Scopes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words;
        impl<'de> Visitor<'de> for Words {
            type Value = Scopes;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list of infer, read-usage, admin")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Scopes, A::Error> {
                let mut scopes = Scopes::default();
                while let Some(word) = seq.next_element::<String>()? {
                    let found = Scope::ALL.into_iter().find(|(_, known)| *known == word);
                    let (scope, _) =
                        found.ok_or_else(|| A::Error::custom("a scope is infer, read-usage or admin"))?;
                    scopes = scopes.with(scope);
                }
                Ok(scopes)
            }
        }
        deserializer.deserialize_seq(Words)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn words_make_sets_and_sets_make_words() {
        let all: Scopes = serde_json::from_str(r#"["admin", "infer", "read-usage", "infer"]"#).unwrap();
        assert_eq!(serde_json::to_string(&all).unwrap(), r#"["infer","read-usage","admin"]"#);
        assert_eq!(serde_json::from_str::<Scopes>("[]").unwrap(), Scopes::default());
        let usage = Scopes::default().with(Scope::ReadUsage);
        assert_eq!(all.and(usage), usage);
        assert_eq!(usage.and(Scopes::INFER), Scopes::default());
        assert!(usage.has(Scope::ReadUsage) && !usage.has(Scope::Infer) && !usage.has(Scope::Admin));
        for bad in [r#"["root"]"#, r#""infer""#, "[1]", r#"["Infer"]"#] {
            assert!(serde_json::from_str::<Scopes>(bad).is_err(), "{bad}");
        }
    }
}
