"""MaskGIT's transformer (arXiv 2202.04200) and its parallel decoding."""

import math

import torch
import torch.nn.functional as F
from torch import nn

import files
import transformer

EPSILON = 1e-12
CHOICE_TEMPERATURE = 4.5


class MaskGit(nn.Module):
    """One table for image tokens, classes and the mask, tied to the output; the class comes first."""

    def __init__(self, c):
        super().__init__()
        width = c["width"]
        grid, self.codes = c["tokens"]["layout"], c["tokens"]["vocabulary"]
        self.length = grid["h"] * grid["w"]
        self.rows = self.codes + c["condition"]["classes"] + 1
        self.tok_emb = nn.Embedding(self.rows, width)
        self.pos_emb = nn.Parameter(torch.zeros(1, 1 + self.length, width))
        self.emb_norm = nn.LayerNorm(width, eps=EPSILON)
        self.blocks = nn.ModuleList(
            transformer.Block(width, c["heads"], EPSILON, after=True, gelu="tanh") for _ in range(c["depth"])
        )
        self.head = nn.Linear(width, width)
        self.head_norm = nn.LayerNorm(width, eps=EPSILON)
        self.head_bias = nn.Parameter(torch.zeros(self.rows))

    def forward(self, classes, ids, rows):
        """Logits of the first `rows` rows of the table at the image's places."""
        x = self.tok_emb(torch.cat([classes[:, None] + self.codes, ids], 1)) + self.pos_emb
        x = self.emb_norm(x)
        for block in self.blocks:
            x = block(x)
        x = self.head_norm(F.gelu(self.head(x[:, 1:]), approximate="tanh"))
        return F.linear(x, self.tok_emb.weight[:rows], self.head_bias[:rows])


class Task:
    @staticmethod
    def prepare(row, folder):
        model = transformer.initialise(MaskGit(row["model"]))
        files.save(folder, "weights", transformer.stored(model))
        b = row["batch"]
        classes = torch.randint(0, row["model"]["condition"]["classes"], (b,))
        codes = torch.randint(0, model.codes, (b, model.length))
        counts = [math.ceil(math.cos(math.pi / 2 * (i + 0.5) / b) * model.length) for i in range(b)]
        masked = torch.stack([torch.randperm(model.length) < count for count in counts])
        files.save(folder, "inputs", {"classes": classes, "codes": codes, "masked": masked})

    def __init__(self, row, folder, variant):
        self.model = MaskGit(row["model"])
        transformer.restore(self.model, files.load(folder, "weights"))
        inputs = files.load(folder, "inputs")
        self.classes, self.codes, self.masked = inputs["classes"], inputs["codes"], inputs["masked"]
        self.open(row, files.compiled(self.model, variant))


class Decode(Task):
    def open(self, row, work):
        self.model.eval()
        self.work, self.steps = work, row["options"]["steps"]

    def logits(self, ids):
        return self.work(self.classes, ids, self.model.codes)

    def start(self):
        return torch.full((len(self.classes), self.model.length), self.model.rows - 1)

    @torch.inference_mode()
    def run(self):
        ids, length = self.start(), self.model.length
        unknown = torch.ones_like(ids, dtype=torch.bool)
        for step in range(self.steps):
            logits = self.logits(ids)
            drawn = (logits + gumbel(logits.shape)).argmax(-1)
            guess = torch.where(unknown, drawn, ids)
            progress = (step + 1) / self.steps
            chosen = logits.log_softmax(-1).gather(-1, guess[..., None])[..., 0]
            confidence = chosen + CHOICE_TEMPERATURE * (1 - progress) * gumbel(chosen.shape)
            confidence = confidence.masked_fill(~unknown, math.inf)
            left = max(1, min(math.floor(length * math.cos(math.pi / 2 * progress)), int(unknown.sum(1).min()) - 1))
            cut = confidence.sort(1).values[:, left : left + 1]
            unknown = confidence < cut
            ids = guess.masked_fill(unknown, self.model.rows - 1)
        return guess

    @torch.inference_mode()
    def check(self):
        return {"logits": self.logits(self.start())}


def gumbel(shape):
    return -torch.log(-torch.log(torch.rand(shape).clamp_min(1e-20)))


class Train(Task):
    def open(self, row, work):
        options = row["options"]
        ids = self.codes.masked_fill(self.masked, self.model.rows - 1)
        # Each image counts the same, whatever the number of its masked tokens.
        weights = self.masked / self.masked.sum(1, keepdim=True) / len(self.codes)

        def loss():
            logits = work(self.classes, ids, self.model.rows).flatten(0, 1)
            smoothing = options["label_smoothing"]
            each = F.cross_entropy(logits, self.codes.flatten(), reduction="none", label_smoothing=smoothing)
            return (each * weights.flatten()).sum()

        self.step = transformer.TrainingStep(self.model, loss, options)

    def run(self):
        return self.step.run()

    def check(self):
        return self.step.check(self.model.blocks[0].fc.weight)


TASKS = {"decode": Decode, "train": Train}
