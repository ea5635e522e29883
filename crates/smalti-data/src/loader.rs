//! Batches of images, decoded and transformed ahead of their use on worker threads, always in the same order.
//!
//! What a batch holds is a function of (data set, seed, position) alone: the order of an epoch is drawn from (seed, epoch), what
//! happens to an image from (seed, epoch, image). Workers and batch size change nothing, and the position, counted in samples,
//! is all the state there is: a run goes on where it stopped.

use crate::datasets::{About, Dataset, Source};
use crate::image::{self, Limits};
use crate::transforms::Pipeline;
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Planes, Result, Rng};
use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Images in a row that may be unusable before training gives up.
const MOST_BAD: usize = 256;
/// Names the stream that draws an epoch's order; no image has this number.
const ORDER: u64 = u64::MAX;

/// How images become batches.
#[derive(Clone, Debug)]
pub struct LoaderConfig {
    /// Images in a batch.
    pub batch: usize,
    /// From a decoded image to what the model sees; must fix the size.
    pub pipeline: Pipeline,
    /// What the values of the images are.
    pub planes: Planes,
    /// Colour behind transparent pixels.
    pub background: [u8; 3],
    /// What one image may cost.
    pub limits: Limits,
    /// Worker threads.
    pub workers: usize,
    /// Batches that may be ready or in work at once. Memory: `ahead * batch * planes * height * width * 4` bytes, and for images that
    /// are in work what [`Limits::memory`] says.
    pub ahead: usize,
}

impl LoaderConfig {
    /// A data section's settings for RGB images, one worker for each thread that computes (at most 8), two batches ahead per worker.
    ///
    /// # Errors
    /// As [`Pipeline::new`].
    pub fn new(data: &crate::DataConfig, batch: usize) -> Result<Self> {
        let workers = smalti_base::threads::count().min(8);
        let pipeline = data.pipeline()?;
        let (background, limits) = (data.background, data.limits);
        Ok(Self { batch, pipeline, planes: Planes::default(), background, limits, workers, ahead: 2 * workers })
    }

    /// The same for images of another kind.
    ///
    /// # Errors
    /// [`Error::Invalid`] for transforms that do not fit it.
    pub fn with_planes(self, planes: Planes) -> Result<Self> {
        self.pipeline.must_suit(planes)?;
        Ok(Self { planes, ..self })
    }
}

/// Images of one batch on the host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImageBatch {
    /// Number of each image in the data set.
    pub indices: Vec<usize>,
    /// Name of each image.
    pub keys: Vec<String>,
    /// `[batch, planes, height, width]`: in -1..1, or labels.
    pub pixels: Vec<f32>,
    /// What the values are.
    pub planes: Planes,
    /// Rows of each image.
    pub height: usize,
    /// Columns of each image.
    pub width: usize,
    /// Class of each image.
    pub labels: Vec<Option<u32>>,
    /// Caption of each image.
    pub texts: Vec<Option<String>>,
    /// Keywords of each image.
    pub keywords: Vec<Vec<String>>,
}

impl ImageBatch {
    /// Number of images.
    pub fn len(&self) -> usize {
        self.indices.len()
    }

    /// Whether there are no images.
    pub fn is_empty(&self) -> bool {
        self.indices.is_empty()
    }
}

/// An image that could not be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Skipped {
    /// Its number in the data set.
    pub index: usize,
    /// Its name.
    pub key: String,
    /// Why.
    pub error: String,
}

/// The order in which training sees numbered things: every epoch a new one, drawn from (seed, epoch).
#[derive(Debug)]
pub struct Order {
    rng: Rng,
    len: usize,
    epochs: Mutex<BTreeMap<u64, Arc<Vec<usize>>>>,
}

impl Order {
    /// The order of `len` things. With none, every position is 0.
    pub fn new(seed: u64, len: usize) -> Self {
        Self { rng: Rng::new(seed), len, epochs: Mutex::new(BTreeMap::new()) }
    }

    /// Epoch and number of the thing at a position, counted from the very start.
    pub fn at(&self, position: u64) -> (u64, usize) {
        let len = self.len.max(1) as u64;
        let (epoch, place) = (position / len, (position % len) as usize);
        (epoch, self.epoch(epoch).get(place).copied().unwrap_or(0))
    }

    /// The whole order of an epoch.
    pub fn epoch(&self, epoch: u64) -> Arc<Vec<usize>> {
        let mut epochs = lock(&self.epochs);
        let order =
            epochs.entry(epoch).or_insert_with(|| Arc::new(self.rng.stream(ORDER, epoch).permutation(self.len)));
        let order = Arc::clone(order);
        // Two epochs meet in a batch; older ones are drawn again if they are ever asked for.
        while epochs.len() > 2 {
            epochs.pop_first();
        }
        order
    }
}

/// An iterator of batches.
pub struct Loader {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    next: u64,
    finished: bool,
}

impl Loader {
    /// Training: no end, each epoch in its own order, from sample `start` on. An image that cannot be used is replaced by the next
    /// usable one of the epoch's order.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the data set is empty, `batch` is 0 or the transforms do not fix the size.
    pub fn new(dataset: Arc<dyn Dataset>, config: LoaderConfig, seed: u64, start: u64) -> Result<Self> {
        let order = Order::new(seed, dataset.len());
        Self::start(dataset, config, Mode::Endless { order, start }, Rng::new(seed))
    }

    /// Evaluation: every image once, in the data set's order, from image `start` on; random transforms are those of epoch 0. An image
    /// that cannot be used is left out of its batch.
    ///
    /// # Errors
    /// As [`Loader::new`].
    pub fn ordered(dataset: Arc<dyn Dataset>, config: LoaderConfig, seed: u64, start: usize) -> Result<Self> {
        Self::start(dataset, config, Mode::Once { start }, Rng::new(seed))
    }

    fn start(dataset: Arc<dyn Dataset>, config: LoaderConfig, mode: Mode, rng: Rng) -> Result<Self> {
        if dataset.is_empty() || config.batch == 0 {
            return Err(Error::file(
                dataset.path(),
                format!("{} images cannot be loaded in batches of {}", dataset.len(), config.batch),
            ));
        }
        let Some(size) = config.pipeline.size() else {
            return Err(Error::invalid_hint(
                "transforms",
                "images would differ in size, so they cannot be batched",
                "add, for example, { kind = \"center_crop\", size = 64 }",
            ));
        };
        let workers = config.workers.max(1);
        let queue = Mutex::new(Queue::default());
        let memory = || Budget::new(config.limits.memory);
        let (files, pixels, skipped) = (memory(), memory(), Mutex::default());
        let (ready, room) = (Condvar::new(), Condvar::new());
        let shared = Shared { dataset, config, mode, rng, size, queue, ready, room, files, pixels, skipped };
        let shared = Arc::new(shared);
        let mut loader = Self { shared: Arc::clone(&shared), threads: Vec::new(), next: 0, finished: false };
        for number in 0..workers {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name(format!("loader-{number}")).spawn(move || shared.work());
            loader.threads.push(thread.map_err(|e| Error::invalid("loader", format!("no worker thread: {e}")))?);
        }
        Ok(loader)
    }

    /// The first sample that has not been handed out: where a loader must start to continue from here.
    pub fn position(&self) -> u64 {
        let start = match &self.shared.mode {
            Mode::Endless { start, .. } => *start,
            Mode::Once { start } => *start as u64,
        };
        start.saturating_add(self.next.saturating_mul(self.shared.config.batch as u64))
    }

    /// The images that could not be used so far, each once, in the data set's order. Workers are ahead, so some may belong to later
    /// batches.
    pub fn skipped(&self) -> Vec<Skipped> {
        let mut skipped = self.skipped_after(0);
        skipped.sort_by_key(|skipped| skipped.index);
        skipped
    }

    /// The same in the order in which it was found out, without the first `known`: what is new since the last look.
    pub fn skipped_after(&self, known: usize) -> Vec<Skipped> {
        lock(&self.shared.skipped).list.get(known..).unwrap_or_default().to_vec()
    }
}

impl Iterator for Loader {
    type Item = Result<ImageBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.finished {
            let mut queue = lock(&self.shared.queue);
            let result = loop {
                match queue.done.remove(&self.next) {
                    Some(result) => break result,
                    None => queue = self.shared.ready.wait(queue).unwrap_or_else(PoisonError::into_inner),
                }
            };
            queue.taken += 1;
            drop(queue);
            self.shared.room.notify_all();
            match result {
                Ok(None) => self.finished = true,
                Ok(Some(batch)) => {
                    self.next += 1;
                    // All its images were left out.
                    if !batch.is_empty() {
                        return Some(Ok(batch));
                    }
                }
                Err(error) => {
                    self.finished = true;
                    return Some(Err(error));
                }
            }
        }
        None
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        lock(&self.shared.queue).stop = true;
        self.shared.room.notify_all();
        for thread in self.threads.drain(..) {
            // A worker catches its panics; there is nothing to report here.
            let _ = thread.join();
        }
    }
}

enum Mode {
    Endless { order: Order, start: u64 },
    Once { start: usize },
}

/// Batches between the workers and the iterator. `None` in `done` is the end.
#[derive(Default)]
struct Queue {
    begun: u64,
    taken: u64,
    done: BTreeMap<u64, Result<Option<ImageBatch>>>,
    stop: bool,
}

/// Images that could not be used, in the order in which that was found out.
#[derive(Default)]
struct SkippedImages {
    list: Vec<Skipped>,
    by_index: HashMap<usize, usize>,
}

/// Bytes that workers share. Whoever needs more than all of them waits until nobody has any.
struct Budget {
    all: u64,
    used: Mutex<u64>,
    freed: Condvar,
}

/// Bytes of a budget, until it is dropped.
struct Share<'a> {
    budget: &'a Budget,
    bytes: u64,
}

impl Budget {
    fn new(all: u64) -> Self {
        Self { all, used: Mutex::new(0), freed: Condvar::new() }
    }

    fn take(&self, bytes: u64) -> Share<'_> {
        let bytes = bytes.min(self.all);
        let mut used = lock(&self.used);
        while *used + bytes > self.all {
            used = self.freed.wait(used).unwrap_or_else(PoisonError::into_inner);
        }
        *used += bytes;
        Share { budget: self, bytes }
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        *lock(&self.budget.used) -= self.bytes;
        self.budget.freed.notify_all();
    }
}

struct Shared {
    dataset: Arc<dyn Dataset>,
    config: LoaderConfig,
    mode: Mode,
    rng: Rng,
    size: (usize, usize),
    queue: Mutex<Queue>,
    ready: Condvar,
    room: Condvar,
    /// For the bytes of files. A worker that has some may wait for pixels, never the other way round.
    files: Budget,
    /// For decoded pixels.
    pixels: Budget,
    skipped: Mutex<SkippedImages>,
}

impl Shared {
    fn work(&self) {
        let ahead = self.config.ahead.max(1) as u64;
        loop {
            let mut queue = lock(&self.queue);
            while !queue.stop && queue.begun >= queue.taken + ahead {
                queue = self.room.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            if queue.stop {
                return;
            }
            let number = queue.begun;
            queue.begun += 1;
            drop(queue);
            let result = catch_unwind(AssertUnwindSafe(|| self.batch(number))).unwrap_or_else(|panic| {
                Err(Error::file(self.dataset.path(), format!("a loader thread failed: {}", panic_text(panic.as_ref()))))
            });
            lock(&self.queue).done.insert(number, result);
            self.ready.notify_all();
        }
    }

    fn batch(&self, number: u64) -> Result<Option<ImageBatch>> {
        let size = self.config.batch;
        let first = number.saturating_mul(size as u64);
        let (height, width) = self.size;
        let planes = self.config.planes;
        let mut batch = ImageBatch { planes, height, width, ..ImageBatch::default() };
        batch.pixels.reserve(size.min(self.dataset.len()).saturating_mul(planes.count() * height * width));
        match &self.mode {
            Mode::Endless { order, start } => {
                for position in start.saturating_add(first)..start.saturating_add(first).saturating_add(size as u64) {
                    self.usable(order, position, &mut batch)?;
                }
            }
            Mode::Once { start } => {
                let begin = start.saturating_add(usize::try_from(first).unwrap_or(usize::MAX));
                if begin >= self.dataset.len() {
                    return Ok(None);
                }
                for index in begin..begin.saturating_add(size).min(self.dataset.len()) {
                    if let Ok((about, pixels)) = self.sample(index, 0) {
                        push(&mut batch, index, about, &pixels);
                    }
                }
            }
        }
        Ok(Some(batch))
    }

    /// Adds the image at a position, or the next usable one of the same epoch.
    fn usable(&self, order: &Order, position: u64, batch: &mut ImageBatch) -> Result<()> {
        let len = self.dataset.len();
        let epoch = position / len as u64;
        let place = (position % len as u64) as usize;
        let permutation = order.epoch(epoch);
        let tries = len.min(MOST_BAD);
        let mut first_error = None;
        for offset in 0..tries {
            let index = permutation[(place + offset) % len];
            match self.sample(index, epoch) {
                Ok((about, pixels)) => {
                    push(batch, index, about, &pixels);
                    return Ok(());
                }
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        let why = first_error.unwrap_or_default();
        Err(Error::file(self.dataset.path(), format!("{tries} images in a row cannot be used; the first one: {why}")))
    }

    /// One transformed image, or why it cannot be used.
    fn sample(&self, index: usize, epoch: u64) -> std::result::Result<(About, Vec<f32>), String> {
        let known = {
            let skipped = lock(&self.skipped);
            skipped.by_index.get(&index).map(|at| skipped.list[*at].error.clone())
        };
        match known {
            Some(error) => Err(error),
            None => self.make(index, epoch).map_err(|error| self.skip(index, &error)),
        }
    }

    fn make(&self, index: usize, epoch: u64) -> Result<(About, Vec<f32>)> {
        let _file = self.files.take(self.dataset.bytes(index));
        let record = self.dataset.read(index)?;
        let _pixels = self.pixels.take(match &record.image {
            Source::Encoded(bytes) => image::cost(bytes),
            Source::Grey { pixels, .. } => 3 * pixels.len() as u64,
        });
        let image = record.decode(self.config.planes, self.config.background, &self.config.limits)?;
        let image = self.config.pipeline.image(image, &mut self.rng.stream(index as u64, epoch))?;
        Ok((record.about, image.planes(self.config.planes)?))
    }

    /// Notes an image that cannot be used; why, with its name.
    fn skip(&self, index: usize, error: &Error) -> String {
        let (key, error) = (self.dataset.key(index), error.to_string());
        // What reads a file names it; a transform does not know whose pixels it has.
        let is_named =
            error.starts_with(&key) || ["/", "`"].iter().any(|before| error.contains(&format!("{before}{key}")));
        let error = if is_named { error } else { format!("{key}: {error}") };
        let mut skipped = lock(&self.skipped);
        let at = skipped.list.len();
        // Two epochs may meet in work, and so may two workers at one image.
        if let std::collections::hash_map::Entry::Vacant(place) = skipped.by_index.entry(index) {
            place.insert(at);
            skipped.list.push(Skipped { index, key, error: error.clone() });
        }
        error
    }
}

fn push(batch: &mut ImageBatch, index: usize, about: About, pixels: &[f32]) {
    batch.indices.push(index);
    batch.keys.push(about.key);
    batch.pixels.extend_from_slice(pixels);
    batch.labels.push(about.label);
    batch.texts.push(about.text);
    batch.keywords.push(about.keywords);
}

/// A lock that a panic elsewhere does not spoil: every critical section here leaves whole values.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_string());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "panic".into())
}
