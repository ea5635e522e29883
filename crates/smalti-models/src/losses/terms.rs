//! Named loss terms and how much they count.

use burn::tensor::Tensor;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use smalti_base::{Error, Result};
use std::fmt;

/// A term that a model adds to the loss by itself, such as commitment.
#[derive(Clone, Debug)]
pub struct LossTerm {
    /// What recipes and logs call it.
    pub name: &'static str,
    /// Its value, one element.
    pub value: Tensor<1>,
    /// How much it counts unless the recipe says otherwise.
    pub weight: f64,
}

impl LossTerm {
    /// A term that counts once.
    pub fn new(name: &'static str, value: Tensor<1>) -> Self {
        Self::weighted(name, value, 1.0)
    }

    /// A term with another usual weight.
    pub fn weighted(name: &'static str, value: Tensor<1>, weight: f64) -> Self {
        Self { name, value, weight }
    }
}

/// How much a term counts: a number, or a ramp over the training steps. A pure function of the step, so that a resumed run continues
/// exactly. In recipes `0.25`, or `{ from = 0.0, to = 1e-6, steps = 5000 }`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Weight {
    /// Always the same.
    Constant(f64),
    /// From one number to another.
    Ramp(Ramp),
}

/// A weight that changes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ramp {
    /// Until `start`.
    pub from: f64,
    /// `steps` later, and from then on.
    pub to: f64,
    /// The step, counted from 0, at which it begins.
    #[serde(default)]
    pub start: u64,
    /// How many steps it takes.
    pub steps: u64,
    /// The way from one to the other.
    #[serde(default)]
    pub shape: RampShape,
}

/// The way from one number to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RampShape {
    /// A straight line.
    #[default]
    Linear,
    /// Half a cosine.
    Cosine,
    /// By equal factors; both numbers must be above 0.
    Exponential,
}

impl Weight {
    /// The weight at `step`, counted from 0.
    pub fn at(self, step: u64) -> f64 {
        let Ramp { from, to, start, steps, shape } = match self {
            Self::Constant(weight) => return weight,
            Self::Ramp(ramp) => ramp,
        };
        let progress = (step.saturating_sub(start) as f64 / steps.max(1) as f64).min(1.0);
        match shape {
            RampShape::Linear => from + (to - from) * progress,
            RampShape::Cosine => from + (to - from) * 0.5 * (1.0 - (std::f64::consts::PI * progress).cos()),
            RampShape::Exponential => from * (to / from).powf(progress),
        }
    }

    /// # Errors
    /// [`Error::Invalid`] for a number that is negative or not finite; `key` names it.
    pub fn check(self, key: &str) -> Result<()> {
        let refuse = |problem: String| Err(Error::invalid("loss", format!("{key} {problem}")));
        let fine = |weight: f64| weight.is_finite() && weight >= 0.0;
        match self {
            Self::Constant(weight) if !fine(weight) => refuse(format!("must be at least 0, but is {weight}")),
            Self::Ramp(Ramp { from, to, .. }) if !(fine(from) && fine(to)) => {
                refuse(format!("must be at least 0, but goes from {from} to {to}"))
            }
            Self::Ramp(Ramp { steps: 0, .. }) => refuse("takes 0 steps; expected at least 1".into()),
            Self::Ramp(Ramp { from, to, shape: RampShape::Exponential, .. }) if from == 0.0 || to == 0.0 => {
                refuse("is 0 at one end, which equal factors never reach; give a small number".into())
            }
            _ => Ok(()),
        }
    }
}

impl Serialize for Weight {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Constant(weight) => weight.serialize(serializer),
            Self::Ramp(ramp) => ramp.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Weight {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NumberOrRamp;
        impl<'de> Visitor<'de> for NumberOrRamp {
            type Value = Weight;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number, or a table with from, to and steps")
            }

            fn visit_f64<E: serde::de::Error>(self, weight: f64) -> Result<Weight, E> {
                Ok(Weight::Constant(weight))
            }

            fn visit_i64<E: serde::de::Error>(self, weight: i64) -> Result<Weight, E> {
                Ok(Weight::Constant(weight as f64))
            }

            fn visit_u64<E: serde::de::Error>(self, weight: u64) -> Result<Weight, E> {
                Ok(Weight::Constant(weight as f64))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Weight, A::Error> {
                Ramp::deserialize(MapAccessDeserializer::new(map)).map(Weight::Ramp).map_err(A::Error::custom)
            }
        }
        deserializer.deserialize_any(NumberOrRamp)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Terms {
        kl: Weight,
    }

    #[test]
    fn weights_are_numbers_or_ramps() {
        let read = |text: &str| toml::from_str::<Terms>(text).map(|terms| terms.kl);
        assert_eq!(read("kl = 1").unwrap(), Weight::Constant(1.0));
        assert_eq!(read("kl = 0.25").unwrap(), Weight::Constant(0.25));
        let ramp = read("kl = { from = 0.0, to = 8.0, start = 10, steps = 4 }").unwrap();
        assert_eq!([0, 10, 11, 14, 99].map(|step| ramp.at(step)), [0.0, 0.0, 2.0, 8.0, 8.0]);
        let halving = read("kl = { from = 8.0, to = 1.0, steps = 3, shape = 'exponential' }").unwrap();
        assert!((halving.at(1) - 4.0).abs() < 1e-12 && (halving.at(2) - 2.0).abs() < 1e-12);
        let cosine = read("kl = { from = 1.0, to = 3.0, steps = 2, shape = 'cosine' }").unwrap();
        assert!((cosine.at(1) - 2.0).abs() < 1e-12);
        assert_eq!(toml::from_str::<Terms>(&toml::to_string(&Terms { kl: ramp }).unwrap()).unwrap().kl, ramp);
        assert!(read("kl = 'much'").unwrap_err().to_string().contains("a number, or a table"));
        assert!(read("kl = { form = 1.0, to = 2.0, steps = 3 }").unwrap_err().to_string().contains("form"));
        let refused = |text: &str| read(text).unwrap().check("weights.kl").unwrap_err().to_string();
        assert!(refused("kl = -1").contains("weights.kl must be at least 0"));
        assert!(refused("kl = { from = 0.0, to = 1.0, steps = 0 }").contains("0 steps"));
        assert!(refused("kl = { from = 0.0, to = 1.0, steps = 5, shape = 'exponential' }").contains("0 at one end"));
    }
}
