//! Values on their way from a device to the host. Reading waits for the device.

use burn::tensor::{Int, Tensor, TensorData};
use smalti_base::{Error, Result};

/// The values of a tensor of floats. One download.
///
/// # Errors
/// [`Error::Invalid`] if the device cannot be read or returns something else.
pub fn floats<const D: usize>(values: Tensor<D>) -> Result<Vec<f32>> {
    let expected = values.dims().iter().product();
    let data = values.try_into_data().map_err(|error| failed(format!("{error:?}")))?;
    whole(expected, data.convert::<f32>())
}

/// The values of a tensor of integers. One download.
///
/// # Errors
/// As [`floats`].
pub fn ints<const D: usize>(values: Tensor<D, Int>) -> Result<Vec<i64>> {
    let expected = values.dims().iter().product();
    let data = values.try_into_data().map_err(|error| failed(format!("{error:?}")))?;
    whole(expected, data.convert::<i64>())
}

/// The one value of a tensor of floats.
///
/// # Errors
/// As [`floats`].
pub fn float(value: Tensor<1>) -> Result<f32> {
    match floats(value)?.as_slice() {
        [value] => Ok(*value),
        values => Err(failed(format!("{} numbers; expected one", values.len()))),
    }
}

fn whole<E: burn::tensor::Element>(expected: usize, data: TensorData) -> Result<Vec<E>> {
    let values = data.try_into_vec::<E>().map_err(|error| failed(format!("{error:?}")))?;
    match values.len() == expected {
        true => Ok(values),
        false => Err(failed(format!("{} numbers arrived; expected {expected}", values.len()))),
    }
}

fn failed(problem: String) -> Error {
    Error::invalid_hint(
        "reading from the device",
        problem,
        "a result that was not computed is never used: run it again",
    )
}
