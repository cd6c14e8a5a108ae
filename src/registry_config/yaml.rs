//! YAML as registries read it, and variables that override it.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{CONFIG_LIMIT, NOT_DRIVERS, Source, Variables, normalize_storage};
use crate::error::{Error, Result};
use crate::printable::Printable;

/// The sections that matter here; the rest is skipped unread.
const SECTIONS: [&str; 7] = ["storage", "http", "proxy", "redis", "auth", "notifications", "database"];

/// The sections of a configuration that matter.
pub(super) fn parse(source: &Source, text: &str) -> Result<Map<String, Value>> {
    // An untyped first look, only when the typed one fails, tells bad YAML from YAML of another shape.
    let sections =
        parse_yaml::<Sections>(text).map_err(|why| match parse_yaml::<serde::de::IgnoredAny>(text) {
            Err(why) => source.refuse(&format!("is not valid YAML: {why}"), "correct it there"),
            Ok(_) => source.refuse(
                &format!("is no registry configuration: {why}"),
                "give a registry's storage directory or its config.yml",
            ),
        })?;
    let Sections { storage, http, proxy, redis, auth, notifications, database } = sections;
    let values = [storage, http, proxy, redis, auth, notifications, database];
    Ok(SECTIONS.into_iter().map(str::to_string).zip(values).collect())
}

/// In the order of [`SECTIONS`].
#[derive(Deserialize)]
struct Sections {
    #[serde(default)]
    storage: Value,
    #[serde(default)]
    http: Value,
    #[serde(default)]
    proxy: Value,
    #[serde(default)]
    redis: Value,
    #[serde(default)]
    auth: Value,
    #[serde(default)]
    notifications: Value,
    #[serde(default)]
    database: Value,
}

/// YAML 1.1, which is what registries read: `yes` is true, the last of two equal keys wins, `0100` is 64.
fn parse_yaml<'de, T: Deserialize<'de>>(text: &'de str) -> std::result::Result<T, String> {
    let options = serde_saphyr::options! {
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::LastWins,
        legacy_octal_numbers: true,
        with_snippet: false,
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|why| match why {
        // The registry reads the first and skips the rest, which is hardly what was meant.
        serde_saphyr::Error::MultipleDocuments { .. } => "more than one document".to_string(),
        why => why.to_string().split_whitespace().collect::<Vec<_>>().join(" "),
    })
}

/// Puts what `REGISTRY_A_B=value` says at `a.b`, in the order of the names: the more specific one comes later and wins.
pub(super) fn overlay(
    source: &mut Source,
    config: &mut Map<String, Value>,
    variables: &Variables,
) -> Result<()> {
    for (variable, value) in variables {
        let Some(name) = variable.to_str() else { continue };
        let Some(keys) = name.strip_prefix("REGISTRY_") else { continue };
        let keys: Vec<&str> = keys.split('_').collect();
        if !is_looked_at(&keys) {
            continue;
        }
        let mut value = parse_variable(source, name, value.to_str())?;
        source.overridden_by.push(name.to_string());
        if keys == ["STORAGE"] {
            value = Value::Object(normalize_storage(source, value)?);
        }
        set(config, &keys, value);
    }
    Ok(())
}

/// Whether a variable means one of our sections; those of other drivers don't matter.
fn is_looked_at(keys: &[&str]) -> bool {
    let is = |word: &str, key: &str| word.to_uppercase() == key;
    let of_storage = |key: &str| key == "FILESYSTEM" || NOT_DRIVERS.iter().any(|word| is(word, key));
    match keys {
        ["STORAGE", second, ..] => of_storage(second),
        [first, ..] => SECTIONS.iter().any(|word| is(word, first)),
        [] => false,
    }
}

fn parse_variable(source: &Source, name: &str, text: Option<&str>) -> Result<Value> {
    let text = text.filter(|text| text.len() as u64 <= CONFIG_LIMIT);
    match text.map(str::trim) {
        Some("") => Ok(Value::Null),
        // A password of digits is what it is.
        Some(text) => parse_yaml(text).map(|value: Value| match value {
            Value::Number(_) => Value::String(text.to_string()),
            value => value,
        }),
        None => Err("not text, or more than 1 MiB of it".to_string()),
    }
    .map_err(|why| {
        Error::invalid(format_args!(
            "the variable {name} that overrides {} is not valid YAML: {why}; correct or unset it",
            source.path.printable()
        ))
    })
}

/// Puts `value` below `keys`, making mappings on the way; does nothing below a scalar, like the registry.
fn set(mapping: &mut Map<String, Value>, keys: &[&str], value: Value) {
    let [first, rest @ ..] = keys else { return };
    let known = mapping.keys().find(|key| key.to_uppercase() == *first).cloned();
    put(mapping.entry(known.unwrap_or_else(|| first.to_lowercase())).or_insert(Value::Null), rest, value);
}

fn put(slot: &mut Value, keys: &[&str], value: Value) {
    let [first, ..] = keys else {
        *slot = value;
        return;
    };
    if slot.is_null() {
        *slot = match first.parse::<usize>() {
            Ok(_) => Value::Array(Vec::new()),
            Err(_) => Value::Object(Map::new()),
        };
    }
    match slot {
        Value::Object(inner) => set(inner, keys, value),
        Value::Array(items) => {
            let Some(index) = first.parse::<usize>().ok().filter(|index| *index <= items.len()) else {
                return;
            };
            if index == items.len() {
                items.push(Value::Null);
            }
            if let Some(item) = items.get_mut(index) {
                put(item, &keys[1..], value);
            }
        }
        _ => {}
    }
}
