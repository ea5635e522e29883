"""Training a VQGAN with its discriminator and LPIPS: losses and order of arXiv 2012.09841's public code.

Two ways to the same gradients. `official`: the norms of the adaptive weight come from two extra backward passes through the
loss networks. `once`: each loss goes back to the reconstruction once, and their weighted sum on through the autoencoder.
"""

import torch
import torch.nn.functional as F
from torch import nn

import files
import vqgan

CONVOLUTIONS = [[0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]]
WIDTHS = [64, 128, 256, 512, 512]
SHIFT, SCALE = [-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]
BETA = 0.25


class Lpips(nn.Module):
    """VGG16 up to its five taps, and a weight for each channel."""

    def __init__(self):
        super().__init__()
        self.net, inputs = nn.Module(), 3
        for i, (layers, width) in enumerate(zip(CONVOLUTIONS, WIDTHS)):
            piece = nn.Module()
            for layer in layers:
                piece.add_module(str(layer), nn.Conv2d(inputs, width, 3, padding=1))
                inputs = width
            self.net.add_module(f"slice{i + 1}", piece)
            head = nn.Module()
            head.model = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{i}", head)
        self.register_buffer("shift", torch.tensor(SHIFT)[None, :, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[None, :, None, None], persistent=False)

    def features(self, x):
        x = (x - self.shift) / self.scale
        for i, layers in enumerate(CONVOLUTIONS):
            x = F.max_pool2d(x, 2) if i else x
            for layer in layers:
                x = F.relu(getattr(getattr(self.net, f"slice{i + 1}"), str(layer))(x))
            yield x

    def forward(self, images, rec):
        with torch.no_grad():
            wanted = [unit(x) for x in self.features(images)]
        distance = 0.0
        for i, (a, b) in enumerate(zip(wanted, self.features(rec))):
            head = getattr(self, f"lin{i}").model[1]
            distance = distance + head((a - unit(b)).square()).mean((1, 2, 3))
        return distance.mean()


def unit(x):
    return x / ((x.square().sum(1, keepdim=True) + 1e-20).sqrt() + 1e-10)


def discriminator(ndf, layers):
    parts = [nn.Conv2d(3, ndf, 4, 2, 1), nn.LeakyReLU(0.2)]
    inputs = ndf
    for n in range(1, layers + 1):
        width = ndf * min(2**n, 8)
        stride = 2 if n < layers else 1
        parts += [nn.Conv2d(inputs, width, 4, stride, 1, bias=False), nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
        inputs = width
    model = nn.Module()
    model.main = nn.Sequential(*parts, nn.Conv2d(inputs, 1, 4, 1, 1))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
    return model


def networks(row):
    o = row["options"]
    lpips = Lpips()
    with torch.no_grad():
        # Activations keep their size, and each channel counts.
        for name, value in lpips.named_parameters():
            if ".model." in name:
                value.uniform_(0.0, 2.0 / value.numel())
            elif value.dim() == 4:
                nn.init.kaiming_normal_(value)
            else:
                value.normal_(0.0, 0.02)
    return vqgan.fresh(row["model"]), discriminator(o["ndf"], o["layers"]), lpips


PREFIXES = ["", "loss.discriminator.", "loss.perceptual_loss."]


class Step:
    @staticmethod
    def prepare(row, folder):
        tensors = {}
        for prefix, network in zip(PREFIXES, networks(row)):
            tensors |= {prefix + name: value for name, value in network.state_dict().items()}
        files.save(folder, "weights", tensors)
        size = row["model"]["image_size"]
        smooth = F.interpolate(torch.rand(row["batch"], 3, 8, 8) * 2 - 1, size=(size, size), mode="bicubic")
        files.save(folder, "inputs", {"images": (smooth + 0.1 * torch.randn_like(smooth)).clamp(-1, 1)})

    def __init__(self, row, folder, variant):
        o, tensors = row["options"], files.load(folder, "weights")
        self.model, self.discriminator, self.lpips = networks(row)
        for prefix, network in zip(PREFIXES, (self.model, self.discriminator, self.lpips)):
            names = network.state_dict()
            network.load_state_dict({name: tensors[prefix + name] for name in names})
        self.lpips.eval().requires_grad_(False)
        self.images = files.load(folder, "inputs")["images"]
        if "channels_last" in variant:
            for network in (self.model, self.discriminator, self.lpips):
                network.to(memory_format=torch.channels_last)
            self.images = self.images.to(memory_format=torch.channels_last)
        self.weight = o["adversarial_weight"]
        adam = lambda network: torch.optim.Adam(
            network.parameters(), lr=o["learning_rate"], betas=tuple(o["betas"]), eps=1e-8, fused=True
        )
        self.optimizer, self.discriminator_optimizer = adam(self.model), adam(self.discriminator)
        self.step = self.official if variant.startswith("official") else self.once

    def forward(self):
        z = self.model.latents(self.images)
        with torch.no_grad():
            codes = self.model.quantize.nearest(z)
        q = self.model.quantize.lookup(codes, self.model.side)
        # The released models' weighting: beta on the codes' side.
        codebook = (q.detach() - z).square().mean() + BETA * (q - z.detach()).square().mean()
        features = self.model.decoder.features(self.model.post_quant_conv(z + (q - z).detach()))
        return features, codebook

    def likelihood(self, rec):
        return (self.images - rec).abs().mean() + self.lpips(self.images, rec)

    def balance(self, of_likelihood, of_discriminator):
        weight = of_likelihood.norm() / (of_discriminator.norm() + 1e-4)
        return weight.clamp(0.0, 1e4).detach() * self.weight

    def official(self):
        last = self.model.decoder.conv_out
        features, codebook = self.forward()
        rec = last(features)
        nll = self.likelihood(rec)
        generator = -self.discriminator.main(rec).mean()
        gradient = lambda loss: torch.autograd.grad(loss, last.weight, retain_graph=True)[0]
        weight = self.balance(gradient(nll), gradient(generator))
        total = nll + weight * generator + codebook
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        return rec.detach(), total.detach(), weight

    def once(self):
        last = self.model.decoder.conv_out
        features, codebook = self.forward()
        rec = last(features)
        leaves = [rec.detach().requires_grad_() for _ in range(2)]
        nll, generator = self.likelihood(leaves[0]), -self.discriminator.main(leaves[1]).mean()
        upstream = [torch.autograd.grad(loss, leaf)[0] for loss, leaf in zip((nll, generator), leaves)]
        at_last = [torch.autograd.grad(rec, last.weight, up, retain_graph=True)[0] for up in upstream]
        weight = self.balance(*at_last)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward([rec, codebook], [upstream[0] + weight * upstream[1], torch.ones_like(codebook)])
        return rec.detach(), (nll + weight * generator + codebook).detach(), weight

    def run(self):
        rec, total, weight = self.step()
        self.optimizer.step()
        real, fake = self.discriminator.main(self.images), self.discriminator.main(rec)
        loss = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.discriminator_optimizer.step()
        return total, weight, loss.detach()

    def check(self):
        watched = self.model.decoder.up[0].block[0].conv1.weight
        before = watched.detach().clone()
        total, weight, discriminator_loss = self.run()
        one = lambda value: value.reshape(1)
        return {
            "loss": one(total),
            "adversarial_weight": one(weight),
            "discriminator_loss": one(discriminator_loss),
            "gradient": watched.grad,
            "update": watched.detach() - before,
        }


TASKS = {"step": Step}
