//! How exactly a generator's weights are kept in memory, and what reducing them does to its predictions.

use serde::{Deserialize, Serialize, Serializer};
use smalti_base::{Error, Result};
use smalti_models::generators::Predictions;
use smalti_models::sampling::argmax;
use smalti_nn::dense::WeightPrecision;

/// How the generator's weights are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct WeightsArgs {
    /// How the generator's matrices are kept in memory, on the CPU: bf16 and int8 take half and a quarter of the
    /// memory and of the time to read it, and change the results slightly [default: f32]
    #[arg(long, value_name = "f32|bf16|int8")]
    pub weights: Option<String>,
}

impl WeightsArgs {
    /// The precision that is meant.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the known ones, [`Error::Unsupported`] for reduced weights on another device than the CPU.
    pub fn resolve(&self, device: &str) -> Result<WeightPrecision> {
        let Some(name) = &self.weights else {
            return Ok(WeightPrecision::F32);
        };
        let known = WeightPrecision::ALL.map(WeightPrecision::name);
        let precision: WeightPrecision =
            name.parse().map_err(|_| Error::unknown("--weights", "precision", name, known))?;
        if precision != WeightPrecision::F32 && device != "cpu" {
            return Err(Error::unsupported(
                format!("--weights {precision} on device `{device}`"),
                "reduced weights are for the CPU: add `--device cpu`, or leave out --weights",
            ));
        }
        Ok(precision)
    }
}

/// Writes the name of a precision.
///
/// # Errors
/// Those of the serializer.
pub(crate) fn name<S: Serializer>(precision: &WeightPrecision, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(precision.name())
}

/// What reduced weights do to a generator, measured on the tokens of images.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct WeightsEffect {
    /// How the weights are kept.
    #[serde(serialize_with = "name")]
    pub weights: WeightPrecision,
    /// Memory of the reduced matrices in bytes.
    pub bytes: usize,
    /// Memory of the same matrices in `f32`.
    pub bytes_f32: usize,
    /// Validation loss with reduced weights, in bits for each token.
    pub bits_per_token: f64,
    /// Validation loss with `f32` weights.
    pub bits_per_token_f32: f64,
    /// Mean magnitude of the difference between a logit with reduced and with `f32` weights.
    pub logit_difference_mean: f64,
    /// The largest such difference.
    pub logit_difference_max: f64,
    /// Share of the predicted tokens whose most likely code is another one.
    pub changed_argmax: f64,
}

/// Sums differences between two sets of logits.
#[derive(Clone, Debug, Default)]
pub(crate) struct Differences {
    sum: f64,
    largest: f64,
    logits: u64,
    changed: u64,
    tokens: u64,
}

impl Differences {
    /// Adds the predicted tokens of a batch. Only logits of the `vocabulary` image tokens count.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the device returns values of another type.
    pub(crate) fn add(&mut self, exact: Predictions, reduced: Predictions, vocabulary: usize) -> Result<()> {
        let width = exact.logits.dims()[1].max(1);
        let floats = |data: burn::tensor::TensorData| {
            let values = data.convert::<f32>().try_into_vec::<f32>();
            values.map_err(|error| Error::invalid("logits", format!("{error:?}")))
        };
        let weights = exact.weights.map(|weights| floats(weights.into_data())).transpose()?;
        let (exact, reduced) = (floats(exact.logits.into_data())?, floats(reduced.logits.into_data())?);
        for (token, (exact, reduced)) in exact.chunks_exact(width).zip(reduced.chunks_exact(width)).enumerate() {
            if weights.as_ref().is_some_and(|weights| weights[token] == 0.0) {
                continue;
            }
            let (exact, reduced) = (&exact[..vocabulary], &reduced[..vocabulary]);
            for (a, b) in exact.iter().zip(reduced) {
                let difference = f64::from((a - b).abs());
                self.sum += difference;
                // Not `max`, which would hide a difference that is no number.
                if difference > self.largest || difference.is_nan() {
                    self.largest = difference;
                }
            }
            self.logits += vocabulary as u64;
            self.changed += u64::from(argmax(exact) != argmax(reduced));
            self.tokens += 1;
        }
        Ok(())
    }

    /// Mean and largest difference, and the share of changed tokens.
    pub(crate) fn summary(&self) -> [f64; 3] {
        let mean = self.sum / self.logits.max(1) as f64;
        [mean, self.largest, self.changed as f64 / self.tokens.max(1) as f64]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, Int, Tensor};

    #[test]
    fn names_and_devices_are_checked() {
        let resolve = |name: &str, device: &str| WeightsArgs { weights: Some(name.into()) }.resolve(device);
        assert_eq!(resolve("int8", "cpu").unwrap(), WeightPrecision::Int8);
        assert_eq!(resolve("f32", "cuda:1").unwrap(), WeightPrecision::F32);
        assert!(resolve("int", "cpu").unwrap_err().to_string().contains("did you mean `int8`?"));
        assert!(resolve("bf16", "cuda").unwrap_err().to_string().contains("--device cpu"));
    }

    #[test]
    fn only_predicted_tokens_and_their_codes_count() {
        let device = Device::flex();
        let predictions = |logits: [[f32; 3]; 2]| Predictions {
            logits: Tensor::from_floats(logits, &device),
            targets: Tensor::<1, Int>::from_ints([0, 1], &device),
            weights: Some(Tensor::from_floats([1.0, 0.0], &device)),
        };
        let mut differences = Differences::default();
        let (exact, reduced) = ([[1.0, 2.0, 9.0], [0.0, 0.0, 0.0]], [[1.0, 0.5, 0.0], [7.0, 7.0, 7.0]]);
        differences.add(predictions(exact), predictions(reduced), 2).unwrap();
        assert_eq!(differences.summary(), [0.75, 1.5, 1.0]);
    }
}
