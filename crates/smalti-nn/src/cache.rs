//! Keys and values of the tokens that a causal model has seen.

use burn::tensor::Tensor;
use smalti_kernels::{attention, cached_attention};

/// The keys and values of one layer, in memory taken once for the longest sequence.
#[derive(Debug)]
pub struct KeyValueCache {
    keys: Option<Tensor<4>>,
    values: Option<Tensor<4>>,
    length: usize,
    capacity: usize,
    prefix: usize,
    /// Whether tokens that are added together see each other.
    groups: bool,
}

impl KeyValueCache {
    /// An empty cache for at most `capacity` tokens, the first `prefix` of which see each other in both directions.
    /// Memory is taken at the first [`Self::attend`].
    pub fn new(capacity: usize, prefix: usize) -> Self {
        Self { keys: None, values: None, length: 0, capacity, prefix, groups: false }
    }

    /// An empty cache for at most `capacity` tokens, in which those that are added together see each other. Tokens for which there is
    /// no room are the last ones: they see all, and are not kept.
    pub fn of_groups(capacity: usize) -> Self {
        Self { groups: true, ..Self::new(capacity, 0) }
    }

    /// Forgets all tokens and keeps the memory.
    pub fn clear(&mut self) {
        self.length = 0;
    }

    /// Tokens seen.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The longest sequence.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Adds new tokens, and mixes for each of them the values of those that it sees: itself, all before it, and in the
    /// prefix the whole prefix. A prefix must be added whole. How tokens are grouped into calls changes nothing, but in a
    /// cache of groups, where a token sees all those that are added with it.
    ///
    /// # Shapes
    /// `[b, h, new, d]` each to the same. The capacity must not be exceeded, but by the last tokens of a cache of groups.
    pub fn attend(&mut self, q_bhnd: Tensor<4>, keys_bhnd: Tensor<4>, values_bhnd: Tensor<4>) -> Tensor<4> {
        let (first, new) = (self.length, keys_bhnd.dims()[2]);
        if self.groups && first + new > self.capacity {
            let with = |memory: &Option<Tensor<4>>, new_bhnd| match memory {
                Some(memory) => Tensor::cat(vec![memory.clone().narrow(2, 0, first), new_bhnd], 2),
                None => new_bhnd,
            };
            return attention(q_bhnd, with(&self.keys, keys_bhnd), with(&self.values, values_bhnd), false, None);
        }
        let keys = write(self.keys.take(), keys_bhnd, first, self.capacity);
        let values = write(self.values.take(), values_bhnd, first, self.capacity);
        self.length += new;
        (self.keys, self.values) = (Some(keys.clone()), Some(values.clone()));
        if self.groups {
            let seen = |memory: Tensor<4>| memory.narrow(2, 0, self.length);
            return attention(q_bhnd, seen(keys), seen(values), false, None);
        }
        let prefix = self.prefix.min(self.length);
        let visible: Vec<usize> = (first + 1..=self.length).map(|place| place.max(prefix)).collect();
        cached_attention(q_bhnd, keys, values, &visible)
    }
}

/// Writes in place: `memory` is not shared while it is taken out of the cache.
fn write(memory: Option<Tensor<4>>, new_bhnd: Tensor<4>, first: usize, capacity: usize) -> Tensor<4> {
    let [b, h, new, d] = new_bhnd.dims();
    let memory = memory.unwrap_or_else(|| Tensor::zeros([b, h, capacity, d], (&new_bhnd.device(), new_bhnd.dtype())));
    memory.slice_assign([0..b, 0..h, first..first + new, 0..d], new_bhnd)
}
