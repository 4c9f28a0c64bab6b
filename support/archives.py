"""Files of torch.save and torch.jit.save: whole by their checksums, and nothing that is in them is run.

support/weights.py and support/foreign.py read other people's files with load_foreign() and load_torchscript(),
support/runs.py the files of runs with load_tensors(). What is no tensor and no plain value of Python comes as a
StandIn, which can do nothing.
"""

import errno
import io
import pickle
import zipfile
from collections import OrderedDict
from types import SimpleNamespace

import torch


def load_tensors(path):
    """A file of torch.save with tensors and plain values alone. It is an error if it is another, or damaged."""
    require_checksums(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def require_checksums(path):
    """ValueError if a byte of the archive was changed: torch.load does not test its checksums."""
    with zipfile.ZipFile(path) as archive:
        if has_checksums(archive):
            damaged = archive.testzip()
            if damaged:
                raise ValueError(f"{damaged} is damaged")


def has_checksums(archive):
    """torch.save can be told to leave them out, for speed. All are 0 then."""
    return any(record.CRC for record in archive.infolist())


def is_torchscript(path):
    """Whether it is what torch.jit.save wrote, such as OpenAI's archives."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def load_torchscript(path):
    """-> {name: tensor}, all in the modules of such an archive. The code beside them is not read."""
    return dict(named_tensors(read_archive(path)))


def named_tensors(module, prefix=""):
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(value, SimpleNamespace):
            yield from named_tensors(value, f"{prefix}{name}.")


def load_foreign(path):
    """A file of torch.save of any origin. Where torch.load refuses an object in it, a StandIn takes its place."""
    is_archive = zipfile.is_zipfile(path)  # no file of PyTorch before 1.6 is
    if is_archive:
        require_checksums(path)
        with zipfile.ZipFile(path) as archive:
            root_of(archive)
    try:
        with open(path, "rb") as file:  # of a path torch.load would ask the ending what it is
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return read_archive(path) if is_archive else read_old(path)
    except OSError as error:
        if error.errno == errno.EINVAL:  # torch.load looks for the end of the archive in front of the file
            raise ValueError("it is cut off") from error
        raise


# ---- With stand-ins ----


class StandIn:
    """In place of an object of a class that a file names, or of what a function that it names would return."""

    def __new__(cls, *_, **__):
        return object.__new__(cls)

    def __init__(self, *_, **__):
        pass

    def ignore(self, *_, **__):
        pass

    __call__ = __setstate__ = __setitem__ = append = extend = add = ignore  # what a pickle does with what it makes


def rebuild_tensor(storage, offset, size, stride, *_):
    return torch.as_strided(storage, size, stride, storage.storage_offset() + offset)


OLD_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
DTYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}
KNOWN = {  # all that a file can call
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): rebuild_tensor, ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
} | {(module, f"{kind}Storage"): dtype for module in ("torch", "torch.cuda") for kind, dtype in DTYPES.items()}


class Reader(pickle.Unpickler):
    """One pickle of a file. storage(key, dtype, count) -> tensor (count,), the numbers that stand outside of it."""

    def __init__(self, file, storage=None):
        super().__init__(file)
        self.storage = storage

    def find_class(self, module, name):
        if module.startswith("__torch__"):  # a module in TorchScript
            return SimpleNamespace
        return KNOWN.get((module, name)) or type(name, (StandIn,), {"__module__": module})

    def persistent_load(self, record):
        if record[0] != "storage":  # "module", class, source file, source: old files have it with a pickled module
            return record[1]
        _, dtype, key, _, count, *view = record
        whole = self.storage(key, dtype, count)
        if view and view[0]:  # old files may name a part of a storage
            _, offset, count = view[0]
            return whole[offset : offset + count]
        return whole


def read_archive(path):
    """What both write: a zip archive with a pickle, and a record for each storage."""
    with zipfile.ZipFile(path) as archive:
        if not has_checksums(archive):
            for record in archive.infolist():
                record.CRC = None  # nothing to be compared
        root = root_of(archive)

        def storage(key, dtype, _):
            return numbers(archive.read(f"{root}data/{key}"), dtype)

        return Reader(io.BytesIO(archive.read(f"{root}data.pkl")), storage).load()


def root_of(archive):
    """-> the folder in the archive, with its slash. ValueError if torch.save did not write it."""
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"an archive with {len(pickles)} files data.pkl, unpack other archives first")
    return pickles[0].removesuffix("data.pkl")


def read_old(path):
    """What it wrote before PyTorch 1.6: three pickles, that of the object, that of a list of keys, the storages."""
    with open(path, "rb") as file:
        if not file.peek().startswith(OLD_START):
            raise ValueError("it is no file of torch.save")
        for _ in range(3):  # a number, the version, the machine's sizes
            Reader(file).load()
        storages = {}

        def storage(key, dtype, count):  # filled below, behind the object that is made of it
            return storages.setdefault(key, torch.zeros(count, dtype=dtype))

        content = Reader(file, storage).load()
        for key in Reader(file).load():
            count, filled = int.from_bytes(file.read(8), "little"), storages[key]
            raw = file.read(filled.nbytes)
            if count != len(filled) or len(raw) != filled.nbytes:
                raise ValueError("it is cut off")
            filled.copy_(numbers(raw, filled.dtype))
        return content


def numbers(content, dtype):
    return torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.zeros(0, dtype=dtype)


def class_of(stand_in):
    """-> "torch.optim.sgd.SGD", what a StandIn stands for."""
    return f"{type(stand_in).__module__}.{type(stand_in).__qualname__}"
