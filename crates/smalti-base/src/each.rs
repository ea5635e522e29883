//! A setting that is one value for all parts, or a list with one for each.

use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// One value, or a list with one for each part (each depth of a stack).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a number or a list of numbers")]
pub enum OneOrEach<T> {
    /// The same for all.
    One(T),
    /// One for each.
    Each(Vec<T>),
}

impl<T> OneOrEach<T> {
    /// The value of a part; none beyond the end of a list.
    pub fn at(&self, part: usize) -> Option<&T> {
        match self {
            Self::One(value) => Some(value),
            Self::Each(values) => values.get(part),
        }
    }

    /// How many values a list has; none if one value is for all.
    pub fn count(&self) -> Option<usize> {
        match self {
            Self::One(_) => None,
            Self::Each(values) => Some(values.len()),
        }
    }

    /// All values that are written.
    pub fn values(&self) -> &[T] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::Each(values) => values,
        }
    }
}

impl<T> From<T> for OneOrEach<T> {
    fn from(value: T) -> Self {
        Self::One(value)
    }
}

/// As it is typed: `5`, or with commas `5,5,3`.
impl<T: FromStr> FromStr for OneOrEach<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> Result<Self, T::Err> {
        match text.contains(',') {
            true => text.split(',').map(|value| value.trim().parse()).collect::<Result<_, _>>().map(Self::Each),
            false => text.parse().map(Self::One),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_have_commas() {
        assert_eq!("5".parse(), Ok(OneOrEach::One(5)));
        assert_eq!("5, 0,3".parse(), Ok(OneOrEach::Each(vec![5, 0, 3])));
        assert!("5,".parse::<OneOrEach<usize>>().is_err() && "".parse::<OneOrEach<usize>>().is_err());
    }
}
