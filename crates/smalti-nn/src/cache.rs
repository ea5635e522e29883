//! Keys and values of the tokens that a causal model has seen.

use burn::tensor::Tensor;

/// The keys and values of one layer, in memory taken once for the longest sequence.
#[derive(Debug)]
pub struct KeyValueCache {
    keys: Option<Tensor<4>>,
    values: Option<Tensor<4>>,
    length: usize,
    capacity: usize,
}

impl KeyValueCache {
    /// An empty cache for at most `capacity` tokens. Memory is taken at the first [`Self::append`].
    pub fn new(capacity: usize) -> Self {
        Self { keys: None, values: None, length: 0, capacity }
    }

    /// Tokens seen.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The longest sequence.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Adds new tokens and returns all of the memory; see [`crate::attention::Visible::cached`] for what hides the rest.
    ///
    /// The whole memory is one block that backends read without copying, in the same shape at each step.
    ///
    /// # Shapes
    /// `[b, h, new, d]` each to `[b, h, capacity, d]`. The capacity must not be exceeded.
    pub fn append(&mut self, keys_bhnd: Tensor<4>, values_bhnd: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let new = keys_bhnd.dims()[2];
        let keys = write(self.keys.take(), keys_bhnd, self.length, self.capacity);
        let values = write(self.values.take(), values_bhnd, self.length, self.capacity);
        self.length += new;
        (self.keys, self.values) = (Some(keys.clone()), Some(values.clone()));
        (keys, values)
    }
}

/// Writes in place: `memory` is not shared while it is taken out of the cache.
fn write(memory: Option<Tensor<4>>, new_bhnd: Tensor<4>, first: usize, capacity: usize) -> Tensor<4> {
    let [b, h, new, d] = new_bhnd.dims();
    let memory = memory.unwrap_or_else(|| Tensor::zeros([b, h, capacity, d], (&new_bhnd.device(), new_bhnd.dtype())));
    memory.slice_assign([0..b, 0..h, first..first + new, 0..d], new_bhnd)
}
