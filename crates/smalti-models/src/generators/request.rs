//! What is asked of a generator, and its checks.

use super::{Condition, Conditions, GeneratorSettings};
use crate::sampling::Sampling;
use burn::tensor::{Device, Int, Tensor};
use smalti_base::{Error, Layout, Result, TokenKind, TokenSpec, Tokens};
use smalti_nn::Interpolation;

/// Tokens that must be kept. Inpainting, outpainting and prefixes are all "some tokens are known".
#[derive(Clone, Debug, PartialEq)]
pub struct Known {
    /// A token for each place of the layout; codes that are not kept are not looked at.
    pub tokens: Tokens,
    /// True where the token is kept.
    pub keep: Vec<bool>,
}

impl Known {
    /// Which tokens are kept if these places of the finest level are, row by row. A coarser level keeps the places that are
    /// kept for more than a half, by straight lines between them; a level of up to three places is kept whole, since it says
    /// more of the picture than of a place (VAR's editing).
    pub fn keep(layout: &Layout, finest: &[bool]) -> Vec<bool> {
        let (rows, columns) = layout.finest();
        let level = |h: usize, w: usize| -> Vec<bool> {
            if (h, w) == (rows, columns) {
                return finest.to_vec();
            }
            let (down, across) =
                (Interpolation::Bilinear.weights(rows, h), Interpolation::Bilinear.weights(columns, w));
            let share = |y: &[f64], x: &[f64]| -> f64 {
                let row = |row: &[bool]| row.iter().zip(x).filter(|(keep, _)| **keep).map(|(_, x)| x).sum::<f64>();
                finest.chunks(columns).zip(y).map(|(cells, y)| y * row(cells)).sum()
            };
            let cells = down.iter().flat_map(|y| across.iter().map(move |x| (y, x)));
            cells.map(|(y, x)| h * w <= 3 || share(y, x) > 0.5).collect()
        };
        match layout {
            Layout::Grid { .. } | Layout::Sequence { .. } => finest.to_vec(),
            Layout::Stack { depth, .. } => finest.iter().flat_map(|keep| vec![*keep; *depth]).collect(),
            Layout::Pyramid { levels } => levels.iter().flat_map(|(h, w)| level(*h, *w)).collect(),
        }
    }
}

/// One picture to make.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageRequest {
    /// What it shows.
    pub condition: Condition,
    /// What guidance leads away from: nothing in particular, or a negative prompt.
    pub negative: Condition,
    /// Seed of its random draws. A picture depends on its own request only, not on its batch.
    pub seed: u64,
    /// Tokens that are given.
    pub known: Option<Known>,
}

impl ImageRequest {
    /// A picture of which no token is given.
    pub fn new(condition: Condition, seed: u64) -> Self {
        Self { condition, negative: Condition::none(), seed, known: None }
    }
}

/// A batch of pictures to make.
#[derive(Clone, Debug)]
pub struct Request {
    /// The pictures.
    pub images: Vec<ImageRequest>,
    /// How tokens are drawn, the same for all.
    pub sampling: Sampling,
    /// Rows and columns of tokens, if the pictures are to be larger than the generator's own.
    pub grid: Option<(usize, usize)>,
}

impl Request {
    /// Pictures of the generator's own size.
    pub fn new(images: Vec<ImageRequest>, sampling: Sampling) -> Self {
        Self { images, sampling, grid: None }
    }

    /// Checks everything, and returns the kept codes of each image, `None` where one is to be made.
    ///
    /// # Errors
    /// [`Error::Invalid`] for no images, sampling settings out of range, conditions of another kind or out of range, known
    /// tokens of another number or out of range; [`Error::Unsupported`] for what the generator cannot do, and for guidance of one that
    /// was not trained without its condition.
    pub(super) fn check(&self, settings: &dyn GeneratorSettings) -> Result<Vec<Vec<Option<u32>>>> {
        self.check_on(settings, settings.tokens(), settings.conditions())
    }

    /// [`Self::check`] on another grid than the generator's own, with the tokens and conditions that it has there.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub(super) fn check_on(
        &self,
        settings: &dyn GeneratorSettings,
        tokens: &TokenSpec,
        conditions: &Conditions,
    ) -> Result<Vec<Vec<Option<u32>>>> {
        self.check_all(settings, tokens, conditions)?;
        let known = |image: &ImageRequest| match image.known.as_ref().map(|known| (&known.tokens, &known.keep)) {
            Some((Tokens::Discrete(codes), keep)) => {
                codes.iter().zip(keep).map(|(code, keep)| keep.then_some(*code)).collect()
            }
            _ => vec![None; tokens.length()],
        };
        Ok(self.images.iter().map(known).collect())
    }

    /// Checks everything, and returns the kept vectors of each image, `None` where one is to be made.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub(super) fn check_vectors(&self, settings: &dyn GeneratorSettings) -> Result<Vec<Vec<Option<Vec<f32>>>>> {
        let tokens = settings.tokens();
        self.check_all(settings, tokens, settings.conditions())?;
        let channels = tokens.channels().unwrap_or(1).max(1);
        let known = |image: &ImageRequest| match image.known.as_ref().map(|known| (&known.tokens, &known.keep)) {
            Some((Tokens::Continuous(values), keep)) => {
                values.chunks_exact(channels).zip(keep).map(|(token, keep)| keep.then(|| token.to_vec())).collect()
            }
            _ => vec![None; tokens.length()],
        };
        Ok(self.images.iter().map(known).collect())
    }

    fn check_all(&self, settings: &dyn GeneratorSettings, tokens: &TokenSpec, conditions: &Conditions) -> Result<()> {
        if self.images.is_empty() {
            return Err(Error::invalid("request", "no images; expected at least 1"));
        }
        check_sampling(settings, &self.sampling)?;
        if self.grid.is_some() && !settings.abilities().slides_a_window {
            return Err(Error::unsupported(
                "pictures of another size by this generator",
                "only gpt can slide a window",
            ));
        }
        for image in &self.images {
            conditions.ids(&image.condition)?;
            conditions.ids(&image.negative)?;
            if !image.negative.is_none() && !self.sampling.is_guided() {
                return Err(Error::invalid_hint(
                    "request",
                    "a negative condition was given without guidance",
                    "guidance leads away from it: use a guidance other than 1",
                ));
            }
            if let Some(known) = &image.known {
                known.check(tokens)?;
            }
        }
        Ok(())
    }

    /// The conditions' ids, and with guidance below them those of what it leads away from, `[n or 2 n, length]`.
    ///
    /// # Errors
    /// As [`Conditions::ids`].
    pub(super) fn condition_rows(&self, config: &Conditions, device: &Device) -> Result<Tensor<2, Int>> {
        config.batch(&self.conditions(), None, device)
    }

    /// The conditions, and with guidance below them what it leads away from.
    pub(super) fn conditions(&self) -> Vec<Condition> {
        let mut rows: Vec<Condition> = self.images.iter().map(|image| image.condition.clone()).collect();
        if self.sampling.is_guided() {
            rows.extend(self.images.iter().map(|image| image.negative.clone()));
        }
        rows
    }
}

/// Checks sampling settings against a generator: ranges, and that each setting that is given has an effect on it. What a model's
/// own settings or a command line ask for is known to be right before a weight is read.
///
/// # Errors
/// [`Error::Invalid`] for settings out of range, [`Error::Unsupported`] for what the generator cannot do.
pub fn check_sampling(settings: &dyn GeneratorSettings, sampling: &Sampling) -> Result<()> {
    sampling.validate()?;
    let (tokens, abilities) = (settings.tokens(), settings.abilities());
    sampling.must_fit_depth(if let Layout::Stack { depth, .. } = &tokens.layout { *depth } else { 1 })?;
    let are_vectors = tokens.vocabulary().is_none();
    let of_vectors = [("top_k", sampling.top_k.is_some()), ("top_p", sampling.top_p.is_some())];
    if let Some((name, _)) = of_vectors.into_iter().find(|(_, given)| *given && are_vectors) {
        return Err(Error::unsupported(
            format!("{name} with tokens that are vectors"),
            "they have no probabilities to cut: leave it out",
        ));
    }
    let refused = [
        (
            sampling.smooth && !abilities.mixes_codes,
            "smooth sampling with this generator",
            "only var can mix codes: leave out `smooth`",
        ),
        (
            sampling.steps.is_some() && !abilities.chooses_steps,
            "a number of decoding steps with this generator",
            "its tokens decide how many there are: leave out `steps`",
        ),
        (
            sampling.diffusion_steps.is_some() && !are_vectors,
            "a number of diffusion steps with tokens that are codes",
            "nothing is diffused: leave out `diffusion_steps`",
        ),
        (
            sampling.is_guided() && (settings.conditions().is_none() || settings.condition_dropout() == 0.0),
            "guidance of a generator that was not trained both with and without a condition",
            "use guidance 1, or train it with a condition and `condition_dropout` above 0",
        ),
    ];
    match refused.into_iter().find(|(is_refused, ..)| *is_refused) {
        Some((_, what, hint)) => Err(Error::unsupported(what, hint)),
        None => Ok(()),
    }
}

impl Known {
    /// # Errors
    /// [`Error::Invalid`] for another number of tokens or marks, tokens of another kind, or kept ones out of range.
    fn check(&self, spec: &TokenSpec) -> Result<()> {
        let refuse = |problem: String| Err(Error::invalid("known tokens", problem));
        let (length, marks) = (spec.length(), self.keep.len());
        let problem = |count: usize| {
            format!("{count} tokens and {marks} marks for {length} places; expected one of each for each place")
        };
        match (&self.tokens, &spec.kind) {
            (Tokens::Discrete(codes), TokenKind::Discrete { vocabulary }) => {
                if codes.len() != length || marks != length {
                    return refuse(problem(codes.len()));
                }
                let kept = (0..length).filter(|place| self.keep[*place]);
                let most = |place: usize| vocabulary.of(spec.layout.part_of(place));
                match kept.into_iter().find(|place| codes[*place] as usize >= most(*place)) {
                    Some(place) => refuse(format!("{} is not in 0..{}", codes[place], most(place))),
                    None => Ok(()),
                }
            }
            _ if marks != length => refuse(problem(length)),
            (tokens, _) => match tokens.misfit(spec) {
                Some(problem) => refuse(problem),
                None => Ok(()),
            },
        }
    }
}
