//! How well a codebook is used.

/// Counts of codes over any number of batches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    counts: Vec<u64>,
}

impl Usage {
    /// No code seen yet, of a vocabulary of this size.
    pub fn new(vocabulary: usize) -> Self {
        Self { counts: vec![0; vocabulary] }
    }

    /// Counts codes; those outside the vocabulary are ignored.
    pub fn add(&mut self, codes: impl IntoIterator<Item = i64>) {
        for code in codes {
            if let Some(count) = usize::try_from(code).ok().and_then(|code| self.counts.get_mut(code)) {
                *count += 1;
            }
        }
    }

    /// How often each code was seen.
    pub fn histogram(&self) -> &[u64] {
        &self.counts
    }

    /// Share of the codes that were seen at least once, 0..1.
    pub fn used_fraction(&self) -> f64 {
        self.counts.iter().filter(|count| **count > 0).count() as f64 / self.counts.len().max(1) as f64
    }

    /// Entropy of the code frequencies in nats, at least 0. Without the field's 1e-10 inside the logarithm, which makes it
    /// negative for a single code.
    pub fn entropy(&self) -> f64 {
        let total = self.counts.iter().sum::<u64>() as f64;
        let used = self.counts.iter().filter(|count| **count > 0).map(|count| *count as f64 / total);
        used.map(|p| -p * p.ln()).sum::<f64>().max(0.0)
    }

    /// [`Self::entropy`] in bits.
    pub fn entropy_bits(&self) -> f64 {
        self.entropy() / std::f64::consts::LN_2
    }

    /// The number of equally frequent codes with the same entropy, 1..=vocabulary.
    pub fn perplexity(&self) -> f64 {
        self.entropy().exp()
    }
}

#[cfg(test)]
mod tests {
    use super::Usage;

    #[test]
    fn even_use_of_half_the_codes() {
        let mut usage = Usage::new(8);
        usage.add([0, 1, 2, 3, 3, 2, 1, 0, -1, 8]);
        assert_eq!(usage.histogram(), [2, 2, 2, 2, 0, 0, 0, 0]);
        assert_eq!(usage.used_fraction(), 0.5);
        assert!((usage.perplexity() - 4.0).abs() < 1e-6);
        assert!((usage.entropy_bits() - 2.0).abs() < 1e-6);
    }

    #[test]
    fn one_code_or_none_has_the_least_perplexity() {
        let mut usage = Usage::new(8);
        assert_eq!(usage.perplexity(), 1.0);
        usage.add([3, 3, 3]);
        assert_eq!(usage.perplexity(), 1.0);
    }
}
