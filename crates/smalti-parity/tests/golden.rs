//! Every golden case at hand: those of this repository, and a larger collection beside it where there is one.

use burn::tensor::Device;
use smalti_parity::{CaseReport, Status, run};
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

/// A larger collection may have cases with settings that are not supported, if the report says so.
fn all(root: &Path, all_supported: bool) -> Vec<CaseReport> {
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
        eprintln!("{}: {:?}, {} tensors compared", report.case, report.status, report.rows.len());
        for row in report.rows.iter().filter(|row| !row.within) {
            eprintln!("{}: {} is off by {:e}, {:e} of its value", report.case, row.tensor, row.max_abs, row.max_rel);
        }
        if let (Status::Failed, Some(error)) = (report.status, &report.error) {
            eprintln!("{}: {error}", report.case);
        }
        let only_unsupported = !all_supported && report.error.is_some() && report.rows.iter().all(|row| row.within);
        if report.status == Status::Failed && !only_unsupported {
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
    let reports = all(&root().join("golden"), true);
    let not_passed: Vec<&CaseReport> = reports.iter().filter(|report| report.status != Status::Passed).collect();
    assert!(reports.len() > 40 && not_passed.is_empty(), "{} cases; not passed: {not_passed:?}", reports.len());
    // Counters of averages, forms of a measure that are not offered, and what follows from a tensor that is compared.
    let left_out = [
        "psnr_of_mean_mse",
        "ssim_uniform",
        "distance_normalize_flag",
        "distance_v00",
        "spatial_map",
        "edit.latent_mask",
        "distances",
        "eval.codes_from_indices",
    ];
    for report in reports.iter().filter(|report| report.status == Status::Passed) {
        let counter = |name: &str| name.ends_with("/average") || name.ends_with("/counter");
        let left_out = |name: &str| left_out.iter().any(|start| name.starts_with(start)) || counter(name);
        let missed: Vec<_> = report.not_compared.iter().filter(|name| !left_out(name)).collect();
        assert!(missed.is_empty(), "{}: {missed:?} were not compared", report.case);
    }
}

#[test]
fn cases_beside_this_repository() {
    let reports = all(&root().join("../shared/golden"), false);
    let count = |status| reports.iter().filter(|report| report.status == status).count();
    for report in reports.iter().filter(|report| report.status == Status::Passed && !report.not_compared.is_empty()) {
        eprintln!("{}: not compared: {}", report.case, report.not_compared.join(", "));
    }
    eprintln!("{} passed, {} not implemented", count(Status::Passed), count(Status::NotImplemented));
}
