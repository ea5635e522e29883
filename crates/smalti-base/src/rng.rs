//! Counter-based random numbers, drawn on the host.
//!
//! A stream is named by (seed, image, step), so what is drawn for one image does not depend on the batch it sits in,
//! on the order of images or on the number of workers.

use rand::{Rng as _, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

/// A source of random streams with one seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rng {
    seed: u64,
}

impl Rng {
    /// The source with this seed.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// The seed that this source was made with.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The stream of one image at one step.
    pub fn stream(&self, image: u64, step: u64) -> Stream {
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        key[8..16].copy_from_slice(&image.to_le_bytes());
        key[16..24].copy_from_slice(&step.to_le_bytes());
        key[24..].copy_from_slice(b"smalti01");
        Stream { inner: ChaCha8Rng::from_seed(key) }
    }
}

/// A sequence of random numbers.
#[derive(Clone, Debug)]
pub struct Stream {
    inner: ChaCha8Rng,
}

impl Stream {
    /// Uniform in `0 <= u < 1`.
    pub fn uniform(&mut self) -> f32 {
        self.inner.random::<f32>()
    }

    /// Uniform in `0 <= u < 1`, with 53 random bits.
    pub fn uniform_f64(&mut self) -> f64 {
        self.inner.random::<f64>()
    }

    /// Uniform in `0..n`. `n` must be at least 1.
    pub fn below(&mut self, n: usize) -> usize {
        self.inner.random_range(0..n)
    }

    /// Normal with mean 0 and standard deviation 1 (Box-Muller).
    pub fn normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.uniform_f64()).ln()).sqrt();
        (radius * (std::f64::consts::TAU * self.uniform_f64()).cos()) as f32
    }

    /// Standard Gumbel: `-ln(-ln u)`.
    pub fn gumbel(&mut self) -> f32 {
        let u = self.uniform_f64().max(f64::MIN_POSITIVE);
        (-(-u.ln()).ln()) as f32
    }

    /// A random order of `0..n`.
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        order.shuffle(&mut self.inner);
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_named_not_shared() {
        let rng = Rng::new(7);
        let alone = rng.stream(3, 5).uniform();
        let _other = rng.stream(2, 5).permutation(100);
        assert_eq!(alone, rng.stream(3, 5).uniform());
        assert_ne!(alone, rng.stream(3, 6).uniform());
        assert_ne!(alone, Rng::new(8).stream(3, 5).uniform());
    }

    #[test]
    fn moments_of_the_distributions() {
        let mut stream = Rng::new(1).stream(0, 0);
        let n = 200_000;
        let normal: Vec<f64> = (0..n).map(|_| f64::from(stream.normal())).collect();
        let mean = normal.iter().sum::<f64>() / f64::from(n);
        let variance = normal.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / f64::from(n);
        assert!(mean.abs() < 0.01 && (variance - 1.0).abs() < 0.02, "mean {mean}, variance {variance}");
        // The Gumbel distribution's mean is the Euler-Mascheroni constant.
        let gumbel = (0..n).map(|_| f64::from(stream.gumbel())).sum::<f64>() / f64::from(n);
        assert!((gumbel - 0.577_215_664_9).abs() < 0.01, "mean {gumbel}");
        let mut order = stream.permutation(50);
        order.sort_unstable();
        assert_eq!(order, (0..50).collect::<Vec<_>>());
    }
}
