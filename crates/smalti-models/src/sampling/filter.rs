//! Temperature, top-k, top-p (arXiv 1904.09751) and drawing.

use super::Sampling;

/// Applies temperature, top-k and top-p, in this order, to one row of logits. Removed tokens become minus infinity. Of settings for
/// several depths the first counts; see [`Sampling::at`].
/// Temperature 0 leaves only the first of the most likely tokens.
pub fn filter(logits: &mut [f32], sampling: &Sampling) {
    if sampling.temperature == 0.0 {
        let best = argmax(logits);
        for (i, logit) in logits.iter_mut().enumerate() {
            *logit = if i == best { 0.0 } else { f32::NEG_INFINITY };
        }
        return;
    }
    if sampling.temperature != 1.0 {
        logits.iter_mut().for_each(|logit| *logit /= sampling.temperature);
    }
    if let Some(k) = sampling.top_k.as_ref().and_then(|k| k.at(0)) {
        keep_top_k(logits, *k);
    }
    if let Some(p) = sampling.top_p.as_ref().and_then(|p| p.at(0)).filter(|p| **p < 1.0) {
        keep_top_p(logits, *p);
    }
}

/// Removes all tokens less likely than the k-th; ties with it are kept.
fn keep_top_k(logits: &mut [f32], k: usize) {
    if k == 0 || k >= logits.len() {
        return;
    }
    let mut sorted = logits.to_vec();
    let (_, threshold, _) = sorted.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    let threshold = *threshold;
    logits.iter_mut().filter(|logit| **logit < threshold).for_each(|logit| *logit = f32::NEG_INFINITY);
}

/// Keeps the most likely tokens up to and with the first whose cumulative probability exceeds `p`.
fn keep_top_p(logits: &mut [f32], p: f32) {
    let total = log_sum_exp(logits);
    let mut order: Vec<(f32, usize)> =
        logits.iter().copied().zip(0..).filter(|(logit, _)| *logit > f32::NEG_INFINITY).collect();
    order.sort_unstable_by(|(a, i), (b, j)| b.total_cmp(a).then(i.cmp(j)));
    let mut cumulative = 0.0;
    for (logit, i) in order {
        if cumulative > f64::from(p) {
            logits[i] = f32::NEG_INFINITY;
        } else {
            cumulative += (f64::from(logit) - total).exp();
        }
    }
}

/// Index of the largest logit, the first among equals.
pub fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = i;
        }
    }
    best
}

/// The logarithm of the sum of exponentials, which turns logits into log-probabilities.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !largest.is_finite() {
        return f64::from(largest);
    }
    // Single-precision exponentials, summed in double: fast, and exact to the logits' own precision.
    let sum: f64 = logits.iter().map(|logit| f64::from((logit - largest).exp())).sum();
    f64::from(largest) + sum.ln()
}

/// Turns logits into probabilities.
pub fn softmax(logits: &mut [f32]) {
    let total = log_sum_exp(logits);
    logits.iter_mut().for_each(|logit| *logit = (f64::from(*logit) - total).exp() as f32);
}

/// Draws an index from `softmax(logits)` by inverting its distribution at `u`, uniform in 0..1.
pub fn draw(logits: &[f32], u: f64) -> usize {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: &f32| f64::from((logit - largest).exp());
    let target = u * logits.iter().map(weight).sum::<f64>();
    let mut cumulative = 0.0;
    let mut last = argmax(logits);
    for (i, logit) in logits.iter().enumerate() {
        let weight = weight(logit);
        if weight > 0.0 {
            cumulative += weight;
            last = i;
            if cumulative > target {
                break;
            }
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;
    use smalti_base::Rng;

    fn kept(logits: &[f32], sampling: &Sampling) -> Vec<usize> {
        let mut row = logits.to_vec();
        filter(&mut row, sampling);
        (0..row.len()).filter(|i| row[*i] > f32::NEG_INFINITY).collect()
    }

    #[test]
    fn draws_follow_the_softmax() {
        let logits = [0.3f32, -1.0, 2.0, f32::NEG_INFINITY, 1.1, -3.0];
        let mut expected = logits;
        softmax(&mut expected);
        let expected = expected.map(f64::from);
        let n = 100_000;
        let mut counts = [0u32; 6];
        for i in 0..n {
            counts[draw(&logits, Rng::new(11).stream(0, i).uniform_f64())] += 1;
        }
        assert_eq!(counts[3], 0);
        let chi: f64 = (0..6)
            .filter(|i| *i != 3)
            .map(|i| (f64::from(counts[i]) - expected[i] * n as f64).powi(2) / (expected[i] * n as f64))
            .sum();
        // 4 degrees of freedom: 99.9 % of samples lie below 18.5.
        assert!(chi < 18.5, "chi-square {chi}, counts {counts:?}");
    }

    #[test]
    fn temperature_divides_and_zero_is_argmax() {
        let logits = [1.0f32, 3.0, 3.0, -2.0];
        let mut row = logits;
        filter(&mut row, &Sampling { temperature: 0.5, ..Default::default() });
        assert_eq!(row, [2.0, 6.0, 6.0, -4.0]);
        assert_eq!(kept(&logits, &Sampling { temperature: 0.0, ..Default::default() }), [1]);
        for u in [0.0, 0.5, 0.999_999] {
            let mut row = logits;
            filter(&mut row, &Sampling { temperature: 0.0, ..Default::default() });
            assert_eq!(draw(&row, u), 1);
        }
    }

    #[test]
    fn top_k_keeps_ties() {
        let logits = [1.0f32, 5.0, 4.0, 4.0, 0.0];
        assert_eq!(kept(&logits, &Sampling { top_k: Some(1.into()), ..Default::default() }), [1]);
        assert_eq!(kept(&logits, &Sampling { top_k: Some(2.into()), ..Default::default() }), [1, 2, 3]);
        assert_eq!(kept(&logits, &Sampling { top_k: Some(99.into()), ..Default::default() }), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn top_p_keeps_the_first_beyond_the_threshold() {
        // Probabilities 0.1, 0.4, 0.3, 0.2.
        let logits = [0.1f32, 0.4, 0.3, 0.2].map(f32::ln);
        let keep = |p: f32| kept(&logits, &Sampling { top_p: Some(p.into()), ..Default::default() });
        assert_eq!(keep(0.3), [1]);
        assert_eq!(keep(0.5), [1, 2]);
        assert_eq!(keep(0.75), [1, 2, 3]);
        assert_eq!(keep(0.95), [0, 1, 2, 3]);
        assert_eq!(keep(1.0), [0, 1, 2, 3]);
    }
}
