"""Single operations: the machine's peak, and the nearest code."""

import torch

import files

SIDE = 1024
COPIED = 1 << 26


class Gemm:
    @staticmethod
    def prepare(row, folder):
        files.save(folder, "inputs", {"a": torch.randn(SIDE, SIDE), "b": torch.randn(SIDE, SIDE)})

    def __init__(self, row, folder, variant):
        self.inputs = files.load(folder, "inputs")

    @torch.inference_mode()
    def run(self):
        return self.inputs["a"] @ self.inputs["b"]

    def check(self):
        return {"product": self.run()}


class Copy:
    @staticmethod
    def prepare(row, folder):
        pass

    def __init__(self, row, folder, variant):
        self.source = torch.arange(COPIED, dtype=torch.float32)
        self.target = torch.zeros(COPIED)

    def run(self):
        self.target.copy_(self.source)

    def check(self):
        self.run()
        return {"copied": self.target[:1024]}


class NearestCode:
    @staticmethod
    def prepare(row, folder):
        o = row["options"]
        latents, table = torch.randn(o["latents"], o["channels"]), torch.randn(o["codes"], o["channels"])
        files.save(folder, "inputs", {"latents": latents, "codebook": table})

    def __init__(self, row, folder, variant):
        inputs = files.load(folder, "inputs")
        self.latents, self.table = inputs["latents"], inputs["codebook"]
        self.work = files.compiled(self.by_cdist if variant == "cdist" else self.by_addmm, variant)

    def by_cdist(self):
        return torch.cdist(self.latents, self.table).argmin(1)

    def by_addmm(self):
        squares = self.table.square().sum(1)
        return torch.addmm(squares, self.latents, self.table.t(), alpha=-2.0).argmin(1)

    @torch.inference_mode()
    def run(self):
        return self.work()

    def check(self):
        return {"indices": self.run()}


TASKS = {"gemm": Gemm, "copy": Copy, "nearest_code": NearestCode}
