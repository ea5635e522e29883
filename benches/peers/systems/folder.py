"""A folder of images to token files: PIL and a DataLoader, encoding in batches, one file of tokens."""

import numpy
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import files
import vqgan


class Folder(Dataset):
    """The shorter side resized, the middle cut out, to -1..1."""

    def __init__(self, folder, size):
        self.paths, self.size = sorted(folder.iterdir()), size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = Image.open(self.paths[index]).convert("RGB")
        w, h = image.size
        short, size = min(w, h), self.size
        image = image.resize((int(w * size / short), int(h * size / short)), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        pixels = numpy.array(image.crop((left, top, left + size, top + size)))
        return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def picture(rng, index):
    """Smooth colours with some grain, like a photograph to a decoder."""
    h, w = (int(rng.integers(300, 700)) for _ in range(2))
    base = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=numpy.uint8)).resize((w, h), Image.Resampling.BICUBIC)
    grain = rng.normal(0.0, 6.0, (h, w, 1))
    return Image.fromarray((numpy.asarray(base) + grain).clip(0, 255).astype(numpy.uint8))


class Tokenize:
    @staticmethod
    def prepare(row, folder):
        files.save(folder, "weights", vqgan.fresh(row["model"]).state_dict())
        images = folder / "images"
        images.mkdir(exist_ok=True)
        rng = numpy.random.default_rng(20260101)
        for i in range(row["options"]["images"]):
            kind = "jpg" if i % 2 else "png"
            picture(rng, i).save(images / f"{i:04}.{kind}", **({"quality": 90} if kind == "jpg" else {}))

    def __init__(self, row, folder, variant):
        self.row, self.folder = row, folder
        workers, self.channels_last = int(variant.split()[0]), "channels_last" in variant
        # Workers are started anew, since a fork of a process whose threads have computed can hang, and once for all runs.
        kept = {"persistent_workers": True, "multiprocessing_context": "spawn"} if workers else {}
        images = Folder(folder / "images", row["model"]["image_size"])
        self.loader = DataLoader(images, batch_size=row["batch"], num_workers=workers, **kept)

    @torch.inference_mode()
    def run(self):
        c = self.row["model"]
        model = vqgan.Vqgan(c)
        model.load_state_dict(files.load(self.folder, "weights"))
        model.eval()
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        codes = torch.cat([model.encode(self.ordered(batch)) for batch in self.loader])
        files.save(self.folder, "torch-tokens", {"codes": codes.int()})
        return codes

    def ordered(self, batch):
        return batch.to(memory_format=torch.channels_last) if self.channels_last else batch

    def check(self):
        codes = self.run()
        return {"png_codes": codes[0::2], "jpeg_codes": codes[1::2]}


TASKS = {"tokenize": Tokenize}
