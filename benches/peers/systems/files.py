"""What the systems share: tensors that both sides read, and compiling."""

import torch
from safetensors.torch import load_file, save_file


def save(folder, name, tensors):
    save_file({key: value.detach().contiguous().clone() for key, value in tensors.items()}, folder / f"{name}.safetensors")


def load(folder, name):
    return load_file(folder / f"{name}.safetensors")


def compiled(function, variant):
    """`function`, compiled if the variant says so; with `freezing` weights are constants, and stored as kernels like them."""
    if "compile" not in variant:
        return function
    if "freezing" in variant:
        from torch._inductor import config

        config.freezing = True
    return torch.compile(function)
