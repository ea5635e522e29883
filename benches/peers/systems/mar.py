"""MAR (arXiv 2406.11838): masked autoregression over vectors with a diffusion loss, with the names of its public checkpoints."""

import math

import numpy
import torch
import torch.nn.functional as F
from torch import nn

import files
import transformer

EPSILON = 1e-6
TIME = 256
# Half the width of a level of values in -1..1.
HALF = 1 / 255


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=EPSILON) for _ in range(2))
        self.attn = transformer.SelfAttention(width, heads)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class DenoiserBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, active):
        shift, scale, gate = self.adaLN_modulation[1](active).chunk(3, -1)
        h = self.mlp(torch.addcmul(shift, self.in_ln(x), scale + 1))
        return torch.addcmul(x, gate, h)


class Denoiser(nn.Module):
    """Predicts noise and variance of a noisy vector."""

    def __init__(self, channels, condition, width, depth):
        super().__init__()
        self.time_embed = nn.Module()
        self.time_embed.mlp = nn.Sequential(nn.Linear(TIME, width), nn.SiLU(), nn.Linear(width, width))
        self.cond_embed, self.input_proj = nn.Linear(condition, width), nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(DenoiserBlock(width) for _ in range(depth))
        self.final_layer = nn.Module()
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.final_layer.linear = nn.Linear(width, 2 * channels)

    def time(self, t):
        frequencies = torch.exp(torch.arange(TIME // 2) * (-math.log(10000) / (TIME // 2)))
        angles = t[:, None].float() * frequencies
        return self.time_embed.mlp(torch.cat([angles.cos(), angles.sin()], -1))

    def run(self, noisy, y):
        """From the sum of the embedded time and condition. All layers need its activation, which is computed once."""
        x, active = self.input_proj(noisy), F.silu(y)
        for block in self.res_blocks:
            x = block(x, active)
        shift, scale = self.final_layer.adaLN_modulation[1](active).chunk(2, -1)
        return self.final_layer.linear(torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPSILON), scale + 1))

    def forward(self, noisy, t, z):
        return self.run(noisy, self.time(t) + self.cond_embed(z))


class Diffusion:
    """The tables of a diffusion with a cosine schedule, computed in double precision."""

    def __init__(self, steps, kept=None):
        left = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = numpy.array([min(1 - left[i + 1] / left[i], 0.999) for i in range(steps)])
        self.timesteps = list(range(steps))
        if kept:
            self.timesteps = [round(i * (steps - 1) / (kept - 1)) for i in range(kept)]
            product = numpy.cumprod(1 - betas)[self.timesteps]
            betas = 1 - product / numpy.concatenate([[1.0], product[:-1]])
        product = numpy.cumprod(1 - betas)
        before = numpy.concatenate([[1.0], product[:-1]])
        variance = betas * (1 - before) / (1 - product)
        least = numpy.log(numpy.concatenate([variance[1:2], variance[1:]]))
        table = lambda values: torch.from_numpy(values).float()
        self.signal, self.noise = table(numpy.sqrt(product)), table(numpy.sqrt(1 - product))
        self.of_noisy, self.of_noise = table(numpy.sqrt(1 / product)), table(numpy.sqrt(1 / product - 1))
        self.mean_clean = table(betas * numpy.sqrt(before) / (1 - product))
        self.mean_noisy = table((1 - before) * numpy.sqrt(1 - betas) / (1 - product))
        self.least = table(least)
        self.half, self.middle = table((numpy.log(betas) - least) / 2), table((numpy.log(betas) + least) / 2)

    def reverse(self, noisy, t, output):
        """Mean and logarithm of the variance of a step back."""
        noise, share = output.chunk(2, -1)
        clean = noisy * self.of_noisy[t] - noise * self.of_noise[t]
        mean = clean * self.mean_clean[t] + noisy * self.mean_noisy[t]
        return mean, share * self.half[t] + self.middle[t]

    def loss(self, clean, noisy, t, noise, output):
        """Error of the noise, and the variational bound, by which only the variance learns; `t` is `[n, 1]`."""
        found, share = output.chunk(2, -1)
        error = (found - noise).square().mean(-1)
        mean, variance = self.reverse(noisy, t, torch.cat([found.detach(), share], -1))
        true = clean * self.mean_clean[t] + noisy * self.mean_noisy[t]
        least = self.least[t]
        distance = (true - mean).square() * (-variance).exp()
        divergence = 0.5 * (variance - least - 1 + (least - variance).exp() + distance)
        bound = torch.where(t == 0, -level_log_likelihood(clean, mean, 0.5 * variance), divergence)
        return (error + bound.mean(-1) / math.log(2)).mean()


def level_log_likelihood(values, mean, deviation):
    """Of values under a normal distribution that is cut into levels, the outer ones without end."""
    below = lambda x: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    log = lambda x: x.clamp_min(1e-12).log()
    centred, inverse = values - mean, (-deviation).exp()
    upper, lower = below((centred + HALF) * inverse), below((centred - HALF) * inverse)
    inside = torch.where(values > 0.999, log(1 - lower), log(upper - lower))
    return torch.where(values < -0.999, log(upper), inside)


class Mar(nn.Module):
    def __init__(self, c):
        super().__init__()
        encoder, decoder, grid = c["encoder"], c["decoder"], c["tokens"]["layout"]
        width, wider = encoder["width"], decoder["width"]
        self.length, self.buffer, self.channels = grid["h"] * grid["w"], c["buffer"], c["tokens"]["channels"]
        self.class_emb = nn.Embedding(c["condition"]["classes"], width)
        self.fake_latent = nn.Parameter(torch.zeros(1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, wider))
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, self.buffer + self.length, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, self.buffer + self.length, wider))
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, self.length, wider))
        self.z_proj, self.z_proj_ln = nn.Linear(self.channels, width), nn.LayerNorm(width, eps=EPSILON)
        self.encoder_blocks = nn.ModuleList(Block(width, encoder["heads"]) for _ in range(encoder["depth"]))
        self.encoder_norm = nn.LayerNorm(width, eps=EPSILON)
        self.decoder_embed = nn.Linear(width, wider)
        self.decoder_blocks = nn.ModuleList(Block(wider, decoder["heads"]) for _ in range(decoder["depth"]))
        self.decoder_norm = nn.LayerNorm(wider, eps=EPSILON)
        self.diffloss = nn.Module()
        self.diffloss.net = Denoiser(self.channels, wider, c["diffusion"]["width"], c["diffusion"]["depth"])

    def forward(self, vectors, tokens, visible, wanted):
        """What the denoiser is told of the wanted places, `[b, wanted, d]`, from vectors of the condition and the visible tokens;
        both lists hold as many ascending places of each image."""
        b, buffer = len(vectors), self.buffer
        rows = torch.arange(b)[:, None]
        places = self.encoder_pos_embed_learned[0]
        x = vectors[:, None] + places[:buffer]
        there = self.z_proj(tokens[rows, visible]) + places[buffer + visible]
        x = self.z_proj_ln(torch.cat([x, there], 1))
        for block in self.encoder_blocks:
            x = block(x)
        known = self.decoder_embed(self.encoder_norm(x))
        hidden = self.mask_token.expand(b, self.length, -1)
        hidden = hidden.scatter(1, visible[..., None].expand(-1, -1, hidden.shape[2]), known[:, buffer:])
        x = torch.cat([known[:, :buffer], hidden], 1) + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x[rows, buffer + wanted]) + self.diffusion_pos_embed_learned[0][wanted]


def others(places, length):
    """The places that are not in lists of ascending ones."""
    kept = torch.ones(len(places), length, dtype=torch.bool).scatter_(1, places, False)
    return kept.nonzero()[:, 1].view(len(places), -1)


class Task:
    @staticmethod
    def prepare(row, folder):
        c, b, options = row["model"], row["batch"], row["options"]
        model = transformer.initialise(Mar(c))
        files.save(folder, "weights", model.state_dict())
        length, channels, inputs = model.length, model.channels, {}
        if row["task"] == "decode":
            inputs["orders"] = torch.stack([torch.randperm(length) for _ in range(b)])
            moments = options["diffusion_steps"]
            # By decoding step, moment of the diffusion, image and place.
            inputs["noise"] = torch.randn(options["part"], moments, b, length, channels)
        else:
            masked = options["masked"]
            inputs["masked"] = torch.stack([torch.randperm(length)[:masked].sort().values for _ in range(b)])
            n = c["diffusion"]["repeats"] * b * masked
            inputs["t"] = torch.randint(0, c["diffusion"]["steps"], (n,))
            inputs["noise"] = torch.randn(n, channels)
            inputs["tokens"] = torch.randn(b, length, channels)
        inputs["classes"] = torch.randint(0, c["condition"]["classes"], (b,))
        files.save(folder, "inputs", inputs)

    def __init__(self, row, folder, variant):
        self.model, self.row = Mar(row["model"]), row
        self.model.load_state_dict(files.load(folder, "weights"))
        self.inputs = files.load(folder, "inputs")
        self.classes = self.inputs["classes"]
        self.open(variant)


class Decode(Task):
    """The first steps of filling an image, with guidance."""

    def open(self, variant):
        model, options, diffusion = self.model.eval(), self.row["options"], self.row["model"]["diffusion"]
        self.steps, self.part, self.guidance = options["steps"], options["part"], options["guidance"]
        self.diffusion = Diffusion(diffusion["steps"], options["diffusion_steps"])
        self.predict = files.compiled(model, variant)
        self.denoise = files.compiled(self.reverse, variant)

    def reverse(self, x, t, y, noise, guidance):
        """One step back, with the noise that both halves predict and the variance of the first."""
        n = len(x)
        conditional, unconditional = self.model.diffloss.net.run(x.repeat(2, 1), y).split(n)
        found, share = conditional.chunk(2, -1)
        without = unconditional[:, : found.shape[1]]
        output = torch.cat([without + guidance * (found - without), share], -1)
        mean, variance = self.diffusion.reverse(x, t, output)
        return mean if noise is None else mean + (0.5 * variance).exp() * noise

    def draw(self, z, guidance, noise):
        """Vectors for the conditions `z`; `noise` has that of all moments."""
        condition, x = self.model.diffloss.net.cond_embed(z), noise[0]
        for moment, t in enumerate(reversed(range(len(self.times))), 1):
            step_noise = noise[moment] if t > 0 else None
            x = self.denoise(x, self.places[t], condition + self.times[t], step_noise, guidance)
        return x

    @torch.inference_mode()
    def run(self):
        model, length, b = self.model, self.model.length, len(self.classes)
        self.times = model.diffloss.net.time(torch.tensor(self.diffusion.timesteps))
        self.places = torch.arange(len(self.times))
        vectors = torch.cat([model.class_emb(self.classes), model.fake_latent.expand(b, -1)])
        tokens, orders = torch.zeros(b, length, model.channels), self.inputs["orders"]
        masked, rows = length, torch.arange(b)[:, None]
        for step in range(self.part):
            left = math.floor(length * math.cos(math.pi / 2 * (step + 1) / self.steps))
            left = max(1, min(left, masked - 1))
            visible, wanted = (places.sort(1).values for places in (orders[:, masked:], orders[:, left:masked]))
            z = self.predict(vectors, tokens.repeat(2, 1, 1), visible.repeat(2, 1), wanted.repeat(2, 1))
            guidance = torch.tensor(1 + (self.guidance - 1) * (length - left) / length)
            noise = self.inputs["noise"][step][:, rows, wanted].flatten(1, 2)
            tokens[rows, wanted] = self.draw(z.flatten(0, 1), guidance, noise).view(b, -1, model.channels)
            masked = left
        return tokens

    def check(self):
        return {"tokens": self.run()}


class Teaching(Task):
    """What forward passes and training share: masked places, timesteps and noise."""

    def open(self, variant):
        self.masked, diffusion = self.inputs["masked"], self.row["model"]["diffusion"]
        self.visible, repeats = others(self.masked, self.model.length), diffusion["repeats"]
        self.diffusion = Diffusion(diffusion["steps"])
        targets = self.inputs["tokens"].gather(1, self.masked[..., None].expand(-1, -1, self.model.channels))
        self.clean, self.repeats = targets.flatten(0, 1).repeat(repeats, 1), repeats
        self.t, self.noise = self.inputs["t"][:, None], self.inputs["noise"]
        self.work = files.compiled(self.outputs, variant)
        self.begin()

    def outputs(self, noisy, t):
        """What the denoiser says of noisy tokens in the masked places."""
        model = self.model
        z = model(model.class_emb(self.classes), self.inputs["tokens"], self.visible, self.masked)
        return model.diffloss.net(noisy, t, z.flatten(0, 1).repeat(self.repeats, 1))

    def noisy(self):
        return self.clean * self.diffusion.signal[self.t] + self.noise * self.diffusion.noise[self.t]


class Forward(Teaching):
    def begin(self):
        self.model.eval()

    @torch.inference_mode()
    def run(self):
        return self.work(self.noisy(), self.inputs["t"])

    def check(self):
        return {"output": self.run()}


class Train(Teaching):
    def begin(self):
        def loss():
            noisy = self.noisy()
            return self.diffusion.loss(self.clean, noisy, self.t, self.noise, self.work(noisy, self.inputs["t"]))

        self.step = transformer.TrainingStep(self.model, loss, self.row["options"])

    def run(self):
        return self.step.run()

    def check(self):
        return self.step.check(self.model.decoder_blocks[0].mlp.fc1.weight)


TASKS = {"decode": Decode, "forward": Forward, "train": Train}
