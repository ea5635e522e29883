"""VQGAN's autoencoder (arXiv 2012.09841) in plain modules, with the parameter names of its public checkpoints."""

import torch
import torch.nn.functional as F
from torch import nn

import files

EPSILON = 1e-6
GROUPS = 32


class Norm(nn.GroupNorm):
    def __init__(self, channels, groups=GROUPS):
        super().__init__(min(groups, channels), channels, eps=EPSILON)


class Residual(nn.Module):
    def __init__(self, inputs, outputs, groups=GROUPS):
        super().__init__()
        self.norm1 = Norm(inputs, groups)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = Norm(outputs, groups)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, channels, groups=GROUPS):
        super().__init__()
        self.norm = Norm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        b, c, h, w = x.shape
        n = self.norm(x)
        q, k, v = (conv(n).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(mixed.squeeze(1).transpose(1, 2).reshape(b, c, h, w))


class Down(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    def __init__(self, inputs, outputs, blocks, attends, groups):
        super().__init__()
        self.block = nn.ModuleList(Residual(inputs if i == 0 else outputs, outputs, groups) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(outputs, groups) for _ in range(blocks if attends else 0))

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.block_1 = Residual(channels, channels, groups)
        self.attn_1 = Attention(channels, groups)
        self.block_2 = Residual(channels, channels, groups)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


def levels(c):
    widths = [c["ch"] * mult for mult in c["ch_mult"]]
    attends = [(c["image_size"] >> level) in c["attn_resolutions"] for level in range(len(widths))]
    return widths, attends, c.get("norm_groups", GROUPS)


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        widths, attends, groups = levels(c)
        self.conv_in = nn.Conv2d(3, c["ch"], 3, padding=1)
        self.down = nn.ModuleList()
        inputs = c["ch"]
        for i, (width, attend) in enumerate(zip(widths, attends)):
            level = Level(inputs, width, c["num_res_blocks"], attend, groups)
            if i + 1 < len(widths):
                level.downsample = Down(width)
            self.down.append(level)
            inputs = width
        self.mid = Middle(inputs, groups)
        self.norm_out = Norm(inputs, groups)
        self.conv_out = nn.Conv2d(inputs, c["z_channels"], 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        widths, attends, groups = levels(c)
        inputs = widths[-1]
        self.conv_in = nn.Conv2d(c["z_channels"], inputs, 3, padding=1)
        self.mid = Middle(inputs, groups)
        up = []
        for i in reversed(range(len(widths))):
            level = Level(inputs, widths[i], c["num_res_blocks"] + 1, attends[i], groups)
            if i > 0:
                level.upsample = Up(widths[i])
            up.insert(0, level)
            inputs = widths[i]
        self.up = nn.ModuleList(up)
        self.norm_out = Norm(inputs, groups)
        self.conv_out = nn.Conv2d(inputs, 3, 3, padding=1)

    def features(self, z):
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return F.silu(self.norm_out(x))

    def forward(self, z):
        return self.conv_out(self.features(z))


class Codebook(nn.Module):
    def __init__(self, codes, channels):
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)

    def nearest(self, z):
        rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        table = self.embedding.weight
        distances = torch.addmm(table.square().sum(1), rows, table.t(), alpha=-2.0)
        return distances.argmin(1).view(z.shape[0], -1)

    def lookup(self, codes, side):
        b = codes.shape[0]
        return self.embedding(codes).view(b, side, side, -1).permute(0, 3, 1, 2)


class Vqgan(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.side = c["image_size"] >> (len(c["ch_mult"]) - 1)
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.quantize = Codebook(c["quantizer"]["codes"], c["embed_dim"])
        self.quant_conv = nn.Conv2d(c["z_channels"], c["embed_dim"], 1)
        self.post_quant_conv = nn.Conv2d(c["embed_dim"], c["z_channels"], 1)

    def latents(self, images):
        return self.quant_conv(self.encoder(images))

    def encode(self, images):
        return self.quantize.nearest(self.latents(images))

    def decode(self, codes):
        return self.decoder(self.post_quant_conv(self.quantize.lookup(codes, self.side)))


def fresh(c):
    """A model whose latents and codes have about the same size."""
    model = Vqgan(c)
    with torch.no_grad():
        model.quantize.embedding.weight.normal_(0.0, 0.3)
    return model


class Inference:
    """What encoding and decoding share."""

    @staticmethod
    def prepare(row, folder):
        c, b = row["model"], row["batch"]
        model = fresh(c)
        files.save(folder, "weights", model.state_dict())
        size = c["image_size"]
        smooth = F.interpolate(torch.rand(b, 3, 16, 16) * 2 - 1, size=(size, size), mode="bicubic")
        images = (smooth + 0.1 * torch.randn(b, 3, size, size)).clamp(-1, 1)
        codes = torch.randint(0, c["quantizer"]["codes"], (b, model.side**2))
        files.save(folder, "inputs", {"images": images, "codes": codes})

    def __init__(self, row, folder, variant):
        self.model = Vqgan(row["model"])
        self.model.load_state_dict(files.load(folder, "weights"))
        self.model.eval()
        self.inputs = files.load(folder, "inputs")
        if "channels_last" in variant:
            self.model.to(memory_format=torch.channels_last)
            self.inputs["images"] = self.inputs["images"].to(memory_format=torch.channels_last)
        self.work = files.compiled(self.function(), variant)

    @torch.inference_mode()
    def run(self):
        return self.work(self.inputs[self.INPUT])


class Encode(Inference):
    INPUT = "images"

    def function(self):
        return self.model.encode

    @torch.inference_mode()
    def check(self):
        return {"latents": self.model.latents(self.inputs["images"]), "codes": self.run()}


class Decode(Inference):
    INPUT = "codes"

    def function(self):
        return self.model.decode

    def check(self):
        return {"images": self.run()}


TASKS = {"encode": Encode, "decode": Decode}
