//! Weights that are numbers: a NaN or an infinity is found while they are read.

use super::tensors::{Source, Stored};
use smalti_base::{Error, Result};
use std::collections::BTreeMap;

/// A source whose tensors must be finite. What is left out is not looked at.
pub struct Finite<'a>(pub &'a dyn Source);

impl Source for Finite<'_> {
    fn place(&self) -> String {
        self.0.place()
    }

    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.0.shapes()
    }

    fn read(&self, name: &str) -> Result<Stored> {
        let stored = self.0.read(name)?;
        let floats = stored.floats().unwrap_or_default();
        // Blocks first: a sum of zeros is fast, and no number only if one of them is none.
        let is_finite = |block: &[f32]| block.iter().map(|x| x * 0.0).sum::<f32>() == 0.0;
        if floats.chunks(4096).all(is_finite) {
            return Ok(stored);
        }
        let first = floats.iter().position(|x| !x.is_finite()).unwrap_or_default();
        let count = floats.iter().filter(|x| !x.is_finite()).count();
        let problem = format!(
            "{count} of the {} values of tensor `{name}` are not finite; the first is {} at {}",
            floats.len(),
            floats[first],
            place(first, &stored.shape)
        );
        let hint = "the training that made the weights went wrong, or the file is damaged: take an earlier checkpoint";
        Err(Error::invalid_hint(self.place(), problem, hint))
    }
}

/// The indices of a value by its place in row-major order.
fn place(mut at: usize, shape: &[usize]) -> String {
    let mut indices: Vec<String> = Vec::new();
    for length in shape.iter().rev() {
        indices.push((at % length).to_string());
        at /= length;
    }
    indices.reverse();
    format!("[{}]", indices.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::tensors::Values;

    #[test]
    fn what_is_not_finite_is_named() {
        let mut values = vec![1.0f32; 3 * 5000];
        let read = |values: &[f32]| {
            let stored = Stored { shape: vec![3, 5000], values: Values::Floats(values.to_vec()) };
            Finite(&BTreeMap::from([("a.b".to_string(), stored)])).read("a.b").map_err(|error| error.to_string())
        };
        assert!(read(&values).is_ok());
        values[5001] = f32::NEG_INFINITY;
        values[14_999] = f32::NAN;
        let error = read(&values).unwrap_err();
        assert!(error.contains("2 of the 15000 values of tensor `a.b`"), "{error}");
        assert!(error.contains("the first is -inf at [1, 1]"), "{error}");
        values[5001] = f32::MAX;
        values[14_999] = f32::MIN_POSITIVE / 4.0;
        assert!(read(&values).is_ok());
    }
}
