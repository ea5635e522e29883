//! Devices by name.

use crate::{Error, Result};
use burn::tensor::{Device, FloatDType, IntDType};

/// The names that this build knows, best first.
pub fn known() -> Vec<&'static str> {
    let mut names = Vec::new();
    if cfg!(feature = "cuda") {
        names.push("cuda");
    }
    if cfg!(feature = "rocm") {
        names.push("rocm");
    }
    if cfg!(feature = "metal") {
        names.push("metal");
    }
    if cfg!(feature = "vulkan") {
        names.push("vulkan");
    }
    if cfg!(feature = "wgpu") {
        names.push("wgpu");
    }
    names.push("cpu");
    names
}

/// The best device of this build that this machine has.
pub fn best() -> &'static str {
    known().into_iter().find(|kind| !present(kind).is_empty()).unwrap_or("cpu")
}

/// The devices of a kind of [`known`] on this machine, by number.
fn present(kind: &str) -> Vec<Device> {
    match kind {
        "cpu" => vec![Device::flex()],
        #[cfg(feature = "cuda")]
        "cuda" => accelerators(burn::tensor::DeviceType::Cuda),
        #[cfg(feature = "rocm")]
        "rocm" => accelerators(burn::tensor::DeviceType::Rocm),
        #[cfg(feature = "vulkan")]
        "vulkan" => accelerators(burn::tensor::DeviceType::Vulkan),
        #[cfg(feature = "metal")]
        "metal" => accelerators(burn::tensor::DeviceType::Metal),
        #[cfg(feature = "wgpu")]
        "wgpu" => accelerators(burn::tensor::DeviceType::Wgpu),
        _ => Vec::new(),
    }
}

/// The accelerators of a type. Their compiled kernels, and with `autotune` the outcome of trials, are kept for the next run, in the
/// user's cache folder (inside a cargo project: in its `target/environment`); a `cubecl.toml` of the user's is respected.
#[cfg(feature = "accelerator")]
fn accelerators(kind: burn::tensor::DeviceType) -> Vec<Device> {
    use burn::cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};
    let mut config = CubeClRuntimeConfig::from_current_dir().override_from_env();
    config.compilation.cache = true;
    // Whoever set it first keeps it: this function, or a program around the library.
    CubeClRuntimeConfig::try_set(config);
    Device::enumerate(kind).into_vec()
}

/// The device called `name`: `cpu`, or `cuda`, `cuda:1`, `rocm`, `vulkan`, `metal`, `wgpu` in a build with that feature.
///
/// # Errors
/// [`Error::Unknown`] with the names of this build, [`Error::Unsupported`] for a kind that this build lacks, [`Error::Invalid`] if
/// the machine has no such device, or the number is not one or too large.
pub fn open(name: &str) -> Result<Device> {
    let (kind, index) = match name.split_once(':') {
        None => (name, 0),
        Some((kind, index)) => match index.parse::<usize>() {
            Ok(index) => (kind, index),
            Err(_) => {
                return Err(Error::invalid(
                    "--device",
                    format!("`{index}` in `{name}` is not a device number; expected, for example, `{kind}:0`"),
                ));
            }
        },
    };
    if !known().contains(&kind) {
        return Err(match kind {
            "cuda" | "rocm" | "vulkan" | "metal" | "wgpu" => Error::unsupported(
                format!("device `{name}` in this build"),
                format!("build again with `--features {kind}`, or use one of: {}", known().join(", ")),
            ),
            _ => Error::unknown("--device", "device", name, known()),
        });
    }
    let mut devices = present(kind);
    match devices.len() {
        0 => Err(Error::invalid_hint(
            "--device",
            format!("this machine has no `{kind}` device, or no driver for it"),
            format!("install the driver, or use `--device {}`", best()),
        )),
        n if index >= n => Err(Error::invalid(
            "--device",
            format!("there is no `{name}`: devices of kind `{kind}` are numbered from 0 to {}", n - 1),
        )),
        _ => Ok(devices.swap_remove(index)),
    }
}

/// [`open`], with tensors in double precision (`f64`) unless something else is said. Must come before anything is computed there.
///
/// # Errors
/// As [`open`], and [`Error::Unsupported`] for a device that has no such numbers, or has begun with others.
pub fn open_double(name: &str) -> Result<Device> {
    let mut device = open(name)?;
    device.configure((FloatDType::F64, IntDType::I32)).map_err(|reason| {
        Error::unsupported(
            format!("double precision on device `{name}`: {reason}"),
            "leave it out, or use `--device cpu`",
        )
    })?;
    Ok(device)
}

#[cfg(test)]
mod tests {
    #[test]
    fn unknown_devices_are_named() {
        let error = super::open("cup").unwrap_err().to_string();
        assert!(error.contains("did you mean `cpu`?"), "{error}");
        assert!(super::open("cuda:x").unwrap_err().to_string().contains("not a device number"));
        assert!(super::open("cpu").is_ok());
        assert!(super::open("cpu:1").unwrap_err().to_string().contains("from 0 to 0"));
    }
}
