"""VAR (arXiv 2404.02905): a transformer that predicts a whole token map at each step, with the names of its public checkpoints."""

import math

import numpy
import torch
import torch.nn.functional as F
from torch import nn

import files
import transformer
import vqgan

EPSILON = 1e-6


class MultiScale(nn.Module):
    """Token maps of growing size that add up to latents: one table, and convolutions after enlarging that levels share."""

    def __init__(self, levels, codes, channels, refinement):
        super().__init__()
        self.levels, self.weight = [tuple(level) for level in levels], refinement["weight"]
        n = refinement["convolutions"]
        self.embedding = nn.Embedding(codes, channels)
        self.quant_resi = nn.Module()
        self.quant_resi.qresi_ls = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(n))
        # In double precision: rounding decides two ties of ten levels.
        edge = 1 / 3 / n if n == 4 else 1 / 2 / n
        ticks = numpy.linspace(edge, 1 - edge, n)
        self.choice = [int(numpy.argmin(abs(ticks - k / (len(levels) - 1)))) for k in range(len(levels))]

    def contribution(self, codes, level):
        """What a level's codes `[b, n]` add to the latents."""
        maps = self.embedding(codes).transpose(1, 2).unflatten(2, self.levels[level])
        if level + 1 < len(self.levels):
            maps = F.interpolate(maps, size=self.levels[-1], mode="bicubic")
        phi = self.quant_resi.qresi_ls[self.choice[level]]
        return maps.mul(1 - self.weight).add_(phi(maps), alpha=self.weight)

    def seen(self, latents, level):
        """Latents at a level's size, as tokens."""
        return F.interpolate(latents, size=self.levels[level], mode="area").flatten(2).transpose(1, 2)

    def known_before(self, codes):
        """What is known before each level but the first, from the codes of all levels."""
        maps = codes.split([h * w for h, w in self.levels], 1)
        latents, rows = 0, []
        for level in range(len(self.levels) - 1):
            latents = latents + self.contribution(maps[level], level)
            rows.append(self.seen(latents, level + 1))
        return torch.cat(rows, 1)


class Attention(nn.Module):
    """Queries and keys of unit length, with a factor for each head."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.scale_mul_1H11 = nn.Parameter(torch.zeros(1, heads, 1, 1))
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x, cache=None, at=0, mask=None):
        b, n, d = x.shape
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x, self.mat_qkv.weight, bias).view(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(math.log(100)).exp()
        k = F.normalize(k, dim=-1)
        if cache is not None:
            keys, values = cache
            keys[:, :, at : at + n], values[:, :, at : at + n] = k, v
            k, v = keys[:, :, : at + n], values[:, :, : at + n]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return self.proj(mixed.transpose(1, 2).reshape(b, n, d))


def modulated(x, scale, shift):
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPSILON), scale + 1)


def condition_layer(width, parts):
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ffn = nn.Module()
        self.ffn.fc1, self.ffn.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.ada_lin = condition_layer(width, 6)

    def modulation(self, vector):
        """Two gains, two scales and two shifts, `[b, 1, d]` each."""
        return self.ada_lin(vector)[:, None].chunk(6, -1)

    def forward(self, x, parts, **attention):
        gain1, gain2, scale1, scale2, shift1, shift2 = parts
        x = torch.addcmul(x, self.attn(modulated(x, scale1, shift1), **attention), gain1)
        h = self.ffn.fc2(F.gelu(self.ffn.fc1(modulated(x, scale2, shift2)), approximate="tanh"))
        return torch.addcmul(x, h, gain2)


class Var(nn.Module):
    def __init__(self, c):
        super().__init__()
        width, heads = c["width"], c["heads"]
        self.levels = [tuple(level) for level in c["tokens"]["layout"]["levels"]]
        self.sizes = [h * w for h, w in self.levels]
        self.length, self.vocabulary, self.heads = sum(self.sizes), c["tokens"]["vocabulary"], heads
        self.null = c["condition"]["classes"]
        self.class_emb = nn.Embedding(self.null + 1, width)
        self.pos_start = nn.Parameter(torch.zeros(1, self.sizes[0], width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, self.length, width))
        self.lvl_embed = nn.Embedding(len(self.levels), width)
        self.word_embed = nn.Linear(c["channels"], width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(c["depth"]))
        self.head_nm = nn.Module()
        self.head_nm.ada_lin = condition_layer(width, 2)
        self.head = nn.Linear(width, self.vocabulary)
        level = torch.cat([torch.full((n,), i) for i, n in enumerate(self.sizes)])
        self.register_buffer("lvl_1L", level[None])
        hidden = level[:, None] < level[None, :]
        mask = torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)
        self.register_buffer("attn_bias_for_masking", mask[None, None])

    def modulations(self, classes):
        """The condition's vector, and what it does to all layers."""
        vector = self.class_emb(classes)
        head = self.head_nm.ada_lin(vector)[:, None].chunk(2, -1)
        return vector, [block.modulation(vector) for block in self.blocks], head

    def places(self):
        return self.lvl_embed(self.lvl_1L) + self.pos_1LC

    def first(self, vector):
        return vector[:, None] + self.pos_start

    def forward(self, classes, known):
        """Logits of all places, given the condition and what is known before each level."""
        vector, parts, head = self.modulations(classes)
        x = torch.cat([self.first(vector), self.word_embed(known)], 1) + self.places()
        for block, part in zip(self.blocks, parts):
            x = block(x, part, mask=self.attn_bias_for_masking)
        return self.head(modulated(x, *head))

    def caches(self, b):
        first = self.class_emb.weight
        shape = (b, self.heads, self.length, first.shape[1] // self.heads)
        return [(first.new_zeros(shape), first.new_zeros(shape)) for _ in self.blocks]

    def step(self, x, parts, head, caches, at):
        """Logits of one more level."""
        for block, part, cache in zip(self.blocks, parts, caches):
            x = block(x, part, cache=cache, at=at)
        return self.head(modulated(x, *head))


class Tokenizer(nn.Module):
    """VAR's autoencoder; only its decoder is used here."""

    def __init__(self, c):
        super().__init__()
        quantizer, latents, kernel = c["quantizer"], c["embed_dim"], c["quant_kernel"]
        table = quantizer["table"]
        self.encoder, self.decoder = vqgan.Encoder(c), vqgan.Decoder(c)
        self.quantize = MultiScale(quantizer["levels"], table["codes"], table["channels"], quantizer["refinement"])
        self.quant_conv = nn.Conv2d(c["z_channels"], latents, kernel, padding=kernel // 2)
        self.post_quant_conv = nn.Conv2d(latents, c["z_channels"], kernel, padding=kernel // 2)

    def pixels(self, latents):
        return self.decoder(self.post_quant_conv(latents))


def quantizer(c):
    return MultiScale(c["tokens"]["layout"]["levels"], c["tokens"]["vocabulary"], c["channels"], c["refinement"])


class Task:
    @staticmethod
    def prepare(row, folder):
        c, b = row["model"], row["batch"]
        model = transformer.initialise(Var(c))
        with torch.no_grad():
            for block in model.blocks:
                block.attn.scale_mul_1H11.add_(math.log(4))
        files.save(folder, "weights", model.state_dict())
        tokenizer = Tokenizer(row["tokenizer"]) if row["task"] == "image" else None
        table = tokenizer.quantize if tokenizer else quantizer(c)
        files.save(folder, "quantizer", table.state_dict())
        if tokenizer:
            files.save(folder, "tokenizer", tokenizer.state_dict())
        classes = torch.randint(0, model.null, (b,))
        codes = torch.randint(0, model.vocabulary, (b, model.length))
        files.save(folder, "inputs", {"classes": classes, "codes": codes})

    def __init__(self, row, folder, variant):
        self.model = Var(row["model"])
        self.model.load_state_dict(files.load(folder, "weights"))
        inputs = files.load(folder, "inputs")
        self.classes, self.codes = inputs["classes"], inputs["codes"]
        self.open(row, folder, variant)


class Image(Task):
    """Tokens with guidance, always the most likely ones, and their image."""

    def open(self, row, folder, variant):
        self.model.eval()
        self.tokenizer = Tokenizer(row["tokenizer"])
        self.tokenizer.load_state_dict(files.load(folder, "tokenizer"))
        self.tokenizer.eval()
        self.format = torch.channels_last if "channels_last" in variant else torch.contiguous_format
        self.tokenizer.to(memory_format=self.format)
        self.guidance = row["options"]["guidance"] - 1.0
        self.step = files.compiled(self.model.step, variant)
        self.pixels = files.compiled(self.tokenizer.pixels, variant)

    @torch.inference_mode()
    def run(self):
        model, table = self.model, self.tokenizer.quantize
        vector, parts, head = model.modulations(torch.cat([self.classes, torch.full_like(self.classes, model.null)]))
        caches, places = model.caches(len(vector)), model.places()
        latents, codes, at = 0, [], 0
        for level, size in enumerate(model.sizes):
            # Both halves see the same tokens.
            x = model.word_embed(table.seen(latents, level)).repeat(2, 1, 1) if level else model.first(vector)
            logits = self.step(x + places[:, at : at + size], parts, head, caches, at)
            conditional, unconditional = logits.chunk(2)
            guidance = self.guidance * level / (len(model.sizes) - 1)
            codes.append(torch.lerp(unconditional, conditional, 1 + guidance).argmax(-1))
            latents = latents + table.contribution(codes[-1], level)
            at += size
        return torch.cat(codes, 1), self.pixels(latents.contiguous(memory_format=self.format))

    def check(self):
        codes, images = self.run()
        return {"codes": codes, "images": images}


class Forward(Task):
    def open(self, row, folder, variant):
        self.model.eval()
        table = quantizer(row["model"])
        table.load_state_dict(files.load(folder, "quantizer"))
        self.table, self.work = table.eval(), files.compiled(self.model, variant)

    @torch.inference_mode()
    def run(self):
        return self.work(self.classes, self.table.known_before(self.codes))

    def check(self):
        return {"logits": self.run()}


class Train(Task):
    def open(self, row, folder, variant):
        table = quantizer(row["model"])
        table.load_state_dict(files.load(folder, "quantizer"))
        table.requires_grad_(False)
        work = files.compiled(self.model, variant)

        def loss():
            logits = work(self.classes, table.known_before(self.codes))
            return F.cross_entropy(logits.flatten(0, 1), self.codes.flatten())

        self.step = transformer.TrainingStep(self.model, loss, row["options"])

    def run(self):
        return self.step.run()

    def check(self):
        return self.step.check(self.model.blocks[0].ffn.fc1.weight)


TASKS = {"image": Image, "forward": Forward, "train": Train}
