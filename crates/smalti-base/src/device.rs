//! Devices by name.

use crate::{Error, Result};
use burn::tensor::Device;

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

/// The device called `name`: `cpu`, or `cuda`, `cuda:1`, `rocm`, `vulkan`, `metal`, `wgpu` in a build with that feature.
///
/// # Errors
/// [`Error::Unknown`] with the names of this build, [`Error::Invalid`] if the number is none.
pub fn open(name: &str) -> Result<Device> {
    let (kind, index) = match name.split_once(':') {
        None => (name, 0),
        Some((kind, index)) => match index.parse::<usize>() {
            Ok(index) => (kind, index),
            Err(_) => {
                return Err(Error::invalid(
                    "--device",
                    format!("`{index}` in `{name}` is not a device number; expected for example `{kind}:0`"),
                ));
            }
        },
    };
    // `index` is unused in a build without accelerators.
    let _ = index;
    match kind {
        "cpu" => Ok(Device::flex()),
        #[cfg(feature = "cuda")]
        "cuda" => Ok(Device::cuda(index)),
        #[cfg(feature = "rocm")]
        "rocm" => Ok(Device::rocm(index)),
        #[cfg(feature = "vulkan")]
        "vulkan" => Ok(Device::vulkan(burn::tensor::DeviceKind::DiscreteGpu(index))),
        #[cfg(feature = "metal")]
        "metal" => Ok(Device::metal(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(feature = "wgpu")]
        "wgpu" => Ok(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)),
        "cuda" | "rocm" | "vulkan" | "metal" | "wgpu" => Err(Error::unsupported(
            format!("device `{name}` in this build"),
            format!("build again with `--features {kind}`, or use one of: {}", known().join(", ")),
        )),
        _ => Err(Error::unknown("--device", "device", name, known())),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn unknown_devices_are_named() {
        let error = super::open("cup").unwrap_err().to_string();
        assert!(error.contains("did you mean `cpu`?"), "{error}");
        assert!(super::open("cuda:x").unwrap_err().to_string().contains("not a device number"));
        assert!(super::open("cpu").is_ok());
    }
}
