"""Transformer blocks as both generators use them, and how their weights are stored."""

import torch
import torch.nn.functional as F
from torch import nn


class SelfAttention(nn.Module):
    """Queries, keys and values in one product; stored apart."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, causal=False, cache=None, at=0, mask=None):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        if cache is not None:
            keys, values = cache
            if mask is None:
                keys[:, :, at : at + n], values[:, :, at : at + n] = k, v
                k, v = keys[:, :, : at + n], values[:, :, : at + n]
            else:
                k, v = keys.index_copy_(2, at, k), values.index_copy_(2, at, v)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.proj(mixed.transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
    """`after`: norms after each sum, as in BERT; else before each branch, as in GPT-2."""

    def __init__(self, width, heads, epsilon, after, gelu):
        super().__init__()
        self.after, self.gelu = after, gelu
        self.ln1, self.ln2 = (nn.LayerNorm(width, eps=epsilon) for _ in range(2))
        self.attn = SelfAttention(width, heads)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def mlp(self, x):
        return self.out(F.gelu(self.fc(x), approximate=self.gelu))

    def forward(self, x, **attention):
        if self.after:
            x = self.ln1(self.attn(x, **attention) + x)
            return self.ln2(self.mlp(x) + x)
        x = x + self.attn(self.ln1(x), **attention)
        return x + self.mlp(self.ln2(x))


def stored(model):
    """The weights with queries, keys and values apart."""
    tensors = {}
    for name, value in model.state_dict().items():
        if ".qkv." in name:
            for part, piece in zip(("query", "key", "value"), value.chunk(3)):
                tensors[name.replace("qkv", part)] = piece
        else:
            tensors[name] = value
    return tensors


def restore(model, tensors):
    """Takes what `stored` gave."""
    state = {}
    for name in model.state_dict():
        parts = [tensors[name.replace("qkv", part)] for part in ("query", "key", "value")] if ".qkv." in name else None
        state[name] = torch.cat(parts) if parts else tensors[name]
    model.load_state_dict(state)


def initialise(model, deviation=0.02):
    """Normal matrices and tables, small biases, norms near 1: nothing is left at a special value."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1:
                value.normal_(0.0, deviation)
            elif ".ln" in name or "_ln." in name or "norm" in name:
                value.normal_(1.0 if name.endswith("weight") else 0.0, deviation)
            else:
                value.normal_(0.0, deviation)
    return model


def optimizer(model, options):
    """AdamW with decay on the matrices of linear layers only."""
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    decayed = [p for p in model.parameters() if id(p) in matrices]
    others = [p for p in model.parameters() if id(p) not in matrices]
    groups = [{"params": decayed, "weight_decay": options["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options["learning_rate"], betas=tuple(options["betas"]), eps=1e-8, fused=True)


class TrainingStep:
    """Loss, gradients, AdamW. `loss` is a function of the model."""

    def __init__(self, model, loss, options):
        self.model, self.loss = model, loss
        self.optimizer = optimizer(model, options)

    def run(self):
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def check(self, watched):
        """The first step's loss, and how it changed one tensor."""
        before = watched.detach().clone()
        loss = self.run()
        return {"loss": loss.reshape(1), "update": watched.detach() - before}
