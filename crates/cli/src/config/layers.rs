//! Three layers make one configuration: a TOML file, then the environment, then flags.
//!
//! Every field of [`Config`] can be set in each layer without being named here: a layer is a list of paths
//! with values, and the struct itself says which paths exist and what type they have.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::Config;

/// Why the configuration cannot be used. Ends the process with exit code 2.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// A file cannot be read.
    #[error("{path}: {source}", path = path.display())]
    Read { path: PathBuf, source: std::io::Error },
    /// A file's content.
    #[error("{path}: {message}", path = path.display())]
    File { path: PathBuf, message: String },
    /// A variable's name or value.
    #[error("environment variable {name}: {message}")]
    Variable { name: String, message: String },
    /// A flag's value.
    #[error("--{name}: {message}")]
    Flag { name: &'static str, message: String },
}

/// Prefix of our variables. The double underscore is there because an orchestrator injects
/// `MIRAI_PORT=tcp://…` for a service of that name.
const PREFIX: &str = "MIRAI__";

/// Variables that platforms set, with the setting they mean. The first that is set wins; ours stand over them.
const PLATFORM: [(&str, &[&str]); 4] = [
    ("PORT", &["server", "port"]),
    ("HTTP_PORT", &["server", "port"]),
    ("MODEL_DIR", &["model", "path"]),
    ("MODEL_NAME", &["model", "served_names"]),
];

/// One flag that was given.
pub(crate) struct Flag {
    /// Its name, without dashes.
    pub(crate) name: &'static str,
    /// The setting: section and key, with dots.
    pub(crate) setting: &'static str,
    /// Its value.
    pub(crate) value: Value,
}

/// Reads the layers, lowest first, and says of a bad value which layer it came from.
pub(crate) fn load(
    file: Option<&Path>,
    environment: impl Iterator<Item = (String, String)>,
    flags: Vec<Flag>,
) -> Result<Config, ConfigError> {
    let mut table = file.map_or_else(|| Ok(Table::new()), read_file)?;
    let mut variables: Vec<(String, String)> = environment.collect();
    variables.sort();
    for (name, path) in PLATFORM.iter().rev() {
        if let Some((_, text)) = variables.iter().find(|(n, text)| n == name && !text.is_empty()) {
            let list = path.last() == Some(&"served_names");
            let value = Value::String(text.clone());
            let value = if list { Value::Array(vec![value]) } else { value };
            set_variable(&mut table, name, path, text, value)?;
        }
    }
    for (name, text) in variables.iter().filter(|(n, _)| n.starts_with(PREFIX)) {
        let path = name[PREFIX.len()..].to_lowercase();
        let path: Vec<&str> = path.split("__").collect();
        set_variable(&mut table, name, &path, text, Value::String(text.clone()))?;
    }
    for flag in flags {
        let path: Vec<&str> = flag.setting.split('.').collect();
        set(&mut table, &path, flag.value);
        check(&table).map_err(|message| ConfigError::Flag { name: flag.name, message })?;
    }
    config(&table)
        .map_err(|message| ConfigError::File { path: file.unwrap_or(Path::new("")).to_owned(), message })
}

fn read_file(path: &Path) -> Result<Table, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let fail = |message: String| ConfigError::File { path: path.to_owned(), message };
    let table: Table = toml::from_str(&text).map_err(|e| fail(e.to_string()))?;
    if let Some(key) = find_secret(&table) {
        return Err(fail(format!("`{key}` is a secret: give it by a file or by the environment, not here")));
    }
    // From the text once more, because its errors show the line.
    toml::from_str::<Config>(&text).map_err(|e| fail(e.to_string()))?;
    Ok(table)
}

/// A key that says it holds a secret, at any depth. Names of files are no secrets.
fn find_secret(table: &Table) -> Option<&str> {
    table.iter().find_map(|(key, value)| match value {
        Value::Table(inner) => find_secret(inner),
        Value::Array(list) if list.iter().any(Value::is_table) => {
            list.iter().filter_map(Value::as_table).find_map(find_secret)
        }
        _ => {
            let name = key.to_lowercase();
            let secret =
                ["api_key", "api-key", "password", "secret", "token"].iter().any(|w| name.ends_with(w))
                    || name == "api_keys";
            secret.then_some(key.as_str())
        }
    })
}

/// Sets a value that came as text: first as what the text looks like in TOML (a number, a list), then as text.
fn set_variable(
    table: &mut Table,
    name: &str,
    path: &[&str],
    text: &str,
    as_text: Value,
) -> Result<(), ConfigError> {
    let parsed = toml::from_str::<Table>(&format!("v = {text}")).ok().and_then(|mut t| t.remove("v"));
    let mut candidate = table.clone();
    set(&mut candidate, path, parsed.unwrap_or_else(|| as_text.clone()));
    let first = match check(&candidate) {
        Ok(()) => {
            *table = candidate;
            return Ok(());
        }
        Err(message) => message,
    };
    let mut candidate = table.clone();
    set(&mut candidate, path, as_text);
    check(&candidate).map_err(|_| ConfigError::Variable { name: name.to_owned(), message: first })?;
    *table = candidate;
    Ok(())
}

/// Puts a value at a path, making tables on the way; what stands in the way is replaced and judged by `check`.
fn set(table: &mut Table, path: &[&str], value: Value) {
    match path {
        [] => {}
        [key] => {
            table.insert((*key).to_owned(), value);
        }
        [key, rest @ ..] => {
            let inner = table.entry((*key).to_owned()).or_insert_with(|| Value::Table(Table::new()));
            if !inner.is_table() {
                *inner = Value::Table(Table::new());
            }
            if let Value::Table(inner) = inner {
                set(inner, rest, value);
            }
        }
    }
}

fn config(table: &Table) -> Result<Config, String> {
    Value::Table(table.clone())
        .try_into()
        .map_err(|e: toml::de::Error| e.to_string().trim().replace('\n', " "))
}

fn check(table: &Table) -> Result<(), String> {
    config(table).map(|_| ())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::{Device, LogFormat};

    fn with(file: &str, environment: &[(&str, &str)], flags: Vec<Flag>) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mirai.toml");
        std::fs::write(&path, file).unwrap();
        let environment = environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        load(Some(&path), environment, flags)
    }

    fn port(value: i64) -> Flag {
        Flag { name: "port", setting: "server.port", value: Value::Integer(value) }
    }

    #[test]
    fn the_last_layer_wins() {
        let file = "[server]\nport = 1\n[engine]\nmax_num_seqs = 7\n[model]\ndevice = \"cpu\"";
        assert_eq!(with(file, &[], vec![]).unwrap().server.port, 1);
        assert_eq!(with(file, &[("PORT", "2")], vec![]).unwrap().server.port, 2);
        let both = [("HTTP_PORT", "9"), ("PORT", "2"), ("MIRAI__SERVER__PORT", "3")];
        assert_eq!(with(file, &both[..2], vec![]).unwrap().server.port, 2);
        assert_eq!(with(file, &both, vec![]).unwrap().server.port, 3);
        let config = with(file, &both, vec![port(4)]).unwrap();
        assert_eq!(
            (config.server.port, config.engine.max_num_seqs, config.model.device),
            (4, 7, Device::Cpu)
        );
    }

    #[test]
    fn variables_are_read_as_the_type_of_their_field() {
        let environment = [
            ("MIRAI__MODEL__PATH", "123"),
            ("MIRAI__MODEL__SERVED_NAMES", r#"["a", "b"]"#),
            ("MIRAI__SERVER__LIMITS__MAX_STOP", "3"),
            ("MIRAI__ENGINE__ENABLE_PREFIX_CACHING", "false"),
            ("MIRAI__LOG__FORMAT", "json"),
            ("MIRAI__SERVER__TIMEOUTS__DRAIN_DELAY_SECONDS", "1.5"),
            ("MODEL_NAME", "ignored: ours stands over it"),
            ("MIRAI_PORT", "tcp://10.0.0.1:80"),
        ];
        let config = with("", &environment, vec![]).unwrap();
        assert_eq!(config.model.path.as_deref(), Some("123"));
        assert_eq!(config.model.served_names, ["a", "b"]);
        assert_eq!(config.server.limits.max_stop, 3);
        assert!(!config.engine.enable_prefix_caching);
        assert_eq!(config.log.format, LogFormat::Json);
        assert!((config.server.timeouts.drain_delay_seconds - 1.5).abs() < 1e-9);
    }

    #[test]
    fn the_platform_names_are_honoured() {
        let config = with("", &[("MODEL_DIR", "/mnt/models"), ("MODEL_NAME", "chat")], vec![]).unwrap();
        assert_eq!(config.model.path.as_deref(), Some("/mnt/models"));
        assert_eq!(config.model.served_names, ["chat"]);
    }

    #[test]
    fn a_bad_value_names_its_layer_and_its_field() {
        /// File, environment, flags, words of the error.
        type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], Vec<Flag>, &'a [&'a str]);
        let cases: [Case<'_>; 10] = [
            ("[server]\nprot = 1", &[], vec![], &["mirai.toml", "prot"]),
            ("[server]\nport = \"x\"", &[], vec![], &["mirai.toml", "port"]),
            ("[server", &[], vec![], &["mirai.toml"]),
            ("[server]\napi_key = \"k\"", &[], vec![], &["mirai.toml", "api_key", "secret"]),
            ("[identity.introspection]\nclient_secret = \"k\"", &[], vec![], &["client_secret", "secret"]),
            ("[[identity.issuer]]\nclient_secret = \"k\"", &[], vec![], &["client_secret", "secret"]),
            ("", &[("MIRAI__SERVER__PROT", "1")], vec![], &["MIRAI__SERVER__PROT", "prot"]),
            ("", &[("PORT", "tcp://1.2.3.4:5")], vec![], &["variable PORT"]),
            ("", &[("MIRAI__MODEL__DEVICE", "tpu")], vec![], &["MIRAI__MODEL__DEVICE", "tpu"]),
            ("", &[], vec![port(70_000)], &["--port", "70000"]),
        ];
        for (file, environment, flags, words) in cases {
            let error = with(file, environment, flags).unwrap_err().to_string();
            assert!(words.iter().all(|w| error.contains(w)), "{file} {environment:?}: {error}");
            assert!(!error.contains("= \"k\""), "a secret must not be repeated: {error}");
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = load(Some(Path::new("/nonexistent/x.toml")), std::iter::empty(), vec![]).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/x.toml"));
    }
}
