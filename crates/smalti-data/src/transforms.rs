//! Named transforms, from a decoded image to what a model sees. Every verb uses these.
//!
//! A recipe lists them in order: `transforms = [{ kind = "resize_short", size = 64 }, { kind = "center_crop", size = 64 },
//! { kind = "to_signed" }]`. Resizing is PIL's `Image.resize`: convolution whose support grows with the reduction
//! (antialiased), rows first, 8 bits in between; equal to PIL's within one level, and nearly everywhere exactly.

use crate::Image;
use fast_image_resize::pixels::U16x3;
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer, images};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Planes, Result, rng::Stream};

/// Largest side that a transform may make.
const LARGEST: usize = 16_384;
/// Most pixels of an image that is resized along one side only.
const MOST_BETWEEN: usize = 1 << 28;
const PLACE: &str = "transforms";

/// How pixels are weighed when an image is resized; PIL's filters of these names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// Mean over the pixels that are covered.
    Box,
    /// Triangle.
    Bilinear,
    /// Cubic with a = -0.5.
    #[default]
    Bicubic,
    /// Windowed sinc with three lobes.
    Lanczos,
    /// The pixel under the middle of the new one: the only one for label maps.
    Nearest,
}

impl Filter {
    /// The filter for images of this kind where nobody chose one.
    pub fn of(planes: Planes) -> Self {
        if planes.are_labels() { Self::Nearest } else { Self::default() }
    }
}

/// A size in pixels: one number for a square, or `[height, width]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Size {
    /// Height and width are the same.
    Square(usize),
    /// Height, width.
    HeightWidth([usize; 2]),
}

impl Size {
    /// Height and width.
    pub fn height_width(self) -> (usize, usize) {
        match self {
            Self::Square(side) => (side, side),
            Self::HeightWidth([height, width]) => (height, width),
        }
    }
}

/// One step from a decoded image to what a model sees.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Transform {
    /// To exactly this size, whatever the shape was.
    Resize {
        /// Size after it.
        size: Size,
        /// How pixels are weighed.
        #[serde(default)]
        filter: Filter,
    },
    /// The shorter side to `size`, the longer one in proportion, rounded down (torchvision's `Resize(size)`).
    ResizeShort {
        /// Pixels of the shorter side.
        size: usize,
        /// How pixels are weighed.
        #[serde(default)]
        filter: Filter,
    },
    /// The middle; where the margin is odd, the smaller half is on the left and on top.
    CenterCrop {
        /// Size after it, at most the image's.
        size: Size,
    },
    /// A part at a random place.
    RandomCrop {
        /// Size after it, at most the image's.
        size: Size,
    },
    /// A part of random area and shape at a random place, resized (torchvision's `RandomResizedCrop`).
    RandomResizedCrop {
        /// Size after it.
        size: Size,
        /// Least and greatest share of the area.
        #[serde(default = "default_scale")]
        scale: [f64; 2],
        /// Least and greatest width per height.
        #[serde(default = "default_ratio")]
        ratio: [f64; 2],
        /// How pixels are weighed.
        #[serde(default)]
        filter: Filter,
    },
    /// Left and right exchanged, at random.
    Flip {
        /// Probability.
        #[serde(default = "half")]
        p: f32,
    },
    /// Levels 0..255 to planes in -1..1; of a label map the labels as they are. Always the last one.
    ToSigned {},
}

fn half() -> f32 {
    0.5
}

fn default_scale() -> [f64; 2] {
    [0.08, 1.0]
}

fn default_ratio() -> [f64; 2] {
    [3.0 / 4.0, 4.0 / 3.0]
}

impl Transform {
    /// The usual way to a fixed size without chance: the shorter side resized, the middle cut out, to -1..1.
    pub fn center(size: (usize, usize), planes: Planes) -> Vec<Self> {
        let (height, width) = size;
        let short = height.max(width);
        vec![
            Self::ResizeShort { size: short, filter: Filter::of(planes) },
            Self::CenterCrop { size: Size::HeightWidth([height, width]) },
            Self::ToSigned {},
        ]
    }

    fn check(&self) -> Result<()> {
        let fail = |problem: String| Err(Error::invalid(PLACE, problem));
        let size = match self {
            Self::Resize { size, .. }
            | Self::CenterCrop { size }
            | Self::RandomCrop { size }
            | Self::RandomResizedCrop { size, .. } => Some(size.height_width()),
            Self::ResizeShort { size, .. } => Some((*size, *size)),
            Self::Flip { .. } | Self::ToSigned {} => None,
        };
        if let Some((height, width)) = size
            && (height.min(width) == 0 || height.max(width) > LARGEST)
        {
            return fail(format!("a size of {height}x{width}; sides are 1 to {LARGEST}"));
        }
        match self {
            Self::Flip { p } if !(0.0..=1.0).contains(p) => fail(format!("flip: p = {p} is not a probability")),
            Self::RandomResizedCrop { scale: [low, high], .. } if !(0.0 < *low && low <= high && *high <= 1.0) => {
                fail(format!("random_resized_crop: scale = [{low}, {high}]; expected 0 < low <= high <= 1"))
            }
            Self::RandomResizedCrop { ratio: [low, high], .. } if !(0.0 < *low && low <= high && high.is_finite()) => {
                fail(format!("random_resized_crop: ratio = [{low}, {high}]; expected 0 < low <= high"))
            }
            _ => Ok(()),
        }
    }

    /// Size after this transform for a size before it, where it does not depend on the image.
    fn size_after(&self, before: Option<(usize, usize)>) -> Option<(usize, usize)> {
        match self {
            Self::Resize { size, .. }
            | Self::CenterCrop { size }
            | Self::RandomCrop { size }
            | Self::RandomResizedCrop { size, .. } => Some(size.height_width()),
            Self::ResizeShort { size, .. } => before.map(|(height, width)| shorter_to(*size, (height, width))),
            Self::Flip { .. } | Self::ToSigned {} => before,
        }
    }

    fn apply(&self, image: Image, stream: &mut Stream) -> Result<Image> {
        match self {
            Self::Resize { size, filter } => resize(&image, size.height_width(), *filter),
            Self::ResizeShort { size, filter } => {
                resize(&image, shorter_to(*size, (image.height, image.width)), *filter)
            }
            Self::CenterCrop { size } => {
                let (height, width) = fitting("center_crop", *size, &image)?;
                image.crop((image.width - width) / 2, (image.height - height) / 2, width, height)
            }
            Self::RandomCrop { size } => {
                let (height, width) = fitting("random_crop", *size, &image)?;
                let (left, top) = (stream.below(image.width - width + 1), stream.below(image.height - height + 1));
                image.crop(left, top, width, height)
            }
            Self::RandomResizedCrop { size, scale, ratio, filter } => {
                let [left, top, width, height] = random_part(&image, *scale, *ratio, stream);
                resize(&image.crop(left, top, width, height)?, size.height_width(), *filter)
            }
            // The draw happens for every image, so that a change of `p` moves nothing else.
            Self::Flip { p } => Ok(if stream.uniform() < *p { image.flipped() } else { image }),
            Self::ToSigned {} => Ok(image),
        }
    }
}

/// A checked list of transforms that ends in `to_signed`.
#[derive(Clone, Debug, PartialEq)]
pub struct Pipeline {
    transforms: Vec<Transform>,
    size: Option<(usize, usize)>,
}

impl Pipeline {
    /// Checks a list.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `to_signed` is not last, or is there twice, or a number is out of range.
    pub fn new(transforms: Vec<Transform>) -> Result<Self> {
        let signed = transforms.iter().position(|t| matches!(t, Transform::ToSigned {}));
        if signed.is_none_or(|at| at + 1 != transforms.len()) {
            return Err(Error::invalid_hint(
                PLACE,
                "the last transform, and only the last, must be to_signed",
                "end the list with { kind = \"to_signed\" }",
            ));
        }
        transforms.iter().try_for_each(Transform::check)?;
        let size = transforms.iter().fold(None, |size, t| t.size_after(size));
        Ok(Self { transforms, size })
    }

    /// That images of this kind can take this way: what mixes pixels spoils labels.
    ///
    /// # Errors
    /// [`Error::Invalid`] if not.
    pub fn must_suit(&self, planes: Planes) -> Result<()> {
        for transform in &self.transforms {
            let filter = match transform {
                Transform::Resize { filter, .. }
                | Transform::ResizeShort { filter, .. }
                | Transform::RandomResizedCrop { filter, .. } => Some(*filter),
                _ => None,
            };
            if planes.are_labels() && filter.is_some_and(|filter| filter != Filter::Nearest) {
                return Err(Error::invalid_hint(
                    PLACE,
                    "resizing would mix the labels of a label map",
                    "add filter = \"nearest\" to it",
                ));
            }
        }
        Ok(())
    }

    /// Height and width that every image has afterwards, if the list fixes them.
    pub fn size(&self) -> Option<(usize, usize)> {
        self.size
    }

    /// The image after all transforms but the last, still with levels 0..255.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a crop is larger than the image.
    pub fn image(&self, image: Image, stream: &mut Stream) -> Result<Image> {
        image.check()?;
        self.transforms.iter().try_fold(image, |image, transform| transform.apply(image, stream))
    }
}

/// Resizes as PIL's `Image.resize` does, to (height, width).
///
/// # Errors
/// [`Error::Invalid`] if a side is 0 or larger than 16384, or the image is extremely long and thin.
pub fn resize(image: &Image, size: (usize, usize), filter: Filter) -> Result<Image> {
    image.check()?;
    let (height, width) = size;
    if height.min(width) == 0 || height.max(width) > LARGEST {
        return Err(Error::invalid(
            "resize",
            format!("{}x{} to {height}x{width}; sides are 1 to {LARGEST}", image.height, image.width),
        ));
    }
    if image.height.saturating_mul(width) > MOST_BETWEEN {
        return Err(Error::invalid(
            "resize",
            format!("{}x{} to {height}x{width}: the shape is too extreme", image.height, image.width),
        ));
    }
    if filter == Filter::Nearest {
        return nearest(image, size);
    }
    // PIL resizes rows first and keeps 8 bits in between, where sharp filters are cut off at 0 and 255: the order shows.
    let rows = pass(image, (image.height, width), filter)?;
    pass(&rows, size, filter)
}

/// Each pixel from the one under its middle.
fn nearest(image: &Image, (height, width): (usize, usize)) -> Result<Image> {
    let under = |i: usize, n: usize, all: usize| (2 * i + 1) * all / (2 * n);
    let mut pixels = Vec::with_capacity(width * height * 3);
    for y in 0..height {
        let row = under(y, height, image.height) * image.width;
        for x in 0..width {
            let from = (row + under(x, width, image.width)) * 3;
            pixels.extend_from_slice(&image.pixels[from..from + 3]);
        }
    }
    Ok(Image { grey: image.grey, ..Image::new(width, height, pixels)? })
}

/// A resize along one side.
fn pass(image: &Image, (height, width): (usize, usize), filter: Filter) -> Result<Image> {
    if (image.height, image.width) == (height, width) {
        return Ok(image.clone());
    }
    let failed = |e: &dyn std::fmt::Display| Error::invalid("resize", e.to_string());
    let side = |n: usize| u32::try_from(n).map_err(|e| failed(&e));
    // 16-bit arithmetic: the 8-bit one is less exact than PIL's, and its errors grow in the second pass.
    let wide: Vec<U16x3> =
        image.pixels.as_chunks::<3>().0.iter().map(|p| U16x3::new(p.map(|v| u16::from(v) * 257))).collect();
    let source =
        images::ImageRef::from_pixels(side(image.width)?, side(image.height)?, &wide).map_err(|e| failed(&e))?;
    let mut target = images::Image::new(side(width)?, side(height)?, PixelType::U16x3);
    let filter = match filter {
        Filter::Box => FilterType::Box,
        Filter::Bilinear => FilterType::Bilinear,
        Filter::Bicubic => FilterType::CatmullRom,
        Filter::Lanczos => FilterType::Lanczos3,
        Filter::Nearest => return nearest(image, (height, width)),
    };
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter)).use_alpha(false);
    Resizer::new().resize(&source, &mut target, &options).map_err(|e| failed(&e))?;
    let narrow = |word: &[u8; 2]| ((u32::from(u16::from_ne_bytes(*word)) + 128) / 257) as u8;
    let pixels = target.buffer().as_chunks::<2>().0.iter().map(narrow).collect();
    Ok(Image { grey: image.grey, ..Image::new(width, height, pixels)? })
}

/// (height, width) whose shorter side is `short`.
fn shorter_to(short: usize, (height, width): (usize, usize)) -> (usize, usize) {
    match height <= width {
        true => (short, (short * width) / height.max(1)),
        false => ((short * height) / width.max(1), short),
    }
}

fn fitting(what: &str, size: Size, image: &Image) -> Result<(usize, usize)> {
    let (height, width) = size.height_width();
    if height > image.height || width > image.width {
        return Err(Error::invalid_hint(
            what,
            format!("the image is {}x{}, smaller than the crop of {height}x{width}", image.height, image.width),
            "put a resize before it",
        ));
    }
    Ok((height, width))
}

/// Left, top, width, height. As torchvision: ten tries, then the largest middle part within the shape limits.
fn random_part(image: &Image, scale: [f64; 2], ratio: [f64; 2], stream: &mut Stream) -> [usize; 4] {
    let (width, height) = (image.width as f64, image.height as f64);
    let mut between = |low: f64, high: f64| low + (high - low) * stream.uniform_f64();
    let tries: Vec<(f64, f64)> = (0..10)
        .map(|_| (width * height * between(scale[0], scale[1]), between(ratio[0].ln(), ratio[1].ln()).exp()))
        .collect();
    for (area, shape) in tries {
        let (w, h) = ((area * shape).sqrt().round() as usize, (area / shape).sqrt().round() as usize);
        if (1..=image.width).contains(&w) && (1..=image.height).contains(&h) {
            return [stream.below(image.width - w + 1), stream.below(image.height - h + 1), w, h];
        }
    }
    let shape = (width / height).clamp(ratio[0], ratio[1]);
    let w = ((height * shape).round().min(width) as usize).max(1);
    let h = ((width / shape).round().min(height) as usize).max(1);
    [(image.width - w) / 2, (image.height - h) / 2, w, h]
}
