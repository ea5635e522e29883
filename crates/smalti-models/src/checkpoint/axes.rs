//! Changes of a tensor's axes, on shapes and on values.

use super::tensors::{Stored, Values};

/// A change of a tensor's axes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// New order of the axes.
    Permute(Vec<usize>),
    /// Removes an axis of length 1.
    Squeeze(usize),
    /// Joins an axis with the next.
    Merge(usize),
    /// Splits axis `.0` into `.1` parts and what each holds.
    Divide(usize, usize),
    /// Adds an axis of length 1.
    Insert(usize),
    /// Adds axes of length 1 at the end until there are so many.
    Axes(usize),
    /// The piece `.1` of `.2` equal ones along an axis.
    Piece(usize, usize, usize),
    /// Takes the last `.1` places of an axis away.
    Cut(usize, usize),
    /// Adds `.1` places of zeros at the end of an axis.
    Pad(usize, usize),
}

impl Change {
    /// The changed shape, or why it does not suit.
    pub(super) fn shape(&self, shape: &[usize]) -> Result<Vec<usize>, String> {
        let mut new = shape.to_vec();
        match self {
            Self::Permute(order) => {
                let mut sorted = order.clone();
                sorted.sort_unstable();
                if sorted != (0..shape.len()).collect::<Vec<_>>() {
                    return Err(format!("{order:?} is not an order of the axes of {shape:?}"));
                }
                new = order.iter().map(|axis| shape[*axis]).collect();
            }
            Self::Squeeze(axis) => {
                if shape.get(*axis) != Some(&1) {
                    return Err(format!("axis {axis} of {shape:?} is not of length 1"));
                }
                new.remove(*axis);
            }
            Self::Merge(axis) => {
                if axis + 1 >= shape.len() {
                    return Err(format!("{shape:?} has no axes {axis} and {}", axis + 1));
                }
                new[*axis] *= new.remove(axis + 1);
            }
            Self::Divide(axis, parts) => match new.get(*axis) {
                Some(length) if *parts > 0 && length % parts == 0 => {
                    new[*axis] /= parts;
                    new.insert(*axis, *parts);
                }
                _ => return Err(format!("axis {axis} of {shape:?} has no {parts} equal parts")),
            },
            Self::Insert(axis) => {
                if *axis > new.len() {
                    return Err(format!("{shape:?} has no axis {axis}"));
                }
                new.insert(*axis, 1);
            }
            Self::Axes(axes) => {
                if new.len() > *axes {
                    return Err(format!("{shape:?} has more than {axes} axes"));
                }
                new.resize(*axes, 1);
            }
            Self::Piece(axis, _, pieces) => match shape.get(*axis) {
                Some(length) if *pieces > 0 && length % pieces == 0 => new[*axis] /= pieces,
                _ => return Err(format!("axis {axis} of {shape:?} has no {pieces} equal pieces")),
            },
            Self::Cut(axis, places) => match new.get_mut(*axis) {
                Some(length) if *length >= *places => *length -= places,
                _ => return Err(format!("axis {axis} of {shape:?} has no {places} places to take away")),
            },
            Self::Pad(axis, places) => match new.get_mut(*axis) {
                Some(length) => *length += places,
                None => return Err(format!("{shape:?} has no axis {axis}")),
            },
        }
        Ok(new)
    }

    /// Changes the values. The shape was found to suit when the plan was made.
    pub(super) fn values(&self, stored: Stored) -> Stored {
        let Ok(shape) = self.shape(&stored.shape) else {
            return stored;
        };
        let values = match self {
            Self::Squeeze(_) | Self::Merge(_) | Self::Axes(_) | Self::Divide(..) | Self::Insert(_) => stored.values,
            Self::Permute(order) => {
                let index = permuted(&stored.shape, order);
                gather(&stored.values, &index)
            }
            Self::Piece(axis, piece, pieces) => {
                let inner: usize = stored.shape[*axis..].iter().product();
                let part = inner / pieces;
                let starts = (0..stored.values.len() / inner.max(1)).map(|outer| outer * inner + piece * part);
                let index: Vec<usize> = starts.flat_map(|start| start..start + part).collect();
                gather(&stored.values, &index)
            }
            Self::Cut(axis, _) | Self::Pad(axis, _) => {
                let inner = |shape: &[usize]| shape[*axis..].iter().product::<usize>();
                resized(&stored.values, inner(&stored.shape), inner(&shape))
            }
        };
        Stored { shape, values }
    }
}

/// For each place of the permuted tensor, in order, the place that it comes from.
fn permuted(shape: &[usize], order: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    let mut index = vec![0];
    for axis in order {
        let (length, stride) = (shape[*axis], strides[*axis]);
        index = index.into_iter().flat_map(|start: usize| (0..length).map(move |i| start + i * stride)).collect();
    }
    index
}

/// Groups of `from` values cut or filled with zeros to groups of `to` values.
fn resized(values: &Values, from: usize, to: usize) -> Values {
    fn each<T: Copy>(values: &[T], from: usize, to: usize, zero: T) -> Vec<T> {
        let group = |group: &[T]| {
            let mut group = group[..from.min(to)].to_vec();
            group.resize(to, zero);
            group
        };
        values.chunks_exact(from.max(1)).flat_map(group).collect()
    }
    match values {
        Values::Floats(v) => Values::Floats(each(v, from, to, 0.0)),
        Values::Ints(v) => Values::Ints(each(v, from, to, 0)),
        Values::Bools(v) => Values::Bools(each(v, from, to, false)),
    }
}

fn gather(values: &Values, index: &[usize]) -> Values {
    match values {
        Values::Floats(v) => Values::Floats(index.iter().map(|i| v[*i]).collect()),
        Values::Ints(v) => Values::Ints(index.iter().map(|i| v[*i]).collect()),
        Values::Bools(v) => Values::Bools(index.iter().map(|i| v[*i]).collect()),
    }
}

/// Tensors one after the other along an axis; `None` if they are not all floats.
pub(super) fn concatenated(pieces: &[Stored], axis: usize, shape: Vec<usize>) -> Option<Stored> {
    let outer: usize = shape[..axis].iter().product();
    let values = pieces.iter().map(Stored::floats).collect::<Option<Vec<&[f32]>>>()?;
    let mut all = Vec::with_capacity(shape.iter().product());
    for i in 0..outer {
        for piece in &values {
            let inner = piece.len() / outer;
            all.extend_from_slice(&piece[i * inner..(i + 1) * inner]);
        }
    }
    Some(Stored { shape, values: Values::Floats(all) })
}
