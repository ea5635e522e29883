//! Label maps against label maps.

/// How often each class was taken for each other one, over pixels of many label maps.
#[derive(Clone, Debug)]
pub struct Confusion {
    classes: usize,
    /// Pixels of class `row` that were found as class `column`.
    counts: Vec<u64>,
}

impl Confusion {
    /// Nothing yet; labels are below `classes`.
    pub fn new(classes: usize) -> Self {
        Self { classes, counts: vec![0; classes * classes] }
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// Adds pixels in pairs, those of the map and those that were found. Labels that are not a class are left out.
    pub fn add(&mut self, labels: impl IntoIterator<Item = u8>, found: impl IntoIterator<Item = u8>) {
        for (label, found) in labels.into_iter().zip(found) {
            let (label, found) = (usize::from(label), usize::from(found));
            if label < self.classes && found < self.classes {
                self.counts[label * self.classes + found] += 1;
            }
        }
    }

    /// Share of the pixels that were found right; not a number without pixels.
    pub fn accuracy(&self) -> f64 {
        let right: u64 = (0..self.classes).map(|class| self.counts[class * self.classes + class]).sum();
        right as f64 / self.counts.iter().sum::<u64>() as f64
    }

    /// Mean intersection over union: pixels of a class that were found as such, by the pixels that are of it or were found as
    /// such, mean over the classes that occur on either side.
    pub fn mean_intersection_over_union(&self) -> f64 {
        let n = self.classes;
        let ratios: Vec<f64> = (0..n)
            .filter_map(|class| {
                let both = self.counts[class * n + class];
                let labelled: u64 = self.counts[class * n..(class + 1) * n].iter().sum();
                let found: u64 = self.counts.iter().skip(class).step_by(n).sum();
                let either = labelled + found - both;
                (either > 0).then(|| both as f64 / either as f64)
            })
            .collect();
        ratios.iter().sum::<f64>() / ratios.len() as f64
    }
}

#[cfg(test)]
mod tests {
    use super::Confusion;

    #[test]
    fn accuracy_and_intersections_of_a_small_map() {
        let mut confusion = Confusion::new(4);
        // Class 0: 2 of 3 found, 1 other taken for it. Class 1: 1 of 2 found, 1 other taken for it. Class 2: found nowhere.
        confusion.add([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 3]);
        assert_eq!(confusion.accuracy(), 3.0 / 6.0);
        let expected = (2.0 / 4.0 + 1.0 / 3.0 + 0.0 + 0.0) / 4.0;
        assert!((confusion.mean_intersection_over_union() - expected).abs() < 1e-12);
        assert!(Confusion::new(2).accuracy().is_nan());
    }
}
