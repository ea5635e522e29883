//! Finite scalar quantization: the authors' notebook and vector-quantize-pytorch.

use super::case::{Case, gradient};
use super::comparison::Comparison;
use super::gradients::Official;
use burn::optim::GradientsParams;
use burn::tensor::{Int, Tensor};
use serde_json::Value;
use smalti_base::Result;
use smalti_models::checkpoint::Rules;
use smalti_models::quantizers::fsq::FsqDialect;
use smalti_models::quantizers::{Fsq, FsqConfig};

pub(super) fn knows_official(case: &Case) -> bool {
    case.has(&["z", "bounded", "quantized", "codebook"])
}

pub(super) fn official(case: &Case, compare: &mut Comparison) -> Result<()> {
    case.only("eps", 1e-3)?;
    let levels: Vec<usize> = case.setting("levels")?;
    let d = levels.len();
    let fsq = FsqConfig::new(levels, d).init(&case.autodiff())?;
    let rows = |tensor: Tensor<4>| tensor.flatten::<2>(0, 2).reshape([-1, d as i32]);
    let z = rows(case.tensor("z")?).autodiff().require_grad();
    compare.floats("bounded", fsq.bound(z.clone()))?;
    let quantized = fsq.quantize(z.clone());
    compare.floats("quantized", quantized.clone())?;
    let codes = fsq.ids(quantized.clone());
    compare.ids("indices", codes.clone())?;
    compare.floats("codes_from_indices", fsq.numbers(codes))?;
    let gradients = (quantized * rows(case.tensor("coef")?)).sum().backward();
    compare.floats("grad_z", gradient("z", z.grad(&gradients))?)?;
    let all = fsq.config.levels.iter().product::<usize>() as i64;
    compare.floats("codebook", fsq.numbers(Tensor::arange(0..all, case.device())))
}

pub(super) fn knows_library(case: &Case) -> bool {
    case.has(&["x", "level_indices", "random_indices", "grad_x"]) && case.has_settings(&["levels"])
}

/// Rows `[n, c]` of `[b, n, c]`, or of an image `[b, c, h, w]`, and the way back to the case's order.
fn rows(case: &Case, name: &str) -> Result<Tensor<2>> {
    Ok(match case.shape(name)?.len() {
        4 => {
            let [b, c, h, w] = case.tensor::<4>(name)?.dims();
            case.tensor::<4>(name)?.permute([0, 2, 3, 1]).reshape([b * h * w, c])
        }
        _ => {
            let [b, n, c] = case.tensor::<3>(name)?.dims();
            case.tensor::<3>(name)?.reshape([b * n, c])
        }
    })
}

fn compare_rows(case: &Case, compare: &mut Comparison, name: &str, rows_nc: Tensor<2>) -> Result<()> {
    match case.shape(name)?[..] {
        [b, c, h, w] => compare.floats(name, rows_nc.reshape([b, h, w, c]).permute([0, 3, 1, 2])),
        _ => compare.floats(name, rows_nc),
    }
}

pub(super) fn library(case: &Case, compare: &mut Comparison) -> Result<()> {
    case.ignore(&[
        "input_shape",
        "keep_num_codebooks_dim",
        "return_indices",
        "allowed_dtypes",
        "force_quantization_f32",
    ]);
    // Noise is of training alone, and cases have none.
    for (key, off) in
        [("noise_dropout", Value::from(0.0)), ("channel_first", false.into()), ("bound_hard_clamp", false.into())]
    {
        case.only(key, off)?;
    }
    case.only("projection_has_bias", true)?;
    let levels: Vec<usize> = case.setting("levels")?;
    let (d, groups) = (levels.len(), case.setting_or("num_codebooks", 1usize)?);
    let symmetric = case.setting_or("preserve_symmetry", false)?;
    let dialect = if symmetric { FsqDialect::Symmetric } else { FsqDialect::Vqp };
    let channels = case.setting_or("dim", d * groups)?;
    let mut fsq = FsqConfig { levels, channels, dialect }.init(&case.autodiff())?;
    if channels != d * groups {
        fsq = projected(case, fsq, channels, d * groups)?;
    }
    let project = |linear: &Option<smalti_nn::dense::Dense>, x: Tensor<2>| match linear {
        Some(linear) => linear.forward(x),
        None => x,
    };
    // Several codebooks are several groups of numbers.
    let grouped = |x: Tensor<2>| x.reshape([-1, d as i32]);
    let back = |numbers: Tensor<2>| project(&fsq.project_out, numbers.reshape([-1, (d * groups) as i32]));
    let from_codes = |codes: Tensor<1, Int>| back(fsq.numbers(codes));

    let x = rows(case, "x")?.autodiff().require_grad();
    let numbers = fsq.quantize(grouped(project(&fsq.project_in, x.clone())));
    let codes = fsq.ids(numbers.clone().inner());
    let quantized = back(numbers);
    compare_rows(case, compare, "quantized", quantized.clone())?;
    compare.ids("indices", codes.clone())?;
    compare.ids("level_indices", fsq.digits(codes.clone()))?;
    compare_rows(case, compare, "codes_from_indices", from_codes(codes))?;
    let given = case.ints("random_indices")?;
    compare_rows(case, compare, "codes_from_random", from_codes(Tensor::from_data(given, case.device())))?;
    let gradients = (quantized * rows(case, "coef")?).sum().backward();
    compare_rows(case, compare, "grad_x", gradient("x", x.grad(&gradients))?)?;
    let gradients = GradientsParams::from_grads(gradients, &fsq);
    Official::new(case, "fsq", "quantizer")?.compare(case, compare, &fsq, &gradients)
}

/// The quantizer with the case's projections, which serve all groups at once.
fn projected(case: &Case, fsq: Fsq, channels: usize, numbers: usize) -> Result<Fsq> {
    use smalti_nn::{dense::Dense, init::Init};
    let dense = |inputs, outputs| Dense::new(inputs, outputs, Init::Zeros, &case.autodiff());
    let fsq = Fsq { project_in: Some(dense(channels, numbers)), project_out: Some(dense(numbers, channels)), ..fsq };
    Ok(Rules::builtin("fsq", "quantizer")?.import(fsq, &case.weights("")?)?.0)
}
