//! Where a ledger's store is, as an operator writes it.
//!
//! Owns the URL's grammar and which kind of connection each caller gets. A password is never part of the URL, so
//! a location can be printed, logged and configured in the open.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::chain::ChainKey;
use crate::error::StoreError;
use crate::quota::{QuotaConfig, QuotaStartError, Quotas};
use crate::store::sqlite::SqliteOptions;
use crate::store::{Outbox, SqlStore, Store};

/// Why a URL names no store. Never repeats the URL, which may hold a password by mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LocationError {
    /// Neither of the two kinds.
    #[error("a store is sqlite:///absolute/path, sqlite:relative/path or postgres://user@host/database")]
    Scheme,
    /// A SQLite URL without a usable path.
    #[error(
        "a SQLite store is sqlite:///absolute/path or sqlite:relative/path, without host, query or fragment"
    )]
    SqlitePath,
    /// What PostgreSQL's own parser refuses.
    #[error("the PostgreSQL URL cannot be read: it is postgres://user@host:port/database?option=value")]
    Postgres,
    /// A secret where everybody sees it.
    #[error("the store's URL must not hold a password: give it in a file or the environment")]
    Password,
    /// The binary was built without it.
    #[error("this build has no PostgreSQL")]
    NoPostgres,
}

#[derive(Clone)]
enum Kind {
    Sqlite(PathBuf),
    #[cfg(feature = "postgres")]
    Postgres(Box<postgres::Config>),
}

/// Where a store is, and the password for it.
#[derive(Clone)]
pub struct Location {
    /// As it was written: it holds no password.
    url: String,
    kind: Kind,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Location({})", self.url)
    }
}

impl FromStr for Location {
    type Err = LocationError;

    fn from_str(url: &str) -> Result<Self, LocationError> {
        let kind = match url.split_once(':') {
            Some(("sqlite", path)) => Kind::Sqlite(sqlite_path(path)?),
            Some(("postgres" | "postgresql", rest)) if rest.starts_with("//") => postgres_kind(url)?,
            _ => return Err(LocationError::Scheme),
        };
        Ok(Self { url: url.to_owned(), kind })
    }
}

/// What follows `sqlite:`. Two slashes begin a host, and there is none.
fn sqlite_path(path: &str) -> Result<PathBuf, LocationError> {
    let path = match path.strip_prefix("//") {
        Some(absolute) if absolute.starts_with('/') => absolute,
        Some(_) => return Err(LocationError::SqlitePath),
        None => path,
    };
    if path.is_empty() || path.ends_with('/') || path.contains(['?', '#', '\0']) {
        return Err(LocationError::SqlitePath);
    }
    Ok(path.into())
}

#[cfg(feature = "postgres")]
fn postgres_kind(url: &str) -> Result<Kind, LocationError> {
    let config: postgres::Config = url.parse().map_err(|_| LocationError::Postgres)?;
    if config.get_password().is_some() {
        return Err(LocationError::Password);
    }
    Ok(Kind::Postgres(Box::new(config)))
}

#[cfg(not(feature = "postgres"))]
const fn postgres_kind(_: &str) -> Result<Kind, LocationError> {
    Err(LocationError::NoPostgres)
}

impl Location {
    /// With the password of the database's user. A store without users takes no notice of it.
    #[must_use]
    #[cfg_attr(not(feature = "postgres"), expect(unused_variables, reason = "a file has no password"))]
    pub fn with_password(self, password: &str) -> Self {
        match self.kind {
            Kind::Sqlite(_) => self,
            #[cfg(feature = "postgres")]
            Kind::Postgres(mut config) => {
                config.password(password);
                Self { kind: Kind::Postgres(config), ..self }
            }
        }
    }

    /// The file, where the store is one.
    pub fn path(&self) -> Option<&Path> {
        match &self.kind {
            Kind::Sqlite(path) => Some(path),
            #[cfg(feature = "postgres")]
            Kind::Postgres(_) => None,
        }
    }

    /// Whether one process at a time can hold it, so that a server may take its dead predecessor's rows over at
    /// once: [`crate::LedgerConfig::takeover`].
    pub fn is_exclusive(&self) -> bool {
        self.path().is_some()
    }

    /// Opens it for a server, and creates what is not there. A file is locked against a second server.
    ///
    /// # Errors
    /// It is in use, newer than this build, out of reach or damaged.
    pub fn open(&self, key: Option<ChainKey>) -> Result<Box<dyn Store>, StoreError> {
        self.open_with(key, &SqliteOptions::default())
    }

    /// Opens it to change it beside a server that runs: erasing, purging.
    ///
    /// # Errors
    /// It does not exist, is newer than this build, out of reach or damaged.
    pub fn open_beside(&self, key: Option<ChainKey>) -> Result<Box<dyn Store>, StoreError> {
        self.must_exist()?;
        self.open_with(key, &SqliteOptions { exclusive: false, ..SqliteOptions::default() })
    }

    fn open_with(
        &self,
        key: Option<ChainKey>,
        options: &SqliteOptions,
    ) -> Result<Box<dyn Store>, StoreError> {
        Ok(match &self.kind {
            Kind::Sqlite(path) => Box::new(SqlStore::open(path, key, options)?),
            #[cfg(feature = "postgres")]
            Kind::Postgres(config) => {
                Box::new(SqlStore::new(crate::store::postgres::Postgres::of((**config).clone()), key)?)
            }
        })
    }

    /// Counts quotas in it, on a connection of their own beside the ledger's.
    ///
    /// # Errors
    /// The zone is unknown, or the store is newer than this build, out of reach or damaged.
    pub fn start_quotas(&self, config: QuotaConfig) -> Result<Quotas, QuotaStartError> {
        match &self.kind {
            Kind::Sqlite(path) => {
                let options = SqliteOptions { exclusive: false, ..SqliteOptions::default() };
                Quotas::start(SqlStore::open(path, None, &options)?, config)
            }
            #[cfg(feature = "postgres")]
            Kind::Postgres(place) => {
                let driver = crate::store::postgres::Postgres::of((**place).clone());
                Quotas::start(SqlStore::new(driver, None)?, config)
            }
        }
    }

    /// Opens its queue of ended rows, beside a server that writes them.
    ///
    /// # Errors
    /// As [`Location::open_beside`].
    pub fn open_outbox(&self) -> Result<Box<dyn Outbox>, StoreError> {
        self.must_exist()?;
        Ok(match &self.kind {
            Kind::Sqlite(path) => {
                let options = SqliteOptions { exclusive: false, ..SqliteOptions::default() };
                Box::new(SqlStore::open(path, None, &options)?)
            }
            #[cfg(feature = "postgres")]
            Kind::Postgres(config) => {
                Box::new(SqlStore::new(crate::store::postgres::Postgres::of((**config).clone()), None)?)
            }
        })
    }

    /// Opens it to read, beside a server that may be writing it. Nothing is created, changed or migrated.
    ///
    /// # Errors
    /// It does not exist, is newer than this build, out of reach or damaged.
    pub fn open_reading(&self) -> Result<Box<dyn Store>, StoreError> {
        self.must_exist()?;
        Ok(match &self.kind {
            Kind::Sqlite(path) => Box::new(SqlStore::open_reading(path)?),
            #[cfg(feature = "postgres")]
            Kind::Postgres(config) => {
                let mut config = (**config).clone();
                let given = config.get_options().unwrap_or_default();
                let options = format!("{given} -c default_transaction_read_only=on");
                config.options(options.trim_start());
                Box::new(SqlStore::reading(crate::store::postgres::Postgres::of(config))?)
            }
        })
    }

    /// A tool that is given the wrong path must say so, not make an empty store there.
    fn must_exist(&self) -> Result<(), StoreError> {
        match self.path() {
            Some(path) if !path.is_file() => {
                Err(StoreError::Unavailable(format!("there is no file {}", path.display())))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::tests::LEASE;

    fn location(url: &str) -> Result<Location, LocationError> {
        url.parse()
    }

    #[test]
    fn urls_name_files_and_databases() {
        for (url, path) in [
            ("sqlite:///var/lib/mirai/ledger.db", "/var/lib/mirai/ledger.db"),
            ("sqlite:/var/ledger.db", "/var/ledger.db"),
            ("sqlite:ledger.db", "ledger.db"),
            ("sqlite:./a b/ledger.db", "./a b/ledger.db"),
        ] {
            let found = location(url).unwrap();
            assert_eq!(found.path(), Some(Path::new(path)), "{url}");
            assert!(found.is_exclusive() && found.to_string() == url);
            assert_eq!(found.with_password("x").path(), Some(Path::new(path)));
        }
        for url in ["postgres://mirai@db/mirai", "postgresql://mirai@[::1]:5433/x?connect_timeout=3"] {
            let found = location(url).unwrap();
            assert_eq!((found.path(), found.is_exclusive()), (None, false));
            let with = found.clone().with_password("canary");
            let Kind::Postgres(config) = &with.kind else { panic!("{url}") };
            assert_eq!(config.get_password(), Some(&b"canary"[..]));
            assert!(!format!("{with} {with:?}").contains("canary"));
        }
        for (url, error) in [
            ("", LocationError::Scheme),
            ("ledger.db", LocationError::Scheme),
            ("/ledger.db", LocationError::Scheme),
            ("postgres:mirai@db", LocationError::Scheme),
            ("mysql://canary@db/x", LocationError::Scheme),
            ("sqlite:", LocationError::SqlitePath),
            ("sqlite://", LocationError::SqlitePath),
            ("sqlite:///", LocationError::SqlitePath),
            ("sqlite://host/ledger.db", LocationError::SqlitePath),
            ("sqlite:ledger.db?mode=canary", LocationError::SqlitePath),
            ("postgres://u:canary@[/x", LocationError::Postgres),
            ("postgres://u@db/x?canary=1", LocationError::Postgres),
            ("postgres://u:canary@db/x", LocationError::Password),
            ("postgres://u@db/x?password=canary", LocationError::Password),
        ] {
            let found = location(url).unwrap_err();
            assert_eq!(found, error, "{url}");
            assert!(!found.to_string().contains("canary"));
        }
    }

    #[test]
    fn each_caller_gets_its_own_kind_of_connection() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger.db");
        let here = location(&format!("sqlite://{}", path.display())).unwrap();
        for missing in [here.open_reading().map(drop), here.open_beside(None).map(drop)] {
            let error = missing.unwrap_err();
            assert!(error.is_unavailable() && error.to_string().contains("ledger.db"), "{error}");
        }
        assert!(!path.exists(), "a tool creates nothing");
        let mut server = here.open(None).unwrap();
        server.register("w", LEASE, true).unwrap();
        assert!(matches!(here.open(None).map(drop), Err(StoreError::Locked(_))));
        let mut tool = here.open_beside(None).unwrap();
        assert_eq!(tool.anonymize(0, 10).unwrap(), 0);
        let mut reader = here.open_reading().unwrap();
        assert_eq!(reader.chains().unwrap().len(), 1);
        assert!(reader.register("x", LEASE, false).is_err());
    }
}
