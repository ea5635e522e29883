//! Comparing with a case.

use super::case::{Case, Tolerance};
use burn::tensor::{Int, Tensor};
use serde::Serialize;
use smalti_base::{Error, Result};

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

/// Collects rows. What a case does not hold is not compared; what it holds and nothing was compared with is
/// [`Case::untouched`].
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
    /// [`Error::Invalid`] for a tensor of another kind or number of values.
    pub fn floats<const D: usize>(&mut self, name: &str, found: Tensor<D>) -> Result<()> {
        if !self.case.has(&[name]) {
            return Ok(());
        }
        let found: Vec<f32> = found.into_data().iter::<f32>().collect();
        self.values(name, &found)
    }

    /// [`Self::floats`] for values on the host.
    ///
    /// # Errors
    /// As [`Self::floats`].
    pub fn values(&mut self, name: &str, found: &[f32]) -> Result<()> {
        if !self.case.has(&[name]) {
            return Ok(());
        }
        let expected = self.case.floats(name)?;
        self.same_count(name, found.len(), expected.len())?;
        self.against(name, found, expected);
        Ok(())
    }

    /// Compares values with the tensor of this name as `expected` has it, in another layout. There must be as many of both.
    pub(crate) fn against(&mut self, name: &str, found: &[f32], expected: &[f32]) {
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
    }

    /// Compares an integer tensor with the one of this name.
    ///
    /// # Errors
    /// As [`Self::floats`].
    pub fn ids<const D: usize>(&mut self, name: &str, found: Tensor<D, Int>) -> Result<()> {
        let found: Vec<i64> = found.into_data().iter::<i64>().collect();
        self.ints(name, &found)
    }

    /// [`Self::ids`] for values on the host.
    ///
    /// # Errors
    /// As [`Self::ids`].
    pub fn ints(&mut self, name: &str, found: &[i64]) -> Result<()> {
        if !self.case.has(&[name]) {
            return Ok(());
        }
        let expected = self.case.ints(name)?;
        self.same_count(name, found.len(), expected.len())?;
        let differ = found.iter().zip(expected).filter(|(found, expected)| found != expected).count();
        let (max_abs, within) = (differ as f32, differ == 0);
        self.rows.push(Row { tensor: name.into(), max_abs, max_rel: 0.0, tolerance: None, within });
        Ok(())
    }

    pub(crate) fn same_count(&self, name: &str, found: usize, expected: usize) -> Result<()> {
        match found == expected {
            true => Ok(()),
            false => {
                Err(Error::invalid(self.case.title(), format!("`{name}` has {expected} values, made were {found}")))
            }
        }
    }
}
