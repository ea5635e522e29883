//! One pass of AdamW over a parameter and its state.

use super::simd::simd;
use crate::adamw::AdamW;
use rayon::prelude::*;

/// Values of a task.
const TASK: usize = 1 << 15;

/// Updates all in place; `average` may be empty.
pub(crate) fn update(
    step: &AdamW,
    value: &mut [f32],
    gradient: &[f32],
    first: &mut [f32],
    second: &mut [f32],
    average: &mut [f32],
) {
    let factors = Factors::of(step);
    let state = value.par_chunks_mut(TASK).zip(first.par_chunks_mut(TASK)).zip(second.par_chunks_mut(TASK));
    let tasks = state.zip(gradient.par_chunks(TASK));
    match (average.is_empty(), step.average_decay) {
        (false, Some(_)) => tasks.zip(average.par_chunks_mut(TASK)).for_each(|((((v, m), s), g), a)| {
            advance(factors, v, g, m, s);
            blend(factors, a, v);
        }),
        _ => tasks.for_each(|(((v, m), s), g)| advance(factors, v, g, m, s)),
    }
}

/// What is multiplied with what, in `f32`.
#[derive(Clone, Copy)]
struct Factors {
    gradient: f32,
    betas: [[f32; 2]; 2],
    root: f32,
    epsilon: f32,
    rate: f32,
    keep: f32,
    average: [f32; 2],
}

impl Factors {
    fn of(step: &AdamW) -> Self {
        let pair = |beta: f64| [beta as f32, (1.0 - beta) as f32];
        Self {
            gradient: step.gradient_factor as f32,
            betas: [pair(step.betas.0), pair(step.betas.1)],
            root: step.corrections.1.sqrt() as f32,
            epsilon: step.epsilon as f32,
            rate: (step.rate / step.corrections.0) as f32,
            keep: (1.0 - step.rate * step.weight_decay) as f32,
            average: pair(step.average_decay.unwrap_or(1.0)),
        }
    }
}

simd! {
    fn advance(factors: Factors, value: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32]) {
        let [[keep_1, take_1], [keep_2, take_2]] = factors.betas;
        let state = value.iter_mut().zip(first).zip(second);
        for (((value, first), second), &gradient) in state.zip(gradient) {
            let gradient = gradient * factors.gradient;
            *first = *first * keep_1 + gradient * take_1;
            *second = *second * keep_2 + gradient * gradient * take_2;
            let change = *first / (second.sqrt() / factors.root + factors.epsilon) * factors.rate;
            *value = *value * factors.keep - change;
        }
    }
}

simd! {
    fn blend(factors: Factors, average: &mut [f32], value: &[f32]) {
        let [keep, take] = factors.average;
        average.iter_mut().zip(value).for_each(|(average, value)| *average = *average * keep + value * take);
    }
}
