"""Checkpoints with all that training programs pickle beside the weights. Run by hand: python odd.py FOLDER, with torch and numpy.

Every file holds the same two tensors below `state_dict`: `encoder.weight` [2, 3] of 0, 0.5, 1, ... and `encoder.bias` [2] of -1 and 2."""
import argparse, collections, datetime, enum, functools, io, pathlib, pickle, random, struct, sys, tarfile, types
import numpy, torch

out = pathlib.Path(sys.argv[1])


def module(name, **names):
    """A module that readers do not have."""
    made = types.ModuleType(name)
    for key, value in names.items():
        value.__module__, value.__qualname__ = name, key
        setattr(made, key, value)
    sys.modules[name] = made


class ModelCheckpoint:
    pass


class AttributeDict(dict):
    def __getattr__(self, key):
        return self[key]


class Stage(enum.Enum):
    FIT = "fit"


class Slots:
    __slots__ = ("a", "b")


class Listed(list):
    pass


def run_me():
    pass


module("lightning_parts", ModelCheckpoint=ModelCheckpoint, AttributeDict=AttributeDict, Stage=Stage, Slots=Slots, Listed=Listed)
module("lightning_calls", run_me=run_me)

weights = collections.OrderedDict()
weights["encoder.weight"] = torch.arange(6).reshape(2, 3) / 2
weights["encoder.bias"] = torch.nn.Parameter(torch.tensor([-1.0, 2.0]))
weights._metadata = collections.OrderedDict([("", {"version": 1})])

hyper = AttributeDict(lr=1e-4, betas=(0.9, 0.999), nested=AttributeDict(a=None, b=[1, {2.5: "x"}]))
hyper.note = "set as an attribute"
slots = Slots()
slots.a, slots.b = 1, torch.ones(1)
listed = Listed([1, torch.zeros(2)])
listed.extra = torch.full((1,), 3.0)
around = {
    "epoch": 1,
    "pytorch-lightning_version": "1.0.8",
    "callbacks": {ModelCheckpoint: {"best_model_path": pathlib.PurePosixPath("a/b"), "best": torch.tensor(0.25)}},
    "hyper_parameters": hyper,
    "filled": collections.defaultdict(list, {"a": [1], 3: [2]}),
    "queue": collections.deque([1, 2, {"t": torch.ones(1)}], maxlen=5),
    "keys": {None: 1, 1.5: 2, (1, "a"): torch.ones(3), b"bytes": 4, True: 5, frozenset([1]): 6, Stage.FIT: 7, 10**30: 8},
    "sets": [{1, 2}, frozenset({"a"})],
    "numpy": [numpy.float64(0.5), numpy.arange(4), numpy.dtype("float32")],
    "times": [datetime.datetime(2020, 1, 2), datetime.timedelta(1), datetime.timezone.utc],
    "torch": [torch.Size([1, 2]), torch.device("cpu"), torch.float16, torch.zeros(8, dtype=torch.uint8)],
    "args": argparse.Namespace(width=3, mean=torch.ones(2), inner=argparse.Namespace(x=1)),
    "calls": [functools.partial(run_me, 1, b=2), run_me, len, slice(1, 2, 3), range(3), complex(1, 2), Ellipsis, NotImplemented],
    "random": random.Random(0).getstate()[1][:9],
    "large": [2**70, -(2**70), 2**31, -(2**40), bytearray(b"abc")],
    "slots": slots,
    "listed": listed,
    "counter": collections.Counter("aab"),
    "sparse": torch.eye(2).to_sparse(),
    "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2, 3)}}, "param_groups": [{"params": [0]}]}],
    "state_dict": weights,
}
around["itself"] = around
around["loops"] = [around]

for protocol in (2, 4):
    torch.save(around, out / f"odd-{protocol}.ckpt", pickle_protocol=protocol)
torch.save(around, out / "odd-legacy.ckpt", _use_new_zipfile_serialization=False)


def tar():
    """The form before 2017, which PyTorch still reads and no longer writes: torch.load is asked whether it is right."""
    storage = torch.FloatStorage([7, 0, 0.5, 1, 1.5, 2, 2.5, -1, 2])
    tensors = {11: ([2, 3], [3, 1], 1), 12: ([2], [1], 0)}
    tables = {name: io.BytesIO() for name in ("sys_info", "storages", "tensors", "pickle")}
    dump = lambda name, value: pickle.dump(value, tables[name], protocol=2)
    dump("sys_info", {"protocol_version": 1000, "little_endian": True, "type_sizes": {"int": 4}})
    dump("storages", 1)
    dump("storages", (5, "cpu", torch.FloatStorage))
    tables["storages"].write(struct.pack("<q", 9) + struct.pack("<9f", *storage.tolist()))
    dump("storages", [(6, 5, 7, 2)])
    dump("tensors", len(tensors))
    for key, (shape, stride, offset) in tensors.items():
        dump("tensors", (key, 5 if key == 11 else 6, torch.FloatTensor))
        numbers = [len(shape), *shape, *stride, offset]
        tables["tensors"].write(struct.pack(f"<{len(numbers)}q", *numbers))

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return int(value[1:]) if isinstance(value, str) and value[:1] == "@" else None

    Pickler(tables["pickle"], protocol=2).dump({"state_dict": collections.OrderedDict([("encoder.weight", "@11"), ("encoder.bias", "@12")])})
    with tarfile.open(out / "odd-tar.ckpt", "w", format=tarfile.USTAR_FORMAT) as file:
        for name, table in tables.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(table.getvalue())
            file.addfile(entry, io.BytesIO(table.getvalue()))
    read = torch.load(out / "odd-tar.ckpt", weights_only=False)["state_dict"]
    assert all(torch.equal(read[name], weights[name]) for name in weights)


tar()
