//! Strict reading of recipes (TOML) and configurations (JSON): an unknown key is an error that names the nearest known one.

use crate::{Error, OneOrEach, Result, files};
use serde::de::DeserializeOwned;
use std::path::Path;

/// Reads a TOML file, applies `key=value` settings in order, and checks it against `T`.
///
/// A setting's key is a dotted path into the file (`optimizer.learning_rate=1e-3`); its value is TOML, or else taken as a
/// string.
///
/// # Errors
/// [`Error::Io`], [`Error::Invalid`] with the key's path, [`Error::Unknown`] with the nearest known key.
pub fn read_toml<T: DeserializeOwned>(path: &Path, settings: &[String]) -> Result<T> {
    let text = files::read_text(path)?;
    parse_toml(&text, &path.display().to_string(), settings)
}

/// [`read_toml`] for a text in memory; `place` names it in errors.
///
/// # Errors
/// As [`read_toml`].
pub fn parse_toml<T: DeserializeOwned>(text: &str, place: &str, settings: &[String]) -> Result<T> {
    let mut table: toml::Table =
        text.parse().map_err(|e: toml::de::Error| Error::invalid(place, e.to_string().trim_end().to_string()))?;
    for setting in settings {
        set(&mut table, setting)?;
    }
    serde_path_to_error::deserialize(toml::Value::Table(table))
        .map_err(|e| explain(place, &e.path().to_string(), e.inner().message()))
}

/// Reads a JSON file strictly.
///
/// # Errors
/// As [`read_toml`].
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = files::read_text(path)?;
    let mut reader = serde_json::Deserializer::from_str(&text);
    serde_path_to_error::deserialize(&mut reader)
        .map_err(|e| explain(&path.display().to_string(), &e.path().to_string(), &e.inner().to_string()))
}

/// Reads a JSON value strictly; `place` names it in errors.
///
/// # Errors
/// As [`read_toml`].
pub fn from_json<T: DeserializeOwned>(value: serde_json::Value, place: &str) -> Result<T> {
    serde_path_to_error::deserialize(value).map_err(|e| explain(place, &e.path().to_string(), &e.inner().to_string()))
}

/// Writes a value as indented JSON, whole or not at all.
///
/// # Errors
/// [`Error::Io`].
pub fn write_json<T: serde::Serialize>(path: &Path, value: &T) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| Error::file(path, e.to_string()))?;
    text.push('\n');
    files::write_bytes(path, text.as_bytes())
}

/// Serializes an `f32` as the decimal number that a person wrote: 0.9, not 0.8999999761581421.
///
/// # Errors
/// Those of the serializer.
pub fn decimal<S: serde::Serializer>(value: &f32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(shortest(*value))
}

/// [`decimal`] for a number that may be absent, or a list of numbers.
///
/// # Errors
/// Those of the serializer.
pub fn decimals_option<S: serde::Serializer>(value: &Option<OneOrEach<f32>>, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(OneOrEach::One(value)) => serializer.serialize_some(&shortest(*value)),
        Some(OneOrEach::Each(values)) => {
            serializer.serialize_some(&values.iter().copied().map(shortest).collect::<Vec<_>>())
        }
        None => serializer.serialize_none(),
    }
}

fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

fn set(table: &mut toml::Table, setting: &str) -> Result<()> {
    let Some((key, value)) = setting.split_once('=') else {
        return Err(Error::invalid(
            "command line",
            format!("`{setting}` is not a setting; expected key=value, for example optimizer.learning_rate=1e-3"),
        ));
    };
    let (key, value) = (key.trim(), value.trim());
    let value = format!("v = {value}")
        .parse::<toml::Table>()
        .ok()
        .and_then(|mut parsed| parsed.remove("v"))
        .unwrap_or_else(|| toml::Value::String(value.to_string()));
    let mut path: Vec<&str> = key.split('.').collect();
    let last = path.pop().unwrap_or_default();
    let mut inside = table;
    for part in path {
        let entry = inside.entry(part).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        inside = entry.as_table_mut().ok_or_else(|| {
            Error::invalid("command line", format!("`{key}`: `{part}` is a value, so nothing can be set inside it"))
        })?;
    }
    inside.insert(last.to_string(), value);
    Ok(())
}

/// Turns serde's message into one of ours. serde says which keys or variants it knows only in its text.
fn explain(place: &str, path: &str, message: &str) -> Error {
    let place = if path == "." { place.to_string() } else { format!("{place}: {path}") };
    let quoted: Vec<String> = message.split('`').skip(1).step_by(2).map(str::to_string).collect();
    for (prefix, kind) in [("unknown field", "key"), ("unknown variant", "name")] {
        if message.starts_with(prefix)
            && let Some((name, known)) = quoted.split_first()
        {
            // The path ends in the unknown key itself: the place is what holds it.
            let place = place.strip_suffix(&format!(".{name}")).or(place.strip_suffix(&format!(": {name}")));
            let place = place.map(str::to_string).unwrap_or_else(|| path_or(path).to_string());
            return Error::unknown(place, kind, name.clone(), known.to_vec());
        }
    }
    Error::invalid(place, message.lines().next().unwrap_or(message).to_string())
}

fn path_or(path: &str) -> &str {
    if path.is_empty() || path == "." { "configuration" } else { path }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Deserialize, Debug)]
    #[serde(deny_unknown_fields)]
    struct Recipe {
        seed: u64,
        optimizer: Optimizer,
    }

    #[derive(Deserialize, Debug)]
    #[serde(deny_unknown_fields)]
    struct Optimizer {
        learning_rate: f64,
        name: String,
    }

    const TEXT: &str = "seed = 1\n[optimizer]\nlearning_rate = 1e-4\nname = \"adamw\"\n";

    fn parse(text: &str, settings: &[&str]) -> Result<Recipe> {
        let settings: Vec<String> = settings.iter().map(|s| s.to_string()).collect();
        parse_toml(text, "r.toml", &settings)
    }

    #[test]
    fn settings_replace_values() {
        let recipe = parse(TEXT, &["seed=5", "optimizer.learning_rate=0.5", "optimizer.name=lion"]).unwrap();
        assert_eq!((recipe.seed, recipe.optimizer.learning_rate), (5, 0.5));
        assert_eq!(recipe.optimizer.name, "lion");
    }

    #[test]
    fn errors_say_where_and_what() {
        let error = parse(TEXT, &["optimizer.learning_rat=1"]).unwrap_err().to_string();
        assert!(
            error.contains("r.toml: optimizer: unknown key `learning_rat`, did you mean `learning_rate`?"),
            "{error}"
        );
        let error = parse(TEXT, &["sead=1"]).unwrap_err().to_string();
        assert!(error.contains("r.toml: unknown key `sead`, did you mean `seed`?"), "{error}");
        let error = parse(TEXT, &["seed=no"]).unwrap_err().to_string();
        assert!(error.contains("r.toml: seed: ") && error.contains("expected u64"), "{error}");
        assert!(parse(TEXT, &["seed"]).unwrap_err().to_string().contains("expected key=value"));
        assert!(parse(TEXT, &["seed.x=1"]).unwrap_err().to_string().contains("nothing can be set inside"));
    }
}
