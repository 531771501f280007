//! The command line of `mirai usage`.
//!
//! Owns flags and what their words mean; never opens anything.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use mirai_ledger::date;
use mirai_ledger::export::Format;
use mirai_ledger::store::Grouping;

/// A moment of a flag, microseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment(pub(crate) i64);

/// A day or time as the ledger's dates are written; no row is older than 1970.
fn moment(text: &str) -> Result<Moment, String> {
    let micros = date::parse(text).map_err(|error| error.to_string())?;
    if micros < 0 { Err("no row is older than 1970".to_owned()) } else { Ok(Moment(micros)) }
}

/// `mirai usage`: sums without a subcommand.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct UsageArgs {
    #[command(subcommand)]
    pub(crate) command: Option<UsageCommand>,
    #[command(flatten)]
    pub(crate) ledger: LedgerArgs,
    #[command(flatten)]
    pub(crate) report: ReportArgs,
}

/// Which ledger.
#[derive(Args, Clone, Default)]
pub(crate) struct LedgerArgs {
    /// Where the rows are: sqlite:///PATH or postgres://USER@HOST/DATABASE. MIRAI_LEDGER_PASSWORD may hold the
    /// user's password.
    #[arg(long, env = "MIRAI__LEDGER__STORE", value_name = "URL")]
    pub(crate) ledger: Option<String>,
    /// File with the password of the database's user.
    #[arg(long, env = "MIRAI__LEDGER__PASSWORD_FILE", value_name = "FILE")]
    pub(crate) ledger_password_file: Option<PathBuf>,
    /// File of versioned secrets with which the chain of rows is signed.
    #[arg(long, env = "MIRAI__LEDGER__CHAIN_KEY_FILE", value_name = "FILE")]
    pub(crate) chain_key_file: Option<PathBuf>,
}

/// What is summed, and how it is written.
#[derive(Args)]
pub(crate) struct ReportArgs {
    /// Requests that arrived at this time or later: 2026-11-01 (midnight UTC) or 2026-11-01T08:00:00+01:00
    /// [default: the begin of this month].
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) from: Option<Moment>,
    /// Requests that arrived before this time [default: now].
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) to: Option<Moment>,
    /// Width of a line in time; days begin at midnight UTC.
    #[arg(long, value_enum, default_value_t = Bucket::Day)]
    pub(crate) bucket: Bucket,
    /// What lines are kept apart by; `none` for time alone.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Group::Application, Group::Model])]
    pub(crate) group_by: Vec<Group>,
    /// Only these applications.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub(crate) application: Vec<String>,
    /// Only these keys, by their ids.
    #[arg(long, value_name = "ID", value_delimiter = ',')]
    pub(crate) key: Vec<String>,
    /// Only these models.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub(crate) model: Vec<String>,
    /// How it is written.
    #[arg(long, value_enum, default_value_t = OutputFormat::Table)]
    pub(crate) format: OutputFormat,
    /// File to write, whole or not at all [default: standard output].
    #[arg(long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Prices in TOML, for costs.
    #[arg(long, env = "MIRAI__USAGE__PRICE_FILE", value_name = "FILE")]
    pub(crate) prices: Option<PathBuf>,
    /// Energy of the whole site for each joule of the machine, for impacts.
    #[arg(long, value_name = "RATIO", requires = "grid_factor")]
    pub(crate) pue: Option<f64>,
    /// Kilograms of CO2 equivalent for each kWh of the grid, for impacts.
    #[arg(long, value_name = "KG", requires = "pue")]
    pub(crate) grid_factor: Option<f64>,
    /// Who is billed, for FOCUS.
    #[arg(long, value_name = "NAME", default_value = "mirai")]
    pub(crate) account: String,
}

/// Width of a line in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Bucket {
    /// A minute.
    #[value(name = "1m", alias = "minute")]
    Minute,
    /// An hour.
    #[value(name = "1h", alias = "hour")]
    Hour,
    /// A day.
    #[value(name = "1d", alias = "day")]
    Day,
    /// All of the time.
    All,
}

impl Bucket {
    pub(crate) fn micros(self) -> i64 {
        match self {
            Self::Minute => date::MINUTE,
            Self::Hour => date::HOUR,
            Self::Day => date::DAY,
            Self::All => i64::MAX,
        }
    }
}

/// What lines are kept apart by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Group {
    /// Who pays.
    #[value(alias = "project")]
    Application,
    /// Which key.
    #[value(alias = "api-key")]
    Key,
    /// Which model.
    Model,
    /// Which price list.
    PriceList,
    /// Nothing.
    None,
}

pub(crate) fn grouping(by: &[Group]) -> Grouping {
    Grouping {
        application: by.contains(&Group::Application),
        key_id: by.contains(&Group::Key),
        model: by.contains(&Group::Model),
        price_version: by.contains(&Group::PriceList),
    }
}

/// How sums are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// For people.
    Table,
    /// With a header.
    Csv,
    /// One object.
    Json,
    /// Columns with types.
    Parquet,
    /// FOCUS 1.3 as CSV, a line for each kind of token.
    Focus,
}

impl From<OutputFormat> for Format {
    fn from(format: OutputFormat) -> Self {
        match format {
            OutputFormat::Table => Self::Table,
            OutputFormat::Csv => Self::Csv,
            OutputFormat::Json => Self::Json,
            OutputFormat::Parquet => Self::Parquet,
            OutputFormat::Focus => Self::Focus,
        }
    }
}

#[derive(Subcommand)]
pub(crate) enum UsageCommand {
    /// Write each ended request as a line of JSON, without its user.
    Rows(RowsArgs),
    /// Erase the users' pseudonyms of requests that ended before a time. Nothing brings them back.
    Anonymize(BeforeArgs),
    /// Remove requests that ended before a time, and sign what remains of the chain. Needs --chain-key-file.
    Purge(BeforeArgs),
    /// Check that no row was lost or altered: every chain of rows from its begin to its head.
    Verify(LedgerArgs),
    /// Print every field that is stored or exported, with its class, purpose, retention and anonymisation.
    Registry,
}

#[derive(Args)]
pub(crate) struct RowsArgs {
    #[command(flatten)]
    pub(crate) ledger: LedgerArgs,
    /// Requests that arrived at this time or later [default: all].
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) from: Option<Moment>,
    /// Requests that arrived before this time [default: all].
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) to: Option<Moment>,
    /// With the users' pseudonyms, which are personal data.
    #[arg(long)]
    pub(crate) with_user: bool,
    /// File to write, whole or not at all [default: standard output].
    #[arg(long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct BeforeArgs {
    #[command(flatten)]
    pub(crate) ledger: LedgerArgs,
    /// A time that has passed: 2026-11-01 (midnight UTC) or 2026-11-01T08:00:00+01:00.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) before: Moment,
}
