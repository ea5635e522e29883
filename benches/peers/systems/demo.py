"""Process start to first picture. As a task it starts programs; as a program it makes one picture with the demo model.

    demo.py BUNDLE PROMPT OUT GREEDY
"""

import os
import sys
import time
from pathlib import Path

# The task only starts programs, and must not be slowed by what they import.
LIGHT = True


class Generate:
    """`row["commands"][variant]` is the program's command; `{out}` in it is the picture's path."""

    @staticmethod
    def prepare(row, folder):
        pass

    def __init__(self, row, folder, variant):
        self.command = row["commands"][variant]
        self.out = folder / f"{variant}.png"
        self.peak_kib = 0

    def start(self, greedy):
        command = [part.replace("{out}", str(self.out)) for part in self.command["run"]]
        command += self.command["greedy"] if greedy else []
        quiet = os.open(os.devnull, os.O_WRONLY)
        process = os.posix_spawn(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, quiet, 1)])
        os.close(quiet)
        _, status, usage = os.wait4(process, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} ended with status {status}")
        self.peak_kib = usage.ru_maxrss

    def run(self):
        self.start(greedy=False)

    def check(self):
        self.start(greedy=True)
        import numpy
        import torch
        from PIL import Image

        return {"levels": torch.from_numpy(numpy.array(Image.open(self.out).convert("RGB"))).float()}


TASKS = {"generate": Generate}


def model(folder, torch):
    """The demo bundle in plain modules: its own names are turned into ours."""
    import json

    from safetensors.torch import load_file

    import transformer
    import vqgan

    config = lambda part: json.loads((folder / part / "config.json").read_text())
    weights = lambda part: {k: v.float() for k, v in load_file(folder / part / "model.safetensors").items()}
    autoencoder = vqgan.Vqgan(config("tokenizer"))
    tensors = {k.replace(".gamma", ".weight").replace(".beta", ".bias"): v for k, v in weights("tokenizer").items()}
    autoencoder.load_state_dict({name: tensors[name] for name in autoencoder.state_dict()})

    c, tensors = config("generator"), {}
    for name, value in weights("generator").items():
        if value.dim() == 2 and name.endswith(".weight"):
            value = value.t().contiguous()
        for ours, theirs in NAMES:
            name = name.replace(ours, theirs)
        tensors[name] = value
    blocks = torch.nn.ModuleList(
        transformer.Block(c["width"], c["heads"], 1e-5, after=False, gelu="none") for _ in range(c["depth"])
    )
    parts = torch.nn.Module()
    parts.blocks, parts.ln_f = blocks, torch.nn.LayerNorm(c["width"])
    transformer.restore(parts, tensors)
    return c, autoencoder.eval(), parts, tensors


NAMES = [
    ("attention_norm", "ln1"),
    ("mlp_norm", "ln2"),
    ("norm.", "ln_f."),
    ("attention.output", "attn.proj"),
    ("attention", "attn"),
    ("mlp.expand", "fc"),
    ("mlp.contract", "out"),
    (".gamma", ".weight"),
    (".beta", ".bias"),
]


def generate(folder, prompt, greedy):
    import json

    import torch
    import torch.nn.functional as F
    from tokenizers import Tokenizer

    sampling = json.loads((folder / "bundle.json").read_text())["sampling"]
    c, autoencoder, parts, tensors = model(folder, torch)
    prefix, null = c["condition"]["length"], c["condition"]["vocabulary"]
    ids = Tokenizer.from_file(str(folder / "text" / "tokenizer.json")).encode(prompt).ids[:prefix]
    ids = torch.tensor([ids + [null] * (prefix - len(ids)), [null] * prefix])
    table, places = tensors["tokens.table"], tensors["positions.table"]
    length, heads, width = c["tokens"]["layout"]["h"] * c["tokens"]["layout"]["w"], c["heads"], c["width"]
    caches = [[torch.zeros(2, heads, prefix + length, width // heads) for _ in range(2)] for _ in parts.blocks]
    x, at, tokens = tensors["condition.table"][ids], 0, []
    with torch.inference_mode():
        while True:
            x = x + places[at : at + x.shape[1]]
            for block, cache in zip(parts.blocks, caches):
                x = block(x, cache=cache, at=at)
            at += x.shape[1]
            conditional, without = F.linear(parts.ln_f(x[:, -1]), tensors["head.weight"])
            logits = without + sampling["guidance"] * (conditional - without)
            if greedy:
                tokens.append(logits.argmax())
            else:
                logits = logits / sampling["temperature"]
                least = logits.topk(sampling["top_k"]).values[-1]
                tokens.append(torch.multinomial(logits.masked_fill(logits < least, -torch.inf).softmax(-1), 1)[0])
            if len(tokens) == length:
                return autoencoder.decode(torch.stack(tokens)[None])[0]
            x = table[tokens[-1]].expand(2, 1, -1)


def program(folder, prompt, out, greedy):
    from PIL import Image

    pixels = generate(Path(folder), prompt, greedy)
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    Image.fromarray(levels.numpy()).save(out)


if __name__ == "__main__":
    program(*sys.argv[1:4], greedy="greedy" in sys.argv[4:])
