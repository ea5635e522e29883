//! A bundle's parts, read: a configuration that suits its weights, and weights whose checksum is the bundle's and whose values are finite.

use super::bundle::{BundlePaths, Part, must_be_sum};
use super::finite::Finite;
use super::packed::pack_from;
use super::tensors::{Source, WeightsFile};
use super::weights::{load_from, load_without_from};
use crate::tokenizers::{TokenDecoder, TokenizerModel};
use burn::module::Module;
use serde::de::DeserializeOwned;
use serde_json::Value;
use smalti_base::{Error, Result, config};
use smalti_nn::dense::{Pack, WeightPrecision};

/// Reads a part's configuration.
///
/// # Errors
/// [`Error::Invalid`] if the bundle has no such part or the part's weights cannot be of such a model, or as [`config::read_json`].
pub fn read_config<C: DeserializeOwned>(bundle: &BundlePaths, part: Part) -> Result<C> {
    if !bundle.has(part) {
        return Err(Error::file(bundle.root(), format!("this bundle has no {}", part.name())));
    }
    let path = bundle.config(part);
    let read = config::read_json(&path)?;
    // A damaged number can ask for any amount of memory, and the weights are there to compare it with.
    if let Ok(file) = bundle.located(part).and_then(|path| WeightsFile::open(&path)) {
        let sizes = Sizes::of(&file);
        sizes.must_suit(&config::read_json(&path)?, "").map_err(|problem| Error::file(&path, problem))?;
    }
    Ok(read)
}

/// How large a model of these weights can be.
struct Sizes {
    /// Most layers.
    tensors: u64,
    /// Largest width.
    values: u64,
}

/// Keys that say how often something is repeated, each time with weights.
const REPEATED: [&str; 6] = ["depth", "head_depth", "layers", "num_res_blocks", "convolutions", "repeats"];
/// Keys that do not say how large something is.
const FREE: [&str; 3] = ["seed", "every", "step"];
/// What a model without weights may have.
const LEAST: Sizes = Sizes { tensors: 64, values: 1 << 16 };
/// The longest schedule.
const MOST_STEPS: u64 = 100_000;

impl Sizes {
    fn of(file: &WeightsFile) -> Self {
        let shapes = file.shapes();
        let values: usize = shapes.values().map(|shape| shape.iter().product::<usize>()).sum();
        Self { tensors: LEAST.tensors.max(shapes.len() as u64), values: LEAST.values.max(values as u64) }
    }

    /// # Errors
    /// The key whose number is too large.
    fn must_suit(&self, value: &Value, key: &str) -> Result<(), String> {
        let at_most = |number: u64, most: u64, what: &str| match number <= most {
            true => Ok(()),
            false => {
                Err(format!("`{key}` is {number}, and the weights beside it are of a model with at most {most} {what}"))
            }
        };
        match value {
            Value::Number(number) if !FREE.contains(&key) => {
                let number = number.as_u64().unwrap_or_default();
                match key {
                    "steps" => at_most(number, MOST_STEPS, "steps"),
                    _ if REPEATED.contains(&key) => at_most(number, self.tensors, "layers"),
                    _ => at_most(number, self.values, "values"),
                }
            }
            Value::Array(items) => {
                let most = if key == "ch_mult" { self.tensors } else { self.values };
                at_most(items.len() as u64, most, "entries")?;
                items.iter().try_for_each(|item| self.must_suit(item, key))
            }
            Value::Object(entries) => {
                let levels = entries.get("ch_mult").and_then(Value::as_array).map_or(1, Vec::len) as u64;
                let blocks = entries.get("num_res_blocks").and_then(Value::as_u64).unwrap_or(1);
                if levels.saturating_mul(blocks) > self.tensors {
                    let most = self.tensors;
                    return Err(format!(
                        "{levels} levels of {blocks} blocks, and the weights beside it are {most} tensors"
                    ));
                }
                entries.iter().try_for_each(|(key, value)| self.must_suit(value, key))
            }
            _ => Ok(()),
        }
    }
}

/// Loads a part's weights into the module that its configuration made.
///
/// # Errors
/// As [`super::load_module`]; [`Error::Mismatch`] if the weights are not those that the bundle names; [`Error::Invalid`] for a value that
/// is not finite.
pub fn read_weights<M: Module>(bundle: &BundlePaths, part: Part, module: M) -> Result<M> {
    verified(bundle, part, |source| load_from(module, source, &|_| false).map(|(module, _)| module))
}

/// The half of a bundle's tokenizer that makes images; the other half is read for the checksum alone.
///
/// # Errors
/// As [`read_weights`].
pub fn read_decoder(bundle: &BundlePaths, tokenizer: TokenizerModel) -> Result<TokenDecoder> {
    let paths = tokenizer.encoder_paths();
    let only_encodes = |path: &str| paths.iter().any(|part| path.starts_with(part));
    verified(bundle, Part::Tokenizer, |source| load_without_from(tokenizer, source, &only_encodes))
        .map(TokenDecoder::new)
}

/// [`read_weights`] for inference on the CPU, with packed dense layers.
///
/// # Errors
/// As [`read_weights`].
pub fn read_packed<M: Pack>(bundle: &BundlePaths, part: Part, module: M, precision: WeightPrecision) -> Result<M> {
    verified(bundle, part, |source| pack_from(module, source, precision))
}

/// Reads a part's weights through `read`. All bytes of the file that is open are hashed meanwhile, and nothing is returned unless their
/// checksum is the one in `bundle.json`.
///
/// # Errors
/// [`Error::Mismatch`] with both checksums; what `read` returns.
pub fn verified<T>(bundle: &BundlePaths, part: Part, read: impl FnOnce(&dyn Source) -> Result<T>) -> Result<T> {
    let expected = bundle.expected_sum(part)?;
    let file = WeightsFile::open(&bundle.located(part)?)?;
    let Some(expected) = expected else { return read(&Finite(&file)) };
    std::thread::scope(|scope| {
        let sum = scope.spawn(|| file.sha256());
        let result = read(&Finite(&file));
        let sum = sum.join().map_err(|_| Error::invalid(file.place(), "its checksum could not be computed"))??;
        must_be_sum(&file.place(), &sum, &expected)?;
        result
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_suit_the_weights() {
        let sizes = Sizes { tensors: 100, values: 70_000 };
        let check = |text: &str| sizes.must_suit(&serde_json::from_str(text).unwrap(), "");
        check(r#"{"depth": 100, "width": 70000, "seed": 18446744073709551615, "ch_mult": [1, 2], "rate": 1e30}"#)
            .unwrap();
        for wrong in [
            r#"{"net": {"depth": 101}}"#,
            r#"{"width": 4294967296}"#,
            r#"{"sizes": [70001]}"#,
            r#"{"ch_mult": [1, 2, 2, 2], "num_res_blocks": 30}"#,
            r#"{"diffusion": {"steps": 2147483648}}"#,
        ] {
            assert!(check(wrong).is_err(), "{wrong}");
        }
    }
}
