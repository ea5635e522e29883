"""GPT over image tokens: minGPT's network with a table of its own for the class."""

import torch
import torch.nn.functional as F
from torch import nn

import files
import transformer


class Gpt(nn.Module):
    def __init__(self, c):
        super().__init__()
        width = c["width"]
        grid, self.vocabulary = c["tokens"]["layout"], c["tokens"]["vocabulary"]
        self.length, self.heads = grid["h"] * grid["w"], c["heads"]
        self.cond_emb = nn.Embedding(c["condition"]["classes"] + 1, width)
        self.tok_emb = nn.Embedding(self.vocabulary, width)
        self.pos_emb = nn.Parameter(torch.zeros(1, self.length, width))
        self.blocks = nn.ModuleList(
            transformer.Block(width, c["heads"], 1e-5, after=False, gelu="none") for _ in range(c["depth"])
        )
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.vocabulary, bias=False)

    def forward(self, classes, codes):
        x = torch.cat([self.cond_emb(classes)[:, None], self.tok_emb(codes[:, :-1])], 1) + self.pos_emb
        for block in self.blocks:
            x = block(x, causal=True)
        return self.head(self.ln_f(x))

    def caches(self, b):
        first = self.tok_emb.weight
        shape = (b, self.heads, self.length, first.shape[1] // self.heads)
        return [(first.new_zeros(shape), first.new_zeros(shape)) for _ in self.blocks]

    def step(self, x, caches, at):
        """Logits after one more embedded token `[b, 1, d]`, over the part of the cache that is filled."""
        x = x + self.pos_emb[:, at : at + 1]
        for block, cache in zip(self.blocks, caches):
            x = block(x, cache=cache, at=at)
        return self.head(self.ln_f(x[:, 0]))

    def masked_step(self, x, caches, at, mask):
        """The same over the whole cache, with one shape for all places: what a compiler likes."""
        x = x + self.pos_emb.index_select(1, at)
        for block, cache in zip(self.blocks, caches):
            x = block(x, cache=cache, at=at, mask=mask)
        return self.head(self.ln_f(x[:, 0]))


class Task:
    @staticmethod
    def prepare(row, folder):
        model = transformer.initialise(Gpt(row["model"]))
        files.save(folder, "weights", transformer.stored(model))
        b = row["batch"]
        classes = torch.randint(0, row["model"]["condition"]["classes"], (b,))
        codes = torch.randint(0, model.vocabulary, (b, model.length))
        files.save(folder, "inputs", {"classes": classes, "codes": codes})

    def __init__(self, row, folder, variant):
        self.model = Gpt(row["model"])
        transformer.restore(self.model, files.load(folder, "weights"))
        if "bf16" in variant:
            self.model.bfloat16()
        inputs = files.load(folder, "inputs")
        self.classes, self.codes = inputs["classes"], inputs["codes"]
        self.open(row, variant)


class Decode(Task):
    def open(self, row, variant):
        self.model.eval()
        self.advance = files.compiled(self.model.masked_step, variant) if "compile" in variant else None

    @torch.inference_mode()
    def run(self):
        model = self.model
        caches = model.caches(len(self.classes))
        x = model.cond_emb(self.classes)[:, None]
        places = torch.arange(model.length)
        tokens = []
        for at in range(model.length):
            if self.advance:
                logits = self.advance(x, caches, places[at : at + 1], (places <= at)[None, None, None])
            else:
                logits = model.step(x, caches, at)
            tokens.append(logits.argmax(-1))
            x = model.tok_emb(tokens[-1])[:, None]
        return torch.stack(tokens, 1)

    @torch.inference_mode()
    def check(self):
        return {"logits": self.model(self.classes[:1], self.codes[:1]).float(), "tokens": self.run()}


class Forward(Task):
    def open(self, row, variant):
        self.model.eval()
        self.work = files.compiled(self.model, variant)

    @torch.inference_mode()
    def run(self):
        return self.work(self.classes, self.codes)

    def check(self):
        return {"logits": self.run()}


class Train(Task):
    def open(self, row, variant):
        work = files.compiled(self.model, variant)
        loss = lambda: F.cross_entropy(work(self.classes, self.codes).flatten(0, 1), self.codes.flatten())
        self.step = transformer.TrainingStep(self.model, loss, row["options"])

    def run(self):
        return self.step.run()

    def check(self):
        return self.step.check(self.model.blocks[0].fc.weight)


TASKS = {"decode": Decode, "forward": Forward, "train": Train}
