//! The losses of taming-transformers and latent-diffusion: reconstruction, perceptual and patch discriminator.

use super::case::Case;
use burn::tensor::Device;
use serde::Deserialize;
use smalti_base::{Error, Result};
use smalti_models::checkpoint::Rules;
use smalti_models::losses::{AdversarialConfig, AdversarialKind, DiscriminatorConfig, TokenizerLossConfig};
use smalti_nn::{PatchGan, PatchGanConfig};

/// The official settings of a loss, and the step that the case was made at. Defaults are those of the official classes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Losses {
    pub(crate) disc_start: u64,
    pub(crate) disc_weight: f64,
    /// Of the generator's term and of the discriminator's loss.
    pub(crate) disc_factor: f64,
    pub(crate) codebook_weight: f64,
    pub(crate) perceptual_weight: f64,
    pub(crate) disc_num_layers: usize,
    #[serde(alias = "ndf")]
    pub(crate) disc_ndf: usize,
    pub(crate) disc_in_channels: usize,
    pub(crate) disc_loss: String,
    /// Of latent-diffusion alone, as are those below.
    pub(crate) kl_weight: f64,
    pub(crate) logvar_init: f64,
    pub(crate) global_step: u64,
}

impl Default for Losses {
    fn default() -> Self {
        Self {
            disc_start: 0,
            disc_weight: 1.0,
            disc_factor: 1.0,
            codebook_weight: 1.0,
            perceptual_weight: 1.0,
            disc_num_layers: 3,
            disc_ndf: 64,
            disc_in_channels: 3,
            disc_loss: "hinge".into(),
            kl_weight: 1.0,
            logvar_init: 0.0,
            global_step: 0,
        }
    }
}

impl Losses {
    /// The settings at `place` of the configuration.
    ///
    /// # Errors
    /// [`Error`] for settings that are not known or not supported.
    pub(crate) fn read(case: &Case, place: &str) -> Result<Self> {
        for key in ["use_actnorm", "disc_conditional"] {
            case.only(&format!("{place}.{key}"), false)?;
        }
        // The official code does not use it.
        case.ignore(&[&format!("{place}.pixelloss_weight")]);
        case.setting(place)
    }

    /// What both systems have of ours.
    ///
    /// # Errors
    /// [`Error::Unknown`] for another kind of adversarial loss.
    pub(crate) fn config(&self, case: &Case) -> Result<TokenizerLossConfig> {
        let kind = match self.disc_loss.as_str() {
            "hinge" => AdversarialKind::Hinge,
            "vanilla" => AdversarialKind::Vanilla,
            other => return Err(Error::unknown(case.title(), "discriminator loss", other, ["hinge", "vanilla"])),
        };
        Ok(TokenizerLossConfig {
            l1: 1.0,
            perceptual_weight: self.perceptual_weight,
            adversarial: Some(AdversarialConfig {
                kind,
                weight: self.disc_weight * self.disc_factor,
                start_step: self.disc_start,
                adaptive: true,
                discriminator: DiscriminatorConfig::default(),
                ndf: self.disc_ndf,
                layers: self.disc_num_layers,
            }),
            codebook_weight: self.codebook_weight,
            ..Default::default()
        })
    }

    /// The case's discriminator.
    ///
    /// # Errors
    /// As [`Rules::import`].
    pub(crate) fn discriminator(&self, case: &Case, device: &Device) -> Result<PatchGan> {
        let config =
            PatchGanConfig { in_channels: self.disc_in_channels, ndf: self.disc_ndf, layers: self.disc_num_layers };
        Ok(Rules::builtin("vqgan", "discriminator")?.import(config.init(device)?, &case.weights("")?)?.0)
    }
}
