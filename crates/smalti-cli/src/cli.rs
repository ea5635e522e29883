//! The command line. What a verb takes is declared once, beside the verb, in the engine.

use clap::{Parser, Subcommand};
use clap_complete::Shell;
use smalti::Settings;
use smalti::assemble::AssembleArgs;
use smalti::bench::BenchArgs;
use smalti::edit::EditArgs;
use smalti::evaluate::EvaluateArgs;
use smalti::export::ExportArgs;
use smalti::generate::GenerateArgs;
use smalti::import::ImportArgs;
use smalti::inspect::InspectArgs;
use smalti::parity::ParityArgs;
use smalti::reconstruct::ReconstructArgs;
use smalti::tokenize::TokenizeArgs;
use smalti::train::TrainArgs;

/// Image tokenizers and generators over their tokens: train, tokenize, generate, edit, evaluate.
#[derive(Debug, Parser)]
#[command(name = "smalti", version, propagate_version = true, max_term_width = 110, after_help = EXAMPLES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
    /// What all verbs share.
    #[command(flatten, next_help_heading = "Global options")]
    pub settings: Settings,
    /// Print one JSON document on standard output; progress and messages go to standard error
    #[arg(long, global = true)]
    pub json: bool,
    /// Show no progress and no messages, only results and errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Without a terminal, print a line for every step
    #[arg(short, long, global = true)]
    pub verbose: bool,
    /// Resolve and check everything, print the plan, and do nothing
    #[arg(long, global = true)]
    pub dry_run: bool,
}

const EXAMPLES: &str = "\
Examples:
  smalti generate \"a red heart\" -o heart.png
  smalti train recipes/vqgan/tiny.toml --out runs/tokenizer
  smalti reconstruct photos/ --model runs/tokenizer -o out/
  smalti systems

Every verb has its own examples: smalti VERB --help";

const TRAIN: &str = "\
Examples:
  smalti train recipes/vqgan/tiny.toml --out runs/tokenizer
  smalti train recipes/vqgan/tiny.toml --out runs/slow optimizer.learning_rate=1e-4 schedule.steps=20000
  smalti train recipes/vqgan/tiny.toml --dry-run";

const TOKENIZE: &str = "\
Examples:
  smalti tokenize photos/ tokens/ --model runs/tokenizer
  smalti tokenize photos/ tokens/train --split train --flip --model runs/tokenizer";

const GENERATE: &str = "\
Examples:
  smalti generate \"a red heart\" -o heart.png
  smalti generate \"a red heart\" -o hearts.png --count 9 --guidance 4
  smalti generate --model runs/digits --class 7 --seed 5 -o sevens/ --count 100
  smalti generate --model runs/digits --class 7 -o seven.png --count 32 --keep 1 --judge runs/classifier
  smalti generate \"a red heart\" -o heart.png --weights int8";

const EDIT: &str = "\
Examples:
  smalti edit photo.png --mask mask.png \"a blue hat\" -o edited.png
  smalti edit photo.png --mask erased.png --model runs/mine -o filled.png";

const RECONSTRUCT: &str = "\
Examples:
  smalti reconstruct photos/ --model runs/tokenizer -o out/
  smalti reconstruct photo.jpg --model runs/tokenizer -o out/ --json";

const EVALUATE: &str = "\
Examples:
  smalti evaluate runs/tokenizer --data photos/ --split validation
  smalti evaluate assets/demo --data assets/emoji3d/validation.tar --json
  smalti evaluate assets/demo --data assets/emoji3d/validation.tar --weights int8";

const BENCH: &str = "\
Examples:
  smalti bench
  smalti bench assets/demo recipes/vqgan/imagenet-f16-1024.toml
  smalti bench --only conv2d --seconds 2 --json";

const IMPORT: &str = "\
Examples:
  smalti import vqgan_imagenet_f16_1024.ckpt --system vqgan -o models/vqgan
  smalti import vae_ch160v4096z32.pth --system var -o models/var-d16
  smalti import var_d16.pth --system var -o models/var-d16
  smalti import mine.ckpt --system vqgan --variant my-recipe.toml -o models/mine
  smalti import hf://ORG/NAME/var_d16.pth --system var -o models/var-d16
  smalti import hf://ORG/NAME@REVISION/vae --system autoencoder-kl -o models/kl --offline

Files from the hub are kept in the cache of the hub's own programs. Environment variables: HF_HOME or HF_HUB_CACHE (the cache), HF_TOKEN or
HF_TOKEN_PATH (for private and gated repositories), HF_ENDPOINT (another hub), HF_HUB_OFFLINE=1 (as --offline).
Weights on the hub are downloaded even for --dry-run, since the plan depends on their shapes.";

const EXPORT: &str = "\
Examples:
  smalti export runs/kl-tiny --layout official -o kl.safetensors
  smalti export assets/demo --part tokenizer -o vqgan.safetensors";

const ASSEMBLE: &str = "\
Examples:
  smalti assemble runs/small -o models/large --next runs/upscaler
  smalti assemble runs/digits -o models/digits --judge runs/classifier
  smalti assemble runs/digits -o models/digits --judge runs/classifier --refer

Afterwards: smalti generate --model models/digits --class 7 -o seven.png --count 32 --keep 1";

const PARITY: &str = "\
Examples:
  smalti parity golden/vqgan/vqmodel-tiny
  smalti parity golden/*/* --json

Exit status: 0 if all tensors are within tolerance, 1 if one is not, 2 if a case's system does not exist here.";

const INSPECT: &str = "\
Examples:
  smalti inspect assets/demo
  smalti inspect heart.png --json";

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Train a tokenizer, a generator or an encoder from a recipe; run it again to continue
    #[command(after_help = TRAIN)]
    Train(TrainArgs),
    /// Turn a data set into token shards; run it again to continue
    #[command(after_help = TOKENIZE)]
    Tokenize(TokenizeArgs),
    /// Make pictures from a caption, a class, or nothing
    #[command(after_help = GENERATE)]
    Generate(GenerateArgs),
    /// Repaint part of an image and keep the rest
    #[command(after_help = EDIT)]
    Edit(EditArgs),
    /// Put images through a tokenizer and back, and measure what is lost
    #[command(after_help = RECONSTRUCT)]
    Reconstruct(ReconstructArgs),
    /// Measure a model on images: PSNR, SSIM, codebook use, bits per token
    #[command(after_help = EVALUATE)]
    Evaluate(EvaluateArgs),
    /// Time this machine, the kernels, and the models of bundles and recipes
    #[command(after_help = BENCH)]
    Bench(BenchArgs),
    /// Turn official weights into a bundle; nothing in the file is executed
    #[command(after_help = IMPORT)]
    Import(ImportArgs),
    /// Write a part of a bundle with the names of the official code
    #[command(after_help = EXPORT)]
    Export(ExportArgs),
    /// Put a model together with a next stage or a judge, as one bundle
    #[command(after_help = ASSEMBLE)]
    Assemble(AssembleArgs),
    /// Compare golden cases of official implementations, tensor by tensor, with what this program computes
    #[command(after_help = PARITY)]
    Parity(ParityArgs),
    /// Show what is in a bundle, a run folder, a weights or recipe file, token shards, images or a picture
    #[command(after_help = INSPECT)]
    Inspect(InspectArgs),
    /// List the systems that exist, with their papers
    #[command(after_help = "Examples:\n  smalti systems\n  smalti systems --json")]
    Systems,
    /// Print a completion script for a shell
    #[command(
        after_help = "Examples:\n  smalti completions bash > ~/.local/share/bash-completion/completions/smalti\n  \
                            smalti completions zsh > ~/.zfunc/_smalti"
    )]
    Completions {
        /// The shell
        shell: Shell,
    },
}
