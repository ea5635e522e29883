//! Every golden case at hand: those of this repository, and a larger collection beside it where there is one.

use burn::tensor::Device;
use smalti::golden::{CaseReport, Status, run};
use std::path::{Path, PathBuf};

fn cases(root: &Path) -> Vec<PathBuf> {
    let folders = |path: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
        entries.filter(|path| path.is_dir()).collect()
    };
    let mut cases: Vec<PathBuf> = folders(root).iter().flat_map(|system| folders(system)).collect();
    cases.retain(|case| case.join("case.json").exists() && case.join("io.safetensors").exists());
    cases.sort();
    cases
}

fn all(root: &Path) -> Vec<CaseReport> {
    let device = Device::flex();
    let reports = cases(root).into_iter().filter_map(|case| match run(&case, &device) {
        Ok(report) => Some(report),
        // A case of another kind, such as one for metrics, need not say what a model's case says.
        Err(error) if error.to_string().contains("missing field") => None,
        Err(error) => panic!("{}: {error}", case.display()),
    });
    let reports: Vec<CaseReport> = reports.collect();
    let mut failed = Vec::new();
    for report in &reports {
        for row in report.rows.iter().filter(|row| !row.within) {
            eprintln!("{}: {} is off by {:e}, {:e} of its value", report.case, row.tensor, row.max_abs, row.max_rel);
        }
        if report.status == Status::Failed {
            failed.push(&report.case);
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
    reports
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[test]
fn cases_of_this_repository() {
    let reports = all(&root().join("golden"));
    let passed: Vec<&str> =
        reports.iter().filter(|report| report.status == Status::Passed).map(|report| report.case.as_str()).collect();
    for case in [
        "autoencoder-kl/diffusers_kl",
        "autoencoder-kl/ldm_kl_f4",
        "autoencoder-kl/mar_kl",
        "fid/psnr-ssim",
        "fsq/official_8_5_5",
        "fsq/vqp_8_5_5_5",
        "fsq/vqp_proj_image",
        "fsq/vqp_symmetric",
        "lpips/vgg-tiny",
        "mar/ar-causal",
        "mar/diffusion-utils",
        "mar/diffusion-utils-linear",
        "mar/tiny",
        "maskgit/schedules",
        "maskgit/transformer",
        "quantizers/argmin-ties",
        "quantizers/usage-metrics",
        "var/quantizer-10scale-256",
        "var/quantizer-10scale-512",
        "var/quantizer-allshared",
        "var/quantizer-znorm-nonshared",
        "var/resampling",
        "var/sampling-and-schedules",
        "var/transformer-l2norm",
        "var/transformer-shared-aln",
        "var/vqvae-4scale",
        "vit-vqgan/vitvq-tiny",
        "vq-vae/vqp_dead_code",
        "vq-vae/vqp_kmeans",
        "vq-vae/vqp_rotation",
        "vit-vqgan/gumbel-quantizer",
        "vqgan/depth-tiny",
        "vqgan/quantizers",
        "vqgan/vqmodel-tiny",
    ] {
        assert!(passed.contains(&case), "{case} is not among the cases that passed: {passed:?}");
    }
}

#[test]
fn cases_beside_this_repository() {
    let reports = all(&root().join("../shared/golden"));
    let count = |status| reports.iter().filter(|report| report.status == status).count();
    for report in reports.iter().filter(|report| report.status == Status::Passed && !report.not_compared.is_empty()) {
        eprintln!("{}: not compared: {}", report.case, report.not_compared.join(", "));
    }
    eprintln!("{} passed, {} not implemented", count(Status::Passed), count(Status::NotImplemented));
}
