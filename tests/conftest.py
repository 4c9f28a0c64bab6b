"""What several tests need: random CLIPs of any size under OpenAI's key names, and OpenAI's own code where installed."""

import functools
import importlib.util
import math
import multiprocessing
import random
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from clip_min import CLIP  # noqa: E402

FORKSERVER = multiprocessing.get_context("forkserver")  # its children have torch loaded, and no threads yet
FORKSERVER.set_forkserver_preload(["train"])
TINY = dict(joint=64, resolution=32, vision_layers=2, vision_width=128, patch=16, text_width=64, text_layers=2)
B32 = dict(joint=512, resolution=224, vision_layers=12, vision_width=768, patch=32, text_width=512, text_layers=12)
B16 = B32 | dict(patch=16)


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU, and is skipped without one")
    # How many seconds a DataLoader that is given up waits for its workers, where it is 5 otherwise.
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 1.0


def call(target, *args):
    """Run a function in a process of its own. -> its exit status."""
    process = FORKSERVER.Process(target=target, args=args)
    process.start()
    process.join(600)
    return process.exitcode


def random_numbers(rng, *shape, std=1.0):
    """Numbers of a random.Random, spread evenly about zero with this standard deviation, the same on every machine.

    torch.randn rounds otherwise on another processor, and what was recorded no longer belongs to the weights.
    """
    numbers = torch.frombuffer(bytearray(rng.randbytes(2 * math.prod(shape))), dtype=torch.int16)
    return numbers.reshape(shape) * (std * 3**0.5 / 2**15)  # spread from -1 to 1 they deviate by 1 / sqrt(3)


def random_state_dict(**sizes):
    """Random weights under OpenAI's keys, on the scale of CLIP's initialisation, so that no layer saturates."""
    return {key: tensor.clone() for key, tensor in drawn_state_dict(**sizes).items()}


@functools.lru_cache(maxsize=8)  # most tests want the same
def drawn_state_dict(
    joint, resolution, vision_layers, vision_width, patch, text_width, text_layers, vocab=49408, seed=0):
    """See random_state_dict."""
    draw = functools.partial(random_numbers, random.Random(seed))

    state = {
        "visual.class_embedding": draw(vision_width, std=vision_width**-0.5),
        "visual.positional_embedding": draw((resolution // patch) ** 2 + 1, vision_width, std=vision_width**-0.5),
        "visual.proj": draw(vision_width, joint, std=vision_width**-0.5),
        "visual.conv1.weight": draw(vision_width, 3, patch, patch, std=(3 * patch * patch) ** -0.5),
        "token_embedding.weight": draw(vocab, text_width, std=0.02),
        "positional_embedding": draw(77, text_width, std=0.01),
        "text_projection": draw(text_width, joint, std=text_width**-0.5),
        "logit_scale": torch.tensor(math.log(100.0)),
    }
    norms = {"visual.ln_pre": vision_width, "visual.ln_post": vision_width, "ln_final": text_width}
    towers = [("visual.transformer", vision_width, vision_layers), ("transformer", text_width, text_layers)]
    for tower, width, layers in towers:
        for i in range(layers):
            block = f"{tower}.resblocks.{i}"
            norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
            linears = {"attn.in_proj_": (3, 1), "attn.out_proj.": (1, 1), "mlp.c_fc.": (4, 1), "mlp.c_proj.": (1, 4)}
            for name, (rows, columns) in linears.items():
                state[f"{block}.{name}weight"] = draw(rows * width, columns * width, std=(columns * width) ** -0.5)
                state[f"{block}.{name}bias"] = draw(rows * width, std=0.02)
    for name, width in norms.items():
        state[f"{name}.weight"] = 1 + draw(width, std=0.1)
        state[f"{name}.bias"] = draw(width, std=0.1)
    return state


@contextmanager
def at_most(calls):
    """The block makes no more calls of functions: a limit that is the same on a slow machine and a busy one.

    It ends at the first call too many, so that work without an end fails as well.
    """
    made = 0

    def count(_, event, __):
        nonlocal made
        made += event in ("call", "c_call")
        if made > calls:
            sys.setprofile(None)
            raise AssertionError(f"more than {calls} calls of functions")

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)
    assert made <= calls, "the error of the first call too many was caught"


def random_clip(**sizes):
    return CLIP.from_state_dict(random_state_dict(**(TINY | sizes)))


@pytest.fixture
def clip():
    """A small random CLIP, new for every test."""
    return random_clip()


@pytest.fixture(params=["fp32", "fp64"])
def precision(request, monkeypatch):
    """The test runs once as the house computes, and once more with every fp32 number of it in double precision.

    A test lists it in front of its CLIP. Pictures that stand in the test's file are cast, too.
    """
    if request.param == "fp64":
        def cast(value):
            if isinstance(value, torch.Tensor):
                return value.double() if value.is_floating_point() else value
            return [cast(item) for item in value]

        for name in ("IMAGES", "VIEWS"):
            if name in vars(request.module):
                monkeypatch.setattr(request.module, name, cast(vars(request.module)[name]))
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        monkeypatch.setattr(torch, "float32", torch.float64)
        torch.set_default_dtype(torch.float64)
    yield request.param
    torch.set_default_dtype(torch.float)


def openai_module(name):
    """OpenAI's "model" or "simple_tokenizer" from PyPI's clip-anytorch, or a skip. Its __init__ imports too much."""
    spec = importlib.util.find_spec("clip")
    if spec is None:
        pytest.skip("clip-anytorch is not installed: pip install clip-anytorch to compare with OpenAI's code")
    path = Path(spec.submodule_search_locations[0]) / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"openai_clip_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def openai_clip(state_dict):
    """OpenAI's CLIP with these weights, fp32, eval()."""
    s = state_dict
    layers = {t: len({k.split(".resblocks.")[1].split(".")[0] for k in s if k.startswith(f"{t}.resblocks.")})
              for t in ("visual.transformer", "transformer")}
    width, _, patch, _ = s["visual.conv1.weight"].shape
    grid = math.isqrt(len(s["visual.positional_embedding"]) - 1)
    vocab, text_width = s["token_embedding.weight"].shape
    model = openai_module("model").CLIP(
        s["text_projection"].shape[1], grid * patch, layers["visual.transformer"], width, patch,
        len(s["positional_embedding"]), vocab, text_width, text_width // 64, layers["transformer"])
    model.load_state_dict(s)
    return model.eval()
