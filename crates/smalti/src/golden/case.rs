//! Reading a case and comparing with it.

use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
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
    config: serde_json::Value,
    tolerance: Tolerances,
    #[serde(default)]
    tensors: BTreeMap<String, serde_json::Value>,
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
    /// The official configuration.
    pub config: serde_json::Value,
    tolerances: Tolerances,
    descriptions: BTreeMap<String, serde_json::Value>,
    device: Device,
    io: BTreeMap<String, Stored>,
    touched: RefCell<BTreeSet<String>>,
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

    /// A part of the configuration.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is not there or of another type.
    pub fn setting<T: DeserializeOwned>(&self, key: &str) -> Result<T> {
        let value = self.config.pointer(&format!("/{}", key.replace('.', "/"))).cloned();
        let value = value.ok_or_else(|| Error::invalid(self.title(), format!("its config has no `{key}`")))?;
        serde_json::from_value(value).map_err(|e| Error::invalid(self.title(), format!("config `{key}`: {e}")))
    }

    /// [`Self::setting`], or a default if it is not there or null.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is of another type.
    pub fn setting_or<T: DeserializeOwned>(&self, key: &str, default: T) -> Result<T> {
        match self.config.pointer(&format!("/{}", key.replace('.', "/"))) {
            None | Some(serde_json::Value::Null) => Ok(default),
            Some(_) => self.setting(key),
        }
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

/// One compared tensor.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Its name in the case.
    pub tensor: String,
    /// Largest absolute difference; for integers the number of places that differ.
    pub max_abs: f32,
    /// Largest difference in parts of the expected value.
    pub max_rel: f32,
    /// What is allowed; `None` for integers, which must be equal.
    pub tolerance: Option<Tolerance>,
    /// Whether all values are within it.
    pub within: bool,
}

/// Collects rows.
pub struct Comparison<'a> {
    case: &'a Case,
    rows: Vec<Row>,
}

impl<'a> Comparison<'a> {
    /// No rows yet.
    pub fn new(case: &'a Case) -> Self {
        Self { case, rows: Vec::new() }
    }

    /// The rows, in the order of comparing.
    pub fn into_rows(self) -> Vec<Row> {
        self.rows
    }

    /// Compares a float tensor with the one of this name. Shapes need not agree, the number of values must.
    ///
    /// # Errors
    /// As [`Case::floats`], or [`Error::Invalid`] for another number of values.
    pub fn floats<const D: usize>(&mut self, name: &str, found: Tensor<D>) -> Result<()> {
        let found: Vec<f32> = found.into_data().iter::<f32>().collect();
        self.values(name, &found)
    }

    /// [`Self::floats`] for values on the host.
    ///
    /// # Errors
    /// As [`Self::floats`].
    pub fn values(&mut self, name: &str, found: &[f32]) -> Result<()> {
        let expected = self.case.floats(name)?;
        self.same_count(name, found.len(), expected.len())?;
        let tolerance = self.case.tolerance(name);
        let (mut max_abs, mut max_rel, mut within) = (0f32, 0f32, true);
        for (found, expected) in found.iter().zip(expected) {
            let error = if found == expected { 0.0 } else { (found - expected).abs() };
            max_abs = max_abs.max(error);
            max_rel = max_rel.max(error / expected.abs().max(f32::MIN_POSITIVE));
            // Written so that NaN is outside.
            within &= error <= tolerance.absolute + tolerance.relative * expected.abs();
        }
        self.rows.push(Row { tensor: name.into(), max_abs, max_rel, tolerance: Some(tolerance), within });
        Ok(())
    }

    /// Compares an integer tensor with the one of this name.
    ///
    /// # Errors
    /// As [`Case::ints`], or [`Error::Invalid`] for another number of values.
    pub fn ids<const D: usize>(&mut self, name: &str, found: Tensor<D, Int>) -> Result<()> {
        let found: Vec<i64> = found.into_data().iter::<i64>().collect();
        self.ints(name, &found)
    }

    /// [`Self::ids`] for values on the host.
    ///
    /// # Errors
    /// As [`Self::ids`].
    pub fn ints(&mut self, name: &str, found: &[i64]) -> Result<()> {
        let expected = self.case.ints(name)?;
        self.same_count(name, found.len(), expected.len())?;
        let differ = found.iter().zip(expected).filter(|(found, expected)| found != expected).count();
        let (max_abs, within) = (differ as f32, differ == 0);
        self.rows.push(Row { tensor: name.into(), max_abs, max_rel: 0.0, tolerance: None, within });
        Ok(())
    }

    fn same_count(&self, name: &str, found: usize, expected: usize) -> Result<()> {
        match found == expected {
            true => Ok(()),
            false => {
                Err(Error::invalid(self.case.title(), format!("`{name}` has {expected} values, made were {found}")))
            }
        }
    }
}

/// A gradient, or an error that names it.
pub(super) fn gradient<const D: usize>(name: &str, gradient: Option<Tensor<D>>) -> Result<Tensor<D>> {
    gradient.ok_or_else(|| Error::invalid(name, "no gradient reached it"))
}

/// A layer's gradient `[inputs, outputs]` as PyTorch has it, the other way round.
pub(super) fn turned(name: &str, found: Option<Tensor<2>>) -> Result<Tensor<2>> {
    Ok(gradient(name, found)?.transpose())
}

/// A tensor in memory, to be loaded.
pub(super) fn stored(shape: &[usize], values: &[f32]) -> Stored {
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
