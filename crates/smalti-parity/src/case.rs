//! Reading a case and comparing with it.

use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use smalti_base::{Error, Result, config};
use smalti_models::checkpoint::{Stored, Values, read_tensors};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// How far a float may be off: `absolute + relative * |expected|`. Integers must be equal.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tolerance {
    /// Absolute part.
    #[serde(rename = "abs")]
    pub absolute: f32,
    /// Part of the expected value.
    #[serde(rename = "rel")]
    pub relative: f32,
}

#[derive(Deserialize)]
struct CaseFile {
    system: String,
    config: Value,
    tolerance: Tolerances,
    #[serde(default)]
    tensors: BTreeMap<String, Value>,
}

/// A tolerance for all tensors, and others for those whose names fit a pattern with `*` for any characters.
#[derive(Deserialize)]
struct Tolerances {
    #[serde(flatten)]
    all: Tolerance,
    #[serde(default)]
    overrides: BTreeMap<String, Tolerance>,
}

/// A case that was read.
pub struct Case {
    folder: PathBuf,
    /// The system that it belongs to.
    pub system: String,
    config: Value,
    tolerances: Tolerances,
    descriptions: BTreeMap<String, Value>,
    device: Device,
    io: BTreeMap<String, Stored>,
    touched: RefCell<BTreeSet<String>>,
    /// Paths of the settings that were read.
    read: RefCell<BTreeSet<String>>,
    /// Paths of those that were checked by themselves.
    checked: RefCell<BTreeSet<String>>,
}

impl Case {
    /// Reads a case's description and tensors, all but the weights.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Invalid`] if it is not a whole case.
    pub fn open(folder: &Path, device: &Device) -> Result<Self> {
        let CaseFile { system, config, tolerance, tensors } = config::read_json(&folder.join("case.json"))?;
        Ok(Self {
            folder: folder.to_path_buf(),
            system,
            config,
            tolerances: tolerance,
            descriptions: tensors,
            device: device.clone(),
            // Cases of text tokenizers have none.
            io: match folder.join("io.safetensors") {
                path if path.exists() => read_tensors(&path)?,
                _ => BTreeMap::new(),
            },
            touched: RefCell::default(),
            read: RefCell::default(),
            checked: RefCell::default(),
        })
    }

    /// `system/name`, where the name is the folder's.
    pub fn title(&self) -> String {
        let name = self.folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        format!("{}/{name}", self.system)
    }

    /// The device to compute on, without gradients.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The device to compute gradients on.
    pub fn autodiff(&self) -> Device {
        self.device.clone().autodiff()
    }

    /// Whether the case has no tensors but weights.
    pub fn is_empty(&self) -> bool {
        self.io.is_empty()
    }

    /// Whether the case has all these tensors.
    pub fn has(&self, names: &[&str]) -> bool {
        names.iter().all(|name| self.io.contains_key(*name))
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.io.keys().map(String::as_str)
    }

    /// The number that follows `mark` in what the case says of a tensor.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is none.
    pub fn said(&self, name: &str, mark: &str) -> Result<f64> {
        let number = |text: &str| {
            let is_part = |c: char| c.is_ascii_digit() || ".eE+-".contains(c);
            let end = text.find(|c| !is_part(c)).unwrap_or(text.len());
            text[..end].trim_end_matches(['.', '-']).parse().ok()
        };
        let found = self.description(name).split_once(mark).and_then(|(_, text)| number(text));
        found.ok_or_else(|| Error::invalid(self.title(), format!("no number follows `{mark}` in the line of `{name}`")))
    }

    /// The number in front of `mark` in what the case says of a tensor.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is none.
    pub fn said_before(&self, name: &str, mark: &str) -> Result<f64> {
        let before = self.description(name).split_once(mark).map(|(before, _)| before);
        let found = before.and_then(|before| before.split_whitespace().last()?.parse().ok());
        found
            .ok_or_else(|| Error::invalid(self.title(), format!("no number precedes `{mark}` in the line of `{name}`")))
    }

    fn value(&self, key: &str) -> Option<&Value> {
        match key {
            "" => Some(&self.config),
            key => self.config.pointer(&format!("/{}", key.replace('.', "/"))),
        }
    }

    /// Whether the configuration has all these settings, which does not count as reading them.
    pub fn has_settings(&self, keys: &[&str]) -> bool {
        keys.iter().all(|key| self.value(key).is_some())
    }

    /// A setting or a part of the configuration, by its dotted path; the whole of it by an empty one. With a type that denies
    /// unknown fields an unknown setting is an error; remarks such as `seed` and `note` are none, nor are those that
    /// [`Self::only`] or [`Self::ignore`] had before.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is not there or of another type, [`Error::Unknown`] for an unknown setting inside.
    pub fn setting<T: DeserializeOwned>(&self, key: &str) -> Result<T> {
        self.read.borrow_mut().insert(key.to_string());
        let value = self.value(key);
        let value = value.ok_or_else(|| Error::invalid(self.title(), format!("its config has no `{key}`")))?;
        let place = if key.is_empty() { "config".to_string() } else { format!("config.{key}") };
        config::from_json(self.remaining(value, key), &format!("{}: {place}", self.title()))
    }

    /// [`Self::setting`], or a default if it is not there or null.
    ///
    /// # Errors
    /// As [`Self::setting`] of one that is there.
    pub fn setting_or<T: DeserializeOwned>(&self, key: &str, default: T) -> Result<T> {
        match self.value(key) {
            None | Some(Value::Null) => Ok(default),
            Some(_) => self.setting(key),
        }
    }

    /// Fails unless a setting, where there is one, has the only value that is supported.
    ///
    /// # Errors
    /// [`Error::Unsupported`] that names the setting.
    pub fn only(&self, key: &str, supported: impl Into<Value>) -> Result<()> {
        self.ignore(&[key]);
        let (found, supported) = (self.value(key), supported.into());
        // 1 and 1.0 are one number.
        let same = |found: &Value| match (found.as_f64(), supported.as_f64()) {
            (Some(found), Some(supported)) => found == supported,
            _ => *found == supported,
        };
        match found {
            Some(found) if !found.is_null() && !same(found) => Err(Error::unsupported(
                format!("{}: config.{key} = {found}", self.title()),
                format!("only {supported} is"),
            )),
            _ => Ok(()),
        }
    }

    /// Settings that change nothing that a case holds, or that are read by themselves.
    pub fn ignore(&self, keys: &[&str]) {
        self.read.borrow_mut().extend(keys.iter().map(|key| key.to_string()));
        self.checked.borrow_mut().extend(keys.iter().map(|key| key.to_string()));
    }

    /// A part of the configuration without remarks and what was checked.
    fn remaining(&self, value: &Value, path: &str) -> Value {
        let Value::Object(map) = value else { return value.clone() };
        let kept = map.iter().filter_map(|(key, value)| {
            let path = joined(path, key);
            let left_out = is_remark(key) || self.checked.borrow().contains(&path);
            (!left_out).then(|| (key.clone(), self.remaining(value, &path)))
        });
        Value::Object(kept.collect())
    }

    /// The settings that nobody has read.
    pub fn unread(&self) -> Vec<String> {
        let mut found = Vec::new();
        unread(&self.config, "", &self.read.borrow(), &mut found);
        found
    }

    /// How far a tensor's floats may be off: the longest pattern that its name fits counts.
    pub fn tolerance(&self, name: &str) -> Tolerance {
        let fitting = self.tolerances.overrides.iter().filter(|(pattern, _)| fits(name, pattern));
        fitting.max_by_key(|(pattern, _)| pattern.len()).map_or(self.tolerances.all, |(_, tolerance)| *tolerance)
    }

    /// The line about a tensor; empty if there is none.
    pub fn description(&self, tensor: &str) -> &str {
        self.descriptions.get(tensor).and_then(|line| line.as_str()).unwrap_or_default()
    }

    /// A value that the line about a tensor says as `key=value`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it does not, or the value is of another type.
    pub fn told<T: std::str::FromStr>(&self, tensor: &str, key: &str) -> Result<T> {
        let words = self.description(tensor).split([' ', ',', ';', '|']);
        let value = words.filter_map(|word| word.strip_prefix(key)?.strip_prefix('=')).next();
        let problem = || Error::invalid(self.title(), format!("its line about `{tensor}` says no `{key}=value`"));
        value.and_then(|value| value.parse().ok()).ok_or_else(problem)
    }

    /// A tensor without counting as read.
    pub(crate) fn peek(&self, name: &str) -> Option<&Stored> {
        self.io.get(name)
    }

    fn stored(&self, name: &str) -> Result<&Stored> {
        self.touched.borrow_mut().insert(name.to_string());
        self.io.get(name).ok_or_else(|| Error::unknown(self.title(), "tensor", name, self.io.keys()))
    }

    /// A tensor's shape.
    ///
    /// # Errors
    /// [`Error::Unknown`] if there is none of this name.
    pub fn shape(&self, name: &str) -> Result<Vec<usize>> {
        self.stored(name).map(|stored| stored.shape.clone())
    }

    /// The values of a float tensor.
    ///
    /// # Errors
    /// [`Error::Unknown`] or [`Error::Invalid`] if there is no such tensor of floats.
    pub fn floats(&self, name: &str) -> Result<&[f32]> {
        let stored = self.stored(name)?;
        stored.floats().ok_or_else(|| Error::invalid(self.title(), format!("`{name}` does not hold floats")))
    }

    /// The values of an integer tensor.
    ///
    /// # Errors
    /// [`Error::Unknown`] or [`Error::Invalid`] if there is no such tensor of integers.
    pub fn ints(&self, name: &str) -> Result<&[i64]> {
        let stored = self.stored(name)?;
        stored.ints().ok_or_else(|| Error::invalid(self.title(), format!("`{name}` does not hold integers")))
    }

    /// A float tensor on the plain device.
    ///
    /// # Errors
    /// As [`Self::floats`], or [`Error::Invalid`] if it has another number of axes.
    pub fn tensor<const D: usize>(&self, name: &str) -> Result<Tensor<D>> {
        let data = TensorData::new(self.floats(name)?.to_vec(), self.axes::<D>(name)?);
        Ok(Tensor::from_data(data, &self.device))
    }

    /// An integer tensor on the plain device.
    ///
    /// # Errors
    /// As [`Self::ints`], or [`Error::Invalid`] if it has another number of axes.
    pub fn ids<const D: usize>(&self, name: &str) -> Result<Tensor<D, Int>> {
        let data = TensorData::new(self.ints(name)?.to_vec(), self.axes::<D>(name)?);
        Ok(Tensor::from_data(data, &self.device))
    }

    fn axes<const D: usize>(&self, name: &str) -> Result<Vec<usize>> {
        let shape = self.shape(name)?;
        match shape.len() == D {
            true => Ok(shape),
            false => Err(Error::invalid(self.title(), format!("`{name}` is {shape:?}, expected {D} axes"))),
        }
    }

    /// The weights whose names begin with `prefix`, without it.
    ///
    /// # Errors
    /// As [`read_tensors`].
    pub fn weights(&self, prefix: &str) -> Result<BTreeMap<String, Stored>> {
        self.weights_of("weights.safetensors", prefix)
    }

    /// [`Self::weights`] of a file of another name.
    ///
    /// # Errors
    /// As [`read_tensors`].
    pub fn weights_of(&self, file: &str, prefix: &str) -> Result<BTreeMap<String, Stored>> {
        let path = self.folder.join(file);
        if !path.exists() {
            return Ok(BTreeMap::new());
        }
        let all = read_tensors(&path)?.into_iter();
        Ok(all.filter_map(|(name, stored)| Some((name.strip_prefix(prefix)?.to_string(), stored))).collect())
    }

    /// The tensors that nobody has read or compared.
    pub fn untouched(&self) -> Vec<String> {
        let touched = self.touched.borrow();
        self.io.keys().filter(|name| !touched.contains(*name)).cloned().collect()
    }
}

/// Whether a setting only says where the case is from.
fn is_remark(key: &str) -> bool {
    ["seed", "note"].contains(&key) || key.ends_with("_note")
}

fn joined(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_string() } else { format!("{path}.{key}") }
}

fn unread(value: &Value, path: &str, read: &BTreeSet<String>, found: &mut Vec<String>) {
    match value {
        _ if read.contains(path) => {}
        Value::Null => {}
        Value::Object(map) => {
            for (key, value) in map.iter().filter(|(key, _)| !is_remark(key)) {
                unread(value, &joined(path, key), read, found);
            }
        }
        _ => found.push(path.to_string()),
    }
}

/// Whether a name fits a pattern with `*` for any characters.
fn fits(name: &str, pattern: &str) -> bool {
    match pattern.split_once('*') {
        None => name == pattern,
        Some((start, rest)) => name.strip_prefix(start).is_some_and(|name| {
            let ends = (0..=name.len()).filter(|end| name.is_char_boundary(*end));
            ends.into_iter().any(|end| fits(&name[end..], rest))
        }),
    }
}

/// A gradient, or an error that names it.
pub(crate) fn gradient<const D: usize>(name: &str, gradient: Option<Tensor<D>>) -> Result<Tensor<D>> {
    gradient.ok_or_else(|| Error::invalid(name, "no gradient reached it"))
}

/// A tensor in memory, to be loaded.
pub(crate) fn stored(shape: &[usize], values: &[f32]) -> Stored {
    Stored { shape: shape.to_vec(), values: Values::Floats(values.to_vec()) }
}

#[cfg(test)]
mod tests {
    use super::fits;

    #[test]
    fn patterns() {
        assert!(fits("gencfg.output", "gen*.output") && fits("gen.output", "gen*.output"));
        assert!(fits("grad.x.y", "grad.*") && fits("loss", "loss") && fits("a.b.c", "*b*"));
        assert!(!fits("gen.outputs", "gen*.output") && !fits("loss_vb", "loss") && !fits("agrad.x", "grad.*"));
    }
}
