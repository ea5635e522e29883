//! Keys and values of the tokens that a model has seen.

use burn::tensor::Tensor;
use smalti_kernels::{attention_over, cached_attention, zeros};

/// Where a layer of a generator finds the keys and values of earlier tokens.
pub trait Cache {
    /// Adds new tokens, and mixes for each of them the values of those that it sees.
    ///
    /// # Shapes
    /// `[b, h, new, d]` each to the same.
    fn attend(&mut self, q_bhnd: Tensor<4>, keys_bhnd: Tensor<4>, values_bhnd: Tensor<4>) -> Tensor<4>;

    /// Tokens seen.
    fn length(&self) -> usize;
}

/// The keys and values of one layer of a causal model, in memory taken once for the longest sequence.
#[derive(Debug)]
pub struct KeyValueCache {
    keys: Option<Tensor<4>>,
    values: Option<Tensor<4>>,
    length: usize,
    capacity: usize,
    prefix: usize,
}

impl KeyValueCache {
    /// An empty cache for at most `capacity` tokens, the first `prefix` of which see each other in both directions.
    /// Memory is taken at the first [`Cache::attend`].
    pub fn new(capacity: usize, prefix: usize) -> Self {
        Self { keys: None, values: None, length: 0, capacity, prefix }
    }

    /// Forgets all tokens and keeps the memory.
    pub fn clear(&mut self) {
        self.length = 0;
    }

    /// The longest sequence.
    pub fn capacity(&self) -> usize {
        self.capacity
    }
}

impl Cache for KeyValueCache {
    /// Each token sees itself, all before it, and in the prefix the whole prefix. A prefix must be added whole. How tokens are
    /// grouped into calls changes nothing. The capacity must not be exceeded.
    fn attend(&mut self, q_bhnd: Tensor<4>, keys_bhnd: Tensor<4>, values_bhnd: Tensor<4>) -> Tensor<4> {
        let (first, new) = (self.length, keys_bhnd.dims()[2]);
        let keys = write(self.keys.take(), keys_bhnd, first, self.capacity);
        let values = write(self.values.take(), values_bhnd, first, self.capacity);
        self.length += new;
        (self.keys, self.values) = (Some(keys.clone()), Some(values.clone()));
        let prefix = self.prefix.min(self.length);
        let visible: Vec<usize> = (first + 1..=self.length).map(|place| place.max(prefix)).collect();
        cached_attention(q_bhnd, keys, values, &visible)
    }

    fn length(&self) -> usize {
        self.length
    }
}

/// Writes in place: `memory` is not shared while it is taken out of the cache.
fn write(memory: Option<Tensor<4>>, new_bhnd: Tensor<4>, first: usize, capacity: usize) -> Tensor<4> {
    let [b, h, new, d] = new_bhnd.dims();
    let memory = memory.unwrap_or_else(|| zeros([b, h, capacity, d], &new_bhnd));
    memory.slice_assign([0..b, 0..h, first..first + new, 0..d], new_bhnd)
}

/// The keys and values of one layer of a model whose tokens come in groups that see each other and all earlier groups, in memory
/// taken once for all but the last group, whose keys and values nobody needs again.
#[derive(Debug)]
pub struct GroupCache {
    memory: Option<[Tensor<4>; 2]>,
    length: usize,
    capacity: usize,
}

impl GroupCache {
    /// An empty cache for at most `capacity` tokens before the last group.
    pub fn new(capacity: usize) -> Self {
        Self { memory: None, length: 0, capacity }
    }
}

impl Cache for GroupCache {
    /// A group for which there is no room must be the last one; another one panics.
    fn attend(&mut self, q_bhnd: Tensor<4>, keys_bhnd: Tensor<4>, values_bhnd: Tensor<4>) -> Tensor<4> {
        let (first, new) = (self.length, [keys_bhnd, values_bhnd]);
        assert!(first <= self.capacity, "the last group was added before");
        let seen = |memory: &Tensor<4>, length| memory.clone().narrow(2, 0, length);
        self.length += new[0].dims()[2];
        if self.length > self.capacity {
            let [keys, values] = match &self.memory {
                Some([keys, values]) => {
                    let [new_keys, new_values] = new;
                    [vec![seen(keys, first), new_keys], vec![seen(values, first), new_values]]
                }
                None => new.map(|new| vec![new]),
            };
            return attention_over(q_bhnd, &keys, &values);
        }
        let mut memory = self.memory.take().map(|memory| memory.map(Some)).unwrap_or_default().into_iter();
        let memory = new.map(|new| write(memory.next().flatten(), new, first, self.capacity));
        let [keys, values] = memory.each_ref().map(|memory| [seen(memory, self.length)]);
        self.memory = Some(memory);
        attention_over(q_bhnd, &keys, &values)
    }

    fn length(&self) -> usize {
        self.length
    }
}
