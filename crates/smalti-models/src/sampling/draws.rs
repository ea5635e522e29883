//! Where random draws of a generation come from.

use super::filter::draw;
use smalti_base::Rng;

/// The random draws of a generation, by image of the batch, decoding step and place of the layout. Places may be asked for in any
/// order, and by several threads at once.
pub trait Draws: Send + Sync {
    /// A token from `softmax(logits)`; filters have been applied.
    fn token(&self, image: usize, step: usize, place: usize, logits: &[f32]) -> usize;
    /// Gumbel noise on the confidence in a place.
    fn confidence_noise(&self, image: usize, step: usize, place: usize) -> f32;
    /// Gumbel noise on the logits of all codes in a place.
    fn noise(&self, image: usize, step: usize, place: usize, codes: usize) -> Vec<f32>;
}

/// Draws keyed by each image's own seed, so that an image does not depend on its batch.
#[derive(Clone, Debug)]
pub struct Seeded {
    images: Vec<Rng>,
}

/// Keeps the stream of a place's confidence apart from that of its token.
const CONFIDENCE: u64 = 1 << 32;
/// And that of the noise on its codes.
const CODES: u64 = 2 << 32;

impl Seeded {
    /// One seed for each image.
    pub fn new(seeds: impl IntoIterator<Item = u64>) -> Self {
        Self { images: seeds.into_iter().map(Rng::new).collect() }
    }
}

impl Draws for Seeded {
    fn token(&self, image: usize, step: usize, place: usize, logits: &[f32]) -> usize {
        draw(logits, self.images[image].stream(place as u64, step as u64).uniform_f64())
    }

    fn confidence_noise(&self, image: usize, step: usize, place: usize) -> f32 {
        self.images[image].stream(CONFIDENCE + place as u64, step as u64).gumbel()
    }

    fn noise(&self, image: usize, step: usize, place: usize, codes: usize) -> Vec<f32> {
        let mut stream = self.images[image].stream(CODES + place as u64, step as u64);
        (0..codes).map(|_| stream.gumbel()).collect()
    }
}

/// The random draws of a generation whose tokens are vectors, by image of the batch, decoding step and place.
pub trait VectorDraws: Send {
    /// An order of the `n` places of an image.
    fn order(&mut self, image: usize, n: usize) -> Vec<usize>;
    /// Standard normal noise for the vector in a place: at moment 0 where its diffusion begins, then at 1, 2, ... for each
    /// reverse step.
    fn noise(&mut self, image: usize, step: usize, place: usize, moment: usize, values: &mut [f32]);
}

/// Keeps the streams of orders and of noise apart from the others, and those of moments from each other.
const ORDER: u64 = 2 << 32;
const NOISE: u64 = 3 << 32;

impl VectorDraws for Seeded {
    fn order(&mut self, image: usize, n: usize) -> Vec<usize> {
        self.images[image].stream(ORDER, 0).permutation(n)
    }

    fn noise(&mut self, image: usize, step: usize, place: usize, moment: usize, values: &mut [f32]) {
        let mut stream = self.images[image].stream(NOISE + ((moment as u64) << 32) + place as u64, step as u64);
        values.iter_mut().for_each(|value| *value = stream.normal());
    }
}
