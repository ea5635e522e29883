//! The loader over the demo data set: order, exact resume, independence of workers and batch size, bad images.

#![allow(clippy::unwrap_used)]

use smalti_base::Planes;
use smalti_data::datasets::{About, Dataset, Source};
use smalti_data::loader::{Loader, LoaderConfig, Order};
use smalti_data::{DataConfig, ImageBatch, Transform};
use std::path::Path;
use std::sync::Arc;

fn emoji(random: bool) -> DataConfig {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/emoji3d");
    let mut transforms = if random {
        let list = r#"[{"kind": "random_resized_crop", "size": 24, "scale": [0.5, 1.0]}, {"kind": "flip"}, {"kind": "to_signed"}]"#;
        serde_json::from_str(list).unwrap()
    } else {
        Transform::center((32, 32), Planes::Colour)
    };
    let mut config = DataConfig::new(path, std::mem::take(&mut transforms));
    config.split = Some("validation".into());
    config
}

/// Images of a loader one by one: index and pixels.
fn images(batches: impl Iterator<Item = ImageBatch>) -> Vec<(usize, Vec<f32>)> {
    let split = |batch: ImageBatch| {
        let area = 3 * batch.height * batch.width;
        assert_eq!(batch.pixels.len(), batch.len() * area);
        let pixels: Vec<Vec<f32>> = batch.pixels.chunks(area).map(<[f32]>::to_vec).collect();
        batch.indices.into_iter().zip(pixels).collect::<Vec<_>>()
    };
    batches.flat_map(split).collect()
}

fn train(batch: usize, workers: usize, start: u64, take: usize) -> Vec<(usize, Vec<f32>)> {
    let data = emoji(true);
    let dataset: Arc<dyn Dataset> = Arc::from(data.open(None).unwrap());
    let mut config = LoaderConfig::new(&data, batch).unwrap();
    config.workers = workers;
    let loader = Loader::new(dataset, config, 11, start).unwrap();
    images(loader.take(take).map(Result::unwrap))
}

#[test]
fn training_order_depends_on_seed_and_epoch_only() {
    // 186 images: 60 batches of 8 reach into the third epoch.
    let reference = train(8, 1, 0, 60);
    let other = train(5, 3, 0, 96);
    assert_eq!(reference, other);
    let order = Order::new(11, 186);
    for (position, (index, _)) in reference.iter().enumerate() {
        assert_eq!(order.at(position as u64).1, *index);
    }
    let mut first: Vec<usize> = reference[..186].iter().map(|r| r.0).collect();
    assert_ne!(first, reference[186..372].iter().map(|r| r.0).collect::<Vec<_>>());
    first.sort_unstable();
    assert_eq!(first, (0..186).collect::<Vec<_>>());
    // The same image is cropped differently in another epoch.
    let again = reference[186..].iter().find(|r| r.0 == reference[0].0).unwrap();
    assert_ne!(again.1, reference[0].1);
}

#[test]
fn a_loader_goes_on_where_it_stopped() {
    let whole = train(6, 2, 0, 70);
    for batches in [1, 31, 40] {
        let rest = train(6, 2, 6 * batches as u64, 70 - batches);
        assert_eq!(rest, whole[6 * batches..]);
    }
}

#[test]
fn evaluation_sees_each_image_once_in_order() {
    let data = emoji(false);
    let dataset: Arc<dyn Dataset> = Arc::from(data.open(None).unwrap());
    let loader = Loader::ordered(Arc::clone(&dataset), LoaderConfig::new(&data, 50).unwrap(), 0, 0).unwrap();
    let batches: Vec<ImageBatch> = loader.map(Result::unwrap).collect();
    assert_eq!(batches.iter().map(ImageBatch::len).collect::<Vec<_>>(), [50, 50, 50, 36]);
    let indices: Vec<usize> = batches.iter().flat_map(|b| b.indices.clone()).collect();
    assert_eq!(indices, (0..186).collect::<Vec<_>>());
    for batch in &batches {
        assert!(batch.texts.iter().all(Option::is_some) && batch.labels.iter().all(Option::is_some));
        assert!(batch.pixels.iter().all(|p| (-1.0..=1.0).contains(p)));
        for (at, &index) in batch.indices.iter().enumerate() {
            assert_eq!(batch.keys[at], dataset.key(index));
        }
    }
}

/// Every third image is broken; number 100 makes its reader panic.
struct Faulty {
    good: Vec<u8>,
    panics: bool,
}

impl Dataset for Faulty {
    fn kind(&self) -> &'static str {
        "faulty"
    }
    fn path(&self) -> &Path {
        Path::new("faulty")
    }
    fn len(&self) -> usize {
        120
    }
    fn classes(&self) -> &[String] {
        &[]
    }
    fn key(&self, index: usize) -> String {
        format!("k{index}")
    }
    fn about(&self, index: usize) -> smalti_base::Result<About> {
        assert!(!self.panics || index != 100, "number 100");
        Ok(About { key: self.key(index), ..About::default() })
    }
    fn source(&self, index: usize) -> smalti_base::Result<Source> {
        let good = !index.is_multiple_of(3);
        Ok(Source::Encoded(if good { self.good.clone() } else { self.good[..self.good.len() / 2].to_vec() }))
    }
}

fn faulty(panics: bool) -> Arc<dyn Dataset> {
    let data = emoji(false).open(None).unwrap();
    let Source::Encoded(good) = data.source(0).unwrap() else { panic!("encoded") };
    Arc::new(Faulty { good, panics })
}

#[test]
fn bad_images_are_replaced_and_listed() {
    let run = |batch: usize, workers: usize, take: usize| {
        let mut config = LoaderConfig::new(&emoji(false), batch).unwrap();
        config.workers = workers;
        let mut loader = Loader::new(faulty(false), config, 3, 0).unwrap();
        let seen = images(loader.by_ref().take(take).map(Result::unwrap));
        (seen, loader.skipped())
    };
    let (seen, skipped) = run(4, 1, 60);
    assert_eq!(seen, run(10, 3, 24).0);
    assert!(seen.iter().all(|(index, _)| index % 3 != 0));
    assert_eq!(skipped.len(), 40);
    assert!(skipped[1].key == "k3" && skipped[1].error.contains("k3: cannot be decoded"), "{:?}", skipped[1]);
    let config = LoaderConfig::new(&emoji(false), 7).unwrap();
    let ordered = Loader::ordered(faulty(false), config, 0, 0).unwrap();
    assert_eq!(images(ordered.map(Result::unwrap)).len(), 80);
}

#[test]
fn a_panic_in_a_worker_is_an_error_and_ends_the_loader() {
    let mut loader = Loader::ordered(faulty(true), LoaderConfig::new(&emoji(false), 16).unwrap(), 0, 0).unwrap();
    let results: Vec<_> = loader.by_ref().collect();
    assert_eq!(results.len(), 7);
    assert!(results[6].as_ref().unwrap_err().to_string().contains("number 100"));
    assert!(loader.next().is_none());
}

#[test]
fn sizes_that_differ_cannot_be_batched() {
    let mut data = emoji(false);
    data.transforms.remove(1);
    let dataset: Arc<dyn Dataset> = Arc::from(data.open(None).unwrap());
    let error = Loader::new(dataset, LoaderConfig::new(&data, 2).unwrap(), 0, 0).err().unwrap();
    assert!(error.to_string().contains("center_crop"), "{error}");
}

#[test]
fn images_that_are_skipped_are_named_and_counted_once() {
    let folder = tempfile::tempdir().unwrap();
    for side in [1, 8] {
        let image = smalti_data::Image::filled(side, side, [9; 3]);
        smalti_data::image::save_png(&folder.path().join(format!("{side}.png")), &image, None).unwrap();
    }
    let crop = serde_json::from_str(r#"[{"kind": "random_crop", "size": 4}, {"kind": "to_signed"}]"#).unwrap();
    let data = DataConfig::new(folder.path(), crop);
    let dataset: Arc<dyn Dataset> = Arc::from(data.open(None).unwrap());
    let mut loader = Loader::ordered(dataset, LoaderConfig::new(&data, 2).unwrap(), 0, 0).unwrap();
    assert_eq!(loader.by_ref().map(|batch| batch.unwrap().len()).sum::<usize>(), 1);
    let skipped = loader.skipped();
    assert_eq!(skipped.len(), 1);
    assert!(skipped[0].error.contains("1.png"), "{:?}", skipped[0]);
    assert_eq!(loader.skipped_after(0), skipped);
    assert!(loader.skipped_after(1).is_empty());
}

/// Counts the images that are in work at once.
struct Counting {
    image: Vec<u8>,
    now: std::sync::atomic::AtomicUsize,
    most: std::sync::atomic::AtomicUsize,
}

impl Dataset for Counting {
    fn kind(&self) -> &'static str {
        "counting"
    }
    fn path(&self) -> &Path {
        Path::new("counting")
    }
    fn len(&self) -> usize {
        24
    }
    fn classes(&self) -> &[String] {
        &[]
    }
    fn key(&self, index: usize) -> String {
        index.to_string()
    }
    fn bytes(&self, _: usize) -> u64 {
        1000
    }
    fn about(&self, index: usize) -> smalti_base::Result<About> {
        use std::sync::atomic::Ordering::SeqCst;
        let now = self.now.fetch_add(1, SeqCst) + 1;
        self.most.fetch_max(now, SeqCst);
        std::thread::sleep(std::time::Duration::from_millis(3));
        self.now.fetch_sub(1, SeqCst);
        Ok(About { key: self.key(index), ..About::default() })
    }
    fn source(&self, _: usize) -> smalti_base::Result<Source> {
        Ok(Source::Encoded(self.image.clone()))
    }
}

#[test]
fn workers_share_the_memory_for_images() {
    let image = smalti_data::image::encode_png(&smalti_data::Image::filled(64, 64, [9; 3]), None).unwrap();
    // Files of 1000 bytes; an image needs 65,536 bytes, which is more than all of the last two.
    for (memory, most) in [(1 << 30, 8), (2500, 2), (10, 1)] {
        let dataset = Arc::new(Counting { image: image.clone(), now: 0.into(), most: 0.into() });
        let mut config = LoaderConfig::new(&emoji(false), 2).unwrap();
        (config.workers, config.ahead, config.limits.memory) = (8, 16, memory);
        let loader = Loader::ordered(dataset.clone(), config, 0, 0).unwrap();
        assert_eq!(loader.map(|batch| batch.unwrap().len()).sum::<usize>(), 24);
        let seen = dataset.most.load(std::sync::atomic::Ordering::SeqCst);
        assert!(seen <= most, "{seen} in work at once, at most {most}");
    }
}
