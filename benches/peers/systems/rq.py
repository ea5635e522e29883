"""RQ-Transformer over the codes of an RQ-VAE (arXiv 2203.01941): a transformer over places and a small one over the codes of each."""

import torch
import torch.nn.functional as F
from torch import nn

import files
import transformer
import vqgan


class Stack(nn.Module):
    def __init__(self, width, depth, heads):
        super().__init__()
        self.heads = heads
        self.blocks = nn.ModuleList(transformer.Block(width, heads, 1e-5, after=False, gelu="none") for _ in range(depth))

    def caches(self, b, n, like):
        shape = (b, self.heads, n, like.shape[-1] // self.heads)
        return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.blocks]

    def forward(self, x, caches=None, at=0):
        for i, block in enumerate(self.blocks):
            x = block(x, cache=caches[i], at=at) if caches else block(x, causal=True)
        return x


class Rq(nn.Module):
    def __init__(self, c):
        super().__init__()
        width, channels, layout = c["width"], c["codebook"]["channels"], c["tokens"]["layout"]
        self.places, self.depth, self.vocabulary = layout["h"] * layout["w"], layout["depth"], c["tokens"]["vocabulary"]
        self.cond_emb = nn.Embedding(c["condition"]["classes"], width)
        self.pos_emb_cond = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_emb_hw = nn.Parameter(torch.zeros(1, self.places, width))
        self.pos_emb_d = nn.Parameter(torch.zeros(1, self.depth, width))
        self.input_mlp, self.head_mlp = (nn.Linear(channels, width) for _ in range(2))
        self.body_transformer = Stack(width, c["depth"], c["heads"])
        self.head_transformer = Stack(width, c["head_depth"], c["heads"])
        self.classifier = nn.Module()
        self.classifier.layer_norm = nn.LayerNorm(width)
        self.classifier.linear = nn.Linear(width, self.vocabulary)

    def logits(self, x):
        return self.classifier.linear(self.classifier.layer_norm(x))

    def forward(self, classes, codes, table):
        """Logits `[b, places, depth, codes]` of all codes `[b, places, depth]`."""
        b = len(codes)
        vectors = F.embedding(codes, table)
        seen = self.input_mlp(vectors).sum(2) + self.pos_emb_hw
        start = self.cond_emb(classes)[:, None] + self.pos_emb_cond
        context = self.body_transformer(torch.cat([start, seen[:, :-1]], 1)).flatten(0, 1)[:, None]
        sums = vectors.cumsum(2)[:, :, :-1].flatten(0, 1)
        head = self.head_transformer(torch.cat([context, self.head_mlp(sums)], 1) + self.pos_emb_d)
        return self.logits(head).unflatten(0, (b, self.places))

    def look(self, x, caches, at):
        """What the body says of a place, given its input `[b, 1, d]`."""
        return self.body_transformer(x, caches, at)

    def step(self, x, caches, at):
        """Logits of the code at one depth, given the head's input `[b, 1, d]`."""
        return self.logits(self.head_transformer(x + self.pos_emb_d[:, at : at + 1], caches, at)[:, 0])


def stored(model):
    """The weights under the official names."""
    tensors = transformer.stored(model)
    return {name.replace(".fc.", ".mlp.0.").replace(".out.", ".mlp.2."): value for name, value in tensors.items()}


def restore(model, tensors):
    transformer.restore(model, {name.replace(".mlp.0.", ".fc.").replace(".mlp.2.", ".out."): v for name, v in tensors.items()})


class Codebook(nn.Module):
    """One table for all depths; its last row is padding and no code."""

    def __init__(self, codes, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(codes + 1, channels))
        self.register_buffer("cluster_size_ema", torch.zeros(codes))
        self.register_buffer("embed_ema", self.weight.detach()[:-1].clone())


class Tokenizer(nn.Module):
    """RQ-VAE's autoencoder; only its decoder is used here."""

    def __init__(self, c):
        super().__init__()
        quantizer = c["quantizer"]
        self.encoder, self.decoder = vqgan.Encoder(c), vqgan.Decoder(c)
        self.quantizer = nn.Module()
        self.quantizer.codebooks = nn.ModuleList([Codebook(quantizer["codes"], quantizer["channels"])])
        self.quant_conv = nn.Conv2d(c["z_channels"], c["embed_dim"], 1)
        self.post_quant_conv = nn.Conv2d(c["embed_dim"], c["z_channels"], 1)

    def table(self):
        return self.quantizer.codebooks[0].weight[:-1]

    def pixels(self, latents):
        return self.decoder(self.post_quant_conv(latents))


class Task:
    @staticmethod
    def prepare(row, folder):
        model = transformer.initialise(Rq(row["model"]))
        files.save(folder, "weights", stored(model))
        files.save(folder, "tokenizer", Tokenizer(row["tokenizer"]).state_dict())
        b = row["batch"]
        classes = torch.randint(0, row["model"]["condition"]["classes"], (b,))
        codes = torch.randint(0, model.vocabulary, (b, model.places * model.depth))
        files.save(folder, "inputs", {"classes": classes, "codes": codes})

    def __init__(self, row, folder, variant):
        self.model = Rq(row["model"])
        restore(self.model, files.load(folder, "weights"))
        self.tokenizer = Tokenizer(row["tokenizer"])
        self.tokenizer.load_state_dict(files.load(folder, "tokenizer"))
        self.tokenizer.requires_grad_(False)
        inputs = files.load(folder, "inputs")
        self.classes, self.codes = inputs["classes"], inputs["codes"]
        self.open(row, variant)


class Image(Task):
    """All codes of a picture, always the most likely, and the picture."""

    def open(self, row, variant):
        self.model.eval()
        self.grid = row["model"]["tokens"]["layout"]
        self.format = torch.channels_last if "channels_last" in variant else torch.contiguous_format
        self.tokenizer.eval().to(memory_format=self.format)
        self.look = files.compiled(self.model.look, variant)
        self.step = files.compiled(self.model.step, variant)
        self.pixels = files.compiled(self.tokenizer.pixels, variant)

    @torch.inference_mode()
    def run(self):
        model, table, b = self.model, self.tokenizer.table(), len(self.classes)
        body = model.body_transformer.caches(b, model.places, model.pos_emb_hw)
        head = model.head_transformer.caches(b, model.depth, model.pos_emb_hw)
        x = model.cond_emb(self.classes)[:, None] + model.pos_emb_cond
        codes, latents = [], []
        for place in range(model.places):
            y = self.look(x, body, place)
            total = seen = 0
            for depth in range(model.depth):
                # The head's cache is written anew for each place.
                codes.append(self.step(y, head, depth).argmax(-1))
                vectors = F.embedding(codes[-1], table)[:, None]
                total, seen = total + vectors, seen + model.input_mlp(vectors)
                if depth + 1 < model.depth:
                    y = model.head_mlp(total)
            latents.append(total)
            x = seen + model.pos_emb_hw[:, place : place + 1]
        grid = torch.cat(latents, 1).transpose(1, 2).unflatten(2, (self.grid["h"], self.grid["w"]))
        return torch.stack(codes, 1), self.pixels(grid.contiguous(memory_format=self.format))

    @torch.inference_mode()
    def check(self):
        codes, images = self.run()
        table = self.tokenizer.table()
        places = self.codes[:1].unflatten(1, (self.model.places, self.model.depth))
        return {"logits": self.model(self.classes[:1], places, table), "codes": codes, "images": images}


class Train(Task):
    def open(self, row, variant):
        work, table = files.compiled(self.model, variant), self.tokenizer.table()
        places = self.codes.unflatten(1, (self.model.places, self.model.depth))
        loss = lambda: F.cross_entropy(work(self.classes, places, table).flatten(0, 2), self.codes.flatten())
        self.step = transformer.TrainingStep(self.model, loss, row["options"])

    def run(self):
        return self.step.run()

    def check(self):
        return self.step.check(self.model.body_transformer.blocks[0].fc.weight)


TASKS = {"image": Image, "train": Train}
