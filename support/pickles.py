"""Files of torch.save that hold more than tensors, read without running anything of them.

support/foreign.py calls read_file() for what others have saved. Tensors and containers are built, and a StandIn takes
the place of every other object. A file that cannot be read ends in one sentence that names it.
"""

import io
import pickle
import zipfile
from collections import OrderedDict

import torch

from clip_min import UserError


class StandIn:
    """Stands for an object of an unknown class: it takes whatever a pickle gives it, and does nothing."""

    def __new__(cls, *_, **__):
        return object.__new__(cls)

    def __init__(self, *_, **__):
        pass

    def do_nothing(self, *_, **__):
        pass

    __call__ = __setstate__ = __setitem__ = append = extend = add = do_nothing


def strided(storage, offset, size, stride, *_):
    return torch.as_strided(storage, size, stride, storage.storage_offset() + offset)


DTYPES = dict(
    Double=torch.float64, Float=torch.float32, Half=torch.float16, BFloat16=torch.bfloat16, Long=torch.int64,
    Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8, Bool=torch.bool)
KNOWN = {("collections", "OrderedDict"): OrderedDict, ("torch._utils", "_rebuild_tensor"): strided,
         ("torch._utils", "_rebuild_tensor_v2"): strided,
         ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor}
for module in "torch", "torch.cuda":  # old files tell on which device a storage was
    KNOWN |= {(module, f"{name}Storage"): dtype for name, dtype in DTYPES.items()}


class Reader(pickle.Unpickler):
    """One pickle of a file. Its tensors are views of storages, which stand outside of the pickle."""

    def __init__(self, file, storage=None):
        """storage: called with a key, the dtype and the number of elements -> a tensor (number,)."""
        super().__init__(file)
        self.storage = storage

    def find_class(self, module, name):  # nothing but what is known, whatever the file asks for
        return KNOWN.get((module, name), StandIn)

    def persistent_load(self, record):
        if record[0] != "storage":  # the class of a module, in old files
            return StandIn
        _, dtype, key, _, count, *view = record
        whole = self.storage(key, dtype, count)
        if view and view[0]:  # old files may name a part of a storage
            _, offset, count = view[0]
            return whole[offset : offset + count]
        return whole


def read_file(path):
    """-> what torch.save was given, with a StandIn for each object that is neither a tensor nor a container."""
    try:
        with open(path, "rb") as file:
            is_archive = file.read(4) == b"PK\3\4"
            file.seek(0)
            return read_archive(zipfile.ZipFile(file)) if is_archive else read_old(file)
    except Exception as error:  # any file can stand there
        if getattr(error, "errno", None):  # the machine's trouble, not the file's
            raise UserError(f"{path} cannot be read ({error.strerror}): see to it, or give another file.") from error
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:100].rstrip(".")
        raise UserError(f"{path} is no whole file of torch.save ({detail}): copy or download it again.") from error


def read_archive(archive):
    """What torch.save writes since PyTorch 1.6. Reading a whole member of the archive tests its checksum."""
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"an archive with {len(pickles)} files data.pkl, unpack other archives first")
    root = pickles[0].removesuffix("data.pkl")

    def storage(key, dtype, _):
        return numbers(archive.read(f"{root}data/{key}"), dtype)

    return Reader(io.BytesIO(archive.read(f"{root}data.pkl")), storage).load()


def read_old(file):
    """What it wrote before: a mark, a version, the sizes of numbers, the object, a list of keys, and the storages."""
    if Reader(file).load() != 0x1950A86A20F9469CFC6C:
        raise ValueError("it does not begin like one")
    Reader(file).load(), Reader(file).load()
    storages = {}

    def storage(key, dtype, count):  # filled below, where the numbers stand
        return storages.setdefault(key, torch.zeros(count, dtype=dtype))

    content = Reader(file, storage).load()
    for key in Reader(file).load():
        filled, count = storages[key], int.from_bytes(file.read(8), "little")
        raw = file.read(filled.nbytes)
        if count != len(filled) or len(raw) != filled.nbytes:
            raise ValueError("it is cut off")
        filled.copy_(numbers(raw, filled.dtype))
    return content


def numbers(raw, dtype):
    """Bytes -> a tensor (number,), also of none."""
    return torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.zeros(0, dtype=dtype)
