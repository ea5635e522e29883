//! What changes a table of codes outside the gradient: moving averages, a k-means start and the revival of dead codes.

use super::vq::{EmaDialect, Learning, ReviveUnit, Vq};
use super::{CodebookStats, Stats};
use burn::module::Param;
use burn::tensor::{IndexingUpdateOp, Int, Tensor};
use smalti_base::rng::Stream;
use smalti_kernels::nearest_code;

/// Share of the past in the moving counts of a table that learns by gradient.
const USAGE_DECAY: f64 = 0.99;

/// What an update did.
#[derive(Clone, Debug, Default)]
pub struct UpdateReport {
    /// Whether the codes were started from the batch.
    pub started: bool,
    /// 1 for each code that was revived, else 0, `[codes]`, if dead codes were looked for. It stays on the device until it is read;
    /// an optimiser's moments of these rows are stale.
    pub revived: Option<Tensor<1, Int>>,
}

/// Counts `[k]` and sums `[k, c]` of the latents of each code.
pub(super) fn tally(latents_nc: &Tensor<2>, codes_n: &Tensor<1, Int>, k: usize) -> (Tensor<1>, Tensor<2>) {
    let ([n, c], device) = (latents_nc.dims(), latents_nc.device());
    let ones = Tensor::ones([n], &device);
    let counts = Tensor::zeros([k], &device).select_assign(0, codes_n.clone(), ones, IndexingUpdateOp::Add);
    let sums =
        Tensor::zeros([k, c], &device).select_assign(0, codes_n.clone(), latents_nc.clone(), IndexingUpdateOp::Add);
    (counts, sums)
}

/// A parameter with a new value; all else about it stays.
pub(super) fn replaced<const D: usize>(param: Param<Tensor<D>>, value: Tensor<D>) -> Param<Tensor<D>> {
    let id = param.id;
    let value = if param.val().is_autodiff() { value.autodiff() } else { value };
    param.transform_for_load(value, id)
}

pub(super) fn plain<const D: usize>(param: &Param<Tensor<D>>) -> Tensor<D> {
    param.val().inner()
}

/// `past * decay + now * (1 - decay)`
pub(super) fn moved<const D: usize>(past: Tensor<D>, now: Tensor<D>, decay: f64) -> Tensor<D> {
    past.mul_scalar(decay) + now.mul_scalar(1.0 - decay)
}

pub(super) fn smoothed(counts_k: Tensor<1>, epsilon: f64) -> Tensor<1> {
    let [k] = counts_k.dims();
    let total = counts_k.clone().sum();
    counts_k.add_scalar(epsilon) * (total.clone() / total.add_scalar(k as f64 * epsilon))
}

/// Rows of `[k, c]` divided by `[k]`.
pub(super) fn per_row(rows_kc: Tensor<2>, by_k: Tensor<1>) -> Tensor<2> {
    rows_kc / by_k.unsqueeze_dim(1)
}

impl Vq {
    /// Applies what a training step did to the codebook; see [`Quantizer::update`](super::Quantizer::update).
    pub(super) fn apply(&mut self, stats: &Stats, step: u64, stream: &mut Stream) -> UpdateReport {
        let Some(CodebookStats { latents_nc, codes_n }) = stats.parts.first() else {
            return UpdateReport::default();
        };
        let [n, _] = latents_nc.dims();
        if n == 0 {
            return UpdateReport::default();
        }
        if !self.has_started() {
            let rows = random_rows(stream, n, self.config.codes);
            *self = self.clone().start_from(latents_nc, &rows);
            return UpdateReport { started: true, revived: None };
        }
        *self = self.clone().average(latents_nc, codes_n);
        match self.config.revive {
            Some(revive) if (step + 1).is_multiple_of(revive.every) => {
                let rows = random_rows(stream, n, self.config.codes);
                let (vq, revived) = self.clone().revive_from(latents_nc, &rows);
                *self = vq;
                UpdateReport { started: false, revived }
            }
            _ => UpdateReport::default(),
        }
    }

    /// Whether the codes need no k-means start (any more). Reads from the device until they do not.
    fn has_started(&mut self) -> bool {
        if let (false, Some(started)) = (self.start_known, &self.started) {
            self.start_known = started.val().to_data().iter::<f32>().all(|value| value > 0.5);
        } else {
            self.start_known = true;
        }
        self.start_known
    }

    /// Starts the codes by k-means over latents `[n, c]`, from the rows named (one per code, each below n). A code without
    /// latents keeps its place.
    pub fn start_from(mut self, latents_nc: &Tensor<2>, rows: &[usize]) -> Self {
        let k = self.config.codes;
        let mut means_kc = gather(latents_nc, rows);
        let mut counts_k = Tensor::zeros([k], &latents_nc.device());
        for _ in 0..self.config.kmeans_init.unwrap_or(0) {
            let codes_n = nearest_code(latents_nc.clone(), means_kc.clone());
            let (counts, sums_kc) = tally(latents_nc, &codes_n, k);
            let empty = counts.clone().lower_elem(0.5).unsqueeze_dim::<2>(1).expand(means_kc.dims());
            let moved_kc = self.compared(per_row(sums_kc, counts.clone().clamp_min(1.0)));
            means_kc = moved_kc.mask_where(empty, means_kc);
            counts_k = counts;
        }
        let (mut table_kc, mut sums_kc) = (means_kc.clone(), means_kc);
        if let Learning::Ema { epsilon, dialect, .. } = self.config.codebook {
            // Codes without latents count as one, else their next average would divide by almost nothing.
            let counts = match dialect {
                EmaDialect::Counting => counts_k,
                _ => counts_k.clamp_min(1.0),
            };
            sums_kc = sums_kc * counts.clone().unsqueeze_dim(1);
            table_kc = self.compared(per_row(sums_kc.clone(), smoothed(counts.clone(), epsilon)));
            counts_k = counts;
        }
        self = self.with_averages(counts_k, sums_kc);
        self.updates = self.updates.map(|updates| {
            // From here on nothing is owed to an empty start.
            let many = plain(&updates).ones_like().mul_scalar(1e6);
            replaced(updates, many)
        });
        self.started = self.started.map(|started| {
            let one = plain(&started).ones_like();
            replaced(started, one)
        });
        self.start_known = true;
        self.with_table(table_kc)
    }

    /// Moves the averages by one batch, and with EMA the codes.
    fn average(mut self, latents_nc: &Tensor<2>, codes_n: &Tensor<1, Int>) -> Self {
        let Some(cluster_size) = &self.cluster_size else {
            return self;
        };
        let (counts, sums) = tally(latents_nc, codes_n, self.config.codes);
        let Learning::Ema { decay, epsilon, dialect } = self.config.codebook else {
            let counts = moved(plain(cluster_size), counts, USAGE_DECAY);
            self.cluster_size = self.cluster_size.map(|param| replaced(param, counts));
            return self;
        };
        let Some(embed_avg) = &self.embed_avg else {
            return self;
        };
        let mut counts = moved(plain(cluster_size), counts, decay);
        let sums = moved(plain(embed_avg), sums, decay);
        let table_kc = match dialect {
            EmaDialect::Counting | EmaDialect::Empty => per_row(sums.clone(), smoothed(counts.clone(), epsilon)),
            EmaDialect::Compounding => {
                counts = smoothed(counts, epsilon);
                per_row(sums.clone(), counts.clone())
            }
            EmaDialect::Sonnet => {
                self.updates = self.updates.map(|updates| {
                    let next = plain(&updates).add_scalar(1.0);
                    replaced(updates, next)
                });
                let debias = self.debias(decay);
                let average = counts.clone() / debias.clone();
                per_row(sums.clone() / debias.unsqueeze_dim(1), smoothed(average, epsilon))
            }
        };
        let table_kc = self.compared(table_kc);
        self.with_averages(counts, sums).with_table(table_kc)
    }

    /// `1 - decay^t`, `[1]`: what the hidden averages of the Sonnet dialect are divided by; 1 in the others.
    fn debias(&self, decay: f64) -> Tensor<1> {
        match &self.updates {
            Some(updates) => plain(updates).mul_scalar(decay.ln()).exp().neg().add_scalar(1.0),
            None => Tensor::ones([1], &self.embedding.weight.val().inner().device()),
        }
    }

    /// Replaces dead codes by the latents named (one row of `[n, c]` per code), and starts their averages afresh. Returns 1 for
    /// each code replaced.
    pub fn revive_from(self, latents_nc: &Tensor<2>, rows: &[usize]) -> (Self, Option<Tensor<1, Int>>) {
        let (Some(revive), Some(cluster_size)) = (self.config.revive, &self.cluster_size) else {
            return (self, None);
        };
        let debias = match self.config.codebook {
            Learning::Ema { decay, .. } => self.debias(decay),
            Learning::Gradient { .. } => self.debias(USAGE_DECAY),
        };
        let counts = plain(cluster_size);
        let average = counts.clone() / debias.clone();
        let (limit, reset) = match revive.unit {
            ReviveUnit::Mean => (average.clone().mean().mul_scalar(revive.threshold), average.clone().mean()),
            ReviveUnit::Latents => {
                let threshold = Tensor::full([1], revive.threshold, &counts.device());
                (threshold.clone(), threshold)
            }
        };
        let dead_k = average.lower(limit.expand(counts.dims()));
        let reset = (reset * debias).expand(counts.dims());
        let rows_kc = gather(latents_nc, rows);
        let dead_kc = dead_k.clone().unsqueeze_dim::<2>(1).expand(rows_kc.dims());
        let table_kc = plain(&self.embedding.weight).mask_where(dead_kc.clone(), rows_kc.clone());
        let sums = match &self.embed_avg {
            Some(sums) => plain(sums).mask_where(dead_kc, rows_kc * reset.clone().unsqueeze_dim(1)),
            None => table_kc.clone(),
        };
        let counts = counts.mask_where(dead_k.clone(), reset);
        (self.with_averages(counts, sums).with_table(table_kc), Some(dead_k.int()))
    }

    fn with_averages(mut self, counts_k: Tensor<1>, sums_kc: Tensor<2>) -> Self {
        self.cluster_size = self.cluster_size.map(|param| replaced(param, counts_k));
        self.embed_avg = self.embed_avg.map(|param| replaced(param, sums_kc));
        self
    }

    fn with_table(mut self, table_kc: Tensor<2>) -> Self {
        self.embedding.weight = replaced(self.embedding.weight, table_kc);
        self
    }
}

/// A random row below `n` for each of `k` codes; all differ if there are enough.
fn random_rows(rng: &mut Stream, n: usize, k: usize) -> Vec<usize> {
    let mut rows = Vec::with_capacity(k);
    while rows.len() < k {
        rows.extend(rng.permutation(n));
    }
    rows.truncate(k);
    rows
}

fn gather(latents_nc: &Tensor<2>, rows: &[usize]) -> Tensor<2> {
    let rows: Vec<i32> = rows.iter().map(|row| *row as i32).collect();
    latents_nc.clone().select(0, Tensor::from_data(rows.as_slice(), &latents_nc.device()))
}
