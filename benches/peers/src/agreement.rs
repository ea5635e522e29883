//! Whether both sides computed the same.

use crate::rows::Tolerance;
use serde::{Deserialize, Serialize};
use smalti::base::{Error, Result};
use smalti::models::checkpoint::{Stored, Values};
use std::collections::BTreeMap;

/// How far one output of smalti is from PyTorch's.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Agreement {
    /// The output.
    pub output: String,
    /// Largest absolute difference; for integers how many differ.
    pub largest: f64,
    /// The measure that is limited.
    pub found: f64,
    /// Its limit.
    pub limit: Tolerance,
}

/// Compares all outputs.
///
/// # Errors
/// [`Error::Invalid`] that names the outputs that are missing, of another size, or too far apart.
pub fn compare(
    row: &str,
    tolerance: &BTreeMap<String, Tolerance>,
    torch: &BTreeMap<String, Stored>,
    smalti: &BTreeMap<String, Stored>,
) -> Result<Vec<Agreement>> {
    let mut found = Vec::new();
    for (name, limit) in tolerance {
        let (Some(expected), Some(ours)) = (torch.get(name), smalti.get(name)) else {
            let have = |side: &BTreeMap<String, Stored>| side.keys().cloned().collect::<Vec<_>>().join(", ");
            let problem = format!("`{name}` is missing; PyTorch wrote {}, smalti {}", have(torch), have(smalti));
            return Err(Error::invalid(row, problem));
        };
        let (largest, measure) = distance(&expected.values, &ours.values, *limit).ok_or_else(|| {
            let (left, right) = (&expected.shape, &ours.shape);
            let kinds = (expected.values.kind(), ours.values.kind());
            let problem = format!("`{name}` is {} {left:?} in PyTorch and {} {right:?} in smalti", kinds.0, kinds.1);
            Error::invalid(row, problem)
        })?;
        found.push(Agreement { output: name.clone(), largest, found: measure, limit: *limit });
    }
    let too_far = |a: &&Agreement| a.found.is_nan() || a.found > value(a.limit);
    let far: Vec<String> = found.iter().filter(too_far).map(ToString::to_string).collect();
    match far.is_empty() {
        true => Ok(found),
        false => Err(Error::invalid_hint(
            row,
            format!("the sides do not agree: {}", far.join("; ")),
            "a row that does not agree has no time; compare its files in target/peers/rows",
        )),
    }
}

/// Largest difference, and the measure that the tolerance limits.
fn distance(expected: &Values, found: &Values, tolerance: Tolerance) -> Option<(f64, f64)> {
    if expected.len() != found.len() || expected.is_empty() {
        return None;
    }
    match (expected, found) {
        (Values::Floats(expected), Values::Floats(found)) => {
            let pairs = || expected.iter().zip(found).map(|(e, f)| (f64::from(*e), f64::from(*f)));
            let worst = |a: f64, b: f64| if b > a || b.is_nan() { b } else { a };
            let largest = pairs().map(|(e, f)| (e - f).abs()).fold(0.0, worst);
            let measure = match tolerance {
                Tolerance::Length { .. } => {
                    let difference: f64 = pairs().map(|(e, f)| (e - f).powi(2)).sum();
                    let length: f64 = pairs().map(|(e, _)| e.powi(2)).sum();
                    (difference / length).sqrt()
                }
                _ => largest / pairs().map(|(e, _)| e.abs()).fold(f64::MIN_POSITIVE, f64::max),
            };
            Some((largest, measure))
        }
        (Values::Ints(expected), Values::Ints(found)) => {
            let differ = expected.iter().zip(found).filter(|(e, f)| e != f).count() as f64;
            Some((differ, differ / expected.len() as f64))
        }
        _ => None,
    }
}

fn value(tolerance: Tolerance) -> f64 {
    match tolerance {
        Tolerance::Largest(limit) | Tolerance::Share { share: limit } | Tolerance::Length { l2: limit } => limit,
    }
}

impl std::fmt::Display for Agreement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { output, largest, found, limit } = self;
        let allowed = value(*limit);
        match limit {
            Tolerance::Share { .. } => {
                write!(f, "{output}: {largest} differ, {:.2} % (limit {} %)", found * 100.0, allowed * 100.0)
            }
            Tolerance::Largest(_) => {
                write!(
                    f,
                    "{output}: largest difference {largest:.1e}, {found:.1e} of the largest value (limit {allowed:e})"
                )
            }
            Tolerance::Length { .. } => {
                write!(f, "{output}: largest difference {largest:.1e}, {found:.1e} of the length (limit {allowed:e})")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outputs(values: Values) -> BTreeMap<String, Stored> {
        BTreeMap::from([("x".to_string(), Stored { shape: vec![values.len()], values })])
    }

    #[test]
    fn what_is_too_far_is_an_error() {
        let (a, b) = (outputs(Values::Floats(vec![1.0, -2.0])), outputs(Values::Floats(vec![1.0, -2.1])));
        let limit = |limit| BTreeMap::from([("x".to_string(), limit)]);
        assert!(compare("row", &limit(Tolerance::Largest(0.06)), &a, &b).is_ok());
        assert!(compare("row", &limit(Tolerance::Largest(0.04)), &a, &b).is_err());
        assert!(compare("row", &limit(Tolerance::Length { l2: 0.04 }), &a, &b).is_err());
        let nan = outputs(Values::Floats(vec![1.0, f32::NAN]));
        assert!(compare("row", &limit(Tolerance::Largest(1e9)), &a, &nan).is_err());
        assert!(compare("row", &limit(Tolerance::Largest(1.0)), &a, &BTreeMap::new()).is_err());
    }

    #[test]
    fn integers_differ_by_share() {
        let (a, b) = (outputs(Values::Ints(vec![1, 2, 3, 4])), outputs(Values::Ints(vec![1, 2, 3, 5])));
        let found = distance(&a["x"].values, &b["x"].values, Tolerance::Share { share: 0.3 });
        assert_eq!(found, Some((1.0, 0.25)));
    }
}
