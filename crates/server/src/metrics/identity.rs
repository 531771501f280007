//! Counts of who was let in, by kind of credential, and of calls to identity providers.
//!
//! Owns the counters and their names. No label takes a value that a client or a token chose.

use super::Counter;

/// What was presented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Credential {
    /// Nothing that could be one.
    None,
    /// A plain key.
    Key,
    /// A key of an application.
    ApplicationKey,
    /// A signed token.
    Signed,
    /// An opaque token.
    Opaque,
    /// What nobody knows.
    Unknown,
}

impl Credential {
    pub(crate) const ALL: [(Self, &'static str); 6] = [
        (Self::None, "none"),
        (Self::Key, "key"),
        (Self::ApplicationKey, "application_key"),
        (Self::Signed, "jwt"),
        (Self::Opaque, "opaque"),
        (Self::Unknown, "unknown"),
    ];
}

/// How it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    Accepted,
    Refused,
    /// An identity provider could not be asked.
    Unavailable,
}

impl Decision {
    pub(crate) const ALL: [(Self, &'static str); 3] =
        [(Self::Accepted, "accepted"), (Self::Refused, "refused"), (Self::Unavailable, "unavailable")];
}

/// What an identity provider was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lookup {
    /// Its keys.
    Keys,
    /// What an opaque token means.
    Token,
}

impl Lookup {
    pub(crate) const ALL: [(Self, &'static str); 2] = [(Self::Keys, "keys"), (Self::Token, "token")];
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct IdentityMetrics {
    decisions: [[Counter; 3]; 6],
    /// By [`Lookup`]: answered, and not.
    lookups: [[Counter; 2]; 2],
}

impl IdentityMetrics {
    pub(crate) fn decided(&self, credential: Credential, decision: Decision) {
        self.decisions[credential as usize][decision as usize].inc();
    }

    pub(crate) fn looked_up(&self, what: Lookup, answered: bool) {
        self.lookups[what as usize][usize::from(!answered)].inc();
    }

    pub(crate) fn decisions(&self, credential: Credential, decision: Decision) -> u64 {
        self.decisions[credential as usize][decision as usize].get()
    }

    /// Answered, not answered.
    pub(crate) fn lookups(&self, what: Lookup) -> [u64; 2] {
        let [answered, failed] = &self.lookups[what as usize];
        [answered.get(), failed.get()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_has_its_counter() {
        let metrics = IdentityMetrics::default();
        for (credential, _) in Credential::ALL {
            for (decision, _) in Decision::ALL {
                metrics.decided(credential, decision);
                assert_eq!(metrics.decisions(credential, decision), 1);
            }
        }
        metrics.looked_up(Lookup::Token, false);
        assert_eq!((metrics.lookups(Lookup::Keys), metrics.lookups(Lookup::Token)), ([0, 0], [0, 1]));
    }
}
